"""Decoding one token at a time, with caches that are allocated once.

Shapes: B rows, S source tokens, T target tokens, H heads, K width of a head, D model width, V vocabulary rows.

The pass below is the decoder of T5 (Raffel et al. 2020, arXiv 1910.10683) for a single position, made of the model's
own modules, so that whatever trains is what decodes. Against the general forward of the library it saves the masks,
the growing copies of the caches and the output bookkeeping of every token: about a fifth of the time of 32 rows on one
CPU core, a third of that of one row. A test holds it to the library's greedy generation, token for token.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from resilient_t5.model.tables import scales_decoder_output


class TokenDecoder:
    """The decoder's state over a batch of sources: reads one token per row, gives the logits of the next.

    The logits are in the head's own precision, all else in that of the caller's autocast context. The caller sees to
    `no_grad` and to `eval`.
    """

    def __init__(self, model: Any, source_BS: torch.Tensor, source_mask_BS: torch.Tensor, limit_tokens: int):
        """Run the encoder once and project its output into every layer's cross-attention.

        Args:
            model: a T5 or mT5 for conditional generation.
            source_BS: int64 ids, padded.
            source_mask_BS: 1 where a source token stands, else 0.
            limit_tokens: most tokens that will be read; sizes the self-attention caches.
        """
        config = model.config
        self._model, self._limit, self._position = model, limit_tokens, 0
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
        head = self._model.lm_head
        # As in the loss: half precision would make the best tokens equal (bf16) or overflow (fp16).
        with torch.autocast(hidden_BD.device.type, enabled=False):
            return head(hidden_BD.to(head.weight.dtype) * self._scale)

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows only (int64 row numbers, in this order); may repeat a row."""
        self._visible_B11S = self._visible_B11S.index_select(0, rows)
        self._cross_BHSK = [(k.index_select(0, rows), v.index_select(0, rows)) for k, v in self._cross_BHSK]
        self._self_BHTK = [(k.index_select(0, rows), v.index_select(0, rows)) for k, v in self._self_BHTK]

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
        mixed_BH1K = functional.scaled_dot_product_attention(
            attention.q(layer.layer_norm(hidden_BD)).view(rows, self._heads, 1, self._width),
            keys_BHSK,
            values_BHSK,
            attn_mask=self._visible_B11S,
            scale=1.0,
        )
        return attention.o(mixed_BH1K.reshape(rows, -1))


@dataclass(frozen=True, eq=False)
class Gaps:
    """What constrained decoding must know of the sources."""

    counts_B: np.ndarray
    """Int (B,): gaps of each row; its sentinels are 0 to count - 1."""
    sentinel_ids: np.ndarray
    """Int: id of sentinel k at place k."""
    barred_ids: np.ndarray
    """Int: ids that no answer may hold (pad, unknown); sentinels and the end mark are barred in any case."""

    def least_tokens(self) -> int:
        """Tokens that the row with most gaps needs at least: a sentinel and one token for each, and the end mark."""
        return 2 * int(self.counts_B.max(initial=0)) + 1


class GapGuide:
    """Chooses the next token so that every gap gets its sentinel, in order, and an answer of at least one token.

    The next token is the next expected sentinel (after the last one: the end mark) or a normal token, whichever has the
    higher logit. When only as many tokens are left as the open gaps need, the row moves on without asking.
    """

    def __init__(self, gaps: Gaps, eos_id: int, vocabulary_rows: int, device: torch.device):
        counts = np.asarray(gaps.counts_B, np.int64)
        if counts.size and not 0 <= counts.min() <= counts.max() <= len(gaps.sentinel_ids):
            raise ValueError(f"gaps per row must be 0 to {len(gaps.sentinel_ids)}, got {counts.min()} to {counts.max()}")
        barred = np.zeros(vocabulary_rows, bool)
        barred[np.concatenate([gaps.sentinel_ids, gaps.barred_ids, [eos_id]]).astype(np.int64)] = True
        self._barred_V = torch.from_numpy(barred).to(device)
        self._sentinels = torch.from_numpy(np.append(gaps.sentinel_ids, eos_id).astype(np.int64)).to(device)
        self._eos_id = eos_id
        self._counts_B = torch.from_numpy(counts).to(device)
        self._opened_B = torch.zeros_like(self._counts_B)
        self._empty_B = torch.zeros_like(self._counts_B, dtype=torch.bool)

    def choose(self, logits_BV: torch.Tensor, remaining_tokens: int) -> torch.Tensor:
        """The next token (B,); `remaining_tokens` counts this one."""
        open_B = self._counts_B - self._opened_B
        next_B = torch.where(open_B > 0, self._sentinels[self._opened_B], self._eos_id)
        next_logit_B = logits_BV.gather(1, next_B[:, None])[:, 0]
        best_B, normal_B = logits_BV.masked_fill(self._barred_V, -torch.inf).max(-1)
        must_B = (self._opened_B == 0) | (remaining_tokens <= 2 * open_B + 1)
        move_B = ~self._empty_B & (must_B | (next_logit_B > best_B))
        self._empty_B = move_B & (open_B > 0)
        self._opened_B = self._opened_B + self._empty_B
        return torch.where(move_B, next_B, normal_B)

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows only (int64 row numbers)."""
        self._counts_B = self._counts_B[rows]
        self._opened_B, self._empty_B = self._opened_B[rows], self._empty_B[rows]
