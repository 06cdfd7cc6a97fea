"""Every error number at every file system call of a save and of a start, once and from then on.

python -m pytest tests/faults/test_disk_errors.py
"""

import errno
import os
import resource
import shutil
from pathlib import Path

import pytest

from resilient_t5.checkpoint.writer import Writer
from resilient_t5.errors import DiskFull, NoValidCheckpoint, StorageError
from resilient_t5.files import FileSystem
from tests.checkpoint.harness import CountingHook, commit, in_child, is_exactly, make_manager, make_parts, valid_updates

pytestmark = pytest.mark.slow

CODES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)


class FailingHook(CountingHook):
    """Raises OSError(code) before call number `at`, or before that and every later one."""

    def __init__(self, at, code, goes_on=False):
        super().__init__(moments=("before",))
        self.fail_at, self.code, self.goes_on = at, code, goes_on

    def __call__(self, moment, operation, arguments):
        super().__call__(moment, operation, arguments)
        number = len(self.operations) - 1
        if moment != "before" or self.fail_at is None or operation == "close":
            return  # a close that is not made would leave a descriptor; it has a test of its own
        if number == self.fail_at or (self.goes_on and number > self.fail_at):
            raise OSError(self.code, os.strerror(self.code))


@pytest.fixture
def base(scratch):
    """A run with three commits, two of them on disk."""
    commit(make_manager(scratch / "base"), 1, 2, 3)
    return scratch / "base"


def saving_with(directory, hook):
    """A manager that resumed from the newest checkpoint; the hook is active only afterwards."""
    fs = FileSystem()
    manager = make_manager(directory, fs=fs, events=[])
    manager.load_newest()
    fs._hook = hook
    return manager, fs


def count_calls(base, work):
    shutil.copytree(base, work)
    hook = FailingHook(None, 0)
    saving_with(work, hook)[0].save(make_parts(4, metric=1.0), best=True)
    shutil.rmtree(work)
    return hook.operations


@pytest.mark.parametrize("goes_on", [False, True], ids=["once", "for good"])
def test_no_error_at_any_call_of_a_save_harms_what_is_saved(base, scratch, goes_on, record_property):
    """The save raises an error that names the errno, or has committed; older ones are whole; a later save works."""
    calls, refused, committed = count_calls(base, scratch / "work"), 0, 0
    for at, (_, operation) in enumerate(calls):
        for code in CODES:
            directory = scratch / "run"
            shutil.copytree(base, directory)
            manager, fs = saving_with(directory, FailingHook(at, code, goes_on))
            try:
                saved = manager.save(make_parts(4, metric=1.0), best=True)
                committed += 1
                assert valid_updates(directory)[saved.commit_number] == 4
            except (DiskFull, StorageError) as error:
                refused += 1
                assert errno.errorcode[code] in str(error), operation
                assert isinstance(error, DiskFull) == (code in (errno.ENOSPC, errno.EDQUOT))
                assert 4 not in valid_updates(directory).values() or goes_on
            assert 3 in valid_updates(directory).values(), f"{operation} {errno.errorcode[code]}"
            assert len(valid_updates(directory)) >= 2
            fs._hook = None
            assert manager.save(make_parts(5), best=False).update == 5
            assert is_exactly(make_manager(directory).load_newest(), 5)
            shutil.rmtree(directory)
    assert refused > 80
    assert committed > 40
    record_property("trials", refused + committed)


def test_no_error_at_any_call_of_a_start_deletes_anything(base, scratch, record_property):
    """A start loads a checkpoint or raises a clear error; an unreadable checkpoint is moved to quarantine at most."""
    shutil.copytree(base, scratch / "work")
    counted = FailingHook(None, 0)
    make_manager(scratch / "work", fs=FileSystem(counted)).load_newest()
    codes = (*CODES, errno.EACCES, errno.EMFILE)
    for at in range(len(counted.operations)):
        for code in codes:
            directory = scratch / "run"
            shutil.copytree(base, directory)
            try:
                loaded = make_manager(directory, fs=FileSystem(FailingHook(at, code))).load_newest()
                assert is_exactly(loaded, loaded.update)
            except (DiskFull, StorageError) as error:
                assert errno.errorcode[code] in str(error)
            except NoValidCheckpoint as error:
                raise AssertionError("one error made a run unusable") from error
            assert len(list(directory.rglob("MANIFEST.json"))) == 2
            if code in (errno.EACCES, errno.EMFILE, errno.EROFS, errno.ENOSPC):
                assert not (directory / "checkpoints" / "quarantine").exists(), "an innocent checkpoint was condemned"
            shutil.rmtree(directory)
    record_property("trials", len(counted.operations) * len(codes))


def test_an_error_leaves_no_descriptor_open(base):
    """A disk that fails for hours must not use up the descriptors of the process."""
    manager, fs = saving_with(base, None)
    before = len(os.listdir("/proc/self/fd"))
    for at in range(40):
        fs._hook = FailingHook(at, errno.EIO)
        try:
            manager.save(make_parts(100 + at), best=False)
        except StorageError:
            continue
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_real_limit_of_the_file_size_is_named_and_survived(base):
    """The kernel itself refuses: EFBIG from a write, not from a hook."""

    def save(write):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        manager = make_manager(base)
        try:
            manager.save(make_parts(4), best=False)
        except StorageError as error:
            write(str(error).encode())
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        manager.save(make_parts(5), best=False)

    code, message = in_child(save)
    assert code == 0
    assert b"EFBIG" in message
    assert set(valid_updates(base).values()) >= {3, 5}


