"""Rates and their intervals over documents.

Run: python -m pytest tests/restoration/scoring/test_rates.py
"""

import math

import numpy as np
import pytest

from resilient_t5.restoration.scoring import metrics
from resilient_t5.restoration.scoring.metrics import RESAMPLES, document_weights, macro_rate, rate_over_documents


def clustered(documents: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Trials whose success depends on their document, documents of unequal size."""
    draws = np.random.Generator(np.random.Philox(key=seed))
    sizes = draws.integers(1, 30, documents)
    chance = np.repeat(draws.beta(2, 2, documents), sizes)
    return draws.random(len(chance)) < chance, np.repeat(np.arange(documents) * 7 + 3, sizes)


def reference_interval(success, documents, statistic) -> tuple[float, float]:
    """The cluster bootstrap as a loop, over the same draws of whole documents."""
    names = np.unique(documents)
    values = []
    for weights in np.concatenate(list(document_weights(len(names), len(names)))):
        drawn = np.concatenate([np.flatnonzero(documents == name) for name in np.repeat(names, weights)])
        values.append(statistic(drawn))
    return tuple(np.percentile(values, [2.5, 97.5]))


def test_interval_equals_that_of_a_plain_loop_over_resampled_documents():
    """The vectorised interval is the percentile interval of means over resampled documents."""
    success, documents = clustered(12, 1)
    rate = rate_over_documents(success, documents)
    low, high = reference_interval(success, documents, lambda drawn: success[drawn].mean())
    assert (rate.rate, rate.n) == (success.mean(), len(success))
    assert rate.low == pytest.approx(low, abs=1e-12) and rate.high == pytest.approx(high, abs=1e-12)


def test_macro_interval_equals_that_of_a_plain_loop(monkeypatch):
    """Mean over terms, of the whole and of each resample; a term that was not drawn is left out; blocks change nothing."""
    success, documents = clustered(9, 2)
    terms = np.random.Generator(np.random.Philox(key=5)).integers(0, 11, len(success)) * 5

    def mean_over_terms(drawn: np.ndarray) -> float:
        return float(np.mean([success[drawn][terms[drawn] == term].mean() for term in np.unique(terms[drawn])]))

    rate = macro_rate(success, documents, terms)
    low, high = reference_interval(success, documents, mean_over_terms)
    assert rate.rate == pytest.approx(mean_over_terms(np.arange(len(success)))) and rate.n == len(np.unique(terms))
    assert rate.low == pytest.approx(low, abs=1e-12) and rate.high == pytest.approx(high, abs=1e-12)
    monkeypatch.setattr(metrics, "BLOCK_NUMBERS", 7 * len(success))
    blocked = macro_rate(success, documents, terms)
    assert (blocked.low, blocked.high) == (rate.low, rate.high)


def test_resamples_draw_as_many_documents_as_there_are_and_favour_none():
    """Each of the 1000 resamples holds D documents; over all of them every document is drawn about equally often."""
    weights = np.concatenate(list(document_weights(40, 40)))
    assert weights.shape == (RESAMPLES, 40) and (weights.sum(1) == 40).all()
    assert np.abs(weights.mean(0) - 1.0).max() < 5 / math.sqrt(RESAMPLES)


def test_the_interval_has_about_its_nominal_coverage():
    """Of 200 samples of 40 clustered documents, the 95 % interval holds the true rate in 88 to 99 %."""
    covered = 0
    for seed in range(200):
        success, documents = clustered(40, 1000 + seed)
        rate = rate_over_documents(success, documents)
        covered += rate.low <= 0.5 <= rate.high
    assert 0.88 <= covered / 200 <= 0.99


def test_trials_of_one_document_are_not_taken_for_independent():
    """The same outcomes in few documents give a wider interval than each in its own; one document gives [0, 1]."""
    success = np.tile(np.array([True] * 10 + [False] * 10), 10)
    few, many = rate_over_documents(success, np.arange(200) // 10), rate_over_documents(success, np.arange(200))
    assert few.high - few.low > 2 * (many.high - many.low)
    one = rate_over_documents(success, np.zeros(200))
    assert (one.rate, one.low, one.high) == (0.5, 0.0, 1.0)


def test_nothing_to_count_is_not_a_rate_of_zero():
    """Without trials the rate is nan and n is 0."""
    nothing = rate_over_documents(np.zeros(0, bool), np.zeros(0, int))
    assert math.isnan(nothing.rate) and nothing.n == 0


def test_intervals_do_not_depend_on_global_random_state_or_touch_it():
    """Equal outcomes, equal interval; numpy's global stream does not advance."""
    success, documents = clustered(15, 4)
    np.random.seed(1)
    state = np.random.get_state()[1].copy()
    first = rate_over_documents(success, documents)
    assert np.array_equal(np.random.get_state()[1], state)
    np.random.seed(2)
    assert rate_over_documents(success, documents) == first
