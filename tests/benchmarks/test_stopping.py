"""Stopping rules of other projects, their scores over recorded curves, and the command.

python -m pytest tests/benchmarks/test_stopping.py
"""

import json
import math
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.stopping import main
from benchmarks.stopping_rules.rules import (
    PEER_RULES,
    Outcome,
    anchored_patience,
    hugging_face,
    keras,
    lightning,
    prechelt_gl,
    prechelt_pq,
    prechelt_up,
    ray_plateau,
)
from benchmarks.stopping_rules.scoring import against_frontier, compare, document, outcome_of, score, summary, sweep
from resilient_t5.config.sections import ConvergenceConfig
from resilient_t5.training.convergence.phases import Window
from resilient_t5.training.convergence.recordings import read_curves
from resilient_t5.training.convergence.replay import Curve, replay, replay_rules
from resilient_t5.training.convergence.rules import Rules

ROOT = Path(__file__).parents[2]
CURVES = Path(os.environ.get("RESILIENT_T5_SHARED", ROOT.parent / "shared")) / "curves" / "curves.jsonl.gz"
LOSSES = [9.0, 6.0, 5.0, 4.5, 4.2, 4.0, 3.9, 3.85, 3.84, 3.83, 3.83, 3.83, *[3.83] * 4, 3.2, 3.0, 2.9, *[2.9] * 9]
RULES = Rules(200, 400, 5, 0.001, 0.0, "counted", "stop", 0.1, 3.0, 3, every=100)


def curve_of(losses, name="one", **more) -> Curve:
    return Curve(name, tuple((float(number), loss) for number, loss in enumerate(losses, 1)), **more)


def test_forgone_is_the_share_of_the_descent_and_updates_that_of_the_recording():
    """By hand: 10 to 2, kept 4, after three of five windows."""
    one = score([10.0, 4.0, 5.0, 2.0, 3.0], Outcome(3, 1))
    assert (one.forgone_percent, one.updates_percent, one.before_minimum) == (25.0, 60.0, True)
    flat = score([2.0, 3.0], Outcome(1, 0))
    assert (flat.forgone_percent, flat.before_minimum) == (0.0, False)
    both = summary([one, flat])
    assert both.forgone_percent == 12.5
    assert both.forgone_se == pytest.approx(12.5)
    assert (both.updates_percent, both.stopped_before_minimum) == (55.0, 1)


def test_the_frontier_at_equal_updates_is_a_paired_mixture():
    """Half-way between two patiences, the difference is to the mean of their scores on the same curve."""
    cheap, dear = [score([4.0, 2.0, 1.0], Outcome(n, n - 1)) for n in (1, 3)], [score([4.0, 2.0, 1.0], Outcome(3, 2))] * 2
    distance = against_frontier([score([4.0, 2.0, 1.0], Outcome(n, n - 1)) for n in (2, 3)], {1: cheap, 2: dear})
    assert distance is not None
    assert distance[0] == pytest.approx((33.333 - 50.0) / 2, abs=0.01)
    assert against_frontier([score([4.0, 2.0, 1.0], Outcome(1, 0))] * 2, {1: dear, 2: dear}) is None


def test_plain_patience_and_the_machine_decide_alike():
    """The sweep's short form against the machine, on random walks with ties and NaN, at several rules."""
    for seed in range(200):
        draw = random.Random(seed)
        losses = [
            draw.choice([round(3 - 0.02 * n + draw.gauss(0, 0.05), 2), math.nan][: 1 + (draw.random() < 0.1)])
            for n in range(50)
        ]
        patience, first, relative = draw.randint(1, 9), draw.randint(1, 20), draw.choice([0.0, 0.01])
        changes = {"start": 0, "judge_from": first * 100, "patience": patience, "min_gain_rel": relative}
        rules = replace(RULES, **changes, divergence_factor=0.0, nonfinite_limit=0)
        curve = curve_of(losses, windows=tuple(Window(100 * n, 0, 0.0, loss) for n, loss in enumerate(losses, 1)))
        expected = outcome_of(replay(curve, rules))
        assert anchored_patience(losses, patience, first=first, relative=relative) == expected