@pytest.mark.parametrize("operation", ["fsync", "fsync_directory", "close"])
def test_a_failed_fsync_is_never_repeated_on_the_same_file(base, operation):
    """The kernel reports an error once; the save is written again from memory under a new temporary."""

    paths = []

    def fail_once(moment, name, arguments):
        path = Path(getattr(arguments[0], "path", arguments[0]))
        if moment == "before" and name == operation and ".tmp-" in str(path):
            paths.append(path)
            if len(paths) == 1:
                raise OSError(errno.EIO, "injected", str(path))

    manager = make_manager(base, fs=FileSystem(fail_once))
    with pytest.raises(StorageError, match="EIO"):
        manager.save(make_parts(4), best=False)
    manager.save(make_parts(4), best=False)
    tries = [path for path in paths if path == paths[0]]
    assert len(tries) <= (2 if operation == "close" else 1)
    assert is_exactly(make_manager(base).load_newest(), 4)


def run_writer(base, policy, reason, hook, **options):
    fs = FileSystem()
    events = []
    manager = make_manager(base, fs=fs, events=events, on_disk_full=policy)
    manager.load_newest()
    fs._hook = hook
    writer = Writer(manager, background=False)
    writer.submit(make_parts(4, reason=reason), best=False, must=True, **options)
    return writer, fs, events


@pytest.mark.parametrize("code", CODES)
def test_the_policy_continue_logs_and_continues(base, code):
    """A periodic save that fails does not end the run; the next one is on disk."""
    writer, fs, events = run_writer(base, "continue", "periodic", FailingHook(0, code, goes_on=True))
    assert writer.poll() == []
    failures = [fields for kind, fields in events if kind == "save_failed"]
    assert len(failures) == 1 and errno.errorcode[code] in failures[0]["error"]
    fs._hook = None
    assert writer.submit(make_parts(5), best=False, must=False)
    assert [item.update for item in writer.poll()] == [5]


def test_a_disk_that_stays_full_is_tried_less_and_less(base):
    """The pause between two tries grows to eight requests and stays there; the first success ends it."""
    writer, fs, _ = run_writer(base, "continue", "periodic", FailingHook(0, errno.ENOSPC, goes_on=True))
    tried = [update for update in range(5, 45) if writer.submit(make_parts(update), best=False, must=False)]
    assert tried == [5, 7, 11, 19, 27, 35, 43]
    fs._hook = None
    assert [u for u in range(45, 60) if writer.submit(make_parts(u), best=False, must=False)] == [51, *range(52, 60)]


@pytest.mark.parametrize("reason", ["signal", "final", "rollback"])
def test_a_save_that_the_run_ends_on_is_never_given_up_in_silence(base, reason):
    """Even the policy `continue` raises: the caller must not report a state as saved."""
    writer, _, _ = run_writer(base, "continue", reason, FailingHook(0, errno.ENOSPC, goes_on=True))
    with pytest.raises(DiskFull, match="ENOSPC"):
        writer.poll()
    writer.close()


def test_the_policy_stop_raises(base):
    """Exit 73 is the caller's business; the error carries it."""
    writer, _, _ = run_writer(base, "stop", "periodic", FailingHook(0, errno.ENOSPC, goes_on=True))
    with pytest.raises(DiskFull) as caught:
        writer.drain()
    assert caught.value.exit_code == 73


def test_the_policy_wait_saves_as_soon_as_there_is_room(base, monkeypatch):
    """The wait asks again and again, and ends with the save."""
    monkeypatch.setattr("resilient_t5.checkpoint.writer.WAIT_S", 0.06)

    class FullForAWhile(FailingHook):
        def __call__(self, moment, operation, arguments):
            if len(self.operations) == 6:
                self.fail_at = None
            super().__call__(moment, operation, arguments)

    writer, _, events = run_writer(base, "wait", "periodic", FullForAWhile(0, errno.ENOSPC, goes_on=True))
    assert [item.update for item in writer.poll()] == [4]
    assert [kind for kind, _ in events].count("save_failed") == 1
    writer.close()


def test_the_wait_for_room_ends_when_the_run_must_stop(base):
    """A signal is answered while the disk is full."""
    polls = []
    writer, _, _ = run_writer(
        base,
        "wait",
        "periodic",
        FailingHook(0, errno.ENOSPC, goes_on=True),
        should_stop=lambda: polls.append(1) or len(polls) > 3,
    )
    assert writer.poll() == []
    assert len(polls) == 4


def test_too_little_room_is_seen_before_the_first_byte(base):
    """Nothing is written, nothing is deleted, and the message has both figures."""

    class Small(FileSystem):
        def free_bytes(self, path):
            return 10

    before = sorted(base.rglob("*"))
    with pytest.raises(DiskFull, match="MiB are needed"):
        make_manager(base, fs=Small()).save(make_parts(4), best=False)
    assert sorted(base.rglob("*")) == before


def test_room_is_made_from_what_may_go_and_only_when_it_is_enough(scratch):
    """Half-deleted remains and the surplus above two go; the two newest and the best never do."""
    manager = make_manager(scratch, keep_last=5)
    for update in range(1, 6):
        manager.save(make_parts(update, metric=1.0), best=update == 2)
    size = manager.committed()[0].manifest.bytes

    class Small(FileSystem):
        room = 0

        def free_bytes(self, path):
            return self.room + size * (5 - len(list((scratch / "checkpoints").glob("u*"))))

    fs = Small()
    manager = make_manager(scratch, keep_last=5, fs=fs)
    with pytest.raises(DiskFull):
        fs.room = -size
        manager.save(make_parts(6), best=False)
    assert len(manager.committed()) == 5
    fs.room = 0
    manager.save(make_parts(6), best=False)
    assert [item.manifest.update for item in manager.committed()] == [6, 5, 4, 2]
