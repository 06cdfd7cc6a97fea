"""pytorch_model.bin: the tensors of a file that torch.save wrote, and nothing else of it.

Such a file is a pickle, and an ordinary unpickler runs what the file tells it to. `torch.load(weights_only=True)` is an
interpreter that builds tensors and plain containers and refuses every other name, so no code of the file runs. The zip
format (since torch 1.6) is mapped into memory and costs no memory of its own; the format before it must be read whole.
"""

import re
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from resilient_t5.errors import DataError

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ZIP_START = b"PK\x03\x04"
# Pages of the map that were read count as memory of this process until the map is closed.
REOPEN_AFTER_BYTES = 256 * 2**20
PUBLISHED = "Take model.safetensors, or a pytorch_model.bin that save_pretrained wrote"


class BinFile:
    """One file: names and shapes at once, values when they are asked for.

    Raises:
        DataError: not whole, or not a dictionary of tensors in floating point.
    """

    def __init__(self, path: Path):
        self.path = path
        self._is_zip = _is_plain_zip(path)
        found = self._load(with_values=False)
        self.shape_of = {name: self._shape(name, value) for name, value in found.items()}
        self._held: dict[str, Any] = found if self._is_zip else {}
        self._bytes_read = 0

    def read(self, name: str) -> torch.Tensor:
        """One tensor as float32, in memory of its own.

        An old file is in memory once it was read; what is taken out of it is forgotten there, so that reading all of a
        model needs little more than the model.

        Raises:
            DataError: the file cannot be read any more.
        """
        if name not in self._held:
            self._held = self._load(with_values=True)
        value = self._held[name] if self._is_zip else self._held.pop(name)
        tensor: torch.Tensor = value.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        self._bytes_read += value.nbytes
        if self._bytes_read > REOPEN_AFTER_BYTES and self._is_zip:
            self._held, self._bytes_read = {}, 0
        return tensor

    def _load(self, *, with_values: bool) -> dict[str, Any]:
        # An old file is read without its values at first: for names and shapes they are not needed.
        reading = nullcontext() if with_values or self._is_zip else torch.serialization.skip_data()
        try:
            with reading:
                content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=self._is_zip)
        except Exception as error:
            # A damaged or hostile file can make the interpreter fail in any way.
            raise self._refusal(error) from error
        if not isinstance(content, dict) or not content or not all(isinstance(name, str) for name in content):
            raise DataError("the file holds no dictionary of tensors", where=str(self.path), hint=PUBLISHED)
        return content

    def _refusal(self, error: Exception) -> DataError:
        text = str(error)
        foreign = re.search(r"GLOBAL (\S+)", text)
        if foreign:
            what = f"the file wants to run {foreign[1]}, and only tensors are taken out of it"
            return DataError(what, where=str(self.path), hint=PUBLISHED)
        reason = re.search(r"WeightsUnpickler error: (.*)", text) or re.match(r"\s*(.*)", text)
        why = (reason[1] if reason else "").strip()[:200] or type(error).__name__
        return DataError(f"not readable as weights of PyTorch: {why}", where=str(self.path), hint="Fetch the file again")

    def _shape(self, name: str, value: Any) -> tuple[int, ...]:
        where = str(self.path)
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout is not torch.strided:
            raise DataError(f"{name} is a {type(value).__name__} and no plain tensor", where=where, hint=PUBLISHED)
        if value.dtype not in FLOATS:
            what = f"the tensor {name} is stored as {str(value.dtype).removeprefix('torch.')}, not as floating point"
            raise DataError(what, where=where, hint="Take a checkpoint that is not quantised")
        stored = value.untyped_storage().nbytes()
        if value.nbytes > stored or stored > self.path.stat().st_size:
            raise DataError(f"the file does not hold all values of {name}", where=where, hint="Fetch the file again")
        return tuple(value.shape)


def _is_plain_zip(path: Path) -> bool:
    """Whether the file can be mapped into memory; False for the older format.

    Raises:
        DataError: it is compressed, as torch.save never writes it: a map of it would hold other numbers.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(ZIP_START)) != ZIP_START:
                return False
        with zipfile.ZipFile(path) as archive:
            compressed = any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist())
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        what = f"not readable as weights of PyTorch: {error}"
        raise DataError(what, where=str(path), hint="Fetch the file again") from error
    if compressed:
        raise DataError("the file is compressed inside", where=str(path), hint=PUBLISHED)
    return True
