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

SMALLEST_SQUARE = 1e-30
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
        square = grad.float().square().add_(SMALLEST_SQUARE)
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
        square = grad[..., block, :].float().square().add_(SMALLEST_SQUARE)
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
