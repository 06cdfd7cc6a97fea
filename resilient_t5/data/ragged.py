"""Examples of different length in common arrays, and sums within them.

A slot is a position in such an array: every row has a slot for each of its tokens and one more for the end mark, so that no run
of slots crosses from one row into the next.
"""

from dataclasses import dataclass

import numpy as np


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


def lay_out(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Indices start, start + 1, ... of every row, concatenated; int64 (sum of lengths,)."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)


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
