"""The memory planner: predict peak memory and choose a configuration that fits, before anything is allocated.

A peak is the sum of the constant part (weights, gradients, optimizer state) and the largest temporary part of a pass or of
the optimizer. On a GPU 5 % is kept free for fragmentation, and the CUDA context is counted. Candidates are tried in the
order of exactness and the first that fits is chosen: AdamW in float32, with checkpointing, 8-bit states, Adafactor,
Adafactor inside the backward pass.

The memory of a forward and backward pass is counted from the layers, not fitted to measurements. `walk` lists the parts of a
pass in forward order. Each part keeps bytes until its own backward, and needs further bytes while that backward runs. The
peak is the largest sum of all bytes still kept and the bytes that the current part needs. The counts follow
`model/layers.py` and `model/vocabulary_gradients.py`; a test compares them with the tensors that autograd saves, and
`benchmarks/plan.py` with measured peaks.

Symbols: B examples (may be a fraction: a budget of tokens over the longest example), S and T source and target tokens,
d model width, f feed-forward width, i width of all heads, h heads, N = B T labels, w bytes of a value in the products.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from resilient_t5.model.optimizer import BLOCK_VALUES, MUON_STEP_BYTES
from resilient_t5.model.shapes import Sizes
from resilient_t5.model.vocabulary_gradients import BLOCK_VALUES as LOSS_BLOCK_VALUES
from resilient_t5.model.vocabulary_gradients import GPU_BLOCK_VALUES, rows_of_block

WIDE = 4
"""Bytes of a float32 value: the residual stream, gradients of parameters, the loss."""


@dataclass(frozen=True)
class Execution:
    """How a pass is computed."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    checkpointing: bool = False
    on_gpu: bool = False
    """On a GPU attention keeps no scores; on a CPU it keeps one byte per score if there is dropout."""
    processes: int = 1
    """Processes over which layers, their gradients and optimizer state are sharded; the vocabulary tables are replicated."""
    copies: bool = False
    """Whether the weights of the layers are kept in the number format of the products too."""
    packed: bool = False
    """Rows hold several examples, and the head is computed at all positions."""

    @property
    def mask_bytes(self) -> int:
        """Bytes of a value of an additive mask: in the format of the scores, which on a CPU is float32."""
        return self.value_bytes if self.on_gpu else WIDE

    @property
    def value_bytes(self) -> int:
        """Bytes of an operand of a matrix product."""
        return WIDE if self.precision == "fp32" else 2

    @property
    def gate_bytes(self) -> int:
        """Bytes of a value between the products of a feed-forward layer: a float32 island with fp16."""
        return 2 if self.precision == "bf16" else WIDE


@dataclass(frozen=True)
class MicroBatchShape:
    """B examples, all padded to S source and T target tokens."""

    examples: float
    source_tokens: int
    target_tokens: int

    @classmethod
    def within(cls, micro_tokens: int, source_tokens: int, target_tokens: int) -> "MicroBatchShape":
        """As many examples of this length as the budget allows, not rounded down: shorter ones may fill it completely."""
        return cls(max(1.0, micro_tokens / (source_tokens + target_tokens)), source_tokens, target_tokens)


@dataclass(frozen=True)
class Part:
    """One part of a pass: bytes kept until its backward, and further bytes that its backward needs."""

    name: str
    kept: float
    needed: float
    phase: Literal["encoder", "decoder", "loss"]


def walk(sizes: Sizes, run: Execution, shape: MicroBatchShape) -> Iterator[Part]:
    """The parts of a pass in forward order."""
    examples, source, target = shape.examples, shape.source_tokens, shape.target_tokens
    w, d = run.value_bytes, sizes.d_model
    encoded = examples * source * d * w
    yield _stack_begin("encoder", sizes, examples * source)
    for layer in range(sizes.encoder_layers):
        first = _mask_bytes(sizes, run, examples, source) if layer == 0 else 0.0
        parts = [
            _attention("encoder", sizes, run, (examples, source, source), own_bias=True),
            _feed_forward("encoder", sizes, run, examples * source),
        ]
        yield from _block(parts, run, examples * source * d * WIDE, first)
    yield Part("encoder end", _stack_end(sizes, examples * source) + encoded, 2 * examples * source * d * WIDE, "encoder")
    yield _stack_begin("decoder", sizes, examples * target)
    for layer in range(sizes.decoder_layers):
        first = _decoder_mask_bytes(sizes, run, shape) if layer == 0 else 0.0
        cross = _attention("decoder", sizes, run, (examples, target, source), own_bias=False)
        parts = [
            _attention("decoder", sizes, run, (examples, target, target), own_bias=True),
            # Gradients of the encoder's output: the sum so far, and those from keys and values.
            Part(cross.name, cross.kept, cross.needed + encoded, "decoder"),
            _feed_forward("decoder", sizes, run, examples * target, encoded),
        ]
        yield from _block(parts, run, examples * target * d * WIDE, first)
    yield Part("decoder end", _stack_end(sizes, examples * target), 3 * examples * target * d * WIDE, "decoder")
    yield _loss(sizes, run, examples * target)


