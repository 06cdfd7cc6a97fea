"""Two autograd Functions that accumulate the gradients of the vocabulary tables directly in `weight.grad`.

The input embedding and the head of a T5 have V x D gradients: for mT5 half a gigabyte each. Autograd would allocate a new one
for every use and then add them. Here they are added to `weight.grad` block by block, and None is returned for the weight. The
weight is still an input, so the output requires a gradient and hooks on the parameter still fire. Adding also gives the right
result for several micro-batches and for the two uses of a tied table.

After an exception `grad` may contain part of a micro-batch: drop all gradients and redo the whole update.

Shapes: N target tokens, V vocabulary rows, D model width, R rows of a block.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable

BLOCK_ROWS = 4096
# 8 MiB in float32: with few tokens a block has more rows, since the last block is not computed twice.
BLOCK_VALUES = 512 * BLOCK_ROWS
GPU_BLOCK_VALUES = 2**24
"""64 MiB in float32, so that short texts need one block: on a GPU a launch costs more than this memory."""


@dataclass(frozen=True)
class LossTerms:
    """The loss terms, summed over the target tokens and multiplied by `scale`:

    (1 - label_smoothing) * nll + label_smoothing * mean over V of -log p + z_loss * (log sum exp z)**2
    """

    scale: float | torch.Tensor
    """A tensor is a scalar in float32 on the device; a captured graph reads it at every replay."""
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    product_dtype: torch.dtype = torch.float32
    """Number format of the operands of the matrix products; results are accumulated in float32 or wider."""
    count_correct: bool = False
    """Compute the argmax; costs a pass over the logits, so only for evaluation."""
    block_rows: int | None = None
    """Rows of a block; None: `rows_of_block` of the tokens."""


class EmbeddingInPlace(torch.autograd.Function):
    """Rows of `weight` for ids of any shape; backward adds into `weight.grad`."""

    @staticmethod
    def forward(ctx: Any, weight_VD: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight_VD
        ctx.save_for_backward(ids)
        return torch.nn.functional.embedding(ids, weight_VD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None]:
        if ctx.needs_input_grad[0]:
            (ids,) = ctx.saved_tensors
            grad_VD = gradient_of(ctx.weight)
            grad_VD.index_add_(0, ids.flatten(), gradient.flatten(0, -2).to(grad_VD.dtype))
        return None, None


class HeadLossInPlace(torch.autograd.Function):
    """Cross-entropy summed over N tokens by blocks of vocabulary rows; the N x V logits are never in memory at once.

    Forward computes a running maximum and sum of exponentials per token; backward computes the logits of each block again.
    The last block is still in the buffer when backward begins, so with a single block nothing is computed twice. Time: four
    products of N x V x D with several blocks, three with one. Buffer: N x R values.

    A label of -100 is ignored: its loss and its gradient are zero.

    Returns (loss, nll_N, correct_N); only the loss has a gradient. correct_N is empty without `count_correct`.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, labels_N: torch.Tensor, terms: LossTerms
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.autocast(hidden_ND.device.type, enabled=False):
            pass_ = _forward_pass(hidden_ND, weight_VD, labels_N, terms)
        valid_N = labels_N >= 0
        nll_N = torch.where(valid_N, pass_.log_sum_N - pass_.label_logit_N, 0.0)
        per_token_N = nll_N
        if terms.label_smoothing > 0:
            smooth_N = pass_.log_sum_N - pass_.logit_sum_N / weight_VD.shape[0]
            per_token_N = (1 - terms.label_smoothing) * nll_N + terms.label_smoothing * torch.where(valid_N, smooth_N, 0.0)
        if terms.z_loss > 0:
            per_token_N = per_token_N + terms.z_loss * torch.where(valid_N, pass_.log_sum_N.square(), 0.0)
        ctx.weight, ctx.terms, ctx.last = weight_VD, terms, (pass_.buffer, pass_.max_N)
        ctx.save_for_backward(hidden_ND, labels_N, pass_.log_sum_N)
        correct_N = pass_.best_N == labels_N if terms.count_correct else labels_N.new_empty(0, dtype=torch.bool)
        ctx.mark_non_differentiable(nll_N, correct_N)
        return per_token_N.sum() * terms.scale, nll_N, correct_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        hidden_ND, labels_N, log_sum_N = ctx.saved_tensors
        buffer, max_N = ctx.last
        ctx.last = (None, None)  # overwritten below; a second backward computes the last block again
        with torch.autocast(hidden_ND.device.type, enabled=False):
            grad_ND = _backward_pass(ctx, hidden_ND, labels_N, log_sum_N, (upstream, buffer, max_N))
        return grad_ND, None, None, None


