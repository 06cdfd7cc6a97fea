"""The weight files of a model directory: find, check, read, write.

The content of a directory is untrusted until it is checked: only known keys of `config.json` are used, every shape is compared
before a tensor is read, and no file outside the directory is opened. safetensors is preferred to `pytorch_model.bin`.

`pytorch_model.bin` is a pickle, and an ordinary unpickler runs code from the file. `torch.load(weights_only=True)` builds
tensors and plain containers only, and refuses every other name. The zip format (since torch 1.6) is memory-mapped; the
older format must be read whole.
"""

import json
import re
import zipfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from resilient_t5 import hub
from resilient_t5.errors import NO_SPACE, DataError, DiskFull, RunDirectoryError, StorageError
from resilient_t5.hub import BIN_FILE, CONFIG_FILE, GENERATION_FILE, INDEX_FILE, WEIGHT_LAYOUTS, WEIGHTS_FILE

FLOAT_TYPES = {"F64", "F32", "F16", "BF16"}
FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf")
ZIP_START = b"PK\x03\x04"
# Pages of the map that were read count as memory of this process until the map is closed.
REOPEN_AFTER_BYTES = 256 * 2**20
FETCH_AGAIN = "Fetch the file again"
QUANTISED = "Take a checkpoint that is not quantised"
NEEDS_TENSORS = "Take model.safetensors, or a pytorch_model.bin that save_pretrained wrote"


class BinFile:
    """A `pytorch_model.bin` or one of its shards: names and shapes at once, values on `read`.

    Raises:
        DataError: incomplete, or not a dictionary of floating-point tensors.
    """

    def __init__(self, path: Path):
        self.path = path
        self._is_zip = _is_uncompressed_zip(path)
        content = self._load(with_values=False)
        self.shape_of = {name: self._shape(name, value) for name, value in content.items()}
        self._content: dict[str, Any] = content if self._is_zip else {}
        self._bytes_read = 0

    def read(self, name: str) -> torch.Tensor:
        """One tensor as float32, in memory of its own.

        A file in the old format stays in memory after the first read. A tensor that was read is dropped from it, so that
        reading the whole model needs little more memory than the model.

        Raises:
            DataError: the file cannot be read.
        """
        if name not in self._content:
            self._content = self._load(with_values=True)
        value = self._content[name] if self._is_zip else self._content.pop(name)
        tensor: torch.Tensor = value.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        self._bytes_read += value.nbytes
        if self._bytes_read > REOPEN_AFTER_BYTES and self._is_zip:
            self._content, self._bytes_read = {}, 0
        return tensor

    def _load(self, *, with_values: bool) -> dict[str, Any]:
        # For the names and shapes of a file in the old format the values are not needed.
        reading = nullcontext() if with_values or self._is_zip else torch.serialization.skip_data()
        try:
            with reading:
                content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=self._is_zip)
        except Exception as error:  # a damaged or malicious file can raise anything
            raise self._refusal(error) from error
        if not isinstance(content, dict) or not content or not all(isinstance(name, str) for name in content):
            raise DataError("the file is not a dictionary of tensors", where=str(self.path), hint=NEEDS_TENSORS)
        return content

    def _refusal(self, error: Exception) -> DataError:
        text = str(error)
        foreign = re.search(r"GLOBAL (\S+)", text)
        if foreign:
            what = f"the file wants to run {foreign[1]}, and only tensors are read from it"
            return DataError(what, where=str(self.path), hint=NEEDS_TENSORS)
        reason = re.search(r"WeightsUnpickler error: (.*)", text) or re.match(r"\s*(.*)", text)
        why = (reason[1] if reason else "").strip()[:200] or type(error).__name__
        return DataError(f"not readable as weights of PyTorch: {why}", where=str(self.path), hint=FETCH_AGAIN)

    def _shape(self, name: str, value: Any) -> tuple[int, ...]:
        where = str(self.path)
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout is not torch.strided:
            raise DataError(f"{name} is a {type(value).__name__} and no plain tensor", where=where, hint=NEEDS_TENSORS)
        if value.dtype not in FLOAT_DTYPES:
            what = f"the tensor {name} is stored as {str(value.dtype).removeprefix('torch.')}, not as floating point"
            raise DataError(what, where=where, hint=QUANTISED)
        stored = value.untyped_storage().nbytes()
        if value.nbytes > stored or stored > self.path.stat().st_size:
            raise DataError(f"the file does not hold all values of {name}", where=where, hint=FETCH_AGAIN)
        return tuple(value.shape)


