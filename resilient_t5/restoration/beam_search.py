"""Beam search under the answer rules: every gap gets its sentinel, in order, and an answer.

Hypotheses are ranked by the sum of their log probabilities, each normalised over the tokens that the rules allow. The
search of a source ends when no live hypothesis can overtake the worst of its W finished ones: sums only decrease, so only
hypotheses that the beam has dropped can be missed. With one beam this is the greedy search of transformers. Tests compare
the search with transformers' beam search under the same rules, with full enumeration, and with plain greedy `generate`.

After the last gap, a sentinel that was not requested ends the answer as the end token does. A model that was trained with
many gaps, or on T5's own targets, expects one there; if its probability were only masked, the answer would run on.

Why not transformers' `generate` with a logits processor: it finds the same hypotheses but needs 1.2 to 2 times the
processor time (1 and 4 beams, 128 notes), and it supports neither the rule above in greedy search nor stopping at a sentinel.

Shapes: B sources, W beams, R = B * W hypotheses, S source tokens, T target tokens, A output ids, C candidates.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from resilient_t5.errors import ConfigError
from resilient_t5.restoration.answer_rules import BEGUN, FORBIDDEN, SEEN, AnswerRules
from resilient_t5.restoration.decoder import MAX_ALIVE_SHARE, TOKENS_PER_SYNC, TokenDecoder, evaluation_mode

MAX_BATCH = 64
"""Maximum hypotheses in a batch. A larger batch is not faster and needs more memory."""
IMPOSSIBLE = -torch.inf


@dataclass(frozen=True)
class DecodeSettings:
    """Settings of the search."""

    beams: int = 1
    """Hypotheses per source; 1 is greedy."""
    alternatives: int = 0
    """Alternative answers to find for each gap."""
    batch_tokens: int = 4096
    """Maximum padded source tokens times beams in a batch; affects speed and memory only."""
    encoding: str = "utf-8"
    """Codec that must be able to encode every answer."""

    def __post_init__(self) -> None:
        problems = [
            f"--{name}: {value} is not from {low} to {high}"
            for name, value, low, high in (
                ("beams", self.beams, 1, 64),
                ("alternatives", self.alternatives, 0, 63),
                ("batch_tokens", self.batch_tokens, 1, 2**24),
            )
            if not low <= value <= high
        ]
        if problems:
            raise ConfigError(*problems)


@dataclass(frozen=True, eq=False)
class SearchRequest:
    """One source and the form of its output.

    source: int64 full ids with end token.
    gaps: number of sentinels in the source; 0 requests one answer without a sentinel, the whole text.
    prefix: full ids that the output begins with; they follow the rules.
    stop_after: number of answers after which the output ends, with the sentinel that follows or, for `gaps`, the end token.
    """

    source: np.ndarray
    gaps: int
    prefix: np.ndarray
    stop_after: int

    def min_tokens(self) -> int:
        """Minimum length of an output: the prefix, or a sentinel and a piece for each gap, and the end token."""
        return max(len(self.prefix) + 2, 2 * self.gaps + (2 if self.gaps == 0 else 1))


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """A finished output: full ids, end token included, and the log probability of each (0 in the prefix)."""

    ids: np.ndarray
    log_probabilities: np.ndarray

    @property
    def score(self) -> float:
        """Sum of the log probabilities."""
        return float(self.log_probabilities.sum())


class BeamSearch:
    """Constrained search with one model and one set of answer rules.

    Args:
        model: a T5 or mT5 for conditional generation, full vocabulary.
        rules: permitted answers.
    """

    def __init__(self, model: Any, rules: AnswerRules):
        self.model, self.rules, self.device = model, rules, model.shared.weight.device
        self.mark_ids = rules.output_ids[np.append(rules.sentinels, rules.end)]
        """Full ids that end an answer: the sentinels and the end token."""
        self.output_ids = torch.from_numpy(rules.output_ids).to(self.device)
        self.marks = torch.from_numpy(np.append(rules.sentinels, rules.end)).to(self.device)
        self.next_state_NA = torch.from_numpy(rules.next_state_NA.astype(np.int64)).to(self.device)
        self.cost_NA = torch.from_numpy(rules.cost_NA).to(self.device)
        self._head_AD = model.lm_head.weight.detach().index_select(0, self.output_ids)
        self._pad_id = int(model.config.pad_token_id)
        start = model.config.decoder_start_token_id
        self.start_id = self._pad_id if start is None else int(start)

    def search_all(
        self,
        requests: Sequence[SearchRequest],
        limit_tokens: int,
        *,
        beams: int,
        batch_tokens: int,
    ) -> list[list[Hypothesis]]:
        """Search in batches of similar length; arguments and result as for `search`."""
        results: list[list[Hypothesis]] = [[] for _ in requests]
        for batch in _batches(requests, beams, batch_tokens):
            hypotheses = self.search([requests[i] for i in batch], limit_tokens, beams=beams)
            for i, own in zip(batch, hypotheses, strict=True):
                results[i] = own
        return results

    def search(self, requests: Sequence[SearchRequest], limit_tokens: int, *, beams: int) -> list[list[Hypothesis]]:
        """Return the best outputs of each request, at most `beams`, best first.

        Args:
            requests: processed as one batch; the encoder runs once for each distinct source array.
            limit_tokens: maximum length of an output, end token included.
            beams: hypotheses per source.

        Raises:
            ValueError: `limit_tokens` is too short for the gaps of a request, or it has more gaps than the rules.
        """
        for request in requests:
            if request.min_tokens() > limit_tokens or request.gaps > len(self.rules.sentinels):
                raise ValueError(f"{request.gaps} gaps do not fit into {limit_tokens} tokens and the rules' sentinels")
        with torch.no_grad(), evaluation_mode(self.model):
            state = _BeamState(self, requests, limit_tokens, beams)
            tokens_per_sync = 1 if self.device.type == "cpu" else TOKENS_PER_SYNC
            for position in range(limit_tokens):
                state.advance(position)
                if (position + 1) % tokens_per_sync == 0 and state.drop_decided():
                    break
        return state.hypotheses()

    def decoder(self, requests: Sequence[SearchRequest], limit_tokens: int, beams: int) -> TokenDecoder:
        """Return a decoder over the sources of the requests; a shared source array is encoded once."""
        sources = {id(request.source): torch.from_numpy(request.source) for request in requests}
        rows = {key: row for row, key in enumerate(sources)}
        ids_BS = pad_sequence(list(sources.values()), batch_first=True, padding_value=self._pad_id)
        lengths = torch.tensor([len(source) for source in sources.values()])
        mask_BS = (torch.arange(ids_BS.shape[1])[None] < lengths[:, None]).long().to(self.device)
        decoder = TokenDecoder(self.model, ids_BS.to(self.device), mask_BS, limit_tokens, beams=beams, head_VD=self._head_AD)
        if len(sources) < len(requests):
            decoder.keep(torch.tensor([rows[id(request.source)] for request in requests], device=self.device))
        return decoder


class _BeamState:
    """State of one search: live and finished hypotheses as tensors. `opened_BW` counts the sentinels written."""

    def __init__(self, search: BeamSearch, requests: Sequence[SearchRequest], limit: int, beams: int):
        device, count = search.device, len(requests)
        self.search, self.limit, self.beams = search, limit, beams
        self.decoder = search.decoder(requests, limit, beams)
        self.alive = torch.arange(count, device=device)
        self.gaps_B = torch.tensor([request.gaps for request in requests], device=device)
        self.stops_B = torch.tensor([request.stop_after for request in requests], device=device)
        prefixes = [torch.from_numpy(np.searchsorted(search.rules.output_ids, request.prefix)) for request in requests]
        self.forced_BT = pad_sequence(prefixes, batch_first=True, padding_value=-1).to(device)
        # A source without gaps begins inside its only answer.
        self.state_BW = torch.where(self.gaps_B == 0, BEGUN, SEEN)[:, None].repeat(1, beams)
        self.opened_BW = torch.zeros((count, beams), dtype=torch.int64, device=device)
        self.score_BW = torch.full((count, beams), IMPOSSIBLE, device=device)
        self.score_BW[:, 0] = 0.0
        self.ids_BWT = torch.zeros((count, beams, limit), dtype=torch.int64, device=device)
        self.log_BWT = torch.zeros((count, beams, limit), device=device)
        self.token_R = torch.full((count * beams,), search.start_id, dtype=torch.int64, device=device)
        # Finished hypotheses of all requests, alive or not.
        self.done_score_BW = torch.full((count, beams), IMPOSSIBLE, device=device)
        self.done_length_BW = torch.zeros((count, beams), dtype=torch.int64, device=device)
        self.done_ids_BWT, self.done_log_BWT = self.ids_BWT.clone(), self.log_BWT.clone()

    def advance(self, position: int) -> None:
        """Extend every hypothesis by one token."""
        rows, beams = len(self.alive), self.beams
        logits_BWA = self.decoder.logits(self.token_R).view(rows, beams, -1).float()
        log_BWA, greedy_BWA = self._log_probabilities(logits_BWA, position)
        choices = log_BWA.shape[-1]
        total_BC = (self.score_BW[:, :, None] + (log_BWA if beams > 1 else greedy_BWA)).view(rows, -1)
        # Each hypothesis has one token that ends its output, so at most W of 2 W candidates end. One beam takes the best
        # token whatever comes after it, as greedy `generate` of transformers does.
        score_BC, index_BC = total_BC.topk(min(2 * beams, total_BC.shape[1]) if beams > 1 else 1, dim=-1)
        parent_BC, token_BC = index_BC // choices, index_BC % choices
        opened_BC = self.opened_BW.gather(1, parent_BC)
        is_mark_BC = token_BC == self._next_mark(opened_BC)
        ends_BC = is_mark_BC & (opened_BC >= self.stops_B[:, None])
        log_BC = log_BWA.view(rows, -1).gather(1, index_BC)
        self._finish(position, (parent_BC, token_BC, log_BC), torch.where(ends_BC, score_BC, IMPOSSIBLE)[:, :beams])
        live_BC = torch.where(ends_BC, IMPOSSIBLE, score_BC)
        order_BW = live_BC.topk(beams, dim=-1).indices if beams > 1 else live_BC.argmax(-1, keepdim=True)
        self.score_BW = live_BC.gather(1, order_BW)
        parent_BW, token_BW, log_BW, is_mark_BW = (
            values.gather(1, order_BW) for values in (parent_BC, token_BC, log_BC, is_mark_BC)
        )
        self._extend(position, (parent_BW, token_BW, log_BW), is_mark_BW)

    def _log_probabilities(self, logits_BWA: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Log probabilities among the allowed tokens, (B, W, A): -inf for the others, 0 for a token of the prefix.

        The second result is for the greedy choice, where a mark counts with its own probability only, not with that of
        all marks that end the answer.
        """
        unfilled_BW = (self.stops_B[:, None] - self.opened_BW).clamp_min(0)
        slack_BW = self.limit - position - 2 - 2 * unfilled_BW
        allowed_BWA = self.search.cost_NA[self.state_BW] <= slack_BW.clamp(-1, FORBIDDEN - 1)[:, :, None]
        mark_BW1 = self._next_mark(self.opened_BW)[:, :, None]
        best_BW1, all_BW1 = self._mark_logits(logits_BWA, mark_BW1)
        logit_BW1 = all_BW1.masked_fill((self.state_BW != SEEN)[:, :, None], IMPOSSIBLE)
        log_BWA = logits_BWA.masked_fill(~allowed_BWA, IMPOSSIBLE).scatter(2, mark_BW1, logit_BW1).log_softmax(-1)
        if position < self.forced_BT.shape[1]:
            forced_B = self.forced_BT[:, position]
            rows = torch.nonzero(forced_B >= 0)[:, 0]
            log_BWA[rows] = IMPOSSIBLE
            log_BWA[rows, 0, forced_B[rows]] = 0.0
        # An unused beam has no allowed token, and its log_softmax is NaN.
        log_BWA = torch.where(self.score_BW[:, :, None] == IMPOSSIBLE, IMPOSSIBLE, log_BWA)
        return log_BWA, log_BWA.scatter_add(2, mark_BW1, best_BW1 - all_BW1)

    def _mark_logits(self, logits_BWA: torch.Tensor, mark_BW1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logit (B, W, 1) of the likeliest mark that ends the answer, and log-sum-exp of all such marks.

        After the last gap these include every sentinel that was not requested.
        """
        sentinels_BWM = logits_BWA[:, :, self.search.marks[:-1]]
        is_further_BM = torch.arange(sentinels_BWM.shape[2], device=self.search.device) >= self.gaps_B[:, None]
        is_last_BW = (self.gaps_B > 0)[:, None] & (self.opened_BW == self.gaps_B[:, None])
        ends_BWM = is_further_BM[:, None, :] & is_last_BW[:, :, None]
        all_BWM = torch.cat([logits_BWA.gather(2, mark_BW1), sentinels_BWM.masked_fill(~ends_BWM, IMPOSSIBLE)], 2)
        return all_BWM.max(2, keepdim=True).values, all_BWM.logsumexp(2, keepdim=True)

    def _next_mark(self, opened_BW: torch.Tensor) -> torch.Tensor:
        """Place in the output ids of the mark that ends the current answer."""
        marks = self.search.marks
        return marks[torch.where(opened_BW < self.gaps_B[:, None], opened_BW, len(marks) - 1)]

    def _extend(self, position: int, chosen: tuple[torch.Tensor, ...], is_mark_BW: torch.Tensor) -> None:
        parent_BW, token_BW, log_BW = chosen
        if self.beams > 1:
            first_B1 = torch.arange(len(self.alive), device=self.search.device)[:, None] * self.beams
            self.decoder.reorder((first_B1 + parent_BW).flatten())
            index_BWT = parent_BW[:, :, None].expand(-1, -1, self.limit)
            self.ids_BWT, self.log_BWT = self.ids_BWT.gather(1, index_BWT), self.log_BWT.gather(1, index_BWT)
        self.ids_BWT[:, :, position], self.log_BWT[:, :, position] = token_BW, log_BW
        state_BW = self.state_BW.gather(1, parent_BW)
        self.state_BW = torch.where(is_mark_BW, BEGUN, self.search.next_state_NA[state_BW, token_BW])
        self.opened_BW = self.opened_BW.gather(1, parent_BW) + is_mark_BW
        self.token_R = self.search.output_ids[token_BW].flatten()

    def _finish(self, position: int, chosen: tuple[torch.Tensor, ...], ended_BW: torch.Tensor) -> None:
        """Merge the hypotheses that end at this position into the W best finished ones."""
        rows = torch.nonzero((ended_BW > IMPOSSIBLE).any(1))[:, 0]
        if len(rows) == 0:
            return
        parent_NW, token_NW, log_NW = (values[rows, : self.beams] for values in chosen)
        index_NWT = parent_NW[:, :, None].expand(-1, -1, self.limit)
        ids_NWT, log_NWT = self.ids_BWT[rows].gather(1, index_NWT), self.log_BWT[rows].gather(1, index_NWT)
        ids_NWT[:, :, position], log_NWT[:, :, position] = token_NW, log_NW
        length_NW = torch.full_like(token_NW, position + 1)
        request = self.alive[rows]
        score_N2 = torch.cat([self.done_score_BW[request], ended_BW[rows]], 1)
        self.done_score_BW[request], order_NW = score_N2.topk(self.beams, dim=-1)
        self.done_length_BW[request] = torch.cat([self.done_length_BW[request], length_NW], 1).gather(1, order_NW)
        order_NWT = order_NW[:, :, None].expand(-1, -1, self.limit)
        self.done_ids_BWT[request] = torch.cat([self.done_ids_BWT[request], ids_NWT], 1).gather(1, order_NWT)
        self.done_log_BWT[request] = torch.cat([self.done_log_BWT[request], log_NWT], 1).gather(1, order_NWT)

    def drop_decided(self) -> bool:
        """Drop the sources whose finished hypotheses cannot be overtaken; return True when no source remains."""
        undecided = torch.nonzero(self.score_BW[:, 0] > self.done_score_BW[self.alive, -1])[:, 0]  # host sync
        if len(undecided) == 0:
            return True
        if len(undecided) <= MAX_ALIVE_SHARE * len(self.alive):
            self.decoder.keep(undecided)
            for name in ("alive", "gaps_B", "stops_B", "forced_BT", "state_BW", "opened_BW", "score_BW", "ids_BWT", "log_BWT"):
                setattr(self, name, getattr(self, name)[undecided])
            self.token_R = self.token_R.view(-1, self.beams)[undecided].flatten()
        return False

    def hypotheses(self) -> list[list[Hypothesis]]:
        """Finished hypotheses of each request, best first."""
        output_ids = self.search.rules.output_ids
        scores, lengths, ids, logs = (
            values.cpu().numpy() for values in (self.done_score_BW, self.done_length_BW, self.done_ids_BWT, self.done_log_BWT)
        )
        return [
            [
                Hypothesis(output_ids[ids[row, k, : lengths[row, k]]], logs[row, k, : lengths[row, k]].astype(np.float64))
                for k in range(self.beams)
                if scores[row, k] > IMPOSSIBLE
            ]
            for row in range(len(scores))
        ]


def _batches(requests: Sequence[SearchRequest], beams: int, batch_tokens: int) -> Iterator[list[int]]:
    """Indices of requests in batches, sorted by length; ties by prefix, gaps and order, so that batches are repeatable."""
    order = sorted(range(len(requests)), key=lambda i: (len(requests[i].source), len(requests[i].prefix), requests[i].gaps, i))
    batch: list[int] = []
    for number in order:
        longest = len(requests[number].source)
        if batch and (longest * (len(batch) + 1) * beams > batch_tokens or (len(batch) + 1) * beams > MAX_BATCH):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
