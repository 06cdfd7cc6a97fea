"""SentencePiece unigram models: the model -> the `tokenizers` document (`tokenizer.json`) that encodes like it; and training.

Used for models trained here and for a single model file. A published directory is read by
`published`, because its reference is AutoTokenizer.

Order of work, as in SentencePiece: the model's character map, white space, one dummy space before the text, the Viterbi
search, bytes for unknown characters where the model has byte pieces. Ids are the model's own. T5's 100 sentinels follow,
`<extra_id_0>` last, unless the model has sentinel pieces.

Text with gaps: the dummy space is before the text only, never after a sentinel, so that the tokens after a gap are
those of the undamaged text. Spaces at the end of a text, or directly before a sentinel, are dropped.

A model is trained on a sample of the corpus in a process of its own. Training is one call into C++ of seconds to a minute that
no signal can interrupt; a process can be killed at any time, and its memory is freed.
"""

import errno
import hashlib
import heapq
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from sentencepiece import SentencePieceTrainer, sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from resilient_t5.errors import DataError, DiskFull

SPACE = "\u2581"
SENTINELS = 100
END = "</s>"
SENTINEL_PIECE = re.compile(rf"\A{SPACE}?<extra_id_(0|[1-9][0-9]*)>\Z")
TRAILING_SPACES = r" +\z"  # in the syntax of the backend (Oniguruma), where $ also matches at line ends
UNIGRAM = 1
# Piece types of the SentencePiece format.
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4


