"""One process per run directory: an flock, which the kernel releases when its holder dies, so no stale lock exists."""

import errno
import fcntl
import json
import os
import platform
import time
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any

from resilient_t5.checkpoint import strict_json
from resilient_t5.checkpoint.reader import reporting
from resilient_t5.errors import RunHeld
from resilient_t5.files import FileSystem, make_directories

LOCK = "run.lock"
BODY_LIMIT_BYTES = 4096
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
LOCKED = (errno.EAGAIN, errno.EACCES)
LOCKS_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class RunLock:
    """Context manager that locks `run.lock` of a run directory; the file is never deleted.

    The directory is created if it is missing. A forked child closes its copy of the lock at once, so that it does not keep
    the run locked after its parent was killed. `is_exclusive` is False where the file system does not support locks (some
    network file systems).

    Raises:
        RunHeld: another process holds the lock; names its pid and host if known.
        StorageError: the lock file cannot be opened or written.
    """

    def __init__(self, run_directory: Path):
        self.path = Path(run_directory) / LOCK
        self.is_exclusive = False
        self._descriptor: int | None = None

    def __enter__(self) -> "RunLock":
        with reporting(f"{self.path} cannot be locked"):
            make_directories(FileSystem(), self.path.parent)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            try:
                self.is_exclusive = self._lock(descriptor)
                self._describe(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
        self._descriptor = descriptor
        this = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _close_in_child(this))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock; in a forked child this only closes the child's copy."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _lock(self, descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in LOCKS_UNSUPPORTED:
                return False
            if error.errno not in LOCKED:
                raise
            raise RunHeld(
                f"{self.path.parent} is held by {_holder(descriptor)}",
                where=str(self.path),
                hint="Wait for it, stop it with SIGTERM, or choose another --run.dir",
            ) from None
        return True

    def _describe(self, descriptor: int) -> None:
        """Write pid and host for the error message of other processes; nothing else may rely on them."""
        boot_id = BOOT_ID.read_text(encoding="ascii").strip() if BOOT_ID.exists() else ""
        body = {"pid": os.getpid(), "host": platform.node(), "boot_id": boot_id, "started": time.time()}
        data = json.dumps(body).encode("ascii") + b"\n"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, data, 0)


def _close_in_child(reference: "weakref.ref[RunLock]") -> None:
    lock = reference()
    if lock is not None:
        lock.close()


def _holder(descriptor: int) -> str:
    try:
        body: Any = strict_json.load(os.pread(descriptor, BODY_LIMIT_BYTES, 0))
        return f"process {int(body['pid'])} on {str(body['host'])[:80]!r}"
    except (ValueError, TypeError, KeyError):
        return "another process"
