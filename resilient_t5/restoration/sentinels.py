"""Model outputs read by sentinel, and answers inserted into the source.

All functions work on ids: a model may write a malformed sentinel as text, and decoding loses information. Shapes: B rows,
S source tokens, T generated tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from rapidfuzz.distance import Levenshtein


class Alignment:
    """Alignment of two id sequences with the fewest edits (Levenshtein 1966)."""

    def __init__(self, from_ids: np.ndarray, to_ids: np.ndarray):
        self._blocks = Levenshtein.opcodes(np.asarray(from_ids).tolist(), np.asarray(to_ids).tolist())

    def replacements(self) -> list[tuple[int, int, int, int]]:
        """Changed parts in order: (start, end) in the first sequence, (start, end) in the second; either may be empty."""
        return [(b.src_start, b.src_end, b.dest_start, b.dest_end) for b in self._blocks if b.tag != "equal"]

    def place(self, start: int, end: int) -> tuple[int, int]:
        """Part of the second sequence aligned with [start, end) of the first, insertions at its borders included."""
        return min(self._partners(start)), max(self._partners(end))

    def _partners(self, position: int) -> list[int]:
        """Positions in the second sequence that a position of the first may be aligned with."""
        partners = [0] if position == 0 else []
        for block in self._blocks:
            if block.src_start == position:
                partners.append(block.dest_start)
            if block.src_end == position:
                partners.append(block.dest_end)
            if block.src_start < position < block.src_end:
                partners.append(min(block.dest_start + position - block.src_start, block.dest_end))
        return partners


@dataclass(frozen=True, eq=False)
class ParsedOutput:
    """One generated row, read by sentinel."""

    spans: tuple[np.ndarray | None, ...]
    """Ids of the answer to sentinel k at place k; None if the sentinel is missing, empty if its answer is."""
    missing: int
    """Expected sentinels that were not written."""
    duplicate: int
    """Expected sentinels written again; only the first answer counts."""
    out_of_order: int
    """Expected sentinels that came after a higher one."""
    unknown: int
    """Sentinels that the source does not contain; the tokens after them are dropped."""
    stray: int
    """Tokens before the first sentinel."""
    early_end: bool
    """Whether the row ended before the last expected sentinel."""
    cut_off: bool
    """Whether the token limit cut the row off before its end token."""

    @property
    def faulty(self) -> bool:
        """Whether the row is anything but the expected sentinels in order, then the end token."""
        counts = (self.missing, self.duplicate, self.out_of_order, self.unknown, self.stray)
        return any(counts) or self.early_end or self.cut_off


def parse_output(generated_ids: np.ndarray, sentinel_ids: np.ndarray, eos_id: int, pad_id: int, expected: int) -> ParsedOutput:
    """Read one generated row.

    Args:
        generated_ids: int (T,), with or without the start token; ids after the first end token are ignored.
        sentinel_ids: int, id of sentinel k at place k.
        eos_id: end token.
        pad_id: padding, ignored everywhere.
        expected: number of sentinels in the source.
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
    return ParsedOutput(
        spans=tuple(spans),
        missing=sum(span is None for span in spans),
        duplicate=duplicate,
        out_of_order=out_of_order,
        unknown=unknown,
        stray=int(marks[0]) if len(marks) else len(row),
        early_end=ended and expected > 0 and spans[-1] is None,
        cut_off=not ended,
    )


def parse_whole_text(
    clean_ids: np.ndarray, generated_ids: np.ndarray, spans: Sequence[tuple[int, int]], eos_id: int, pad_id: int
) -> ParsedOutput:
    """Read one generated row of a model that writes the whole text: the part aligned with each span.

    Args:
        clean_ids: int, the undamaged chunk.
        generated_ids: int (T,); ids after the first end token are ignored.
        spans: (start, end) in `clean_ids`, in order; insertions at the borders of a span count to the span.
        eos_id: end token.
        pad_id: padding, ignored everywhere.
    """
    row, ended = until_end(generated_ids, eos_id, pad_id)
    alignment = Alignment(clean_ids, row)
    answers = tuple(row[slice(*alignment.place(start, end))] for start, end in spans)
    return ParsedOutput(answers, 0, 0, 0, 0, 0, early_end=False, cut_off=not ended)


def until_end(generated_ids: np.ndarray, eos_id: int, pad_id: int) -> tuple[np.ndarray, bool]:
    """Return the row before its first end token, without padding, and whether it has an end token."""
    row = np.asarray(generated_ids)
    ends = np.flatnonzero(row == eos_id)
    row = row[: ends[0]] if len(ends) else row
    return row[row != pad_id], len(ends) > 0


def sentinel_numbers(ids: np.ndarray, sentinel_ids: np.ndarray) -> np.ndarray:
    """Return the sentinel number of each id, -1 for other ids; same shape as `ids`."""
    order = np.argsort(sentinel_ids)
    place = np.searchsorted(sentinel_ids, ids, sorter=order)
    k = order[np.minimum(place, len(order) - 1)]
    return np.where(np.asarray(sentinel_ids)[k] == ids, k, -1)


def insert_answers(
    source_ids: np.ndarray, output: ParsedOutput, *, sentinel_ids: np.ndarray, eos_id: int, pad_id: int
) -> np.ndarray:
    """Return the source with each sentinel replaced by its answer, without end token and padding.

    A sentinel without an answer stays, so that a missing answer remains visible.
    """
    row = np.asarray(source_ids)
    row = row[(row != eos_id) & (row != pad_id)]
    number = sentinel_numbers(row, sentinel_ids)
    parts: list[np.ndarray] = []
    done = 0
    for mark in np.flatnonzero(number >= 0).tolist():
        k = int(number[mark])
        answer = output.spans[k] if k < len(output.spans) else None
        parts += [row[done:mark], row[mark : mark + 1] if answer is None else answer.astype(row.dtype)]
        done = mark + 1
    return np.concatenate([*parts, row[done:]])


def bracketed(pieces: Sequence[tuple[np.ndarray | None, bool]], decode: Callable[[np.ndarray], str]) -> str:
    """Decode pieces of ids in order, with answers in square brackets and `[?]` for None.

    Each piece is decoded together with the text before it, because a piece alone loses its leading space.

    Args:
        pieces: (ids, whether they are an answer); only an answer may be None.
        decode: ids -> text.
    """
    ids = np.zeros(0, np.int64)
    text, shown = "", ""
    for piece, is_answer in pieces:
        ids = np.concatenate([ids, piece]) if piece is not None else ids
        longer = decode(ids)
        # A prefix may decode differently if it ends inside a character of byte pieces; decode the piece alone then.
        added = longer[len(text) :] if longer.startswith(text) else decode(piece if piece is not None else ids[:0])
        text = longer
        if is_answer:
            body = added.lstrip() if piece is not None else "?"
            added = f"{added[: len(added) - len(added.lstrip())]}[{body}]"
        shown += added
    return shown
