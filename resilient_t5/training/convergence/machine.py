"""The loss-window state machine: when a run counts as saturated, and why.

Once per evaluation the machine observes one window and gives one verdict. The decision is plain anchored patience: a
window counts as a gain when its loss lies below the *anchor*, the last loss that counted, by more than the counted
gain; after `patience` judged windows without one the run is saturated. Nothing is charged before `judge_from`, the
first judged window sets the anchor, and best is the strict minimum of all finite evaluations from the first on.
The statistics of `trend.py` explain each verdict and decide nothing. docs/stopping.md has the measurements.

Phases move by the table of `phases.py` alone. State is JSON; no torch, no files, no clock, no random numbers. Limits and
signals belong to the loop and leave the machine as it is, so a resumed run is never born stopped.
The words and numbers that explain a verdict are read off the state and change nothing.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from resilient_t5.errors import DataError
from resilient_t5.training.convergence.phases import AFTER_PLATEAU, NEXT, Mark, Phase, Reason, Sign, State, Verdict, Window
from resilient_t5.training.convergence.rules import Rules, unreachable
from resilient_t5.training.convergence.trend import (
    CUSUM_ALARM,
    DIRECTION_CODES,
    HORIZON_WINDOWS,
    RECENT,
    Trend,
    cusum_after,
    judge_trend,
    noise_sigma,
)

__all__ = [
    "ConvergenceMachine",
    "Mark",
    "Phase",
    "Reason",
    "Rules",
    "Sign",
    "Verdict",
    "Window",
    "cooldown_factor",
    "unreachable",
]


def cause_of(rules: Rules, state: State, window: Window, reference: float | None, *, previous: Phase, sign: Sign) -> str:
    """What this window meant, in a few words."""
    if sign in (Sign.EARLY, Sign.WATCHED):
        watching = f"watching from {rules.start}, " if sign is Sign.EARLY and rules.start < rules.judge_from else ""
        return f"{watching}judging from {rules.judge_from}"
    if sign is Sign.BASED:
        return f"first judged window, anchor {window.loss:.4g}"
    if sign is Sign.FELL and reference is not None:
        second = "secondary convergence: " if previous in AFTER_PLATEAU else ""
        return f"{second}gain of {reference - window.loss:.3g} counted"
    if not math.isfinite(window.loss):
        return f"loss is not finite, {state.nonfinite} so far"
    if sign in (Sign.SPENT, Sign.COOLING) and state.best:
        where = f"best {state.best.value:.4g} at {state.best.update}"
        return f"{state.plateau} windows without a counted gain, {where}" if previous != Phase.COOLDOWN else where
    needed = rules.needed_gain(reference) if reference is not None else rules.min_gain
    return f"no gain above {needed:.3g}"


def statistics_of(rules: Rules, state: State, trend: Trend | None, train_trend: Trend | None) -> dict[str, float | None]:
    """Numbers for TensorBoard and metrics.jsonl; None where there are too few windows yet."""
    return {
        "plateau": float(state.plateau),
        "patience": float(rules.patience),
        "anchor": state.anchor.loss if state.anchor else None,
        "verdict": DIRECTION_CODES[trend.direction] if trend else None,
        "level": trend.level if trend else None,
        "gain": trend.gain if trend else None,
        "gain_low": trend.gain_low if trend else None,
        "gain_high": trend.gain_high if trend else None,
        "worth": trend.worth if trend else None,
        "sigma": trend.sigma if trend else None,
        "train_gain": train_trend.gain if train_trend else None,
    }


def format_statistics(plateau: int, patience: int, trend: Trend | None) -> str:
    """The counter and the trend, as the console shows them."""
    counter = f"plateau={plateau}/{patience}"
    if trend is None:
        return f"{counter} trend=none"
    interval = f"[{trend.gain_low:.3g},{trend.gain_high:.3g}]"
    gain = f"gain/{HORIZON_WINDOWS}w={trend.gain:.3g} {interval}"
    return f"{counter} trend={trend.direction} {gain} worth={trend.worth:.2g} sigma={trend.sigma:.2g}"


def format_earliest(update: int | None) -> str:
    """The end of the line: when the run could stop at the earliest."""
    return f", earliest stop {update}" if update is not None else ""


def format_verdict(verdict: Verdict) -> str:
    """Why the run goes on or stops, with the events in brackets; a change of phase shows in the phase itself."""
    events = ", ".join(event for event in verdict.events if event != "phase")
    return f"{verdict.why} [{events}]" if events else verdict.why


NOISE_TOLD_AT = 6
"""Judged windows after which an evaluation noise above the counted gain is told, once."""

HIGH_WINDOWS = 2
"""Windows in a row above the divergence limit that end a run: one alone may be a spike that the next one has forgotten."""


def cooldown_factor(update: int, start: int | None, length: int) -> float:
    """Factor of the learning rate of the update that follows `update` done ones: 1 before `start`, then linearly to 0.

    The last update of the cooldown still has 1 / length, so none is wasted.
    """
    if start is None or update < start:
        return 1.0
    return max(0.0, 1.0 - (update - start) / length)


def _without_removed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A state of an earlier version, which could extend the patience or stop as overfit, in the terms of this one."""
    kept = {key: value for key, value in values.items() if key != "overfit"}
    if kept.get("phase") == "EXTENDED":
        kept["phase"] = Phase.PLATEAU.name
    if kept.get("reason") == "saturated_max":
        kept["reason"] = Reason.SATURATED.value
    if kept.get("reason") == "overfit":
        kept |= {"phase": Phase.PLATEAU.name, "reason": None}
    return kept


