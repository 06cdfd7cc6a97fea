"""Examples of different length in common arrays, and sums within them.

A slot is a position in such an array: every row has a slot for each of its tokens and one more for the end mark, so that no run
of slots crosses from one row into the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resilient_t5.data.counter_rng import Stream, keys


@dataclass(frozen=True)
class Split:
    """The examples of one side of the split of a store; every array is a read-only memory map.

    tokens: uint16 or uint32 (tokens,), active ids of all examples, concatenated, without end marks.
    offsets: int64 (examples + 1,), where each example begins in `tokens`.
    terms: int32 (occurrences, 4): example, first token, token after the last, term id; token positions are within the example;
        sorted by example, then first token.
    documents: int32 (examples,), number of the document that the example was cut from.
    pairs: int32 (examples,): -1 for text to corrupt; for an already masked pair the length of its source, which its target
        follows. A pair is trained as it is.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    terms: np.ndarray
    documents: np.ndarray
    pairs: np.ndarray

    def __len__(self) -> int:
        return len(self.documents)


@dataclass(frozen=True)
class Rows:
    """A batch of B examples in N slots."""

    ids: np.ndarray
    """int32 (N,): token ids, the end mark last in each row."""
    offsets: np.ndarray
    """int64 (B + 1,): first slot of each row."""
    row: np.ndarray
    """int64 (N,): row of each slot."""
    position: np.ndarray
    """int64 (N,): place of each slot within its row."""
    text: np.ndarray
    """bool (N,): tokens that corruption may touch; False for end marks and for examples that are trained as they are."""
    tokens: np.ndarray
    """int64 (B,): tokens that corruption may touch."""

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class RowKeys:
    """Seed and one (epoch, example id) per row, from which random keys are derived."""

    seed: int
    epochs: np.ndarray
    """int64 (B,)"""
    example_ids: np.ndarray
    """int64 (B,)"""

    def of(self, stream: Stream) -> np.ndarray:
        """Key of each row for one purpose; uint64 (B,)."""
        return keys(self.seed, stream, self.epochs, self.example_ids)


def lay_out(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Indices start, start + 1, ... of every row, concatenated; int64 (sum of lengths,)."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Offsets of rows of these lengths: row r has [offsets[r], offsets[r + 1]); int64 (rows + 1,)."""
    return np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))


def take_rows(values: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Select rows of a ragged array: their values and offsets."""
    lengths = offsets[rows + 1] - offsets[rows]
    return values[lay_out(offsets[rows], lengths)], offsets_of(lengths)


def join_rows(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate ragged arrays, each given as values and offsets."""
    values, offsets = zip(*parts, strict=True)
    return np.concatenate(values), offsets_of(np.concatenate([np.diff(part) for part in offsets]))


def pad_rows(
    values: np.ndarray, offsets: np.ndarray, rows: np.ndarray, *, padding: int, multiple: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pad rows of a ragged array to the longest of them, rounded up to a multiple: int64, and a mask of the values, bool."""
    taken, bounds = take_rows(values, offsets, rows)
    lengths = np.diff(bounds)
    mask = np.arange(int(rounded_up(lengths, multiple).max())) < lengths[:, None]
    padded = np.full(mask.shape, padding, np.int64)
    padded[mask] = taken
    return padded, mask


def rounded_up(lengths: np.ndarray, multiple: int) -> np.ndarray:
    """Smallest multiples of `multiple` that are at least `lengths`."""
    return -(-lengths // multiple) * multiple


def cumulated(values: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Running sum of `values` that restarts where `row` changes; equal rows are adjacent. int64, same shape."""
    total = np.cumsum(values)
    first = firsts(row)
    return total - (total - values)[first][np.cumsum(first) - 1]


def firsts(row: np.ndarray) -> np.ndarray:
    """Where a new row begins; bool, same shape. Equal rows are adjacent."""
    first = np.ones(len(row), bool)
    np.not_equal(row[1:], row[:-1], out=first[1:])
    return first


def in_random_order(row: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Indices that sort by (row, random word): a random order within every row. int64, same shape as `row`."""
    # A stable sort: equal words keep their order, whatever else is in the batch.
    return np.argsort((row.astype(np.uint64) << np.uint64(40)) | (words >> np.uint64(24)), kind="stable")


def runs(flags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and exclusive ends of the runs of True; two int64 arrays."""
    edges = np.flatnonzero(np.diff(flags.view(np.int8), prepend=np.int8(0), append=np.int8(0)))
    return edges[0::2], edges[1::2]
