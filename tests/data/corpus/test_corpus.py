"""Text in: files, formats, encodings, cleaning, duplicates, the split.

Run: python -m pytest tests/data/corpus/test_corpus.py
"""

import gzip
import json
import lzma
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient_t5.config.sections import DataConfig
from resilient_t5.data.corpus import encodings, formats
from resilient_t5.data.corpus.documents import (
    CorpusCounts,
    Document,
    SeenParagraphs,
    find_inputs,
    held_out,
    read_documents,
    text_digest,
)
from resilient_t5.errors import ConfigError, DataError, ExitCode, StorageError

CHINESE = (
    "\u60a3\u8005\u53d1\u70ed\u4e09\u5929\uff0c\u4f53\u6e29\u4e09\u5341\u4e5d\u5ea6\u3002\u670d\u7528\u9000\u70ed\u836f\u3002"
)


def read(*inputs: object, **settings: object) -> tuple[list[Document], CorpusCounts]:
    counts = CorpusCounts()
    return list(read_documents([str(name) for name in inputs], DataConfig(**settings), counts)), counts  # type: ignore[arg-type]


def texts(*inputs: object, **settings: object) -> list[str]:
    return [document.text for document in read(*inputs, **settings)[0]]


def written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture(params=[1, 3, 1 << 18])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Blocks of 1 and 3 bytes cut every character and every line break."""
    monkeypatch.setattr(encodings, "BLOCK_BYTES", request.param)
    yield request.param


# Inputs


def test_folders_globs_and_files_are_found_once_each_and_sorted(tmp_path: Path) -> None:
    """A file named three ways is read once; hidden names and other kinds in folders are passed over."""
    expected = [written(tmp_path / name, "x") for name in ("a.txt", "b/c.jsonl.gz", "b/d.MD", "e.csv.xz")]
    for name in ("b/notes.docx", ".hidden/x.txt", "b/.swap.txt"):
        written(tmp_path / name, "x")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    found = find_inputs([str(tmp_path / "b" / "*.gz"), str(tmp_path), str(tmp_path / "a.txt")])
    assert found == expected


@pytest.mark.parametrize("name", ["absent.txt", "nothing-*.txt", "empty", "report.docx"])
def test_an_input_that_gives_nothing_is_a_data_error_that_names_it(tmp_path: Path, name: str) -> None:
    """A missing file, a glob without a hit, an empty folder, an unknown kind: exit code 65 and the name."""
    (tmp_path / "empty").mkdir()
    written(tmp_path / "report.docx", "x")
    with pytest.raises(DataError, match=name.replace("*", r"\*")) as caught:
        find_inputs([str(tmp_path / name)])
    assert caught.value.exit_code == ExitCode.BAD_DATA
    assert caught.value.hint


def test_files_without_text_are_a_data_error(tmp_path: Path) -> None:
    """An empty corpus never passes for a corpus."""
    written(tmp_path / "a.txt", "")
    written(tmp_path / "b.txt", " \n\u3000\n\x00\n")
    with pytest.raises(DataError, match="no text"):
        read(tmp_path)


# Encodings


@pytest.mark.parametrize(
    ("encoding", "mark"),
    [
        ("utf-8", b""),
        ("utf-8", b"\xef\xbb\xbf"),
        ("gb18030", b""),
        ("gb18030", b"\x84\x31\x95\x33"),
        ("utf-16-le", b""),
        ("utf-16-be", b""),
        ("utf-16-le", b"\xff\xfe"),
        ("utf-16-be", b"\xfe\xff"),
        ("utf-32-le", b"\xff\xfe\x00\x00"),
    ],
)
def test_auto_reads_every_encoding_it_promises(tmp_path: Path, encoding: str, mark: bytes, block_bytes: int) -> None:
    """The same text comes back from all of them, byte order marks dropped, whatever the blocks cut."""
    text = f"{CHINESE}\nBP 120/80, dose 3.5 mg\n{CHINESE[::-1]}"
    path = written(tmp_path / "a.txt", mark + text.replace("\n", "\r\n").encode(encoding))
    documents, counts = read(path, document="line")
    assert [document.text for document in documents] == text.split("\n")
    assert counts.encodings == {encoding: 1}
    assert counts.bytes == path.stat().st_size
    assert counts.control_characters_dropped == 0


def test_line_breaks_of_two_bytes_are_one_even_when_a_block_cuts_them(tmp_path: Path, block_bytes: int) -> None:
    """A carriage return at the end of a block waits for what follows."""
    assert texts(written(tmp_path / "a.txt", "a\r\nb\r\n\r\nc\rd"), document="file") == ["a\nb\n\nc\nd"]


def test_a_few_nul_bytes_do_not_make_a_text_utf16(tmp_path: Path) -> None:
    """The trap: pairs of ASCII letters are Chinese characters in UTF-16."""
    documents, counts = read(written(tmp_path / "a.txt", b"fever\0" + b"cough" * 20 + b"rash\0"))
    assert documents[0].text == "fever" + "cough" * 20 + "rash"
    assert counts.encodings == {"utf-8": 1}
    assert counts.control_characters_dropped == 2


@pytest.mark.parametrize("ending", [".txt.gz", ".txt.xz"])
def test_packed_files_read_as_their_content(tmp_path: Path, ending: str, block_bytes: int) -> None:
    """Packing changes neither the text nor the count of unpacked bytes."""
    pack = gzip.compress if ending.endswith("gz") else lzma.compress
    content = f"{CHINESE}\nsecond".encode("gb18030")
    documents, counts = read(written(tmp_path / f"a{ending}", pack(content)), document="line")
    assert [document.text for document in documents] == [CHINESE, "second"]
    assert counts.bytes == len(content)


@pytest.mark.parametrize("setting", ["auto", "utf-8"])
@pytest.mark.parametrize("lines", [1, 40])
def test_one_bad_byte_in_a_utf8_file_is_named_by_its_offset(tmp_path: Path, setting: str, lines: int, block_bytes: int) -> None:
    """Damage is an error, early and late in the file; it is never read as another encoding."""
    whole = (CHINESE + "\n").encode()
    content = whole * lines + whole[:9] + b"\xff" + whole[9:] + whole
    path = written(tmp_path / "a.txt", content)
    with pytest.raises(DataError) as caught:
        read(path, encoding=setting)
    message = str(caught.value)
    assert f"0xff at byte {len(whole) * lines + 9}, line {lines + 1}" in message
    assert str(path) in message
    assert "data.encoding" in message


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16-le", "big5"])
def test_an_explicit_encoding_that_fails_names_the_offset(tmp_path: Path, encoding: str, block_bytes: int) -> None:
    """The offset is that of the first byte of what does not decode, at any size of the blocks."""
    good = "\u4e2d\u6587\n".encode(encoding)
    bad = b"\x00\xdc" if encoding == "utf-16-le" else b"\xff\xff"
    with pytest.raises(DataError, match=f"at byte {len(good)}, line 2"):
        read(written(tmp_path / "a.txt", good + bad + good), encoding=encoding)


def test_a_damaged_utf8_file_that_gb18030_could_decode_is_still_an_error(tmp_path: Path) -> None:
    """The trap: a stray lead byte may leave a file that decodes strictly as GB18030, into nonsense."""
    content = "\u6c34\u6c34".encode() + b"\n" + b"\xb0A " + "\u6c34\u6c34\n".encode() * 3
    content.decode("gb18030")
    with pytest.raises(UnicodeDecodeError):
        content.decode()
    with pytest.raises(DataError, match="0xb0 at byte 7"):
        read(written(tmp_path / "a.txt", content))


def test_a_western_text_is_not_read_as_chinese(tmp_path: Path) -> None:
    """Bytes above 0x7f before ASCII letters decode as GB18030 too; isolated ones are no evidence for it."""
    content = ("na\u00efvet\u00e9e of the caf\u00e9s\n" * 9).encode("cp1252")
    content.decode("gb18030")
    with pytest.raises(DataError, match="rare characters"):
        read(written(tmp_path / "a.txt", content))
    assert texts(tmp_path / "a.txt", encoding="cp1252", document="line") == ["na\u00efvet\u00e9e of the caf\u00e9s"]


def test_a_character_cut_off_by_the_end_of_the_file_is_an_error(tmp_path: Path, block_bytes: int) -> None:
    """The error names a file truncated inside a character."""
    with pytest.raises(DataError, match="ends inside the character at byte 5"):
        read(written(tmp_path / "a.txt", b"ab\n\xe6\x82".replace(b"ab", b"abcd")), encoding="utf-8")


def test_an_unknown_encoding_is_a_config_error(tmp_path: Path) -> None:
    """A misspelt or non-text encoding is a mistake of the settings, exit code 2."""
    path = written(tmp_path / "a.txt", "text")
    for name in ("utf-9", "hex"):
        with pytest.raises(ConfigError, match=r"data\.encoding"):
            read(path, encoding=name)


def test_a_binary_file_is_called_one(tmp_path: Path) -> None:
    """Many NUL bytes that are not UTF-16: the message is about a binary file, not about a byte offset."""
    with pytest.raises(DataError, match="binary"):
        read(written(tmp_path / "a.txt", bytes(range(256)) * 4 + b"\0" * 500))


def test_a_packed_file_cut_short_is_a_data_error(tmp_path: Path) -> None:
    """A download that broke off never passes for a shorter corpus."""
    for name, packed in (("a.txt.gz", gzip.compress(b"text\n" * 999)), ("b.txt.xz", lzma.compress(b"text\n" * 999))):
        with pytest.raises(DataError, match="unpacked"):
            read(written(tmp_path / name, packed[:-9]))
        with pytest.raises(DataError, match="unpacked"):
            read(written(tmp_path / name, b"no such format"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_an_unreadable_file_is_a_storage_error(tmp_path: Path) -> None:
    """Missing permissions are reported as such."""
    path = written(tmp_path / "a.txt", "text")
    path.chmod(0)
    with pytest.raises(StorageError):
        read(path)


# Cleaning and duplicates


def test_control_characters_are_dropped_and_counted(tmp_path: Path) -> None:
    """NUL, C0, DEL and C1 go; tab, line feed, emoji and full width space stay; both kinds of line break become one."""
    path = written(tmp_path / "a.txt", "a\x00b\x07\x7f\x85c\td\u3000\U0001f600\r\ne\rf")
    documents, counts = read(path)
    assert [document.text for document in documents] == ["abc\td\u3000\U0001f600\ne\nf"]
    assert counts.control_characters_dropped == 4
    assert counts.control_characters == {"U+0000": 1, "U+0007": 1, "U+007F": 1, "U+0085": 1}
    assert counts.characters == len(documents[0].text)


def test_control_characters_and_lone_surrogates_spelled_in_json_are_dropped(tmp_path: Path) -> None:
    """What an escape smuggles past the file's own cleaning is cleaned too; a pair of surrogates is one character."""
    documents, counts = read(written(tmp_path / "a.jsonl", r'{"text": "a\u0000b\ud800c\r\n\ud83d\ude00"}'))
    assert documents[0].text == "abc\n\U0001f600"
    assert counts.control_characters_dropped == 2
    assert counts.control_characters == {"U+0000": 1, "U+D800": 1}


