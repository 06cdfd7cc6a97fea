"""Compare stopping rules over recorded curves.

Forgone is 100 x (loss at the kept window - lowest loss) / (first loss - lowest loss): the share of the recorded descent
that a rule misses. Updates is the share of the recording that it trains. The frontier is anchored patience at every
patience of `SWEEP`. A rule is better only if it forgoes less at equal updates, so each is compared with the frontier at
its own mean updates, paired by curve.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.stopping_rules.rules import FIRST_JUDGED, PEER_RULES, Outcome, anchored_patience
from resilient_t5.config.sections import ConvergenceConfig
from resilient_t5.training.convergence.replay import Curve, Replay, replay, replay_rules
from resilient_t5.training.convergence.rules import PRESETS

SWEEP = tuple(range(1, 31))
"""Patiences of the frontier, in windows."""


@dataclass(frozen=True)
class Score:
    """One rule on one curve."""

    forgone_percent: float
    updates_percent: float
    before_minimum: bool


@dataclass(frozen=True)
class Summary:
    """One rule over many curves; `forgone_se` is the standard error of the mean."""

    forgone_percent: float
    forgone_se: float
    updates_percent: float
    stopped_before_minimum: int
    forgone_p95: float


@dataclass(frozen=True)
class Comparison:
    """Scores per rule, in the order of the curves; `sweep` holds anchored patience by its number of windows."""

    curves: tuple[Curve, ...]
    rules: dict[str, list[Score]]
    sweep: dict[int, list[Score]]


def outcome_of(result: Replay) -> Outcome:
    """How long the replayed run trained and which window it kept."""
    updates = [window.update for window in result.windows]
    kept = updates.index(result.best.update) if result.best else len(result.verdicts) - 1
    return Outcome(len(result.verdicts), kept)


def score(losses: Sequence[float], outcome: Outcome) -> Score:
    """Score `outcome` on a curve with at least one finite loss."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    descent, kept = finite[0] - min(finite), losses[outcome.kept]
    updates = 100 * outcome.windows / len(losses)
    if not math.isfinite(kept):
        return Score(100.0, updates, True)
    forgone = 100 * (kept - min(finite)) / descent if descent > 0 else 0.0
    return Score(forgone, updates, kept > min(finite))


def summary(scores: Sequence[Score]) -> Summary:
    """Means over the curves."""
    forgone = sorted(one.forgone_percent for one in scores)
    return Summary(
        forgone_percent=statistics.fmean(forgone),
        forgone_se=standard_error(forgone),
        updates_percent=statistics.fmean(one.updates_percent for one in scores),
        stopped_before_minimum=sum(one.before_minimum for one in scores),
        forgone_p95=forgone[min(len(forgone) - 1, math.ceil(0.95 * len(forgone)) - 1)],
    )


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean; 0 for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def compare(
    curves: Sequence[Curve], extra: Mapping[str, ConvergenceConfig] | None = None, clock: str = "windows"
) -> Comparison:
    """Run the presets, the peers' rules and the sweep over all curves with a finite loss.

    Presets are scored at saturation: a recording did not lower its learning rate there, so the windows of a cooldown
    would cost updates and gain nothing. The row `thorough+cooldown` counts those windows.

    Args:
        curves: recordings.
        extra: further settings of the machine, by name.
        clock: as in `windows_of`; `updates` applies to the convergence machine only.
    """
    usable = tuple(curve for curve in curves if any(math.isfinite(loss) for loss in curve.losses))
    presets = {name: ConvergenceConfig(preset=name, on_saturation="stop") for name in PRESETS}  # type: ignore[arg-type]
    settings = {**presets, "thorough+cooldown": ConvergenceConfig(preset="thorough"), **(extra or {})}
    rules: dict[str, list[Score]] = {name: [] for name in settings}
    for curve in usable:
        for name, section in settings.items():
            rules[name].append(score(curve.losses, outcome_of(replay(curve, replay_rules(curve, section, clock), clock))))
    for name, rule in PEER_RULES.items():
        rules[name] = [score(curve.losses, rule(curve.losses, curve.training_losses)) for curve in usable]
    return Comparison(usable, rules, sweep(usable, lambda losses, p: anchored_patience(losses, p, first=FIRST_JUDGED)))


