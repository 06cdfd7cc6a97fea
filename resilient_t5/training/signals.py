"""Signals and the STOP file: handlers set flags, the loop decides.

A handler writes no file and no log line. It notes the first signal that asks the run to stop and when it came; what is
running polls `requested`. Only a second SIGINT leaves at once, which is safe because a save survives even SIGKILL.
"""

import faulthandler
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType

from resilient_t5.errors import ExitCode

STOPPING = {
    signal.SIGINT: ExitCode.INTERRUPTED,
    signal.SIGTERM: ExitCode.TERMINATED,
    signal.SIGHUP: ExitCode.HANGUP,
}
STOP_FILE_POLL_S = 1.0

Handler = Callable[[int, FrameType | None], object] | int | None


class Stopped(Exception):
    """Raised out of work that has no state to save, such as preparing a corpus, when the run was asked to stop."""


class StopSignal:
    """Context manager that catches the stopping signals, SIGUSR1 (save and go on) and SIGUSR2 (print stacks).

    Works in the main thread only; elsewhere, and for a signal that was ignored when the process began (nohup), it
    changes nothing. The former handlers come back at the end.
    """

    def __init__(self, run_directory: Path | None = None):
        self.stop_file = None if run_directory is None else run_directory / "STOP"
        self.received: signal.Signals | None = None
        self.received_at_s = 0.0
        self.save_requested = False
        self._file_polled_at_s = float("-inf")
        self._former: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> "StopSignal":
        for number in (*STOPPING, signal.SIGUSR1):
            former = signal.getsignal(number)
            if former is not signal.SIG_IGN:
                self._former[number] = former
                signal.signal(number, self._note)
        if sys.__stderr__ is not None:
            faulthandler.register(signal.SIGUSR2, file=sys.__stderr__, all_threads=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)
        faulthandler.unregister(signal.SIGUSR2)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.save_requested = True
        elif self.received is None:
            self.received, self.received_at_s = signal.Signals(number), time.monotonic()
        elif number == signal.SIGINT and self.received == signal.SIGINT:
            os._exit(ExitCode.INTERRUPTED)

    @property
    def requested(self) -> bool:
        """True once the run was asked to stop, by a signal or by a file STOP in the run directory.

        The file is looked for at most once a second: a look costs a system call.
        """
        now_s = time.monotonic()
        if self.received is None and self.stop_file is not None and now_s - self._file_polled_at_s >= STOP_FILE_POLL_S:
            self._file_polled_at_s = now_s
            if self.stop_file.exists():
                self.received, self.received_at_s = signal.SIGINT, now_s
        return self.received is not None

    @property
    def exit_code(self) -> ExitCode:
        """The exit code of the signal that was received."""
        return STOPPING[self.received] if self.received is not None else ExitCode.OK


def die_by(number: signal.Signals) -> None:
    """End this process by the signal itself, so that a parent sees a true signal death.

    Whatever must be on disk is there before this is called.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
