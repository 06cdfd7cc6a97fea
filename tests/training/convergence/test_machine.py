"""The convergence machine: its table, its restarts, its reasons.

pytest tests/training/convergence/test_machine.py
"""

import json
import math
from dataclasses import replace

import pytest

from resilient_t5.config.sections import ConvergenceConfig, EvaluationConfig, updates_at
from resilient_t5.errors import DataError
from resilient_t5.training.convergence.machine import ConvergenceMachine, Phase, Reason, Rules, Window, cooldown_factor
from resilient_t5.training.convergence.phases import NEXT, Sign
from resilient_t5.training.convergence.rules import PRESETS

RULES = Rules(
    start=10,
    judge_from=20,
    patience=4,
    min_gain=0.1,
    min_gain_rel=0.0,
    anchor_rule="counted",
    on_saturation="stop",
    cooldown_share=0.5,
    divergence_factor=0.0,
    nonfinite_limit=0,
    every=1,
)
JUDGED = replace(RULES, start=0, judge_from=0)


def window(update: int, loss: float, **more: object) -> Window:
    return Window(update=update, tokens=update, lr=1e-3, loss=loss, **more)  # type: ignore[arg-type]


def feed(machine: ConvergenceMachine, losses: list[float], begin: int = 1) -> list:
    verdicts = []
    for update, loss in enumerate(losses, begin):
        verdicts.append(machine.observe(window(update, loss)))
        if verdicts[-1].stop:
            break
    return verdicts


W, O, D, P, S, C, X, Z = Phase  # noqa: E741  the table below is read by its letters
ARROWS = {
    (W, Sign.EARLY): W,
    (W, Sign.WATCHED): O,
    (O, Sign.WATCHED): O,
    (C, Sign.COOLING): C,
    (C, Sign.SPENT): X,
    (C, Sign.BROKEN): Z,
    **{(phase, Sign.BASED): D for phase in (W, O, D, P, X)},
    **{(phase, Sign.FELL): D for phase in (W, O, D)},
    **{(phase, Sign.FELL): S for phase in (P, S, X)},
    **{(phase, Sign.STALLED): D for phase in (W, O, D)},
    **{(phase, Sign.STALLED): P for phase in (P, X)},
    (S, Sign.STALLED): S,
    **{(phase, Sign.LEVEL): P for phase in (W, O, D, P, S, X)},
    **{(phase, Sign.COOLING): C for phase in (W, O, D, P, S, X)},
    **{(phase, Sign.SPENT): X for phase in (W, O, D, P, S, X)},
    **{(phase, Sign.BROKEN): Z for phase in (W, O, D, P, S, X)},
}


def provoked(phase: Phase, sign: Sign) -> Phase:
    """The phase that a machine in `phase` reaches by a window that means `sign`."""
    mark = {"update": 3, "loss": 1.0, "value": 1.0}
    more = {Sign.COOLING: {"on_saturation": "cooldown"}, Sign.BROKEN: {"nonfinite_limit": 1}}
    machine = ConvergenceMachine(replace(RULES, **more.get(sign, {})))
    state = machine.state() | {"phase": phase.name, "last_update": 29, "best": mark, "lowest": mark, "anchor": mark}
    state["plateau"] = {Sign.STALLED: 0, Sign.LEVEL: 2}.get(sign, 3)
    if sign is Sign.BASED:
        state["anchor"] = None
    if phase is Phase.COOLDOWN:
        state["cooldown_start"] = 26 if sign is Sign.COOLING else 10
    update = {Sign.EARLY: 5, Sign.WATCHED: 15}.get(sign, 30)
    machine.restore(state | {"last_update": update - 1})
    loss = {Sign.FELL: 0.5, Sign.BROKEN: math.nan}.get(sign, 1.0)
    return machine.observe(window(update, loss)).phase


def test_the_table_holds_the_stated_arrows_and_no_other():
    """NEXT is the table of the documentation."""
    assert {(phase, sign): end for phase, row in NEXT.items() for sign, end in row.items()} == ARROWS


