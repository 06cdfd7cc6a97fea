"""A run's own metrics replayed. Run: python -m pytest tests/training/test_own_replay.py"""

from resilient_t5.commands.replay import main
from tests.conftest import read_summary


def test_a_replayed_run_gives_the_decisions_that_it_made(fork_server, tiny_config, tmp_path, capsys):
    """bin/replay over the run directory finds every verdict as it was, a resume in between included."""
    run, console = tmp_path / "run", tmp_path / "console.txt"
    argv = ["--config", tiny_config, "--run.dir", run]
    settings = ["--convergence.start", "2", "--convergence.judge_from", "4", "--convergence.patience", "2"]
    assert fork_server.run([*argv, *settings], console) == 0, console.read_text()
    assert main([str(run), "--png", "none"]) == 0
    assert "agrees with the run's own verdicts" in capsys.readouterr().out


def test_a_saturated_run_goes_on_with_a_raised_patience_and_replays_as_it_happened(fork_server, tiny_config, tmp_path, capsys):
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
    told = capsys.readouterr().out
    assert "plateau=2/2" in told
    assert "plateau=4/4" in told
    assert "agrees with the run's own verdicts at all 6 evaluations" in told
