"""Packed rows: their examples, shapes and padding. Run: python -m pytest tests/data/test_packing.py"""

import dataclasses
import itertools
import math
import time
from contextlib import closing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient_t5.config.schema import BatchConfig, Config, CorruptionConfig, DataConfig
from resilient_t5.data import packing
from resilient_t5.data.batches import IGNORED, Batches, MicroBatch, Prefetcher
from resilient_t5.data.packing import Packing, RowShapes, choose_shapes, cover, pack
from resilient_t5.errors import DataError
from resilient_t5.training.update import failure_of
from tests.data.fake_split import FakeSplit, fake_table, log_normal_lengths, random_split

TABLE = fake_table()


def config_of(examples_per_update: int = 16, window_updates: int = 50, groups: int = 4) -> Config:
    """The default corruption with these batches."""
    return Config(
        data=DataConfig(max_source_tokens=512, max_target_tokens=256),
        corruption=CorruptionConfig(),
        batch=BatchConfig(examples_per_update=examples_per_update, window_updates=window_updates, groups_per_update=groups),
    )


def longest_of(split: FakeSplit) -> tuple[int, int]:
    """Upper bounds of the lengths of any example: as text 3 % longer, a fifth masked in 27 spans, and the end marks."""
    most = int(np.diff(split.offsets).max())
    return min(512, math.ceil(1.03 * most) + 1), min(256, math.ceil(0.2 * most) + 27 + 2)


def packed_batches(
    split: FakeSplit, config: Config | None = None, *, micro_tokens: int = 4096, parts: int = 1, pad_multiple: int = 8
) -> Batches:
    """Batches with packed rows."""
    rows = Packing(longest_of(split), parts)
    sizes = {"micro_tokens": micro_tokens, "pad_multiple": pad_multiple}
    return Batches(split, TABLE, config or config_of(), seed=3, packing=rows, **sizes)


def short_texts(examples: int = 4000) -> FakeSplit:
    """About 60 source and 18 target tokens, log-normal."""
    return random_split(log_normal_lengths(examples, 60.0, 0.6, 400, seed=1), 2)


