"""The loss of a T5 or mT5 as a sum over target tokens; gradients of the vocabulary tables are accumulated in place.

Encoder and decoder are called with embedded inputs, and the head by blocks of the vocabulary, so the full matrix of logits is
never allocated. On a CPU the head is computed at positions with a label only, on a GPU at all positions: to select positions
it would have to wait for the device. The sum is divided once by the target tokens of the whole update, so the gradient does
not depend on how the update is split into micro-batches.

Shapes: B examples, S source tokens, T target tokens, N labels that are not -100, V vocabulary rows, D model width.
"""

from dataclasses import dataclass

import torch

from resilient_t5.errors import DataError
from resilient_t5.model.embeddings import SpecialIds, T5Model, scales_decoder_output, special_ids
from resilient_t5.model.vocabulary_gradients import (
    GPU_BLOCK_VALUES,
    EmbeddingInPlace,
    HeadLossInPlace,
    LossTerms,
    rows_of_block,
)

IGNORED = -100


@dataclass(frozen=True)
class LossParts:
    """The contribution of one micro-batch to its update."""

    loss: torch.Tensor
    """Scalar with a gradient: the sum of all loss terms over the labels, divided by the divisor."""
    nll_sum: torch.Tensor
    """Scalar, detached, float64: negative log-likelihood in nats, summed over the labels; no smoothing, no z-loss."""


@dataclass(frozen=True)
class ExampleNll:
    """Evaluation of one micro-batch, per example; all tensors (B,)."""

    nll_sum_B: torch.Tensor
    """float64, nats."""
    tokens_B: torch.Tensor
    """int64, labels."""
    correct_B: torch.Tensor
    """int64, labels that are the argmax."""
    part: "ExampleNll | None" = None
    """The same over a subset of the labels, if requested."""


def forward_loss(
    model: T5Model,
    source_BS: torch.Tensor,
    source_mask_BS: torch.Tensor | None,
    labels_BT: torch.Tensor,
    target_segments_BT: torch.Tensor | None = None,
    *,
    divisor: float | torch.Tensor,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    all_positions: bool = False,
) -> LossParts:
    """The loss of one micro-batch; its backward adds to `.grad` of both vocabulary tables.

    A micro-batch without labels gives 0 and zero gradients. Compatible with autocast, loss scaling, gradient checkpointing,
    and tied, untied and frozen tables.

    Args:
        model: T5ForConditionalGeneration or MT5ForConditionalGeneration with lean layers.
        source_BS: encoder ids, padded.
        source_mask_BS: 1 for a token, 0 for padding; None without padding. With packed rows the number of the example in
            its row, from 1.
        labels_BT: decoder targets, -100 for no target; shifted right, they are the decoder's inputs.
        target_segments_BT: with packed rows, the number of each label's example in its row; 0 for padding.
        divisor: target tokens of the whole update, on all ranks; a scalar tensor in float32 is not checked.
        label_smoothing: share of the target probability spread over the V rows.
        z_loss: weight of the squared log-partition of each label.
        all_positions: compute the head for every position, with or without label: more work, but no size then depends on
            the values of the labels.

    Raises:
        DataError: the divisor is not above 0: the update has no target token.
    """
    if not isinstance(divisor, torch.Tensor) and not divisor > 0:
        raise DataError("an update without any target token", hint="Check the prepared corpus; every example needs a target")
    block_rows = rows_of_block(labels_BT.numel(), model.lm_head.weight.shape[0], GPU_BLOCK_VALUES) if all_positions else None
    terms = LossTerms(1.0 / divisor, label_smoothing, z_loss, _product_dtype(model), block_rows=block_rows)
    batch = (source_BS, source_mask_BS, labels_BT, target_segments_BT)
    decoded_BTD = _decode(model, *batch, check_padding=not all_positions)
    positions_N = None if all_positions else _label_positions(labels_BT)
    hidden_ND, labels_N = _at(model, decoded_BTD, labels_BT, positions_N)
    loss, nll_N, _ = HeadLossInPlace.apply(hidden_ND, model.lm_head.weight, labels_N, terms)
    return LossParts(loss, nll_N.detach().sum(dtype=torch.float64))


@torch.no_grad()
def token_nll(
    model: T5Model,
    source_BS: torch.Tensor,
    source_mask_BS: torch.Tensor | None,
    labels_BT: torch.Tensor,
    target_segments_BT: torch.Tensor | None = None,
    *,
    part_BT: torch.Tensor | None = None,
) -> ExampleNll:
    """Negative log-likelihood and correct tokens of each example with teacher forcing, without gradients.

    Args:
        model: in evaluation mode for a result without dropout.
        source_BS, source_mask_BS, labels_BT, target_segments_BT: as in `forward_loss`; with packed rows the results are
            per row.
        part_BT: bool; a subset of the labels, such as terms, to be evaluated separately in the same forward pass.
    """
    decoded_BTD = _decode(model, source_BS, source_mask_BS, labels_BT, target_segments_BT, check_padding=True)
    positions_N = _label_positions(labels_BT)
    hidden_ND, labels_N = _at(model, decoded_BTD, labels_BT, positions_N)
    terms = LossTerms(1.0, product_dtype=_product_dtype(model), count_correct=True)
    _, nll_N, correct_N = HeadLossInPlace.apply(hidden_ND, model.lm_head.weight, labels_N, terms)
    example_N = positions_N // labels_BT.shape[1]

    def per_example(values_N: torch.Tensor) -> torch.Tensor:
        return values_N.new_zeros(labels_BT.shape[0]).index_add_(0, example_N, values_N)

    def over(counted_N: torch.Tensor, part: ExampleNll | None = None) -> ExampleNll:
        return ExampleNll(
            per_example(torch.where(counted_N, nll_N.double(), 0.0)),
            per_example(counted_N.long()),
            per_example((correct_N & counted_N).long()),
            part,
        )

    of_part = None if part_BT is None else over(part_BT.flatten()[positions_N].bool())
    return over(torch.ones_like(correct_N), of_part)


