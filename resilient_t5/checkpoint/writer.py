"""The background writer: training pauses only for a copy to host memory, which a thread then writes.

At most one save is in flight and one copy in memory. A periodic save is dropped while another save is in flight; all others
wait for it. Saves before the process exits (signal, final) and rollbacks are synchronous and need no copy. So is every
save when host memory is too small for a copy.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace

from resilient_t5.checkpoint.manager import CheckpointManager
from resilient_t5.checkpoint.manifest import Committed, Parts
from resilient_t5.checkpoint.tensors import snapshot_bytes, take_snapshot
from resilient_t5.errors import DiskFull, StorageError
from resilient_t5.host_memory import available_bytes

SYNCHRONOUS = ("signal", "final", "rollback")
"""Reasons of saves that the caller waits for."""
MEMORY_FACTOR = 1.3
MEMORY_SPARE_BYTES = 1.5 * 2**30
MAX_DROPPED = 7
"""Most periodic saves that are dropped before a failing disk is tried again."""
WAIT_S = 1.0
POLL_S = 0.05


class Writer:
    """Saves through `manager`, in a thread where possible. Call all methods from the thread that created it.

    `checkpoint.on_disk_full` decides how a failed periodic or best save is handled: `continue` logs `save_failed` and
    backs off exponentially; `wait` retries until there is disk space; `stop` raises. A failed signal, final or rollback
    save always raises, except that `wait` retries a final save or a rollback.

    Args:
        manager: no other thread may save or load through it while a save is in flight.
        background: whether to use the thread.
        available_bytes: free host memory.
    """

    def __init__(
        self,
        manager: CheckpointManager,
        *,
        background: bool,
        available_bytes: Callable[[], int] = available_bytes,
    ):
        self._manager, self._background, self._available_bytes = manager, background, available_bytes
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._in_flight: Future[Committed | None] | None = None
        self._finished: list[Committed] = []
        self._errors: list[BaseException] = []
        self._failures = 0
        self._to_drop = 0
        self._last_commit_number = 0
        self._stop_retrying = threading.Event()

    @property
    def busy(self) -> bool:
        """Whether a save is in flight."""
        return self._in_flight is not None and not self._in_flight.done()

    def submit(self, parts: Parts, *, best: bool, must: bool, should_stop: Callable[[], bool] | None = None) -> bool:
        """Save the present values of `parts`; the caller may change the tensors after the return.

        Args:
            parts: the content of the checkpoint.
            best: this is the best model so far.
            must: wait while another save is in flight, instead of dropping this one.
            should_stop: ends the wait for the save in flight or for disk space.

        Returns:
            False if the request was dropped.
        """
        if parts.reason == "signal":
            self.hurry()
        if not must and (self.busy or self._backs_off()):
            return False
        if not self._wait_for_slot(should_stop):
            return False
        self._collect()
        self._stop_retrying.clear()
        newest = self._manager.newest
        self._last_commit_number = newest.commit_number if newest else 0
        synchronous = parts.reason in SYNCHRONOUS or not self._fits_in_memory(parts)
        if not synchronous and not parts.are_copies:
            parts = replace(parts, tensors=take_snapshot(parts.tensors))
        self._in_flight = self._executor.submit(self._save, parts, best, should_stop)
        if synchronous:  # the thread reads the caller's own tensors, so the caller waits for it
            self._wait_for_slot(None)
        return True

    def poll(self) -> list[Committed]:
        """Checkpoints committed since the last poll.

        Raises:
            Exception: the error of a save since the last poll, once.
        """
        self._collect()
        self._manager.emit_pending()
        if self._errors:
            raise self._errors.pop(0)
        finished, self._finished = self._finished, []
        return finished

    def drain(self) -> list[Committed]:
        """Wait until no save is in flight; then `poll`."""
        self._wait_for_slot(None)
        return self.poll()

    def hurry(self) -> None:
        """Abort a save that waits for disk space; one that is being written continues."""
        self._stop_retrying.set()

    def close(self) -> None:
        """Finish the save in flight without waiting for disk space, end the thread, and raise any pending error."""
        self.hurry()
        self._executor.shutdown(wait=True)
        self.poll()

    def _backs_off(self) -> bool:
        self._collect()
        self._to_drop -= 1
        return self._to_drop >= 0

    def _fits_in_memory(self, parts: Parts) -> bool:
        if not self._background or parts.are_copies:
            return self._background
        return self._available_bytes() >= MEMORY_FACTOR * snapshot_bytes(parts.tensors) + MEMORY_SPARE_BYTES

    def _wait_for_slot(self, should_stop: Callable[[], bool] | None) -> bool:
        while self._in_flight is not None and not self._in_flight.done():
            if should_stop is not None and should_stop():
                return False
            wait([self._in_flight], timeout=POLL_S)
        return True

    def _collect(self) -> None:
        if self._in_flight is None or not self._in_flight.done():
            return
        error, future = self._in_flight.exception(), self._in_flight
        self._in_flight = None
        if error is not None:
            self._errors.append(error)
            return
        committed = future.result()
        if committed is None:
            self._failures += 1
            self._to_drop = min(2 ** (self._failures - 1) - 1, MAX_DROPPED)
        else:
            self._failures = self._to_drop = 0
            if committed.commit_number > self._last_commit_number:  # not if the update had been saved before
                self._last_commit_number = committed.commit_number
                self._finished.append(committed)

    def _save(self, parts: Parts, best: bool, should_stop: Callable[[], bool] | None) -> Committed | None:
        policy, logged = self._manager.settings.on_disk_full, False
        while True:
            try:
                return self._manager.save(parts, best=best)
            except (DiskFull, StorageError) as error:
                waits = policy == "wait" and isinstance(error, DiskFull) and parts.reason != "signal"
                if not waits and (policy == "stop" or parts.reason in SYNCHRONOUS):
                    raise
                if not logged:
                    self._manager.emit("save_failed", update=parts.update, reason=parts.reason, error=str(error), waits=waits)
                    logged = True
                if not waits or not self._wait_before_retry(should_stop):
                    if parts.reason in SYNCHRONOUS:
                        raise
                    return None

    def _wait_before_retry(self, should_stop: Callable[[], bool] | None) -> bool:
        """Wait WAIT_S; return False when the save must not be tried again."""
        until_s = time.monotonic() + WAIT_S
        while time.monotonic() < until_s:
            if self._stop_retrying.is_set() or (should_stop is not None and should_stop()):
                return False
            time.sleep(POLL_S)
        return True
