"""Gaps of a text: the marks a user chose, the documents that hold them, and the encoder inputs they are predicted from.

The tokens of a document are those that the tokenizer gives for the text with its gaps, as in training and in plain
transformers. A window is one encoder input with a limited number of tokens and gaps. If the document is longer than a
window, the gaps that a window predicts (its own) lie in its middle half. Gaps around them get a sentinel as well, so that
the source looks as in training, but only the window that has them in its middle predicts them. If more gaps are open than
sentinels exist, the first ones are predicted, the others are left out of the source, and a later pass predicts them with
the earlier answers in place.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from resilient_t5.config.sections import DocumentMode
from resilient_t5.data.corpus.formats import Line, document_lines
from resilient_t5.data.examples import sentence_ends
from resilient_t5.data.tokenizer.tokenizer import TextTokenizer
from resilient_t5.errors import ConfigError

DEFAULT_MARK = "[?]"
KNOWN_MARKS = ("[?]", "\u25a1\u25a1", "___", "<extra_id_0>")
SENTINEL = re.compile(r"<extra_id_\d{1,2}>")
LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+\Z")
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufeff]")
"""Characters that the reading of a corpus drops, after it has unified line breaks."""
NEXT_GAP = "\ufffc"
"""Text after a gap that is followed directly by another open gap."""


@dataclass(frozen=True)
class Gap:
    """Characters [start, end) of the text, and the mark there."""

    start: int
    end: int
    mark: str


@dataclass
class OpenDocument:
    """A document with open gaps: the texts before, between and after them, and the caller's number for each gap."""

    parts: list[str]
    numbers: list[int]

    @classmethod
    def of(cls, text: str, gaps: Sequence[tuple[int, int]], first_number: int) -> "OpenDocument":
        """Cut `text` at its gaps, characters [start, end) in order and disjoint, numbered from `first_number`."""
        bounds = [0, *(border for gap in gaps for border in gap), len(text)]
        parts = [clean(text[a:b]) for a, b in zip(bounds[::2], bounds[1::2], strict=True)]
        parts[0], parts[-1] = parts[0].lstrip(), parts[-1].rstrip()
        return cls(parts, list(range(first_number, first_number + len(gaps))))

    def fill(self, answers: Mapping[int, Callable[[str, str], str]]) -> None:
        """Close the gaps with these numbers. An answer is a function of the text before and after its gap."""
        parts, numbers = [self.parts[0]], []
        for number, after in zip(self.numbers, self.parts[1:], strict=True):
            if number in answers:
                following = after or (NEXT_GAP if number != self.numbers[-1] else "")
                parts[-1] += answers[number](parts[-1], following) + after
            else:
                parts.append(after)
                numbers.append(number)
        self.parts, self.numbers = parts, numbers


@dataclass(frozen=True, eq=False)
class EncodedDocument:
    """Tokens of an open document.

    tokens: int64, -1 for each gap.
    gaps: places of the gaps in `tokens`.
    sentence_starts: places in `tokens` where a sentence begins.
    """

    tokens: np.ndarray
    gaps: list[int]
    sentence_starts: np.ndarray


@dataclass(frozen=True, eq=False)
class Window:
    """One encoder input with the sentinels of `gaps`, of which it predicts its `own`."""

    source: np.ndarray
    gaps: tuple[int, ...]
    """Indices of gaps in the document, in order: the k-th one has sentinel k."""
    own: frozenset[int]
    left_out: tuple[int, ...] = ()
    """Open gaps within the window for which there is no sentinel; the source omits them."""


