"""One update: micro-batches -> gradients of the whole update -> one optimizer move -> UpdateResult.

The loss of an update is the sum of the token losses over all its micro-batches divided once by all its target tokens
(law 3 of the design), so the gradient does not depend on how the update is cut. Each micro-batch contributes
sum / tokens of the whole update, and that divisor is known on the CPU before the first forward pass. With several
processes each accumulates its share of the micro-batches; one sum over all of them follows, then all move alike.

Shapes: B examples, S source tokens, T target tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator

from resilient_t5.config.schema import OptimConfig
from resilient_t5.data.batches import IGNORED, MicroBatch
from resilient_t5.errors import ConfigError, OutOfMemory
from resilient_t5.model.embeddings import T5Model
from resilient_t5.model.loss import LossParts, forward_loss
from resilient_t5.model.optimizer import AdafactorInBackward
from resilient_t5.model.precision import seed_dropout
from resilient_t5.model.vocabulary_gradients import gradient_of
from resilient_t5.training.hardware.machine import is_out_of_memory
from resilient_t5.training.hardware.process_group import ProcessGroup
from resilient_t5.training.hardware.sharding import ShardedModel
from resilient_t5.training.state import UpdateResult


@dataclass(frozen=True)
class Updater:
    """The parts that an update moves or reads, built once."""

    accelerator: Accelerator
    layers: ShardedModel
    optimizer: torch.optim.Optimizer
    settings: OptimConfig
    seed: int

    @property
    def model(self) -> T5Model:
        """The model that is trained."""
        return self.layers.model

    @property
    def ranks(self) -> ProcessGroup:
        """The processes that train it."""
        return self.layers.ranks

    def __post_init__(self) -> None:
        if self.ranks.count > 1 and isinstance(self.optimizer, AdafactorInBackward):
            raise ConfigError("optim.name: adafactor_in_backward moves weights before gradients meet; use one process")

    def __call__(
        self, micro_batches: list[MicroBatch], attempted: int, lr: float, interrupted: Callable[[], bool]
    ) -> UpdateResult | None:
        """Do update number `attempted` at learning rate `lr`; None when `interrupted` between two micro-batches.

        An interrupted update leaves no gradient behind and is done again, whole, after the resume. One that cannot be
        computed (no target token, an id outside the vocabulary) is refused before the model sees it, and one whose loss
        or gradient is not finite before the optimizer moves.

        Raises:
            OutOfMemory: while the optimizer moved; before that the allocator's own error comes through.
        """
        tokens = sum(micro_batch.target_tokens for micro_batch in micro_batches)
        fault = failure_of(micro_batches, self.model.shared.weight.shape[0])
        nll_sum = norm = math.nan
        half_moved = False
        if not fault and isinstance(self.optimizer, AdafactorInBackward):
            nll_sum, norm, fault = self._move_in_backward(micro_batches, tokens, attempted, lr)
            half_moved = bool(fault) and self.optimizer.moved > 0
        elif not fault:
            accumulate = self._accumulate_in_rounds if self.layers.is_sharded else self._accumulate_all
            nll_sums = accumulate(micro_batches, tokens, attempted, interrupted)
            if nll_sums is None:
                self.layers.drop_gradients()
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
        """The gradient of the whole update: this process' share, and those of the others added to it.

        Returns:
            The loss sum of every micro-batch, float64 on the device; None when a process was interrupted.

        Raises:
            MemoryError: another process found no room for its share, so that this one gives up as it does.
        """
        done: dict[int, torch.Tensor] = {}
        halted, failure = False, ""
        try:
            for index in self.ranks.share([micro_batch.padded_tokens for micro_batch in micro_batches]):
                if halted := interrupted():
                    break
                done[index] = self.accumulate(micro_batches[index], tokens, attempted, index)
            if self.ranks.count == 1:
                return None if halted else torch.stack(list(done.values()))
            gradients = [gradient_of(p) for p in self.layers.whole_parameters()]
        except (RuntimeError, MemoryError) as error:
            if self.ranks.count == 1 or not is_out_of_memory(error):
                raise
            failure = str(error).partition("\n")[0][:300] or type(error).__name__
        notes = self.ranks.all_gather_object(f"update {attempted}", {"halted": halted, "failure": failure})
        if short := [f"process {index}: {told['failure']}" for index, told in enumerate(notes) if told["failure"]]:
            raise MemoryError(short[0])
        if any(told["halted"] for told in notes):
            return None
        return self._added_up(done, len(micro_batches), gradients)

    def _accumulate_in_rounds(
        self, micro_batches: list[MicroBatch], tokens: int, attempted: int, interrupted: Callable[[], bool]
    ) -> torch.Tensor | None:
        """The same with layers that are cut: all processes do each pass together, as many as the one that has most of them.

        One that has no micro-batch left passes nothing through the layers, which adds nothing. A pass that has begun ends
        in all of them or in none, so memory that runs out in it ends the run.
        """
        shares = self.ranks.shares([micro_batch.padded_tokens for micro_batch in micro_batches])
        own, done = shares[self.ranks.index], dict[int, torch.Tensor]()
        for number in range(max(map(len, shares))):
            notes = self.ranks.all_gather_object(f"update {attempted}, pass {number}", {"halted": interrupted()})
            if any(told["halted"] for told in notes):
                return None
            with self.ranks.collective():
                if number < len(own):
                    done[own[number]] = self.accumulate(micro_batches[own[number]], tokens, attempted, own[number])
                else:
                    self.accumulate(nothing_of(micro_batches[0]), tokens, attempted, 0)
        self.layers.take_gradients()
        return self._added_up(done, len(micro_batches), [gradient_of(p) for p in self.layers.whole_parameters()])

    def _added_up(self, done: dict[int, torch.Tensor], pieces: int, gradients: list[torch.Tensor]) -> torch.Tensor:
        """The loss sums of all pieces, those of this process and of the others; the gradients become sums where they lie."""
        nothing = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        nll_sums = torch.stack([done.get(index, nothing) for index in range(pieces)])
        self.ranks.all_reduce([nll_sums, *gradients])
        return nll_sums

    def accumulate(self, micro_batch: MicroBatch, tokens: int, attempted: int, index: int) -> torch.Tensor:
        """Add one micro-batch's share of the gradient; its loss sum, in nats, stays on the device."""
        parts = self._forward(micro_batch, tokens, attempted, index)
        self.accelerator.backward(parts.loss)
        return parts.nll_sum

    def _forward(self, micro_batch: MicroBatch, tokens: int, attempted: int, index: int) -> LossParts:
        """The loss of one micro-batch, with its graph.

        Dropout is seeded by (seed, update, micro-batch), so nothing drawn elsewhere can change it.
        """
        device = self.accelerator.device
        seed_dropout(self.seed, attempted, index)
        with self.accelerator.autocast():
            return forward_loss(
                self.model,
                micro_batch.source_BS.to(device, non_blocking=True),
                micro_batch.source_mask_BS.to(device, non_blocking=True),
                micro_batch.labels_BT.to(device, non_blocking=True),
                divisor=tokens,
                label_smoothing=self.settings.label_smoothing,
                z_loss=self.settings.z_loss,
            )

    def _move_in_backward(
        self, micro_batches: list[MicroBatch], tokens: int, attempted: int, lr: float
    ) -> tuple[float, float, str]:
        """One forward and one backward that is the update; the loss sum, the gradient norm, and what was wrong."""
        assert isinstance(self.optimizer, AdafactorInBackward)
        self.optimizer.begin(lr)
        if len(micro_batches) > 1:
            raise ConfigError("batch.micro_tokens: adafactor_in_backward takes an update in one micro-batch; set it to auto")
        parts = self._forward(micro_batches[0], tokens, attempted, 0)
        nll_sum = float(parts.nll_sum)  # a host sync, before anything moves
        if not math.isfinite(nll_sum):
            return nll_sum, math.nan, "loss or gradient not finite"
        self.accelerator.backward(parts.loss)
        shape = self.optimizer.failed
        fault = "" if shape is None else f"the gradient of a parameter of shape {shape} is not finite"
        return nll_sum, self.optimizer.end(), fault

    def _norm_and_clip(self, nll_sum: torch.Tensor) -> tuple[float, float]:
        """Unscale, measure, clip. One host synchronisation reads loss and norm together."""
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.layers.parameters() if p.grad is not None]
        norm = self.layers.gradient_norm(parameters)
        if self.settings.clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.settings.clip_norm, norm)
        values = torch.stack([nll_sum.float(), norm.float().to(nll_sum.device)]).tolist()
        return values[0], values[1]

    def _move(self, lr: float, nll_sum: float, norm: float) -> bool:
        """Move the weights unless loss or gradient is not finite; with fp16 the scaler learns of the overflow."""
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
                "the optimizer found no room; some weights may have moved, so the newest checkpoint is what counts",
                where=str(error).partition("\n")[0][:300],
                hint="Ask bin/plan what fits; another optim.name needs a new run, whose weights run.fork takes over",
            ) from error
        if scaler is not None:
            scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return finite


