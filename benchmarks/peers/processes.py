"""Run one side of a comparison in a new process, and measure its time and memory.

The processes are forked from a server that has only imported the libraries. They share no allocations, caches or tuning with
other sides, and the imports run once.
"""

import multiprocessing
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from resilient_t5.training.hardware.machine import MIB, memory_mib

MIN_TIMED_UPDATES = 3
CLEAR_REFS = Path("/proc/self/clear_refs")
PRELOADED = ["torch", "transformers.trainer_seq2seq", "resilient_t5.training.run", "benchmarks.peers.trainers"]


class SideFailed(RuntimeError):
    """A side ended without a result; its traceback was printed before."""


@dataclass(frozen=True)
class OutOfDeviceMemory:
    """Result of a side that does not fit into device memory."""

    message: str


def in_fresh_process(side: Callable[..., Any], *arguments: Any) -> Any:
    """Return `side(*arguments)` of a module-level function from a new process, or `OutOfDeviceMemory`.

    Raises:
        SideFailed: the process died or raised.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, side, arguments))
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
        process.join()
    except EOFError:
        answer = None
        process.join()
    finally:
        process.kill()  # after Ctrl+C or SIGTERM; no effect otherwise
    if process.exitcode != 0 or answer is None:
        raise SideFailed(f"{side.__name__}{arguments} ended with {process.exitcode}")
    return answer


def _answer(sender: Connection, side: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        sender.send(side(*arguments))
    except torch.OutOfMemoryError as error:
        sender.send(OutOfDeviceMemory(str(error).partition("\n")[0]))
    sender.close()


class Meter:
    """Wall clock, CPU seconds and peak memory from `start` to `stop` on a device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.loading_mib = 0.0

    def start(self) -> None:
        """Start the clocks. Memory that is still allocated counts towards the peak."""
        _synchronize(self.device)
        self._wall_s, self._cpu_s = time.perf_counter(), time.process_time()

    def stop(self) -> dict[str, float]:
        """Return the seconds since `start` and the peak since `forget_peak`."""
        _synchronize(self.device)
        figures = {
            "wall_s": time.perf_counter() - self._wall_s,
            "cpu_s": time.process_time() - self._cpu_s,
            "peak_mib": memory_mib(self.device),
            "loading_peak_mib": self.loading_mib,
        }
        if self.device.type == "cuda":
            figures["allocated_peak_mib"] = torch.cuda.max_memory_allocated(self.device) / MIB
        return figures

    def is_late(self, updates: int, time_s: float | None, deadline_s: float | None) -> bool:
        """Whether the timed updates must end: after `time_s` and a few updates, or at the deadline and one update."""
        if updates >= 1 and deadline_s is not None and time.monotonic() > deadline_s:
            return True
        return updates >= MIN_TIMED_UPDATES and time_s is not None and time.perf_counter() - self._wall_s > time_s

    def forget_peak(self) -> None:
        """Record the peak of loading and reset it for training."""
        self.loading_mib = memory_mib(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        if CLEAR_REFS.exists():  # on other systems than Linux the peak includes loading
            CLEAR_REFS.write_text("5", encoding="ascii")  # resets the peak resident size to the current one


def resident_mib(device: torch.device) -> float:
    """Memory in use: allocated by the GPU allocator, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / MIB
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() / MIB


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