def peak_bytes(parts: list[Part], gradients: dict[str, float] | None = None) -> float:
    """Peak bytes of a pass without parameters and their gradients.

    Args:
        parts: from `walk`.
        gradients: bytes of parameter gradients that exist during a phase only.
    """
    kept, peak = 0.0, 0.0
    for part in parts:
        kept += part.kept
        peak = max(peak, kept + part.needed + (gradients or {}).get(part.phase, 0.0))
    return peak


def kept_bytes(parts: list[Part]) -> float:
    """Bytes that autograd has saved at the end of the forward pass."""
    return sum(part.kept for part in parts)


def evaluation_bytes(sizes: Sizes, run: Execution, shape: MicroBatchShape) -> float:
    """Peak bytes of the loss of a micro-batch without gradients, parameters not counted."""
    examples, source, target = shape.examples, shape.source_tokens, shape.target_tokens
    longest = examples * max(source, target)
    stream = longest * (2 * sizes.d_model * WIDE + max(3 * sizes.inner, 3 * sizes.d_ff) * run.gate_bytes)
    scores = examples * sizes.heads * source * source * run.value_bytes
    return stream + 2 * scores + _loss(sizes, run, examples * target).needed


def generation_bytes(sizes: Sizes, run: Execution, shape: MicroBatchShape) -> float:
    """Peak bytes of greedy generation: the caches of all decoder layers, and the logits of one position."""
    examples, source, target = shape.examples, shape.source_tokens, shape.target_tokens
    caches = 2 * sizes.decoder_layers * examples * (source + target) * sizes.inner * run.value_bytes
    return caches + 3 * examples * sizes.rows * WIDE + sizes.heads * target**2 * WIDE


def _attention(
    phase: Literal["encoder", "decoder"], sizes: Sizes, run: Execution, lengths: tuple[float, int, int], *, own_bias: bool
) -> Part:
    """Norm, attention, output product and dropout of one sublayer; `lengths` is (B, queries, keys)."""
    examples, queries, keys = lengths
    w, d, i = run.value_bytes, sizes.d_model, sizes.inner
    q, k, scores = examples * queries, examples * keys, examples * sizes.heads * queries * keys
    normed = q * (d * WIDE + WIDE + d * w)
    projections = (2 * q + 2 * k) * i * w  # queries, keys, values, and the input of the output product
    bits = q * d if sizes.dropout > 0 else 0.0
    stream = 2 * q * d * WIDE
    # The gradient of the mask is accumulated over the layers of a stack: B x h x S x S where the mask contains padding.
    per_row = phase == "encoder" or run.packed
    mask_sum = (scores if per_row else sizes.heads * queries * keys) * run.mask_bytes if own_bias else 0.0
    slots = (q + 2 * k) * i
    if run.on_gpu:
        log_sums = examples * sizes.heads * queries * WIDE
        needed = (2 * slots + q * i) * w + (scores * w if own_bias else 0.0) + mask_sum + log_sums
        return Part("attention", normed + projections + bits + log_sums, stream + needed, phase)
    weights = scores if sizes.dropout > 0 else 0.0
    # Scores, their gradient, and that of the weights; operands and their gradients in float32 with the heads first.
    needed = 3 * scores * WIDE + 2 * slots * WIDE + mask_sum
    return Part("attention", normed + projections + bits + weights, stream + needed, phase)


