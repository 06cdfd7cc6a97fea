"""From a corpus to the files of a store: one pass (read, encode, find terms, cut), then the active vocabulary and the files.

The backend encodes without holding the GIL, so a second core encodes while this thread reads, searches and writes. The pass
writes its examples with full ids, since the active vocabulary is known only after it. Memory is a few batches of
`BATCH_CHARACTERS`, whatever the size of the corpus.
"""

import dataclasses
import json
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from resilient_t5.config.schema import Config
from resilient_t5.data.corpus.documents import Document, SeenParagraphs, held_out, read_documents, text_digest
from resilient_t5.data.corpus.formats import CorpusCounts
from resilient_t5.data.corpus.sample import generate_notes
from resilient_t5.data.corruption.gap_encoding import reachable_after_gaps
from resilient_t5.data.examples import Examples, cut_examples, find_terms
from resilient_t5.data.store.corpus_report import Tally, build_report, check_unknown
from resilient_t5.data.store.fingerprint import BUILTIN, Fingerprint, is_builtin
from resilient_t5.data.store.store import (
    FORMAT,
    META,
    REPORT,
    SPLITS,
    TERMS,
    TOKENIZER,
    TOKENIZER_RECORD,
    VOCABULARY,
    sha256_of,
)
from resilient_t5.data.terms import TermList, TermMatcher
from resilient_t5.data.tokenizer.tokenizer import EncodedBatch, TextTokenizer
from resilient_t5.errors import DataError

# Fits into the CPU cache, and makes the cost per call negligible.
BATCH_CHARACTERS = 60_000
BATCHES_AHEAD = 3
PACKED_SUFFIXES = (".gz", ".xz")
GAP_RESERVE_SHARE = 16  # 32 of 512 tokens: one for each of 27 gaps, and a few more
USUAL_PACKING = 4  # how much larger packed text becomes; for the progress figure only
# Arrays of a split apart from its tokens: dtype and shape of a row.
ARRAYS: dict[str, tuple[type[np.integer[Any]], tuple[int, ...]]] = {
    "offsets": (np.int64, ()),
    "documents": (np.int32, ()),
    "pairs": (np.int32, ()),
    "terms": (np.int32, (4,)),
}
TOKENS_AT_ONCE = 1 << 20
ROUND_TO = 64
MARK = re.compile(r"<extra_id_\d+>")
ACTIVE_16_BIT = 65_536

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """Settings, inputs, tokenizer, terms by id, and a progress callback (bytes read, bytes to read)."""

    config: Config
    identity: Fingerprint
    tokenizer: TextTokenizer
    terms: TermList
    on_progress: Progress


@dataclass
class Batch:
    """Documents to encode together, and whether each belongs to validation."""

    documents: list[Document] = field(default_factory=list)
    validation: list[bool] = field(default_factory=list)

    def texts(self) -> list[str]:
        """The texts; empty for pairs, which are encoded separately."""
        return [document.text if document.target is None else "" for document in self.documents]


