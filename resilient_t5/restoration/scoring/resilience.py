"""The resilience curve: restoration at increasing damage.

There are three kinds of damage: masks alone, noise at the mask ratio of the run, and both together. All levels damage the
same examples from the same random key, so the curve is paired and smooth with few examples: a term that is masked at one
level is masked at every higher one, and with fixed masks a token that is noised is noised at every higher level. (Random
spans next to terms are drawn again where another term is masked.)

`area` is the mean height of the curve over its range of damage (trapezoids over the measured levels).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from resilient_t5.data.batches import EvaluationBatch
from resilient_t5.restoration.scoring.measure import Restorer, measure_restoration
from resilient_t5.restoration.scoring.metrics import NO_TRIALS, Rate, finite_or_none, term_restoration

Damage = Literal["masks", "noise", "both"]
DAMAGES: tuple[Damage, ...] = ("masks", "noise", "both")
LEVELS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True)
class Point:
    """Results at one level of damage; `rate` has no trials if no term is masked."""

    level: float
    rate: Rate
    majority: Rate
    cer: float
    """Character error rate of the restored text; nan when it was not measured."""
    cer_reduction: float
    """1 - CER of the restored over CER of the damaged text; nan if nothing was damaged."""

    def to_json(self) -> dict[str, Any]:
        """All numbers; None without trials."""
        numbers = {
            "term_rate": self.rate.rate,
            "term_rate_low": self.rate.low,
            "term_rate_high": self.rate.high,
            "majority_rate": self.majority.rate,
            "cer": self.cer,
            "cer_reduction": self.cer_reduction,
        }
        return {"level": self.level, "n": self.rate.n, **{name: finite_or_none(value) for name, value in numbers.items()}}


@dataclass(frozen=True)
class Curve:
    """Results for one kind of damage at increasing levels."""

    damage: Damage
    points: tuple[Point, ...]

    @property
    def area(self) -> float:
        """Mean term restoration rate over the levels with masked terms; nan with fewer than two."""
        known = [(point.level, point.rate.rate) for point in self.points if point.rate.n]
        if len(known) < 2:
            return math.nan
        pairs = zip(known[:-1], known[1:], strict=True)
        total = sum((right[0] - left[0]) * (left[1] + right[1]) / 2 for left, right in pairs)
        return total / (known[-1][0] - known[0][0])

    def to_json(self) -> dict[str, Any]:
        """All numbers; None without trials."""
        area = finite_or_none(self.area)
        return {"damage": self.damage, "area": area, "points": [point.to_json() for point in self.points]}


def ratios(damage: Damage, level: float, mask_ratio: float) -> tuple[float, float]:
    """Return mask ratio and noise ratio of one level."""
    return {"masks": (level, 0.0), "noise": (mask_ratio, level), "both": (level, level)}[damage]


def measure_curve(
    damage: Damage,
    model: Any,
    batches_at: Callable[[float, float], Sequence[EvaluationBatch]],
    restorer: Restorer,
    mask_ratio: float,
) -> Curve:
    """Restore the same examples at every level of one kind of damage. A level without masks is not measured.

    Args:
        damage: the kind of damage.
        model: as in `measure_restoration`; the caller sets evaluation mode, no_grad and autocast.
        batches_at: returns the fixed examples for (mask ratio, noise ratio).
        restorer: vocabulary, terms, baselines.
        mask_ratio: the constant mask ratio of the noise curve.
    """
    points = []
    for level in LEVELS:
        masks, noise = ratios(damage, level, mask_ratio)
        if masks == 0.0:
            points.append(Point(level, NO_TRIALS, NO_TRIALS, cer=0.0, cer_reduction=math.nan))
            continue
        report = measure_restoration(model, batches_at(masks, noise), restorer)
        points.append(Point(level, term_restoration(report.outcomes), report.majority, report.cer, report.cer_reduction))
    return Curve(damage, tuple(points))


def table_lines(curves: Sequence[Curve]) -> list[str]:
    """Format the curves as a table with one line per level and one column per kind of damage."""
    lines = ["damage " + "".join(f"{curve.damage:>28}" for curve in curves)]
    for points in zip(*(curve.points for curve in curves), strict=True):
        lines.append(f"{points[0].level:6.0%} " + "".join(f"{_cell(point.rate):>28}" for point in points))
    areas = [f"{curve.area:.3f}" if math.isfinite(curve.area) else "-" for curve in curves]
    return [*lines, "area   " + "".join(f"{area:>28}" for area in areas)]


def _cell(rate: Rate) -> str:
    return f"{rate.rate:.3f} [{rate.low:.3f}, {rate.high:.3f}]" if rate.n else "-"
