"""The machine of a run: device, peak memory, suspend time, and the conditions of bit-exact results."""

import ctypes
import importlib.metadata
import os
import platform
import sys
import time
from typing import Any

import torch

import resilient_t5
from resilient_t5.errors import plural
from resilient_t5.host_memory import peak_mib

MIB = 1 << 20
CPU_OUT_OF_MEMORY = ("DefaultCPUAllocator", "can't allocate memory", "not enough memory")
NUMERIC_PACKAGES = ("torch", "transformers", "accelerate", "numpy", "tokenizers", "sentencepiece")
# M_MMAP_THRESHOLD of malloc.h
MMAP_THRESHOLD, LARGE_BLOCK_BYTES = -3, MIB


def choose_device(name: str) -> torch.device:
    """The device for `hardware.device`; `auto` is the GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def describe(device: torch.device) -> str:
    """Name and size of the device, for the console."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / MIB:.0f} MiB"
    return f"CPU, {plural(torch.get_num_threads(), 'thread')}"


def numeric_conditions(device: torch.device) -> dict[str, Any]:
    """Everything except the configuration that the bits of a result depend on: hardware, versions, threads, flags.

    Two processes with equal conditions compute the same bits, on a CPU or with deterministic kernels.
    """
    # The package may run from a checkout without metadata of an installation.
    conditions: dict[str, Any] = {"version of resilient_t5": resilient_t5.__version__}
    conditions |= {f"version of {name}": importlib.metadata.version(name) for name in NUMERIC_PACKAGES}
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
    """Make glibc return every freed block of 1 MiB or more to the OS immediately, for the whole process.

    By default glibc keeps freed blocks of up to 32 MiB in its heap, and tensors of varying sizes fragment it: the resident
    peak of a micro-batch is then about three times what its tensors need, and varies between runs. The cost is new pages
    for every large tensor, up to 25 % more time where tensors are large. No effect with other C libraries.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "gnu_get_libc_version"):
        library.mallopt(MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: by CUDA, by torch on the CPU, or by Python."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in CPU_OUT_OF_MEMORY)


def allocation_failure(error: BaseException) -> str:
    """First line of an out-of-memory error, or its type if it has no text."""
    return str(error).partition("\n")[0][:300] or type(error).__name__


def slept_s() -> float:
    """Seconds that this machine has been suspended since boot; 0 where the system does not report it."""
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
