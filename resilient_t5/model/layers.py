"""T5 layers for training: few operations, and only tensors saved that the backward pass cannot recompute cheaply.

The layers of transformers save every intermediate: eight feed-forward widths for a gated GELU, the normed input in addition to
the input, and a 16-bit copy of every weight under autocast. Here a norm saves its input, a product its input, and a
feed-forward layer the results of its first products. The rest is recomputed: element-wise operations, and on a CPU the scores
of attention (`model/attention.py`). Products over the same input are one product. Gradients of matrices are added to
`weight.grad` by the product itself, as those of the vocabulary tables are (`model/vocabulary_gradients.py`), unless the
layers are sharded. Nothing in forward or backward depends on the values of a tensor, so on a GPU a pass can be captured as a
graph.

`install_lean_layers` changes the classes of stacks and blocks. With `embedded_BSD` a stack computes as described here,
otherwise as in transformers, which generation uses.

`model/memory.py` counts the saved bytes. Shapes: B rows, S tokens, N = B S, D model width, F feed-forward width, I width of all
heads together, H heads, Q queries, K keys, O results of a product.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.models.mt5.modeling_mt5 import MT5Block, MT5Stack
from transformers.models.t5.modeling_t5 import T5Block, T5Stack

from resilient_t5.model.attention import PositionMask, additive_mask, attend, mask_dtype
from resilient_t5.model.dropout import DropoutMask, draw_ahead, drop
from resilient_t5.model.embeddings import T5Model
from resilient_t5.model.operands import Operand, StaticBuffers
from resilient_t5.model.vocabulary_gradients import add_product, wide_product

aten = torch.ops.aten
Derivative = Callable[..., torch.Tensor]
# Name in a T5 configuration -> the function, and its backward (grad of output, input, where to write) -> grad of input.
ACTIVATIONS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Derivative]] = {
    "relu": (torch.relu, lambda grad, gate, out: aten.threshold_backward.grad_input(grad, gate, 0, grad_input=out)),
    "gelu": (functional.gelu, lambda grad, gate, out: aten.gelu_backward.grad_input(grad, gate, grad_input=out)),
    "gelu_new": (
        lambda gate: functional.gelu(gate, approximate="tanh"),
        lambda grad, gate, out: aten.gelu_backward.grad_input(grad, gate, approximate="tanh", grad_input=out),
    ),
    "silu": (functional.silu, lambda grad, gate, out: aten.silu_backward.grad_input(grad, gate, grad_input=out)),
    "swish": (functional.silu, lambda grad, gate, out: aten.silu_backward.grad_input(grad, gate, grad_input=out)),
}


LEAN = "lean"
"""First argument of a block for the forward pass of this module."""
LONGEST_DISTANCES = 1024
"""Distances are looked up for lengths of at least this; doubled for longer rows."""


@dataclass
class Constants:
    """Tensors that every pass needs, made once. Captured graphs read them, so none is ever replaced."""

    scalars: dict[tuple[float, torch.device, torch.dtype], torch.Tensor] = field(default_factory=dict)
    distances: dict[tuple[bool, int, torch.device], torch.Tensor] = field(default_factory=dict)
    """See `one_hot_distances`."""

    def scalar(self, value: float, like: torch.Tensor) -> torch.Tensor:
        """A scalar on the device of `like`, in its dtype or float32 if that is wider."""
        key = value, like.device, torch.promote_types(like.dtype, torch.float32)
        if key not in self.scalars:
            self.scalars[key] = torch.full((), value, device=key[1], dtype=key[2])
        return self.scalars[key]


@dataclass
class LeanSettings:
    """What the blocks of a model share, and each block's copies of its weights."""

    by_kernel: bool
    """Draw dropout in one call, as for a GPU."""
    in_place: bool
    """Add gradients of matrices to `weight.grad` directly."""
    activation: str
    epsilon: float
    """Of the norms; from the configuration, since the class of a norm may be that of another library."""
    constants: Constants
    linears: dict[str, tuple[nn.Linear, ...]]
    """The layers of each product of a block, by the name of the product; empty for a stack."""
    operands: dict[str, Operand] = field(default_factory=dict)
    """Copies of the weights of a block in the dtype of its products, by the name of the product."""


def working_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype of a matrix product with this operand: that of autocast if enabled, else that of the operand."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return tensor.dtype