def sweep(curves: Sequence[Curve], rule: Callable[[Sequence[float], int], Outcome]) -> dict[int, list[Score]]:
    """Scores of `rule` at every patience of `SWEEP`."""
    return {patience: [score(curve.losses, rule(curve.losses, patience)) for curve in curves] for patience in SWEEP}


def against_frontier(scores: Sequence[Score], frontier: Mapping[int, Sequence[Score]]) -> tuple[float, float] | None:
    """Points forgone above anchored patience at equal mean updates, paired by curve, and their standard error.

    Between two patiences the frontier is interpolated: choosing one of the two at random for each run has these means.
    None outside the range of the frontier, and without scores.
    """
    if not scores:
        return None
    spent = statistics.fmean(one.updates_percent for one in scores)
    ladder = sorted(
        (statistics.fmean(one.updates_percent for one in column), patience) for patience, column in frontier.items()
    )
    for (low, short), (high, long) in zip(ladder[:-1], ladder[1:], strict=True):
        if low <= spent <= high:
            share = (spent - low) / (high - low) if high > low else 0.0
            differences = [
                one.forgone_percent - (1 - share) * early.forgone_percent - share * late.forgone_percent
                for one, early, late in zip(scores, frontier[short], frontier[long], strict=True)
            ]
            return statistics.fmean(differences), standard_error(differences)
    return None


def table(comparison: Comparison) -> list[str]:
    """The comparison as a table: all curves, the sweep, then each group."""
    lines = [f"{'rule':<18}{'forgone %':>16}{'updates %':>11}{'p95 %':>8}{'before min':>12}{'against the frontier':>24}"]
    for name, scores in comparison.rules.items():
        distance = against_frontier(scores, comparison.sweep)
        shown = f"{distance[0]:+.2f} +- {distance[1]:.2f}" if distance else "-"
        lines.append(_row(name, summary(scores)) + f"{shown:>24}")
    lines.append("presets are scored at saturation, since no recording cooled down; +cooldown counts its windows as well")
    lines += ["", "anchored patience, judged from window 12, counted gain 0.001 (the frontier):"]
    lines += [_row(f"patience-{p}", summary(comparison.sweep[p])) for p in SWEEP if p <= 10 or p % 5 == 0 or p == 12]
    groups = sorted({curve.group for curve in comparison.curves if curve.group})
    if len(groups) > 1:
        counts = {group: sum(curve.group == group for curve in comparison.curves) for group in groups}
        lines += ["", "by group, forgone % / updates %:"]
        lines.append(f"{'rule':<18}" + "".join(f"{f'{group} ({counts[group]})':>17}" for group in groups))
        lines += [_group_row(name, scores, comparison.curves, groups) for name, scores in comparison.rules.items()]
    return lines


def document(comparison: Comparison) -> dict[str, object]:
    """The comparison as JSON values; the rules of the sweep are named patience-N."""
    rules = {**comparison.rules, **{f"patience-{patience}": scores for patience, scores in comparison.sweep.items()}}
    values = {}
    for name, scores in rules.items():
        one = summary(scores)
        values[name] = {
            "forgone_percent": round(one.forgone_percent, 4),
            "forgone_se": round(one.forgone_se, 4),
            "updates_percent": round(one.updates_percent, 3),
            "stopped_before_minimum": one.stopped_before_minimum,
        }
    return {"curves": len(comparison.curves), "rules": values}


def _row(name: str, one: Summary) -> str:
    forgone = f"{one.forgone_percent:.2f} +- {one.forgone_se:.2f}"
    return f"{name:<18}{forgone:>16}{one.updates_percent:>11.1f}{one.forgone_p95:>8.1f}{one.stopped_before_minimum:>12}"


def _group_row(name: str, scores: Sequence[Score], curves: Sequence[Curve], groups: Sequence[str]) -> str:
    cells = []
    for group in groups:
        one = summary([part for part, curve in zip(scores, curves, strict=True) if curve.group == group])
        cells.append(f"{f'{one.forgone_percent:.2f} / {one.updates_percent:.0f}':>17}")
    return f"{name:<18}" + "".join(cells)
