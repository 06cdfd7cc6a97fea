"""A run that is restarted as long as it makes progress. Run: python -m pytest tests/commands/test_supervise.py"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from resilient_t5.commands import supervise
from resilient_t5.commands.supervise import Supervisor, newest_commit
from tests.conftest import ROOT, read_summary

pytestmark = pytest.mark.slow

CHILD = """
import os, signal, sys, time
from pathlib import Path
directory, script = Path(sys.argv[1]), sys.argv[2].split(",")
starts = directory / "starts"
number = len(starts.read_text()) if starts.exists() else 0
starts.write_text("x" * (number + 1))
kind = script[min(number, len(script) - 1)]
if kind.startswith("commit"):
    (directory / "checkpoints" / f"u00000001-{number + 1:04d}").mkdir(parents=True)
    kind = kind.removeprefix("commit")
if kind == "wait":
    signal.signal(signal.SIGUSR1, lambda *_: (directory / "usr1").touch())
    (directory / "ready").touch()
    time.sleep(30)
if int(kind) < 0:
    os.kill(os.getpid(), -int(kind))
raise SystemExit(int(kind))
"""


class Scripted(Supervisor):
    """A real supervisor over real processes with scripted exits."""

    def _run_once(self):
        popen, command = subprocess.Popen, [sys.executable, "-c", CHILD, str(self.directory), *self.argv]
        supervise.subprocess.Popen = lambda _, **keywords: popen(command, **keywords)
        try:
            return super()._run_once()
        finally:
            supervise.subprocess.Popen = popen


def starts(directory):
    """How many processes there were."""
    return len((directory / "starts").read_text())


def test_what_is_resumable_is_started_again_until_it_is_done(tmp_path):
    """Requeue, SIGKILL, SIGSEGV, SIGTERM from outside and their shell codes; then 0."""
    script = "commit75,commit-9,commit-11,commit-15,commit137,commit139,commit143,0"
    assert Scripted([script], tmp_path, first_pause_s=0.01).run() == 0
    assert starts(tmp_path) == 8


def test_permanent_failures_are_not_restarted(tmp_path):
    """Diverged, wrong settings, bad data: one start, the same status."""
    for code in (0, 2, 65, 66, 69, 70, 73, 78, 130):
        directory = tmp_path / str(code)
        directory.mkdir()
        assert Scripted([str(code)], directory, first_pause_s=0.01).run() == code
        assert starts(directory) == 1


def test_it_aborts_without_new_checkpoints(tmp_path):
    """After five consecutive crashes; a commit in between resets the count."""
    assert Scripted(["-9"], tmp_path, first_pause_s=0.001).run() == -9
    assert starts(tmp_path) == supervise.MAX_STARTS_WITHOUT_PROGRESS
    other = tmp_path / "other"
    other.mkdir()
    assert Scripted(["-9,-9,-9,-9,commit-9,-9"], other, first_pause_s=0.001).run() == -9
    assert starts(other) == 4 + 1 + supervise.MAX_STARTS_WITHOUT_PROGRESS


def test_a_real_run_under_supervision_survives_kills_and_a_stop_ends_both(tiny_config, tmp_path):
    """Twice SIGKILL to the run itself, then SIGTERM to the supervisor: it saves, both leave by the signal; then to the end."""
    run, console = tmp_path / "run", (tmp_path / "console.txt").open("w")
    command = [sys.executable, str(ROOT / "bin" / "train"), "--supervise", "--config", str(tiny_config), "--run.dir", str(run)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=console, stderr=console)
    killed = []
    for _ in range(2):
        commit = newest_commit(run)
        wait_until(lambda commit=commit: newest_commit(run) > commit and running(run) not in (None, *killed), console)
        killed.append(running(run))
        os.kill(killed[-1], signal.SIGKILL)
    wait_until(lambda: running(run) not in (None, *killed) and "resumed from" in last_start(run), console)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == -signal.SIGTERM
    assert read_summary(run)["exit_code"] == 143
    assert subprocess.run(command, env=environment, stdout=console, stderr=console, timeout=120).returncode == 0
    assert read_summary(run)["status"] == "finished"
    console.close()
    assert (tmp_path / "console.txt").read_text().count("; restarting in") == 2


def running(run):
    """The process that holds the run."""
    try:
        return json.loads((run / "run.lock").read_text())["pid"]
    except (OSError, ValueError):
        return None


def last_start(run):
    """The last line of the log that begins a process."""
    lines = (run / "train.log").read_text().splitlines() if (run / "train.log").exists() else []
    return next((line for line in reversed(lines) if " run    " in line), "")


def wait_until(holds, console):
    """Wait for something to be true."""
    until = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < until, Path(console.name).read_text()[-3000:]
        time.sleep(0.01)
