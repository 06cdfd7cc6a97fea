"""Tiny T5 and mT5 directories in the layouts that are published: which files lie there, how they are named, which ids.

All layouts share the pieces of one SentencePiece model over the built-in notes, so that the weights of one trained model
can be written in each of them. `LAYOUTS` names them; `write_layout` writes one.
"""

import functools
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file, save_model
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from resilient_t5.data.corpus.sample import generate_notes

SENTINELS = 100
SPARE_ROWS = 12  # published tables are padded to a multiple of 128
SIZES = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4}
IDS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
SPECIAL = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
MT5_CONFIG = {
    **SPECIAL,
    "extra_ids": 0,
    "additional_special_tokens": None,
    "tokenizer_file": None,
    "name_or_path": "google/mt5-small",
}


@dataclass(frozen=True)
class Weights:
    """A trained model over the shared pieces: tensors by name, without tables; tables by piece and by sentinel number."""

    tensors: dict[str, torch.Tensor]
    pieces: tuple[torch.Tensor, torch.Tensor | None]
    """Rows of the pieces in the embedding and, for an untied model, in the head."""
    sentinels: tuple[torch.Tensor, torch.Tensor | None]


@functools.cache
def spiece() -> bytes:
    """The shared SentencePiece model, normalising as T5's do."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([note.text for note in generate_notes(600, 5)]), model_writer=model, vocab_size=700,
        model_type="unigram", hard_vocab_limit=False, normalization_rule_name="nmt_nfkc", character_coverage=1.0,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>", minloglevel=2, num_threads=1,
    )  # fmt: skip
    return model.getvalue()


def with_pieces(names: list[str], kind: int, byte_fallback: bool = False) -> bytes:
    """The shared model with more pieces behind its own."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(spiece())
    for name in names:
        piece = proto.pieces.add()
        piece.piece, piece.score, piece.type = name, -20.0, kind
    proto.trainer_spec.byte_fallback = byte_fallback
    return proto.SerializeToString()


def piece_count() -> int:
    """Pieces of the shared model."""
    return len(sentencepiece_model_pb2.ModelProto.FromString(spiece()).pieces)


MT5_PIECES = [f"\u2581<extra_id_{k}>" for k in reversed(range(SENTINELS))]
BYTE_PIECES = [f"<0x{value:02X}>" for value in range(256)]
NORMAL, BYTE = 1, 6


def _spiece_alone(directory: Path) -> None:
    (directory / "spiece.model").write_bytes(spiece())


def _saved_by_this_version(directory: Path) -> None:
    _spiece_alone(directory)
    AutoTokenizer.from_pretrained(directory).save_pretrained(directory)


def _saved_by_version_4(directory: Path) -> None:
    """tokenizer.json with the normaliser and pre-tokenizer that transformers 4 converts a spiece.model to."""
    _saved_by_this_version(directory)
    path = directory / "tokenizer.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    strip = {"type": "Strip", "strip_left": False, "strip_right": True}
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "\u2581"}
    document["normalizer"] = {"type": "Sequence", "normalizers": [document["normalizer"], strip, spaces]}
    document["pre_tokenizer"] = document["pre_tokenizer"]["pretokenizers"][1]
    path.write_text(json.dumps(document), encoding="utf-8")
    sentinels = [f"<extra_id_{k}>" for k in range(SENTINELS)]
    _write(directory / "tokenizer_config.json", {**SPECIAL, "extra_ids": 100, "additional_special_tokens": sentinels,
                                                 "tokenizer_class": "T5TokenizerFast"})  # fmt: skip


def _slow_files(directory: Path) -> None:
    _spiece_alone(directory)
    sentinels = [f"<extra_id_{k}>" for k in range(SENTINELS)]
    _write(directory / "special_tokens_map.json", {**SPECIAL, "additional_special_tokens": sentinels})
    _write(directory / "tokenizer_config.json", {**SPECIAL, "extra_ids": 100, "additional_special_tokens": sentinels})


def _added_tokens(directory: Path) -> None:
    _spiece_alone(directory)
    _write(directory / "added_tokens.json", {"<PATIENT>": piece_count() + 100, "{": piece_count() + 101})


