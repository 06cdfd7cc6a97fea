"""Prepare a store and its report from corpus, tokenizer and terms; reuse it while nothing changed, else refuse it by key."""

import time
from collections.abc import Callable
from pathlib import Path

from resilient_t5.config.schema import Config
from resilient_t5.data.corpus.formats import CorpusCounts
from resilient_t5.data.corpus.sample import clinical_terms
from resilient_t5.data.corruption.token_table import check_sentinels
from resilient_t5.data.store.build import Job, Progress, bytes_to_read, documents_of, finish_store, read_corpus
from resilient_t5.data.store.corpus_report import check_unknown
from resilient_t5.data.store.fingerprint import differences, identify, is_builtin, terms_path
from resilient_t5.data.store.store import Store, not_a_store, read_meta, store_state
from resilient_t5.data.terms import TermList, clean_terms, read_terms
from resilient_t5.data.tokenizer.tokenizer import TextTokenizer, train_tokenizer
from resilient_t5.errors import DataError
from resilient_t5.files import making, only_maker, storage_errors


def prepare(config: Config, directory: Path, on_progress: Progress | None = None) -> Store:
    """Create the store that `config` describes, or open it when it exists.

    Args:
        config: sections data, tokenizer, model (tokenizer, active vocabulary), batch and run.seed are read.
        directory: the store; absent or empty, or a store of the same text, tokenizer, terms and settings.
        on_progress: called with (bytes read, bytes to read) periodically: 0 read during tokenizer training, 0 to read for the
            built-in corpus, and (0, 0) while another process prepares the same store. An exception that it raises stops the
            work, and nothing is left on disk.

    Raises:
        DataError: unusable inputs, or too many characters that the tokenizer lacks; or a directory with another store (names
            the differences) or anything else in it.
        DiskFull, StorageError: the file system.
    """
    directory = Path(directory)
    report_progress = on_progress or (lambda done, total: None)
    if (store := existing_store(config, directory)) is not None:
        return store
    with storage_errors(directory), only_maker(directory, lambda: report_progress(0, 0)):
        if (store := existing_store(config, directory)) is not None:  # created by another process in the meantime
            return store
        with making(directory) as temporary:
            job, tokenizer_seconds = _job(config, report_progress)
            result = read_corpus(job, temporary / "streams")
            if not result.streams.counts["validation"]["examples"] and not config.data.validation_inputs():
                # Chance held out no document of a small corpus: a second pass holds out one.
                result = read_corpus(job, temporary / "streams", forced=result.smallest_key)
            finish_store(result, temporary, job, tokenizer_seconds)
    return Store.open(directory)


def store_directory(config: Config) -> Path:
    """Directory of the prepared corpus of a run: `data.store`, or `store` in the run directory."""
    return Path(config.data.store) if config.data.store is not None else Path(config.run.dir) / "store"


def existing_store(config: Config, directory: Path) -> Store | None:
    """Open the store at `directory`, if any; None when there is none. Writes nothing.

    Raises:
        DataError: it has other inputs or settings, too many unknown characters, or is not a store.
    """
    state = store_state(directory)
    if state == "absent":
        return None
    if state == "other":
        raise not_a_store(directory)
    meta = read_meta(directory)
    identity = identify(config, meta)
    old, new = meta["identity"], identity.values
    if not meta["counts"]["train"]["pairs"]:  # only pairs depend on data.max_target_tokens
        old, new = {**old, "data.max_target_tokens": 0}, {**new, "data.max_target_tokens": 0}
    if changes := differences(old, new):
        raise DataError(
            f"this store was prepared from something else; differences: {'; '.join(changes)}",
            where=str(directory),
            hint="Name another directory with data.store, or remove this one.",
        )
    store = Store.open(directory)
    check_unknown(store.report, config.tokenizer.max_unknown_share, str(directory))
    return store


def listed_terms(config: Config) -> TermList:
    """Terms by id: those of `data.terms`, else of the built-in corpus, else none."""
    if config.data.terms is not None:
        return read_terms(terms_path(config.data.terms))
    return clean_terms(clinical_terms()) if is_builtin(config) else TermList()


def _job(config: Config, on_progress: Progress) -> tuple[Job, float]:
    """Job of a pass, and the duration of tokenizer training in seconds."""
    identity = identify(config, None)
    if identity.tokenizer is not None:
        check_sentinels(identity.tokenizer, config.corruption)
    terms = listed_terms(config)
    started = time.perf_counter()
    total = max(1, bytes_to_read(identity))
    tokenizer = identity.tokenizer or _train(config, lambda: on_progress(0, total))
    return Job(config, identity, tokenizer, terms, on_progress), time.perf_counter() - started


def _train(config: Config, poll: Callable[[], None]) -> TextTokenizer:
    settings = config.tokenizer
    assert settings.train_vocab_size is not None, "identify loads a tokenizer unless one is to be trained"
    texts = (document.text for document, validation in documents_of(config, CorpusCounts()) if not validation)
    return train_tokenizer(texts, settings.train_vocab_size, settings.character_coverage, poll)
