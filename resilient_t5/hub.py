"""Where the name of a model or tokenizer becomes a directory, and which files of that directory are read.

A local directory is taken as it is. Anything else that is shaped like a hub name is downloaded with huggingface_hub, which
reads HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE; nothing else in this package reaches the network. A download takes
the files that are read and no others: for a model config.json and one format of the weights, safetensors first. When the
hub cannot be reached, the local cache serves if it holds all of them.
"""

import errno
import functools
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from resilient_t5.errors import DataError, DiskFull, ResilientError, StorageError

Want = Literal["model", "tokenizer"]

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
BIN_FILE = "pytorch_model.bin"
BIN_INDEX_FILE = "pytorch_model.bin.index.json"
# One file, or the index of several and how their names end; the first format that is there is the one that is read.
WEIGHT_LAYOUTS = ((WEIGHTS_FILE, INDEX_FILE, ".safetensors"), (BIN_FILE, BIN_INDEX_FILE, ".bin"))
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", CONFIG_FILE)
# Downloaded last, in this order: where one of them is in the cache, all that belongs to it is.
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
MODEL_NEEDS = f"{CONFIG_FILE} and {WEIGHTS_FILE} or {BIN_FILE}"
TOKENIZER_NEEDS = "tokenizer.json or spiece.model with the JSON files that were published beside it"

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
MAX_JSON_BYTES = 64 * 2**20
POINTER = b"version https://git-lfs"

KINDS = {
    "T5ForConditionalGeneration": "t5",
    "T5WithLMHeadModel": "t5",
    "T5Model": "t5",
    "MT5ForConditionalGeneration": "mt5",
    "MT5Model": "mt5",
    "UMT5ForConditionalGeneration": "umt5",
    "LongT5ForConditionalGeneration": "longt5",
}
UNSUPPORTED = {
    "umt5": "umT5 has a position bias of its own in every layer, which is not supported",
    "longt5": "LongT5 has another attention than T5, which is not supported",
}
BYTES = "ByT5 reads bytes instead of SentencePiece pieces, which is not supported"
WORDPIECE = "the tokenizer is a BERT vocabulary (vocab.txt) instead of SentencePiece, which is not supported"
TAKE_ANOTHER = "Name a T5, T5 1.1, flan-T5 or mT5 checkpoint with its SentencePiece tokenizer"


def resolve(name_or_path: str, want: Want, *, setting: str) -> Path:
    """The directory that a name means: a local one as it is, else the hub repository, downloaded as far as it is read.

    Args:
        name_or_path: a directory, `~` for the home directory, or a hub name (`google/mt5-small`).
        want: which files are read, those of the model or those of the tokenizer.
        setting: what the user set, for the messages: `model.name_or_path`.

    Raises:
        DataError: no such directory, or no such repository, or the hub cannot be reached and the cache is not complete.
        DiskFull: the disk has no room for the download; nothing was begun.
        StorageError: the local cache cannot be written.
    """
    path = _local_path(name_or_path)
    if path is not None and path.is_dir():
        return path
    if path is not None:
        what, hint = f"{setting}: a {want} is a directory, this is a file", "Name the directory around it"
        raise DataError(what, where=name_or_path, hint=hint)
    if HUB_NAME.fullmatch(name_or_path) is None:
        hint = f"Check {setting}: the path of a directory, or a name of the hub such as google/mt5-small"
        raise DataError(f"no such {want} directory", where=name_or_path, hint=hint)
    return _from_hub(name_or_path, want, setting)


def cached(name_or_path: str, want: Want) -> Path | None:
    """As `resolve`, without the network: a local directory, or the hub's local cache; None where neither is there.

    A model whose weights are not in the cache, but whose config.json is, counts: a plan reads no more.
    """
    path = _local_path(name_or_path)
    if path is not None and path.is_dir():
        return path
    if path is not None or HUB_NAME.fullmatch(name_or_path) is None:
        return None
    found = _cached_snapshot(name_or_path, want)
    if found is None and want == "model":
        return next((path for path in _snapshots(name_or_path) if (path / CONFIG_FILE).is_file()), None)
    return found