def find_gaps(text: str, marks: Sequence[str]) -> list[Gap]:
    """Return the gaps of `text`, in order.

    A mark is literal, with two exceptions: one repeated character (`___`, two white squares) also matches any longer run
    of it, and `<extra_id_k>` with any k matches all hundred sentinels. At one position the longest mark wins.

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
    """Return the usual marks that occur in `text` and are not among `marks`."""
    return [mark for mark in KNOWN_MARKS if mark not in marks and find_gaps(text, [mark])]


def document_ranges(text: str, mode: DocumentMode) -> list[tuple[int, int]]:
    """Characters [start, end) of each document, in order, as the corpus reader splits a text; blank lines may be left out."""
    spans = [match.span() for match in LINE.finditer(text)]
    lines = [Line(text[start:end].rstrip("\r\n"), number) for number, (start, end) in enumerate(spans)]
    groups = [group for group, _ in document_lines(lines, mode)]
    return [(spans[group[0].number][0], spans[group[-1].number][1]) for group in groups]


def clean(text: str) -> str:
    """Normalise text as the reading of a corpus does: one kind of line break, no control characters."""
    return CONTROL.sub("", re.sub("\r\n?", "\n", text))


def encode_documents(documents: Sequence[OpenDocument], tokenizer: TextTokenizer) -> list[EncodedDocument]:
    """Tokenize open documents."""
    encoded = []
    for document, parts in zip(documents, tokenizer.encode_around_gaps([d.parts for d in documents]), strict=True):
        tokens: list[np.ndarray] = []
        starts: list[np.ndarray] = []
        gaps: list[int] = []
        length = 0
        for text, part in zip(document.parts, parts, strict=True):
            if starts:
                gaps.append(length)
                tokens.append(np.array([-1], np.int64))
                length += 1
            breaks = np.searchsorted(part.starts, sentence_ends(text)[:-1]) if text else np.zeros(0, np.int64)
            starts.append(breaks + length)
            tokens.append(part.ids.astype(np.int64))
            length += len(part.ids)
        encoded.append(EncodedDocument(np.concatenate(tokens), gaps, np.concatenate(starts)))
    return encoded


def make_windows(document: EncodedDocument, tokenizer: TextTokenizer, max_tokens: int, max_gaps: int) -> list[Window]:
    """Return the windows of the next pass; together they predict at least one gap.

    Args:
        document: the document with its open gaps.
        tokenizer: the tokenizer of the model.
        max_tokens: maximum length of a source, end token included.
        max_gaps: maximum number of gaps in a source.
    """
    tokens, gaps = document.tokens, document.gaps
    is_whole = len(tokens) < max_tokens
    width = max_tokens - 1 if is_whole else max_tokens - 2  # one token for the start of a text
    windows: list[Window] = []
    first, predicted_until = 0, -1
    while first < len(gaps):
        last = first
        while last + 1 < min(len(gaps), first + max_gaps) and (is_whole or gaps[last + 1] - gaps[first] < width // 2):
            last += 1
        begin, end = _extent(document, first, last, width)
        inside = [k for k in range(len(gaps)) if begin <= gaps[k] < end]
        # Wait for the next pass if this source would have to omit a gap that an earlier window of this pass predicts.
        if not windows or len(inside) <= max_gaps or begin > predicted_until:
            chosen = _nearest(inside, first, last, max_gaps)
            left_out = tuple(k for k in inside if k not in chosen)
            ids = tokens[begin:end].copy()
            ids[[gaps[k] - begin for k in chosen]] = tokenizer.sentinel_ids[: len(chosen)]
            source = np.delete(ids, [gaps[k] - begin for k in left_out])
            source = source if begin == 0 else _with_text_start(source, tokenizer, max_tokens - 1)
            source = np.append(source, tokenizer.eos_id)
            windows.append(Window(source, tuple(chosen), frozenset(range(first, last + 1)), left_out))
            predicted_until = gaps[last]
        first = last + 1
    return windows


def _with_text_start(ids: np.ndarray, tokenizer: TextTokenizer, max_tokens: int) -> np.ndarray:
    """Tokens of a text that begins here, as for chunks in training; unchanged if the start token does not fit."""
    if tokenizer.of_an_older_version:
        return ids
    word, replaced = tokenizer.starts_as_text(ids)
    started = np.concatenate([word, ids[replaced:]])
    return started if len(started) <= max_tokens else ids


def _extent(document: EncodedDocument, first: int, last: int, width: int) -> tuple[int, int]:
    """Up to `width` tokens [begin, end) around gaps `first` to `last`, cut at sentence starts where one is near."""
    left, right, starts = document.gaps[first], document.gaps[last], document.sentence_starts
    begin = max(0, left - (width - (right - left + 1)) // 2)
    end = min(len(document.tokens), begin + width)
    begin = max(0, end - width)
    if begin > 0:
        near = starts[(starts >= begin) & (starts <= (begin + left) // 2)]
        begin = int(near[0]) if len(near) else begin
    if end < len(document.tokens):
        near = starts[(starts <= end) & (starts > (right + 1 + end) // 2)]
        end = int(near[-1]) if len(near) else end
    return begin, end


def _nearest(inside: list[int], first: int, last: int, max_gaps: int) -> list[int]:
    """Gaps `first` to `last` and the nearest others, at most `max_gaps`, in order."""
    others = sorted((k for k in inside if not first <= k <= last), key=lambda k: max(first - k, k - last))
    return sorted([*range(first, last + 1), *others[: max_gaps - (last - first + 1)]])
