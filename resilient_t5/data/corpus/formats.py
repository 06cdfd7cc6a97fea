"""File formats: plain text, .jsonl, .csv and .tsv to text records, line by line.

Memory is one record and one block, whatever the size of the file: a plain text document longer than
`MAX_DOCUMENT_CHARACTERS` is split into parts; a longer line of .jsonl or field of .csv is an error.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from resilient_t5.config.sections import DataConfig, DocumentMode
from resilient_t5.data.corpus.encodings import PACKED_SUFFIXES, read_text, resolve_encoding
from resilient_t5.errors import DataError

MAX_DOCUMENT_CHARACTERS = 1 << 20
MAX_RECORD_CHARACTERS = 1 << 24
SMALL_FILE_BYTES = 32 * 1024
COLUMN_SAMPLE_ROWS = 200
TEXT_COLUMN_WIDTH = 20  # minimum mean width of the fields of a text column; a wide (CJK) character counts two
MAX_COLUMN_NAME = 100

# C0 without tab and line feed, DEL, C1, and lone surrogates, which .jsonl escapes can contain and tokenizers cannot read.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
FIRST_SURROGATE = 0xD800
WIDE = re.compile("[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff60\U00020000-\U0003ffff]")
STOPS = "\u3002\uff01\uff1f\uff1b.!?\n "


@dataclass
class CorpusCounts:
    """Counters of what was read and dropped, over one or more calls."""

    files: int = 0
    bytes: int = 0
    """Bytes of the files, decompressed."""
    documents: int = 0
    characters: int = 0
    """Characters of the kept documents."""
    control_characters_dropped: int = 0
    """NUL, control characters except tab and line feed, and lone surrogates."""
    control_characters: dict[str, int] = field(default_factory=dict)
    """Count by code point (U+0000); all lone surrogates count as U+D800."""
    duplicate_paragraphs_dropped: int = 0
    empty_records_dropped: int = 0
    """Records of .jsonl, .csv and .tsv without text."""
    long_document_parts: int = 0
    """Parts after the first one of documents too long for memory."""
    paragraphs_forgotten: int = 0
    """Paragraphs beyond the size of the duplicate table; a later copy of one of them may be kept."""
    encodings: dict[str, int] = field(default_factory=dict)
    """Encoding -> files."""
    columns_taken: dict[str, list[str]] = field(default_factory=dict)
    """Path of a .csv or .tsv -> the columns used."""

    def clean(self, text: str) -> str:
        """Remove control characters from `text` and count them."""
        found = CONTROL.findall(text)
        if not found:
            return text
        self.control_characters_dropped += len(found)
        for character, times in Counter(found).items():
            name = f"U+{min(ord(character), FIRST_SURROGATE):04X}"
            self.control_characters[name] = self.control_characters.get(name, 0) + times
        return CONTROL.sub("", text)


class Record(NamedTuple):
    """Text as in the file, before duplicates are dropped; `part_of` as in `Line`."""

    text: str
    line: int
    target: str | None = None
    part_of: str | None = None


class Line(NamedTuple):
    """A line and its number, from 1. For a later part of a long line, `part_of` is the first part."""

    text: str
    number: int
    part_of: str | None = None


def file_kind(path: Path) -> str | None:
    """`txt`, `md`, `jsonl`, `csv` or `tsv` by extension, ignoring .gz and .xz; None for other files."""
    name = path.name.lower()
    for packed in PACKED_SUFFIXES:
        name = name.removesuffix(packed)
    kind = name.rpartition(".")[2]
    return kind if kind in ("txt", "md", "jsonl", "csv", "tsv") else None


def read_records(path: Path, settings: DataConfig, counts: CorpusCounts) -> Iterator[Record]:
    """Records of one file, without control characters.

    Raises:
        DataError: undecodable text, a malformed record, a missing field or column; names the line.
        ConfigError, StorageError: as `resolve_encoding`.
    """
    encoding = resolve_encoding(path, settings.encoding)
    counts.files += 1
    counts.encodings[encoding] = counts.encodings.get(encoding, 0) + 1
    kind = file_kind(path)
    if kind == "jsonl":
        return _json_records(path, text_lines(path, encoding, counts), settings.text_field, counts)
    if kind in ("csv", "tsv"):
        return _table_records(path, text_lines(path, encoding, counts), settings.column, counts)
    return _plain_records(text_lines(path, encoding, counts, cut=True), settings.document, counts)


def text_lines(path: Path, encoding: str, counts: CorpusCounts, *, cut: bool = False) -> Iterator[Line]:
    """Lines of a text file without line feed and control characters.

    With `cut`, a line longer than `MAX_DOCUMENT_CHARACTERS` is split into parts of the same number; without it, a line longer
    than `MAX_RECORD_CHARACTERS` is a DataError.
    """
    number, rest_of_line = 1, ""
    beginning: str | None = None
    for text, size in read_text(path, encoding):
        counts.bytes += size
        lines = counts.clean(text).split("\n")
        lines[0] = rest_of_line + lines[0]
        rest_of_line = lines.pop()
        for line in lines:
            if beginning is not None or (cut and len(line) > MAX_DOCUMENT_CHARACTERS):
                yield from _parts(line, number, beginning)
                beginning = None
            else:
                yield Line(line, number)
            number += 1
        if cut and len(rest_of_line) > 2 * MAX_DOCUMENT_CHARACTERS:
            *parts, rest = _parts(rest_of_line, number, beginning)
            yield from parts
            rest_of_line, beginning = rest.text, rest.part_of
        elif len(rest_of_line) > MAX_RECORD_CHARACTERS:
            raise DataError(
                f"a line is longer than {MAX_RECORD_CHARACTERS} characters",
                where=f"{path}:{number}",
                hint="Write one record per line",
            )
    if rest_of_line:
        yield from _parts(rest_of_line, number, beginning) if cut else [Line(rest_of_line, number)]


def _parts(text: str, number: int, beginning: str | None) -> Iterator[Line]:
    """Split a line into parts of at most `MAX_DOCUMENT_CHARACTERS`, at the last stop near the limit."""
    start = 0
    while len(text) - start > MAX_DOCUMENT_CHARACTERS:
        limit = start + MAX_DOCUMENT_CHARACTERS
        near = limit - MAX_DOCUMENT_CHARACTERS // 8
        end = max(text.rfind(stop, near, limit) for stop in STOPS) + 1 or limit
        part = text[start:end]
        yield Line(part, number, beginning)
        start, beginning = end, beginning or part
    yield Line(text[start:], number, beginning)


def document_lines(
    lines: Iterable[Line], mode: DocumentMode, max_characters: int | None = None
) -> Iterator[tuple[list[Line], bool]]:
    """Group the lines of a plain text into documents.

    Args:
        lines: the lines, without their line breaks.
        mode: as `data.document`. `auto`: a block between blank lines is a document up to `SMALL_FILE_BYTES`; in a larger
            block each line is one. This needs no look-ahead beyond `SMALL_FILE_BYTES`.
        max_characters: most characters of a group; a longer document becomes several groups. None: no limit.

    Yields:
        the lines of a group, and whether the group continues the document of the group before it.
    """
    group: list[Line] = []
    size, continued, by_line = 0, False, mode == "line"
    for line in lines:
        if mode != "file" and (not line.text or line.text.isspace()):
            if group:
                yield group, continued
            group, size, continued, by_line = [], 0, False, mode == "line"
            continue
        if by_line:
            yield [line], False
            continue
        too_long = max_characters is not None and size + len(line.text) > max_characters
        if group and mode != "auto" and (too_long or line.part_of is not None):
            yield group, continued
            group, size, continued = [], 0, True
        group.append(line)
        size += (len(line.text.encode("utf-8", "surrogatepass")) if mode == "auto" else len(line.text)) + 1
        if mode == "auto" and size > SMALL_FILE_BYTES:
            yield from (([line], False) for line in group)
            group, by_line = [], True
    if group:
        yield group, continued


def _plain_records(lines: Iterator[Line], document: DocumentMode, counts: CorpusCounts) -> Iterator[Record]:
    """Documents of plain text by `data.document`."""
    beginning = ""
    for group, continued in document_lines(lines, document, MAX_DOCUMENT_CHARACTERS):
        text = "\n".join(line.text for line in group)
        part_of = beginning if continued else group[0].part_of
        beginning = beginning if continued else text
        counts.long_document_parts += part_of is not None
        yield Record(text, group[0].number, None, part_of)


def _json_records(path: Path, lines: Iterator[Line], text_field: str, counts: CorpusCounts) -> Iterator[Record]:
    for text, number, _ in lines:
        if not text or text.isspace():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"a line is not JSON: {error}", where=where, hint="Write one JSON object per line") from None
        if not isinstance(value, dict):
            raise DataError("a line is not a JSON object", where=where, hint=f'Write {{"{text_field}": "..."}} on each line')
        if text_field in value:
            record = Record(_text_of(value, text_field, where, counts), number)
        elif "inputs" in value and "targets" in value:
            target = _text_of(value, "targets", where, counts)
            source = _text_of(value, "inputs", where, counts)
            record = Record(source if target.strip() else "", number, target)
        else:
            raise DataError(
                f"a record has neither {text_field!r} nor 'inputs' and 'targets'; it has {_listed(value)}",
                where=where,
                hint="Set data.text_field to the field with the text",
            )
        if record.text.strip():
            yield record
        else:
            counts.empty_records_dropped += 1


def _text_of(value: dict[str, object], name: str, where: str, counts: CorpusCounts) -> str:
    text = value[name]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(f"field {name!r} is {type(text).__name__}, not text", where=where, hint="Set data.text_field to a text")
    return counts.clean(text.replace("\r\n", "\n").replace("\r", "\n"))


def _listed(names: Iterable[str]) -> str:
    shown = [repr(name[:40]) for name in islice(names, 12)]
    return ", ".join(shown) or "no field"


def _table_records(path: Path, lines: Iterator[Line], column: str | None, counts: CorpusCounts) -> Iterator[Record]:
    """One record per row: the fields of the text columns, one per line."""
    rows = _table_rows(path, lines)
    first = next(rows, None)
    if first is None:
        return
    header = [name.strip() for name in first[1]]
    if any(len(name) > MAX_COLUMN_NAME for name in header):
        raise DataError("the first record is not a header", where=f"{path}:1", hint="Add a first line with the column names")
    sample = list(islice(rows, COLUMN_SAMPLE_ROWS))
    taken = _taken_columns(path, header, [row for _, row in sample], column)
    counts.columns_taken[str(path)] = [header[index] or f"column {index + 1}" for index in taken]
    for number, row in chain(sample, rows):
        if any(extra.strip() for extra in row[len(header) :]):
            raise DataError(
                f"a record has {len(row)} fields, the header names {len(header)}",
                where=f"{path}:{number}",
                hint="Put quotation marks around fields that contain the separator",
            )
        text = "\n".join(row[index].strip() for index in taken if index < len(row) and row[index].strip())
        if text:
            yield Record(text, number)
        else:
            counts.empty_records_dropped += 1


def _table_rows(path: Path, lines: Iterator[Line]) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of each row that is not empty."""
    head = next(lines, None)
    if head is None:
        return
    delimiter = "\t" if file_kind(path) == "tsv" else max(",;\t", key=head.text.count)
    # The limit is process-wide; it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD_CHARACTERS))
    reader = csv.reader((line.text + "\n" for line in chain([head], lines)), delimiter=delimiter, strict=True)
    start = 1
    try:
        for row in reader:
            if any(row):
                yield start, row
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"the record cannot be read: {error}",
            where=f"{path}:{start}",
            hint="Check its quotation marks: one inside a quoted field is written twice",
        ) from None


