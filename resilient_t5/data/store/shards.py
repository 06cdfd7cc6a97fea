"""Parts: a pass writes them with full ids; merging them chooses the active vocabulary and writes the files of the store.

A part is the output of one pass: streams of int32 for each split, the sizes that each batch of documents added to them, and
counts. A shard has every n-th batch, so a merge takes a batch from each part in turn and gives the store of a single pass, on
whatever machines and in whatever order the parts were made. Both read and write in blocks: memory does not grow with the corpus
except for a few numbers per batch.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from resilient_t5.data.corruption.gap_encoding import reachable_after_gaps
from resilient_t5.data.examples import Examples
from resilient_t5.data.store.store import SPLITS, sha256_of
from resilient_t5.data.tokenizer.tokenizer import TextTokenizer

STREAMS = ("tokens", "lengths", "documents", "pairs", "terms")
PART = "part.json"
FREQUENCIES = "frequencies.npy"
BATCHES = "batches.npy"
COUNTED = ("examples", "documents", "tokens", "terms")
"""Sizes of a batch; the columns of `batches.npy`, split by split."""
UNITS = {"tokens": "tokens", "lengths": "examples", "documents": "examples", "pairs": "examples", "terms": "terms"}
BATCHES_TOGETHER = 8  # when there is one part only
ROUND_TO = 64
ACTIVE_16_BIT = 65_536


class PartWriter:
    """Streams examples into `directory`; `finish` writes the counts last."""

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
        """Record the positions of all streams; everything added since the last call is one batch."""
        self._totals.append(self._so_far())

    def _so_far(self) -> list[int]:
        return [self.counts[split][name] for split in SPLITS for name in COUNTED]

    def finish(self, extra: dict[str, Any]) -> "Part":
        """Close the streams and write the counts and `extra`; ends an open batch."""
        if any(self._so_far()) and self._totals[-1:] != [self._so_far()]:
            self.end_batch()
        self.close()
        np.save(self._directory / FREQUENCIES, self._frequencies)
        totals = np.array(self._totals, dtype=np.int64).reshape(-1, len(SPLITS) * len(COUNTED))
        np.save(self._directory / BATCHES, np.diff(totals, axis=0, prepend=0))
        content = {"counts": self.counts, **extra}
        (self._directory / PART).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
        return Part.open(self._directory)

    def close(self) -> None:
        """Close the files."""
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
    """Consecutive elements of a stream of one part, and the shift of its example and document numbers."""

    array: np.ndarray
    examples: int
    documents: int


def pieces(parts: Sequence[Part], split: str, name: str) -> Iterator[Piece]:
    """Stream of the merged store: a batch of each part in turn; int32, rows of four for terms."""
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
    """Active vocabulary of a corpus: int32 (active,), ascending.

    Every id that occurs in the corpus, in its terms or after a gap, all special ids, sentinels and byte pieces; then the lowest
    other ids up to a multiple of 64. In a SentencePiece model the lowest ids are the most frequent pieces.
    """
    active = frequencies > 0
    active[tokenizer.special_ids] = True
    active[tokenizer.sentinel_ids] = True
    active[tokenizer.byte_ids] = True
    if terms:
        active[tokenizer.encode_together(list(terms)).tokens.ids] = True
    active = reachable_after_gaps(tokenizer, active)
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
    """Write an int32 column with the document and example numbers of the merged store."""
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
