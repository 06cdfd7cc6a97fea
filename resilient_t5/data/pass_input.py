"""Micro-batches as one tensor on a GPU, copied ahead by the reader threads.

Shapes: R rows, S source tokens, T target tokens.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

# Label of a padded target position, ignored by the cross-entropy.
IGNORED = -100


class HostBatch(Protocol):
    """A micro-batch in host memory; see `data/batches.py`."""

    @property
    def source_BS(self) -> torch.Tensor:
        """(R, S) ids."""
        ...

    @property
    def source_mask_BS(self) -> torch.Tensor:
        """(R, S): 0 for padding, else the number of the example in its row, from 1."""
        ...

    @property
    def labels_BT(self) -> torch.Tensor:
        """(R, T), padded with -100."""
        ...

    @property
    def target_segments_BT(self) -> torch.Tensor | None:
        """(R, T), as `source_mask_BS`; None if each row is one example."""
        ...


@dataclass(frozen=True)
class PassInput:
    """Source, source segments, labels and target segments of a micro-batch in one int32 tensor."""

    flat: torch.Tensor
    """(2 R S + 2 R T,)"""
    shape: tuple[int, int, int]
    """R, S, T."""
    copied: "torch.cuda.Event | None" = None
    """Recorded after the copy to the device; None if `flat` may be used at once."""

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views: source (R, S), source segments (R, S), labels (R, T), target segments (R, T)."""
        rows, source, target = self.shape
        sizes = [rows * source, rows * source, rows * target, rows * target]
        first, second, third, fourth = self.flat.split(sizes)
        return first.view(rows, source), second.view(rows, source), third.view(rows, target), fourth.view(rows, target)

    def to(self, device: torch.device) -> "PassInput":
        """The input on `device`."""
        return PassInput(self.flat.to(device), self.shape)

    def wait(self) -> None:
        """Let the current stream wait for the copy; the host does not wait."""
        if self.copied is not None:
            stream = torch.cuda.current_stream(self.flat.device)
            stream.wait_event(self.copied)
            self.flat.record_stream(stream)


def pass_input(batch: HostBatch) -> PassInput:
    """A micro-batch as one tensor in host memory; without segments each row is one example."""
    segments_BT = batch.target_segments_BT
    if segments_BT is None:
        segments_BT = batch.labels_BT != IGNORED
    parts = (batch.source_BS, batch.source_mask_BS, batch.labels_BT, segments_BT)
    flat = np.concatenate([part.numpy().ravel().astype(np.int32, copy=False) for part in parts])
    return PassInput(torch.from_numpy(flat), (*batch.source_BS.shape, batch.labels_BT.shape[1]))


class CopyAhead:
    """Copies micro-batches to a GPU on a stream of its own, from pinned memory; called by reader threads."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def __call__(self, batch: HostBatch) -> PassInput | None:
        """The micro-batch on the device, or on its way there; None without memory for it, then the update copies it."""
        host = pass_input(batch)
        try:
            with torch.cuda.stream(self._stream):
                flat = host.flat.pin_memory().to(self._device, non_blocking=True)
                copied = torch.cuda.Event()
                copied.record(self._stream)
        except torch.OutOfMemoryError:
            return None
        return PassInput(flat, host.shape, copied)
