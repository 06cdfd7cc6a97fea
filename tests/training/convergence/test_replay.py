"""Readers of recordings, the replay and the command.

pytest tests/training/convergence/test_replay.py
"""

import gzip
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from resilient_t5.commands.replay import main
from resilient_t5.config.sections import ConvergenceConfig
from resilient_t5.errors import DataError
from resilient_t5.training.convergence.machine import ConvergenceMachine, Rules, Window
from resilient_t5.training.convergence.recordings import read_curves
from resilient_t5.training.convergence.replay import Curve, differences, replay, replay_rules, story, windows_of

LOSSES = [9.0, 6.0, 5.0, 4.5, 4.2, 4.0, 3.9, 3.85, 3.84, 3.83, 3.83, 3.83, *[3.83] * 4, 3.2, 3.0, 2.9, *[2.9] * 9]
RULES = Rules(200, 400, 5, 0.001, 0.0, "counted", "stop", 0.1, 3.0, 3, every=100)


def curve_of(losses, name="one", **more) -> Curve:
    return Curve(name, tuple((float(number), loss) for number, loss in enumerate(losses, 1)), **more)


def write_run(path: Path, losses, rules=RULES, altered=None) -> Path:
    """metrics.jsonl as a run writes it: its rules at the start, and the window and the verdict of each evaluation."""
    machine = ConvergenceMachine(rules)
    rows = [{"kind": "start", "update": 0, "rules": asdict(rules)}]
    for number, loss in enumerate(losses):
        window = Window(number * rules.every, 10 * number, 1e-3, loss, train_loss=loss + 0.1, series={"term_restoration": 0.5})
        rows.append({"kind": "train", "update": window.update, "loss": loss + 0.1})
        verdict = machine.observe(window)
        written = {key: "nan" if value != value else value for key, value in asdict(window).items()}
        loss_written = "nan" if math.isnan(loss) else loss
        statistics = {f"convergence_{name}": value for name, value in verdict.statistics.items()}
        if altered == number:
            statistics["convergence_plateau"] = 77
        row = {"update": window.update, "loss": loss_written, "phase": verdict.phase.name, "window": written, **statistics}
        rows.append({"kind": "evaluation", **row})
        if verdict.stop:
            break
    path.mkdir(parents=True, exist_ok=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tr', encoding="utf-8")
    return path


def test_a_run_replayed_gives_its_very_decisions(tmp_path, capsys):
    """Own rules, own windows, NaN and a torn last line included; a verdict that differs is reported."""
    losses = [*LOSSES[:6], math.nan, *LOSSES[6:]]
    run = write_run(tmp_path / "run", losses)
    curve = read_curves(run)[0]
    result = replay(curve, curve.rules)
    assert differences(result) == []
    assert curve.recorded[-1].phase == "SATURATED"
    assert main([str(run), "--png", "none"]) == 0
    assert f"agrees with the run's own verdicts at all {len(curve.recorded)} evaluations" in capsys.readouterr().out
    assert main([str(write_run(tmp_path / "other", losses, altered=8)), "--png", "none"]) == 65
    assert "update 800: the run recorded plateau 77" in capsys.readouterr().out


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
        ("a.jsonl", '{"name": "x"}\n', "a curve needs"),
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


def test_the_story_reports_stop_best_and_what_is_forgone_and_saved():
    """A second descent after five flat windows: a patience of 4 stops before it, `thorough` reaches it."""
    curve = curve_of(LOSSES)
    stories = {
        p: "\n".join(story(replay(curve, replay_rules(curve, ConvergenceConfig(preset=p))))) for p in ("seed", "thorough")
    }
    assert "-> continue (first judged window, anchor 3.83, earliest stop 17000)" in stories["seed"]
    assert "SECONDARY_CONVERGENCE" in stories["seed"]
    early = replay(curve, replay_rules(curve, ConvergenceConfig(preset="seed", patience=4)))
    words = "\n".join(story(early))
    assert "stops at update 16000 of 28000 (saturated), after 16 of 28 windows" in words
    assert "forgoes 0.93 (15.25 % of the descent): the lowest, 2.9, is at update 19000" in words
    assert "saves 12 windows, 43 % of the recording" in words
    assert "never stops: the recording ends in PLATEAU" in stories["thorough"]


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


def test_another_rule_is_reported_in_addition_to_the_runs_own(tmp_path, capsys):
    """The run keeps its own rules and verdicts; the stop of the other rule is printed, and the picture is written."""
    run, picture = write_run(tmp_path / "run", LOSSES, replace(RULES, patience=8)), tmp_path / "both.png"
    other = ["--beside", "--convergence.preset", "seed-code", "--convergence.start", "200", "--convergence.judge_from", "200"]
    assert main([str(run), "--png", str(picture), *other]) == 0
    own, beside = capsys.readouterr().out.split("with seed-code instead:")
    assert "patience 8 windows" in own
    assert "stops at update 2600 of 2600 (saturated)" in own
    assert "patience 5 windows" in beside
    assert "stops at update 1400 of 2600 (saturated)" in beside
    assert "keeps 3.83 of update 900; forgoes 0.93" in beside
    assert "agrees with the run's own verdicts" in beside
    assert picture.stat().st_size > 10_000
    assert main([str(run), "--beside", "--png", "none"]) == 2
    assert "--beside needs" in capsys.readouterr().err


def test_comparing_rules_is_refused_with_the_name_of_its_benchmark(capsys):
    """Exit code 2, whatever else is on the command line."""
    assert main(["curves.jsonl", "--compare", "--png", "none"]) == 2
    assert "bin/benchmark stopping" in capsys.readouterr().err
