"""Decoding: greedy answers for scoring, and beam search under answer rules for filling gaps.

`generate` writes greedy answers. `Searcher` gives every gap its sentinel, in order, and an answer. `ask` goes from windows
to answers: batches by length, the best output of each window, and other answers for its own gaps.

Hypotheses are ranked by the sum of their log probabilities, each token's taken among the tokens that the rules allow
there. A source's search ends when no live hypothesis can overtake the worst of its W finished ones: sums only fall, so
nothing better is missed but what the beam dropped on the way. One beam is greedy search, as `generate` of transformers
does it: the likeliest token at each place. Tests compare the search with the library's beam search under the same rules,
with full enumeration, and with plain greedy `generate`.

After the last gap, a sentinel that was not asked for ends the answer as the end mark does. A model that was trained with
many gaps, or on T5's own targets, expects one there; if its probability were only forbidden, the answer would run on.

Shapes: B sources, W beams, R = B * W hypotheses, S source tokens, T target tokens, A output ids.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from resilient_t5.errors import ConfigError
from resilient_t5.restoration.answer_rules import BEGUN, FORBIDDEN, SEEN, AnswerRules
from resilient_t5.restoration.decoder import TokenDecoder
from resilient_t5.restoration.sheet import Window

# Rows that have ended are dropped from the batch when at most this share is still alive.
ALIVE_SHARE = 0.75
# On a GPU asking whether rows have ended waits for the device; that many tokens share one question.
TOKENS_PER_QUESTION = 8


NEVER = -torch.inf


@dataclass(frozen=True, eq=False)
class Question:
    """What is wanted of one source.

    gaps: sentinels that the source holds, 0 to gaps - 1; 0 asks for one answer without a sentinel, the whole text.
    prefix: full ids that the output begins with; they follow the rules.
    stops_at: the output ends with the mark behind this many sentinels; `gaps` ends it with the end mark.
    """

    source: np.ndarray
    gaps: int
    prefix: np.ndarray
    stops_at: int

    def min_tokens(self) -> int:
        """Tokens that any output needs: the prefix, or a sentinel and a piece for each gap, and the end mark."""
        return max(len(self.prefix) + 2, 2 * self.gaps + (2 if self.gaps == 0 else 1))


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """One finished output: full ids, end included, and the log probability of each (0 in the prefix)."""

    ids: np.ndarray
    log_probabilities: np.ndarray

    @property
    def score(self) -> float:
        """Sum of the log probabilities."""
        return float(self.log_probabilities.sum())


class Searcher:
    """A model that answers under one set of rules.

    Args:
        model: a T5 or mT5 for conditional generation, full vocabulary.
        rules: what answers may hold.
    """

    def __init__(self, model: Any, rules: AnswerRules):
        device = model.shared.weight.device
        self.model, self.rules, self.device = model, rules, device
        self._output_ids = torch.from_numpy(rules.output_ids).to(device)
        self._marks = torch.from_numpy(np.append(rules.sentinels, rules.end)).to(device)
        self._following_NA = torch.from_numpy(rules.following_NA.astype(np.int64)).to(device)
        self._cost_NA = torch.from_numpy(rules.cost_NA).to(device)
        self._head_AD = model.lm_head.weight.detach().index_select(0, self._output_ids)
        self._pad_id = int(model.config.pad_token_id)
        start = model.config.decoder_start_token_id
        self._start_id = self._pad_id if start is None else int(start)

    def first_mark(self) -> np.ndarray:
        """The id of sentinel 0, with which every output for gaps begins."""
        return self.rules.output_ids[self.rules.sentinels[:1]]

    def mark_ids(self) -> np.ndarray:
        """The ids that end an answer: sentinels and the end mark."""
        return self.rules.output_ids[np.append(self.rules.sentinels, self.rules.end)]

    def search(
        self,
        questions: Sequence[Question],
        limit_tokens: int,
        *,
        beams: int = 1,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[list[Hypothesis]] | None:
        """The best outputs for each question, at most `beams`, best first; None when `should_stop` said so.

        Args:
            questions: answered in one batch; the encoder runs once for each distinct source array.
            limit_tokens: longest output, end mark included.
            beams: hypotheses that are kept per source.
            should_stop: asked before every token.

        Raises:
            ValueError: `limit_tokens` cannot hold the gaps of a question, or a source has more gaps than the rules have.
        """
        for question in questions:
            if question.min_tokens() > limit_tokens or question.gaps > len(self.rules.sentinels):
                raise ValueError(f"{question.gaps} gaps do not fit into {limit_tokens} tokens and the rules' sentinels")
        with torch.no_grad(), evaluating(self.model):
            beam = _Beam(self, questions, limit_tokens, beams)
            every = 1 if self.device.type == "cpu" else TOKENS_PER_QUESTION
            for position in range(limit_tokens):
                if should_stop is not None and should_stop():
                    return None
                beam.advance(position)
                if (position + 1) % every == 0 and beam.drop_decided():
                    break
        return beam.finished()

    def decoder(self, questions: Sequence[Question], limit_tokens: int, beams: int) -> TokenDecoder:
        """A decoder over the sources of the questions, equal arrays encoded once."""
        unique: dict[int, int] = {}
        sources: list[np.ndarray] = []
        place = []
        for question in questions:
            if id(question.source) not in unique:
                unique[id(question.source)] = len(sources)
                sources.append(question.source)
            place.append(unique[id(question.source)])
        longest = max(map(len, sources))
        source_BS = np.full((len(sources), longest), self._pad_id, np.int64)
        for row, source in enumerate(sources):
            source_BS[row, : len(source)] = source
        lengths = torch.tensor([len(source) for source in sources])
        mask_BS = (torch.arange(longest)[None] < lengths[:, None]).long().to(self.device)
        ids_BS = torch.from_numpy(source_BS).to(self.device)
        decoder = TokenDecoder(self.model, ids_BS, mask_BS, limit_tokens, beams=beams, head_VD=self._head_AD)
        if len(sources) < len(questions):
            decoder.keep(torch.tensor(place, device=self.device))
        return decoder


class _Beam:
    """The moving part of one search."""

    def __init__(self, searcher: Searcher, questions: Sequence[Question], limit: int, beams: int):
        s, device, count = searcher, searcher.device, len(questions)
        self.s, self.limit, self.beams, self.questions = s, limit, beams, questions
        self.decoder = s.decoder(questions, limit, beams)
        self.alive = torch.arange(count, device=device)
        self.gaps_B = torch.tensor([question.gaps for question in questions], device=device)
        self.stops_B = torch.tensor([question.stops_at for question in questions], device=device)
        self.forced_BT = self._forced(questions).to(device)
        # A source without gaps begins inside its only answer.
        begins = torch.where(self.gaps_B == 0, BEGUN, SEEN)
        self.state_BW = begins[:, None].repeat(1, beams)
        self.opened_BW = torch.zeros((count, beams), dtype=torch.int64, device=device)
        self.score_BW = torch.full((count, beams), NEVER, device=device)
        self.score_BW[:, 0] = 0.0
        shape_BWT = (count, beams, limit)
        self.ids_BWT = torch.zeros(shape_BWT, dtype=torch.int64, device=device)
        self.log_BWT = torch.zeros(shape_BWT, device=device)
        self.token_R = torch.full((count * beams,), s._start_id, dtype=torch.int64, device=device)
        # What has finished, of all questions.
        self.done_score_BW = torch.full((count, beams), NEVER, device=device)
        self.done_length_BW = torch.zeros((count, beams), dtype=torch.int64, device=device)
        self.done_ids_BWT, self.done_log_BWT = self.ids_BWT.clone(), self.log_BWT.clone()

    def _forced(self, questions: Sequence[Question]) -> torch.Tensor:
        """Int64 (B, T'): places of the prefixes in the output ids, -1 behind them."""
        longest = max(len(question.prefix) for question in questions)
        forced_BT = np.full((len(questions), longest), -1, np.int64)
        for row, question in enumerate(questions):
            forced_BT[row, : len(question.prefix)] = np.searchsorted(self.s.rules.output_ids, question.prefix)
        return torch.from_numpy(forced_BT)

    def advance(self, position: int) -> None:
        """One token for every hypothesis."""
        rows, beams = len(self.alive), self.beams
        logits_RA = self.decoder.logits(self.token_R)
        log_BWA, preferred_BWA = self._log_probabilities(logits_RA.view(rows, beams, -1), position)
        choices = log_BWA.shape[-1]
        total_BC = (self.score_BW[:, :, None] + (log_BWA if beams > 1 else preferred_BWA)).view(rows, -1)
        # Of 2 W candidates at most W end an output, since each hypothesis has one token that does. One beam is greedy: it
        # takes the best token, whatever comes after it, as `generate` of transformers does.
        score_BC, index_BC = total_BC.topk(min(2 * beams, total_BC.shape[1]) if beams > 1 else 1, dim=-1)
        parent_BC, token_BC = index_BC // choices, index_BC % choices
        is_move_BC = self._is_move(parent_BC, token_BC)
        opened_BC = self.opened_BW.gather(1, parent_BC)
        ends_BC = is_move_BC & (opened_BC >= self.stops_B[:, None])
        log_BC = log_BWA.view(rows, -1).gather(1, index_BC)
        self._finish(position, (parent_BC, token_BC, log_BC), torch.where(ends_BC, score_BC, NEVER)[:, :beams])
        live_BC = torch.where(ends_BC, NEVER, score_BC)
        order_BW = live_BC.topk(beams, dim=-1).indices if beams > 1 else live_BC.argmax(-1, keepdim=True)
        self.score_BW = live_BC.gather(1, order_BW)
        self._go_on(
            position,
            tuple(values.gather(1, order_BW) for values in (parent_BC, token_BC, log_BC)),
            is_move_BC.gather(1, order_BW),
        )

    def _log_probabilities(self, logits_BWA: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Log probabilities among the allowed tokens, (B, W, A); -inf for the others, 0 for a token of the prefix.

        And the same for a greedy choice, in which two marks that both end an answer do not vote together.
        """
        s = self.s
        open_BW = (self.stops_B[:, None] - self.opened_BW).clamp_min(0)
        slack_BW = self.limit - position - 2 - 2 * open_BW
        allowed_BWA = s._cost_NA[self.state_BW] <= slack_BW.clamp(-1, FORBIDDEN - 1)[:, :, None]
        logits_BWA = logits_BWA.float()
        move_BW1 = self._next_mark(self.opened_BW)[:, :, None]
        ending_BW1, together_BW1 = self._ending(logits_BWA, move_BW1)
        logit_BW1 = together_BW1.masked_fill((self.state_BW != SEEN)[:, :, None], NEVER)
        log_BWA = logits_BWA.masked_fill(~allowed_BWA, NEVER).scatter(2, move_BW1, logit_BW1).log_softmax(-1)
        if position < self.forced_BT.shape[1]:
            forced_B = self.forced_BT[:, position]
            rows = torch.nonzero(forced_B >= 0)[:, 0]
            log_BWA[rows] = NEVER
            log_BWA[rows, 0, forced_B[rows]] = 0.0
        # A hypothesis that does not exist has no allowed token, and log_softmax of nothing is NaN.
        log_BWA = torch.where(self.score_BW[:, :, None] == NEVER, NEVER, log_BWA)
        return log_BWA, log_BWA.scatter_add(2, move_BW1, ending_BW1 - together_BW1)

    def _ending(self, logits_BWA: torch.Tensor, move_BW1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logit of the mark that would end the answer; behind the last gap every sentinel that was not asked ends it, too.

        Returns:
            (B, W, 1) of the likeliest of them, and of all together.
        """
        logit_BW1 = logits_BWA.gather(2, move_BW1)
        sentinels_BWM = logits_BWA[:, :, self.s._marks[:-1]]
        is_further_BM = torch.arange(sentinels_BWM.shape[2], device=self.s.device) >= self.gaps_B[:, None]
        is_last_BW = (self.gaps_B > 0)[:, None] & (self.opened_BW == self.gaps_B[:, None])
        ends_BWM = is_further_BM[:, None, :] & is_last_BW[:, :, None]
        all_BWM = torch.cat([logit_BW1, sentinels_BWM.masked_fill(~ends_BWM, NEVER)], 2)
        return all_BWM.max(2, keepdim=True).values, all_BWM.logsumexp(2, keepdim=True)

    def _next_mark(self, opened_BW: torch.Tensor) -> torch.Tensor:
        """Place in the output ids of the mark that would end the answer."""
        number_BW = torch.where(opened_BW < self.gaps_B[:, None], opened_BW, len(self.s._marks) - 1)
        return self.s._marks[number_BW]

    def _is_move(self, parent_BC: torch.Tensor, token_BC: torch.Tensor) -> torch.Tensor:
        return token_BC == self._next_mark(self.opened_BW.gather(1, parent_BC))

    def _go_on(self, position: int, chosen: tuple[torch.Tensor, ...], is_move_BW: torch.Tensor) -> None:
        parent_BW, token_BW, log_BW = chosen
        if self.beams > 1:
            first_B1 = torch.arange(len(self.alive), device=self.s.device)[:, None] * self.beams
            self.decoder.reorder((first_B1 + parent_BW).flatten())
            index_BWT = parent_BW[:, :, None].expand(-1, -1, self.limit)
            self.ids_BWT, self.log_BWT = self.ids_BWT.gather(1, index_BWT), self.log_BWT.gather(1, index_BWT)
        self.ids_BWT[:, :, position], self.log_BWT[:, :, position] = token_BW, log_BW
        state_BW, opened_BW = self.state_BW.gather(1, parent_BW), self.opened_BW.gather(1, parent_BW)
        self.state_BW = torch.where(is_move_BW, BEGUN, self.s._following_NA[state_BW, token_BW])
        self.opened_BW = opened_BW + is_move_BW
        self.token_R = self.s._output_ids[token_BW].flatten()

    def _finish(self, position: int, chosen: tuple[torch.Tensor, ...], ended_BW: torch.Tensor) -> None:
        """Keep the W best of what had finished before and of what has finished now."""
        rows = torch.nonzero((ended_BW > NEVER).any(1))[:, 0]
        if len(rows) == 0:
            return
        parent_NW, token_NW, log_NW = (values[rows, : self.beams] for values in chosen)
        index_NWT = parent_NW[:, :, None].expand(-1, -1, self.limit)
        ids_NWT, log_NWT = self.ids_BWT[rows].gather(1, index_NWT), self.log_BWT[rows].gather(1, index_NWT)
        ids_NWT[:, :, position], log_NWT[:, :, position] = token_NW, log_NW
        length_NW = torch.full_like(token_NW, position + 1)
        whole = self.alive[rows]
        score_N2 = torch.cat([self.done_score_BW[whole], ended_BW[rows]], 1)
        self.done_score_BW[whole], order_NW = score_N2.topk(self.beams, dim=-1)
        self.done_length_BW[whole] = torch.cat([self.done_length_BW[whole], length_NW], 1).gather(1, order_NW)
        order_NWT = order_NW[:, :, None].expand(-1, -1, self.limit)
        self.done_ids_BWT[whole] = torch.cat([self.done_ids_BWT[whole], ids_NWT], 1).gather(1, order_NWT)
        self.done_log_BWT[whole] = torch.cat([self.done_log_BWT[whole], log_NWT], 1).gather(1, order_NWT)

    def drop_decided(self) -> bool:
        """Let go of the sources whose finished outputs cannot be overtaken; True when none is left."""
        going = torch.nonzero(self.score_BW[:, 0] > self.done_score_BW[self.alive, -1])[:, 0]  # host sync
        if len(going) == 0:
            return True
        if len(going) <= ALIVE_SHARE * len(self.alive):
            self.decoder.keep(going)
            for name in ("alive", "gaps_B", "stops_B", "forced_BT", "state_BW", "opened_BW", "score_BW", "ids_BWT", "log_BWT"):
                setattr(self, name, getattr(self, name)[going])
            self.token_R = self.token_R.view(-1, self.beams)[going].flatten()
        return False

    def finished(self) -> list[list[Hypothesis]]:
        """What has finished, for each question, best first."""
        output_ids = self.s.rules.output_ids
        score, length, ids, logs = (
            values.cpu().numpy() for values in (self.done_score_BW, self.done_length_BW, self.done_ids_BWT, self.done_log_BWT)
        )
        return [
            [
                Hypothesis(output_ids[ids[row, k, : length[row, k]]], logs[row, k, : length[row, k]].astype(np.float64))
                for k in range(self.beams)
                if score[row, k] > NEVER
            ]
            for row in range(len(self.questions))
        ]


MAX_BATCH = 64
"""Most questions in one batch: beyond it a longer batch is no faster, and the caches only grow."""


@dataclass(frozen=True)
class DecodeSettings:
    """How a model is asked."""

    beams: int = 1
    """Hypotheses that are kept; 1 is greedy."""
    alternatives: int = 0
    """Other answers that are looked for at each gap."""
    batch_tokens: int = 4096
    """Most padded source tokens, times beams, in one batch; speed and memory only."""
    encoding: str = "utf-8"
    """Codec that every answer must fit into."""

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
class Answer:
    """The answer to one gap and the others that were found, likeliest first: full ids and probabilities."""

    best: tuple[np.ndarray, float]
    others: tuple[tuple[np.ndarray, float], ...] = ()


def ask(
    searcher: Searcher,
    windows: Sequence[Window],
    asking: DecodeSettings,
    limit_tokens: int,
    should_stop: Callable[[], bool] | None = None,
) -> list[dict[int, Answer]] | None:
    """For each window the answers to its own gaps, by their places; None when `should_stop` said so.

    Args:
        limit_tokens: longest output, end mark included.
    """
    first_mark = searcher.first_mark()
    questions = [Question(window.source, len(window.asked), first_mark, stops_at=len(window.asked)) for window in windows]
    found = in_batches(searcher, questions, asking.beams, asking, limit_tokens, should_stop)
    if found is None:
        return None
    best = [hypotheses[0] for hypotheses in found]
    others = _others(searcher, list(zip(windows, best, strict=True)), asking, limit_tokens, should_stop)
    if others is None:
        return None
    answers: list[dict[int, Answer]] = []
    for number, (window, hypothesis) in enumerate(zip(windows, best, strict=True)):
        parts = answers_of(hypothesis, searcher.mark_ids())
        answers.append(
            {
                place: Answer(parts[k], others.get((number, k), ()))
                for k, place in enumerate(window.asked)
                if place in window.own
            }
        )
    return answers


def answers_of(hypothesis: Hypothesis, mark_ids: np.ndarray) -> list[tuple[np.ndarray, float]]:
    """The answers in an output that follows the rules: ids, and the probability of them and of the mark that ends them."""
    marks = np.flatnonzero(np.isin(hypothesis.ids, mark_ids)).tolist()
    return [
        (hypothesis.ids[a + 1 : b], math.exp(hypothesis.log_probabilities[a + 1 : b + 1].sum()))
        for a, b in zip(marks[:-1], marks[1:], strict=True)
    ]


def _others(
    searcher: Searcher,
    answered: Sequence[tuple[Window, Hypothesis]],
    asking: DecodeSettings,
    limit_tokens: int,
    should_stop: Callable[[], bool] | None,
) -> dict[tuple[int, int], tuple[tuple[np.ndarray, float], ...]] | None:
    """Answers to (window, k-th gap), the answers before it as they are."""
    if not asking.alternatives:
        return {}
    keys, questions = [], []
    for number, (window, hypothesis) in enumerate(answered):
        marks = np.flatnonzero(np.isin(hypothesis.ids, searcher.mark_ids())).tolist()
        for k, place in enumerate(window.asked):
            if place in window.own:
                keys.append((number, k))
                prefix = hypothesis.ids[: marks[k] + 1]
                questions.append(Question(window.source, len(window.asked), prefix, stops_at=k + 1))
    beams = max(asking.beams, asking.alternatives + 1)
    found = in_batches(searcher, questions, beams, asking, limit_tokens, should_stop)
    if found is None:
        return None
    return {
        key: tuple((h.ids[len(question.prefix) : -1], math.exp(h.score)) for h in hypotheses)
        for key, question, hypotheses in zip(keys, questions, found, strict=True)
    }


def in_batches(
    searcher: Searcher,
    questions: Sequence[Question],
    beams: int,
    asking: DecodeSettings,
    limit_tokens: int,
    should_stop: Callable[[], bool] | None,
) -> list[list[Hypothesis]] | None:
    """The outputs for every question, in the order of the questions; None when `should_stop` said so."""
    results: list[list[Hypothesis]] = [[] for _ in questions]
    for batch in _batches(questions, beams, asking.batch_tokens):
        found = searcher.search([questions[i] for i in batch], limit_tokens, beams=beams, should_stop=should_stop)
        if found is None:
            return None
        for i, hypotheses in zip(batch, found, strict=True):
            results[i] = hypotheses
    return results


def _batches(questions: Sequence[Question], beams: int, batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of questions, those of like length together; ties by prefix, gaps and order, so that it is repeatable."""
    order = sorted(
        range(len(questions)), key=lambda i: (len(questions[i].source), len(questions[i].prefix), questions[i].gaps, i)
    )
    batch: list[int] = []
    for number in order:
        longest = len(questions[number].source)  # ascending: the newest is the longest
        if batch and (longest * (len(batch) + 1) * beams > batch_tokens or (len(batch) + 1) * beams > MAX_BATCH):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


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
    """Greedy answers: int64 (B, T), each row ended by `eos_id` and padded with `pad_id`, without the start token.

    The encoder runs once; rows that have ended leave the batch. Touches no random state and leaves every module's mode
    as it was; precision is that of the caller's autocast context.

    Args:
        model: a T5 or mT5 for conditional generation.
        source_BS: int64 ids on the model's device, padded on the right.
        source_mask_BS: 1 where a source token stands, else 0.
        max_new_tokens: longest answer, end mark included.
        eos_id: ends a row.
        pad_id: fills up a row that has ended; also the decoder's start when the model names none.
        should_stop: asked before every token.

    Returns:
        The ids, or None when `should_stop` said so.
    """
    rows, device = source_BS.shape[0], source_BS.device
    start = model.config.decoder_start_token_id
    ids_BT = torch.full((rows, max_new_tokens), pad_id, dtype=torch.int64, device=device)
    token = torch.full((rows,), pad_id if start is None else start, dtype=torch.int64, device=device)
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    alive = torch.arange(rows, device=device)
    every = 1 if device.type == "cpu" else TOKENS_PER_QUESTION
    with torch.no_grad(), evaluating(model):
        decoder = TokenDecoder(model, source_BS, source_mask_BS, max_new_tokens)
        for position in range(max_new_tokens):
            if should_stop is not None and should_stop():
                return None
            token = torch.where(ended, pad_id, decoder.logits(token).argmax(-1))
            ids_BT[alive, position] = token
            ended = ended | (token == eos_id)
            if (position + 1) % every:
                continue
            going = torch.nonzero(~ended)[:, 0]  # host sync
            if len(going) == 0:
                break
            if len(going) <= ALIVE_SHARE * len(alive):
                decoder.keep(going)
                alive, token, ended = alive[going], token[going], ended[going]
    return _trimmed(ids_BT.cpu().numpy(), eos_id)


def _trimmed(ids_BT: np.ndarray, eos_id: int) -> np.ndarray:
    """Without the columns behind the longest row."""
    is_end = ids_BT == eos_id
    lengths = np.where(is_end.any(1), is_end.argmax(1) + 1, ids_BT.shape[1])
    return ids_BT[:, : int(lengths.max(initial=0))]


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module's own mode again afterwards, frozen parts included."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
