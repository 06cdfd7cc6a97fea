"""Micro-batches, readers, evaluation batches. Run: python -m pytest tests/data/test_batches.py"""

import dataclasses
import itertools
import threading
import time
import tracemalloc
from collections import Counter
from contextlib import closing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient_t5.config.schema import BatchConfig, Config, CorruptionConfig, DataConfig, OptimConfig
from resilient_t5.data.batches import (
    MICRO_BATCH_TOKENS,
    Batches,
    MicroBatch,
    Prefetcher,
    cheapest_cut,
    cut,
    deal,
    evaluation_batches,
    group_sizes,
)
from resilient_t5.data.corruption.corruption import corrupt
from resilient_t5.errors import DataError
from tests.data.fake_split import FakeSplit, fake_table, log_normal_lengths, random_split, split_of

TABLE = fake_table()


def config_of(*, examples_per_update: int = 8, window_updates: int = 5, groups: int = 4, mask_ratio: float = 0.3) -> Config:
    """A configuration with these batches."""
    return Config(
        data=DataConfig(max_source_tokens=512, max_target_tokens=256),
        corruption=CorruptionConfig(mask_ratio=mask_ratio, max_sentinels=100),
        batch=BatchConfig(examples_per_update=examples_per_update, window_updates=window_updates, groups_per_update=groups),
    )


def batches_of(
    split: FakeSplit, config: Config | None = None, *, micro_tokens: int = 400, pad_multiple: int = 1, seed: int = 3
) -> Batches:
    """Batches of a split."""
    return Batches(split, TABLE, config or config_of(), seed=seed, micro_tokens=micro_tokens, pad_multiple=pad_multiple)


def small_split(examples: int = 100) -> FakeSplit:
    """Chunks of 4 to 90 tokens."""
    return random_split(log_normal_lengths(examples, 30.0, 0.8, 90, seed=1), 2)


def same(ours: list[MicroBatch], others: list[MicroBatch]) -> bool:
    """Whether two updates have the same micro-batches, bit for bit and in order."""
    return len(ours) == len(others) and all(
        torch.equal(a.source_BS, b.source_BS)
        and torch.equal(a.source_mask_BS, b.source_mask_BS)
        and torch.equal(a.labels_BT, b.labels_BT)
        and np.array_equal(a.example_ids, b.example_ids)
        for a, b in zip(ours, others, strict=True)
    )


