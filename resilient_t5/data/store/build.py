"""The single pass over a corpus (read, encode ahead in a thread, find terms, cut, write a part), and from parts to a store.

The backend encodes without holding the GIL, so a second core encodes while this thread reads, searches and writes. Memory is a
few batches of `BATCH_CHARACTERS`, whatever the size of the corpus. `finish_store` writes the active vocabulary, the files of
the splits, terms, tokenizer, report, and finally `meta.json`.
"""

import dataclasses
import json
import shutil
import time
from collections import Counter, deque
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
from resilient_t5.data.examples import Examples, cut_examples, find_terms
from resilient_t5.data.store.corpus_report import (
    build_report,
    check_unknown,
    segments_between_marks,
    unknown_characters,
    unknown_figures,
    visible_characters,
)
from resilient_t5.data.store.fingerprint import BUILTIN, Fingerprint, differences, is_builtin
from resilient_t5.data.store.shards import PART, Part, PartWriter, choose_active, hashed_files, join_parts
from resilient_t5.data.store.store import FORMAT, META, REPORT, TERMS, TOKENIZER, TOKENIZER_RECORD, VOCABULARY
from resilient_t5.data.terms import TermList, TermMatcher
from resilient_t5.data.tokenizer.tokenizer import EncodedBatch, TextTokenizer
from resilient_t5.errors import DataError

# Fits into the CPU cache, and makes the cost per call negligible.
BATCH_CHARACTERS = 60_000
BATCHES_AHEAD = 3
PACKED_SUFFIXES = (".gz", ".xz")
GAP_RESERVE_SHARE = 16  # 32 of 512 tokens: one for each of 27 gaps, and a few more
USUAL_PACKING = 4  # how much larger packed text becomes; for the progress figure only

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
    """Documents to encode together, whether each belongs to validation, and the digests of their content."""

    documents: list[Document] = field(default_factory=list)
    validation: list[bool] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)

    def texts(self) -> list[str]:
        """The texts; empty for pairs, which are encoded separately."""
        return [document.text if document.target is None else "" for document in self.documents]


@dataclass
class Tally:
    """Counters of a pass, in addition to those of the writer."""

    term_counts: np.ndarray
    characters: int = 0
    tokens: int = 0
    unknown: int = 0
    pairs: int = 0
    empty_pairs: int = 0
    truncated: int = 0
    chunked: int = 0
    widened: int = 0
    cut_terms: int = 0
    visible: int = 0
    """Characters that are not white space."""
    unknown_characters: dict[str, int] = field(default_factory=dict)
    """Characters without a piece, with how often each occurs."""

    def count_characters(self, texts: Sequence[str], encoded: EncodedBatch | None, unk_id: int) -> None:
        """Count visible and unknown characters of `texts`; `encoded` is None when no character is unknown."""
        self.visible += visible_characters(texts)
        found = {} if encoded is None else unknown_characters(texts, encoded, unk_id)
        for character, count in found.items():
            self.unknown_characters[character] = self.unknown_characters.get(character, 0) + count


def documents_of(config: Config, counts: CorpusCounts) -> Iterator[tuple[Document, bool]]:
    """Every document and whether it belongs to validation; no document is in both splits."""
    data = config.data
    share = data.validation_share
    if data.validation_inputs():
        seen = SeenParagraphs()
        for document in read_documents(data.validation_inputs(), data, counts, seen=seen):
            yield document, True
        share = 0.0
        documents = _train_documents(config, counts, seen)
    else:
        documents = _train_documents(config, counts, None)
    for document in documents:
        yield document, share > 0 and held_out(document, share)


def _train_documents(config: Config, counts: CorpusCounts, seen: SeenParagraphs | None) -> Iterator[Document]:
    if not is_builtin(config):
        yield from read_documents(config.data.train_inputs(), config.data, counts, seen=seen)
        return
    for number, note in enumerate(generate_notes(config.data.sample_notes, config.run.seed), start=1):
        counts.documents += 1
        counts.characters += len(note.text)
        counts.bytes += len(note.text.encode())
        yield Document(note.text, f"{BUILTIN}:{number}", None, text_digest(note.text))


def _batches(config: Config, counts: CorpusCounts, shard: tuple[int, int] | None, forced: int | None) -> Iterator[Batch]:
    batch, characters, number = Batch(), 0, 0
    for document, validation in documents_of(config, counts):
        key = text_digest(document.text) if document.key is None else document.key
        batch.documents.append(document)
        batch.validation.append(validation or key == forced)
        batch.keys.append(key)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            if shard is None or number % shard[1] == shard[0] - 1:
                yield batch
            batch, characters, number = Batch(), 0, number + 1
    if batch.documents and (shard is None or number % shard[1] == shard[0] - 1):
        yield batch


