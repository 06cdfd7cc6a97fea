"""Attention of a T5 with one additive mask a stack, and with scores that a CPU makes again in the backward pass.

All layers of a stack share one position bias. transformers joins it with the padding in every layer anew, B x heads x S
x S each time, and adds zeros of that size in every cross-attention. Here the first layer joins them, in the number format
of the products, and hands the result on in the place of the bias; where nothing is padded it stays (1, heads, S, S), and
cross-attention gets (B, 1, T, S) or nothing. On a GPU torch's own kernels do the rest (for them the gradient of the bias
adds up over the layers in 16 bits); on a CPU they would keep scores, weights and dropout of every layer, so
`RecomputedAttention` keeps the projections and one byte a score, and makes the weights again, as Dao et al. 2022
(arXiv 2205.14135) do, but without their blocks.

Shapes: B examples, H heads, Q queries, K keys, W width of a head.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.models.mt5.modeling_mt5 import MT5Attention
from transformers.models.t5.modeling_t5 import T5Attention


class RecomputedAttention(torch.autograd.Function):
    """softmax(q k^T + mask) v with dropout on the weights; float32 inside, keeps its inputs and the bits of dropout."""

    @staticmethod
    def forward(
        ctx: Any,
        query_BHQW: torch.Tensor,
        key_BHKW: torch.Tensor,
        value_BHKW: torch.Tensor,
        mask: torch.Tensor | None,
        probability: float,
    ) -> torch.Tensor:
        with torch.autocast(query_BHQW.device.type, enabled=False):
            weights_BHQK = _weights(query_BHQW, key_BHKW, mask)
            keep_BHQK = None
            if probability > 0:
                keep_BHQK = torch.empty_like(weights_BHQK, dtype=torch.bool).bernoulli_(1.0 - probability)
                weights_BHQK.mul_(keep_BHQK)
            ctx.save_for_backward(query_BHQW, key_BHKW, value_BHKW, mask, keep_BHQK)
            # The scale of dropout goes into the values, which are far fewer than the weights.
            ctx.factor = 1.0 / (1.0 - probability)
            wide_BHKW = _wide(value_BHKW) * ctx.factor if probability > 0 else _wide(value_BHKW)
            return (weights_BHQK @ wide_BHKW).to(query_BHQW.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHQW: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query_BHQW, key_BHKW, value_BHKW, mask, keep_BHQK = ctx.saved_tensors
        with torch.autocast(grad_BHQW.device.type, enabled=False):
            scaled_BHQW = _wide(grad_BHQW) * ctx.factor
            grad_BHQK = scaled_BHQW @ _wide(value_BHKW).transpose(2, 3)
            weights_BHQK = _weights(query_BHQW, key_BHKW, mask)
            if keep_BHQK is None:
                grad_value_BHKW = weights_BHQK.transpose(2, 3) @ scaled_BHQW
            else:
                grad_value_BHKW = (weights_BHQK * keep_BHQK).transpose(2, 3) @ scaled_BHQW
                grad_BHQK.mul_(keep_BHQK)
            dtype = weights_BHQK.dtype
            grad_BHQK = torch.ops.aten._softmax_backward_data(grad_BHQK, weights_BHQK, -1, dtype)
            del weights_BHQK
            grad_query_BHQW = grad_BHQK @ _wide(key_BHKW)
            grad_key_BHKW = grad_BHQK.transpose(2, 3) @ _wide(query_BHQW)
            grad_mask = None
            if mask is not None and ctx.needs_input_grad[3]:
                grad_mask = grad_BHQK.sum_to_size(mask.shape).to(mask.dtype)
        narrow = query_BHQW.dtype
        return grad_query_BHQW.to(narrow), grad_key_BHKW.to(narrow), grad_value_BHKW.to(narrow), grad_mask, None


def attend(
    query_BHQW: torch.Tensor,
    key_BHKW: torch.Tensor,
    value_BHKW: torch.Tensor,
    mask: torch.Tensor | None,
    probability: float,
) -> torch.Tensor:
    """Attention without a scale, as T5's is: (B, H, Q, W).

    Args:
        mask: additive, in the dtype of the query, to be broadcast to (B, H, Q, K); None where every key is seen.
        probability: of dropout on the weights.
    """
    if query_BHQW.device.type == "cpu" and torch.is_grad_enabled():
        return RecomputedAttention.apply(query_BHQW, key_BHKW, value_BHKW, mask, probability)
    return functional.scaled_dot_product_attention(
        query_BHQW, key_BHKW, value_BHKW, attn_mask=mask, dropout_p=probability, scale=1.0
    )


def additive_mask(bias_1HQK: torch.Tensor | None, visible: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Bias and visibility as one mask to be added to the scores, of `dtype`.

    Args:
        bias_1HQK: the learned position bias; None in cross-attention.
        visible: bool, or additive floats, to be broadcast to (B, H, Q, K); None where all keys are visible.
    """
    bias = None if bias_1HQK is None else bias_1HQK.to(dtype)
    if visible is None:
        return None if bias is None else bias.contiguous()
    if visible.dtype != torch.bool:
        return visible.to(dtype) if bias is None else bias + visible.to(dtype)
    hidden = torch.finfo(dtype).min
    if bias is None:
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, hidden)
    return torch.where(visible, bias, hidden)


