"""Micro-batches for every update: a pure function of (seed, update number), prepared ahead by threads.

    B  examples of a micro-batch    S  longest source in it    T  longest target in it

The stream of examples is endless. Position p belongs to epoch p // n and is that epoch's example number p % n in
`counter_rng.order`. Update u has positions u * U to u * U + U - 1, so no update is short at the end of an epoch. A window
is `window_updates` updates' worth of positions, at most about one epoch.

Within a window the examples are corrupted, sorted by length and cut into `groups_per_update` bands. Every update is dealt one
group of neighbouring examples from each band, a light group of one band for a heavy group of another, so updates have their
share of every length and nearly the same number of tokens. A group that exceeds `micro_tokens` is cut again. A window of one
update is one group with very different lengths; it is cut where the cost of padding and of the number of micro-batches
together is lowest.

`micro_tokens` is applied after dealing, so it changes the speed of an update and never its examples. The largest micro-batch of
an update comes first: an out-of-memory error comes early, and the allocator can reuse its blocks.

With packed rows (`packing.py`) the groups of an update are joined, and its examples are packed into micro-batches of at most
eight shapes. The examples of every update are the same, packed or not.
"""

import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from resilient_t5.config.schema import Config
from resilient_t5.data.corruption.corruption import Corrupted, corrupt, term_targets
from resilient_t5.data.corruption.token_table import TokenTable
from resilient_t5.data.counter_rng import Stream, order, shuffle
from resilient_t5.data.packing import MULTIPLE, Lengths, PackedRows, Packing, RowShapes, choose_shapes, fill_rows, pack
from resilient_t5.data.pass_input import IGNORED, PassInput
from resilient_t5.data.ragged import Split, pad_rows, rounded_up
from resilient_t5.errors import DataError

# Fixed cost of a micro-batch in padded tokens. Measured on a CPU, forward and backward of T5 with one to eight layers: 47 to
# 77. It is higher on a GPU (not measured).
MICRO_BATCH_TOKENS = 64


