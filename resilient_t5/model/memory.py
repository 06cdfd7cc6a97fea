"""The planner: what fits into this much memory, in plain numbers and before anything is allocated.

A peak is the sum of what stands all the time (weights, gradients, optimizer state) and of the largest moment of a pass
(`model/activations.py`), or of the optimizer. On a GPU a twentieth is kept free, since an allocator never fills a card,
and the context of the process is counted. Candidates are tried in the order of exactness; the first that fits is chosen:
AdamW in float32, with checkpointing, 8-bit states, Adafactor, Adafactor stepped inside the backward pass.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from resilient_t5.model import muon
from resilient_t5.model.activations import (
    WIDE,
    Execution,
    MicroBatchShape,
    evaluation_bytes,
    generation_bytes,
    kept_bytes,
    peak_bytes,
    walk,
)
from resilient_t5.model.adafactor import BLOCK_VALUES
from resilient_t5.model.shapes import Sizes

GIB = 1 << 30
CONTEXT_BYTES = 0.45 * GIB
"""CUDA context, kernels and the workspace of the matrix library; 0.3 to 0.5 GiB are reported."""
FREE_SHARE = 0.05
LEAST_MICRO_TOKENS = 256
MOST_MICRO_TOKENS = {False: 2048, True: 16384}
"""Larger micro-batches than these bring no speed: on a CPU, on a GPU."""
OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "adafactor_in_backward")
"""In the order of exactness."""


@dataclass(frozen=True)
class Peak:
    """The largest moment of training by item, in bytes."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """What the forward pass keeps for the backward pass, the last block of logits included."""
    workspace: float
    """What the largest moment needs on top: gradients of activations, recomputed values, casts, logits."""

    @property
    def total(self) -> float:
        """All of it; no context, nothing kept free."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.workspace


@dataclass(frozen=True)
class Task:
    """What is to be planned for: the longest example, and the examples of an update."""

    source_tokens: int
    target_tokens: int
    examples_per_update: int = 16

    @property
    def longest(self) -> int:
        """Padded tokens of the longest example."""
        return self.source_tokens + self.target_tokens


@dataclass(frozen=True)
class Memory:
    """The memory that is planned for, in bytes."""

    total: float
    on_gpu: bool = True
    context_counted: bool = True
    """Whether the context of the process still has to find room in `total`; not in what a running process finds free."""

    @property
    def usable(self) -> float:
        """What peaks may reach."""
        context = CONTEXT_BYTES if self.on_gpu and self.context_counted else 0.0
        return (self.total - context) * (1 - FREE_SHARE)


@dataclass(frozen=True)
class Choice:
    """One way to train, what it needs and what it costs."""

    optimizer: str
    checkpointing: bool
    micro_tokens: int
    precision: str
    peak: Peak
    evaluation: float
    """Bytes of an evaluation or a generation at its largest moment, weights and optimizer state included."""
    cost: float
    """Counted floating-point operations of an update over those without checkpointing."""
    fits: bool

    @property
    def needed(self) -> float:
        """Bytes at the largest moment of all."""
        return max(self.peak.total, self.evaluation)

    def to_json(self) -> dict[str, Any]:
        """Plain values; bytes as GiB."""
        items = {f"{name}_gib": value / GIB for name, value in asdict(self.peak).items()}
        plain = {key: getattr(self, key) for key in ("optimizer", "checkpointing", "micro_tokens", "precision", "cost", "fits")}
        return {**plain, "needed_gib": self.needed / GIB, "evaluation_gib": self.evaluation / GIB, **items}


def optimizer_bytes(sizes: Sizes, name: str, processes: int = 1) -> float:
    """Bytes of the optimizer's state, with layers cut over so many processes, which AdamW alone allows."""
    if name == "adamw":
        return 2 * WIDE * sizes.held(processes)
    if name == "muon":  # one moment of what is inside the layers, two of the rest
        return WIDE * (sizes.parameters + (1 if sizes.tied else 2) * sizes.table)
    if name == "adamw8bit":  # two bytes a value, and two float32 scales for every 256 of them
        return (2 + 2 * WIDE / 256) * sizes.parameters
    vectors = 2 * sizes.table / min(sizes.rows, sizes.d_model) + 2 * sizes.parameters / min(sizes.d_model, sizes.inner)
    return WIDE * vectors