def examples_of(update: list[MicroBatch]) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Every example of an update with its source and labels, found by its segments, sorted."""
    found = []
    for m in update:
        ids = iter(m.example_ids.tolist())
        of_labels = (m.labels_BT != IGNORED).int() if m.target_segments_BT is None else m.target_segments_BT
        for source, source_segments, labels, label_segments in zip(
            m.source_BS, m.source_mask_BS, m.labels_BT, of_labels, strict=True
        ):
            for number in range(1, int(source_segments.max()) + 1):
                text, answer = source[source_segments == number], labels[label_segments == number]
                found.append((next(ids), tuple(text.tolist()), tuple(answer.tolist())))
        assert next(ids, None) is None
    return sorted(found)


def share(updates: list[list[MicroBatch]]) -> float:
    """Useful tokens of all padded ones."""
    flat = [m for update in updates for m in update]
    return sum(m.useful_tokens for m in flat) / sum(m.padded_tokens for m in flat)


def same(ours: list[MicroBatch], others: list[MicroBatch]) -> bool:
    """Whether two updates have the same packed micro-batches, bit for bit and in order."""
    names = ("source_BS", "source_mask_BS", "labels_BT", "target_segments_BT")
    return len(ours) == len(others) and all(
        all(torch.equal(getattr(a, name), getattr(b, name)) for name in names) and np.array_equal(a.example_ids, b.example_ids)
        for a, b in zip(ours, others, strict=True)
    )


@pytest.mark.parametrize(("window_updates", "parts", "micro_tokens"), [(50, 1, 4096), (1, 1, 4096), (5, 3, 4096), (5, 1, 700)])
def test_an_update_has_the_same_examples_packed_or_not(window_updates, parts, micro_tokens):
    """With the same sources and labels, token for token, however it is packed."""
    split, config = short_texts(500), config_of(window_updates=window_updates)
    plain = Batches(split, TABLE, config, seed=3, micro_tokens=4096, pad_multiple=1)
    rows = packed_batches(split, config, micro_tokens=micro_tokens, parts=parts)
    for update in (0, 1, 30, 77):
        assert examples_of(rows.at(update)) == examples_of(plain.at(update))
        assert len(rows.at(update)) >= parts


def test_a_row_holds_its_examples_one_after_another_and_then_padding():
    """Segments count 1, 2, ... in source and labels alike, and padding is the padding id, -100 and segment 0."""
    packed = packed_batches(short_texts(500))
    for m in itertools.chain.from_iterable(packed.at(update) for update in range(20)):
        tensors = (m.source_BS, m.source_mask_BS, m.labels_BT, m.target_segments_BT)
        assert {tensor.dtype for tensor in tensors} == {torch.int32}
        assert m.shape == (*m.source_BS.shape, m.labels_BT.shape[1]) and m.labels_BT.shape == m.target_segments_BT.shape
        assert (m.source_BS[m.source_mask_BS == 0] == TABLE.pad_id).all()
        assert ((m.labels_BT == IGNORED) == (m.target_segments_BT == 0)).all()
        for row in range(m.shape[0]):
            most = int(m.source_mask_BS[row].max())
            for segments in (m.source_mask_BS[row].tolist(), m.target_segments_BT[row].tolist()):
                written = [segment for segment in segments if segment > 0]
                assert segments == written + [0] * (len(segments) - len(written))
                assert written == sorted(written) and set(written) == set(range(1, most + 1))
        # The end mark closes every example, and nothing else is one.
        assert (m.source_BS == TABLE.eos_id).sum() == (m.labels_BT == TABLE.eos_id).sum() == len(m.example_ids)
        assert m.target_tokens == int((m.labels_BT != IGNORED).sum())
        assert m.useful_tokens == int((m.source_mask_BS > 0).sum()) + m.target_tokens
        assert m.padded_tokens == m.source_BS.numel() + m.labels_BT.numel()


def test_the_lengths_of_a_micro_batch_are_those_of_its_examples():
    """Packed or not, in the order of its example ids."""
    split = short_texts(300)
    for batches in (packed_batches(split), Batches(split, TABLE, config_of(), seed=3, micro_tokens=400, pad_multiple=8)):
        for m in batches.at(4):
            sources, targets = m.lengths()
            found = sorted(zip(m.example_ids.tolist(), sources, targets, strict=True))
            assert found == [(example, len(source), len(target)) for example, source, target in examples_of([m])]


@pytest.mark.parametrize("micro_tokens", [1, 700, 4096])
@pytest.mark.parametrize("window_updates", [1, 50])
def test_an_epoch_has_only_the_chosen_shapes_and_keeps_the_budget(window_updates, micro_tokens):
    """At most eight, multiples of eight, the largest micro-batch of an update first; one example may pass the budget."""
    split = short_texts(2000)
    batches = packed_batches(split, config_of(window_updates=window_updates), micro_tokens=micro_tokens)
    shapes = batches.shapes
    assert 1 <= len(set(shapes)) == len(shapes) <= 8 and len({rows for rows, *_ in shapes}) == 1
    budget = max(micro_tokens, sum(-(-length // 8) * 8 for length in longest_of(split)))
    assert all(rows * (source + target) <= budget for rows, source, target in shapes)
    assert all(source % 8 == target % 8 == 0 for _, source, target in shapes)
    for update in range(125):
        sizes = [m.padded_tokens for m in batches.at(update)]
        assert {m.shape for m in batches.at(update)} <= set(shapes)
        assert sizes == sorted(sizes, reverse=True)


def few_long_ones(examples: int) -> np.ndarray:
    """Nineteen texts of about 20 tokens to one of about 400."""
    generator = np.random.default_rng(4)
    return np.where(
        generator.random(examples) < 0.05, generator.integers(380, 420, examples), generator.integers(10, 30, examples)
    )


REALISTIC = {
    "log-normal": lambda examples: log_normal_lengths(examples, 60.0, 0.6, 400, seed=1),
    "uniform": lambda examples: np.random.default_rng(2).integers(5, 120, examples),
    "all equal": lambda examples: np.full(examples, 60),
    "few long ones": few_long_ones,
}


@pytest.mark.parametrize("examples_per_update", [16, 64])
@pytest.mark.parametrize("name", REALISTIC)
def test_packed_rows_have_95_percent_useful_tokens_in_one_micro_batch(name, examples_per_update):
    """Over an epoch and more, of which the shapes were chosen from a part; a hundredth of the updates may need two."""
    split = random_split(REALISTIC[name](6400), 2, term_gap=200)
    batches = packed_batches(split, config_of(examples_per_update), micro_tokens=16_384)
    updates = [batches.at(update) for update in range(50, 50 + 9600 // examples_per_update)]
    assert share(updates) >= 0.95
    assert sum(map(len, updates)) <= 1.01 * len(updates)


@pytest.mark.parametrize(("micro_tokens", "rows"), [(16_384, 16), (4096, 4)])
def test_texts_that_fill_their_rows_are_not_packed_but_bucketed(micro_tokens, rows):
    """One example a row, as many rows as the update has or as divide it within the budget."""
    split = random_split(np.full(1600, 500), 2)
    batches = packed_batches(split, micro_tokens=micro_tokens)
    assert {rows for rows, *_ in batches.shapes} == {rows}
    updates = [batches.at(update) for update in range(100)]
    assert all(len(update) == 16 // rows and m.source_mask_BS.max() == 1 for update in updates for m in update)
    assert share(updates) >= 0.95


def test_half_the_budget_gives_new_shapes_and_the_same_examples():
    """As after an update that ran out of memory: its largest micro-batch is split."""
    batches = packed_batches(short_texts(1000))
    before, shapes = batches.at(7), batches.shapes
    batches.micro_tokens = max(m.padded_tokens for m in before) // 2
    after = batches.at(7)
    assert examples_of(after) == examples_of(before) and len(after) > len(before)
    assert all(m.padded_tokens <= batches.micro_tokens and m.shape in batches.shapes for m in after)
    assert not set(batches.shapes) & {m.shape for m in before}
    batches.micro_tokens = 4096
    assert batches.shapes == shapes and same(batches.at(7), before)


def test_packed_updates_are_a_pure_function_of_their_number():
    """Any order of asking, a new object and any number of reader threads give the same bits."""
    split = short_texts(600)
    config = config_of(window_updates=5)
    first, again = packed_batches(split, config), packed_batches(split, config)
    straight = [first.at(update) for update in range(12, 30)]
    assert all(same(again.at(update), straight[update - 12]) for update in (29, 12, 17, 13, 28))
    for readers in (0, 1, 4):
        with closing(Prefetcher(packed_batches(split, config), 12, readers)) as reader:
            assert all(same(reader.take(), update) for update in straight)


def test_every_process_gets_a_micro_batch():
    """As many micro-batches as processes, and not fewer examples than that in an update."""
    split = short_texts(600)
    for parts in (2, 4):
        batches = packed_batches(split, config_of(window_updates=5), parts=parts)
        updates = [batches.at(update) for update in range(20)]
        assert all(len(update) >= parts and all(len(m.example_ids) for m in update) for update in updates)
    assert [len(m.example_ids) for m in packed_batches(split, config_of(2), parts=4).at(0)] == [1, 1]


def test_the_longest_examples_are_packed_like_an_update():
    """A rehearsal measures with the shapes of the run."""
    batches = packed_batches(short_texts(600))
    longest = batches.longest()
    assert {m.shape for m in longest} <= set(batches.shapes)
    assert sum(len(m.example_ids) for m in longest) == 16


def test_an_unpacked_run_has_no_fixed_shapes():
    """Its micro-batches are as before: one example a row."""
    batches = Batches(short_texts(300), TABLE, config_of(), seed=3, micro_tokens=400, pad_multiple=8)
    assert batches.shapes == []
    assert all(m.target_segments_BT is None and len(m.example_ids) == m.shape[0] for m in batches.at(0))


@pytest.mark.parametrize("examples_per_update", [1, 5, 40])
def test_more_examples_an_update_than_the_corpus_has(examples_per_update):
    """A tiny corpus, also of one example alone: its examples come again and again, and nothing is lost."""
    for examples in (1, 3):
        split = random_split(np.array([9, 300, 40][:examples]), 2)
        config = config_of(examples_per_update)
        plain = Batches(split, TABLE, config, seed=3, micro_tokens=1000, pad_multiple=1)
        rows = packed_batches(split, config, micro_tokens=1000)
        for update in range(6):
            assert examples_of(rows.at(update)) == examples_of(plain.at(update))
            assert {m.shape for m in rows.at(update)} <= set(rows.shapes)


LENGTHS = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 30)), min_size=1, max_size=24)


@settings(max_examples=60, deadline=None)
@given(
    sample=st.lists(LENGTHS, min_size=1, max_size=12),
    others=st.lists(LENGTHS, min_size=1, max_size=4),
    outlier=st.tuples(st.integers(60, 300), st.integers(30, 90)),
    micro_tokens=st.integers(1, 1500),
    parts=st.integers(1, 5),
)
def test_any_update_fits_into_the_shapes_of_any_other(sample, others, outlier, micro_tokens, parts):
    """Also updates unlike those that the shapes were chosen from, with an example longer than all others: every example is
    in one row, no row is overfull, no micro-batch is empty or of another shape."""
    updates = [tuple(np.array(update).T) for update in sample]
    shapes = choose_shapes(updates, micro_tokens=micro_tokens, longest=outlier, parts=parts)
    assert len(shapes.lengths) <= 8
    budget = max(micro_tokens, sum(-(-length // 8) * 8 for length in outlier))
    assert all(shapes.rows * sum(pair) <= budget for pair in shapes.lengths)
    for update in [*updates, *(tuple(np.array([*update, outlier]).T) for update in others)]:
        micro_batches = pack(update, shapes, parts)
        assert sorted(np.concatenate([m.examples for m in micro_batches]).tolist()) == list(range(len(update[0])))
        assert min(parts, len(update[0])) <= len(micro_batches) <= len(update[0])
        for m in micro_batches:
            assert m.shape in shapes.triples() and len(m.examples) > 0
            assert np.all(np.diff(m.row) >= 0) and 0 <= m.row[0] <= m.row[-1] < shapes.rows
            for of_side, limit in zip(update, m.shape[1:], strict=True):
                assert np.bincount(m.row, of_side[m.examples]).max() <= limit


def test_an_example_longer_than_every_shape_is_refused():
    """By a data error, not by an endless search."""
    with pytest.raises(DataError, match="fits into no packed row"):
        pack((np.array([5, 200]), np.array([3, 3])), RowShapes(2, ((64, 32),)))


NEEDS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(needs=NEEDS, most=st.integers(18, 24), limit=st.integers(1, 3))
def test_no_cut_into_runs_costs_less(needs, most, limit):
    """Against every way to cut the needs, sorted by source, into runs, and to leave out some between them at twice their
    tokens."""
    wanted = np.array(needs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "MAX_SHAPES", limit)
        pairs = np.array(cover(wanted, most))
    assert len(pairs) <= limit and (pairs.sum(1) <= most).all()
    assert (wanted[-1] <= pairs).all(1).any()

    sums = np.where((wanted[:, None] <= pairs).all(2), pairs.sum(1), 10**6).min(1)
    found = int(np.minimum(sums, 2 * wanted.sum(1)).sum())

    ordered, counts = np.unique(wanted, axis=0, return_counts=True)

    def cost_of(run: list[int]) -> float:
        union = int(ordered[run].max(0).sum())
        is_run = run[-1] - run[0] == len(run) - 1
        return int(counts[run].sum()) * union if is_run and union <= most else math.inf

    costs = []
    for kind in itertools.product((False, True), repeat=len(ordered)):
        kept = [number for number, is_kept in enumerate(kind) if is_kept]
        left_out = 2 * int((counts * ordered.sum(1))[~np.array(kind)].sum())
        if (ordered[kept] == wanted[-1]).all(1).any():
            for cuts in (cuts for count in range(limit) for cuts in itertools.combinations(range(1, len(kept)), count)):
                ends = [0, *cuts, len(kept)]
                costs.append(left_out + sum(cost_of(kept[a:b]) for a, b in itertools.pairwise(ends)))
    assert found <= min(costs)


def test_a_rare_need_beyond_the_limit_stays_without_a_pair():
    """A pair that covers both would pass the limit, and one pair is allowed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "MAX_SHAPES", 1)
        assert cover(np.array([[8, 64], *[[64, 8]] * 9]), 80) == ((64, 8),)


