"""Positive PMI of neighbours. Run: python -m pytest tests/data/test_cooccurrence.py"""

import math

import numpy as np
import pytest

from resilient_t5.data import cooccurrence
from resilient_t5.data.cooccurrence import REACH, SMOOTHING, count_neighbours
from tests.data.fake_split import split_of


def dense(found):
    """The matrix as {(id, id): value}."""
    matrix = {}
    for row, number in enumerate(found.ids):
        for k in range(found.row_ends[row], found.row_ends[row + 1]):
            matrix[int(number), int(found.ids[found.columns[k]])] = float(found.values[k])
    return matrix


def by_definition(chunks):
    """The same by two loops over every pair of tokens."""
    counts = {}
    for chunk in chunks:
        for here, one in enumerate(chunk):
            for there, other in enumerate(chunk):
                if 0 < abs(here - there) <= REACH:
                    counts[one, other] = counts.get((one, other), 0.0) + 1 / abs(here - there)
    total = {}
    for (one, _), count in counts.items():
        total[one] = total.get(one, 0.0) + count
    smoothed = sum(value**SMOOTHING for value in total.values())

    def pmi(one, other):
        return math.log(counts[one, other] / total[one] / (total[other] ** SMOOTHING / smoothed))

    both_ways = {pair: (pmi(*pair) + pmi(*pair[::-1])) / 2 for pair in counts}
    return {pair: value for pair, value in both_ways.items() if value > 0}


@pytest.fixture
def chunks():
    """Sixty chunks over 40 ids of falling frequency."""
    random = np.random.default_rng(5)
    return [(2 + np.minimum(random.geometric(0.08, random.integers(1, 25)), 39)).tolist() for _ in range(60)]


@pytest.mark.parametrize("block", [1, 100, 4_000_000])
def test_the_matrix_is_that_of_the_definition_however_it_is_cut_into_blocks(chunks, block, monkeypatch):
    """Also: symmetric, and no pair reaches from one example into the next."""
    monkeypatch.setattr(cooccurrence, "BLOCK_COUNTS", block)
    found = dense(count_neighbours(split_of(chunks), rows=50, most_ids=50))
    expected = by_definition(chunks)
    assert found.keys() == expected.keys()
    assert all(math.isclose(found[pair], expected[pair], rel_tol=1e-5) for pair in expected)
    assert all(math.isclose(found[pair], found[pair[::-1]], rel_tol=1e-5) for pair in found)


def test_the_most_frequent_ids_are_counted(chunks):
    """In the order of their frequency, and no id that never occurs."""
    frequency = np.bincount(np.concatenate(chunks), minlength=50)
    found = count_neighbours(split_of(chunks), rows=50, most_ids=10)
    assert found.ids.tolist() == np.argsort(-frequency, kind="stable")[:10].tolist()
    assert len(count_neighbours(split_of(chunks), rows=50, most_ids=50).ids) == (frequency > 0).sum()


def test_no_more_is_read_than_has_to_be(chunks, monkeypatch):
    """A corpus of any size costs what its first examples cost."""
    monkeypatch.setattr(cooccurrence, "MAX_TOKENS", 100)
    whole = np.cumsum([len(chunk) for chunk in chunks])
    kept = chunks[: int((whole <= 100).sum())]
    assert dense(count_neighbours(split_of(chunks), 50, 50)) == dense(count_neighbours(split_of(kept), 50, 50))


@pytest.mark.parametrize("chunks", [[[7]], [[7], [8]], [[7, 7, 7]]])
def test_a_corpus_without_neighbours_gives_an_empty_matrix(chunks):
    """One token in an example, or one id in all of them."""
    found = count_neighbours(split_of(chunks), rows=9, most_ids=9)
    assert len(found.values) == len(found.columns) == found.row_ends[-1]
    assert len(found.row_ends) == len(found.ids) + 1
    assert np.isfinite(found.values).all()
