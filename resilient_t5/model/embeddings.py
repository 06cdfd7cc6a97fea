"""The vocabulary tables of a T5 or mT5: the input embedding and the output head, tied or untied.

Shapes: V vocabulary rows, D model width. transformers 5 declares every T5 and mT5 tied, so its methods that tie, resize or load
by name silently break an untied model. The tables are therefore replaced by `set_tables` only.
"""

from dataclasses import dataclass

from torch import nn
from transformers import MT5ForConditionalGeneration, T5ForConditionalGeneration

from resilient_t5.errors import DataError

T5Model = T5ForConditionalGeneration | MT5ForConditionalGeneration

SHARED = "shared.weight"
HEAD = "lm_head.weight"
ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


@dataclass(frozen=True)
class SpecialIds:
    """The ids of a tokenizer that the model needs; a T5 decoder starts with the pad."""

    pad_id: int
    eos_id: int
    decoder_start_id: int


def special_ids(model: T5Model) -> SpecialIds:
    """The special ids of the model's configuration, in its own (full or active) numbering."""
    pad, eos, start = model.config.pad_token_id, model.config.eos_token_id, model.config.decoder_start_token_id
    if not isinstance(pad, int) or not isinstance(eos, int) or not isinstance(start, int):
        raise DataError(f"the model needs one pad, one end and one start id: {pad}, {eos}, {start}", hint="Set them as numbers")
    return SpecialIds(pad, eos, start)


def is_tied(model: T5Model) -> bool:
    """Whether the head is the input embedding itself."""
    return model.lm_head.weight is model.shared.weight


def scales_decoder_output(model: T5Model) -> bool:
    """Whether the decoder's output is multiplied by D**-0.5 before the head: T5 1.0 does, T5 1.1 and mT5 do not."""
    return model.config.model_type == "t5" and bool(model.config.scale_decoder_outputs)


def set_tables(model: T5Model, shared_VD: nn.Parameter, head_VD: nn.Parameter | None) -> None:
    """Replace the embedding of both stacks and the head; `None` ties the head to the embedding.

    The row counts of modules and configurations are updated. `config.tie_word_embeddings` is set too, so that a later
    `tie_weights` by a library cannot tie an untied model.
    """
    rows = shared_VD.shape[0]
    for module in (model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens):
        module.weight = shared_VD
        module.num_embeddings = rows
    model.lm_head.weight = shared_VD if head_VD is None else head_VD
    model.lm_head.out_features = rows
    for config in (model.config, model.encoder.config, model.decoder.config):
        config.vocab_size = rows
        config.tie_word_embeddings = head_VD is None
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
