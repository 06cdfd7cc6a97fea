"""Filling gaps, from bytes to bytes: every byte outside the gaps stays, for any text, encoding and number of gaps.

Run: python -m pytest tests/restoration/test_filling.py
"""

import numpy as np
import pytest

from resilient_t5.data.corpus.sample import generate_notes
from resilient_t5.data.tokenizer.tokenizer import train_tokenizer
from resilient_t5.errors import ConfigError, DataError
from resilient_t5.restoration.beam_search import DecodeSettings
from resilient_t5.restoration.correction import correct
from resilient_t5.restoration.filler import FillStatistics, open_filler
from resilient_t5.restoration.gaps import (
    OpenDocument,
    clean,
    document_ranges,
    encode_documents,
    find_gaps,
    make_windows,
    other_marks,
)
from resilient_t5.restoration.restoration_config import RestorationConfig, read_restoration_config
from resilient_t5.restoration.text_encoding import TextBytes

ENCODINGS = [
    "utf-8",
    "utf-8-sig",
    "utf-16",
    "utf-16-be",
    "utf-32",
    "gb18030",
    "gbk",
    "big5",
    "cp1252",
    "shift_jis",
]
ALPHABET = list("患者因高血压入院给予氨氯地平。，；\n abcDE019.-()") + [
    "\r\n",
    "\r",
    "\t",
    "\n\n",
    "  ",
    "\u3000",
    "\x0b",
    "\x00",
    "\u00e9",
]
WIDE = ["\U0001f9ec", "\ue000", "鼽", "\u0301", "<extra_id_3>", "<pad>", "</s>", "\ufeff", "\u2028"]
MARKS = ["[?]", "\u25a1\u25a1", "___", "<extra_id_0>", "患者"]


@pytest.fixture(scope="module")
def filler(tiny_export):
    """A tiny model with windows of 40 tokens and five sentinels, so that most texts need several of both."""
    return open_filler(str(tiny_export()))[0]


def random_document(draws, encoding):
    """Text in random pieces, random gaps in it (touching, at both ends, none), and its bytes."""
    pool = [piece for piece in ALPHABET + WIDE if encodable(piece, encoding)]
    marks = [mark for mark in MARKS if encodable(mark, encoding)]
    mark = marks[draws.integers(len(marks))]
    length = int(draws.integers(0, 90))
    pieces = [pool[draws.integers(len(pool))] for _ in range(length)]
    for _ in range(int(draws.integers(0, 12))):
        pieces.insert(int(draws.integers(0, len(pieces) + 1)), mark)
    return "".join(pieces), mark


def encodable(text, encoding):
    try:
        return text.encode(encoding).decode(encoding) == text
    except UnicodeError:
        return False


@pytest.mark.slow
def test_every_byte_outside_the_gaps_stays_over_a_thousand_random_documents(filler):
    """Any encoding, any number of gaps: the bytes between the fills are the bytes between the marks, in order."""
    draws, filled = np.random.default_rng(11), 0
    for start in range(0, 1000, 100):
        texts = []
        for number in range(start, start + 100):
            encoding = ENCODINGS[number % len(ENCODINGS)]
            text, mark = random_document(draws, encoding)
            texts.append((TextBytes.read(text.encode(encoding), "text", encoding), mark))
        gaps = [find_gaps(text.text, [mark]) for text, mark in texts]
        for codec in {text.encoding for text, _ in texts}:
            chosen = [i for i, (text, _) in enumerate(texts) if text.encoding == codec]
            fills = filler.fill(
                [(texts[i][0].text, gaps[i]) for i in chosen], DecodeSettings(encoding=codec, batch_tokens=2000)
            )
            for i, found in zip(chosen, fills, strict=True):
                text = texts[i][0]
                assert [fill.gap for fill in found] == gaps[i]
                assert all(fill.text.strip() and 0 < fill.probability <= 1 for fill in found)
                result = text.replaced([(fill.gap.start, fill.gap.end, fill.text) for fill in found])
                assert_same_outside(text, gaps[i], [fill.text for fill in found], result)
                filled += len(found)
    assert filled > 3000


def assert_same_outside(text, gaps, fills, result):
    """Compare byte by byte and after decoding."""
    bounds = [0, *(border for gap in gaps for border in (gap.start, gap.end)), len(text.text)]
    outside = [text.text[a:b] for a, b in zip(bounds[::2], bounds[1::2], strict=True)]
    expected = "".join(part + fill for part, fill in zip(outside, [*fills, ""], strict=True))
    assert result.decode(text.encoding) == expected
    rest, raw = result, text.raw
    for part, fill, gap in zip(outside, [*fills, None], [*gaps, None], strict=True):
        size = len(part.encode(text.encoding))
        assert rest[:size] == raw[:size]
        rest, raw = rest[size:], raw[size:]
        if fill is not None:
            rest, raw = rest[len(fill.encode(text.encoding)) :], raw[len(gap.mark.encode(text.encoding)) :]
    assert rest == raw == b""


