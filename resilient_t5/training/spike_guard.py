"""The spike guard: reacts to non-finite and to far too large losses and gradients. Plain numbers, JSON state.

update.py refuses an update with a non-finite loss or gradient; the guard counts refused updates, watches applied ones, and
decides:

    OK        continue
    SKIP      the update was refused; the next one uses other examples
    BACKOFF   a spike: halve the learning rate for a while
    ROLLBACK  SKIP or BACKOFF did not help: restore a healthy checkpoint and skip the examples that preceded the divergence
    ABORT     ROLLBACK did not help

float16 overflows (finite loss, non-finite gradient) are how the loss scaler finds its scale; they are counted separately.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from statistics import median
from typing import Any


class Action(StrEnum):
    """Reaction to an attempted update."""

    OK = "ok"
    SKIP = "skip"
    BACKOFF = "backoff"
    ROLLBACK = "rollback"
    ABORT = "abort"


@dataclass(frozen=True)
class Verdict:
    """An action, its reason, and the attempted updates that caused it."""

    action: Action
    why: str = ""
    attempts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Limits:
    """Thresholds of the actions."""

    skips_in_row: int = 3
    skips_in_window: int = 10
    skip_window_updates: int = 1000
    overflows_in_row: int = 20
    """float16: a scale of 2^12 falls below 1 after twelve halvings, so twenty in a row are not calibration."""
    spike_window_updates: int = 256
    spike_window_fewest: int = 64
    """Applied updates needed before one can count as a spike."""
    spike_mads: float = 8.0
    least_rise: float = 0.25
    """Nats per target token: a smaller rise is never a spike, even if the loss hardly varies (memorised corpus)."""
    norm_factor: float = 20.0
    spike_updates: int = 3
    """In a row. A single large gradient is clipped and harmless: small models from scratch show a dozen of 20 to 70 times the
    median in 2,000 updates and keep learning."""
    backoff_factor: float = 0.5
    backoff_updates: int = 200
    rollbacks: int = 3


OK = Verdict(Action.OK)


@dataclass
class Memory:
    """State of the guard."""

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
    """Watches one run.

    Args:
        warmup_updates: no spike is detected in the first `warmup_updates` applied updates.
        limits: the thresholds.
    """

    def __init__(self, warmup_updates: int = 0, limits: Limits | None = None):
        self.warmup_updates, self.limits, self.memory = warmup_updates, limits or Limits(), Memory()

    def refused(self, attempt: int, *, overflow: bool = False) -> Verdict:
        """Judge attempted update `attempt` (from 0), which was refused."""
        memory, limits = self.memory, self.limits
        if overflow:
            memory.overflows += 1
            memory.overflows_in_row += 1
            if memory.overflows_in_row > limits.overflows_in_row:
                why = f"the gradient overflowed {memory.overflows_in_row} times in a row, at any loss scale"
                return self._broken(why, [attempt])
            return Verdict(Action.SKIP, "the loss scaler is searching its scale", (attempt,))
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
        """Judge attempted update `attempt`, which became applied update `update` (from 1).

        Args:
            loss: mean per target token, in nats.
            gradient_norm: global norm before clipping.
        """
        memory, limits = self.memory, self.limits
        memory.skips_in_row = memory.overflows_in_row = 0
        judged = update > self.warmup_updates and len(memory.losses) >= limits.spike_window_fewest
        loss_limit = _loss_limit(memory.losses, limits) if judged else math.inf
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
        """Judge a state that holds NaN or infinity after attempted update `attempt`."""
        return self._broken(why, [attempt])

    def factor_at(self, update: int) -> float:
        """Learning rate factor of the update after `update` applied ones."""
        return self.limits.backoff_factor if update < self.memory.backoff_until else 1.0

    def should_skip(self, attempt: int) -> bool:
        """Return whether a rollback marked attempted update `attempt` to be skipped."""
        return any(first <= attempt <= last for first, last in self.memory.passed_over)

    def health(self) -> dict[str, bool]:
        """Return the health flags of a checkpoint; a rollback uses only checkpoints with all of them True."""
        return {"finite": self.memory.skips_in_row == 0, "in_band": self.memory.in_band}

    def state(self) -> dict[str, Any]:
        """Return the state for state.json."""
        return asdict(self.memory)

    def restore(self, values: dict[str, Any]) -> None:
        """Restore the values of `state`; raises TypeError if one is missing or unknown."""
        if different := asdict(Memory()).keys() ^ values.keys():
            raise TypeError(f"state of the guard: {sorted(different)} missing or unknown")
        self.memory = Memory(**values)

    def rolled_back(self, before: Memory, update: int, attempts: Sequence[int]) -> None:
        """Record a rollback to applied update `update`; call it after `restore` of the older state.

        Counters, the updates to skip and a halved learning rate are kept; the back-off period starts again.

        Args:
            before: the memory before `restore`.
            attempts: the attempted updates that caused the rollback.
        """
        memory = self.memory
        memory.rollbacks = before.rollbacks + 1
        memory.backoffs, memory.skipped, memory.overflows = before.backoffs, before.skipped, before.overflows
        memory.backoff_until = update + self.limits.backoff_updates if before.backoff_until else 0
        memory.passed_over = _merged(before.passed_over + [[attempt, attempt] for attempt in attempts])

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


def _loss_limit(losses: Sequence[float], limits: Limits) -> float:
    """Return the highest loss that is not a spike: `spike_mads` median absolute deviations above the median."""
    middle = median(losses)
    deviation = median(abs(loss - middle) for loss in losses)
    return middle + max(limits.spike_mads * deviation, limits.least_rise)


def _merged(ranges: Sequence[list[int]]) -> list[list[int]]:
    """Merge overlapping and adjacent [first, last] ranges."""
    merged: list[list[int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1][1] = max(merged[-1][1], last)
        else:
            merged.append([first, last])
    return merged
