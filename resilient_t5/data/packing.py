"""Packed rows: several examples one after another in a row, so that a run has at most eight shapes of micro-batches.

    R  rows of a micro-batch    S  source tokens of a row    T  target tokens of a row

T5's position bias depends on the distance of two tokens only, so examples in one row with a block-diagonal mask give the same
result as examples in rows of their own. A GPU needs few shapes: each shape is one CUDA graph.

The shapes are chosen once, from the lengths in a sample of updates. The examples of an update are assigned to rows with about
equal source and target tokens, the longest example first, each to the row with the least load (longest processing time
first). That gives the row lengths (S, T) which the update needs. At most eight pairs are chosen that cover the needs of all
sampled updates with little padding. More rows make shorter rows, and attention costs rows * length^2: so the largest
number of rows is taken whose share of useful tokens is still high. If every example fills its row, that is one row for each
example, and the shapes are plain length buckets.

Everything here is a pure function of lengths in whole numbers, so every process and every resumed run gets the same rows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from resilient_t5.data.ragged import lay_out, rounded_up, take_rows
from resilient_t5.errors import DataError

MAX_SHAPES = 8
# Packed lengths are multiples of this, which GPU kernels need.
MULTIPLE = 8
# Share of useful tokens in the sample at which a number of rows is good enough.
GOOD_SHARE = 0.955
# If no number of rows is good enough, the largest whose share is at most this below the best.
NEARLY = 0.005
# Attention over a row of this many tokens takes about a third of the operations of mT5-small's layers, and memory that grows
# with the square of the length, so rows need not be longer.
LONG_ROW = 1024
# Numbers of rows that are tried: all up to this, then fewer and fewer.
EVERY_COUNT_TO = 32
# Most examples of an update that are assigned one by one, which is slow: the shortest ones.
ONE_BY_ONE = 256
# Examples by which numbers of rows are ruled out that cannot be good.
SCREENING_EXAMPLES = 512


@dataclass(frozen=True)
class Packing:
    """How the updates of a run are packed."""

    longest: tuple[int, int]
    """Upper bounds of the source and target tokens of any example."""
    parts: int = 1
    """Least number of micro-batches of an update, for as many processes."""


Lengths = tuple[np.ndarray, np.ndarray]
"""Source and target tokens of some examples; int64 (n,) each."""


@dataclass(frozen=True)
class RowShapes:
    """The shapes that packed micro-batches may have."""

    rows: int
    lengths: tuple[tuple[int, int], ...]
    """(source tokens, target tokens) of a row: at most eight pairs, the smallest sum first. One covers every example."""

    def triples(self) -> list[tuple[int, int, int]]:
        """(rows, source tokens, target tokens) of each shape."""
        return [(self.rows, source, target) for source, target in self.lengths]


@dataclass(frozen=True)
class PackedRows:
    """Which examples a packed micro-batch has, and where."""

    examples: np.ndarray
    """int64 (B,): numbers of the examples, row after row."""
    row: np.ndarray
    """int64 (B,): row of each, ascending. A row may be empty."""
    shape: tuple[int, int, int]
    """(rows, source tokens, target tokens)."""


def pack(lengths: Lengths, shapes: RowShapes, parts: int = 1) -> list[PackedRows]:
    """Assign the examples of an update to micro-batches of these shapes, as few as possible.

    Args:
        parts: least number of micro-batches; fewer only if there are fewer examples.

    Returns:
        micro-batches, each with the cheapest shape that holds its rows.

    Raises:
        DataError: an example is longer than every shape.
    """
    choices = np.array(shapes.lengths)

    def fits(needs: np.ndarray) -> bool:
        return bool((_first_cover(needs, choices) >= 0).all())

    tokens = [int(of_side.sum()) for of_side in lengths]
    least = max(parts, *(math.ceil(tokens[side] / (shapes.rows * int(choices[:, side].max()))) for side in (0, 1)))
    row, needs = _spread(lengths, shapes.rows, least, fits)
    in_order = np.argsort(row, kind="stable")
    begins = np.searchsorted(row[in_order], shapes.rows * np.arange(len(needs) + 1))
    chosen = _first_cover(needs, choices).tolist()
    return [
        PackedRows(in_order[begin:end], row[in_order[begin:end]] - part * shapes.rows, (shapes.rows, *shapes.lengths[choice]))
        for part, (begin, end, choice) in enumerate(zip(begins, begins[1:], chosen, strict=False))
        if end > begin
    ]


def _spread(lengths: Lengths, rows: int, least: int, fits: Callable[[np.ndarray], bool]) -> tuple[np.ndarray, np.ndarray]:
    """Assign examples to the rows of as few micro-batches as `fits` accepts.

    Args:
        least: number of micro-batches to begin with.
        fits: whether micro-batches with these needs, int64 (micro-batches, 2), are possible.

    Returns:
        the row of each example, int64 (n,), numbered through all micro-batches, and the needs of the micro-batches.
    """
    examples = len(lengths[0])
    count = min(least, examples)
    while True:
        row = _balanced(lengths, rows * count)
        needs = _needs(lengths, row, rows, count)
        if fits(needs):
            return row, needs
        if rows * count >= examples:
            longest = tuple(int(of_side.max()) for of_side in lengths)
            raise DataError(
                f"an example of up to {longest[0]} source and {longest[1]} target tokens fits into no packed row",
                hint="Prepare the store again with these settings, or set batch.pack to false.",
            )
        count += 1


def _balanced(lengths: Lengths, rows: int) -> np.ndarray:
    """Row of each example so that rows have about equal source and target tokens; the heaviest row is number 0.

    Longest processing time first; the load of a row is the larger of its shares of all source and of all target tokens. Of
    many examples the longer ones are taken `rows` at a time, the longest of them to the row with the least load.
    """
    source, target = lengths
    examples = len(source)
    if rows == 1:
        return np.zeros(examples, np.int64)
    steps = np.stack((source * int(target.sum()), target * int(source.sum())))  # in the same unit
    by_weight = np.argsort(-steps.max(0), kind="stable")
    row, loads = np.empty(examples, np.int64), np.zeros((2, rows), np.int64)
    done = 0
    while done == 0 or examples - done > ONE_BY_ONE:
        taken = by_weight[done : done + rows]
        lightest = np.argsort(loads.max(0), kind="stable")[: len(taken)]
        loads[:, lightest] += steps[:, taken]
        row[taken] = lightest
        done += len(taken)
    for example in by_weight[done:].tolist():
        step = steps[:, example : example + 1]
        best = int((loads + step).max(0).argmin())
        loads[:, best] += step[:, 0]
        row[example] = best
    number = np.empty(rows, np.int64)
    number[np.argsort(-loads.max(0), kind="stable")] = np.arange(rows)
    return number[row]


def _needs(lengths: Lengths, row: np.ndarray, rows: int, count: int) -> np.ndarray:
    """Longest row of each micro-batch in source and target tokens; int64 (count, 2)."""
    totals = [np.bincount(row, of_side, rows * count).astype(np.int64) for of_side in lengths]
    return np.stack([of_side.reshape(count, rows).max(1) for of_side in totals], axis=1)


def choose_shapes(
    updates: Sequence[Lengths], *, micro_tokens: int, longest: tuple[int, int], parts: int = 1, multiple: int = MULTIPLE
) -> RowShapes:
    """Choose at most eight shapes for all updates of a run, from a sample of them.

    Args:
        updates: lengths of the examples of each sampled update.
        micro_tokens: most padded tokens of a micro-batch, rows * (source + target); a single example may need more.
        longest: upper bounds of the source and target tokens of any example of the run.
        parts: least number of micro-batches of an update.
        multiple: row lengths are multiples of this.

    Returns:
        the shapes with the most rows that reach `GOOD_SHARE` useful tokens in the sample, else `NEARLY` the best share.
    """
    longest = _padded(longest, multiple)
    budget = max(micro_tokens, sum(longest))

    def share_of(rows: int) -> float:  # in the half of the sample that the shapes were not fitted to
        return useful_share(updates[1::2] or updates, fit_shapes(updates[::2], rows, budget, longest, parts, multiple), parts)

    counts = _promising(_row_counts(updates, parts, budget, longest), updates, parts, budget, multiple)
    # The share falls as the number of rows grows, so the largest number that is good enough is found by bisection.
    rows = counts.pop()
    share = share_of(rows)
    enough = GOOD_SHARE if share >= GOOD_SHARE else share - NEARLY
    while counts:
        middle = len(counts) // 2
        if share_of(counts[middle]) >= enough:
            rows, counts = counts[middle], counts[:middle]
        else:
            counts = counts[middle + 1 :]
    return fit_shapes(updates, rows, budget, longest, parts, multiple)


def fit_shapes(
    updates: Sequence[Lengths],
    rows: int,
    micro_tokens: int,
    longest: tuple[int, int],
    parts: int = 1,
    multiple: int = MULTIPLE,
) -> RowShapes:
    """At most eight shapes of this number of rows for a sample of updates; arguments as of `choose_shapes`.

    A micro-batch may have more than `micro_tokens` only if one longest example in each row does.
    """
    longest = _padded(longest, multiple)
    budget = max(micro_tokens, rows * sum(longest))
    needs = [_needs_of_update(lengths, rows, parts, budget, multiple) for lengths in updates]
    return RowShapes(rows, cover(np.vstack([*needs, [longest]]), budget // rows))


def _padded(longest: tuple[int, int], multiple: int) -> tuple[int, int]:
    source, target = rounded_up(np.array(longest), multiple).tolist()
    return source, target


def _promising(counts: list[int], updates: Sequence[Lengths], parts: int, budget: int, multiple: int) -> list[int]:
    """The numbers of rows that could have a good share, or nearly the best, if each micro-batch had the shape that it needs."""
    few = updates[: max(4, SCREENING_EXAMPLES // len(updates[0][0]))]
    useful = sum(int(of_side.sum()) for lengths in few for of_side in lengths)
    padded = [
        sum(rows * int(_needs_of_update(lengths, rows, parts, budget, multiple).sum()) for lengths in few) for rows in counts
    ]
    enough = min(GOOD_SHARE, useful / min(padded) - NEARLY)
    return [rows for rows, tokens in zip(counts, padded, strict=True) if useful / tokens >= enough]


def useful_share(updates: Sequence[Lengths], shapes: RowShapes, parts: int = 1) -> float:
    """Tokens of the examples of these updates, of all tokens that their packed micro-batches have with padding."""
    useful = sum(int(of_side.sum()) for lengths in updates for of_side in lengths)
    packed = [part.shape for lengths in updates for part in pack(lengths, shapes, parts)]
    return useful / sum(rows * (source + target) for rows, source, target in packed)


def _row_counts(updates: Sequence[Lengths], parts: int, budget: int, longest: tuple[int, int]) -> list[int]:
    """Numbers of rows to try, the most first; large ones are a fifth apart.

    `budget` allows as many rows as longest examples fit in it, and rows of `LONG_ROW` source tokens need not be longer.
    """
    examples = max(len(source) for source, _ in updates)
    most = max(1, min(-(-examples // parts), budget // sum(longest)))
    source, target = (sum(int(lengths[side].sum()) for lengths in updates) / len(updates) for side in (0, 1))
    of_micro_batch = min(source / parts, budget * source / (source + target))
    least = min(most, max(1, math.ceil(of_micro_batch / max(LONG_ROW, longest[0]))))
    counts = [most]
    while counts[-1] > least:
        counts.append(max(least, min(counts[-1] - 1, max(EVERY_COUNT_TO, counts[-1] * 4 // 5))))
    return counts


def _needs_of_update(lengths: Lengths, rows: int, parts: int, budget: int, multiple: int) -> np.ndarray:
    """Row lengths that the micro-batches of an update need within the budget; int64 (micro-batches, 2)."""

    def fits(needs: np.ndarray) -> bool:
        return bool((rows * rounded_up(needs, multiple).sum(1) <= budget).all())

    least = max(parts, math.ceil(sum(int(of_side.sum()) for of_side in lengths) / budget))
    needs = rounded_up(_spread(lengths, rows, least, fits)[1], multiple)
    return needs[needs.any(1)]


def cover(needs: np.ndarray, most: int) -> tuple[tuple[int, int], ...]:
    """At most `MAX_SHAPES` pairs so that each need has a pair at least as large on both sides, with little padding.

    The needs are cut into runs of neighbours by source length, at the least cost; the pair of a run is its maximum. Then each
    need takes the smallest pair that covers it, and each pair shrinks to its needs.

    Args:
        needs: int64 (n, 2), source and target tokens of a row; the last one is always covered.
        most: largest sum of a pair. Rare large needs may stay without a pair; their updates get one more micro-batch.

    Returns:
        the pairs, the smallest sum first.
    """
    different, inverse, counts = np.unique(needs, axis=0, return_inverse=True, return_counts=True)
    pairs = _cheapest_runs(different, counts, most, int(inverse.ravel()[-1]))
    while True:
        pairs = pairs[np.argsort(pairs.sum(1), kind="stable")]
        owner = _first_cover(needs, pairs)
        owned = [needs[owner == number].max(0) for number in range(len(pairs)) if (owner == number).any()]
        if np.array_equal(owned, pairs):
            return tuple((int(source), int(target)) for source, target in pairs)
        pairs = np.array(owned)


def _cheapest_runs(pairs: np.ndarray, counts: np.ndarray, most: int, required: int) -> np.ndarray:
    """Cut pairs into at most `MAX_SHAPES` runs at the least cost: padded tokens, and for a pair left out twice its tokens.

    Exact, by dynamic programming over the end of the last run, in O(n^2).

    Args:
        pairs: int64 (n, 2), sorted by source tokens.
        counts: needs of each pair.
        required: number of a pair that is not left out.

    Returns:
        the maximum of each run, int64 (runs, 2); none has a sum above `most`.
    """
    size, never = len(pairs), np.iinfo(np.int64).max // 4
    before = np.concatenate(([0], np.cumsum(counts)))
    least = np.full((MAX_SHAPES + 1, size + 1), never)
    least[:, 0] = 0
    begins = np.zeros((MAX_SHAPES + 1, size + 1), np.int64)  # -1: the last pair is left out
    for end in range(1, size + 1):
        largest = sum(np.maximum.accumulate(pairs[:end, side][::-1])[::-1] for side in (0, 1))
        padded = np.where(largest <= most, (before[end] - before[:end]) * largest, never)
        cost = np.minimum(least[:-1, :end] + padded, never)
        begins[1:, end] = cost.argmin(1)
        least[1:, end] = cost.min(1)
        if end - 1 != required:
            left_out = least[:, end - 1] + 2 * counts[end - 1] * pairs[end - 1].sum()
            begins[left_out < least[:, end], end] = -1
            least[:, end] = np.minimum(least[:, end], left_out)
    runs, end, left = [], size, MAX_SHAPES
    while end:
        begin = int(begins[left, end])
        if begin < 0:
            end -= 1
        else:
            runs.append(pairs[begin:end].max(0))
            end, left = begin, left - 1
    return np.array(runs)


def _first_cover(needs: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Number of the first pair that is at least as large as each need on both sides; -1 if none is."""
    covered = np.all(needs[:, None, :] <= pairs, axis=2)
    return np.where(covered.any(1), covered.argmax(1), -1)


def fill_rows(
    values: np.ndarray, offsets: np.ndarray, packed: PackedRows, length: int, padding: int
) -> tuple[np.ndarray, np.ndarray]:
    """Write the packed examples of a ragged array one after another into their rows.

    Args:
        length: tokens of a row.

    Returns:
        int32 (rows, length): the values; and the segments: 0 for padding, else 1 + the number of the example in its row.
    """
    taken, bounds = take_rows(values, offsets, packed.examples)
    lengths = np.diff(bounds)
    first = np.searchsorted(packed.row, packed.row)  # the first example of the same row
    places = lay_out(packed.row * length + bounds[:-1] - bounds[first], lengths)
    filled = np.full(packed.shape[0] * length, padding, np.int32)
    segments = np.zeros(packed.shape[0] * length, np.int32)
    filled[places] = taken
    segments[places] = np.repeat(1 + np.arange(len(lengths)) - first, lengths)
    return filled.reshape(packed.shape[0], length), segments.reshape(packed.shape[0], length)