class RmsNorm(torch.autograd.Function):
    """(x / rms(x) * weight in `dtype`, x itself); saves x and one number per token. Computes in float32 or wider.

    The second result is for the residual connection: its gradient then arrives here and is added by the last operation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight_D: torch.Tensor,
        scalars: tuple[torch.Tensor, torch.Tensor],
        settings: tuple[Any, bool],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        (epsilon, ctx.one), (dtype, ctx.in_place) = scalars, settings
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=epsilon.dtype)
        scale = torch.addcmul(epsilon, norm, norm, value=1.0 / x.shape[-1]).rsqrt_()
        ctx.save_for_backward(x, scale)
        ctx.weight = weight_D
        ctx.set_materialize_grads(False)
        normed = x * scale
        return torch.mul(normed, weight_D, out=normed if dtype == normed.dtype else torch.empty_like(normed, dtype=dtype)), x

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: torch.Tensor, grad_residual: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        (x, scale), weight_D = ctx.saved_tensors, ctx.weight
        normed = x * scale
        along = (normed * grad).flatten(0, -2)
        grad_weight_D = None
        if ctx.needs_input_grad[1] and ctx.in_place and weight_D.grad is not None:
            weight_D.grad.addmv_(along.T, ctx.one.expand(along.shape[0]))
        elif ctx.needs_input_grad[1]:
            grad_weight_D = along.sum(0).to(weight_D.dtype)
        weight = weight_D.to(along.dtype)
        mean = torch.addmv(along.new_empty(along.shape[0]), along, weight, beta=0, alpha=-1.0 / x.shape[-1]).view(scale.shape)
        del along
        grad_x = normed.mul_(mean).addcmul_(grad, weight)
        grad_x = grad_x.mul_(scale) if grad_residual is None else torch.addcmul(grad_residual, grad_x, scale)
        return grad_x.to(x.dtype), grad_weight_D, None, None


def rms_norm(x: torch.Tensor, norm: Any, dtype: torch.dtype, lean: LeanSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """x / rms(x) * weight in `dtype`, and x for the residual connection; on a GPU by torch's kernel."""
    if x.device.type == "cpu":
        scalars = lean.constants.scalar(lean.epsilon, x), lean.constants.scalar(1.0, x)
        return RmsNorm.apply(x, norm.weight, scalars, (dtype, lean.in_place))
    return functional.rms_norm(x, (x.shape[-1],), norm.weight, lean.epsilon).to(dtype), x


