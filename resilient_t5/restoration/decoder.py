"""Decoding one token at a time, with caches that are allocated once.

Shapes: B rows, S source tokens, T target tokens, H heads, K width of a head, D model width, V vocabulary rows, W beams.

The pass below is the decoder of T5 (Raffel et al. 2020, arXiv 1910.10683) for a single position, made of the model's
own modules, so that whatever trains is what decodes. Against the general forward of the library it saves the masks,
the growing copies of the caches and the output bookkeeping of every token: about a fifth of the time of 32 rows on one
CPU core, a third of that of one row. A test holds it to the library's greedy generation, token for token.
"""

from typing import Any

import torch
from torch.nn import functional

from resilient_t5.model.embeddings import scales_decoder_output


class TokenDecoder:
    """The decoder's state over a batch of sources: reads one token per row, gives the logits of the next.

    The logits are in the head's own precision, all else in that of the caller's autocast context. The caller sees to
    `no_grad` and to `eval`.
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
        """Run the encoder once and project its output into every layer's cross-attention.

        Args:
            model: a T5 or mT5 for conditional generation.
            source_BS: int64 ids, padded.
            source_mask_BS: 1 where a source token stands, else 0.
            limit_tokens: most tokens that will be read; sizes the self-attention caches.
            beams: hypotheses per source; they share its keys and values. Tokens are then (B * W,), source by source.
            head_VD: the rows of the head that logits are wanted for; all of them when None.
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
        """Logits (B, V) of the token after `token_B` (B,), which is read at the next position."""
        hidden_BD = self._model.decoder.embed_tokens(token_B)
        for index, block in enumerate(self._model.decoder.block):
            hidden_BD = hidden_BD + self._attend_self(index, block.layer[0], hidden_BD)
            hidden_BD = hidden_BD + self._attend_source(index, block.layer[1], hidden_BD)
            hidden_BD = block.layer[2](hidden_BD)
        self._position += 1
        hidden_BD = self._model.decoder.final_layer_norm(hidden_BD)
        # As in the loss: half precision would make the best tokens equal (bf16) or overflow (fp16).
        with torch.autocast(hidden_BD.device.type, enabled=False):
            return functional.linear(hidden_BD.to(self._head_VD.dtype) * self._scale, self._head_VD)

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these sources only (int64 numbers, in this order); may repeat one. Beams stay with their source."""
        self._visible_B11S = self._visible_B11S.index_select(0, rows)
        self._cross_BHSK = [(k.index_select(0, rows), v.index_select(0, rows)) for k, v in self._cross_BHSK]
        if self._self_BHTK:
            self.reorder((rows[:, None] * self._beams + torch.arange(self._beams, device=rows.device)).flatten())

    def reorder(self, hypotheses: torch.Tensor) -> None:
        """Put the hypotheses into this order (int64 numbers); may repeat one, each stays with its source."""
        self._self_BHTK = [(self._picked(k, hypotheses), self._picked(v, hypotheses)) for k, v in self._self_BHTK]

    def _picked(self, cache_BHTK: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        # Only what has been written is copied.
        picked_BHTK = cache_BHTK.new_empty((len(rows), *cache_BHTK.shape[1:]))
        picked_BHTK[:, :, : self._position] = cache_BHTK[:, :, : self._position].index_select(0, rows)
        return picked_BHTK

    def _split(self, states_BSD: torch.Tensor) -> torch.Tensor:
        rows, length, _ = states_BSD.shape
        return states_BSD.view(rows, length, self._heads, self._width).transpose(1, 2).contiguous()

    def _attend_self(self, index: int, layer: Any, hidden_BD: torch.Tensor) -> torch.Tensor:
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

    def _attend_source(self, index: int, layer: Any, hidden_BD: torch.Tensor) -> torch.Tensor:
        attention, rows = layer.EncDecAttention, hidden_BD.shape[0]
        keys_BHSK, values_BHSK = self._cross_BHSK[index]
        query_BWHK = attention.q(layer.layer_norm(hidden_BD)).view(-1, self._beams, self._heads, self._width)
        mixed_BHWK = functional.scaled_dot_product_attention(
            query_BWHK.transpose(1, 2), keys_BHSK, values_BHSK, attn_mask=self._visible_B11S, scale=1.0
        )
        return attention.o(mixed_BHWK.transpose(1, 2).reshape(rows, -1))
