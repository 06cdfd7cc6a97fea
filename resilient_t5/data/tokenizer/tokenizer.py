"""Load a T5 or mT5 tokenizer, or train one; text -> ids with exact character positions, fast.

Where the tokens of a text spell it character by character, positions are running sums of their lengths. The other texts
are encoded again with the offsets of the tokenizers backend, which take a third more time. The padding, the end mark, the
unknown token and the sentinels are never read from a text that contains their names; the names are spelled in pieces.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from resilient_t5 import hub
from resilient_t5.data.ragged import offsets_of
from resilient_t5.data.tokenizer.published import (
    ADDED_TOKENS_FILE,
    CONFIG_FILE,
    DOCUMENT_FILE,
    SPIECE_FILE,
    read_published,
)
from resilient_t5.data.tokenizer.sentencepiece import (
    SPACE,
    TRAILING_SPACES,
    added_token,
    document_from_sentencepiece,
    end_mark_template,
    plain_sentinel_names,
    train_sentencepiece,
)
from resilient_t5.errors import DataError, StorageError

SPECIAL_TOKENS_FILE = "special_tokens_map.json"
TOKENIZER_FILES = (DOCUMENT_FILE, SPIECE_FILE, CONFIG_FILE, SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE)
SENTINEL_TEXT = re.compile(r"<extra_id_(0|[1-9][0-9]{0,4})>")
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
# Noncharacters, which no text holds. In front of a special piece's name: no text can spell it, so none reaches its id.
UNREACHABLE = "\U0010ffff"
GAP_MARK = "\U0010fffe"  # placeholder of a sentinel while a text with gaps is encoded
BYTES = "\0"  # spelling of a character's first byte piece; its continuation bytes spell nothing
WORD_STARTS_KEPT = 1 << 16


@dataclass(frozen=True)
class Encoded:
    """One text, or several concatenated ones.

    ids: int32, full-vocabulary ids without end mark.
    starts, ends: int32, characters [start, end) of the text for each token; neither decreases. A space before a word belongs to
        no token; a byte piece has its whole character; the dummy space before a text is empty.
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def part(self, first: int, end: int) -> "Encoded":
        """Tokens [first, end), with their positions unchanged."""
        return Encoded(self.ids[first:end], self.starts[first:end], self.ends[first:end])


@dataclass(frozen=True)
class EncodedBatch:
    """Concatenated texts: `tokens` with positions within each text; text i has [offsets[i], offsets[i + 1])."""

    tokens: Encoded
    offsets: np.ndarray

    def __getitem__(self, number: int) -> Encoded:
        return self.tokens.part(self.offsets[number], self.offsets[number + 1])

    def __iter__(self) -> Iterator[Encoded]:
        return (self.tokens.part(first, end) for first, end in itertools.pairwise(self.offsets.tolist()))