@pytest.mark.parametrize(
    "text",
    ["[?]", "[?][?]", "[?]患者[?]", "[?]" * 500, "患者[?]因[?]。" * 100, "\n\n[?]\n\n", "a\r\n[?]\r\n\r\n[?]b", "\ufeff[?]"],
    ids=["one gap", "touching", "at both ends", "500 gaps", "200 in a sentence", "blank lines", "crlf", "bom"],
)
def test_any_number_of_gaps_in_any_place_is_filled(filler, text):
    """Each gap has an answer, in order; more gaps than sentinels take several passes."""
    statistics = FillStatistics()
    gaps = find_gaps(text, ["[?]"])
    fills = filler.fill([(text, gaps)], DecodeSettings(), statistics)[0]
    assert [fill.gap for fill in fills] == gaps
    assert all(fill.text.strip() for fill in fills)
    # At most five gaps in a window; overlapping windows of one document wait for the next pass.
    assert statistics.windows >= len(gaps) / 5
    assert statistics.passes <= statistics.windows


def test_the_answers_for_a_text_do_not_depend_on_the_other_texts_of_the_batch(filler):
    """A batch of notes is filled as each note alone, alternatives included, probabilities up to rounding."""
    notes = [note.text for note in generate_notes(8, 21)]
    texts = [note[: len(note) // 3] + "[?]" + note[len(note) // 2 :] for note in notes]
    settings = DecodeSettings(beams=2, alternatives=3)
    together = filler.fill([(text, find_gaps(text, ["[?]"])) for text in texts], settings)
    for text, found in zip(texts, together, strict=True):
        alone = filler.fill([(text, find_gaps(text, ["[?]"]))], settings)[0]
        assert [fill.text for fill in found] == [fill.text for fill in alone]
        for one, other in zip(found, alone, strict=True):
            assert one.probability == pytest.approx(other.probability, rel=1e-3)
            assert [text for text, _ in one.alternatives] == [text for text, _ in other.alternatives]
            assert len(one.alternatives) == 3 and one.text not in dict(one.alternatives)
            values = [value for _, value in one.alternatives]
            assert values == sorted(values, reverse=True)


def test_a_source_is_what_training_would_show():
    """A note with a term taken out as text has the ids of the note with the term's tokens taken out: no space too many."""
    tokenizer = train_tokenizer([note.text for note in generate_notes(1000, 5)], 2000, 0.999)
    total = 0
    for note in generate_notes(60, 33):
        encoded = tokenizer.encode_batch([note.text])[0]
        for fact in note.facts[:3]:
            at = note.text.find(fact)
            inside = np.flatnonzero((encoded.starts < at + len(fact)) & (encoded.ends > at))
            if encoded.starts[inside[0]] != at or encoded.ends[inside[-1]] != at + len(fact):
                continue  # a piece that reaches across the border: no mask of whole tokens is this gap
            document = encode_documents([OpenDocument.of(note.text, [(at, at + len(fact))], 0)], tokenizer)[0]
            before = encoded.ids[: inside[0]].tolist()
            while before and before[-1] in tokenizer.ignored_before_gap:
                before.pop()
            expected = [*before, -1, *encoded.ids[inside[-1] + 1 :].tolist()]
            assert document.tokens.tolist() == expected
            total += 1
    assert total > 100


def test_windows_hold_what_they_may_and_each_gap_in_its_middle(tiny_tokenizer):
    """Every open gap is decided once a pass or waits; no window is too long or has too many gaps; own gaps have context."""
    draws = np.random.default_rng(5)
    for _ in range(60):
        text = "".join(
            note.text + ("[?]" if draws.random() < 0.8 else "") for note in generate_notes(12, int(draws.integers(99)))
        )
        places = sorted(draws.integers(0, len(text), int(draws.integers(1, 25))).tolist(), reverse=True)
        for place in places:
            text = text[:place] + "[?]" + text[place:]
        gaps = find_gaps(text, ["[?]"])
        document = OpenDocument.of(text, [(gap.start, gap.end) for gap in gaps], 0)
        sentinels, max_tokens = int(draws.integers(1, 7)), int(draws.integers(24, 80))
        passes = 0
        while document.numbers:
            passes += 1
            encoded = encode_documents([document], tiny_tokenizer)[0]
            windows = make_windows(encoded, tiny_tokenizer, max_tokens, sentinels)
            own = [place for window in windows for place in window.own]
            for number, window in enumerate(windows):
                earlier = {place for other in windows[:number] for place in other.own}
                assert not set(window.left_out) & earlier, "a source lacks a gap that another window of this pass predicts"
            assert own and len(own) == len(set(own))
            for window in windows:
                assert len(window.source) <= max_tokens and window.source[-1] == tiny_tokenizer.eos_id
                assert window.own <= set(window.gaps) and len(window.gaps) <= sentinels
                marks = [token for token in window.source.tolist() if token in tiny_tokenizer.sentinel_ids]
                assert marks == tiny_tokenizer.sentinel_ids[: len(window.gaps)].tolist()
            document.fill({document.numbers[place]: lambda before, after: "x" for place in own})
        assert passes <= len(gaps)


def test_marks_are_what_the_user_means():
    """Literal marks, runs of one character, all sentinels by one; the longest at a place; nothing is read as a pattern."""
    text = "a[?]b______c\u25a1\u25a1\u25a1d<extra_id_7>e.*"
    for marks, found in (
        (["[?]"], ["[?]"]),
        (["___"], ["______"]),
        (["\u25a1\u25a1"], ["\u25a1\u25a1\u25a1"]),
        (["<extra_id_0>"], ["<extra_id_7>"]),
        ([".*"], [".*"]),
        (["[?]", "[?]b"], ["[?]b"]),
        (["_"], ["_"] * 8),
    ):
        assert [gap.mark for gap in find_gaps(text, marks)] == found
        assert all(text[gap.start : gap.end] == gap.mark for gap in find_gaps(text, marks))
    assert other_marks(text, ["[?]"]) == ["\u25a1\u25a1", "___", "<extra_id_0>"]
    for mark in ("", " ", "\n"):
        with pytest.raises(ConfigError):
            find_gaps(text, [mark])


def test_documents_are_those_of_the_corpus():
    """Blank lines separate documents; a long part is cut by lines; the ranges contain every visible character."""
    text = "a\nb\n\n \n c\r\nd\n"
    read = lambda mode: [text[a:b] for a, b in document_ranges(text, mode)]  # noqa: E731
    assert read("auto") == read("blank_line") == ["a\nb\n", " c\r\nd\n"]
    assert read("line") == ["a\n", "b\n", " c\r\n", "d\n"]
    assert read("file") == [text]
    long = "患者\n" * 10_000
    assert len(document_ranges(long, "auto")) == 10_000
    assert clean("a\r\nb\rc\x00\ufeff") == "a\nb\nc"


def test_text_outside_the_vocabulary_is_counted(filler):
    """Characters spelled in bytes are counted, and the gap is filled nevertheless."""
    statistics = FillStatistics()
    text = "鼽\U0001f9ec, the[?]"
    filler.fill([(text, find_gaps(text, ["[?]"]))], DecodeSettings(), statistics)
    assert statistics.byte_pieces == 3 + 4 and statistics.tokens > 7


def test_corrections_change_the_edited_places_only(tiny_export):
    """An untrained model rewrites at random: its edits applied give the output, and all else is the original's bytes."""
    corrector = open_filler(str(tiny_export("correct", max_target_tokens=40)))[0]
    for number, note in enumerate(generate_notes(6, 8)):
        raw = f"\ufeff{note.text}\r\n鼽  {note.text[:20]}".encode("utf-16-le" if number % 2 else "utf-8")
        text = TextBytes.read(raw, "text", "utf-16-le" if number % 2 else "utf-8")
        edits = correct(corrector, text.text, DecodeSettings(encoding=text.encoding), FillStatistics())
        assert edits and all(text.text[edit.start : edit.end] == edit.before != edit.after for edit in edits)
        assert all(a.end <= b.start for a, b in zip(edits[:-1], edits[1:], strict=True))
        result = text.replaced([(edit.start, edit.end, edit.after) for edit in edits]).decode(text.encoding)
        assert "鼽" in result


def test_a_replacement_that_the_encoding_cannot_hold_and_an_encoding_with_shifts_are_refused():
    """A clear error, never a question mark in the text; for UTF-7 and ISO-2022 the hint is a command that converts it."""
    with pytest.raises(DataError, match="big5"):
        TextBytes.read("患者[?]".encode("big5"), "text", "big5").replaced([(2, 5, "\u8840\u538b")])
    for encoding in ("utf-7", "iso2022_jp", "hz"):
        with pytest.raises(DataError) as error:
            TextBytes.read("患者[?]入院".encode(encoding), "text", encoding)
        assert f"iconv -f {encoding.upper()} -t UTF-8" in str(error.value)


def test_a_character_with_two_spellings_keeps_its_own_outside_the_gaps():
    """Code page 932 encodes some characters in two ways; Python writes only one of them."""
    raw = b"\x87\x90[?]\xfa\x5c[?]"
    assert raw[:2] != raw[:2].decode("cp932").encode("cp932")
    assert TextBytes.read(raw, "text", "cp932").replaced([(1, 4, "x"), (5, 8, "y")]) == b"\x87\x90x\xfa\x5cy"


@pytest.mark.parametrize(
    ("key", "value"),
    [("format", 2), ("task", "other"), ("max_source_tokens", "9"), ("max_sentinels", 101), ("trained_ids", [[5, 3]]),
     ("trained_ids", [[0, 9], [9, 10]]), ("trained_ids", [[0, 10**9]]), ("trained_ids", "x"), ("document", None),
     ("trained_ids_sha256", "0")],
)  # fmt: skip
def test_a_damaged_restoration_json_is_a_clear_error(tmp_path, key, value):
    """Hostile values are refused; what was written reads back."""
    import json

    config = RestorationConfig(max_sentinels=3, trained_ids=np.array([0, 1, 2, 7, 8, 30]))
    config.write(tmp_path)
    assert read_restoration_config(tmp_path).to_json() == config.to_json()
    content = {**config.to_json(), key: value}
    (tmp_path / "restoration.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"restoration\.json"):
        read_restoration_config(tmp_path)