def _encoded_ahead(batches: Iterator[Batch], tokenizer: TextTokenizer) -> Iterator[tuple[Batch, EncodedBatch]]:
    waiting: deque[tuple[Batch, Future[EncodedBatch]]] = deque()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode") as pool:
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(tokenizer.encode_together, batch.texts())))
                if len(waiting) > BATCHES_AHEAD:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def write_part(job: Job, directory: Path, *, shard: tuple[int, int] | None = None, forced: int | None = None) -> Part:
    """Read the whole corpus and write a part of it.

    Args:
        job: what to do.
        directory: where the part is written.
        shard: (i, n) takes only every n-th batch of documents, from the i-th on.
        forced: key of a document that is assigned to validation in any case.
    """
    started = time.perf_counter()
    counts, tally = CorpusCounts(), Tally(np.zeros(len(job.terms.terms), dtype=np.int64))
    total = bytes_to_read(job.identity)
    matcher = TermMatcher(job.terms.terms) if job.terms.terms else None
    smallest_key = 2**64
    with closing(PartWriter(directory, job.tokenizer.size)) as writer:
        for batch, encoded in _encoded_ahead(_batches(job.config, counts, shard, forced), job.tokenizer):
            examples = _examples_of(job, matcher, batch, encoded, tally)
            validation = np.array(batch.validation)
            for split, chosen in (("train", ~validation), ("validation", validation)):
                if chosen.any():
                    writer.add(split, examples.chosen(chosen), int(chosen.sum()))
            writer.end_batch()
            smallest_key = min(smallest_key, *batch.keys)
            job.on_progress(min(counts.bytes, total or counts.bytes), total)
        extra = {key: value for key, value in dataclasses.asdict(tally).items() if key != "term_counts"}
        extra |= {"term_counts": tally.term_counts.tolist(), "corpus": dataclasses.asdict(counts)}
        return writer.finish({**extra, "smallest_key": smallest_key, "seconds": time.perf_counter() - started})


def _examples_of(job: Job, matcher: TermMatcher | None, batch: Batch, encoded: EncodedBatch, tally: Tally) -> Examples:
    """The examples of a batch; counted in `tally`."""
    data, texts = job.config.data, batch.texts()
    found = find_terms(matcher, texts, encoded)
    examples, lost = cut_examples(
        texts,
        encoded,
        found.spans,
        tokenizer=job.tokenizer,
        max_tokens=(longest := longest_example(job.tokenizer, data.max_source_tokens)),
        overlap_tokens=data.overlap_tokens,
    )
    tally.widened += found.widened
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


