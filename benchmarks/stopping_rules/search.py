"""Search for a stopping rule that is better than anchored patience.

Each family changes one property of anchored patience and is run at several base patiences. The measure is the
difference in descent forgone at *equal mean updates*, paired by curve, with its standard error: a rule that only waits
longer is on the frontier. Since many variants are tried, one counts as better only if it is better by three standard
errors at two neighbouring patiences and, at both, in each half of the curves, split by name.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.stopping_rules.rules import FIRST_JUDGED, THRESHOLD, Outcome, anchored_patience
from benchmarks.stopping_rules.scoring import Score, against_frontier, score, summary, sweep
from resilient_t5.training.convergence.replay import Curve, lowest
from resilient_t5.training.convergence.trend import Direction, judge_trend, noise_sigma

BASES = (4, 5, 6, 8, 10, 12, 15)


@dataclass
class Course:
    """The input of a variant: losses and counters up to the current window."""

    losses: Sequence[float]
    training: Sequence[float | None]
    patience: int
    index: int = 0
    anchor: float = math.nan
    anchor_index: int = 0
    plateau: float = 0
    survived: float = 0

    def seen(self, count: int) -> list[float]:
        """The last `count` losses that are finite."""
        return [loss for loss in self.losses[max(0, self.index + 1 - count) : self.index + 1] if math.isfinite(loss)]

    def sigma(self) -> float:
        """Noise of one evaluation."""
        return noise_sigma(self.seen(24)) or 0.0

    def direction(self) -> Direction | None:
        """Trend of the evaluation loss."""
        trend = judge_trend(self.seen(24), int(self.plateau), self.sigma())
        return trend.direction if trend else None

    def training_direction(self) -> Direction | None:
        """Trend of the training loss."""
        recent = [value for value in self.training[max(0, self.index - 23) : self.index + 1] if value is not None]
        trend = judge_trend(recent, int(self.plateau), noise_sigma(recent))
        return trend.direction if trend else None


Limit = Callable[[Course], float]
Charge = Callable[[Course], float]
Judged = Callable[[Course], float]


@dataclass(frozen=True)
class Family:
    """A variation of anchored patience: how long it waits, how much a window counts, and which loss is compared."""

    name: str
    idea: str
    limit: Limit = lambda course: course.patience
    charge: Charge = lambda course: 1.0
    judged: Judged = lambda course: course.losses[course.index]
    needed: Judged = lambda course: THRESHOLD
    first: int = FIRST_JUDGED


def run(family: Family, curve: Curve, patience: int) -> Outcome:
    """Run one variant over one curve."""
    losses = curve.losses
    course = Course(losses, curve.training_losses, patience)
    for index in range(family.first - 1, len(losses)):
        course.index = index
        loss = family.judged(course)
        if math.isnan(course.anchor) or course.anchor - loss > family.needed(course):
            course.survived = max(course.survived, course.plateau)
            course.anchor, course.anchor_index, course.plateau = loss, index, 0
            continue
        course.plateau += family.charge(course)
        if course.plateau >= patience and course.plateau >= family.limit(course):
            return Outcome(index + 1, lowest(losses, index + 1))
    return Outcome(len(losses), lowest(losses, len(losses)))


def unless(condition: Callable[[Course], bool], factor: float) -> Limit:
    """Wait `factor` times as long while `condition` holds."""
    return lambda course: course.patience * (factor if condition(course) else 1.0)


def not_flat(course: Course) -> bool:
    """The trend does not exclude a relevant gain."""
    return course.direction() in (Direction.DECLINE, Direction.UNSURE, None)


def training_falls(course: Course) -> bool:
    """The training loss is falling significantly."""
    return course.training_direction() is Direction.DECLINE


def overfits(course: Course) -> bool:
    """The evaluation loss is rising significantly."""
    return course.direction() is Direction.RISE


FAMILIES = (
    Family("relative-0.0005", "counted gain 0.05 % of the anchor", needed=lambda c: 0.0005 * abs(c.anchor)),
    Family("relative-0.002", "counted gain 0.2 % of the anchor", needed=lambda c: 0.002 * abs(c.anchor)),
    Family("any-gain", "counted gain 0", needed=lambda c: 0.0),
    Family("noise-gain", "counted gain at least one sigma", needed=lambda c: max(THRESHOLD, c.sigma())),
    Family(
        "noise-patience",
        "longer by sigma over its share of the level",
        limit=lambda c: c.patience * (1 + min(1.0, 50 * c.sigma() / abs(c.anchor))),
    ),
    Family(
        "noise-patience-2",
        "twice as long where sigma exceeds the counted gain",
        limit=unless(lambda c: c.sigma() > THRESHOLD, 2.0),
    ),
    Family("since-gain-1.25", "also until 1.25 x the window of the last gain", limit=lambda c: 0.25 * (c.anchor_index + 1)),
    Family("since-gain-1.5", "also until 1.5 x the window of the last gain", limit=lambda c: 0.5 * (c.anchor_index + 1)),
    Family("survivor-1", "as long as the longest plateau survived", limit=lambda c: c.survived),
    Family("survivor-2", "twice as long as the longest plateau survived", limit=lambda c: 2 * c.survived),
    Family("trend-1.5", "half as long again while the trend is not flat", limit=unless(not_flat, 1.5)),
    Family("trend-2", "twice as long while the trend is not flat", limit=unless(not_flat, 2.0)),
    Family("training-1.5", "half as long again while the training loss falls", limit=unless(training_falls, 1.5)),
    Family(
        "agreement-1.5",
        "half as long again unless training loss and trend are both flat",
        limit=unless(lambda c: training_falls(c) and not_flat(c), 1.5),
    ),
    Family(
        "agreement-2",
        "twice as long unless training loss and trend agree",
        limit=unless(lambda c: training_falls(c) and not_flat(c), 2.0),
    ),
    Family("rise-double", "a window on a rising trend counts twice", charge=lambda c: 2.0 if overfits(c) else 1.0),
    Family("rise-half", "a window counts half unless the trend rises", charge=lambda c: 1.0 if overfits(c) else 0.5),
    Family(
        "rise-training",
        "a window counts twice where evaluation rises and training falls",
        charge=lambda c: 2.0 if overfits(c) and training_falls(c) else 1.0,
    ),
    Family("median-3", "the median of three losses is judged", judged=lambda c: median(c.seen(3)) if c.seen(3) else math.inf),
    Family(
        "mean-3", "the mean of three losses is judged", judged=lambda c: sum(c.seen(3)) / 3 if len(c.seen(3)) == 3 else math.inf
    ),
    Family(
        "above-best",
        "keeps waiting while the last three are within 1 % of the anchor",
        limit=unless(lambda c: median(c.seen(3)) < 1.01 * c.anchor, 2.0),
    ),
    Family("gate-6", "judged from window 6", first=6),
    Family("gate-9", "judged from window 9", first=9),
)


@dataclass(frozen=True)
class Cell:
    """One family at one base patience: its figures, and its distance to the frontier over all curves and in each half."""

    forgone_percent: float
    updates_percent: float
    distance: tuple[float, float] | None
    halves: tuple[tuple[float, float] | None, ...]

    @property
    def is_better(self) -> bool:
        """Three standard errors below the frontier, and below it in both halves."""
        clear = self.distance is not None and self.distance[0] <= -3 * self.distance[1] < 0
        return clear and all(half is not None and half[0] < 0 for half in self.halves)

    def figures(self) -> dict[str, float]:
        """The figures as JSON values."""
        values = {"forgone_percent": self.forgone_percent, "updates_percent": self.updates_percent}
        if self.distance:
            values |= {"against_frontier": self.distance[0], "se": self.distance[1]}
        return {key: round(value, 4) for key, value in values.items()}

    def __str__(self) -> str:
        return f"{self.distance[0]:+.2f} +- {self.distance[1]:.2f} @{self.updates_percent:.1f}" if self.distance else "-"


def measure(family: Family, base: int, curves: Sequence[Curve], frontier: dict[int, list[Score]]) -> Cell:
    """Compare one variant with the frontier."""
    scores = [score(curve.losses, run(family, curve, base)) for curve in curves]
    halves = []
    for half in (0, 1):
        members = [index for index, curve in enumerate(curves) if zlib.crc32(curve.name.encode()) % 2 == half]
        part = {patience: [column[index] for index in members] for patience, column in frontier.items()}
        halves.append(against_frontier([scores[index] for index in members], part))
    one = summary(scores)
    return Cell(one.forgone_percent, one.updates_percent, against_frontier(scores, frontier), tuple(halves))


def search(curves: Sequence[Curve]) -> dict[str, Any]:
    """Run all families over `curves`, print a table row for each, and return the figures as JSON values."""
    frontier = sweep(curves, lambda losses, patience: anchored_patience(losses, patience, first=FIRST_JUDGED))
    variants = len(FAMILIES) * len(BASES)
    print(f"{len(curves)} curves, {variants} variants; points forgone above anchored patience at equal updates (@)")
    print(f"{'family':<18}" + "".join(f"{f'p{base}':>22}" for base in BASES))
    families: dict[str, dict[str, dict[str, float]]] = {}
    better = []
    for family in FAMILIES:
        cells = [measure(family, base, curves, frontier) for base in BASES]
        families[family.name] = {str(base): cell.figures() for base, cell in zip(BASES, cells, strict=True)}
        print(f"{family.name:<18}" + "".join(f"{str(cell):>22}" for cell in cells), flush=True)
        if any(first.is_better and second.is_better for first, second in zip(cells[:-1], cells[1:], strict=True)):
            better.append(family.name)
    print(f"better than the frontier: {', '.join(better) or 'none'}")
    return {"curves": len(curves), "variants": variants, "better": better, "families": families}
