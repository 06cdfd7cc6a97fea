"""Read one checkpoint directory; every size and every sha256 is checked before anything is returned."""

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
from resilient_t5.errors import NO_SPACE, DiskFull, NoValidCheckpoint, StorageError
from resilient_t5.files import FileSystem, closing

# Errors that prove damage of the checkpoint. Any other error (no permission, too many open files, an unreachable file server)
# does not, and must not quarantine a valid checkpoint.
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


def read_directory(fs: FileSystem, directory: Path, run_id: str | None) -> Loaded:
    """Load and verify the checkpoint in `directory`; of any run when `run_id` is None.

    Raises:
        CorruptCheckpoint: it differs from what a save of that run committed under that name.
        OSError: an error that does not prove damage of the checkpoint.
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
    return Loaded(manifest.name, manifest.commit_number, manifest.update, tensors, state, manifest)


def read_stored(fs: FileSystem, directory: Path, run_id: str | None) -> tuple[Manifest, str]:
    """The manifest of `directory` and its sha256; sizes of all files are checked, contents are not read.

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
        NoValidCheckpoint: it is damaged or does not exist.
        StorageError: it cannot be read.
    """
    return read_or_refuse(FileSystem(), Path(os.path.abspath(directory)), None)


def read_or_refuse(fs: FileSystem, directory: Path, run_id: str | None) -> Loaded:
    """`read_directory` for a checkpoint that the user named; raises NoValidCheckpoint, DiskFull or StorageError."""
    try:
        with reporting(f"{directory} cannot be read"):
            return read_directory(fs, directory, run_id)
    except CorruptCheckpoint as damage:
        raise NoValidCheckpoint(
            f"{directory} cannot be loaded: {damage}", hint="Name another checkpoint, or use run.resume auto"
        ) from damage


def damage_of(error: OSError) -> Exception:
    """Convert an error that proves damage to CorruptCheckpoint; return any other error unchanged."""
    reason = DAMAGE.get(error.errno or 0)
    return CorruptCheckpoint(reason, f"{Path(str(error.filename)).name}: {describe(error)}") if reason else error


def describe(error: OSError) -> str:
    """Name and description of the errno, with the call that failed."""
    call = "".join(f" in {note}" for note in getattr(error, "__notes__", [])[:1])
    return f"{errno.errorcode.get(error.errno or 0, 'unknown')}, {error.strerror or 'no description'}{call}"


@contextmanager
def reporting(what: str) -> Iterator[None]:
    """Convert an OSError to DiskFull or StorageError with the message `what`, the first errno, the call and the file."""
    try:
        yield
    except OSError as error:
        kind, fix = (DiskFull, "Free some space") if error.errno in NO_SPACE else (StorageError, "Fix the file system")
        hint = f"{fix}, then start again: the run resumes from its last checkpoint"
        raise kind(what, where=f"{error.filename}: {describe(error)}", hint=hint) from error


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
        raise CorruptCheckpoint("state", f"{STATE} is not an object")
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
