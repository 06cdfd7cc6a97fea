"""The plan in updates and the learning rate. Run: python -m pytest tests/training/test_schedule.py"""

import math

import pytest

from resilient_t5.config.schema import EvaluationConfig, OptimConfig, ScheduleConfig
from resilient_t5.config.sections import seconds, updates_at
from resilient_t5.errors import ConfigError
from resilient_t5.training.schedule import lr_at, make_plan

OPTIM = OptimConfig(lr=1.0)


def rates(total=100, **settings):
    """The learning rate of every update of a run, peak 1."""
    schedule = ScheduleConfig(max_updates=total, **settings)
    plan = make_plan(schedule, EvaluationConfig(), 50.0, 400.0)
    return [lr_at(update, plan, schedule, OPTIM) for update in range(total)]


def test_warm_up_rises_linearly_to_the_peak():
    """The last update of the warm-up has the peak; the first one already moves."""
    found = rates(warmup=0.1, shape="constant")
    assert found[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert set(found[10:]) == {1.0}


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_decaying_shape_ends_just_above_its_final_share(shape):
    """The update after the last one would have exactly the final share, so none is wasted."""
    schedule = ScheduleConfig(max_updates=100, shape=shape, final_share=0.2)
    plan = make_plan(schedule, EvaluationConfig(), 50.0, 400.0)
    assert lr_at(100, plan, schedule, OPTIM) == pytest.approx(0.2)
    assert lr_at(99, plan, schedule, OPTIM) > 0.2
    found = rates(shape=shape, final_share=0.2)
    assert all(a >= b for a, b in zip(found[10:], found[11:], strict=False))


def test_cosine_is_half_way_at_its_middle():
    """Between warm-up and end, the cosine crosses the mean of peak and end."""
    assert rates(shape="cosine", warmup=0)[50] == pytest.approx(0.5)


def test_inverse_square_root_falls_with_the_root_of_the_update():
    """Four times the updates, half the rate; it joins the warm-up without a jump."""
    found = rates(total=400, shape="inverse_sqrt", warmup=25)
    assert found[24] == pytest.approx(1.0)
    assert found[99] / found[399] == pytest.approx(2.0)
    assert abs(found[25] - found[24]) < 0.03


def test_points_are_read_in_updates_epochs_and_tokens():
    """6000, 0.5ep and 2Mtok mean the same place when an epoch has 12,000 updates of 333.33 target tokens."""
    assert updates_at(6000, 1.0, 1.0) == 6000
    assert updates_at("0.5ep", 12000.0, 1.0) == 6000
    assert updates_at("2Mtok", 1.0, 2e6 / 6000) == 6000
    with pytest.raises(ConfigError, match="not a point"):
        updates_at("soon", 1.0, 1.0)


def test_epochs_become_updates_and_warm_up_may_be_a_point():
    """Five epochs of 12.5 updates are 63 updates; a warm-up of one epoch is 12 of them."""
    plan = make_plan(ScheduleConfig(epochs=5, warmup="1ep"), EvaluationConfig(every="2ep"), 12.5, 100.0)
    assert (plan.total_updates, plan.warmup_updates, plan.evaluate_every) == (math.ceil(62.5), 12, 25)


def test_durations_carry_their_unit():
    """90min and 1.5h are the same time; a bare number is refused."""
    assert seconds("90min") == seconds("1.5h") == 5400
    with pytest.raises(ConfigError):
        ScheduleConfig(max_time="90")