def deal(
    ascending: np.ndarray, lengths: tuple[np.ndarray, np.ndarray], updates: int, groups: int, key: tuple[int, int]
) -> list[list[np.ndarray]]:
    """Cut sorted rows into bands and each band into one group of neighbours per update; deal groups so that updates balance.

    The band whose groups differ most is dealt at random. Of every other band the lightest group goes to the update that has
    the most tokens so far. Dealt at random, updates of a real corpus differ by 21 % in their tokens, balanced by 3 %.

    Args:
        ascending: int64, rows in order of length.
        lengths: source and target tokens of every row.
        groups: groups of an update, at most its rows.
        key: seed and number of the window.

    Returns:
        for each update its groups, the band of the shortest rows first.
    """
    source, target = lengths
    weights = source * max(1, int(target.sum())) + target * max(1, int(source.sum()))  # both sides count the same
    sizes = group_sizes(len(ascending) // updates, groups)
    begins = np.cumsum([0, *sizes]) * updates
    bands = [
        ascending[begin : begin + updates * size].reshape(updates, size) for begin, size in zip(begins, sizes, strict=False)
    ]
    of_bands = [weights[band].sum(1) for band in bands]
    order_of_bands = sorted(range(groups), key=lambda band: -int(np.ptp(of_bands[band])))
    first = order_of_bands[0]
    chosen = np.empty((groups, updates), np.int64)
    chosen[first] = shuffle(key[0], Stream.DEAL, key[1], updates)
    loads = of_bands[first][chosen[first]]
    for band in order_of_bands[1:]:
        heaviest_first = np.argsort(-loads, kind="stable")
        chosen[band][heaviest_first] = np.argsort(of_bands[band], kind="stable")
        loads = loads + of_bands[band][chosen[band]]
    return [[bands[band][chosen[band, update]] for band in range(groups)] for update in range(updates)]


def group_sizes(rows: int, groups: int) -> list[int]:
    """Rows of each group of an update, from the shortest rows to the longest; they sum to `rows`, none is empty.

    Sizes fall about linearly, to a third: 16 rows in 4 groups are 6, 4, 4 and 2. Only the longest rows differ much in length,
    so small groups of them save most of the padding and keep the largest micro-batch small.
    """
    weights = np.arange(3 * (groups - 1), groups - 2, -2) if groups > 1 else np.ones(1, np.int64)
    ends = np.cumsum(weights) * (rows - groups)
    total = 2 * int(weights.sum())
    rounded = (2 * ends + total // 2) // total  # half up, in whole numbers
    return sorted((1 + np.diff(rounded, prepend=0)).tolist(), reverse=True)


def cut(
    ascending: np.ndarray, lengths: tuple[np.ndarray, np.ndarray], micro_tokens: int, pad_multiple: int
) -> list[np.ndarray]:
    """Cut rows sorted by length where rows * (longest source + longest target), padded, would exceed `micro_tokens`.

    The longest rows are cut off first; a row that exceeds the budget alone is a part by itself.

    Args:
        lengths: source and target tokens of every row.
    """
    source, target = (rounded_up(of_row[ascending], pad_multiple).tolist() for of_row in lengths)
    parts: list[np.ndarray] = []
    end = len(ascending)
    longest_source = longest_target = 0
    for place in range(len(ascending) - 1, -1, -1):
        longest_source, longest_target = max(longest_source, source[place]), max(longest_target, target[place])
        if place + 1 < end and (end - place) * (longest_source + longest_target) > micro_tokens:
            parts.append(ascending[place + 1 : end])
            end, longest_source, longest_target = place + 1, source[place], target[place]
    parts.append(ascending[:end])
    return parts


def cheapest_cut(
    ascending: np.ndarray, lengths: tuple[np.ndarray, np.ndarray], micro_tokens: int, pad_multiple: int
) -> list[np.ndarray]:
    """Cut rows sorted by length into runs of neighbours at the lowest cost: padded tokens plus `MICRO_BATCH_TOKENS` a run.

    For an update in random order, whose lengths differ widely: filling every micro-batch up to a large `micro_tokens` would
    pad short rows to the longest. Exact, by dynamic programming over the end of the last run in O(rows^2): about a millisecond
    at 64 rows. No run exceeds `micro_tokens` unless it is one row.

    Args:
        lengths: source and target tokens of every row; the source lengths ascend along `ascending`.

    Returns:
        the runs, the longest rows first.
    """
    source, target = (rounded_up(of_row[ascending], pad_multiple) for of_row in lengths)
    rows = len(ascending)
    least = np.zeros(rows + 1, np.int64)
    begins = np.zeros(rows + 1, np.int64)
    for end in range(1, rows + 1):
        # Cost of each run that ends here, by the row it begins at, plus the lowest cost of all rows before it.
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


# No training reaches these epochs, so evaluation and estimates never repeat a draw of training.
EVALUATION_EPOCH = 2**62
ESTIMATE_EPOCH = EVALUATION_EPOCH + 1
ESTIMATE_EXAMPLES = 512
# Readers may be in two windows at once, and a caller may ask for an earlier one.
WINDOWS_KEPT = 3
UPDATES_AHEAD = 8
# Packed shapes are chosen from the first updates: as many as have these examples, but within these bounds.
SAMPLE_EXAMPLES = 16_384
SAMPLE_UPDATES = (32, 512)


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward of B examples in R rows: B = R unless it is packed.

    The tensors are int64, and int32 in a packed micro-batch, whose rows have several examples one after another or none.
    """

    source_BS: torch.Tensor
    """(R, S), padded with the padding id."""
    source_mask_BS: torch.Tensor
    """(R, S), 0 for padding, else 1 + the number of the example in its row: 1 for all tokens if it is not packed."""
    labels_BT: torch.Tensor
    """(R, T), padded with -100."""
    example_ids: np.ndarray
    """int64 (B,), row after row."""
    target_tokens: int
    """Labels that are not padding."""
    useful_tokens: int
    """Tokens of sources and targets."""
    padded_tokens: int
    """Elements of the source and the labels, padding included."""
    id_range: tuple[int, int]
    """Lowest and highest token id of sources and labels."""
    target_segments_BT: torch.Tensor | None = None
    """(R, T), the same for the labels as `source_mask_BS`; None if it is not packed."""
    on_device: PassInput | None = None
    """The tensors on the GPU, if a reader has copied them ahead."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(rows, source tokens, target tokens)."""
        rows, source = self.source_BS.shape
        return rows, source, self.labels_BT.shape[1]

    def pass_input(self) -> PassInput:
        """The tensors as one, in host memory."""
        return PassInput.of(self.source_BS, self.source_mask_BS, self.labels_BT, self.target_segments_BT)

    @property
    def is_single(self) -> bool:
        """Whether it is one example in one row, so that no smaller micro-batch can hold it."""
        return len(self.example_ids) == len(self.source_BS) == 1

    def lengths(self) -> tuple[list[int], list[int]]:
        """Source and target tokens of each example, in the order of `example_ids`."""
        if self.target_segments_BT is None:
            return self.source_mask_BS.sum(1).tolist(), (self.labels_BT != IGNORED).sum(1).tolist()
        return segment_lengths(self.source_mask_BS.numpy()), segment_lengths(self.target_segments_BT.numpy())


def segment_lengths(segments: np.ndarray) -> list[int]:
    """Tokens of each segment of packed rows (rows, length), row after row; 0 is padding."""
    keys = segments + (int(segments.max()) + 1) * np.arange(len(segments))[:, None]
    counts = np.bincount(keys[segments > 0])
    return counts[counts > 0].tolist()


@dataclass(frozen=True)
class EvaluationBatch:
    """A micro-batch of evaluation with what was masked in it, row for row."""

    micro_batch: MicroBatch
    corrupted: Corrupted
    of_terms_BT: torch.Tensor
    """bool, the labels that belong to a masked term."""


@dataclass(frozen=True)
class _Window:
    """A corrupted window and the groups of each update."""

    corrupted: Corrupted
    example_ids: np.ndarray
    groups: list[list[np.ndarray]]
    """For each update its groups of rows, each ascending in length."""


@dataclass
class _Slot:
    """A window that one thread computes while others wait for it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    window: _Window | None = None


class Batches:
    """Micro-batches of every update of a run. Stateless except for a cache; threads may share it.

    Args:
        seed: of order and corruption.
        micro_tokens: maximum padded tokens, source plus target, of a micro-batch; a single example may exceed it.
        pad_multiple: lengths are padded to a multiple of this; those of packed rows to a multiple of 8 at least.
        packing: pack the examples of an update; None: one example a row.

    Raises:
        DataError: the split is empty.
    """

    def __init__(
        self,
        split: Split,
        table: TokenTable,
        config: Config,
        *,
        seed: int,
        micro_tokens: int,
        pad_multiple: int,
        packing: Packing | None = None,
    ):
        if len(split) == 0:
            raise DataError("there are no examples to train on", hint="Give more text.")
        self.split, self.table, self.config, self.seed = split, table, config, seed
        self.micro_tokens, self.pad_multiple = micro_tokens, pad_multiple
        self.examples_per_update = config.batch.examples_per_update
        self.window_updates = max(1, min(config.batch.window_updates, len(split) // self.examples_per_update))
        self.updates_per_epoch = len(split) / self.examples_per_update
        self.packing = packing
        self._row_shapes: dict[int, RowShapes] = {}
        self._row_shapes_lock = threading.Lock()
        self._slots: OrderedDict[int, _Slot] = OrderedDict()
        self._slots_lock = threading.Lock()

    @cached_property
    def mean_target_tokens(self) -> float:
        """Mean target tokens of an update, estimated from a fixed sample of examples."""
        count = min(ESTIMATE_EXAMPLES, len(self.split))
        sample = order(self.seed, ESTIMATE_EPOCH, np.arange(count), len(self.split))
        corrupted = self._corrupt(sample, np.full(count, ESTIMATE_EPOCH))
        return len(corrupted.target) / count * self.examples_per_update

    def at(self, update: int) -> list[MicroBatch]:
        """The micro-batches of update number `update`, counted from 0; the largest first."""
        window = self._window(update // self.window_updates)
        return self._cut(window, window.groups[update % self.window_updates])

    def longest(self) -> list[MicroBatch]:
        """Micro-batches of the longest examples, about the largest that an update can have; no run trains on them."""
        count = min(self.examples_per_update, len(self.split))
        lengths = np.diff(self.split.offsets)
        example_ids = np.argpartition(lengths, len(lengths) - count)[-count:]
        corrupted = self._corrupt(example_ids, np.full(count, ESTIMATE_EPOCH))
        ascending = np.lexsort(_lengths(corrupted)[::-1])
        return self._cut(_Window(corrupted, example_ids, [[ascending]]), [ascending])

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(rows, source tokens, target tokens) of every micro-batch that a packed update may have; empty if not packed."""
        return [] if self.packing is None else self._shapes_within(self.packing, self.micro_tokens).triples()

    def largest_shape(self, micro_tokens: int) -> tuple[int, int, int]:
        """Upper bounds of rows, source tokens and target tokens of packed micro-batches within a budget."""
        assert self.packing is not None
        shapes = self._shapes_within(self.packing, micro_tokens)
        return shapes.rows, max(source for source, _ in shapes.lengths), max(target for _, target in shapes.lengths)

    def _shapes_within(self, packing: Packing, micro_tokens: int) -> RowShapes:
        """Packed shapes for this budget, chosen once from the first updates of the run."""
        with self._row_shapes_lock:
            if micro_tokens not in self._row_shapes:
                multiple = math.lcm(MULTIPLE, self.pad_multiple)
                self._row_shapes[micro_tokens] = choose_shapes(
                    self._sample, micro_tokens=micro_tokens, longest=packing.longest, parts=packing.parts, multiple=multiple
                )
            return self._row_shapes[micro_tokens]

    @cached_property
    def _sample(self) -> list[Lengths]:
        """Lengths of the examples of each of the first updates."""
        fewest, most = SAMPLE_UPDATES
        updates = min(max(SAMPLE_EXAMPLES // self.examples_per_update, fewest), most)
        windows = -(-updates // self.window_updates)
        size = self.window_updates * self.examples_per_update
        source, target = _lengths(self._draw(np.arange(windows * size))[1])
        sampled: list[Lengths] = []
        for number in range(windows):
            first = number * size
            dealt = self._deal((source[first : first + size], target[first : first + size]), number)
            sampled += [(source[rows], target[rows]) for rows in (first + np.concatenate(groups) for groups in dealt)]
        return sampled

    def _packed(self, window: _Window, rows: np.ndarray, packing: Packing) -> list[MicroBatch]:
        """These rows of a window as packed micro-batches, the largest first."""
        source, target = _lengths(window.corrupted)
        shapes = self._shapes_within(packing, self.micro_tokens)
        parts = [
            replace(part, examples=rows[part.examples]) for part in pack((source[rows], target[rows]), shapes, packing.parts)
        ]
        micro_batches = [
            collate_packed(window.corrupted, part, window.example_ids[part.examples], pad_id=self.table.pad_id)
            for part in parts
        ]
        return sorted(micro_batches, key=lambda micro_batch: -micro_batch.padded_tokens)

    def _cut(self, window: _Window, groups: list[np.ndarray]) -> list[MicroBatch]:
        """Groups of rows as micro-batches, the largest first."""
        if self.packing is not None:
            return self._packed(window, np.concatenate(groups), self.packing)
        whole = self.window_updates > 1 or self.config.optim.name == "adafactor_in_backward"  # which cannot accumulate
        cut_group = cut if whole else cheapest_cut
        parts = [
            rows
            for group in groups
            for rows in cut_group(group, _lengths(window.corrupted), self.micro_tokens, self.pad_multiple)
        ]
        micro_batches = [
            collate(window.corrupted, rows, window.example_ids[rows], pad_id=self.table.pad_id, pad_multiple=self.pad_multiple)
            for rows in parts
        ]
        return sorted(micro_batches, key=lambda micro_batch: -micro_batch.padded_tokens)

    def prepare(self, update: int) -> None:
        """Compute the window of an update before `at` needs it."""
        self._window(update // self.window_updates)

    def _window(self, number: int) -> _Window:
        with self._slots_lock:
            slot = self._slots.setdefault(number, _Slot())
            self._slots.move_to_end(number)
            while len(self._slots) > WINDOWS_KEPT:
                self._slots.popitem(last=False)
        with slot.lock:
            if slot.window is None:
                slot.window = self._compute(number)
            return slot.window

    def _compute(self, number: int) -> _Window:
        """Corrupt, sort and deal window `number`."""
        size = self.window_updates * self.examples_per_update
        example_ids, corrupted = self._draw(number * size + np.arange(size))
        return _Window(corrupted, example_ids, self._deal(_lengths(corrupted), number))

    def _draw(self, positions: np.ndarray) -> tuple[np.ndarray, Corrupted]:
        """The examples at these positions of the stream: their ids, and corrupted."""
        epochs = positions // len(self.split)
        example_ids = order(self.seed, epochs, positions % len(self.split), len(self.split))
        return example_ids, self._corrupt(example_ids, epochs)

    def _deal(self, lengths: Lengths, number: int) -> list[list[np.ndarray]]:
        """The groups of each update of window `number`, from the lengths of its examples."""
        groups = min(self.config.batch.groups_per_update, self.examples_per_update) if self.window_updates > 1 else 1
        return deal(np.lexsort(lengths[::-1]), lengths, self.window_updates, groups, (self.seed, number))

    def _corrupt(self, example_ids: np.ndarray, epochs: np.ndarray) -> Corrupted:
        settings, data = self.config.corruption, self.config.data
        return corrupt(self.split, example_ids, epochs, seed=self.seed, settings=settings, data=data, table=self.table)


class Prefetcher:
    """Updates of `batches` in order, prepared ahead by threads; bit-identical to `Batches.at`.

    Args:
        first_update: the update that the first `take` returns.
        readers: threads; with 0, `take` prepares.
        copy_ahead: copies an input to the GPU; called in the threads.
    """

    def __init__(
        self,
        batches: Batches,
        first_update: int,
        readers: int,
        copy_ahead: Callable[[PassInput], PassInput | None] | None = None,
    ):
        self.wait_s = 0.0
        """Seconds that `take` has waited so far."""
        self._batches, self._readers, self._copy_ahead = batches, readers, copy_ahead
        self._start(first_update)

    def restart(self, update: int) -> None:
        """Drop what was prepared and continue at `update`."""
        self.close()
        self._start(update)

    def _start(self, update: int) -> None:
        self._next_taken = self._next_submitted = update
        self._threads = ThreadPoolExecutor(self._readers, thread_name_prefix="reader") if self._readers > 0 else None
        self._ahead: deque[Future[list[MicroBatch]]] = deque()
        self._submit()

    def take(self) -> list[MicroBatch]:
        """The next update's micro-batches; raises what preparing them raised."""
        begin_s = time.perf_counter()
        micro_batches = self._read(self._next_taken) if self._threads is None else self._ahead.popleft().result()
        self.wait_s += time.perf_counter() - begin_s
        self._next_taken += 1
        self._submit()
        return micro_batches

    def _read(self, update: int) -> list[MicroBatch]:
        micro_batches = self._batches.at(update)
        if self._copy_ahead is None:
            return micro_batches
        return [replace(micro_batch, on_device=self._copy_ahead(micro_batch.pass_input())) for micro_batch in micro_batches]

    def close(self) -> None:
        """Drop prepared updates and wait for the threads to end. Idempotent."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def _submit(self) -> None:
        """Submit the next updates to the threads, and at the beginning of a window also the next window."""
        if self._threads is None:
            return
        while self._next_submitted < self._next_taken + UPDATES_AHEAD:
            self._ahead.append(self._threads.submit(self._read, self._next_submitted))
            self._next_submitted += 1
        first_of_window = self._next_taken % self._batches.window_updates == 0
        if first_of_window and self._batches.window_updates > UPDATES_AHEAD:
            # An error is raised again when an update of that window is taken.
            self._threads.submit(self._batches.prepare, self._next_taken + self._batches.window_updates)


def collate(corrupted: Corrupted, rows: np.ndarray, example_ids: np.ndarray, *, pad_id: int, pad_multiple: int) -> MicroBatch:
    """Pad these rows to the longest of them, rounded up to a multiple of `pad_multiple`."""
    ids, offsets = corrupted.encoder_ids, corrupted.encoder_offsets
    source, source_mask = pad_rows(ids, offsets, rows, padding=pad_id, multiple=pad_multiple)
    ids, offsets = corrupted.target, corrupted.target_offsets
    labels, label_mask = pad_rows(ids, offsets, rows, padding=IGNORED, multiple=pad_multiple)
    target_tokens = int(label_mask.sum())
    return MicroBatch(
        source_BS=torch.from_numpy(source),
        source_mask_BS=torch.from_numpy(source_mask.astype(np.int64)),
        labels_BT=torch.from_numpy(labels),
        example_ids=example_ids,
        target_tokens=target_tokens,
        useful_tokens=int(source_mask.sum()) + target_tokens,
        padded_tokens=source.size + labels.size,
        id_range=_id_range(source, labels[label_mask]),
    )


def collate_packed(corrupted: Corrupted, packed: PackedRows, example_ids: np.ndarray, *, pad_id: int) -> MicroBatch:
    """Write the examples of `packed`, rows of `corrupted`, one after another into the rows of a micro-batch."""
    _, source_length, target_length = packed.shape
    ids, offsets = corrupted.encoder_ids, corrupted.encoder_offsets
    source, source_segments = fill_rows(ids, offsets, packed, source_length, pad_id)
    ids, offsets = corrupted.target, corrupted.target_offsets
    labels, target_segments = fill_rows(ids, offsets, packed, target_length, IGNORED)
    target_tokens = int(np.count_nonzero(target_segments))
    return MicroBatch(
        source_BS=torch.from_numpy(source),
        source_mask_BS=torch.from_numpy(source_segments),
        labels_BT=torch.from_numpy(labels),
        example_ids=example_ids,
        target_tokens=target_tokens,
        useful_tokens=int(np.count_nonzero(source_segments)) + target_tokens,
        padded_tokens=source.size + labels.size,
        id_range=_id_range(source, labels[target_segments > 0]),
        target_segments_BT=torch.from_numpy(target_segments),
    )


def _id_range(source: np.ndarray, targets: np.ndarray) -> tuple[int, int]:
    """Lowest and highest token id."""
    return int(min(source.min(), targets.min())), int(max(source.max(), targets.max()))


def evaluation_batches(
    split: Split,
    table: TokenTable,
    config: Config,
    *,
    examples: int,
    seed: int,
    micro_tokens: int,
    pad_multiple: int,
) -> list[EvaluationBatch]:
    """Fixed examples under fixed corruption, sorted by length and cut by `micro_tokens`, the longest first.

    The examples are drawn by key from the whole split; fewer of them are the first of more.

    Args:
        examples: most examples to take; 0 gives no batch.

    Raises:
        DataError: examples are asked for and the split is empty.
    """
    if examples == 0:
        return []
    if len(split) == 0:
        raise DataError("there are no examples to evaluate on", hint="Give more text, or raise data.validation_share.")
    count = min(examples, len(split))
    example_ids = order(seed, EVALUATION_EPOCH, np.arange(count), len(split))
    epochs = np.full(count, EVALUATION_EPOCH)
    settings = replace(config.corruption, mask_ratio_spread=0.0)
    corrupted = corrupt(split, example_ids, epochs, seed=seed, settings=settings, data=config.data, table=table)
    lengths, of_terms = _lengths(corrupted), term_targets(corrupted)
    parts = cut(np.lexsort(lengths[::-1]), lengths, micro_tokens, pad_multiple)
    return [
        EvaluationBatch(
            micro_batch=collate(corrupted, rows, example_ids[rows], pad_id=table.pad_id, pad_multiple=pad_multiple),
            corrupted=corrupted.take(rows),
            of_terms_BT=torch.from_numpy(
                pad_rows(of_terms, corrupted.target_offsets, rows, padding=0, multiple=pad_multiple)[0] > 0
            ),
        )
        for rows in parts
    ]


def _lengths(corrupted: Corrupted) -> tuple[np.ndarray, np.ndarray]:
    """Source and target tokens of every row."""
    return np.diff(corrupted.encoder_offsets), np.diff(corrupted.target_offsets)
