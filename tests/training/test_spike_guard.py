"""The guard's decisions, without a run. Run: python -m pytest tests/training/test_spike_guard.py"""

import copy
import json
import math
import random

import pytest

from resilient_t5.training.spike_guard import Action, Limits, SpikeGuard

LIMITS = Limits()


def calm(guard, updates, first=0, loss=2.0):
    """Apply `updates` ordinary updates; the noise is that of a seeded generator."""
    draw = random.Random(first)
    for number in range(first, first + updates):
        verdict = guard.applied(number, number + 1, loss + 0.1 * draw.random(), 1.0 + 0.2 * draw.random())
        assert verdict.action is Action.OK, verdict
    return first + updates


def spike(guard, at, loss=9.0, norm=1.0):
    """Three updates far above the usual loss; the verdict on the last of them."""
    verdicts = [guard.applied(at + k, at + k + 1, loss, norm) for k in range(LIMITS.spike_updates)]
    assert {verdict.action for verdict in verdicts[:-1]} <= {Action.OK}
    return verdicts[-1]


def test_a_few_single_refusals_are_survived():
    """Occasional refusals only skip, however long the run is."""
    guard = SpikeGuard()
    for attempt in range(0, 100_000, LIMITS.skip_window_updates // 5):
        assert guard.refused(attempt).action is Action.SKIP
        guard.applied(attempt + 1, attempt + 1, 2.0, 1.0)


def test_the_fourth_refusal_in_a_row_rolls_back_and_names_all_four():
    """The verdict names them; the run will skip their examples."""
    guard = SpikeGuard()
    verdicts = [guard.refused(attempt) for attempt in range(7, 11)]
    assert [verdict.action for verdict in verdicts] == [Action.SKIP] * 3 + [Action.ROLLBACK]
    assert verdicts[-1].attempts == (7, 8, 9, 10)


def test_more_than_one_percent_of_the_last_thousand_rolls_back():
    """Ten refusals in a thousand updates are allowed, the eleventh is not."""
    guard, verdicts = SpikeGuard(), []
    for attempt in range(0, 22, 2):
        verdicts.append(guard.refused(attempt).action)
        guard.applied(attempt + 1, attempt + 1, 2.0, 1.0)
    assert verdicts == [Action.SKIP] * 10 + [Action.ROLLBACK]


def test_three_updates_far_above_the_usual_loss_halve_the_learning_rate_for_200_updates():
    """The third one does; the factor ends at a known update."""
    guard = SpikeGuard()
    at = calm(guard, 100)
    assert guard.factor_at(at) == 1.0
    assert spike(guard, at).action is Action.BACKOFF
    done = at + LIMITS.spike_updates
    assert [guard.factor_at(done + k) for k in (0, 199, 200)] == [0.5, 0.5, 1.0]


def test_two_bad_updates_and_a_good_one_are_no_spike():
    """A row is broken by one update within the band."""
    guard = SpikeGuard()
    at = calm(guard, 100)
    for number in range(at, at + 30):
        loss = 2.05 if number % 3 == 2 else 9.0
        assert guard.applied(number, number + 1, loss, 1.0).action is Action.OK


def test_one_gradient_far_above_the_usual_norm_is_clipped_and_forgotten():
    """However large and frequent, if isolated; three in a row cause a back-off, whatever the loss is."""
    guard = SpikeGuard()
    at = calm(guard, 100)
    for number in range(at, at + 30):
        norm = 100.0 if number % 3 else 1.0
        assert guard.applied(number, number + 1, 2.05, norm).action is Action.OK
    at = calm(guard, 100, at + 30)
    assert spike(guard, at, loss=2.05, norm=25.0).action is Action.BACKOFF


def test_nothing_is_a_spike_before_the_warm_up_is_over_or_enough_is_known():
    """The loss of the first updates falls and jumps; no median is known yet either."""
    guard = SpikeGuard(warmup_updates=300)
    for number in range(300):
        assert guard.applied(number, number + 1, 10.0 if number % 2 else 1e4, 1e3 * (number % 7)).action is Action.OK
    guard = SpikeGuard()
    for number in range(LIMITS.spike_window_fewest):
        assert guard.applied(number, number + 1, 1e4 if number > 30 else 1.0, 1.0).action is Action.OK


def test_a_memorised_corpus_is_no_reason_to_call_every_breath_a_spike():
    """The median absolute deviation of a loss near zero is near zero; the band is not."""
    guard = SpikeGuard()
    for number in range(100):
        guard.applied(number, number + 1, 0.01, 1.0)
    for number in range(100, 110):
        assert guard.applied(number, number + 1, 0.2, 1.0).action is Action.OK
    assert guard.memory.in_band
    assert spike(guard, 110, loss=0.3).action is Action.BACKOFF


def test_a_second_spike_within_the_backed_off_updates_rolls_back():
    """The verdict names the updates of the second spike."""
    guard = SpikeGuard()
    at = calm(guard, 100)
    assert spike(guard, at).action is Action.BACKOFF
    at = calm(guard, 40, at + 3)
    verdict = spike(guard, at)
    assert verdict.action is Action.ROLLBACK
    assert verdict.attempts == (at, at + 1, at + 2)


def test_a_second_spike_after_the_backed_off_updates_backs_off_again():
    """After 200 normal updates a spike counts as the first again."""
    guard = SpikeGuard()
    at = calm(guard, 100)
    spike(guard, at)
    at = calm(guard, LIMITS.backoff_updates, at + 3)
    assert spike(guard, at).action is Action.BACKOFF


def test_a_rollback_passes_over_what_led_to_it_and_keeps_what_was_learned():
    """The restored state predates the spike; the guard remembers it, and the back-off period starts again."""
    guard = SpikeGuard()
    at = calm(guard, 100)
    healthy = json.loads(json.dumps(guard.state()))
    assert spike(guard, at).action is Action.BACKOFF
    verdict = spike(guard, at + 3)
    before = guard.memory
    guard.restore(healthy)
    guard.rolled_back(before, 100, verdict.attempts)
    assert guard.memory.rollbacks == 1
    assert [guard.should_skip(at + k) for k in range(2, 7)] == [False, True, True, True, False]
    assert [guard.factor_at(update) for update in (100, 299, 300)] == [0.5, 0.5, 1.0]
    assert guard.memory.passed_over == [[at + 3, at + 5]]


def test_after_three_rollbacks_the_fourth_reason_ends_the_run():
    """The message states that rolling back did not help."""
    guard = SpikeGuard()
    for round_number in range(LIMITS.rollbacks + 1):
        state = guard.state()
        verdict = [guard.refused(10 * round_number + k) for k in range(4)][-1]
        assert verdict.action is (Action.ROLLBACK if round_number < LIMITS.rollbacks else Action.ABORT)
        before = copy.deepcopy(guard.memory)
        guard.restore(state)
        guard.rolled_back(before, 5, verdict.attempts)
    assert "3 rollbacks did not help" in verdict.why


def test_an_overflow_of_float16_is_calibration_until_it_never_ends():
    """It is not counted as a refusal; twenty-one in a row are not calibration."""
    guard = SpikeGuard()
    verdicts = [guard.refused(attempt, overflow=True).action for attempt in range(21)]
    assert verdicts == [Action.SKIP] * 20 + [Action.ROLLBACK]
    assert guard.memory.skipped == 0 and guard.health()["finite"]


def test_health_says_what_a_rollback_must_not_go_back_to():
    """A state between refusals, or with a loss out of band, is unhealthy; the next good update resets both."""
    guard = SpikeGuard()
    at = calm(guard, 100)
    assert guard.health() == {"finite": True, "in_band": True}
    guard.applied(at, at + 1, 9.0, 1.0)
    assert guard.health() == {"finite": True, "in_band": False}
    guard.refused(at + 1)
    assert guard.health() == {"finite": False, "in_band": False}
    guard.applied(at + 2, at + 2, 2.05, 1.0)
    assert guard.health() == {"finite": True, "in_band": True}


@pytest.mark.parametrize("seed", range(5))
def test_a_guard_that_is_saved_and_restored_anywhere_decides_the_same(seed):
    """Saved to JSON and restored at every update of an unstable run: same verdicts, same factors, bit for bit."""
    draw, straight, restarted = random.Random(seed), SpikeGuard(20), SpikeGuard(20)
    update = 0
    for attempt in range(600):
        restored = SpikeGuard(20)
        restored.restore(json.loads(json.dumps(restarted.state())))
        restarted = restored
        if draw.random() < 0.008:
            verdicts = [guard.refused(attempt, overflow=draw.random() < 0) for guard in (straight, restarted)]
        else:
            update += 1
            loss = 9.0 if attempt % 150 > 145 else 2.0 + 0.1 * draw.random()
            norm = 60.0 if draw.random() < 0.05 else 1.0 + draw.random()
            verdicts = [guard.applied(attempt, update, loss, norm) for guard in (straight, restarted)]
        assert verdicts[0] == verdicts[1]
        assert straight.factor_at(update) == restarted.factor_at(update)
        assert math.isfinite(straight.factor_at(update))
    assert straight.state() == restarted.state()


def test_a_state_with_a_part_missing_is_refused():
    """By name; a default value would silently forget a rollback."""
    state = SpikeGuard().state()
    del state["passed_over"]
    with pytest.raises(TypeError, match="passed_over"):
        SpikeGuard().restore(state)
