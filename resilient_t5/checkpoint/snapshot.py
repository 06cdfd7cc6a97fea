"""Copies of the tensors of a checkpoint in host memory, and the check that all values are finite."""

from collections.abc import Iterator, Mapping

import torch

from resilient_t5.checkpoint.tensors import split_shared, tensor_bytes
from resilient_t5.errors import Diverged

TensorFiles = dict[str, dict[str, torch.Tensor]]
"""File stem -> tensor name -> tensor."""


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
