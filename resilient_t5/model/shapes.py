"""The sizes of a T5 or mT5 as plain numbers, and its exact parameter counts. Nothing is allocated."""

from dataclasses import dataclass, replace
from pathlib import Path

from resilient_t5 import hub
from resilient_t5.config.sections import ModelConfig
from resilient_t5.errors import ConfigError, DataError
from resilient_t5.model.embeddings import HEAD
from resilient_t5.model.load import PRESETS, Shape, read_config, shape_of
from resilient_t5.model.weights import find_weights

MT5_ROWS = 250_112
# Hub names whose sizes are known without a download.
KNOWN_NAMES = {f"google/{name}": PRESETS[name] for name in ("mt5-small", "mt5-base", "mt5-large", "mt5-xl")}


@dataclass(frozen=True)
class Sizes:
    """The numbers that parameter and activation counts depend on."""

    d_model: int
    d_ff: int
    d_kv: int
    heads: int
    encoder_layers: int
    decoder_layers: int
    rows: int
    """Trained vocabulary rows."""
    gated: bool
    tied: bool
    dropout: float = 0.1
    buckets: int = 32

    @property
    def inner(self) -> int:
        """Width of all heads together."""
        return self.heads * self.d_kv

    @property
    def table(self) -> int:
        """Parameters of one vocabulary table."""
        return self.rows * self.d_model

    @property
    def encoder(self) -> int:
        """Parameters of the encoder without its embedding."""
        layer = 4 * self.d_model * self.inner + self._feed_forward + 2 * self.d_model
        return self.encoder_layers * layer + self.buckets * self.heads + self.d_model

    @property
    def decoder(self) -> int:
        """Parameters of the decoder without its embedding and head."""
        layer = 8 * self.d_model * self.inner + self._feed_forward + 3 * self.d_model
        return self.decoder_layers * layer + self.buckets * self.heads + self.d_model

    @property
    def parameters(self) -> int:
        """All parameters; a tied table counts once."""
        return self.encoder + self.decoder + self.table * (1 if self.tied else 2)

    def per_process(self, processes: int) -> float:
        """Parameters per process with layers sharded over `processes`."""
        layers = self.encoder + self.decoder
        return self.parameters - layers + layers / processes

    @property
    def largest_block(self) -> int:
        """Parameters of a block of the decoder."""
        return 8 * self.d_model * self.inner + self._feed_forward + 3 * self.d_model + self.buckets * self.heads

    @property
    def largest_matrix(self) -> int:
        """Parameters of the largest matrix other than a vocabulary table."""
        return self.d_model * max(self.d_ff, self.inner)

    @property
    def _feed_forward(self) -> int:
        return (3 if self.gated else 2) * self.d_model * self.d_ff

    def with_rows(self, rows: int) -> "Sizes":
        """The same model with another number of vocabulary rows."""
        return replace(self, rows=rows)


def sizes_of_shape(shape: Shape, rows: int, dropout: float | None = None) -> Sizes:
    """The sizes of a preset with `rows` vocabulary rows."""
    layers = (shape.num_layers, shape.num_layers)
    rate = 0.1 if dropout is None else dropout
    return Sizes(
        shape.d_model, shape.d_ff, shape.d_kv, shape.num_heads, *layers, rows, gated=shape.mt5, tied=not shape.mt5, dropout=rate
    )


def sizes_of_checkpoint(directory: Path, dropout: float | None = None) -> Sizes:
    """The sizes in a checkpoint's config.json, with all its rows; the weights are not read.

    Whether the head is tied is decided by the names of the weights if present, else by the configuration.

    Raises:
        DataError: not a T5 or mT5; the message is that of the loader.
    """
    hub.refuse_unsupported(directory)
    config, declared_untied = read_config(directory)
    try:
        tied = HEAD not in find_weights(directory).file_of
    except DataError:
        tied = not (declared_untied or config.model_type == "mt5")
    return Sizes(
        d_model=config.d_model,
        d_ff=config.d_ff,
        d_kv=config.d_kv,
        heads=config.num_heads,
        encoder_layers=config.num_layers,
        decoder_layers=config.num_decoder_layers or config.num_layers,
        rows=config.vocab_size,
        gated=config.is_gated_act,
        tied=tied,
        dropout=config.dropout_rate if dropout is None else dropout,
        buckets=config.relative_attention_num_buckets,
    )


def sizes_of_settings(settings: ModelConfig, rows: int | None) -> Sizes:
    """The sizes of the model in `settings`: a preset, a checkpoint on this machine, or a published mT5.

    Args:
        rows: trained vocabulary rows; None takes those of the checkpoint or of mT5.

    Raises:
        ConfigError: no model is set, or a hub name that is not in the local cache.
        DataError: the checkpoint's config.json cannot be used.
    """
    if settings.name_or_path is None:
        return sizes_of_shape(shape_of(settings), rows or MT5_ROWS, settings.dropout)
    directory = hub.cached(settings.name_or_path, "model")
    if directory is None and settings.name_or_path in KNOWN_NAMES:
        return sizes_of_shape(KNOWN_NAMES[settings.name_or_path], rows or MT5_ROWS, settings.dropout)
    if directory is None:
        raise ConfigError(
            f"model.name_or_path: {settings.name_or_path} is not on this machine, and a plan downloads nothing; "
            "give a directory, or the shape of the model with --model.preset"
        )
    sizes = sizes_of_checkpoint(directory, settings.dropout)
    return sizes if rows is None else sizes.with_rows(rows)
