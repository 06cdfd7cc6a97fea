"""The vocabulary as corruption sees it, and look-alikes. Run: python -m pytest tests/data/corruption/test_token_table.py"""

import numpy as np
import pytest

from resilient_t5.data.corruption.token_table import TokenTable, build_token_table, built_in_confusions, read_confusions
from resilient_t5.errors import DataError

SPECIALS = ["<pad>", "</s>", "<unk>", "l"]
BYTES = ["<0x41>", "<0xE5>"]
WORDS = ["\u2581", "\u2581the", "liver", "己", "已", "巳", "\u2581己", "\u2581已", "0", "O", "o", "rn", "m", "血", "1"]
MARKS = [",", "。", "\u2581(", ")。", "%", "...", "+"]
SENTINELS = [f"<extra_id_{k}>" for k in range(99, -1, -1)]
PIECES = [*SPECIALS, *BYTES, *WORDS, *MARKS, *SENTINELS]


class FakeTokenizer:
    """The part of a tokenizer that the table reads."""

    size = len(PIECES)
    pad_id, eos_id, unk_id = 0, 1, 2
    sentinel_ids = np.arange(len(PIECES) - 1, len(PIECES) - 101, -1, dtype=np.int32)
    special_ids = np.array([0, 1, 2, 3, *sentinel_ids])
    byte_ids = np.array([4, 5])
    ignored_before_gap = np.zeros(0, np.int32)
    continues_word = np.zeros(len(PIECES), bool)
    gap_starts_word = False

    def pieces(self) -> list[str]:
        return PIECES


def table_without(*pieces: str, path=None) -> tuple[TokenTable, list[str]]:
    """The table when these pieces are not active, and the active pieces."""
    active = np.array([n for n, piece in enumerate(PIECES) if piece not in pieces], np.int32)
    return build_token_table(FakeTokenizer(), active, path), [PIECES[n] for n in active]


def look_alikes(table: TokenTable, pieces: list[str], piece: str) -> set[str]:
    """The look-alikes of a piece, as pieces."""
    number = pieces.index(piece)
    ids = table.confusions[table.confusion_offsets[number] : table.confusion_offsets[number + 1]]
    return {pieces[n] for n in ids}


def test_pieces_are_classified_in_active_ids():
    """Marks, punctuation, bytes and sentinels are found where the active vocabulary puts them."""
    table, pieces = table_without("\u2581the", "1")
    assert table.size == len(pieces) and pieces[table.pad_id] == "<pad>" and pieces[table.eos_id] == "</s>"
    assert [pieces[n] for n in table.sentinel_ids] == [f"<extra_id_{k}>" for k in range(100)]
    assert {pieces[n] for n in np.flatnonzero(table.special)} == {*SPECIALS, *SENTINELS}
    assert {pieces[n] for n in np.flatnonzero(table.punctuation)} == {*MARKS, *BYTES, "\u2581"}
    assert {pieces[n] for n in np.flatnonzero(table.byte)} == set(BYTES)


def test_look_alikes_are_whole_active_pieces_of_the_same_spacing():
    """A look-alike that is no active piece is left out; the mark of a space before a piece stays."""
    table, pieces = table_without("巳", "O")
    assert look_alikes(table, pieces, "己") == {"已"}
    assert look_alikes(table, pieces, "\u2581己") == {"\u2581已"}
    assert look_alikes(table, pieces, "0") == {"o"}
    assert look_alikes(table, pieces, "rn") == {"m"} and look_alikes(table, pieces, "m") == {"rn"}
    assert look_alikes(table, pieces, "1") == set(), "l is a special piece here"
    assert look_alikes(table, pieces, "liver") == look_alikes(table, pieces, "血") == set()


def test_a_users_table_extends_the_built_in_one(tmp_path):
    """The user's look-alikes are added to the built-in ones, in the direction of the file."""
    path = tmp_path / "confusions.tsv"
    path.write_text("# our scanner\n血\t己 已\n\n己\t1\r\n", encoding="utf-8-sig")
    table, pieces = table_without(path=path)
    assert look_alikes(table, pieces, "血") == {"己", "已"}
    assert look_alikes(table, pieces, "己") == {"已", "巳", "1"}
    assert "血" not in look_alikes(table, pieces, "已")


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"\xe5\xb7\xb1\t\xe5\xb7\xb2\nab\tc\n", ":2"),
        (b"\n\nx y\n", ":3"),
        (b"a\t\n", ":1"),
        (b"a\ta\n", ":1"),
        (b"a\tb\n\xff\tc\n", ":2"),
    ],
)
def test_a_bad_line_of_a_users_table_is_named(tmp_path, content, place):
    """A line without a tab, with no or several characters before it, with nothing after it, or not UTF-8."""
    path = tmp_path / "confusions.tsv"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_confusions(path)
    assert caught.value.where == f"{path}{place}"


def test_a_missing_table_is_a_data_error(tmp_path):
    """The error for a missing path names the key."""
    with pytest.raises(DataError, match="cannot be read") as caught:
        read_confusions(tmp_path / "none.tsv")
    assert "corruption.confusions" in caught.value.hint


@pytest.mark.parametrize("piece", ["<pad>", "</s>", "<extra_id_0>", "<extra_id_99>", "<extra_id_50>"])
def test_an_active_vocabulary_without_a_mark_is_refused(piece):
    """Padding, end mark and all sentinels must be active."""
    with pytest.raises(DataError, match="not in the active vocabulary"):
        table_without(piece)


def test_an_active_vocabulary_of_another_tokenizer_is_refused():
    """Ids beyond the tokenizer's pieces cannot be its own."""
    with pytest.raises(DataError, match="does not belong"):
        build_token_table(FakeTokenizer(), np.array([0, 1, len(PIECES)], np.int32), None)


def test_the_built_in_table_is_symmetric_and_never_maps_to_itself():
    """If a looks like b then b looks like a, and nothing is its own look-alike."""
    table = built_in_confusions()
    assert len(table) > 400
    for text, others in table.items():
        assert text not in others and others
        assert all(text in table[other] for other in others)


def test_the_table_is_the_same_in_every_process():
    """Look-alikes are in ascending order of id, not in the order of a set of strings."""
    table, _ = table_without()
    for number in range(table.size):
        ids = table.confusions[table.confusion_offsets[number] : table.confusion_offsets[number + 1]]
        assert np.all(np.diff(ids) > 0)