def test_exact_duplicate_paragraphs_are_dropped_across_files(tmp_path: Path) -> None:
    """A paragraph seen before goes, in a document of several too; what remains of the document stays."""
    written(tmp_path / "a.txt", "one\ntwo\none\nthree")
    written(tmp_path / "b.jsonl", json.dumps({"text": "new\n\ntwo\n\nlast"}) + "\n" + json.dumps({"text": "three"}))
    documents, counts = read(tmp_path, document="line")
    assert [document.text for document in documents] == ["one", "two", "three", "new\n\nlast"]
    assert counts.duplicate_paragraphs_dropped == 3
    assert counts.documents == 4


def test_paragraphs_of_the_validation_files_leave_the_training_files(tmp_path: Path) -> None:
    """With one memory for both, no text is on both sides."""
    written(tmp_path / "validation.txt", "same\nother")
    written(tmp_path / "train.txt", "first\nsame\nlast")
    seen, counts, settings = SeenParagraphs(), CorpusCounts(), DataConfig(document="line")
    list(read_documents([str(tmp_path / "validation.txt")], settings, counts, seen=seen))
    kept = [document.text for document in read_documents([str(tmp_path / "train.txt")], settings, counts, seen=seen)]
    assert kept == ["first", "last"]


@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 40).map(lambda small: small * 64), max_size=60))
def test_the_memory_of_paragraphs_is_exact_up_to_its_limit(digests: list[int]) -> None:
    """Against a set, with digests that collide in the table; zero passes for one."""
    seen, known = SeenParagraphs(slots_log2=7), set()
    for digest in digests:
        assert seen.add(digest) == ((digest or 1) not in known)
        known.add(digest or 1)
    assert seen.forgotten == 0


