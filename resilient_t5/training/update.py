"""One update: micro-batches -> gradients of the whole update -> one optimizer step -> UpdateResult.

The loss of an update is the sum of its token losses divided once by all its target tokens, so the gradient does not depend
on the split into micro-batches. The divisor is known on the CPU before the first forward pass. With several ranks each
accumulates its share of the micro-batches; then gradients are all-reduced and every rank makes the same step.

Shapes: B examples, S source tokens, T target tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator

from resilient_t5.config.schema import OptimConfig
from resilient_t5.data.batches import IGNORED, MicroBatch
from resilient_t5.data.pass_input import PassInput
from resilient_t5.errors import ConfigError, OutOfMemory
from resilient_t5.model.dropout import seed_dropout
from resilient_t5.model.embeddings import T5Model
from resilient_t5.model.loss import LossParts, forward_loss
from resilient_t5.model.operands import StaticBuffers
from resilient_t5.model.optimizer import AdafactorInBackward
from resilient_t5.model.vocabulary_gradients import gradient_of
from resilient_t5.training.hardware.graphs import CapturedPasses
from resilient_t5.training.hardware.machine import allocation_failure, is_out_of_memory
from resilient_t5.training.hardware.process_group import ProcessGroup
from resilient_t5.training.hardware.sharding import ShardedModel
from resilient_t5.training.state import UpdateResult


@dataclass
class Updater:
    """Runs updates of one model."""

    accelerator: Accelerator
    sharded: ShardedModel
    optimizer: torch.optim.Optimizer
    settings: OptimConfig
    seed: int
    buffers: StaticBuffers | None = None
    """Gradients and copies of the weights at fixed addresses; None allocates gradients anew in every update."""
    static_shapes: bool = False
    """Run passes as a GPU needs them: no operation depends on the values of a tensor."""
    graphs: CapturedPasses | None = None
    """Captured passes; None runs all passes eagerly."""

    @property
    def model(self) -> T5Model:
        """The trained model."""
        return self.sharded.model

    @property
    def group(self) -> ProcessGroup:
        """The processes that train the model together."""
        return self.sharded.ranks

    def __post_init__(self) -> None:
        if self.group.count > 1 and isinstance(self.optimizer, AdafactorInBackward):
            raise ConfigError("optim.name: adafactor_in_backward updates weights before gradients are reduced; use one process")

    def __call__(
        self, micro_batches: list[MicroBatch], attempted: int, lr: float, interrupted: Callable[[], bool]
    ) -> UpdateResult | None:
        """Run update number `attempted` at learning rate `lr`; None if `interrupted` between two micro-batches.

        An interrupted update leaves no gradients and is repeated after the resume. Invalid micro-batches (no target token,
        an id outside the vocabulary) are refused before the forward pass; a non-finite loss or gradient before the step.

        Raises:
            OutOfMemory: in the optimizer step; before it, the allocator's own error is raised.
        """
        tokens = sum(micro_batch.target_tokens for micro_batch in micro_batches)
        fault = failure_of(micro_batches, self.model.shared.weight.shape[0])
        nll_sum = norm = math.nan
        half_moved = False
        if self.buffers is not None:
            self.buffers.begin_update()
        if not fault and isinstance(self.optimizer, AdafactorInBackward):
            nll_sum, norm, fault = self._move_in_backward(micro_batches, tokens, attempted, lr)
            half_moved = bool(fault) and self.optimizer.moved > 0
        elif not fault:
            accumulate = self._accumulate_in_rounds if self.sharded.is_sharded else self._accumulate_all
            nll_sums = accumulate(micro_batches, tokens, attempted, interrupted)
            if nll_sums is None:
                self.sharded.zero_grad()
                return None
            nll_sum, norm = self._norm_and_clip(nll_sums.sum())
            fault = "" if self._move(lr, nll_sum, norm) else "loss or gradient not finite"
        clip = self.settings.clip_norm
        return UpdateResult(
            nll_sum=nll_sum,
            gradient_norm=norm,
            learning_rate=lr,
            applied=not fault,
            clipped=not fault and 0 < clip < norm,
            target_tokens=tokens,
            source_tokens=sum(int(m.useful_tokens) for m in micro_batches) - tokens,
            useful_tokens=sum(m.useful_tokens for m in micro_batches),
            padded_tokens=sum(m.padded_tokens for m in micro_batches),
            micro_batches=len(micro_batches),
            example_ids=tuple(sorted(int(example) for m in micro_batches for example in m.example_ids)),
            overflow=self.accelerator.scaler is not None and math.isfinite(nll_sum) and not math.isfinite(norm),
            why=fault,
            half_moved=half_moved,
        )

    def _accumulate_all(
        self, micro_batches: list[MicroBatch], tokens: int, attempted: int, interrupted: Callable[[], bool]
    ) -> torch.Tensor | None:
        """Accumulate this rank's share of the micro-batches, then all-reduce the gradients.

        Returns:
            The loss sum of every micro-batch, float64 on the device; None if any rank was interrupted.

        Raises:
            MemoryError: any rank ran out of memory.
        """
        done: dict[int, torch.Tensor] = {}
        halted, failure = False, ""
        try:
            for index in self.group.partition([m.padded_tokens for m in micro_batches])[self.group.index]:
                if halted := interrupted():
                    break
                done[index] = self.accumulate(micro_batches[index], tokens, attempted, index)
            if self.group.count == 1:
                return None if halted else torch.stack(list(done.values()))
            gradients = [gradient_of(p) for p in self.sharded.replicated_parameters()]
        except (RuntimeError, MemoryError) as error:
            if self.group.count == 1 or not is_out_of_memory(error):
                raise
            failure = allocation_failure(error)
        notes = self.group.all_gather_object(f"update {attempted}", {"halted": halted, "failure": failure})
        if failures := [f"process {index}: {note['failure']}" for index, note in enumerate(notes) if note["failure"]]:
            raise MemoryError(failures[0])
        if any(note["halted"] for note in notes):
            return None
        return self._all_reduce(done, len(micro_batches), gradients)

    def _accumulate_in_rounds(
        self, micro_batches: list[MicroBatch], tokens: int, attempted: int, interrupted: Callable[[], bool]
    ) -> torch.Tensor | None:
        """The same with sharded layers: all ranks run each pass together, as many passes as the largest share has.

        A rank without a micro-batch runs an empty one, which adds nothing. Running out of memory in a pass ends the run.
        """
        shares = self.group.partition([micro_batch.padded_tokens for micro_batch in micro_batches])
        own, done = shares[self.group.index], dict[int, torch.Tensor]()
        for number in range(max(map(len, shares))):
            notes = self.group.all_gather_object(f"update {attempted}, pass {number}", {"halted": interrupted()})
            if any(note["halted"] for note in notes):
                return None
            with self.group.collective():
                if number < len(own):
                    done[own[number]] = self.accumulate(micro_batches[own[number]], tokens, attempted, own[number])
                else:
                    self.accumulate(empty_like(micro_batches[0]), tokens, attempted, 0)
        self.sharded.assign_shard_gradients()
        return self._all_reduce(done, len(micro_batches), [gradient_of(p) for p in self.sharded.replicated_parameters()])

    def _all_reduce(self, done: dict[int, torch.Tensor], count: int, gradients: list[torch.Tensor]) -> torch.Tensor:
        """Sum the gradients in place over all ranks; return the loss sums of all `count` micro-batches."""
        zero = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        nll_sums = torch.stack([done.get(index, zero) for index in range(count)])
        self.group.all_reduce([nll_sums, *gradients])
        return nll_sums

    def accumulate(self, micro_batch: MicroBatch, tokens: int, attempted: int, index: int) -> torch.Tensor:
        """Add the gradient of one micro-batch; return its loss sum in nats, on the device.

        Dropout depends only on (seed, update, micro-batch).
        """
        seed_dropout(self.seed, attempted, index)
        if not self.static_shapes:
            parts = self._forward(micro_batch, tokens)
            self.accelerator.backward(parts.loss)
            return parts.nll_sum
        given = micro_batch.on_device or micro_batch.pass_input().to(self.accelerator.device)
        given.wait()
        if self.graphs is not None and given.shape in self.graphs:
            return self.graphs.replay(given, float(tokens))
        return self.run_pass(given, torch.full((), float(tokens), device=self.accelerator.device))

    def run_pass(self, given: PassInput, divisor: torch.Tensor) -> torch.Tensor:
        """Forward and backward without a host sync; adds gradients and returns the loss sum in nats.

        Args:
            divisor: scalar, float32: target tokens of the update.
        """
        with self.accelerator.autocast():
            parts = forward_loss(
                self.model,
                *given.tensors(),
                divisor=divisor,
                label_smoothing=self.settings.label_smoothing,
                z_loss=self.settings.z_loss,
                all_positions=True,
            )
        self.accelerator.backward(parts.loss)
        return parts.nll_sum

    def _forward(self, micro_batch: MicroBatch, tokens: int) -> LossParts:
        """Run the forward pass of one micro-batch."""
        device = self.accelerator.device
        with self.accelerator.autocast():
            return forward_loss(
                self.model,
                micro_batch.source_BS.to(device),
                micro_batch.source_mask_BS.to(device),
                micro_batch.labels_BT.to(device),
                divisor=tokens,
                label_smoothing=self.settings.label_smoothing,
                z_loss=self.settings.z_loss,
            )

    def _move_in_backward(
        self, micro_batches: list[MicroBatch], tokens: int, attempted: int, lr: float
    ) -> tuple[float, float, str]:
        """Update the weights in the backward pass of one micro-batch; return loss sum, gradient norm and failure."""
        assert isinstance(self.optimizer, AdafactorInBackward)
        self.optimizer.begin(lr)
        if len(micro_batches) > 1:
            raise ConfigError("batch.micro_tokens: adafactor_in_backward takes an update in one micro-batch; set it to auto")
        seed_dropout(self.seed, attempted, 0)
        parts = self._forward(micro_batches[0], tokens)
        nll_sum = float(parts.nll_sum)  # a host sync, before any weight changes
        if not math.isfinite(nll_sum):
            return nll_sum, math.nan, "loss or gradient not finite"
        self.accelerator.backward(parts.loss)
        shape = self.optimizer.failed
        fault = "" if shape is None else f"the gradient of a parameter of shape {shape} is not finite"
        return nll_sum, self.optimizer.end(), fault

    def _norm_and_clip(self, nll_sum: torch.Tensor) -> tuple[float, float]:
        """Unscale, measure and clip the gradients; one host sync reads loss and norm together."""
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.sharded.parameters() if p.grad is not None]
        norm = self.sharded.gradient_norm(parameters)
        if self.settings.clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.settings.clip_norm, norm)
        values = torch.stack([nll_sum.float(), norm.float().to(nll_sum.device)]).tolist()
        return values[0], values[1]

    def _move(self, lr: float, nll_sum: float, norm: float) -> bool:
        """Step the optimizer if loss and gradient are finite, and update the fp16 loss scaler; return whether it stepped."""
        finite, scaler = math.isfinite(nll_sum) and math.isfinite(norm), self.accelerator.scaler
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        try:
            if finite and scaler is not None:
                scaler.step(self.optimizer)
            elif finite:
                self.optimizer.step()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(
                "out of memory in the optimizer step; weights may be half updated, so resume from the newest checkpoint",
                where=allocation_failure(error),
                hint="See bin/plan for what fits; another optim.name needs a new run, which run.fork starts from these weights",
            ) from error
        if scaler is not None:
            scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return finite


def empty_like(micro_batch: MicroBatch) -> MicroBatch:
    """Return a micro-batch with one source token and no label: loss 0, zero gradients."""
    labels_11 = torch.full((1, 1), IGNORED, dtype=micro_batch.labels_BT.dtype)
    source_11, mask_11 = micro_batch.source_BS[:1, :1], torch.ones_like(micro_batch.source_mask_BS[:1, :1])
    return replace(
        micro_batch,
        source_BS=source_11,
        source_mask_BS=mask_11,
        labels_BT=labels_11,
        target_tokens=0,
        target_segments_BT=None,
        on_device=None,
    )


def failure_of(micro_batches: Sequence[MicroBatch], rows: int) -> str:
    """Return why these micro-batches are invalid for `rows` vocabulary rows; empty if they are valid.

    Checked on the CPU, because an id out of range reads foreign memory or, on a GPU, kills the context.
    """
    if not any(micro_batch.target_tokens for micro_batch in micro_batches):
        return "no target token"
    if any(micro_batch.id_range[0] < 0 or micro_batch.id_range[1] >= rows for micro_batch in micro_batches):
        return "token id outside the vocabulary"
    return ""
