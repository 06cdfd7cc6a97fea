"""Resolve the name of a model or tokenizer to a directory, and define which files of that directory are read.

A local directory is used as it is. Any other valid repository name is downloaded with huggingface_hub, which reads
HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE; nothing else in this package uses the network. Only the files that are read
are downloaded: for a model config.json and one weight format, safetensors first. If the hub cannot be reached, the local
cache is used if it is complete.
"""

import errno
import functools
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import constants

from resilient_t5.errors import NO_SPACE, DataError, DiskFull, ResilientError, StorageError, plural

Kind = Literal["model", "tokenizer"]

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
BIN_FILE = "pytorch_model.bin"
BIN_INDEX_FILE = "pytorch_model.bin.index.json"
# A single file, or the index of shards and the suffix of their names; the first format that is present is read.
WEIGHT_LAYOUTS = ((WEIGHTS_FILE, INDEX_FILE, ".safetensors"), (BIN_FILE, BIN_INDEX_FILE, ".bin"))
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", CONFIG_FILE)
# Downloaded last: if one of them is in the cache, so are the settings that belong to it.
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
TOKENIZER_NEEDS = "tokenizer.json or spiece.model with the JSON files that were published with it"
MODEL_NEEDS = f"{CONFIG_FILE} and {WEIGHTS_FILE} or {BIN_FILE}, and {TOKENIZER_NEEDS}"

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
MAX_JSON_BYTES = 64 * 2**20
LFS_POINTER = b"version https://git-lfs"

MODEL_TYPES = {
    "T5ForConditionalGeneration": "t5",
    "T5WithLMHeadModel": "t5",
    "T5Model": "t5",
    "MT5ForConditionalGeneration": "mt5",
    "MT5Model": "mt5",
    "UMT5ForConditionalGeneration": "umt5",
    "LongT5ForConditionalGeneration": "longt5",
}
UNSUPPORTED = {
    "umt5": "umT5 has a position bias in every layer, which is not supported",
    "longt5": "LongT5 has a different attention, which is not supported",
}
BYTES = "ByT5 reads bytes instead of SentencePiece pieces, which is not supported"
WORDPIECE = "the tokenizer is a BERT vocabulary (vocab.txt) instead of SentencePiece, which is not supported"
TAKE_ANOTHER = "Name a T5, T5 1.1, flan-T5 or mT5 checkpoint with its SentencePiece tokenizer"
FETCH_AGAIN = "Fetch the file again"
FREE_SPACE = "Free some space, or set HF_HOME to a directory on another disk"


def resolve(name_or_path: str, kind: Kind, *, setting: str) -> Path:
    """The directory of a model or tokenizer: a local one, else the snapshot of a hub repository, downloaded if necessary.

    Args:
        name_or_path: a directory, `~` for the home directory, or a hub name (`google/mt5-small`).
        kind: which files are needed.
        setting: the setting that holds the name, for messages: `model.name_or_path`.

    Raises:
        DataError: no such directory, no such repository, or the hub cannot be reached and the cache is incomplete.
        DiskFull: the disk is too full for the download; nothing was downloaded.
        StorageError: the local cache cannot be written.
    """
    path = _local_path(name_or_path)
    if path is not None and path.is_dir():
        return path
    if path is not None:
        what, hint = f"{setting}: a {kind} is a directory, this is a file", "Name the directory that contains it"
        raise DataError(what, where=name_or_path, hint=hint)
    if HUB_NAME.fullmatch(name_or_path) is None:
        hint = f"Check {setting}: the path of a directory, or a name of the hub such as google/mt5-small"
        raise DataError(f"no such {kind} directory", where=name_or_path, hint=hint)
    return _from_hub(name_or_path, kind, setting)


def cached(name_or_path: str, kind: Kind) -> Path | None:
    """As `resolve`, without the network: a local directory or a snapshot in the local cache, else None.

    For a model config.json is enough, since a plan reads no weights.
    """
    path = _local_path(name_or_path)
    if path is not None and path.is_dir():
        return path
    if path is not None or HUB_NAME.fullmatch(name_or_path) is None:
        return None
    snapshot = _cached_snapshot(name_or_path, kind)
    if snapshot is None and kind == "model":
        return next((path for path in _snapshots(name_or_path) if (path / CONFIG_FILE).is_file()), None)
    return snapshot


def _local_path(name_or_path: str) -> Path | None:
    """The path if it exists; the empty name is not the working directory."""
    path = Path(os.path.expanduser(name_or_path))
    try:
        return path if name_or_path and path.exists() else None
    except (OSError, ValueError):
        return None  # an invalid or unreadable path


