"""Restore fixed evaluation examples by greedy generation, and score what came back.

Reads only: the examples, their damage and their order are the caller's, and no random state is touched. Three kinds of
example are brought to one form, clean ids with spans in them:

* a chunk with masked spans: as the corruption says;
* a chunk with noise only, for a model that writes the whole text: its spans are the damaged places;
* a pair that was masked elsewhere: the clean text is its source with its target's answers filled in; no terms are known.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from resilient_t5.data.batches import MicroBatch
from resilient_t5.data.corruption.corruption import Corrupted
from resilient_t5.data.corruption.token_table import TokenTable
from resilient_t5.restoration.decode import generate
from resilient_t5.restoration.scoring.baselines import MajorityBaseline, TermSplit, score_copy, score_majority, terms_of_example
from resilient_t5.restoration.scoring.metrics import (
    Answers,
    Glossary,
    TermOutcome,
    cer_reduction,
    character_error_rate,
    format_health,
    over_edit_share,
    score_spans,
    score_terms,
    term_restoration,
)
from resilient_t5.restoration.scoring.score_report import RestorationReport, Sample, TextFigures
from resilient_t5.restoration.sentinels import (
    Alignment,
    Fills,
    align_fills,
    bracketed,
    parse_fills,
    sentinel_numbers,
    stitch,
    until_end,
)

# Tokens that an answer may be longer than the longest gold target of its batch; bounds what an untrained model costs.
SLACK_TOKENS = 16


class EvaluationSplit(TermSplit, Protocol):
    """The split that the examples come from."""

    @property
    def documents(self) -> np.ndarray:
        """Int (examples,): the document that each example was cut from."""

    @property
    def pairs(self) -> np.ndarray:
        """Int (examples,): where the target begins of a pair that was masked elsewhere, -1 for text."""


@dataclass(frozen=True, eq=False)
class Restorer:
    """What a measurement needs beside the model and the examples; built once."""

    split: EvaluationSplit
    table: TokenTable
    glossary: Glossary
    majority: MajorityBaseline
    task: Literal["restore", "correct"]
    max_target_tokens: int
    """Longest answer, end mark included."""
    samples: int
    """Examples that are shown: those with the smallest ids."""


@dataclass(frozen=True, eq=False)
class _Row:
    """One example, restored. `spans` are rows (k, start, end), `terms` rows (term id, k, start, end), `gaps` (t, 2)."""

    clean: np.ndarray
    source: np.ndarray
    fills: Fills
    restored: np.ndarray
    spans: np.ndarray
    terms: np.ndarray
    gaps: np.ndarray
    """Where each masked term's gap lies in the source: first token, token behind."""


@dataclass(frozen=True, eq=False)
class _Batch:
    answers: Answers
    rows: list[_Row]


def measure_restoration(
    model: Any,
    batches: Sequence[tuple[MicroBatch, Corrupted]],
    restorer: Restorer,
    should_stop: Callable[[], bool] | None = None,
) -> RestorationReport | None:
    """Restore every example of `batches` and score it; None when `should_stop` cut it short.

    Args:
        model: the bare T5 or mT5; the caller provides the autocast context.
        batches: micro-batches with their damage, the same rows in the same order.
        restorer: vocabulary, terms, baselines.
        should_stop: asked before every token.
    """
    generated = []
    for micro_batch, corrupted in batches:
        generated_BT = write_answers(model, micro_batch, restorer, should_stop)
        if generated_BT is None:
            return None
        generated.append((np.asarray(micro_batch.example_ids), corrupted, generated_BT))
    return score_generated(generated, restorer)


def score_generated(generated: Sequence[tuple[np.ndarray, Corrupted, np.ndarray]], restorer: Restorer) -> RestorationReport:
    """Score what any decoding wrote.

    Args:
        generated: for each batch the example ids (B,), their damage, and the ids written, int (B, T); the same rows in
            the same order.
        restorer: vocabulary, terms, baselines.
    """
    return _report([_read_batch(*batch, restorer) for batch in generated], restorer)


def write_answers(
    model: Any, micro_batch: MicroBatch, restorer: Restorer, should_stop: Callable[[], bool] | None
) -> np.ndarray | None:
    """What the model writes for a micro-batch, int (B, T) with T at most `longest_answer`; None when it was cut short."""
    device = model.lm_head.weight.device
    return generate(
        model,
        micro_batch.source_BS.to(device),
        micro_batch.source_mask_BS.to(device),
        max_new_tokens=longest_answer(micro_batch, restorer),
        eos_id=restorer.table.eos_id,
        pad_id=restorer.table.pad_id,
        should_stop=should_stop,
    )


