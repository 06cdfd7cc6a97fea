"""A recorded course of losses, and the windows that the convergence machine makes of it."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

from resilient_t5.training.presets import Rules
from resilient_t5.training.window import Window

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
