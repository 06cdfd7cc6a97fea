"""Muon for the matrices inside the layers, AdamW for everything else: for models from scratch.

A matrix moves along its momentum after all singular values of that were made equal, so directions that few examples ask
for move as far as those that all ask for (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks").
The move is scaled to the root mean square that AdamW's has, so `optim.lr` keeps its meaning (Liu et al. 2025, "Muon is
scalable for LLM training"). Vocabulary tables, norms and position biases are no maps between hidden states and stay AdamW's.

On the Chinese run it needs two thirds of AdamW's updates for the same loss (docs/results.md). Fine-tuning with
it degrades models that were pretrained with Adam (arXiv 2605.10468), so the configuration refuses it for a checkpoint.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

MOMENTUM = 0.95
QUINTIC = (3.4445, -4.7750, 2.0315)
"""Of Jordan et al.: five rounds bring singular values from 0.002 up into 0.7 to 1.2, which is equal enough."""
ROUNDS = 5
"""Three are two fifths cheaper and did as well in 500 updates of the Chinese run, but on the built-in notes the facts fell into
place later: 0.31 of the terms after 400 updates, for 0.95 with five."""
ADAM_RMS = 0.2
BLOCK_VALUES = 2**22
"""Values of gradients that are worked on at once; bounds the memory of a move."""
MOVE_BYTES = 20
"""What a move takes for each of them in float32, where matrices are square; less where they are not."""


class Muon(torch.optim.Optimizer):
    """One optimizer of two kinds of groups; those of AdamW come first. State of a matrix: `momentum`, float32.

    Args:
        matrices: the group of what is moved by its orthogonal momentum; two-dimensional parameters.
        rest: AdamW over everything else.
        product_dtype: number format of the products; bfloat16 suffices and is faster where the device has it.
    """

    def __init__(self, matrices: dict[str, Any], rest: torch.optim.AdamW, product_dtype: torch.dtype = torch.float32) -> None:
        super().__init__([matrices], {"lr": rest.defaults["lr"]})
        rest.state = self.state
        self.param_groups = [*rest.param_groups, *self.param_groups]
        self._rest, self._product_dtype = rest, product_dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. A closure is refused: the loop owns forward and backward."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        self._rest.step()
        group = self.param_groups[-1]
        for block in _blocks([parameter for parameter in group["params"] if parameter.grad is not None]):
            self._move(block, group["lr"], group["weight_decay"])

    def _move(self, block: list[torch.Tensor], lr: float, weight_decay: float) -> None:
        wanted_KRC = torch.stack([_oriented(self._momentum(parameter)) for parameter in block])
        rate = lr * ADAM_RMS * math.sqrt(wanted_KRC.shape[-1])
        for parameter, move_RC in zip(block, orthogonal(wanted_KRC, self._product_dtype), strict=True):
            parameter.mul_(1.0 - lr * weight_decay)
            _oriented(parameter).sub_(move_RC, alpha=rate)

    def _momentum(self, parameter: torch.Tensor) -> torch.Tensor:
        """The gradient and the momentum it is added to, ahead by one update (Nesterov)."""
        grad, state = parameter.grad, self.state[parameter]
        assert grad is not None
        if not state:
            state["momentum"] = torch.zeros_like(grad, dtype=torch.float32)
        momentum = state["momentum"].mul_(MOMENTUM).add_(grad)
        return torch.add(grad, momentum, alpha=MOMENTUM)


def orthogonal(matrices_KRC: torch.Tensor, product_dtype: torch.dtype) -> torch.Tensor:
    """The matrices with all singular values brought near 1, float32; K of them, R rows not more than C columns.

    A matrix of zeros stays one. Cost: ROUNDS * (4 R C + 2 R R) R operations each.
    """
    norm_K11 = torch.linalg.vector_norm(matrices_KRC, dim=(1, 2), keepdim=True)
    x_KRC = (matrices_KRC / norm_K11.clamp_min(torch.finfo(torch.float32).tiny)).to(product_dtype)
    a, b, c = QUINTIC
    for _ in range(ROUNDS):
        square_KRR = x_KRC @ x_KRC.mT
        polynomial_KRR = torch.baddbmm(square_KRR, square_KRR, square_KRR, beta=b, alpha=c)
        x_KRC = torch.baddbmm(x_KRC, polynomial_KRR, x_KRC, beta=a)
    return x_KRC.float()


def _oriented(matrix: torch.Tensor) -> torch.Tensor:
    """A view with not more rows than columns."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def _blocks(parameters: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Parameters of one oriented shape together, in the order given, at most BLOCK_VALUES or one matrix at a time."""
    of_shape: dict[torch.Size, list[torch.Tensor]] = {}
    for parameter in parameters:
        of_shape.setdefault(_oriented(parameter).shape, []).append(parameter)
    for shape, alike in of_shape.items():
        size = max(1, BLOCK_VALUES // shape.numel())
        yield from (alike[first : first + size] for first in range(0, len(alike), size))
