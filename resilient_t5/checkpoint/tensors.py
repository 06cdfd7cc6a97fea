"""The tensors of a checkpoint: copies in host memory, the check that all are finite, and their files.

The files have the safetensors format: 8 bytes of header length, a JSON header, and the raw buffers without gaps. They are
read and written as a stream, so that they are hashed in the same pass: the safetensors library cannot hash while it writes,
would have to read a file twice to verify it, and does not detect a flipped bit. Any safetensors reader opens these files.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from resilient_t5.checkpoint import strict_json
from resilient_t5.errors import Diverged

# A chunk fits into the CPU cache between hashing and writing, and bounds the host memory of a device tensor.
CHUNK_BYTES = 8 * 2**20
HEADER_LIMIT_BYTES = 64 * 2**20
MAX_DIMENSIONS = 16
METADATA = "__metadata__"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


TensorFiles = dict[str, dict[str, torch.Tensor]]
"""File stem -> tensor name -> tensor."""


class ByteSource(Protocol):
    """The input of `read_tensors`."""

    def fill(self, buffer: memoryview) -> None:
        """Fill the whole buffer, or raise."""


@dataclass(frozen=True)
class Layout:
    """The plan of a file: its header, the tensors in the order of their buffers, and {alias: name} of shared ones."""

    header: bytes
    tensors: list[torch.Tensor]
    shared: dict[str, str]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(tensor_bytes(tensor) for tensor in self.tensors)


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the elements of a tensor."""
    return tensor.numel() * tensor.element_size()


