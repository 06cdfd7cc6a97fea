"""Build a T5 or mT5 from scratch, load one, save one: always float32; an untied head stays untied.

`from_pretrained` is not used: it takes the dtype of the file, can tie tables that are separate in the file, and reads a
missing embedding from the head. Here the model is created on the meta device from its configuration, and every parameter is
read from the file by name after its shape was compared.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration

from resilient_t5 import hub
from resilient_t5.config.sections import ModelConfig
from resilient_t5.errors import ConfigError, DataError
from resilient_t5.hub import CONFIG_FILE, read_json
from resilient_t5.model.embeddings import ALIASES, HEAD, SHARED, SpecialIds, T5Model, is_tied, scales_decoder_output, set_tables
from resilient_t5.model.initial_weights import fill_with_first_weights
from resilient_t5.model.weights import WeightFiles, find_weights, write_directory

__all__ = ["SpecialIds", "build_model", "check_checkpoint", "load_model", "save_model"]


@dataclass(frozen=True)
class Shape:
    """The sizes of a T5: width, feed-forward width, layers per stack, heads and their width."""

    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    d_kv: int = 64
    mt5: bool = False
    """mT5: gated GELU, untied head. Otherwise T5 1.0: ReLU, head tied to the embedding."""

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
    """The preset of `settings`, with the sizes that `settings` overrides.

    Raises:
        ConfigError: no preset is set.
    """
    if settings.preset is None:
        raise ConfigError("model.preset is not set: a model from scratch needs a shape")
    sizes = {key: getattr(settings, key) for key in ("d_model", "d_ff", "num_layers", "num_heads")}
    return replace(PRESETS[settings.preset], **{key: value for key, value in sizes.items() if value is not None})


CLASSES = {"t5": (T5Config, T5ForConditionalGeneration), "mt5": (MT5Config, MT5ForConditionalGeneration)}
# Contained in old T5 files; no T5 uses it.
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
SIZES = (
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_layers",
    "num_decoder_layers",
    "num_heads",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
)
NEEDED = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
MAX_SIZE = 2**24
MAX_DEPTH = 1024  # layers of a stack
NUMBERS = ("dropout_rate", "layer_norm_epsilon")
SPECIAL_IDS = ("pad_token_id", "eos_token_id", "decoder_start_token_id")
FUNCTIONS = r"(relu|gelu|gelu_new|silu|swish)"


def build_model(settings: ModelConfig, *, vocabulary_rows: int, special: SpecialIds, seed: int) -> T5Model:
    """Build a model from scratch, in float32 on the CPU; its loss starts near ln(vocabulary_rows).

    Args:
        settings: `preset`, sizes that override those of the preset, `dropout`.
        vocabulary_rows: rows of the embedding; every id of the tokenizer is below.
        special: ids of the tokenizer.
        seed: the weights are a function of it and of the sizes; no global random stream is used.

    Raises:
        ConfigError: no preset is set.
    """
    shape = shape_of(settings)
    config_class = CLASSES["mt5" if shape.mt5 else "t5"][0]
    config = config_class(
        **shape.config(settings.dropout),
        vocab_size=vocabulary_rows,
        pad_token_id=special.pad_id,
        eos_token_id=special.eos_id,
        decoder_start_token_id=special.decoder_start_id,
        tie_word_embeddings=not shape.mt5,
    )
    model = _skeleton(config)
    for name, parameter in list(model.named_parameters()):
        if name not in (SHARED, HEAD):
            _put(model, name, nn.Parameter(torch.empty(parameter.shape)))
    table_VD = (vocabulary_rows, shape.d_model)
    set_tables(model, nn.Parameter(torch.empty(table_VD)), nn.Parameter(torch.empty(table_VD)) if shape.mt5 else None)
    fill_with_first_weights(model, seed)
    return model


def load_model(name_or_path: str, settings: ModelConfig) -> T5Model:
    """Load a T5 or mT5 checkpoint as a float32 model on the CPU, tied or untied as in its file.

    Args:
        name_or_path: a directory with config.json and model.safetensors or pytorch_model.bin (one file or shards), else
            a hub name.
        settings: `dropout` overrides that of the checkpoint.

    Raises:
        DataError: the directory is not a complete, undamaged T5 or mT5 checkpoint.
    """
    model, files, declared_untied = _opened(name_or_path, settings.dropout)
    for name, _ in list(model.named_parameters()):
        if name not in (SHARED, HEAD):
            _put(model, name, nn.Parameter(files.read(name)))
    shared_VD, head_VD = read_tables(files, declared_untied)
    set_tables(model, nn.Parameter(shared_VD), None if head_VD is None else nn.Parameter(head_VD))
    return model


def check_checkpoint(name_or_path: str) -> None:
    """Download a checkpoint if necessary and check everything except the values of the weights.

    Raises:
        DataError: as `load_model`.
    """
    _opened(name_or_path, None)


def _opened(name_or_path: str, dropout: float | None) -> tuple[T5Model, WeightFiles, bool]:
    """Check a checkpoint; return its model on the meta device, its files, and whether config.json declares it untied."""
    directory = hub.resolve(name_or_path, "model", setting="model.name_or_path")
    hub.refuse_unsupported(directory)
    config, declared_untied = read_config(directory)
    if dropout is not None:
        config.dropout_rate = dropout
    files = find_weights(directory)
    _check_layers(files, config)
    model = _skeleton(config)
    _check_names_and_shapes(files, model, declared_untied)
    return model, files, declared_untied


def read_tables(files: WeightFiles, declared_untied: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Read the input embedding (V, D) and the head (V, D) in float32; the head is None if it is tied.

    Old tied files hold the same matrix under several names, files of `safetensors.torch.save_model` under any one of them.
    A file with different embeddings for encoder and decoder is refused.

    Raises:
        DataError: no input embedding, or two.
    """
    name = _embedding_name(files, declared_untied)
    if name is None:
        hint = "Take config.json and weights from one whole T5 or mT5 checkpoint"
        raise DataError(f"the weights lack the input embedding {SHARED}", where=str(files.directory), hint=hint)
    shared_VD = files.read(name)
    for alias in ALIASES:
        if alias != name and alias in files.file_of and not torch.equal(files.read(alias), shared_VD):
            raise DataError(f"{alias} differs from {name}", where=str(files.directory), hint="Take an undamaged checkpoint")
    if HEAD not in files.file_of or name == HEAD:
        return shared_VD, None
    head_VD = files.read(HEAD)
    return shared_VD, None if not declared_untied and torch.equal(head_VD, shared_VD) else head_VD


