"""Keyed randomness and the keyed order. Run: python -m pytest tests/data/test_counter_rng.py"""

import itertools
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient_t5.data.counter_rng import Stream, below, bits, keys, order, shuffle, uniform


def chi_square(counts: np.ndarray) -> float:
    """Pearson's statistic against the even distribution."""
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())


def highest_plausible(cells: int) -> float:
    """Mean plus six standard deviations of chi-square with `cells` - 1 degrees of freedom."""
    return cells - 1 + 6.0 * np.sqrt(2.0 * (cells - 1)) + 6.0


def test_draws_are_the_published_outputs_of_splitmix64():
    """Output number c of SplitMix64 started at key 0 is what its reference implementation prints."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert bits(np.zeros(4, np.uint64), np.arange(4)).tolist() == published


def test_draws_of_neighbouring_keys_and_counters_are_even_and_independent():
    """Over keys of consecutive examples and consecutive counters, pairs of draws fill the unit square evenly."""
    key = keys(42, Stream.SPAN_RANK, 3, np.arange(400))
    draws = np.stack([uniform(key, counter) for counter in range(50)])
    assert draws.min() >= 0.0 and draws.max() < 1.0
    for first, second in ((draws[:-1], draws[1:]), (draws[:, :-1], draws[:, 1:])):
        cells = np.histogram2d(first.ravel(), second.ravel(), bins=10, range=[[0, 1], [0, 1]])[0]
        assert chi_square(cells) < highest_plausible(cells.size)


def test_bounded_draws_stay_below_their_limit_and_are_even():
    """`below` gives every value from 0 to limit - 1 equally often."""
    draws = below(keys(1, Stream.NOISE_KIND, np.arange(6000)), 0, 6)
    assert draws.min() == 0 and draws.max() == 5
    assert chi_square(np.bincount(draws)) < highest_plausible(6)


def test_streams_seeds_epochs_and_examples_never_share_a_key():
    """Keys of all small combinations differ, seeds of 63 bits among them."""
    seeds = (0, 1, 2, 2**32, 2**63 - 1)
    made = [keys(seed, stream, epoch, np.arange(50)) for seed in seeds for stream in Stream for epoch in range(5)]
    assert len(np.unique(np.concatenate(made))) == 50 * len(made)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**40))
def test_an_epoch_visits_every_example_exactly_once(count, seed, epoch):
    """`order` is a permutation for every number of examples."""
    visited = order(seed, epoch, np.arange(count), count)
    assert sorted(visited.tolist()) == list(range(count))


def test_every_small_permutation_is_equally_likely():
    """Over many epochs the orders of 3 and of 4 examples are uniform over all permutations."""
    epochs = 6000
    for count in (3, 4):
        orders = np.stack([order(5, np.arange(epochs), np.full(epochs, p), count) for p in range(count)], axis=1)
        numbers = {permutation: n for n, permutation in enumerate(itertools.permutations(range(count)))}
        seen = np.bincount([numbers[tuple(one)] for one in orders.tolist()], minlength=len(numbers))
        assert chi_square(seen) < highest_plausible(len(numbers))


@pytest.mark.parametrize("count", [7, 100, 1025])
def test_a_position_of_an_epoch_holds_any_example_equally_often(count):
    """Over epochs, the examples at the first, a middle and the last position are uniform, and neighbours are unrelated."""
    epochs = 4000
    middle = count // 2
    at = {p: order(9, np.arange(epochs), np.full(epochs, p), count) for p in (0, middle, middle + 1, count - 1)}
    for examples in at.values():
        cells = np.histogram(examples, bins=min(count, 25), range=(0, count))[0]
        assert chi_square(cells) < 2 * highest_plausible(cells.size)
    assert abs(np.corrcoef(at[middle], at[middle + 1])[0, 1]) < 1.0 / (count - 1) + 0.08


def test_epochs_and_seeds_have_orders_of_their_own():
    """Two epochs, and two seeds, agree at hardly any position."""
    first, positions = order(1, 0, np.arange(5000), 5000), np.arange(5000)
    for other in (order(1, 1, positions, 5000), order(2, 0, positions, 5000), positions):
        assert np.mean(first == other) < 0.005


def test_any_position_of_a_huge_epoch_costs_nothing():
    """Sixteen positions anywhere in 10 million or a million million examples take milliseconds and no table."""
    for count in (10_000_000, 10**12, 2**62):
        tracemalloc.start()
        begin_s = time.perf_counter()
        visited = order(3, 7, np.arange(count - 16, count), count)
        wall_s, peak_bytes = time.perf_counter() - begin_s, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(set(visited.tolist())) == 16 and visited.min() >= 0 and visited.max() < count
        assert wall_s < 0.5 and peak_bytes < 1_000_000


def test_positions_may_be_asked_for_in_any_company():
    """The example at a position depends on nothing else that is asked for, epochs mixed included."""
    positions, epochs = np.array([5, 900, 5, 17]), np.array([0, 3, 1, 2])
    alone = [int(order(4, int(e), np.array([p]), 1000)[0]) for p, e in zip(positions, epochs, strict=True)]
    assert order(4, epochs, positions, 1000).tolist() == alone


def test_a_shuffle_is_a_permutation_of_its_own_number():
    """`shuffle` permutes, and another number permutes otherwise."""
    assert sorted(shuffle(1, Stream.DEAL, 0, 100).tolist()) == list(range(100))
    assert shuffle(1, Stream.DEAL, 0, 100).tolist() != shuffle(1, Stream.DEAL, 1, 100).tolist()


def test_draws_never_change_between_versions():
    """A run that is resumed under another version must find its order and masks: these numbers are on file."""
    assert keys(42, Stream.ORDER, 3, 11).tolist() == [1641395787418807980]
    assert order(42, 1, np.arange(8), 1000).tolist() == [314, 534, 857, 471, 681, 551, 560, 663]
