"""Sentinels: answers read by sentinel, and stitched into the text.

Everything here works on ids, never on text: a model may write a malformed sentinel as text, and text loses what ids
keep. Shapes: B rows, S source tokens, T generated tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from rapidfuzz.distance import Levenshtein


class Alignment:
    """Two rows of ids side by side, by the fewest edits (Levenshtein 1966)."""

    def __init__(self, from_ids: np.ndarray, to_ids: np.ndarray):
        self._blocks = Levenshtein.opcodes(np.asarray(from_ids).tolist(), np.asarray(to_ids).tolist())

    def changed(self) -> list[tuple[int, int]]:
        """The parts of the first row that the second one does not keep, in order; empty where something was put in."""
        return [(block.src_start, block.src_end) for block in self._blocks if block.tag != "equal"]

    def replacements(self) -> list[tuple[int, int, int, int]]:
        """(start, end) of the first row and what stands for it in the second one, for every part that is not kept."""
        return [(b.src_start, b.src_end, b.dest_start, b.dest_end) for b in self._blocks if b.tag != "equal"]

    def place(self, start: int, end: int) -> tuple[int, int]:
        """The part of the second row that stands for `start` to `end` of the first; what was put in at its borders counts."""
        return min(self._partners(start)), max(self._partners(end))

    def _partners(self, position: int) -> list[int]:
        """Positions of the second row that a border of the first may be matched with."""
        found = [0] if position == 0 else []
        for block in self._blocks:
            if block.src_start == position:
                found.append(block.dest_start)
            if block.src_end == position:
                found.append(block.dest_end)
            if block.src_start < position < block.src_end:
                found.append(min(block.dest_start + position - block.src_start, block.dest_end))
        return found


@dataclass(frozen=True, eq=False)
class Fills:
    """One generated row, read by sentinel."""

    spans: tuple[np.ndarray | None, ...]
    """Ids of the answer for sentinel k at place k; None where the sentinel is missing, empty where its answer is."""
    missing: int
    """Expected sentinels that were not written."""
    duplicate: int
    """Expected sentinels written again; the first answer counts, the others are dropped."""
    out_of_order: int
    """Expected sentinels that came after a higher one."""
    unknown: int
    """Sentinels that the source does not hold; what follows them is dropped."""
    stray: int
    """Tokens before the first sentinel."""
    early_end: bool
    """The row ended by itself before the last expected sentinel."""
    cut_off: bool
    """The row did not end: the token limit cut it off."""

    @property
    def faulty(self) -> bool:
        """Whether the row is anything but the expected sentinels in order, then the end mark."""
        counts = (self.missing, self.duplicate, self.out_of_order, self.unknown, self.stray)
        return any(counts) or self.early_end or self.cut_off


def parse_fills(generated_ids: np.ndarray, sentinel_ids: np.ndarray, eos_id: int, pad_id: int, expected: int) -> Fills:
    """Read one generated row.

    Args:
        generated_ids: int (T,), with or without the decoder's start token; what follows the first end mark is ignored.
        sentinel_ids: int, id of sentinel k at place k.
        eos_id: the end mark.
        pad_id: ignored wherever it stands.
        expected: sentinels in the source, 0 to expected - 1.
    """
    row, ended = until_end(generated_ids, eos_id, pad_id)
    number = sentinel_numbers(row, sentinel_ids)
    marks = np.flatnonzero(number >= 0)
    spans: list[np.ndarray | None] = [None] * expected
    duplicate = out_of_order = unknown = 0
    highest = -1
    for mark, until in zip(marks, np.append(marks, len(row))[1:], strict=True):
        k = int(number[mark])
        if k >= expected:
            unknown += 1
        elif spans[k] is not None:
            duplicate += 1
        else:
            spans[k] = row[mark + 1 : until]
            out_of_order += k < highest
            highest = max(highest, k)
    return Fills(
        spans=tuple(spans),
        missing=sum(span is None for span in spans),
        duplicate=duplicate,
        out_of_order=out_of_order,
        unknown=unknown,
        stray=int(marks[0]) if len(marks) else len(row),
        early_end=ended and expected > 0 and spans[-1] is None,
        cut_off=not ended,
    )


def align_fills(
    clean_ids: np.ndarray, generated_ids: np.ndarray, spans: Sequence[tuple[int, int]], eos_id: int, pad_id: int
) -> Fills:
    """Read one generated row of a model that writes the whole text: what it wrote in the place of each span.

    The places come from the alignment of the two rows with the fewest edits; what was inserted at a span's border counts
    to the span.

    Args:
        clean_ids: int, the undamaged chunk.
        generated_ids: int (T,); what follows the first end mark is ignored.
        spans: (start, end) in `clean_ids`, in order.
        eos_id: the end mark.
        pad_id: ignored wherever it stands.
    """
    row, ended = until_end(generated_ids, eos_id, pad_id)
    places = Alignment(clean_ids, row)
    answers = tuple(row[slice(*places.place(start, end))] for start, end in spans)
    return Fills(answers, 0, 0, 0, 0, 0, early_end=False, cut_off=not ended)


def until_end(generated_ids: np.ndarray, eos_id: int, pad_id: int) -> tuple[np.ndarray, bool]:
    """The row before its first end mark, without pads, and whether it has an end mark."""
    row = np.asarray(generated_ids)
    ends = np.flatnonzero(row == eos_id)
    row = row[: ends[0]] if len(ends) else row
    return row[row != pad_id], len(ends) > 0


def sentinel_numbers(ids: np.ndarray, sentinel_ids: np.ndarray) -> np.ndarray:
    """For each id the k of its sentinel, or -1; same shape as `ids`."""
    order = np.argsort(sentinel_ids)
    place = np.searchsorted(sentinel_ids, ids, sorter=order)
    k = order[np.minimum(place, len(order) - 1)]
    return np.where(np.asarray(sentinel_ids)[k] == ids, k, -1)


def stitch(source_ids: np.ndarray, fills: Fills, *, sentinel_ids: np.ndarray, eos_id: int, pad_id: int) -> np.ndarray:
    """Ids of the whole restored text: the source with each sentinel replaced by its answer, without end mark and pads.

    A sentinel whose answer is missing stays where it is, so that no gap closes unseen.
    """
    row = np.asarray(source_ids)
    row = row[(row != eos_id) & (row != pad_id)]
    number = sentinel_numbers(row, sentinel_ids)
    parts: list[np.ndarray] = []
    done = 0
    for mark in np.flatnonzero(number >= 0).tolist():
        k = int(number[mark])
        answer = fills.spans[k] if k < len(fills.spans) else None
        parts += [row[done:mark], row[mark : mark + 1] if answer is None else answer.astype(row.dtype)]
        done = mark + 1
    return np.concatenate([*parts, row[done:]])


def bracketed(pieces: Sequence[tuple[np.ndarray | None, bool]], decode: Callable[[np.ndarray], str]) -> str:
    """Text of pieces of ids in their order, answers in square brackets; an answer that is None reads `[?]`.

    Every piece is decoded together with what stands before it, because a piece alone loses the space it begins with.

    Args:
        pieces: (ids, whether they are an answer); only an answer may be None.
        decode: ids -> text.
    """
    ids = np.zeros(0, np.int64)
    text, shown = "", ""
    for piece, is_answer in pieces:
        ids = np.concatenate([ids, piece]) if piece is not None else ids
        grown = decode(ids)
        # A prefix may read differently when a byte piece is cut; then the whole piece is shown as it reads by itself.
        added = grown[len(text) :] if grown.startswith(text) else decode(piece if piece is not None else ids[:0])
        text = grown
        if is_answer:
            body = added.lstrip() if piece is not None else "?"
            added = f"{added[: len(added) - len(added.lstrip())]}[{body}]"
        shown += added
    return shown
