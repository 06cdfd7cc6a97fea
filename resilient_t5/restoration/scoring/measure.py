"""Restore a fixed set of evaluation examples by greedy decoding and score the outputs.

The caller chooses the examples, their damage and their order; no random state is used. Three kinds of example are converted
to one form, clean ids with spans in them:

* a chunk with masked spans: the spans of the corruption;
* a chunk with noise only, for a model that writes the whole text: its damaged places are the spans;
* a pair that was masked elsewhere: the clean text is its source with the answers of its target; it has no known terms.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from resilient_t5.data.batches import EvaluationBatch, MicroBatch
from resilient_t5.data.corruption.corruption import Corrupted
from resilient_t5.data.corruption.token_table import TokenTable
from resilient_t5.data.ragged import Split
from resilient_t5.restoration.decoder import generate
from resilient_t5.restoration.scoring.baselines import MajorityBaseline, copy_guesses, gap_contexts, terms_of_example
from resilient_t5.restoration.scoring.metrics import (
    Glossary,
    Predictions,
    Rate,
    SpanOutcome,
    TermOutcome,
    cer_reduction,
    character_error_rate,
    finite_or_none,
    masked_character_error_rate,
    over_edit_share,
    ratio,
    score_spans,
    score_terms,
    span_match,
    term_restoration,
    term_restoration_by,
    term_restoration_macro,
)
from resilient_t5.restoration.sentinels import (
    Alignment,
    ParsedOutput,
    bracketed,
    insert_answers,
    parse_output,
    parse_whole_text,
    sentinel_numbers,
    until_end,
)

COPY_RULES: tuple[Literal["recent", "frequent"], ...] = ("recent", "frequent")
SLACK_TOKENS = 16
"""Tokens that an output may exceed the longest gold target of its batch by; limits the cost of an untrained model."""


@dataclass(frozen=True, eq=False)
class Restorer:
    """Everything a measurement needs except the model and the examples."""

    split: Split
    """The split that the examples come from."""
    table: TokenTable
    glossary: Glossary
    majority: MajorityBaseline
    task: Literal["restore", "correct"]
    max_target_tokens: int
    """Maximum length of an output, end token included."""
    samples: int
    """Number of samples in a report: the examples with the smallest ids."""


@dataclass(frozen=True)
class Sample:
    """One restored example as text; gaps and answers in square brackets, `[?]` without an answer."""

    example_id: int
    source: str
    gold: str
    restored: str


@dataclass(frozen=True, eq=False)
class RestorationReport:
    """Restoration results for a fixed set of examples; shares and rates are nan without trials."""

    outcomes: list[TermOutcome]
    spans: list[SpanOutcome]
    outputs: Sequence[ParsedOutput]
    """Parsed output of each example."""
    cer: float
    """Character error rate of the restored texts, edits per clean character."""
    cer_reduction: float
    """1 - CER of the restored over CER of the damaged texts; negative if restoring adds errors."""
    over_edit_share: float
    """Edits outside the damage over the characters there; nan for a model that fills gaps and cannot over-edit."""
    majority: Rate
    """Term restoration rate of the majority guess."""
    copy: Rate
    """Term restoration rate of copying a visible term, by the better of its two rules."""
    samples: tuple[Sample, ...]

    @property
    def term_rate(self) -> float | None:
        """The term restoration rate; None if no term was masked."""
        return finite_or_none(term_restoration(self.outcomes).rate)

    def as_row(self) -> dict[str, float | int | None]:
        """Return the results as JSON numbers; None without trials, and no key for an empty band."""
        exact = term_restoration(self.outcomes)
        by_training = term_restoration_by(self.outcomes, "training")
        by_sentinel = term_restoration_by(self.outcomes, "sentinel")
        numbers: dict[str, float] = {
            "term_rate": exact.rate,
            "term_rate_low": exact.low,
            "term_rate_high": exact.high,
            "term_rate_normalised": term_restoration(self.outcomes, "normalised").rate,
            "term_rate_near": term_restoration(self.outcomes, "near").rate,
            "term_rate_macro": term_restoration_macro(self.outcomes).rate,
            **{f"term_rate_{band}": rate.rate for band, rate in by_training.items()},
            **{f"term_rate_sentinel_{band}": rate.rate for band, rate in by_sentinel.items()},
            "majority_rate": self.majority.rate,
            "copy_rate": self.copy.rate,
            "span_match": span_match(self.spans).rate,
            "span_match_term": span_match(self.spans, "term").rate,
            "span_match_random": span_match(self.spans, "random").rate,
            "cer_masked": masked_character_error_rate(self.spans),
            "cer": self.cer,
            "cer_reduction": self.cer_reduction,
            "over_edit_share": self.over_edit_share,
            "format_error_share": ratio(sum(output.faulty for output in self.outputs), len(self.outputs)),
            "early_end_share": ratio(sum(output.early_end for output in self.outputs), len(self.outputs)),
        }
        counts = {
            "n": exact.n,
            "n_terms": len({outcome.term_id for outcome in self.outcomes}),
            "n_unseen": sum(not outcome.seen for outcome in self.outcomes),
            "n_spans": len(self.spans),
            "n_examples": len(self.outputs),
            "n_documents": len({outcome.document for outcome in self.outcomes}),
        }
        return {**{name: finite_or_none(value) for name, value in numbers.items()}, **counts}


@dataclass(frozen=True, eq=False)
class _Row:
    """One restored example."""

    clean: np.ndarray
    source: np.ndarray
    output: ParsedOutput
    restored: np.ndarray
    spans: np.ndarray
    """Int (spans, 3): sentinel k, start, end in `clean`."""
    terms: np.ndarray
    """Int (terms, 4): term id, sentinel k, start, end in `clean`."""
    gaps: np.ndarray
    """Int (terms, 2): [start, end) of the gap of each masked term in `source`."""


def measure_restoration(model: Any, batches: Sequence[EvaluationBatch], restorer: Restorer) -> RestorationReport:
    """Restore and score every example of `batches`.

    Args:
        model: the bare T5 or mT5; the caller provides the autocast context.
        batches: micro-batches with their damage, the same rows in the same order.
        restorer: vocabulary, terms, baselines.
    """
    generated = []
    for batch in batches:
        generated_BT = write_answers(model, batch.micro_batch, restorer, None)
        assert generated_BT is not None, "generation without a stop signal"
        generated.append((np.asarray(batch.micro_batch.example_ids), batch.corrupted, generated_BT))
    return score_generated(generated, restorer)


def write_answers(
    model: Any, micro_batch: MicroBatch, restorer: Restorer, should_stop: Callable[[], bool] | None
) -> np.ndarray | None:
    """Decode a micro-batch to int (B, T) with T at most `longest_answer`; None if `should_stop` returned True."""
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
    """Maximum number of tokens in an output for this micro-batch."""
    return min(restorer.max_target_tokens, micro_batch.labels_BT.shape[1] + SLACK_TOKENS)


def score_generated(generated: Sequence[tuple[np.ndarray, Corrupted, np.ndarray]], restorer: Restorer) -> RestorationReport:
    """Score generated outputs.

    Args:
        generated: for each batch the example ids (B,), their damage, and the generated ids, int (B, T); the same rows in
            the same order.
        restorer: vocabulary, terms, baselines.
    """
    glossary, split = restorer.glossary, restorer.split
    ids = np.concatenate([example_ids for example_ids, _, _ in generated])
    rows = [
        _read_row(int(number), row, corrupted, generated_BT[row], restorer)
        for example_ids, corrupted, generated_BT in generated
        for row, number in enumerate(example_ids.tolist())
    ]
    predictions = Predictions(
        example_ids=ids,
        documents=np.asarray(split.documents[ids]),
        clean=[row.clean for row in rows],
        spans=_numbered([row.spans for row in rows]),
        masked_terms=_numbered([row.terms for row in rows]),
        outputs=[row.output for row in rows],
    )
    gaps = np.concatenate([row.gaps for row in rows])
    contexts = gap_contexts(predictions.masked_terms[:, 0], [row.source for row in rows], gaps)
    majority = score_terms(predictions, glossary, restorer.majority.guess(contexts))
    copied = [score_terms(predictions, glossary, copy_guesses(predictions, split, rule)) for rule in COPY_RULES]
    decode = glossary.decode
    texts = [(decode(row.clean), decode(row.source), decode(row.restored)) for row in rows]
    by_id = np.argsort(ids, kind="stable")[: restorer.samples].tolist()
    return RestorationReport(
        outcomes=score_terms(predictions, glossary),
        spans=score_spans(predictions, decode),
        outputs=predictions.outputs,
        cer=character_error_rate((clean, restored) for clean, _, restored in texts),
        cer_reduction=cer_reduction(texts),
        over_edit_share=over_edit_share(texts) if restorer.task == "correct" else math.nan,
        majority=term_restoration(majority),
        copy=max(map(term_restoration, copied), key=lambda rate: rate.rate),
        samples=tuple(_sample(int(ids[row]), rows[row], restorer) for row in by_id),
    )


def _numbered(tables: list[np.ndarray]) -> np.ndarray:
    """Concatenate the tables of all rows, each line preceded by the number of its row."""
    return np.concatenate([np.insert(table.astype(np.int64), 0, row, axis=1) for row, table in enumerate(tables)])


def _read_row(example_id: int, row: int, corrupted: Corrupted, generated: np.ndarray, restorer: Restorer) -> _Row:
    split, table = restorer.split, restorer.table
    source = corrupted.source[corrupted.source_offsets[row] : corrupted.source_offsets[row + 1]]
    target = corrupted.target[corrupted.target_offsets[row] : corrupted.target_offsets[row + 1]]
    source, _ = until_end(source, table.eos_id, table.pad_id)
    is_pair = split.pairs[example_id] >= 0
    if restorer.task == "correct":
        clean, _ = until_end(target, table.eos_id, table.pad_id)
        occurrences = np.zeros((0, 3), np.int64) if is_pair else terms_of_example(split, example_id)
        return _read_whole_text(source, clean, occurrences, generated, table)
    if is_pair:
        return _read_pair(source, target, generated, table)
    clean = np.asarray(split.tokens[split.offsets[example_id] : split.offsets[example_id + 1]]).astype(np.int32)
    spans = corrupted.spans[corrupted.spans[:, 0] == row][:, 1:]
    terms = corrupted.masked_terms[corrupted.masked_terms[:, 0] == row][:, 1:]
    output = _parse(generated, table, expected=len(spans))
    # The sentinels of a source are in the order of their numbers, so number k is the k-th mark.
    at = np.flatnonzero(sentinel_numbers(source, table.sentinel_ids) >= 0)[terms[:, 1]]
    return _Row(clean, source, output, _restored(source, output, table), spans, terms, np.stack((at, at + 1), axis=1))


def _read_pair(source: np.ndarray, target: np.ndarray, generated: np.ndarray, table: TokenTable) -> _Row:
    numbers = sentinel_numbers(source, table.sentinel_ids)
    expected = int(numbers.max(initial=-1)) + 1
    gold, output = _parse(target, table, expected), _parse(generated, table, expected)
    spans, shift = [], 0
    for mark in np.flatnonzero(numbers >= 0).tolist():
        answer = gold.spans[int(numbers[mark])]
        if answer is not None:
            spans.append((int(numbers[mark]), mark + shift, mark + shift + len(answer)))
            shift += len(answer) - 1
    no_terms = np.zeros((0, 4), np.int64)
    return _Row(
        clean=_restored(source, gold, table),
        source=source,
        output=output,
        restored=_restored(source, output, table),
        spans=np.array(spans, np.int64).reshape(-1, 3),
        terms=no_terms,
        gaps=no_terms[:, :2],
    )


def _read_whole_text(
    source: np.ndarray, clean: np.ndarray, occurrences: np.ndarray, generated: np.ndarray, table: TokenTable
) -> _Row:
    """The spans are the damaged places of `clean`; those of the `occurrences` (start, end, term id) that overlap one count."""
    alignment = Alignment(clean, source)
    damaged = [(start, end) for start, end, _, _ in alignment.replacements()]
    hit = [(start, end, term) for start, end, term in occurrences.tolist() if any(a < end and start < b for a, b in damaged)]
    spans = _merged([*damaged, *((start, end) for start, end, _ in hit)])
    starts = [start for start, _ in spans]
    terms = [(term, bisect_right(starts, start) - 1, start, end) for start, end, term in hit]
    gaps = [alignment.place(*spans[k]) for _, k, _, _ in terms]
    return _Row(
        clean=clean,
        source=source,
        output=parse_whole_text(clean, generated, spans, table.eos_id, table.pad_id),
        restored=until_end(generated, table.eos_id, table.pad_id)[0],
        spans=np.array([(k, *span) for k, span in enumerate(spans)], np.int64).reshape(-1, 3),
        terms=np.array(terms, np.int64).reshape(-1, 4),
        gaps=np.array(gaps, np.int64).reshape(-1, 2),
    )


def _merged(intervals: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sort intervals and merge those that overlap or touch."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _parse(generated: np.ndarray, table: TokenTable, expected: int) -> ParsedOutput:
    return parse_output(generated, table.sentinel_ids, table.eos_id, table.pad_id, expected)


def _restored(source: np.ndarray, output: ParsedOutput, table: TokenTable) -> np.ndarray:
    return insert_answers(source, output, sentinel_ids=table.sentinel_ids, eos_id=table.eos_id, pad_id=table.pad_id)


def _sample(example_id: int, row: _Row, restorer: Restorer) -> Sample:
    decode = restorer.glossary.decode
    spans = [(start, end, row.clean[start:end]) for _, start, end in row.spans.tolist()]
    gold = bracketed(_with_answers(row.clean, spans), decode)
    if restorer.task == "correct":
        return Sample(example_id, decode(row.source), gold, decode(row.restored))
    numbers = sentinel_numbers(row.source, restorer.table.sentinel_ids)
    marks = [(mark, int(numbers[mark])) for mark in np.flatnonzero(numbers >= 0).tolist()]
    answers = row.output.spans
    shown = _with_answers(row.source, [(mark, mark + 1, None) for mark, _ in marks])
    filled = _with_answers(row.source, [(mark, mark + 1, answers[k] if k < len(answers) else None) for mark, k in marks])
    return Sample(example_id, bracketed(shown, decode), gold, bracketed(filled, decode))


def _with_answers(
    ids: np.ndarray, answers: Sequence[tuple[int, int, np.ndarray | None]]
) -> list[tuple[np.ndarray | None, bool]]:
    """Pieces of `ids`, and whether they are answers, with each [start, end) replaced by its answer."""
    pieces: list[tuple[np.ndarray | None, bool]] = []
    done = 0
    for start, end, answer in answers:
        pieces += [(ids[done:start], False), (answer, True)]
        done = end
    return [*pieces, (ids[done:], False)]
