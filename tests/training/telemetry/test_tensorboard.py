"""TensorBoard output of a real run, read from its event files.

Run: python -m pytest tests/training/telemetry/test_tensorboard.py
"""

import re

import pytest
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

from resilient_t5.training.telemetry.tensorboard import LAYOUT

TAGS = {
    "train/loss",
    "train/learning_rate",
    "train/gradient_norm",
    "evaluation/loss",
    "evaluation/best",
    "evaluation/token_accuracy",
    "evaluation/loss_terms",
    "evaluation/loss_rest",
    "evaluation/term_token_accuracy",
    "restoration/term_rate",
    "restoration/term_rate_low",
    "restoration/majority_rate",
    "convergence/phase",
    "convergence/plateau",
    "convergence/patience",
    "performance/tokens_per_s",
    "performance/memory_mib",
    "checkpoint/save_s",
    "final/term_rate",
    "final/loss",
}


@pytest.fixture(scope="module")
def board(fork_server, tiny_config, tmp_path_factory):
    """The events of a run that was stopped after update 6 and resumed: TensorBoard's loader, and the run directory."""
    run = tmp_path_factory.mktemp("board") / "run"
    output = run.with_name("console.txt")
    argv = ["--config", tiny_config, "--run.dir", run, "--telemetry.samples", "2", "--schedule.shape", "constant"]
    assert fork_server.run([*argv, "--schedule.warmup", "1", "--schedule.max_updates", "6"], output) == 0, output.read_text()
    assert fork_server.run([*argv, "--schedule.warmup", "1", "--schedule.max_updates", "12"], output) == 0, output.read_text()
    return EventMultiplexer().AddRunsFromDirectory(str(run / "tensorboard")).Reload(), run


@pytest.mark.slow
def test_everything_is_in_one_run(board):
    """Hyper-parameters and curves create no extra runs, which a resume could not purge."""
    assert len(board[0].Runs()) == 1


def test_the_tags_are_there_and_no_tag_is_a_folder_of_another(board):
    """Scripts and layouts rely on the tags; TensorBoard does not draw a tag below another tag."""
    (run,) = board[0].Runs()
    tags = set(board[0].PluginRunToTagToContent("scalars")[run])
    assert tags >= TAGS
    assert all(tag.isascii() for tag in tags)
    assert [(tag, other) for tag in tags for other in tags if other.startswith(f"{tag}/")] == []


def test_the_charts_of_the_layout_show_what_they_name(board):
    """Layout tags are patterns, matched from the start: each matches one tag, or several if it ends in `.*`."""
    (run,) = board[0].Runs()
    tags = set(board[0].PluginRunToTagToContent("scalars")[run])
    for charts in LAYOUT.values():
        for kind, patterns in charts.values():
            for pattern in patterns:
                shown = [tag for tag in tags if (tag == pattern if kind == "Margin" else re.match(pattern, tag))]
                assert len(shown) == 1 or (shown and pattern.endswith(".*")), (pattern, shown)


def test_a_resumed_curve_has_every_update_once(board):
    """Twelve updates, one row each, over two processes."""
    (run,) = board[0].Runs()
    assert [point.step for point in board[0].Tensors(run, "train/loss")] == list(range(1, 13))


def test_texts_pictures_settings_and_the_layout_are_there(board):
    """The samples as a table, the configuration, the loss windows, hparams and the custom scalars layout."""
    loader, directory = board
    (run,) = loader.Runs()
    texts = loader.PluginRunToTagToContent("text")[run]
    assert {"samples/probe/text_summary", "run/config/text_summary", "run/environment/text_summary"} <= set(texts)
    assert "convergence/windows" in loader.PluginRunToTagToContent("images")[run]
    assert "_hparams_/experiment" in loader.PluginRunToTagToContent("hparams")[run]
    assert loader.PluginRunToTagToContent("custom_scalars")[run]
    assert (directory / "windows.png").read_bytes().startswith(b"\x89PNG")
    assert (directory / "samples" / "u00000012.md").read_text(encoding="utf-8").startswith("| source | gold | restored |")
