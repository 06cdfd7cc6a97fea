"""What goes into a checkpoint, what a save returns, and what a load returns."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resilient_t5.checkpoint.manifest import Manifest


@dataclass(frozen=True)
class Parts:
    """What one checkpoint holds.

    Args:
        update: applied updates; names the directory.
        tensors: file stem ("model", "optimizer", "rng") -> tensor name -> tensor on any device. Names that share the same
            memory within one file are written once and share it again after a load.
        state: JSON values; floats that are not finite are kept exactly, keys must be strings.
        reason: periodic, best, signal, final or rollback.
        health: what a rollback looks at; any False makes the checkpoint unhealthy.
        fingerprints: hashes of configuration, data and tokenizer, to be compared on resume.
        metric: what `best` judged by, for the pointers.
        are_copies: nobody changes the tensors any more, so they need not be copied before the caller goes on.
    """

    update: int
    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any]
    reason: str
    health: dict[str, Any]
    fingerprints: dict[str, str]
    metric: float | None = None
    are_copies: bool = False


@dataclass(frozen=True)
class Committed:
    """A checkpoint that is durable: `seconds` from the start of its save to the commit, `bytes` of its files.

    `is_best` when it was the best of its run when it was saved.
    """

    name: str
    q: int
    update: int
    directory: Path
    seconds: float
    bytes: int
    is_best: bool


@dataclass(frozen=True)
class Loaded:
    """A checkpoint whose every byte was verified; tensors are on the CPU with their saved dtypes."""

    name: str
    q: int
    update: int
    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any]
    manifest: Manifest