@pytest.mark.parametrize(("phase", "sign"), ARROWS, ids=lambda value: value.name)
def test_a_window_of_each_sign_takes_its_arrow(phase, sign):
    """Every arrow can be walked by a real window."""
    assert provoked(phase, sign) is ARROWS[phase, sign]


def test_the_whole_story_of_two_descents_runs_through_the_phases_in_order():
    """Warm-up, observation, descent, plateau, second descent, plateau, saturation."""
    losses = [9 - 0.5 * i for i in range(12)] + [3.0] * 9 + [2.9, 2.9, 2.9, 2.0, 1.5] + [1.5] * 9
    verdicts = feed(ConvergenceMachine(RULES), losses)
    order = [verdict.phase.name for verdict in verdicts]
    assert [name for name, before in zip(order, [None, *order], strict=False) if name != before] == [
        "WARMUP", "OBSERVE", "DESCENT", "PLATEAU", "SECONDARY_CONVERGENCE", "PLATEAU", "SATURATED",
    ]  # fmt: skip
    assert verdicts[-1].stop is Reason.SATURATED
    assert verdicts[-1].update == 30
    assert sum("secondary_convergence" in verdict.events for verdict in verdicts) == 1
    assert [verdict.update for verdict in verdicts if verdict.is_best][-1] == 26


def test_every_verdict_explains_itself_and_gives_the_earliest_stop():
    """The text has the patience used, the trend and the earliest stop."""
    first = ConvergenceMachine(RULES).observe(window(1, 5.0))
    expected = "patience 0/4 used, trend unknown -> continue (observed from 10, judged from 20, earliest stop 24)"
    assert first.why == expected
    machine = ConvergenceMachine(JUDGED)
    last = feed(machine, [5 - 0.01 * i for i in range(4)])[-1]
    assert last.why.startswith(
        "patience 3/4 used, trend DECLINE, gain over 5 windows 0.05 [0.05, 0.05], flat below 0.005, noise "
    )
    assert last.why.endswith("-> continue (no gain above 0.1, earliest stop 5)")
    assert "stop: saturated (4 windows without a counted gain, best 4.96 at 5)" in machine.observe(window(5, 4.96)).why


@pytest.mark.parametrize("preset", PRESETS)
def test_a_flat_run_stops_exactly_at_the_earliest_stop_of_its_first_verdict(preset):
    """The update is exact, neither too early nor too late."""
    settings = ConvergenceConfig(preset=preset)
    rules = Rules.from_config(settings, lambda point: updates_at(point, 8000, 1.0), EvaluationConfig(every=500))
    machine = ConvergenceMachine(rules)
    earliest = []
    for update in range(0, 10**6, 500):
        verdict = machine.observe(window(update, 2.0))
        earliest.append(verdict.earliest_stop_update)
        if verdict.stop:
            break
    assert set(earliest[:-1]) == {update} == {rules.earliest_stop()}
    assert earliest[-1] is None


def test_state_is_restored_at_every_index_of_a_curve_without_a_trace():
    """A run that is cut after every evaluation gives the same verdicts and, byte for byte, the same state."""
    losses = [5.0, 4.0, 3.5, math.nan, 3.4, 3.4, 3.39, 3.4, 2.0, 1.9, 1.9, 2.4, 1.9, 1.9, 1.91, 1.9, 1.92, 1.9, 1.9, 1.9]
    for rules in (RULES, JUDGED, replace(JUDGED, on_saturation="cooldown")):
        straight, cut = ConvergenceMachine(rules), ConvergenceMachine(rules)
        for update, loss in enumerate(losses, 1):
            seen = Window(update, 0, 0.0, loss, train_loss=loss + 0.1, series={"term_restoration": 0.5})
            expected, given = straight.observe(seen), cut.observe(seen)
            assert given == expected
            text = json.dumps(cut.state(), allow_nan=False)
            cut = ConvergenceMachine(rules)
            cut.restore(json.loads(text))
            assert json.dumps(cut.state()) == text == json.dumps(straight.state())
            if expected.stop:
                break


