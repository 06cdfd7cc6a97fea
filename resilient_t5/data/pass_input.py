"""Micro-batches as one tensor on a GPU, copied ahead by the reader threads.

Shapes: R rows, S source tokens, T target tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch

# Label of a padded target position, ignored by the cross-entropy.
IGNORED = -100


@dataclass(frozen=True)
class PassInput:
    """Source, source segments, labels and target segments of a micro-batch in one int32 tensor."""

    flat: torch.Tensor
    """(2 R S + 2 R T,)"""
    shape: tuple[int, int, int]
    """R, S, T."""
    copied: "torch.cuda.Event | None" = None
    """Recorded after the copy to the device; None if `flat` may be used at once."""

    @classmethod
    def of(
        cls,
        source_RS: torch.Tensor,
        segments_RS: torch.Tensor,
        labels_RT: torch.Tensor,
        target_segments_RT: torch.Tensor | None,
    ) -> "PassInput":
        """The tensors of a micro-batch in host memory as one; without target segments each row is one example."""
        if target_segments_RT is None:
            target_segments_RT = labels_RT != IGNORED
        parts = (source_RS, segments_RS, labels_RT, target_segments_RT)
        flat = np.concatenate([part.numpy().ravel().astype(np.int32, copy=False) for part in parts])
        return cls(torch.from_numpy(flat), (*source_RS.shape, labels_RT.shape[1]))

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


class CopyAhead:
    """Copies micro-batches to a GPU on a stream of its own, from pinned memory; called by reader threads."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def __call__(self, host: PassInput) -> PassInput | None:
        """The input on the device, or on its way there; None without memory for it, then the update copies it."""
        try:
            with torch.cuda.stream(self._stream):
                flat = host.flat.pin_memory().to(self._device, non_blocking=True)
                copied = torch.cuda.Event()
                copied.record(self._stream)
        except torch.OutOfMemoryError:
            return None
        return PassInput(flat, host.shape, copied)
