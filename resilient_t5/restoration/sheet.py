"""A document with gaps as tokens, and the windows through which a model of limited length sees it.

The tokens are those that the tokenizer gives for the text with its gaps, as in training and in plain transformers.

A window is one question: at most `source_tokens` tokens, at most `sentinels` gaps. Its own gaps lie in its middle half
when the document is longer than a window; gaps around them are asked too, so that the source looks as in training, but
their answers are left to the window that has them in its middle. Where more gaps are open than sentinels are there,
the first ones are asked, the others are left out of the source, and a later pass asks them with the answers of the
earlier ones in place.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from resilient_t5.data.examples import sentence_ends
from resilient_t5.data.tokenizer.tokenizer import TextTokenizer

# What the reading of a corpus drops too; line breaks are made one before.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufeff]")
LINE_BREAK = re.compile("\r\n?")
BESIDE_A_GAP = "\ufffc"  # stands for the next gap where two touch


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


@dataclass
class Draft:
    """A document in which gaps are still open: the text before, between and behind them, and what the caller calls them."""

    parts: list[str]
    numbers: list[int]

    def settle(self, answers: Mapping[int, Callable[[str, str], str]]) -> None:
        """Put the answers to some gaps in their places.

        Args:
            answers: by number, a function from the text before the gap and the text behind it to the text in it.
        """
        parts, numbers = [self.parts[0]], []
        for number, behind in zip(self.numbers, self.parts[1:], strict=True):
            if number in answers:
                following = behind or (BESIDE_A_GAP if number != self.numbers[-1] else "")
                parts[-1] += answers[number](parts[-1], following) + behind
            else:
                parts.append(behind)
                numbers.append(number)
        self.parts, self.numbers = parts, numbers


@dataclass(frozen=True, eq=False)
class GapDocument:
    """The tokens of a draft: `segments` of ids (int64) with gap i between segments i and i + 1.

    breaks: for each segment the tokens at which a sentence begins.
    """

    segments: list[np.ndarray]
    breaks: list[np.ndarray]


@dataclass(frozen=True, eq=False)
class Window:
    """One question about a sheet: `source` with the sentinels of the gaps `asked`, whose `own` ones it decides."""

    source: np.ndarray
    asked: tuple[int, ...]
    """Places of the gaps in the draft, in order: the k-th one has sentinel k."""
    own: frozenset[int]
    left_out: tuple[int, ...] = ()
    """Open gaps in its stretch of text for which there is no sentinel: the source closes over them."""


def clean(text: str) -> str:
    """Text as the reading of a corpus gives it: one kind of line break, no control characters."""
    return CONTROL.sub("", LINE_BREAK.sub("\n", text))


def make_draft(text: str, gaps: Sequence[tuple[int, int]], first_number: int) -> Draft:
    """The draft of a document.

    Args:
        gaps: characters [start, end) of each, in order and apart.
        first_number: number of the first gap; the others follow.
    """
    bounds = [0, *(border for gap in gaps for border in gap), len(text)]
    parts = [clean(text[a:b]) for a, b in zip(bounds[::2], bounds[1::2], strict=True)]
    parts[0], parts[-1] = parts[0].lstrip(), parts[-1].rstrip()
    return Draft(parts, list(range(first_number, first_number + len(gaps))))


def read_sheets(
    drafts: Sequence[Draft], tokenizer: TextTokenizer, trained_ids: np.ndarray | None, counted: Vocabulary | None
) -> list[GapDocument]:
    """Encode drafts.

    Args:
        tokenizer: the model's.
        trained_ids: as in `Usage`, for the count.
        counted: the tokens are added to it.
    """
    sheets = []
    for draft, encoded in zip(drafts, tokenizer.encode_around_gaps([draft.parts for draft in drafts]), strict=True):
        segments = [tokens.ids.astype(np.int64) for tokens in encoded]
        breaks = [
            np.searchsorted(tokens.starts, sentence_ends(part)[:-1]) if part else np.zeros(0, np.int64)
            for part, tokens in zip(draft.parts, encoded, strict=True)
        ]
        if counted is not None:
            counted.count(np.concatenate(segments), tokenizer, trained_ids)
        sheets.append(GapDocument(segments, breaks))
    return sheets


def windows_of(sheet: GapDocument, tokenizer: TextTokenizer, source_tokens: int, sentinels: int) -> list[Window]:
    """The windows of the next pass over a sheet; at least one gap is decided by them.

    Args:
        source_tokens: longest source, end mark included.
        sentinels: most gaps in a source.
    """
    flat, slots, begins = _laid_out(sheet)
    room = source_tokens - 1 if len(flat) < source_tokens else source_tokens - 2  # the mark of a text's beginning
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
            ids[[slots[k] - begin for k in asked]] = tokenizer.sentinel_ids[: len(asked)]
            left_out = [k for k in inside if k not in asked]
            source = np.delete(ids, [slots[k] - begin for k in left_out])
            source = source if begin == 0 else _starts_as_text(source, tokenizer, source_tokens - 1)
            windows.append(
                Window(np.append(source, tokenizer.eos_id), tuple(asked), frozenset(range(first, last + 1)), tuple(left_out))
            )
            decided_until = slots[last]
        first = last + 1
    return windows


def _starts_as_text(ids: np.ndarray, tokenizer: TextTokenizer, room: int) -> np.ndarray:
    """The ids of a text that begins here, as chunks do in training; unless there is no room for the mark of a beginning."""
    if tokenizer.of_an_older_version:
        return ids
    word, replaced = tokenizer.starts_as_text(ids)
    begun = np.concatenate([word, ids[replaced:]])
    return begun if len(begun) <= room else ids


def _laid_out(sheet: GapDocument) -> tuple[np.ndarray, list[int], np.ndarray]:
    """The tokens with -1 for each gap, where those are, and where sentences begin."""
    parts, slots, begins, length = [], [], [], 0
    for number, (segment, breaks) in enumerate(zip(sheet.segments, sheet.breaks, strict=True)):
        parts.append(segment)
        begins.append(breaks + length)
        length += len(segment)
        if number < len(sheet.segments) - 1:
            slots.append(length)
            parts.append(np.array([-1], np.int64))
            length += 1
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
