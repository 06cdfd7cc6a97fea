"""One update: micro-batches -> gradients of the whole update -> one optimizer move -> UpdateResult.

The loss of an update is the sum of the token losses over all its micro-batches divided once by all its target tokens
(law 3 of the design), so the gradient does not depend on how the update is cut. Each micro-batch contributes
sum / tokens of the whole update, and that divisor is known on the CPU before the first forward pass.

Shapes: B examples, S source tokens, T target tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from resilient_t5.config import OptimConfig
from resilient_t5.data.batches import MicroBatch
from resilient_t5.errors import DataError
from resilient_t5.model.loss import forward_loss
from resilient_t5.model.numerics import seed_dropout
from resilient_t5.model.tables import T5Model
from resilient_t5.training.state import UpdateResult


@dataclass(frozen=True)
class Updater:
    """The parts that an update moves or reads, built once."""

    accelerator: Accelerator
    model: T5Model
    optimizer: torch.optim.Optimizer
    settings: OptimConfig
    seed: int

    def __call__(
        self, micro_batches: list[MicroBatch], attempted: int, lr: float, interrupted: Callable[[], bool]
    ) -> UpdateResult | None:
        """Do update number `attempted` at learning rate `lr`; None when `interrupted` between two micro-batches.

        An interrupted update leaves no gradient behind and is done again, whole, after the resume.

        Raises:
            DataError: the update holds no target token.
        """
        tokens = sum(micro_batch.target_tokens for micro_batch in micro_batches)
        if tokens == 0:
            raise DataError(f"update {attempted} holds no target token", mend="The store is damaged; prepare it again")
        nll_sums = []
        for index, micro_batch in enumerate(micro_batches):
            if interrupted():
                self.optimizer.zero_grad(set_to_none=True)
                return None
            nll_sums.append(self.accumulate(micro_batch, tokens, attempted, index))
        nll_sum, norm, scaled = self._norm_and_clip(torch.stack(nll_sums).sum())
        applied = self._move(lr, nll_sum, norm)
        clip = self.settings.clip_norm
        return UpdateResult(
            nll_sum=nll_sum,
            gradient_norm=norm,
            learning_rate=lr,
            applied=applied,
            clipped=scaled and clip > 0 and norm > clip,
            target_tokens=tokens,
            source_tokens=sum(int(m.useful_tokens) for m in micro_batches) - tokens,
            useful_tokens=sum(m.useful_tokens for m in micro_batches),
            padded_tokens=sum(m.padded_tokens for m in micro_batches),
            micro_batches=len(micro_batches),
            examples=sum(len(m.example_ids) for m in micro_batches),
        )

    def accumulate(self, micro_batch: MicroBatch, tokens: int, attempted: int, index: int) -> torch.Tensor:
        """Add one micro-batch's share of the gradient; its loss sum, in nats, stays on the device.

        Dropout is seeded by (seed, update, micro-batch, rank), so nothing drawn elsewhere can change it.
        """
        device = self.accelerator.device
        seed_dropout(self.seed, attempted, index, self.accelerator.process_index)
        with self.accelerator.autocast():
            parts = forward_loss(
                self.model,
                micro_batch.source_BS.to(device, non_blocking=True),
                micro_batch.source_mask_BS.to(device, non_blocking=True),
                micro_batch.labels_BT.to(device, non_blocking=True),
                divisor=tokens,
                label_smoothing=self.settings.label_smoothing,
                z_loss=self.settings.z_loss,
            )
        self.accelerator.backward(parts.loss)
        return parts.nll_sum

    def _norm_and_clip(self, nll_sum: torch.Tensor) -> tuple[float, float, bool]:
        """Unscale, measure, clip. One host synchronisation reads loss and norm together."""
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.settings.clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.settings.clip_norm, norm)
        values = torch.stack([nll_sum.float(), norm.float().to(nll_sum.device)]).tolist()
        return values[0], values[1], self.settings.clip_norm > 0

    def _move(self, lr: float, nll_sum: float, norm: float) -> bool:
        """Move the weights unless loss or gradient is not finite; with fp16 the scaler learns of the overflow."""
        finite = _finite(nll_sum) and _finite(norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.step(self.optimizer)
            self.accelerator.scaler.update()
        elif finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return finite


def _finite(value: float) -> bool:
    return value - value == 0.0
