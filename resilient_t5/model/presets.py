"""Shapes of the models that can be built from scratch, and their first weights.

The first weights are those of T5 (Raffel et al. 2020, as in Mesh TensorFlow) but for the scale of the residual stream.
Whatever writes into it starts at STREAM_SCALE of T5's deviation; it is normalised wherever it is read, so every layer
computes what T5's does. The decoder's last norm makes up for it, up to logits that still leave the loss near that of a
uniform guess. Weights of that size move by a useful share under AdamW at 1e-3; T5's embeddings, of deviation 1, hardly do.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch

from resilient_t5.config_data import ModelConfig
from resilient_t5.errors import ConfigError
from resilient_t5.model.tables import HEAD, SHARED, T5Model, scales_decoder_output

LAST_NORM = "decoder.final_layer_norm.weight"
STREAM_SCALE = 0.04
LARGEST_LOGIT_DEVIATION = 0.6
# A tied model sees its own input token with a logit of up to sqrt(d) deviations.
LARGEST_LOGIT = 7.0


@dataclass(frozen=True)
class Shape:
    """The sizes of a T5: width, feed-forward width, layers in each stack, heads and their width."""

    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    d_kv: int = 64
    mt5: bool = False
    """mT5: gated GELU, head apart from the embedding. Otherwise T5 1.0: ReLU, head tied to the embedding."""

    def config(self, dropout: float | None) -> dict[str, Any]:
        """The arguments of T5Config or MT5Config."""
        sizes = {key: getattr(self, key) for key in ("d_model", "d_ff", "num_layers", "num_heads", "d_kv")}
        gate = "gated-gelu" if self.mt5 else "relu"
        return sizes | {"feed_forward_proj": gate, "dropout_rate": 0.1 if dropout is None else dropout}


PRESETS = {
    "tiny": Shape(d_model=64, d_ff=128, num_layers=2, num_heads=4, d_kv=16),  # 0.2 M without embedding: tests
    "mini": Shape(d_model=128, d_ff=384, num_layers=4, num_heads=4, d_kv=32),  # 1.6 M: the quickstart, minutes on two cores
    "small": Shape(d_model=512, d_ff=2048, num_layers=6, num_heads=8),  # T5-small: 44 M, 60.5 M with 32,128 rows
    "mt5-small": Shape(d_model=512, d_ff=1024, num_layers=8, num_heads=6, mt5=True),
    "mt5-base": Shape(d_model=768, d_ff=2048, num_layers=12, num_heads=12, mt5=True),
    "mt5-large": Shape(d_model=1024, d_ff=2816, num_layers=24, num_heads=16, mt5=True),
}


def shape_of(settings: ModelConfig) -> Shape:
    """The preset of `settings` with the sizes that `settings` gives instead.

    Raises:
        ConfigError: no preset is set.
    """
    if settings.preset is None:
        raise ConfigError("model.preset is not set: a model from scratch needs a shape")
    sizes = {key: getattr(settings, key) for key in ("d_model", "d_ff", "num_layers", "num_heads")}
    return replace(PRESETS[settings.preset], **{key: value for key, value in sizes.items() if value is not None})


def first_value(name: str, config: Any, *, scaled: bool) -> tuple[float, float]:
    """Mean and standard deviation that a parameter of this name starts with; a norm has deviation 0.

    `scaled`: the decoder's output is multiplied by d_model**-0.5 before the head.
    """
    d, inner = config.d_model, config.num_heads * config.d_kv
    if name == LAST_NORM:
        deviation = min(LARGEST_LOGIT_DEVIATION, LARGEST_LOGIT * d**-0.5)
        return deviation / STREAM_SCALE * (1.0 if scaled else d**-0.5), 0.0
    if name.endswith("layer_norm.weight"):
        return 1.0, 0.0
    if name in (SHARED, HEAD):
        return 0.0, STREAM_SCALE
    if name.endswith(".q.weight"):
        return 0.0, (d * config.d_kv) ** -0.5  # scores are not divided by sqrt(d_kv), the weights are
    if name.endswith(".o.weight"):
        return 0.0, STREAM_SCALE * inner**-0.5
    if name.endswith(".wo.weight"):
        return 0.0, STREAM_SCALE * config.d_ff**-0.5
    return 0.0, d**-0.5


@torch.no_grad()
def fill_with_first_weights(model: T5Model, seed: int) -> None:
    """Draw every parameter from a stream of its own, keyed by seed and name; no global stream is touched."""
    for name, parameter in model.named_parameters():
        mean, deviation = first_value(name, model.config, scaled=scales_decoder_output(model))
        if deviation == 0.0:
            parameter.fill_(mean)
            continue
        key = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
        parameter.normal_(mean, deviation, generator=generator)
