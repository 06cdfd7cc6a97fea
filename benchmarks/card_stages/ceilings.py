"""What the device can do: matrix products, memory bandwidth, and the cost of starting a kernel. Runs in a new process."""

import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from resilient_t5.training.hardware.machine import choose_device, describe

SPAN_S = 0.3
"""Duration of one timed span; the median of `SPANS` counts."""
SPANS = 5
SMALL_OPERATIONS = 2000
SMALL_SIZE = 256
GRAPH_KERNELS = 500
GIB = 1 << 30


def name_device(device_name: str) -> str:
    """Name and memory of the device."""
    return describe(choose_device(device_name))


def measure_ceilings(device_name: str, quick: bool) -> dict[str, Any]:
    """Name and limits of the device."""
    device = choose_device(device_name)
    on_gpu = device.type == "cuda"
    size = (8192 if torch.cuda.get_device_properties(device).total_memory > 7 * GIB else 4096) if on_gpu else 1024
    span_s = SPAN_S / 10 if quick else SPAN_S
    result: dict[str, Any] = {"device": describe(device), "threads": torch.get_num_threads(), "product_size": size}
    if on_gpu:
        result |= _card(device)
    formats = {"bf16": torch.bfloat16, "fp32": torch.float32} | ({"fp16": torch.float16} if on_gpu else {})
    for name, dtype in formats.items():
        # A CPU without bf16 instructions is a thousand times slower in this format.
        own_size = size if on_gpu or name == "fp32" else SMALL_SIZE
        result[f"{name}_tflops"] = round(_product_tflops(device, dtype, own_size, span_s), 5)
    result["bandwidth_gb_per_s"] = round(_bandwidth_gb_per_s(device, on_gpu, span_s), 1)
    result |= _launches(device, on_gpu)
    return result


def _card(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(total / GIB, 2),
        "free_gib": round(free / GIB, 2),
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def _driver() -> str | None:
    """Version of the driver, as nvidia-smi reports it."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return None
    try:
        done = subprocess.run(
            [tool, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().partition("\n")[0] or None


def _seconds_per_call(device: torch.device, call: Callable[[], object], span_s: float) -> float:
    """Median seconds of a call over spans of many calls."""

    def timed(count: int) -> float:
        _wait(device)
        started_s = time.perf_counter()
        for _ in range(count):
            call()
        _wait(device)
        return time.perf_counter() - started_s

    timed(2)
    count = max(1, int(span_s / max(timed(2) / 2, 1e-6)))
    return statistics.median(timed(count) / count for _ in range(SPANS))


def _product_tflops(device: torch.device, dtype: torch.dtype, size: int, span_s: float) -> float:
    """Rate of square matrix products of random values; float32 without TF32, as torch multiplies by default."""
    a_NN, b_NN = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out_NN = torch.empty_like(a_NN)
    return 2 * size**3 / _seconds_per_call(device, lambda: torch.mm(a_NN, b_NN, out=out_NN), span_s) / 1e12


def _bandwidth_gb_per_s(device: torch.device, on_gpu: bool, span_s: float) -> float:
    """Bytes read and written by copying a large tensor."""
    values = torch.zeros((GIB if on_gpu else GIB // 8) // 4, device=device)
    copy = torch.empty_like(values)
    return 2 * values.nbytes / _seconds_per_call(device, lambda: copy.copy_(values), span_s) / 1e9


def _launches(device: torch.device, on_gpu: bool) -> dict[str, Any]:
    """Microseconds for each of many small operations: to issue one, until all are done, and in a CUDA graph."""
    value = torch.zeros(16, device=device)

    def loop(count: int) -> None:
        for _ in range(count):
            value.add_(1.0)

    loop(SMALL_OPERATIONS)
    _wait(device)
    started_s = time.perf_counter()
    loop(SMALL_OPERATIONS)
    issued_s = time.perf_counter() - started_s
    _wait(device)
    done_s = time.perf_counter() - started_s
    result = {
        "issue_us": round(1e6 * issued_s / SMALL_OPERATIONS, 2),
        "small_operation_us": round(1e6 * done_s / SMALL_OPERATIONS, 2),
    }
    if not on_gpu:
        return result
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loop(GRAPH_KERNELS)
    replay_s = _seconds_per_call(device, graph.replay, SPAN_S / 10)
    return result | {"graph_kernel_us": round(1e6 * replay_s / GRAPH_KERNELS, 2)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
