"""Durable file operations: the calls of the checkpoint layer, one method each, and directories that appear atomically.

`FileSystem` is the seam for fault injection. A method is one call (or one short loop of the same call), so a hook that runs
before and after each method sees every moment at which a process can be killed, a disk can return an error, or the power can
fail. The methods contain no decisions.

`making` fills a directory under a temporary name, fsyncs it and renames it once, to a name that is free. The lock of
`only_maker` is a file `.NAME.lock` next to the directory, held by flock and removed afterwards, so it ends with its process.
The holder may remove every `.NAME.making-*`: it belongs to a process that was killed.
"""

import errno
import fcntl
import functools
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from resilient_t5.errors import NO_SPACE, DiskFull, StorageError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Hook = Callable[[str, str, tuple[Any, ...]], None]
"""Called as hook(moment, operation, arguments), moment being "before" or "after"; its exceptions are not caught."""

# Some network file systems cannot fsync a directory; that is not an error of the save.
DIRECTORY_FSYNC_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP)
FALLOCATE_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
LOCK_POLL_S = 0.2


@dataclass(frozen=True)
class OpenFile:
    """A descriptor with the path it was opened under; `size` is the size at opening, in bytes."""

    path: Path
    descriptor: int
    size: int


def _operation(
    method: Callable[Concatenate["FileSystem", Arguments], Result],
) -> Callable[Concatenate["FileSystem", Arguments], Result]:
    """Call the hook before and after a method of `FileSystem`; add the path and the method's name to an OSError."""
    name = method.__name__

    @functools.wraps(method)
    def call(self: "FileSystem", *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            if self._hook is not None:
                self._hook("before", name, args)
            result = method(self, *args, **kwargs)
            if self._hook is not None:
                self._hook("after", name, args)
        except OSError as error:
            subject: Any = args[0]
            if error.filename is None:
                error.filename = os.fspath(subject.path if isinstance(subject, OpenFile) else subject)
            error.add_note(name)
            raise
        return result

    return call


class FileSystem:
    """The calls of a save, a load and a deletion. All raise OSError with `filename` set and the call in its notes."""

    def __init__(self, hook: Hook | None = None):
        self._hook = hook

    # Writing

    @_operation
    def make_directory(self, path: Path) -> None:
        """Create one directory that must not exist."""
        os.mkdir(path)

    @_operation
    def open_new(self, path: Path) -> OpenFile:
        """Open a file for writing that must not exist."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return OpenFile(path, os.open(path, flags, 0o644), 0)

    @_operation
    def allocate(self, file: OpenFile, size: int) -> None:
        """Reserve `size` bytes, so that a full disk is detected before the first write; skipped if unsupported."""
        if size == 0 or not hasattr(os, "posix_fallocate"):
            return
        try:
            os.posix_fallocate(file.descriptor, 0, size)
        except OSError as error:
            if error.errno not in FALLOCATE_UNSUPPORTED:
                raise

    @_operation
    def write(self, file: OpenFile, data: memoryview) -> None:
        """Append all of `data`."""
        while data:
            data = data[os.write(file.descriptor, data) :]

    @_operation
    def fsync(self, file: OpenFile) -> None:
        """Make the content of a file durable. Never repeat it after an error: a second fsync would return 0 regardless."""
        os.fsync(file.descriptor)

    @_operation
    def close(self, file: OpenFile) -> None:
        """Close a file; a network file system reports some write errors only here."""
        os.close(file.descriptor)

    @_operation
    def fsync_directory(self, path: Path) -> None:
        """Make the entries of a directory durable."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in DIRECTORY_FSYNC_UNSUPPORTED:
                raise
        finally:
            os.close(descriptor)

    @_operation
    def rename(self, source: Path, target: Path) -> None:
        """Rename a directory to a name that does not exist."""
        os.rename(source, target)

    @_operation
    def replace(self, source: Path, target: Path) -> None:
        """Replace a file by another one, atomically."""
        os.replace(source, target)

    @_operation
    def unlink(self, path: Path) -> None:
        """Remove a file, or a symbolic link itself."""
        os.unlink(path)

    @_operation
    def remove_directory(self, path: Path) -> None:
        """Remove an empty directory."""
        os.rmdir(path)

    # Reading

    @_operation
    def names(self, path: Path) -> list[str]:
        """Names in a directory, sorted; empty when the directory does not exist."""
        try:
            return sorted(os.listdir(path))
        except FileNotFoundError:
            return []

    @_operation
    def is_directory(self, path: Path) -> bool:
        """Whether `path` is a directory, and not a symbolic link to one."""
        try:
            return stat.S_ISDIR(os.lstat(path).st_mode)
        except FileNotFoundError:
            return False

    @_operation
    def file_size(self, path: Path) -> int:
        """Size in bytes of a regular file; ELOOP for a symbolic link, EINVAL for anything else."""
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            raise OSError(errno.ELOOP, "is a symbolic link", os.fspath(path))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", os.fspath(path))
        return status.st_size

    @_operation
    def open_old(self, path: Path) -> OpenFile:
        """Open a regular file for reading; ELOOP for a symbolic link, EINVAL for anything else."""
        # O_NONBLOCK: opening a named pipe must not block the start.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "is not a regular file", os.fspath(path))
        return OpenFile(path, descriptor, status.st_size)

    @_operation
    def read(self, file: OpenFile, buffer: memoryview) -> int:
        """Fill `buffer` from the file; return the bytes read, fewer only at the end of the file."""
        done = 0
        while done < len(buffer):
            count = os.readv(file.descriptor, [buffer[done:]])
            if count == 0:
                break
            done += count
        return done

    @_operation
    def free_bytes(self, path: Path) -> int:
        """Bytes that an unprivileged process may still write on the file system of `path`."""
        status = os.statvfs(path)
        return status.f_bavail * status.f_frsize


@contextmanager
def closing(fs: FileSystem, file: OpenFile) -> Iterator[OpenFile]:
    """Close `file` at the end; an error of the close is raised, unless the body has raised one."""
    try:
        yield file
    except BaseException:
        with suppress(OSError):  # the first error is the informative one
            fs.close(file)
        raise
    fs.close(file)


def make_directories(fs: FileSystem, path: Path) -> None:
    """Create `path` and its missing parents, each one durable before anything is put into it."""
    if fs.is_directory(path) or path.is_dir():
        return
    make_directories(fs, path.parent)
    try:
        fs.make_directory(path)
    except FileExistsError:  # created by another process, which may not have fsynced it yet
        if not path.is_dir():
            raise
    fs.fsync_directory(path.parent)


def remove_tree(fs: FileSystem, path: Path) -> None:
    """Remove a file, a symbolic link, or a directory tree; links are not followed."""
    if not fs.is_directory(path):
        fs.unlink(path)
        return
    for name in fs.names(path):
        remove_tree(fs, path / name)
    fs.remove_directory(path)


def replace_file(fs: FileSystem, path: Path, data: bytes) -> None:
    """Write a small file atomically; durable on return."""
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
        OSError: EFBIG if it is longer than `limit_bytes`; else the error of the file system.
    """
    with closing(fs, fs.open_old(path)) as file:
        if file.size > limit_bytes:
            raise OSError(errno.EFBIG, f"{file.size} bytes, at most {limit_bytes} are expected", os.fspath(path))
        buffer = bytearray(file.size)
        read = fs.read(file, memoryview(buffer))
    return bytes(buffer[:read])


@contextmanager
def storage_errors(where: Path) -> Iterator[None]:
    """Convert an OSError of the body to DiskFull or StorageError with its path."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            hint = "Free some space, or name a directory on another disk; no partial result was kept."
            raise DiskFull("no space for the prepared corpus", where=str(where), hint=hint) from error
        raise StorageError(f"cannot write: {error.strerror or error}", where=str(error.filename or where)) from error


@contextmanager
def only_maker(directory: Path, poll: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of `directory`; while another process holds it, wait and call `poll`, which may raise."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    path = directory.parent / f".{directory.name}.lock"
    while (lock := _try_lock(path)) is None:
        poll()
        time.sleep(LOCK_POLL_S)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock is released, so that no process locks an unlinked file
        os.close(lock)


@contextmanager
def making(directory: Path) -> Iterator[Path]:
    """A temporary directory that is renamed to `directory` after the body, and removed if it raises.

    Call it inside `only_maker`. `directory` must not exist, or be empty: a rename never replaces anything.
    """
    prefix = f".{directory.name}.making-"
    for dead in directory.parent.glob(f"{prefix}*"):
        shutil.rmtree(dead)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=directory.parent))
    try:
        yield temporary
        umask = os.umask(0o022)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # mkdtemp creates it with mode 700
        fsync_tree(temporary)
        temporary.rename(directory)
        fsync_path(directory.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _try_lock(path: Path) -> int | None:
    """The descriptor of the lock; None while another process holds it."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The previous holder may have unlinked the file between our open and our lock.
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except BlockingIOError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def fsync_tree(directory: Path) -> None:
    """Make a directory with everything in it durable."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            fsync_path(Path(folder, name))
        fsync_path(Path(folder))


def fsync_path(path: Path) -> None:
    """Make a file, or the entries of a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file atomically; text as UTF-8. After an error the previous file is unchanged."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def nearest_directory(path: Path) -> Path:
    """Return `path`, or its nearest ancestor that is a directory."""
    nearest = Path(os.path.abspath(path))
    while not nearest.is_dir():
        nearest = nearest.parent
    return nearest


def free_bytes(path: Path) -> int:
    """Free bytes on the disk of `path`, which need not exist yet."""
    return shutil.disk_usage(nearest_directory(path)).free
