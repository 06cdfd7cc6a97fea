"""Parsing, aligning and inserting answers.

Run: python -m pytest tests/restoration/test_sentinels.py
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient_t5.restoration.sentinels import bracketed, insert_answers, parse_output, parse_whole_text, sentinel_numbers

PAD, EOS = 0, 1
SENTINELS = np.arange(99, 89, -1, dtype=np.int32)  # sentinel k is 99 - k, as in T5
S = SENTINELS.tolist()


def read(row: list[int], expected: int):
    return parse_output(np.array(row), SENTINELS, EOS, PAD, expected)


def answers(output) -> list[list[int] | None]:
    return [None if span is None else span.tolist() for span in output.spans]


def faults(output) -> dict[str, int | bool]:
    names = ("missing", "duplicate", "out_of_order", "unknown", "stray", "early_end", "cut_off")
    return {name: getattr(output, name) for name in names if getattr(output, name)}


@pytest.mark.parametrize(
    ("row", "expected", "spans", "found"),
    [
        ([S[0], 10, 11, S[1], 12, EOS], 2, [[10, 11], [12]], {}),
        ([PAD, S[0], 10, S[1], 12, EOS, PAD, PAD], 2, [[10], [12]], {}),
        ([EOS, S[0], 10], 0, [], {}),
        ([S[0], S[1], 12, EOS], 2, [[], [12]], {}),
        ([S[0], 10, EOS, S[1], 12], 2, [[10], None], {"missing": 1, "early_end": True}),
        ([S[0], 10, S[2], 12, EOS], 3, [[10], None, [12]], {"missing": 1}),
        ([S[1], 12, S[0], 10, EOS], 2, [[10], [12]], {"out_of_order": 1}),
        ([S[0], 10, S[0], 11, S[1], 12, EOS], 2, [[10], [12]], {"duplicate": 1}),
        ([S[0], 10, S[7], 11, 11, S[1], 12, EOS], 2, [[10], [12]], {"unknown": 1}),
        ([30, 31, S[0], 10, EOS], 1, [[10]], {"stray": 2}),
        ([30, 31], 1, [None], {"stray": 2, "missing": 1, "cut_off": True}),
        ([S[0], 10, 11], 1, [[10, 11]], {"cut_off": True}),
        ([], 2, [None, None], {"missing": 2, "cut_off": True}),
        ([EOS], 2, [None, None], {"missing": 2, "early_end": True}),
        ([S[2], 5, S[0], 6, S[1], 7, S[2], 8, S[9], 9, EOS], 3, [[6], [7], [5]],
         {"out_of_order": 2, "duplicate": 1, "unknown": 1}),
    ],
)  # fmt: skip
def test_malformed_rows_are_read_by_sentinel_and_every_fault_is_counted(row, expected, spans, found):
    """The first answer of every expected sentinel is kept, in any order, and nothing else is."""
    output = read(row, expected)
    assert answers(output) == spans
    assert faults(output) == found
    assert output.faulty == bool(found)


@given(st.lists(st.lists(st.integers(2, 80), max_size=4), max_size=10), st.booleans())
def test_a_well_formed_target_reads_back_as_it_was_written(spans, padded):
    """Writing answers in T5's form and reading them is the identity, without a fault."""
    row = [token for k, span in enumerate(spans) for token in (S[k], *span)] + [EOS] + [PAD] * (3 * padded)
    output = read(row, len(spans))
    assert answers(output) == spans and not output.faulty


@given(st.lists(st.integers(0, 99), max_size=30), st.integers(0, 10))
def test_any_row_of_ids_is_read_without_an_error(row, expected):
    """Answers hold no sentinel, pad or end mark, and missing plus found sentinels are the expected ones."""
    output = read(row, expected)
    found = [span for span in output.spans if span is not None]
    assert len(output.spans) == expected == output.missing + len(found)
    assert all(2 <= token < 90 for span in found for token in span)


def test_sentinel_numbers_hold_for_any_order_of_ids():
    """The number of an id is its place in the table, whether the table goes up, down or neither."""
    for table in (SENTINELS, SENTINELS[::-1], np.array([93, 99, 90])):
        expected_numbers = [next((k for k, number in enumerate(table) if number == i), -1) for i in range(102)]
        assert sentinel_numbers(np.arange(102), table).tolist() == expected_numbers


def test_answers_are_inserted_at_their_sentinels():
    """Each sentinel is replaced by its answer; a sentinel without an answer stays."""
    source = np.array([5, S[0], 6, 7, S[1], S[2], 8, EOS, PAD])
    output = read([S[0], 20, 21, S[2], EOS], 3)
    restored = insert_answers(source, output, sentinel_ids=SENTINELS, eos_id=EOS, pad_id=PAD)
    assert restored.tolist() == [5, 20, 21, 6, 7, S[1], 8]


@given(st.lists(st.integers(2, 80), min_size=1, max_size=30), st.data())
def test_inserting_the_gold_answers_gives_the_clean_text(clean, data):
    """Masking spans and inserting their own tokens changes nothing."""
    cuts = sorted(data.draw(st.sets(st.integers(0, len(clean)), max_size=8)))
    spans = list(zip(cuts[::2], cuts[1::2], strict=False))
    source, target, done = [], [], 0
    for k, (start, end) in enumerate(spans):
        source += [*clean[done:start], S[k]]
        target += [S[k], *clean[start:end]]
        done = end
    source += [*clean[done:], EOS]
    output = read([*target, EOS], len(spans))
    assert insert_answers(np.array(source), output, sentinel_ids=SENTINELS, eos_id=EOS, pad_id=PAD).tolist() == clean


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ([2, 3, 4, 5, 6], [4, 5]),
        ([2, 3, 9, 6], [9]),
        ([2, 3, 6], []),
        ([2, 3, 7, 8, 9, 6], [7, 8, 9]),
        ([3, 4, 5, 6], [4, 5]),
        ([2, 2, 2, 3, 4, 5, 6], [4, 5]),
        ([2, 3], []),
        ([], []),
    ],
)
def test_a_model_that_writes_the_whole_text_is_read_in_the_place_of_the_span(written, answer):
    """The answer is the part between the neighbours of the span, whatever was written before it."""
    output = parse_whole_text(np.array([2, 3, 4, 5, 6]), np.array([*written, EOS, 9, 9]), [(2, 4)], EOS, PAD)
    assert answers(output) == [answer] and not output.faulty
    assert parse_whole_text(np.array([2, 3]), np.array([2, 3]), [(0, 2)], EOS, PAD).cut_off


def test_brackets_keep_the_space_that_an_answer_begins_with():
    """A piece is decoded together with the text before it, so its space stays, outside the bracket."""
    words = {5: " with", 6: " heart", 7: " failure", 8: "."}

    def decode(ids: np.ndarray) -> str:
        return "".join(words[int(number)] for number in ids).removeprefix(" ")

    pieces = [(np.array([5]), False), (np.array([6, 7]), True), (np.array([8]), False), (None, True)]
    assert bracketed(pieces, decode) == "with [heart failure].[?]"
