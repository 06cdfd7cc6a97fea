"""Where the time of a run goes (updates, waiting for data, evaluations, saves), and the time left.

Times are wall-clock seconds of this process; none of them is part of the training state.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

SMOOTHING_UPDATES = 200


@dataclass(frozen=True)
class TimeLeft:
    """Seconds to the planned end, by activity."""

    training_s: float
    evaluation_s: float
    save_s: float

    @property
    def total_s(self) -> float:
        """Seconds to the planned end."""
        return self.training_s + self.evaluation_s + self.save_s

    def text(self) -> str:
        """Format as `1d 02h (train 23h 10m, eval 2h 04m, save 8m 20s)`; unknown or short parts are left out."""
        parts = {"train": self.training_s, "eval": self.evaluation_s, "save": self.save_s}
        named = ", ".join(f"{name} {readable(part_s)}" for name, part_s in parts.items() if part_s >= 1.0)
        return f"{readable(self.total_s)} ({named})" if named else readable(self.total_s)


@dataclass
class Timing:
    """Seconds by activity since this process started to train."""

    started_s: float = field(default_factory=time.monotonic)
    spent_s: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    lapped_s: dict[str, float] = field(default_factory=dict)
    update_s: float = math.nan
    """Moving average over about SMOOTHING_UPDATES updates."""

    @contextmanager
    def measure(self, activity: str) -> Iterator[None]:
        """Add the time of the block to `activity`: update, wait, evaluation or save."""
        started_s = time.monotonic()
        try:
            yield
        finally:
            self.add(activity, time.monotonic() - started_s)

    def add(self, activity: str, duration_s: float) -> None:
        """Add `duration_s` to `activity`."""
        self.spent_s[activity] = self.spent_s.get(activity, 0.0) + duration_s
        count = self.counts[activity] = self.counts.get(activity, 0) + 1
        if activity == "update":
            weight = 1.0 / min(count, SMOOTHING_UPDATES)
            self.update_s = duration_s if count == 1 else self.update_s + weight * (duration_s - self.update_s)

    def lap(self, activity: str) -> float:
        """Seconds of `activity` since the previous lap."""
        total_s = self.spent_s.get(activity, 0.0)
        lap_s = total_s - self.lapped_s.get(activity, 0.0)
        self.lapped_s[activity] = total_s
        return lap_s

    def mean_s(self, activity: str) -> float:
        """Mean seconds of one `activity`; 0 before the first."""
        return self.spent_s.get(activity, 0.0) / max(1, self.counts.get(activity, 0))

    @property
    def elapsed_s(self) -> float:
        """Seconds since this process started to train."""
        return time.monotonic() - self.started_s

    def left(self, updates: int, evaluations: int, save_every_s: float | None) -> TimeLeft:
        """Project the time of `updates` and `evaluations`, with one save per evaluation and one per `save_every_s`."""
        training_s = updates * (self.update_s + self.mean_s("wait"))
        evaluation_s = evaluations * self.mean_s("evaluation")
        saves = evaluations + ((training_s + evaluation_s) / save_every_s if save_every_s else 0.0)
        return TimeLeft(training_s, evaluation_s, saves * self.mean_s("save"))


def readable(duration_s: float) -> str:
    """Format a duration: 0.4 s, 42 s, 3m 20s, 5h 12m, 2d 03h; `?` when it is unknown."""
    if not math.isfinite(duration_s):
        return "?"
    whole = max(0, round(duration_s))
    if duration_s < 10:
        return f"{max(0.0, duration_s):.1f} s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"
