"""Every durable write: the calls of the checkpoint layer, one method each, and directories made whole or not at all.

`FileSystem` is the seam at which faults are injected. A method is one call (or one short loop of the same call), so a hook
that runs before and after each method sees every moment at which a process can be killed, a disk can refuse, or the power
can fail. Nothing in it decides anything.

`making` fills a directory under a temporary name, fsyncs it and renames it once, to an empty place. The lock of
`only_maker` is a file `.NAME.lock` beside the directory, held by flock and removed with the work, so it dies with its
process. Whoever holds it knows that every `.NAME.making-*` beside it belongs to a maker that was killed, and removes it.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from resilient_t5.errors import DiskFull, StorageError

Result = TypeVar("Result")
Hook = Callable[[str, str, tuple[Any, ...]], None]
"""Called as hook(moment, operation, arguments), moment being "before" or "after"; what it raises passes through."""

# A directory that cannot be fsynced at all (some network file systems) is no failure of this save.
DIRECTORY_FSYNC_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP)
FALLOCATE_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


@dataclass(frozen=True)
class OpenFile:
    """A descriptor with the path it was opened under; `size` is the size at opening, in bytes."""

    path: Path
    descriptor: int
    size: int


class FileSystem:
    """The calls of a save, a load and a deletion. All raise OSError with `filename` set and the call in its notes."""

    def __init__(self, hook: Hook | None = None):
        self._hook = hook

    def _call(self, operation: str, function: Callable[..., Result], *arguments: Any) -> Result:
        try:
            if self._hook is not None:
                self._hook("before", operation, arguments)
            result = function(*arguments)
            if self._hook is not None:
                self._hook("after", operation, arguments)
        except OSError as error:
            subject = arguments[0]
            if error.filename is None:
                error.filename = os.fspath(subject.path if isinstance(subject, OpenFile) else subject)
            error.add_note(operation)
            raise
        return result

    # Writing

    def make_directory(self, path: Path) -> None:
        """Create one directory that must not exist."""
        self._call("make_directory", os.mkdir, path)

    def open_new(self, path: Path) -> OpenFile:
        """Open a file for writing that must not exist."""
        return self._call("open_new", _open_new, path)

    def allocate(self, file: OpenFile, size: int) -> None:
        """Reserve `size` bytes, so that a full disk shows before the first byte; skipped where unsupported."""
        self._call("allocate", _allocate, file, size)

    def write(self, file: OpenFile, data: memoryview) -> None:
        """Append all of `data`."""
        self._call("write", _write, file, data)

    def fsync(self, file: OpenFile) -> None:
        """Make the content of a file durable. An error is final: a second fsync would return 0 and prove nothing."""
        self._call("fsync", _fsync, file)

    def close(self, file: OpenFile) -> None:
        """Close a file; a network file system reports some write errors only here."""
        self._call("close", _close, file)

    def fsync_directory(self, path: Path) -> None:
        """Make the entries of a directory durable."""
        self._call("fsync_directory", _fsync_directory, path)

    def rename(self, source: Path, target: Path) -> None:
        """Rename a directory to a name that does not exist."""
        self._call("rename", os.rename, source, target)

    def replace(self, source: Path, target: Path) -> None:
        """Put a file in the place of another one, atomically."""
        self._call("replace", os.replace, source, target)

    def unlink(self, path: Path) -> None:
        """Remove a file, or a symbolic link itself."""
        self._call("unlink", os.unlink, path)

    def remove_directory(self, path: Path) -> None:
        """Remove an empty directory."""
        self._call("remove_directory", os.rmdir, path)

    # Reading

    def names(self, path: Path) -> list[str]:
        """Names in a directory, sorted; empty when the directory does not exist."""
        return self._call("list", _names, path)

    def is_directory(self, path: Path) -> bool:
        """Whether `path` is a directory, and not a symbolic link to one."""
        return self._call("is_directory", _is_directory, path)

    def file_size(self, path: Path) -> int:
        """Size in bytes of a regular file; a symbolic link is refused with ELOOP."""
        return self._call("file_size", _file_size, path)

    def open_old(self, path: Path) -> OpenFile:
        """Open a regular file for reading; a symbolic link is refused with ELOOP, anything else with EINVAL."""
        return self._call("open_old", _open_old, path)

    def read(self, file: OpenFile, buffer: memoryview) -> int:
        """Fill `buffer` from the file; returns the bytes read, fewer only at the end of the file."""
        return self._call("read", _read, file, buffer)

    def free_bytes(self, path: Path) -> int:
        """Bytes that an unprivileged process may still write on the file system of `path`."""
        return self._call("free_bytes", _free_bytes, path)


@contextmanager
def closing(fs: FileSystem, file: OpenFile) -> Iterator[OpenFile]:
    """Close `file` at the end; an error of the close itself counts, unless an earlier one is on its way."""
    try:
        yield file
    except BaseException:
        with suppress(OSError):  # the first error is the one that tells what happened
            fs.close(file)
        raise
    fs.close(file)


def make_directories(fs: FileSystem, path: Path) -> None:
    """Create `path` and what is missing above it, each one durable in its parent before anything is put into it."""
    if fs.is_directory(path) or path.is_dir():
        return
    make_directories(fs, path.parent)
    try:
        fs.make_directory(path)
    except FileExistsError:  # another starter was faster; its fsync may not have happened yet
        if not path.is_dir():
            raise
    fs.fsync_directory(path.parent)


def remove_tree(fs: FileSystem, path: Path) -> None:
    """Remove a file, a symbolic link, or a directory with all it holds; no link is followed."""
    if not fs.is_directory(path):
        fs.unlink(path)
        return
    for name in fs.names(path):
        remove_tree(fs, path / name)
    fs.remove_directory(path)


def replace_file(fs: FileSystem, path: Path, data: bytes) -> None:
    """Write a small file so that it is never seen half written; durable on return."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    if temporary.name in fs.names(path.parent):
        fs.unlink(temporary)
    with closing(fs, fs.open_new(temporary)) as file:
        fs.write(file, memoryview(data))
        fs.fsync(file)
    fs.replace(temporary, path)
    fs.fsync_directory(path.parent)


