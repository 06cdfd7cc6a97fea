"""Rules of the convergence machine as plain numbers, their presets, and warnings about unreachable phases.

A preset fills the settings that the configuration leaves open. Points in epochs or tokens are converted to updates once,
at the start of a run.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from resilient_t5.config.sections import ConvergenceConfig, EvaluationConfig, Point
from resilient_t5.errors import ConfigError, DataError

SEED: dict[str, Any] = {
    "start": 6000,
    "judge_from": 12000,
    "patience": 5,
    "min_gain": 0.001,
    "min_gain_rel": 0.0,
    "anchor_rule": "counted",
    "on_saturation": "stop",
    "cooldown_share": 0.1,
    "divergence_factor": 3.0,
    "nonfinite_limit": 3,
}
PRESETS: dict[str, dict[str, Any]] = {
    # The peer's code, EarlyStoppingCallback that starts at update 6000: for tests and as a baseline.
    "seed-code": {**SEED, "judge_from": 6000, "anchor_rule": "best", "divergence_factor": 0.0, "nonfinite_limit": 0},
    # The peer's numbers with the meaning that its description gives them.
    "seed": SEED,
    # For final results. At 12 windows the cost of more patience rises on the recorded curves (docs/stopping.md); a
    # relative gain fits every level of loss.
    "thorough": {
        **SEED,
        "start": "0.5ep",
        "judge_from": "1.0ep",
        "patience": 12,
        "min_gain": 0.0,
        "min_gain_rel": 0.0005,
        "on_saturation": "cooldown",
    },
    # For runs of minutes, which are judged early. Their evaluation sets are small, so the counted gain is twice that of
    # `thorough`; eight windows outlast a short plateau.
    "short": {**SEED, "start": 50, "judge_from": 100, "patience": 8, "min_gain": 0.0, "min_gain_rel": 0.001},
}
REMOVED_RULES = ("patience_max", "overfit_percent", "overfit_windows")
"""Rules that an earlier version recorded; off in all of its presets."""


@dataclass(frozen=True)
class Rules:
    """The numbers that the machine uses; points and cadence in updates, `patience` in judged windows."""

    start: int
    judge_from: int
    patience: int
    min_gain: float
    min_gain_rel: float
    anchor_rule: str
    on_saturation: str
    cooldown_share: float
    divergence_factor: float
    nonfinite_limit: int
    every: int
    criterion: str = "loss"

    @classmethod
    def from_config(
        cls, settings: ConvergenceConfig, to_updates: Callable[[Point], int], evaluation: EvaluationConfig | None = None
    ) -> "Rules":
        """Fill `settings` from its preset and convert points to updates.

        Args:
            settings: the section `convergence`.
            to_updates: converts a point to an update.
            evaluation: the section `evaluation`, for cadence and criterion.

        Raises:
            ConfigError: `judge_from` is before `start`.
        """
        evaluation = evaluation or EvaluationConfig()
        every = max(1, to_updates(evaluation.every))
        given = {key: value for key, value in asdict(settings).items() if key != "preset" and value is not None}
        merged = {**PRESETS[settings.preset], **given}
        start, judge_from = to_updates(merged["start"]), to_updates(merged["judge_from"])
        if judge_from < start and "judge_from" in given:
            raise ConfigError(
                f"convergence.judge_from: {merged['judge_from']} is before convergence.start {merged['start']}; "
                "nothing is judged before start"
            )
        if isinstance(merged["patience"], str):
            merged["patience"] = max(1, math.ceil(to_updates(merged["patience"]) / every))
        merged |= {"start": start, "judge_from": max(start, judge_from)}
        return cls(**merged, every=every, criterion=evaluation.criterion)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> "Rules":
        """Read rules that a run recorded; DataError for a missing, unknown or mistyped key."""
        values = {key: value for key, value in values.items() if key not in REMOVED_RULES}
        kinds = {name: field.type for name, field in cls.__dataclass_fields__.items()}
        unfit = sorted(kinds.keys() ^ values.keys())
        accepted = {int: (int,), float: (int, float), str: (str,)}
        unfit += [k for k in kinds.keys() & values.keys() if type(values[k]) not in accepted[kinds[k]]]  # type: ignore[index]
        if unfit:
            raise DataError(f"the recorded rules have missing, unknown or mistyped keys: {', '.join(unfit)}", where=where)
        return cls(**values)

    def needed_gain(self, reference: float) -> float:
        """The decrease below `reference` that a loss must exceed to count: the larger of the two thresholds."""
        return max(self.min_gain, self.min_gain_rel * abs(reference))

    def cooldown_updates(self, update: int) -> int:
        """Length of a cooldown that begins at `update`, rounded up to end on an evaluation."""
        return max(1, math.ceil(self.cooldown_share * update / self.every)) * self.every

    def first_judged(self, update: int = -1) -> int:
        """The first judged evaluation after `update`; a run also evaluates before its first update."""
        return max(update // self.every + 1, -(-self.judge_from // self.every)) * self.every

    def earliest_stop(self) -> int | None:
        """The earliest update at which a run with finite losses can stop as saturated; None when it never stops."""
        if self.on_saturation == "continue":
            return None
        first = self.first_judged()
        # The first judged window sets the anchor; with the rule `best` an earlier evaluation already has.
        has_reference = self.anchor_rule == "best" and first > 0
        stop = first + (self.patience - has_reference) * self.every
        return stop + (self.cooldown_updates(stop) if self.on_saturation == "cooldown" else 0)


def unreachable(rules: Rules, planned_updates: int) -> list[str]:
    """Warnings about phases that a run of `planned_updates` cannot reach, each with options that fix it."""
    last = planned_updates // rules.every * rules.every
    saturated = replace(rules, on_saturation="stop").earliest_stop() or 0
    stop = rules.earliest_stop() or saturated
    if stop <= last:
        return []
    span = f"the last evaluation of {planned_updates} planned updates is at {last}" if last else "the run has no evaluation"
    if rules.start > last:
        problem = f"convergence.start {rules.start} is never reached ({span}): OBSERVE and all later phases are impossible"
    elif rules.first_judged() > last:
        problem = f"convergence.judge_from {rules.judge_from} is never reached ({span}): nothing is ever judged"
    elif saturated <= last:
        problem = f"COOLDOWN can never end: the earliest possible stop is {stop}, but {span}"
    else:
        problem = f"SATURATED can never be reached: the earliest possible stop is {stop}, but {span}"
    return [f"{problem}. {_remedy(rules, planned_updates)}"]


def _remedy(rules: Rules, planned_updates: int) -> str:
    """Options with which the machine can stop within the run, if possible judging from its first quarter on."""
    every, options = rules.every, ""
    if _judgeable_windows(rules, planned_updates, every) < 3:
        every = max(1, planned_updates // (4 * (rules.patience + 3)))
        options = f"--evaluation.every {every} "
    windows = _judgeable_windows(rules, planned_updates, every)
    if windows < 3:
        return f"A run of {planned_updates} updates is too short to be judged"
    if windows > rules.patience:
        judge_from = max(1, min(windows // 4, windows - rules.patience)) * every
        return f"Use {options}--convergence.start {judge_from // 2} --convergence.judge_from {judge_from}"
    return f"Use {options}--convergence.start 0 --convergence.judge_from {every} --convergence.patience {windows // 2}"


def _judgeable_windows(rules: Rules, planned_updates: int, every: int) -> int:
    """Windows of the run that leave enough updates for a cooldown."""
    cools = rules.on_saturation == "cooldown"
    return int(planned_updates // every / (1 + rules.cooldown_share * cools)) - cools
