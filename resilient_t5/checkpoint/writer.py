"""The background writer: training stands still only for a copy to host memory, then a thread writes it.

One save is in flight and one copy in memory at a time. A periodic save that finds the writer busy is dropped, as the next
one is near; the others wait. Saves that the process is about to end on (signal, final), and rollbacks, are written by the
caller at once: nobody would gain from a copy. So is every save when memory is too short for one.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace

from resilient_t5.checkpoint.manager import CheckpointManager
from resilient_t5.checkpoint.manifest import Committed, Parts
from resilient_t5.checkpoint.snapshot import snapshot_bytes, take_snapshot
from resilient_t5.errors import DiskFull, StorageError
from resilient_t5.host_memory import available_bytes

ENDING = ("signal", "final", "rollback")
"""Reasons of saves that the caller cannot go on without."""
MEMORY_FACTOR = 1.3
MEMORY_SPARE_BYTES = 1.5 * 2**30
MAX_DROPPED = 7
"""Periodic requests that are dropped, at most, before a failing disk is tried again."""
WAIT_S = 1.0
POLL_S = 0.05


class Writer:
    """Saves through `vault`, in a thread where that helps. All methods belong to the thread that made it.

    `vault.settings.on_disk_full` decides what a periodic or best save does that the disk refuses: `continue` tells
    `save_failed` and goes on, with fewer tries the longer it lasts; `wait` tries again until there is room; `stop` raises.
    A signal, final or rollback save that the disk refuses always raises, `wait` waits for all but a signal.

    Args:
        vault: where to save; nobody else may save or load while a save is in flight.
        background: use a thread at all.
        available_bytes: free host memory; None counts as too little.
    """

    def __init__(
        self,
        manager: CheckpointManager,
        *,
        background: bool,
        available_bytes: Callable[[], int | None] = available_bytes,
    ):
        self._manager, self._background, self._available_bytes = manager, background, available_bytes
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._in_flight: Future[Committed | None] | None = None
        self._finished: list[Committed] = []
        self._errors: list[BaseException] = []
        self._failures = 0
        self._to_drop = 0
        self._last_q = 0
        self._give_up = threading.Event()

    @property
    def busy(self) -> bool:
        """Whether a save is in flight."""
        return self._in_flight is not None and not self._in_flight.done()

    def submit(self, parts: Parts, *, best: bool, must: bool, should_stop: Callable[[], bool] | None = None) -> bool:
        """Save `parts` as they are now; the caller may change the tensors after the return.

        Args:
            parts: what to save.
            best: this is the best model so far.
            must: wait while another save is in flight; otherwise the request is dropped then.
            should_stop: ends the waiting, for a slot or for room on the disk.

        Returns:
            False when the request was dropped.
        """
        if parts.reason == "signal":
            self.hurry()
        if not must and (self.busy or self._backs_off()):
            return False
        if not self._wait_for_slot(should_stop):
            return False
        self._collect()
        self._give_up.clear()
        newest = self._manager.newest
        self._last_q = newest.q if newest else 0
        at_once = parts.reason in ENDING or not self._has_room_for(parts)
        if not at_once and not parts.are_copies:
            parts = replace(parts, tensors=take_snapshot(parts.tensors))
        self._in_flight = self._executor.submit(self._save, parts, best, should_stop)
        if at_once:  # the thread reads the caller's own tensors, so the caller stays here until it is done
            self._wait_for_slot(None)
        return True

    def poll(self) -> list[Committed]:
        """Checkpoints committed since the last poll.

        Raises:
            Exception: what a save raised since the last poll, once.
        """
        self._collect()
        self._manager.emit_pending()
        if self._errors:
            raise self._errors.pop(0)
        finished, self._finished = self._finished, []
        return finished

    def drain(self, poll_s: float = POLL_S, should_stop: Callable[[], bool] | None = None) -> list[Committed]:
        """Wait until nothing is in flight, or until `should_stop`; then `poll`."""
        self._wait_for_slot(should_stop, poll_s)
        return self.poll()

    def hurry(self) -> None:
        """A save that waits for room on the disk gives up; one that is being written goes on."""
        self._give_up.set()

    def close(self) -> None:
        """Let the save in flight end, stop waiting for room, and end the thread; raises what no poll has raised yet."""
        self.hurry()
        self._executor.shutdown(wait=True)
        self.poll()

    def _backs_off(self) -> bool:
        self._collect()
        self._to_drop -= 1
        return self._to_drop >= 0

    def _has_room_for(self, parts: Parts) -> bool:
        if not self._background or parts.are_copies:
            return self._background
        available = self._available_bytes()
        need = MEMORY_FACTOR * snapshot_bytes(parts.tensors) + MEMORY_SPARE_BYTES
        return available is not None and available >= need

    def _wait_for_slot(self, should_stop: Callable[[], bool] | None, poll_s: float = POLL_S) -> bool:
        while self._in_flight is not None and not self._in_flight.done():
            if should_stop is not None and should_stop():
                return False
            wait([self._in_flight], timeout=poll_s)
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
            if committed.q > self._last_q:  # a save that found its update saved already is no news
                self._last_q = committed.q
                self._finished.append(committed)

    def _save(self, parts: Parts, best: bool, should_stop: Callable[[], bool] | None) -> Committed | None:
        policy, told = self._manager.settings.on_disk_full, False
        while True:
            try:
                return self._manager.save(parts, best=best)
            except (DiskFull, StorageError) as error:
                waits = policy == "wait" and isinstance(error, DiskFull) and parts.reason != "signal"
                if not waits and (policy == "stop" or parts.reason in ENDING):
                    raise
                if not told:
                    self._manager.emit("save_failed", update=parts.update, reason=parts.reason, error=str(error), waits=waits)
                    told = True
                if not waits or not self._wait_for_room(should_stop):
                    if parts.reason in ENDING:
                        raise
                    return None

    def _wait_for_room(self, should_stop: Callable[[], bool] | None) -> bool:
        """Wait a little; False when the waiting has to end."""
        until_s = time.monotonic() + WAIT_S
        while time.monotonic() < until_s:
            if self._give_up.is_set() or (should_stop is not None and should_stop()):
                return False
            time.sleep(POLL_S)
        return True
