"""bin/evaluate from the command line. Run: python -m pytest tests/commands/test_evaluate.py"""

import json
import shutil

import pytest
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

from resilient_t5.commands.evaluate import main
from tests.conftest import read_summary


def figures(capsys):
    """The last line that was printed, and all lines before it."""
    *lines, last = capsys.readouterr().out.splitlines()
    return json.loads(last)["models"], lines


def test_a_run_is_examined_on_the_examples_that_it_held_out(finished, tmp_path, capsys):
    """With the run's own number of examples the rate is the one that the run reported; the files agree with the output."""
    where = ["--json", str(tmp_path / "a.json"), "--png", str(tmp_path / "a.png")]
    assert main([str(finished), "--examples", "4", "--curve_examples", "3", *where]) == 0
    (model,), lines = figures(capsys)
    assert model["term_rate"] == read_summary(finished)["best"]["term_restoration"]
    assert model["foreign_token_share"] == 0.0
    assert [curve["damage"] for curve in model["resilience"]] == ["masks", "noise", "both"]
    assert all(len(curve["points"]) == 7 for curve in model["resilience"])
    assert sum(band["n"] for band in model["by"]["length"].values()) == model["n"]
    assert any(line.startswith("fewer than 200") for line in lines)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["models"][0]["n"] == model["n"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_several_models_are_listed_in_one_table(finished, capsys):
    """One line each, in the order given."""
    assert main([str(finished), f"{finished}/", "--examples", "4", "--curve_examples", "0", "--which", "last"]) == 0
    models, lines = figures(capsys)
    assert len(models) == 2
    assert models[0]["term_rate"] == models[1]["term_rate"] == read_summary(finished)["last"]["term_restoration"]
    assert sum(line.startswith(str(finished)) for line in lines) >= 2


def test_the_resilience_curve_is_written_to_the_tensorboard_of_the_run(finished, tmp_path, capsys):
    """As a separate run, written twice and shown once; the curves equal the printed results."""
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("checkpoints"))
    command = [str(run), "--examples", "4", "--curve_examples", "3", "--png", "", "--tensorboard"]
    assert main(command) == main(command) == 0
    (model,), _ = figures(capsys)
    board = EventMultiplexer().AddRunsFromDirectory(str(run / "tensorboard")).Reload()
    assert set(board.Runs()) == {".", "resilience"}
    for curve in model["resilience"]:
        drawn = [
            (event.step, event.tensor_proto.float_val[0])
            for event in board.Tensors("resilience", f"resilience/term_rate_{curve['damage']}")
        ]
        measured = [(round(100 * point["level"]), point["term_rate"]) for point in curve["points"] if point["n"]]
        assert drawn == [(level, pytest.approx(rate)) for level, rate in measured]
    assert len(board.Tensors("resilience", "resilience/curve")) == 1


def test_other_text_is_examined_whole_and_what_was_never_trained_is_counted(finished, tmp_path, capsys):
    """A single line is enough; the share of characters that this run did not train is reported."""
    text = tmp_path / "other.txt"
    text.write_text("A man, 40: cough since Monday. 饕餮魑魅魍魉齉龘 Diagnosis: pneumonia.\n", encoding="utf-8")
    assert main([str(finished), "--text", str(text), "--curve_examples", "0"]) == 0
    (model,), _ = figures(capsys)
    assert model["n_examples"] >= 1
    assert 0.0 <= model["foreign_token_share"] < 1.0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere"], 65, "not a run directory"),
        (["RUN", "--text", "EMPTY"], 65, "no text"),
        (["RUN", "--examples", "0"], 2, "below 1"),
    ],
)
def test_invalid_input_is_reported(finished, tmp_path, capsys, arguments, code, words):
    """A message and an exit code, never a traceback."""
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    names = {"RUN": str(finished), "EMPTY": str(tmp_path / "empty.txt")}
    assert main([names.get(argument, argument) for argument in arguments]) == code
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_a_run_without_an_export_is_reported(finished, tmp_path, capsys):
    """An interrupted run has no export yet."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_bytes((finished / "config.yaml").read_bytes())
    assert main([str(run)]) == 65
    assert "there is no export" in capsys.readouterr().err
