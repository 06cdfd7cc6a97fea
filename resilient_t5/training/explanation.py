"""The words and numbers that explain a verdict; they read the machine's state and change nothing."""

import math

from resilient_t5.training.phases import AFTER_PLATEAU, Phase, Sign
from resilient_t5.training.presets import Rules
from resilient_t5.training.trend import DIRECTION_CODES, HORIZON_WINDOWS, Trend
from resilient_t5.training.window import State, Verdict, Window


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
    if sign is Sign.BROKEN and state.lowest:
        return f"{state.overfit} rising windows, {window.loss:.4g} is above the lowest, {state.lowest.loss:.4g}"
    if not math.isfinite(window.loss):
        return f"loss is not finite, {state.nonfinite} so far"
    if sign in (Sign.SPENT, Sign.COOLING) and state.best:
        where = f"best {state.best.value:.4g} at {state.best.update}"
        return f"{state.plateau} windows without a counted gain, {where}" if previous != Phase.COOLDOWN else where
    if sign is Sign.LONGER:
        return f"extended to {rules.patience_max} windows while the trend is not flat"
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


def told(plateau: int, patience: int, trend: Trend | None) -> str:
    """The counter and the trend, as the console shows them."""
    counter = f"plateau={plateau}/{patience}"
    if trend is None:
        return f"{counter} trend=none"
    interval = f"[{trend.gain_low:.3g},{trend.gain_high:.3g}]"
    gain = f"gain/{HORIZON_WINDOWS}w={trend.gain:.3g} {interval}"
    return f"{counter} trend={trend.direction} {gain} worth={trend.worth:.2g} sigma={trend.sigma:.2g}"


def told_earliest(update: int | None) -> str:
    """The end of the line: when the run could stop at the earliest."""
    return f", earliest stop {update}" if update is not None else ""


def told_verdict(verdict: Verdict) -> str:
    """Why the run goes on or stops, with the events in brackets; a change of phase shows in the phase itself."""
    events = ", ".join(event for event in verdict.events if event != "phase")
    return f"{verdict.why} [{events}]" if events else verdict.why
