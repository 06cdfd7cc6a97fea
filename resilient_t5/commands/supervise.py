"""`bin/train --supervise`: restart the training as long as it makes progress.

A run that was killed, lost its device or exited with 75 (requeue) is restarted in a new process; a run that finished,
diverged or is misconfigured is not. Progress is the commit number of the newest checkpoint, which increases with every save.
Signals are forwarded to the run, which saves its state; the supervisor exits with the status of the run.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from resilient_t5.errors import ExitCode

FLAG = "--supervise"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
STOPPING = SIGNALS[:3]
DEATHS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGTERM)
RESUMABLE = {int(ExitCode.RESUMABLE), *(128 + number for number in DEATHS), *(-number for number in DEATHS)}
"""75, and termination by a signal that this process did not forward: OOM killer, driver crash, preemption."""
MAX_STARTS_WITHOUT_PROGRESS = 5
MAX_PAUSE_S = 60.0


class Supervisor:
    """Runs and restarts one training.

    Args:
        argv: command line of `bin/train` without --supervise.
        directory: run directory, whose checkpoints show the progress.
        first_pause_s: pause before a restart; doubles with every restart without a new commit.
    """

    def __init__(self, argv: Sequence[str], directory: Path, first_pause_s: float = 1.0):
        self.argv, self.directory, self.first_pause_s = list(argv), directory, first_pause_s
        self._child: subprocess.Popen[bytes] | None = None
        self._stop: int | None = None

    def run(self) -> int:
        """Train to the end; returns the status of the last process: its exit code, or minus the signal that terminated it."""
        former = {number: signal.signal(number, self._forward) for number in SIGNALS}
        try:
            without_progress, commit = 0, newest_commit(self.directory)
            while True:
                status = self._run_once()
                before, commit = commit, newest_commit(self.directory)
                without_progress = 0 if commit > before else without_progress + 1
                if self._stop is not None or status not in RESUMABLE:
                    return status
                if without_progress >= MAX_STARTS_WITHOUT_PROGRESS:
                    _log(f"{without_progress} consecutive starts without a new checkpoint (last status {status}); aborting")
                    return status
                pause_s = min(MAX_PAUSE_S, self.first_pause_s * 2**without_progress)
                _log(f"the run ended with status {status} at commit {commit}; restarting in {pause_s:.0f} s")
                if not self._pause(pause_s):
                    return status
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _run_once(self) -> int:
        # In its own process group, so that Ctrl+C in the terminal reaches the run once, through this process.
        command = [sys.executable, "-m", "resilient_t5.commands.train", *self.argv]
        self._child = subprocess.Popen(command, process_group=0)
        if self._stop is not None:  # the signal arrived between two processes
            self._child.send_signal(self._stop)
        return self._child.wait()

    def _pause(self, pause_s: float) -> bool:
        until_s = time.monotonic() + pause_s
        while time.monotonic() < until_s and self._stop is None:
            time.sleep(0.05)
        return self._stop is None

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if number in STOPPING:
            self._stop = number
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)


def newest_commit(directory: Path) -> int:
    """Highest commit number among the checkpoints of a run; 0 if there are none."""
    names = (path.name.rpartition("-")[2] for path in (directory / "checkpoints").glob("u*-*"))
    return max((int(number) for number in names if number.isdecimal()), default=0)


def supervise(argv: Sequence[str], directory: Path) -> int:
    """Run `bin/train` with `argv` to the end; terminate like its last process, by the same signal if there was one."""
    status = Supervisor(argv, directory).run()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def _log(line: str) -> None:
    print(f"supervise: {line}", file=sys.stderr)