class Streams:
    """The examples of a pass in files of `directory`, with full ids: `add` writes them, `write_splits` converts them."""

    def __init__(self, directory: Path, vocabulary_size: int):
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.frequencies = np.zeros(vocabulary_size, dtype=np.int64)
        """How often each id occurs in train and validation."""
        self.counts = {split: {"examples": 0, "documents": 0, "tokens": 0, "terms": 0, "with_term": 0} for split in SPLITS}
        names = ("tokens", *ARRAYS)
        self._files = {split: {name: self._path(split, name).open("wb") for name in names} for split in SPLITS}
        for files in self._files.values():
            files["offsets"].write(np.zeros(1, dtype=np.int64).data)

    def _path(self, split: str, name: str) -> Path:
        return self.directory / f"{split}-{name}.bin"

    def add(self, split: str, examples: Examples, documents: int) -> None:
        """Append examples whose documents are numbered from 0 to `documents` - 1."""
        counts, files = self.counts[split], self._files[split]
        arrays = {
            "offsets": counts["tokens"] + np.cumsum(examples.lengths, dtype=np.int64),
            "documents": examples.documents + counts["documents"],
            "pairs": examples.pairs,
            "terms": examples.terms + np.array([counts["examples"], 0, 0, 0]),
        }
        files["tokens"].write(np.ascontiguousarray(examples.tokens, dtype=np.int32).data)
        for name, array in arrays.items():
            files[name].write(np.ascontiguousarray(array, dtype=ARRAYS[name][0]).data)
        self.frequencies += np.bincount(examples.tokens, minlength=len(self.frequencies))
        counts["examples"] += len(examples.lengths)
        counts["documents"] += documents
        counts["tokens"] += len(examples.tokens)
        counts["terms"] += len(examples.terms)
        counts["with_term"] += len(np.unique(examples.terms[:, 0]))

    def close(self) -> None:
        """Close the files; nothing can be added afterwards."""
        for files in self._files.values():
            for file in files.values():
                file.close()

    def write_splits(self, directory: Path, active_to_full: np.ndarray) -> np.dtype[Any]:
        """Write the files of both splits of a store, with active ids; return the dtype of the tokens."""
        dtype = np.dtype(np.uint16 if len(active_to_full) <= ACTIVE_16_BIT else np.uint32)
        full_to_active = np.zeros(len(self.frequencies), dtype=dtype)
        full_to_active[active_to_full] = np.arange(len(active_to_full), dtype=dtype)
        for split, folder in SPLITS.items():
            target, counts = directory / folder, self.counts[split]
            target.mkdir(exist_ok=True)
            with self._path(split, "tokens").open("rb") as source, (target / "tokens.bin").open("wb") as file:
                while len(ids := np.fromfile(source, np.int32, TOKENS_AT_ONCE)):
                    file.write(full_to_active[ids].data)
            rows = {"offsets": counts["examples"] + 1, "terms": counts["terms"]}
            for name, (kind, row_shape) in ARRAYS.items():
                with self._path(split, name).open("rb") as source, (target / f"{name}.npy").open("wb") as file:
                    shape = (rows.get(name, counts["examples"]), *row_shape)
                    header = {"descr": np.dtype(kind).str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                    shutil.copyfileobj(source, file)
        return dtype


@dataclass(frozen=True)
class Pass:
    """Result of a pass over the corpus."""

    streams: Streams
    tally: Tally
    corpus: CorpusCounts
    smallest_key: int
    """Smallest key of a document: the one to hold out when chance holds out none."""
    seconds: float


def documents_of(config: Config, counts: CorpusCounts) -> Iterator[tuple[Document, bool]]:
    """Every document and whether it belongs to validation; no document is in both splits."""
    data, seen = config.data, SeenParagraphs()
    share = data.validation_share
    if data.validation_inputs():
        share = 0.0
        for document in read_documents(data.validation_inputs(), data, counts, seen=seen):
            yield document, True
    for document in _train_documents(config, counts, seen):
        yield document, share > 0 and held_out(document, share)


def _train_documents(config: Config, counts: CorpusCounts, seen: SeenParagraphs) -> Iterator[Document]:
    if not is_builtin(config):
        yield from read_documents(config.data.train_inputs(), config.data, counts, seen=seen)
        return
    for number, note in enumerate(generate_notes(config.data.sample_notes, config.run.seed), start=1):
        counts.documents += 1
        counts.characters += len(note.text)
        counts.bytes += len(note.text.encode())
        yield Document(note.text, f"{BUILTIN}:{number}", None, text_digest(note.text))


def _batches(config: Config, counts: CorpusCounts, forced: int | None) -> Iterator[Batch]:
    batch, characters = Batch(), 0
    for document, validation in documents_of(config, counts):
        batch.documents.append(document)
        batch.validation.append(validation or document.key == forced)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = Batch(), 0
    if batch.documents:
        yield batch


def _encoded_ahead(batches: Iterator[Batch], tokenizer: TextTokenizer) -> Iterator[tuple[Batch, EncodedBatch]]:
    """Encode in a thread, `BATCHES_AHEAD` batches ahead of the caller."""
    waiting: deque[tuple[Batch, Future[EncodedBatch]]] = deque()
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode")
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(tokenizer.encode_batch, batch.texts())))
            if len(waiting) > BATCHES_AHEAD:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def read_corpus(job: Job, directory: Path, *, forced: int | None = None) -> Pass:
    """Read the whole corpus and write its examples into streams in `directory`.

    Args:
        forced: key of a document that is assigned to validation in any case.
    """
    started = time.perf_counter()
    counts, tally = CorpusCounts(), Tally(np.zeros(len(job.terms.terms), dtype=np.int64))
    total = bytes_to_read(job.identity)
    matcher = TermMatcher(job.terms.terms) if job.terms.terms else None
    smallest_key = 2**64
    with closing(Streams(directory, job.tokenizer.size)) as streams:
        for batch, encoded in _encoded_ahead(_batches(job.config, counts, forced), job.tokenizer):
            examples = _examples_of(job, matcher, batch, encoded, tally)
            validation = np.array(batch.validation)
            for split, chosen in (("train", ~validation), ("validation", validation)):
                if chosen.any():
                    streams.add(split, examples.chosen(chosen), int(chosen.sum()))
            smallest_key = min(smallest_key, *(document.key for document in batch.documents))
            job.on_progress(min(counts.bytes, total or counts.bytes), total)
    return Pass(streams, tally, counts, smallest_key, time.perf_counter() - started)


