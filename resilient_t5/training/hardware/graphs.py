"""Forward and backward of a micro-batch as CUDA graphs, one for each shape, captured once and replayed in every update.

A pass launches one to three thousand kernels, which takes the host longer than the GPU needs to compute them. A replay is one
launch. The shapes of a run are few and known before it starts (`data/packing.py`), inputs are copied into fixed tensors, and
gradients are added into fixed buffers (`model/operands.py`).

Before the run relies on graphs, each shape is run eagerly and by its graph with the same weights, input and dropout: loss and
gradient norms must agree. Whatever fails, in a capture or in this comparison, leaves the run without graphs and with the
reason for the banner. torch does not clean up after a failed capture: the stream, the random generator and the allocator are
repaired here, and an eager pass then tests that the GPU still works.

Dropout stays a function of its key: a graph reads seed and offset of the generator at each replay.
"""

import gc
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch

from resilient_t5.data.pass_input import IGNORED, PassInput
from resilient_t5.errors import DeviceLost
from resilient_t5.training.hardware.machine import is_out_of_memory

Shape = tuple[int, int, int]
"""Rows, source tokens and target tokens of a micro-batch."""
Pass = Callable[[PassInput, torch.Tensor], torch.Tensor]
"""Forward and backward of an input with a divisor (scalar, float32): adds gradients, returns the loss sum (scalar, float64)."""
WARM_UP_PASSES = 2
TOLERANCE = {False: 0.02, True: 0.001}
"""Largest relative difference between eager and captured; key: deterministic kernels. Atomics add in random order, which moves
a gradient of 16-bit products by up to 1 %."""


@dataclass(frozen=True)
class _Captured:
    graph: "torch.cuda.CUDAGraph"
    given: PassInput
    divisor: torch.Tensor
    nll_sum: torch.Tensor


class CapturedPasses:
    """The graphs of all shapes of a run; see `capture`."""

    def __init__(self, captured: dict[Shape, _Captured]):
        self._captured = captured

    def __contains__(self, shape: Shape) -> bool:
        return shape in self._captured

    def replay(self, given: PassInput, divisor: float) -> torch.Tensor:
        """Run the graph of this input's shape; the result is a copy."""
        captured = self._captured[given.shape]
        captured.given.flat.copy_(given.flat)
        captured.divisor.fill_(divisor)
        captured.graph.replay()
        return captured.nll_sum.clone()


def example_input(shape: Shape, rows: int, device: torch.device) -> PassInput:
    """An input of this shape with one example a row and varied ids below `rows` of the vocabulary."""
    count, source, target = shape
    source_RS = torch.arange(count * source, dtype=torch.int32).view(count, source) % rows
    labels_RT = torch.arange(count * target, dtype=torch.int32).view(count, target) * 7 % rows
    segments = torch.ones_like(source_RS), torch.ones_like(labels_RT)
    if target > 1:
        labels_RT[:, -1] = IGNORED
        segments[1][:, -1] = 0
    flat = torch.cat([part.flatten() for part in (source_RS, segments[0], labels_RT, segments[1])])
    return PassInput(flat.to(device), shape)


def capture(
    run_pass: Pass,
    shapes: Sequence[Shape],
    rows: int,
    parameters: Sequence[torch.nn.Parameter],
    begin_update: Callable[[], None],
    seed: Callable[[], None],
) -> tuple[CapturedPasses | None, str]:
    """Capture a graph for every shape, the largest first, so that the others fit into its memory.

    Args:
        run_pass: works on the current CUDA stream, without host syncs.
        shapes: those of the run.
        rows: of the vocabulary.
        parameters: whose gradients are compared.
        begin_update: sets all gradients to zero at their fixed addresses.
        seed: seeds the dropout of a pass, always in the same way.

    Returns:
        the graphs, and ""; or None, and the reason.

    Raises:
        DeviceLost: a capture failed, and the GPU cannot run an eager pass any more.
    """
    device = parameters[0].device
    work = _Work(run_pass, rows, parameters, begin_update, seed)
    ordered = sorted(shapes, key=lambda shape: -shape[0] * (shape[1] + shape[2]))
    before = _Before.of(device)
    captured: dict[Shape, _Captured] = {}
    try:
        # All eager passes come first: the graphs keep their memory, so that later passes would need it a second time.
        expected = {shape: work.eager_figures(shape, before.side) for shape in ordered}
        for shape in ordered:
            captured[shape] = work.captured(shape, before.side, before.pool)
            offset = largest_offset(work.replayed_figures(captured[shape]), expected[shape])
            if not offset <= TOLERANCE[torch.are_deterministic_algorithms_enabled()]:  # true for NaN
                raise RuntimeError(f"a captured update of shape {shape} differs from an eager one by {offset:.1e}")
        begin_update()
        return CapturedPasses(captured), ""
    except (RuntimeError, MemoryError, TypeError, ValueError, AttributeError, AssertionError) as error:
        why_not = _first_cause(error)
    # Not in the handler, where the traceback still holds the tensors of the failed pass.
    captured.clear()
    before.repair()
    work.test_eager(ordered[-1], why_not)
    return None, why_not


