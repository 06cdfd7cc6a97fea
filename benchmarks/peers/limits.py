"""Limit a process to a part of a GPU: its memory, and its multiprocessors. No setting of the card is changed.

The memory limit is that of torch's allocator. The multiprocessors are those of a CUDA green context. Autograd usually runs the
backward pass of a GPU in a thread of its own, which does not have that context; it then runs in the calling thread.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.peers.setup import Setup
from resilient_t5.model.memory import CONTEXT_BYTES

WAYS = ("context", "stream")
"""Make the green context the current one, or use a stream of it."""
PROBE_SIZE = 4096
PROBE_PRODUCTS = 10
HELD_TOLERANCE = 1.6
"""A limit holds if products run at no more than this multiple of the share of the multiprocessors."""

_contexts: list[Any] = []  # a green context ends when its object is deleted


def limit_device(device: torch.device, setup: Setup) -> None:
    """Apply the limits of `setup` to this process; called before anything is allocated."""
    cap_memory(device, setup.memory_gib)
    if setup.multiprocessors is not None:
        limit_multiprocessors(device, setup.multiprocessors, setup.limited_by)


def cap_memory(device: torch.device, memory_gib: float | None) -> None:
    """Limit the GPU memory of this process to `memory_gib`, of which the CUDA context takes the planner's share."""
    if memory_gib is None:
        return
    if device.type != "cuda":
        sys.exit("benchmark error: --memory-gib limits GPU memory, but this is a CPU. Omit it, or choose a GPU with --device")
    total = torch.cuda.get_device_properties(device).total_memory
    # The index: unlike other functions of torch.cuda, this one refuses a device without it.
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, memory_gib * 2**30 - CONTEXT_BYTES) / total), index)


def limit_multiprocessors(device: torch.device, count: int, way: str) -> None:
    """Run everything that this process launches from now on with about `count` multiprocessors.

    Raises:
        RuntimeError: this torch, driver or card has no green contexts.
    """
    from torch.cuda import green_contexts

    if _contexts:
        return
    torch.zeros(1, device=device)  # creates the primary context
    context = green_contexts.GreenContext.create(num_sms=count, device_id=torch.cuda.current_device())
    _contexts.append(context)
    if way == "context":
        context.set_context()
        torch.autograd.set_multithreading_enabled(False)
    else:
        torch.cuda.set_stream(context.Stream())


def probe_speeds(device_name: str, count: int | None, way: str) -> dict[str, float | str]:
    """Seconds of forward products, of backward products and of the replay of a CUDA graph; or the error of a kind.

    A process of its own for each limit: streams and graphs belong to the context in which they were created.

    Args:
        count: multiprocessors to use; None for all.
    """
    device = torch.device(device_name)
    if count is not None:
        limit_multiprocessors(device, count, way)
    seconds: dict[str, float | str] = {"multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count}
    for kind in PROBES:
        try:
            seconds[kind] = _probed_s(kind, device)
        except RuntimeError as error:
            seconds[kind] = str(error).partition("\n")[0]
    return seconds


def judge_probe(free: dict[str, float | str], limited: dict[str, float | str], count: int, way: str) -> dict[str, Any]:
    """Compare the speeds with and without the limit of `count` multiprocessors.

    Returns:
        `share` of the multiprocessors, `speed_share` by kind, `holds` by kind, `errors`.
    """
    share = count / float(free["multiprocessors"])
    result: dict[str, Any] = {"way": way, "share": round(share, 3), "speed_share": {}, "holds": {}, "errors": {}}
    for kind in PROBES:
        before, after = free[kind], limited[kind]
        if isinstance(before, str) or isinstance(after, str):
            result["errors"][kind] = before if isinstance(before, str) else after
            result["holds"][kind] = False
        else:
            result["speed_share"][kind] = round(before / after, 3)
            result["holds"][kind] = before / after < HELD_TOLERANCE * share
    return result


def _probed_s(kind: str, device: torch.device) -> float:
    """Seconds of `PROBE_PRODUCTS` bf16 products."""
    run = PROBES[kind](torch.randn(PROBE_SIZE, PROBE_SIZE, device=device, dtype=torch.bfloat16))
    run()
    torch.cuda.synchronize(device)
    started_s = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - started_s


def _forward(value_NN: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        for _ in range(PROBE_PRODUCTS):
            value_NN @ value_NN

    return run


def _backward(value_NN: torch.Tensor) -> Callable[[], None]:
    weight_NN = value_NN.clone().requires_grad_()

    def run() -> None:
        for _ in range(PROBE_PRODUCTS):
            (value_NN @ weight_NN).backward(value_NN)

    return run


def _graph(value_NN: torch.Tensor) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    warm = _forward(value_NN)
    warm()
    torch.cuda.synchronize(value_NN.device)
    with torch.cuda.graph(graph):
        warm()
    return graph.replay


PROBES: dict[str, Callable[[torch.Tensor], Callable[[], None]]] = {"forward": _forward, "backward": _backward, "graph": _graph}