@dataclass(frozen=True)
class _Pass:
    max_N: torch.Tensor
    log_sum_N: torch.Tensor
    label_logit_N: torch.Tensor
    logit_sum_N: torch.Tensor
    best_N: torch.Tensor
    buffer: torch.Tensor
    """exp(logit - max_N) of the last block, flat."""


def gradient_of(weight: torch.Tensor) -> torch.Tensor:
    """`weight.grad`, created as zeros if it is None."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


def rows_of_block(tokens: int, rows: int, values: int = BLOCK_VALUES) -> int:
    """Rows of a block of the vocabulary for this many target tokens, at most `values` logits unless they are 4,096 rows."""
    return min(rows, max(BLOCK_ROWS, values // max(1, tokens)))


def _blocks(rows: int, tokens: int, terms: LossTerms) -> list[tuple[int, int]]:
    """(first row, end row) of each block; a smaller block is the first one, so the last has full size."""
    size = rows_of_block(tokens, rows) if terms.block_rows is None else min(rows, terms.block_rows)
    ends = range(rows % size or size, rows + 1, size)
    return [(max(0, end - size), end) for end in ends]


def _logits(operand_ND: torch.Tensor, weight_RD: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """hidden @ weight^T in the buffer's dtype, as a view of the buffer."""
    out_NR = buffer[: operand_ND.shape[0] * weight_RD.shape[0]].view(operand_ND.shape[0], weight_RD.shape[0])
    if operand_ND.dtype == buffer.dtype:
        return torch.mm(operand_ND, weight_RD.to(operand_ND.dtype).T, out=out_NR)
    return out_NR.copy_(wide_product(operand_ND, weight_RD.to(operand_ND.dtype).T))


def wide_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b of 16-bit operands in float32; only CUDA returns the unrounded sum."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a, b).float()