def _embedding_name(files: WeightFiles, declared_untied: bool) -> str | None:
    """The name of the input embedding in the weight files; that of the head only if the tables are tied."""
    names = (SHARED, *ALIASES) if declared_untied else (SHARED, *ALIASES, HEAD)
    return next((name for name in names if name in files.file_of), None)


def config_of(model: T5Model) -> dict[str, Any]:
    """The content of config.json with which transformers 4 and 5 load this model correctly.

    transformers 5 writes `tie_word_embeddings: true` for every T5; transformers 4 then drops an untied head.
    """
    config = model.config.to_dict() | {"tie_word_embeddings": is_tied(model), "architectures": [type(model).__name__]}
    if model.config.model_type == "t5":
        config["scale_decoder_outputs"] = scales_decoder_output(model)
    return config | {"dtype": "float32"}


def save_model(model: T5Model, directory: Path) -> None:
    """Write a float32 export for `from_pretrained` of transformers 4 and 5.

    Args:
        model: with all rows of its vocabulary; for a model with an active vocabulary use `vocabulary.write_back`.
        directory: has no model yet; the caller publishes it by a rename.

    Raises:
        RunDirectoryError: the directory has a model already.
        DiskFull, StorageError: a write failed.
    """
    write_directory(directory, config_of(model), generation_of(model), dict(model.named_parameters()))


def generation_of(model: T5Model) -> dict[str, Any]:
    """The content of generation_config.json: the special ids."""
    return {key: getattr(model.config, key) for key in SPECIAL_IDS}


def _skeleton(config: T5Config | MT5Config) -> T5Model:
    # The meta device allocates and initialises nothing.
    with torch.device("meta"):
        return CLASSES[config.model_type][1](config)


def _put(model: T5Model, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, parameter)


