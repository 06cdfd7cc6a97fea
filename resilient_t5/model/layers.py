"""Memory-saving T5 layers: the forward pass saves only tensors that the backward pass cannot recompute cheaply.

The layers of transformers save every intermediate: eight feed-forward widths for a gated GELU, the normed input in addition to
the input, a 16-bit copy of every weight under autocast, and a mask of B x heads x S x S in every layer. Here a norm saves its
input, a product saves its input and the weight itself, and a feed-forward layer saves the results of its first products. The
rest is recomputed: element-wise operations, and on a CPU the scores of attention. Forward and backward are the same up to
rounding.

All layers of a stack share one position bias and one additive mask. transformers adds the padding mask to the bias in every
layer, B x heads x S x S each time, and adds zeros of that size in every cross-attention. Here the first layer adds them once,
in the number format of the products, and passes the result on in place of the bias; without padding it stays
(1, heads, S, S), and cross-attention gets (B, 1, T, S) or nothing. On a GPU torch's kernels do the rest (the gradient of the
bias is then accumulated over the layers in 16 bits). On a CPU they would save scores, weights
and dropout of every layer, so `RecomputedAttention` saves the projections and one byte per score, and recomputes the weights,
like Dao et al. 2022 (arXiv 2205.14135) but without tiling.

`model/memory.py` counts the saved bytes. Shapes: B examples, S tokens, D model width, F feed-forward width, H heads,
Q queries, K keys, W width of a head.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.models.mt5.modeling_mt5 import MT5Attention, MT5DenseActDense, MT5DenseGatedActDense, MT5LayerNorm
from transformers.models.t5.modeling_t5 import T5Attention, T5DenseActDense, T5DenseGatedActDense, T5LayerNorm

from resilient_t5.model.embeddings import T5Model
from resilient_t5.model.vocabulary_gradients import wide_product


class RecomputedAttention(torch.autograd.Function):
    """softmax(q k^T + mask) v with dropout on the weights; computes in float32, saves its inputs and the dropout mask."""

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
            # The scale of dropout is applied to the values, which are far fewer than the weights.
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
    """T5 attention, which has no scale factor: (B, H, Q, W).

    Args:
        mask: additive, in the dtype of the query, broadcastable to (B, H, Q, K); None if every key is visible.
        probability: of dropout on the weights.
    """
    if query_BHQW.device.type == "cpu" and torch.is_grad_enabled():
        return RecomputedAttention.apply(query_BHQW, key_BHKW, value_BHKW, mask, probability)
    return functional.scaled_dot_product_attention(
        query_BHQW, key_BHKW, value_BHKW, attn_mask=mask, dropout_p=probability, scale=1.0
    )


def additive_mask(bias_1HQK: torch.Tensor | None, visible: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Combine bias and visibility into one additive mask of `dtype`.

    Args:
        bias_1HQK: the learned position bias; None in cross-attention.
        visible: bool, or additive floats, broadcastable to (B, H, Q, K); None if all keys are visible.
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
    """Forward of the two classes below over `attend`. With a cache, the forward of transformers runs."""

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
        """The mask of the first layer, which is passed to the others as their bias."""
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


aten = torch.ops.aten
Derivative = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# Name in a T5 configuration -> the function, and its backward (grad of output, input) -> grad of input.
ACTIVATIONS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Derivative]] = {
    "relu": (torch.relu, lambda grad, gate: aten.threshold_backward(grad, gate, 0)),
    "gelu": (functional.gelu, lambda grad, gate: aten.gelu_backward(grad, gate)),
    "gelu_new": (
        lambda gate: functional.gelu(gate, approximate="tanh"),
        lambda grad, gate: aten.gelu_backward(grad, gate, approximate="tanh"),
    ),
    "silu": (functional.silu, lambda grad, gate: aten.silu_backward(grad, gate)),
    "swish": (functional.silu, lambda grad, gate: aten.silu_backward(grad, gate)),
}


def working_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype of a matrix product with this operand: that of autocast if enabled, else that of the operand."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return tensor.dtype


class RmsNorm(torch.autograd.Function):
    """x / rms(x) * weight; saves x and one number per token. Computes in float32 or wider, returns `dtype`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_D: torch.Tensor, epsilon: float, dtype: torch.dtype) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight_D, scale)
        return (x * scale).mul_(weight_D).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        x, weight_D, scale = ctx.saved_tensors
        normed = x * scale
        along = (normed * grad).flatten(0, -2)
        grad_weight_D = along.sum(0).to(weight_D.dtype) if ctx.needs_input_grad[1] else None
        mean = torch.mv(along, weight_D.to(along.dtype)).div_(x.shape[-1]).view(scale.shape)
        del along
        grad_x = normed.mul_(mean.neg_()).addcmul_(grad.to(normed.dtype), weight_D.to(normed.dtype)).mul_(scale)
        return grad_x.to(x.dtype), grad_weight_D, None, None