@pytest.mark.parametrize("damage", [{"phase": "NOWHERE"}, {"best": {"loss": 1}}, {"recent": [[1]]}, {"surprise": 1}])
def test_a_damaged_state_is_refused(damage):
    """Never half a state."""
    machine = ConvergenceMachine(JUDGED)
    feed(machine, [3.0, 2.0])
    before = machine.state()
    with pytest.raises(DataError, match="convergence state"):
        machine.restore(before | damage)
    assert machine.state() == before


def test_a_state_of_the_version_with_extension_and_overfitting_is_restored():
    """An extended run continues on its plateau, one that ended at its bound stays ended, an overfit one is reopened."""
    machine = ConvergenceMachine(JUDGED)
    feed(machine, [3.0, 2.0, 2.0])
    old = machine.state() | {"overfit": 2}
    for changes, phase, reason in (
        ({"phase": "EXTENDED"}, Phase.PLATEAU, None),
        ({"phase": "SATURATED", "reason": "saturated_max", "plateau": 9}, Phase.SATURATED, Reason.SATURATED),
        ({"phase": "STOPPED", "reason": "overfit"}, Phase.PLATEAU, None),
    ):
        machine.restore(old | changes)
        assert (machine.phase, machine.reason) == (phase, reason)


def test_a_raised_patience_reopens_a_saturated_run_and_nothing_else_does():
    """The same rules leave it stopped."""
    machine = ConvergenceMachine(JUDGED)
    feed(machine, [2.0] * 9)
    assert machine.reason is Reason.SATURATED
    again = ConvergenceMachine(JUDGED)
    again.restore(machine.state())
    with pytest.raises(RuntimeError, match="saturated"):
        again.observe(window(50, 2.0))
    patient = ConvergenceMachine(replace(JUDGED, patience=6))
    patient.restore(machine.state())
    assert patient.observe(window(50, 2.0)).phase is Phase.PLATEAU
    assert patient.observe(window(51, 2.0)).stop is Reason.SATURATED


def test_windows_must_move_forward_and_may_begin_at_update_zero():
    """A run evaluates before its first update; the same evaluation twice is a mistake of the caller."""
    machine = ConvergenceMachine(RULES)
    assert machine.observe(window(0, 3.0)).is_best
    with pytest.raises(ValueError, match="not later"):
        machine.observe(window(0, 3.0))


def test_the_learning_rate_cools_linearly_and_wastes_no_update():
    """A pure function of update and start; the last update of the cooldown still learns."""
    assert [cooldown_factor(update, 10, 4) for update in (0, 9, 10, 11, 13, 14, 20)] == [1, 1, 1, 0.75, 0.25, 0, 0]
    assert cooldown_factor(10**9, None, 0) == 1.0


def test_cooldown_lasts_its_share_ends_on_an_evaluation_and_keeps_the_best_of_all():
    """Saturated at 50, half of that again, rounded up to the cadence of 10; a better loss on the way is kept."""
    machine = ConvergenceMachine(replace(JUDGED, every=10, on_saturation="cooldown", cooldown_share=0.45))
    for update in (10, 20, 30, 40, 50):
        verdict = machine.observe(window(update, 2.0))
    assert (verdict.phase, verdict.stop, verdict.earliest_stop_update) == (Phase.COOLDOWN, None, 80)
    assert (machine.cooldown_start, machine.cooldown_updates) == (50, 30)
    assert "-> cooldown to update 80" in verdict.why
    assert machine.observe(window(60, 1.5)).is_best
    assert machine.observe(window(70, 3.0)).phase is Phase.COOLDOWN
    last = machine.observe(window(80, 1.6))
    assert (last.phase, last.stop) == (Phase.SATURATED, Reason.SATURATED)
    assert machine.best is not None
    assert machine.best.update == 60