def examples_of(update: list[MicroBatch]) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Every example of an update with its source and labels, padding taken off, sorted."""
    return sorted(
        (int(example), tuple(source[mask == 1].tolist()), tuple(labels[labels != -100].tolist()))
        for m in update
        for example, source, mask, labels in zip(
            m.example_ids, m.source_BS.numpy(), m.source_mask_BS.numpy(), m.labels_BT.numpy(), strict=True
        )
    )


def share(updates: list[list[MicroBatch]]) -> float:
    """Useful tokens of all padded ones."""
    flat = [m for update in updates for m in update]
    return sum(m.useful_tokens for m in flat) / sum(m.padded_tokens for m in flat)


def test_a_micro_batch_is_the_padded_corruption_of_its_examples():
    """Sources, masks and labels are those of `corrupt`, padded to the longest with pad id, 0 and -100."""
    split = small_split()
    config = config_of(window_updates=1)
    for m in batches_of(split, config, seed=9).at(4):
        ids = m.example_ids
        epochs = np.zeros(len(ids))
        expected = corrupt(split, ids, epochs, seed=9, settings=config.corruption, data=config.data, table=TABLE)
        for row in range(len(ids)):
            source = expected.source[expected.source_offsets[row] : expected.source_offsets[row + 1]].tolist()
            target = expected.target[expected.target_offsets[row] : expected.target_offsets[row + 1]].tolist()
            padding = m.source_BS.shape[1] - len(source)
            assert m.source_BS[row].tolist() == source + [TABLE.pad_id] * padding
            assert m.source_mask_BS[row].tolist() == [1] * len(source) + [0] * padding
            assert m.labels_BT[row].tolist() == target + [-100] * (m.labels_BT.shape[1] - len(target))
        assert m.source_BS.shape[1] == np.diff(expected.source_offsets).max()
        assert m.labels_BT.shape[1] == np.diff(expected.target_offsets).max()
        assert m.source_BS.dtype == m.source_mask_BS.dtype == m.labels_BT.dtype == torch.int64
        assert m.target_tokens == len(expected.target)
        assert m.useful_tokens == len(expected.source) + len(expected.target)
        assert m.padded_tokens == m.source_BS.numel() + m.labels_BT.numel()


@settings(max_examples=25, deadline=None)
@given(
    examples=st.integers(1, 60),
    per_update=st.integers(1, 9),
    window=st.integers(1, 12),
    groups=st.integers(1, 6),
)
def test_every_epoch_gives_every_example_once_and_every_update_is_full(examples, per_update, window, groups):
    """The first two epochs' worth of positions hold every example exactly twice; no update is short."""
    config = config_of(examples_per_update=per_update, window_updates=window, groups=groups)
    batches = batches_of(small_split(examples), config)
    updates_of_windows = -(-2 * examples // (per_update * batches.window_updates)) * batches.window_updates
    updates = [batches.at(update) for update in range(updates_of_windows)]
    assert all(sum(len(m.example_ids) for m in update) == per_update for update in updates)
    counts = Counter(int(example) for update in updates for m in update for example in m.example_ids)
    assert min(counts.values()) >= 2
    assert sum(counts.values()) == updates_of_windows * per_update
    assert max(counts.values()) <= -(-updates_of_windows * per_update // examples)


def test_an_epoch_that_divides_into_windows_gives_every_example_once():
    """With 80 examples, updates 0 to 9 are one epoch and 10 to 19 another, in another order with other masks."""
    batches = batches_of(small_split(80))
    first, second = ([batches.at(update) for update in numbers] for numbers in (range(10), range(10, 20)))
    for epoch in (first, second):
        seen = [int(example) for update in epoch for m in update for example in m.example_ids]
        assert sorted(seen) == list(range(80))
    assert sorted(sum((examples_of(u) for u in first), [])) != sorted(sum((examples_of(u) for u in second), []))


@pytest.mark.parametrize("window_updates", [1, 5])
def test_micro_tokens_changes_no_update(window_updates):
    """However an update is cut into micro-batches, it has the same examples with the same damage."""
    split = small_split()
    config = config_of(window_updates=window_updates)
    budgets = (1, 60, 150, 400, 2000, 10**9)
    cuts = [batches_of(split, config, micro_tokens=budget) for budget in budgets]
    for update in (0, 3, 17):
        updates = [batches.at(update) for batches in cuts]
        assert all(examples_of(one) == examples_of(updates[0]) for one in updates)
        assert len(updates[0]) == 8 and len(updates[-1]) in (range(1, 8) if window_updates == 1 else (4,))
    padded = batches_of(split, config, pad_multiple=8).at(3)
    assert examples_of(padded) == examples_of(cuts[0].at(3))
    assert all(size % 8 == 0 for m in padded for size in (m.source_BS.shape[1], m.labels_BT.shape[1]))


@pytest.mark.parametrize("pad_multiple", [1, 8])
def test_no_micro_batch_passes_its_budget_unless_it_is_one_example(pad_multiple):
    """Padded tokens stay within micro_tokens; the largest micro-batch of an update comes first."""
    for window_updates in (1, 5):
        batches = batches_of(small_split(), config_of(window_updates=window_updates), pad_multiple=pad_multiple)
        for update in range(30):
            sizes = [(m.padded_tokens, len(m.example_ids)) for m in batches.at(update)]
            assert all(padded <= 400 or examples == 1 for padded, examples in sizes)
            assert [padded for padded, _ in sizes] == sorted((padded for padded, _ in sizes), reverse=True)


def test_updates_are_a_pure_function_of_their_number():
    """Any order of asking, a new object and old windows asked for again give the same bits; another seed does not."""
    split = small_split()
    batches = batches_of(split)
    straight = [batches.at(update) for update in range(40)]
    again = batches_of(split)
    for update in (37, 0, 12, 39, 11, 1, 20, 0, 37):
        assert same(again.at(update), straight[update])
    assert not same(batches_of(split, seed=4).at(0), straight[0])


def test_window_one_keeps_the_updates_of_the_random_order():
    """With a window of one update, an update has exactly the next examples_per_update examples of the order."""
    from resilient_t5.data.counter_rng import order

    split = small_split(50)
    batches = batches_of(split, config_of(window_updates=1))
    positions = 8 * 9 + np.arange(8)
    expected = order(3, positions // 50, positions % 50, 50)
    assert sorted(int(e) for m in batches.at(9) for e in m.example_ids) == sorted(expected.tolist())


def test_a_window_never_spans_more_than_about_an_epoch():
    """The window is capped at the updates of one epoch, and at one update for a tiny corpus."""
    assert batches_of(small_split(30), config_of(window_updates=50)).window_updates == 3
    assert batches_of(small_split(3), config_of(window_updates=50)).window_updates == 1
    assert batches_of(small_split(3), config_of(window_updates=50)).updates_per_epoch == 3 / 8


@settings(max_examples=60, deadline=None)
@given(updates=st.integers(1, 20), per_update=st.integers(1, 12), groups=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_dealing_gives_every_row_to_one_update_in_groups_of_neighbours(updates, per_update, groups, seed):
    """Every update gets the same number of rows in `groups` groups, each a run of the sorted list."""
    groups = min(groups, per_update)
    rows = np.random.default_rng(seed).permutation(updates * per_update)
    place = np.argsort(rows)
    lengths = np.sort(np.random.default_rng(seed + 1).integers(1, 99, len(rows)))[place], np.ones(len(rows), np.int64)
    dealt = deal(rows, lengths, updates, groups, (seed, 0))
    assert [len(of_update) for of_update in dealt] == [groups] * updates
    assert all(sum(map(len, of_update)) == per_update for of_update in dealt)
    assert sorted(np.concatenate([g for of_update in dealt for g in of_update]).tolist()) == sorted(rows.tolist())
    assert all(np.all(np.diff(place[group]) == 1) for of_update in dealt for group in of_update)


def test_updates_are_dealt_about_the_same_number_of_tokens():
    """The same groups dealt at random vary at least twice as much."""
    generator = np.random.default_rng(1)
    source = np.sort(np.clip(generator.lognormal(4.0, 0.45, 800), 4, 112).astype(np.int64))
    target = np.maximum(1, generator.binomial(source, 0.3))
    dealt = deal(np.arange(800), (source, target), 50, 4, (1, 0))
    at_random = [[dealt[(update + 7 * band) % 50][band] for band in range(4)] for update in range(50)]

    def deviation(updates, side):
        totals = np.array([sum(int(side[group].sum()) for group in of_update) for of_update in updates])
        return totals.std() / totals.mean()

    assert deviation(dealt, source) < 0.03 and deviation(dealt, target) < 0.06
    assert deviation(dealt, source) < deviation(at_random, source) / 2


def test_dealing_is_random_and_keyed_by_the_window():
    """Neither the band that is dealt first nor any other is in order, and another window is dealt otherwise."""
    rows, lengths = np.arange(800), (np.arange(800) // 8 + 4, np.arange(800) // 40 + 1)
    dealt, other = deal(rows, lengths, 50, 4, (1, 0)), deal(rows, lengths, 50, 4, (1, 1))
    places, other_places = (np.array([[group[0] for group in of_update] for of_update in each]) for each in (dealt, other))
    assert np.all(np.abs(np.corrcoef(np.column_stack((np.arange(50), places)).T)[0, 1:]) < 0.5)
    assert np.all((places == other_places).mean(axis=0) < 0.2)


@given(rows=st.integers(1, 64), groups=st.integers(1, 16))
def test_group_sizes_fall_towards_the_longest_rows(rows, groups):
    """Sizes sum to the rows of an update, none is empty, and none is larger than the one before it."""
    groups = min(groups, rows)
    sizes = group_sizes(rows, groups)
    assert len(sizes) == groups and sum(sizes) == rows and min(sizes) >= 1
    assert sizes == sorted(sizes, reverse=True)
    assert groups == 1 or sizes[0] <= 4 * (rows / groups)


def test_sixteen_rows_are_dealt_in_groups_of_six_four_four_and_two():
    """The default update, and an update of as many groups as rows."""
    assert group_sizes(16, 4) == [6, 4, 4, 2]
    assert group_sizes(4, 4) == [1, 1, 1, 1] and group_sizes(7, 1) == [7]


def test_cutting_keeps_order_and_budget():
    """Parts are runs of the sorted rows, the longest first, and none could take the next row."""
    source, target = np.array([3, 4, 4, 9, 20]), np.array([2, 1, 5, 2, 30])
    parts = cut(np.arange(5), (source, target), 22, 1)
    assert [part.tolist() for part in parts] == [[4], [3], [1, 2], [0]]


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 30)), min_size=1, max_size=9),
    micro_tokens=st.integers(1, 700),
    pad_multiple=st.sampled_from([1, 8]),
)
def test_no_cut_is_cheaper_than_the_cheapest(lengths, micro_tokens, pad_multiple):
    """Against every way to cut the sorted rows into runs that keep the budget: padded tokens and a toll for each run."""
    source, target = np.array(lengths).T
    ascending = np.lexsort((target, source))

    def padded(rows: np.ndarray) -> int:
        return sum(len(rows) * -(-int(of_row[rows].max()) // pad_multiple) * pad_multiple for of_row in (source, target))

    def cost(parts: list[np.ndarray]) -> int:
        return sum(padded(part) + MICRO_BATCH_TOKENS for part in parts)

    parts = cheapest_cut(ascending, (source, target), micro_tokens, pad_multiple)
    assert np.concatenate(parts[::-1]).tolist() == ascending.tolist()
    assert all(len(part) == 1 or padded(part) <= micro_tokens for part in parts)
    places = range(1, len(lengths))
    ways = (np.split(ascending, ends) for count in range(len(lengths)) for ends in itertools.combinations(places, count))
    allowed = (way for way in ways if all(len(part) == 1 or padded(part) <= micro_tokens for part in way))
    assert cost(parts) == min(map(cost, allowed))


def test_a_window_of_fifty_has_98_percent_useful_tokens_and_steady_targets():
    """Log-normal lengths, 30 % masked, 16 examples an update in 4 groups: padding is at most 2 %, and the number of
    target tokens varies less from update to update than in random order."""
    split = random_split(log_normal_lengths(3200, 156.0, 0.8, 511, seed=4), 5)
    sorted_updates, random_updates = (
        [batches.at(update) for update in range(200)]
        for batches in (
            batches_of(split, config_of(examples_per_update=16, window_updates=window), micro_tokens=4096) for window in (50, 1)
        )
    )
    assert share(sorted_updates) >= 0.98
    spread = [np.std([sum(m.target_tokens for m in u) for u in updates]) for updates in (sorted_updates, random_updates)]
    assert spread[0] < spread[1]


def test_a_window_of_one_has_85_percent_useful_tokens():
    """The same lengths in random order, about two examples a micro-batch."""
    split = random_split(log_normal_lengths(800, 156.0, 0.8, 511, seed=4), 5)
    batches = batches_of(split, config_of(examples_per_update=16, window_updates=1), micro_tokens=700)
    updates = [batches.at(update) for update in range(50)]
    assert 1.8 < 16 * 50 / sum(map(len, updates)) < 2.4
    assert share(updates) >= 0.85


def test_a_window_of_one_does_not_pad_to_a_large_budget():
    """However large micro_tokens is, the short examples of an update are not padded to its longest."""
    split = random_split(log_normal_lengths(800, 156.0, 0.8, 511, seed=4), 5)
    config = config_of(examples_per_update=16, window_updates=1)
    for micro_tokens in (4096, 10**9):
        batches = batches_of(split, config, micro_tokens=micro_tokens)
        updates = [batches.at(update) for update in range(50)]
        assert share(updates) >= 0.88
        assert sum(map(len, updates)) / 50 < 7


@pytest.mark.parametrize("first_update", [0, 13])
def test_readers_change_no_bit(first_update):
    """0, 1 and 4 threads give the updates of `Batches.at`, from any update on."""
    split = small_split()
    expected = [batches_of(split).at(update) for update in range(first_update, first_update + 30)]
    for readers in (0, 1, 4):
        with closing(Prefetcher(batches_of(split), first_update, readers)) as reader:
            assert all(same(reader.take(), update) for update in expected)
            assert reader.wait_s > 0.0


def test_a_reader_prepares_ahead_and_not_without_bound():
    """Before anything is taken a few updates are prepared; the rest waits."""
    asked, enough = [], threading.Event()

    class Recorded(Batches):
        def at(self, update: int) -> list[MicroBatch]:
            asked.append(update)
            if len(asked) >= 8:
                enough.set()
            return super().at(update)

    batches = Recorded(small_split(), TABLE, config_of(), seed=3, micro_tokens=400, pad_multiple=1)
    with closing(Prefetcher(batches, 0, 2)) as reader:
        assert enough.wait(30)
        assert sorted(asked) == list(range(8))
        reader.take()
    assert max(asked) <= 8


def test_what_a_reader_thread_raises_comes_out_of_take():
    """A store with a bad example stops the run with its own error, with threads and without."""
    split = split_of([[200] * 20] * 9 + [[60_000] * 20])
    for readers in (0, 2):
        failure = pytest.raises(DataError, match="beyond its vocabulary")
        with closing(Prefetcher(batches_of(split), 0, readers)) as reader, failure:
            for _ in range(10):
                reader.take()


def test_closing_a_reader_ends_its_threads():
    """After `close` no reader thread is alive; closing twice is harmless."""
    reader = Prefetcher(batches_of(small_split()), 0, 3)
    reader.take()
    reader.close()
    reader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reader")]


def test_threads_share_one_computation_of_a_window(monkeypatch):
    """Many threads that ask for one window corrupt it once."""
    from resilient_t5.data import batches as module

    calls = []
    monkeypatch.setattr(module, "corrupt", lambda *args, **kwargs: (calls.append(1), corrupt(*args, **kwargs))[1])
    batches = batches_of(small_split())
    threads = [threading.Thread(target=batches.at, args=(update % 5,)) for update in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_the_mean_target_length_is_that_of_training():
    """The estimate that plans use is within a few percent of what updates really have."""
    split = random_split(log_normal_lengths(600, 60.0, 0.5, 200, seed=6), 7)
    batches = batches_of(split)
    real = np.mean([sum(m.target_tokens for m in batches.at(update)) for update in range(75)])
    assert abs(batches.mean_target_tokens / real - 1.0) < 0.05


def test_evaluation_is_fixed_keyed_and_apart_from_training():
    """The same examples and damage every time, drawn from the whole split, in micro-batches that lose nothing."""
    split = small_split(200)
    config = config_of()
    chosen = {"examples": 40, "seed": 3, "pad_multiple": 1}
    first, again, finer = (evaluation_batches(split, TABLE, config, micro_tokens=budget, **chosen) for budget in (600, 600, 90))
    assert same([b.micro_batch for b in first], [b.micro_batch for b in again])
    assert examples_of([b.micro_batch for b in first]) == examples_of([b.micro_batch for b in finer])
    ids = [int(example) for b in first for example in b.micro_batch.example_ids]
    assert len(set(ids)) == 40 and ids != list(range(40)) and max(ids) > 150
    lengths = [b.micro_batch.source_BS.shape[1] for b in first]
    assert lengths == sorted(lengths, reverse=True)
    training = batches_of(split, config)
    damaged = {example for update in range(25) for example in examples_of(training.at(update))}
    assert len(damaged & set(examples_of([b.micro_batch for b in first]))) <= 2


def test_evaluation_keeps_to_the_mask_ratio_where_training_spreads_it():
    """A spread changes training batches and no bit of the evaluation."""
    split, config = small_split(60), config_of()
    corruption = dataclasses.replace(config.corruption, mask_ratio_spread=0.2)
    spread = dataclasses.replace(config, corruption=corruption)
    chosen = {"examples": 40, "seed": 1, "micro_tokens": 500, "pad_multiple": 8}
    plain, same_ones = (
        [b.micro_batch for b in evaluation_batches(split, TABLE, config_, **chosen)] for config_ in (config, spread)
    )
    assert same(plain, same_ones)
    assert not same(batches_of(split, config).at(0), batches_of(split, spread).at(0))


def test_evaluation_batches_know_what_was_masked():
    """Spans and masked terms of each micro-batch are numbered by its own rows; its labels have them at these positions."""
    split = small_split(60)
    found = 0
    for batch in evaluation_batches(split, TABLE, config_of(), examples=60, seed=1, micro_tokens=500, pad_multiple=8):
        labels = batch.micro_batch.labels_BT.tolist()
        for row, k, start, end in batch.corrupted.spans.tolist():
            at = labels[row].index(int(TABLE.sentinel_ids[k]))
            assert labels[row][at + 1 : at + 1 + end - start] == split.chunk(int(batch.micro_batch.example_ids[row]))[start:end]
        for row, term, _, start, end in batch.corrupted.masked_terms.tolist():
            assert (start, end, term) in split.terms_of(int(batch.micro_batch.example_ids[row]))
            found += 1
        assert len(batch.corrupted) == len(labels) == len(batch.micro_batch.example_ids)
        for row, chosen in enumerate(batch.of_terms_BT):
            of_terms = batch.micro_batch.labels_BT[row][chosen].tolist()
            chunk = split.chunk(int(batch.micro_batch.example_ids[row]))
            masked = batch.corrupted.masked_terms
            assert of_terms == [token for *_, a, b in masked[masked[:, 0] == row].tolist() for token in chunk[a:b]]
    assert found > 5


def test_fewer_evaluation_examples_are_the_first_of_more():
    """The restoration subset lies inside the loss subset."""
    split = small_split(100)

    def ids(examples: int) -> set[int]:
        batches = evaluation_batches(split, TABLE, config_of(), examples=examples, seed=3, micro_tokens=500, pad_multiple=1)
        return {int(example) for b in batches for example in b.micro_batch.example_ids}

    assert ids(10) < ids(40) < ids(1000) == set(range(100)) and ids(0) == set()


class RecordedTokens:
    """Tokens that are made while they are read: example i is made of id 200 + i % 1000. Remembers how many were read."""

    def __init__(self, examples: int, tokens_per_example: int):
        self._size, self._per_example = examples * tokens_per_example, tokens_per_example
        self.read = 0

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        self.read += np.size(index)
        return (200 + np.asarray(index) // self._per_example % 1000).astype(np.int32)


def test_the_first_batch_of_ten_million_examples_costs_the_same_at_any_position():
    """Under a second and under 200 MiB, anywhere in any epoch; and of tokens mapped while they are read, as those of runs
    over the full vocabulary, only the window's own are read."""
    examples, length = 10_000_000, 60
    offsets = np.arange(examples + 1) * length
    split = FakeSplit(RecordedTokens(examples, length), offsets, np.zeros((0, 4), np.int32))  # type: ignore[arg-type]
    config = config_of(examples_per_update=16, window_updates=50)
    for update in (0, 312_499, 624_999, 10**9):
        split.tokens.read = 0
        tracemalloc.start()
        begin_s = time.process_time()
        micro_batches = batches_of(split, config, micro_tokens=4096).at(update)
        core_s, peak_bytes = time.process_time() - begin_s, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert core_s < 1.0 and peak_bytes < 200 << 20
        assert sum(len(m.example_ids) for m in micro_batches) == 16
        assert split.tokens.read < 1.1 * 50 * 16 * length


def test_an_empty_split_is_refused():
    """Nothing to train or evaluate on is a data error."""
    empty = split_of([])
    with pytest.raises(DataError, match="train on"):
        batches_of(empty)
    with pytest.raises(DataError, match="evaluate on"):
        evaluation_batches(empty, TABLE, config_of(), examples=5, seed=1, micro_tokens=500, pad_multiple=1)


@pytest.mark.parametrize("window_updates", [1, 5])
def test_no_update_of_an_epoch_has_more_tokens_than_that_of_the_longest_examples(window_updates):
    """It is what a rehearsal measures memory and time by."""
    split = small_split()
    batches = batches_of(split, config_of(window_updates=window_updates))
    longest = batches.longest()
    ids = np.concatenate([micro_batch.example_ids for micro_batch in longest])
    lengths = np.diff(split.offsets)
    assert sorted(lengths[ids]) == sorted(lengths)[-8:]
    most = max(sum(micro_batch.useful_tokens for micro_batch in batches.at(update)) for update in range(12))
    assert sum(micro_batch.useful_tokens for micro_batch in longest) >= most
    assert all(micro_batch.padded_tokens <= 400 or len(micro_batch.example_ids) == 1 for micro_batch in longest)


def test_an_optimizer_that_cannot_accumulate_gets_an_update_whole():
    """Also with windows of one update, where others are cut for the least padding."""
    config = dataclasses.replace(config_of(window_updates=1), optim=OptimConfig(name="adafactor_in_backward", clip_norm=0.0))
    for update in range(6):
        assert len(batches_of(small_split(), config, micro_tokens=10**6).at(update)) == 1
    assert max(len(batches_of(small_split(), config_of(window_updates=1), micro_tokens=10**6).at(u)) for u in range(6)) > 1
