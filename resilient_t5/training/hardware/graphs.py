"""Forward and backward of a micro-batch as CUDA graphs, one for each shape, captured once and replayed in every update.

A pass launches one to three thousand kernels, which takes the host longer than the GPU needs to compute them. A replay is one
launch. The shapes of a run are few and known before it starts (`data/packing.py`), inputs are copied into fixed tensors, and
gradients are added into fixed buffers (`model/operands.py`).

Before the run relies on graphs, each shape is run eagerly and by its graph with the same weights, input and dropout: loss and
gradient norms must agree. Whatever fails, in a capture or in this comparison, leaves the run without graphs and with the
reason for the banner.

Dropout stays a function of its key: a graph reads seed and offset of the generator at each replay.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from resilient_t5.data.pass_input import IGNORED, PassInput

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
    """
    device = parameters[0].device
    captured: dict[Shape, _Captured] = {}
    pool = torch.cuda.graph_pool_handle()
    try:
        for shape in sorted(shapes, key=lambda shape: -shape[0] * (shape[1] + shape[2])):
            given = example_input(shape, rows, device)
            divisor = torch.full((), float(shape[0] * shape[2]), device=device)
            eager = _warm_up(partial(run_pass, given, divisor), parameters, begin_update, seed)
            begin_update()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                nll_sum = run_pass(given, divisor)
            captured[shape] = _Captured(graph, given, divisor, nll_sum)
            begin_update()
            seed()
            graph.replay()
            offset = largest_offset(_figures(nll_sum, parameters), eager)
            if not offset <= TOLERANCE[torch.are_deterministic_algorithms_enabled()]:  # true for NaN
                return None, f"a captured update of shape {shape} differs from an eager one by {offset:.1e}"
    except (RuntimeError, MemoryError) as error:
        captured.clear()
        torch.cuda.empty_cache()
        return None, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    finally:
        begin_update()
    return CapturedPasses(captured), ""


def _warm_up(
    run_pass: Callable[[], torch.Tensor],
    parameters: Sequence[torch.nn.Parameter],
    begin_update: Callable[[], None],
    seed: Callable[[], None],
) -> list[float]:
    """Run passes on a side stream, as a capture requires, and return the figures of the last one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_PASSES):
            begin_update()
            seed()
            nll_sum = run_pass()
        figures = _figures(nll_sum, parameters)
    torch.cuda.current_stream().wait_stream(stream)
    return figures


def _figures(nll_sum: torch.Tensor, parameters: Sequence[torch.nn.Parameter]) -> list[float]:
    """The loss sum and the norm of every gradient."""
    norms = torch._foreach_norm([p.grad for p in parameters if p.grad is not None], 2, dtype=torch.float32)
    figures: list[float] = torch.stack([nll_sum.double(), *(norm.double() for norm in norms)]).tolist()
    return figures


def largest_offset(found: Sequence[float], expected: Sequence[float]) -> float:
    """The difference of the losses, and of the gradient norms in relation to the norm of the whole gradient."""
    if not all(map(math.isfinite, (*found, *expected))):
        return math.nan
    whole = math.hypot(*expected[1:]) or 1.0
    loss = abs(found[0] - expected[0]) / (abs(expected[0]) or 1.0)
    return max(loss, math.hypot(*(a - b for a, b in zip(found[1:], expected[1:], strict=True))) / whole)
