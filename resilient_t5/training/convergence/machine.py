"""The convergence machine: decides once per evaluation whether a run is saturated, and explains why.

The decision is anchored patience. A window counts as a gain when its loss is below the *anchor*, the last loss that
counted, by more than the counted gain. After `patience` judged windows without a counted gain the run is saturated.
Windows before `judge_from` use no patience, the first judged window sets the anchor, and best is the strict minimum of
all finite evaluations. The statistics of `trend.py` explain a verdict and decide nothing; docs/stopping.md has the
measurements.

Phases follow the table in `phases.py`. The state is JSON; the machine uses no torch, files, clock or random numbers.
Limits of a run and signals belong to the loop and do not change the machine, so a resumed run never starts as stopped.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from resilient_t5.errors import DataError, plural
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

__all__ = ["ConvergenceMachine", "Phase", "Reason", "Rules", "Verdict", "Window", "cooldown_factor", "unreachable"]

NOISE_CHECKED_AT = 6
"""Judged windows after which an evaluation noise above the counted gain is reported, once."""
HIGH_WINDOWS = 2
"""Windows in a row above the divergence limit that end a run; a single one may be a spike."""


def cooldown_factor(update: int, start: int | None, length: int) -> float:
    """Factor of the learning rate after `update` updates: 1 before `start`, then linearly to 0.

    The last update of the cooldown has 1 / length, so none is wasted.
    """
    if start is None or update < start:
        return 1.0
    return max(0.0, 1.0 - (update - start) / length)


def format_verdict(verdict: Verdict) -> str:
    """The explanation of a verdict with its events in brackets; the phase is shown separately."""
    events = ", ".join(event for event in verdict.events if event != "phase")
    return f"{verdict.why} [{events}]" if events else verdict.why


class ConvergenceMachine:
    """Judges one run: call `observe` once per evaluation; `state` and `restore` carry it over a restart."""

    def __init__(self, rules: Rules):
        self.rules = rules
        self._state = State()

    @property
    def phase(self) -> Phase:
        """The current phase."""
        return Phase(self._state.phase)

    @property
    def best(self) -> Mark | None:
        """The best of all finite evaluations by the criterion; the oldest of equals."""
        return self._state.best

    @property
    def reason(self) -> Reason | None:
        """Why the machine ended the run, or None."""
        return None if self._state.reason is None else Reason(self._state.reason)

    @property
    def cooldown_start(self) -> int | None:
        """The update at which the cooldown began, or None."""
        return self._state.cooldown_start

    @property
    def cooldown_updates(self) -> int:
        """Length of the cooldown; 0 before it has begun."""
        return 0 if self.cooldown_start is None else self.rules.cooldown_updates(self.cooldown_start)

    def state(self) -> dict[str, Any]:
        """The whole state as JSON values."""
        values = asdict(self._state)
        return {**values, "phase": self.phase.name, "recent": [list(entry) for entry in self._state.recent]}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Restore what `state` returned. A saturated run is reopened if the patience has been raised since.

        Raises:
            DataError: keys are missing or unknown, or a value has the wrong type.
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
        if state.reason == Reason.SATURATED and state.cooldown_start is None and state.plateau < self.rules.patience:
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
        divergence = self._diverged(window)
        is_best = not divergence and self._update_best(window)
        trend, train_trend = self._remember(window)
        if divergence:
            sign, state.reason = Sign.BROKEN, Reason.DIVERGED
        elif window.update < rules.judge_from:
            sign = Sign.EARLY if window.update < rules.start else Sign.WATCHED
        elif state.cooldown_start is not None:
            sign = Sign.SPENT if window.update >= state.cooldown_start + self.cooldown_updates else Sign.COOLING
        else:
            sign = self._judge(window, reference)
        state.phase = NEXT[previous][sign]
        if sign is Sign.SPENT and rules.on_saturation != "continue":
            state.reason = Reason.SATURATED
        earliest = self._earliest_stop()
        cause = divergence or self._cause(window, reference, previous, sign)
        until = "" if earliest is None else f", earliest stop {earliest}"
        return Verdict(
            update=window.update,
            phase=self.phase,
            previous=previous,
            stop=self.reason,
            why=f"{_format_statistics(state.plateau, rules.patience, trend)} -> {self._action(sign)} ({cause}{until})",
            earliest_stop_update=earliest,
            is_best=is_best,
            events=tuple(events + self._events(window, previous, sign, trend)),
            statistics=self._statistics(trend, train_trend),
        )

    def _reference(self) -> float | None:
        mark = self._state.lowest if self.rules.anchor_rule == "best" else self._state.anchor
        return None if mark is None else mark.loss

    def _diverged(self, window: Window) -> str:
        """Why the run has diverged, or an empty text."""
        state, rules = self._state, self.rules
        if not math.isfinite(window.loss):
            state.nonfinite += 1
            limit = rules.nonfinite_limit
            return f"{state.nonfinite} evaluations were not finite" if limit and state.nonfinite >= limit else ""
        lowest, train = state.lowest, window.train_loss
        if not rules.divergence_factor or lowest is None or lowest.loss <= 0:
            return ""
        # A training loss below the lowest evaluation loss means overfitting, which patience ends; the run may recover.
        overfits = train is not None and train <= lowest.loss
        is_high = window.loss > rules.divergence_factor * lowest.loss and not overfits
        state.high = state.high + 1 if is_high else 0
        if state.high < HIGH_WINDOWS:
            return ""
        return f"loss {window.loss:.4g} is again above {rules.divergence_factor:g} x the lowest, {lowest.loss:.4g}"

    def _update_best(self, window: Window) -> bool:
        """Update the lowest loss and the best by the criterion; return whether this window is the best."""
        state = self._state
        if not math.isfinite(window.loss):
            return False
        if state.lowest is None or window.loss < state.lowest.loss:
            state.lowest = Mark(window.update, window.loss, window.loss)
        if self.rules.criterion == "loss":
            value = window.loss
            is_better = state.lowest.update == window.update
        else:
            value = window.series.get(self.rules.criterion, math.nan)
            is_better = math.isfinite(value) and (state.best is None or value > state.best.value)
        if is_better:
            state.best = Mark(window.update, window.loss, value)
        return is_better

    def _watch_plateau(self, window: Window) -> list[str]:
        """Detect a change point on a plateau; it restarts the slope window and announces a second descent early."""
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
        """Add the window to the recent ones; return the trends of evaluation and training loss."""
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
        """Use or reset patience; the only place where a window counts."""
        state, rules = self._state, self.rules
        state.judged += 1
        # The difference is computed as the peers compute it, so that equal thresholds round equally.
        is_gain = reference is None or reference - window.loss > rules.needed_gain(reference)
        if math.isfinite(window.loss) and is_gain:
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
        if state.judged == NOISE_CHECKED_AT and state.cooldown_start is None and trend and state.anchor:
            events += ["noise_above_gain"] if trend.sigma > self.rules.needed_gain(state.anchor.loss) else []
        return events

    def _earliest_stop(self) -> int | None:
        """The earliest update at which a run with finite losses can still end as saturated."""
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
        return "continue although saturated" if sign is Sign.SPENT else "continue"

    def _cause(self, window: Window, reference: float | None, previous: Phase, sign: Sign) -> str:
        """The reason for the verdict on a window that did not diverge."""
        rules, state = self.rules, self._state
        if sign in (Sign.EARLY, Sign.WATCHED):
            observed = f"observed from {rules.start}, " if sign is Sign.EARLY and rules.start < rules.judge_from else ""
            return f"{observed}judged from {rules.judge_from}"
        if sign is Sign.BASED:
            return f"first judged window, anchor {window.loss:.4g}"
        if sign is Sign.FELL and reference is not None:
            second = "secondary convergence: " if previous in AFTER_PLATEAU else ""
            return f"{second}counted gain of {reference - window.loss:.3g}"
        if not math.isfinite(window.loss):
            return f"loss is not finite, {state.nonfinite} so far"
        if sign in (Sign.SPENT, Sign.COOLING) and state.best:
            best = f"best {state.best.value:.4g} at {state.best.update}"
            without = f"{plural(state.plateau, 'window')} without a counted gain"
            return best if previous is Phase.COOLDOWN else f"{without}, {best}"
        needed = rules.needed_gain(reference) if reference is not None else rules.min_gain
        return f"no gain above {needed:.3g}"

    def _statistics(self, trend: Trend | None, train_trend: Trend | None) -> dict[str, float | None]:
        """Values for metrics.jsonl and TensorBoard; None where there are too few windows."""
        names = ("level", "gain", "gain_low", "gain_high", "worth", "sigma")
        return {
            "plateau": float(self._state.plateau),
            "patience": float(self.rules.patience),
            "anchor": self._state.anchor.loss if self._state.anchor else None,
            "verdict": DIRECTION_CODES[trend.direction] if trend else None,
            **{name: getattr(trend, name, None) for name in names},
            "train_gain": train_trend.gain if train_trend else None,
        }


def _without_removed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a state of an earlier version, which could extend the patience or stop as overfit."""
    kept = {key: value for key, value in values.items() if key != "overfit"}
    if kept.get("phase") == "EXTENDED":
        kept["phase"] = Phase.PLATEAU.name
    if kept.get("reason") == "saturated_max":
        kept["reason"] = Reason.SATURATED.value
    if kept.get("reason") == "overfit":
        kept |= {"phase": Phase.PLATEAU.name, "reason": None}
    return kept


def _format_statistics(plateau: int, patience: int, trend: Trend | None) -> str:
    """The patience used and the trend, as the console shows them."""
    used = f"patience {plateau}/{patience} used"
    if trend is None:
        return f"{used}, trend unknown"
    gain = f"gain over {HORIZON_WINDOWS} windows {trend.gain:.3g} [{trend.gain_low:.3g}, {trend.gain_high:.3g}]"
    return f"{used}, trend {trend.direction}, {gain}, flat below {trend.worth:.2g}, noise {trend.sigma:.2g}"
