"""Noise in the visible part of a source: tokens dropped, doubled, swapped or replaced by look-alikes, in bursts.

Whether a token is noised follows a two-state Markov chain along the chunk: a burst continues with a fixed probability, so its
length is geometric with mean `noise_burst_tokens`, and the stationary share makes `noise_ratio` of the visible tokens noised.
The chain is computed without a loop: a draw either sets the state or keeps it, so the state is that of the last draw that set
it.

Tokens of terms, special tokens and single bytes of a character are never changed; a burst skips them. A swap exchanges a token
with the next one, which must be free to be noised too; a replacement needs a look-alike. The kind is drawn uniformly among
those that are possible at the position; where none is, the token is kept.
"""

from dataclasses import dataclass

import numpy as np

from resilient_t5.config.sections import CorruptionConfig, NoiseKind
from resilient_t5.data.corruption.token_table import TokenTable
from resilient_t5.data.counter_rng import Stream, below, uniform
from resilient_t5.data.ragged import RowKeys, Rows, cumulated

KINDS: tuple[NoiseKind, ...] = ("drop", "double", "swap", "replace")
DROP, DOUBLE, SWAP, REPLACE = range(4)
# Rows of nearly only terms would need a larger share of their other tokens.
MAX_SHARE = 0.5


@dataclass(frozen=True)
class Noise:
    """Slots after noise: ids int32 (N,) and copies of each in the source, 0 to 2, int8 (N,)."""

    ids: np.ndarray
    copies: np.ndarray


def make_noise(
    rows: Rows,
    visible: np.ndarray,
    in_term: np.ndarray,
    row_keys: RowKeys,
    *,
    settings: CorruptionConfig,
    table: TokenTable,
) -> Noise:
    """Noise for every row; a pure function of each row's own key, tokens, masks and terms.

    Args:
        visible: bool (N,), unmasked tokens that corruption may change.
        in_term: bool (N,), tokens of any term occurrence.
    """
    copies = np.ones(len(rows.ids), np.int8)
    free = visible & ~in_term & ~(table.special | table.byte)[rows.ids]
    if settings.noise_ratio == 0.0 or not free.any():
        return Noise(rows.ids, copies)
    noised = np.flatnonzero(_bursts(rows, visible, free, row_keys, settings) & free)
    kind = _choose_kinds(rows, noised, free, row_keys, settings, table)

    swapped = _disjoint_pairs(noised[kind == SWAP])
    others = np.ones(len(rows.ids), bool)
    others[swapped] = others[swapped + 1] = False
    ids = rows.ids.copy()
    ids[swapped], ids[swapped + 1] = rows.ids[swapped + 1], rows.ids[swapped]
    for number, count in ((DROP, 0), (DOUBLE, 2)):
        slots = noised[kind == number]
        copies[slots[others[slots]]] = count
    replaced = noised[kind == REPLACE]
    replaced = replaced[others[replaced]]
    ids[replaced] = _look_alikes(rows, replaced, row_keys, table)
    return Noise(ids, copies)


def _bursts(rows: Rows, visible: np.ndarray, free: np.ndarray, row_keys: RowKeys, settings: CorruptionConfig) -> np.ndarray:
    """bool (N,): slots at which the chain is in a burst."""
    free_counts = np.bincount(rows.row[free], minlength=len(rows))
    share = settings.noise_ratio * np.bincount(rows.row[visible], minlength=len(rows)) / np.maximum(free_counts, 1)
    share = np.minimum(share, MAX_SHARE)
    stay = np.maximum(1.0 - 1.0 / settings.noise_burst_tokens, share)
    if "swap" in settings.noise_kinds:
        # A swap at the end of a burst also moves the token after it.
        share = share / (1.0 + (1.0 - stay) / len(set(settings.noise_kinds)))
    enter = share * (1.0 - stay) / (1.0 - share)

    key = row_keys.of(Stream.NOISE_BURST)
    draw = uniform(key[rows.row], rows.position)
    begins = draw < enter[rows.row]
    begins[rows.offsets[:-1]] = draw[rows.offsets[:-1]] < share
    sets = begins | (draw >= stay[rows.row])
    sets[rows.offsets[:-1]] = True
    last_set = np.maximum.accumulate(np.where(sets, np.arange(len(draw)), 0))
    return begins[last_set]


def _choose_kinds(
    rows: Rows, noised: np.ndarray, free: np.ndarray, row_keys: RowKeys, settings: CorruptionConfig, table: TokenTable
) -> np.ndarray:
    """Kind of noise of each noised slot, int64, -1 where none is possible."""
    possible = np.repeat(np.array([[kind in settings.noise_kinds for kind in KINDS]]), len(noised), axis=0)
    possible[:, SWAP] &= free[noised + 1]  # the end mark follows the last token of a row and is never free
    possible[:, REPLACE] &= _look_alike_counts(rows.ids[noised], table) > 0
    count = possible.sum(axis=1)
    row = rows.row[noised]
    key = row_keys.of(Stream.NOISE_KIND)
    pick = below(key[row], rows.position[noised], np.maximum(count, 1))
    kind = np.argmax(possible & (np.cumsum(possible, axis=1) == (pick + 1)[:, None]), axis=1)
    return np.where(count > 0, kind, -1)


def _disjoint_pairs(slots: np.ndarray) -> np.ndarray:
    """Of ascending slots, those whose pairs (slot, slot + 1) do not overlap: every other one of a run of neighbours."""
    run = np.cumsum(np.diff(slots, prepend=-2) != 1)
    return slots[cumulated(np.ones_like(slots), run) % 2 == 1]


def _look_alike_counts(ids: np.ndarray, table: TokenTable) -> np.ndarray:
    """Number of look-alikes of each id."""
    return table.confusion_offsets[ids + 1] - table.confusion_offsets[ids]


def _look_alikes(rows: Rows, slots: np.ndarray, row_keys: RowKeys, table: TokenTable) -> np.ndarray:
    """A look-alike for the token of each slot, int32; every one has some."""
    key = row_keys.of(Stream.NOISE_REPLACEMENT)
    ids = rows.ids[slots]
    pick = below(key[rows.row[slots]], rows.position[slots], _look_alike_counts(ids, table))
    return table.confusions[table.confusion_offsets[ids] + pick]


def within_length(rows: Rows, copies: np.ndarray, most_extra: np.ndarray) -> np.ndarray:
    """Undo the last doublings of rows that would grow by more than `most_extra` (B,) tokens."""
    doubled = np.flatnonzero(copies == 2)
    row = rows.row[doubled]
    keep = cumulated(np.ones_like(row), row) <= most_extra[row]
    copies = copies.copy()
    copies[doubled[~keep]] = 1
    return copies
