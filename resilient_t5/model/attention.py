"""Attention of a T5 without saved scores, and the additive mask that all layers of a stack share.

The layers of transformers keep a mask of B x heads x S x S in every layer, and on a CPU also scores, weights and dropout. Here
the first layer of a stack combines position bias and visibility into one additive mask, which the others use as it is. On a
GPU torch's kernels compute attention from it. On a CPU `RecomputedAttention` saves queries, keys, values and one byte per
score, and computes the weights again in the backward pass, like Dao et al. 2022 (arXiv 2205.14135) but without tiling.

A row may hold several examples (packed rows): the position bias of T5 depends on distance only, so it is enough that no
example sees another.

Shapes: B rows, H heads, Q queries, K keys, W width of a head, P = Q + K - 1 distances, N buckets.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from resilient_t5.model.dropout import DropoutMask, drop


class RecomputedAttention(torch.autograd.Function):
    """softmax(q k^T + mask) v with dropout on the weights; computes in float32 or wider.

    Queries, keys and values are slots of two tensors, as they come out of a product over several weights: `first` (B, Q, 1, H,
    W) and `second` (B, K, 2, H, W), or only `first` (B, S, 3, H, W). Returns (B, Q, H, W).
    """

    @staticmethod
    def forward(
        ctx: Any,
        first: torch.Tensor,
        second: torch.Tensor | None,
        mask: torch.Tensor | None,
        probability: float,
        by_kernel: bool,
    ) -> torch.Tensor:
        with torch.autocast(first.device.type, enabled=False):
            query, key, value = _operands(first, second)
            weights, dropout = drop(_weights(query, key, mask), probability, by_kernel)
            ctx.save_for_backward(first, second, mask, dropout.keep)
            ctx.scales = dropout.scales
            mixed = _scaled_product(weights, value, dropout.product_scale)
            out_BQHW = first.new_empty(first.shape[0], first.shape[1], *first.shape[3:])
            out_BQHW.transpose(1, 2).copy_(mixed.view(first.shape[0], first.shape[3], *mixed.shape[1:]))
            return out_BQHW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BQHW: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        first, second, mask, keep = ctx.saved_tensors
        rows, _, _, heads, _ = first.shape
        with torch.autocast(grad_BQHW.device.type, enabled=False):
            query, key, value = _operands(first, second)
            grad = _heads_first(grad_BQHW[:, :, None])[0]
            weights = _weights(query, key, mask)
            dropout = DropoutMask(keep, *ctx.scales)
            grad_first = _empty_slots(first, grad.dtype)
            grad_second = None if second is None else _empty_slots(second, grad.dtype)
            places = (*grad_first, *(grad_second if grad_second is not None else ()))
            _scaled_product(dropout.apply(weights).transpose(1, 2), grad, dropout.product_scale, places[2])
            grad_weights = dropout.apply_(_scaled_product(grad, value.transpose(1, 2), dropout.product_scale))
            del value, grad
            grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            del weights, grad_weights
            torch.bmm(grad_scores, key, out=places[0])
            torch.bmm(grad_scores.transpose(1, 2), query, out=places[1])
            grad_mask = None
            if mask is not None and ctx.needs_input_grad[2]:
                grad_mask = grad_scores.view(rows, heads, *grad_scores.shape[1:]).sum_to_size(mask.shape).to(mask.dtype)
            del grad_scores, query, key
            second_grad = None if second is None or grad_second is None else _as_input(grad_second, second)
            return _as_input(grad_first, first), second_grad, grad_mask, None, None


def _operands(first: torch.Tensor, second: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values (B * H, S, W) in float32 or wider."""
    slots = _heads_first(first)
    if second is None:
        return slots[0], slots[1], slots[2]
    others = _heads_first(second)
    return slots[0], others[0], others[1]


def _heads_first(slots_BSCHW: torch.Tensor) -> torch.Tensor:
    """(B, S, C, H, W) as (C, B * H, S, W), contiguous, in float32 or wider."""
    rows, length, count, heads, width = slots_BSCHW.shape
    wide = slots_BSCHW.new_empty(count, rows, heads, length, width, dtype=_wide(slots_BSCHW.dtype))
    wide.copy_(slots_BSCHW.permute(2, 0, 3, 1, 4))
    return wide.view(count, rows * heads, length, width)


