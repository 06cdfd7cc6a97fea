"""Counters and sums of a run: plain values that are saved in state.json."""

import dataclasses
import hashlib
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class UpdateResult:
    """Result of one attempted update, in sums and counts.

    `nll_sum` is in nats over `target_tokens`; `gradient_norm` is the global norm before clipping. `applied` is False if the
    weights did not change; `why` then holds the reason. `overflow`: a float16 update with a finite loss and a non-finite
    gradient. `example_ids` are sorted, so they do not depend on the split into micro-batches.
    """

    nll_sum: float
    gradient_norm: float
    learning_rate: float
    applied: bool
    clipped: bool
    target_tokens: int
    source_tokens: int
    useful_tokens: int
    padded_tokens: int
    micro_batches: int
    example_ids: tuple[int, ...]
    overflow: bool = False
    why: str = ""
    half_moved: bool = False
    """The optimizer steps in the backward pass, and some parameters had changed before the failure."""


@dataclass
class SinceLog:
    """Sums since the last training row."""

    nll_sum: float = 0.0
    target_tokens: int = 0
    source_tokens: int = 0
    useful_tokens: int = 0
    padded_tokens: int = 0
    updates: int = 0
    clipped: int = 0
    gradient_norm_sum: float = 0.0
    gradient_norm_max: float = 0.0
    learning_rate: float = 0.0


@dataclass
class RunState:
    """Counters and sums; only `count`, `skip` and evaluations change them.

    `update` counts applied optimizer updates and drives schedule and cadence. `attempted` also counts refused and skipped
    updates and drives the data cursor, so the examples of a refused update are not used again. `order_sha256` is a hash
    chain over the examples of every attempted update: runs with equal values saw the same examples in the same order.
    """

    update: int = 0
    attempted: int = 0
    micro_batches: int = 0
    examples: int = 0
    target_tokens: int = 0
    useful_tokens: int = 0
    padded_tokens: int = 0
    order_sha256: str = ""
    window_nll_sum: float = 0.0
    window_tokens: int = 0
    since_log: SinceLog = field(default_factory=SinceLog)
    evaluated_update: int = -1
    evaluations: int = 0
    best: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    before: dict[str, Any] | None = None
    ended: str | None = None
    wall_s: float = 0.0

    def count(self, result: UpdateResult) -> None:
        """Count one attempted update."""
        self.attempted += 1
        self.examples += len(result.example_ids)
        self.order_sha256 = hashlib.sha256(f"{self.order_sha256} {result.example_ids}".encode()).hexdigest()
        if not result.applied:
            return
        self.update += 1
        self.micro_batches += result.micro_batches
        self.target_tokens += result.target_tokens
        self.useful_tokens += result.useful_tokens
        self.padded_tokens += result.padded_tokens
        self.window_nll_sum += result.nll_sum
        self.window_tokens += result.target_tokens
        since = self.since_log
        since.nll_sum += result.nll_sum
        since.target_tokens += result.target_tokens
        since.source_tokens += result.source_tokens
        since.useful_tokens += result.useful_tokens
        since.padded_tokens += result.padded_tokens
        since.updates += 1
        since.clipped += result.clipped
        since.gradient_norm_sum += result.gradient_norm
        since.learning_rate = result.learning_rate
        since.gradient_norm_max = max(since.gradient_norm_max, result.gradient_norm)

    def skip(self) -> None:
        """Move the data cursor past one update without attempting it."""
        self.attempted += 1

    def to_json(self) -> dict[str, Any]:
        """Return all values for state.json."""
        return dataclasses.asdict(self)

    def restore(self, values: dict[str, Any]) -> None:
        """Set all values from `to_json` of an earlier state; raises TypeError if one is missing or unknown."""
        since_log = SinceLog(**values["since_log"])
        names = {field.name for field in dataclasses.fields(self)}
        if set(values) != names:
            raise TypeError(f"state.json: {sorted(names ^ set(values))} missing or unknown")
        vars(self).update({**values, "since_log": since_log})
