"""A document with gaps as tokens, and the windows through which a model of limited length sees it.

A window is one question: at most `source_tokens` tokens, at most `sentinels` gaps. Its own gaps lie in its middle half
when the document is longer than a window; gaps around them are asked too, so that the source looks as in training, but
their answers are left to the window that has them in its middle. Where more gaps are open than sentinels are there,
the first ones are asked, the others are left out of the source, and a later pass asks them with the answers of the
earlier ones in place.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from resilient_t5.data.chunks import sentence_ends
from resilient_t5.data.tokenizer import SPACE, TextTokenizer
from resilient_t5.restoration.marks import Gap

# A private-use character is in no text of training and in no piece: beside it a segment is encoded as in mid-text.
ANCHOR = "\ue000"
# What the reading of a corpus drops too; line breaks are made one before.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufeff]")
LINE_BREAK = re.compile("\r\n?")


@dataclass
class Vocabulary:
    """Tokens that were read, and those of them that the model cannot know well."""

    tokens: int = 0
    unknown: int = 0
    """Characters without a piece."""
    untrained: int = 0
    """Pieces whose rows were not trained; their rows are those from before training."""
    spelled: int = 0
    """Byte pieces: parts of characters without a piece of their own."""

    def count(self, ids: np.ndarray, tokenizer: TextTokenizer, trained_ids: np.ndarray | None) -> None:
        """Add the tokens `ids`."""
        self.tokens += len(ids)
        self.unknown += int((ids == tokenizer.unk_id).sum())
        self.spelled += int(np.isin(ids, tokenizer.byte_ids).sum())
        self.untrained += 0 if trained_ids is None else int((~np.isin(ids, trained_ids)).sum())


@dataclass(eq=False)
class Sheet:
    """One document: `segments` of ids (int64) with gap i between segments i and i + 1, and the answers so far.

    breaks: for each segment the tokens at which a sentence begins.
    numbers: what the caller calls the gaps.
    """

    segments: list[np.ndarray]
    breaks: list[np.ndarray]
    numbers: list[int]
    answers: list[np.ndarray | None] = field(init=False)

    def __post_init__(self) -> None:
        self.answers = [None] * len(self.numbers)

    def is_open(self) -> bool:
        """Whether a gap has no answer yet."""
        return any(answer is None for answer in self.answers)


@dataclass(frozen=True, eq=False)
class Window:
    """One question about a sheet: `source` with the sentinels of the gaps `asked`, whose `own` ones it decides."""

    source: np.ndarray
    asked: tuple[int, ...]
    """Places of the gaps in the sheet, in order: the k-th one has sentinel k."""
    own: frozenset[int]
    left_out: tuple[int, ...] = ()
    """Open gaps in its stretch of text for which there is no sentinel: the source closes over them."""


def clean(text: str) -> str:
    """Text as the reading of a corpus gives it: one kind of line break, no control characters."""
    return CONTROL.sub("", LINE_BREAK.sub("\n", text))


def read_sheets(
    documents: Sequence[tuple[str, Sequence[Gap], int]],
    tokenizer: TextTokenizer,
    trained_ids: np.ndarray | None,
    counted: Vocabulary,
) -> list[Sheet]:
    """Encode documents with gaps.

    A segment behind a gap is encoded as if text stood before it, and a space before a gap belongs to its answer, since
    pieces carry the space in front of them.

    Args:
        documents: (text, its gaps in order, number of the first gap).
        tokenizer: the model's.
        trained_ids: as in `Usage`, for the count.
        counted: the tokens are added to it.
    """
    texts, shapes = [], []
    for text, gaps, _ in documents:
        bounds = [0, *(border for gap in gaps for border in (gap.start, gap.end)), len(text)]
        parts = [clean(text[a:b]) for a, b in zip(bounds[::2], bounds[1::2], strict=True)]
        parts[0], parts[-1] = parts[0].lstrip(), parts[-1].rstrip()
        for number, part in enumerate(parts):
            behind, before = number > 0, number < len(parts) - 1
            shapes.append((part, behind, before))
            texts.append(f"{ANCHOR if behind else ''}{part}{ANCHOR if before else ''}" if part else "")
    lone_space = tokenizer.pieces().index(SPACE) if SPACE in tokenizer.pieces() else -1
    encoded = iter(zip(tokenizer.encode_batch(texts), shapes, strict=True))
    sheets = []
    for _, gaps, first in documents:
        segments, breaks = [], []
        for _ in range(len(gaps) + 1):
            tokens, (part, behind, before) = next(encoded)
            inside = (tokens.ends > behind) & (tokens.starts < behind + len(part)) if part else np.zeros(0, bool)
            if not behind and part:
                inside[0] |= tokens.ids[0] == lone_space  # the dummy space in front of a text has no character
            ids, starts = tokens.ids[inside].astype(np.int64), tokens.starts[inside] - behind
            if before and len(ids) and ids[-1] == lone_space:
                ids, starts = ids[:-1], starts[:-1]
            counted.count(ids, tokenizer, trained_ids)
            segments.append(ids)
            breaks.append(np.searchsorted(starts, sentence_ends(part)[:-1]) if part else np.zeros(0, np.int64))
        sheets.append(Sheet(segments, breaks, list(range(first, first + len(gaps)))))
    return sheets


def windows_of(sheet: Sheet, sentinel_ids: np.ndarray, eos_id: int, source_tokens: int, sentinels: int) -> list[Window]:
    """The windows of the next pass over a sheet with open gaps; at least one gap is decided by them.

    Args:
        sentinel_ids: full id of sentinel k at place k.
        eos_id: the end mark, which closes every source.
        source_tokens: longest source, end mark included.
        sentinels: most gaps in a source.
    """
    flat, slots, begins = _laid_out(sheet)
    places = [place for place, answer in enumerate(sheet.answers) if answer is None]
    room = source_tokens - 1
    windows: list[Window] = []
    first, decided_until = 0, -1
    while first < len(slots):
        last = first
        while last + 1 < len(slots) and last + 1 - first < sentinels and _fits(slots[first], slots[last + 1], len(flat), room):
            last += 1
        begin, end = _extent(slots[first], slots[last], len(flat), room, begins)
        inside = [k for k in range(len(slots)) if begin <= slots[k] < end]
        # A gap that an earlier window of this pass decides would have to be left out of this source: next pass.
        if not windows or len(inside) <= sentinels or begin > decided_until:
            asked = _asked(inside, first, last, sentinels)
            ids = flat[begin:end].copy()
            ids[[slots[k] - begin for k in asked]] = sentinel_ids[: len(asked)]
            left_out = [k for k in inside if k not in asked]
            source = np.append(np.delete(ids, [slots[k] - begin for k in left_out]), eos_id)
            own = frozenset(places[k] for k in range(first, last + 1))
            windows.append(Window(source, tuple(places[k] for k in asked), own, tuple(places[k] for k in left_out)))
            decided_until = slots[last]
        first = last + 1
    return windows


def _laid_out(sheet: Sheet) -> tuple[np.ndarray, list[int], np.ndarray]:
    """The tokens with answers in place and -1 for each open gap, where those are, and where sentences begin."""
    parts, slots, begins, length = [], [], [], 0
    for number, (segment, breaks) in enumerate(zip(sheet.segments, sheet.breaks, strict=True)):
        parts.append(segment)
        begins.append(breaks + length)
        length += len(segment)
        if number < len(sheet.answers):
            answer = sheet.answers[number]
            if answer is None:
                slots.append(length)
                answer = np.array([-1], np.int64)
            parts.append(answer)
            length += len(answer)
    return np.concatenate(parts), slots, np.concatenate(begins)


def _fits(first: int, slot: int, length: int, room: int) -> bool:
    return length <= room or slot - first < room // 2


def _extent(first: int, last: int, length: int, room: int, begins: np.ndarray) -> tuple[int, int]:
    """Tokens [begin, end) around two slots: as many as there is room for, from a sentence's beginning if one is near."""
    begin = max(0, first - (room - (last - first + 1)) // 2)
    end = min(length, begin + room)
    begin = max(0, end - room)
    if begin > 0:
        near = begins[(begins >= begin) & (begins <= (begin + first) // 2)]
        begin = int(near[0]) if len(near) else begin
    if end < length:
        near = begins[(begins <= end) & (begins > (last + 1 + end) // 2)]
        end = int(near[-1]) if len(near) else end
    return begin, end


def _asked(inside: list[int], first: int, last: int, sentinels: int) -> list[int]:
    """The window's own gaps and, as far as sentinels go, those nearest to them."""
    others = sorted((k for k in inside if not first <= k <= last), key=lambda k: max(first - k, k - last))
    return sorted([*range(first, last + 1), *others[: sentinels - (last - first + 1)]])
