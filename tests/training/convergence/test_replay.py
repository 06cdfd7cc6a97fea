"""Readers of recordings, the peers' rules, the scores, the pictures and the command.

pytest tests/training/convergence/test_replay.py
"""

import gzip
import json
import math
import os
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from PIL import Image

from resilient_t5.commands.replay import main
from resilient_t5.config.training import ConvergenceConfig
from resilient_t5.errors import DataError
from resilient_t5.training.convergence.machine import ConvergenceMachine, Phase, Rules, Window
from resilient_t5.training.convergence.recordings import read_curves
from resilient_t5.training.convergence.replay import Curve, Outcome, differences, replay, replay_rules, story, windows_of
from resilient_t5.training.convergence.rivals import (
    RIVALS,
    anchored_patience,
    hugging_face,
    keras,
    lightning,
    prechelt_gl,
    prechelt_pq,
    prechelt_up,
    ray_plateau,
)
from resilient_t5.training.convergence.scoring import against_frontier, compare, document, score, summary, sweep
from resilient_t5.training.telemetry.plots import round_ticks

ROOT = Path(__file__).parents[3]
CURVES = Path(os.environ.get("RESILIENT_T5_SHARED", ROOT.parent / "shared")) / "curves" / "curves.jsonl.gz"
LOSSES = [9.0, 6.0, 5.0, 4.5, 4.2, 4.0, 3.9, 3.85, 3.84, 3.83, 3.83, 3.83, *[3.83] * 4, 3.2, 3.0, 2.9, *[2.9] * 9]
RULES = Rules(200, 400, 5, 0.001, 0.0, "counted", "stop", 0.1, 3.0, 3, every=100)


def curve_of(losses, name="one", **more) -> Curve:
    return Curve(name, tuple((float(number), loss) for number, loss in enumerate(losses, 1)), **more)


def write_run(path: Path, losses, rules=RULES, altered=None) -> Path:
    """metrics.jsonl as a run with our telemetry writes it: its rules at the start, its windows and verdicts beside the loss."""
    machine = ConvergenceMachine(rules)
    rows = [{"kind": "start", "update": 0, "rules": asdict(rules)}]
    for number, loss in enumerate(losses):
        window = Window(number * rules.every, 10 * number, 1e-3, loss, train_loss=loss + 0.1, series={"term_restoration": 0.5})
        rows.append({"kind": "train", "update": window.update, "loss": loss + 0.1})
        verdict = machine.observe(window)
        written = {key: "nan" if value != value else value for key, value in asdict(window).items()}
        loss_written = "nan" if math.isnan(loss) else loss
        why = "because" if altered == number else verdict.why
        row = {"update": window.update, "loss": loss_written, "phase": verdict.phase.name, "why": why, "window": written}
        rows.append({"kind": "evaluation", **row})
        if verdict.stop:
            break
    path.mkdir(parents=True, exist_ok=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tr', encoding="utf-8")
    return path


def test_a_run_replayed_gives_its_very_decisions(tmp_path, capsys):
    """Own rules, own windows, NaN and a torn last line included; a changed verdict is found and named."""
    losses = [*LOSSES[:6], math.nan, *LOSSES[6:]]
    run = write_run(tmp_path / "run", losses)
    curve = read_curves(run)[0]
    result = replay(curve, curve.rules)
    assert differences(result) == []
    assert curve.recorded[-1].phase == "SATURATED"
    assert main([str(run), "--png", "none"]) == 0
    assert f"agrees with the run's own verdicts at all {len(curve.recorded)} evaluations" in capsys.readouterr().out
    assert main([str(write_run(tmp_path / "other", losses, altered=8)), "--png", "none"]) == 65
    assert "update 800: the run said" in capsys.readouterr().out


def test_a_run_of_the_version_with_extension_and_overfitting_is_replayed(tmp_path, capsys):
    """Its rules hold three settings that are gone; where they were off, every decision is the same."""
    run = write_run(tmp_path / "run", LOSSES)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[:-1]]
    rows[0]["rules"] |= {"patience_max": 0, "overfit_percent": 0.0, "overfit_windows": 6}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert main([str(run), "--png", "none"]) == 0
    assert "agrees with the run's own verdicts" in capsys.readouterr().out


