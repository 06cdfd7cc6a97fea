"""How a checkpoint leaves: renamed away first, so that no half of one ever stands under a live name."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from resilient_t5.checkpoint.manifest import Damaged
from resilient_t5.checkpoint.reading import describe
from resilient_t5.files import FileSystem, make_directories, remove_tree

TEMPORARY = ".tmp-"
TRASH = ".trash-"
QUARANTINE = "quarantine"
Tell = Callable[..., None]
"""Called as tell(kind, **fields)."""


def delete(fs: FileSystem, parent: Path, names: Sequence[str], tell: Tell) -> None:
    """Delete checkpoints of `parent`; a failure is told as `delete_failed`, and what is left over is swept later."""
    try:
        for name in names:
            fs.rename(parent / name, parent / (TRASH + name))
            tell("delete", name=name)
        if names:
            fs.fsync_directory(parent)
    except OSError as error:
        tell("delete_failed", file=Path(str(error.filename)).name, error=describe(error))
        return
    for name in names:
        remove(fs, parent / (TRASH + name), tell)


def remove(fs: FileSystem, path: Path, tell: Tell) -> bool:
    """Remove a tree that stands under no live name; False, and `delete_failed`, when the file system refuses."""
    try:
        remove_tree(fs, path)
    except OSError as error:
        tell("delete_failed", file=path.name, error=describe(error))
        return False
    return True


def take_back(fs: FileSystem, temporary: Path, final: Path) -> None:
    """Drop a save that failed, from memory's point of view it never was; what cannot be dropped now is swept later.

    One that was renamed already but may not be durable goes too: it was not acknowledged.
    """
    trash = final.with_name(TRASH + final.name)
    with suppress(OSError):
        if fs.is_directory(final):
            fs.rename(final, trash)
    for path in (temporary, trash):
        with suppress(OSError):
            if fs.is_directory(path):
                remove_tree(fs, path)


def quarantine(fs: FileSystem, parent: Path, name: str, damage: Damaged, tell: Tell) -> bool:
    """Move a damaged checkpoint out of the way, under its name and the reason; False when it could not be moved."""
    tell("quarantine", name=name, reason=damage.reason, error=str(damage))
    directory = parent / QUARANTINE
    try:
        make_directories(fs, directory)
        taken = set(fs.names(directory))
        wanted = f"{name}.{damage.reason}"
        target = next(t for t in (wanted, *(f"{wanted}.{n}" for n in range(2, len(taken) + 3))) if t not in taken)
        fs.rename(parent / name, directory / target)
        fs.fsync_directory(directory)
        fs.fsync_directory(parent)
    except OSError as error:
        tell("quarantine_failed", name=name, error=describe(error))
        return False
    return True
