"""Number formats: which one a device should use, float32 islands for float16, an overflow probe, keyed dropout.

T5 was trained in bfloat16 and overflows float16: the product of the second feed-forward matrix passes 65,504. The
precautions in transformers (`_keep_in_fp32_modules`, the clamps) do nothing under autocast.
"""

import hashlib
import struct
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from resilient_t5.errors import ConfigError
from resilient_t5.model.embeddings import T5Model
from resilient_t5.model.layers import LeanLinear
from resilient_t5.model.loss import token_nll

PrecisionName = Literal["fp32", "bf16", "fp16"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
CPU_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}
"""Words of /proc/cpuinfo; the last one is an ARM's. On one Zen 5 core such products are four times as fast as in float32."""
FIRST_LOSS_SCALE = 2.0**12
PROBE_TOLERANCE = 0.05
Batch = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]


@dataclass(frozen=True)
class Precision:
    """The number format of the matrix products, and the reason for it in words. Weights are always float32."""

    name: PrecisionName
    why: str

    def autocast(self, device: torch.device) -> AbstractContextManager[None]:
        """The context that a forward pass runs in; its casts are not cached across forward passes."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(device.type, dtype=DTYPES[self.name])

    @property
    def optimizer_dtype(self) -> torch.dtype:
        """Format of the products that an optimizer makes; float16 would overflow there."""
        return torch.bfloat16 if self.name == "bf16" else torch.float32

    def scaler(self, device: torch.device) -> torch.amp.GradScaler | None:
        """The loss scaler of float16; None where no scaling is needed."""
        return torch.amp.GradScaler(device.type, init_scale=FIRST_LOSS_SCALE) if self.name == "fp16" else None


def choose_precision(requested: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device) -> Precision:
    """The format that was asked for, or the best one that the device does natively.

    Raises:
        ConfigError: bf16 was asked for on a GPU that only emulates it.
    """
    native = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
    if requested == "bf16" and not native:
        raise ConfigError(f"hardware.precision: {torch.cuda.get_device_name(device)} has no bf16; use auto, fp16 or fp32")
    if device.type != "cuda":
        return _on_a_cpu(requested, cpu_multiplies_bf16())
    if requested != "auto":
        return Precision(requested, "as configured")
    if native:
        return Precision("bf16", f"{torch.cuda.get_device_name(device)} does bf16 natively")
    if torch.cuda.get_device_capability(device) >= (7, 0):
        return Precision("fp16", f"{torch.cuda.get_device_name(device)} has no bf16; fp16 with float32 islands")
    return Precision("fp32", f"{torch.cuda.get_device_name(device)} has no fast 16-bit products")


def _on_a_cpu(requested: Literal["auto", "fp32", "bf16", "fp16"], has_bf16: bool | None) -> Precision:
    if requested == "bf16" and has_bf16 is False:
        return Precision("bf16", "as configured, but this CPU only emulates it: fp32 is faster")
    if requested != "auto":
        return Precision(requested, "as configured")
    # Not chosen by itself: what a run computes should not change with the CPU that it wakes up on.
    return Precision("fp32", "a CPU; this one multiplies bf16, which hardware.precision can ask for" if has_bf16 else "a CPU")


def cpu_multiplies_bf16(facts: Path = Path("/proc/cpuinfo")) -> bool | None:
    """Whether this CPU has instructions for products of bfloat16; None where the system does not say."""
    try:
        return not CPU_BF16.isdisjoint(facts.read_text(encoding="ascii", errors="replace").split())
    except OSError:
        return None


class WideOutput(LeanLinear):
    """A linear layer whose product leaves in float32, so that what follows cannot overflow float16."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).float()


