"""What restoration is judged by: terms, spans, characters, format; and rates with their intervals.

**Term restoration rate**: over masked term occurrences; a success if and only if the text predicted for the span that
held the term contains the gold term, exactly. `normalised` compares after NFKC, case folding and without spaces, `near`
allows a normalised edit similarity of at least 0.8. A gap without its sentinel counts as failed, never as skipped.

Ids are those of the store; text comes from a `decode` that maps them, so a metaspace is a space and byte pieces join.

A rate is successes over trials. Occurrences of one document are not independent, so its 95 % interval comes from
resampling whole documents with replacement (the cluster bootstrap; Efron and Tibshirani 1993, "An Introduction to the
Bootstrap", percentile interval). The resamples are drawn from a generator with a fixed key, so equal outcomes always give
equal intervals.
"""

import math
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rapidfuzz.distance import Levenshtein

from resilient_t5.restoration.sentinels import Fills

RESAMPLES = 1000
BOOTSTRAP_KEY = 0x7E570
# Most numbers of one block of resamples: 8 MiB of int64.
BLOCK_NUMBERS = 2**20


@dataclass(frozen=True)
class Rate:
    """A share of successes; `rate`, `low` and `high` are nan when there was nothing to count."""

    rate: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of the 95 % interval."""
    n: int
    """Trials; for a mean over terms, the terms."""

    def text(self) -> str:
        """Such as `0.520 [0.480, 0.560] n=612`."""
        return f"{self.rate:.3f} [{self.low:.3f}, {self.high:.3f}] n={self.n}" if self.n else "- n=0"


NOTHING = Rate(math.nan, math.nan, math.nan, 0)


def rate_over_documents(success: np.ndarray, documents: np.ndarray) -> Rate:
    """Share of successes, with its interval over documents.

    Args:
        success: bool (n,), one per trial.
        documents: int (n,), the document of each trial.

    Returns:
        The rate. The interval is [0, 1] when all trials come from one document, which tells nothing about others.
    """
    if len(success) == 0:
        return NOTHING
    _, document = np.unique(documents, return_inverse=True)
    trials_D = np.bincount(document)
    successes_D = np.bincount(document, weights=success)
    low, high = bootstrap_interval(successes_D, trials_D)
    return Rate(float(np.mean(success)), low, high, len(success))


def bootstrap_interval(successes_D: np.ndarray, trials_D: np.ndarray) -> tuple[float, float]:
    """95 % interval of sum(successes) / sum(trials) when the D documents are drawn anew with replacement."""
    if len(trials_D) < 2:
        return 0.0, 1.0
    rates = [
        (weights_RD @ successes_D) / (weights_RD @ trials_D) for weights_RD in document_weights(len(trials_D), len(trials_D))
    ]
    return _percentiles(np.concatenate(rates))


def macro_rate(success: np.ndarray, documents: np.ndarray, groups: np.ndarray) -> Rate:
    """Mean over groups (terms) of each group's share of successes, with its interval over documents.

    A resample in which a group does not occur leaves that group out of its mean.

    Args:
        success: bool (n,).
        documents: int (n,).
        groups: int (n,), the term of each trial.
    """
    if len(success) == 0:
        return NOTHING
    _, group = np.unique(groups, return_inverse=True)
    mean = float(np.mean(np.bincount(group, weights=success) / np.bincount(group)))
    count_D, document = np.unique(documents, return_inverse=True)
    if len(count_D) < 2:
        return Rate(mean, 0.0, 1.0, int(group.max()) + 1)
    by_group = np.argsort(group, kind="stable")
    firsts = np.searchsorted(group[by_group], np.arange(group.max() + 1))
    resampled = []
    for weights_RD in document_weights(len(count_D), len(success)):
        weights_RN = weights_RD[:, document[by_group]]
        trials_RG = np.add.reduceat(weights_RN, firsts, axis=1)
        successes_RG = np.add.reduceat(weights_RN * success[by_group], firsts, axis=1)
        present_RG = trials_RG > 0
        rates_RG = successes_RG / np.where(present_RG, trials_RG, 1)
        resampled.append(rates_RG.sum(1) / present_RG.sum(1))
    return Rate(mean, *_percentiles(np.concatenate(resampled)), len(firsts))


def document_weights(documents: int, columns: int) -> Iterator[np.ndarray]:
    """How often each resample draws each document, in blocks int64 (R, documents); 1000 resamples in all.

    Args:
        documents: documents to draw from; each resample draws as many.
        columns: numbers that the caller needs for each resample; bounds the size of a block.
    """
    draws = np.random.Generator(np.random.Philox(key=BOOTSTRAP_KEY))
    per_block = max(1, BLOCK_NUMBERS // max(documents, columns))
    for first in range(0, RESAMPLES, per_block):
        count = min(per_block, RESAMPLES - first)
        drawn = draws.integers(0, documents, (count, documents)) + np.arange(count)[:, None] * documents
        yield np.bincount(drawn.ravel(), minlength=count * documents).reshape(count, documents)


def _percentiles(resampled: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)


Decode = Callable[[np.ndarray], str]
Strictness = Literal["exact", "normalised", "near"]

NEAR_SIMILARITY = 0.8
BandBy = Literal["training", "length", "sentinel", "frequency", "digits"]
# Each band: its name and the first value above it. Lengths are in characters, frequencies in training occurrences.
SENTINEL_BANDS = (("00_09", 10), ("10_26", 27), ("27_up", math.inf))
LENGTH_BANDS = (("01_02", 3), ("03_04", 5), ("05_08", 9), ("09_up", math.inf))
FREQUENCY_BANDS = (("0", 1), ("1_9", 10), ("10_99", 100), ("100_up", math.inf))


@dataclass(frozen=True, eq=False)
class Glossary:
    """What scoring must know of the terms, and of text."""

    terms: Sequence[str]
    """Text of term id t at place t."""
    train_counts: np.ndarray
    """Int (terms,): occurrences of each term in the training split."""
    decode: Decode
    """Ids of the store -> text; sentinels and other specials are skipped."""


@dataclass(frozen=True, eq=False)
class Answers:
    """Restored examples: what was masked, and what the model wrote; row r of everything is one example."""

    example_ids: np.ndarray
    """Int (rows,)."""
    documents: np.ndarray
    """Int (rows,): the document each example was cut from."""
    clean: Sequence[np.ndarray]
    """Ids of each undamaged chunk."""
    spans: np.ndarray
    """Int (m, 4): row, sentinel k, token start, token end in the clean chunk."""
    masked_terms: np.ndarray
    """Int (t, 5): row, term id, sentinel k, token start, token end in the clean chunk."""
    fills: Sequence[Fills]
    """What was read from each generated row."""

    def answer(self, row: int, k: int) -> np.ndarray | None:
        """Ids written for sentinel `k` of `row`; None when the sentinel is missing."""
        spans = self.fills[row].spans
        return spans[k] if k < len(spans) else None


@dataclass(frozen=True)
class TermOutcome:
    """One masked term occurrence and what became of it."""

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
    """One masked span and what was written for it."""

    example_id: int
    document: int
    sentinel: int
    held_term: bool
    gold: str
    predicted: str | None


@dataclass(frozen=True)
class FormatHealth:
    """Faults of the generated rows; the counts are over all rows."""

    rows: int
    expected: int
    faulty_rows: int
    early_end_rows: int
    cut_off_rows: int
    missing: int
    duplicate: int
    out_of_order: int
    unknown: int
    stray_rows: int

    @property
    def error_share(self) -> float:
        """Share of the rows with any fault."""
        return ratio(self.faulty_rows, self.rows)

    @property
    def early_end_share(self) -> float:
        """Share of the rows that ended before their last sentinel."""
        return ratio(self.early_end_rows, self.rows)


def count_terms(occurrences: np.ndarray, terms: int) -> np.ndarray:
    """Occurrences of each of `terms` term ids in a split's `terms` array (n, 4); int64 (terms,)."""
    return np.bincount(np.asarray(occurrences[:, 3]), minlength=terms)