def read_config(directory: Path) -> tuple[T5Config | MT5Config, bool]:
    """Read known and checked keys of config.json; return the configuration and whether it declares the tables untied.

    Old files are supported: without `model_type` or `feed_forward_proj`, or with special ids in lists of one.

    Raises:
        DataError: not a configuration of a T5 or mT5.
    """
    raw, where = read_json(directory / CONFIG_FILE), str(directory / CONFIG_FILE)
    kind = hub.model_kind(raw)
    if kind not in CLASSES:
        raise DataError(f"model_type is {kind!r}, not t5 or mt5", where=where, hint="Name a T5 or mT5 checkpoint")
    sizes = {key: raw[key] for key in SIZES if raw.get(key) is not None}
    numbers = {key: raw[key] for key in NUMBERS if raw.get(key) is not None}
    ids = {key: _single(raw[key]) for key in SPECIAL_IDS if raw.get(key) is not None}
    gate = raw.get("feed_forward_proj", "relu" if kind == "t5" else "gated-gelu")
    # Written since transformers 4.21 in addition to `feed_forward_proj`; these take precedence.
    written = {key: raw[key] for key in ("dense_act_fn", "is_gated_act") if raw.get(key) is not None}
    rows = sizes.get("vocab_size", 0)
    sizes_in_layers = [key for key in ("num_layers", "num_decoder_layers") if type(sizes.get(key)) is int]
    wrong = [key for key in sizes_in_layers if sizes[key] > MAX_DEPTH]
    wrong += [key for key, value in sizes.items() if type(value) is not int or not 1 <= value <= MAX_SIZE]
    wrong += [key for key, value in numbers.items() if type(value) not in (int, float) or not 0 <= value < 1]
    wrong += [key for key, value in ids.items() if type(value) is not int or type(rows) is not int or not 0 <= value < rows]
    wrong += [] if isinstance(gate, str) and re.fullmatch(f"(gated-)?{FUNCTIONS}", gate) else ["feed_forward_proj"]
    wrong += [] if re.fullmatch(FUNCTIONS, str(written.get("dense_act_fn", "relu"))) else ["dense_act_fn"]
    wrong += [] if type(written.get("is_gated_act", False)) is bool else ["is_gated_act"]
    wrong += [key for key in NEEDED if key not in sizes]
    if wrong:
        raise DataError(f"not usable in a T5 configuration: {', '.join(wrong)}", where=where, hint="Fetch the file again")
    ids.setdefault("pad_token_id", 0)
    ids.setdefault("decoder_start_token_id", ids["pad_token_id"])
    untied = raw.get("tie_word_embeddings") is False
    kept = {"tokenizer_class": raw["tokenizer_class"]} if isinstance(raw.get("tokenizer_class"), str) else {}
    config = CLASSES[kind][0](**sizes, **numbers, **ids, **kept, feed_forward_proj=gate)
    for key, value in written.items():
        setattr(config, key, value)
    if kind == "t5":
        # transformers 5 writes the key; in older files it follows from whether the tables are tied.
        config.scale_decoder_outputs = bool(raw.get("scale_decoder_outputs", not untied))
    return config, untied


def _single(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _check_layers(files: WeightFiles, config: T5Config | MT5Config) -> None:
    # Before the model is built: a configuration with a million layers must not cost their memory.
    for stack, layers in (("encoder", config.num_layers), ("decoder", config.num_decoder_layers or config.num_layers)):
        last = f"{stack}.block.{layers - 1}.layer.0.SelfAttention.q.weight"
        beyond = f"{stack}.block.{layers}.layer.0.SelfAttention.q.weight"
        if last not in files.file_of or beyond in files.file_of:
            raise DataError(
                f"the weights do not have the {layers} {stack} layers of {CONFIG_FILE}",
                where=str(files.directory),
                hint="Take config.json and weights from one checkpoint",
            )


def _check_names_and_shapes(files: WeightFiles, model: T5Model, declared_untied: bool) -> None:
    where, hint = str(files.directory), "Take config.json and weights from one whole T5 or mT5 checkpoint"
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    table = expected.pop(SHARED)
    if declared_untied and HEAD not in files.file_of:
        raise DataError(f"{CONFIG_FILE} declares an untied head, but the weights lack {HEAD}", where=where, hint=hint)
    # A missing embedding is an error too; transformers 5 would silently use an untied head for it.
    embedding = _embedding_name(files, declared_untied) or SHARED
    absent = sorted({embedding, *expected} - set(files.file_of))
    if absent:
        what = f"the weights lack {len(absent)} of the tensors of the model, {absent[0]} first"
        raise DataError(what, where=where, hint=hint)
    tables = [name for name in (SHARED, *ALIASES, HEAD) if name in files.file_of]
    expected |= dict.fromkeys(tables, table)
    unknown = sorted(set(files.file_of) - set(expected) - {UNUSED})
    if unknown:
        what = f"the weights hold {len(unknown)} tensors that no T5 has, {unknown[0]} first"
        raise DataError(what, where=where, hint=hint)
    for name, shape in expected.items():
        actual = files.shape_of[name]
        if actual != shape:
            short = name in tables and actual[1:] == shape[1:] and actual[0] < shape[0]
            rows = f": fewer rows than the vocab_size {shape[0]}" if short else ""
            raise DataError(f"{name} has shape {actual}, {CONFIG_FILE} requires {shape}{rows}", where=where, hint=hint)