def read_bounded(fs: FileSystem, path: Path, limit_bytes: int) -> bytes:
    """The content of a small regular file.

    Raises:
        OSError: EFBIG when it is longer than `limit_bytes`; else what the file system says.
    """
    with closing(fs, fs.open_old(path)) as file:
        if file.size > limit_bytes:
            raise OSError(errno.EFBIG, f"{file.size} bytes, at most {limit_bytes} are expected", os.fspath(path))
        buffer = bytearray(file.size)
        read = fs.read(file, memoryview(buffer))
    return bytes(buffer[:read])


def _open_new(path: Path) -> OpenFile:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return OpenFile(path, os.open(path, flags, 0o644), 0)


def _allocate(file: OpenFile, size: int) -> None:
    if size == 0 or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.descriptor, 0, size)
    except OSError as error:
        if error.errno not in FALLOCATE_UNSUPPORTED:
            raise


def _write(file: OpenFile, data: memoryview) -> None:
    while data:
        data = data[os.write(file.descriptor, data) :]


def _fsync(file: OpenFile) -> None:
    os.fsync(file.descriptor)


def _close(file: OpenFile) -> None:
    os.close(file.descriptor)


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in DIRECTORY_FSYNC_UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def _names(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError:
        return []


def _is_directory(path: Path) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


def _file_size(path: Path) -> int:
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        raise OSError(errno.ELOOP, "is a symbolic link", os.fspath(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "is not a regular file", os.fspath(path))
    return status.st_size


def _open_old(path: Path) -> OpenFile:
    # O_NONBLOCK: a pipe planted under the name of a file must not hang the start.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file", os.fspath(path))
    return OpenFile(path, descriptor, status.st_size)


def _read(file: OpenFile, buffer: memoryview) -> int:
    done = 0
    while done < len(buffer):
        count = os.readv(file.descriptor, [buffer[done:]])
        if count == 0:
            break
        done += count
    return done


def _free_bytes(path: Path) -> int:
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


LOCK_POLL_S = 0.2


@contextlib.contextmanager
def storage_errors(where: Path) -> Iterator[None]:
    """Turn an OSError of the body into DiskFull or StorageError with its place."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "Make room, or name a directory on another disk; nothing half made was left."
            raise DiskFull("there is no room for the prepared corpus", where=str(where), hint=hint) from error
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
                _fsync_path(Path(folder, name))
            _fsync_path(Path(folder))
        temporary.rename(directory)
        _fsync_path(directory.parent)
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


def _fsync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def write_whole(path: Path, text: str) -> None:
    """Write a small text file so that it is never seen half written."""
    temporary = path.with_name(f".tmp-{path.name}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
