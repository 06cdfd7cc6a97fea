"""Incremental T5 decoder with caches that are allocated once, and greedy decoding.

Shapes: B rows, S source tokens, T target tokens, H heads, K width of a head, D model width, V vocabulary rows, W beams.

`TokenDecoder` computes the decoder of T5 (Raffel et al. 2020, arXiv 1910.10683) for one position from the modules of the
model. Unlike the general forward of transformers it builds no masks, does not grow its caches and keeps no output
records: on one CPU core it saves about a fifth of the time for 32 rows and a third for one row. Tests compare it with the
greedy generation of transformers, token for token.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from resilient_t5.model.embeddings import scales_decoder_output

MAX_ALIVE_SHARE = 0.75
"""Finished rows are removed from the batch when at most this share is still alive."""
TOKENS_PER_SYNC = 8
"""Tokens between two checks for finished rows on a GPU, because each check waits for the device."""


class TokenDecoder:
    """Decoder state for a batch of sources. Each call of `logits` reads one token per row.

    Logits have the precision of the output head, everything else that of the caller's autocast context. The caller sets
    `no_grad` and evaluation mode.
    """

    def __init__(
        self,
        model: Any,
        source_BS: torch.Tensor,
        source_mask_BS: torch.Tensor,
        limit_tokens: int,
        *,
        beams: int = 1,
        head_VD: torch.Tensor | None = None,
    ):
        """Run the encoder once and compute the keys and values of every cross-attention.

        Args:
            model: a T5 or mT5 for conditional generation.
            source_BS: int64 ids, padded.
            source_mask_BS: 1 for a source token, 0 for padding.
            limit_tokens: maximum number of tokens to read; the size of the self-attention caches.
            beams: hypotheses per source, which share its keys and values. Tokens are then (B * W,), grouped by source.
            head_VD: rows of the output head to compute logits for; None for all.
        """
        config = model.config
        self._model, self._limit, self._position, self._beams = model, limit_tokens, 0, beams
        self._head_VD = model.lm_head.weight if head_VD is None else head_VD
        self._heads, self._width = config.num_heads, config.d_kv
        self._scale = config.d_model**-0.5 if scales_decoder_output(model) else 1.0
        states_BSD = model.encoder(input_ids=source_BS, attention_mask=source_mask_BS).last_hidden_state
        self._visible_B11S = source_mask_BS[:, None, None, :].bool()
        attentions = [block.layer[1].EncDecAttention for block in model.decoder.block]
        self._cross_BHSK = [(self._split(a.k(states_BSD)), self._split(a.v(states_BSD))) for a in attentions]
        self._self_BHTK: list[tuple[torch.Tensor, torch.Tensor]] = []
        first = model.decoder.block[0].layer[0].SelfAttention
        self._bias_1HTT = first.compute_bias(limit_tokens, limit_tokens, device=source_BS.device)

    def logits(self, token_B: torch.Tensor) -> torch.Tensor:
        """Read `token_B` (B,) at the next position and return the logits (B, V) of the token after it."""
        hidden_BD = self._model.decoder.embed_tokens(token_B)
        for index, block in enumerate(self._model.decoder.block):
            hidden_BD = hidden_BD + self._self_attention(index, block.layer[0], hidden_BD)
            hidden_BD = hidden_BD + self._cross_attention(index, block.layer[1], hidden_BD)
            hidden_BD = block.layer[2](hidden_BD)
        self._position += 1
        hidden_BD = self._model.decoder.final_layer_norm(hidden_BD)
        # As in the loss: half precision would make the best tokens equal (bf16) or overflow (fp16).
        with torch.autocast(hidden_BD.device.type, enabled=False):
            return functional.linear(hidden_BD.to(self._head_VD.dtype) * self._scale, self._head_VD)

    def keep(self, rows: torch.Tensor) -> None:
        """Keep these sources with their beams, in this order (int64 indices, which may repeat)."""
        self._visible_B11S = self._visible_B11S.index_select(0, rows)
        self._cross_BHSK = [(k.index_select(0, rows), v.index_select(0, rows)) for k, v in self._cross_BHSK]
        if self._self_BHTK:
            self.reorder((rows[:, None] * self._beams + torch.arange(self._beams, device=rows.device)).flatten())

    def reorder(self, hypotheses: torch.Tensor) -> None:
        """Reorder the hypotheses (int64 indices, which may repeat) within their sources."""
        self._self_BHTK = [(self._selected(k, hypotheses), self._selected(v, hypotheses)) for k, v in self._self_BHTK]

    def _selected(self, cache_BHTK: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        # Copy only the positions that have been written.
        selected_BHTK = cache_BHTK.new_empty((len(rows), *cache_BHTK.shape[1:]))
        selected_BHTK[:, :, : self._position] = cache_BHTK[:, :, : self._position].index_select(0, rows)
        return selected_BHTK

    def _split(self, states_BSD: torch.Tensor) -> torch.Tensor:
        rows, length, _ = states_BSD.shape
        return states_BSD.view(rows, length, self._heads, self._width).transpose(1, 2).contiguous()

    def _self_attention(self, index: int, layer: Any, hidden_BD: torch.Tensor) -> torch.Tensor:
        attention, rows, now = layer.SelfAttention, hidden_BD.shape[0], self._position
        normed_BD = layer.layer_norm(hidden_BD)
        shape = (rows, self._heads, self._width)
        key_BHK, value_BHK = attention.k(normed_BD).view(shape), attention.v(normed_BD).view(shape)
        if now == 0:
            # Allocated here because only the projection knows the dtype that autocast gives it.
            shape_BHTK = (rows, self._heads, self._limit, self._width)
            self._self_BHTK.append((key_BHK.new_empty(shape_BHTK), value_BHK.new_empty(shape_BHTK)))
        keys_BHTK, values_BHTK = self._self_BHTK[index]
        keys_BHTK[:, :, now], values_BHTK[:, :, now] = key_BHK, value_BHK
        mixed_BH1K = functional.scaled_dot_product_attention(
            attention.q(normed_BD).view(rows, self._heads, 1, self._width),
            keys_BHTK[:, :, : now + 1],
            values_BHTK[:, :, : now + 1],
            attn_mask=self._bias_1HTT[:, :, now : now + 1, : now + 1].to(keys_BHTK.dtype),
            scale=1.0,
        )
        return attention.o(mixed_BH1K.reshape(rows, -1))

    def _cross_attention(self, index: int, layer: Any, hidden_BD: torch.Tensor) -> torch.Tensor:
        attention, rows = layer.EncDecAttention, hidden_BD.shape[0]
        keys_BHSK, values_BHSK = self._cross_BHSK[index]
        query_BWHK = attention.q(layer.layer_norm(hidden_BD)).view(-1, self._beams, self._heads, self._width)
        mixed_BHWK = functional.scaled_dot_product_attention(
            query_BWHK.transpose(1, 2), keys_BHSK, values_BHSK, attn_mask=self._visible_B11S, scale=1.0
        )
        return attention.o(mixed_BHWK.transpose(1, 2).reshape(rows, -1))


def generate(
    model: Any,
    source_BS: torch.Tensor,
    source_mask_BS: torch.Tensor,
    *,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
    should_stop: Callable[[], bool] | None = None,
) -> np.ndarray | None:
    """Decode greedily, without constraints.

    The encoder runs once and finished rows leave the batch. No random state is used, and every module keeps its mode. The
    precision is that of the caller's autocast context.

    Args:
        model: a T5 or mT5 for conditional generation.
        source_BS: int64 ids on the model's device, padded on the right.
        source_mask_BS: 1 for a source token, 0 for padding.
        max_new_tokens: maximum length of an output, end token included.
        eos_id: end token.
        pad_id: padding after the end token; also the start token when the model defines none.
        should_stop: called before every token.

    Returns:
        Int64 (B, T) without the start token; None if `should_stop` returned True.
    """
    rows, device = source_BS.shape[0], source_BS.device
    start = model.config.decoder_start_token_id
    ids_BT = torch.full((rows, max_new_tokens), pad_id, dtype=torch.int64, device=device)
    token = torch.full((rows,), pad_id if start is None else start, dtype=torch.int64, device=device)
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    alive = torch.arange(rows, device=device)
    tokens_per_sync = 1 if device.type == "cpu" else TOKENS_PER_SYNC
    with torch.no_grad(), evaluation_mode(model):
        decoder = TokenDecoder(model, source_BS, source_mask_BS, max_new_tokens)
        for position in range(max_new_tokens):
            if should_stop is not None and should_stop():
                return None
            token = torch.where(ended, pad_id, decoder.logits(token).argmax(-1))
            ids_BT[alive, position] = token
            ended = ended | (token == eos_id)
            if (position + 1) % tokens_per_sync:
                continue
            unfinished = torch.nonzero(~ended)[:, 0]  # host sync
            if len(unfinished) == 0:
                break
            if len(unfinished) <= MAX_ALIVE_SHARE * len(alive):
                decoder.keep(unfinished)
                alive, token, ended = alive[unfinished], token[unfinished], ended[unfinished]
    generated_BT = ids_BT.cpu().numpy()
    is_end = generated_BT == eos_id
    lengths = np.where(is_end.any(1), is_end.argmax(1) + 1, max_new_tokens)
    return generated_BT[:, : int(lengths.max(initial=0))]


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Set evaluation mode and restore the mode of every module afterwards, frozen parts included."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