# Content of a directory


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 64 MiB.

    Raises:
        DataError: missing, too large, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise DataError("much too large for its purpose", where=str(path), hint=FETCH_AGAIN)
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"the directory has no {path.name}", where=str(path.parent), hint="Copy it there") from error
    except (OSError, ValueError, RecursionError) as error:
        refuse_pointer(path)
        raise DataError(f"not readable as JSON: {error}", where=str(path), hint=FETCH_AGAIN) from error
    if not isinstance(content, dict):
        raise DataError("not a JSON object", where=str(path), hint=FETCH_AGAIN)
    return content


def weight_map(index: Path, suffix: str) -> dict[str, str]:
    """Tensor name -> file name, from the index of sharded weights.

    Raises:
        DataError: no index, or one with a file name outside its directory.
    """
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise DataError("the index has no weight_map", where=str(index), hint=FETCH_AGAIN)
    for name in mapping.values():
        if not isinstance(name, str) or re.fullmatch(r"\w[\w.-]*", name) is None or not name.endswith(suffix):
            what = f"the index names {name!r}, which is not a shard in its directory"
            raise DataError(what, where=str(index), hint="Take the checkpoint from a source that you trust")
    return mapping


def model_kind(config: dict[str, Any]) -> str | None:
    """`t5`, `mt5` or another model type, from config.json; old files without `model_type` only name the class."""
    if config.get("model_type") is not None:
        return str(config["model_type"])
    names = config.get("architectures")
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    return next((MODEL_TYPES[name] for name in names if name in MODEL_TYPES), None)


def declared_rows(name_or_path: str) -> int | None:
    """`vocab_size` in the config.json of a model on this machine; None if unknown."""
    directory = cached(name_or_path, "model")
    if directory is None or not (directory / CONFIG_FILE).is_file():
        return None
    rows = read_json(directory / CONFIG_FILE).get("vocab_size")
    return rows if type(rows) is int else None


def refuse_pointer(path: Path) -> None:
    """Raise DataError if the file is a Git LFS pointer instead of the real file."""
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    except OSError:
        return  # the reader of the file reports the error
    if start == LFS_POINTER:
        what = f"{path.name} is a Git LFS pointer and not the file itself"
        raise DataError(what, where=str(path.parent), hint="Run `git lfs pull` there, or download the file")


def refuse_unsupported(directory: Path) -> None:
    """Refuse a model or tokenizer that is not supported. Missing and damaged files are left to their readers.

    Raises:
        DataError: ByT5, umT5, LongT5, a BERT vocabulary, another model type than t5 and mt5, or Git LFS pointers.
    """
    try:
        names = set(os.listdir(directory))
    except OSError:
        return
    weights = [[name for name in sorted(names) if name.endswith(suffix)] for _, _, suffix in WEIGHT_LAYOUTS]
    # With model.safetensors present, pytorch_model.bin may be a pointer: it is not read.
    for name in (CONFIG_FILE, *TOKENIZER_FILES, *(weights[0] or weights[1])):
        if name in names:
            refuse_pointer(directory / name)
    _refuse_kind(directory, names, str(directory))


def _refuse_kind(directory: Path, names: Iterable[str], where: str) -> None:
    """Refuse by config.json and tokenizer_config.json, if present and readable, and by the file names."""
    settings = {}
    for name in ("tokenizer_config.json", CONFIG_FILE):
        try:
            settings[name] = read_json(directory / name)
        except DataError:
            settings[name] = {}
    tokenizer = str(next((s["tokenizer_class"] for s in settings.values() if s.get("tokenizer_class")), ""))
    bare_vocabulary = "vocab.txt" in names and not set(names) & set(TOKENIZER_FILES)
    kind, reason = model_kind(settings[CONFIG_FILE]), None
    if kind not in (None, "t5", "mt5"):
        reason = UNSUPPORTED.get(kind, f"model_type is {kind!r}, not t5 or mt5")
    elif tokenizer.startswith("ByT5"):
        reason = BYTES
    elif tokenizer.startswith("Bert") or bare_vocabulary:
        reason = WORDPIECE
    if reason is not None:
        raise DataError(reason, where=where, hint=TAKE_ANOTHER)


# Download


@dataclass(frozen=True)
class _Listing:
    """A repository at one commit: file name -> size in bytes, and file name -> etag, its name in the local cache."""

    revision: str
    sizes: dict[str, int]
    etags: dict[str, str]


