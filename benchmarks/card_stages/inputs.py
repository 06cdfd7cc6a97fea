"""Stores and model directories of `bin/benchmark card`, prepared once in its folder and used again.

Short texts: the examples of the corpus as they are, or of the built-in notes. Long texts: documents joined until each fills
the longest source. Models have random weights and the rows of mT5; ours trains those that the corpus uses.
"""

import dataclasses
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.card_stages.session import Session, Sizes
from benchmarks.peers.setup import Setup, make_model, make_store
from resilient_t5.config.sections import DataConfig, ModelConfig, TokenizerConfig
from resilient_t5.data.corpus.sample import clinical_terms, generate_notes
from resilient_t5.data.store.store import Store
from resilient_t5.model.load import shape_of
from resilient_t5.model.shapes import sizes_of_shape

BUILTIN = "builtin:clinical"
NOTES, QUICK_NOTES = 12_000, 300
NOTE_PIECES, QUICK_PIECES = 1200, 700
"""The built-in notes have too few words for a larger tokenizer."""
LONG_CHARACTERS = 4000
"""Characters of a joined document: several chunks of 512 tokens in any language."""
LONG_BYTES, QUICK_LONG_BYTES = 10_000_000, 100_000
"""About 50 updates of 64 examples."""
QUICK_LENGTHS = {"max_source_tokens": 128, "max_target_tokens": 64}
FEWER_ROWS = (100_000, 50_000)
FREE_SHARE = 0.05
MIB = 1 << 20


class NoSpace(RuntimeError):
    """The disk has no space for a model directory."""


@dataclass(frozen=True)
class Prepared:
    """A store, and the settings that it was prepared with."""

    data: DataConfig
    tokenizer: TokenizerConfig
    store: Path


def short_store(session: Session) -> Prepared:
    """The store of the texts as they are; prepared if it does not exist."""
    return _prepared(session, "short")


def long_store(session: Session) -> Prepared:
    """The store of the joined texts, with the tokenizer of the short ones."""
    short_store(session)
    return _prepared(session, "long")


def _prepared(session: Session, kind: str) -> Prepared:
    """Raises RuntimeError: preparation failed or took too long."""
    if kind not in session.inputs:
        session.say(f"preparing the {kind} texts in {session.folder}")
        corpus, terms = (None if path is None else str(path) for path in (session.corpus, session.terms))
        outcome = session.prepare(prepare_store, kind, str(session.folder), corpus, terms, session.sizes)
        if not outcome.done:
            raise RuntimeError(f"the {kind} texts could not be prepared: {outcome.reason}")
        session.inputs[kind], described = outcome.value
        session.result.setdefault("texts", {})[kind] = described
        session.save()
    found: Prepared = session.inputs[kind]
    return found


def prepare_store(
    kind: str, folder: str, corpus: str | None, terms: str | None, sizes: Sizes
) -> tuple[Prepared, dict[str, Any]]:
    """Prepare or open a store. Runs in a new process."""
    quick = sizes.name == "quick"
    lengths, notes = (QUICK_LENGTHS, QUICK_NOTES) if quick else ({}, NOTES)
    # A CPU and a GPU use the same stores, so that one machine can prepare for another.
    name = ("notes" if corpus is None else f"{Path(corpus).stem}-{Path(corpus).stat().st_size}") + "-quick" * quick
    stores = Path(folder) / "stores"
    pieces = sizes.pieces if corpus is not None else QUICK_PIECES if quick else NOTE_PIECES
    tokenizer = TokenizerConfig(train_vocab_size=pieces)
    if kind == "long":
        tokenizer = TokenizerConfig(name_or_path=str(stores / name / "tokenizer"))
        path = Path(folder) / "texts" / f"{name}.txt"
        terms_path = Path(folder) / "texts" / f"{name}.terms.txt"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, joined(_documents(corpus, notes), QUICK_LONG_BYTES if quick else LONG_BYTES))
            _write(terms_path, iter(clinical_terms()) if terms is None else iter(_lines(terms)))
        data = DataConfig(train=str(path), terms=str(terms_path), document="line", validation_share=0.01, **lengths)
        name = f"{name}-long"
    elif corpus is None:
        data = DataConfig(train=BUILTIN, sample_notes=notes, **lengths)
    else:
        data = DataConfig(train=corpus, terms=terms, document="line", validation_share=0.01, **lengths)
    store = make_store(data, tokenizer, ModelConfig(preset="mt5-small"), stores / name)
    described = {
        "text": "built-in notes" if corpus is None else Path(corpus).name,
        "examples": len(store.train),
        "rows_that_ours_trains": len(store.active_to_full),
    }
    return Prepared(data, tokenizer, store.directory), described