def _feed_forward(
    phase: Literal["encoder", "decoder"], sizes: Sizes, run: Execution, tokens: float, other_gradients: float = 0.0
) -> Part:
    """Norm, feed-forward products and dropout of one sublayer; `other_gradients`: bytes that exist at the same time."""
    w, d, f = run.value_bytes, sizes.d_model, sizes.d_ff
    hidden = tokens * f * run.gate_bytes
    bits = tokens * (d + f) if sizes.dropout > 0 else 0.0
    kept = tokens * (d * WIDE + WIDE + d * w) + (2 if sizes.gated else 1) * hidden + bits
    # A cast of the weight; on a CPU a 16-bit gradient before it is added.
    weight = 0.0 if run.value_bytes == WIDE else d * f * 2 * ((0 if run.copies else 1) + (0 if run.on_gpu else 1))
    return Part("feed-forward", kept, 2 * tokens * d * WIDE + 4 * hidden + weight + other_gradients, phase)


def _block(parts: list[Part], run: Execution, entry: float, first: float) -> Iterator[Part]:
    """The sublayers of a block; with checkpointing only its input is kept, and the rest is recomputed in its backward.

    Args:
        entry: bytes of the block's input.
        first: bytes of the masks, which the first block of a stack keeps for all.
    """
    if not run.checkpointing:
        yield Part("masks", first, 0.0, parts[0].phase)
        yield from parts
        return
    yield Part("block", entry + first, first + peak_bytes(parts), parts[0].phase)


def _stack_begin(phase: Literal["encoder", "decoder"], sizes: Sizes, tokens: float) -> Part:
    """Embedding: its dropout mask; ids are counted in the micro-batch."""
    bits = tokens * sizes.d_model if sizes.dropout > 0 else 0.0
    return Part("embedding", bits, 2 * tokens * sizes.d_model * WIDE, phase)


def _mask_bytes(sizes: Sizes, run: Execution, examples: float, source: int) -> float:
    """The encoder's additive mask, and the visibility that it is made from."""
    visible = examples * source * (source if run.packed else 1)
    return examples * source**2 * sizes.heads * run.mask_bytes + visible


def _decoder_mask_bytes(sizes: Sizes, run: Execution, shape: MicroBatchShape) -> float:
    """The additive masks of self-attention and cross-attention, and the visibility that the first is made from."""
    rows, source, target = shape.examples, shape.source_tokens, shape.target_tokens
    own = (rows if run.packed else 1.0) * target**2 * (sizes.heads * run.mask_bytes + 1)
    return own + rows * source * (target if run.packed else 1) * run.mask_bytes


def _stack_end(sizes: Sizes, tokens: float) -> float:
    """The last norm keeps its input, its dropout one byte per value."""
    return tokens * (sizes.d_model * WIDE + WIDE) + (tokens * sizes.d_model if sizes.dropout > 0 else 0.0)


def _loss(sizes: Sizes, run: Execution, labels: float) -> Part:
    """The states at the labels and one block of logits, which is kept until the backward pass."""
    on_gpu = run.on_gpu or run.packed
    block = rows_of_block(math.ceil(labels), sizes.rows, GPU_BLOCK_VALUES if on_gpu else LOSS_BLOCK_VALUES)
    d = sizes.d_model
    kept = labels * d * WIDE + labels * block * WIDE + labels * (3 * WIDE + 16)
    needed = labels * d * WIDE * 2
    if run.precision == "bf16":
        # On a CPU a block of logits is computed in 16 bits and then widened; both copies exist in addition to the buffer.
        logits = labels * block * (WIDE if run.on_gpu else WIDE + 2)
        needed = logits + 2 * d * (block + labels) + (labels * d * WIDE if sizes.rows > block else 0.0)
    return Part("loss", kept, needed, "loss")


GIB = 1 << 30
CONTEXT_BYTES = 0.45 * GIB
"""CUDA context, kernels and cuBLAS workspace; 0.3 to 0.5 GiB are reported."""
FREE_SHARE = 0.05
MIN_MICRO_TOKENS = 256
MAX_MICRO_TOKENS = {False: 2048, True: 16384}
"""Larger micro-batches are not faster; key: on a GPU."""
OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "adafactor_in_backward")
"""In the order of exactness."""


