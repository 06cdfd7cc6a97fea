"""Floating-point operations of one micro-batch of a T5, from its shapes; a multiply-add counts as two.

Only matrix products count, as in torch's FlopCounterMode; tests/benchmarks/test_flops.py compares the formulas with it.
Padding, recomputed activations and recomputed logits are included.

Symbols: B examples, S source and T target positions with padding, N positions that reach the head, V vocabulary rows,
d model width, f feed-forward width, i = heads x head width, L layers of a stack.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from resilient_t5.model.vocabulary_gradients import rows_of_block


@dataclass(frozen=True)
class MicroShape:
    """Padded shape of one micro-batch."""

    examples: int
    source: int
    """S"""
    target: int
    """T"""
    head: int
    """N: all target positions if all logits are computed, otherwise the label positions."""


def stack_flops(config: Any, shape: MicroShape) -> int:
    """Operations of the forward pass of encoder and decoder.

    Args:
        config: a T5Config or MT5Config.
        shape: the micro-batch.
    """
    d, f, i = config.d_model, config.d_ff, config.num_heads * config.d_kv
    feed = (3 if config.is_gated_act else 2) * d * f
    s, t = shape.source, shape.target
    encoder = config.num_layers * (2 * s * (4 * d * i + feed) + 4 * s * s * i)
    crossed = 2 * s * 2 * d * i + 4 * t * s * i
    decoder = config.num_decoder_layers * (2 * t * (6 * d * i + feed) + 4 * t * t * i + crossed)
    return int(shape.examples * (encoder + decoder))


def peer_flops(config: Any, shape: MicroShape, *, checkpointing: bool) -> int:
    """Operations of forward and backward with all logits: 3 x forward, plus the stacks again if recomputed."""
    stacks, head = stack_flops(config, shape), 2 * shape.head * config.d_model * config.vocab_size
    return (4 if checkpointing else 3) * stacks + 3 * head


def useful_flops(config: Any, lengths: Iterable[tuple[int, int]]) -> int:
    """Operations that examples of these (source, target) lengths need, without padding, recomputation and unused logits.

    Divided by time and device peak, this is the useful utilisation. It is comparable between sides that train the same
    vocabulary rows.
    """
    return sum(peer_flops(config, MicroShape(1, source, target, target), checkpointing=False) for source, target in lengths)


def score_flops(config: Any, shape: MicroShape) -> int:
    """Operations of the query-key products in one forward pass."""
    i, s, t = config.num_heads * config.d_kv, shape.source, shape.target
    return int(shape.examples * 2 * i * (config.num_layers * s * s + config.num_decoder_layers * (t * t + t * s)))


def our_flops(config: Any, shape: MicroShape, *, checkpointing: bool) -> int:
    """Operations of forward and backward with lean layers and a head in blocks.

    Attention scores are computed twice, and so are the logits of all blocks except the last.
    """
    rows = config.vocab_size
    head = 2 * shape.head * config.d_model * (4 * rows - rows_of_block(shape.head, rows))
    layers = (4 if checkpointing else 3) * stack_flops(config, shape) + score_flops(config, shape)
    # The position bias is a product with the one-hot buckets of each distance, and so is its gradient.
    distances = 2 * shape.source - 1 + 2 * shape.target - 1
    bias = 2 * distances * config.relative_attention_num_buckets * config.num_heads
    return layers + (3 if checkpointing else 2) * bias + head
