"""The guard: what a loss or gradient that is not finite, or far too large, does to the run. Plain numbers, JSON state.

An update whose loss or gradient is not finite never moves the weights (`update.py` sees to that); the guard counts what was
refused, watches what was applied, and says what to do about it:

    OK        go on
    SKIP      this update was refused; the next one sees other examples
    BACKOFF   a spike: half the learning rate for a while
    ROLLBACK  skipping or backing off did not help: go back to a healthy checkpoint, pass over the examples that led here
    ABORT     rolling back did not help either

An overflow of float16 (a finite loss, a gradient that is not) is how the loss scaler finds its scale, and is counted apart.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from statistics import median
from typing import Any


class Action(StrEnum):
    """What the run does after an attempted update."""

    OK = "ok"
    SKIP = "skip"
    BACKOFF = "backoff"
    ROLLBACK = "rollback"
    ABORT = "abort"


@dataclass(frozen=True)
class Verdict:
    """An action, the reason for it in words, and the attempted updates that gave the reason."""

    action: Action
    why: str = ""
    attempts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Limits:
    """Where each action begins."""

    skips_in_row: int = 3
    skips_in_window: int = 10
    skip_window_updates: int = 1000
    overflows_in_row: int = 20
    """float16: a scale of 2^12 is below 1 after twelve halvings, so twenty in a row are no calibration."""
    spike_window_updates: int = 256
    spike_window_fewest: int = 64
    """Applied updates that must be known before one of them can be called a spike."""
    spike_mads: float = 8.0
    least_rise: float = 0.25
    """Nats per target token: where the loss hardly moves, as on a memorised corpus, a rise below this is still no spike."""
    norm_factor: float = 20.0
    spike_updates: int = 3
    """In a row. One gradient far above the rest is clipped and harmless: small models from scratch show a dozen of 20 to 70
    times the median in 2,000 updates and go on learning."""
    backoff_factor: float = 0.5
    backoff_updates: int = 200
    rollbacks: int = 3


OK = Verdict(Action.OK)


@dataclass
class Memory:
    """All that the guard remembers; plain values."""

    skipped: int = 0
    overflows: int = 0
    skips_in_row: int = 0
    overflows_in_row: int = 0
    recent_skips: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    spikes_in_row: int = 0
    in_band: bool = True
    backoff_until: int = 0
    backoffs: int = 0
    rollbacks: int = 0
    passed_over: list[list[int]] = field(default_factory=list)


class SpikeGuard:
    """Watches one run. `memory` is its whole state.

    Args:
        warmup_updates: applied updates before which nothing counts as a spike.
    """

    def __init__(self, warmup_updates: int = 0, limits: Limits | None = None):
        self.warmup_updates, self.limits, self.memory = warmup_updates, limits or Limits(), Memory()

    def refused(self, attempt: int, *, overflow: bool = False) -> Verdict:
        """Account for attempted update number `attempt` (from 0), which did not move the weights."""
        memory, limits = self.memory, self.limits
        if overflow:
            memory.overflows += 1
            memory.overflows_in_row += 1
            if memory.overflows_in_row > limits.overflows_in_row:
                why = f"the gradient overflowed {memory.overflows_in_row} times in a row, at any loss scale"
                return self._broken(why, [attempt])
            return Verdict(Action.SKIP, "the loss scaler looks for its scale", (attempt,))
        memory.skipped += 1
        memory.skips_in_row += 1
        memory.recent_skips = [a for a in memory.recent_skips if a > attempt - limits.skip_window_updates] + [attempt]
        if memory.skips_in_row > limits.skips_in_row:
            row = memory.recent_skips[-memory.skips_in_row :]
            return self._broken(f"{memory.skips_in_row} updates in a row were refused", row)
        if len(memory.recent_skips) > limits.skips_in_window:
            count = len(memory.recent_skips)
            return self._broken(f"{count} of the last {limits.skip_window_updates} updates were refused", memory.recent_skips)
        return Verdict(Action.SKIP, "", (attempt,))

    def applied(self, attempt: int, update: int, loss: float, gradient_norm: float) -> Verdict:
        """Account for attempted update number `attempt`, which became applied update number `update` (from 1).

        Args:
            loss: mean per target token, in nats.
            gradient_norm: global norm before clipping.
        """
        memory, limits = self.memory, self.limits
        memory.skips_in_row = memory.overflows_in_row = 0
        judged = update > self.warmup_updates and len(memory.losses) >= limits.spike_window_fewest
        loss_limit = _upper_edge(memory.losses, limits) if judged else math.inf
        norm_limit = limits.norm_factor * median(memory.gradient_norms) if judged else math.inf
        memory.in_band = loss <= loss_limit and gradient_norm <= norm_limit
        memory.spikes_in_row = 0 if memory.in_band else memory.spikes_in_row + 1
        for values, value in ((memory.losses, loss), (memory.gradient_norms, gradient_norm)):
            values.append(value)
            del values[: -limits.spike_window_updates]
        if memory.spikes_in_row >= limits.spike_updates:
            attempts = list(range(attempt - memory.spikes_in_row + 1, attempt + 1))
            allowed = f"allowed {loss_limit:.4g} and {norm_limit:.4g}"
            why = f"{len(attempts)} updates in a row spiked, loss {loss:.4g}, gradient norm {gradient_norm:.4g}, {allowed}"
            return self._spike(why, update, attempts)
        return OK

    def not_finite(self, attempt: int, why: str) -> Verdict:
        """Account for a state that could not be saved since it holds NaN or infinity; `attempt` came before it."""
        return self._broken(why, [attempt])

    def factor_at(self, update: int) -> float:
        """What the learning rate of the update after `update` applied ones is multiplied by."""
        return self.limits.backoff_factor if update < self.memory.backoff_until else 1.0

    def should_skip(self, attempt: int) -> bool:
        """Whether a rollback found that attempted update number `attempt` leads the run astray."""
        return any(first <= attempt <= last for first, last in self.memory.passed_over)

    def health(self) -> dict[str, bool]:
        """What a rollback looks at in a checkpoint: it goes back to none of which one of these is False."""
        return {"finite": self.memory.skips_in_row == 0, "in_band": self.memory.in_band}

    def state(self) -> dict[str, Any]:
        """Plain values for state.json."""
        return asdict(self.memory)

    def restore(self, values: dict[str, Any]) -> None:
        """Take back what `state` gave; TypeError when a value is missing or unknown."""
        missing = asdict(Memory()).keys() ^ values.keys()
        if missing:
            raise TypeError(f"state of the guard: {sorted(missing)} missing or unknown")
        self.memory = Memory(**values)

    def rolled_back(self, before: Memory, update: int, attempts: Sequence[int]) -> None:
        """Remember a rollback to applied update number `update`; call it after `restore` of the older state.

        What was learned since then stays known: how often the run was rolled back, which updates to pass over, and that
        the learning rate was halved, which then lasts for the whole span again.

        Args:
            before: the memory from before `restore`.
            attempts: the attempted updates that led to the rollback.
        """
        memory = self.memory
        memory.rollbacks = before.rollbacks + 1
        memory.backoffs, memory.skipped, memory.overflows = before.backoffs, before.skipped, before.overflows
        memory.backoff_until = update + self.limits.backoff_updates if before.backoff_until else 0
        ranges = before.passed_over + [[attempt, attempt] for attempt in attempts]
        memory.passed_over = _joined(ranges)

    def _spike(self, why: str, update: int, attempts: list[int]) -> Verdict:
        memory = self.memory
        memory.spikes_in_row = 0
        if update <= memory.backoff_until:
            return self._broken(f"{why}; the second spike within {self.limits.backoff_updates} updates", attempts)
        memory.backoff_until = update + self.limits.backoff_updates
        memory.backoffs += 1
        return Verdict(Action.BACKOFF, why, tuple(attempts))

    def _broken(self, why: str, attempts: list[int]) -> Verdict:
        if self.memory.rollbacks >= self.limits.rollbacks:
            return Verdict(Action.ABORT, f"{why}; {self.memory.rollbacks} rollbacks did not help", tuple(attempts))
        return Verdict(Action.ROLLBACK, why, tuple(attempts))


def _upper_edge(losses: Sequence[float], limits: Limits) -> float:
    """The highest loss that is no spike: some median absolute deviations above the median."""
    middle = median(losses)
    deviation = median(abs(loss - middle) for loss in losses)
    return middle + max(limits.spike_mads * deviation, limits.least_rise)


def _joined(ranges: Sequence[list[int]]) -> list[list[int]]:
    """The same attempts as few ascending [first, last] ranges."""
    joined: list[list[int]] = []
    for first, last in sorted(ranges):
        if joined and first <= joined[-1][1] + 1:
            joined[-1][1] = max(joined[-1][1], last)
        else:
            joined.append([first, last])
    return joined
