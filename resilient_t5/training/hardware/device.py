"""Device, precision and Accelerator of a run."""

import os
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

PROBE_MICRO_BATCHES = 4
ACCELERATE_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def build_device(config: Config) -> tuple[torch.device, Precision, Accelerator]:
    """The device, the precision with the reason for it, and an Accelerator for both.

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
        # cuBLAS reads it at the first matrix product, when it creates its handle.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.hardware.deterministic)
    keep_cudnn_attention_out()
    # Optimizer moments of rare rows decay to denormal numbers, with which a CPU multiplies many times slower.
    torch.set_flush_denormal(True)
    accelerator = build_accelerator(precision, device)
    return accelerator.device, precision, accelerator


def build_accelerator(precision: Precision, device: torch.device) -> Accelerator:
    """A new Accelerator with this precision; replaces the global state of an earlier one."""
    AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision=ACCELERATE_PRECISION[precision.name],
        cpu=device.type == "cpu",
        kwargs_handlers=[AutocastKwargs(cache_enabled=False), GradScalerKwargs(init_scale=FIRST_LOSS_SCALE)],
    )


def settle_precision(config: Config, model: T5Model, batches: Batches, precision: Precision, device: torch.device) -> Precision:
    """Test an automatically chosen precision on the first batches; its reason then includes the measured headroom.

    On a GPU the backward pass of fused attention is compared with plain attention, which is used where they differ.
    """
    attention = check_attention(device) if device.type == "cuda" else ""
    if config.hardware.precision == "auto" and precision.name != "fp32":
        first = [
            tuple(
                None if part is None else part.to(device)
                for part in (batch.source_BS, batch.source_mask_BS, batch.labels_BT, batch.target_segments_BT)
            )
            for batch in batches.at(0)[:PROBE_MICRO_BATCHES]
        ]
        precision = probe_overflow(model, first, precision, device)
    return replace(precision, why=precision.why + attention)