def gold_text(term: str, decoded: str) -> str:
    """The text that an answer must contain.

    That is the term as listed; where the tokenizer cannot spell it so (it folds full-width characters, for example),
    the decoded span itself.
    """
    return term if term in decoded else decoded.strip()


def normalise(text: str) -> str:
    """NFKC, case-folded, without white space."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def is_near(gold: str, predicted: str) -> bool:
    """Whether `predicted`, or a stretch of it as long as `gold`, has a normalised edit similarity of at least 0.8.

    A stretch counts because the span that held the term may have held its neighbours too. Both texts are normalised.
    """
    width = len(gold)
    stretches = [predicted[at : at + width] for at in range(len(predicted) - width + 1)] or [predicted]
    return any(Levenshtein.normalized_similarity(gold, text) >= NEAR_SIMILARITY for text in stretches)


def judge_answer(gold: str, predicted: str | None) -> tuple[bool, bool, bool]:
    """(exact, normalised, near) of one answer; each implies the next. An empty gold is never restored."""
    if predicted is None or not gold:
        return False, False, False
    exact = gold in predicted
    plain_gold, plain = normalise(gold), normalise(predicted)
    normalised = exact or (bool(plain_gold) and plain_gold in plain)
    return exact, normalised, normalised or (bool(plain_gold) and is_near(plain_gold, plain))


def score_terms(answers: Answers, glossary: Glossary) -> list[TermOutcome]:
    """One outcome for each row of `answers.masked_terms`, in its order."""
    decode = glossary.decode
    outcomes = []
    for row, term_id, k, start, end in np.asarray(answers.masked_terms).tolist():
        gold = gold_text(glossary.terms[term_id], decode(answers.clean[row][start:end]))
        ids = answers.answer(row, k)
        predicted = None if ids is None else decode(ids)
        outcomes.append(term_outcome(answers, (row, term_id, k), gold, predicted, int(glossary.train_counts[term_id])))
    return outcomes


def term_outcome(
    answers: Answers, place: tuple[int, int, int], gold: str, predicted: str | None, train_count: int
) -> TermOutcome:
    """The outcome of one answer to the masked term at `place` (row, term id, sentinel)."""
    row, term_id, k = place
    exact, normalised, near = judge_answer(gold, predicted)
    return TermOutcome(
        example_id=int(answers.example_ids[row]),
        document=int(answers.documents[row]),
        term_id=term_id,
        sentinel=k,
        gold=gold,
        predicted=predicted,
        exact=exact,
        normalised=normalised,
        near=near,
        train_count=train_count,
    )


def score_spans(answers: Answers, decode: Decode) -> list[SpanOutcome]:
    """One outcome for each row of `answers.spans`, in its order."""
    with_term = {(row, k) for row, _, k, _, _ in np.asarray(answers.masked_terms).tolist()}
    outcomes = []
    for row, k, start, end in np.asarray(answers.spans).tolist():
        ids = answers.answer(row, k)
        outcomes.append(
            SpanOutcome(
                example_id=int(answers.example_ids[row]),
                document=int(answers.documents[row]),
                sentinel=k,
                held_term=(row, k) in with_term,
                gold=decode(answers.clean[row][start:end]).strip(),
                predicted=None if ids is None else decode(ids).strip(),
            )
        )
    return outcomes


def term_restoration(outcomes: Sequence[TermOutcome], strictness: Strictness = "exact") -> Rate:
    """The term restoration rate over occurrences, with its 95 % interval over documents."""
    return rate_over_documents(_successes(outcomes, strictness), _documents(outcomes))


def term_restoration_macro(outcomes: Sequence[TermOutcome], strictness: Strictness = "exact") -> Rate:
    """Mean over terms of each term's rate; `n` counts the terms."""
    terms = np.array([outcome.term_id for outcome in outcomes], np.int64)
    return macro_rate(_successes(outcomes, strictness), _documents(outcomes), terms)


