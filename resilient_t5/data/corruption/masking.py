"""Which tokens of a chunk are masked: terms first, short random spans for the rest of the budget.

Rules, per chunk of n tokens:

* The budget is a share of the n tokens, rounded, at least 1. The share is `mask_ratio`, or drawn for each chunk, uniform from
  `mask_ratio` - `mask_ratio_spread` to `mask_ratio` + `mask_ratio_spread`.
* Term occurrences that share a token are one unit. Each unit is drawn with `term_probability`; drawn units are masked whole, in
  random order, as long as budget, sentinels and target length allow. The first one may exceed the budget, up to half the
  chunk. A unit with a special token is never drawn.
* Random spans fill the budget. They never cover punctuation, special tokens or any token of a term, and leave a visible token
  between themselves and any other masked token. So a span exceeds `max_span_tokens` only where terms adjoin.
* Where `max_sentinels` or the target length do not allow the budget, random spans are drawn longer, then fewer.
* A chunk without a span gets one: a plain token, else a term, else a punctuation mark, else any token.

Random spans come from cells. A run of plain tokens is divided from left to right into cells of 1 to `max_span_tokens`
tokens with one token between two cells; cells are then taken in random order. Every draw is keyed by the chunk and
counted by the position, so a chunk's masks do not depend on the batch it is computed in.
"""

from dataclasses import dataclass

import numpy as np

from resilient_t5.config.schema import CorruptionConfig
from resilient_t5.data.corruption.token_table import TokenTable
from resilient_t5.data.counter_rng import Stream, bits, uniform
from resilient_t5.data.ragged import RowKeys, Rows, cumulated, firsts, in_random_order, offsets_of, runs

# Cells at the end of a run are shorter than drawn; lengths are drawn larger by this factor to compensate.
CELL_LOSS = 1.25
# Classes of tokens that may be masked in a chunk without a span, in order of preference.
PLAIN, TERM, PUNCTUATION, INSIDE_TERM, SPECIAL = range(5)


@dataclass(frozen=True)
class Occurrences:
    """Term occurrences of a batch, sorted by start; int64 (t,) each."""

    row: np.ndarray
    start: np.ndarray
    """First slot."""
    end: np.ndarray
    """Slot after the last one."""
    term: np.ndarray
    """Term id."""


@dataclass(frozen=True)
class Masks:
    """What is masked: bool (slots,), and which term occurrences are masked whole: bool (t,)."""

    masked: np.ndarray
    occurrences: np.ndarray


@dataclass(frozen=True)
class Units:
    """Term occurrences that share tokens, joined; sorted by start, none overlaps another. (u,) each."""

    row: np.ndarray
    start: np.ndarray
    end: np.ndarray
    maskable: np.ndarray
    """bool: no special token inside, and short enough for a target."""
    of_occurrence: np.ndarray
    """int64 (t,): unit of each occurrence."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each unit."""
        return self.end - self.start


def choose_masks(
    rows: Rows,
    occurrences: Occurrences,
    row_keys: RowKeys,
    *,
    settings: CorruptionConfig,
    max_target_tokens: int,
    table: TokenTable,
) -> Masks:
    """Choose what is masked in every row; a pure function of each row's own key, tokens and terms."""
    special = table.special[rows.ids]
    units = _join_overlapping(rows, occurrences, special, max_target_tokens)
    draw = uniform(row_keys.of(Stream.MASK_RATIO), 0)
    ratios = settings.mask_ratio + settings.mask_ratio_spread * (2.0 * draw - 1.0)
    budget = np.maximum(np.floor(ratios * rows.tokens + 0.5).astype(np.int64), 1)
    taken = _choose_terms(rows, units, row_keys, settings, (budget, max_target_tokens))
    masked = _covered(len(rows.ids), units.start[taken], units.end[taken])
    in_term = _covered(len(rows.ids), units.start, units.end)
    plain = rows.text & ~table.punctuation[rows.ids] & ~special & ~in_term
    free = plain.copy()
    free[np.maximum(units.start[taken] - 1, 0)] = False
    free[units.end[taken]] = False

    span_rows = rows.row[runs(masked)[0]]
    term_spans = np.bincount(span_rows, minlength=len(rows))
    term_tokens = np.bincount(units.row[taken], units.lengths[taken], len(rows)).astype(np.int64)
    limits = _Limits(
        tokens=budget - term_tokens,
        spans=settings.max_sentinels - term_spans,
        target=max_target_tokens - 1 - term_tokens - term_spans,
    )
    start, end = _choose_cells(rows, free, row_keys, settings.max_span_tokens, limits)
    masked |= _covered(len(rows.ids), start, end)

    bare = (term_spans == 0) & (rows.tokens > 0)
    bare[rows.row[start]] = False
    if bare.any():
        extra = _fallback(rows, units, row_keys, (bare, plain, in_term, special, table.punctuation[rows.ids]))
        masked |= extra
        taken |= extra[units.start] & units.maskable & bare[units.row]
    return Masks(masked, taken[units.of_occurrence])


