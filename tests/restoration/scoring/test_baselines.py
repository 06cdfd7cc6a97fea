"""Guesses without a model: majority by context, and copying.

Run: python -m pytest tests/restoration/scoring/test_baselines.py
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from resilient_t5.restoration.scoring.baselines import (
    CONTEXTS,
    OUTSIDE,
    REACH,
    MajorityBaseline,
    copy_guesses,
    gap_contexts,
    terms_of_example,
)
from resilient_t5.restoration.scoring.metrics import Glossary, Predictions, score_terms
from resilient_t5.restoration.sentinels import parse_output


@dataclass
class Examples:
    """A split in memory."""

    tokens: np.ndarray
    offsets: np.ndarray
    terms: np.ndarray


def make_split(rows: list[list[int]], terms: list[tuple[int, int, int, int]]) -> Examples:
    offsets = np.cumsum([0] + [len(row) for row in rows])
    return Examples(np.concatenate(rows).astype(np.uint16), offsets, np.array(terms, np.int32).reshape(-1, 4))


def random_split(examples: int = 60, seed: int = 0) -> Examples:
    """Short texts over few tokens, so that contexts repeat, with terms anywhere, at borders too."""
    draws = np.random.Generator(np.random.Philox(key=seed))
    rows, terms = [], []
    for example in range(examples):
        row = draws.integers(0, 4, int(draws.integers(3, 12))).tolist()
        rows.append(row)
        cuts = np.sort(draws.choice(len(row) + 1, 2, replace=False))
        terms.append((example, int(cuts[0]), int(cuts[1]), int(draws.integers(0, 3))))
    return make_split(rows, terms)


def context_of(row: list[int], start: int, end: int) -> list[int]:
    left = [row[start - 1 - d] if start - 1 - d >= 0 else OUTSIDE for d in range(REACH)]
    right = [row[end + d] if end + d < len(row) else OUTSIDE for d in range(REACH)]
    return left + right


def plain_guess(split: Examples, context: list[int]) -> int:
    """The back-off as loops over the training occurrences."""
    for left, right in CONTEXTS:
        columns = [*range(left), *range(REACH, REACH + right)]
        found = Counter()
        for example, start, end, term in split.terms.tolist():
            row = split.tokens[split.offsets[example] : split.offsets[example + 1]].tolist()
            own = context_of(row, start, end)
            found[term] += all(own[i] == context[i] for i in columns)
        best = max(sorted(found), key=lambda term: found[term], default=-1)
        if best >= 0 and found[best]:
            return best
    return -1


@pytest.mark.parametrize("seed", range(3))
def test_majority_guess_equals_a_plain_count_with_back_off(seed):
    """For seen and unseen contexts the guess is the most frequent training term of the longest context seen."""
    split = random_split(seed=seed)
    contexts = np.random.Generator(np.random.Philox(key=99)).integers(-1, 5, (200, 2 * REACH))
    guesses = MajorityBaseline.fit(split).guess(contexts)
    assert guesses.tolist() == [plain_guess(split, context) for context in contexts.tolist()]
    assert len(set(guesses.tolist())) > 1


def test_a_known_context_decides_and_an_unknown_one_falls_back_to_the_commonest_term():
    """A neighbour that always goes with one term wins over the global majority; an unknown one falls back to it."""
    rows = [[10, 1, 11], [10, 1, 11], [20, 2, 21], [30, 1, 31]]
    baseline = MajorityBaseline.fit(make_split(rows, [(0, 1, 2, 5), (1, 1, 2, 5), (2, 1, 2, 7), (3, 1, 2, 5)]))
    contexts = np.array([context_of([20, 0, 21], 1, 2), context_of([77, 0, 78], 1, 2), context_of([20, 0, 99], 1, 2)])
    assert baseline.guess(contexts).tolist() == [7, 5, 7]


def test_a_training_split_without_terms_gives_no_guess():
    """Without a training term there is no guess."""
    baseline = MajorityBaseline.fit(make_split([[1, 2]], []))
    assert baseline.guess(np.zeros((2, 2 * REACH), np.int64)).tolist() == [-1, -1]
    assert baseline.guess(np.zeros((0, 2 * REACH), np.int64)).tolist() == []


def test_a_bounded_fit_reads_a_part_that_is_spread_over_the_corpus():
    """With a tenth of the occurrences the common term is still the guess, and the fit is that of the tenth alone."""
    rows = [[1]] * 1000
    terms = [(example, 0, 1, 3 if example % 3 else 4) for example in range(1000)]
    split = make_split(rows, terms)
    assert MajorityBaseline.fit(split, max_occurrences=100).guess(np.full((1, 2 * REACH), OUTSIDE)).tolist() == [3]
    tenth = make_split(rows, terms[::10])
    ours, theirs = MajorityBaseline.fit(split, max_occurrences=100), MajorityBaseline.fit(tenth)
    assert all(np.array_equal(a.terms, b.terms) for a, b in zip(ours.levels, theirs.levels, strict=True))


def answers_for(split: Examples, example_ids: list[int], spans, masked_terms) -> Predictions:
    clean = [np.array(split.tokens[split.offsets[i] : split.offsets[i + 1]]) for i in example_ids]
    nothing = [parse_output(np.zeros(0, int), np.array([99]), 1, 0, 0) for _ in example_ids]
    ids = np.array(example_ids)
    return Predictions(ids, ids, clean, np.array(spans).reshape(-1, 4), np.array(masked_terms).reshape(-1, 5), nothing)


NAMES = ["liver", "lung", "heart", "heart failure"]
GLOSSARY = Glossary(NAMES, np.array([1, 1, 1, 1]), lambda ids: " ".join(NAMES[int(i) - 40] for i in ids if i >= 40))


def test_majority_is_scored_on_the_damaged_source_by_the_rule_of_the_model():
    """The gap's neighbours in the source decide, and a guess that contains the gold term counts as for a model."""
    train = make_split([[5, 40, 6], [7, 43, 8]], [(0, 1, 2, 0), (1, 1, 2, 3)])
    split = make_split([[5, 40, 6, 7, 42, 8]], [(0, 1, 2, 0), (0, 4, 5, 2)])
    answers = answers_for(split, [0], [[0, 0, 1, 2], [0, 1, 4, 5]], [[0, 0, 0, 1, 2], [0, 2, 1, 4, 5]])
    source = np.array([5, 99, 6, 7, 98, 8])
    assert gap_contexts(np.zeros(2, int), [source], np.array([[1, 2], [4, 5]])).tolist() == [
        [5, -1, -1, 6, 7, 98], [7, 6, 99, 8, -1, -1]
    ]  # fmt: skip
    contexts = gap_contexts(np.zeros(2, int), [source], np.array([[1, 2], [4, 5]]))
    outcomes = score_terms(answers, GLOSSARY, MajorityBaseline.fit(train).guess(contexts))
    assert [(outcome.predicted, outcome.exact) for outcome in outcomes] == [("liver", True), ("heart failure", True)]


