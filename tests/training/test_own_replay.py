"""A run's own metrics replayed. Run: python -m pytest tests/training/test_own_replay.py"""

from resilient_t5.commands.replay import main


def test_a_replayed_run_gives_the_decisions_that_it_made(fork_server, tiny_config, tmp_path, capsys):
    """bin/replay over the run directory finds every verdict as it was, a resume in between included."""
    run, console = tmp_path / "run", tmp_path / "console.txt"
    argv = ["--config", tiny_config, "--run.dir", run]
    settings = ["--convergence.start", "2", "--convergence.judge_from", "4", "--convergence.patience", "2"]
    assert fork_server.run([*argv, *settings], console) == 0, console.read_text()
    assert main([str(run), "--png", "none"]) == 0
    assert "agrees with the run's own verdicts" in capsys.readouterr().out
