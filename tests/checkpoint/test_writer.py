"""The background writer: what is saved is the state at the request, and training waits for nothing but the copy.

python -m pytest tests/checkpoint/test_writer.py
"""

import errno
import threading
import time
from dataclasses import replace

import pytest
import torch

from resilient_t5.checkpoint.tensors import NonFiniteState
from resilient_t5.checkpoint.writer import Writer
from resilient_t5.errors import StorageError
from resilient_t5.files import FileSystem
from tests.checkpoint.harness import is_exactly, live_names, make_manager, make_parts

PLENTY = 2**40


class SlowDisk(FileSystem):
    """Waits at the first write of a save until `go` is set."""

    def __init__(self):
        super().__init__()
        self.go, self.reached = threading.Event(), threading.Event()

    def write(self, file, data):
        self.reached.set()
        assert self.go.wait(20)
        super().write(file, data)


@pytest.fixture
def slow(scratch):
    """(disk, writer, manager, events) with a writer that is blocked until `disk.go` is set."""
    disk, events = SlowDisk(), []
    manager = make_manager(scratch, fs=disk, events=events)
    writer = Writer(manager, background=True, available_bytes=lambda: PLENTY)
    yield disk, writer, manager, events
    disk.go.set()
    writer.close()


def spoil(parts):
    """What the next update does to the live tensors."""
    for part in parts.tensors.values():
        for tensor in part.values():
            tensor.fill_(3)


def test_what_is_saved_is_the_state_at_the_request(slow, scratch):
    """The training thread changes every tensor while the writer still has not written a byte."""
    disk, writer, _, _ = slow
    parts = make_parts(7)
    assert writer.submit(parts, best=False, must=False)
    assert disk.reached.wait(20)
    spoil(parts)
    disk.go.set()
    assert [item.update for item in writer.drain()] == [7]
    assert is_exactly(make_manager(scratch).load_newest(), 7)


def test_parts_that_are_copies_already_are_written_in_the_background_without_another_copy(scratch):
    """With too little memory for a copy the caller waits, except for parts that do not change any more."""
    disk = SlowDisk()
    writer = Writer(make_manager(scratch, fs=disk), background=True, available_bytes=lambda: 0)
    assert writer.submit(replace(make_parts(7), are_copies=True), best=False, must=False)
    assert writer.busy and disk.reached.wait(20)
    disk.go.set()
    assert [item.update for item in writer.drain()] == [7]
    writer.close()


def test_shared_tensors_are_copied_once_and_stay_shared(slow, scratch):
    """A tied matrix costs its memory once, in the snapshot and in the file."""
    disk, writer, manager, _ = slow
    disk.go.set()
    writer.submit(make_parts(1), best=False, must=False)
    writer.drain()
    assert manager.committed()[0].manifest.shared == {"model": {"shared": "lm_head"}}
    model = make_manager(scratch).load_newest().tensors["model"]
    assert model["shared"].data_ptr() == model["lm_head"].data_ptr()


def test_a_periodic_request_is_dropped_while_a_save_is_in_flight_and_the_others_wait(slow, scratch):
    """One snapshot in memory at a time; a best save is not lost."""
    disk, writer, _, _ = slow
    writer.submit(make_parts(1), best=False, must=False)
    assert not writer.submit(make_parts(2), best=False, must=False)
    threading.Timer(0.1, disk.go.set).start()
    assert writer.submit(make_parts(3, metric=1.0), best=True, must=True)
    assert [item.update for item in writer.drain()] == [1, 3]


def test_the_wait_for_a_slot_ends_when_the_run_must_stop(slow):
    """A second signal is answered although the disk is slow; the request then counts as dropped."""
    _, writer, _, _ = slow
    writer.submit(make_parts(1), best=False, must=False)
    assert not writer.submit(make_parts(2), best=False, must=True, should_stop=lambda: True)
    assert writer.busy


@pytest.mark.parametrize("reason", ["signal", "final", "rollback"])
def test_a_save_that_the_run_ends_on_is_on_disk_when_submit_returns(scratch, reason):
    """No snapshot, no thread to wait for, however much memory there is."""
    writer = Writer(make_manager(scratch), background=True, available_bytes=lambda: PLENTY)
    writer.submit(make_parts(5, reason=reason), best=False, must=True)
    assert is_exactly(make_manager(scratch).load_newest(), 5)
    assert [item.update for item in writer.poll()] == [5]
    writer.close()


@pytest.mark.parametrize("available", [0, int(1.5 * 2**30)])
def test_when_memory_is_short_the_save_is_synchronous_and_makes_no_copy(scratch, monkeypatch, available):
    """It is on disk when submit returns."""
    monkeypatch.setattr("resilient_t5.checkpoint.writer.take_snapshot", lambda tensors: pytest.fail("made a copy"))
    writer = Writer(make_manager(scratch), background=True, available_bytes=lambda: available)
    assert writer.submit(make_parts(5), best=False, must=False)
    assert live_names(scratch) == ["u00000005-0001"]
    writer.close()


def test_the_stall_does_not_depend_on_the_speed_of_the_disk(scratch):
    """With 30 ms per call of a disk that takes seconds per save, submit returns after the copy."""

    def sleep_before(moment, operation, arguments):
        if moment == "before":
            time.sleep(0.03)

    writer = Writer(make_manager(scratch, fs=FileSystem(sleep_before)), background=True, available_bytes=lambda: PLENTY)
    started_s = time.monotonic()
    writer.submit(make_parts(1), best=False, must=False)
    stall_s = time.monotonic() - started_s
    assert writer.busy
    writer.drain()
    assert stall_s < (time.monotonic() - started_s) / 3
    writer.close()


