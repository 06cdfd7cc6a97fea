"""SentencePiece unigram models: the model -> the `tokenizers` document (`tokenizer.json`) that encodes like it.

Used for the models that we train and for a model file that stands alone. A published directory is read by
`published_tokenizer`, because its reference is AutoTokenizer.

Order of work, as in SentencePiece: the model's character map, white space, one dummy space before the text, the Viterbi
search, bytes for unknown characters where the model has byte pieces. Ids are the model's own. T5's 100 sentinels follow,
`<extra_id_0>` last, unless the model has sentinel pieces.

Text with gaps: the dummy space stands before the text only, never after a sentinel, so that the tokens after a gap are
those of the undamaged text. Spaces at the end of a text, or directly before a sentinel, are dropped.
"""

import json
import re
from typing import Any, Literal

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from resilient_t5.errors import DataError

SPACE = "\u2581"
SENTINELS = 100
SENTINEL_PIECE = re.compile(rf"\A{SPACE}?<extra_id_(0|[1-9]\d*)>\Z")
TRAILING_SPACES = r" +\z"  # in the syntax of the backend (Oniguruma), where $ also matches at line ends
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
    proto = parse_sentencepiece(model, where)
    pieces = [piece.piece for piece in proto.pieces]
    unknown_id = proto.trainer_spec.unk_id
    specials = [piece.piece for piece in proto.pieces if piece.type in (UNKNOWN, CONTROL)]
    user_defined = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    vocabulary, own_sentinels = plain_sentinel_names([(piece.piece, piece.score) for piece in proto.pieces])
    try:
        backend = Tokenizer(models.Unigram(vocabulary, unk_id=unknown_id, byte_fallback=proto.trainer_spec.byte_fallback))
    except Exception as error:  # noqa: BLE001  the backend raises bare Exception for a vocabulary it cannot use
        raise DataError(f"this SentencePiece model cannot be used: {error}", where=where) from error
    backend.add_tokens([AddedToken(p, normalized=False) for p in user_defined if SENTINEL_PIECE.fullmatch(p) is None])
    backend.add_special_tokens([AddedToken(p, normalized=False, special=True) for p in specials])
    sentinels = own_sentinels or [f"<extra_id_{k}>" for k in reversed(range(SENTINELS))]
    backend.add_special_tokens([AddedToken(sentinel, normalized=False, special=True) for sentinel in sentinels])
    backend.normalizer = _normalizer(proto)
    scheme: Literal["first", "never"] = "first" if proto.normalizer_spec.add_dummy_prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=True)
    spaces = [decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *spaces])
    end = pieces[proto.trainer_spec.eos_id]
    backend.post_processor = processors.TemplateProcessing(
        single=["$A", end], pair=["$A", end, "$B", end], special_tokens=[(end, proto.trainer_spec.eos_id)]
    )
    document: dict[str, Any] = json.loads(backend.to_str())
    return document


def parse_sentencepiece(model: bytes, where: str) -> Any:
    """The `ModelProto` of a unigram model with an unknown piece and an end mark.

    Raises:
        DataError: anything else.
    """
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
        parts.append(normalizers.Replace(Regex(" {2,}"), " "))
    # Each stretch of text between two sentinels is normalised by itself: this also drops the spaces before a gap.
    return normalizers.Sequence([*parts, normalizers.Replace(Regex(TRAILING_SPACES), "")])


def added_token(number: int, content: str, *, special: bool) -> dict[str, Any]:
    """An entry of `added_tokens` that is found in running text, whatever stands around it."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": content, **flags, "special": special}


def plain_sentinel_names(vocabulary: list[tuple[str, float]]) -> tuple[list[tuple[str, float]], list[str]]:
    """The vocabulary with mT5's pieces U+2581 + `<extra_id_k>` renamed to `<extra_id_k>`, and the names of all sentinels in it.

    Under the plain name the piece can be an added token of a `tokenizer.json`, which is found in running text.
    """
    renamed = [(SENTINEL_PIECE.sub(r"<extra_id_\1>", piece), score) for piece, score in vocabulary]
    return renamed, [piece for piece, _ in renamed if SENTINEL_PIECE.fullmatch(piece)]
