"""Metrics of restoration: terms, spans, characters and output format, with confidence intervals.

**Term restoration rate**: the share of masked term occurrences for which the text predicted for the masked span contains
the term exactly. `normalised` compares after NFKC, case folding and removal of spaces; `near` accepts a normalised edit
similarity of at least 0.8. A gap whose sentinel is missing is a failure, never skipped.

Ids are those of the store; `decode` turns them into text, so a metaspace becomes a space and byte pieces are joined.

Occurrences within a document are not independent, so the 95 % interval of a rate comes from resampling whole documents
with replacement (cluster bootstrap, percentile interval; Efron and Tibshirani 1993, "An Introduction to the Bootstrap").
The random generator has a fixed key, so equal outcomes always give equal intervals.

Shapes: D documents, R resamples, N trials, G groups.
"""

import math
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rapidfuzz.distance import Levenshtein

from resilient_t5.restoration.sentinels import ParsedOutput

RESAMPLES = 1000
BOOTSTRAP_KEY = 0x7E570
BLOCK_NUMBERS = 2**20
"""Maximum numbers in one block of resamples: 8 MiB of int64."""
NO_TERM = -1

Decode = Callable[[np.ndarray], str]
Strictness = Literal["exact", "normalised", "near"]
NEAR_SIMILARITY = 0.8
BandBy = Literal["training", "length", "sentinel", "frequency", "digits"]
# Name of each band and the first value above it. Lengths are in characters, frequencies in training occurrences.
SENTINEL_BANDS = (("00_09", 10), ("10_26", 27), ("27_up", math.inf))
LENGTH_BANDS = (("01_02", 3), ("03_04", 5), ("05_08", 9), ("09_up", math.inf))
FREQUENCY_BANDS = (("0", 1), ("1_9", 10), ("10_99", 100), ("100_up", math.inf))
BAND_NAMES: dict[BandBy, tuple[str, ...]] = {
    "training": ("seen", "unseen"),
    "length": tuple(name for name, _ in LENGTH_BANDS),
    "sentinel": tuple(name for name, _ in SENTINEL_BANDS),
    "frequency": tuple(name for name, _ in FREQUENCY_BANDS),
    "digits": ("with", "without"),
}


