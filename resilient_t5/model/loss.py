"""The loss of a T5 or mT5 as a sum over target tokens; gradients of the vocabulary tables are accumulated in place.

Encoder and decoder are called with embedded inputs, and the head only on positions with a label, by blocks of the vocabulary,
so the full matrix of logits is never allocated. The sum is divided once by the target tokens of the whole update, so the
gradient does not depend on how the update is split into micro-batches.

Shapes: B examples, S source tokens, T target tokens, N labels that are not -100, V vocabulary rows, D model width.
"""

from dataclasses import dataclass

import torch

from resilient_t5.errors import DataError
from resilient_t5.model.embeddings import SpecialIds, T5Model, scales_decoder_output, special_ids
from resilient_t5.model.vocabulary_gradients import EmbeddingInPlace, HeadLossInPlace, LossTerms

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
    *,
    divisor: float,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> LossParts:
    """The loss of one micro-batch; its backward adds to `.grad` of both vocabulary tables.

    A micro-batch without labels gives 0 and zero gradients. Compatible with autocast, loss scaling, gradient checkpointing,
    and tied, untied and frozen tables.

    Args:
        model: T5ForConditionalGeneration or MT5ForConditionalGeneration; its own forward is not called.
        source_BS: encoder ids, padded.
        source_mask_BS: 1 for a token, 0 for padding; None without padding.
        labels_BT: decoder targets, -100 for no target; shifted right, they are the decoder's inputs.
        divisor: target tokens of the whole update, on all ranks.
        label_smoothing: share of the target probability spread over the V rows.
        z_loss: weight of the squared log-partition of each label.

    Raises:
        DataError: the divisor is not above 0: the update has no target token.
    """
    if not divisor > 0:
        raise DataError("an update without any target token", hint="Check the prepared corpus; every example needs a target")
    terms = LossTerms(1.0 / divisor, label_smoothing, z_loss, _product_dtype(model))
    hidden_ND, labels_N, _ = _label_states(model, source_BS, source_mask_BS, labels_BT)
    loss, nll_N, _ = HeadLossInPlace.apply(hidden_ND, model.lm_head.weight, labels_N, terms)
    return LossParts(loss, nll_N.detach().sum(dtype=torch.float64))


@torch.no_grad()
def token_nll(
    model: T5Model,
    source_BS: torch.Tensor,
    source_mask_BS: torch.Tensor | None,
    labels_BT: torch.Tensor,
    *,
    part_BT: torch.Tensor | None = None,
) -> ExampleNll:
    """Negative log-likelihood and correct tokens of each example with teacher forcing, without gradients.

    Args:
        model: in evaluation mode for a result without dropout.
        source_BS, source_mask_BS, labels_BT: as in `forward_loss`.
        part_BT: bool; a subset of the labels, such as terms, to be evaluated separately in the same forward pass.
    """
    hidden_ND, labels_N, positions_N = _label_states(model, source_BS, source_mask_BS, labels_BT)
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


def shift_right(labels_BT: torch.Tensor, special: SpecialIds) -> torch.Tensor:
    """Decoder inputs: the start id, then the labels without the last one; -100 becomes the pad."""
    inputs_BT = labels_BT.new_full(labels_BT.shape, special.decoder_start_id)
    inputs_BT[:, 1:] = labels_BT[:, :-1]
    return inputs_BT.masked_fill_(inputs_BT == IGNORED, special.pad_id)


def _product_dtype(model: T5Model) -> torch.dtype:
    kind, dtype = model.lm_head.weight.device.type, model.lm_head.weight.dtype
    if torch.is_autocast_enabled(kind) and dtype == torch.float32:
        # With float16 the logits would overflow and small probabilities become zero: then the loss uses float32.
        return torch.bfloat16 if torch.get_autocast_dtype(kind) == torch.bfloat16 else torch.float32
    return dtype


def _label_states(
    model: T5Model, source_BS: torch.Tensor, source_mask_BS: torch.Tensor | None, labels_BT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inputs of the head at the N labels (N, D), the labels (N,), and their flat positions (N,) in labels_BT."""
    embedding_VD, config = model.shared.weight, model.config
    inputs_BT = shift_right(labels_BT, special_ids(model))
    encoded_BSD = model.encoder(
        inputs_embeds=EmbeddingInPlace.apply(embedding_VD, source_BS), attention_mask=source_mask_BS
    ).last_hidden_state
    # The decoder needs no padding mask: padding is at the end, and attention is causal.
    decoded_BTD = model.decoder(
        inputs_embeds=EmbeddingInPlace.apply(embedding_VD, inputs_BT),
        encoder_hidden_states=encoded_BSD,
        encoder_attention_mask=source_mask_BS,
        use_cache=False,
    ).last_hidden_state
    positions_N = (labels_BT.flatten() != IGNORED).nonzero()[:, 0]  # a host sync on a GPU
    hidden_ND = decoded_BTD.flatten(0, 1).index_select(0, positions_N)
    if scales_decoder_output(model):
        hidden_ND = hidden_ND * config.d_model**-0.5
    return hidden_ND, labels_BT.flatten()[positions_N], positions_N