def _taken_columns(path: Path, header: list[str], sample: list[list[str]], column: str | None) -> list[int]:
    """Indices of the text columns: the named one, or those whose sampled fields look like text."""
    if column is not None:
        if column not in header:
            raise DataError(
                f"no column {column!r}; there are {_listed(header)}", where=str(path), hint="Set data.column to one of these"
            )
        return [header.index(column)]
    columns = ([row[index].strip() for row in sample if index < len(row)] for index in range(len(header)))
    taken = [index for index, fields in enumerate(columns) if _reads_as_text([field for field in fields if field])]
    if not taken and sample:
        raise DataError(
            f"no column contains running text; there are {_listed(header)}",
            where=str(path),
            hint="Set data.column to the one to take",
        )
    return taken


def _reads_as_text(fields: list[str]) -> bool:
    """Whether fields are long enough on average, mostly letters, with words or wide characters, and varied."""
    joined = "".join(fields)
    wide = len(WIDE.findall(joined))
    letters = sum(map(str.isalpha, joined))
    in_words = sum(" " in field or WIDE.search(field) is not None for field in fields)
    return (
        len(joined) + wide >= TEXT_COLUMN_WIDTH * max(1, len(fields))
        and 2 * letters >= len(joined)
        and 2 * in_words >= len(fields)
        and 5 * len(set(fields)) >= len(fields)
    )
