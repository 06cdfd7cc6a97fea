"""The checkpoints of one run: save, scan, load, fall back, quarantine, retain.

A save writes into `.tmp-*` in the same directory. Every file is hashed and fsynced, the manifest last. Then the directory is
fsynced and renamed once, to a name that was never used before, and the parent is fsynced. Only after that is the save
acknowledged, do the pointers move, and is anything deleted. A directory is renamed before it is deleted. So after a kill or
a power loss at any moment every directory under a live name is complete, and every acknowledged checkpoint that retention
keeps exists. A failed fsync is never repeated: the next save writes everything again from memory.

All methods but the constructor require that this process holds the run lock. Only one of them runs at a time.
"""

import math
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from resilient_t5.checkpoint import strict_json
from resilient_t5.checkpoint.manifest import (
    STATE_LIMIT_BYTES,
    Committed,
    CorruptCheckpoint,
    Loaded,
    Manifest,
    Parts,
    checkpoint_names,
    parse_name,
    write_checkpoint,
)
from resilient_t5.checkpoint.reader import describe, read_directory, read_or_refuse, read_stored, reporting
from resilient_t5.checkpoint.retention import (
    BEST,
    LAST,
    MIN_KEPT,
    QUARANTINE,
    TEMPORARY,
    TEMPORARY_PREFIXES,
    TRASH,
    Stored,
    delete,
    find_best,
    pointed_commit,
    quarantine,
    remove,
    surplus,
    undo_commit,
    write_pointer,
)
from resilient_t5.checkpoint.tensors import lay_out, refuse_non_finite
from resilient_t5.config.schema import CheckpointConfig
from resilient_t5.errors import DiskFull, NoValidCheckpoint, StorageError
from resilient_t5.files import FileSystem, make_directories

__all__ = ["CheckpointManager", "Committed", "Loaded", "Parts"]

OLD_BALLAST = ".ballast"
"""A file of earlier versions that reserved disk space for the last save."""
RESERVE_BYTES = 32 * 2**20
PINNED_COMMITS = 2
"""Commits after which the checkpoint that this process resumed from may be deleted."""