def _documents(corpus: str | None, notes: int) -> Iterator[str]:
    if corpus is not None:
        return iter(_lines(corpus))
    return (note.text.replace("\n", " ") for note in generate_notes(notes, 7))


def _lines(path: str) -> list[str]:
    """The lines of a text file that are not empty, as the store reads it."""
    for encoding in ("utf-8-sig", "gb18030"):
        try:
            return [line for line in Path(path).read_text(encoding=encoding).splitlines() if line.strip()]
        except UnicodeDecodeError:
            continue
    raise ValueError(f"{path} is neither UTF-8 nor GB18030")


def joined(documents: Iterator[str], most_bytes: int) -> Iterator[str]:
    """Join documents to texts of `LONG_CHARACTERS`, until they have `most_bytes` in UTF-8."""
    parts: list[str] = []
    length = written = 0
    for document in documents:
        parts.append(document)
        length += len(document)
        if length >= LONG_CHARACTERS:
            text = " ".join(parts)
            yield text
            written += len(text.encode())
            parts, length = [], 0
            if written >= most_bytes:
                return
    if parts and not written:
        yield " ".join(parts)


def _write(path: Path, lines: Iterator[str]) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
    temporary.replace(path)


def model_directory(session: Session, model: str) -> str:
    """The directory of `mt5-small` or `mt5-base` with all rows, or with fewer if the disk has no space for them.

    Raises:
        NoSpace: not even for the fewest rows.
        RuntimeError: it could not be written in the time left.
    """
    settings = session.sizes.models[model]
    models = session.folder / "models"
    models.mkdir(exist_ok=True)
    rows = _rows_that_fit(session, settings, model)
    directory = models / _name(session, model, rows)
    if not directory.is_dir():
        session.say(f"writing {model} with {rows:,} rows to {directory} ({_bytes_of(settings, rows) / MIB:.0f} MiB)")
        outcome = session.prepare(write_model, str(short_store(session).store), settings, rows, str(directory))
        if not outcome.done:
            raise RuntimeError(f"{model} could not be written: {outcome.reason}")
    session.result.setdefault("models", {})[model] = {"rows": rows}
    return str(directory)


def _name(session: Session, model: str, rows: int) -> str:
    return f"{'tiny' if session.sizes.name == 'quick' else model}-{rows}"


def _rows_that_fit(session: Session, settings: ModelConfig, model: str) -> int:
    """The rows of the model on disk, or as many as fit."""
    wanted = session.sizes.rows
    if (session.folder / "models" / _name(session, model, wanted)).is_dir():
        return wanted
    free = shutil.disk_usage(session.folder).free * (1 - FREE_SHARE)
    for rows in (wanted, *(fewer for fewer in FEWER_ROWS if fewer < wanted)):
        if _bytes_of(settings, rows) <= free:
            if rows < wanted:
                needed = _bytes_of(settings, wanted) / MIB
                session.say(
                    f"{model} with {wanted:,} rows needs {needed:.0f} MiB in {session.folder}, but {free / MIB:.0f} MiB are "
                    f"free: measured with {rows:,} rows instead, which favours the Trainer. --out DIR takes another disk"
                )
            return rows
    needed = _bytes_of(settings, FEWER_ROWS[-1]) / MIB
    raise NoSpace(
        f"{model} needs at least {needed:.0f} MiB in {session.folder}, {free / MIB:.0f} MiB are free. Set --out to another disk"
    )


def _bytes_of(settings: ModelConfig, rows: int) -> float:
    return 4.0 * sizes_of_shape(shape_of(settings), rows).parameters


def write_model(store: str, settings: ModelConfig, rows: int, directory: str) -> None:
    """Write a model directory completely or not at all. Runs in a new process."""
    temporary = Path(f"{directory}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        make_model(Store.open(Path(store)), settings, rows, temporary)
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def setup_of(session: Session, model: str, scratch: Path, *, long: bool = False) -> Setup:
    """The setup of both sides for a model and a kind of text."""
    texts = long_store(session) if long else short_store(session)
    sizes = session.sizes
    setup = Setup(
        store=str(texts.store),
        model=model_directory(session, model),
        scratch=str(scratch),
        data=texts.data,
        device=session.device,
        memory_gib=None,
        updates=sizes.updates,
        script_updates=1,
        warm_updates=sizes.warm_updates,
        time_s=sizes.time_s,
    )
    if long:
        return dataclasses.replace(setup, examples_per_update=sizes.long_examples, micro_examples=sizes.long_examples)
    return setup