def document_from_sentencepiece(model: bytes, where: str) -> dict[str, Any]:
    """The `tokenizer.json` content that encodes as the SentencePiece model (the content of a `spiece.model`) does.

    Raises:
        DataError: not a SentencePiece unigram model, or one without pad, end mark and unknown piece.
    """
    proto = parse_sentencepiece(model, where)
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
        raise DataError("this is not a SentencePiece model", where=where, hint="Fetch the file again.") from error
    spec = proto.trainer_spec
    if not proto.pieces or spec.model_type != UNIGRAM:
        raise DataError("this is not a SentencePiece unigram model, the kind of T5 and mT5", where=where)
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
    """Entry of `added_tokens` that is matched anywhere in running text."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": content, **flags, "special": special}


def end_mark_template(end_id: int) -> dict[str, Any]:
    """The `post_processor` of a document that appends T5's end mark to each text."""
    end = {"SpecialToken": {"id": END, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B"))
    special = {END: {"id": END, "ids": [end_id], "tokens": [END]}}
    return {"type": "TemplateProcessing", "single": [first, end], "pair": [first, end, second, end], "special_tokens": special}


def plain_sentinel_names(vocabulary: list[tuple[str, float]]) -> tuple[list[tuple[str, float]], list[str]]:
    """The vocabulary with mT5's pieces U+2581 + `<extra_id_k>` renamed to `<extra_id_k>`, and the names of all sentinels in it.

    Under the plain name the piece can be an added token of a `tokenizer.json`, which is found in running text.
    """
    renamed = [(SENTINEL_PIECE.sub(r"<extra_id_\1>", piece), score) for piece, score in vocabulary]
    return renamed, [piece for piece, _ in renamed if SENTINEL_PIECE.fullmatch(piece)]


# A process of its own and not `multiprocessing`, whose spawn imports the caller's script again: that fails for a script
# without a guard of `__main__` and for one read from standard input.
COMMAND = ("-P", "-m", "resilient_t5.data.tokenizer.sentencepiece")
POLL_S = 0.1
PARENT_CHECK_S = 1.0
POLL_LINES = 1000
# Three million characters give the same tokens per character as a corpus of nine (within 0.5 %) in a quarter of the time.
TRAINING_CHARACTERS = 3_000_000
TRAINING_LINE_CHARACTERS = 1000
TRAINING_THREADS = 4  # fixed: the sums of the training, and so the model, depend on it
TOO_FEW_PIECES = re.compile(r"smaller than required_chars\. \d+ vs (\d+)")


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, character_coverage: float, poll: Callable[[], None] = lambda: None
) -> bytes:
    """Train a unigram model with byte fallback and T5's ids (pad 0, end mark 1, unknown 2); the same text, the same model.

    Text is kept as it is (no normalisation, no lower case, white space kept), so that decoding gives it back. Of a larger
    corpus a fixed sample of `TRAINING_CHARACTERS` is read, chosen by content.

    Args:
        texts: documents, read once.
        vocab_size: pieces, bytes and specials included; a small corpus may give fewer.
        character_coverage: share of the corpus' characters with a piece of their own.
        poll: called several times a second; an exception that it raises ends the training.

    Raises:
        DataError: the text is too little to train on.
        DiskFull: no space for the sample in the temporary directory.
    """
    lines = _sample(texts, poll)
    if not lines:
        raise DataError("there is no text to train a tokenizer on", hint="Give a corpus, or set tokenizer.name_or_path.")
    options = {
        "model_type": "unigram",
        "vocab_size": vocab_size,
        "hard_vocab_limit": False,
        "character_coverage": character_coverage,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": True,
        "max_sentence_length": 8 * TRAINING_LINE_CHARACTERS,
        "pad_id": 0,
        "eos_id": 1,
        "unk_id": 2,
        "bos_id": -1,
        "pad_piece": "<pad>",
        "eos_piece": "</s>",
        "unk_piece": "<unk>",
        "num_threads": TRAINING_THREADS,
        "minloglevel": 2,
    }
    code, model, errors = _run(options, lines, poll)
    if code != 0:
        raise _refusal(vocab_size, code, errors)
    return model


def _run(options: dict[str, Any], lines: list[str], poll: Callable[[], None]) -> tuple[int, bytes, str]:
    """Exit code, model and error text of the training process; it is killed when `poll` raises."""
    command = [sys.executable, *COMMAND, str(os.getpid())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        with tempfile.TemporaryFile() as text:  # a pipe would fill up before the process reads it, and block this one
            text.write("\n".join((json.dumps(options), *lines)).encode("utf-8", "surrogatepass"))
            text.seek(0)
            process = subprocess.Popen(command, stdin=text, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFull(
            "no space for the text that the tokenizer is trained on",
            where=tempfile.gettempdir(),
            hint="Free disk space, or set TMPDIR to a directory on another disk",
        ) from error
    try:
        while True:
            try:
                model, errors = process.communicate(timeout=POLL_S)
            except subprocess.TimeoutExpired:
                poll()
                continue
            poll()  # a signal to the process group also ends the training; then the signal is what to report
            return process.returncode, model, errors.decode("utf-8", "replace")
    finally:
        process.kill()
        process.wait()


def _refusal(vocab_size: int, code: int, errors: str) -> DataError:
    """The error of a failed training; the most common one is reported in terms of our settings."""
    where = "tokenizer.train_vocab_size"
    if code < 0:
        return DataError(
            f"tokenizer training was ended by signal {-code}",
            where=where,
            hint="Start it again; signal 9 usually means that memory ran out",
        )
    if (needed := TOO_FEW_PIECES.search(errors)) is not None:
        return DataError(
            f"cannot train a tokenizer of {vocab_size} pieces on this text: its characters alone need {needed[1]}",
            where=where,
            hint=f"Set it above {needed[1]}, or lower tokenizer.character_coverage to spell the rarest characters in bytes",
        )
    last_line = errors.strip().splitlines()[-1:] or [f"exit code {code}"]
    return DataError(
        f"cannot train a tokenizer of {vocab_size} pieces on this text: {last_line[0].strip()}",
        where=where,
        hint="Give more text, or another number of pieces.",
    )


def _sample(texts: Iterable[str], poll: Callable[[], None]) -> list[str]:
    """Lines of at most `TRAINING_CHARACTERS` characters together, those of smallest hash, in the order of the corpus."""
    kept: list[tuple[int, int, str]] = []  # a heap whose top is the largest hash
    characters = 0
    for number, line in enumerate(_lines(texts)):
        if number % POLL_LINES == 0:
            poll()
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


def _train_from_stdin() -> int:
    """Main function of the training process.

    Reads the options of the trainer as a line of JSON from stdin, then the text; writes the model to stdout. An error of the
    trainer goes to stderr, with exit code 1. The argument is the id of the parent process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches the whole process group; the parent ends this process
    threading.Thread(target=_exit_without, args=(int(sys.argv[1]),), daemon=True).start()
    options, *lines = sys.stdin.buffer.read().decode("utf-8", "surrogatepass").split("\n")
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **json.loads(options))
    except RuntimeError as error:
        sys.stderr.write(str(error))
        return 1
    sys.stdout.buffer.write(model.getvalue())
    return 0


def _exit_without(parent: int) -> None:
    """Exit this process once `parent` has ended, even when it was killed."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(_train_from_stdin())
