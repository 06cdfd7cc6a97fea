"""RunLog: metrics.jsonl, TensorBoard and console. Run: python -m pytest tests/training/telemetry/test_metrics_log.py"""

import json
import math

from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

from resilient_t5.training.state import RunState
from resilient_t5.training.telemetry.console import Console
from resilient_t5.training.telemetry.metrics_log import read_rows
from resilient_t5.training.telemetry.run_log import RunLog


def opened(directory, from_update, console=None, **options):
    """A log that continues at `from_update`."""
    log = RunLog(console or Console("quiet", None), directory, **options)
    log.open_at(RunState(update=from_update, evaluated_update=from_update))
    return log


def write(directory, updates, from_update=0):
    """Log one training row per update, as a run that resumes at `from_update`."""
    log = opened(directory, from_update, tensorboard=True)
    for update in updates:
        log.event("train", update, loss=1.0 / update, tokens_per_s=5.0)
    log.event("save", max(updates), name="u", write_s=0.1)
    log.close()


def updates_of(directory, kind="train"):
    """The updates of all rows of one kind, in the file's order."""
    return [row["update"] for row in read_rows(directory / "metrics.jsonl") if row["kind"] == kind]


def test_every_row_has_kind_update_and_time(tmp_path):
    """Scripts rely on these three keys."""
    write(tmp_path, [1, 2])
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert {"kind", "update", "time"} <= json.loads(line).keys()


def test_rows_beyond_the_restored_update_go_and_the_audit_trail_stays(tmp_path):
    """After a return to update 3, rows 4 and 5 appear once, and both save rows are kept."""
    write(tmp_path, [1, 2, 3, 4, 5])
    write(tmp_path, [4, 5, 6], from_update=3)
    assert updates_of(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert updates_of(tmp_path, "save") == [5, 6]


def test_a_partial_last_line_is_skipped(tmp_path):
    """A kill may leave a partial line; it is neither read nor kept."""
    write(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "upd')
    write(tmp_path, [3], from_update=2)
    assert updates_of(tmp_path) == [1, 2, 3]


def test_curves_continue_without_overlap_in_tensorboard_after_a_crash(tmp_path):
    """TensorBoard's own loader shows every update once and in order, although two writers overlapped."""
    write(tmp_path, [1, 2, 3, 4, 5])
    write(tmp_path, [4, 5, 6], from_update=3)
    board = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "tensorboard")).Reload()
    (run,) = board.Runs()
    assert [point.step for point in board.Tensors(run, "train/loss")] == [1, 2, 3, 4, 5, 6]
    assert "performance/tokens_per_s" in board.PluginRunToTagToContent("scalars")[run]


def test_a_value_that_is_no_number_is_written_as_text(tmp_path):
    """JSON has no NaN; the value is kept as text and the file stays valid."""
    log = opened(tmp_path, 0)
    log.event("guard", 1, loss=math.nan, gradient_norm=math.inf)
    log.close()
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert (row["loss"], row["gradient_norm"]) == ("nan", "inf")


def test_one_call_writes_the_row_and_the_line(tmp_path):
    """The line may be formatted from the row; checkpoint events before the log is open are queued, and come first."""
    with Console("quiet", tmp_path / "train.log") as console:
        log = RunLog(console, tmp_path)
        log.checkpoint_event("fallback", {"name": "u1", "update": 1})
        log.open_at(RunState(update=2))
        log.event("guard", 2, line=lambda row: f"guard  {row['action']}", action="skip")
        log.close()
    assert [(row["kind"], row["update"]) for row in read_rows(tmp_path / "metrics.jsonl")] == [("save", 1), ("guard", 2)]
    lines = (tmp_path / "train.log").read_text(encoding="utf-8").splitlines()
    assert [line.partition(" ")[2] for line in lines] == ["checkpoint fallback: name u1, update 1", "guard  skip"]


def test_a_rank_that_does_not_write_is_silent(tmp_path, capsys):
    """No directory: no file, no line, no error."""
    log = opened(None, 0)
    log.event("guard", 1, line="guard  skip")
    log.close()
    assert (list(tmp_path.iterdir()), capsys.readouterr().out, log.write_errors) == ([], "", 0)