def _examples_of(job: Job, matcher: TermMatcher | None, batch: Batch, encoded: EncodedBatch, tally: Tally) -> Examples:
    """The examples of a batch; counted in `tally`."""
    data, texts = job.config.data, batch.texts()
    longest = data.max_source_tokens - 1  # without end mark
    if job.tokenizer.gap_starts_word:  # its gaps add tokens
        longest -= data.max_source_tokens // GAP_RESERVE_SHARE
    spans, widened = find_terms(matcher, texts, encoded)
    examples, lost = cut_examples(
        texts,
        encoded,
        spans,
        tokenizer=job.tokenizer,
        max_tokens=longest,
        overlap_tokens=data.overlap_tokens,
    )
    tally.widened += widened
    tally.cut_terms += lost
    tally.chunked += int((np.diff(encoded.offsets) > longest).sum())
    tally.characters += sum(map(len, texts))
    tally.tokens += len(encoded.tokens.ids)
    tally.unknown += int((encoded.tokens.ids == job.tokenizer.unk_id).sum())
    tally.count_characters(texts, encoded, job.tokenizer.unk_id)
    if len(examples.terms):
        tally.term_counts += np.bincount(examples.terms[:, 3], minlength=len(tally.term_counts))
    if any(document.target is not None for document in batch.documents):
        examples = _with_pairs(job, batch, examples, tally)
    return examples


def _with_pairs(job: Job, batch: Batch, examples: Examples, tally: Tally) -> Examples:
    """`examples` and then the pairs of the batch, truncated to the maximum source and target."""
    data, tokenizer = job.config.data, job.tokenizer
    longest = (data.max_source_tokens - 1, data.max_target_tokens - 1)
    tokens, lengths, documents, sources = [examples.tokens], [], [], []
    for number, document in enumerate(batch.documents):
        if document.target is None:
            continue
        whole = [tokenizer.encode_marked(text) for text in (document.text, document.target)]
        if not all(map(len, whole)):
            tally.empty_pairs += 1
            continue
        kept = [ids[:limit] for ids, limit in zip(whole, longest, strict=True)]
        tokens += kept
        lengths.append(sum(map(len, kept)))
        documents.append(number)
        sources.append(len(kept[0]))
        tally.pairs += 1
        tally.truncated += sum(map(len, whole)) > lengths[-1]
        tally.characters += len(document.text) + len(document.target)
        tally.tokens += sum(map(len, whole))
        unknown = sum(int((ids == tokenizer.unk_id).sum()) for ids in whole)
        tally.unknown += unknown
        segments = [part for text in (document.text, document.target) for part in MARK.split(text)]
        encoded = tokenizer.encode_batch(segments) if unknown else None  # encode again, for the positions
        tally.count_characters(segments, encoded, tokenizer.unk_id)
    return Examples(
        np.concatenate(tokens),
        np.concatenate([examples.lengths, np.array(lengths, dtype=np.int32)]),
        np.concatenate([examples.documents, np.array(documents, dtype=np.int32)]),
        np.concatenate([examples.pairs, np.array(sources, dtype=np.int32)]),
        examples.terms,
    )