@functools.cache
def _listing(name: str) -> _Listing:
    """The files of the repository; requested once, so that model and tokenizer are of the same commit."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(name, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError("the server is not a hub") from None
    files = info.siblings or []
    if info.sha is None or COMMIT.fullmatch(info.sha) is None or not files:
        raise ValueError("the server is not a hub")
    etags = {file.rfilename: (file.lfs.sha256 if file.lfs else file.blob_id) or "" for file in files}
    sizes = {file.rfilename: file.size or (file.lfs.size if file.lfs else 0) for file in files}
    return _Listing(info.sha, sizes, etags)


@functools.cache
def _from_hub(name: str, kind: Kind, setting: str) -> Path:
    """The repository's snapshot in the local cache, with all files of this kind."""
    from huggingface_hub.errors import EntryNotFoundError, HTTPError

    try:
        return _download(name, kind, setting)
    except ResilientError:
        raise
    # The xet protocol of the hub raises RuntimeError when a transfer is interrupted.
    except (HTTPError, EntryNotFoundError, OSError, ValueError, RuntimeError) as error:
        _raise_storage_error(error)
        problem = _problem(error, name, setting)
        snapshot = _cached_snapshot(name, kind)
        if snapshot is None:
            raise problem from error
        if not constants.HF_HUB_OFFLINE:
            _log(f"{problem.what}; the local cache is used, revision {snapshot.name[:12]}")
        return snapshot


def _download(name: str, kind: Kind, setting: str) -> Path:
    listing = _listing(name)
    where = f"{constants.ENDPOINT}/{name}"
    first = _settings_files(listing, kind)
    if kind == "model" and CONFIG_FILE not in first:
        raise DataError(f"{setting}: the repository has no {CONFIG_FILE}", where=where, hint=TAKE_ANOTHER)
    missing = _missing(name, listing, first)
    snapshot = _fetch(name, listing, first) or _repository(name) / "snapshots" / listing.revision
    # Checked before gigabytes are downloaded.
    _refuse_kind(snapshot, listing.sizes, where)
    rest = _weight_files(snapshot, listing, where) if kind == "model" else _tokenizer_files(listing, where)
    missing += _missing(name, listing, rest)
    if missing:
        size = sum(listing.sizes[file] for file in missing)
        _require_space(name, size)
        files = plural(len(missing), "file")
        _log(f"downloading the {kind} {name} from {constants.ENDPOINT}: {files}, {_size(size)} ({', '.join(missing)})")
    snapshot = _fetch(name, listing, rest) or snapshot
    _write_reference(name, listing.revision)
    return snapshot


def _settings_files(listing: _Listing, kind: Kind) -> list[str]:
    if kind == "tokenizer":
        return [file for file in TOKENIZER_SETTINGS if file in listing.sizes]
    # An index is needed only if no file with precedence over it exists.
    preferred = {INDEX_FILE: {WEIGHTS_FILE}, BIN_INDEX_FILE: {WEIGHTS_FILE, INDEX_FILE, BIN_FILE}}
    indexes = [index for index, others in preferred.items() if not others & set(listing.sizes)]
    return [file for file in (CONFIG_FILE, GENERATION_FILE, *indexes) if file in listing.sizes]


def _weight_files(snapshot: Path, listing: _Listing, where: str) -> list[str]:
    """The weights in one format: a single file, or the shards of the index."""
    for single, index, suffix in WEIGHT_LAYOUTS:
        if single in listing.sizes:
            return [single]
        if index in listing.sizes:
            shards = sorted(set(weight_map(snapshot / index, suffix).values()))
            for shard in shards:
                if shard not in listing.sizes:
                    raise DataError(f"the repository lacks the shard {shard}", where=where, hint="Take another checkpoint")
            return shards
    what = f"the repository has neither {WEIGHTS_FILE} nor {BIN_FILE}; weights of TensorFlow and Flax are not supported"
    raise DataError(what, where=where, hint="Convert them with transformers 4, and give the local directory")


def _tokenizer_files(listing: _Listing, where: str) -> list[str]:
    files = [file for file in TOKENIZER_FILES if file in listing.sizes]
    if not files:
        raise DataError(f"the repository has neither {' nor '.join(TOKENIZER_FILES)}", where=where, hint=TAKE_ANOTHER)
    return files


def _fetch(name: str, listing: _Listing, files: Iterable[str]) -> Path | None:
    """Download files into the local cache, one after the other; return their snapshot directory."""
    from huggingface_hub import hf_hub_download

    paths = [hf_hub_download(name, file, revision=listing.revision) for file in files]
    return Path(paths[-1]).parent if paths else None


