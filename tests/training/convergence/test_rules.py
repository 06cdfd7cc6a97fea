"""Presets, points in training, and the phases that a run can never reach.

pytest tests/training/convergence/test_rules.py
"""

from dataclasses import asdict, replace

import pytest

from resilient_t5.config.sections import ConvergenceConfig, EvaluationConfig, updates_at
from resilient_t5.errors import ConfigError
from resilient_t5.training.convergence.rules import PRESETS, Rules, unreachable


def test_the_earliest_stops_of_the_presets_are_the_documented_ones():
    """`seed-code` 10 000, `seed` 17 000, `thorough` an epoch, 12 windows and a cooldown."""
    at = {
        p: Rules.from_config(ConvergenceConfig(preset=p), lambda x: updates_at(x, 12000, 1.0)).earliest_stop() for p in PRESETS
    }
    assert at == {"seed-code": 10_000, "seed": 17_000, "thorough": 24_000 + 3_000, "short": 9_000}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_fills_every_key_and_a_given_key_wins(preset):
    """There is no default outside the presets."""
    assert PRESETS[preset].keys() | {"preset"} == asdict(ConvergenceConfig()).keys()
    rules = Rules.from_config(
        ConvergenceConfig(preset=preset, patience=3, min_gain=0.5), lambda point: updates_at(point, 100, 1.0)
    )
    assert (rules.patience, rules.min_gain) == (3, 0.5)


def test_patience_may_be_a_span_and_points_may_be_epochs_or_tokens():
    """Spans become windows rounded up; points become updates."""
    settings = ConvergenceConfig(start="0.5ep", judge_from="40ktok", patience="1.5ep")
    rules = Rules.from_config(settings, lambda point: updates_at(point, 100, 200.0), EvaluationConfig(every=40))
    assert (rules.start, rules.judge_from, rules.patience, rules.every) == (50, 200, 4, 40)
    for wrong in ("6000", "5windows", 0):
        with pytest.raises(ConfigError, match=r"convergence\.patience"):
            ConvergenceConfig(patience=wrong)


def test_judging_never_begins_before_start():
    """A start beyond the preset's judge_from moves it along; two contradicting settings are refused by name."""
    points = lambda point: updates_at(point, 100, 1.0)  # noqa: E731
    assert Rules.from_config(ConvergenceConfig(start=20_000), points).judge_from == 20_000
    with pytest.raises(ConfigError, match="judge_from: 5 is before"):
        Rules.from_config(ConvergenceConfig(start=20, judge_from=5), points)


def test_an_unreachable_phase_is_reported_with_options_that_work():
    """5 681 planned updates never reach start 6000: the warning's own options lead to a run that can stop."""
    for planned in (300, 999, 5_681, 11_900, 16_999, 24_000):
        for preset in PRESETS:
            for every in (50, 1000):
                rules = Rules.from_config(
                    ConvergenceConfig(preset=preset),
                    lambda x, p=planned: updates_at(x, p // 2, 1.0),
                    EvaluationConfig(every=every),
                )
                warnings = unreachable(rules, planned)
                last = planned // every * every
                assert bool(warnings) == ((rules.earliest_stop() or 0) > last)
                if warnings:
                    words = warnings[0].replace("--convergence.", "").replace("--evaluation.", "").split("Use ")[1].split()
                    changed = replace(rules, **{key: int(value) for key, value in zip(words[::2], words[1::2], strict=True)})
                    assert unreachable(changed, planned) == []
    rules = Rules.from_config(ConvergenceConfig(), lambda point: updates_at(point, 1, 1.0))
    assert "convergence.start 6000 is never reached" in unreachable(rules, 5_681)[0]
    assert "convergence.judge_from 12000 is never reached" in unreachable(rules, 11_900)[0]
    assert "SATURATED can never be reached" in unreachable(rules, 16_999)[0]
    assert "too short" in unreachable(rules, 2)[0]
    assert unreachable(rules, 17_000) == []
