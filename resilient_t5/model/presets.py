"""Shapes of the models that can be built from scratch."""

from dataclasses import dataclass, replace
from typing import Any

from resilient_t5.config.data import ModelConfig
from resilient_t5.errors import ConfigError


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
    "mt5-xl": Shape(d_model=2048, d_ff=5120, num_layers=24, num_heads=32, mt5=True),
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
