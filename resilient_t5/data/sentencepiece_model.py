"""SentencePiece unigram models: a bare `spiece.model` -> the `tokenizers` document that encodes like it; training one.

The document is what `tokenizer.json` holds. It follows SentencePiece's own order: the model's character map, then white
space, then one dummy space in front, then the Viterbi search, with unknown characters spelled in bytes where the model
has byte pieces. Ids are the model's own; T5's sentinels are appended behind them, `<extra_id_0>` last, unless the model
brings its own as mT5's does (`<extra_id_99>` at 250,000 up to `<extra_id_0>` at 250,099, each spelled with U+2581).
"""

import hashlib
import heapq
import io
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from resilient_t5.errors import DataError

SPACE = "\u2581"
SENTINELS = 100
UNIGRAM = 1
# Piece types of the SentencePiece format.
UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5
# Three million characters give the same tokens per character as a corpus of nine (within 0.5 %) in a quarter of the time.
TRAINING_CHARACTERS = 3_000_000
TRAINING_LINE_CHARACTERS = 1000
TOO_FEW_PIECES = re.compile(r"smaller than required_chars\. \d+ vs (\d+)")
TRAINING_THREADS = 4  # fixed: the sums of the training, and so the model, depend on it


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


def train_sentencepiece(texts: Iterable[str], vocab_size: int, character_coverage: float) -> bytes:
    """Train a unigram model with byte fallback and T5's ids (pad 0, end mark 1, unknown 2); the same text, the same model.

    Text is kept as it is (no normalisation, no lower case, white space kept), so that decoding gives it back. Of a larger
    corpus a fixed sample of `TRAINING_CHARACTERS` is read, chosen by content.

    Args:
        texts: documents, read once.
        vocab_size: pieces, bytes and specials included; a small corpus may give fewer.
        character_coverage: share of the corpus' characters with a piece of their own.

    Raises:
        DataError: the text is too little to train on.
    """
    lines = _sample(texts)
    if not lines:
        raise DataError("there is no text to train a tokenizer on", mend="Give a corpus, or set tokenizer.name_or_path.")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            max_sentence_length=8 * TRAINING_LINE_CHARACTERS,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            pad_piece="<pad>",
            eos_piece="</s>",
            unk_piece="<unk>",
            num_threads=TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _refusal(vocab_size, str(error)) from error
    return model.getvalue()


def _refusal(vocab_size: int, said: str) -> DataError:
    """What SentencePiece said, in the words of our settings where it is the mistake that many make."""
    where = "tokenizer.train_vocab_size"
    if (needed := TOO_FEW_PIECES.search(said)) is not None:
        return DataError(
            f"no tokenizer of {vocab_size} pieces can be trained on this text: its characters alone need {needed[1]}",
            where=where,
            mend=f"Set it above {needed[1]}, or lower tokenizer.character_coverage, which spells the rarest in bytes",
        )
    return DataError(
        f"no tokenizer of {vocab_size} pieces can be trained on this text: {said.splitlines()[-1].strip()}",
        where=where,
        mend="Give more text, or another number of pieces.",
    )


def _sample(texts: Iterable[str]) -> list[str]:
    """Lines of at most `TRAINING_CHARACTERS` characters together, those of smallest hash, in the order of the corpus."""
    kept: list[tuple[int, int, str]] = []  # a heap whose top is the largest hash
    characters = 0
    for number, line in enumerate(_lines(texts)):
        order = int.from_bytes(hashlib.blake2b(line.encode("utf-8", "surrogatepass"), digest_size=7).digest())
        if characters >= TRAINING_CHARACTERS and order >= -kept[0][0]:
            continue
        heapq.heappush(kept, (-order, -number, line))
        characters += len(line)
        while characters - len(kept[0][2]) >= TRAINING_CHARACTERS:
            characters -= len(heapq.heappop(kept)[2])
    return [line for _, _, line in sorted(kept, key=lambda entry: -entry[1])]


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), TRAINING_LINE_CHARACTERS):
                yield line[start : start + TRAINING_LINE_CHARACTERS]
