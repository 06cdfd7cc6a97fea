"""Make a directory whole or not at all: one maker at a time, a temporary name, fsync, one rename to an empty place.

The lock is a file `.NAME.lock` beside the directory, held by flock and removed with the work, so it dies with its
process. Whoever holds it knows that every `.NAME.making-*` beside it belongs to a maker that was killed, and removes it.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from resilient_t5.errors import DiskFull, StorageError

LOCK_POLL_S = 0.2


@contextlib.contextmanager
def storage_errors(where: Path) -> Iterator[None]:
    """Turn an OSError of the body into DiskFull or StorageError with its place."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            mend = "Make room, or name a directory on another disk; nothing half made was left."
            raise DiskFull("there is no room for the prepared corpus", where=str(where), mend=mend) from error
        raise StorageError(f"cannot write: {error.strerror or error}", where=str(error.filename or where)) from error


@contextlib.contextmanager
def only_maker(directory: Path, poll: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of `directory`; while another process holds it, wait and call `poll`, which may raise."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    path = directory.parent / f".{directory.name}.lock"
    while (lock := _take(path)) is None:
        poll()
        time.sleep(LOCK_POLL_S)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held, so that nobody takes a lock that has no name
        os.close(lock)


@contextlib.contextmanager
def making(directory: Path) -> Iterator[Path]:
    """A temporary directory that becomes `directory` when the body ends, and vanishes when it raises.

    Call it under `only_maker`. `directory` must not exist, or be empty: a rename never replaces anything.
    """
    prefix = f".{directory.name}.making-"
    for dead in directory.parent.glob(f"{prefix}*"):
        shutil.rmtree(dead)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=directory.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        for folder, _, names in os.walk(temporary, topdown=False):
            for name in names:
                _fsync(Path(folder, name))
            _fsync(Path(folder))
        temporary.rename(directory)
        _fsync(directory.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _take(path: Path) -> int | None:
    """The descriptor of the held lock; None while another process holds it."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The holder before us may have removed the name between our open and our lock.
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except BlockingIOError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
