"""Term lists, matches against an independent search, places on tokens.

Run: python -m pytest tests/data/test_terms.py
With real text elsewhere than in ../shared: RESILIENT_T5_SHARED=/folder python -m pytest tests/data/test_terms.py
"""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient_t5.data.terms import Match, TermMatcher, clean_terms, fold, read_terms, token_spans
from resilient_t5.data.tokenizer.tokenizer import Encoded
from resilient_t5.errors import DataError


def plain_fold(character: str) -> str:
    """Small and half width, of one character, without a table."""
    if unicodedata.east_asian_width(character) in "FH" and len(unicodedata.normalize("NFKC", character)) == 1:
        character = unicodedata.normalize("NFKC", character)
    small = character.casefold()
    return small if len(small) == 1 else character


def plain_search(terms: list[str], text: str) -> list[Match]:
    """At every place the longest term that keeps the word rule, longest first, by slicing: no automaton."""
    folded = "".join(map(plain_fold, text))
    known = {"".join(map(plain_fold, term)): number for number, term in reversed(list(enumerate(terms)))}
    lengths = sorted({len(term) for term in known}, reverse=True)
    longest_by_first: dict[str, list[int]] = {}
    for term in known:
        longest_by_first.setdefault(term[0], []).append(len(term))
    lengths_by_first = {first: sorted(set(found), reverse=True) for first, found in longest_by_first.items()}
    assert not lengths or max(map(max, lengths_by_first.values())) == lengths[0]

    def alphabetic(position: int) -> bool:
        return 0 <= position < len(folded) and folded[position].isalnum() and folded[position] < "\u2e80"

    found, place = [], 0
    while place < len(folded):
        for length in lengths_by_first.get(folded[place], ()):
            end = place + length
            if end > len(folded) or folded[place:end] not in known:
                continue
            if not (alphabetic(place - 1) and alphabetic(place)) and not (alphabetic(end - 1) and alphabetic(end)):
                found.append((place, end, known[folded[place:end]]))
                place = end
                break
        else:
            place += 1
    return found


LETTERS = "abAB1 -\u4e2d\u6587\u836f\uff21\uff42\uff11\uff0c\u00e9\u00c9\u00df\u0130"


@settings(deadline=None)
@given(st.lists(st.text(LETTERS, min_size=1, max_size=5), max_size=12), st.text(LETTERS, max_size=60))
def test_matches_equal_those_of_a_plain_search(terms: list[str], text: str) -> None:
    """Leftmost-longest under the word rule, on strings where matches nest, overlap and touch letters."""
    matcher = TermMatcher(terms)
    assert matcher.find(text) == plain_search(matcher.terms, text)


@pytest.mark.parametrize(
    ("terms", "text", "found"),
    [
        (["ALS"], "also ALS, als. ALSO", ["ALS", "als"]),
        (["CT", "B\u8d85"], "\u505aCT\u548cB\u8d85\uff0cCTA", ["CT", "B\u8d85"]),
        (["vitamin b12"], "Vitamin \uff22\uff11\uff12!", ["Vitamin \uff22\uff11\uff12"]),
        (["heart", "heart attack"], "heart attacks the heart attack", ["heart", "heart attack"]),
        (["a b", "b c d", "b"], "xa b c dx", ["b"]),
        (["\u7cd6\u5c3f\u75c5", "\u7cd6\u5c3f"], "\u7cd6\u5c3f\u75c5\u7cd6\u5c3f", ["\u7cd6\u5c3f\u75c5", "\u7cd6\u5c3f"]),
        (["\u836f"], "\U0001f600\u836f\U00020000\u836f", ["\u836f", "\u836f"]),
        ([], "text", []),
    ],
)
def test_terms_are_found_as_a_reader_finds_them(terms: list[str], text: str, found: list[str]) -> None:
    """Whole words in Latin script, anywhere in Chinese; where a longer term breaks the rule a shorter one counts."""
    assert [text[start:end] for start, end, _ in TermMatcher(terms).find(text)] == found


def test_terms_of_more_characters_than_there_are_short_spellings_are_found() -> None:
    """60,000 characters that occur in terms, more than lie below the code points that no text can spell."""
    characters = [chr(code) for code in range(0x20000, 0x20000 + 60_000)]
    text = "".join(characters[::-1][:7000:10])
    assert [text[start:end] for start, end, _ in TermMatcher(characters).find(text)] == list(text)
    assert [term for _, _, term in TermMatcher(characters).find(text)] == list(range(59_999, 52_999, -10))


def test_texts_searched_together_are_found_as_each_alone() -> None:
    """Positions count from the beginning of the first text; no term reaches over the break between two."""
    matcher = TermMatcher(["heart attack", "heart", "\u7cd6\u5c3f\u75c5"])
    texts = ["a heart", "", "attack", "\u7cd6\u5c3f", "\u75c5\u7cd6\u5c3f\u75c5", "heart attack"]
    begins = np.cumsum([0, *(len(text) + 1 for text in texts)])
    alone = [
        [start + begin, end + begin, term]
        for text, begin in zip(texts, begins.tolist(), strict=False)
        for start, end, term in matcher.find(text)
    ]
    assert matcher.find_together(texts).tolist() == alone and len(alone) == 3
    assert matcher.find_together([]).shape == (0, 3)


