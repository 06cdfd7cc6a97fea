"""Where the time of a run goes: updates, waiting for data, evaluations, saves; and the time that is left.

Times are wall-clock seconds of this process; none of them enters the state of the run.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

SMOOTHING_UPDATES = 200


@dataclass(frozen=True)
class Left:
    """Seconds to the planned end, by what they go to."""

    training_s: float
    evaluation_s: float
    save_s: float

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.training_s + self.evaluation_s + self.save_s

    def text(self) -> str:
        """Such as `1d 02h (train 23h 10m, eval 2h 04m, save 8m 20s)`; parts that nothing is known of are left out."""
        parts = {"train": self.training_s, "eval": self.evaluation_s, "save": self.save_s}
        named = ", ".join(f"{name} {readable(part_s)}" for name, part_s in parts.items() if part_s >= 1.0)
        return f"{readable(self.total_s)} ({named})" if named else readable(self.total_s)


@dataclass
class Timing:
    """Seconds by activity since this process began to train."""

    started_s: float = field(default_factory=time.monotonic)
    spent_s: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    lapped_s: dict[str, float] = field(default_factory=dict)
    update_s: float = math.nan

    @contextmanager
    def measure(self, activity: str) -> Iterator[None]:
        """Count the time of the block as `activity`: update, wait, evaluation or save."""
        begun_s = time.monotonic()
        try:
            yield
        finally:
            self.add(activity, time.monotonic() - begun_s)

    def add(self, activity: str, duration_s: float) -> None:
        """Count `duration_s` as `activity`; for updates, keep a moving average over about 200 of them."""
        self.spent_s[activity] = self.spent_s.get(activity, 0.0) + duration_s
        count = self.counts[activity] = self.counts.get(activity, 0) + 1
        if activity == "update":
            weight = 1.0 / min(count, SMOOTHING_UPDATES)
            self.update_s = duration_s if count == 1 else self.update_s + weight * (duration_s - self.update_s)

    def lap(self, activity: str) -> float:
        """Seconds of `activity` since the last lap of it."""
        total_s = self.spent_s.get(activity, 0.0)
        lap_s = total_s - self.lapped_s.get(activity, 0.0)
        self.lapped_s[activity] = total_s
        return lap_s

    def mean_s(self, activity: str) -> float:
        """Mean seconds of one `activity`; 0 when there was none yet."""
        return self.spent_s.get(activity, 0.0) / max(1, self.counts.get(activity, 0))

    @property
    def elapsed_s(self) -> float:
        """Seconds since this process began to train."""
        return time.monotonic() - self.started_s

    def left(self, updates: int, evaluations: int, save_every_s: float | None) -> Left:
        """What `updates` and `evaluations` will take, with the saves that fall into them: one each evaluation at most."""
        training_s = updates * (self.update_s + self.mean_s("wait"))
        evaluation_s = evaluations * self.mean_s("evaluation")
        saves = evaluations + ((training_s + evaluation_s) / save_every_s if save_every_s else 0.0)
        return Left(training_s, evaluation_s, saves * self.mean_s("save"))


def readable(duration_s: float) -> str:
    """A duration for people: 0.4 s, 42 s, 3m 20s, 5h 12m, 2d 03h; `?` when it is not known."""
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
