"""The device of a run, its number format, and Accelerate for both; and compiled layers (`hardware.compile`).

Each block is compiled by itself, for all lengths at once. A stack of equal blocks gives one graph for the first and one for
the others, so four in all, and lengths that change bring no new ones. The in-place vocabulary gradients stay outside.
Checkpointing breaks the graphs and is excluded.
Compiled dropout draws other numbers from the same seed, and products may round otherwise: the run is another draw.
"""

import importlib.util
import os
import shutil
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs, GradScalerKwargs

from resilient_t5.config.schema import Config
from resilient_t5.data.batches import Batches
from resilient_t5.errors import ConfigError
from resilient_t5.model.embeddings import T5Model
from resilient_t5.model.precision import (
    FIRST_LOSS_SCALE,
    Precision,
    check_attention,
    choose_precision,
    keep_cudnn_attention_out,
    probe_overflow,
)
from resilient_t5.training.hardware.machine import choose_device

COMPILERS = ("c++", "g++", "clang++", "cl")


def compile_layers(model: T5Model, device: torch.device) -> None:
    """Compile every block of both stacks when it first runs, which takes about a minute; names and parameters stay.

    Raises:
        ConfigError: this machine has no C++ compiler, or on a GPU no triton.
    """
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else list(COMPILERS)
    if not any(shutil.which(name) for name in wanted):
        raise ConfigError(f"hardware.compile: no C++ compiler here ({', '.join(wanted)}); install one, or set it to false")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ConfigError("hardware.compile: triton is not installed, and a GPU's kernels need it; set it to false")
    for block in (*model.encoder.block, *model.decoder.block):
        block.compile(dynamic=True)


PROBE_MICRO_BATCHES = 4
ACCELERATE_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def build_device(config: Config) -> tuple[torch.device, Precision, Accelerator]:
    """The device, the number format and why, and Accelerate for both.

    Raises:
        ConfigError: fp16 on a CPU, or bf16 on a GPU that only emulates it.
    """
    if config.hardware.threads != "auto":
        torch.set_num_threads(config.hardware.threads)
    device = choose_device(config.hardware.device)
    precision = choose_precision(config.hardware.precision, device)
    if precision.name == "fp16" and device.type == "cpu":
        raise ConfigError("hardware.precision: fp16 needs a GPU; use fp32 or bf16 on a CPU")
    if config.hardware.deterministic:
        # cuBLAS reads it when the first matrix product creates its handle, which has not happened yet.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.hardware.deterministic)
    keep_cudnn_attention_out()
    # Moments of rows that are rarely seen decay into denormal numbers, which a CPU multiplies many times slower.
    torch.set_flush_denormal(True)
    accelerator = build_accelerator(precision, device)
    return accelerator.device, precision, accelerator


def build_accelerator(precision: Precision, device: torch.device) -> Accelerator:
    """Accelerate in this number format; one that was built before in another is forgotten."""
    AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision=ACCELERATE_PRECISION[precision.name],
        cpu=device.type == "cpu",
        kwargs_handlers=[AutocastKwargs(cache_enabled=False), GradScalerKwargs(init_scale=FIRST_LOSS_SCALE)],
    )


def settle_precision(config: Config, model: T5Model, batches: Batches, precision: Precision, device: torch.device) -> Precision:
    """A number format that was chosen for the user, tried on the first batches; the reason tells how close it came.

    On a GPU the backward pass of its attention is compared with the plain one as well, which takes over where they differ.
    """
    attention = check_attention(device) if device.type == "cuda" else ""
    if config.hardware.precision == "auto" and precision.name != "fp32":
        first = [
            (found.source_BS.to(device), found.source_mask_BS.to(device), found.labels_BT.to(device))
            for found in batches.at(0)[:PROBE_MICRO_BATCHES]
        ]
        precision = probe_overflow(model, first, precision, device)
    return replace(precision, why=precision.why + attention)
