"""Corruption: a chunk and its key give a source and a target; pure, and vectorised over a batch of chunks of different length.

    source  "the [sentinel 0] showed a [sentinel 1] in the left lobe [end]"     the chunk, a sentinel for each span, noise
    target  "[sentinel 0] liver scan [sentinel 1] cyst [end]"                   the masked tokens

A target has no last sentinel before its end mark, as in T5's own pre-training, whose masks always end a chunk. With
`task: correct` nothing is masked: the source is the noised chunk, the target the clean one. Already masked pairs are neither
masked nor noised.

`masking.py` chooses what is masked and `noise.py` what is noised. The result for an example depends on (seed, epoch, example
id), its tokens and the settings, never on the rest of the batch.
"""

from dataclasses import dataclass, replace

import numpy as np

from resilient_t5.config.schema import CorruptionConfig, DataConfig
from resilient_t5.data.corruption.masking import Masks, Occurrences, choose_masks
from resilient_t5.data.corruption.noise import Noise, make_noise, within_length
from resilient_t5.data.corruption.token_table import TokenTable
from resilient_t5.data.ragged import RowKeys, Rows, Split, join_rows, lay_out, offsets_of, runs, take_rows
from resilient_t5.errors import DataError

# Slots processed at once: limits the memory of a large window and keeps its arrays in the CPU caches.
SLAB_SLOTS = 131_072


@dataclass(frozen=True)
class Corrupted:
    """n corrupted examples, ragged: row r has [offsets[r], offsets[r + 1])."""

    source: np.ndarray
    """int32: the damaged text token by token, each row with its end mark."""
    source_offsets: np.ndarray
    """int64 (n + 1,)"""
    target: np.ndarray
    """int32: sentinels and the tokens they replace, each row with its end mark."""
    target_offsets: np.ndarray
    """int64 (n + 1,)"""
    spans: np.ndarray
    """int32 (m, 4): row, sentinel k, first token, token after the last one (of the clean chunk); sorted by row and k."""
    masked_terms: np.ndarray
    """int32 (t, 5): row, term id, sentinel k, first token, token after the last one; sorted by row and token."""
    encoder_ids: np.ndarray
    """int32: input of the encoder: the source as the tokenizer encodes it (`gap_encoding.py`)."""
    encoder_offsets: np.ndarray
    """int64 (n + 1,)"""

    def __len__(self) -> int:
        return len(self.source_offsets) - 1

    def take(self, rows: np.ndarray) -> "Corrupted":
        """Select rows, each at most once, in this order; they are renumbered."""
        new_number = np.full(len(self), -1)
        new_number[rows] = np.arange(len(rows))

        def renumbered(table: np.ndarray) -> np.ndarray:
            kept = table[new_number[table[:, 0]] >= 0]
            kept[:, 0] = new_number[kept[:, 0]]
            return kept[np.argsort(kept[:, 0], kind="stable")]

        return Corrupted(
            *take_rows(self.source, self.source_offsets, rows),
            *take_rows(self.target, self.target_offsets, rows),
            renumbered(self.spans),
            renumbered(self.masked_terms),
            *take_rows(self.encoder_ids, self.encoder_offsets, rows),
        )


def term_targets(corrupted: Corrupted) -> np.ndarray:
    """Which target tokens belong to a masked term; bool, same shape as `corrupted.target`. Sentinels never do."""
    found = np.zeros(len(corrupted.target), bool)
    row, _, number, first, last = corrupted.masked_terms.T.astype(np.int64)
    span_row, _, span_first, span_last = corrupted.spans.T.astype(np.int64)
    first_span = np.searchsorted(span_row, row)
    written = np.cumsum(span_last - span_first + 1) - (span_last - span_first + 1)  # a span is its sentinel and its tokens
    span = first_span + number
    within = written[span] - written[first_span] + 1 + first - span_first[span]
    found[lay_out(corrupted.target_offsets[row] + within, last - first)] = True
    return found


