"""What goes into the convergence machine, what it remembers, and what comes out: plain values."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from resilient_t5.training.phases import Phase, Reason


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
    overfit: int = 0
    recent: list[tuple[int, float, float | None]] = field(default_factory=list)
    slope_from: int = 0
    cusum: float = 0.0
    announced: bool = False
    cooldown_start: int | None = None
    last_update: int = -1
    reason: str | None = None
