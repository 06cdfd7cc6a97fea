"""The weights of a model directory: find, check and read what is there; write what `from_pretrained` loads.

A directory is hostile until it is checked: only known keys of `config.json` are believed, every shape is compared before a
tensor is read, and no file outside the directory is touched. safetensors are read where they are there, else
`pytorch_model.bin`, out of which nothing but tensors is taken.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from resilient_t5 import hub
from resilient_t5.errors import DataError, DiskFull, RunDirectoryError, StorageError
from resilient_t5.hub import BIN_FILE, CONFIG_FILE, GENERATION_FILE, INDEX_FILE, WEIGHT_LAYOUTS, WEIGHTS_FILE
from resilient_t5.model.pytorch_bin import BinFile

FLOAT_TYPES = {"F64", "F32", "F16", "BF16"}
OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf")


@dataclass(frozen=True)
class WeightFiles:
    """The tensors of a model directory: name -> file, name -> shape. All are floating point."""

    directory: Path
    file_of: dict[str, Path]
    shape_of: dict[str, tuple[int, ...]]
    bins: dict[Path, BinFile]
    """Those of the files that are no safetensors."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor as float32 in memory of its own, so that the file may change or vanish afterwards.

        Raises:
            DataError: the file cannot be read, or the tensor holds NaN or infinity.
        """
        path = self.file_of[name]
        tensor = self.bins[path].read(name) if path in self.bins else _read_safetensor(path, name)
        if not _is_finite(tensor):
            raise DataError(f"the tensor {name} holds NaN or infinity", where=str(path), hint="Take an undamaged checkpoint")
        return tensor


def find_weights(directory: Path) -> WeightFiles:
    """The weights of a model directory, in one file or in shards, names and shapes read and checked.

    Raises:
        DataError: no weights, an index that leads outside the directory, a shard that is missing or damaged, anything else
            than tensors in floating point.
    """
    for single, index, suffix in WEIGHT_LAYOUTS:
        if (directory / single).is_file():
            return _with_shapes(directory, [directory / single])
        if (directory / index).is_file():
            weight_map = hub.weight_map(directory / index, suffix)
            found = _with_shapes(directory, [directory / name for name in sorted(set(weight_map.values()))])
            absent = sorted(set(weight_map) - set(found.file_of))
            if absent:
                what = f"the shards lack {len(absent)} of the tensors that the index names, {absent[0]} first"
                raise DataError(what, where=str(directory / index), hint="Fetch all shards")
            return found
    hint = f"Put {WEIGHTS_FILE} or {BIN_FILE} there"
    others = sorted(path.name for pattern in OTHER_WEIGHTS for path in directory.glob(pattern))
    if others:
        raise DataError(f"no weights under a name that is read, only {others[0]}", where=str(directory), hint=hint)
    raise DataError("the model directory has no weights", where=str(directory), hint=hint)


def _with_shapes(directory: Path, paths: list[Path]) -> WeightFiles:
    found = WeightFiles(directory, {}, {}, {})
    for path in paths:
        hub.refuse_pointer(path)
        if path.suffix == ".bin":
            found.bins[path] = BinFile(path)
        shapes = found.bins[path].shape_of if path in found.bins else _safetensors_shapes(path)
        found.file_of.update(dict.fromkeys(shapes, path))
        found.shape_of.update(shapes)
    return found


def _safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    shapes = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                tensor = file.get_slice(name)
                if tensor.get_dtype() not in FLOAT_TYPES:
                    what = f"the tensor {name} is stored as {tensor.get_dtype()}, not as floating point"
                    raise DataError(what, where=str(path), hint="Take a checkpoint that is not quantised")
                shapes[name] = tuple(tensor.get_shape())
    except (SafetensorError, OSError) as error:
        raise DataError(f"not readable as safetensors: {error}", where=str(path), hint="Fetch the file again") from error
    return shapes


def _is_finite(tensor: torch.Tensor) -> bool:
    # Both ends of the range are NaN where a value is; `isfinite` would need the tensor's memory once more.
    return tensor.numel() == 0 or all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))


def _read_safetensor(path: Path, name: str) -> torch.Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name).to(torch.float32, copy=True)
            return tensor
    except (SafetensorError, OSError) as error:
        what = f"the tensor {name} cannot be read: {error}"
        raise DataError(what, where=str(path), hint="Fetch the file again") from error


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
        raise RunDirectoryError("a model already lies there", where=str(directory), hint="export into an empty directory")
    owned = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in ((CONFIG_FILE, config), (GENERATION_FILE, generation)):
            (directory / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        # `format` is what transformers looks for before it believes a file.
        save_file(owned, directory / WEIGHTS_FILE, metadata={"format": "pt"})
        # safetensors lets only the owner read the file; it is to follow the umask, as the others do.
        (directory / WEIGHTS_FILE).chmod((directory / CONFIG_FILE).stat().st_mode & 0o777)
    except (OSError, SafetensorError) as error:
        # safetensors reports a full disk in words only.
        full = getattr(error, "errno", None) == 28 or "os error 28" in str(error)
        kind = DiskFull if full else StorageError
        raise kind(f"the export cannot be written: {error}", where=str(directory), hint="make room or hint the disk") from error
