"""Number formats: choice for a device, float32 islands for float16, overflow probe, dropout seeds.

T5 was trained in bfloat16 and overflows float16: the product of the second feed-forward matrix exceeds 65,504. The
precautions in transformers (`_keep_in_fp32_modules`, the clamps) have no effect under autocast.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from resilient_t5.errors import ConfigError
from resilient_t5.model.embeddings import T5Model
from resilient_t5.model.loss import token_nll

PrecisionName = Literal["fp32", "bf16", "fp16"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
CPU_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}
"""Flags in /proc/cpuinfo; the last one is for ARM. On one Zen 5 core bf16 products are four times as fast as float32."""
FIRST_LOSS_SCALE = 2.0**12
PROBE_TOLERANCE = 0.05
Batch = tuple[Any, ...]


@dataclass(frozen=True)
class Precision:
    """The number format of the matrix products and the reason for it. Weights are always float32."""

    name: PrecisionName
    why: str

    def autocast(self, device: torch.device) -> AbstractContextManager[None]:
        """The autocast context of one forward pass."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(device.type, dtype=DTYPES[self.name])

    @property
    def optimizer_dtype(self) -> torch.dtype:
        """Format of the matrix products of an optimizer; float16 would overflow there."""
        return torch.bfloat16 if self.name == "bf16" else torch.float32


def choose_precision(requested: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device) -> Precision:
    """The requested format, or the best one that the device supports natively.

    Raises:
        ConfigError: bf16 was requested on a GPU that only emulates it.
    """
    native = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
    if requested == "bf16" and not native:
        raise ConfigError(f"hardware.precision: {torch.cuda.get_device_name(device)} has no bf16; use auto, fp16 or fp32")
    if device.type != "cuda":
        return _choose_on_cpu(requested, cpu_supports_bf16())
    if requested != "auto":
        return Precision(requested, "as configured")
    if native:
        return Precision("bf16", f"{torch.cuda.get_device_name(device)} supports bf16 natively")
    if torch.cuda.get_device_capability(device) >= (7, 0):
        return Precision("fp16", f"{torch.cuda.get_device_name(device)} has no bf16; fp16 with float32 islands")
    return Precision("fp32", f"{torch.cuda.get_device_name(device)} has no fast 16-bit products")


def _choose_on_cpu(requested: Literal["auto", "fp32", "bf16", "fp16"], has_bf16: bool | None) -> Precision:
    if requested == "bf16" and has_bf16 is False:
        return Precision("bf16", "as configured, but this CPU only emulates it: fp32 is faster")
    if requested != "auto":
        return Precision(requested, "as configured")
    # `auto` never selects bf16 on a CPU: the results of a run should not depend on the CPU model.
    return Precision("fp32", "a CPU; this one supports bf16: set hardware.precision bf16" if has_bf16 else "a CPU")


def cpu_supports_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool | None:
    """Whether this CPU has bfloat16 matrix instructions; None if unknown."""
    try:
        return not CPU_BF16.isdisjoint(cpuinfo.read_text(encoding="ascii", errors="replace").split())
    except OSError:
        return None


class WideOutput(nn.Linear):
    """A linear layer that returns float32, so that later operations cannot overflow float16."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).float()


class WideProduct(nn.Linear):
    """A linear layer that computes in float32 regardless of autocast."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return functional.linear(input.float(), self.weight.float())


def install_float32_islands(model: T5Model) -> int:
    """Run every feed-forward layer from its activation to the residual stream in float32; return the number of layers.

    Needed for float16 only. The final norm and the loss are float32 already. Parameters keep their names and identity.
    Idempotent.
    """
    islands = 0
    for module in model.modules():
        if not isinstance(getattr(module, "wo", None), nn.Linear):
            continue
        for name, kind in (("wi", WideOutput), ("wi_0", WideOutput), ("wi_1", WideOutput), ("wo", WideProduct)):
            layer = getattr(module, name, None)
            if isinstance(layer, nn.Linear):
                # Only the class changes, so parameters, names and hooks are kept.
                layer.__class__ = kind
        islands += 1
    return islands


@torch.no_grad()
def probe_overflow(model: T5Model, batches: Iterable[Batch], precision: Precision, device: torch.device) -> Precision:
    """Return the same precision if it passes on the batches, else float32; with the reason.

    Each batch is evaluated in float32 and in the given format without dropout: both losses must be finite and may differ by
    5 %. No random stream is used and the model's mode is restored.

    Args:
        model: on `device`, with float32 islands if `precision` is fp16.
        batches: arguments of `token_nll` after the model, on `device`.
        precision: the candidate.
        device: device of the model.
    """
    if precision.name == "fp32":
        return precision
    training = model.training
    model.eval()
    try:
        wide, narrow, tokens = 0.0, 0.0, 0
        for batch in batches:
            exact = token_nll(model, *batch)
            with precision.autocast(device):
                rounded = token_nll(model, *batch)
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
    """Disable cuDNN attention in this process: with a mask, such as T5's bias, its backward gives NaN on Hopper.

    The memory-efficient and the math kernels stay enabled.
    """
    if torch.cuda.is_available():
        torch.backends.cuda.enable_cudnn_sdp(False)


def attention_backward_offset(device: torch.device) -> float:
    """Largest relative difference between the attention gradients of the active kernel and the math kernel.

    The bias makes row maxima strongly negative, for which a defective kernel gives NaN; the result is then infinity. The first
    of two rows is packed: kernels compute by blocks of keys, some of which its second example does not see at all. Above
    PROBE_TOLERANCE the active kernels must not be used.
    """
    generator = torch.Generator().manual_seed(0)
    heads, length, head_width = 6, 192, 64
    shape = (2, heads, length, head_width)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    inputs = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3)]
    bias = torch.randn(2, heads, length, length, generator=generator) * 4 - 150
    example = torch.arange(length) >= length // 2
    bias[0].masked_fill_(example[:, None] != example, torch.finfo(dtype).min)
    bias = bias.to(device, dtype)

    def gradients(context: Callable[[], AbstractContextManager[None]]) -> list[torch.Tensor]:
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (*inputs, bias)]
        query, key, value, mask = leaves
        with context():
            output = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)
            output.float().square().sum().backward()
        return [leaf.grad.float() for leaf in leaves if leaf.grad is not None]

    active, math_kernel = gradients(nullcontext), gradients(lambda: sdpa_kernel(SDPBackend.MATH))
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(active, math_kernel, strict=True))
    return worst if worst == worst else float("inf")


def check_attention(device: torch.device) -> str:
    """Compare the attention backward of a GPU with the math kernel; if they differ, leave only the math kernel enabled.

    Returns:
        The result as text, to be appended to the reason of a `Precision`.
    """
    offset = attention_backward_offset(device)
    if offset <= PROBE_TOLERANCE:
        return f"; attention backward is within {offset:.1e} of the math kernel"
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_flash_sdp(False)
    return f"; attention backward differs by {offset:.1e}, so only the math kernel is used"
