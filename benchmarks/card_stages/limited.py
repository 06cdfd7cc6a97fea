"""Run a function in a new process with a time limit; its output goes to a log file.

The processes are forked from the server of `peers/processes.py`. Each leads a process group, so that a limit also ends what it
has started.
"""

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.processes import PRELOADED

POLL_S = 0.2


@dataclass(frozen=True)
class Outcome:
    """What became of a function: its value, or the reason why there is none."""

    value: Any = None
    reason: str = ""
    out_of_memory: bool = False

    @property
    def done(self) -> bool:
        """Whether the function returned."""
        return not self.reason


class Child:
    """A function that runs in a new process. Leaving the context kills it."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...], log: Path):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=_run, args=(sender, str(log), function, arguments))
        self.process.start()
        sender.close()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """End the process and everything that it has started, at once."""
        if self.process.pid is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()

    def wait(self, limit_s: float) -> Outcome:
        """Wait for the value, at most `limit_s` seconds."""
        end_s = time.monotonic() + limit_s
        while not self._receiver.poll(POLL_S):
            if time.monotonic() > end_s:
                self.kill()
                return Outcome(reason=f"ended after its time limit of {limit_s:.0f} s")
        try:
            outcome: Outcome = self._receiver.recv()
        except EOFError:
            self.process.join()
            return Outcome(reason=f"its process ended with {self.process.exitcode}; see the log")
        return outcome


def kill_all() -> None:
    """End every process that is still running, for instance after a signal during its start."""
    for process in multiprocessing.active_children():
        if process.pid is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()


def run_limited(function: Callable[..., Any], arguments: tuple[Any, ...], limit_s: float, log: Path) -> Outcome:
    """Return the outcome of `function(*arguments)`, a function of a module, in a new process."""
    with Child(function, arguments, log) as child:
        return child.wait(limit_s)


def _run(sender: Connection, log: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.setpgid(0, 0)  # no signal of the terminal reaches it
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        outcome = Outcome(function(*arguments))
    except torch.OutOfMemoryError as error:
        outcome = Outcome(reason=f"does not fit: {_first_line(error)}", out_of_memory=True)
    except SystemExit as error:
        outcome = Outcome(reason=f"ended: {error.code}")
    except Exception as error:  # noqa: BLE001  # one measurement must not end the others
        traceback.print_exc()
        outcome = Outcome(reason=f"{type(error).__name__}: {_first_line(error)}")
    sender.send(outcome)
    sender.close()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300]
