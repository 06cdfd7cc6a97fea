"""Load a T5 or mT5 tokenizer, or train one; text -> ids with exact character positions, fast.

Positions cost nothing where they can be counted: when normalisation maps every character of a text to a known number of
characters and the pieces' lengths add up to them, a running sum places each token. Only the other texts are encoded
again with the backend's own offsets. Names of special tokens that stand in the text as text are spelled in pieces, never
read as special tokens.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from resilient_t5.data.character_lengths import CharacterLengths
from resilient_t5.data.sentencepiece_model import SENTINELS, SPACE, document_from_sentencepiece
from resilient_t5.data.sentencepiece_training import train_sentencepiece
from resilient_t5.errors import DataError, StorageError

TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
SENTINEL_TEXT = re.compile(r"\s*<extra_id_(\d{1,2})>")
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# A noncharacter in front of a special piece's name: no text can spell it, so no text can reach the special id.
UNREACHABLE = "\U0010ffff"
NO_LENGTH = -1  # piece that stands for an unknown number of characters


@dataclass(frozen=True)
class Encoded:
    """One text, or several laid one after another.

    ids: int32, full-vocabulary ids without end mark.
    starts, ends: int32, characters [start, end) of the text that a token stands for; both never decrease. A space that a
        piece carries in front of a word belongs to no token; a byte piece has its whole character; the dummy space in
        front of a text is empty.
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


@dataclass(frozen=True)
class EncodedBatch:
    """Texts laid one after another: `tokens` with positions within each text, text i has [offsets[i], offsets[i + 1])."""

    tokens: Encoded
    offsets: np.ndarray


