"""What a forward and backward pass of our layers holds in memory, counted from the layers and not fitted to a curve.

`walk` lists the parts of a pass in the order of the forward pass. Each keeps bytes until its own backward, and needs
further bytes while that backward runs. The peak is the largest sum of all that is still kept and of what the part in
work needs. The counts follow `model/lean.py`, `model/attention.py` and `model/vocabulary_gradients.py` line by line; a
test compares them with the tensors that autograd saved, byte for byte, and `benchmarks/plan.py` with measured peaks.

Symbols: B examples (may be a fraction: a budget of tokens over the longest example), S and T source and target tokens,
d model width, f feed-forward width, i width of all heads, h heads, N = B T labels, w bytes of a value in the products.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from resilient_t5.model.shapes import Sizes
from resilient_t5.model.vocabulary_gradients import rows_of_block

WIDE = 4
"""Bytes of a float32 value: the residual stream, gradients of parameters, the loss."""


@dataclass(frozen=True)
class Execution:
    """How a pass is computed."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    checkpointing: bool = False
    on_gpu: bool = False
    """A GPU's attention keeps no scores; a CPU's keeps a byte a score where there is dropout."""
    padded: bool = True
    """Whether some example of the micro-batch is shorter than the longest."""
    processes: int = 1
    """Processes that the layers, their gradients and their optimizer state are cut over; the vocabulary tables are whole."""

    @property
    def value_bytes(self) -> int:
        """Bytes of a value that goes into a matrix product."""
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
        """As many examples of this length as the budget holds, not rounded down: shorter ones may fill it whole."""
        return cls(max(1.0, micro_tokens / (source_tokens + target_tokens)), source_tokens, target_tokens)


@dataclass(frozen=True)
class Part:
    """One part of a pass: what it keeps until its backward, and what its backward needs besides, in bytes."""

    name: str
    kept: float
    needed: float
    phase: Literal["encoder", "decoder", "loss"]


def walk(sizes: Sizes, run: Execution, shape: MicroBatchShape) -> Iterator[Part]:
    """The parts of a pass in forward order."""
    examples, source, target = shape.examples, shape.source_tokens, shape.target_tokens
    w, d = run.value_bytes, sizes.d_model
    encoded = examples * source * d * w
    yield _stack_begin("encoder", sizes, run, (examples, source))
    for layer in range(sizes.encoder_layers):
        first = _mask_bytes(sizes, run, examples, source) if layer == 0 else 0.0
        parts = [
            _attention("encoder", sizes, run, (examples, source, source), own_bias=True),
            _feed_forward("encoder", sizes, run, examples * source),
        ]
        yield from _block(parts, run, examples * source * d * WIDE, first)
    yield Part("encoder end", _stack_end(sizes, examples * source) + encoded, 2 * examples * source * d * WIDE, "encoder")
    yield _stack_begin("decoder", sizes, run, (examples, target))
    cross_mask = examples * target * source * w if run.padded else 0.0
    for layer in range(sizes.decoder_layers):
        first = cross_mask + sizes.heads * target**2 * w + 9 * target**2 if layer == 0 else 0.0
        cross = _attention("decoder", sizes, run, (examples, target, source), own_bias=False)
        parts = [
            _attention("decoder", sizes, run, (examples, target, target), own_bias=True),
            # Gradients of the encoder's output: the sum so far, and those of keys and of values.
            Part(cross.name, cross.kept, cross.needed + encoded, "decoder"),
            _feed_forward("decoder", sizes, run, examples * target, encoded),
        ]
        yield from _block(parts, run, examples * target * d * WIDE, first)
    yield Part("decoder end", _stack_end(sizes, examples * target), 3 * examples * target * d * WIDE, "decoder")
    yield _loss(sizes, run, examples * target)


def peak_bytes(parts: list[Part], gradients: dict[str, float] | None = None) -> float:
    """Most bytes that stand at once in a pass, parameters and their gradients not counted.

    Args:
        parts: from `walk`.
        gradients: bytes of parameters' gradients that stand while a phase is in work, where they do not stand all the time.
    """
    kept, peak = 0.0, 0.0
    for part in parts:
        kept += part.kept
        peak = max(peak, kept + part.needed + (gradients or {}).get(part.phase, 0.0))
    return peak


def kept_bytes(parts: list[Part]) -> float:
    """Bytes that autograd keeps at the end of the forward pass."""
    return sum(part.kept for part in parts)


def evaluation_bytes(sizes: Sizes, run: Execution, shape: MicroBatchShape) -> float:
    """Most bytes of the loss of a micro-batch without gradients, parameters not counted."""
    examples, source, target = shape.examples, shape.source_tokens, shape.target_tokens
    longest = examples * max(source, target)
    stream = longest * (2 * sizes.d_model * WIDE + max(3 * sizes.inner, 3 * sizes.d_ff) * run.gate_bytes)
    scores = examples * sizes.heads * source * source * run.value_bytes
    return stream + 2 * scores + _loss(sizes, run, examples * target).needed