def corrupt(
    split: Split,
    example_ids: np.ndarray,
    epochs: np.ndarray,
    *,
    seed: int,
    settings: CorruptionConfig,
    data: DataConfig,
    table: TokenTable,
) -> Corrupted:
    """Corrupt examples of a split; pure.

    Args:
        example_ids: int64 (n,), any examples in any order, repeats allowed.
        epochs: int64 (n,), the epoch that each one is drawn for.

    Raises:
        DataError: an example is empty or longer than the settings allow, or has terms outside of it.
    """
    example_ids = np.asarray(example_ids, np.int64)
    epochs = np.broadcast_to(np.asarray(epochs, np.int64), example_ids.shape)
    _, lengths = _places(split, example_ids)
    slab_of_row = (np.cumsum(lengths) - lengths) // SLAB_SLOTS
    parts = np.split(np.arange(len(example_ids)), np.flatnonzero(np.diff(slab_of_row)) + 1)
    keys = [RowKeys(seed, epochs[part], example_ids[part]) for part in parts]
    slabs = [_corrupt_slab(split, row_keys, settings=settings, data=data, table=table) for row_keys in keys]
    corrupted = slabs[0] if len(slabs) == 1 else _joined(slabs)
    if table.gap_encoding is None:
        return corrupted
    ids, offsets = table.gap_encoding.encode(corrupted.source, corrupted.source_offsets, data.max_source_tokens)
    return replace(corrupted, encoder_ids=ids, encoder_offsets=offsets)