class _LeanAttention(nn.Module):
    """What the two classes below share: a forward over `attend`. With a cache, transformers' own forward runs."""

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    dropout: float
    n_heads: int
    key_value_proj_dim: int
    inner_dim: int
    is_causal: bool
    has_relative_attention_bias: bool
    compute_bias: Any

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        key_value_states: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        past_key_values: Any = None,
        **rest: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        if past_key_values is not None:
            return super().forward(hidden_states, mask, key_value_states, position_bias, past_key_values, **rest)
        source = hidden_states if key_value_states is None else key_value_states
        query_BHQW, key_BHKW, value_BHKW = (
            self._split(self.q(hidden_states)),
            self._split(self.k(source)),
            self._split(self.v(source)),
        )
        if position_bias is None:
            position_bias = self._mask(mask, query_BHQW, key_BHKW.shape[2])
        probability = self.dropout if self.training else 0.0
        mixed_BHQW = attend(query_BHQW, key_BHKW, value_BHKW, position_bias, probability)
        rows, length = hidden_states.shape[:2]
        return self.o(mixed_BHQW.transpose(1, 2).reshape(rows, length, self.inner_dim)), position_bias, None

    def _split(self, states_BSI: torch.Tensor) -> torch.Tensor:
        rows, length, _ = states_BSI.shape
        return states_BSI.view(rows, length, self.n_heads, self.key_value_proj_dim).transpose(1, 2)

    def _mask(self, visible: torch.Tensor | None, query_BHQW: torch.Tensor, keys: int) -> torch.Tensor | None:
        """The first layer's mask, which the others are handed as their bias."""
        queries, device = query_BHQW.shape[2], query_BHQW.device
        if not self.has_relative_attention_bias:
            return additive_mask(None, visible, query_BHQW.dtype)
        if visible is None and self.is_causal and queries > 1:
            visible = torch.ones(queries, keys, dtype=torch.bool, device=device).tril()[None, None]
        return additive_mask(self.compute_bias(queries, keys, device=device), visible, query_BHQW.dtype)


class LeanT5Attention(_LeanAttention, T5Attention):
    """`T5Attention` over `attend`."""


class LeanMT5Attention(_LeanAttention, MT5Attention):
    """`MT5Attention` over `attend`."""


LEAN_ATTENTION: dict[type[nn.Module], type[nn.Module]] = {T5Attention: LeanT5Attention, MT5Attention: LeanMT5Attention}


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _weights(query_BHQW: torch.Tensor, key_BHKW: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    scores_BHQK = _wide(query_BHQW) @ _wide(key_BHKW).transpose(2, 3)
    if mask is not None:
        scores_BHQK.add_(mask)
    return torch.softmax(scores_BHQK, -1)