class ConvergenceMachine:
    """One run's judge. `observe` once per evaluation; `state` and `restore` carry it over a restart without a trace."""

    def __init__(self, rules: Rules):
        self.rules = rules
        self._state = State()

    @property
    def phase(self) -> Phase:
        """Where the run stands."""
        return Phase(self._state.phase)

    @property
    def best(self) -> Mark | None:
        """The strict best of all finite evaluations by the criterion; of equals the oldest."""
        return self._state.best

    @property
    def reason(self) -> Reason | None:
        """Why the machine ended the run; None while it has not."""
        return None if self._state.reason is None else Reason(self._state.reason)

    @property
    def cooldown_start(self) -> int | None:
        """The update at which the learning rate began to go down; None before."""
        return self._state.cooldown_start

    @property
    def cooldown_updates(self) -> int:
        """Length of the cooldown under way; 0 when there is none."""
        return 0 if self.cooldown_start is None else self.rules.cooldown_updates(self.cooldown_start)

    def state(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        values = asdict(self._state)
        return {**values, "phase": self.phase.name, "recent": [list(entry) for entry in self._state.recent]}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Take over what `state` gave. A run that had saturated is reopened when the patience has been raised since.

        Raises:
            DataError: keys are missing or unknown, or a value is of the wrong kind.
        """
        values = _without_removed(values)
        if values.keys() != asdict(State()).keys():
            unfit = ", ".join(sorted(values.keys() ^ asdict(State()).keys()))
            raise DataError(f"the saved convergence state has missing or unknown keys: {unfit}")
        try:
            marks = {key: values[key] and Mark(**values[key]) for key in ("best", "lowest", "anchor")}
            recent = [(int(update), float(loss), train) for update, loss, train in values["recent"]]
            state = State(**{**values, **marks, "phase": Phase[values["phase"]], "recent": recent})
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"the saved convergence state is damaged: {error}") from None
        if self._patience_was_raised(state):
            state.reason = None
        self._state = state

    def observe(self, window: Window) -> Verdict:
        """Judge one window.

        Raises:
            RuntimeError: the machine has already ended the run.
            ValueError: the window is not later than the last one.
        """
        state, rules = self._state, self.rules
        if state.reason is not None:
            raise RuntimeError(f"the convergence machine has stopped: {state.reason}")
        if window.update <= state.last_update:
            raise ValueError(f"window at update {window.update} is not later than the last one, {state.last_update}")
        state.last_update = window.update
        previous, reference = self.phase, self._reference()
        events = self._watch_plateau(window)
        broken = self._diverged(window)
        is_best = not broken and self._keep(window)
        trend, train_trend = self._remember(window)
        if broken:
            sign, state.reason = Sign.BROKEN, Reason.DIVERGED
        elif window.update < rules.judge_from:
            sign = Sign.EARLY if window.update < rules.start else Sign.WATCHED
        elif state.cooldown_start is not None:
            sign = Sign.SPENT if window.update >= state.cooldown_start + self.cooldown_updates else Sign.COOLING
        else:
            sign = self._judge(window, reference)
        phase = NEXT[previous][sign]
        state.phase = phase
        if sign is Sign.SPENT and rules.on_saturation != "continue":
            state.reason = Reason.SATURATED
        events += self._events(window, previous, sign, trend)
        cause = broken or cause_of(rules, state, window, reference, previous=previous, sign=sign)
        statistics = format_statistics(state.plateau, rules.patience, trend)
        earliest = self._earliest_stop()
        return Verdict(
            update=window.update,
            phase=phase,
            previous=previous,
            stop=self.reason,
            why=f"{statistics} -> {self._action(sign)} ({cause}{format_earliest(earliest)})",
            earliest_stop_update=earliest,
            is_best=is_best,
            events=tuple(events),
            statistics=statistics_of(rules, state, trend, train_trend),
        )

    def _patience_was_raised(self, state: State) -> bool:
        waits = state.reason == Reason.SATURATED and state.cooldown_start is None
        return waits and state.plateau < self.rules.patience

    def _reference(self) -> float | None:
        mark = self._state.lowest if self.rules.anchor_rule == "best" else self._state.anchor
        return None if mark is None else mark.loss

    def _diverged(self, window: Window) -> str:
        """Why the run counts as diverged; empty when it does not."""
        state, rules = self._state, self.rules
        if not math.isfinite(window.loss):
            state.nonfinite += 1
            limit = rules.nonfinite_limit
            return f"{state.nonfinite} evaluations were not finite" if limit and state.nonfinite >= limit else ""
        lowest, train = state.lowest, window.train_loss
        if not rules.divergence_factor or lowest is None or lowest.loss <= 0:
            return ""
        # A run that fits its training text better than ever has overfitted; patience ends it, and it may come back.
        memorises = train is not None and train <= lowest.loss
        high = window.loss > rules.divergence_factor * lowest.loss and not memorises
        state.high = state.high + 1 if high else 0
        if state.high < HIGH_WINDOWS:
            return ""
        return f"loss {window.loss:.4g} is again above {rules.divergence_factor:g} x the lowest, {lowest.loss:.4g}"

    def _keep(self, window: Window) -> bool:
        """Keep the lowest loss and the best by the criterion; whether this window is the best."""
        state = self._state
        if not math.isfinite(window.loss):
            return False
        if state.lowest is None or window.loss < state.lowest.loss:
            state.lowest = Mark(window.update, window.loss, window.loss)
        if self.rules.criterion == "loss":
            better = state.lowest.update == window.update
            value = window.loss
        else:
            value = window.series.get(self.rules.criterion, math.nan)
            better = math.isfinite(value) and (state.best is None or value > state.best.value)
        if better:
            state.best = Mark(window.update, window.loss, value)
        return better

    def _watch_plateau(self, window: Window) -> list[str]:
        """Look for a change point on a plateau: it restarts the slope window and announces what patience will count later."""
        state = self._state
        if self.phase not in AFTER_PLATEAU:
            state.cusum = 0.0
            return []
        sigma = noise_sigma([loss for _, loss, _ in state.recent])
        segment = [loss for update, loss, _ in state.recent[-state.plateau :] if update >= state.slope_from]
        if sigma is None or not segment or not math.isfinite(window.loss):
            return []
        state.cusum = cusum_after(state.cusum, window.loss, segment, sigma)
        if state.cusum <= CUSUM_ALARM:
            return []
        state.cusum, state.slope_from = 0.0, window.update
        was_announced, state.announced = state.announced, True
        return ["change_point"] + ([] if was_announced else ["secondary_convergence"])

    def _remember(self, window: Window) -> tuple[Trend | None, Trend | None]:
        """Take the window into the recent ones; the trends of the evaluation loss and of the training loss."""
        state = self._state
        if math.isfinite(window.loss):
            train = window.train_loss if window.train_loss is not None and math.isfinite(window.train_loss) else None
            state.recent = [*state.recent, (window.update, window.loss, train)][-RECENT:]
        sigma = noise_sigma([loss for _, loss, _ in state.recent])
        if sigma is not None and window.paired_se is not None and math.isfinite(window.paired_se):
            sigma = max(sigma, window.paired_se / math.sqrt(2))
        trend = judge_trend([loss for update, loss, _ in state.recent if update >= state.slope_from], state.plateau, sigma)
        trains = [train for _, _, train in state.recent if train is not None]
        return trend, judge_trend(trains, state.plateau, noise_sigma(trains))

    def _judge(self, window: Window, reference: float | None) -> Sign:
        """Charge or reset patience; the only place where a window counts."""
        state, rules = self._state, self.rules
        state.judged += 1
        finite = math.isfinite(window.loss)
        # The difference is formed as the peers form it, so that equal thresholds round equally.
        if finite and (reference is None or reference - window.loss > rules.needed_gain(reference)):
            state.anchor = Mark(window.update, window.loss, window.loss)
            state.plateau = 0
            return Sign.BASED if reference is None else Sign.FELL
        state.plateau += 1
        if state.plateau < rules.patience:
            return Sign.LEVEL if state.plateau >= max(1, rules.patience // 2) else Sign.STALLED
        if rules.on_saturation == "cooldown":
            state.cooldown_start = window.update
            return Sign.COOLING
        return Sign.SPENT

    def _events(self, window: Window, previous: Phase, sign: Sign, trend: Trend | None) -> list[str]:
        state = self._state
        events = [] if math.isfinite(window.loss) else ["nonfinite"]
        if state.phase != previous:
            events.append("phase")
        if sign in (Sign.FELL, Sign.BASED):
            if self.phase is Phase.SECONDARY_CONVERGENCE and previous in AFTER_PLATEAU and not state.announced:
                events.append("secondary_convergence")
            state.announced = False
        anchor = state.anchor
        if state.judged == NOISE_TOLD_AT and state.cooldown_start is None and trend and anchor:
            events += ["noise_above_gain"] if trend.sigma > self.rules.needed_gain(anchor.loss) else []
        return events

    def _earliest_stop(self) -> int | None:
        """The earliest update at which a run whose losses stay finite can still end as saturated."""
        state, rules = self._state, self.rules
        if state.reason is not None or rules.on_saturation == "continue":
            return None
        if state.cooldown_start is not None:
            return state.cooldown_start + self.cooldown_updates
        first = rules.first_judged(state.last_update)
        unset = self._reference() is None and (rules.anchor_rule == "counted" or first == state.last_update + rules.every)
        missing = max(1, rules.patience - state.plateau) + unset
        stop = first + (missing - 1) * rules.every
        return stop + (rules.cooldown_updates(stop) if rules.on_saturation == "cooldown" else 0)

    def _action(self, sign: Sign) -> str:
        if self.reason is not None:
            return f"stop: {self.reason}"
        if sign is Sign.COOLING and self.cooldown_start is not None:
            return f"cooldown to update {self.cooldown_start + self.cooldown_updates}"
        return "saturated, going on as asked" if sign is Sign.SPENT else "continue"