def test_the_peers_rules_stop_where_their_sources_say():
    """Each on a series worked out by hand."""
    flat = [5.0, 4.0, 3.0] + [3.0] * 20
    nothing = [None] * len(flat)
    assert hugging_face(flat, nothing) == Outcome(8, 2)
    assert lightning(flat, nothing) == Outcome(8, 2)
    assert keras(flat, nothing) == Outcome(17, 2)
    assert ray_plateau(flat, nothing) == Outcome(12, 2)
    creep = [3 - 0.0009 * number for number in range(23)]
    assert hugging_face(creep, nothing).windows == 6
    assert lightning(creep, nothing).windows == 23
    assert lightning([5.0, math.nan, 4.0], nothing).windows == 2
    rising = [5.0, 4.0] + [4.0 + 0.05 * number for number in range(21)]
    assert prechelt_gl(10)(rising, nothing).windows == 12
    assert prechelt_gl(20)(rising, nothing).windows == 20
    assert prechelt_up(2)(rising, nothing).windows == 15
    assert prechelt_up(3)(rising, nothing).windows == 20
    assert prechelt_pq(0.75)(rising, nothing).windows == 23
    assert prechelt_pq(0.75)(rising, [3.0] * 23).windows == 12
    assert PEER_RULES["never"](rising, nothing) == Outcome(23, 1)


def test_compare_ends_in_the_promised_line_of_json(tmp_path, capsys):
    """All our presets, all peers, and figures that the rules themselves give."""
    lines = [
        {"name": f"c{n}", "group": "ab"[n % 2], "eval": [[i, v + 0.1 * n] for i, v in enumerate(LOSSES)]} for n in range(4)
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    picture = tmp_path / "f.png"
    assert main([str(tmp_path / "c.jsonl"), "--png", str(picture), "--convergence.patience", "5"]) == 0
    out = capsys.readouterr().out
    last = json.loads(out.splitlines()[-1])
    assert last["curves"] == 4
    assert {"seed", "thorough", "short", "seed-code", "given", *PEER_RULES} <= last["rules"].keys()
    for figures in last["rules"].values():
        assert figures.keys() == {"forgone_percent", "forgone_se", "updates_percent", "stopped_before_minimum"}
    assert last["rules"]["never"] == {
        "forgone_percent": 0.0, "forgone_se": 0.0, "updates_percent": 100.0, "stopped_before_minimum": 0,
    }  # fmt: skip
    assert last["rules"]["keras"] == last["rules"]["seed"] == last["rules"]["patience-5"]
    assert last["rules"].pop("given") == last["rules"]["seed"]
    assert document(compare(read_curves(tmp_path / "c.jsonl"))) == last
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_search_ends_in_its_line_of_json_and_groups_can_be_chosen(tmp_path, capsys):
    """The same line goes into a file; a group that no curve has is bad data."""
    lines = [{"name": f"c{n}", "group": "ab"[n % 2], "eval": list(enumerate(LOSSES))} for n in range(4)]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert main([str(path), "--search", "--without", "b", "--json", str(tmp_path / "r.json")]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["curves"], last["variants"]) == (2, 161)
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8")) == last
    assert main([str(path), "--group", "c"]) == 65


@pytest.mark.skipif(not CURVES.is_file(), reason="no recorded curves: set RESILIENT_T5_SHARED to a folder with curves/")
def test_thorough_keeps_its_promise_on_the_recorded_curves():
    """At most 1.0 % forgone on sequence-to-sequence runs, and within noise of the frontier over all of them."""
    curves, section = read_curves(CURVES), ConvergenceConfig(preset="thorough", on_saturation="stop")
    scores = [score(curve.losses, outcome_of(replay(curve, replay_rules(curve, section)))) for curve in curves]
    ours = [one for one, curve in zip(scores, curves, strict=True) if curve.group == "s2s"]
    assert summary(ours).forgone_percent <= 1.0
    frontier = sweep(curves, lambda losses, patience: anchored_patience(losses, patience, first=12))
    distance = against_frontier(scores, frontier)
    assert distance is not None
    assert distance[0] <= max(0.01, 2 * distance[1])
