"""Signals and the STOP file: handlers set flags, the loop polls them.

A handler does no I/O. It records the first stopping signal; the running code polls `requested`. Only a second SIGINT exits
at once, which is safe because saves survive even SIGKILL. After SIGTERM or SIGHUP a thread watches the deadline, because
SIGKILL will follow. During corpus preparation the progress callback polls.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Literal

from resilient_t5.errors import ExitCode

STOPPING = {
    signal.SIGINT: ExitCode.INTERRUPTED,
    signal.SIGTERM: ExitCode.TERMINATED,
    signal.SIGHUP: ExitCode.HANGUP,
}
HURRIED = (signal.SIGTERM, signal.SIGHUP)
STOP_FILE_POLL_S = 1.0
DEADLINE_S = 25.0
"""Less than the 30 s that SLURM and Kubernetes wait between SIGTERM and SIGKILL."""
WATCH_S = 0.25

Handler = Callable[[int, FrameType | None], object] | int | None


class Stopped(Exception):
    """A stop request in work without state to save, such as preparing a corpus."""


class StopSignal:
    """Context manager that handles the stopping signals, SIGUSR1 (save) and SIGUSR2 (print stacks, write status.json).

    It has no effect outside the main thread, and leaves ignored signals (nohup) ignored. On exit it restores the handlers.

    Args:
        run_directory: a file STOP in it counts as a Ctrl+C.
        deadline_s: seconds after SIGTERM or SIGHUP at which the process exits unconditionally.
        on_usr1: effect of SIGUSR1: `save` and continue, or `requeue`: save and exit with 75.
    """

    def __init__(
        self,
        run_directory: Path | None = None,
        *,
        deadline_s: float = DEADLINE_S,
        on_usr1: Literal["save", "requeue"] = "save",
    ):
        self.stop_file = None if run_directory is None else run_directory / "STOP"
        self.received: signal.Signals | None = None
        self.count = 0
        """Stopping signals received so far."""
        self.save_requested = False
        self.status_requested = False
        self._deadline_s, self._on_usr1 = deadline_s, on_usr1
        self._leave_at_s: float | None = None
        self._interrupts = 0
        self._file_polled_at_s = float("-inf")
        self._former: dict[signal.Signals, Handler] = {}
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._watch_deadline, name="deadline", daemon=True)

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (*STOPPING, signal.SIGUSR1, signal.SIGUSR2):
            former = signal.getsignal(number)
            if former is not signal.SIG_IGN:
                self._former[number] = former
                signal.signal(number, self._note)
        if signal.SIGUSR2 in self._former and sys.__stderr__ is not None:
            with contextlib.suppress(OSError, ValueError):  # stderr without a file descriptor
                faulthandler.register(signal.SIGUSR2, file=sys.__stderr__, all_threads=True, chain=True)
        self._watch.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        faulthandler.unregister(signal.SIGUSR2)
        for number, former in self._former.items():
            signal.signal(number, former)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR2:
            self.status_requested = True
            return
        if number == signal.SIGUSR1 and self._on_usr1 == "save":
            self.save_requested = True
            return
        self.count += 1
        if self.received is None:
            self.received = signal.Signals(number)
        if number in HURRIED and self._leave_at_s is None:
            self._leave_at_s = time.monotonic() + self._deadline_s
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                os._exit(ExitCode.INTERRUPTED)

    def _watch_deadline(self) -> None:
        while not self._ended.wait(WATCH_S):
            if self.left_s <= 0.0:
                os._exit(self.exit_code)

    def adopt(self, number: int, left_s: float) -> None:
        """Adopt a stop request that another rank received, with its remaining seconds."""
        self.received = signal.Signals(number)
        if self._leave_at_s is None and left_s < float("inf"):
            self._leave_at_s = time.monotonic() + left_s

    @property
    def requested(self) -> bool:
        """Whether the run was asked to stop, by a signal or the STOP file, which is polled at most once a second."""
        now_s = time.monotonic()
        if self.received is None and self.stop_file is not None and now_s - self._file_polled_at_s >= STOP_FILE_POLL_S:
            self._file_polled_at_s = now_s
            if self.stop_file.exists():
                self.received = signal.SIGINT
        return self.received is not None

    @property
    def left_s(self) -> float:
        """Seconds until the process must exit; infinite without a deadline."""
        return float("inf") if self._leave_at_s is None else self._leave_at_s - time.monotonic()

    @property
    def exit_code(self) -> ExitCode:
        """Exit code of the received signal; 75 for a requeue."""
        if self.received is None:
            return ExitCode.OK
        return STOPPING.get(self.received, ExitCode.RESUMABLE)


def die_by(number: signal.Signals) -> None:
    """End this process by the signal itself, so that the parent sees a signal death. Save everything before."""
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


PROGRESS_EVERY_S = 5.0


def progress_callback(stop: StopSignal, write_line: Callable[[str], None]) -> Callable[[int, int], None]:
    """Return a callback for `prepare` that prints the progress every PROGRESS_EVERY_S and checks for a stop request.

    Raises (the callback):
        Stopped: the process was asked to stop.
    """
    printed_s = time.monotonic()

    def on_progress(done_bytes: int, total_bytes: int) -> None:
        nonlocal printed_s
        if stop.requested:
            raise Stopped
        if time.monotonic() - printed_s < PROGRESS_EVERY_S:
            return
        printed_s = time.monotonic()
        if done_bytes == total_bytes == 0:
            write_line("prepare waits for another process that builds the same store")
        elif done_bytes == 0:
            write_line("prepare trains the tokenizer on a sample of the text")
        elif total_bytes == 0:
            write_line(f"prepare {done_bytes / 1e6:.1f} MB of the built-in corpus")
        else:
            write_line(f"prepare {100 * done_bytes / total_bytes:5.1f}% of {total_bytes / 1e6:.1f} MB")

    return on_progress