def nothing_of(micro_batch: MicroBatch) -> MicroBatch:
    """One source token of a micro-batch and no label: a pass over it has the loss 0 and zero gradients."""
    labels_11 = torch.full((1, 1), IGNORED, dtype=micro_batch.labels_BT.dtype)
    source_11, mask_11 = micro_batch.source_BS[:1, :1], micro_batch.source_mask_BS[:1, :1]
    return replace(micro_batch, source_BS=source_11, source_mask_BS=mask_11, labels_BT=labels_11, target_tokens=0)


def failure_of(micro_batches: Sequence[MicroBatch], rows: int) -> str:
    """Why these micro-batches must not reach a model of `rows` vocabulary rows; empty when nothing is wrong with them.

    An id out of range reads foreign memory or, on a GPU, takes the whole context down, so it is looked for on the CPU.
    """
    if not any(micro_batch.target_tokens for micro_batch in micro_batches):
        return "no target token"
    for micro_batch in micro_batches:
        source_BS, labels_BT = micro_batch.source_BS, micro_batch.labels_BT
        negative = source_BS.min() < 0 or ((labels_BT < 0) & (labels_BT != IGNORED)).any()
        if negative or source_BS.max() >= rows or labels_BT.max() >= rows:
            return "token id outside the vocabulary"
    return ""