@dataclass(frozen=True)
class Peak:
    """Peak memory of training by item, in bytes."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Saved by the forward pass for the backward pass, including the last block of logits."""
    workspace: float
    """Needed in addition at the peak: gradients of activations, recomputed values, casts, logits."""

    @property
    def total(self) -> float:
        """The sum, without CUDA context and free share."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.workspace


@dataclass(frozen=True)
class Task:
    """The workload: lengths of the longest example, and examples per update."""

    source_tokens: int
    target_tokens: int
    examples_per_update: int = 16

    @property
    def longest(self) -> int:
        """Padded tokens of the longest example."""
        return self.source_tokens + self.target_tokens


@dataclass(frozen=True)
class Memory:
    """The available memory in bytes."""

    total: float
    on_gpu: bool = True
    context_counted: bool = True
    """Whether `total` must also hold the CUDA context; False for the free memory that a running process measured."""

    @property
    def usable(self) -> float:
        """Upper limit for a peak."""
        context = CONTEXT_BYTES if self.on_gpu and self.context_counted else 0.0
        return (self.total - context) * (1 - FREE_SHARE)


@dataclass(frozen=True)
class Choice:
    """One training configuration with its memory and cost."""

    optimizer: str
    checkpointing: bool
    micro_tokens: int
    precision: str
    peak: Peak
    evaluation: float
    """Peak bytes of an evaluation or a generation, weights and optimizer state included."""
    cost: float
    """Floating-point operations of an update, relative to those without checkpointing."""
    fits: bool
    copies: bool = False
    """Whether the weights of the layers are kept in the number format of the products too."""

    @property
    def needed(self) -> float:
        """Peak bytes of training and evaluation."""
        return max(self.peak.total, self.evaluation)

    def to_json(self) -> dict[str, Any]:
        """Plain values; memory in GiB."""
        items = {f"{name}_gib": value / GIB for name, value in asdict(self.peak).items()}
        plain = {
            key: getattr(self, key)
            for key in ("optimizer", "checkpointing", "micro_tokens", "precision", "cost", "fits", "copies")
        }
        return {**plain, "needed_gib": self.needed / GIB, "evaluation_gib": self.evaluation / GIB, **items}


def optimizer_bytes(sizes: Sizes, name: str, processes: int = 1) -> float:
    """Bytes of the optimizer's state, with layers sharded over `processes`, which only AdamW supports."""
    if name == "adamw":
        return 2 * WIDE * sizes.per_process(processes)
    if name == "muon":  # one moment of the matrices inside the layers, two of the rest
        return WIDE * (sizes.parameters + (1 if sizes.tied else 2) * sizes.table)
    if name == "adamw8bit":  # two bytes per value, and two float32 scales for every 256 of them
        return (2 + 2 * WIDE / 256) * sizes.parameters
    vectors = 2 * sizes.table / min(sizes.rows, sizes.d_model) + 2 * sizes.parameters / min(sizes.d_model, sizes.inner)
    return WIDE * vectors


def training_peak(sizes: Sizes, optimizer: str, run: Execution, shape: MicroBatchShape) -> Peak:
    """Peak memory of an update, by item.

    Gradients of all parameters exist throughout, as they do from the second micro-batch on. With an optimizer inside the
    backward pass only those of the vocabulary tables exist, each during its part of the pass.
    """
    parts = list(walk(sizes, run, shape))
    kept = kept_bytes(parts)
    table, weights = WIDE * sizes.table, WIDE * sizes.per_process(run.processes)
    if run.copies:
        weights += run.value_bytes * (sizes.encoder + sizes.decoder)
    state = optimizer_bytes(sizes, optimizer, run.processes)
    # Adafactor processes a matrix by blocks, two of which exist at once.
    block, own_block = (2 * WIDE * min(BLOCK_VALUES, values) for values in (sizes.table, sizes.largest_matrix))
    if optimizer == "adafactor_in_backward":
        # The head is updated after the loss has freed its logits and before the decoder's backward, the embedding after the
        # encoder's backward.
        steps = {"loss": table, "decoder": (table if sizes.tied else 0.0) + own_block, "encoder": table + own_block}
        head_step = kept_bytes(parts[:-1]) + table + block
        whole = max(peak_bytes(parts, steps), head_step)
        gradients = min(table, whole)
        return Peak(weights, gradients, state, min(kept, whole - gradients), max(0.0, whole - gradients - kept))
    muon_values = max(min(BLOCK_VALUES, sizes.encoder + sizes.decoder), sizes.largest_matrix)
    stepping = {"adafactor": block, "muon": MUON_STEP_BYTES * muon_values}.get(optimizer, 0.0)
    # A block of sharded layers is gathered while the next one is prefetched, and has its full gradient until it is reduced.
    gathered = 4 * WIDE * sizes.largest_block if run.processes > 1 else 0.0
    return Peak(weights, weights, state, kept, max(peak_bytes(parts) + gathered, stepping) - kept)