def _empty_slots(like_BSCHW: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    rows, length, count, heads, width = like_BSCHW.shape
    return like_BSCHW.new_empty(count, rows * heads, length, width, dtype=dtype)


def _as_input(slots: torch.Tensor, like_BSCHW: torch.Tensor) -> torch.Tensor:
    """The inverse of `_heads_first`."""
    rows, length, count, heads, width = like_BSCHW.shape
    out = torch.empty_like(like_BSCHW)
    out.permute(2, 0, 3, 1, 4).copy_(slots.view(count, rows, heads, length, width))
    return out


def _scaled_product(a: torch.Tensor, b: torch.Tensor, scale: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """a @ b * scale for two batches of matrices."""
    if scale == 1.0:
        return torch.bmm(a, b, out=out)
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale, out=out)


def _weights(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """softmax(q k^T + mask), (B * H, Q, K)."""
    keys = key.transpose(1, 2)
    if mask is None:
        return torch.softmax(torch.bmm(query, keys), -1)
    rows, heads, queries, columns = mask.shape
    if rows * heads == query.shape[0]:
        return torch.softmax(torch.baddbmm(mask.view(rows * heads, queries, columns), query, keys), -1)
    scores = torch.bmm(query, keys)
    # Such a mask has one head for each row, or the heads of the model for all rows.
    by_row = scores.view(rows, -1, queries, columns) if heads == 1 else scores.view(-1, heads, queries, columns)
    by_row.add_(mask)
    return torch.softmax(scores, -1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def attend(
    first: torch.Tensor, second: torch.Tensor | None, mask: torch.Tensor | None, probability: float, by_kernel: bool
) -> torch.Tensor:
    """T5 attention, which has no scale factor: (B, Q, H, W).

    Args:
        first, second: as in `RecomputedAttention`.
        mask: additive, from `additive_mask`, broadcastable to (B, H, Q, K); None if every key is visible.
        probability: of dropout on the weights.
        by_kernel: as in `drop`.
    """
    if first.device.type == "cpu":
        mixed_BQHW: torch.Tensor = RecomputedAttention.apply(first, second, mask, probability, by_kernel)
        return mixed_BQHW
    slots = first.permute(2, 0, 3, 1, 4).unbind(0)
    query, key, value = slots if second is None else (*slots, *second.permute(2, 0, 3, 1, 4).unbind(0))
    mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=probability, scale=1.0)
    return mixed.transpose(1, 2)


class PositionMask(torch.autograd.Function):
    """The additive mask of a stack from its table of position biases; the gradient of the table is deterministic.

    The bias of a pair depends on its distance only. Forward looks up one bias per distance and lays them out with a strided
    view. Backward adds the diagonals of the gradient with the same view, and then the distances of each bucket by a product
    with their one-hot matrix: no scatter, which on a GPU adds in random order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        table_NH: torch.Tensor,
        one_hot_PN: torch.Tensor,
        visible: torch.Tensor | None,
        shape: tuple[int, int],
        dtype: Any,
    ) -> torch.Tensor:
        bias_HP = torch.mm(one_hot_PN.to(table_NH.dtype), table_NH).T.to(dtype).contiguous()
        bias_1HQK = bias_HP.unfold(1, shape[1], 1).flip(1)[None]
        ctx.save_for_backward(one_hot_PN, visible)
        ctx.table_dtype = table_NH.dtype
        return bias_1HQK if visible is None else torch.where(visible, bias_1HQK, torch.finfo(dtype).min)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHQK: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        one_hot_PN, visible = ctx.saved_tensors
        wide = torch.promote_types(grad_BHQK.dtype, torch.float32)
        if visible is not None:
            grad_BHQK = torch.where(visible, grad_BHQK, 0.0)
        queries, keys = grad_BHQK.shape[2:]
        distances, heads = queries + keys - 1, grad_BHQK.shape[1]
        # Row q of the reversed gradient begins at distance q. A buffer one value wider than P shifts each row by one place
        # when it is read with width P, so the columns of that view are the diagonals.
        skewed = grad_BHQK.new_zeros(heads, queries, distances + 1, dtype=wide)
        skewed[:, :, :keys] = grad_BHQK.sum(0, dtype=wide).flip(1)
        diagonals_HP = skewed.flatten(1)[:, : queries * distances].view(heads, queries, distances).sum(1)
        grad_NH = torch.mm(one_hot_PN.to(wide).T, diagonals_HP.T).to(ctx.table_dtype)
        return grad_NH, None, None, None, None


def additive_mask(visible: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """The mask of a cross-attention, which has no position bias.

    Args:
        visible: bool, broadcastable to (B, H, Q, K); None if all keys are visible.
    """
    if visible is None:
        return None
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)


def mask_dtype(product: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of an additive mask: that of the scores, float32 or wider on a CPU, that of the products on a GPU."""
    return _wide(product) if device.type == "cpu" else product
