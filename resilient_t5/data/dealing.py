"""Which rows of a window go together: an update's groups, and the micro-batches of a group.

Rows sorted by length are cut into bands, and every update is dealt one group of neighbours from each band at random. So
every update has its share of every length, and the number of its target tokens varies less than in random order. Groups
dealt from the whole list would make it vary twice as much as in random order, consecutive runs of the list four times.
"""

import numpy as np

from resilient_t5.data.keyed import Stream, shuffle

# What one more micro-batch costs beside its tokens, counted in padded tokens. Measured on a CPU, forward and backward of
# T5 with one to eight layers: 47 to 77. On a GPU it is more; how much was not measured.
MICRO_BATCH_TOKENS = 64


def deal(ascending: np.ndarray, updates: int, groups: int, key: tuple[int, int]) -> list[list[np.ndarray]]:
    """Cut sorted rows into bands, each band into one group of neighbours per update, and deal each band at random.

    Args:
        ascending: int64, rows in order of length.
        groups: groups of an update, at most its rows.
        key: seed and number of the window.

    Returns:
        for each update its groups, the band of the shortest rows first.
    """
    dealt: list[list[np.ndarray]] = [[] for _ in range(updates)]
    begin = 0
    for band, size in enumerate(group_sizes(len(ascending) // updates, groups)):
        of_band = ascending[begin : begin + updates * size].reshape(updates, size)
        begin += updates * size
        by_draw = shuffle(key[0], Stream.DEAL, key[1] * groups + band, updates)
        for update, group in zip(dealt, of_band[by_draw], strict=True):
            update.append(group)
    return dealt


def group_sizes(rows: int, groups: int) -> list[int]:
    """Rows of each group of an update, from the shortest rows to the longest; they sum to `rows`, none is empty.

    Sizes fall about linearly, to a third: 16 rows in 4 groups are 6, 4, 4 and 2. Lengths lie far apart only among the
    longest, so small groups there save most of the padding, and they keep the largest micro-batch small.
    """
    weights = np.arange(3 * (groups - 1), groups - 2, -2) if groups > 1 else np.ones(1, np.int64)
    ends = np.cumsum(weights) * (rows - groups)
    total = 2 * int(weights.sum())
    rounded = (2 * ends + total // 2) // total  # half up, in whole numbers
    return sorted((1 + np.diff(rounded, prepend=0)).tolist(), reverse=True)


def cut(
    ascending: np.ndarray, lengths: tuple[np.ndarray, np.ndarray], micro_tokens: int, pad_multiple: int
) -> list[np.ndarray]:
    """Cut rows sorted by length where rows * (longest source + longest target), padded, would pass `micro_tokens`.

    The longest are cut off first; a row that passes the budget alone makes a part of its own.

    Args:
        lengths: source and target tokens of every row.
    """
    parts: list[np.ndarray] = []
    end = len(ascending)
    longest_source = longest_target = 0
    for place in range(len(ascending) - 1, -1, -1):
        source, target = (rounded_up(int(of_row[ascending[place]]), pad_multiple) for of_row in lengths)
        longest_source, longest_target = max(longest_source, source), max(longest_target, target)
        if place + 1 < end and (end - place) * (longest_source + longest_target) > micro_tokens:
            parts.append(ascending[place + 1 : end])
            end, longest_source, longest_target = place + 1, source, target
    parts.append(ascending[:end])
    return parts


def cheapest_cut(
    ascending: np.ndarray, lengths: tuple[np.ndarray, np.ndarray], micro_tokens: int, pad_multiple: int
) -> list[np.ndarray]:
    """Cut rows sorted by length into runs of neighbours so that padded tokens and `MICRO_BATCH_TOKENS` a run are least.

    For an update in random order, whose lengths lie far apart: filling every micro-batch up to a large `micro_tokens`
    would pad the short rows to the longest. Exact by dynamic programming over the end of the last run, in time of the
    rows squared: about a millisecond at 64 rows. No run passes `micro_tokens` unless it is one row.

    Args:
        lengths: source and target tokens of every row; the source lengths ascend along `ascending`.

    Returns:
        the runs, the longest rows first.
    """
    source, target = (-(-of_row[ascending] // pad_multiple) * pad_multiple for of_row in lengths)
    rows = len(ascending)
    least = np.zeros(rows + 1, np.int64)
    begins = np.zeros(rows + 1, np.int64)
    for end in range(1, rows + 1):
        # Of all runs that end here, the one that begins at each row: its size, and the cheapest way to get to its begin.
        widest_target = np.maximum.accumulate(target[:end][::-1])[::-1]
        padded = np.arange(end, 0, -1) * (source[end - 1] + widest_target)
        allowed = padded <= micro_tokens
        allowed[-1] = True
        total = np.where(allowed, least[:end] + padded + MICRO_BATCH_TOKENS, np.iinfo(np.int64).max)
        begins[end] = np.argmin(total)
        least[end] = total[begins[end]]
    parts, end = [], rows
    while end:
        begin = int(begins[end])
        parts.append(ascending[begin:end])
        end = begin
    return parts


def rounded_up(length: int, multiple: int) -> int:
    """The least multiple that is not below `length`."""
    return -(-length // multiple) * multiple
