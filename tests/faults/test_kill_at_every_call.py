"""SIGKILL before and after every file system call of a save, a first save, a load with quarantine, and a sweep.

python -m pytest tests/faults/test_kill_at_every_call.py
"""

import shutil
import signal

import pytest

from resilient_t5.files import FileSystem
from tests.checkpoint.harness import (
    CountingHook,
    commit,
    die,
    in_child,
    is_exactly,
    leftovers,
    live_names,
    make_manager,
    make_parts,
    valid_updates,
)

pytestmark = pytest.mark.slow


def save_the_next(directory, hook, write):
    """The fourth save, with a victim of retention, a new best and both pointers."""
    manager = make_manager(directory, fs=FileSystem(hook))
    manager.load_newest()
    manager.save(make_parts(4, metric=1.0), best=True)
    write(b"4")


def save_the_first(directory, hook, write):
    """The first save of a run whose directory does not exist yet."""
    make_manager(directory / "new" / "run", fs=FileSystem(hook)).save(make_parts(1), best=True)
    write(b"1")


def recover(directory, hook, write):
    """What a start does: sweep, quarantine the damaged newest one, load the next."""
    manager = make_manager(directory, fs=FileSystem(hook))
    manager.sweep()
    assert manager.load_newest().update == 2
    write(b"2")


def count_moments(action, directory):
    hook = CountingHook()
    action(directory, hook, lambda data: None)
    return len(hook.operations)


def three_committed(directory):
    commit(make_manager(directory), 1, 2, 3)
    (directory / "checkpoints" / ".tmp-0009-1-dead").mkdir()
    (directory / "checkpoints" / ".tmp-0009-1-dead" / "model.safetensors").write_bytes(b"half")
    return directory


def kill_at_each(action, base, scratch, record_property):
    """Yield (moment number, directory, what the child acknowledged) for a kill at every moment of `action`."""
    shutil.copytree(base, scratch / "counted")
    moments = count_moments(action, scratch / "counted")
    for at in range(moments):
        directory = scratch / f"killed-{at}"
        shutil.copytree(base, directory)
        code, acknowledged = in_child(lambda write, d=directory, n=at: action(d, CountingHook(n, die), write))
        assert code == -signal.SIGKILL
        yield at, directory, acknowledged
        shutil.rmtree(directory)
    assert moments > 30
    record_property("trials", moments)


def test_a_kill_at_any_call_of_a_save_leaves_only_whole_checkpoints(scratch, record_property):
    """No live name has a partial checkpoint, no older checkpoint that retention keeps is lost, and the run resumes."""
    base = three_committed(scratch / "base")
    for at, directory, acknowledged in kill_at_each(save_the_next, base, scratch, record_property):
        assert set(valid_updates(directory).values()) >= {3}, f"moment {at}"
        assert len(valid_updates(directory)) >= 2
        manager = make_manager(directory)
        manager.sweep()
        assert leftovers(directory) == []
        loaded = manager.load_newest()
        assert loaded.update == 4 or (loaded.update == 3 and acknowledged == b"")
        assert is_exactly(loaded, loaded.update)
        manager.save(make_parts(5), best=False)
        assert is_exactly(make_manager(directory).load_newest(), 5)


def test_a_kill_at_any_call_of_the_first_save_leaves_a_run_that_can_start(scratch, record_property):
    """There is the first checkpoint or none at all, never an error and never a part."""
    (scratch / "base").mkdir()
    outcomes = set()
    for _, directory, acknowledged in kill_at_each(save_the_first, scratch / "base", scratch, record_property):
        manager = make_manager(directory / "new" / "run")
        manager.sweep()
        loaded = manager.load_newest()
        outcomes.add(loaded is None)
        assert loaded is None or is_exactly(loaded, 1)
        assert acknowledged == b""
        manager.save(make_parts(2), best=False)
        assert is_exactly(make_manager(directory / "new" / "run").load_newest(), 2)
    assert outcomes == {True, False}


@pytest.mark.parametrize("damaged_file", ["model.safetensors", "MANIFEST.json"])
def test_a_kill_at_any_call_of_a_recovery_leaves_a_run_that_recovers(scratch, damaged_file, record_property):
    """Quarantine and sweep may die anywhere: the next start falls back to the same checkpoint."""
    base = three_committed(scratch / "base")
    newest = base / "checkpoints" / live_names(base)[-1] / damaged_file
    newest.write_bytes(newest.read_bytes()[:-1])
    for _, directory, acknowledged in kill_at_each(recover, base, scratch, record_property):
        manager = make_manager(directory)
        manager.sweep()
        assert leftovers(directory) == []
        assert is_exactly(manager.load_newest(), 2)
        assert acknowledged == b""
        assert len(list((directory / "checkpoints" / "quarantine").iterdir())) == 1
