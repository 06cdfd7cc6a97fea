"""`bin/train --supervise`: start the training again as long as that brings it further.

A run that was killed, ran out of luck with a driver, or asks to be queued again (75) goes on in a new process; one that has
finished, diverged, or is configured wrongly does not. Whether it gets further is read from the checkpoints: their commit
number grows with every save. Signals are passed on to the run, which saves, and the supervisor leaves as the run did.
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
"""75, and deaths by a signal that this process did not pass on: the out-of-memory killer, a driver, a preemption."""
FRUITLESS_RESTARTS = 5
MAX_PAUSE_S = 60.0


class Supervisor:
    """Keeps one run going.

    Args:
        argv: the command line of `bin/train` without --supervise.
        directory: the run directory, where the commit numbers stand.
        first_pause_s: the wait before a restart; it doubles with every restart that brought no new commit.
    """

    def __init__(self, argv: Sequence[str], directory: Path, first_pause_s: float = 1.0):
        self.argv, self.directory, self.first_pause_s = list(argv), directory, first_pause_s
        self._child: subprocess.Popen[bytes] | None = None
        self._stop: int | None = None

    def run(self) -> int:
        """Train to the end; returns the status of the last process: its exit code, or minus the signal it died of."""
        former = {number: signal.signal(number, self._pass_on) for number in SIGNALS}
        try:
            fruitless, commit = 0, newest_commit(self.directory)
            while True:
                status = self._run_once()
                before, commit = commit, newest_commit(self.directory)
                fruitless = 0 if commit > before else fruitless + 1
                if self._stop is not None or status not in RESUMABLE:
                    return status
                if fruitless >= FRUITLESS_RESTARTS:
                    _say(f"{fruitless} starts in a row committed nothing new (last status {status}); giving up")
                    return status
                pause_s = min(MAX_PAUSE_S, self.first_pause_s * 2**fruitless)
                _say(f"the run ended with status {status} at commit {commit}; starting it again in {pause_s:.0f} s")
                if not self._pause(pause_s):
                    return status
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _run_once(self) -> int:
        # A process group of its own: a Ctrl+C in the terminal reaches the run once, through this process, and not twice.
        command = [sys.executable, "-m", "resilient_t5.commands.train", *self.argv]
        self._child = subprocess.Popen(command, process_group=0)
        if self._stop is not None:  # it came between two processes
            self._child.send_signal(self._stop)
        return self._child.wait()

    def _pause(self, pause_s: float) -> bool:
        until_s = time.monotonic() + pause_s
        while time.monotonic() < until_s and self._stop is None:
            time.sleep(0.05)
        return self._stop is None

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if number in STOPPING:
            self._stop = number
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)


def newest_commit(directory: Path) -> int:
    """The highest commit number among the checkpoints of a run; 0 without any."""
    names = (path.name.rpartition("-")[2] for path in (directory / "checkpoints").glob("u*-*"))
    return max((int(number) for number in names if number.isdecimal()), default=0)


def supervise(argv: Sequence[str], directory: Path) -> int:
    """Run `bin/train` with `argv` until it is done; leave as its last process did, by the same signal if it died of one."""
    status = Supervisor(argv, directory).run()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def _say(text: str) -> None:
    sys.stderr.write(f"supervise: {text}\n")
