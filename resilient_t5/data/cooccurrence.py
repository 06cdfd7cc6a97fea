"""Positive pointwise mutual information of neighbouring tokens in a corpus, from which embeddings are initialised.

PMI compares how often two tokens occur together with how often chance would put them together. Its positive part, factorised,
gives word vectors as good as trained ones on small corpora (Levy & Goldberg 2014; Levy, Goldberg & Dagan 2015, also for the
smoothing). Counts are symmetric, over neighbours of up to REACH tokens in the same example; closer neighbours count more.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from resilient_t5.data.ragged import Split

REACH = 3
# PMI overestimates rare contexts; their frequency is raised to this power.
SMOOTHING = 0.75
MAX_TOKENS = 8_000_000
# Size of the dense block of counts: 16 MB.
BLOCK_COUNTS = 2_000_000
# Positions in `ids` are stored in 16 bits.
UNCOUNTED = 2**16 - 1


@dataclass(frozen=True, eq=False)
class Neighbours:
    """A symmetric matrix (n, n) over the n ids that were counted, in compressed rows; only values above 0 are stored."""

    ids: np.ndarray
    """int64 (n,): the ids, the most frequent first."""
    row_ends: np.ndarray
    """int64 (n + 1,)"""
    columns: np.ndarray
    """int32: positions in `ids`."""
    values: np.ndarray
    """float32, above 0."""


def count_neighbours(split: Split, rows: int, most_ids: int) -> Neighbours:
    """Positive PMI of the most frequent ids of `split`.

    Reads 8 million tokens at most, the first ones of the split: some 4 to 8 s on one core, 210 MB.

    Args:
        rows: every id is below.
        most_ids: maximum number of ids to count, below 65,535; ids that do not occur are left out.
    """
    examples = int(np.searchsorted(split.offsets, MAX_TOKENS, side="right")) - 1
    tokens = np.asarray(split.tokens[: split.offsets[max(1, examples)]])
    frequency = np.bincount(tokens, minlength=rows)
    ids = np.argsort(-frequency, kind="stable")[: min(most_ids, int((frequency > 0).sum()))]
    place = np.full(rows, UNCOUNTED, np.uint16)
    place[ids] = np.arange(len(ids))
    pairs = list(_pairs(place[tokens], np.asarray(split.offsets[1 : max(1, examples) + 1])))
    totals = sum(
        np.bincount(side, minlength=len(ids)) * weight for left, right, weight in pairs for side in (left, right)
    ) + np.zeros(len(ids))
    smoothed = totals**SMOOTHING
    # Half of the logarithm of (frequency x smoothed frequency), so that the matrix stays symmetric.
    with np.errstate(divide="ignore"):
        chance = 0.5 * (np.log(totals) + np.log(smoothed) - np.log(max(1.0, smoothed.sum())))
    return _compress(ids, pairs, chance)


def _pairs(places: np.ndarray, ends: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
    """(left, right, weight) of all tokens at distance 1 to REACH in the same example, as positions in `ids`."""
    example = np.zeros(len(places), np.int32)
    example[ends[:-1][ends[:-1] < len(places)]] = 1
    np.cumsum(example, out=example)
    for distance in range(1, REACH + 1):
        left, right = places[:-distance], places[distance:]
        together = (example[:-distance] == example[distance:]) & (left != UNCOUNTED) & (right != UNCOUNTED)
        yield left[together], right[together], 1.0 / distance


def _compress(ids: np.ndarray, pairs: list[tuple[np.ndarray, np.ndarray, float]], chance: np.ndarray) -> Neighbours:
    """Positive PMI of all pairs, computed block of rows by block of rows."""
    size = len(ids)
    height = max(1, BLOCK_COUNTS // max(1, size))
    lengths, columns, values = [np.zeros(1, np.int64)], [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
    for first in range(0, size, height):
        last = min(first + height, size)
        flat = np.zeros((last - first) * size)
        for left, right, weight in pairs:
            for row, column in ((left, right), (right, left)):
                inside = (row >= first) & (row < last)
                keys = (row[inside].astype(np.int64) - first) * size + column[inside]
                flat += weight * np.bincount(keys, minlength=len(flat))
        counts = flat.reshape(-1, size)
        with np.errstate(divide="ignore", invalid="ignore"):
            pmi = np.log(counts) - chance[first:last, None] - chance[None, :]
        positive = (counts > 0) & (pmi > 0)
        lengths.append(positive.sum(1))
        columns.append(np.nonzero(positive)[1].astype(np.int32))
        values.append(pmi[positive].astype(np.float32))
    return Neighbours(ids, np.cumsum(np.concatenate(lengths)), np.concatenate(columns), np.concatenate(values))
