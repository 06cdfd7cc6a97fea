"""The ballast: a file as large as a checkpoint, whose place the save that a run leaves with takes when the disk is full."""

import errno
from contextlib import suppress
from pathlib import Path

from resilient_t5.checkpoint.disposal import Tell
from resilient_t5.checkpoint.reading import describe
from resilient_t5.files import FileSystem, closing

BALLAST = ".ballast"


def with_spare(size_bytes: int, reserve_bytes: int) -> int:
    """Free bytes that a checkpoint of this size needs."""
    return size_bytes + size_bytes // 20 + reserve_bytes


class Ballast:
    """The ballast of one checkpoint directory. What the file system refuses is told, once, and never raised."""

    def __init__(self, fs: FileSystem, directory: Path, tell: Tell):
        self._fs, self._path, self._tell, self._told = fs, directory / BALLAST, tell, False

    def keep(self, size_bytes: int) -> None:
        """Set at least `size_bytes` aside, unless that would take the room of the next save."""
        try:
            if self._is_there() and self._fs.file_size(self._path) >= size_bytes:
                return
            self.drop()
            if self._fs.free_bytes(self._path.parent) < 2 * size_bytes:
                raise OSError(errno.ENOSPC, "no room for it beside the next checkpoint", str(self._path))
            with closing(self._fs, self._fs.open_new(self._path)) as file:
                self._fs.allocate(file, size_bytes)
            if self._fs.file_size(self._path) < size_bytes:
                raise OSError(errno.ENOTSUP, "this file system reserves nothing", str(self._path))
        except OSError as error:
            self.drop()
            if not self._told:
                self._tell("ballast_failed", size_bytes=size_bytes, error=describe(error))
                self._told = True

    def drop(self) -> bool:
        """Give the room back; False when there was none."""
        with suppress(OSError):  # then the save that wanted the room says what is wrong
            if self._is_there():
                self._fs.unlink(self._path)
                return True
        return False

    def _is_there(self) -> bool:
        return self._path.name in self._fs.names(self._path.parent)
