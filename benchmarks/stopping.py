"""Is there a better stopping rule than anchored patience? Every idea is held against its frontier, curve by curve.

    python benchmarks/stopping.py CURVES.jsonl.gz [--json FILE]

Each family changes one thing about anchored patience and is run at several base patiences. What counts is the
difference in descent forgone at *equal mean updates*, paired by curve, with its standard error: a rule that merely
waits longer lies on the frontier. Many variants are tried, so one counts as better only when it is so by three standard
errors at two neighbouring patiences, and at both of them in either half of the curves, split by name.
The last line is JSON: {"curves", "variants", "better": [...], "families": {family: {patience: figures}}}.
"""

import argparse
import json
import math
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from resilient_t5.training.convergence.recordings import read_curves
from resilient_t5.training.convergence.replay import Curve, Outcome, lowest
from resilient_t5.training.convergence.rivals import FIRST_JUDGED, THRESHOLD, anchored_patience
from resilient_t5.training.convergence.scoring import Score, against_frontier, score, summary, sweep
from resilient_t5.training.convergence.trend import Direction, judge_trend, median, noise_sigma

BASES = (4, 5, 6, 8, 10, 12, 15)


@dataclass
class Course:
    """What a variant may look at when it decides: everything up to the present window."""

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
        """Where the evaluation loss goes."""
        trend = judge_trend(self.seen(24), int(self.plateau), self.sigma())
        return trend.direction if trend else None

    def training_direction(self) -> Direction | None:
        """Where the training loss goes."""
        recent = [value for value in self.training[max(0, self.index - 23) : self.index + 1] if value is not None]
        trend = judge_trend(recent, int(self.plateau), noise_sigma(recent))
        return trend.direction if trend else None


Limit = Callable[[Course], float]
Charge = Callable[[Course], float]
Judged = Callable[[Course], float]


@dataclass(frozen=True)
class Family:
    """A variation of anchored patience: how long it waits, what a window costs, and which loss is compared."""

    name: str
    idea: str
    limit: Limit = lambda course: course.patience
    charge: Charge = lambda course: 1.0
    judged: Judged = lambda course: course.losses[course.index]
    needed: Judged = lambda course: THRESHOLD
    first: int = FIRST_JUDGED


def run(family: Family, curve: Curve, patience: int) -> Outcome:
    """One curve under one variant."""
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
            return Outcome(index + 1, lowest(losses, 0, index + 1))
    return Outcome(len(losses), lowest(losses, 0, len(losses)))


def unless(condition: Callable[[Course], bool], factor: float) -> Limit:
    """Wait `factor` times as long while `condition` holds."""
    return lambda course: course.patience * (factor if condition(course) else 1.0)


def not_flat(course: Course) -> bool:
    """The trend does not rule out a worthwhile gain."""
    return course.direction() in (Direction.DECLINE, Direction.UNSURE, None)


def training_falls(course: Course) -> bool:
    """The training loss is surely falling."""
    return course.training_direction() is Direction.DECLINE


def overfits(course: Course) -> bool:
    """The evaluation loss is surely rising."""
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
    Family("rise-double", "a window on a rising trend costs two", charge=lambda c: 2.0 if overfits(c) else 1.0),
    Family("rise-half", "a window costs half unless the trend rises", charge=lambda c: 1.0 if overfits(c) else 0.5),
    Family(
        "rise-training",
        "a window costs two where evaluation rises and training falls",
        charge=lambda c: 2.0 if overfits(c) and training_falls(c) else 1.0,
    ),
    Family("median-3", "the median of three losses is judged", judged=lambda c: median(c.seen(3)) if c.seen(3) else math.inf),
    Family(
        "mean-3", "the mean of three losses is judged", judged=lambda c: sum(c.seen(3)) / 3 if len(c.seen(3)) == 3 else math.inf
    ),
    Family(
        "above-best",
        "waits on while the last three are within 1 % of the anchor",
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
        """For the line of JSON."""
        values = {"forgone_percent": self.forgone_percent, "updates_percent": self.updates_percent}
        if self.distance:
            values |= {"against_frontier": self.distance[0], "se": self.distance[1]}
        return {key: round(value, 4) for key, value in values.items()}

    def __str__(self) -> str:
        return f"{self.distance[0]:+.2f} +- {self.distance[1]:.2f} @{self.updates_percent:.1f}" if self.distance else "-"


def measure(family: Family, base: int, curves: Sequence[Curve], frontier: dict[int, list[Score]]) -> Cell:
    """Hold one variant against the frontier."""
    scores = [score(curve.losses, run(family, curve, base)) for curve in curves]
    halves = []
    for half in (0, 1):
        members = [index for index, curve in enumerate(curves) if zlib.crc32(curve.name.encode()) % 2 == half]
        part = {patience: [column[index] for index in members] for patience, column in frontier.items()}
        halves.append(against_frontier([scores[index] for index in members], part))
    one = summary(scores)
    return Cell(one.forgone_percent, one.updates_percent, against_frontier(scores, frontier), tuple(halves))


def main() -> int:
    """Run all families over the curves of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("curves", type=Path, help="a .jsonl(.gz) of curves")
    parser.add_argument("--json", type=Path, help="also write the last line there")
    parser.add_argument("--without", default="", help="leave out this group of curves")
    arguments = parser.parse_args()
    curves = [curve for curve in read_curves(arguments.curves) if curve.group != (arguments.without or None)]
    frontier = sweep(curves, lambda losses, patience: anchored_patience(losses, patience, first=FIRST_JUDGED))
    variants = len(FAMILIES) * len(BASES)
    print(f"{len(curves)} curves, {variants} variants; points forgone beyond anchored patience at equal updates (@)")
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
    line = json.dumps({"curves": len(curves), "variants": variants, "better": better, "families": families})
    if arguments.json:
        arguments.json.write_text(line + "\n", encoding="utf-8")
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