class TextTokenizer:
    """A T5 or mT5 tokenizer.

    Args:
        document: content of a `tokenizer.json`.
        spiece: content of the `spiece.model` it came from, if any.
        where: where it was read, for messages.

    Raises:
        DataError: not a unigram tokenizer with T5's special tokens and at least one sentinel.
    """

    def __init__(self, document: dict[str, Any], spiece: bytes | None = None, where: str = "tokenizer.json"):
        added = _checked_vocabulary(document, where)
        self.of_an_older_version = _is_of_an_older_version(document)
        """Whether an earlier version wrote it, whose document puts a word start after each gap that training never saw."""
        if self.of_an_older_version:
            document = _renewed(document)
            added = _checked_vocabulary(document, where)
        self._pieces = _all_pieces(document, added, where)
        ids = {piece: number for number, piece in enumerate(self._pieces)}
        self.size = len(self._pieces)
        self.unk_id = int(document["model"]["unk_id"])
        try:
            self.pad_id, self.eos_id = ids["<pad>"], ids["</s>"]
        except KeyError as error:
            raise DataError(f"the tokenizer has no {error}, which T5 needs", where=where) from error
        # Training ends every source and target in the end mark, whatever the published file would append to a text.
        ending = end_mark_template(self.eos_id)
        self._document = {**document, "post_processor": ending, "truncation": None, "padding": None}
        self._spiece = spiece
        self.sentinel_ids = _sentinel_ids(ids, where)
        """int32 (sentinels,): id of <extra_id_k> at place k."""
        hidden = {self.pad_id, self.eos_id, self.unk_id, *self.sentinel_ids.tolist()}
        self.added_ids = np.array(sorted({int(token["id"]) for token in added} | hidden), dtype=np.int32)
        """int32: special and added tokens and sentinels, which the search for pieces never gives."""
        specials = {int(token["id"]) for token in added if token.get("special")}
        self.special_ids = np.array(sorted(specials | hidden), dtype=np.int32)
        fallback = bool(document["model"].get("byte_fallback"))
        byte_pieces = [i for i, piece in enumerate(self._pieces) if BYTE_PIECE.fullmatch(piece)]
        self.byte_ids = np.array(byte_pieces if fallback else [], dtype=np.int32)
        self._backend = _backend(_backend_document(document, hidden, self.size, int(self.sentinel_ids[0])), where)
        self._carries_space = np.array([len(piece) > 1 and piece[0] == SPACE for piece in self._pieces], dtype=bool)
        self._spellings = list(self._pieces)
        for number in self.byte_ids.tolist():
            self._spellings[number] = "" if 0x80 <= int(self._pieces[number][3:5], 16) < 0xC0 else BYTES
        self._lengths = np.array([len(spelling) for spelling in self._spellings], dtype=np.int32)
        self._normalized = cache(self._normalize)
        self.text_start = lru_cache(WORD_STARTS_KEPT)(self._text_start)

    def encode_batch(self, texts: Sequence[str]) -> EncodedBatch:
        """Encode texts, with the character positions of their tokens."""
        texts = [_without_mark(text) for text in texts]
        found = [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        offsets = offsets_of(np.fromiter(map(len, found), np.int64, len(found)))
        ids = np.fromiter(itertools.chain.from_iterable(found), np.int32, int(offsets[-1]))
        starts, ends = self._spelled_positions(ids, offsets)
        others = [number for number, text in enumerate(texts) if not self._spells(found[number], text)]
        if others:  # encode again: the fast encoding reports no offsets
            encodings = self._backend.encode_batch([texts[number] for number in others], add_special_tokens=False)
            for number, encoding in zip(others, encodings, strict=True):
                part = slice(offsets[number], offsets[number + 1])
                starts[part], ends[part] = self._backend_positions(texts[number], ids[part], encoding.offsets)
        return EncodedBatch(Encoded(ids, starts, ends), offsets)

    def encode_marked(self, text: str) -> np.ndarray:
        """Ids (int32) of a text in which `<extra_id_k>` is sentinel k: what AutoTokenizer gives, without end mark."""
        known = len(self.sentinel_ids)
        numbers = [int(match[1]) for match in SENTINEL_TEXT.finditer(text) if int(match[1]) < known]
        marked = SENTINEL_TEXT.sub(lambda match: GAP_MARK if int(match[1]) < known else match[0], _without_mark(text))
        ids = np.array(self._backend.encode(marked, add_special_tokens=False).ids, dtype=np.int32)
        ids[ids == self.size] = self.sentinel_ids[numbers]
        return ids

    def encode_around_gaps(self, texts: Sequence[Sequence[str]]) -> list[list[Encoded]]:
        """Encode texts with gaps: for each text, given as its parts between the gaps, the tokens of each part.

        The parts' tokens with a sentinel between them are what `encode_marked` gives for the whole. Positions are within
        the part.
        """
        marked = [GAP_MARK.join(map(_without_mark, parts)) for parts in texts]
        encodings = self._backend.encode_batch(marked, add_special_tokens=False)
        return [self._parts_of(*one) for one in zip(texts, marked, encodings, strict=True)]

    def _parts_of(self, parts: Sequence[str], text: str, encoding: Any) -> list[Encoded]:
        ids = np.array(encoding.ids, dtype=np.int32)
        gaps = np.flatnonzero(ids == self.size)
        ids[gaps] = self.sentinel_ids[0]
        starts, ends = self._backend_positions(text, ids, encoding.offsets)
        begins = itertools.accumulate((len(part) + 1 for part in parts), initial=0)
        return [
            Encoded(ids[a:b], np.clip(starts[a:b] - begin, 0, len(part)), np.clip(ends[a:b] - begin, 0, len(part)))
            for part, begin, a, b in zip(parts, begins, [0, *(gaps + 1)], [*gaps, len(ids)], strict=False)
        ]

    def _text_start(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Ids of a text that begins with these pieces, which stood inside a word; cached as `text_start`.

        Args:
            ids: pieces of one word without its beginning; none is special, unknown, or a byte.
        """
        if not self._marks_text_start:
            return ids
        text = "".join(self._pieces[number] for number in ids).replace(SPACE, " ")
        if not text:  # an unknown character or a byte follows: only the word-start mark comes before it
            start = self._piece_id(SPACE)
            return () if start < 0 else (start,)
        return tuple(self._backend.encode(text, add_special_tokens=False).ids)

    def starts_as_text(self, ids: np.ndarray) -> tuple[np.ndarray, int]:
        """The tokens that replace the first ones of `ids` where these are to begin a text, and how many they replace.

        Of tokens that continue a word (in Chinese nearly all do), the rest of that word is encoded as the beginning of a text.
        """
        if not len(ids) or not self.continues_word[ids[0]]:
            return ids[:0], 0
        outside = np.flatnonzero(~self.inside_word[ids])
        count = int(outside[0]) if len(outside) else len(ids)
        return np.array(self.text_start(tuple(ids[:count].tolist())), dtype=ids.dtype), count

    @cached_property
    def _marks_text_start(self) -> bool:
        return any(self._pieces[number].startswith(SPACE) for number in self.encode_batch(["word"]).tokens.ids[:1])

    @cached_property
    def inside_word(self) -> np.ndarray:
        """bool (size,): pieces without a word-start mark, except special, added and unknown tokens and bytes."""
        inside = self.continues_word.copy()
        inside[self.byte_ids] = inside[self.unk_id] = False
        return inside

    @cached_property
    def continues_word(self) -> np.ndarray:
        """bool (size,): tokens that can begin a text only after a word-start mark."""
        found = np.fromiter((not piece.startswith(SPACE) for piece in self._pieces), bool, self.size)
        found[self.added_ids] = False
        found[self.unk_id] = True
        return found

    @cached_property
    def gap_starts_word(self) -> bool:
        """Whether the text after a gap is encoded as a new word, as T5's tokenizers do; else as the inside of a text."""
        sentinel = int(self.sentinel_ids[0])
        probes = ("b", "word", "\u75c5", "1")
        encoded = [self.encode_marked(f"a<extra_id_0>{probe}").tolist() for probe in probes]
        return any(self._pieces[ids[ids.index(sentinel) + 1]].startswith(SPACE) for ids in encoded if ids[-1] != sentinel)

    @cached_property
    def ignored_before_gap(self) -> np.ndarray:
        """int32: ids of white space that is dropped directly before a sentinel; empty for a store of an older version."""
        if self.of_an_older_version:
            return np.zeros(0, dtype=np.int32)
        found, bytes_of = [], set(self.byte_ids.tolist())
        bare = self.encode_marked("a<extra_id_0>").tolist()
        for number, piece in enumerate(self._pieces):
            byte = BYTE_PIECE.fullmatch(piece) if number in bytes_of else None
            text = chr(int(byte[1], 16)) if byte and int(byte[1], 16) < 0x80 else piece.replace(SPACE, " ")
            if text and text.isspace() and self.encode_marked(f"a{text}<extra_id_0>").tolist() == bare:
                found.append(number)
        return np.array(found, dtype=np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special ids and sentinels are skipped."""
        skipped = set(self.special_ids.tolist())
        kept = [int(number) for number in ids if int(number) not in skipped]
        return str(self._backend.decode(kept, skip_special_tokens=False))

    def pieces(self) -> list[str]:
        """Piece of every id."""
        return list(self._pieces)

    def save(self, directory: Path) -> None:
        """Write the files that `load_tokenizer` and `transformers.AutoTokenizer` read with equal ids."""
        directory.mkdir(parents=True, exist_ok=True)
        names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": self._pieces[self.unk_id]}
        special = [self._pieces[number] for number in self.special_ids.tolist()]
        sentinels = [f"<extra_id_{k}>" for k in range(len(self.sentinel_ids))]
        others = [name for name in special if name not in names.values() and name not in sentinels]
        config = {
            # The class that takes tokenizer.json as it is; T5Tokenizer would build another pre-tokenizer.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "extra_ids": 0,
            "model_input_names": ["input_ids", "attention_mask"],
            "additional_special_tokens": [*sentinels, *others],
            **names,
        }
        if self._spiece is not None:
            (directory / SPIECE_FILE).write_bytes(self._spiece)
        special_tokens = {"additional_special_tokens": [*sentinels, *others], **names}
        _write_json(directory / SPECIAL_TOKENS_FILE, special_tokens)
        _write_json(directory / CONFIG_FILE, config)
        _write_json(directory / DOCUMENT_FILE, self._document, indent=None)

    def fingerprint(self) -> str:
        """sha256 of everything that determines the ids of a text."""
        keys = ("model", "normalizer", "pre_tokenizer", "decoder", "added_tokens")
        content = json.dumps([self._document.get(key) for key in keys], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def _piece_id(self, piece: str) -> int:
        number = self._backend.token_to_id(piece)
        return -1 if number is None else int(number)

    def _spells(self, ids: list[int], text: str) -> bool:
        """Whether the tokens spell a word-start mark and then each character of `text` as one character."""
        spelled = "".join([self._spellings[number] for number in ids])
        expected = SPACE + text.replace(" ", SPACE)
        if len(spelled) != len(expected):
            return not ids
        # Where normalisation splits, joins, drops or reorders characters, the first place that it changes differs.
        return spelled == expected or all(
            one == other or self._normalized(one) == other or (other == BYTES and len(self._normalized(one)) == 1)
            for one, other in set(zip(expected, spelled, strict=True))
        )

    def _normalize(self, character: str) -> str:
        """What the tokenizer's normaliser makes of one character inside a text; cached as `_normalized`."""
        normalizer = self._backend.normalizer
        return normalizer.normalize_str(f"a{character}a")[1:-1].replace(" ", SPACE) if normalizer else character

    def _spelled_positions(self, ids: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions of tokens in texts that they spell as `_spells` requires."""
        lengths = self._lengths[ids]
        ends = np.cumsum(lengths, dtype=np.int64)
        before = np.concatenate([[0], ends])[offsets[:-1]] + 1  # the mark at the beginning of a text has no character
        ends -= np.repeat(before, np.diff(offsets))
        starts = ends - lengths + self._carries_space[ids] - (lengths == 0)  # a continuation byte has its lead's character
        return np.maximum(starts, 0).astype(np.int32), np.maximum(ends, 0).astype(np.int32)

    def _backend_positions(self, text: str, ids: np.ndarray, spans: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """The backend's own offsets, without the spaces that pieces carry."""
        bounds = np.array(spans, dtype=np.int32).reshape(-1, 2)
        starts, ends = bounds[:, 0].copy(), bounds[:, 1].copy()
        for i in np.flatnonzero(self._carries_space[ids]).tolist():
            while starts[i] < ends[i] - 1 and text[starts[i]].isspace():
                starts[i] += 1
        for i in np.flatnonzero(ids == self._piece_id(SPACE)).tolist():
            place = text[starts[i] : ends[i]]
            if not place.isspace():  # the mark of a word's beginning; the backend gives it the character after it
                ends[i] = starts[i]
                starts[i] -= bool(text[starts[i] - 1 : starts[i]].isspace())
        return np.maximum.accumulate(starts), np.maximum.accumulate(ends)


def load_tokenizer(name_or_path: str, *, setting: str = "tokenizer.name_or_path") -> TextTokenizer:
    """Load the tokenizer of a directory or hub name, with the ids that AutoTokenizer gives; or a model file as it is.

    A hub name is tried only when no such path exists, and then the network may be used.

    Args:
        setting: configuration key, for messages.

    Raises:
        DataError: no tokenizer there, or one that T5 cannot use.
    """
    files = tokenizer_files(name_or_path, setting=setting)
    directory = files[0].parent
    alone = len(files) == 1 and Path(name_or_path).expanduser().is_file()
    try:
        if alone and files[0].suffix == ".model":
            content = files[0].read_bytes()
            return TextTokenizer(document_from_sentencepiece(content, str(files[0])), content, str(files[0]))
        if alone:
            return TextTokenizer(hub.read_json(files[0]), None, str(files[0]))
        spiece = (directory / SPIECE_FILE).read_bytes() if (directory / SPIECE_FILE).is_file() else None
    except OSError as error:
        raise StorageError(f"cannot read the tokenizer: {error.strerror}", where=str(files[0])) from error
    return TextTokenizer(read_published(directory), spiece, str(directory))


def check_rows(tokenizer: TextTokenizer, rows: int, where: str) -> None:
    """Raise DataError unless a model of so many vocabulary rows has one for every id of the tokenizer."""
    if tokenizer.size > rows:
        raise DataError(
            f"the tokenizer has {tokenizer.size} ids, and the model has {rows} rows",
            where=where,
            hint="Put the tokenizer of the model into its directory",
        )


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, character_coverage: float, poll: Callable[[], None] = lambda: None
) -> TextTokenizer:
    """A SentencePiece unigram tokenizer with T5's sentinels on top; arguments and errors as in `train_sentencepiece`."""
    model = train_sentencepiece(texts, vocab_size, character_coverage, poll)
    return TextTokenizer(document_from_sentencepiece(model, "trained tokenizer"), model, "trained tokenizer")


def tokenizer_files(name_or_path: str, *, setting: str = "tokenizer.name_or_path") -> list[Path]:
    """Files that determine the ids of the tokenizer `name_or_path`; the first one has its pieces.

    Raises:
        DataError: no such directory or hub name, or no tokenizer in it.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file() and path.suffix in (".json", ".model"):
        return [path]
    directory = hub.resolve(name_or_path, "tokenizer", setting=setting)
    found = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    if not found or found[0].name not in (DOCUMENT_FILE, SPIECE_FILE):
        hub.refuse_unsupported(directory)
        raise DataError(
            f"no tokenizer in {directory}; looked for {DOCUMENT_FILE} and {SPIECE_FILE}",
            hint="Set tokenizer.name_or_path to a directory with one of them",
        )
    return found


def _checked_vocabulary(document: Any, where: str) -> list[dict[str, Any]]:
    """The added tokens, after a check of the shape of the document."""
    try:
        kind, vocabulary, unknown = document["model"]["type"], document["model"]["vocab"], document["model"]["unk_id"]
        added = [{"id": int(token["id"]), **token} for token in document.get("added_tokens") or []]
        sound = kind == "Unigram" and 0 <= int(unknown) < len(vocabulary) and all(len(entry) == 2 for entry in vocabulary)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError("this is not a unigram tokenizer, the kind of T5 and mT5", where=where) from error
    if not sound:
        raise DataError("this is not a unigram tokenizer, the kind of T5 and mT5", where=where)
    return added


def _all_pieces(document: dict[str, Any], added: list[dict[str, Any]], where: str) -> list[str]:
    """The piece of every id."""
    pieces = [str(piece) for piece, _ in document["model"]["vocab"]]
    for token in sorted(added, key=lambda token: int(token["id"])):
        if token["id"] > len(pieces):
            raise DataError(
                f"the tokenizer has no token for id {len(pieces)}, but one for {token['id']}",
                where=where,
                hint="Fetch it again",
            )
        if token["id"] == len(pieces):
            pieces.append(str(token["content"]))
    return pieces


def _sentinel_ids(ids: dict[str, int], where: str) -> np.ndarray:
    """Ids of <extra_id_0> and as many after it as there are."""
    found = list(itertools.takewhile(lambda number: number >= 0, (ids.get(f"<extra_id_{k}>", -1) for k in itertools.count())))
    if not found:
        raise DataError(
            "the tokenizer has no sentinels <extra_id_0>, <extra_id_1>, ..., which mark the gaps",
            where=where,
            hint="Name a T5 or mT5; tokenizer_config.json may ask for them with extra_ids",
        )
    return np.array(found, dtype=np.int32)


def _is_of_an_older_version(document: dict[str, Any]) -> bool:
    """Whether an earlier version converted it: its normaliser puts U+2581 before every segment of a text."""
    steps = (document.get("normalizer") or {}).get("normalizers") or []
    scheme = (document.get("pre_tokenizer") or {}).get("prepend_scheme")
    return bool(steps) and steps[-1] == {"type": "Prepend", "prepend": SPACE} and scheme == "never"


def _renewed(document: dict[str, Any]) -> dict[str, Any]:
    """Convert the document of an older version to word starts before the text only; the same ids for text without gaps."""
    steps = [step for step in document["normalizer"]["normalizers"][:-1] if step.get("type") != "Strip"]
    trailing = {"type": "Replace", "pattern": {"Regex": TRAILING_SPACES}, "content": ""}
    vocabulary, sentinels = plain_sentinel_names([(str(piece), score) for piece, score in document["model"]["vocab"]])
    ids = {piece: number for number, (piece, _) in enumerate(vocabulary)}
    added = {int(token["id"]): token for token in document["added_tokens"]}
    added |= {ids[name]: added_token(ids[name], name, special=True) for name in sentinels}
    return {
        **document,
        "normalizer": {"type": "Sequence", "normalizers": [*steps, trailing]},
        "pre_tokenizer": {**document["pre_tokenizer"], "prepend_scheme": "first"},
        "added_tokens": [added[number] for number in sorted(added)],
        "model": {**document["model"], "vocab": [list(entry) for entry in vocabulary]},
    }


def _backend_document(document: dict[str, Any], hidden: set[int], size: int, sentinel: int) -> dict[str, Any]:
    """Document to encode with: the same pieces, scores and added tokens, hidden ids unreachable, nothing appended.

    `GAP_MARK` is one more added token, with the id `size`, and is read in running text as the sentinels are.
    """
    vocabulary = list(document["model"]["vocab"])
    added = {int(token["id"]): token for token in document.get("added_tokens") or []}
    mark = added_token(size, GAP_MARK, special=True)
    mark |= {key: added[sentinel][key] for key in ("lstrip", "rstrip", "single_word") if key in added.get(sentinel, {})}
    for number in hidden:
        if number < len(vocabulary):
            vocabulary[number] = [UNREACHABLE + vocabulary[number][0], vocabulary[number][1]]
            added.pop(number, None)
        else:  # kept, so that the added tokens after it keep their ids
            added[number] = added_token(number, f"{UNREACHABLE}{number}", special=False)
    return {
        **document,
        "model": {**document["model"], "vocab": vocabulary},
        "added_tokens": [*(added[number] for number in sorted(added)), mark],
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }


def _backend(document: dict[str, Any], where: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(json.dumps(document))
    except Exception as error:  # noqa: BLE001  the backend raises bare Exception
        raise DataError(f"the tokenizer cannot be built: {error}", where=where) from error


def _without_mark(text: str) -> str:
    return text.replace(GAP_MARK, UNREACHABLE) if GAP_MARK in text else text


def _write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")