def test_readers_prepare_thousands_of_packed_examples_a_second():
    """On one thread, corruption included; at least 2000, also on a busy machine."""
    batches = packed_batches(short_texts(4000))
    batches.at(0)
    begin_s = time.thread_time()
    examples = sum(len(m.example_ids) for update in range(50, 250) for m in batches.at(update))
    assert examples / (time.thread_time() - begin_s) > 2000


@pytest.mark.parametrize("is_packed", [False, True])
def test_an_id_outside_the_vocabulary_is_found_without_reading_a_tensor(is_packed):
    """The range of ids is that of the tensors, -100 left out; an update needs a target token."""
    split = short_texts(200)
    batches = (
        packed_batches(split) if is_packed else Batches(split, TABLE, config_of(), seed=3, micro_tokens=400, pad_multiple=8)
    )
    update = batches.at(0)
    for m in update:
        ids = torch.cat((m.source_BS.flatten(), m.labels_BT[m.labels_BT != IGNORED].flatten()))
        assert m.id_range == (int(ids.min()), int(ids.max()))
    highest = max(m.id_range[1] for m in update)
    assert failure_of(update, highest + 1) == ""
    assert failure_of(update, highest) == "token id outside the vocabulary"
    assert failure_of([dataclasses.replace(update[0], id_range=(-1, 5))], TABLE.size) == "token id outside the vocabulary"
    assert failure_of([dataclasses.replace(m, target_tokens=0) for m in update], TABLE.size) == "no target token"
