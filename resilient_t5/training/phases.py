"""The phases of a run and the table that moves between them.

`training/convergence.py` turns each window into one sign; the next phase is `NEXT[phase][sign]` and nothing else.
"""

from enum import IntEnum, StrEnum


class Phase(IntEnum):
    """Where the run stands; the numbers are what TensorBoard draws."""

    WARMUP = 0
    """Before `start`: training always goes on."""
    OBSERVE = 1
    """Before `judge_from`: verdicts are told, a stop is vetoed."""
    DESCENT = 2
    """Judged, and the loss still makes counted gains."""
    PLATEAU = 3
    """Half of the patience or more is used up."""
    SECONDARY_CONVERGENCE = 4
    """A counted gain has come after a plateau."""
    EXTENDED = 5
    """Patience is used up, the trend is not flat, and a bounded extension was asked for."""
    COOLDOWN = 6
    """Saturated; the learning rate goes linearly to zero and nothing is judged."""
    SATURATED = 7
    """Patience is used up: the end, unless `on_saturation` is `continue`."""
    STOPPED = 8
    """Diverged or overfit: the end."""


class Sign(StrEnum):
    """What one window means to the machine."""

    EARLY = "update is below start"
    WATCHED = "update is below judge_from"
    BASED = "first finite judged window: it sets the anchor"
    FELL = "counted gain"
    STALLED = "no counted gain, less than half of the patience used"
    LEVEL = "no counted gain, half of the patience or more used"
    LONGER = "patience used up, trend not flat, extension left"
    COOLING = "patience used up, cooldown not done"
    SPENT = "patience used up, or cooldown done"
    BROKEN = "diverged or overfit"


class Reason(StrEnum):
    """Why the machine ends a run; the loop has reasons of its own."""

    SATURATED = "saturated"
    SATURATED_MAX = "saturated_max"
    OVERFIT = "overfit"
    DIVERGED = "diverged"


_AFTER_PATIENCE = {
    Sign.LONGER: Phase.EXTENDED,
    Sign.COOLING: Phase.COOLDOWN,
    Sign.SPENT: Phase.SATURATED,
    Sign.BROKEN: Phase.STOPPED,
}
_FIRST_JUDGED = {
    Sign.BASED: Phase.DESCENT,
    Sign.FELL: Phase.DESCENT,
    Sign.STALLED: Phase.DESCENT,
    Sign.LEVEL: Phase.PLATEAU,
    **_AFTER_PATIENCE,
}
_AFTER_PLATEAU = {
    Sign.BASED: Phase.DESCENT,  # only when every judged window so far was not finite
    Sign.FELL: Phase.SECONDARY_CONVERGENCE,
    Sign.STALLED: Phase.PLATEAU,  # only when the patience was raised on a resume
    Sign.LEVEL: Phase.PLATEAU,
    **_AFTER_PATIENCE,
}
NEXT: dict[Phase, dict[Sign, Phase]] = {
    Phase.WARMUP: {Sign.EARLY: Phase.WARMUP, Sign.WATCHED: Phase.OBSERVE, **_FIRST_JUDGED},
    Phase.OBSERVE: {Sign.WATCHED: Phase.OBSERVE, **_FIRST_JUDGED},
    Phase.DESCENT: _FIRST_JUDGED,
    Phase.PLATEAU: _AFTER_PLATEAU,
    Phase.SECONDARY_CONVERGENCE: {
        Sign.FELL: Phase.SECONDARY_CONVERGENCE,
        Sign.STALLED: Phase.SECONDARY_CONVERGENCE,
        Sign.LEVEL: Phase.PLATEAU,
        **_AFTER_PATIENCE,
    },
    Phase.EXTENDED: _AFTER_PLATEAU,
    Phase.COOLDOWN: {Sign.COOLING: Phase.COOLDOWN, Sign.SPENT: Phase.SATURATED, Sign.BROKEN: Phase.STOPPED},
    Phase.SATURATED: _AFTER_PLATEAU,  # left only with on_saturation continue, or with a patience raised on a resume
    Phase.STOPPED: {},
}
AFTER_PLATEAU = (Phase.PLATEAU, Phase.EXTENDED, Phase.SATURATED)
"""Phases out of which a counted gain is a secondary convergence."""
