"""Which checkpoints stay: a pure function of what is committed.

Kept are the last `keep_last`, the best, the newest healthy one to roll back to, and the one this process resumed from for
as long as it is pinned. Order is by commit number alone: clocks jump and copied files have new times.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from resilient_t5.checkpoint.manifest import Manifest

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


def most_kept(keep_last: int) -> int:
    """Most checkpoints that can stand on disk at once: kept, best, healthy, resumed from, and the one being written."""
    return max(keep_last, FEWEST) + 4