def test_the_memory_of_paragraphs_stays_bounded_and_never_drops_what_is_new() -> None:
    """Beyond its limit it forgets, and counts that; a new paragraph is never called a duplicate."""
    seen = SeenParagraphs(slots_log2=4)
    assert all(seen.add(digest) for digest in range(1, 1000))
    assert seen.forgotten == 999 - 12
    assert sum(not seen.add(digest) for digest in range(984, 1000)) >= 8


# What a document is


def test_auto_takes_a_small_file_whole_and_a_large_one_by_lines(tmp_path: Path) -> None:
    """Without a blank line, 32 KiB decide: in bytes, so for Chinese as well."""
    lines = [f"{number} {CHINESE}" for number in range(800)]
    small = written(tmp_path / "small.txt", "\n".join(lines[:300]))
    large = written(tmp_path / "large.txt", "\n".join(lines))
    assert small.stat().st_size <= formats.SMALL_FILE_BYTES < large.stat().st_size
    assert texts(small) == ["\n".join(lines[:300])]
    assert texts(large) == lines


def test_auto_splits_at_blank_lines_wherever_they_are(tmp_path: Path) -> None:
    """Lines of white space count as blank; a long part between blank lines is taken by lines."""
    long = [f"{number} {CHINESE}" for number in range(600)]
    path = written(tmp_path / "a.md", "\n\na\nb\n \u3000\n\nc\n\n" + "\n".join(long) + "\n\nd\ne\n")
    documents, _ = read(path)
    assert [document.text for document in documents] == ["a\nb", "c", *long, "d\ne"]
    assert [document.source for document in documents[:3]] == [f"{path}:3", f"{path}:7", f"{path}:9"]