def test_every_form_of_recording_gives_the_same_losses(tmp_path):
    """Trainer state, CSV, TSV, TensorBoard, plain and packed curves."""
    points = [[100 * number, loss] for number, loss in enumerate([3.0, 2.5, 2.25], 1)]
    log = [{"step": at, "eval_loss": loss} for at, loss in points] + [{"step": 50, "loss": 4.0}, {"step": 150, "loss": 3.5}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}), encoding="utf-8")
    table = (
        "\ufeffGlobal Step,Train Loss,Eval Loss\n50,4.0,\n" + "".join(f"{at},,{loss}\n" for at, loss in points) + "150,3.5,\n"
    )
    (tmp_path / "a.csv").write_text(table, encoding="utf-8")
    (tmp_path / "a.tsv").write_text(table.replace(",", "\t"), encoding="utf-8")
    line = json.dumps({"name": "c", "eval": points, "train": [[50, 4.0], [150, 3.5]]}) + "\n"
    (tmp_path / "c.jsonl").write_text(line, encoding="utf-8")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    forms = [tmp_path / name for name in ("trainer_state.json", "a.csv", "a.tsv", "c.jsonl", "c.jsonl.gz")]
    for path in forms:
        (curve,) = read_curves(path)
        assert curve.evaluations == ((100.0, 3.0), (200.0, 2.5), (300.0, 2.25)), path
        assert curve.training == ((50.0, 4.0), (150.0, 3.5)), path
        assert curve.training_losses == (4.0, 3.5, 3.5)


def test_a_tensorboard_directory_is_read_in_full_and_a_resumed_update_once(tmp_path):
    """More points than TensorBoard's own sample; the later record of an update stands."""
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with tensorboard.SummaryWriter(str(tmp_path / "run" / "tensorboard")) as board:
        for update in range(1, 12_001):
            board.add_scalar("train/loss", 4.0, update)
        for update in (10, 20, 30, 30):
            board.add_scalar("evaluation/loss", 3.0 - update / 100, update)
    (curve,) = read_curves(tmp_path / "run" / "tensorboard")
    assert [at for at, _ in curve.evaluations] == [10, 20, 30]
    assert curve.losses == pytest.approx((2.9, 2.8, 2.7))
    assert len(curve.training) == 12_000
    with pytest.raises(DataError, match="no event file with an evaluation loss"):
        read_curves(tmp_path / "run" / "tensorboard", tag="nowhere")


def test_scalars_that_tensorflow_2_wrote_as_tensors_are_read(tmp_path):
    """Keras' board: one run for training and one for validation, the same tag in both."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.plugins.scalar.summary_v2 import scalar_pb
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(tmp_path / "validation"))
    for epoch, loss in enumerate([3.0, 2.5]):
        writer.add_event(Event(step=epoch, summary=scalar_pb("epoch_loss", loss)))
    writer.close()
    (curve,) = read_curves(tmp_path, tag="epoch_loss")
    assert (curve.name, curve.evaluations) == ("validation", ((0.0, 3.0), (1.0, 2.5)))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", "", "empty"),
        ("a.jsonl", "{]\n{}\n", "not a JSON object"),
        ("a.jsonl", "[1]\n", "not a JSON object"),
        ("a.jsonl", '{"name": "x"}\n', "a curve wants"),
        ("a.jsonl", '{"eval": 5}\n', "not a pair of numbers"),
        ("a.jsonl", '{"eval": [[1, true]]}\n', "not a pair of numbers"),
        ("a.jsonl", '{"eval": [[-1, 2.0]]}\n', "negative or not finite"),
        ("a.jsonl", '{"eval": []}\n', "no evaluation loss"),
        ("a.jsonl", '{"eval": [[1, 2]], "window_updates": 0}\n', "window_updates"),
        ("a.jsonl", '{"kind": "start", "update": 0, "rules": {"start": 1}}\n', "recorded rules"),
        ("a.jsonl", '{"kind": "evaluation", "update": 1, "loss": 2, "window": {"update": 1}}\n', "recorded window"),
        ("trainer_state.json", "[]", "no log_history"),
        ("trainer_state.json", "[" * 100_000, "no log_history"),
        ("trainer_state.json", '{"log_history": [{"step": 1, "loss": 2}]}', "no evaluation loss"),
        ("a.csv", "step,accuracy\n1,2\n", "no column of an evaluation loss"),
        ("a.csv", "step,eval_loss\n1,abc\n", "not a pair of numbers"),
        ("a.png", "x", "not a kind of file"),
        ("a.jsonl.gz", "not packed", "cannot be read as text"),
    ],
)
def test_a_recording_that_is_not_one_is_refused_with_its_place(tmp_path, name, content, words, capsys):
    """Exit code 65, one line, no traceback."""
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert main([str(tmp_path / name), "--png", "none"]) == 65
    stories = capsys.readouterr().err
    assert words in stories
    assert name in stories
    assert "Traceback" not in stories


def test_a_packed_file_that_unfolds_without_end_is_refused(tmp_path, monkeypatch):
    """The bound is on what comes out."""
    monkeypatch.setattr("resilient_t5.training.convergence.recordings.LINE_BYTES_MAX", 1 << 16)
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(b" " * (1 << 20)))
    with pytest.raises(DataError, match="too large"):
        read_curves(tmp_path / "bomb.jsonl.gz")


def test_an_evaluation_is_a_window_unless_the_curve_says_otherwise():
    """Windows of 1000 updates by count, by stated length, or the recording's own updates."""
    points = ((50.0, 3.0), (100.0, 2.0), (150.0, 1.0))
    assert [window.update for window in windows_of(Curve("a", points))] == [1000, 2000, 3000]
    assert [window.update for window in windows_of(Curve("a", points, window_length=200.0))] == [250, 500, 750]
    assert [window.update for window in windows_of(Curve("a", points), "updates")] == [50, 100, 150]
    epochs = Curve("a", ((0.2, 3.0), (0.4, 2.0), (0.6, 2.0)))
    assert [window.update for window in windows_of(epochs, "updates")] == [0, 1, 2]


