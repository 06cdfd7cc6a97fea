"""Gaps in a text: where the marks stand that a user chose, and which lines belong together. Text only, no tokens."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from resilient_t5.data.corpus.formats import Line, document_lines
from resilient_t5.errors import ConfigError
from resilient_t5.restoration.restoration_config import DocumentMode

DEFAULT_MARK = "[?]"
KNOWN_MARKS = ("[?]", "\u25a1\u25a1", "___", "<extra_id_0>")
SENTINEL = re.compile(r"<extra_id_\d{1,2}>")
LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+\Z")


@dataclass(frozen=True)
class Gap:
    """One gap: characters [start, end) of the text, and what stands there."""

    start: int
    end: int
    mark: str


def find_gaps(text: str, marks: Sequence[str]) -> list[Gap]:
    """The gaps of `text`, in order.

    A mark is taken as it is written, with two exceptions: one character repeated (`___`, two white squares) also matches
    any longer run of it, and `<extra_id_k>` for any k stands for all hundred sentinels. Of marks that begin at one place
    the longest counts.

    Raises:
        ConfigError: a mark is empty or white space.
    """
    pattern = re.compile("|".join(_pattern(mark) for mark in sorted(marks, key=len, reverse=True)))
    return [Gap(match.start(), match.end(), match[0]) for match in pattern.finditer(text)]


def _pattern(mark: str) -> str:
    if not mark or mark.isspace():
        raise ConfigError("--mark: a mark is at least one visible character, such as [?], ___ or <extra_id_0>")
    if SENTINEL.fullmatch(mark):
        return SENTINEL.pattern
    if len(mark) > 1 and set(mark) == {mark[0]}:
        return f"(?:{re.escape(mark[0])}){{{len(mark)},}}"
    return re.escape(mark)


def other_marks(text: str, marks: Sequence[str]) -> list[str]:
    """The usual marks that stand in `text` and are not among `marks`."""
    return [mark for mark in KNOWN_MARKS if mark not in marks and find_gaps(text, [mark])]


def document_ranges(text: str, mode: DocumentMode) -> list[tuple[int, int]]:
    """Characters [start, end) of each document, in order, as the corpus reader splits a text; blank lines may be left out."""
    spans = [match.span() for match in LINE.finditer(text)]
    lines = [Line(text[start:end].rstrip("\r\n"), number) for number, (start, end) in enumerate(spans)]
    groups = [group for group, _ in document_lines(lines, mode)]
    return [(spans[group[0].number][0], spans[group[-1].number][1]) for group in groups]