def term_restoration_by(outcomes: Sequence[TermOutcome], by: BandBy) -> dict[str, Rate]:
    """The exact rate in every band that has an occurrence, bands in their order.

    Args:
        by: `training` (seen, unseen), `length` of the gold term in characters, `sentinel` index, `frequency` in the
            training split, `digits` (with, without).
    """
    names = [_band(outcome, by) for outcome in outcomes]
    order = {name: place for place, name in enumerate(_band_names(by))}
    return {
        name: term_restoration([outcome for outcome, own in zip(outcomes, names, strict=True) if own == name])
        for name in sorted(set(names), key=order.__getitem__)
    }


def span_match(outcomes: Sequence[SpanOutcome], which: Literal["all", "term", "random"] = "all") -> Rate:
    """Share of the spans (all, those that held a term, the others) whose answer is the gold text, exactly."""
    chosen = [outcome for outcome in outcomes if which == "all" or outcome.held_term == (which == "term")]
    success = np.array([outcome.gold == outcome.predicted for outcome in chosen], bool)
    return rate_over_documents(success, _documents(chosen))


def character_error_rate(pairs: Iterable[tuple[str, str]]) -> float:
    """Edits over gold characters, both summed over the (gold, predicted) pairs; nan without a gold character."""
    edits = characters = 0
    for gold, predicted in pairs:
        edits += Levenshtein.distance(gold, predicted)
        characters += len(gold)
    return ratio(edits, characters)