def test_the_story_tells_stop_best_and_what_is_given_up_and_saved():
    """A second descent after five flat windows: seed stops before it, thorough lives to see it."""
    curve = curve_of(LOSSES)
    stories = {
        p: "\n".join(story(replay(curve, replay_rules(curve, ConvergenceConfig(preset=p))))) for p in ("seed", "thorough")
    }
    assert "-> continue (first judged window, anchor 3.83, earliest stop 17000)" in stories["seed"]
    assert "SECONDARY_CONVERGENCE" in stories["seed"]
    early = replay(curve, replay_rules(curve, ConvergenceConfig(preset="seed", patience=4)))
    words = "\n".join(story(early))
    assert "stops at update 16000 of 28000 (saturated), after 16 of 28 windows" in words
    assert "gives up 0.93 (15.25 % of the descent): the lowest, 2.9, came at 19000" in words
    assert "saves 12 windows, 43 % of the recording" in words
    assert "never stops: the recording ends in PLATEAU" in stories["thorough"]


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
        expected = replay(curve, rules).outcome
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
    assert RIVALS["never"](rising, nothing) == Outcome(23, 1)


def test_compare_ends_in_the_promised_line_of_json(tmp_path, capsys):
    """All our presets, all peers, and figures that the rules themselves give."""
    lines = [
        {"name": f"c{n}", "group": "ab"[n % 2], "eval": [[i, v + 0.1 * n] for i, v in enumerate(LOSSES)]} for n in range(4)
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    picture = tmp_path / "f.png"
    assert main([str(tmp_path / "c.jsonl"), "--compare", "--png", str(picture)]) == 0
    out = capsys.readouterr().out
    last = json.loads(out.splitlines()[-1])
    assert last["curves"] == 4
    assert {"seed", "thorough", "short", "seed-code", *RIVALS} <= last["rules"].keys()
    for figures in last["rules"].values():
        assert figures.keys() == {"forgone_percent", "forgone_se", "updates_percent", "stopped_before_minimum"}
    assert last["rules"]["never"] == {
        "forgone_percent": 0.0, "forgone_se": 0.0, "updates_percent": 100.0, "stopped_before_minimum": 0,
    }  # fmt: skip
    assert last["rules"]["keras"] == last["rules"]["seed"] == last["rules"]["patience-5"]
    assert document(compare(read_curves(tmp_path / "c.jsonl"))) == last
    assert Image.open(picture).size == (1500, 930)


def test_settings_and_choices_on_the_command_line(tmp_path, capsys):
    """--convergence.key as for training; one curve of several must be named; mistakes leave with 2."""
    lines = [{"name": name, "eval": list(enumerate(LOSSES, 1))} for name in ("red", "green")]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    path = str(tmp_path / "c.jsonl")
    assert main([path, "--name", "red", "--png", "none", "--convergence.patience=4", "--convergence.start", "2000"]) == 0
    assert "start 2000, judge_from 12000, patience 4 windows" in capsys.readouterr().out
    assert main([path, "--png", "none"]) == 2
    assert "choose one (red, green" in capsys.readouterr().err
    assert main([path, "--name", "red", "--convergence.patince", "4"]) == 2
    assert "Did you mean --convergence.patience?" in capsys.readouterr().err
    assert main([path, "--group", "blue"]) == 65
    assert main([path, "--name", "red", "--png", str(tmp_path / "no" / "where.png")]) == 74


def test_the_picture_shows_every_phase_the_stop_and_what_was_not_trained(tmp_path):
    """Colours of the bands, of the stop line and of the rest are on the page."""
    from resilient_t5.training.telemetry.plots import BAND, SECOND, STOP, UNTRAINED, draw_replay

    losses = [5.0, 4.0, 3.0, 3.0, 3.0, 3.0, 2.0, *[2.0] * 9, 1.5, 1.4]
    windows = tuple(Window(100 * number, 0, 0.0, loss) for number, loss in enumerate(losses, 1))
    result = replay(curve_of(losses, windows=windows), RULES)
    draw_replay(result, tmp_path / "a.png")
    image = Image.open(tmp_path / "a.png")
    seen = {color for _, color in image.getcolors(1 << 20)}
    phases = {verdict.phase for verdict in result.verdicts}
    assert phases == set(Phase) - {Phase.COOLDOWN, Phase.STOPPED}
    assert {BAND[phase] for phase in phases} | {STOP, UNTRAINED} <= seen
    # A thin dashed line is smoothed; its colour is near, not exact.
    assert any(math.dist(color, SECOND) < 40 for color in seen)


def test_another_rule_is_told_and_drawn_beside_the_runs_own(tmp_path, capsys):
    """The run keeps its own rules and its agreement; the other's stop is in the story and in the picture."""
    from resilient_t5.training.telemetry.plots import OTHER, STOP

    run, picture = write_run(tmp_path / "run", LOSSES, replace(RULES, patience=8)), tmp_path / "both.png"
    other = ["--beside", "--convergence.preset", "seed-code", "--convergence.start", "200", "--convergence.judge_from", "200"]
    assert main([str(run), "--png", str(picture), *other]) == 0
    own, beside = capsys.readouterr().out.split("seed-code beside it:")
    assert "patience 8 windows" in own
    assert "stops at update 2600 of 2600 (saturated)" in own
    assert "patience 5 windows" in beside
    assert "stops at update 1400 of 2600 (saturated)" in beside
    assert "keeps 3.83 of update 900; gives up 0.93" in beside
    assert "agrees with the run's own verdicts" in beside
    seen = {color for _, color in Image.open(picture).getcolors(1 << 20)}
    assert {OTHER, STOP} <= seen
    assert main([str(run), "--beside", "--png", "none"]) == 2
    assert "--beside wants" in capsys.readouterr().err


@pytest.mark.parametrize("losses", [[2.0], [math.nan, math.nan], [2.0, math.nan, 1.0], [5.0] * 4, [1e-9, 1e9]])
def test_odd_recordings_are_told_and_drawn(tmp_path, losses, capsys):
    """One evaluation, none finite, gaps, no range, a huge range."""
    path = tmp_path / "odd.jsonl"
    path.write_text(json.dumps({"name": "\u4e2d", "eval": list(enumerate(losses))}) + "\n", encoding="utf-8")
    assert main([str(path), "--png", str(tmp_path / "odd.png")]) == 0
    assert (tmp_path / "odd.png").is_file()
    assert main([str(path), "--compare", "--png", str(tmp_path / "f.png")]) == (0 if any(map(math.isfinite, losses)) else 65)
    capsys.readouterr()


def test_ticks_are_round_and_inside():
    """Multiples of 1, 2, 2.5 or 5 times a power of ten."""
    assert round_ticks(0.0, 1.0, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert round_ticks(1012.0, 1098.0, 4) == [1025, 1050, 1075]
    assert round_ticks(3.0, 3.0, 4) == [3.0]


@pytest.mark.skipif(not CURVES.is_file(), reason="no recorded curves: set RESILIENT_T5_SHARED to a folder with curves/")
def test_thorough_keeps_its_promise_on_the_recorded_curves():
    """At most 1.0 % forgone on sequence-to-sequence runs, and within noise of the frontier over all of them."""
    curves, section = read_curves(CURVES), ConvergenceConfig(preset="thorough", on_saturation="stop")
    scores = [score(curve.losses, replay(curve, replay_rules(curve, section)).outcome) for curve in curves]
    ours = [one for one, curve in zip(scores, curves, strict=True) if curve.group == "s2s"]
    assert summary(ours).forgone_percent <= 1.0
    frontier = sweep(curves, lambda losses, patience: anchored_patience(losses, patience, first=12))
    distance = against_frontier(scores, frontier)
    assert distance is not None
    assert distance[0] <= max(0.01, 2 * distance[1])