class Product(torch.autograd.Function):
    """x @ weight^T for one or several weights (O_i, D) with the same input: (..., sum of O_i) in the dtype of x. Saves x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, in_place: bool, operand: Operand | None, *weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.in_place, ctx.operand, ctx.weights = in_place, operand, weights
        x_ND = x.flatten(0, -2)
        with torch.autocast(x.device.type, enabled=False):
            if operand is not None:
                return torch.mm(x_ND, operand.cast_OD.T).view(*x.shape[:-1], -1)
            out_NO = x_ND.new_empty(x_ND.shape[0], sum(weight.shape[0] for weight in weights))
            for part_NO, weight in zip(out_NO.split([w.shape[0] for w in weights], 1), weights, strict=True):
                torch.mm(x_ND, weight.to(x.dtype).T, out=part_NO)
            return out_NO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,), weights = ctx.saved_tensors, ctx.weights
        grad_NO, x_ND = grad.flatten(0, -2), x.flatten(0, -2)
        sizes, needed = [weight.shape[0] for weight in weights], ctx.needs_input_grad[3:]
        with torch.autocast(x.device.type, enabled=False):
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = _product_gradient(grad_NO, weights, ctx.operand).view_as(x)
            grads: list[torch.Tensor | None] = [None] * len(weights)
            if ctx.in_place and ctx.operand is not None and all(needed):
                ctx.operand.add_gradient(grad_NO, x_ND)
            else:
                parts = zip(grad_NO.split(sizes, 1), weights, needed, strict=True)
                grads = [_weight_gradient(g, x_ND, w, 1.0, ctx.in_place) if use else None for g, w, use in parts]
        return grad_x, None, None, *grads


def _product_gradient(grad_NO: torch.Tensor, weights: Sequence[torch.Tensor], operand: Operand | None) -> torch.Tensor:
    """The gradient (N, D) of the input of a product."""
    if operand is not None:
        return torch.mm(grad_NO, operand.cast_OD)
    parts = grad_NO.split([weight.shape[0] for weight in weights], 1)
    grad_ND = torch.mm(parts[0], weights[0].to(grad_NO.dtype))
    for part_NO, weight in zip(parts[1:], weights[1:], strict=True):
        grad_ND.addmm_(part_NO, weight.to(grad_NO.dtype))
    return grad_ND


class ResidualProduct(torch.autograd.Function):
    """residual + dropout(x @ weight^T): the end of an attention. Saves x and the dropout mask."""

    @staticmethod
    def forward(
        ctx: Any,
        residual: torch.Tensor,
        x: torch.Tensor,
        weight_DI: torch.Tensor,
        operand: Operand | None,
        settings: tuple[float, bool, bool],
    ) -> torch.Tensor:
        probability, by_kernel, ctx.in_place = settings
        # Not a saved tensor: checkpointing would hand out another one, without `grad`.
        ctx.operand, ctx.weight = operand, weight_DI
        with torch.autocast(x.device.type, enabled=False):
            drawn = draw_ahead(residual.shape, probability, by_kernel)
            cast_ID = _in_dtype(weight_DI, operand, x.dtype).T
            values, dropout = drop(torch.mm(x.flatten(0, -2), cast_ID), probability, by_kernel, drawn)
            ctx.save_for_backward(x, dropout.keep)
            ctx.scales = dropout.scales
            return torch.add(residual, values.view(residual.shape), alpha=dropout.product_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x, keep), weight_DI = ctx.saved_tensors, ctx.weight
        with torch.autocast(x.device.type, enabled=False):
            grad_ND, scale = _through_dropout(grad, keep, ctx.scales, x.dtype)
            grad_x = _scaled_mm(grad_ND, _in_dtype(weight_DI, ctx.operand, x.dtype), scale).view_as(x)
            grad_weight = None
            if ctx.needs_input_grad[2]:
                grad_weight = _weight_gradient(grad_ND, x.flatten(0, -2), weight_DI, scale, ctx.in_place)
        return grad, grad_x, grad_weight, None, None


class ResidualFeedForward(torch.autograd.Function):
    """residual + dropout(dropout(activation(gate) * linear) @ weight^T): a feed-forward layer after its first products.

    `first` holds gate and linear (..., 2 F), or only the gate (..., F). Saved: `first` and the dropout masks; the rest is
    recomputed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        residual: torch.Tensor,
        first: torch.Tensor,
        weight_DF: torch.Tensor,
        operand: Operand | None,
        settings: tuple[str, float, bool, bool],
    ) -> torch.Tensor:
        ctx.activation, probability, by_kernel, ctx.in_place = settings
        ctx.operand, ctx.weight = operand, weight_DF
        with torch.autocast(first.device.type, enabled=False):
            gate, linear = _gate_and_linear(first, weight_DF)
            drawn = draw_ahead(gate.shape, probability, by_kernel), draw_ahead(residual.shape, probability, by_kernel)
            activated = ACTIVATIONS[ctx.activation][0](gate)
            hidden = activated if linear is None else activated.mul_(linear)
            hidden, inner = drop(hidden, probability, by_kernel, drawn[0])
            cast_FD = _in_dtype(weight_DF, operand, first.dtype).T
            values, outer = drop(_scaled_mm(hidden, cast_FD, inner.product_scale), probability, by_kernel, drawn[1])
            ctx.save_for_backward(first, inner.keep, outer.keep)
            ctx.scales = outer.scales  # those of both masks, which have the same probability
            return torch.add(residual, values.view(residual.shape), alpha=outer.product_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (first, keep_hidden, keep), weight_DF = ctx.saved_tensors, ctx.weight
        activation, derivative = ACTIVATIONS[ctx.activation]
        with torch.autocast(first.device.type, enabled=False):
            grad_ND, scale = _through_dropout(grad, keep, ctx.scales, first.dtype)
            gate, linear = _gate_and_linear(first, weight_DF)
            activated = activation(gate)
            inner = DropoutMask(keep_hidden, *ctx.scales)
            scale *= inner.product_scale
            grad_weight = None
            if ctx.needs_input_grad[2]:
                hidden = inner.apply(activated) if linear is None else inner.apply_(activated * linear)
                grad_weight = _weight_gradient(grad_ND, hidden, weight_DF, scale, ctx.in_place)
                del hidden
            grad_hidden = inner.apply_(_scaled_mm(grad_ND, _in_dtype(weight_DF, ctx.operand, first.dtype), scale))
            grad_first = first.new_empty(gate.shape[0], first.shape[-1])
            if linear is not None:
                torch.mul(activated, grad_hidden, out=grad_first[:, gate.shape[1] :])
                grad_hidden.mul_(linear)
            derivative(grad_hidden, gate, grad_first[:, : gate.shape[1]])
        return grad, grad_first.view_as(first), grad_weight, None, None


def _gate_and_linear(first: torch.Tensor, weight_DF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Views (N, F) of the gate and, in a gated layer, of the linear part."""
    first_N = first.flatten(0, -2)
    width = weight_DF.shape[1]
    return (first_N, None) if first_N.shape[1] == width else (first_N[:, :width], first_N[:, width:])


def _through_dropout(
    grad: torch.Tensor, keep_ND: torch.Tensor | None, scales: tuple[float, float], dtype: torch.dtype
) -> tuple[torch.Tensor, float]:
    """The gradient (N, D) of a product before its dropout, in `dtype`, and the factor that is left to the next product."""
    grad_ND = grad.flatten(0, -2)
    if keep_ND is None:
        return grad_ND.to(dtype), 1.0
    out_ND = torch.empty_like(grad_ND, dtype=dtype)
    return torch.mul(grad_ND, keep_ND, out=out_ND), scales[0] * scales[1]


def _in_dtype(weight: torch.Tensor, operand: Operand | None, dtype: torch.dtype) -> torch.Tensor:
    """The weight in the dtype of a product: the copy that exists anyway, or a new one."""
    return weight.to(dtype) if operand is None else operand.cast_OD


def _scaled_mm(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.mm(a, b) if scale == 1.0 else torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def _weight_gradient(
    grad_NO: torch.Tensor, x_ND: torch.Tensor, weight: torch.Tensor, scale: float, in_place: bool
) -> torch.Tensor | None:
    """scale * grad^T @ x, accumulated in the dtype of the weight: added to `weight.grad` or returned."""
    if in_place:
        add_product(weight, grad_NO.T, x_ND, scale)
        return None
    product = torch.mm(grad_NO.T, x_ND) if x_ND.dtype == weight.dtype else wide_product(grad_NO.T, x_ND).to(weight.dtype)
    return product if scale == 1.0 else product.mul_(scale)


def products_of(block: Any) -> dict[str, tuple[nn.Linear, ...]]:
    """The layers of each product of a block: those with the same input are one product."""
    attention, dense = block.layer[0].SelfAttention, block.layer[-1].DenseReluDense
    found = {"self.first": (attention.q, attention.k, attention.v), "self.last": (attention.o,)}
    if block.is_decoder:
        cross = block.layer[1].EncDecAttention
        found |= {"cross.first": (cross.q,), "cross.second": (cross.k, cross.v), "cross.last": (cross.o,)}
    gates = (dense.wi_0, dense.wi_1) if hasattr(dense, "wi_0") else (dense.wi,)
    return found | {"ff.first": gates, "ff.last": (dense.wo,)}


class LeanBlock(nn.Module):
    """Forward of the two classes below over the functions above.

    Every argument is positional, since checkpointing passes only those to the backward pass. Returns the hidden states and
    the mask of self-attention, which the first block makes from visibility and its table of biases.
    """

    layer: nn.ModuleList
    is_decoder: bool
    lean: LeanSettings

    def forward(self, hidden_BSD: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not (args and args[0] is LEAN):
            return super().forward(hidden_BSD, *args, **kwargs)
        _, mask, encoded_BKD, cross_mask = args
        hidden_BSD, mask = self._self_attention(hidden_BSD, mask)
        if self.is_decoder:
            hidden_BSD = self._cross_attention(hidden_BSD, encoded_BKD, cross_mask)
        return self._feed_forward(hidden_BSD), mask

    def _self_attention(self, hidden_BSD: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        sublayer: Any = self.layer[0]
        attention = sublayer.SelfAttention
        normed_BSD, hidden_BSD = self._norm(sublayer, hidden_BSD)
        first = self._heads(self._product(normed_BSD, "self.first"), attention)
        if attention.has_relative_attention_bias:
            mask = self._position_mask(attention, first, mask)
        return self._attention_end(sublayer, attention, hidden_BSD, (first, None, mask)), mask

    def _cross_attention(self, hidden_BTD: torch.Tensor, encoded_BKD: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        sublayer: Any = self.layer[1]
        attention = sublayer.EncDecAttention
        normed_BTD, hidden_BTD = self._norm(sublayer, hidden_BTD)
        first = self._heads(self._product(normed_BTD, "cross.first"), attention)
        second = self._heads(self._product(encoded_BKD, "cross.second"), attention)
        return self._attention_end(sublayer, attention, hidden_BTD, (first, second, mask))

    def _attention_end(self, sublayer: Any, attention: Any, hidden_BSD: torch.Tensor, inputs: tuple[Any, ...]) -> torch.Tensor:
        first, second, mask = inputs
        mixed_BSHW = attend(first, second, mask, self._probability(attention.dropout), self.lean.by_kernel)
        name = "self.last" if second is None else "cross.last"
        settings = (self._probability(sublayer.dropout.p), self.lean.by_kernel, self.lean.in_place)
        weight = attention.o.weight
        return ResidualProduct.apply(hidden_BSD, mixed_BSHW.flatten(2), weight, self._operand(name, mixed_BSHW.dtype), settings)

    def _feed_forward(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        sublayer: Any = self.layer[-1]
        dense = sublayer.DenseReluDense
        normed_BSD, hidden_BSD = self._norm(sublayer, hidden_BSD)
        first = self._product(normed_BSD, "ff.first")
        if first.dtype == torch.float16:
            first = first.float()  # an island: hidden values overflow float16, so the second product is float32 too
        settings = (self.lean.activation, self._probability(dense.dropout.p), self.lean.by_kernel, self.lean.in_place)
        return ResidualFeedForward.apply(hidden_BSD, first, dense.wo.weight, self._operand("ff.last", first.dtype), settings)

    def _norm(self, sublayer: Any, hidden_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        norm = sublayer.layer_norm
        return rms_norm(hidden_BSD, norm, working_dtype(hidden_BSD), self.lean)

    def _product(self, x: torch.Tensor, name: str) -> torch.Tensor:
        x = x.to(working_dtype(x))
        return Product.apply(
            x, self.lean.in_place, self._operand(name, x.dtype), *(linear.weight for linear in self.lean.linears[name])
        )

    def _operand(self, name: str, dtype: torch.dtype) -> Operand | None:
        """The copy of the weights of a product in `dtype`; only in training, which keeps it up to date."""
        operand = self.lean.operands.get(name) if self.training else None
        return operand if operand is not None and operand.cast_OD.dtype == dtype else None

    def _heads(self, product_BSO: torch.Tensor, attention: Any) -> torch.Tensor:
        return product_BSO.unflatten(2, (-1, attention.n_heads, attention.key_value_proj_dim))

    def _position_mask(self, attention: Any, first: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
        length = first.shape[1]
        table_NH = attention.relative_attention_bias.weight
        one_hot_PN = one_hot_distances(attention, length, self.lean.constants, first.device)
        dtype = mask_dtype(first.dtype, first.device)
        return PositionMask.apply(table_NH, one_hot_PN, visible, (length, length), dtype)

    def _probability(self, probability: float) -> float:
        return probability if self.training else 0.0


def one_hot_distances(attention: Any, length: int, constants: Constants, device: torch.device) -> torch.Tensor:
    """The bucket of each distance from -(length - 1) to length - 1 as one-hot rows (P, N), float32.

    Distances are position of the key minus position of the query.
    """
    longest = max(LONGEST_DISTANCES, 1 << (length - 1).bit_length())
    key = attention.is_decoder, longest, device
    if key not in constants.distances:
        buckets_P = attention._relative_position_bucket(
            torch.arange(1 - longest, longest),
            bidirectional=not attention.is_decoder,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        buckets_N = torch.arange(attention.relative_attention_num_buckets)
        constants.distances[key] = (buckets_P[:, None] == buckets_N).float().to(device)
    return constants.distances[key][longest - length : longest + length - 1]


class LeanT5Block(LeanBlock, T5Block):  # type: ignore[misc]
    """`T5Block` with the forward pass of this module."""


class LeanMT5Block(LeanBlock, MT5Block):  # type: ignore[misc]
    """`MT5Block` with the forward pass of this module."""


class LeanStack(nn.Module):
    """Forward of the two classes below: embedded inputs to hidden states.

    Without `embedded_BSD` the forward pass of transformers runs.
    """

    block: nn.ModuleList
    final_layer_norm: Any
    dropout: nn.Dropout
    is_decoder: bool
    lean: LeanSettings

    def forward(
        self,
        *args: Any,
        embedded_BSD: torch.Tensor | None = None,
        visible: torch.Tensor | None = None,
        encoded_BKD: torch.Tensor | None = None,
        cross_visible: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The hidden states (B, S, D): of a decoder in the dtype of the residual stream, since they enter the loss.

        Args:
            embedded_BSD: rows of the embedding.
            visible: bool, broadcastable to (B, 1, S, S), the keys that each query sees; None for all.
            encoded_BKD: result of the encoder.
            cross_visible: the same for the encoder's positions as keys, (B, 1, S, K).
        """
        if embedded_BSD is None:
            return super().forward(*args, **kwargs)
        probability = self.dropout.p if self.training else 0.0
        hidden_BSD = Dropout.apply(embedded_BSD, probability, self.lean.by_kernel)
        dtype = working_dtype(hidden_BSD)
        mask, cross_mask = visible, additive_mask(cross_visible, mask_dtype(dtype, hidden_BSD.device))
        for block in self.block:
            hidden_BSD, mask = block(hidden_BSD, LEAN, mask, encoded_BKD, cross_mask)
        # The output of the encoder is the input of products only, so it is cast to 16 bits once.
        normed_BSD, _ = rms_norm(hidden_BSD, self.final_layer_norm, hidden_BSD.dtype if self.is_decoder else dtype, self.lean)
        return Dropout.apply(normed_BSD, probability, self.lean.by_kernel)


class Dropout(torch.autograd.Function):
    """Dropout that saves one byte per value."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, probability: float, by_kernel: bool) -> torch.Tensor:
        values, dropout = drop(x if by_kernel or probability <= 0 else x.clone(), probability, by_kernel)
        ctx.save_for_backward(dropout.keep)
        ctx.scales = dropout.scales
        return values if dropout.product_scale == 1.0 else values.mul_(dropout.product_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        dropout = DropoutMask(keep, *ctx.scales)
        grad_x = dropout.apply(grad)
        return grad_x if dropout.product_scale == 1.0 else grad_x.mul_(dropout.product_scale), None, None


class LeanT5Stack(LeanStack, T5Stack):
    """`T5Stack` with the forward pass of this module."""


class LeanMT5Stack(LeanStack, MT5Stack):
    """`MT5Stack` with the forward pass of this module."""


LEAN_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    T5Block: LeanT5Block,
    MT5Block: LeanMT5Block,
    T5Stack: LeanT5Stack,
    MT5Stack: LeanMT5Stack,
}


def install_lean_layers(model: T5Model, *, in_place: bool = True, by_kernel: bool = False) -> None:
    """Replace the classes of the stacks and blocks of `model`; parameters, names and hooks are kept. Idempotent.

    Compatible with autocast, checkpointing, evaluation and generation.

    Args:
        in_place: add the gradients of matrices to `weight.grad` directly; not with sharded layers, whose gradients are
            reduced by autograd hooks.
        by_kernel: draw dropout in one call, as for a GPU.
    """
    constants, config = Constants(), model.config
    for stack in (model.encoder, model.decoder):
        modules: list[Any] = [stack, *stack.block]
        for module in modules:
            # Only the class changes, so parameters, names and hooks are kept.
            module.__class__ = LEAN_CLASSES.get(type(module), type(module))
            linears = {} if module is stack else products_of(module)
            module.lean = LeanSettings(by_kernel, in_place, config.dense_act_fn, config.layer_norm_epsilon, constants, linears)


def allocate_buffers(model: T5Model, dtype: torch.dtype | None) -> StaticBuffers:
    """Allocate the static buffers of a model with lean layers that is trained and not sharded.

    Args:
        dtype: of the copies of the weights; None keeps no copies.
    """
    if dtype is None:
        return StaticBuffers(model, [])
    operands: list[Operand] = []
    blocks: list[Any] = [*model.encoder.block, *model.decoder.block]
    for block in blocks:
        for name, linears in block.lean.linears.items():
            weights = tuple(linear.weight for linear in linears)
            # The second product of a feed-forward layer is a float32 island with float16: no copy.
            if all(weight.requires_grad for weight in weights) and not (name == "ff.last" and dtype == torch.float16):
                block.lean.operands[name] = Operand.allocate(weights, dtype)
                operands.append(block.lean.operands[name])
    return StaticBuffers(model, operands)
