"""The resilience curve. Run: python -m pytest tests/restoration/scoring/test_resilience.py"""

import math

import numpy as np
import pytest

from resilient_t5.config.schema import CorruptionConfig, DataConfig
from resilient_t5.data.corruption.corruption import corrupt
from resilient_t5.restoration.scoring.metrics import Rate
from resilient_t5.restoration.scoring.resilience import LEVELS, Curve, Point, ratios, table_lines
from tests.restoration.scoring.test_measure import make_split, make_table


def curve(*levels_and_rates):
    """A curve through these points; None is a level without masks."""
    nothing = Rate(math.nan, math.nan, math.nan, 0)
    points = [
        Point(level, nothing if rate is None else Rate(rate, rate - 0.1, rate + 0.1, 50), nothing, 0.1, 0.5)
        for level, rate in levels_and_rates
    ]
    return Curve("masks", tuple(points))


def test_the_area_is_the_mean_height_over_the_levels_that_were_measured():
    """A flat curve has its height as area; a straight line its middle; levels need not be evenly spaced."""
    assert curve((0.0, None), (0.1, 0.6), (0.5, 0.6)).area == pytest.approx(0.6)
    assert curve((0.0, 1.0), (0.1, 0.8), (0.5, 0.0)).area == pytest.approx(0.5)
    assert math.isnan(curve((0.0, None), (0.1, 0.6)).area)


def test_each_kind_of_damage_sets_its_own_ratios():
    """Masks alone, noise under the run's own masks, both."""
    assert ratios("masks", 0.3, 0.2) == (0.3, 0.0)
    assert ratios("noise", 0.3, 0.2) == (0.2, 0.3)
    assert ratios("both", 0.3, 0.2) == (0.3, 0.3)


def test_a_term_that_is_masked_at_one_level_is_masked_at_every_higher_one():
    """The levels damage the same places from the same key: the curve is paired."""
    split, table, ids = make_split(60), make_table(), np.arange(60)
    data = DataConfig(max_source_tokens=64, max_target_tokens=64)
    former: set[tuple[int, ...]] = set()
    sizes = []
    for level in LEVELS[1:]:
        settings = CorruptionConfig(mask_ratio=level, term_probability=0.9, noise_ratio=0.0)
        corrupted = corrupt(split, ids, np.zeros_like(ids), seed=3, settings=settings, data=data, table=table)
        masked = {tuple(row) for row in corrupted.masked_terms[:, [0, 1, 3, 4]].tolist()}
        assert former <= masked
        former = masked
        sizes.append(len(masked))
    assert sizes[-1] > 1.5 * sizes[0]


def test_numbers_are_json_and_the_table_has_a_line_for_each_level():
    """What was not measured is null there and a dash here."""
    shown = curve((0.0, None), (0.1, 0.6), (0.5, 0.2))
    json_points = shown.to_json()["points"]
    assert [point["n"] for point in json_points] == [0, 50, 50]
    assert json_points[0]["term_rate"] is None
    lines = table_lines([shown])
    assert len(lines) == 5
    assert lines[1].split() == ["0%", "-"]
    assert "0.600 [0.500, 0.700]" in lines[2]