@pytest.mark.parametrize(
    ("mode", "expected"), [("file", ["a\nb\n\nc"]), ("blank_line", ["a\nb", "c"]), ("line", ["a", "b", "c"])]
)
def test_the_document_setting_overrides_auto(tmp_path: Path, mode: str, expected: list[str]) -> None:
    """Each mode splits at its own boundaries."""
    assert texts(written(tmp_path / "a.txt", "a\nb\n\nc\n"), document=mode) == expected


@pytest.mark.parametrize("mode", ["file", "blank_line", "line", "auto"])
@pytest.mark.parametrize("breaks", ["\n", ""])
def test_a_document_too_long_to_hold_leaves_in_parts_on_one_side(
    tmp_path: Path, mode: str, breaks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory stays bounded, no character is lost, and all parts share the key that decides the split."""
    monkeypatch.setattr(formats, "MAX_DOCUMENT_CHARACTERS", 64)
    monkeypatch.setattr(formats, "SMALL_FILE_BYTES", 64)
    monkeypatch.setattr(encodings, "BLOCK_BYTES", 50)
    sentences = [f"{number}{CHINESE}{number}." for number in range(40)]
    documents, counts = read(written(tmp_path / "a.txt", breaks.join(sentences)), document=mode)
    assert all(len(document.text) <= 64 for document in documents)
    assert "".join(document.text for document in documents).replace("\n", "") == "".join(sentences)
    if breaks and mode in ("line", "auto"):
        assert [document.text for document in documents] == sentences
        assert counts.long_document_parts == 0
    else:
        assert len({document.key for document in documents}) == 1
        assert counts.long_document_parts == len(documents) - 1 > 5


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), max_size=20), max_size=8),
    st.sampled_from(["file", "line"]),
)
def test_no_character_but_white_space_and_controls_is_lost(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], mode: str
) -> None:
    """Any text comes back whole, in any of the encodings that can spell it."""
    unique = [f"{number}{line}" for number, line in enumerate(lines)] or ["0"]
    path = tmp_path_factory.mktemp("any") / "a.txt"
    path.write_bytes("\n".join(unique).encode())
    expected = formats.CONTROL.sub("", "".join(unique))
    got = "".join(texts(path, document=mode, encoding="utf-8"))
    assert "".join(got.split()) == "".join(expected.split())


# .jsonl


def test_jsonl_gives_texts_and_pairs(tmp_path: Path) -> None:
    """A text field by its name, or inputs and targets as they are; empty records are counted."""
    rows = [
        {"text": " a "},
        {"inputs": "x <extra_id_0> z", "targets": "<extra_id_0> y"},
        {"text": None},
        {"inputs": "q", "targets": ""},
    ]
    path = written(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    documents, counts = read(path)
    assert [(document.text, document.target) for document in documents] == [
        ("a", None),
        ("x <extra_id_0> z", "<extra_id_0> y"),
    ]
    assert documents[1].source == f"{path}:2"
    assert counts.empty_records_dropped == 2


def test_pairs_are_duplicates_only_as_pairs(tmp_path: Path) -> None:
    """The same source with another target is another example, on the same side of the split."""
    rows = [{"inputs": "x", "targets": target} for target in ("a", "b", "a")]
    documents, counts = read(written(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))))
    assert [document.target for document in documents] == ["a", "b"]
    assert documents[0].key == documents[1].key
    assert counts.duplicate_paragraphs_dropped == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('["a"]', "not a JSON object"),
        ('{"body": "a"}', "'body'"),
        ('{"text": 3}', "int, not text"),
    ],
)
def test_a_malformed_jsonl_line_is_named_by_number(tmp_path: Path, line: str, message: str) -> None:
    """What is wrong, and file:line."""
    path = written(tmp_path / "a.jsonl", '{"text": "fine"}\n\n' + line)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert f"{path}:3" in str(caught.value)


def test_a_record_longer_than_memory_allows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the limit a line is whole, even at the end of the file; beyond it the line is named."""
    monkeypatch.setattr(formats, "MAX_DOCUMENT_CHARACTERS", 10)
    assert texts(written(tmp_path / "a.jsonl", '{"text": "a text of more than ten"}')) == ["a text of more than ten"]
    monkeypatch.setattr(formats, "MAX_RECORD_CHARACTERS", 20)
    with pytest.raises(DataError, match="longer than 20"):
        read(tmp_path / "a.jsonl")


# .csv, .tsv

TABLE = (
    "id,date,ward,question,answer\n"
    '7,2024-01-02,ICU,"What helps against\na long, dry cough?","He said ""rest"", and plenty of water."\n'
    "8,2024-01-03,ICU,Is a fever of 39 degrees dangerous?,It may be; ask a doctor soon.\n"
)


def test_a_table_without_a_named_column_takes_its_text_columns_and_says_which(tmp_path: Path) -> None:
    """Numbers, dates and labels are no text; a record is one document; line breaks and quotes in fields stay."""
    path = written(tmp_path / "a.csv", TABLE)
    documents, counts = read(path)
    assert counts.columns_taken == {str(path): ["question", "answer"]}
    assert [document.text for document in documents] == [
        'What helps against\na long, dry cough?\nHe said "rest", and plenty of water.',
        "Is a fever of 39 degrees dangerous?\nIt may be; ask a doctor soon.",
    ]
    assert [document.source for document in documents] == [f"{path}:2", f"{path}:4"]


def test_identifiers_links_figures_and_long_labels_are_no_text_columns(tmp_path: Path) -> None:
    """Each of them is as long as a sentence, none reads as one."""
    labels = ("Department of Internal Medicine", "Department of General Surgery")
    rows = [
        f"https://example.org/records/visit/{day},12.5 13.5 14.5 15.5 16.5 {day},{labels[day % 2]},Fever lasted for {day} days"
        for day in range(30)
    ]
    path = written(tmp_path / "a.csv", "link,figures,department,note\n" + "\n".join(rows))
    assert read(path)[1].columns_taken == {str(path): ["note"]}


def test_a_named_column_is_taken_alone(tmp_path: Path) -> None:
    """From .csv with semicolons and from .tsv; an empty field is counted."""
    written(tmp_path / "a.csv", "id;note\n1;first\n2;\n")
    written(tmp_path / "b.tsv", "id\tnote\n1\tsecond\n")
    documents, counts = read(tmp_path, column="note")
    assert [document.text for document in documents] == ["first", "second"]
    assert counts.empty_records_dropped == 1


def test_a_gb18030_table_is_detected_and_its_chinese_columns_taken(tmp_path: Path) -> None:
    """Short labels are left out; questions and answers are taken."""
    content = "\u79d1\u5ba4,\u95ee\u9898,\u56de\u7b54\n" + "".join(
        f"\u5185\u79d1,{number}{CHINESE},{CHINESE}{number}\n" for number in range(5)
    )
    path = written(tmp_path / "a.csv", content.encode("gb18030"))
    _, counts = read(path)
    assert counts.encodings == {"gb18030": 1}
    assert counts.columns_taken == {str(path): ["\u95ee\u9898", "\u56de\u7b54"]}


@pytest.mark.parametrize(
    ("content", "column", "message"),
    [
        (TABLE, "text", "'question'"),
        ("id,ward\n1,ICU\n", None, "'ward'"),
        ("id,note\n1,a,b\n", "note", "3 fields"),
        ('id,note\n1,"never closed\n', "note", "cannot be read"),
        ('id,note\n1,"a" b\n', "note", "cannot be read"),
        ("x" * 200 + ",b\n", None, "not a header"),
    ],
)
def test_a_malformed_table_is_a_data_error(tmp_path: Path, content: str, column: str | None, message: str) -> None:
    """An absent column, no text column, too many fields, an open quotation mark, no header: never text cut in silence."""
    with pytest.raises(DataError, match=message):
        read(written(tmp_path / "a.csv", content), column=column)


# The split


def test_the_held_out_share_depends_on_the_content_alone(tmp_path: Path) -> None:
    """Other file names, another order, a copy among others: the same documents are held out, at about the share."""
    lines = [f"document {number}" for number in range(4000)]
    written(tmp_path / "a.txt", "\n".join(lines))
    written(tmp_path / "z" / "b.txt", "\n".join(reversed(lines)))
    sides = [
        {document.text for document in read(path, document="line")[0] if held_out(document, 0.1)}
        for path in (tmp_path / "a.txt", tmp_path / "z")
    ]
    documents = [Document(line, "elsewhere", None, text_digest(line)) for line in lines]
    assert sides[0] == sides[1] == {document.text for document in documents if held_out(document, 0.1)}
    assert 320 < len(sides[0]) < 480


def test_a_duplicate_dropped_inside_a_document_does_not_move_it_across_the_split(tmp_path: Path) -> None:
    """The key is that of the text as the file holds it, so file order cannot move a document."""
    shared, own = "heading", "own text"
    written(tmp_path / "a.jsonl", json.dumps({"text": shared}) + "\n" + json.dumps({"text": f"{shared}\n\n{own}"}))
    cut = read(tmp_path)[0][1]
    assert cut.text == own
    written(tmp_path / "a.jsonl", json.dumps({"text": f"{shared}\n\n{own}"}))
    assert read(tmp_path)[0][0].key == cut.key


def test_a_real_gb18030_table_reads_with_auto(shared_data: Path) -> None:
    """A published forum table: all records but exact duplicates, its three text columns."""
    path = shared_data / "zh_dialogue_gb18030.csv"
    documents, counts = read(path)
    assert counts.encodings == {"gb18030": 1}
    assert counts.columns_taken[str(path)] == ["title", "ask", "answer"]
    assert len(documents) + counts.duplicate_paragraphs_dropped + counts.empty_records_dropped == 7644