def _places(split: Split, example_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First token and number of tokens of each example; int64 (n,) each."""
    starts = np.asarray(split.offsets)[example_ids].astype(np.int64)
    return starts, np.asarray(split.offsets)[example_ids + 1].astype(np.int64) - starts


def _corrupt_slab(
    split: Split, row_keys: RowKeys, *, settings: CorruptionConfig, data: DataConfig, table: TokenTable
) -> Corrupted:
    targets_at = np.asarray(split.pairs)[row_keys.example_ids].astype(np.int64)
    starts, lengths = _places(split, row_keys.example_ids)
    _check_lengths(row_keys.example_ids, lengths, targets_at, settings=settings, data=data)
    rows = _gather(split, (starts, lengths), targets_at, table)
    occurrences = _gather_terms(split, row_keys.example_ids, rows)
    if settings.task == "restore":
        masks = choose_masks(
            rows, occurrences, row_keys, settings=settings, max_target_tokens=data.max_target_tokens, table=table
        )
    else:
        masks = Masks(np.zeros(len(rows.ids), bool), np.zeros(len(occurrences.row), bool))
    in_term = np.zeros(len(rows.ids), bool)
    in_term[lay_out(occurrences.start, occurrences.end - occurrences.start)] = True
    noise = make_noise(rows, rows.text & ~masks.masked, in_term, row_keys, settings=settings, table=table)
    return _assemble(rows, occurrences, masks, noise, (targets_at, settings.task, data.max_source_tokens), table)


def _check_lengths(
    example_ids: np.ndarray, lengths: np.ndarray, targets_at: np.ndarray, *, settings: CorruptionConfig, data: DataConfig
) -> None:
    """Raise DataError unless sources and targets fit; truncation would silently lose text."""
    paired = targets_at >= 0
    source = np.where(paired, targets_at, lengths) + 1
    clean_target = lengths + 1 if settings.task == "correct" else np.zeros_like(lengths)
    target = np.where(paired, lengths - targets_at + 1, clean_target)
    wrong = (source > data.max_source_tokens) | (target > data.max_target_tokens) | (lengths < 1) | (targets_at > lengths)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DataError(
            f"an example of {lengths[row]} tokens does not fit into data.max_source_tokens {data.max_source_tokens} "
            f"and data.max_target_tokens {data.max_target_tokens}",
            where=f"example {example_ids[row]} of the store",
            hint="Prepare a store with these settings.",
        )


def _gather(split: Split, places: tuple[np.ndarray, np.ndarray], targets_at: np.ndarray, table: TokenTable) -> Rows:
    """Concatenate the examples, each with a slot for its end mark."""
    starts, lengths = places
    offsets = offsets_of(lengths + 1)
    row = np.repeat(np.arange(len(lengths)), lengths + 1)
    position = np.arange(offsets[-1]) - offsets[row]
    ends = offsets[1:] - 1
    text = (targets_at < 0)[row]
    text[ends] = False
    index = position + starts[row]
    index[ends] = starts  # any valid index; the end mark replaces the token
    # Index before the conversion, which would otherwise read and map all tokens of the split.
    ids = np.asarray(split.tokens[index]).astype(np.int32)
    ids[ends] = table.eos_id
    if len(ids) and ids.max() >= table.size:
        raise DataError("the store contains ids beyond its vocabulary", hint="Prepare the store again.")
    return Rows(ids, offsets, row, position, text, np.where(targets_at < 0, lengths, 0))


def _gather_terms(split: Split, example_ids: np.ndarray, rows: Rows) -> Occurrences:
    """Term occurrences of the rows to corrupt."""
    examples = np.asarray(split.terms)[:, 0]
    first = _lower_bound(examples, example_ids)
    count = np.where(rows.tokens > 0, _lower_bound(examples, example_ids + 1) - first, 0)
    found = np.asarray(split.terms)[lay_out(first, count)].astype(np.int64)
    row = np.repeat(np.arange(len(rows)), count)
    start, end = found[:, 1], found[:, 2]
    disordered = (start[1:] < start[:-1]) & (row[1:] == row[:-1])
    if np.any((start < 0) | (start >= end) | (end > rows.tokens[row])) or disordered.any():
        raise DataError("the store places terms outside of their examples", hint="Prepare the store again.")
    return Occurrences(row, rows.offsets[row] + start, rows.offsets[row] + end, found[:, 3])


def _lower_bound(ascending: np.ndarray, values: np.ndarray) -> np.ndarray:
    """First index whose element is not below each value; like np.searchsorted, which would copy a strided column whole."""
    low, high = np.zeros(len(values), np.int64), np.full(len(values), len(ascending))
    for _ in range(len(ascending).bit_length()):
        middle = (low + high) // 2
        below = (low < high) & (ascending[np.minimum(middle, len(ascending) - 1)] < values)
        low, high = np.where(below, middle + 1, low), np.where(below, high, middle)
    return low


def _assemble(
    rows: Rows,
    occurrences: Occurrences,
    masks: Masks,
    noise: Noise,
    shape: tuple[np.ndarray, str, int],
    table: TokenTable,
) -> Corrupted:
    """Write sources and targets. `shape`: target starts of the pairs (B,), the task, the longest source in tokens."""
    targets_at, task, max_source_tokens = shape
    start, end = runs(masks.masked)
    span_row = rows.row[start]
    first_span = np.searchsorted(span_row, np.arange(len(rows)))
    sentinel = np.arange(len(start)) - first_span[span_row]
    in_target = masks.masked if task == "restore" else rows.text
    closing = rows.offsets[1:] - 1
    second_part = rows.position >= np.where(targets_at >= 0, targets_at, rows.position.max(initial=0) + 1)[rows.row]

    source_ids = noise.ids.copy()
    source_ids[start] = table.sentinel_ids[sentinel]
    copies = np.where(masks.masked | second_part, np.int8(0), noise.copies)
    copies[start] = 1
    copies[closing] = 1
    plain_length = np.add.reduceat(np.minimum(copies, 1), rows.offsets[:-1], dtype=np.int64)
    copies = within_length(rows, copies, max_source_tokens - plain_length)

    written = (in_target | second_part).astype(np.int8)
    written[start] = 2
    written[closing] = 1
    target_ends = np.cumsum(written, dtype=np.int64)
    target = np.repeat(rows.ids, written)
    target[target_ends[start] - 2] = table.sentinel_ids[sentinel]

    spans = np.stack((span_row, sentinel, rows.position[start], rows.position[end - 1] + 1), axis=1)
    kept = np.flatnonzero(masks.occurrences)
    term_start = occurrences.start[kept]
    of_term = sentinel[np.searchsorted(start, term_start, "right") - 1]
    masked_terms = np.stack(
        (
            occurrences.row[kept],
            occurrences.term[kept],
            of_term,
            rows.position[term_start],
            rows.position[occurrences.end[kept] - 1] + 1,
        ),
        axis=1,
    )
    source = np.repeat(source_ids, copies)
    source_offsets = np.concatenate(([0], np.cumsum(copies, dtype=np.int64)[closing]))
    return Corrupted(
        source=source,
        source_offsets=source_offsets,
        encoder_ids=source,
        encoder_offsets=source_offsets,
        target=target,
        target_offsets=np.concatenate(([0], target_ends[closing])),
        spans=spans.astype(np.int32),
        masked_terms=masked_terms.astype(np.int32),
    )


def _joined(slabs: list[Corrupted]) -> Corrupted:
    """Concatenate batches whose encoder reads their sources."""
    first_rows = offsets_of(np.array([len(slab) for slab in slabs]))[:-1]

    def renumbered(tables: list[np.ndarray]) -> np.ndarray:
        joined = np.concatenate(tables)
        joined[:, 0] += np.repeat(first_rows, [len(table) for table in tables]).astype(np.int32)
        return joined

    source = join_rows([(slab.source, slab.source_offsets) for slab in slabs])
    target = join_rows([(slab.target, slab.target_offsets) for slab in slabs])
    spans, masked_terms = renumbered([slab.spans for slab in slabs]), renumbered([slab.masked_terms for slab in slabs])
    return Corrupted(*source, *target, spans, masked_terms, *source)