@dataclass(frozen=True)
class _Limits:
    """Remaining budget for random spans in each row; int64 (B,) each."""

    tokens: np.ndarray
    spans: np.ndarray
    target: np.ndarray
    """Target tokens, sentinels counted."""


def _covered(slots: int, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """bool (slots,): inside one of the intervals, which do not overlap."""
    change = np.zeros(slots + 1, np.int8)
    change[start] += 1
    change[end] -= 1
    return np.cumsum(change[:-1], dtype=np.int8).view(bool)


def _join_overlapping(rows: Rows, occurrences: Occurrences, special: np.ndarray, max_target_tokens: int) -> Units:
    """The units of the batch's term occurrences."""
    if len(occurrences.start) == 0:
        nothing = np.zeros(0, np.int64)
        return Units(nothing, nothing, nothing, nothing.astype(bool), nothing)
    reach = np.maximum.accumulate(occurrences.end)
    first = np.ones(len(reach), bool)
    first[1:] = occurrences.start[1:] >= reach[:-1]
    number = np.cumsum(first) - 1
    head = np.flatnonzero(first)
    start, end = occurrences.start[head], np.maximum.reduceat(occurrences.end, head)
    specials_before = offsets_of(special)
    maskable = (specials_before[end] == specials_before[start]) & (end - start + 2 <= max_target_tokens)
    return Units(occurrences.row[head], start, end, maskable, number)


def _choose_terms(
    rows: Rows, units: Units, row_keys: RowKeys, settings: CorruptionConfig, limits: tuple[np.ndarray, int]
) -> np.ndarray:
    """bool (units,): the units that are masked. `limits`: the budget of each row (B,), and the longest target."""
    position = rows.position[units.start]
    chance = uniform(row_keys.of(Stream.TERM_CHANCE)[units.row], position)
    drawn = np.flatnonzero((chance < settings.term_probability) & units.maskable)
    rank_keys = row_keys.of(Stream.TERM_RANK)
    row = units.row[drawn]
    drawn = drawn[in_random_order(row, bits(rank_keys[row], position[drawn]))]

    row, lengths = units.row[drawn], units.lengths[drawn]
    budget, max_target_tokens = limits[0][row], limits[1]
    tokens = cumulated(lengths, row)
    spans = cumulated(np.ones_like(row), row)
    within_budget = (tokens <= budget) | ((spans == 1) & (lengths <= rows.tokens[row] // 2))
    # Adjoining terms share a sentinel; counting one for each is conservative.
    keep = within_budget & (spans <= settings.max_sentinels) & (tokens + spans + 1 <= max_target_tokens)
    taken = np.zeros(len(units.start), bool)
    taken[drawn[keep]] = True
    return taken


def _choose_cells(
    rows: Rows, plain: np.ndarray, row_keys: RowKeys, max_span_tokens: int, limits: _Limits
) -> tuple[np.ndarray, np.ndarray]:
    """Slots [start, end) of the random spans; two int64 arrays, no two intervals touch."""
    open_rows = (limits.tokens > 0) & (limits.spans > 0) & (limits.target >= 2)
    mean = (1 + max_span_tokens) / 2
    mean_needed = CELL_LOSS * limits.tokens / np.maximum(limits.spans, 1)
    longest_share = np.clip((mean_needed - mean) / max(max_span_tokens - mean, 0.5), 0.0, 1.0)
    start, length = _lay_cells(rows, plain & open_rows[rows.row], row_keys, max_span_tokens, longest_share)

    row = rows.row[start]
    words = bits(row_keys.of(Stream.SPAN_RANK)[row], rows.position[start])
    # Where sentinels are scarce, cells that are short because their run ended come after the others.
    late = (length < max_span_tokens) & ((words & np.uint64(0xFFFF)) < longest_share[row] * 2.0**16)
    drawn = in_random_order(row, (words >> np.uint64(1)) | (late.astype(np.uint64) << np.uint64(63)))
    row, start, length, words = row[drawn], start[drawn], length[drawn], words[drawn]
    left = limits.tokens[row] - (cumulated(length, row) - length)
    surplus = np.maximum(length - left, 0)
    # The last cell is cut to the remaining budget at either end, so that no position in a run is favoured.
    start = start + np.where(words & np.uint64(0x10000), surplus, 0)
    length = length - surplus
    spans = cumulated(np.ones_like(row), row)
    keep = (length > 0) & (spans <= limits.spans[row])
    keep &= cumulated(np.maximum(length, 0), row) + spans <= limits.target[row]
    return start[keep], start[keep] + length[keep]


def _lay_cells(
    rows: Rows, plain: np.ndarray, row_keys: RowKeys, max_span_tokens: int, longest_share: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Divide every run of plain tokens into cells: first slots and lengths, one row's cells in an order of its own.

    `longest_share` (B,) is the share of cells that are drawn `max_span_tokens` long; the others are uniform.
    """
    start, end = runs(plain)
    key = row_keys.of(Stream.SPAN_LENGTH)
    length = np.minimum(_first_lengths(rows, start, row_keys, max_span_tokens, longest_share), end - start)
    cells = [(start[length > 0], length[length > 0])]
    start = start + length + 1
    while True:  # each pass adds a cell to every run with free tokens; the longest run determines the number of passes
        unfinished = start < end
        start, end = start[unfinished], end[unfinished]
        if len(start) == 0:
            break
        row = rows.row[start]
        word = bits(key[row], rows.position[start])
        length = 1 + (((word >> np.uint64(32)) * np.uint64(max_span_tokens)) >> np.uint64(32)).astype(np.int64)
        length[(word & np.uint64(0xFFFFFFFF)) < longest_share[row] * 2.0**32] = max_span_tokens
        length = np.minimum(length, end - start)
        cells.append((start, length))
        start = start + length + 1
    start, length = (np.concatenate(parts) for parts in zip(*cells, strict=True))
    return start, length


def _first_lengths(
    rows: Rows, start: np.ndarray, row_keys: RowKeys, max_span_tokens: int, longest_share: np.ndarray
) -> np.ndarray:
    """Tokens of each run's first cell, int64, 0 where the run begins with the token between two cells.

    A run is a window on an endless row of cells, so its first cell is mostly the rest of one; its length r has
    probability P(cell >= r) / (mean cell + 1), and every token of a run is as likely to be in a cell as any other.
    """
    row = rows.row[start]
    lengths = np.arange(1, max_span_tokens + 1)
    uniform_tail = (max_span_tokens + 1 - lengths) / max_span_tokens
    tail = uniform_tail + longest_share[row][:, None] * (1.0 - uniform_tail)
    tail = np.concatenate((np.ones((len(row), 1)), tail), axis=1)
    thresholds = np.cumsum(tail, axis=1)
    thresholds /= thresholds[:, -1:]
    phase_keys = row_keys.of(Stream.SPAN_PHASE)
    draw = uniform(phase_keys[row], rows.position[start])
    return (draw[:, None] >= thresholds[:, :-1]).sum(axis=1)


def _fallback(rows: Rows, units: Units, row_keys: RowKeys, flags: tuple[np.ndarray, ...]) -> np.ndarray:
    """bool (slots,): one span for every bare row. `flags`: bare (B,), then plain, in_term, special, punctuation (N,)."""
    bare, plain, in_term, special, punctuation = flags
    slot = np.flatnonzero(bare[rows.row] & rows.text)
    unit_of = np.searchsorted(units.start, slot, "right") - 1
    in_whole_term = in_term[slot].copy()
    in_whole_term[in_whole_term] = units.maskable[unit_of[in_whole_term]]
    classes = np.select(
        (plain[slot], in_whole_term, special[slot], in_term[slot], punctuation[slot]),
        (PLAIN, TERM, SPECIAL, INSIDE_TERM, PUNCTUATION),
    )
    row = rows.row[slot]
    words = bits(row_keys.of(Stream.FALLBACK)[row], rows.position[slot])
    by_preference = in_random_order(row, (classes.astype(np.uint64) << np.uint64(60)) | (words >> np.uint64(4)))
    chosen = by_preference[firsts(row[by_preference])]
    start, end = slot[chosen], slot[chosen] + 1
    whole = np.flatnonzero(classes[chosen] == TERM)
    start[whole], end[whole] = units.start[unit_of[chosen[whole]]], units.end[unit_of[chosen[whole]]]
    return _covered(len(rows.ids), start, end)