def training_peak(sizes: Sizes, optimizer: str, run: Execution, shape: MicroBatchShape) -> Peak:
    """The largest moment of an update, by item.

    Gradients of parameters stand all the time, as they do from the second micro-batch on; stepped inside the backward
    pass, only those of the vocabulary tables stand, each for its part of the pass.
    """
    parts = list(walk(sizes, run, shape))
    kept = kept_bytes(parts)
    table, weights = WIDE * sizes.table, WIDE * sizes.held(run.processes)
    state = optimizer_bytes(sizes, optimizer, run.processes)
    # Adafactor works through a matrix by blocks, two of which stand at once.
    block, own_block = (2 * WIDE * min(BLOCK_VALUES, values) for values in (sizes.table, sizes.largest_matrix))
    if optimizer == "adafactor_in_backward":
        # The head is stepped when the loss has let go of its logits, before the decoder's backward begins, and the
        # embedding when the encoder's is over.
        steps = {"loss": table, "decoder": (table if sizes.tied else 0.0) + own_block, "encoder": table + own_block}
        head_step = kept_bytes(parts[:-1]) + table + block
        whole = max(peak_bytes(parts, steps), head_step)
        held = min(table, whole)
        return Peak(weights, held, state, min(kept, whole - held), max(0.0, whole - held - kept))
    moved = max(min(muon.BLOCK_VALUES, sizes.encoder + sizes.decoder), sizes.largest_matrix)
    moving = {"adafactor": block, "muon": muon.MOVE_BYTES * moved}.get(optimizer, 0.0)
    # Of layers that are cut, a block is gathered while the next one is, and its whole gradient stands until it is added up.
    passing = 4 * WIDE * sizes.largest_block if run.processes > 1 else 0.0
    return Peak(weights, weights, state, kept, max(peak_bytes(parts) + passing, moving) - kept)


def counted_flops(sizes: Sizes, source: int, target: int, checkpointing: bool) -> float:
    """Floating-point operations of forward and backward of one example, a multiply-add as two."""
    d, i = sizes.d_model, sizes.inner
    feed_forward = (3 if sizes.gated else 2) * d * sizes.d_ff
    encoder = sizes.encoder_layers * (source * 2 * (4 * d * i + feed_forward) + 4 * source**2 * i)
    decoder = sizes.decoder_layers * (
        target * 2 * (6 * d * i + feed_forward) + source * 2 * 2 * d * i + 4 * target**2 * i + 4 * target * source * i
    )
    # The head makes its logits a second time in the backward pass, unless one block holds them all.
    head = 2 * target * d * sizes.rows * 4
    return (4 if checkpointing else 3) * (encoder + decoder) + head


def choices(
    sizes: Sizes, task: Task, memory: Memory, precision: str, optimizers: tuple[str, ...], processes: int = 1
) -> Iterator[Choice]:
    """Every way that is worth a look, in the order of exactness, with the largest micro-batch that fits.

    Args:
        optimizers: the ones to consider, out of `OPTIMIZERS`.
        processes: those that the layers are cut over.
    """
    for optimizer in optimizers:
        for checkpointing in (False, True):
            run = Execution(precision, checkpointing, memory.on_gpu, processes=processes)  # type: ignore[arg-type]
            yield choose_micro_tokens(sizes, task, memory, run, optimizer)


def choose_micro_tokens(sizes: Sizes, task: Task, memory: Memory, run: Execution, optimizer: str) -> Choice:
    """One optimizer with or without checkpointing, at the largest budget of tokens that fits.

    Budgets are powers of two, or one longest example where that is more. Stepped inside the backward pass, all examples
    of an update make one micro-batch.
    """
    most = MOST_MICRO_TOKENS[memory.on_gpu]
    ladder = [2**k for k in range(int(math.log2(LEAST_MICRO_TOKENS)), int(math.log2(most)) + 1)]
    budgets = sorted({max(tokens, task.longest) for tokens in ladder})
    if optimizer == "adafactor_in_backward":
        budgets = [task.longest * task.examples_per_update]
    tried = [_choice(sizes, task, memory, run, optimizer, tokens) for tokens in budgets]
    fitting = [choice for choice in tried if choice.fits]
    return fitting[-1] if fitting else tried[0]


def choice_at(sizes: Sizes, task: Task, memory: Memory, run: Execution, optimizer: str, micro_tokens: int) -> Choice:
    """What one given way needs."""
    return _choice(sizes, task, memory, run, optimizer, micro_tokens)


def first_fit(found: list[Choice]) -> Choice | None:
    """The most exact choice that fits; None where none does."""
    return next((choice for choice in found if choice.fits), None)


def smallest_card_gib(sizes: Sizes, task: Task, precision: str, optimizers: tuple[str, ...], processes: int = 1) -> float:
    """Memory of the smallest GPU that one of these optimizers can train on, one example at a time, in GiB."""
    nothing = Memory(0.0)
    least = min(choice.needed for choice in choices(sizes, task, nothing, precision, optimizers, processes))
    return (least / (1 - FREE_SHARE) + CONTEXT_BYTES) / GIB


def _choice(sizes: Sizes, task: Task, memory: Memory, run: Execution, optimizer: str, micro_tokens: int) -> Choice:
    shape = MicroBatchShape.within(micro_tokens, task.source_tokens, task.target_tokens)
    peak = training_peak(sizes, optimizer, run, shape)
    reading = max(evaluation_bytes(sizes, run, shape), generation_bytes(sizes, run, shape))
    evaluation = WIDE * sizes.parameters + peak.optimizer + reading  # layers that are cut are gathered for it
    lengths = (task.source_tokens, task.target_tokens)
    cost = counted_flops(sizes, *lengths, run.checkpointing) / counted_flops(sizes, *lengths, False)
    fits = max(peak.total, evaluation) <= memory.usable
    return Choice(optimizer, run.checkpointing, micro_tokens, run.precision, peak, evaluation, cost, fits)
