"""Adafactor (Shazeer and Stern 2018) as T5 was trained with, with an absolute learning rate.

No first moment, no parameter scaling, no learning rate of its own; the second moment of a matrix is kept as the means of
its rows and columns, in float32. Second-moment decay 1 - t**-0.8, the update clipped to a root mean square of 1.

torch.optim.Adafactor multiplies the learning rate by the parameter's size and fetches a number from the device per
tensor; transformers' makes two more tensors of the size of the parameter. This one works through a matrix by blocks of
rows, so an mT5 embedding costs a buffer of 16 MiB and no host sync.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

MIN_SQUARE = 1e-30
CLIP_RMS = 1.0
DECAY_POWER = -0.8
BLOCK_VALUES = 2**22


class Adafactor(torch.optim.Optimizer):
    """Adafactor with a learning rate that is set from outside. State per parameter: see `adafactor_update`."""

    def __init__(self, params: Iterable[Any], lr: float):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. A closure is refused: the loop owns forward and backward."""
        if closure is not None:
            raise ValueError("Adafactor takes no closure")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    adafactor_update(parameter, parameter.grad, self.state[parameter], group["lr"])


class AdafactorInBackward(Adafactor):
    """Adafactor that updates each parameter as soon as the backward pass has its whole gradient, and drops the gradient.

    No gradient but those of the vocabulary tables ever waits for another, so weights and states are nearly all there is
    to hold. The price: one backward pass is one update, so there is no accumulation over micro-batches; the global norm is
    known when all is over, so nothing is clipped by it (Adafactor clips each tensor's update); no loss scaler; one process.

    A gradient that is not finite stops all movement from there on, but what the pass reached before it has moved: the
    weights are then worth nothing, and the run must go back to a checkpoint.
    """

    def __init__(self, params: Iterable[Any], lr: float):
        super().__init__(params, lr)
        self.moved = 0
        self.failed: tuple[int, ...] | None = None
        self._squares: list[torch.Tensor] = []
        self._lr = lr
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(self._update)

    def begin(self, lr: float) -> None:
        """Get ready for one backward pass at this learning rate."""
        self.moved, self.failed, self._squares, self._lr = 0, None, [], lr
        for group in self.param_groups:
            group["lr"] = lr

    def end(self) -> float:
        """The global gradient norm of the pass."""
        return float(torch.stack(self._squares).sum().sqrt()) if self._squares else math.nan

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Refused: the backward pass is the update."""
        raise RuntimeError("Adafactor stepped in the backward pass has no update of its own")

    @torch.no_grad()
    def _update(self, parameter: torch.Tensor) -> None:
        grad = parameter.grad
        if grad is None:
            return
        square = torch.linalg.vector_norm(grad, dtype=torch.float32).square()
        self._squares.append(square)
        if self.failed is None and math.isfinite(float(square)):  # a host sync for every tensor
            adafactor_update(parameter, grad, self.state[parameter], self._lr)
            self.moved += 1
        elif self.failed is None:
            self.failed = tuple(parameter.shape)
        parameter.grad = None


@torch.no_grad()
def adafactor_update(parameter: torch.Tensor, grad: torch.Tensor, state: dict[str, torch.Tensor], lr: float) -> None:
    """Update one parameter in place; the gradient is only read.

    Args:
        parameter: of any shape; matrices are factored over their last two dimensions.
        grad: of the same shape.
        state: `count` (int64 scalar on the CPU) and `row`, `column` (float32 means of squares) or, for a vector,
            `square` (float32); empty before the first update.
        lr: absolute learning rate.
    """
    if not state:
        state["count"] = torch.zeros((), dtype=torch.int64)
        for name, shape in _state_shapes(grad).items():
            state[name] = torch.zeros(shape, dtype=torch.float32, device=grad.device)
    state["count"] += 1
    decay = 1.0 - math.pow(int(state["count"]), DECAY_POWER)
    if grad.ndim < 2:
        square = grad.float().square().add_(MIN_SQUARE)
        scaled = state["square"].lerp_(square, 1.0 - decay).rsqrt().mul_(grad)
        clip = (scaled.square().mean().sqrt() / CLIP_RMS).clamp_(min=1.0)
        parameter.sub_((scaled / clip * lr).to(parameter.dtype))
        return
    _update_matrices(parameter, grad, state, decay, lr)


def _state_shapes(grad: torch.Tensor) -> dict[str, tuple[int, ...]]:
    shape = tuple(grad.shape)
    return {"row": shape[:-1], "column": (*shape[:-2], shape[-1])} if grad.ndim >= 2 else {"square": shape}


def _update_matrices(
    parameter: torch.Tensor, grad: torch.Tensor, state: dict[str, torch.Tensor], decay: float, lr: float
) -> None:
    rows, columns = grad.shape[-2:]
    block_rows = max(1, BLOCK_VALUES // columns)
    blocks = [slice(first, min(first + block_rows, rows)) for first in range(0, rows, block_rows)]
    column_sum = torch.zeros_like(state["column"])
    for block in blocks:
        square = grad[..., block, :].float().square().add_(MIN_SQUARE)
        state["row"][..., block].lerp_(square.mean(-1), 1.0 - decay)
        column_sum += square.sum(-2)
    state["column"].lerp_(column_sum / rows, 1.0 - decay)
    row_factor = (state["row"] / state["row"].mean(-1, keepdim=True)).rsqrt_()[..., None]
    column_factor = state["column"].rsqrt()[..., None, :]

    def scaled(block: slice) -> torch.Tensor:
        return (grad[..., block, :].float() * row_factor[..., block, :]).mul_(column_factor)

    total = torch.zeros((), dtype=torch.float32, device=grad.device)
    for block in blocks:
        total += scaled(block).square_().sum()
    factor = lr / ((total / grad.numel()).sqrt() / CLIP_RMS).clamp_(min=1.0)
    for block in blocks:
        parameter[..., block, :].sub_(scaled(block).mul_(factor).to(parameter.dtype))