def masked_character_error_rate(outcomes: Iterable[SpanOutcome]) -> float:
    """Character error rate on the masked characters only; a missing answer misses all of its characters."""
    return character_error_rate((outcome.gold, outcome.predicted or "") for outcome in outcomes)


def cer_reduction(triples: Iterable[tuple[str, str, str]]) -> float:
    """1 - CER out / CER in over (clean, damaged, restored) texts: 1 mends all, 0 nothing, below 0 does harm.

    nan when nothing was damaged.
    """
    before = after = 0
    for clean, damaged, restored in triples:
        before += Levenshtein.distance(clean, damaged)
        after += Levenshtein.distance(clean, restored)
    return 1.0 - ratio(after, before)


def over_edit_share(triples: Iterable[tuple[str, str, str]]) -> float:
    """Edits outside the damaged places over the characters outside, over (clean, damaged, restored) texts.

    A clean character is outside when the damaged text keeps it; a place between two of them is outside when the damage
    put nothing there. nan when no character was kept.
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


def format_health(fills: Sequence[Fills]) -> FormatHealth:
    """Faults summed over rows."""
    return FormatHealth(
        rows=len(fills),
        expected=sum(len(row.spans) for row in fills),
        faulty_rows=sum(row.faulty for row in fills),
        early_end_rows=sum(row.early_end for row in fills),
        cut_off_rows=sum(row.cut_off for row in fills),
        missing=sum(row.missing for row in fills),
        duplicate=sum(row.duplicate for row in fills),
        out_of_order=sum(row.out_of_order for row in fills),
        unknown=sum(row.unknown for row in fills),
        stray_rows=sum(row.stray > 0 for row in fills),
    )


def ratio(part: float, whole: float) -> float:
    """part / whole; nan when there is nothing to divide by."""
    return part / whole if whole else math.nan


def _successes(outcomes: Sequence[TermOutcome], strictness: Strictness) -> np.ndarray:
    return np.array([getattr(outcome, strictness) for outcome in outcomes], bool)


def _documents(outcomes: Sequence[TermOutcome] | Sequence[SpanOutcome]) -> np.ndarray:
    return np.array([outcome.document for outcome in outcomes], np.int64)


def _band_names(by: BandBy) -> list[str]:
    bands = {"length": LENGTH_BANDS, "sentinel": SENTINEL_BANDS, "frequency": FREQUENCY_BANDS}
    if by in bands:
        return [name for name, _ in bands[by]]
    return ["seen", "unseen"] if by == "training" else ["with", "without"]


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
