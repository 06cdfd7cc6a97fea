"""Which checkpoints stay, how the others are deleted, and the pointers to the best and the last.

Kept are the last `keep_last`, the best, the newest healthy one to roll back to, and the one this process resumed from for
as long as it is pinned: a pure function of what is committed. Order is by commit number alone: clocks jump and copied files
have new times. What is deleted is renamed away first, so that no half of one ever stands under a live name.
`best.json` and `last.json` are small files for people and scripts. They are hints; the scan of checkpoints is the truth.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from resilient_t5.checkpoint import strict_json
from resilient_t5.checkpoint.manifest import CorruptCheckpoint, Manifest, parse_name
from resilient_t5.checkpoint.reader import describe
from resilient_t5.files import FileSystem, make_directories, read_bounded, remove_tree, replace_file

FEWEST = 2
"""Newest checkpoints that stay even when the disk is full: one alone cannot fall back."""


@dataclass(frozen=True)
class Stored:
    """A checkpoint on disk whose manifest is whole; `manifest_sha256` is the hash of MANIFEST.json."""

    manifest: Manifest
    manifest_sha256: str

    @property
    def name(self) -> str:
        """Its directory name."""
        return self.manifest.name

    @property
    def q(self) -> int:
        """Its commit number."""
        return self.manifest.q


def surplus(stored: Sequence[Stored], keep_last: int, best_q: int | None, pinned_q: int | None) -> list[Stored]:
    """The checkpoints to delete, oldest first."""
    by_age = sorted(stored, key=lambda item: item.q)
    kept = {item.q for item in by_age[-max(keep_last, FEWEST) :]} | {best_q, pinned_q}
    kept |= {item.q for item in [item for item in by_age if item.manifest.healthy][-1:]}
    return [item for item in by_age if item.q not in kept]


def find_best(stored: Sequence[Stored], named_q: int | None) -> Stored | None:
    """The best checkpoint: the one named when it still exists, else the last that was the best when it was saved.

    Each best is a strict improvement, so the last one committed is the next best that still exists. Without a name the
    newest checkpoint tells which one was the best.
    """
    by_age = sorted(stored, key=lambda item: item.q)
    if named_q is None and by_age:
        named_q = by_age[-1].manifest.best_q
    named = [item for item in by_age if item.q == named_q]
    return next(iter(named or [item for item in by_age if item.manifest.is_best][-1:]), None)


def max_kept(keep_last: int) -> int:
    """Most checkpoints that can stand on disk at once: kept, best, healthy, resumed from, and the one being written."""
    return max(keep_last, FEWEST) + 4


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


def undo_commit(fs: FileSystem, temporary: Path, final: Path) -> None:
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


def quarantine(fs: FileSystem, parent: Path, name: str, damage: CorruptCheckpoint, tell: Tell) -> bool:
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


BEST = "best.json"
LAST = "last.json"
TEMPORARY_PREFIXES = (f".tmp-{BEST}-", f".tmp-{LAST}-")
LIMIT_BYTES = 64 * 2**10


def write_pointer(fs: FileSystem, path: Path, item: Stored) -> None:
    """Point `path` at a committed checkpoint, atomically and durably."""
    manifest = item.manifest
    fields = {"name": item.name, "q": item.q, "update": manifest.update, "metric": manifest.metric}
    replace_file(fs, path, strict_json.dump({**fields, "manifest_sha256": item.manifest_sha256}))


def pointed_q(fs: FileSystem, path: Path) -> int:
    """The commit number in a pointer, a lower bound of those ever used.

    Returns:
        0 without a pointer; 1 for a damaged one, since it proves that something was committed.
    """
    try:
        fields = strict_json.load(read_bounded(fs, path, LIMIT_BYTES))
        return (parse_name(str(fields["name"])) or (0, 1))[1]
    except FileNotFoundError:
        return 0
    except (OSError, ValueError, TypeError, KeyError):
        return 1