@settings(deadline=None)
@given(st.text())
def test_folding_keeps_every_position(text: str) -> None:
    """One character for one, twice the same as once, and each as if it stood alone."""
    folded = fold(text)
    assert len(folded) == len(text)
    assert fold(folded) == folded
    assert folded == "".join(fold(character) for character in text)


def test_blanks_and_duplicates_are_dropped_and_counted() -> None:
    """Duplicates after folding; the first spelling stays."""
    listed = clean_terms([" Aspirin ", "", "\u3000", "aspirin", "\uff21spirin", "\u836f", "CT"])
    assert listed.terms == ["Aspirin", "\u836f", "CT"]
    assert (listed.blanks_dropped, listed.duplicates_dropped) == (2, 2)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16"])
def test_a_list_is_read_in_the_encodings_of_the_corpus(tmp_path: Path, encoding: str) -> None:
    """The same terms from each."""
    path = tmp_path / "terms.txt"
    path.write_bytes("\u9ad8\u8840\u538b\r\n\r\n\u51a0\u5fc3\u75c5\r\nCT\r\n".encode(encoding))
    listed = read_terms(path)
    assert listed.terms == ["\u9ad8\u8840\u538b", "\u51a0\u5fc3\u75c5", "CT"]
    assert listed.blanks_dropped == 1


def test_a_list_that_is_none_is_a_data_error(tmp_path: Path) -> None:
    """Empty, running text, undecodable: each by name, the running text by line."""
    path = tmp_path / "terms.txt"
    path.write_bytes(b"\n \n")
    with pytest.raises(DataError, match="empty"):
        read_terms(path)
    path.write_bytes(b"fever\n" + b"word " * 100)
    with pytest.raises(DataError, match=r"500|499") as caught:
        read_terms(path)
    assert f"{path}:2" in str(caught.value)
    path.write_bytes(b"fever\xff")
    with pytest.raises(DataError, match=r"terms\.txt is not UTF-8: first bad byte 0xff at byte 5") as caught:
        read_terms(path)
    assert "data.encoding" not in str(caught.value)  # it is the text's, and would change nothing here


def tokens(*spans: tuple[int, int]) -> Encoded:
    starts, ends = np.array(spans, dtype=np.int32).T
    return Encoded(np.arange(len(spans), dtype=np.int32), starts, ends)


def test_terms_are_placed_on_whole_tokens_and_the_widened_are_counted() -> None:
    """A clean run, a cut token on each side, bytes that share a character, a term without any token."""
    encoded = tokens((0, 0), (0, 2), (2, 4), (4, 7), (8, 9), (8, 9), (8, 9), (9, 12))
    spans, widened = token_spans(np.array([(0, 4, 5), (3, 5, 6), (7, 8, 7), (8, 9, 8), (9, 11, 9)], np.int32), encoded)
    assert spans.tolist() == [[1, 3, 5], [2, 4, 6], [4, 7, 8], [7, 8, 9]]
    assert spans.dtype == np.int32
    assert widened == 2
    assert token_spans(np.zeros((0, 3), np.int32), encoded)[0].shape == (0, 3)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.data())
def test_every_character_of_a_term_is_inside_its_tokens(lengths: list[int], data: st.DataObject) -> None:
    """Against a token-by-token search: the span is exactly the tokens that share a character with the term."""
    bounds = np.cumsum([0, *lengths])
    encoded = tokens(*zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
    size = int(bounds[-1])
    if size < 1:
        return
    start = data.draw(st.integers(0, size - 1))
    end = data.draw(st.integers(start + 1, size))
    sharing = [
        number
        for number, (low, high) in enumerate(zip(encoded.starts.tolist(), encoded.ends.tolist(), strict=True))
        if low < end and high > start and high > low
    ]
    spans, widened = token_spans(np.array([(start, end, 0)], np.int32), encoded)
    assert spans[0, :2].tolist() == [sharing[0], sharing[-1] + 1]
    assert widened == (encoded.starts[sharing[0]] < start or encoded.ends[sharing[-1]] > end)


@pytest.mark.slow
@pytest.mark.parametrize(("terms", "text"), [("zh_terms.txt", "zh_medical_25mb_open.txt"), ("en_terms.txt", "en_medquad.txt")])
def test_matches_equal_those_of_a_plain_search_on_real_text(shared_data: Path, terms: str, text: str) -> None:
    """18,749 Chinese and 30,581 English terms over every fortieth line of the real files."""
    matcher = TermMatcher(read_terms(shared_data / terms).terms)
    lines = (shared_data / text).read_text(encoding="utf-8").split("\n")[::40]
    joined = "\n".join(lines)
    found = matcher.find(joined)
    assert len(found) > 3000
    assert found == plain_search(matcher.terms, joined)
