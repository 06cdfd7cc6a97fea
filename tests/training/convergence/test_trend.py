"""The statistics against references, and the directions they give.

pytest tests/training/convergence/test_trend.py
"""

import random
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient_t5.training.convergence.trend import (
    CUSUM_ALARM,
    Direction,
    cusum_after,
    judge_trend,
    noise_sigma,
    theil_sen,
)

VALUES = st.lists(st.floats(-100, 100), min_size=4, max_size=30)


@settings(max_examples=60, deadline=None)
@given(VALUES)
def test_the_slope_equals_its_reference(values):
    """Theil-Sen is the median of all pairwise slopes."""
    index = np.arange(len(values))
    upper = np.triu_indices(len(values), 1)
    pairs = (np.subtract.outer(values, values) / np.subtract.outer(index, index).clip(max=-1))[upper]
    assert theil_sen(values) == pytest.approx(np.median(pairs), abs=1e-9)


def test_the_noise_is_found_under_a_steep_descent():
    """Normal noise of 0.01 on a fall of 0.1 per window: the plain deviation is thirty times too large, this one is not."""
    found = []
    for seed in range(200):
        draw = random.Random(seed)
        losses = [5 - 0.1 * number + draw.gauss(0, 0.01) for number in range(24)]
        found.append(noise_sigma(losses))
        assert statistics.stdev(losses) > 0.5
    assert statistics.fmean(found) == pytest.approx(0.01, rel=0.15)


def test_a_wild_window_moves_neither_slope_nor_noise_far():
    """One evaluation in sixteen may be anything."""
    draw = random.Random(3)
    losses = [3 - 0.01 * number + draw.gauss(0, 0.002) for number in range(16)]
    wild = [*losses[:7], 50.0, *losses[8:]]
    assert theil_sen(wild) == pytest.approx(theil_sen(losses), abs=0.002)
    assert noise_sigma(wild) < 3 * noise_sigma(losses)


@pytest.mark.parametrize(
    ("fall", "direction"),
    [(0.05, Direction.DECLINE), (-0.05, Direction.RISE), (0.0, Direction.FLAT)],
)
def test_clear_courses_get_their_direction(fall, direction):
    """Quiet evaluations, twelve windows."""
    draw = random.Random(5)
    losses = [3 - fall * number + draw.gauss(0, 0.0005) for number in range(12)]
    trend = judge_trend(losses, 11, noise_sigma(losses))
    assert trend is not None
    assert trend.direction is direction
    assert trend.gain_low <= trend.gain <= trend.gain_high
    assert trend.gain == pytest.approx(5 * fall, abs=0.01)


def test_noise_gives_no_false_certainty():
    """A loss whose noise hides any worthwhile gain is UNSURE on a short plateau, and FLAT in time once the plateau is long."""
    draw = random.Random(6)
    losses = [3 + draw.gauss(0, 0.01) for _ in range(16)]
    short, long = (judge_trend(losses, plateau, 0.01) for plateau in (0, 15))
    assert short is not None
    assert long is not None
    assert short.direction is Direction.UNSURE
    assert long.gain_high - long.gain_low < (short.gain_high - short.gain_low) / 4


def test_the_interval_holds_the_true_gain_as_often_as_it_says():
    """80 % of 2000 noisy descents, within three standard errors of that share."""
    inside = 0
    for seed in range(2000):
        draw = random.Random(seed)
        trend = judge_trend([3 - 0.004 * number + draw.gauss(0, 0.01) for number in range(12)], 11, 0.01)
        assert trend is not None
        inside += trend.gain_low <= 0.02 <= trend.gain_high
    assert 0.773 < inside / 2000 < 0.86


def test_too_few_windows_have_no_trend():
    """Four are the least."""
    assert noise_sigma([3.0, 2.0, 1.0]) is None
    assert judge_trend([3.0, 2.0, 1.0], 0, 0.1) is None
    assert judge_trend([3.0, 2.0, 1.0, 0.5], 0, 0.01) is not None


def test_the_cusum_finds_a_shift_within_windows_and_sleeps_on_noise():
    """A fall of three sigma is found by the third window; on pure noise an alarm is rare."""
    segment = [2.0] * 10
    total, needed = 0.0, 0
    while total <= CUSUM_ALARM:
        total, needed = cusum_after(total, 1.97, segment, 0.01), needed + 1
    assert needed == 2
    alarms = 0
    for seed in range(300):
        draw, total = random.Random(seed), 0.0
        for _ in range(20):
            total = cusum_after(total, 2 + draw.gauss(0, 0.01), segment, 0.01)
            alarms += total > CUSUM_ALARM
            total = 0.0 if total > CUSUM_ALARM else total
    assert alarms < 60


def test_the_cusum_of_a_noiseless_loss_is_defined():
    """Any fall is far, none is none, a rise empties the sum."""
    assert cusum_after(0.0, 2.0, [2.0], 0.0) == 0.0
    assert cusum_after(0.0, 1.9, [2.0], 0.0) == 2.5
    assert cusum_after(2.5, 2.1, [2.0], 0.0) == 0.0
