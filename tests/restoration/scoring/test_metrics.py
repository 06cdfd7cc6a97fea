"""Metrics of restoration on hand-made cases.

Run: python -m pytest tests/restoration/scoring/test_metrics.py
"""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient_t5.restoration.scoring.metrics import (
    Glossary,
    Predictions,
    cer_reduction,
    character_error_rate,
    count_terms,
    gold_text,
    judge_answer,
    masked_character_error_rate,
    over_edit_share,
    score_spans,
    score_terms,
    span_match,
    term_restoration,
    term_restoration_by,
    term_restoration_macro,
)
from resilient_t5.restoration.sentinels import parse_output

PAD, EOS = 0, 1
SENTINELS = np.arange(199, 99, -1)
S = SENTINELS.tolist()
WORDS = [
    "",
    "",
    " heart",
    " failure",
    " of",
    " the",
    " lung",
    "\u809d",
    "\u764c",
    "\u80ba",
    " Ca",
    " 12",
    "(",
    ")",
    "\uff08",
    " x",
]


def decode(ids) -> str:
    """A tokenizer in one line: a word has its space before it, the first space goes, sentinels are skipped."""
    return "".join(WORDS[int(number)] for number in ids if number < 100).removeprefix(" ")


def make_answers(clean, spans, masked_terms, rows, documents=None) -> Predictions:
    counts = [sum(1 for span in spans if span[0] == row) for row in range(len(clean))]
    outputs = [parse_output(np.array(row), SENTINELS, EOS, PAD, count) for row, count in zip(rows, counts, strict=True)]
    return Predictions(
        example_ids=np.arange(len(clean)) + 50,
        documents=np.array(documents if documents is not None else range(len(clean))),
        clean=[np.array(row) for row in clean],
        spans=np.array(spans, np.int32).reshape(-1, 4),
        masked_terms=np.array(masked_terms, np.int32).reshape(-1, 5),
        outputs=outputs,
    )


GLOSSARY = Glossary(["heart failure", "\u809d\u764c", "Ca", "12"], np.array([9, 0, 120, 1]), decode)


@pytest.mark.parametrize(
    ("gold", "predicted", "verdict"),
    [
        ("heart failure", "heart failure", (True, True, True)),
        ("heart failure", "of the heart failure", (True, True, True)),
        ("heart failure", "Heart  Failure", (False, True, True)),
        ("COPD", "\uff23\uff2f\uff30\uff24", (False, True, True)),
        ("heart failure", "heart failvre", (False, False, True)),
        ("heart failure", "the heart failvre of", (False, False, True)),
        ("heart failure", "failure", (False, False, False)),
        ("\u809d\u764c", "\u80ba\u764c", (False, False, False)),
        ("\u809d\u764c", "\u764c", (False, False, False)),
        ("heart failure", "", (False, False, False)),
        ("heart failure", None, (False, False, False)),
        ("", "anything", (False, False, False)),
    ],
)
def test_an_answer_is_judged_by_three_rules_each_wider_than_the_one_before(gold, predicted, verdict):
    """Exact: contains the term; normalised: after NFKC, case and spaces; near: edit similarity of 0.8 for a stretch."""
    assert judge_answer(gold, predicted) == verdict


@given(st.text(max_size=8), st.text(max_size=12))
def test_exact_implies_normalised_and_normalised_implies_near(gold, predicted):
    """No answer passes a strict rule and fails a loose one, whatever characters it holds."""
    exact, normalised, near = judge_answer(gold, predicted)
    assert exact <= normalised <= near


def test_terms_are_scored_by_the_answer_of_the_span_that_held_them():
    """Right, wrong sentinel, missing sentinel and duplicate: only the first answer to the own sentinel counts."""
    clean = [[2, 3, 4, 5, 6], [7, 8, 5, 2, 3], [10, 5, 11]]
    spans = [[0, 0, 0, 2], [0, 1, 4, 5], [1, 0, 0, 2], [1, 1, 3, 5], [2, 0, 0, 1], [2, 1, 2, 3]]
    terms = [[0, 0, 0, 0, 2], [1, 1, 0, 0, 2], [1, 0, 1, 3, 5], [2, 2, 0, 0, 1], [2, 3, 1, 2, 3]]
    rows = [
        [S[0], 4, 2, 3, S[1], 6, EOS],
        [S[0], 9, 8, S[0], 7, 8, EOS],
        [S[1], 11, S[0], 10, EOS],
    ]
    answers = make_answers(clean, spans, terms, rows, documents=[4, 4, 6])
    outcomes = score_terms(answers, GLOSSARY)
    assert [outcome.exact for outcome in outcomes] == [True, False, False, True, True]
    assert [outcome.predicted for outcome in outcomes] == ["of heart failure", "\u80ba\u764c", None, "Ca", "12"]
    assert [outcome.gold for outcome in outcomes] == ["heart failure", "\u809d\u764c", "heart failure", "Ca", "12"]
    assert [(o.example_id, o.document, o.term_id, o.sentinel, o.seen) for o in outcomes] == [
        (50, 4, 0, 0, True), (51, 4, 1, 0, False), (51, 4, 0, 1, True), (52, 6, 2, 0, True), (52, 6, 3, 1, True)
    ]  # fmt: skip
    rate = term_restoration(outcomes)
    assert (rate.rate, rate.n) == (0.6, 5)
    assert term_restoration_macro(outcomes).rate == pytest.approx((0.5 + 0 + 1 + 1) / 4)

    spans_found = score_spans(answers, decode)
    assert [span.held_term for span in spans_found] == [True, False, True, True, True, True]
    assert span_match(spans_found).rate == 3 / 6, "an answer with a word too much is no match"
    assert (span_match(spans_found, "random").rate, span_match(spans_found, "term").rate) == (1.0, 2 / 5)
    missed = 3 + 1 + 13  # "of ", one wrong character, a whole missing answer
    assert masked_character_error_rate(spans_found) == pytest.approx(missed / (13 + 4 + 2 + 13 + 2 + 2))