class TextTokenizer:
    """A T5 or mT5 tokenizer.

    Args:
        document: content of a `tokenizer.json`.
        spiece: content of the `spiece.model` it came from, if any.
        where: where it was read, for messages.

    Raises:
        DataError: no unigram tokenizer with T5's specials and 100 sentinels.
    """

    def __init__(self, document: dict[str, Any], spiece: bytes | None = None, where: str = "tokenizer.json"):
        self._document, self._spiece = document, spiece
        added = _checked_vocabulary(document, where)
        self._pieces = [str(piece) for piece, _ in document["model"]["vocab"]]
        for token in sorted(document.get("added_tokens") or [], key=lambda token: int(token["id"])):
            if token["id"] == len(self._pieces):
                self._pieces.append(token["content"])
        ids = {piece: number for number, piece in enumerate(self._pieces)}
        self.size = len(self._pieces)
        self.unk_id = int(document["model"]["unk_id"])
        try:
            self.pad_id, self.eos_id = ids["<pad>"], ids["</s>"]
        except KeyError as error:
            raise DataError(f"the tokenizer has no {error}, which T5 needs", where=where) from error
        self.sentinel_ids = _sentinel_ids(ids, where)
        specials = {int(token["id"]) for token in added if token.get("special")} | set(self.sentinel_ids.tolist())
        self.special_ids = np.array(sorted(specials | {self.pad_id, self.eos_id, self.unk_id}), dtype=np.int32)
        self.byte_ids = np.array([i for i, piece in enumerate(self._pieces) if BYTE_PIECE.fullmatch(piece)], dtype=np.int32)
        self._plain = _plain_backend(document, self.special_ids, where)
        self._lengths, self._carries_space = self._piece_tables()
        self._characters = CharacterLengths(document.get("normalizer"))
        self._fingerprint = ""

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        """Encode texts, each with the character positions of its tokens."""
        batch = self.encode_together(texts)
        tokens, bounds = batch.tokens, itertools.pairwise(batch.offsets.tolist())
        return [Encoded(tokens.ids[a:b], tokens.starts[a:b], tokens.ends[a:b]) for a, b in bounds]

    def encode_together(self, texts: Sequence[str]) -> EncodedBatch:
        """`encode_batch` in one piece: arrays of all tokens, the positions within each text, and where texts begin."""
        found = [encoding.ids for encoding in self._plain.encode_batch_fast(texts, add_special_tokens=False)]
        offsets = np.zeros(len(texts) + 1, dtype=np.int64)
        np.cumsum(np.fromiter(map(len, found), np.int64, len(found)), out=offsets[1:])
        ids = np.fromiter(itertools.chain.from_iterable(found), np.int32, int(offsets[-1]))
        starts, ends, uncounted = self._count_positions(texts, ids, offsets)
        if len(uncounted):
            slow = self._plain.encode_batch([texts[i] for i in uncounted], add_special_tokens=False)
            for number, encoding in zip(uncounted, slow, strict=True):
                part = slice(offsets[number], offsets[number + 1])
                starts[part], ends[part] = self._backend_positions(texts[number], ids[part], encoding.offsets)
        return EncodedBatch(Encoded(ids, starts, ends), offsets)

    def encode_marked(self, text: str) -> np.ndarray:
        """Ids (int32) of a text in which `<extra_id_k>` stands for sentinel k; no dummy space behind a sentinel."""
        parts: list[np.ndarray] = []
        position = 0
        lone_space = self._piece_id(SPACE)
        for mark in itertools.chain(SENTINEL_TEXT.finditer(text), [None]):
            segment = text[position : mark.start() if mark else len(text)]
            spaced = segment[:1].isspace()
            ids = self.encode_together([segment[1:] if spaced and position else segment]).tokens.ids
            glued = position > 0 and not spaced and len(ids) > 0 and ids[0] == lone_space
            parts.append(ids[1:] if glued else ids)
            if mark:
                parts.append(self.sentinel_ids[int(mark[1]) : int(mark[1]) + 1])
                position = mark.end()
        return np.concatenate(parts)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special ids and sentinels are skipped."""
        skipped = set(self.special_ids.tolist())
        kept = [int(number) for number in ids if int(number) not in skipped]
        return str(self._plain.decode(kept, skip_special_tokens=False))

    def pieces(self) -> list[str]:
        """Piece of every id."""
        return list(self._pieces)

    def save(self, directory: Path) -> None:
        """Write the files that `load_tokenizer` and `transformers.AutoTokenizer` read with equal ids."""
        directory.mkdir(parents=True, exist_ok=True)
        names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": self._pieces[self.unk_id]}
        sentinels = [self._pieces[number] for number in self.sentinel_ids]
        config = {
            # The class that takes tokenizer.json as it is; T5Tokenizer would rebuild it without byte fallback.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "extra_ids": 0,
            "additional_special_tokens": sentinels,
            **names,
        }
        if self._spiece is not None:
            (directory / "spiece.model").write_bytes(self._spiece)
        _write_json(directory / "special_tokens_map.json", {"additional_special_tokens": sentinels, **names})
        _write_json(directory / "tokenizer_config.json", config)
        _write_json(directory / "tokenizer.json", self._document, indent=None)

    def fingerprint(self) -> str:
        """sha256 of what decides which ids a text gets."""
        if not self._fingerprint:
            keys = ("model", "normalizer", "pre_tokenizer", "decoder", "added_tokens")
            content = json.dumps([self._document.get(key) for key in keys], sort_keys=True)
            self._fingerprint = hashlib.sha256(content.encode()).hexdigest()
        return self._fingerprint

    def _piece_id(self, piece: str) -> int:
        number = self._plain.token_to_id(piece)
        return -1 if number is None else int(number)

    def _piece_tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Per id: characters a piece stands for, and whether it carries a space in front of something."""
        lengths = np.array([len(piece) for piece in self._pieces], dtype=np.int16)
        for number in self.byte_ids.tolist():
            match = BYTE_PIECE.fullmatch(self._pieces[number])
            lengths[number] = 0 if match and 0x80 <= int(match[1], 16) < 0xC0 else 1
        lengths[self.special_ids] = NO_LENGTH
        carries = np.array([len(piece) > 1 and piece[0] == SPACE for piece in self._pieces], dtype=bool)
        return lengths, carries

    def _count_positions(
        self, texts: Sequence[str], ids: np.ndarray, offsets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions by running sums, and the numbers of the texts for which the sums cannot be trusted."""
        lengths = self._lengths[ids].astype(np.int64)
        normal_ends = np.concatenate([[0], np.cumsum(np.maximum(lengths, 0))])
        unknown = np.concatenate([[0], np.cumsum(lengths == NO_LENGTH)])
        first, last = offsets[:-1], offsets[1:]
        text_bounds = np.zeros(len(texts) + 1, dtype=np.int64)
        np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)), out=text_bounds[1:])
        origin, wanted, counted = self._characters.origins(texts, text_bounds)
        prefix = (last > first).astype(np.int64)  # the dummy space, which has no character
        trusted = counted & (normal_ends[last] - normal_ends[first] == wanted + prefix) & (unknown[last] == unknown[first])
        # Origins of all texts lie one after another; a text's tokens begin one before them, with the dummy space.
        shift = np.concatenate([[0], np.cumsum(wanted)])[:-1] - normal_ends[first] - prefix
        counts = last - first
        shift_of_token = np.repeat(shift, counts)
        normal_start, normal_end = normal_ends[:-1] + shift_of_token, normal_ends[1:] + shift_of_token
        normal_start = normal_start + self._carries_space[ids]
        low = np.repeat(shift + normal_ends[first] + prefix, counts)
        normal_start -= lengths == 0  # a continuation byte shares the character of the byte before it
        if origin is None:
            starts, ends = np.maximum(normal_start, low), np.maximum(normal_end, low)
        else:
            limit = max(len(origin) - 1, 0)
            origin = origin if len(origin) else np.zeros(1, dtype=np.int64)
            starts = origin[np.clip(normal_start, low, limit)]
            ends = np.where(normal_end > low, origin[np.clip(normal_end - 1, 0, limit)] + 1, starts)
        base = np.repeat(text_bounds[:-1], counts)
        return (starts - base).astype(np.int32), (ends - base).astype(np.int32), np.flatnonzero(~trusted)

    def _backend_positions(self, text: str, ids: np.ndarray, spans: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """The backend's own offsets, without the spaces that pieces carry."""
        bounds = np.array(spans, dtype=np.int32).reshape(-1, 2)
        starts, ends = bounds[:, 0].copy(), bounds[:, 1].copy()
        for i in np.flatnonzero(self._carries_space[ids]).tolist():
            while starts[i] < ends[i] - 1 and text[starts[i]].isspace():
                starts[i] += 1
        lone_space = self._piece_id(SPACE)
        if len(ids) and ids[0] == lone_space:
            ends[0] = starts[0]  # the dummy space
        return np.maximum.accumulate(starts), np.maximum.accumulate(ends)


def load_tokenizer(name_or_path: str) -> TextTokenizer:
    """The tokenizer in a directory (`tokenizer.json`, or a bare `spiece.model`), or of a hub name.

    A hub name is tried only when no such path exists, and then the network may be used.

    Raises:
        DataError: no tokenizer there, or one that T5 cannot use.
    """
    path = tokenizer_file(name_or_path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read the tokenizer: {error.strerror}", where=str(path)) from error
    if path.suffix != ".json":
        return TextTokenizer(document_from_sentencepiece(content, str(path)), content, str(path))
    try:
        document = json.loads(content)
    except ValueError as error:
        raise DataError(f"the tokenizer is not valid JSON: {error}", where=str(path), mend="Fetch the file again.") from error
    beside = path.with_name("spiece.model")
    return TextTokenizer(document, beside.read_bytes() if beside.is_file() else None, str(path))


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, character_coverage: float, poll: Callable[[], None] = lambda: None
) -> TextTokenizer:
    """A SentencePiece unigram tokenizer trained on `texts`, with T5's sentinels on top; the same text, the same tokenizer.

    `poll` is called several times a second; what it raises ends the work.

    Raises:
        DataError: too little text.
    """
    model = train_sentencepiece(texts, vocab_size, character_coverage, poll)
    return TextTokenizer(document_from_sentencepiece(model, "trained tokenizer"), model, "trained tokenizer")


def tokenizer_file(name_or_path: str) -> Path:
    """The file that decides the tokenizer of a directory or hub name.

    Raises:
        DataError: no such directory or hub name, or no tokenizer in it.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file() and path.suffix in (".json", ".model"):
        return path
    if not path.exists():
        path = _hub_directory(name_or_path)
    for name in TOKENIZER_FILES:
        if (path / name).is_file():
            return path / name
    raise DataError(
        f"no tokenizer in {path}; looked for {' and '.join(TOKENIZER_FILES)}",
        mend="Set tokenizer.name_or_path to a directory that holds one of them.",
    )


def _hub_directory(name: str) -> Path:
    mend = "Set tokenizer.name_or_path to a local directory, or train one with tokenizer.train_vocab_size."
    if not HUB_NAME.fullmatch(name):
        raise DataError(f"no tokenizer directory {name}", mend=mend)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[*TOKENIZER_FILES, "tokenizer_config.json"]))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{name} is no local directory and could not be had from the hub: {reason}", mend=mend) from error


def _checked_vocabulary(document: Any, where: str) -> list[dict[str, Any]]:
    """The added tokens, after a check of the shape of the document."""
    try:
        kind, vocabulary, unknown = document["model"]["type"], document["model"]["vocab"], document["model"]["unk_id"]
        added = [{"id": int(token["id"]), **token} for token in document.get("added_tokens") or []]
        sound = kind == "Unigram" and 0 <= int(unknown) < len(vocabulary) and all(len(entry) == 2 for entry in vocabulary)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError("this is no unigram tokenizer, which T5 and mT5 use", where=where) from error
    if not sound:
        raise DataError("this is no unigram tokenizer, which T5 and mT5 use", where=where)
    return added


def _sentinel_ids(ids: dict[str, int], where: str) -> np.ndarray:
    """Ids of <extra_id_0> to <extra_id_99>, with or without U+2581 in front."""
    found = [ids.get(f"<extra_id_{k}>", ids.get(f"{SPACE}<extra_id_{k}>")) for k in range(SENTINELS)]
    missing = [f"<extra_id_{k}>" for k, number in enumerate(found) if number is None]
    if missing:
        raise DataError(f"the tokenizer lacks {len(missing)} of T5's {SENTINELS} sentinels, {missing[0]} first", where=where)
    return np.array(found, dtype=np.int32)


def _plain_backend(document: dict[str, Any], special_ids: np.ndarray, where: str) -> Tokenizer:
    """A backend for plain text: the same pieces and scores, special pieces unreachable, nothing appended."""
    vocabulary = list(document["model"]["vocab"])
    for number in special_ids.tolist():
        if number < len(vocabulary):
            vocabulary[number] = [UNREACHABLE + vocabulary[number][0], vocabulary[number][1]]
    specials = set(special_ids.tolist())
    plain = {
        **document,
        "model": {**document["model"], "vocab": vocabulary},
        "added_tokens": [token for token in document.get("added_tokens") or [] if int(token["id"]) not in specials],
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }
    try:
        return Tokenizer.from_str(json.dumps(plain))
    except Exception as error:  # noqa: BLE001  the backend raises bare Exception
        raise DataError(f"the tokenizer cannot be built: {error}", where=where) from error


def _write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")
