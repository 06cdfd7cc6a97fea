"""Everything that moves during a run, beside the tensors: plain values that become state.json."""

import dataclasses
import hashlib
import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class UpdateResult:
    """What one attempted update did; sums and counts, never means.

    `nll_sum` is in nats over `target_tokens`; `gradient_norm` is the global norm before clipping; `applied` is False
    when the weights were left alone, and `why` says then what was wrong. `overflow` is an update of float16 with a finite
    loss and a gradient that is not. `example_ids` ascend, so they do not depend on the cut into micro-batches.
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
    """The optimizer stepped inside the backward pass and met a fault behind parameters that had moved."""


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
    """Counters and sums. `count` and `pass_over` are where they move (law 2 of the design).

    `update` counts optimizer updates that were applied and drives schedule and cadence; `attempted` also counts those
    that were refused or passed over and drives the data cursor, so a refused update never sees its examples again.
    `order_sha256` is a chain over the examples of every attempted update: two runs that agree in it saw the same ones.
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
        """Account for one attempted update."""
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
        """Go on behind an update that is not attempted at all."""
        self.attempted += 1

    @property
    def useful_token_share(self) -> float:
        """Share of the encoder and decoder positions so far that were no padding."""
        return self.useful_tokens / self.padded_tokens if self.padded_tokens else math.nan

    def to_json(self) -> dict[str, Any]:
        """All values, ready for state.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RunState":
        """The state that `to_json` wrote; TypeError when a value is missing or unknown."""
        since_log = SinceLog(**values["since_log"])
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != names:
            raise TypeError(f"state.json: {sorted(names ^ set(values))} missing or unknown")
        return cls(**{**values, "since_log": since_log})