def test_bands_hold_every_outcome_once_and_name_only_what_occurs():
    """By training, length, sentinel, frequency and digits; the bands of one kind add up to all."""
    clean = [[2, 3], [7, 8], [10], [11]]
    terms = [[row, row, 0, 0, len(ids)] for row, ids in enumerate(clean)]
    spans = [[row, 0, 0, len(ids)] for row, ids in enumerate(clean)]
    rows = [[S[0], *clean[0], EOS], [S[0], 9, EOS], [S[0], 10, EOS], [S[0], 15, EOS]]
    outcomes = score_terms(make_answers(clean, spans, terms, rows), GLOSSARY)

    def rates(by) -> dict[str, tuple[float, int]]:
        return {name: (rate.rate, rate.n) for name, rate in term_restoration_by(outcomes, by).items()}

    assert rates("training") == {"seen": (2 / 3, 3), "unseen": (0.0, 1)}
    assert rates("length") == {"01_02": (1 / 3, 3), "09_up": (1.0, 1)}
    assert rates("sentinel") == {"00_09": (0.5, 4)}
    assert rates("frequency") == {"0": (0.0, 1), "1_9": (0.5, 2), "100_up": (1.0, 1)}
    assert rates("digits") == {"with": (0.0, 1), "without": (2 / 3, 3)}


def test_sentinel_bands_begin_at_the_number_in_their_name():
    """Sentinels 0, 9, 10, 26, 27 and 99 fall into 00_09, 10_26 and 27_up, two each."""
    clean = [[10]] * 6
    spans, terms, outputs = [], [], []
    for row, k in enumerate((0, 9, 10, 26, 27, 99)):
        spans.append([row, k, 0, 1])
        terms.append([row, 2, k, 0, 1])
        outputs.append(parse_output(np.array([S[k], 10, EOS]), SENTINELS, EOS, PAD, 100))
    answers = Predictions(np.arange(6), np.arange(6), [np.array(r) for r in clean], np.array(spans), np.array(terms), outputs)
    bands = term_restoration_by(score_terms(answers, GLOSSARY), "sentinel")
    assert {name: (rate.rate, rate.n) for name, rate in bands.items()} == {
        "00_09": (1.0, 2), "10_26": (1.0, 2), "27_up": (1.0, 2)
    }  # fmt: skip


def test_gold_is_the_listed_term_unless_the_tokenizer_cannot_spell_it():
    """A widened span does not widen the term; a folded spelling replaces one that no output could ever match."""
    assert gold_text("heart failure", "of heart failure") == "heart failure"
    assert gold_text("\uff23\uff2f\uff30\uff24", " COPD") == "COPD"


def plain_distance(a: str, b: str) -> int:
    """Edit distance by the textbook table."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        current = [i]
        for j, y in enumerate(b, 1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (x != y)))
        previous = current
    return previous[-1]


@given(st.lists(st.tuples(st.text("ab\u764c ", max_size=9), st.text("ab\u764c ", max_size=9)), max_size=5))
def test_character_error_rate_equals_a_plain_table_of_edits(pairs):
    """Edits summed over pairs, over gold characters summed over pairs; nan without a gold character."""
    characters = sum(len(gold) for gold, _ in pairs)
    rate = character_error_rate(pairs)
    if characters:
        assert rate == pytest.approx(sum(plain_distance(*pair) for pair in pairs) / characters)
    else:
        assert math.isnan(rate)


def test_reduction_is_one_when_all_is_restored_and_negative_when_errors_are_added():
    """1 - CER out / CER in; nan when there was nothing to correct."""
    assert cer_reduction([("abcd", "abxd", "abcd")]) == 1.0
    assert cer_reduction([("abcd", "abxx", "abxd")]) == 0.5
    assert cer_reduction([("abcd", "abxd", "axxd")]) == -1.0
    assert math.isnan(cer_reduction([("abcd", "abcd", "abcd")]))


@pytest.mark.parametrize(
    ("clean", "damaged", "restored", "share"),
    [
        ("abcdef", "abXdef", "abcdef", 0.0),
        ("abcdef", "abXdef", "abXdef", 0.0),
        ("abcdef", "abXdef", "abYdef", 0.0),
        ("abcdef", "abXdef", "Zbcdef", 1 / 5),
        ("abcdef", "abdef", "abdf", 1 / 5),
        ("abcdef", "abcXdef", "abcXdef", 0.0),
        ("abcdef", "abcdef", "abcdeZf", 1 / 6),
        ("abcdef", "abcdef", "abcdef!", 1 / 6),
        ("abcdef", "abcdef", "", 1.0),
    ],
)
def test_only_edits_outside_the_damage_are_over_edits(clean, damaged, restored, share):
    """Any change of a damaged place is none; a change of an undamaged character is one edit."""
    assert over_edit_share([(clean, damaged, restored)]) == pytest.approx(share)


def test_terms_are_counted_over_the_whole_list():
    """A listed term that never occurs has count 0."""
    assert count_terms(np.array([[0, 0, 1, 2], [0, 3, 4, 0], [1, 0, 1, 2]]), 4).tolist() == [1, 0, 2, 0]
    assert count_terms(np.zeros((0, 4), np.int32), 3).tolist() == [0, 0, 0]
