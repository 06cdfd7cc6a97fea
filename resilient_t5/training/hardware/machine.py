"""The machine under the run: device, memory in use and free, time suspended, and what its bits depend on."""

import ctypes
import importlib.metadata
import os
import platform
import sys
import time
from typing import Any

import torch

from resilient_t5.host_memory import peak_mib

MIB = 1 << 20
CPU_SIGNS = ("DefaultCPUAllocator", "can't allocate memory", "not enough memory")
NUMERIC_PACKAGES = ("resilient_t5", "torch", "transformers", "accelerate", "numpy", "tokenizers", "sentencepiece")
# M_MMAP_THRESHOLD of malloc.h
MMAP_THRESHOLD, LARGE_BLOCK_BYTES = -3, MIB


def choose_device(wanted: str) -> torch.device:
    """The device for `hardware.device`; `auto` takes a GPU when there is one."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(wanted)


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / MIB:.0f} MiB"
    return f"CPU, {torch.get_num_threads()} threads"


def numeric_conditions(device: torch.device) -> dict[str, Any]:
    """What the bits of a result depend on beside the configuration: hardware, versions, threads, flags.

    Two processes that agree in all of it, on a CPU or with deterministic kernels, compute the same bits.
    """
    conditions: dict[str, Any] = {f"version of {name}": importlib.metadata.version(name) for name in NUMERIC_PACKAGES}
    conditions |= {
        "python": platform.python_version(),
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "float32 products": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if device.type == "cuda":
        conditions |= {
            "gpu": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        }
    return conditions


def memory_mib(device: torch.device) -> float:
    """Peak memory of this process so far, in MiB: reserved by the GPU allocator, or resident on a CPU."""
    return torch.cuda.max_memory_reserved(device) / MIB if device.type == "cuda" else peak_mib()


def return_freed_memory_to_os() -> None:
    """Make the C library give every freed block of 1 MiB or more back to the system at once; for this whole process.

    glibc keeps blocks of up to 32 MiB in its heap once some were freed, and tensors of changing sizes tear holes into it:
    the resident peak of a micro-batch then lies at three times what its tensors need, and differs from run to run. The
    price is fresh pages for every large tensor, up to a quarter more time where tensors are large. Elsewhere than on
    glibc nothing is changed.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "gnu_get_libc_version"):
        library.mallopt(MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator refused: that of CUDA, of torch on the CPU, or Python's own."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in CPU_SIGNS)


def slept_s() -> float:
    """Seconds that this machine has spent suspended since it was booted; 0 where the system does not tell."""
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