def _local_path(name_or_path: str) -> Path | None:
    """What exists under this name on this machine; the empty name is not the working directory."""
    path = Path(os.path.expanduser(name_or_path))
    try:
        return path if name_or_path and path.exists() else None
    except (OSError, ValueError):
        return None  # longer than a path can be, or not readable: nothing there that could be used


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 64 MiB.

    Raises:
        DataError: missing, too large, not JSON, or not an object.
    """
    again = "Fetch the file again"
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise DataError("far too large for what it should hold", where=str(path), hint=again)
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"the directory has no {path.name}", where=str(path.parent), hint="Copy it there") from error
    except (OSError, ValueError, RecursionError) as error:
        refuse_pointer(path)
        raise DataError(f"not readable as JSON: {error}", where=str(path), hint=again) from error
    if not isinstance(content, dict):
        raise DataError("not a JSON object", where=str(path), hint=again)
    return content


def weight_map(index: Path, suffix: str) -> dict[str, str]:
    """Tensor name -> file name, from the index of sharded weights.

    Raises:
        DataError: no index, or one that names a file elsewhere than beside it.
    """
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise DataError("the index names no tensor", where=str(index), hint="Fetch the file again")
    for name in mapping.values():
        if not isinstance(name, str) or re.fullmatch(r"\w[\w.-]*", name) is None or not name.endswith(suffix):
            what = f"the index names {name!r}, which is no shard beside it"
            raise DataError(what, where=str(index), hint="Take the checkpoint from a source that you trust")
    return mapping


def model_kind(config: dict[str, Any]) -> str | None:
    """`t5`, `mt5` or another model type, from config.json; a file older than `model_type` names the class only."""
    if config.get("model_type") is not None:
        return str(config["model_type"])
    names = config.get("architectures")
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    return next((KINDS[name] for name in names if name in KINDS), None)


def declared_rows(name_or_path: str) -> int | None:
    """`vocab_size` in the config.json of a model that is on this machine; None where it does not say."""
    directory = cached(name_or_path, "model")
    if directory is None or not (directory / CONFIG_FILE).is_file():
        return None
    rows = read_json(directory / CONFIG_FILE).get("vocab_size")
    return rows if type(rows) is int else None


def refuse_pointer(path: Path) -> None:
    """Refuse a file that is only the pointer of Git LFS to the real one.

    Raises:
        DataError: it is.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(POINTER))
    except OSError:
        return  # who reads the file says what is wrong with it
    if start == POINTER:
        what = f"{path.name} is a Git LFS pointer and not the file itself"
        raise DataError(what, where=str(path.parent), hint="Run `git lfs pull` there, or download the file")


def refuse_unsupported(directory: Path) -> None:
    """Refuse the model or tokenizer of a directory that no setting can make work, in one sentence.

    Files that are missing or damaged are left to those who read them.

    Raises:
        DataError: ByT5, umT5, LongT5, a BERT vocabulary, another model type than t5 and mt5, or Git LFS pointers.
    """
    try:
        names = set(os.listdir(directory))
    except OSError:
        return
    weights = [[name for name in sorted(names) if name.endswith(suffix)] for _, _, suffix in WEIGHT_LAYOUTS]
    # A clone may hold pytorch_model.bin as a pointer on purpose, when model.safetensors was pulled.
    for name in (CONFIG_FILE, *TOKENIZER_FILES, *(weights[0] or weights[1])):
        if name in names:
            refuse_pointer(directory / name)
    _refuse_kind(directory, names, str(directory))


def _refuse_kind(directory: Path, names: Iterable[str], where: str) -> None:
    """Refuse by what config.json and tokenizer_config.json say, where they lie there, and by the file names."""
    config, settings = _json_or_nothing(directory / CONFIG_FILE), _json_or_nothing(directory / "tokenizer_config.json")
    tokenizer = str(settings.get("tokenizer_class") or config.get("tokenizer_class") or "")
    present = set(names)
    bare_vocabulary = "vocab.txt" in present and not present & set(TOKENIZER_FILES)
    kind, reason = model_kind(config), None
    if kind not in (None, "t5", "mt5"):
        reason = UNSUPPORTED.get(kind, f"model_type is {kind!r}, not t5 or mt5")
    elif tokenizer.startswith("ByT5"):
        reason = BYTES
    elif tokenizer.startswith("Bert") or bare_vocabulary:
        reason = WORDPIECE
    if reason is not None:
        raise DataError(reason, where=where, hint=TAKE_ANOTHER)