def _missing(name: str, listing: _Listing, files: Iterable[str]) -> list[str]:
    """The files that are not in the local cache, neither in this revision nor with the same content in another one."""
    repository = _repository(name)
    snapshot, blobs = repository / "snapshots" / listing.revision, repository / "blobs"
    return [file for file in files if not (snapshot / file).is_file() and not (blobs / listing.etags[file]).is_file()]


def _require_space(name: str, size: int) -> None:
    cache = _repository(name)
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if size > free:
        raise DiskFull(f"{name} needs {_size(size)}, and {_size(free)} are free", where=str(existing), hint=FREE_SPACE)


# Local cache


def _write_reference(name: str, revision: str) -> None:
    """Record the revision of `main`, which hf_hub_download does not do for a pinned one; used when the hub is offline."""
    reference = _repository(name) / "refs" / "main"
    part = reference.with_name(f"main.{os.getpid()}.part")
    try:
        if not reference.is_file() or reference.read_text(encoding="ascii") != revision:
            reference.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(revision, encoding="ascii")
            part.replace(reference)
    except (OSError, ValueError):
        return  # a read-only cache works without it


def _repository(name: str) -> Path:
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")


def _snapshots(name: str) -> list[Path]:
    """The revisions in the local cache: that of `main` first, then the newest."""
    try:
        repository = _repository(name)
        snapshots = sorted((repository / "snapshots").iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    except (OSError, ValueError):
        return []
    try:
        main = (repository / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        main = ""
    return sorted(snapshots, key=lambda path: path.name != main)


def _cached_snapshot(name: str, kind: Kind) -> Path | None:
    """The first revision in the local cache with all files of this kind."""
    return next((path for path in _snapshots(name) if _is_complete(path, kind)), None)


def _is_complete(snapshot: Path, kind: Kind) -> bool:
    if kind == "tokenizer":
        return any((snapshot / file).is_file() for file in TOKENIZER_FILES)
    for single, index, suffix in WEIGHT_LAYOUTS:
        if (snapshot / single).is_file():
            return (snapshot / CONFIG_FILE).is_file()
        if (snapshot / index).is_file():
            try:
                shards = set(weight_map(snapshot / index, suffix).values())
            except DataError:
                return False
            return all((snapshot / file).is_file() for file in (CONFIG_FILE, *shards))
    return False


# Errors and messages


def _raise_storage_error(error: BaseException) -> None:
    """Raise DiskFull or StorageError if the error is one of the local disk."""
    code = getattr(error, "errno", None)
    what, cache = f"the hub cache cannot be written: {error}", os.environ.get("HF_HOME", "~/.cache/huggingface")
    if code in NO_SPACE:
        raise DiskFull(what, where=cache, hint=FREE_SPACE) from error
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        raise StorageError(what, where=cache, hint="Set HF_HOME to a writable directory") from error


def _problem(error: BaseException, name: str, setting: str) -> DataError:
    """The message for an error of the hub, with the possible fixes."""
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    cause: BaseException = error
    while cause.__cause__ is not None and getattr(cause, "response", None) is None:
        cause = cause.__cause__
    status = getattr(getattr(cause, "response", None), "status_code", None)
    subject = f"{setting}:" if setting == f"hub:{name}" else f"{setting}: {name} is not a local directory, and"
    page = f"{constants.ENDPOINT}/{name}"
    if isinstance(cause, HFValidationError):
        return DataError(f"{subject} it is not a valid name of a hub repository", where=name, hint="Check the name")
    if isinstance(cause, GatedRepoError):
        hint = "Accept its conditions on that page, then log in with `hf auth login` or set HF_TOKEN"
        return DataError(f"{subject} its repository is gated ({status})", where=page, hint=hint)
    if isinstance(cause, RepositoryNotFoundError) or status in (401, 403, 404):
        what = f"{subject} the hub has no such repository or does not show it to you ({status})"
        hint = "Check the name; for a private or gated repository log in with `hf auth login` or set HF_TOKEN"
        return DataError(what, where=page, hint=hint)
    needs = TOKENIZER_NEEDS if setting.startswith("tokenizer") else MODEL_NEEDS
    hint = f"Check the network, or set HF_ENDPOINT to a mirror of the hub, or give a local directory with {needs}"
    lines = str(cause).strip().splitlines()
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else lines[0][:200] if lines else type(cause).__name__
    return DataError(f"{subject} {constants.ENDPOINT} cannot be reached: {reason}", hint=hint)


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def _log(text: str) -> None:
    sys.stderr.write(f"hub    {text}\n")