class RecastProduct(torch.autograd.Function):
    """x @ weight^T in the 16-bit format of x; saves x and the weight itself, and casts the weight again in backward.

    The gradient of the weight is accumulated in float32 if the device supports it.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x, weight.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            grad_x = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
            grad_weight = None
            if ctx.needs_input_grad[1]:
                grad_weight = wide_product(grad.flatten(0, -2).T, x.flatten(0, -2)).to(weight.dtype)
        return grad_x, grad_weight


class FeedForward(torch.autograd.Function):
    """keep * activation(gate) * linear @ weight^T; saves gate, linear and the dropout mask, recomputes the rest."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: torch.Tensor,
        linear: torch.Tensor | None,
        weight_DF: torch.Tensor,
        keep: torch.Tensor | None,
        settings: tuple[str, float, torch.dtype],
    ) -> torch.Tensor:
        ctx.save_for_backward(gate, linear, weight_DF, keep)
        ctx.settings = settings
        with torch.autocast(gate.device.type, enabled=False):
            hidden = _hidden(ACTIVATIONS[settings[0]][0](gate), linear, keep, settings[1])
            return functional.linear(hidden.to(settings[2]), weight_DF.to(settings[2]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, None, None]:
        gate, linear, weight_DF, keep = ctx.saved_tensors
        name, factor, dtype = ctx.settings
        activation, derivative = ACTIVATIONS[name]
        with torch.autocast(gate.device.type, enabled=False):
            activated = activation(gate)
            grad_weight_DF = None
            if ctx.needs_input_grad[2]:
                hidden = _hidden(activated if linear is None else activated.clone(), linear, keep, factor)
                grad_weight_DF = _product(grad.flatten(0, -2).T, hidden.flatten(0, -2).to(dtype)).to(weight_DF.dtype)
                del hidden
            grad_hidden = (grad @ weight_DF.to(grad.dtype)).to(gate.dtype)
            if keep is not None:
                grad_hidden.mul_(keep).mul_(factor)
            if linear is None:
                return derivative(grad_hidden, gate), None, grad_weight_DF, None, None
            grad_linear = activated.mul_(grad_hidden)
            return derivative(grad_hidden.mul_(linear), gate), grad_linear, grad_weight_DF, None, None


def _hidden(activated: torch.Tensor, linear: torch.Tensor | None, keep: torch.Tensor | None, factor: float) -> torch.Tensor:
    """The input of the second product, computed in place of `activated`."""
    if linear is not None:
        activated.mul_(linear)
    return activated if keep is None else activated.mul_(keep).mul_(factor)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b if a.dtype in (torch.float32, torch.float64) else wide_product(a, b)


FEED_FORWARDS = (T5DenseActDense, T5DenseGatedActDense, MT5DenseActDense, MT5DenseGatedActDense)


class LeanNorm(nn.Module):
    """A norm inside a block: its output feeds matrix products only, so under autocast it is cast to 16 bits once."""

    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon, working_dtype(hidden_states))


class LeanLastNorm(LeanNorm):
    """The decoder's last norm: float32 regardless of autocast, since it is the input of the loss."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon, hidden_states.dtype)


class LeanDropout(nn.Dropout):
    """Dropout that saves one byte per value, on a CPU too."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.native_dropout(input, self.p, True)[0] if self.training and self.p > 0 else input


class LeanLinear(nn.Linear):
    """A linear layer that saves no 16-bit copy of its weight under autocast."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        dtype = working_dtype(input)
        if dtype == self.weight.dtype:
            return functional.linear(input, self.weight)
        return RecastProduct.apply(input.to(dtype), self.weight)


class LeanFeedForward(nn.Module):
    """T5's feed-forward layer, gated or not, over `FeedForward`."""

    wo: nn.Linear
    dropout: nn.Dropout
    activation_name: str

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        first: Any = getattr(self, "wi_0", None)
        gated = first is not None
        gate = first(hidden_states) if gated else self.get_submodule("wi")(hidden_states)
        linear = self.get_submodule("wi_1")(hidden_states) if gated else None
        probability = self.dropout.p if self.training else 0.0
        keep = torch.empty_like(gate, dtype=torch.bool).bernoulli_(1.0 - probability) if probability > 0 else None
        factor = 1.0 / (1.0 - probability)
        # In the number format of the gate: a float32 island (`precision.py`) needs its second product in float32 too.
        return FeedForward.apply(gate, linear, self.wo.weight, keep, (self.activation_name, factor, gate.dtype))


def install_lean_layers(model: T5Model) -> None:
    """Replace the classes of the layers of `model`; parameters, names and hooks are kept. Idempotent.

    Compatible with autocast, checkpointing, float32 islands (before or after), evaluation and generation.
    """
    modules: list[Any] = list(model.modules())
    for module in modules:
        kind = type(module)
        if kind in LEAN_ATTENTION:
            # Only the class changes, so parameters, names and hooks are kept.
            module.__class__ = LEAN_ATTENTION[kind]
        elif kind in (T5LayerNorm, MT5LayerNorm):
            module.__class__ = LeanNorm
        elif kind in FEED_FORWARDS:
            module.activation_name = model.config.dense_act_fn
            module.__class__ = LeanFeedForward
        elif kind is nn.Dropout:
            module.__class__ = LeanDropout
        elif kind is nn.Linear and module is not model.lm_head:
            module.__class__ = LeanLinear
    last: Any = model.decoder.final_layer_norm
    last.__class__ = LeanLastNorm
