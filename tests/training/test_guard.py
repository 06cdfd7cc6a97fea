"""When refused updates end a run. Run: python -m pytest tests/training/test_guard.py"""

import json

from resilient_t5.training.guard import CONSECUTIVE_LIMIT, WINDOW_LIMIT, WINDOW_UPDATES, Guard


def test_a_few_single_refusals_are_survived():
    """One refusal now and then never ends a run, however long it is."""
    guard = Guard()
    assert all(guard.observe(attempt) is None for attempt in range(1, 100_000, WINDOW_UPDATES // 5))


def test_a_series_of_refusals_ends_the_run():
    """The one beyond the limit has a diagnosis, those before do not."""
    guard = Guard()
    verdicts = [guard.observe(attempt) for attempt in range(1, CONSECUTIVE_LIMIT + 2)]
    assert verdicts[:-1] == [None] * CONSECUTIVE_LIMIT
    assert "in a row" in verdicts[-1]


def test_too_many_in_a_window_end_the_run():
    """Every other update refused is no training."""
    guard = Guard()
    verdicts = [guard.observe(attempt) for attempt in range(1, 2 * WINDOW_LIMIT + 2, 2)]
    assert verdicts[-1] is not None and not any(verdicts[:-1])


def test_the_count_survives_a_restart():
    """A crash between two refusals does not make the guard forget."""
    guard = Guard()
    for attempt in range(1, CONSECUTIVE_LIMIT + 1):
        again = Guard()
        guard.observe(attempt)
        again.restore(json.loads(json.dumps(guard.to_json())))
        guard = again
    assert guard.observe(CONSECUTIVE_LIMIT + 1) is not None
