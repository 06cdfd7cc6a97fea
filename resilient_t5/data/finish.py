"""From parts to a store: active vocabulary, the splits' files, terms, tokenizer, report, and `meta.json` last."""

import json
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from resilient_t5.data.identity import TOKENIZER_RECORD, Identity, differences
from resilient_t5.data.one_pass import Job
from resilient_t5.data.parts import PART, Part, choose_active, hashed_files, join_parts
from resilient_t5.data.report import build_report
from resilient_t5.data.store import FORMAT, META, REPORT, TERMS, TOKENIZER, VOCABULARY
from resilient_t5.data.unknown import check_unknown, unknown_figures
from resilient_t5.errors import DataError

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
    """Write the store's files into `directory` and remove the parts that lie in it.

    Raises:
        DataError: too many unknown characters, a side of the split is empty, or no listed term occurs.
    """
    started = time.perf_counter()
    totals = _totals(parts)
    check_unknown(totals["unknown_figures"], job.config.tokenizer.max_unknown_share, "data.train")
    frequencies = np.sum([part.frequencies() for part in parts], axis=0)
    size = job.tokenizer.size
    if job.config.tokenizer.train_vocab_size is not None:  # trained on this text: every piece is of use
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
    """Note in a part what it is a part of, and lay the tokenizer beside it."""
    job.tokenizer.save(part.directory / TOKENIZER)
    described = {"identity": job.identity.values, "shard": shard, "shards": shards, **part.extra, "counts": part.counts}
    _write(part.directory / PART, {**described, "tokenizer": job.tokenizer.fingerprint()})


def open_shard(directory: Path, identity: Identity, shard: int, shards: int) -> Part:
    """The part of one shard.

    Raises:
        DataError: it is missing, or a part of something else.
    """
    if not (directory / PART).is_file():
        here = directory.exists() and any(directory.iterdir())
        what = "this directory holds something that is no part" if here else f"the part of shard {shard}/{shards} is missing"
        raise DataError(what, where=str(directory), mend=f"Prepare it with --shard {shard}/{shards}.")
    part = Part.open(directory)
    changes = differences(part.extra["identity"], identity.values)
    if changes or (part.extra["shard"], part.extra["shards"]) != (shard, shards):
        reason = "; ".join(changes) or "another shard"
        raise DataError(
            f"this part was prepared from something else; what differs: {reason}",
            where=str(directory),
            mend="Remove it and prepare it again.",
        )
    return part


def _totals(parts: Sequence[Part]) -> dict[str, Any]:
    """Sums over the parts; what reading counted is the same in each, since each read the whole corpus."""
    if len({part.extra.get("tokenizer") for part in parts}) > 1:
        raise DataError("the parts were made with different tokenizers", mend="Prepare the shards again, with one version.")
    totals: dict[str, Any] = {key: sum(part.extra[key] for part in parts) for key in SUMS}
    totals["term_counts"] = np.sum([part.extra["term_counts"] for part in parts], axis=0)
    totals["corpus"] = parts[0].extra["corpus"]
    totals["unknown_figures"] = _unknown_figures(parts)
    return totals


def _unknown_figures(parts: Sequence[Part]) -> dict[str, Any]:
    """The unknown characters of all parts; empty when an older version, which did not count them, made one of the parts."""
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
            f"nothing is left to {side}: the corpus has {documents} document{'s' if documents != 1 else ''}",
            where="data.train",
            mend="Give more text, or data.validation, or let each line be a document (data.document line).",
        )
    if data.terms is not None and not totals["pairs"] and not counts["train"]["terms"] + counts["validation"]["terms"]:
        raise DataError(
            f"none of the {len(job.terms.terms)} terms occurs in the corpus",
            where=data.terms,
            mend="Check that terms and text are of one language and script, or leave data.terms out.",
        )


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
