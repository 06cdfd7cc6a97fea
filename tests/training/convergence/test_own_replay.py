"""What a run reports about its convergence: metrics that replay to its decisions, console lines, TensorBoard.

python -m pytest tests/training/convergence/test_own_replay.py
"""

import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from resilient_t5.commands.replay import main
from resilient_t5.training.telemetry.metrics_log import read_rows
from tests.conftest import read_summary

pytestmark = pytest.mark.slow

VERDICT = re.compile(
    r"phase  (?P<phase>[A-Z_]+) patience (?P<plateau>\d+)/(?P<patience>\d+) used, trend (unknown|(RISE|FLAT|UNSURE|DECLINE), "
    r"gain over 5 windows [-.e\d]+ \[[-.e\d]+, [-.e\d]+\], flat below [-.e\d]+, noise [-.e\d]+) "
    r"-> (continue|cooldown to update \d+|stop: saturated) \(.+\)"
)
"""Phase, patience used, trend, gain with its interval, noise, and the reason: one line per evaluation."""


@pytest.fixture(scope="module")
def cooled(fork_server, tiny_config, tmp_path_factory):
    """A run that saturates at update 5 and cools down to update 8: its directory and its console."""
    run = tmp_path_factory.mktemp("cooled") / "run"
    console = run.with_name("console.txt")
    argv = ["--config", tiny_config, "--run.dir", run, "--evaluation.every", "1", "--evaluation.criterion", "term_restoration"]
    argv += ["--schedule.shape", "constant", "--schedule.warmup", "1", "--convergence.min_gain", "9"]
    argv += ["--convergence.start", "1", "--convergence.judge_from", "2", "--convergence.patience", "3"]
    argv += ["--convergence.on_saturation", "cooldown", "--convergence.cooldown_share", "0.5"]
    assert fork_server.run(argv, console) == 0, console.read_text()
    return run, console.read_text()


def test_every_evaluation_has_one_console_line_with_its_reason(cooled):
    """Each has the documented form and agrees with the metrics."""
    run, console = cooled
    lines = [line for line in console.splitlines() if " phase  " in line]
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["kind"] == "evaluation"]
    assert len(lines) == len(rows) == 9
    for line, row in zip(lines, rows, strict=True):
        found = VERDICT.search(line)
        assert found, line
        assert found["phase"] == row["phase"]
        assert (int(found["plateau"]), int(found["patience"])) == (row["convergence_plateau"], 3)
        assert row["why"] in line
        earliest = row["convergence_earliest_stop_update"]
        assert earliest is None or f"earliest stop {earliest}" in line
    assert "trend DECLINE" in console


def test_phase_patience_and_events_stand_in_the_event_files(cooled):
    """TensorBoard shows at every evaluation what metrics.jsonl holds, and the events as a table with their reasons."""
    run, _ = cooled
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    board.Reload()
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["kind"] == "evaluation"]
    names = ("phase", "plateau", "patience", "anchor", "earliest_stop_update", "verdict", "level", "gain", "gain_low")
    for name in (*names, "gain_high", "worth", "sigma"):
        written = [(row["update"], row[f"convergence_{name}"]) for row in rows]
        shown = [(event.step, event.value) for event in board.Scalars(f"convergence/{name}")]
        assert shown == [(update, pytest.approx(value)) for update, value in written if value is not None], name
    assert [int(event.value) for event in board.Scalars("convergence/phase")] == [0, 1, 2, 3, 3, 6, 6, 6, 7]
    table = board.Tensors("events/log/text_summary")[-1].tensor_proto.string_val[0].decode()
    events = [row for row in rows if row["events"]]
    assert table.count("\n") == len(events) + 1
    assert all(f"| {row['update']} | {row['phase']} |" in table for row in events)
    assert re.search(r"\| 5 \| COOLDOWN \| [a-z_, ]*phase \| patience 3/3 used.*-> cooldown to update 8 ", table)


def test_the_cooldown_takes_the_learning_rate_to_zero_and_the_best_of_all_is_kept(cooled):
    """Constant until saturation at 5, then linear; best goes by the term restoration rate, where the oldest highest stands."""
    run, _ = cooled
    rows = list(read_rows(run / "metrics.jsonl"))
    rates = [row["learning_rate"] for row in rows if row["kind"] == "train"]
    assert rates == pytest.approx([0.002] * 6 + [0.002 * 2 / 3, 0.002 / 3])
    assert [row["window"]["lr"] for row in rows if row["kind"] == "evaluation"][-1] == 0.0
    restored = [row["term_rate"] for row in rows if row["kind"] == "restoration"]
    best = read_summary(run)["best"]
    assert best["update"] == restored.index(max(restored))
    assert best["term_restoration"] == max(restored)
    assert (read_summary(run)["stop_reason"], read_summary(run)["updates"]) == ("saturated", 8)


def test_a_replayed_run_gives_the_decisions_that_it_made(cooled, capsys):
    """bin/replay over the run directory finds every verdict as it was, and does not call a cooldown that was one missing."""
    assert main([str(cooled[0]), "--png", "none"]) == 0
    printed = capsys.readouterr().out
    assert "agrees with the run's own verdicts at all 9 evaluations" in printed
    assert "did not cool down" not in printed


def test_a_saturated_run_continues_with_a_raised_patience_and_replays_as_it_happened(
    fork_server, tiny_config, tmp_path, capsys
):
    """The same settings find nothing to do; more patience reopens the run; the replay knows which patience held when."""
    run, console = tmp_path / "run", tmp_path / "console.txt"
    argv = ["--config", tiny_config, "--run.dir", run, "--evaluation.every", "1", "--convergence.min_gain", "9"]
    argv += ["--convergence.start", "0", "--convergence.judge_from", "1", "--convergence.patience"]
    assert fork_server.run([*argv, "2"], console) == 0, console.read_text()
    assert (read_summary(run)["stop_reason"], read_summary(run)["updates"]) == ("saturated", 3)
    assert fork_server.run([*argv, "2"], console) == 0, console.read_text()
    assert "nothing left to do" in console.read_text()
    assert fork_server.run([*argv, "4"], console) == 0, console.read_text()
    assert (read_summary(run)["stop_reason"], read_summary(run)["updates"]) == ("saturated", 5)
    assert main([str(run), "--png", "none"]) == 0
    printed = capsys.readouterr().out
    assert "patience 2/2 used" in printed
    assert "patience 4/4 used" in printed
    assert "agrees with the run's own verdicts at all 6 evaluations" in printed


def test_an_unreachable_phase_is_reported_at_the_start(fork_server, tiny_config, tmp_path):
    """The peer's thresholds on a run of one update: what is out of reach, and that no setting would change that."""
    console = tmp_path / "console.txt"
    argv = [
        "--config",
        tiny_config,
        "--run.dir",
        tmp_path / "run",
        "--convergence.preset",
        "seed",
        "--evaluation.every",
        "1000",
    ]
    assert fork_server.run([*argv, "--schedule.max_updates", "1"], console) == 0, console.read_text()
    warnings = [line for line in console.read_text().splitlines() if "plan warning" in line]
    assert len(warnings) == 1
    assert "convergence.start 6000 is never reached (the run has no evaluation)" in warnings[0]
    assert "too short to be judged" in warnings[0]
