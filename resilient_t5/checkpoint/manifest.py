"""The manifest: what one checkpoint consists of, with the sha256 of every file and of itself.

It is written last inside a checkpoint's directory, so a directory without a whole manifest was never committed. Reading
it back must give the same bytes as writing it, so no edited byte passes, not even a blank.
Here too: what goes into a checkpoint (`Parts`), what a save returns (`Committed`), and what a load returns (`Loaded`).
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


class CorruptCheckpoint(Exception):
    """A checkpoint that must not be used; `reason` is one word for names and logs, the text says what was found."""

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

    `q` is the commit number, which grows by one per commit and names the order; `parent_q` the checkpoint that this one
    went on from; `best_q` the best one as of this commit (its own `q` when `is_best`). `shared` is
    {file stem: {alias: name}}.
    """

    run_id: str
    q: int
    parent_q: int | None
    update: int
    created: str
    reason: str
    metric: float | None
    is_best: bool
    best_q: int | None
    health: dict[str, Any]
    fingerprints: dict[str, str]
    shared: dict[str, dict[str, str]]
    files: dict[str, FileEntry]

    @property
    def name(self) -> str:
        """The only directory name under which this checkpoint is valid."""
        return checkpoint_name(self.update, self.q)

    @property
    def healthy(self) -> bool:
        """Whether no health field says no."""
        return not any(value is False for value in self.health.values())

    @property
    def bytes(self) -> int:
        """Bytes of all files except the manifest."""
        return sum(entry.bytes for entry in self.files.values())


def checkpoint_name(update: int, q: int) -> str:
    """Directory name of the checkpoint of `update` applied updates with commit number `q`."""
    return f"u{update:08d}-{q:04d}"


def parse_name(name: str) -> tuple[int, int] | None:
    """(update, q) of a directory name, None when it is not the name of a checkpoint."""
    match = NAME.fullmatch(name)
    if match is None:
        return None
    update, q = int(match[1]), int(match[2])
    return (update, q) if checkpoint_name(update, q) == name else None


def dump(manifest: Manifest) -> bytes:
    """The bytes of MANIFEST.json."""
    fields = {"format": FORMAT, **asdict(manifest)}
    return strict_json.dump({**fields, "self_sha256": hashlib.sha256(strict_json.dump(fields)).hexdigest()})


def read_manifest(fs: FileSystem, directory: Path) -> tuple[Manifest, str]:
    """The manifest of a checkpoint directory and the sha256 of its bytes; no other file is read.

    Raises:
        CorruptCheckpoint: it does not have the bytes that a save wrote, or belongs under another name.
        ResumeMismatch: it is whole, and of a format that this version does not read.
        OSError: it cannot be read.
    """
    data = read_bounded(fs, directory / MANIFEST, MANIFEST_LIMIT_BYTES)
    try:
        manifest = _parse(data)
        written = dump(manifest)
    except (ValueError, TypeError) as error:
        raise CorruptCheckpoint("manifest", f"{MANIFEST}: {error}") from None
    if written != data:
        raise CorruptCheckpoint("manifest", f"{MANIFEST} is not what was written")
    if manifest.name != directory.name:
        raise CorruptCheckpoint("name", f"it is {manifest.name} and lies under {directory.name}")
    return manifest, hashlib.sha256(data).hexdigest()


def write_hashed(fs: FileSystem, path: Path, size: int, data: Iterable[memoryview]) -> FileEntry:
    """Write a new file of `size` bytes and make it durable; hashed on the way, so nothing is read back.

    Raises:
        OSError: from the first call that failed; the file is of no use then.
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
    """Fill a new directory: tensor files, state, and the manifest last; durable on return, under a temporary name still.

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
    """Reads one file of a checkpoint from start to end and holds it against its manifest entry."""

    def __init__(self, fs: FileSystem, file: OpenFile, entry: FileEntry):
        if file.size != entry.bytes:
            raise CorruptCheckpoint("size", f"{file.path.name} has {file.size} bytes, not {entry.bytes}")
        self._fs, self._file, self._entry, self._digest = fs, file, entry, hashlib.sha256()

    def fill(self, buffer: memoryview) -> None:
        """Fill the whole buffer with the next bytes; CorruptCheckpoint when the file ends before."""
        for start in range(0, len(buffer), CHUNK_BYTES):
            chunk = buffer[start : start + CHUNK_BYTES]
            if self._fs.read(self._file, chunk) != len(chunk):
                raise CorruptCheckpoint("size", f"{self._file.path.name} ends early")
            self._digest.update(chunk)

    def verify(self) -> None:
        """Raise CorruptCheckpoint unless exactly the bytes that were written have been read."""
        if self._digest.hexdigest() != self._entry.sha256:
            raise CorruptCheckpoint("sha256", f"{self._file.path.name} has other bytes than were written")


def _parse(data: bytes) -> Manifest:
    fields = strict_json.load(data)
    if not isinstance(fields, dict):
        raise ValueError("is no object")
    if fields.pop("self_sha256", None) != hashlib.sha256(strict_json.dump(fields)).hexdigest():
        raise ValueError("does not have its own sha256")
    found = fields.pop("format", None)
    if found != FORMAT:  # whole, but of another version of this program: nothing that may go into quarantine
        raise ResumeMismatch(
            f"the checkpoint has format {found}, this version reads format {FORMAT}",
            hint="Continue the run with the version of resilient_t5 that wrote it",
        )
    files = fields.pop("files", None)
    if not isinstance(files, dict) or STATE not in files:
        raise ValueError("lists no files")
    entries = {name: FileEntry(**entry) for name, entry in files.items()}
    for name, entry in entries.items():
        if not _is_file_name(name) or not _is_count(entry.bytes) or not SHA256.fullmatch(str(entry.sha256)):
            raise ValueError(f"lists the unusable file {name!r}")
    manifest = Manifest(files=entries, **fields)
    if not _is_count(manifest.update) or not _is_count(manifest.q) or parse_name(manifest.name) is None:
        raise ValueError("has no usable update or q")
    if not isinstance(manifest.health, dict) or not isinstance(manifest.shared, dict):
        raise ValueError("has no usable health or shared")
    if not all(isinstance(names, dict) for names in manifest.shared.values()):
        raise ValueError("has no usable shared")
    return manifest


def _is_file_name(name: str) -> bool:
    return name == STATE or (name.endswith(TENSOR_SUFFIX) and STEM.fullmatch(name.removesuffix(TENSOR_SUFFIX)) is not None)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


@dataclass(frozen=True)
class Parts:
    """What one checkpoint holds.

    Args:
        update: applied updates; names the directory.
        tensors: file stem ("model", "optimizer", "rng") -> tensor name -> tensor on any device. Names that share the same
            memory within one file are written once and share it again after a load.
        state: JSON values; floats that are not finite are kept exactly, keys must be strings.
        reason: periodic, best, signal, final or rollback.
        health: what a rollback looks at; any False makes the checkpoint unhealthy.
        fingerprints: hashes of configuration, data and tokenizer, to be compared on resume.
        metric: what `best` judged by, for the pointers.
        are_copies: nobody changes the tensors any more, so they need not be copied before the caller goes on.
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
    """A checkpoint that is durable: `seconds` from the start of its save to the commit, `bytes` of its files.

    `is_best` when it was the best of its run when it was saved.
    """

    name: str
    q: int
    update: int
    directory: Path
    seconds: float
    bytes: int
    is_best: bool


@dataclass(frozen=True)
class Loaded:
    """A checkpoint whose every byte was verified; tensors are on the CPU with their saved dtypes."""

    name: str
    q: int
    update: int
    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any]
    manifest: Manifest