def add_product(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    """weight.grad += scale * a @ b, accumulated in the dtype of the weight."""
    if weight.grad is not None:
        add_into(weight.grad, a, b, scale)
        return
    product = torch.mm(a, b) if a.dtype == weight.dtype else wide_product(a, b).to(weight.dtype)
    weight.grad = product if scale == 1.0 else product.mul_(scale)


def add_into(grad: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    """grad += scale * a @ b in the dtype of `grad`; of 16-bit operands in one kernel where the device has it."""
    if a.dtype == grad.dtype:
        grad.addmm_(a, b, alpha=scale)
    elif a.is_cuda and _accumulates_wide(a.device, a.dtype):
        torch.addmm(grad, a, b, alpha=scale, out_dtype=grad.dtype, out=grad)
    else:
        grad.add_(wide_product(a, b) if a.is_cuda else torch.mm(a, b), alpha=scale)


@cache
def _accumulates_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product of 16-bit operands can be added to a float32 matrix, tested on this device."""
    a, grad = torch.eye(16, device=device, dtype=dtype), torch.ones(16, 16, device=device)
    try:
        torch.addmm(grad, a, a, alpha=2.0, out_dtype=torch.float32, out=grad)
        return bool((grad == 1 + 2 * torch.eye(16, device=device)).all())
    except (RuntimeError, TypeError):
        return False


def _forward_pass(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, labels_N: torch.Tensor, terms: LossTerms) -> _Pass:
    tokens, rows = hidden_ND.shape[0], weight_VD.shape[0]
    wide = torch.promote_types(terms.product_dtype, torch.float32)
    operand_ND = hidden_ND.to(terms.product_dtype)
    blocks = _blocks(rows, tokens, terms)
    buffer = hidden_ND.new_empty(tokens * (blocks[-1][1] - blocks[-1][0]), dtype=wide)
    max_N = hidden_ND.new_full((tokens,), -torch.inf, dtype=wide)
    sum_N, label_logit_N, logit_sum_N = (torch.zeros_like(max_N) for _ in range(3))
    best_N = torch.zeros_like(labels_N)
    for first, last in blocks:
        logits_NR = _logits(operand_ND, weight_VD[first:last], buffer)
        inside_N = (labels_N >= first) & (labels_N < last)
        column_N = (labels_N - first).clamp(0, last - first - 1)
        label_logit_N = torch.where(inside_N, logits_NR.gather(1, column_N[:, None])[:, 0], label_logit_N)
        if terms.label_smoothing > 0:
            logit_sum_N += logits_NR.sum(1)
        if terms.count_correct:
            block_max_N, where_N = logits_NR.max(1)
            best_N = torch.where(block_max_N > max_N, where_N + first, best_N)
        else:
            block_max_N = logits_NR.amax(1)
        new_max_N = torch.maximum(max_N, block_max_N)
        sum_N = sum_N * (max_N - new_max_N).exp() + logits_NR.sub_(new_max_N[:, None]).exp_().sum(1)
        max_N = new_max_N
    return _Pass(max_N, max_N + sum_N.log(), label_logit_N, logit_sum_N, best_N, buffer)


def _backward_pass(
    ctx: Any,
    hidden_ND: torch.Tensor,
    labels_N: torch.Tensor,
    log_sum_N: torch.Tensor,
    rest: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
) -> torch.Tensor:
    upstream, buffer, max_N = rest
    terms, weight_VD, rows = ctx.terms, ctx.weight, ctx.weight.shape[0]
    scale = upstream.to(log_sum_N.dtype) * terms.scale
    factor_N = torch.where(labels_N >= 0, scale * (1 + 2 * terms.z_loss * log_sum_N), 0.0)
    on_label = scale * (1 - terms.label_smoothing)
    on_all_N = torch.where(labels_N >= 0, scale * terms.label_smoothing / rows, 0.0)
    operand_ND = hidden_ND.to(terms.product_dtype)
    grad_ND = torch.zeros_like(hidden_ND, dtype=log_sum_N.dtype)
    grad_VD = gradient_of(weight_VD) if ctx.needs_input_grad[1] else None
    ready = buffer is not None
    blocks = _blocks(rows, hidden_ND.shape[0], terms)
    if buffer is None:
        buffer = log_sum_N.new_empty(hidden_ND.shape[0] * (blocks[-1][1] - blocks[-1][0]))
    for first, last in reversed(blocks):
        if ready and max_N is not None:
            share_NR = buffer[: hidden_ND.shape[0] * (last - first)].view(-1, last - first)
            share_NR.mul_(((max_N - log_sum_N).exp() * factor_N)[:, None])
        else:
            share_NR = _logits(operand_ND, weight_VD[first:last], buffer)
            share_NR.sub_(log_sum_N[:, None]).exp_().mul_(factor_N[:, None])
        ready = False
        if terms.label_smoothing > 0:
            share_NR.sub_(on_all_N[:, None])
        inside_N = (labels_N >= first) & (labels_N < last)
        column_N = (labels_N - first).clamp(0, last - first - 1)
        share_NR.scatter_add_(1, column_N[:, None], torch.where(inside_N, -on_label, 0.0)[:, None])
        _add_products(share_NR, operand_ND, weight_VD[first:last], grad_ND, None if grad_VD is None else grad_VD[first:last])
    return grad_ND.to(hidden_ND.dtype)


def _add_products(
    share_NR: torch.Tensor,
    operand_ND: torch.Tensor,
    weight_RD: torch.Tensor,
    grad_ND: torch.Tensor,
    grad_RD: torch.Tensor | None,
) -> None:
    """grad_ND += share @ weight and grad_RD += share^T @ hidden, for one block."""
    share_NR = share_NR.to(operand_ND.dtype)
    weight_RD = weight_RD.to(operand_ND.dtype)
    if share_NR.dtype == grad_ND.dtype:
        grad_ND.addmm_(share_NR, weight_RD)
    else:
        grad_ND += wide_product(share_NR, weight_RD)
    if grad_RD is None:
        return
    if share_NR.dtype == grad_RD.dtype:
        grad_RD.addmm_(share_NR.T, operand_ND)
    else:
        grad_RD += wide_product(share_NR.T, operand_ND).to(grad_RD.dtype)