def longest_answer(micro_batch: MicroBatch, restorer: Restorer) -> int:
    """Tokens that an answer to this micro-batch may have."""
    return min(restorer.max_target_tokens, micro_batch.labels_BT.shape[1] + SLACK_TOKENS)


def _read_batch(example_ids: np.ndarray, corrupted: Corrupted, generated_BT: np.ndarray, restorer: Restorer) -> _Batch:
    rows = [
        _read_row(int(number), row, corrupted, generated_BT[row], restorer) for row, number in enumerate(example_ids.tolist())
    ]
    answers = Answers(
        example_ids=example_ids,
        documents=np.asarray(restorer.split.documents[example_ids]),
        clean=[row.clean for row in rows],
        spans=_numbered([row.spans for row in rows]),
        masked_terms=_numbered([row.terms for row in rows]),
        fills=[row.fills for row in rows],
    )
    return _Batch(answers, rows)


def _read_row(example_id: int, row: int, corrupted: Corrupted, generated: np.ndarray, restorer: Restorer) -> _Row:
    split, table = restorer.split, restorer.table
    source = corrupted.source[corrupted.source_offsets[row] : corrupted.source_offsets[row + 1]]
    target = corrupted.target[corrupted.target_offsets[row] : corrupted.target_offsets[row + 1]]
    source, _ = until_end(source, table.eos_id, table.pad_id)
    text = np.asarray(split.tokens[split.offsets[example_id] : split.offsets[example_id + 1]]).astype(np.int32)
    is_pair = split.pairs[example_id] >= 0
    if restorer.task == "correct":
        clean, _ = until_end(target, table.eos_id, table.pad_id)
        damaged = np.zeros((0, 3), np.int64) if is_pair else terms_of_example(split, example_id)
        return _read_whole_text(source, clean, damaged, generated, restorer)
    if is_pair:
        return _read_pair(source, target, generated, restorer)
    spans = corrupted.spans[corrupted.spans[:, 0] == row][:, 1:]
    terms = corrupted.masked_terms[corrupted.masked_terms[:, 0] == row][:, 1:]
    fills = parse_fills(generated, table.sentinel_ids, table.eos_id, table.pad_id, expected=len(spans))
    # Sentinels stand in the source in the order of their numbers, so number k is the k-th mark.
    at = np.flatnonzero(sentinel_numbers(source, table.sentinel_ids) >= 0)[terms[:, 1]]
    return _Row(text, source, fills, _stitch(source, fills, table), spans, terms, np.stack((at, at + 1), axis=1))


def _read_pair(source: np.ndarray, target: np.ndarray, generated: np.ndarray, restorer: Restorer) -> _Row:
    table = restorer.table
    numbers = sentinel_numbers(source, table.sentinel_ids)
    expected = int(numbers.max(initial=-1)) + 1
    gold = parse_fills(target, table.sentinel_ids, table.eos_id, table.pad_id, expected=expected)
    fills = parse_fills(generated, table.sentinel_ids, table.eos_id, table.pad_id, expected=expected)
    spans, grown = [], 0
    for mark in np.flatnonzero(numbers >= 0).tolist():
        answer = gold.spans[int(numbers[mark])]
        if answer is not None:
            spans.append((int(numbers[mark]), mark + grown, mark + grown + len(answer)))
            grown += len(answer) - 1
    nothing = np.zeros((0, 4), np.int64)
    spans_array = np.array(spans, np.int64).reshape(-1, 3)
    clean = _stitch(source, gold, table)
    return _Row(clean, source, fills, _stitch(source, fills, table), spans_array, nothing, nothing[:, :2])


def _read_whole_text(
    source: np.ndarray, clean: np.ndarray, occurrences: np.ndarray, generated: np.ndarray, restorer: Restorer
) -> _Row:
    """The spans are the damaged places of `clean`; of the `occurrences` (start, end, term id) count those in one."""
    table = restorer.table
    places = Alignment(clean, source)
    damaged = places.changed()
    hit = [(start, end, term) for start, end, term in occurrences.tolist() if any(a < end and start < b for a, b in damaged)]
    spans = _merged([*damaged, *((start, end) for start, end, _ in hit)])
    begins = [start for start, _ in spans]
    terms = [(term, bisect_right(begins, start) - 1, start, end) for start, end, term in hit]
    gaps = [places.place(*spans[k]) for _, k, _, _ in terms]
    written, _ = until_end(generated, table.eos_id, table.pad_id)
    return _Row(
        clean=clean,
        source=source,
        fills=align_fills(clean, generated, spans, table.eos_id, table.pad_id),
        restored=written,
        spans=np.array([(k, *span) for k, span in enumerate(spans)], np.int64).reshape(-1, 3),
        terms=np.array(terms, np.int64).reshape(-1, 4),
        gaps=np.array(gaps, np.int64).reshape(-1, 2),
    )


