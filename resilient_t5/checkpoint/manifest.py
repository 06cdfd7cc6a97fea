"""The manifest of a checkpoint: its metadata, and the sha256 of every file and of the manifest itself.

It is the last file that is written into a checkpoint's directory, so a directory without a valid manifest was never
committed. A manifest is valid only if serialising it again gives the same bytes, so any edit is detected, even of white space.
This module also defines the input of a save (`Parts`), its result (`Committed`), and the result of a load (`Loaded`).
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from resilient_t5.checkpoint import strict_json
from resilient_t5.checkpoint.tensors import CHUNK_BYTES, Layout, chunks
from resilient_t5.errors import ResumeMismatch
from resilient_t5.files import FileSystem, OpenFile, closing, read_bounded

FORMAT = 1
MANIFEST = "MANIFEST.json"
STATE = "state.json"
MANIFEST_LIMIT_BYTES = 64 * 2**20
STATE_LIMIT_BYTES = 256 * 2**20
NAME = re.compile(r"u([0-9]{8,12})-([0-9]{4,8})")
STEM = re.compile(r"[a-z][a-z0-9_-]{0,40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
TENSOR_SUFFIX = ".safetensors"
JSON_KEYS = {"commit_number": "q", "parent_commit": "parent_q", "best_commit": "best_q"}
"""Field of `Manifest` -> its key in MANIFEST.json, where the two differ."""


class CorruptCheckpoint(Exception):
    """A checkpoint that must not be used; `reason` is one word for names and logs, the text gives the details."""

    def __init__(self, reason: str, detail: str):
        self.reason = reason
        super().__init__(detail)


@dataclass(frozen=True)
class FileEntry:
    """Size and hash of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything about a checkpoint except its state and tensors.

    `commit_number` grows by one per commit and defines the order; `parent_commit` is the checkpoint that the run continued
    from; `best_commit` the best one as of this commit (its own number when `is_best`). `shared` is
    {file stem: {alias: name}}.
    """

    run_id: str
    commit_number: int
    parent_commit: int | None
    update: int
    created: str
    reason: str
    metric: float | None
    is_best: bool
    best_commit: int | None
    health: dict[str, Any]
    fingerprints: dict[str, str]
    shared: dict[str, dict[str, str]]
    files: dict[str, FileEntry]

    @property
    def name(self) -> str:
        """The only directory name under which this checkpoint is valid."""
        return checkpoint_name(self.update, self.commit_number)

    @property
    def healthy(self) -> bool:
        """Whether no health field is False."""
        return not any(value is False for value in self.health.values())

    @property
    def bytes(self) -> int:
        """Bytes of all files except the manifest."""
        return sum(entry.bytes for entry in self.files.values())


def checkpoint_name(update: int, commit_number: int) -> str:
    """Directory name of the checkpoint after `update` applied updates."""
    return f"u{update:08d}-{commit_number:04d}"


def parse_name(name: str) -> tuple[int, int] | None:
    """(update, commit number) of a directory name, None when it is not the name of a checkpoint."""
    match = NAME.fullmatch(name)
    if match is None:
        return None
    update, commit_number = int(match[1]), int(match[2])
    return (update, commit_number) if checkpoint_name(update, commit_number) == name else None


def checkpoint_names(fs: FileSystem, directory: Path) -> list[str]:
    """Names of the checkpoint directories in `directory`, newest commit first."""
    numbered = [(key[1], key[0], name) for name in fs.names(directory) if (key := parse_name(name)) is not None]
    return [name for _, _, name in sorted(numbered, reverse=True)]


def dump(manifest: Manifest) -> bytes:
    """The bytes of MANIFEST.json."""
    fields = {"format": FORMAT, **{JSON_KEYS.get(name, name): value for name, value in asdict(manifest).items()}}
    return strict_json.dump({**fields, "self_sha256": hashlib.sha256(strict_json.dump(fields)).hexdigest()})


def read_manifest(fs: FileSystem, directory: Path) -> tuple[Manifest, str]:
    """The manifest of a checkpoint directory and the sha256 of its bytes; no other file is read.

    Raises:
        CorruptCheckpoint: its bytes are not those that a save wrote, or the directory has another name.
        ResumeMismatch: it is intact, but has a format that this version does not read.
        OSError: it cannot be read.
    """
    data = read_bounded(fs, directory / MANIFEST, MANIFEST_LIMIT_BYTES)
    try:
        manifest = _parse(data)
        written = dump(manifest)
    except (ValueError, TypeError) as error:
        raise CorruptCheckpoint("manifest", f"{MANIFEST}: {error}") from None
    if written != data:
        raise CorruptCheckpoint("manifest", f"{MANIFEST} was changed after it was written")
    if manifest.name != directory.name:
        raise CorruptCheckpoint("name", f"the manifest is that of {manifest.name}, the directory is {directory.name}")
    return manifest, hashlib.sha256(data).hexdigest()


def write_hashed(fs: FileSystem, path: Path, size: int, data: Iterable[memoryview]) -> FileEntry:
    """Write a new file of `size` bytes and make it durable. It is hashed while it is written, so nothing is read back.

    Raises:
        OSError: from the first call that failed; the file is then unusable.
        ValueError: `data` does not have `size` bytes.
    """
    digest, written = hashlib.sha256(), 0
    with closing(fs, fs.open_new(path)) as file:
        fs.allocate(file, size)
        for chunk in data:
            digest.update(chunk)
            fs.write(file, chunk)
            written += len(chunk)
        if written != size:
            raise ValueError(f"{path.name} has {written} bytes, not {size}")
        fs.fsync(file)
    return FileEntry(size, digest.hexdigest())


def write_checkpoint(fs: FileSystem, directory: Path, draft: Manifest, layouts: dict[str, Layout], state: bytes) -> Manifest:
    """Write tensor files, state and, last, the manifest into the new directory `directory`; durable on return.

    Returns:
        `draft` with the files and their hashes.

    Raises:
        OSError: from the first call that failed.
    """
    fs.make_directory(directory)
    files = {}
    for stem, layout in layouts.items():
        name = stem + TENSOR_SUFFIX
        files[name] = write_hashed(fs, directory / name, layout.size, chunks(layout))
    files[STATE] = write_hashed(fs, directory / STATE, len(state), [memoryview(state)])
    manifest = replace(draft, files=files)
    data = dump(manifest)
    write_hashed(fs, directory / MANIFEST, len(data), [memoryview(data)])
    fs.fsync_directory(directory)
    return manifest


class HashedReader:
    """Reads one file of a checkpoint from start to end and compares it with its manifest entry."""

    def __init__(self, fs: FileSystem, file: OpenFile, entry: FileEntry):
        if file.size != entry.bytes:
            raise CorruptCheckpoint("size", f"{file.path.name} has {file.size} bytes, not {entry.bytes}")
        self._fs, self._file, self._entry, self._digest = fs, file, entry, hashlib.sha256()

    def fill(self, buffer: memoryview) -> None:
        """Fill the whole buffer with the next bytes; CorruptCheckpoint at an early end of the file."""
        for start in range(0, len(buffer), CHUNK_BYTES):
            chunk = buffer[start : start + CHUNK_BYTES]
            if self._fs.read(self._file, chunk) != len(chunk):
                raise CorruptCheckpoint("size", f"{self._file.path.name} ends early")
            self._digest.update(chunk)

    def verify(self) -> None:
        """Raise CorruptCheckpoint unless the bytes read so far have the sha256 of the entry."""
        if self._digest.hexdigest() != self._entry.sha256:
            raise CorruptCheckpoint("sha256", f"{self._file.path.name} does not have the sha256 of its manifest")


def _parse(data: bytes) -> Manifest:
    fields = strict_json.load(data)
    if not isinstance(fields, dict):
        raise ValueError("not an object")
    if fields.pop("self_sha256", None) != hashlib.sha256(strict_json.dump(fields)).hexdigest():
        raise ValueError("wrong self_sha256")
    version = fields.pop("format", None)
    if version != FORMAT:  # intact, but of another version of this program: it must not be quarantined
        raise ResumeMismatch(
            f"the checkpoint has format {version}, this version reads format {FORMAT}",
            hint="Continue the run with the version of resilient_t5 that wrote it",
        )
    files = fields.pop("files", None)
    if not isinstance(files, dict) or STATE not in files:
        raise ValueError("no list of files")
    entries = {name: FileEntry(**entry) for name, entry in files.items()}
    for name, entry in entries.items():
        if not _is_file_name(name) or not _is_count(entry.bytes) or not SHA256.fullmatch(str(entry.sha256)):
            raise ValueError(f"invalid entry of the file {name!r}")
    names = {key: name for name, key in JSON_KEYS.items()}
    values = {names.get(str(key), str(key)): value for key, value in fields.items()}
    manifest = Manifest(files=entries, **values)
    if not _is_count(manifest.update) or not _is_count(manifest.commit_number) or parse_name(manifest.name) is None:
        raise ValueError("invalid update or q")
    if not isinstance(manifest.health, dict) or not isinstance(manifest.shared, dict):
        raise ValueError("invalid health or shared")
    if not all(isinstance(aliases, dict) for aliases in manifest.shared.values()):
        raise ValueError("invalid shared")
    return manifest


def _is_file_name(name: str) -> bool:
    return name == STATE or (name.endswith(TENSOR_SUFFIX) and STEM.fullmatch(name.removesuffix(TENSOR_SUFFIX)) is not None)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


@dataclass(frozen=True)
class Parts:
    """The content of one checkpoint.

    Args:
        update: applied updates; part of the directory name.
        tensors: file stem ("model", "optimizer", "rng") -> tensor name -> tensor on any device. Names that share memory
            within one file are written once and share memory again after a load.
        state: JSON values; non-finite floats are kept exactly, keys must be strings.
        reason: periodic, best, signal, final or rollback.
        health: any False makes the checkpoint unhealthy, so a rollback does not load it.
        fingerprints: hashes of configuration, data and tokenizer, compared on resume.
        metric: the value that decides `best`; written into the pointers.
        are_copies: the tensors do not change any more, so they need not be copied for a background save.
    """

    update: int
    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any]
    reason: str
    health: dict[str, Any]
    fingerprints: dict[str, str]
    metric: float | None = None
    are_copies: bool = False


@dataclass(frozen=True)
class Committed:
    """A durable checkpoint: `seconds` from the start of its save to the commit, `bytes` of its files.

    `is_best` if it was the best of its run when it was saved.
    """

    name: str
    commit_number: int
    update: int
    directory: Path
    seconds: float
    bytes: int
    is_best: bool


@dataclass(frozen=True)
class Loaded:
    """A verified checkpoint; tensors are on the CPU with their saved dtypes."""

    name: str
    commit_number: int
    update: int
    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any]
    manifest: Manifest