def _added_special_token(directory: Path) -> None:
    _slow_files(directory)
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    token = {
        "content": "<PATIENT>",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    config["added_tokens_decoder"] = {str(piece_count() + 100): token}
    _write(directory / "tokenizer_config.json", config)


def _extra_ids(count: int) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        _spiece_alone(directory)
        _write(directory / "tokenizer_config.json", {**SPECIAL, "extra_ids": count, "tokenizer_class": "T5Tokenizer"})

    return write


def _mt5_spiece(directory: Path) -> None:
    (directory / "spiece.model").write_bytes(with_pieces(MT5_PIECES, NORMAL))


def _mt5_hub(directory: Path) -> None:
    _mt5_spiece(directory)
    _write(directory / "tokenizer_config.json", MT5_CONFIG)
    _write(directory / "special_tokens_map.json", SPECIAL)


def _mt5_saved(directory: Path) -> None:
    _mt5_hub(directory)
    AutoTokenizer.from_pretrained(directory).save_pretrained(directory)


def _mt5_bytes(directory: Path) -> None:
    proto = sentencepiece_model_pb2.ModelProto.FromString(with_pieces(BYTE_PIECES, BYTE, byte_fallback=True))
    proto.pieces.extend(sentencepiece_model_pb2.ModelProto.FromString(with_pieces(MT5_PIECES, NORMAL)).pieces[-SENTINELS:])
    (directory / "spiece.model").write_bytes(proto.SerializeToString())
    _write(directory / "tokenizer_config.json", MT5_CONFIG)


def _one_file(tensors: dict[str, torch.Tensor], directory: Path, dtype: torch.dtype) -> None:
    save_file(_as(tensors, dtype), directory / "model.safetensors", metadata={"format": "pt"})


def _aliased(tensors: dict[str, torch.Tensor], directory: Path, dtype: torch.dtype) -> None:
    """As safetensors.torch.save_model writes a tied model: the one table under another name."""
    config = T5Config(**json.loads((directory / "config.json").read_text(encoding="utf-8")))
    model = T5ForConditionalGeneration(config)
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    save_model(model, str(directory / "model.safetensors"))


def _binary(tensors: dict[str, torch.Tensor], directory: Path, dtype: torch.dtype) -> None:
    """As older versions of transformers wrote: every alias of a tied table is there."""
    tensors = _as(tensors, dtype)
    aliases = {f"{stack}.embed_tokens.weight": tensors["shared.weight"] for stack in ("encoder", "decoder")}
    torch.save({**tensors, **aliases}, directory / "pytorch_model.bin")


def _sharded(tensors: dict[str, torch.Tensor], directory: Path, dtype: torch.dtype) -> None:
    names = sorted(tensors)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for shard, own_names in shards.items():
        save_file(_as({name: tensors[name] for name in own_names}, dtype), directory / shard, metadata={"format": "pt"})
    _write_index(directory / "model.safetensors.index.json", shards)


def _sharded_binary(tensors: dict[str, torch.Tensor], directory: Path, dtype: torch.dtype) -> None:
    names = sorted(tensors)
    shards = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for shard, own_names in shards.items():
        torch.save(_as({name: tensors[name] for name in own_names}, dtype), directory / shard)
    _write_index(directory / "pytorch_model.bin.index.json", shards)


def _write_index(path: Path, shards: dict[str, list[str]]) -> None:
    _write(path, {"metadata": {}, "weight_map": {name: shard for shard, own_names in shards.items() for name in own_names}})


def _as(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: tensor.to(dtype).contiguous().clone() for name, tensor in tensors.items()}


OLD_CONFIG = {
    "architectures": ["T5WithLMHeadModel"],
    "n_positions": 512,
    "num_decoder_layers": None,
    "task_specific_params": {},
}
T5_CONFIG = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "feed_forward_proj": "relu",
    "torch_dtype": "float32",
}
FLAN_CONFIG = {**T5_CONFIG, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
MT5_MODEL_CONFIG = {
    "model_type": "mt5",
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "tokenizer_class": "T5Tokenizer",
}


@dataclass(frozen=True)
class Layout:
    """One published layout."""

    config: dict[str, object]
    tokenizer: Callable[[Path], None]
    weights: Callable[[dict[str, torch.Tensor], Path, torch.dtype], None]
    dtype: torch.dtype = torch.float32
    sentinels: int = SENTINELS
    more_ids: int = 0
    """Ids behind the sentinels, or for mT5 between pieces and sentinels."""

    @property
    def mt5(self) -> bool:
        """Whether its sentinels are pieces of its SentencePiece model."""
        return self.config.get("model_type") == "mt5"

    @property
    def untied(self) -> bool:
        """Whether its head is apart from its embedding."""
        return self.config.get("tie_word_embeddings") is False


LAYOUTS = {
    "t5-oldest": Layout(OLD_CONFIG, _spiece_alone, _binary),
    "t5-saved-by-5": Layout(T5_CONFIG, _saved_by_this_version, _one_file),
    "t5-saved-by-4": Layout(T5_CONFIG, _saved_by_version_4, _aliased),
    "t5-slow-files": Layout(T5_CONFIG, _slow_files, _sharded, torch.float16),
    "t5-added-tokens": Layout(T5_CONFIG, _added_tokens, _one_file, more_ids=2),
    "t5-added-special": Layout(T5_CONFIG, _added_special_token, _one_file, more_ids=1),
    "t5-30-sentinels": Layout(T5_CONFIG, _extra_ids(30), _binary, sentinels=30),
    "t5-200-sentinels": Layout(T5_CONFIG, _extra_ids(200), _one_file, sentinels=200),
    "flan": Layout(FLAN_CONFIG, _slow_files, _sharded, torch.bfloat16),
    "mt5-spiece-alone": Layout(MT5_MODEL_CONFIG, _mt5_spiece, _one_file),
    "mt5-hub": Layout(MT5_MODEL_CONFIG, _mt5_hub, _binary),
    "mt5-saved-by-5": Layout(MT5_MODEL_CONFIG, _mt5_saved, _sharded_binary, torch.bfloat16),
    "mt5-bytes": Layout(MT5_MODEL_CONFIG, _mt5_bytes, _one_file, more_ids=256),
}


def random_weights(untied: bool) -> Weights:
    """Weights from scratch, of the size that transformers draws them in."""
    torch.manual_seed(11)
    gate = "gated-gelu" if untied else "relu"
    model = T5ForConditionalGeneration(T5Config(**SIZES, vocab_size=8, feed_forward_proj=gate, dropout_rate=0.0))
    names = {name for name, _ in model.named_parameters()} - {"shared.weight", "lm_head.weight"}
    tensors = {name: tensor.detach().clone() for name, tensor in model.named_parameters() if name in names}
    draw = torch.Generator().manual_seed(5)

    def table(rows):
        return torch.randn(rows, SIZES["d_model"], generator=draw) * (0.3 if untied else 1.0)

    head = (table(piece_count()) * 0.1, table(100) * 0.1) if untied else (None, None)
    return Weights(tensors, (table(piece_count()), head[0]), (table(100), head[1]))


def write_layout(layout: Layout, weights: Weights, directory: Path) -> Path:
    """Write the weights in a layout; the directory."""
    directory.mkdir(parents=True)
    count = piece_count()
    rows = count + layout.sentinels + layout.more_ids + SPARE_ROWS
    first = count + (layout.more_ids if layout.mt5 else 0)
    places = torch.tensor([first + layout.sentinels - 1 - k for k in range(min(SENTINELS, layout.sentinels))])
    _write(directory / "config.json", {**SIZES, **IDS, "dropout_rate": 0.0, "vocab_size": rows, **layout.config})
    layout.tokenizer(directory)
    tensors = dict(weights.tensors)
    for name, pieces, sentinels in zip(("shared.weight", "lm_head.weight"), weights.pieces, weights.sentinels, strict=True):
        if pieces is not None and sentinels is not None:
            table = torch.randn(rows, SIZES["d_model"], generator=torch.Generator().manual_seed(rows)) * 0.05
            table[:count] = pieces
            table[places] = sentinels[: len(places)]
            tensors[name] = table
    layout.weights(tensors, directory, layout.dtype)
    return directory


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