def _merged(intervals: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Intervals in order, those that overlap or touch made one."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _stitch(source: np.ndarray, fills: Fills, table: TokenTable) -> np.ndarray:
    return stitch(source, fills, sentinel_ids=table.sentinel_ids, eos_id=table.eos_id, pad_id=table.pad_id)


def _numbered(tables: list[np.ndarray]) -> np.ndarray:
    """The tables of all rows under one another, each line with its row's number before it."""
    return np.concatenate([np.insert(table.astype(np.int64), 0, row, axis=1) for row, table in enumerate(tables)])


def _report(batches: list[_Batch], restorer: Restorer) -> RestorationReport:
    glossary = restorer.glossary
    majority: list[TermOutcome] = []
    copies: dict[Literal["recent", "frequent"], list[TermOutcome]] = {"recent": [], "frequent": []}
    for batch in batches:
        sources = [row.source for row in batch.rows]
        gaps = np.concatenate([row.gaps for row in batch.rows])
        majority += score_majority(restorer.majority, batch.answers, sources, gaps, glossary)
        for rule, copied in copies.items():
            copied += score_copy(batch.answers, restorer.split, glossary, rule)
    return RestorationReport(
        outcomes=[outcome for batch in batches for outcome in score_terms(batch.answers, glossary)],
        spans=[outcome for batch in batches for outcome in score_spans(batch.answers, glossary.decode)],
        health=format_health([fills for batch in batches for fills in batch.answers.fills]),
        texts=_text_figures(batches, restorer),
        majority=term_restoration(majority),
        copy=max((term_restoration(copied) for copied in copies.values()), key=lambda rate: rate.rate),
        samples=_samples(batches, restorer),
    )


def _text_figures(batches: list[_Batch], restorer: Restorer) -> TextFigures:
    decode = restorer.glossary.decode
    triples = [(decode(row.clean), decode(row.source), decode(row.restored)) for batch in batches for row in batch.rows]
    return TextFigures(
        cer=character_error_rate((clean, restored) for clean, _, restored in triples),
        cer_reduction=cer_reduction(triples),
        over_edit_share=over_edit_share(triples) if restorer.task == "correct" else math.nan,
    )


def _samples(batches: list[_Batch], restorer: Restorer) -> tuple[Sample, ...]:
    """The examples with the smallest ids, whatever the order of the batches."""
    numbered = [pair for batch in batches for pair in zip(batch.answers.example_ids.tolist(), batch.rows, strict=True)]
    numbered.sort(key=lambda pair: pair[0])
    return tuple(_sample(number, row, restorer) for number, row in numbered[: restorer.samples])


def _sample(example_id: int, row: _Row, restorer: Restorer) -> Sample:
    decode = restorer.glossary.decode
    gold_pieces: list[tuple[np.ndarray | None, bool]] = []
    done = 0
    for _, start, end in row.spans.tolist():
        gold_pieces += [(row.clean[done:start], False), (row.clean[start:end], True)]
        done = end
    gold = bracketed([*gold_pieces, (row.clean[done:], False)], decode)
    if restorer.task == "correct":
        return Sample(example_id, decode(row.source), gold, decode(row.restored))
    numbers = sentinel_numbers(row.source, restorer.table.sentinel_ids)
    shown: list[tuple[np.ndarray | None, bool]] = []
    filled: list[tuple[np.ndarray | None, bool]] = []
    done = 0
    for mark in np.flatnonzero(numbers >= 0).tolist():
        k = int(numbers[mark])
        answer = row.fills.spans[k] if k < len(row.fills.spans) else None
        shown += [(row.source[done:mark], False), (None, True)]
        filled += [(row.source[done:mark], False), (answer, True)]
        done = mark + 1
    rest = (row.source[done:], False)
    return Sample(example_id, bracketed([*shown, rest], decode), gold, bracketed([*filled, rest], decode))