@dataclass(frozen=True)
class Rate:
    """A share of successes; `rate`, `low` and `high` are nan without trials."""

    rate: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of the 95 % interval."""
    n: int
    """Number of trials; for a mean over terms, the number of terms."""


NO_TRIALS = Rate(math.nan, math.nan, math.nan, 0)


def rate_over_documents(success: np.ndarray, documents: np.ndarray) -> Rate:
    """Return the share of successes with its interval over documents; [0, 1] if all trials come from one document.

    Args:
        success: bool (N,).
        documents: int (N,), the document of each trial.
    """
    if len(success) == 0:
        return NO_TRIALS
    _, document = np.unique(documents, return_inverse=True)
    trials_D = np.bincount(document)
    successes_D = np.bincount(document, weights=success)
    if len(trials_D) < 2:
        return Rate(float(np.mean(success)), 0.0, 1.0, len(success))
    rates = [(weights_RD @ successes_D) / (weights_RD @ trials_D) for weights_RD in document_weights(len(trials_D))]
    return Rate(float(np.mean(success)), *_interval(rates), len(success))


def macro_rate(success: np.ndarray, documents: np.ndarray, groups: np.ndarray) -> Rate:
    """Return the mean over groups (terms) of the share of successes in each group, with its interval over documents.

    A group that does not occur in a resample is left out of the mean of that resample.

    Args:
        success: bool (N,).
        documents: int (N,).
        groups: int (N,), the term of each trial.
    """
    if len(success) == 0:
        return NO_TRIALS
    _, group = np.unique(groups, return_inverse=True)
    mean = float(np.mean(np.bincount(group, weights=success) / np.bincount(group)))
    names, document = np.unique(documents, return_inverse=True)
    if len(names) < 2:
        return Rate(mean, 0.0, 1.0, int(group.max()) + 1)
    by_group = np.argsort(group, kind="stable")
    firsts = np.searchsorted(group[by_group], np.arange(group.max() + 1))
    means = []
    for weights_RD in document_weights(len(names), len(success)):
        weights_RN = weights_RD[:, document[by_group]]
        trials_RG = np.add.reduceat(weights_RN, firsts, axis=1)
        successes_RG = np.add.reduceat(weights_RN * success[by_group], firsts, axis=1)
        present_RG = trials_RG > 0
        rates_RG = successes_RG / np.where(present_RG, trials_RG, 1)
        means.append(rates_RG.sum(1) / present_RG.sum(1))
    return Rate(mean, *_interval(means), len(firsts))


def document_weights(documents: int, columns: int = 0) -> Iterator[np.ndarray]:
    """Draw 1000 resamples of `documents` documents; yield how often each contains each document, int64 (R, D) blocks.

    Args:
        documents: number of documents, and of draws in each resample.
        columns: numbers that the caller computes for each resample; limits the size of a block.
    """
    generator = np.random.Generator(np.random.Philox(key=BOOTSTRAP_KEY))
    per_block = max(1, BLOCK_NUMBERS // max(documents, columns))
    for first in range(0, RESAMPLES, per_block):
        count = min(per_block, RESAMPLES - first)
        drawn = generator.integers(0, documents, (count, documents)) + np.arange(count)[:, None] * documents
        yield np.bincount(drawn.ravel(), minlength=count * documents).reshape(count, documents)


def _interval(blocks: list[np.ndarray]) -> tuple[float, float]:
    low, high = np.percentile(np.concatenate(blocks), [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True, eq=False)
class Glossary:
    """The terms of a corpus, and the decoding of its ids."""

    terms: Sequence[str]
    """Text of term id t at place t."""
    train_counts: np.ndarray
    """Int (terms,): occurrences of each term in the training split."""
    decode: Decode
    """Ids of the store -> text; sentinels and other special tokens are skipped."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """Masked examples and the parsed outputs of the model; row r of every field is one example."""

    example_ids: np.ndarray
    """Int (rows,)."""
    documents: np.ndarray
    """Int (rows,): the document each example was cut from."""
    clean: Sequence[np.ndarray]
    """Ids of each undamaged chunk."""
    spans: np.ndarray
    """Int (spans, 4): row, sentinel k, token start, token end in the clean chunk."""
    masked_terms: np.ndarray
    """Int (terms, 5): row, term id, sentinel k, token start, token end in the clean chunk."""
    outputs: Sequence[ParsedOutput]

    def answer(self, row: int, k: int) -> np.ndarray | None:
        """Ids written for sentinel `k` of `row`; None when the sentinel is missing."""
        spans = self.outputs[row].spans
        return spans[k] if k < len(spans) else None


@dataclass(frozen=True)
class TermOutcome:
    """Result for one masked term occurrence."""

    example_id: int
    document: int
    term_id: int
    sentinel: int
    gold: str
    predicted: str | None
    """Text written for the span that held the term; None when its sentinel is missing."""
    exact: bool
    normalised: bool
    near: bool
    train_count: int

    @property
    def seen(self) -> bool:
        """Whether the term occurs in the training split."""
        return self.train_count > 0


@dataclass(frozen=True)
class SpanOutcome:
    """Gold and predicted text of one masked span."""

    document: int
    held_term: bool
    gold: str
    predicted: str | None


def count_terms(occurrences: np.ndarray, terms: int) -> np.ndarray:
    """Count the occurrences of each of `terms` term ids in a split's `terms` array (n, 4); int64 (terms,)."""
    return np.bincount(np.asarray(occurrences[:, 3]), minlength=terms)


def gold_text(term: str, decoded: str) -> str:
    """Return the text that an answer must contain.

    This is the listed term, or the decoded span if the tokenizer cannot reproduce the term (it may fold full-width
    characters, for example).
    """
    return term if term in decoded else decoded.strip()


