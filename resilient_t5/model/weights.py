"""Model directories on disk: find, check and read what is there; write what `from_pretrained` loads.

A directory is hostile until it is checked: only JSON and safetensors are opened, only known keys of `config.json` are
believed, every shape is compared before a tensor is read, and no file outside the directory is touched. Nothing here
unpickles.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from resilient_t5.errors import DataError, DiskFull, RunDirectoryError, StorageError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"
LARGEST_JSON_BYTES = 64 * 2**20
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
FLOAT_TYPES = {"F64", "F32", "F16", "BF16"}
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
CONVERT = (
    "convert it once where you trust the file: read it with torch.load(..., weights_only=True) and write the tensors with "
    "safetensors.torch.save_file into model.safetensors"
)


@dataclass(frozen=True)
class WeightFiles:
    """The tensors of a model directory: name -> file, name -> shape. All are floating point."""

    directory: Path
    file_of: dict[str, Path]
    shape_of: dict[str, tuple[int, ...]]

    def read(self, name: str) -> torch.Tensor:
        """One tensor as float32 in memory of its own, so that the file may change or vanish afterwards.

        Raises:
            DataError: the file cannot be read, or the tensor holds NaN or infinity.
        """
        path = self.file_of[name]
        try:
            with safe_open(path, framework="pt") as file:
                tensor = file.get_tensor(name).to(torch.float32, copy=True)
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"the tensor {name} cannot be read: {error}", where=str(path), mend="fetch the file again"
            ) from error
        if not bool(torch.isfinite(tensor).all()):
            raise DataError(f"the tensor {name} holds NaN or infinity", where=str(path), mend="take an undamaged checkpoint")
        return tensor


def resolve_directory(name_or_path: str) -> Path:
    """A local directory as it is, else the hub repository of that name, fetched or from the local cache.

    Raises:
        DataError: neither a directory nor a hub repository that can be had.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise DataError("a model is a directory, this is a file", where=name_or_path, mend="name the directory around it")
    if HUB_NAME.fullmatch(name_or_path) is None:
        raise DataError("no such model directory", where=name_or_path, mend="check model.name_or_path")
    # Imported here: only a hub name needs it, and it is the one road to the network.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = [CONFIG_FILE, GENERATION_FILE, "*.safetensors", INDEX_FILE]
    try:
        return Path(snapshot_download(name_or_path, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        cause = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"neither a local directory nor a hub model that can be fetched: {cause[0]}",
            where=name_or_path,
            mend="check the name, or the network, or give the path of a local copy",
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 64 MiB.

    Raises:
        DataError: missing, too large, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > LARGEST_JSON_BYTES:
            raise DataError("far too large for what it should hold", where=str(path), mend="fetch the file again")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"the model directory has no {path.name}", where=str(path.parent), mend="copy it there") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"not readable as JSON: {error}", where=str(path), mend="fetch the file again") from error
    if not isinstance(content, dict):
        raise DataError("not a JSON object", where=str(path), mend="fetch the file again")
    return content


def find_weights(directory: Path) -> WeightFiles:
    """The safetensors of a model directory, in one file or in shards, headers read and checked.

    Raises:
        DataError: no weights, only pickled ones, an index that leads outside the directory, a shard that is missing or
            damaged, a tensor that is not floating point.
    """
    single, index = directory / WEIGHTS_FILE, directory / INDEX_FILE
    if single.is_file():
        return _with_headers(directory, [single])
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise DataError("the index names no tensor", where=str(index), mend="fetch the file again")
        for name in weight_map.values():
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise DataError(
                    f"the index names {name!r}, which is no shard beside it", where=str(index), mend="do not use it"
                )
        shards = [directory / name for name in sorted(set(weight_map.values()))]
        found = _with_headers(directory, shards)
        absent = sorted(set(weight_map) - set(found.file_of))
        if absent:
            raise DataError(
                f"the shards lack {len(absent)} tensors, {absent[0]} first", where=str(index), mend="fetch all shards"
            )
        return found
    pickled = sorted(path.name for pattern in PICKLE_PATTERNS for path in directory.glob(pattern))
    if pickled:
        raise DataError(
            f"the weights are pickled ({pickled[0]}); unpickling runs code from the file, so it is refused",
            where=str(directory),
            mend=CONVERT,
        )
    raise DataError("the model directory has no weights", where=str(directory), mend=f"put {WEIGHTS_FILE} there")


def _with_headers(directory: Path, paths: list[Path]) -> WeightFiles:
    file_of: dict[str, Path] = {}
    shape_of: dict[str, tuple[int, ...]] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    tensor = file.get_slice(name)
                    if tensor.get_dtype() not in FLOAT_TYPES:
                        raise DataError(
                            f"the tensor {name} is stored as {tensor.get_dtype()}, not as floating point",
                            where=str(path),
                            mend="take a checkpoint that is not quantised",
                        )
                    file_of[name], shape_of[name] = path, tuple(tensor.get_shape())
        except (SafetensorError, OSError) as error:
            raise DataError(f"not readable as safetensors: {error}", where=str(path), mend="fetch the file again") from error
    return WeightFiles(directory, file_of, shape_of)


def write_directory(
    directory: Path, config: dict[str, Any], generation: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    """Write config.json, generation_config.json and model.safetensors into a directory that holds no model yet.

    The caller publishes the directory, by a rename, when everything else that belongs into it is there too.

    Raises:
        RunDirectoryError: a model already lies there; it is not touched.
        DiskFull, StorageError: the file system refuses; what was written so far lies there.
    """
    if any((directory / name).exists() for name in (CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE)):
        raise RunDirectoryError("a model already lies there", where=str(directory), mend="export into an empty directory")
    owned = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # `format` is what transformers looks for before it believes a file.
        save_file(owned, directory / WEIGHTS_FILE, metadata={"format": "pt"})
        for name, content in ((CONFIG_FILE, config), (GENERATION_FILE, generation)):
            (directory / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        # safetensors reports a full disk in words only.
        full = getattr(error, "errno", None) == 28 or "os error 28" in str(error)
        kind = DiskFull if full else StorageError
        raise kind(f"the export cannot be written: {error}", where=str(directory), mend="make room or mend the disk") from error