def counted_flops(sizes: Sizes, source: int, target: int, checkpointing: bool) -> float:
    """Floating-point operations of forward and backward of one example; a multiply-add counts as two."""
    d, i = sizes.d_model, sizes.inner
    feed_forward = (3 if sizes.gated else 2) * d * sizes.d_ff
    encoder = sizes.encoder_layers * (source * 2 * (4 * d * i + feed_forward) + 4 * source**2 * i)
    decoder = sizes.decoder_layers * (
        target * 2 * (6 * d * i + feed_forward) + source * 2 * 2 * d * i + 4 * target**2 * i + 4 * target * source * i
    )
    # The head computes its logits again in the backward pass, unless they fit into one block.
    head = 2 * target * d * sizes.rows * 4
    return (4 if checkpointing else 3) * (encoder + decoder) + head


def choices(
    sizes: Sizes, task: Task, memory: Memory, precision: str, optimizers: tuple[str, ...], processes: int = 1
) -> Iterator[Choice]:
    """Every candidate in the order of exactness, each with the largest micro-batch that fits.

    Args:
        optimizers: those to consider, out of `OPTIMIZERS`.
        processes: over which the layers are sharded.
    """
    for optimizer in optimizers:
        for checkpointing in (False, True):
            run = Execution(precision, checkpointing, memory.on_gpu, processes=processes)  # type: ignore[arg-type]
            yield choose_micro_tokens(sizes, task, memory, run, optimizer)


LargestShape = Callable[[int], tuple[int, int, int]]
"""Budget of a micro-batch in tokens -> upper bounds of its rows, source tokens and target tokens."""


def choose_micro_tokens(
    sizes: Sizes, task: Task, memory: Memory, run: Execution, optimizer: str, largest_shape: LargestShape | None = None
) -> Choice:
    """One optimizer with or without checkpointing, at the largest token budget that fits, else at the smallest.

    Budgets are powers of two, but at least one longest example. With an optimizer inside the backward pass one micro-batch
    holds all examples of an update.

    Args:
        largest_shape: of packed rows; None plans for the longest example of the task in every row.
    """
    most = MAX_MICRO_TOKENS[memory.on_gpu]
    ladder = [2**k for k in range(int(math.log2(MIN_MICRO_TOKENS)), int(math.log2(most)) + 1)]
    budgets = sorted({max(tokens, task.longest) for tokens in ladder}, reverse=True)
    if optimizer == "adafactor_in_backward":
        budgets = [task.longest * task.examples_per_update]
    for tokens in budgets:
        choice = choice_at(sizes, task, memory, run, optimizer, tokens, largest_shape)
        if choice.fits:
            return choice
    return choice


def first_fit(candidates: list[Choice]) -> Choice | None:
    """The most exact choice that fits; None if none does."""
    return next((choice for choice in candidates if choice.fits), None)


def smallest_card_gib(sizes: Sizes, task: Task, precision: str, optimizers: tuple[str, ...], processes: int = 1) -> float:
    """Memory in GiB of the smallest GPU that one of these optimizers can train on, one example at a time."""
    candidates = choices(sizes, task, Memory(0.0), precision, optimizers, processes)
    return (min(choice.needed for choice in candidates) / (1 - FREE_SHARE) + CONTEXT_BYTES) / GIB


def choice_at(
    sizes: Sizes,
    task: Task,
    memory: Memory,
    run: Execution,
    optimizer: str,
    micro_tokens: int,
    largest_shape: LargestShape | None = None,
) -> Choice:
    """Memory and cost of one optimizer at one token budget; arguments as of `choose_micro_tokens`."""
    shape = MicroBatchShape.within(micro_tokens, task.source_tokens, task.target_tokens)
    trained = shape if largest_shape is None else MicroBatchShape(*largest_shape(micro_tokens))
    peak = training_peak(sizes, optimizer, run, trained)
    inference = max(evaluation_bytes(sizes, run, shape), generation_bytes(sizes, run, shape))
    evaluation = WIDE * sizes.parameters + peak.optimizer + inference  # sharded layers are gathered for it
    if run.copies or run.packed:  # static buffers
        evaluation += peak.weights - WIDE * sizes.parameters + peak.gradients
    lengths = (task.source_tokens, task.target_tokens)
    cost = counted_flops(sizes, *lengths, run.checkpointing) / counted_flops(sizes, *lengths, False)
    fits = max(peak.total, evaluation) <= memory.usable
    return Choice(optimizer, run.checkpointing, micro_tokens, run.precision, peak, evaluation, cost, fits, run.copies)
