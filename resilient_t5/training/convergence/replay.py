"""Replay a recorded curve through the convergence machine: its verdicts, their cost and their savings."""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_low

from resilient_t5.config.sections import ConvergenceConfig, EvaluationConfig, updates_at
from resilient_t5.errors import plural
from resilient_t5.training.convergence.machine import ConvergenceMachine, format_verdict
from resilient_t5.training.convergence.phases import Mark, Phase, Verdict, Window
from resilient_t5.training.convergence.rules import Rules, unreachable

WINDOW_UPDATES = 1000
"""Updates per evaluation of a foreign recording: the cadence that the presets are written for."""
EPOCH_WINDOWS = 12
"""Windows per epoch of a replay: points in epochs are then where the corpus of the preset puts them."""
Losses = Sequence[float]


@dataclass(frozen=True)
class Recorded:
    """Verdict that a run of ours recorded at an evaluation; `statistics` as in `Verdict`."""

    update: int
    phase: str
    statistics: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Curve:
    """Evaluation and training losses as (position, loss), with strictly rising positions in the recording's own unit.

    Only a run of ours has `windows`, the input of its machine, with `window_rules` in force at each of them (a resume may
    change the patience), the last `rules`, and the `recorded` verdicts.
    """

    name: str
    evaluations: tuple[tuple[float, float], ...]
    training: tuple[tuple[float, float], ...] = ()
    group: str = ""
    window_length: float | None = None
    """Positions per window, if the recording defines it; otherwise each evaluation is one window."""
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
        """The latest training loss at each evaluation."""
        positions = [position for position, _ in self.training]
        latest = [bisect_right(positions, position) - 1 for position, _ in self.evaluations]
        return tuple(self.training[index][1] if index >= 0 else None for index in latest)


def windows_of(curve: Curve, clock: str = "windows") -> tuple[Window, ...]:
    """The windows of `curve`.

    Args:
        curve: a recording.
        clock: `windows` counts each evaluation as `WINDOW_UPDATES` updates, unless the curve has a window length;
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
        # Positions in fractions of an epoch may round to the same update, but the machine needs rising ones.
        update = max(update, windows[-1].update + 1) if windows else update
        windows.append(Window(update=update, tokens=0, lr=0.0, loss=loss, train_loss=train))
    return tuple(windows)


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


@dataclass(frozen=True)
class ReplayComparison:
    """A replay of the same recording under another rule, with the name of that rule."""

    name: str
    replay: Replay


def replay_rules(curve: Curve, settings: ConvergenceConfig, clock: str = "windows") -> Rules:
    """The rules of `settings` in the clock of the recording, with `EPOCH_WINDOWS` windows per epoch."""
    every = WINDOW_UPDATES
    if clock == "updates" or curve.windows:
        updates = [window.update for window in windows_of(curve, clock)]
        gaps = [later - earlier for earlier, later in zip(updates[:-1], updates[1:], strict=True)]
        every = max(1, median_low(gaps)) if gaps else WINDOW_UPDATES
    epoch = EPOCH_WINDOWS * every
    return Rules.from_config(settings, lambda point: updates_at(point, epoch, 1.0), EvaluationConfig(every=every))


def replay(curve: Curve, rules: Rules, clock: str = "windows") -> Replay:
    """Let a new machine observe the recording until it stops.

    With its own `rules`, a run of ours is replayed with the rules that were in force at each window.
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
    """Where phase or statistics differ from what the run itself recorded."""
    lines = []
    for verdict, recorded in zip(result.verdicts, result.curve.recorded, strict=False):
        ours = {"phase": verdict.phase.name, **verdict.statistics}
        theirs = {"phase": recorded.phase, **recorded.statistics}
        for name, value in ours.items():
            if theirs.get(name, value) != value:
                lines.append(f"update {recorded.update}: the run recorded {name} {theirs[name]}; the replay gives {value}")
    if len(result.verdicts) != len(result.curve.recorded):
        lines.append(f"the run recorded {len(result.curve.recorded)} verdicts; the replay gives {len(result.verdicts)}")
    return lines


def story(result: Replay, *, whole: bool = False) -> list[str]:
    """The replay as text.

    Args:
        result: a replay.
        whole: include every window, not only those with an event.
    """
    windows, rules = result.windows, result.rules
    finite = [window.loss for window in windows if math.isfinite(window.loss)]
    if not finite:
        return [f"{result.curve.name}: {plural(len(windows), 'evaluation')}, none of them finite"]
    lines = [
        f"{result.curve.name}: {plural(len(windows), 'evaluation')}, one window = {plural(rules.every, 'update')}, "
        f"loss {finite[0]:.4g} -> lowest {min(finite):.4g} -> last {finite[-1]:.4g}",
        f"rules: start {rules.start}, judge_from {rules.judge_from}, patience {plural(rules.patience, 'window')}, "
        f"counted gain {rules.min_gain:g} or {100 * rules.min_gain_rel:g} % ({rules.anchor_rule}), "
        f"at saturation: {rules.on_saturation}",
    ]
    lines += [f"warning: {text}" for text in unreachable(rules, windows[-1].update)]
    for number, (window, verdict) in enumerate(zip(windows, result.verdicts, strict=False)):
        if whole or number == 0 or verdict.events or verdict.stop:
            lines.append(f"{window.update:>8}  {window.loss:<8.4g} {verdict.phase.name:<21} {format_verdict(verdict)}")
    return lines + _balance(result, min(finite), finite[0])


def _balance(result: Replay, least: float, first: float) -> list[str]:
    """The stop, the loss that is kept, and what the stop costs and saves."""
    windows, done, best = result.windows, len(result.verdicts), result.best
    if best is None:
        return ["no evaluation became the best"]
    last = result.verdicts[-1]
    if last.stop:
        lines = [f"stops at update {last.update} of {windows[-1].update} ({last.stop}), after {done} of {len(windows)} windows"]
    else:
        lines = [f"never stops: the recording ends in {last.phase.name} at update {windows[-1].update}"]
    share = 100 * (best.loss - least) / (first - least) if first > least else 0.0
    at = windows[lowest(result.curve.losses, len(windows))].update
    cost = f"forgoes {best.loss - least:.4g} ({share:.2f} % of the descent): the lowest, {least:.4g}, is at update {at}"
    lines.append(f"keeps {best.loss:.4g} of update {best.update}; {cost if best.loss > least else 'forgoes nothing'}")
    lines.append(f"saves {plural(len(windows) - done, 'window')}, {100 * (1 - done / len(windows)):.0f} % of the recording")
    has_cooled = result.curve.windows and result.rules == result.curve.rules
    if any(verdict.phase is Phase.COOLDOWN for verdict in result.verdicts) and not has_cooled:
        lines.append("the recording did not cool down, so these figures do not include the gain of a decaying learning rate")
    return lines


def lowest(losses: Losses, end: int) -> int:
    """Index of the lowest finite loss before `end`, the oldest of equals; the last index where none is finite."""
    finite = [index for index in range(end) if math.isfinite(losses[index])]
    return min(finite, key=lambda index: losses[index]) if finite else end - 1
