"""Handle out of memory in an update: repeat it once with half the micro-batches, then fail with the cheapest options.

A repeated update has the same examples, corruption and divisor, so its gradient is the same up to the order of summation.
Dropout is drawn per micro-batch, so with dropout the rest of the run is another sample of the same run. The smaller size
stays for the rest of the process. With sharded layers nothing is repeated: the other ranks wait in a pass that this rank
cannot finish.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from resilient_t5.data.batches import Batches, MicroBatch, Prefetcher
from resilient_t5.errors import OutOfMemory
from resilient_t5.model.memory import GIB, Choice, Execution, choice_at
from resilient_t5.model.optimizer import AdafactorInBackward
from resilient_t5.model.precision import PrecisionName
from resilient_t5.training.hardware.machine import allocation_failure, is_out_of_memory
from resilient_t5.training.hardware.memory_fit import Fit
from resilient_t5.training.signals import StopSignal
from resilient_t5.training.state import RunState, UpdateResult
from resilient_t5.training.telemetry.console import halving_line
from resilient_t5.training.telemetry.run_log import RunLog
from resilient_t5.training.update import Updater


@dataclass
class MemoryGuard:
    """Runs updates; the first that runs out of memory is repeated with half the micro-batches."""

    updater: Updater
    batches: Batches
    prefetcher: Prefetcher
    fit: Fit
    precision: PrecisionName
    conditions: dict[str, Any]
    """The conditions that are saved with every checkpoint; `micro_tokens` follows the change."""
    log: RunLog
    halved: bool = False

    def __call__(self, micro_batches: list[MicroBatch], state: RunState, lr: float, stop: StopSignal) -> UpdateResult | None:
        """Run the next update at learning rate `lr`; None if `stop` interrupted it.

        Raises:
            OutOfMemory: not for the first time, or no micro-batch can be split, or weights may have changed.
        """
        result, failure = self._attempt(micro_batches, state, lr, stop)
        if failure is None:
            return result
        weights_moved = isinstance(self.updater.optimizer, AdafactorInBackward)
        single = all(micro_batch.is_single for micro_batch in micro_batches)
        if self.halved or weights_moved or self.updater.sharded.is_sharded or single:
            raise self._error(failure)
        self._halve(micro_batches, state, failure)
        result, failure = self._attempt(self.batches.at(state.attempted), state, lr, stop)
        if failure is not None:
            raise self._error(failure)
        return result

    def _attempt(
        self, micro_batches: list[MicroBatch], state: RunState, lr: float, stop: StopSignal
    ) -> tuple[UpdateResult | None, str | None]:
        """Return the result, or the allocator's message. The exception is dropped because its frames hold the tensors."""
        try:
            return self.updater(micro_batches, state.attempted, lr, lambda: stop.requested), None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = allocation_failure(error)
        # A partial gradient is useless: the gradients of the tables are accumulated in place.
        self.updater.sharded.zero_grad()
        if self.updater.graphs is not None:
            # No eager pass, step or evaluation can use their memory.
            self.updater.graphs = None
            self.conditions["graphs"] = False
        if self.updater.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        return None, failure

    def _halve(self, micro_batches: list[MicroBatch], state: RunState, failure: str) -> None:
        """Halve the token budget so that the largest micro-batch of this update is split."""
        former = self.batches.micro_tokens
        # Micro-batches are often smaller than the budget, so half the budget might not split them.
        largest = max(batch.padded_tokens for batch in micro_batches if not batch.is_single)
        micro_tokens = max(1, min(former, largest) // 2)
        self.batches.micro_tokens = self.conditions["micro_tokens"] = micro_tokens
        self.halved = True
        self.prefetcher.restart(state.attempted + 1)  # prefetched updates have the old size
        sizes = {"micro_tokens": micro_tokens, "former_micro_tokens": former}
        row: dict[str, Any] = {"action": "out of memory", "attempted": state.attempted, **sizes, "why": failure}
        self.log.event("guard", state.update, line=halving_line, **row)

    def _error(self, failure: str) -> OutOfMemory:
        """Return the error that ends the run, with the options sorted by their cost."""
        choice, micro_tokens = self.fit.choice, self.batches.micro_tokens
        now = self._planned(choice.optimizer, choice.checkpointing, micro_tokens)
        short_gib = (now.needed - self.fit.memory.usable) / GIB
        options = " | ".join(
            f"{setting} ({(option.needed - now.needed) / GIB:+.2f} GiB)" for setting, option in self._options()
        )
        return OutOfMemory(
            f"an update with micro_tokens {micro_tokens} and sources of up to {self.fit.task.source_tokens} tokens"
            + (f" needs about {short_gib:.2f} GiB more memory" if short_gib > 0 else " does not fit in memory"),
            where=failure,
            hint=f"Cheapest first: {options}" if options else "Use a smaller model or a larger machine; see bin/plan",
        )

    def _options(self) -> Iterator[tuple[str, Choice]]:
        """Yield settings that need less memory, the cheapest first."""
        choice, micro_tokens = self.fit.choice, self.batches.micro_tokens
        smaller = max(self.fit.task.longest, micro_tokens // 2)
        if smaller < micro_tokens:
            yield f"--batch.micro_tokens {smaller}", self._planned(choice.optimizer, choice.checkpointing, smaller)
        if not choice.checkpointing:
            yield "--model.gradient_checkpointing true", self._planned(choice.optimizer, True, micro_tokens)
        if choice.optimizer == "adamw" and self.fit.processes == 1:
            # Another optimizer needs a new run, which can start from these weights.
            yield "--optim.name adafactor with --run.fork", self._planned("adafactor", choice.checkpointing, micro_tokens)

    def _planned(self, optimizer: str, checkpointing: bool, micro_tokens: int) -> Choice:
        fit = self.fit
        execution = Execution(
            self.precision, checkpointing, fit.memory.on_gpu, processes=fit.processes, copies=fit.choice.copies
        )
        return choice_at(fit.sizes, fit.task, fit.memory, execution, optimizer, micro_tokens)
