"""Windows to answers: batches by length, the best output of each, and other answers for its own gaps."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from resilient_t5.errors import ConfigError
from resilient_t5.restoration.search import Hypothesis, Question, Searcher
from resilient_t5.restoration.sheet import Window

LARGEST_BATCH = 64
"""Most questions in one batch: beyond it a longer batch is no faster, and the caches only grow."""


@dataclass(frozen=True)
class Asking:
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
    asking: Asking,
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
    asking: Asking,
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
    asking: Asking,
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
        if batch and (longest * (len(batch) + 1) * beams > batch_tokens or (len(batch) + 1) * beams > LARGEST_BATCH):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