def test_an_exception_of_the_writer_is_raised_once_at_the_next_poll(scratch):
    """Nothing is swallowed, and the writer can be used again."""

    class Broken(FileSystem):
        broken = True

        def rename(self, source, target):
            if self.broken:
                raise OSError(errno.EIO, "injected", str(target))
            super().rename(source, target)

    disk = Broken()
    manager = make_manager(scratch, fs=disk, on_disk_full="stop")
    writer = Writer(manager, background=True, available_bytes=lambda: PLENTY)
    writer.submit(make_parts(1), best=False, must=False)
    with pytest.raises(StorageError, match="EIO"):
        writer.drain()
    assert writer.poll() == []
    disk.broken = False
    writer.submit(make_parts(2), best=False, must=False)
    assert [item.update for item in writer.drain()] == [2]
    writer.close()


def test_an_error_that_nobody_polled_is_raised_by_close(scratch):
    """The last chance to learn of it."""
    writer = Writer(make_manager(scratch), background=True, available_bytes=lambda: PLENTY)
    bad = make_parts(1)
    bad.tensors["model"]["scale"].fill_(float("nan"))
    writer.submit(bad, best=False, must=False)
    with pytest.raises(NonFiniteState):
        writer.close()


@pytest.mark.parametrize("place", [("model", "scale"), ("optimizer", "shared/exp_avg"), ("model", "lm_head")])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_state_that_is_not_finite_is_never_committed(scratch, place, value):
    """One bad element anywhere, regardless of the health fields; the older checkpoint stays."""
    manager = make_manager(scratch)
    manager.save(make_parts(1), best=False)
    bad = make_parts(2)
    bad.tensors[place[0]][place[1]].reshape(-1)[-1] = value
    with pytest.raises(NonFiniteState, match="NaN or infinity") as caught:
        manager.save(bad, best=True)
    assert place[0] in str(caught.value) and caught.value.exit_code == 70
    assert live_names(scratch) == ["u00000001-0001"]
    assert is_exactly(manager.load_newest(), 1)


def test_finite_numbers_whose_sum_overflows_are_committed(scratch):
    """The quick check by sums must not refuse what is finite."""
    huge = {
        "a": torch.full((8,), 3e38),
        "b": torch.full((4,), 60000.0, dtype=torch.float16),
        "c": torch.full((3,), 1.7e308, dtype=torch.float64),
        "d": torch.full((5,), 3e38, dtype=torch.bfloat16),
    }
    parts = replace(make_parts(1), tensors={"model": huge})
    make_manager(scratch).save(parts, best=False)
    assert live_names(scratch) == ["u00000001-0001"]


def test_the_audit_is_called_in_the_thread_of_the_run_only(slow):
    """Log files need no lock; the order is that of the events."""
    disk, writer, manager, _ = slow
    threads = []
    manager._audit = lambda kind, fields: threads.append((kind, threading.get_ident()))
    disk.go.set()
    writer.submit(make_parts(1), best=False, must=False)
    while writer.busy:
        time.sleep(0.005)
    assert threads == []
    writer.poll()
    assert threads == [("save", threading.get_ident())]


def test_the_pointers_never_name_what_is_not_committed(slow, scratch):
    """While the writer is held up there is no pointer; after the commit there is."""
    disk, writer, _, _ = slow
    writer.submit(make_parts(1, metric=1.0), best=True, must=True)
    assert disk.reached.wait(20)
    assert not (scratch / "last.json").exists() and not (scratch / "best.json").exists()
    disk.go.set()
    writer.drain()
    assert (scratch / "last.json").exists() and (scratch / "best.json").exists()


def test_nothing_is_saved_twice_at_one_update(scratch):
    """The final save after a periodic one is no news; a new best and a rollback are saved all the same."""
    manager = make_manager(scratch)
    writer = Writer(manager, background=False)
    for parts, best in (
        (make_parts(3), False),
        (make_parts(3, reason="final"), False),
        (make_parts(3, metric=1.0), True),
        (make_parts(3, metric=1.0), True),
        (make_parts(3, reason="rollback"), False),
    ):
        writer.submit(parts, best=best, must=True)
    assert [item.commit_number for item in writer.drain()] == [1, 2, 3]
    writer.close()
    manager = make_manager(scratch)
    manager.load_newest()
    writer = Writer(manager, background=False)
    writer.submit(make_parts(3, reason="signal"), best=False, must=True)
    assert writer.drain() == [] and len(live_names(scratch)) == 2
    writer.close()


def test_a_signal_save_does_not_wait_for_a_writer_that_waits_for_disk_space(scratch):
    """The waiting save gives up, so that the process can leave within its deadline."""

    class Full(FileSystem):
        def free_bytes(self, path):
            return 0

    events = []
    manager = make_manager(scratch, fs=Full(), events=events, on_disk_full="wait")
    writer = Writer(manager, background=True, available_bytes=lambda: PLENTY)
    writer.submit(make_parts(1), best=False, must=False)
    started_s = time.monotonic()
    writer.submit(make_parts(1, reason="signal"), best=False, must=True, should_stop=lambda: time.monotonic() > started_s + 5)
    assert time.monotonic() - started_s < 2.0
    with pytest.raises(Exception, match="no space"):
        writer.close()