def _json_or_nothing(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except DataError:
        return {}


@dataclass(frozen=True)
class _Listing:
    """A repository at one commit: file name -> size in bytes, and -> the name of its content in the local cache."""

    revision: str
    sizes: dict[str, int]
    etags: dict[str, str]


@functools.cache
def _listing(name: str) -> _Listing:
    """What the repository holds now; asked once, so that the model and its tokenizer are of one commit."""
    from huggingface_hub import HfApi, constants

    try:
        info = HfApi().model_info(name, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError("what answers there is not a hub") from None
    files = info.siblings or []
    if info.sha is None or COMMIT.fullmatch(info.sha) is None or not files:
        raise ValueError("what answers there is not a hub")
    etags = {file.rfilename: (file.lfs.sha256 if file.lfs else file.blob_id) or "" for file in files}
    sizes = {file.rfilename: file.size or (file.lfs.size if file.lfs else 0) for file in files}
    return _Listing(info.sha, sizes, etags)


@functools.cache
def _from_hub(name: str, want: Want, setting: str) -> Path:
    """The repository's snapshot in the local cache, with all files that are read."""
    from huggingface_hub.errors import EntryNotFoundError, HTTPError

    try:
        return _download(name, want, setting)
    except ResilientError:
        raise
    # RuntimeError is what the faster protocol of the hub raises when a transfer breaks off.
    except (HTTPError, EntryNotFoundError, OSError, ValueError, RuntimeError) as error:
        _refuse_storage(error)
        problem = _problem(error, name, setting)
        found = _cached_snapshot(name, want)
        if found is None:
            raise problem from error
        if not _is_offline():
            _say(f"{problem.what}; the local cache is used, revision {found.name[:12]}")
        return found


def _download(name: str, want: Want, setting: str) -> Path:
    listing = _listing(name)
    where = f"{_endpoint()}/{name}"
    first = _settings_files(listing, want)
    if want == "model" and CONFIG_FILE not in first:
        raise DataError(f"{setting}: the repository has no {CONFIG_FILE}", where=where, hint=TAKE_ANOTHER)
    missing = _missing(name, listing, first)
    snapshot = _fetch(name, listing, first) or _repository(name) / "snapshots" / listing.revision
    # Before gigabytes are downloaded that cannot be used.
    _refuse_kind(snapshot, listing.sizes, where)
    rest = list(_weight_files(snapshot, listing, where) if want == "model" else _tokenizer_files(listing, where))
    missing += _missing(name, listing, rest)
    size = sum(listing.sizes[file] for file in missing)
    if missing:
        _check_room(name, size)
        files = f"{len(missing)} file{'s' if len(missing) > 1 else ''}"
        _say(f"downloading the {want} {name} from {_endpoint()}: {files}, {_size(size)} ({', '.join(missing)})")
    snapshot = _fetch(name, listing, rest) or snapshot
    _remember(name, listing.revision)
    return snapshot


def _settings_files(listing: _Listing, want: Want) -> list[str]:
    if want == "tokenizer":
        return [file for file in TOKENIZER_SETTINGS if file in listing.sizes]
    # The index is read only where neither file that goes before it is there.
    before = {INDEX_FILE: {WEIGHTS_FILE}, BIN_INDEX_FILE: {WEIGHTS_FILE, INDEX_FILE, BIN_FILE}}
    indexes = [index for index, others in before.items() if not others & set(listing.sizes)]
    return [file for file in (CONFIG_FILE, GENERATION_FILE, *indexes) if file in listing.sizes]


def _weight_files(snapshot: Path, listing: _Listing, where: str) -> Iterator[str]:
    """The weights in one format: a single file, or the shards that the index names."""
    for single, index, suffix in WEIGHT_LAYOUTS:
        if single in listing.sizes:
            yield single
            return
        if index in listing.sizes:
            for shard in sorted(set(weight_map(snapshot / index, suffix).values())):
                if shard not in listing.sizes:
                    raise DataError(f"the repository lacks the shard {shard}", where=where, hint="Take another checkpoint")
                yield shard
            return
    what = f"the repository has neither {WEIGHTS_FILE} nor {BIN_FILE}; weights of TensorFlow and Flax are not read"
    raise DataError(what, where=where, hint="Convert them with transformers 4, and give the local directory")


def _tokenizer_files(listing: _Listing, where: str) -> list[str]:
    found = [file for file in TOKENIZER_FILES if file in listing.sizes]
    if not found:
        raise DataError(f"the repository has neither {' nor '.join(TOKENIZER_FILES)}", where=where, hint=TAKE_ANOTHER)
    return found


def _fetch(name: str, listing: _Listing, files: Iterable[str]) -> Path | None:
    """Put files into the local cache, one after the other, and return the snapshot they lie in."""
    from huggingface_hub import hf_hub_download

    paths = [hf_hub_download(name, file, revision=listing.revision) for file in files]
    return Path(paths[-1]).parent if paths else None


def _missing(name: str, listing: _Listing, files: Iterable[str]) -> list[str]:
    """The files that are not in the local cache, in this revision or with the same content in another one."""
    repository = _repository(name)

    def here(file: str) -> bool:
        blob = repository / "blobs" / listing.etags[file]
        return (repository / "snapshots" / listing.revision / file).is_file() or blob.is_file()

    return [file for file in files if not here(file)]


def _check_room(name: str, size: int) -> None:
    cache = _repository(name)
    there = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if size > free:
        hint = "Make room, or set HF_HOME to a directory on another disk"
        raise DiskFull(f"{name} needs {_size(size)}, and {_size(free)} are free", where=str(there), hint=hint)


def _remember(name: str, revision: str) -> None:
    """Let the name mean this revision when the hub cannot be reached, for us and for whoever uses the same cache."""
    reference = _repository(name) / "refs" / "main"
    part = reference.with_name(f"main.{os.getpid()}.part")
    try:
        if not reference.is_file() or reference.read_text(encoding="ascii") != revision:
            reference.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(revision, encoding="ascii")
            part.replace(reference)
    except (OSError, ValueError):
        return  # a cache that only others may write serves all the same; the files are found without it


def _repository(name: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")


def _snapshots(name: str) -> list[Path]:
    """The revisions in the local cache: the one that the name means first, then the newest."""
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


def _cached_snapshot(name: str, want: Want) -> Path | None:
    """The first revision in the local cache that holds all files that are read."""
    return next((path for path in _snapshots(name) if _is_complete(path, want)), None)


def _is_complete(snapshot: Path, want: Want) -> bool:
    if want == "tokenizer":
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


def _refuse_storage(error: BaseException) -> None:
    """Tell an error of the local disk from one of the network."""
    number = getattr(error, "errno", None)
    what, cache = f"the hub's cache cannot be written: {error}", os.environ.get("HF_HOME", "~/.cache/huggingface")
    if number in (errno.ENOSPC, errno.EDQUOT):
        raise DiskFull(what, where=cache, hint="Make room, or set HF_HOME to a directory on another disk") from error
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        raise StorageError(what, where=cache, hint="Set HF_HOME to a directory that you may write") from error


def _problem(error: BaseException, name: str, setting: str) -> DataError:
    """What went wrong with the hub, and the ways out of it."""
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    cause: BaseException = error
    while cause.__cause__ is not None and getattr(cause, "response", None) is None:
        cause = cause.__cause__
    status = getattr(getattr(cause, "response", None), "status_code", None)
    subject = f"{setting}:" if setting == f"hub:{name}" else f"{setting}: {name} is no local directory, and"
    page = f"{_endpoint()}/{name}"
    if isinstance(cause, HFValidationError):
        return DataError(f"{subject} the hub has no such names", where=name, hint="Check the name")
    if isinstance(cause, GatedRepoError):
        hint = "Accept its conditions on that page, then log in with `hf auth login` or set HF_TOKEN"
        return DataError(f"{subject} its repository is gated ({status})", where=page, hint=hint)
    if isinstance(cause, RepositoryNotFoundError) or status in (401, 403, 404):
        what = f"{subject} the hub has no such repository or does not show it to you ({status})"
        hint = "Check the name; for a private or gated repository log in with `hf auth login` or set HF_TOKEN"
        return DataError(what, where=page, hint=hint)
    # A model directory has its tokenizer beside it, whichever of the two was asked for first.
    needs = TOKENIZER_NEEDS if setting.startswith("tokenizer") else f"{MODEL_NEEDS}, and {TOKENIZER_NEEDS}"
    hint = f"Check the network, or set HF_ENDPOINT to a mirror of the hub, or give a local directory that holds {needs}"
    return DataError(f"{subject} {_endpoint()} cannot be reached: {_reason(cause)}", hint=hint)


def _reason(cause: BaseException) -> str:
    if _is_offline():
        return "HF_HUB_OFFLINE is set"
    lines = str(cause).strip().splitlines()
    return lines[0][:200] if lines else type(cause).__name__


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def _say(text: str) -> None:
    sys.stderr.write(f"hub    {text}\n")