def longest_example(tokenizer: TextTokenizer, max_source_tokens: int) -> int:
    """Maximum tokens of an example without end mark, less a reserve for tokenizers whose gaps add tokens."""
    return max_source_tokens - 1 - (max_source_tokens // GAP_RESERVE_SHARE if tokenizer.gap_starts_word else 0)


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
        segments = [part for text in (document.text, document.target) for part in segments_between_marks(text)]
        encoded = tokenizer.encode_together(segments) if unknown else None  # encode again, for the positions
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


SUMS = (
    "characters",
    "tokens",
    "unknown",
    "pairs",
    "empty_pairs",
    "truncated",
    "chunked",
    "widened",
    "cut_terms",
    "seconds",
    "tokenizer_seconds",
)


def finish_store(parts: Sequence[Part], directory: Path, job: Job) -> None:
    """Write the files of the store into `directory` and remove the parts in it.

    Raises:
        DataError: too many unknown characters, a side of the split is empty, or no listed term occurs.
    """
    started = time.perf_counter()
    totals = _totals(parts)
    check_unknown(totals["unknown_figures"], job.config.tokenizer.max_unknown_share, "data.train")
    frequencies = np.sum([part.frequencies() for part in parts], axis=0)
    size = job.tokenizer.size
    if job.config.tokenizer.train_vocab_size is not None:  # trained on this text, so every piece is in use
        active_to_full = np.arange(size, dtype=np.int32)
    else:
        active_to_full = choose_active(frequencies, job.tokenizer, job.terms.terms)
    written = join_parts(parts, directory, active_to_full, size)
    _check_content(written["counts"], totals, job)
    np.savez(directory / VOCABULARY, active_to_full=active_to_full)
    (directory / TERMS).write_text("".join(f"{term}\n" for term in job.terms.terms), encoding="utf-8")
    job.tokenizer.save(directory / TOKENIZER)
    for part in parts:
        if part.directory.parent == directory:
            shutil.rmtree(part.directory)
    totals["seconds"] += time.perf_counter() - started
    vocabulary = (len(active_to_full), size)
    report = build_report(totals, written["counts"], job.terms, vocabulary, job.config.batch.examples_per_update)
    _write(directory / REPORT, report)
    written["counts"]["train"]["pairs"] = totals["pairs"]
    meta = {"format": FORMAT, "fingerprint": job.identity.fingerprint(), "identity": job.identity.values}
    tokenizer_files = [Path(entry["path"]).name for entry in job.identity.inputs if entry["key"] == "tokenizer"]
    meta |= {"inputs": job.identity.inputs, TOKENIZER_RECORD: tokenizer_files, **written, "files": hashed_files(directory)}
    _write(directory / META, meta)


def write_shard_identity(part: Part, job: Job, shard: int, shards: int) -> None:
    """Record in a part which corpus and shard it belongs to, and add the tokenizer."""
    job.tokenizer.save(part.directory / TOKENIZER)
    described = {"identity": job.identity.values, "shard": shard, "shards": shards, **part.extra, "counts": part.counts}
    _write(part.directory / PART, {**described, "tokenizer": job.tokenizer.fingerprint()})


def open_shard(directory: Path, identity: Fingerprint, shard: int, shards: int) -> Part:
    """The part of one shard.

    Raises:
        DataError: it is missing, or a part of something else.
    """
    if not (directory / PART).is_file():
        here = directory.exists() and any(directory.iterdir())
        what = (
            "this directory contains something else than a part" if here else f"the part of shard {shard}/{shards} is missing"
        )
        raise DataError(what, where=str(directory), hint=f"Prepare it with --shard {shard}/{shards}.")
    part = Part.open(directory)
    changes = differences(part.extra["identity"], identity.values)
    if changes or (part.extra["shard"], part.extra["shards"]) != (shard, shards):
        reason = "; ".join(changes) or "another shard"
        raise DataError(
            f"this part was prepared from something else; differences: {reason}",
            where=str(directory),
            hint="Remove it and prepare it again.",
        )
    return part


def _totals(parts: Sequence[Part]) -> dict[str, Any]:
    """Sums over the parts. Counts of reading are equal in all parts, since each read the whole corpus."""
    if len({part.extra.get("tokenizer") for part in parts}) > 1:
        raise DataError("the parts were made with different tokenizers", hint="Prepare the shards again with one version.")
    totals: dict[str, Any] = {key: sum(part.extra[key] for part in parts) for key in SUMS}
    totals["term_counts"] = np.sum([part.extra["term_counts"] for part in parts], axis=0)
    totals["corpus"] = parts[0].extra["corpus"]
    totals["unknown_figures"] = _unknown_figures(parts)
    return totals


def _unknown_figures(parts: Sequence[Part]) -> dict[str, Any]:
    """Unknown characters of all parts; empty when an older version, which did not count them, wrote a part."""
    if any("unknown_characters" not in part.extra for part in parts):
        return {}
    unknown: Counter[str] = Counter()
    for part in parts:
        unknown.update(part.extra["unknown_characters"])
    return unknown_figures(unknown, sum(part.extra["visible"] for part in parts))


def _check_content(counts: dict[str, dict[str, int]], totals: dict[str, Any], job: Job) -> None:
    data = job.config.data
    if not counts["validation"]["examples"] or not counts["train"]["examples"]:
        documents = counts["train"]["documents"] + counts["validation"]["documents"]
        side = "train on" if counts["validation"]["examples"] else "evaluate on"
        raise DataError(
            f"there is nothing to {side}: the corpus has {documents} document{'s' if documents != 1 else ''}",
            where="data.train",
            hint="Give more text, or data.validation, or let each line be a document (data.document line).",
        )
    if data.terms is not None and not totals["pairs"] and not counts["train"]["terms"] + counts["validation"]["terms"]:
        raise DataError(
            f"none of the {len(job.terms.terms)} terms occurs in the corpus",
            where=data.terms,
            hint="Check that terms and text are of one language and script, or leave data.terms out.",
        )


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
