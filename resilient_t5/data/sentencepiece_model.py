"""SentencePiece unigram models: a bare `spiece.model` -> the `tokenizers` document that encodes like it.

The document is what `tokenizer.json` holds. It follows SentencePiece's own order: the model's character map, then white
space, then one dummy space in front, then the Viterbi search, with unknown characters spelled in bytes where the model
has byte pieces. Ids are the model's own; T5's sentinels are appended behind them, `<extra_id_0>` last, unless the model
brings its own as mT5's does (`<extra_id_99>` at 250,000 up to `<extra_id_0>` at 250,099, each spelled with U+2581).
"""

import json
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from resilient_t5.errors import DataError

SPACE = "\u2581"
SENTINELS = 100
UNIGRAM = 1
# Piece types of the SentencePiece format.
UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5


def document_from_sentencepiece(model: bytes, where: str) -> dict[str, Any]:
    """The `tokenizer.json` content that encodes as the SentencePiece model does.

    Args:
        model: content of a `spiece.model`.
        where: its path, for messages.

    Raises:
        DataError: not a SentencePiece unigram model, or one without pad, end mark and unknown piece.
    """
    proto = _parse(model, where)
    pieces = [piece.piece for piece in proto.pieces]
    unknown_id = proto.trainer_spec.unk_id
    specials = [piece.piece for piece in proto.pieces if piece.type in (UNKNOWN, CONTROL)]
    user_defined = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    vocabulary = [(piece.piece, piece.score) for piece in proto.pieces]
    try:
        backend = Tokenizer(models.Unigram(vocabulary, unk_id=unknown_id, byte_fallback=proto.trainer_spec.byte_fallback))
    except Exception as error:  # noqa: BLE001  the backend raises bare Exception for a vocabulary it cannot use
        raise DataError(f"this SentencePiece model cannot be used: {error}", where=where) from error
    own_sentinels = {f"<extra_id_{k}>" for k in range(SENTINELS)} | {f"{SPACE}<extra_id_{k}>" for k in range(SENTINELS)}
    backend.add_tokens([AddedToken(p, normalized=False) for p in user_defined if p not in own_sentinels])
    backend.add_special_tokens([AddedToken(p, normalized=False, special=True) for p in specials])
    if not own_sentinels & set(pieces):
        sentinels = [f"<extra_id_{k}>" for k in reversed(range(SENTINELS))]
        backend.add_special_tokens([AddedToken(sentinel, normalized=False, special=True) for sentinel in sentinels])
    backend.normalizer = _normalizer(proto)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=True)
    spaces = [decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *spaces])
    end = pieces[proto.trainer_spec.eos_id]
    backend.post_processor = processors.TemplateProcessing(
        single=["$A", end], pair=["$A", end, "$B", end], special_tokens=[(end, proto.trainer_spec.eos_id)]
    )
    document: dict[str, Any] = json.loads(backend.to_str())
    return document


def _parse(model: bytes, where: str) -> Any:
    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(model)
    except Exception as error:  # noqa: BLE001  protobuf's DecodeError; its module is no dependency of ours
        raise DataError("this is no SentencePiece model", where=where, mend="Fetch the file again.") from error
    spec = proto.trainer_spec
    if not proto.pieces or spec.model_type != UNIGRAM:
        raise DataError("this is no SentencePiece unigram model, which T5 and mT5 use", where=where)
    if not (0 <= spec.unk_id < len(proto.pieces) and 0 <= spec.eos_id < len(proto.pieces)):
        raise DataError("this SentencePiece model has no unknown piece or no end mark", where=where)
    return proto


def _normalizer(proto: Any) -> normalizers.Normalizer:
    spec = proto.normalizer_spec
    parts: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        parts.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        parts += [normalizers.Strip(left=True, right=True), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        parts.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence(parts)