def bytes_to_read(identity: Fingerprint) -> int:
    """Unpacked bytes of the inputs; of packed files an estimate."""
    entries = [entry for entry in identity.inputs if entry["key"] in ("data.train", "data.validation")]
    return sum(entry["bytes"] * (USUAL_PACKING if entry["path"].endswith(PACKED_SUFFIXES) else 1) for entry in entries)


def finish_store(result: Pass, directory: Path, job: Job, tokenizer_seconds: float) -> None:
    """Write the files of the store into `directory` and remove the streams of the pass.

    Raises:
        DataError: too many unknown characters, a side of the split is empty, or no listed term occurs.
    """
    started = time.perf_counter()
    streams, tally, counts = result.streams, result.tally, result.streams.counts
    check_unknown(tally.unknown_figures(), job.config.tokenizer.max_unknown_share, "data.train")
    _check_content(counts, tally, job)
    size = job.tokenizer.size
    if job.config.tokenizer.train_vocab_size is not None:  # trained on this text, so every piece is in use
        active_to_full = np.arange(size, dtype=np.int32)
    else:
        active_to_full = choose_active(streams.frequencies, job.tokenizer, job.terms.terms)
    dtype = streams.write_splits(directory, active_to_full)
    np.savez(directory / VOCABULARY, active_to_full=active_to_full)
    (directory / TERMS).write_text("".join(f"{term}\n" for term in job.terms.terms), encoding="utf-8")
    job.tokenizer.save(directory / TOKENIZER)
    shutil.rmtree(streams.directory)
    report = build_report(
        tally,
        dataclasses.asdict(result.corpus),
        counts,
        job.terms,
        vocabulary=(len(active_to_full), size),
        examples_per_update=job.config.batch.examples_per_update,
        seconds=(result.seconds + time.perf_counter() - started, tokenizer_seconds),
    )
    _write_json(directory / REPORT, report)
    meta = {"format": FORMAT, "fingerprint": job.identity.fingerprint(), "identity": job.identity.values}
    tokenizer_files = [Path(entry["path"]).name for entry in job.identity.inputs if entry["key"] == "tokenizer"]
    meta |= {"inputs": job.identity.inputs, TOKENIZER_RECORD: tokenizer_files, "dtype": dtype.name}
    counted = {**counts, "train": {**counts["train"], "pairs": tally.pairs}}
    _write_json(directory / META, meta | {"counts": counted, "files": _hashed_files(directory)})


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
        active[tokenizer.encode_batch(list(terms)).tokens.ids] = True
    active = reachable_after_gaps(tokenizer, active)
    missing = -int(active.sum()) % ROUND_TO
    active[np.flatnonzero(~active)[:missing]] = True
    return np.flatnonzero(active).astype(np.int32)


def _hashed_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file below `directory`, by its path in it."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files}


def _check_content(counts: dict[str, dict[str, int]], tally: Tally, job: Job) -> None:
    data = job.config.data
    if not counts["validation"]["examples"] or not counts["train"]["examples"]:
        documents = counts["train"]["documents"] + counts["validation"]["documents"]
        side = "train on" if counts["validation"]["examples"] else "evaluate on"
        raise DataError(
            f"there is nothing to {side}: the corpus has {documents} document{'s' if documents != 1 else ''}",
            where="data.train",
            hint="Give more text, or data.validation, or let each line be a document (data.document line).",
        )
    if data.terms is not None and not tally.pairs and not counts["train"]["terms"] + counts["validation"]["terms"]:
        raise DataError(
            f"none of the {len(job.terms.terms)} terms occurs in the corpus",
            where=data.terms,
            hint="Check that terms and text are of one language and script, or leave data.terms out.",
        )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