def shift_right(labels_BT: torch.Tensor, special: SpecialIds, target_segments_BT: torch.Tensor | None = None) -> torch.Tensor:
    """Decoder inputs: for each example the start id, then its labels without the last one; -100 becomes the pad."""
    inputs_BT = labels_BT.new_full(labels_BT.shape, special.decoder_start_id)
    inputs_BT[:, 1:] = labels_BT[:, :-1]
    if target_segments_BT is not None:
        begins_BT = target_segments_BT[:, 1:] != target_segments_BT[:, :-1]
        inputs_BT[:, 1:].masked_fill_(begins_BT, special.decoder_start_id)
    return inputs_BT.masked_fill_(inputs_BT == IGNORED, special.pad_id)


def _product_dtype(model: T5Model) -> torch.dtype:
    kind, dtype = model.lm_head.weight.device.type, model.lm_head.weight.dtype
    if torch.is_autocast_enabled(kind) and dtype == torch.float32:
        # With float16 the logits would overflow and small probabilities become zero: then the loss uses float32.
        return torch.bfloat16 if torch.get_autocast_dtype(kind) == torch.bfloat16 else torch.float32
    return dtype


def _decode(
    model: T5Model,
    source_BS: torch.Tensor,
    source_mask_BS: torch.Tensor | None,
    labels_BT: torch.Tensor,
    target_segments_BT: torch.Tensor | None,
    *,
    check_padding: bool,
) -> torch.Tensor:
    """The output of the decoder (B, T, D).

    Args:
        check_padding: on a CPU, leave out a mask without padding; a GPU would have to be waited for.
    """
    if source_mask_BS is not None and check_padding and not source_mask_BS.is_cuda and target_segments_BT is None:
        source_mask_BS = None if bool(source_mask_BS.all()) else source_mask_BS
    embedding_VD = model.shared.weight
    inputs_BT = shift_right(labels_BT, special_ids(model), target_segments_BT)
    causal_TT = torch.ones(labels_BT.shape[1], labels_BT.shape[1], dtype=torch.bool, device=labels_BT.device).tril()
    visible = None if source_mask_BS is None else source_mask_BS[:, None, None, :] > 0
    cross_visible, causal = visible, causal_TT[None, None]
    if target_segments_BT is not None and source_mask_BS is not None:
        visible = _same(source_mask_BS, source_mask_BS)
        # A padded target sees every source position: attention kernels differ where a query sees no key, some give NaN.
        cross_visible = _same(target_segments_BT, source_mask_BS) | (target_segments_BT == 0)[:, None, :, None]
        causal = causal & _same(target_segments_BT, target_segments_BT)
    # Unpacked, the decoder needs no padding mask: padding is at the end, and attention is causal.
    encoded_BSD = model.encoder(embedded_BSD=EmbeddingInPlace.apply(embedding_VD, source_BS), visible=visible)
    decoded_BTD: torch.Tensor = model.decoder(
        embedded_BSD=EmbeddingInPlace.apply(embedding_VD, inputs_BT),
        visible=causal,
        encoded_BKD=encoded_BSD,
        cross_visible=cross_visible,
    )
    return decoded_BTD


def _same(queries_BQ: torch.Tensor, keys_BK: torch.Tensor) -> torch.Tensor:
    """Which positions belong to the same example: bool (B, 1, Q, K)."""
    return queries_BQ[:, None, :, None] == keys_BK[:, None, None, :]


def _label_positions(labels_BT: torch.Tensor) -> torch.Tensor:
    """Flat positions (N,) of the labels in labels_BT; waits for a GPU."""
    return (labels_BT.flatten() != IGNORED).nonzero()[:, 0]


def _at(
    model: T5Model, decoded_BTD: torch.Tensor, labels_BT: torch.Tensor, positions_N: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inputs of the head (N, D) and the labels (N,), at these positions or at all."""
    hidden_ND, labels_N = decoded_BTD.flatten(0, 1), labels_BT.flatten()
    if positions_N is not None:
        hidden_ND, labels_N = hidden_ND.index_select(0, positions_N), labels_N[positions_N]
    if scales_decoder_output(model):
        hidden_ND = hidden_ND * model.config.d_model**-0.5
    return hidden_ND, labels_N.long()