class CheckpointManager:
    """The checkpoints below `run_directory`.

    Args:
        run_directory: the run; `checkpoints/`, `best.json` and `last.json` are below it.
        run_id: checkpoints of any other run are refused.
        settings: how many are kept.
        audit: receives the events `save`, `delete`, `fallback`, `quarantine`, `sweep`, `space`, `best_lost`, and the failures
            that are not fatal (`delete_failed`, `pointer_failed`, `quarantine_failed`); always called in the thread that
            created the manager.
        fs: file system calls.
        reserve_bytes: disk space that stays free in addition to the checkpoint.
    """

    def __init__(
        self,
        run_directory: Path,
        *,
        run_id: str,
        settings: CheckpointConfig,
        audit: Callable[[str, dict[str, Any]], None],
        fs: FileSystem | None = None,
        reserve_bytes: int = RESERVE_BYTES,
    ):
        self.run_directory = Path(run_directory)
        self.directory = self.run_directory / "checkpoints"
        self.settings = settings
        self._run_id, self._fs, self.reserve_bytes = run_id, fs or FileSystem(), reserve_bytes
        self._audit, self._audit_thread = audit, threading.get_ident()
        self._pending_events: deque[tuple[str, dict[str, Any]]] = deque()
        self._parent: Manifest | None = None
        self.newest: Committed | None = None
        """The checkpoint that this process committed or loaded last."""
        self._resumed_commit: int | None = None
        self._commits = 0
        self._last_commit_number = 0
        self._best_pointer = ""

    # Events

    def emit(self, kind: str, **fields: Any) -> None:
        """Pass one event to `audit`; in another thread, keep it until `emit_pending`."""
        self._pending_events.append((kind, fields))
        if threading.get_ident() == self._audit_thread:
            self.emit_pending()

    def emit_pending(self) -> None:
        """Pass on the events of other threads, oldest first."""
        while self._pending_events:
            self._audit(*self._pending_events.popleft())

    # Listing

    def committed(self) -> list[Stored]:
        """Checkpoints with a valid manifest and files of the right sizes, newest first; contents are not read.

        Raises:
            StorageError: they cannot be read.
        """
        with reporting(f"{self.directory} cannot be read"):
            return self._scan()

    def _scan(self) -> list[Stored]:
        stored = []
        for name in checkpoint_names(self._fs, self.directory):
            with suppress(CorruptCheckpoint):  # the next load quarantines it; here it only must not count as kept
                stored.append(Stored(*read_stored(self._fs, self.directory / name, self._run_id)))
        return stored

    def sweep(self) -> None:
        """Remove incomplete saves and deletions of dead processes. Failed removals are logged, not raised.

        Raises:
            StorageError: the directories cannot be listed.
        """
        for parent, prefixes in (
            (self.directory, (TEMPORARY, TRASH, OLD_BALLAST)),
            (self.run_directory, TEMPORARY_PREFIXES),
        ):
            with reporting(f"{parent} cannot be read"):
                names = self._fs.names(parent)
            for name in names:
                if name.startswith(prefixes) and remove(self._fs, parent / name, self.emit):
                    self.emit("sweep", file=name)

    # Loading

    def load(self, name: str) -> Loaded:
        """Load one checkpoint by name and continue from it.

        Raises:
            NoValidCheckpoint: it does not exist or is damaged; it is not moved.
            StorageError: it cannot be read.
        """
        if parse_name(name) is None:
            raise NoValidCheckpoint(f"{name!r} is not the name of a checkpoint", where=str(self.directory))
        return self._adopt(read_or_refuse(self._fs, self.directory / name, self._run_id))

    def load_newest(self, *, healthy: bool = False) -> Loaded | None:
        """Load the newest valid checkpoint and continue from it; quarantine damaged ones.

        Args:
            healthy: ignore checkpoints whose health has a False field, as a rollback does.

        Returns:
            None only when this run never committed a checkpoint.

        Raises:
            NoValidCheckpoint: there were checkpoints and none is valid; nothing was deleted.
            StorageError: an error that does not prove damage of a checkpoint; nothing was moved.
        """
        with reporting(f"the checkpoints in {self.directory} cannot be read"):
            names = checkpoint_names(self._fs, self.directory)
            loaded = self._first_valid(names, healthy)
            if loaded is not None:
                return self._adopt(loaded)
            quarantined = self._fs.names(self.directory / QUARANTINE)
            if not names and not quarantined and pointed_commit(self._fs, self.run_directory / LAST) == 0:
                return None
        raise NoValidCheckpoint(
            f"no {'healthy' if healthy else 'valid'} checkpoint is left in {self.directory}; nothing was deleted",
            where=", ".join(names[:3]),
            hint=f"Look into {self.directory / QUARANTINE}; a new run needs another --run.dir",
        )

    def _first_valid(self, names: list[str], healthy: bool) -> Loaded | None:
        """Load the first valid checkpoint in the order of `names`; of the others only manifest and sizes are checked."""
        loaded, damaged = None, 0
        for name in names:
            directory = self.directory / name
            try:
                manifest, _ = read_stored(self._fs, directory, self._run_id)
                if loaded is None and (manifest.healthy or not healthy):
                    loaded = read_directory(self._fs, directory, self._run_id)
            except CorruptCheckpoint as damage:
                damaged += loaded is None
                quarantine(self._fs, self.directory, name, damage, self.emit)
        if loaded is not None and damaged:
            self.emit("fallback", name=loaded.name, q=loaded.commit_number, update=loaded.update, newest=names[0])
        return loaded

    def load_best(self) -> Loaded | None:
        """Load the best checkpoint without continuing from it; if it is damaged, the next best one.

        Raises:
            StorageError: it cannot be read.
        """
        with reporting(f"the best checkpoint in {self.directory} cannot be read"):
            while (best := find_best(self._scan(), self._best_commit())) is not None:
                if self._best_commit() not in (None, best.commit_number):
                    self.emit("best_lost", q=self._best_commit(), name=best.name)
                try:
                    return read_directory(self._fs, self.directory / best.name, self._run_id)
                except CorruptCheckpoint as damage:
                    if not quarantine(self._fs, self.directory, best.name, damage, self.emit):
                        return None
        return None

    # Saving

    def save(self, parts: Parts, *, best: bool) -> Committed:
        """Save and return once it is durable. One update is saved once, except for a new best or a rollback.

        Args:
            best: this is the best model so far; ignored when `parts.metric` is not finite.

        Raises:
            NonFiniteState: a tensor holds NaN or infinity.
            DiskFull, StorageError: not saved; names the first errno. Older checkpoints are intact, and a later save may
                succeed.
        """
        is_best = best and (parts.metric is None or math.isfinite(parts.metric))
        if self.newest is not None and self._is_saved(parts, is_best):
            return self.newest
        refuse_non_finite(parts.tensors)
        with reporting(f"the checkpoint of update {parts.update} was not saved; older ones are intact"):
            manifest, committed = self._commit(parts, is_best)
        self._parent, self.newest = manifest, committed
        self._commits += 1
        fields = {"name": committed.name, "q": committed.commit_number, "update": committed.update, "reason": parts.reason}
        self.emit("save", **fields, best=is_best, metric=parts.metric, bytes=committed.bytes, save_s=committed.seconds)
        self._tidy(manifest)
        return committed

    def _is_saved(self, parts: Parts, is_best: bool) -> bool:
        saved, parent = self.newest, self._parent
        if saved is None or parent is None or saved.update != parts.update or parts.reason == "rollback":
            return False
        return parent.is_best or not is_best

    def _commit(self, parts: Parts, is_best: bool) -> tuple[Manifest, Committed]:
        started_s = time.monotonic()
        make_directories(self._fs, self.directory)
        layouts = {stem: lay_out(tensors) for stem, tensors in sorted(parts.tensors.items())}
        state = strict_json.dump(parts.state)
        if len(state) > STATE_LIMIT_BYTES:
            raise ValueError(f"the state has {len(state)} bytes; at most {STATE_LIMIT_BYTES} can be loaded again")
        self._require_space(parts.update, sum(layout.size for layout in layouts.values()) + len(state))
        draft = self._draft(parts, is_best, {stem: layout.shared for stem, layout in layouts.items() if layout.shared})
        if parse_name(draft.name) is None:
            raise StorageError(
                f"{draft.name} exceeds the last commit number", where=str(self.directory), hint="Start a new run"
            )
        temporary = self.directory / f"{TEMPORARY}{draft.commit_number:04d}-{os.getpid()}-{secrets.token_hex(4)}"
        final = self.directory / draft.name
        try:
            manifest = write_checkpoint(self._fs, temporary, draft, layouts, state)
            self._fs.rename(temporary, final)
            self._fs.fsync_directory(self.directory)
        except OSError:
            undo_commit(self._fs, temporary, final)
            raise
        seconds = time.monotonic() - started_s
        return manifest, Committed(
            manifest.name, manifest.commit_number, manifest.update, final, seconds, manifest.bytes, is_best
        )

    def _draft(self, parts: Parts, is_best: bool, shared: dict[str, dict[str, str]]) -> Manifest:
        number, parent = self._next_commit_number(), self._parent
        earlier = find_best(self._scan(), self._best_commit())
        return Manifest(
            run_id=self._run_id,
            commit_number=number,
            parent_commit=parent.commit_number if parent else None,
            update=parts.update,
            created=datetime.now(UTC).isoformat(timespec="milliseconds"),
            reason=parts.reason,
            metric=parts.metric,
            is_best=is_best,
            best_commit=number if is_best else (earlier.commit_number if earlier else None),
            health=parts.health,
            fingerprints=parts.fingerprints,
            shared=shared,
            files={},
        )

    # After a commit: pointers and retention

    def _tidy(self, manifest: Manifest) -> None:
        try:
            stored = self._scan()
        except OSError as error:  # without a listing nothing may be deleted
            self.emit("delete_failed", file=Path(str(error.filename)).name, error=describe(error))
            return
        self._point(stored, manifest)
        victims = surplus(stored, self.settings.keep_last, manifest.best_commit, self._pinned_commit())
        delete(self._fs, self.directory, [item.name for item in victims], self.emit)

    def _point(self, stored: list[Stored], manifest: Manifest) -> None:
        own = next((item for item in stored if item.commit_number == manifest.commit_number), None)
        best = find_best(stored, manifest.best_commit)
        try:
            if own is not None:
                write_pointer(self._fs, self.run_directory / LAST, own)
            if best is not None and best.name != self._best_pointer:
                write_pointer(self._fs, self.run_directory / BEST, best)
                self._best_pointer = best.name
        except OSError as error:
            self.emit("pointer_failed", file=Path(str(error.filename)).name, error=describe(error))

    def _best_commit(self) -> int | None:
        return self._parent.best_commit if self._parent else None

    def _pinned_commit(self) -> int | None:
        return self._resumed_commit if self._commits < PINNED_COMMITS else None

    def _adopt(self, loaded: Loaded) -> Loaded:
        manifest = loaded.manifest
        self._parent, self._resumed_commit, self._commits = manifest, manifest.commit_number, 0
        directory = self.directory / loaded.name
        self.newest = Committed(
            loaded.name, loaded.commit_number, loaded.update, directory, 0.0, manifest.bytes, manifest.is_best
        )
        return loaded

    # Names and disk space

    def _next_commit_number(self) -> int:
        """One more than every known commit number, quarantined and pointed-to ones included: no name is used twice."""
        names = self._fs.names(self.directory) + self._fs.names(self.directory / QUARANTINE)
        parsed = [parse_name(name.removeprefix(TRASH).split(".")[0]) for name in names]
        known = [key[1] for key in parsed if key is not None]
        pointed = [pointed_commit(self._fs, self.run_directory / name) for name in (LAST, BEST)]
        self._last_commit_number = 1 + max([self._last_commit_number, *known, *pointed])
        return self._last_commit_number

    def _require_space(self, update: int, size_bytes: int) -> None:
        """Raise DiskFull unless the checkpoint and a reserve fit; delete surplus checkpoints first if that is enough."""
        need = size_bytes + size_bytes // 20 + self.reserve_bytes
        if self._fs.free_bytes(self.directory) >= need:
            return
        self.sweep()
        stored = self._scan()
        best = find_best(stored, self._best_commit())
        victims = surplus(stored, MIN_KEPT, best.commit_number if best else None, self._pinned_commit())
        names = [item.name for item in victims]
        free = self._fs.free_bytes(self.directory)
        if free < need <= free + sum(item.manifest.bytes for item in victims):
            self.emit("space", need_bytes=need, free_bytes=free, deleted=names)
            delete(self._fs, self.directory, names, self.emit)
            free = self._fs.free_bytes(self.directory)
        if free < need:
            raise DiskFull(
                f"no space for the checkpoint of update {update}: {need / 2**20:.0f} MiB are needed, {free / 2**20:.0f} free",
                where=str(self.directory),
                hint="Free some space, then start again: the run resumes from its last checkpoint",
            )
