"""The one pass writes parts with full ids; joining parts chooses the active vocabulary and writes the store's files.

A part is what one pass wrote: streams of int32 for each split, what each batch of documents added to them, and counts. A
shard has every n-th batch, so a join takes a batch from each part in turn and is the store of one pass over all of it,
whatever the machines and the order that made the parts. Both write and read in blocks: memory does not grow with the
corpus, but for a few numbers a batch.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from resilient_t5.data.corruption.gap_encoding import reachable_behind_gaps
from resilient_t5.data.examples import Examples
from resilient_t5.data.store.store import SPLITS, sha256_of
from resilient_t5.data.tokenizer.tokenizer import TextTokenizer

STREAMS = ("tokens", "lengths", "documents", "pairs", "terms")
PART = "part.json"
FREQUENCIES = "frequencies.npy"
BATCHES = "batches.npy"
COUNTED = ("examples", "documents", "tokens", "terms")
"""What a batch is measured in; the columns of `batches.npy`, for each split one after another."""
UNITS = {"tokens": "tokens", "lengths": "examples", "documents": "examples", "pairs": "examples", "terms": "terms"}
BATCHES_TOGETHER = 8  # of one part alone, which needs no turns
ROUND_TO = 64
ACTIVE_16_BIT = 65_536


class PartWriter:
    """Streams examples into `directory`; `close` writes the counts last."""

    def __init__(self, directory: Path, vocabulary_size: int):
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._files = {split: {name: _stream(directory, split, name).open("wb") for name in STREAMS} for split in SPLITS}
        self._frequencies = np.zeros(vocabulary_size, dtype=np.int64)
        self._totals: list[list[int]] = []
        self.counts = {split: {"examples": 0, "documents": 0, "tokens": 0, "terms": 0, "with_term": 0} for split in SPLITS}

    def add(self, split: str, examples: Examples, documents: int) -> None:
        """Append examples whose documents are numbered from 0 to `documents` - 1."""
        counts, files = self.counts[split], self._files[split]
        terms = examples.terms + np.array([counts["examples"], 0, 0, 0], dtype=np.int32)
        streams = (examples.tokens, examples.lengths, examples.documents + counts["documents"], examples.pairs, terms)
        for name, array in zip(STREAMS, streams, strict=True):
            files[name].write(np.ascontiguousarray(array, dtype=np.int32).data)
        self._frequencies += np.bincount(examples.tokens, minlength=len(self._frequencies))
        counts["examples"] += len(examples.lengths)
        counts["documents"] += documents
        counts["tokens"] += len(examples.tokens)
        counts["terms"] += len(terms)
        counts["with_term"] += len(np.unique(examples.terms[:, 0]))

    def end_batch(self) -> None:
        """Note how far all streams have come; what was added since the last time is one batch."""
        self._totals.append(self._so_far())

    def _so_far(self) -> list[int]:
        return [self.counts[split][name] for split in SPLITS for name in COUNTED]

    def close(self, extra: dict[str, Any]) -> "Part":
        """End the streams and write the counts, with `extra` beside them; a batch that was not ended ends here."""
        if any(self._so_far()) and self._totals[-1:] != [self._so_far()]:
            self.end_batch()
        self.release()
        np.save(self._directory / FREQUENCIES, self._frequencies)
        totals = np.array(self._totals, dtype=np.int64).reshape(-1, len(SPLITS) * len(COUNTED))
        np.save(self._directory / BATCHES, np.diff(totals, axis=0, prepend=0))
        content = {"counts": self.counts, **extra}
        (self._directory / PART).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
        return Part.open(self._directory)

    def release(self) -> None:
        """Close the files, also of a pass that failed."""
        for files in self._files.values():
            for file in files.values():
                file.close()


@dataclass(frozen=True)
class Part:
    """A finished part."""

    directory: Path
    counts: dict[str, dict[str, int]]
    extra: dict[str, Any]

    @classmethod
    def open(cls, directory: Path) -> "Part":
        """Read the counts of a part."""
        content = json.loads((directory / PART).read_text(encoding="utf-8"))
        return cls(directory, content.pop("counts"), content)

    def frequencies(self) -> np.ndarray:
        """int64 (vocabulary size,): how often each id occurs in train and validation."""
        counts: np.ndarray = np.load(self.directory / FREQUENCIES, allow_pickle=False)
        return counts

    def batches(self, split: str) -> np.ndarray:
        """int64 (batches, 4): examples, documents, tokens and terms that each batch added to a split."""
        sizes: np.ndarray = np.load(self.directory / BATCHES, allow_pickle=False)
        first = list(SPLITS).index(split) * len(COUNTED)
        return sizes[:, first : first + len(COUNTED)]


@dataclass(frozen=True)
class Piece:
    """Neighbouring elements of a stream of one part, and what its numbers of examples and documents are moved by."""

    array: np.ndarray
    examples: int
    documents: int


def pieces(parts: Sequence[Part], split: str, name: str) -> Iterator[Piece]:
    """A stream of the joined store: a batch of each part in turn; int32, rows of four for terms."""
    columns, unit = 4 if name == "terms" else 1, COUNTED.index(UNITS[name])
    sizes = [part.batches(split) for part in parts]
    if len(parts) == 1:  # in any pieces
        sizes = [np.add.reduceat(sizes[0], np.arange(0, len(sizes[0]), BATCHES_TOGETHER))] if len(sizes[0]) else sizes
    whole, own = np.zeros(2, dtype=np.int64), np.zeros((len(parts), 2), dtype=np.int64)
    with ExitStack() as stack:
        files = [stack.enter_context(_stream(part.directory, split, name).open("rb")) for part in parts]
        for number in range(sum(map(len, sizes))):
            turn = number % len(parts)
            size = sizes[turn][number // len(parts)]
            array = np.frombuffer(files[turn].read(4 * columns * int(size[unit])), dtype=np.int32)
            moved = whole - own[turn]
            yield Piece(array.reshape(-1, 4) if columns == 4 else array, int(moved[0]), int(moved[1]))
            whole += size[:2]
            own[turn] += size[:2]


def choose_active(frequencies: np.ndarray, tokenizer: TextTokenizer, terms: Sequence[str]) -> np.ndarray:
    """The ids that a corpus can use: int32 (active,), ascending.

    Every id that occurs in it or in its terms or behind a gap in it, all special ids, sentinels and byte pieces; then the
    lowest other ids up to a multiple of 64. In a SentencePiece model the lowest ids are its most frequent pieces.
    """
    active = frequencies > 0
    active[tokenizer.special_ids] = True
    active[tokenizer.sentinel_ids] = True
    active[tokenizer.byte_ids] = True
    if terms:
        active[tokenizer.encode_together(list(terms)).tokens.ids] = True
    active = reachable_behind_gaps(tokenizer, active)
    missing = -int(active.sum()) % ROUND_TO
    active[np.flatnonzero(~active)[:missing]] = True
    return np.flatnonzero(active).astype(np.int32)


def join_parts(parts: Sequence[Part], directory: Path, active_to_full: np.ndarray, size: int) -> dict[str, Any]:
    """Write the files of both splits; the counts and the dtype for `meta.json`."""
    dtype = np.dtype(np.uint16 if len(active_to_full) <= ACTIVE_16_BIT else np.uint32)
    full_to_active = np.zeros(size, dtype=dtype)
    full_to_active[active_to_full] = np.arange(len(active_to_full), dtype=dtype)
    counts = {}
    for split, folder in SPLITS.items():
        target = directory / folder
        target.mkdir(exist_ok=True)
        counts[split] = {key: sum(part.counts[split][key] for part in parts) for key in parts[0].counts[split]}
        with (target / "tokens.bin").open("wb") as file:
            for piece in pieces(parts, split, "tokens"):
                file.write(full_to_active[piece.array].data)
        _write_offsets(parts, split, target / "offsets.npy", counts[split]["examples"])
        for name in ("documents", "pairs", "terms"):
            _write_column(parts, split, name, target / f"{name}.npy", counts[split])
    return {"dtype": dtype.name, "counts": counts}


def hashed_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file below `directory`, by its path in it."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files}


def _write_offsets(parts: Sequence[Part], split: str, path: Path, examples: int) -> None:
    with path.open("wb") as file:
        _npy_header(file, np.dtype(np.int64), (examples + 1,))
        end = np.zeros(1, dtype=np.int64)
        file.write(end.data)
        for piece in pieces(parts, split, "lengths"):
            ends = np.cumsum(piece.array, dtype=np.int64) + end
            end = ends[-1:] if len(ends) else end
            file.write(ends.data)


def _write_column(parts: Sequence[Part], split: str, name: str, path: Path, counts: dict[str, int]) -> None:
    """One int32 column, with the numbers of documents and examples as they are in the joined store."""
    rows = counts["terms"] if name == "terms" else counts["examples"]
    with path.open("wb") as file:
        _npy_header(file, np.dtype(np.int32), (rows, 4) if name == "terms" else (rows,))
        for piece in pieces(parts, split, name):
            shift = {
                "documents": np.int32(piece.documents),
                "pairs": np.int32(0),
                "terms": np.array([piece.examples, 0, 0, 0], dtype=np.int32),
            }[name]
            file.write((piece.array + shift).data)


def _npy_header(file: BinaryIO, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _stream(directory: Path, split: str, name: str) -> Path:
    return directory / f"{split}-{name}.bin"