def split_shared(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Split into tensors with memory of their own, and {alias: name} for further names of the same memory.

    The first name in sorted order is the owner, so that the same model always gives the same file.
    """
    owners: dict[tuple[Any, ...], str] = {}
    unique: dict[str, torch.Tensor] = {}
    shared: dict[str, str] = {}
    for name, tensor in sorted(tensors.items()):
        memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        owner = owners.setdefault(memory, name) if tensor.numel() else name
        if owner == name:
            unique[name] = tensor
        else:
            shared[name] = owner
    return unique, shared


class NonFiniteState(Diverged):
    """The state holds NaN or infinity; it was not saved, and the older checkpoints are intact."""


def snapshot_bytes(tensors: TensorFiles) -> int:
    """Host memory that `take_snapshot` allocates."""
    return sum(tensor_bytes(tensor) for part in tensors.values() for tensor in split_shared(part)[0].values())


def take_snapshot(tensors: TensorFiles) -> TensorFiles:
    """Copy every tensor to new host memory, shared ones once; synchronous (one device sync per tensor)."""
    return {stem: _copy(part) for stem, part in tensors.items()}


def _copy(part: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    unique, shared = split_shared(part)
    copies = {name: torch.empty(t.shape, dtype=t.dtype).copy_(t.detach()) for name, t in unique.items()}
    return {**copies, **{alias: copies[name] for alias, name in shared.items()}}


def refuse_non_finite(tensors: TensorFiles) -> None:
    """Check all floating-point tensors, with one sync per device.

    Raises:
        NonFiniteState: names the first tensors that hold NaN or infinity.
    """
    bad = [f"{stem}/{name}" for stem, part in tensors.items() for name in _non_finite(part)]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise NonFiniteState(
            "the state holds NaN or infinity and was not saved; older checkpoints are intact",
            where=", ".join(bad[:3]) + more,
            hint="Lower optim.lr, or use another hardware.precision",
        )


def _non_finite(part: Mapping[str, torch.Tensor]) -> Iterator[str]:
    by_device: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in split_shared(part)[0].items():
        if tensor.is_floating_point() and tensor.numel():
            by_device.setdefault(tensor.device, []).append((name, _sum(tensor.detach())))
    for sums in by_device.values():
        finite = torch.stack([total for _, total in sums]).isfinite().tolist()
        # A sum of finite numbers can overflow, so these tensors are checked element by element.
        suspects = [name for (name, _), good in zip(sums, finite, strict=True) if not good]
        yield from (name for name in suspects if not _all_finite(part[name]))


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.element_size() == 1:
        tensor = tensor.to(torch.float32)
    return tensor.sum(dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32).to(torch.float32)


def _all_finite(tensor: torch.Tensor) -> bool:
    values = tensor.detach().to(torch.float32) if tensor.element_size() == 1 else tensor.detach()
    return bool(torch.isfinite(values).all())


def lay_out(tensors: Mapping[str, torch.Tensor]) -> Layout:
    """Plan the file of `tensors` (any device and shape, zero-dimensional and empty ones included).

    Raises:
        TypeError: a tensor that is not dense, a dtype that the format does not have, or an invalid name.
    """
    for name, tensor in tensors.items():
        if name in ("", METADATA, strict_json.FLOAT_KEY):
            raise TypeError(f"{name!r} cannot name a tensor")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in DTYPE_NAMES:
            raise TypeError(f"tensor {name!r} ({tensor.dtype}, {tensor.layout}, {tensor.device}) cannot be saved")
    unique, shared = split_shared(tensors)
    # Wide elements come first, so that every buffer is aligned for readers that map the file.
    ordered = sorted(unique.items(), key=lambda item: (-item[1].element_size(), item[0]))
    entries: dict[str, Any] = {METADATA: {"format": "pt"}}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor_bytes(tensor)
        entries[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT_BYTES:
        raise TypeError(f"the header of {len(entries)} tensors exceeds {HEADER_LIMIT_BYTES} bytes")
    return Layout(len(text).to_bytes(8, "little") + text, [tensor for _, tensor in ordered], shared)


def chunks(layout: Layout) -> Iterator[memoryview]:
    """The bytes of the file in order, at most CHUNK_BYTES at a time; device tensors are copied to the host in chunks."""
    yield memoryview(layout.header)
    for tensor in layout.tensors:
        flat = tensor.detach().reshape(-1)
        if flat.stride(0) != 1:  # an expanded tensor, or one element of a strided one, cannot be viewed as bytes
            flat = flat.clone(memory_format=torch.contiguous_format)
        data = flat.view(torch.uint8)
        for start in range(0, data.numel(), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES].cpu().numpy().data


def read_tensors(source: ByteSource, size: int, shared: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Read the tensors of a file of `size` bytes to the CPU, each into its own allocation so that it can be freed alone.

    Args:
        source: the bytes in order; the caller verifies their hash afterwards.
        size: bytes of the file; bounds every allocation.
        shared: {alias: name}; an alias becomes the same tensor object as its owner.

    Raises:
        ValueError: the bytes are not a safetensors file of this size, or `shared` does not fit.
    """
    entries = _read_header(source, size)
    tensors: dict[str, torch.Tensor] = {}
    for name, dtype, shape, _, _ in entries:
        tensor = torch.empty(shape, dtype=dtype)
        if tensor.numel():
            source.fill(tensor.reshape(-1).view(torch.uint8).numpy().data)
        tensors[name] = tensor
    for alias, name in shared.items():
        if name not in tensors or alias in tensors:
            raise ValueError(f"shared tensor {alias!r} -> {name!r} does not fit the file")
    return {**tensors, **{alias: tensors[name] for alias, name in shared.items()}}


Entry = tuple[str, torch.dtype, list[int], int, int]


def _read_header(source: ByteSource, size: int) -> list[Entry]:
    prefix = bytearray(8)
    if size < len(prefix):
        raise ValueError("shorter than a header")
    source.fill(memoryview(prefix))
    length = int.from_bytes(prefix, "little")
    if length > min(HEADER_LIMIT_BYTES, size - len(prefix)):
        raise ValueError(f"header of {length} bytes in a file of {size}")
    header = bytearray(length)
    source.fill(memoryview(header))
    fields = strict_json.load(bytes(header))
    if not isinstance(fields, dict):
        raise ValueError("the header is not an object")
    entries = sorted((_entry(name, value) for name, value in fields.items() if name != METADATA), key=lambda e: (e[3], e[4]))
    position = 0
    for name, _, _, start, end in entries:
        if start != position:
            raise ValueError(f"tensor {name!r} starts at {start}, not at {position}")
        position = end
    if len(prefix) + length + position != size:
        raise ValueError(f"the tensors end at {len(prefix) + length + position}, the file at {size}")
    return entries


def _entry(name: str, value: Any) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} has a malformed header entry")
    dtype, shape, offsets = DTYPES.get(str(value["dtype"])), value["shape"], value["data_offsets"]
    if dtype is None or not _sizes(shape) or len(shape) > MAX_DIMENSIONS or not _sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has an invalid dtype, shape or offset")
    start, end = offsets
    if math.prod(max(length, 1) for length in shape) >= 2**48:
        raise ValueError(f"tensor {name!r} has the impossible shape {shape}")
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {name!r} of shape {shape} does not have the bytes {start} to {end}")
    return name, dtype, shape, start, end


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**48 for item in value)