def normalise(text: str) -> str:
    """Apply NFKC and case folding and remove white space."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def is_near(gold: str, predicted: str) -> bool:
    """Whether `predicted`, or a substring as long as `gold`, has a normalised edit similarity of at least 0.8.

    Substrings count because the masked span may have included neighbours of the term. Both texts are normalised.
    """
    width = len(gold)
    candidates = [predicted[at : at + width] for at in range(len(predicted) - width + 1)] or [predicted]
    return any(Levenshtein.normalized_similarity(gold, text) >= NEAR_SIMILARITY for text in candidates)


def judge_answer(gold: str, predicted: str | None) -> tuple[bool, bool, bool]:
    """Return (exact, normalised, near) for one answer; each implies the next. An empty gold text is never restored."""
    if predicted is None or not gold:
        return False, False, False
    exact = gold in predicted
    plain_gold, plain = normalise(gold), normalise(predicted)
    normalised = exact or (bool(plain_gold) and plain_gold in plain)
    return exact, normalised, normalised or (bool(plain_gold) and is_near(plain_gold, plain))


def score_terms(predictions: Predictions, glossary: Glossary, guesses: np.ndarray | None = None) -> list[TermOutcome]:
    """Return one outcome for each row of `predictions.masked_terms`, in order.

    Args:
        predictions: masked terms and the outputs of the model.
        glossary: terms and decoding.
        guesses: int (terms,): score these term ids instead of the outputs; `NO_TERM` for no guess.
    """
    outcomes = []
    for number, (row, term_id, k, start, end) in enumerate(np.asarray(predictions.masked_terms).tolist()):
        gold = gold_text(glossary.terms[term_id], glossary.decode(predictions.clean[row][start:end]))
        if guesses is None:
            ids = predictions.answer(row, k)
            predicted = None if ids is None else glossary.decode(ids)
        else:
            guess = int(guesses[number])
            # The right term counts even if the tokenizer spells the gold text differently.
            predicted = None if guess == NO_TERM else gold if guess == term_id else glossary.terms[guess]
        exact, normalised, near = judge_answer(gold, predicted)
        outcomes.append(
            TermOutcome(
                example_id=int(predictions.example_ids[row]),
                document=int(predictions.documents[row]),
                term_id=term_id,
                sentinel=k,
                gold=gold,
                predicted=predicted,
                exact=exact,
                normalised=normalised,
                near=near,
                train_count=int(glossary.train_counts[term_id]),
            )
        )
    return outcomes


def score_spans(predictions: Predictions, decode: Decode) -> list[SpanOutcome]:
    """Return one outcome for each row of `predictions.spans`, in order."""
    with_term = {(row, k) for row, _, k, _, _ in np.asarray(predictions.masked_terms).tolist()}
    outcomes = []
    for row, k, start, end in np.asarray(predictions.spans).tolist():
        ids = predictions.answer(row, k)
        gold = decode(predictions.clean[row][start:end]).strip()
        predicted = None if ids is None else decode(ids).strip()
        outcomes.append(SpanOutcome(int(predictions.documents[row]), (row, k) in with_term, gold, predicted))
    return outcomes


def term_restoration(outcomes: Sequence[TermOutcome], strictness: Strictness = "exact") -> Rate:
    """Term restoration rate over occurrences, with its 95 % interval over documents."""
    success = np.array([getattr(outcome, strictness) for outcome in outcomes], bool)
    return rate_over_documents(success, _documents(outcomes))


def term_restoration_macro(outcomes: Sequence[TermOutcome]) -> Rate:
    """Mean over terms of the exact rate of each term; `n` counts the terms."""
    success = np.array([outcome.exact for outcome in outcomes], bool)
    return macro_rate(success, _documents(outcomes), np.array([outcome.term_id for outcome in outcomes], np.int64))


def term_restoration_by(outcomes: Sequence[TermOutcome], by: BandBy) -> dict[str, Rate]:
    """Exact rate of every band with an occurrence, in the order of the bands.

    Args:
        outcomes: scored terms.
        by: `training` (seen, unseen), `length` of the gold term in characters, `sentinel` index, `frequency` in the
            training split, `digits` (with, without).
    """
    by_band: dict[str, list[TermOutcome]] = {name: [] for name in BAND_NAMES[by]}
    for outcome in outcomes:
        by_band[_band(outcome, by)].append(outcome)
    return {name: term_restoration(own) for name, own in by_band.items() if own}


def _band(outcome: TermOutcome, by: BandBy) -> str:
    if by == "training":
        return "seen" if outcome.seen else "unseen"
    if by == "digits":
        return "with" if any(character.isdigit() for character in outcome.gold) else "without"
    bands, value = {
        "length": (LENGTH_BANDS, len(outcome.gold)),
        "sentinel": (SENTINEL_BANDS, outcome.sentinel),
        "frequency": (FREQUENCY_BANDS, outcome.train_count),
    }[by]
    return next(name for name, end in bands if value < end)


def span_match(outcomes: Sequence[SpanOutcome], which: Literal["all", "term", "random"] = "all") -> Rate:
    """Share of the spans (all, those with a term, the others) whose answer equals the gold text."""
    chosen = [outcome for outcome in outcomes if which == "all" or outcome.held_term == (which == "term")]
    success = np.array([outcome.gold == outcome.predicted for outcome in chosen], bool)
    return rate_over_documents(success, _documents(chosen))


def _documents(outcomes: Sequence[TermOutcome] | Sequence[SpanOutcome]) -> np.ndarray:
    return np.array([outcome.document for outcome in outcomes], np.int64)


def character_error_rate(pairs: Iterable[tuple[str, str]]) -> float:
    """Sum of edits over sum of gold characters of (gold, predicted) pairs; nan without a gold character."""
    edits = characters = 0
    for gold, predicted in pairs:
        edits += Levenshtein.distance(gold, predicted)
        characters += len(gold)
    return ratio(edits, characters)


def masked_character_error_rate(outcomes: Iterable[SpanOutcome]) -> float:
    """Character error rate of the masked spans only; a missing answer counts as empty."""
    return character_error_rate((outcome.gold, outcome.predicted or "") for outcome in outcomes)


def cer_reduction(triples: Iterable[tuple[str, str, str]]) -> float:
    """1 - CER after / CER before, over (clean, damaged, restored) texts; nan if nothing was damaged.

    1 means that everything was restored, 0 no improvement; negative values mean that restoring added errors.
    """
    before = after = 0
    for clean, damaged, restored in triples:
        before += Levenshtein.distance(clean, damaged)
        after += Levenshtein.distance(clean, restored)
    return 1.0 - ratio(after, before)


def over_edit_share(triples: Iterable[tuple[str, str, str]]) -> float:
    """Edits outside the damage over undamaged characters, over (clean, damaged, restored) texts.

    A clean character is undamaged if the damaged text keeps it; a position between two of them is outside the damage if
    nothing was inserted there. nan if no character was kept.
    """
    edits = characters = 0
    for clean, damaged, restored in triples:
        kept = np.zeros(len(clean), bool)
        gap_outside = np.ones(len(clean) + 1, bool)
        for block in Levenshtein.opcodes(clean, damaged):
            kept[block.src_start : block.src_end] = block.tag == "equal"
            if block.tag != "equal":
                gap_outside[block.src_start : block.src_end + 1] = False
        characters += int(kept.sum())
        for edit in Levenshtein.editops(clean, restored):
            edits += bool(gap_outside[edit.src_pos] if edit.tag == "insert" else kept[edit.src_pos])
    return ratio(edits, characters)


def ratio(part: float, whole: float) -> float:
    """Return part / whole; nan for an empty whole."""
    return part / whole if whole else math.nan


def finite_or_none(value: float) -> float | None:
    """Return the value for JSON, which has no nan."""
    return float(value) if math.isfinite(value) else None
