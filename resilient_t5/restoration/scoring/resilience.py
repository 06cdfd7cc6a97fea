"""The resilience curve: how restoration holds out as the damage grows.

Three kinds of damage: masks alone, noise at the run's own mask ratio, and both together. All levels damage the same
examples of the same documents from the same key, so the curve is paired and smooth with few examples: a term that is masked
at one level is masked at every higher one, and with fixed masks so is a token that is noised. (Random spans beside terms
are laid anew where a further term is masked.)

`area` is the mean height of the curve over its span of damage (trapezoids over the levels that were measured).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from resilient_t5.data.batches import EvaluationBatch
from resilient_t5.restoration.scoring.measure import Restorer, measure_restoration
from resilient_t5.restoration.scoring.metrics import Rate, term_restoration

Damage = Literal["masks", "noise", "both"]
DAMAGES: tuple[Damage, ...] = ("masks", "noise", "both")
LEVELS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True)
class Point:
    """One level of damage; `rate` counts nothing where no term is masked."""

    level: float
    rate: Rate
    majority: Rate
    cer: float
    """Character error rate of the restored text; nan when it was not measured."""
    cer_reduction: float
    """1 - CER of the restored over CER of the damaged text; nan where nothing was damaged."""


@dataclass(frozen=True)
class Curve:
    """One kind of damage at rising levels."""

    damage: Damage
    points: tuple[Point, ...]

    @property
    def area(self) -> float:
        """Mean term restoration rate over the levels at which terms were masked; nan with fewer than two."""
        known = [(point.level, point.rate.rate) for point in self.points if point.rate.n]
        if len(known) < 2:
            return math.nan
        pairs = zip(known[:-1], known[1:], strict=True)
        total = sum((right[0] - left[0]) * (left[1] + right[1]) / 2 for left, right in pairs)
        return total / (known[-1][0] - known[0][0])

    def to_json(self) -> dict[str, Any]:
        """All numbers; None where there was nothing to count."""
        return {"damage": self.damage, "area": _number(self.area), "points": [_point_json(point) for point in self.points]}


def ratios(damage: Damage, level: float, mask_ratio: float) -> tuple[float, float]:
    """Mask ratio and noise ratio of one level; no mask at all is a ratio of 0."""
    return {"masks": (level, 0.0), "noise": (mask_ratio, level), "both": (level, level)}[damage]


def measure_curve(
    damage: Damage,
    model: Any,
    batches_at: Callable[[float, float], Sequence[EvaluationBatch]],
    restorer: Restorer,
    mask_ratio: float,
    levels: Sequence[float] = LEVELS,
) -> Curve:
    """Restore the same examples at every level of one kind of damage.

    Args:
        damage: what grows.
        model: as in `measure_restoration`; the caller provides evaluation mode, no_grad and autocast.
        batches_at: the fixed examples under (mask ratio, noise ratio).
        restorer: vocabulary, terms, baselines.
        mask_ratio: the ratio that stays while noise grows.
        levels: shares of the tokens, ascending. A level that masks nothing asks nothing of the model: nothing to restore.
    """
    points = []
    for level in levels:
        masks, noise = ratios(damage, level, mask_ratio)
        if masks == 0.0:
            nothing = term_restoration([])
            points.append(Point(level, nothing, nothing, cer=0.0, cer_reduction=math.nan))
            continue
        batches = [(batch.micro_batch, batch.corrupted) for batch in batches_at(masks, noise)]
        report = measure_restoration(model, batches, restorer)
        assert report is not None  # nothing can cut it short
        texts = report.texts
        points.append(Point(level, term_restoration(report.outcomes), report.majority, texts.cer, texts.cer_reduction))
    return Curve(damage, tuple(points))


def table_lines(curves: Sequence[Curve]) -> list[str]:
    """The curves as a table: one line a level, one column a kind of damage."""
    heads = "".join(f"{curve.damage:>28}" for curve in curves)
    lines = [f"damage {heads}"]
    for index, point in enumerate(curves[0].points):
        cells = "".join(f"{_cell(curve.points[index]):>28}" for curve in curves)
        lines.append(f"{point.level:6.0%} {cells}")
    return [*lines, "area   " + "".join(f"{_text(curve.area):>28}" for curve in curves)]


def _cell(point: Point) -> str:
    if point.rate.n == 0:
        return "-"
    return f"{point.rate.rate:.3f} [{point.rate.low:.3f}, {point.rate.high:.3f}]"


def _text(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"


def _point_json(point: Point) -> dict[str, Any]:
    rate = point.rate
    numbers = {
        "term_rate": rate.rate,
        "term_rate_low": rate.low,
        "term_rate_high": rate.high,
        "majority_rate": point.majority.rate,
        "cer": point.cer,
        "cer_reduction": point.cer_reduction,
    }
    return {"level": point.level, "n": rate.n, **{name: _number(value) for name, value in numbers.items()}}


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