def test_on_saturation_continue_trains_on_to_a_second_descent():
    """Nothing stops; SATURATED gives way to SECONDARY_CONVERGENCE."""
    verdicts = feed(ConvergenceMachine(replace(JUDGED, on_saturation="continue")), [2.0] * 8 + [1.0, 1.0])
    assert [verdict.phase for verdict in verdicts[-5:]] == [X, X, X, S, S]
    assert all(verdict.stop is None and verdict.earliest_stop_update is None for verdict in verdicts)
    assert "continue although saturated" in verdicts[6].why


def test_divergence_takes_two_windows_and_is_not_confused_with_memorising():
    """One spike passes; two end the run; a training loss below the best evaluation means overfitting, and the run continues."""
    rules = replace(RULES, divergence_factor=3.0, judge_from=10**6)
    spike = ConvergenceMachine(rules)
    assert [verdict.stop for verdict in feed(spike, [2.0, 7.0, 2.0, 7.0, 7.0])] == [None] * 4 + [Reason.DIVERGED]
    assert spike.phase is Phase.STOPPED
    memoriser = ConvergenceMachine(rules)
    for update in range(1, 9):
        verdict = memoriser.observe(window(update, 2.0 if update == 1 else 9.0, train_loss=1.0))
        assert verdict.stop is None


def test_losses_that_are_not_finite_end_the_run_at_their_limit():
    """Counted over the whole run, with an event each time."""
    verdicts = feed(ConvergenceMachine(replace(RULES, nonfinite_limit=3)), [math.nan, 2.0, math.inf, 2.0, math.nan])
    assert [verdict.stop for verdict in verdicts] == [None, None, None, None, Reason.DIVERGED]
    assert ["nonfinite" in verdict.events for verdict in verdicts] == [True, False, True, False, True]


def test_best_can_go_by_term_restoration_while_patience_goes_by_the_loss():
    """The higher rate wins, ties keep the older, a window without a rate is never the best."""
    machine = ConvergenceMachine(replace(JUDGED, criterion="term_restoration"))
    rates = [None, 0.2, 0.5, 0.5, math.nan]
    flags = []
    for update, rate in enumerate(rates, 1):
        series = {} if rate is None else {"term_restoration": rate}
        flags.append(machine.observe(window(update, 3.0, series=series)).is_best)
    assert flags == [False, True, True, False, False]
    assert machine.best is not None
    assert (machine.best.update, machine.best.value, machine.best.loss) == (3, 0.5, 3.0)
    assert machine.reason is Reason.SATURATED


def test_a_change_point_on_a_plateau_is_announced_before_patience_counts_a_gain():
    """Several sigma below the plateau, yet below the counted gain: the event comes once, the phase stays."""
    noise = [0.001, -0.001, 0.0005, -0.0005, 0.001, -0.001, 0.0]
    losses = [2 + n for n in noise * 2] + [1.99, 1.989, 1.988, 1.5]
    patient = feed(ConvergenceMachine(replace(JUDGED, patience=8, on_saturation="continue")), losses)
    announced = [(verdict.update, verdict.phase) for verdict in patient if "secondary_convergence" in verdict.events]
    assert announced == [(16, Phase.SATURATED)]
    assert patient[-1].phase is Phase.SECONDARY_CONVERGENCE
    longer = feed(ConvergenceMachine(replace(JUDGED, patience=8, on_saturation="continue")), [*losses, *[1.5] * 6, 1.0])
    assert [verdict.update for verdict in longer if "secondary_convergence" in verdict.events] == [16, 25]


def test_noise_above_the_counted_gain_is_reported_once():
    """The evaluation set is too small for its threshold."""
    losses = [2 + 0.3 * math.sin(2.3 * number) for number in range(40)]
    verdicts = feed(ConvergenceMachine(replace(JUDGED, patience=30)), losses)
    assert sum("noise_above_gain" in verdict.events for verdict in verdicts) == 1
    quiet = feed(ConvergenceMachine(replace(JUDGED, patience=30)), [2 + 0.01 * (loss - 2) for loss in losses])
    assert sum("noise_above_gain" in verdict.events for verdict in quiet) == 0
