"""Train a SentencePiece unigram model on a sample of the corpus, in a process of its own.

The training is one call into C++ that no signal can interrupt, for seconds to a minute; a process can be ended at any time,
and gives its memory back.
"""

import errno
import hashlib
import heapq
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from resilient_t5.errors import DataError, DiskFull

PROGRAM = Path(__file__).with_name("sentencepiece_program.py")
POLL_S = 0.1
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
        poll: called several times a second; what it raises ends the work.

    Raises:
        DataError: the text is too little to train on.
        DiskFull: the sample does not fit where temporary files go.
    """
    lines = _sample(texts, poll)
    if not lines:
        raise DataError("there is no text to train a tokenizer on", mend="Give a corpus, or set tokenizer.name_or_path.")
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
    code, model, said = _run(options, lines, poll)
    if code != 0:
        raise _refusal(vocab_size, code, said)
    return model


def _run(options: dict[str, Any], lines: list[str], poll: Callable[[], None]) -> tuple[int, bytes, str]:
    """Exit code, output and last words of the program; it is killed when `poll` raises."""
    command = [sys.executable, "-P", str(PROGRAM), str(os.getpid())]
    try:
        with tempfile.TemporaryFile() as handed:  # a pipe that fills while nobody reads would have to be fed and polled at once
            handed.write("\n".join((json.dumps(options), *lines)).encode("utf-8", "surrogatepass"))
            handed.seek(0)
            program = subprocess.Popen(command, stdin=handed, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFull(
            "there is no room for the text that the tokenizer is trained on",
            where=tempfile.gettempdir(),
            mend="Make room, or name a folder on another disk with TMPDIR",
        ) from error
    try:
        while True:
            try:
                model, said = program.communicate(timeout=POLL_S)
            except subprocess.TimeoutExpired:
                poll()
                continue
            poll()  # a signal to the whole group ends the program too, and is what counts
            return program.returncode, model, said.decode("utf-8", "replace")
    finally:
        program.kill()
        program.wait()


def _refusal(vocab_size: int, code: int, said: str) -> DataError:
    """What SentencePiece said, in the words of our settings where it is the mistake that many make."""
    where = "tokenizer.train_vocab_size"
    if code < 0:
        return DataError(
            f"the training of the tokenizer was ended by signal {-code}",
            where=where,
            mend="Start it again; signal 9 is mostly sent where memory runs out",
        )
    if (needed := TOO_FEW_PIECES.search(said)) is not None:
        return DataError(
            f"no tokenizer of {vocab_size} pieces can be trained on this text: its characters alone need {needed[1]}",
            where=where,
            mend=f"Set it above {needed[1]}, or lower tokenizer.character_coverage, which spells the rarest in bytes",
        )
    last_words = said.strip().splitlines()[-1:] or [f"the training ended with code {code}"]
    return DataError(
        f"no tokenizer of {vocab_size} pieces can be trained on this text: {last_words[0].strip()}",
        where=where,
        mend="Give more text, or another number of pieces.",
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
