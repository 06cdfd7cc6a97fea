"""Phases of a run, the table of their transitions, and the input, output and state of the convergence machine.

`machine.py` turns each window into one sign; the next phase is always `NEXT[phase][sign]`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum


class Phase(IntEnum):
    """Phase of a run; TensorBoard draws the numbers. 5 was a phase of an earlier version."""

    WARMUP = 0
    """Before `start`."""
    OBSERVE = 1
    """Before `judge_from`: verdicts are reported but cannot stop the run."""
    DESCENT = 2
    """Judged, with less than half of the patience used."""
    PLATEAU = 3
    """Half of the patience or more is used."""
    SECONDARY_CONVERGENCE = 4
    """A counted gain followed a plateau."""
    COOLDOWN = 6
    """Saturated; the learning rate decays linearly to zero and no window is judged."""
    SATURATED = 7
    """The patience is used up; final unless `on_saturation` is `continue`."""
    STOPPED = 8
    """Diverged; final."""


class Sign(StrEnum):
    """Meaning of one window."""

    EARLY = "update is below start"
    WATCHED = "update is below judge_from"
    BASED = "first finite judged window, which sets the anchor"
    FELL = "counted gain"
    STALLED = "no counted gain, less than half of the patience used"
    LEVEL = "no counted gain, half of the patience or more used"
    COOLING = "patience used up, cooldown not done"
    SPENT = "patience used up, or cooldown done"
    BROKEN = "diverged"


class Reason(StrEnum):
    """Reason of the machine to end a run."""

    SATURATED = "saturated"
    DIVERGED = "diverged"


_AFTER_PATIENCE = {
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
    Phase.COOLDOWN: {Sign.COOLING: Phase.COOLDOWN, Sign.SPENT: Phase.SATURATED, Sign.BROKEN: Phase.STOPPED},
    Phase.SATURATED: _AFTER_PLATEAU,  # left only with on_saturation continue, or with a patience raised on a resume
    Phase.STOPPED: {},
}
AFTER_PLATEAU = (Phase.PLATEAU, Phase.SATURATED)
"""Phases after which a counted gain is a secondary convergence."""


@dataclass(frozen=True)
class Window:
    """Result of one evaluation. Losses are means in nats per target token, without padding, on the fixed evaluation set."""

    update: int
    tokens: int
    lr: float
    loss: float
    loss_se: float | None = None
    """Standard error of `loss` over documents."""
    train_loss: float | None = None
    """Mean training loss of the window; distinguishes overfitting from divergence."""
    train_se: float | None = None
    series: Mapping[str, float] = field(default_factory=dict)
    """Further measures, such as `term_restoration`."""
    paired_se: float | None = None
    """Standard error of the paired difference to the best evaluation; a lower bound of the noise."""


@dataclass(frozen=True)
class Mark:
    """A loss, its update, and the value that the criterion compares."""

    update: int
    loss: float
    value: float


@dataclass(frozen=True)
class Verdict:
    """Decision of the machine on one window, with its explanation."""

    update: int
    phase: Phase
    previous: Phase
    stop: Reason | None
    why: str
    earliest_stop_update: int | None
    is_best: bool
    events: tuple[str, ...]
    statistics: dict[str, float | None]


@dataclass
class State:
    """State of the machine, as JSON values and marks."""

    phase: int = Phase.WARMUP
    best: Mark | None = None
    lowest: Mark | None = None
    anchor: Mark | None = None
    plateau: int = 0
    judged: int = 0
    nonfinite: int = 0
    high: int = 0
    recent: list[tuple[int, float, float | None]] = field(default_factory=list)
    slope_from: int = 0
    cusum: float = 0.0
    announced: bool = False
    cooldown_start: int | None = None
    last_update: int = -1
    reason: str | None = None
