"""Read one checkpoint directory, believing nothing: every size and every sha256 is checked before anything is returned."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from resilient_t5.checkpoint import strict_json
from resilient_t5.checkpoint.manifest import (
    STATE,
    STATE_LIMIT_BYTES,
    TENSOR_SUFFIX,
    CorruptCheckpoint,
    FileEntry,
    HashedReader,
    Loaded,
    Manifest,
    read_manifest,
)
from resilient_t5.checkpoint.tensors import read_tensors
from resilient_t5.errors import DiskFull, NoValidCheckpoint, ResilientError, StorageError
from resilient_t5.files import FileSystem, closing

# What the file system says when it is the checkpoint that is at fault. Anything else (no permission, too many open files,
# a server that is away) says nothing about the checkpoint, and must not send a good one into quarantine.
DAMAGE = {
    errno.ENOENT: "missing",
    errno.EIO: "unreadable",
    errno.ELOOP: "link",
    errno.ENOTDIR: "kind",
    errno.EISDIR: "kind",
    errno.EINVAL: "kind",
    errno.ENXIO: "kind",
    errno.EFBIG: "size",
}
FULL = (errno.ENOSPC, errno.EDQUOT)


def read_directory(fs: FileSystem, directory: Path, run_id: str | None) -> Loaded:
    """Load and verify the checkpoint in `directory`; of any run when `run_id` is None.

    Raises:
        CorruptCheckpoint: it is not exactly what a save of that run committed under that name.
        OSError: the file system failed in a way that says nothing about the checkpoint.
    """
    try:
        manifest = read_stored(fs, directory, run_id)[0]
        state = _read_state(fs, directory, manifest.files[STATE])
        tensors = {
            name.removesuffix(TENSOR_SUFFIX): _read_tensor_file(fs, directory / name, manifest)
            for name in manifest.files
            if name != STATE
        }
    except OSError as error:
        raise damage_of(error) from error
    return Loaded(manifest.name, manifest.q, manifest.update, tensors, state, manifest)


def read_stored(fs: FileSystem, directory: Path, run_id: str | None) -> tuple[Manifest, str]:
    """The manifest of `directory` and its sha256, with all files there in the right sizes; contents are not read.

    Raises:
        CorruptCheckpoint, OSError: as `read_directory`.
    """
    try:
        if not fs.is_directory(directory):
            raise CorruptCheckpoint("kind", f"{directory.name} is not a directory")
        manifest, sha256 = read_manifest(fs, directory)
        if run_id is not None and manifest.run_id != run_id:
            raise CorruptCheckpoint("run", f"it belongs to run {manifest.run_id!r}, not {run_id!r}")
        for name, entry in manifest.files.items():
            size = fs.file_size(directory / name)
            if size != entry.bytes:
                raise CorruptCheckpoint("size", f"{name} has {size} bytes, not {entry.bytes}")
    except OSError as error:
        raise damage_of(error) from error
    return manifest, sha256


def load_checkpoint(directory: Path) -> Loaded:
    """Load a checkpoint of any run by its path, for a fork or an export; nothing is moved or written.

    Raises:
        NoValidCheckpoint: it is damaged, or there is none.
        StorageError: it cannot be read.
    """
    return read_or_refuse(FileSystem(), Path(os.path.abspath(directory)), None)


def read_or_refuse(fs: FileSystem, directory: Path, run_id: str | None) -> Loaded:
    """`read_directory` with errors for a user who named this checkpoint."""
    try:
        with reporting(f"{directory} cannot be read"):
            return read_directory(fs, directory, run_id)
    except CorruptCheckpoint as damage:
        raise NoValidCheckpoint(
            f"{directory} cannot be loaded: {damage}", hint="Name another checkpoint, or use run.resume auto"
        ) from damage


def damage_of(error: OSError) -> Exception:
    """`error` as CorruptCheckpoint when the checkpoint is at fault, unchanged otherwise."""
    reason = DAMAGE.get(error.errno or 0)
    return CorruptCheckpoint(reason, f"{Path(str(error.filename)).name}: {describe(error)}") if reason else error


def describe(error: OSError) -> str:
    """The errno by name and in words, with the call that failed."""
    call = "".join(f" in {note}" for note in getattr(error, "__notes__", [])[:1])
    return f"{errno.errorcode.get(error.errno or 0, 'unknown')}, {error.strerror or 'no description'}{call}"


@contextmanager
def reporting(what: str) -> Iterator[None]:
    """Turn an OSError into DiskFull or StorageError that says `what`, the first errno, the call and the file."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, what) from error


def storage_error(error: OSError, what: str) -> ResilientError:
    """DiskFull or StorageError that names the first errno and the file it concerns."""
    where = f"{error.filename}: {describe(error)}"
    if error.errno in FULL:
        return DiskFull(what, where=where, hint="Free some space, then start again: the run goes on where it was saved last")
    return StorageError(
        what, where=where, hint="Mend the file system, then start again: the run goes on where it was saved last"
    )


def _read_state(fs: FileSystem, directory: Path, entry: FileEntry) -> dict[str, Any]:
    if entry.bytes > STATE_LIMIT_BYTES:
        raise CorruptCheckpoint("size", f"{STATE} has {entry.bytes} bytes, at most {STATE_LIMIT_BYTES} are expected")
    with closing(fs, fs.open_old(directory / STATE)) as file:
        reader = HashedReader(fs, file, entry)
        data = bytearray(entry.bytes)
        reader.fill(memoryview(data))
        reader.verify()
    try:
        state = strict_json.load(bytes(data))
    except ValueError as error:
        raise CorruptCheckpoint("state", f"{STATE}: {error}") from None
    if not isinstance(state, dict):
        raise CorruptCheckpoint("state", f"{STATE} is no object")
    return state


def _read_tensor_file(fs: FileSystem, path: Path, manifest: Manifest) -> dict[str, torch.Tensor]:
    entry, stem = manifest.files[path.name], path.name.removesuffix(TENSOR_SUFFIX)
    with closing(fs, fs.open_old(path)) as file:
        reader = HashedReader(fs, file, entry)
        try:
            tensors = read_tensors(reader, entry.bytes, manifest.shared.get(stem, {}))
        except ValueError as error:
            raise CorruptCheckpoint("format", f"{path.name}: {error}") from None
        reader.verify()
    return tensors