def generation_bytes(sizes: Sizes, run: Execution, shape: MicroBatchShape) -> float:
    """Most bytes of greedy generation: the caches of all decoder layers, and the logits of one position."""
    examples, source, target = shape.examples, shape.source_tokens, shape.target_tokens
    caches = 2 * sizes.decoder_layers * examples * (source + target) * sizes.inner * run.value_bytes
    return caches + 3 * examples * sizes.rows * WIDE + sizes.heads * target**2 * WIDE


def _attention(
    phase: Literal["encoder", "decoder"], sizes: Sizes, run: Execution, lengths: tuple[float, int, int], *, own_bias: bool
) -> Part:
    """Norm, attention, output product and dropout of one sublayer; B, queries and keys."""
    examples, queries, keys = lengths
    w, d, i = run.value_bytes, sizes.d_model, sizes.inner
    q, k, scores = examples * queries, examples * keys, examples * sizes.heads * queries * keys
    normed = q * (d * WIDE + WIDE + d * w)
    projections = (2 * q + 2 * k) * i * w  # query, keys, values, and what goes into the output product
    bits = q * d if sizes.dropout > 0 else 0.0
    stream = 2 * q * d * WIDE
    # The gradient of the mask adds up over the layers of a stack: B x h x S x S where it holds padding.
    mask_sum = (scores if run.padded and phase == "encoder" else sizes.heads * queries * keys) * w if own_bias else 0.0
    if run.on_gpu:
        log_sums = examples * sizes.heads * queries * WIDE
        needed = (2 * q + 2 * k) * i * w + (scores * w if own_bias else 0.0) + mask_sum + log_sums
        return Part("attention", normed + projections + bits + log_sums, stream + needed, phase)
    weights = scores if sizes.dropout > 0 else 0.0
    copies = 0.0 if w == WIDE else (q + k) * i * WIDE
    needed = 3 * scores * WIDE + (2 * q + k) * i * WIDE + mask_sum + copies
    return Part("attention", normed + projections + bits + weights, stream + needed, phase)


def _feed_forward(
    phase: Literal["encoder", "decoder"], sizes: Sizes, run: Execution, tokens: float, waiting: float = 0.0
) -> Part:
    """Norm, feed-forward products and dropout of one sublayer; `waiting`: gradients of others that stand meanwhile."""
    w, d, f = run.value_bytes, sizes.d_model, sizes.d_ff
    hidden = tokens * f * run.gate_bytes
    bits = tokens * (d + f) if sizes.dropout > 0 else 0.0
    kept = tokens * (d * WIDE + WIDE + d * w) + (2 if sizes.gated else 1) * hidden + bits
    weight = d * f * WIDE + (0 if run.gate_bytes == WIDE else 2 * d * f * 2)
    return Part("feed-forward", kept, 2 * tokens * d * WIDE + 3 * hidden + weight + waiting, phase)


def _block(parts: list[Part], run: Execution, entry: float, first: float) -> Iterator[Part]:
    """The sublayers of a block; with checkpointing its input is kept, and all the rest made again in its backward.

    Args:
        entry: bytes of the block's input.
        first: bytes that the first block of a stack keeps for all: masks.
    """
    if not run.checkpointing:
        yield Part("masks", first, 0.0, parts[0].phase)
        yield from parts
        return
    again = first + peak_bytes(parts)
    yield Part("block", entry + first, again, parts[0].phase)


def _stack_begin(phase: Literal["encoder", "decoder"], sizes: Sizes, run: Execution, lengths: tuple[float, int]) -> Part:
    """Embedding: the bits of its dropout; ids belong to the micro-batch."""
    tokens = lengths[0] * lengths[1]
    bits = tokens * sizes.d_model if sizes.dropout > 0 else 0.0
    return Part("embedding", bits, 2 * tokens * sizes.d_model * WIDE, phase)


def _mask_bytes(sizes: Sizes, run: Execution, examples: float, source: int) -> float:
    """The encoder's mask, the padding that it was made from, and the buckets of the position bias."""
    padding = examples * source**2 if run.padded else 0.0
    return (examples if run.padded else 1) * sizes.heads * source**2 * run.value_bytes + padding + 8 * source**2


def _stack_end(sizes: Sizes, tokens: float) -> float:
    """The last norm keeps its input, its dropout a bit a value."""
    return tokens * (sizes.d_model * WIDE + WIDE) + (tokens * sizes.d_model if sizes.dropout > 0 else 0.0)


def _loss(sizes: Sizes, run: Execution, labels: float) -> Part:
    """The states at the labels and one block of logits, which stays until the backward pass."""
    block = rows_of_block(math.ceil(labels), sizes.rows)
    d = sizes.d_model
    kept = labels * d * WIDE + labels * block * WIDE + labels * (3 * WIDE + 16)
    needed = labels * d * WIDE * 2
    if run.precision == "bf16":
        # A CPU rounds a block of logits to 16 bits before it widens them; both copies stand beside the buffer.
        logits = labels * block * (WIDE if run.on_gpu else WIDE + 2)
        needed = logits + 2 * d * (block + labels) + (labels * d * WIDE if sizes.rows > block else 0.0)
    return Part("loss", kept, needed, "loss")
