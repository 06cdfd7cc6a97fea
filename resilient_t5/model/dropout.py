"""Dropout that saves one byte per value, and the keys that it is drawn by.

A GPU draws and applies a mask in one kernel. On a CPU the Bernoulli draws of torch take longer than the element-wise work
around them (9.6 ms for a million on one core), so a mask is compared from random 16-bit numbers (1.8 ms): the probability is
then a multiple of 2**-16, and the kept values are scaled by exactly its inverse.
"""

import hashlib
import struct
from dataclasses import dataclass

import torch

LEVELS = 1 << 16


@dataclass(frozen=True)
class DropoutMask:
    """What was kept, and by which factors kept values are scaled."""

    keep: torch.Tensor | None
    """bool, of the shape of the values; None without dropout."""
    mask_scale: float = 1.0
    """The factor that is applied together with the mask."""
    product_scale: float = 1.0
    """The factor that is left to the matrix product that follows, which applies it at no cost."""

    @property
    def scales(self) -> tuple[float, float]:
        """`mask_scale` and `product_scale`, to build the mask again in a backward pass."""
        return self.mask_scale, self.product_scale

    def apply(self, values: torch.Tensor) -> torch.Tensor:
        """Mask and `mask_scale` applied to values, which are not changed."""
        if self.keep is None:
            return values
        if self.mask_scale == 1.0:
            return values * self.keep
        return torch.ops.aten.native_dropout_backward(values, self.keep, self.mask_scale)

    def apply_(self, values: torch.Tensor) -> torch.Tensor:
        """The same for values that are not needed afterwards."""
        return values.mul_(self.keep) if self.keep is not None and self.mask_scale == 1.0 else self.apply(values)


def draw_ahead(shape: torch.Size, probability: float, by_kernel: bool) -> torch.Tensor | None:
    """The mask of a later `drop` on a CPU; None if that draws it itself.

    A mask outlives the values that it is applied to. Allocated before them it leaves no gap in the heap when they are freed.
    """
    return None if by_kernel or probability <= 0 else random_mask(shape, probability)


def drop(
    values: torch.Tensor, probability: float, by_kernel: bool, drawn: torch.Tensor | None = None
) -> tuple[torch.Tensor, DropoutMask]:
    """Draw a mask from the global generator of the device and apply it, all but its `product_scale`.

    Args:
        values: floats of any shape, not needed afterwards.
        probability: that a value becomes zero.
        by_kernel: in one call, as for a GPU.
        drawn: the mask from `draw_ahead`, of the same number of values.
    """
    if probability <= 0:
        return values, DropoutMask(None)
    if by_kernel:
        scaled, keep = torch.native_dropout(values, probability, True)
        return scaled, DropoutMask(keep, mask_scale=1.0 / (1.0 - probability))
    keep = random_mask(values.shape, probability) if drawn is None else drawn.view(values.shape)
    return values.mul_(keep), DropoutMask(keep, product_scale=LEVELS / (LEVELS - _dropped_levels(probability)))


def _dropped_levels(probability: float) -> int:
    return min(LEVELS - 1, round(probability * LEVELS))


def random_mask(shape: torch.Size, probability: float) -> torch.Tensor:
    """A bool mask on the CPU, False with `probability`, which is rounded to a multiple of 2**-16."""
    keep = torch.empty(shape, dtype=torch.bool)
    words = torch.empty(-(-keep.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    torch.ge(words.view(torch.int16)[: keep.numel()], _dropped_levels(probability) - LEVELS // 2, out=keep.view(-1))
    return keep


def seed_dropout(seed: int, update: int, micro_batch: int) -> None:
    """Seed torch's global generators, on all devices, with a hash of the three numbers.

    Dropout is then a function of them alone, independent of earlier draws, of a resume, and of the rank.
    """
    digest = hashlib.blake2b(struct.pack("<4q", seed, update, micro_batch, 0), digest_size=8, person=b"dropout").digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
