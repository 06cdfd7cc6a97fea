"""Buffers that last from update to update: gradients, and copies of the weights in the number format of the products.

Products over the same input (queries, keys and values; gate and linear) share one copy and one gradient buffer, so each is one
product. The copies cost 2 bytes a weight; without them every product casts its weight again, in forward and in backward.

Shapes: O results of a product, D inputs, N tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from resilient_t5.model.vocabulary_gradients import add_into


@dataclass(frozen=True)
class Operand:
    """The weights of a product, one below the other."""

    weights: tuple[nn.Parameter, ...]
    cast_OD: torch.Tensor
    """Their copy in the dtype of the product."""
    grad_OD: torch.Tensor
    """Their gradients, in the dtype of the weights; during an update `weight.grad` is a view of it."""

    @classmethod
    def allocate(cls, weights: tuple[nn.Parameter, ...], dtype: torch.dtype) -> "Operand":
        """The operand of these weights (O_i, D), with gradients of zero and no copy yet."""
        first, rows = weights[0], sum(weight.shape[0] for weight in weights)
        return cls(weights, first.new_empty(rows, first.shape[1], dtype=dtype), first.new_zeros(rows, first.shape[1]))

    def casts(self) -> Sequence[torch.Tensor]:
        """The part of each weight in `cast_OD`."""
        return self.cast_OD.split([weight.shape[0] for weight in self.weights])

    def gradients(self) -> Sequence[torch.Tensor]:
        """The part of each weight in `grad_OD`."""
        return self.grad_OD.split([weight.shape[0] for weight in self.weights])

    def add_gradient(self, grad_NO: torch.Tensor, x_ND: torch.Tensor) -> None:
        """Add grad^T @ x to the gradients of all weights."""
        add_into(self.grad_OD, grad_NO.T, x_ND, 1.0)


class StaticBuffers:
    """Gradients, and copies of the weights if any, at addresses that never change: a captured graph keeps using them.

    Args:
        model: not sharded, on its device.
        operands: of its blocks; may be empty.
    """

    def __init__(self, model: nn.Module, operands: Sequence[Operand]):
        self._casts = [part for operand in operands for part in operand.casts()]
        self._weights: list[torch.Tensor] = [weight for operand in operands for weight in operand.weights]
        shared = {id(weight) for weight in self._weights}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in shared]
        own = [torch.zeros_like(parameter) for parameter in others]
        self._filled = [*(operand.grad_OD for operand in operands), *own]
        parts = [part for operand in operands for part in operand.gradients()]
        self._gradient_of = [*zip(self._weights, parts, strict=True), *zip(others, own, strict=True)]

    @torch.no_grad()
    def begin_update(self) -> None:
        """Copy the weights, and set all gradients to zero and back into `grad`, which an optimizer may have set to None."""
        if self._casts:
            torch._foreach_copy_(self._casts, self._weights)
        torch._foreach_zero_(self._filled)
        for parameter, gradient in self._gradient_of:
            parameter.grad = gradient