def _is_uncompressed_zip(path: Path) -> bool:
    """Whether the file can be memory-mapped; False for the older format.

    Raises:
        DataError: the zip is compressed, which torch.save never does: a map of it would hold wrong values.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(ZIP_START)) != ZIP_START:
                return False
        with zipfile.ZipFile(path) as archive:
            compressed = any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist())
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        raise DataError(f"not readable as weights of PyTorch: {error}", where=str(path), hint=FETCH_AGAIN) from error
    if compressed:
        raise DataError("the zip archive is compressed", where=str(path), hint=NEEDS_TENSORS)
    return True


@dataclass(frozen=True)
class WeightFiles:
    """The tensors of a model directory: name -> file, name -> shape. All are floating point."""

    directory: Path
    file_of: dict[str, Path]
    shape_of: dict[str, tuple[int, ...]]
    bins: dict[Path, BinFile]
    """The files that are not safetensors."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor as float32 in memory of its own, so that the file may change or vanish afterwards.

        Raises:
            DataError: the file cannot be read, or the tensor holds NaN or infinity.
        """
        path = self.file_of[name]
        tensor = self.bins[path].read(name) if path in self.bins else _read_safetensor(path, name)
        # NaN propagates to both ends of the range; `isfinite` of the whole tensor would need its memory once more.
        if tensor.numel() and not all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor)):
            raise DataError(f"the tensor {name} holds NaN or infinity", where=str(path), hint="Take an undamaged checkpoint")
        return tensor


def find_weights(directory: Path) -> WeightFiles:
    """Find the weights of a model directory, in one file or in shards; names and shapes are read and checked.

    Raises:
        DataError: no weights, an index with a path outside the directory, a missing or damaged shard, or content other than
            floating-point tensors.
    """
    for single, index, suffix in WEIGHT_LAYOUTS:
        if (directory / single).is_file():
            return _with_shapes(directory, [directory / single])
        if (directory / index).is_file():
            weight_map = hub.weight_map(directory / index, suffix)
            files = _with_shapes(directory, [directory / name for name in sorted(set(weight_map.values()))])
            missing = sorted(set(weight_map) - set(files.file_of))
            if missing:
                what = f"the shards lack {len(missing)} of the tensors in the index, {missing[0]} first"
                raise DataError(what, where=str(directory / index), hint="Fetch all shards")
            return files
    hint = f"Put {WEIGHTS_FILE} or {BIN_FILE} there"
    others = sorted(path.name for pattern in OTHER_WEIGHTS for path in directory.glob(pattern))
    if others:
        raise DataError(f"no weights under a supported name, only {others[0]}", where=str(directory), hint=hint)
    raise DataError("the model directory has no weights", where=str(directory), hint=hint)


def _with_shapes(directory: Path, paths: list[Path]) -> WeightFiles:
    files = WeightFiles(directory, {}, {}, {})
    for path in paths:
        hub.refuse_pointer(path)
        if path.suffix == ".bin":
            files.bins[path] = BinFile(path)
        shapes = files.bins[path].shape_of if path in files.bins else _safetensors_shapes(path)
        files.file_of.update(dict.fromkeys(shapes, path))
        files.shape_of.update(shapes)
    return files


def _safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    shapes = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                tensor = file.get_slice(name)
                if tensor.get_dtype() not in FLOAT_TYPES:
                    what = f"the tensor {name} is stored as {tensor.get_dtype()}, not as floating point"
                    raise DataError(what, where=str(path), hint=QUANTISED)
                shapes[name] = tuple(tensor.get_shape())
    except (SafetensorError, OSError) as error:
        raise DataError(f"not readable as safetensors: {error}", where=str(path), hint=FETCH_AGAIN) from error
    return shapes


def _read_safetensor(path: Path, name: str) -> torch.Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name).to(torch.float32, copy=True)
            return tensor
    except (SafetensorError, OSError) as error:
        raise DataError(f"the tensor {name} cannot be read: {error}", where=str(path), hint=FETCH_AGAIN) from error


def write_directory(
    directory: Path, config: dict[str, Any], generation: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    """Write config.json, generation_config.json and model.safetensors into a directory without a model.

    The caller renames the directory to its final name once all other files are written too.

    Raises:
        RunDirectoryError: the directory has a model already; it is not touched.
        DiskFull, StorageError: a write failed; files written before stay there.
    """
    if any((directory / name).exists() for name in (CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE)):
        raise RunDirectoryError(
            "the directory already has a model", where=str(directory), hint="Export into an empty directory"
        )
    owned = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in ((CONFIG_FILE, config), (GENERATION_FILE, generation)):
            (directory / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        # transformers requires the `format` entry.
        save_file(owned, directory / WEIGHTS_FILE, metadata={"format": "pt"})
        # safetensors creates the file with mode 600; it should follow the umask as the others do.
        (directory / WEIGHTS_FILE).chmod((directory / CONFIG_FILE).stat().st_mode & 0o777)
    except (OSError, SafetensorError) as error:
        # safetensors reports a full disk in its message only.
        full = getattr(error, "errno", None) in NO_SPACE or "os error 28" in str(error)
        kind = DiskFull if full else StorageError
        raise kind(
            f"the export cannot be written: {error}", where=str(directory), hint="Free some space or fix the disk"
        ) from error