def test_copying_takes_a_term_that_is_still_shown():
    """`recent`: the nearest before the gap, else the first after it; `frequent`: the commonest; a masked one never."""
    rows = [[40, 9, 40, 9, 41, 9, 42, 9, 41, 9, 40], [42, 9, 41], [42, 9]]
    terms = [(0, 0, 1, 0), (0, 2, 3, 0), (0, 4, 5, 1), (0, 6, 7, 2), (0, 8, 9, 1), (0, 10, 11, 0),
             (1, 0, 1, 2), (1, 2, 3, 1), (2, 0, 1, 2)]  # fmt: skip
    split = make_split(rows, terms)
    spans = [[0, 0, 6, 7], [0, 1, 8, 9], [1, 0, 0, 1], [2, 0, 0, 1]]
    masked = [[0, 2, 0, 6, 7], [0, 1, 1, 8, 9], [1, 2, 0, 0, 1], [2, 2, 0, 0, 1]]
    answers = answers_for(split, [0, 1, 2], spans, masked)
    recent = score_terms(answers, GLOSSARY, copy_guesses(answers, split, "recent"))
    frequent = score_terms(answers, GLOSSARY, copy_guesses(answers, split, "frequent"))
    assert [outcome.predicted for outcome in recent] == ["lung", "lung", "lung", None]
    assert [outcome.predicted for outcome in frequent] == ["liver", "liver", "lung", None]
    assert [outcome.exact for outcome in recent] == [False, True, False, False]


def test_a_guess_of_the_very_term_counts_however_the_tokenizer_spells_it():
    """The listed spelling never comes out of the tokenizer; the guess is right all the same."""
    split = make_split([[40]], [(0, 0, 1, 0)])
    glossary = Glossary(["LIVER (full-width)"], np.array([1]), lambda ids: "liver")
    answers = answers_for(split, [0], [[0, 0, 0, 1]], [[0, 0, 0, 0, 1]])
    assert score_terms(answers, glossary, np.array([0]))[0].exact


def test_terms_of_an_example_are_found_by_its_number():
    """For every example, also those without a term, the rows are those of a plain filter."""
    split = make_split([[1, 2, 3]] * 6, [(0, 0, 1, 4), (2, 0, 1, 5), (2, 1, 3, 6), (5, 0, 2, 7)])
    for example in range(6):
        columns = [row[1:] for row in split.terms.tolist() if row[0] == example]
        assert terms_of_example(split, example).tolist() == columns
