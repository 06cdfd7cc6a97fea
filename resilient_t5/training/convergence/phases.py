"""The phases of a run and the table that moves between them; what goes into the convergence machine and what comes out.

`training/convergence/machine.py` turns each window into one sign; the next phase is `NEXT[phase][sign]` and nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum


class Phase(IntEnum):
    """Where the run stands; the numbers are what TensorBoard draws. 5 was a phase of an earlier version."""

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
    COOLDOWN = 6
    """Saturated; the learning rate goes linearly to zero and nothing is judged."""
    SATURATED = 7
    """Patience is used up: the end, unless `on_saturation` is `continue`."""
    STOPPED = 8
    """Diverged: the end."""


class Sign(StrEnum):
    """What one window means to the machine."""

    EARLY = "update is below start"
    WATCHED = "update is below judge_from"
    BASED = "first finite judged window: it sets the anchor"
    FELL = "counted gain"
    STALLED = "no counted gain, less than half of the patience used"
    LEVEL = "no counted gain, half of the patience or more used"
    COOLING = "patience used up, cooldown not done"
    SPENT = "patience used up, or cooldown done"
    BROKEN = "diverged"


class Reason(StrEnum):
    """Why the machine ends a run; the loop has reasons of its own."""

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
"""Phases out of which a counted gain is a secondary convergence."""


@dataclass(frozen=True)
class Window:
    """What one evaluation knows. Losses are means per target token in nats, pads excluded, on the fixed evaluation set."""

    update: int
    tokens: int
    lr: float
    loss: float
    loss_se: float | None = None
    """Standard error of `loss` between documents."""
    train_loss: float | None = None
    """Mean training loss of the window; explains, and tells overfitting from divergence."""
    train_se: float | None = None
    series: Mapping[str, float] = field(default_factory=dict)
    """Further measures, such as `term_restoration`."""
    paired_se: float | None = None
    """Standard error of the difference to the best, example by example; a floor of the noise where it is known."""


@dataclass(frozen=True)
class Mark:
    """A loss and where it was measured; `value` is what the criterion compares."""

    update: int
    loss: float
    value: float


@dataclass(frozen=True)
class Verdict:
    """What the machine makes of one window."""

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
    """All that the machine remembers; JSON values and marks."""

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
