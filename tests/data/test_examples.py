"""Sentence ends, clause ends and chunks.

Run: python -m pytest tests/data/test_examples.py
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient_t5.data.examples import clause_ends, cut_chunks, sentence_ends
from resilient_t5.data.tokenizer.tokenizer import Encoded

FULL_STOP, COMMA, CLOSE_QUOTE = "\u3002", "\uff0c", "\u201d"


def by_character(text: str) -> Encoded:
    """A tokenizer of one token per character."""
    positions = np.arange(len(text) + 1, dtype=np.int32)
    return Encoded(positions[:-1], positions[:-1], positions[1:])


def split(text: str, ends: np.ndarray) -> list[str]:
    return [text[begin:end].strip() for begin, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)]


@pytest.mark.parametrize(
    "sentences",
    [
        [
            "\u6709\u70ed\u3002",
            "\u54b3\u55fd\uff1f",
            "\u662f\uff01\uff01",
            "\u505c\u836f\uff1b",
            "\u89c2\u5bdf\u2026\u2026",
            "\u5b8c",
        ],
        [f"\u201c\u597d{FULL_STOP}{CLOSE_QUOTE}", f"\uff08\u6ce8{FULL_STOP}\uff09", "\u4e86"],
        ["\u80fd\u5403\u515a\u53c2\u5417?", "\u53ef\u4ee5!", "\u597d"],
        ["Give 3.5 mg.", "Wait."],
        ["Dr. Li saw him.", 'He said "stop."', "Use e.g. aspirin (approx. 1 g).", "Why?", "It works!"],
        ["See Fig. 2 vs. Fig. 3.", "J. Smith came.", "It is hepatitis B.", "The U.S. has it."],
        ["It hurt... but less.", "See http://a.org/x?y=1.", "End"],
        ["1. Wash.", "2. Dry"],
        ["Heading", "Text without a stop", "Last."],
    ],
)
def test_sentences_end_where_a_reader_ends_them(sentences: list[str]) -> None:
    """Chinese stops with their closers; Western stops but in numbers, abbreviations, initials, list marks, links."""
    chinese = any("\u3400" <= character <= "\u9fff" for character in sentences[0])
    joint = "" if chinese else "\n" if sentences[0] in ("Heading", "1. Wash.") else " "
    text = joint.join(sentences)
    assert split(text, sentence_ends(text)) == sentences


def test_clauses_end_at_commas_and_spaces_but_not_in_numbers() -> None:
    """Chinese and Western marks; 1,000 and 10:30 stay whole."""
    text = f"\u5934\u75db{COMMA}\u53d1\u70ed\u3001\u54b3\u55fd\uff1a\u4e09\u5929 at 10:30, 1,000 ml; end"
    parts = [
        "\u5934\u75db\uff0c",
        "\u53d1\u70ed\u3001",
        "\u54b3\u55fd\uff1a",
        "\u4e09\u5929",
        "at",
        "10:30,",
        "1,000",
        "ml;",
        "end",
    ]
    assert [part for part in split(text, clause_ends(text)) if part] == parts


MARKS = st.text("\u4e2d\u6587ab1. ?!,:;'\")\n\t\u3002\uff01\uff0c\u3001\u201d\u2026\u3000", max_size=80)


@given(MARKS)
def test_ends_are_ascending_positions_up_to_the_length(text: str) -> None:
    """Any text: no end at 0 but for the empty text, none twice, the last at the length."""
    for ends in (sentence_ends(text), clause_ends(text)):
        assert ends.dtype == np.int32
        assert ends[-1] == len(text)
        assert (np.diff(ends) > 0).all()
        assert ends[0] > 0 or not text


@given(MARKS, st.integers(1, 20), st.data())
def test_the_chunks_of_a_document_spell_it(text: str, max_tokens: int, data: st.DataObject) -> None:
    """Without the repeated context the chunks tile the document; none is too long, each adds something."""
    overlap = data.draw(st.integers(0, max_tokens - 1))
    chunks = cut_chunks(by_character(text), text, max_tokens, overlap)
    spelled = ""
    for begin, end in chunks:
        assert end - begin <= max_tokens
        assert max(0, len(spelled) - overlap) == begin or not spelled
        assert end > len(spelled) >= begin
        spelled += text[len(spelled) : end]
    assert spelled == text


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=40), st.integers(5, 9), st.integers(0, 2))
def test_no_chunk_begins_or_ends_inside_a_character(pieces: list[tuple[int, int]], max_tokens: int, overlap: int) -> None:
    """Byte pieces share a character, other tokens hold several, some none: every cut is between characters."""
    starts, ends, position = [], [], 0
    for shared, length in pieces:
        if shared:
            starts += [position] * (shared + 1)
            ends += [position + 1] * (shared + 1)
            position += 1
        else:
            starts.append(position)
            ends.append(position + length)
            position += length
    text = "x" * position
    encoded = Encoded(np.arange(len(starts), dtype=np.int32), np.array(starts, dtype=np.int32), np.array(ends, dtype=np.int32))
    chunks = cut_chunks(encoded, text, max_tokens, overlap)
    for (begin, end), (following, _) in zip(chunks, chunks[1:], strict=False):
        assert end - begin <= max_tokens
        assert end - overlap <= following <= end
        assert starts[end] >= ends[end - 1]
        assert starts[following] >= ends[following - 1]
    assert not starts or chunks[-1][1] == len(starts)


def test_chunks_are_filled_with_whole_sentences() -> None:
    """As many as fit; a sentence longer than a chunk is cut at its commas, a clause longer than one anywhere."""
    sentence, clauses, hard = "\u4e00" * 4 + FULL_STOP, ("\u4e8c" * 5 + COMMA) * 3 + FULL_STOP, "\u4e09" * 30
    text = sentence * 5 + clauses + hard
    chunks = [text[begin:end] for begin, end in cut_chunks(by_character(text), text, 13, 0)]
    assert chunks[:3] == [sentence * 2, sentence * 2, sentence]
    assert chunks[3:5] == [("\u4e8c" * 5 + COMMA) * 2, "\u4e8c" * 5 + COMMA + FULL_STOP]
    assert [len(chunk) for chunk in chunks[5:]] == [13, 13, 4]


def test_an_overlap_as_long_as_a_chunk_is_refused() -> None:
    """It could never end."""
    with pytest.raises(ValueError, match="overlap_tokens"):
        cut_chunks(by_character("abc"), "abc", 2, 2)
