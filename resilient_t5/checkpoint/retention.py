"""Which checkpoints are kept, how the others are deleted, and the pointers to the best and the last.

Kept are the last `keep_last`, the best, the newest healthy one as a rollback target, and the one that this process resumed
from while it is pinned: a pure function of the committed checkpoints. Order is by commit number alone, since clocks jump and
copied files have new times. A directory is renamed before it is deleted, so no partial checkpoint has a live name.
`best.json` and `last.json` are small files for people and scripts. The directory scan is authoritative, not they.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from resilient_t5.checkpoint import strict_json
from resilient_t5.checkpoint.manifest import CorruptCheckpoint, Manifest, parse_name
from resilient_t5.checkpoint.reader import describe
from resilient_t5.files import FileSystem, make_directories, read_bounded, remove_tree, replace_file

MIN_KEPT = 2
"""Newest checkpoints that are kept even when the disk is full: a single one has no fallback."""
TEMPORARY = ".tmp-"
TRASH = ".trash-"
QUARANTINE = "quarantine"
BEST = "best.json"
LAST = "last.json"
TEMPORARY_PREFIXES = (f".tmp-{BEST}-", f".tmp-{LAST}-")
POINTER_LIMIT_BYTES = 64 * 2**10
Emit = Callable[..., None]
"""Called as emit(kind, **fields)."""


@dataclass(frozen=True)
class Stored:
    """A checkpoint on disk with a valid manifest; `manifest_sha256` is the hash of MANIFEST.json."""

    manifest: Manifest
    manifest_sha256: str

    @property
    def name(self) -> str:
        """Directory name."""
        return self.manifest.name

    @property
    def commit_number(self) -> int:
        """Commit number."""
        return self.manifest.commit_number


def surplus(stored: Sequence[Stored], keep_last: int, best_commit: int | None, pinned_commit: int | None) -> list[Stored]:
    """The checkpoints to delete, oldest first."""
    by_age = sorted(stored, key=lambda item: item.commit_number)
    kept = {item.commit_number for item in by_age[-max(keep_last, MIN_KEPT) :]} | {best_commit, pinned_commit}
    kept |= {item.commit_number for item in [item for item in by_age if item.manifest.healthy][-1:]}
    return [item for item in by_age if item.commit_number not in kept]


def find_best(stored: Sequence[Stored], best_commit: int | None) -> Stored | None:
    """The checkpoint `best_commit` if it still exists, else the last one that was the best when it was saved.

    Each best is a strict improvement, so the last one committed is the next best that still exists. Without a
    `best_commit`, that of the newest checkpoint is used.
    """
    by_age = sorted(stored, key=lambda item: item.commit_number)
    if best_commit is None and by_age:
        best_commit = by_age[-1].manifest.best_commit
    named = [item for item in by_age if item.commit_number == best_commit]
    return next(iter(named or [item for item in by_age if item.manifest.is_best][-1:]), None)


def max_kept(keep_last: int) -> int:
    """Most checkpoints on disk at once: the last ones, the best, the healthy, the resumed, and the one being written."""
    return max(keep_last, MIN_KEPT) + 4


def delete(fs: FileSystem, parent: Path, names: Sequence[str], emit: Emit) -> None:
    """Delete checkpoints of `parent`; a failure is logged as `delete_failed`, and a later sweep removes the rest."""
    try:
        for name in names:
            fs.rename(parent / name, parent / (TRASH + name))
            emit("delete", name=name)
        if names:
            fs.fsync_directory(parent)
    except OSError as error:
        emit("delete_failed", file=Path(str(error.filename)).name, error=describe(error))
        return
    for name in names:
        remove(fs, parent / (TRASH + name), emit)


def remove(fs: FileSystem, path: Path, emit: Emit) -> bool:
    """Remove a tree that has no live name; on an error log `delete_failed` and return False."""
    try:
        remove_tree(fs, path)
    except OSError as error:
        emit("delete_failed", file=path.name, error=describe(error))
        return False
    return True


def undo_commit(fs: FileSystem, temporary: Path, final: Path) -> None:
    """Roll back a failed save; what cannot be removed now is removed by a later sweep.

    A directory that was renamed already but may not be durable is removed too: it was not acknowledged.
    """
    trash = final.with_name(TRASH + final.name)
    with suppress(OSError):
        if fs.is_directory(final):
            fs.rename(final, trash)
    for path in (temporary, trash):
        with suppress(OSError):
            if fs.is_directory(path):
                remove_tree(fs, path)


def quarantine(fs: FileSystem, parent: Path, name: str, damage: CorruptCheckpoint, emit: Emit) -> bool:
    """Move a damaged checkpoint into quarantine, as NAME.REASON; False when it could not be moved."""
    emit("quarantine", name=name, reason=damage.reason, error=str(damage))
    directory = parent / QUARANTINE
    try:
        make_directories(fs, directory)
        existing = set(fs.names(directory))
        base = f"{name}.{damage.reason}"
        target = next(t for t in (base, *(f"{base}.{n}" for n in range(2, len(existing) + 3))) if t not in existing)
        fs.rename(parent / name, directory / target)
        fs.fsync_directory(directory)
        fs.fsync_directory(parent)
    except OSError as error:
        emit("quarantine_failed", name=name, error=describe(error))
        return False
    return True


def write_pointer(fs: FileSystem, path: Path, item: Stored) -> None:
    """Point `path` at a committed checkpoint, atomically and durably."""
    manifest = item.manifest
    fields = {"name": item.name, "q": item.commit_number, "update": manifest.update, "metric": manifest.metric}
    replace_file(fs, path, strict_json.dump({**fields, "manifest_sha256": item.manifest_sha256}))


def pointed_commit(fs: FileSystem, path: Path) -> int:
    """The commit number in a pointer file, a lower bound of the numbers that were used.

    Returns:
        0 without a pointer; 1 for a damaged one, since it proves that something was committed.
    """
    try:
        fields = strict_json.load(read_bounded(fs, path, POINTER_LIMIT_BYTES))
        return (parse_name(str(fields["name"])) or (0, 1))[1]
    except FileNotFoundError:
        return 0
    except (OSError, ValueError, TypeError, KeyError):
        return 1