class WideProduct(nn.Linear):
    """A linear layer that is computed in float32 under any autocast."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return functional.linear(input.float(), self.weight.float())


def install_float32_islands(model: T5Model) -> int:
    """Keep every feed-forward layer from its activation to the residual stream in float32; returns how many.

    Only float16 needs it. The final norm runs in float32 as the residual stream does, and the loss does so by itself.
    Parameters keep their names and their identity. Installing twice changes nothing.
    """
    islands = 0
    for module in model.modules():
        if not isinstance(getattr(module, "wo", None), nn.Linear):
            continue
        for name, kind in (("wi", WideOutput), ("wi_0", WideOutput), ("wi_1", WideOutput), ("wo", WideProduct)):
            layer = getattr(module, name, None)
            if isinstance(layer, nn.Linear):
                # The class alone differs, so parameter, name and hooks stay what they are.
                layer.__class__ = kind
        islands += 1
    return islands


@torch.no_grad()
def probe_overflow(model: T5Model, batches: Iterable[Batch], precision: Precision, device: torch.device) -> Precision:
    """The same precision if it survives the batches, else float32; with the reason.

    Each batch is evaluated in float32 and in the given format, dropout off: both must be finite, and the mean loss may
    differ by 5 %. No random stream is used and the model's mode is restored.

    Args:
        model: on `device`, islands installed where `precision` is fp16.
        batches: (source (B, S), its mask or None, labels (B, T)), on `device`.
        precision: the candidate.
        device: where the model is.
    """
    if precision.name == "fp32":
        return precision
    training = model.training
    model.eval()
    try:
        wide, narrow, tokens = 0.0, 0.0, 0
        for source_BS, mask_BS, labels_BT in batches:
            exact = token_nll(model, source_BS, mask_BS, labels_BT)
            with precision.autocast(device):
                rounded = token_nll(model, source_BS, mask_BS, labels_BT)
            wide += float(exact.nll_sum_B.sum())
            narrow += float(rounded.nll_sum_B.sum())
            tokens += int(exact.tokens_B.sum())
    finally:
        model.train(training)
    offset = abs(narrow - wide) / max(abs(wide), 1e-9)
    if offset <= PROBE_TOLERANCE:  # false for NaN
        return Precision(precision.name, f"{precision.why}; probe on {tokens} tokens differs from fp32 by {offset:.2%}")
    cause = f"differs from fp32 by {offset:.1%}" if offset < torch.inf else "overflows"
    return Precision("fp32", f"{precision.name} {cause} in a probe on {tokens} tokens")


def keep_cudnn_attention_out() -> None:
    """Switch cuDNN's attention off for this process: with a mask its backward gives NaN on Hopper at some lengths.

    T5's bias is such a mask. The memory-efficient and the plain kernels remain. Without CUDA nothing happens.
    """
    if torch.cuda.is_available():
        torch.backends.cuda.enable_cudnn_sdp(False)


def attention_backward_offset(device: torch.device, heads: int = 6, head_width: int = 64) -> float:
    """Largest relative difference between the gradients of the attention in use and of the plain one, at length 64.

    The bias drives row maxima far down, where a broken kernel gives NaN; the result is then infinite. A start-up probe:
    above 0.05 the kernels of this machine are not to be trusted.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (2, heads, 64, head_width)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    inputs = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3)]
    bias = (torch.randn(1, heads, 64, 64, generator=generator) * 4 - 150).to(device, dtype)

    def gradients(context: Callable[[], AbstractContextManager[None]]) -> list[torch.Tensor]:
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (*inputs, bias)]
        query, key, value, mask = leaves
        with context():
            output = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)
            output.float().square().sum().backward()
        return [leaf.grad.float() for leaf in leaves if leaf.grad is not None]

    in_use, plain = gradients(nullcontext), gradients(lambda: sdpa_kernel(SDPBackend.MATH))
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(in_use, plain, strict=True))
    return worst if worst == worst else float("inf")


def check_attention(device: torch.device) -> str:
    """Compare the backward pass of a GPU's attention with the plain one; leave only the plain one where it cannot be trusted.

    Returns:
        What was found, to be added to a reason.
    """
    offset = attention_backward_offset(device)
    if offset <= PROBE_TOLERANCE:
        return f"; attention's backward is within {offset:.1e} of the plain one"
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_flash_sdp(False)
    return f"; attention's backward is off by {offset:.1e}, so only the plain kernel is used"


def seed_dropout(seed: int, update: int, micro_batch: int) -> None:
    """Start torch's global streams, on all devices, from a hash of the three numbers.

    Dropout is then a function of them alone: neither what ran before, nor a resume, nor the process that computes the
    micro-batch can move it.
    """
    digest = hashlib.blake2b(struct.pack("<4q", seed, update, micro_batch, 0), digest_size=8, person=b"dropout").digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
