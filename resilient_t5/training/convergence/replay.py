"""The convergence machine over a recorded curve: the verdicts it would have given, and what they cost and save.

A curve is a recorded course of losses; `windows_of` are the windows that the convergence machine makes of it.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

from resilient_t5.config.training import ConvergenceConfig, EvaluationConfig
from resilient_t5.config.values import updates_at
from resilient_t5.training.convergence.machine import ConvergenceMachine, format_verdict
from resilient_t5.training.convergence.phases import Mark, Phase, Verdict, Window
from resilient_t5.training.convergence.rules import Rules, unreachable

WINDOW_UPDATES = 1000
"""Updates that a foreign evaluation stands for: the cadence that the presets are written for."""
EPOCH_WINDOWS = 12
"""Windows of an epoch where a recording does not tell: points in epochs then lie where the corpus of the preset puts them."""


@dataclass(frozen=True)
class Recorded:
    """What a run of ours wrote beside an evaluation."""

    update: int
    phase: str
    why: str


@dataclass(frozen=True)
class Curve:
    """Evaluation and training losses as (position, loss), positions rising strictly in the recording's own unit.

    `windows` is there only for a run of ours: the very windows its machine observed, with the rules it obeyed.
    `window_rules` holds those of each window, since a resume may change the patience; `rules` are the last ones.
    """

    name: str
    evaluations: tuple[tuple[float, float], ...]
    training: tuple[tuple[float, float], ...] = ()
    group: str = ""
    window_length: float | None = None
    """Positions that make one window, where the recording says so; else each evaluation is one window."""
    windows: tuple[Window, ...] = ()
    rules: Rules | None = None
    window_rules: tuple[Rules, ...] = ()
    recorded: tuple[Recorded, ...] = ()

    @property
    def losses(self) -> tuple[float, ...]:
        """Evaluation losses in order."""
        return tuple(loss for _, loss in self.evaluations)

    @property
    def training_losses(self) -> tuple[float | None, ...]:
        """The latest training loss known at each evaluation."""
        positions = [position for position, _ in self.training]
        latest = [bisect_right(positions, position) - 1 for position, _ in self.evaluations]
        return tuple(self.training[index][1] if index >= 0 else None for index in latest)


def windows_of(curve: Curve, clock: str = "windows") -> tuple[Window, ...]:
    """The windows of `curve`.

    Args:
        curve: a recording.
        clock: `windows` counts each evaluation as `WINDOW_UPDATES` updates, unless the curve tells its window's length;
            `updates` takes the recorded positions as updates.
    """
    if curve.windows:
        return curve.windows
    windows: list[Window] = []
    for number, ((position, loss), train) in enumerate(zip(curve.evaluations, curve.training_losses, strict=True), 1):
        if clock == "updates":
            update = round(position)
        elif curve.window_length:
            update = round(position / curve.window_length * WINDOW_UPDATES)
        else:
            update = number * WINDOW_UPDATES
        # Positions in fractions of an epoch may round to the same update; the machine wants them to rise.
        update = max(update, windows[-1].update + 1) if windows else update
        windows.append(Window(update=update, tokens=0, lr=0.0, loss=loss, train_loss=train))
    return tuple(windows)


def cadence(windows: Sequence[Window]) -> int:
    """The usual distance between two evaluations, in updates."""
    gaps = [later.update - earlier.update for earlier, later in zip(windows[:-1], windows[1:], strict=True)]
    return max(1, median_low(gaps)) if gaps else WINDOW_UPDATES


@dataclass(frozen=True)
class Outcome:
    """`windows` that were trained, and the index of the `kept` one."""

    windows: int
    kept: int


@dataclass(frozen=True)
class Replay:
    """`verdicts` up to the stop, over all `windows` of the recording."""

    curve: Curve
    rules: Rules
    windows: tuple[Window, ...]
    verdicts: tuple[Verdict, ...]
    best: Mark | None

    @property
    def stopped(self) -> Verdict | None:
        """The verdict that ended the run; None when the recording ended first."""
        return self.verdicts[-1] if self.verdicts and self.verdicts[-1].stop else None

    @property
    def outcome(self) -> Outcome:
        """How long it trained and what it kept."""
        updates = [window.update for window in self.windows]
        kept = updates.index(self.best.update) if self.best else len(self.verdicts) - 1
        return Outcome(len(self.verdicts), kept)


@dataclass(frozen=True)
class ReplayComparison:
    """Another rule over the same recording, with the name it is told and drawn by."""

    name: str
    replay: Replay


def replay_rules(curve: Curve, settings: ConvergenceConfig, clock: str = "windows") -> Rules:
    """The rules of `settings` in the clock of the recording; an epoch is what `EPOCH_WINDOWS` says."""
    every = cadence(windows_of(curve, clock)) if clock == "updates" or curve.windows else WINDOW_UPDATES
    epoch = EPOCH_WINDOWS * every
    return Rules.from_config(settings, lambda point: updates_at(point, epoch, 1.0), EvaluationConfig(every=every))


def replay(curve: Curve, rules: Rules, clock: str = "windows") -> Replay:
    """Let a fresh machine observe the recording until it stops.

    A run of ours that was resumed with another patience is replayed with the rules of each window, as it happened.
    """
    windows = windows_of(curve, clock)
    in_force = curve.window_rules if rules == curve.rules and curve.window_rules else (rules,) * len(windows)
    machine = ConvergenceMachine(in_force[0] if in_force else rules)
    verdicts: list[Verdict] = []
    for window, rules_now in zip(windows, in_force, strict=True):
        if rules_now != machine.rules:
            former, machine = machine, ConvergenceMachine(rules_now)
            machine.restore(former.state())
        if machine.reason is not None:
            break
        verdicts.append(machine.observe(window))
    return Replay(curve, rules, windows, tuple(verdicts), machine.best)


def differences(result: Replay) -> list[str]:
    """Where the verdicts differ from those that the run itself wrote down; empty when they are the very same."""
    found = []
    for verdict, recorded in zip(result.verdicts, result.curve.recorded, strict=False):
        if (verdict.phase.name, verdict.why) != (recorded.phase, recorded.why):
            ours, theirs = f"{verdict.phase.name} {verdict.why}", f"{recorded.phase} {recorded.why}"
            found.append(f"update {recorded.update}: the run said {theirs}; the replay says {ours}")
    if len(result.verdicts) != len(result.curve.recorded):
        found.append(f"the run recorded {len(result.curve.recorded)} verdicts; the replay gives {len(result.verdicts)}")
    return found


def story(result: Replay, *, whole: bool = False) -> list[str]:
    """What happened, line by line.

    Args:
        result: a replay.
        whole: every window instead of those where something happened.
    """
    windows, rules = result.windows, result.rules
    finite = [window.loss for window in windows if math.isfinite(window.loss)]
    if not finite:
        return [f"{result.curve.name}: {len(windows)} evaluations, none of them finite"]
    lines = [
        f"{result.curve.name}: {len(windows)} evaluations, one window = {rules.every} updates, "
        f"loss {finite[0]:.4g} -> lowest {min(finite):.4g} -> last {finite[-1]:.4g}",
        f"rules: start {rules.start}, judge_from {rules.judge_from}, patience {rules.patience} windows, counted gain "
        f"{rules.min_gain:g} or {100 * rules.min_gain_rel:g} % ({rules.anchor_rule}), at saturation: {rules.on_saturation}",
    ]
    lines += [f"warning: {text}" for text in unreachable(rules, windows[-1].update, rules.every)]
    for number, (window, verdict) in enumerate(zip(windows, result.verdicts, strict=False)):
        if whole or number == 0 or verdict.events or verdict.stop:
            lines.append(f"{window.update:>8}  {window.loss:<8.4g} {verdict.phase.name:<21} {format_verdict(verdict)}")
    return lines + _balance(result, min(finite), finite[0])


def _balance(result: Replay, least: float, first: float) -> list[str]:
    """Where it stops, what it keeps, gives up and saves."""
    windows, done, best = result.windows, len(result.verdicts), result.best
    if best is None:
        return ["no evaluation became the best"]
    last = result.verdicts[-1]
    if last.stop:
        lines = [f"stops at update {last.update} of {windows[-1].update} ({last.stop}), after {done} of {len(windows)} windows"]
    else:
        lines = [f"never stops: the recording ends in {last.phase.name} at update {windows[-1].update}"]
    share = 100 * (best.loss - least) / (first - least) if first > least else 0.0
    at = windows[lowest(result.curve.losses, 0, len(windows))].update
    given_up = f"gives up {best.loss - least:.4g} ({share:.2f} % of the descent): the lowest, {least:.4g}, came at {at}"
    lines.append(f"keeps {best.loss:.4g} of update {best.update}; {given_up if best.loss > least else 'gives up nothing'}")
    lines.append(f"saves {len(windows) - done} windows, {100 * (1 - done / len(windows)):.0f} % of the recording")
    has_cooled = result.curve.windows and result.rules == result.curve.rules
    if any(verdict.phase is Phase.COOLDOWN for verdict in result.verdicts) and not has_cooled:
        lines.append("the recording did not cool down: what a falling learning rate would have gained is not in these figures")
    return lines


Losses = Sequence[float]


def lowest(losses: Losses, begin: int, end: int) -> int:
    """Index of the lowest finite loss in [begin, end); the last one where there is none. The oldest of equals."""
    finite = [index for index in range(begin, end) if math.isfinite(losses[index])]
    return min(finite, key=lambda index: losses[index]) if finite else end - 1