def _first_cause(error: BaseException) -> str:
    """One line: after an error in a capture, the end of the capture raises another one, which says nothing about the cause."""
    while error.__context__ is not None:
        error = error.__context__
    lines = str(error).strip().splitlines() or [""]
    return lines[0][:200] if type(error) is RuntimeError else f"{type(error).__name__}: {lines[0][:200]}"


@dataclass(frozen=True)
class _Before:
    """What a failed capture may leave in a state that no later operation can use."""

    device: torch.device
    stream: "torch.cuda.Stream"
    side: "torch.cuda.Stream"
    """One stream for all passes of `capture`: each stream has its own workspace of cuBLAS, 32 MiB on Hopper."""
    pool: Any
    generator: torch.Generator
    generator_state: torch.Generator

    @classmethod
    def of(cls, device: torch.device) -> "_Before":
        """The current state, with a new side stream and a new pool of memory."""
        index = torch.cuda.current_device() if device.index is None else device.index
        generator = torch.cuda.default_generators[index]
        stream = torch.cuda.current_stream(device)
        pool, side = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        return cls(device, stream, side, pool, generator, generator.clone_state())

    def repair(self) -> None:
        """Set the stream and the generator back, and free the memory of the pool; errors show in the next pass."""
        with suppress(RuntimeError):
            # `torch.cuda.graph` leaves its stream current if the end of a capture fails, and the generator in capture mode,
            # in which it refuses to draw outside of a capture.
            torch.cuda.set_stream(self.stream)
            self.generator.graphsafe_set_state(self.generator_state)
        gc.collect()
        with suppress(RuntimeError, AttributeError):
            # Without this, the allocator waits for the end of the capture with every block that another stream has used.
            # Refused if the capture has ended.
            index = torch.cuda.current_device() if self.device.index is None else self.device.index
            torch._C._cuda_endAllocateToPool(index, self.pool)
            torch._C._cuda_releasePool(index, self.pool)
        with suppress(RuntimeError):
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Work:
    """The passes of `capture`; its arguments."""

    run_pass: Pass
    rows: int
    parameters: Sequence[torch.nn.Parameter]
    begin_update: Callable[[], None]
    seed: Callable[[], None]

    def inputs(self, shape: Shape) -> tuple[PassInput, torch.Tensor]:
        """An input and a divisor on the device."""
        device = self.parameters[0].device
        return example_input(shape, self.rows, device), torch.full((), float(shape[0] * shape[2]), device=device)

    def eager_figures(self, shape: Shape, side: "torch.cuda.Stream") -> list[float]:
        """The figures of the last of several eager passes on a side stream, which a capture requires."""
        given, divisor = self.inputs(shape)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for number in range(WARM_UP_PASSES):
                self.begin_update()
                self.seed()
                with _no_host_sync() if number else nullcontext():
                    nll_sum = self.run_pass(given, divisor)
            figures = self.figures(nll_sum)
        torch.cuda.current_stream().wait_stream(side)
        return figures

    def captured(self, shape: Shape, side: "torch.cuda.Stream", pool: Any) -> _Captured:
        """The graph of a shape; gradients are not changed."""
        given, divisor = self.inputs(shape)
        self.begin_update()
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as the watchdog of NCCL, may ask for events during the capture.
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            nll_sum = self.run_pass(given, divisor)
        return _Captured(graph, given, divisor, nll_sum)

    def replayed_figures(self, captured: _Captured) -> list[float]:
        """The figures of a replay."""
        self.begin_update()
        self.seed()
        captured.graph.replay()
        return self.figures(captured.nll_sum)

    def figures(self, nll_sum: torch.Tensor) -> list[float]:
        """The loss sum and the norm of every gradient."""
        norms = torch._foreach_norm([p.grad for p in self.parameters if p.grad is not None], 2, dtype=torch.float32)
        figures: list[float] = torch.stack([nll_sum.double(), *(norm.double() for norm in norms)]).tolist()
        return figures

    def test_eager(self, shape: Shape, why_not: str) -> None:
        """Run an eager pass; leaves all gradients at zero.

        Raises:
            DeviceLost: it fails, except by a lack of memory, which an update can handle.
        """
        try:
            self.begin_update()
            self.seed()
            float(self.run_pass(*self.inputs(shape)))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise DeviceLost(
                    f"the GPU cannot be used after CUDA graphs failed: {why_not}",
                    where=_first_cause(error),
                    hint="Run the same command with --hardware.graphs false",
                ) from error
        finally:
            with suppress(RuntimeError):
                self.begin_update()


@contextmanager
def _no_host_sync() -> Iterator[None]:
    """Raise RuntimeError where a value is read on the host, before a capture fails at it.

    Some deterministic kernels read values, depending on the version of torch.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls this mode a prototype
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


def largest_offset(found: Sequence[float], expected: Sequence[float]) -> float:
    """The difference of the losses, and of the gradient norms in relation to the norm of the whole gradient."""
    if not all(map(math.isfinite, (*found, *expected))):
        return math.nan
    whole = math.hypot(*expected[1:]) or 1.0
    loss = abs(found[0] - expected[0]) / (abs(expected[0]) or 1.0)
    return max(loss, math.hypot(*(a - b for a, b in zip(found[1:], expected[1:], strict=True))) / whole)
