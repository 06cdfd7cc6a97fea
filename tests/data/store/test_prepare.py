"""Preparing a corpus, end to end, on small real files. Run: python -m pytest tests/data/store/test_prepare.py"""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient_t5.config.schema import BatchConfig, Config, DataConfig, RunConfig, TokenizerConfig
from resilient_t5.data.corpus.sample import clinical_terms, generate_notes
from resilient_t5.data.dataset import Dataset
from resilient_t5.data.examples import cut_examples, find_terms
from resilient_t5.data.store.corpus_report import scale_reading
from resilient_t5.data.store.prepare import prepare
from resilient_t5.data.store.store import Store
from resilient_t5.data.terms import TermMatcher
from resilient_t5.data.tokenizer.tokenizer import load_tokenizer, train_tokenizer
from resilient_t5.errors import DataError
from resilient_t5.files import only_maker

NOTES = [note.text for note in generate_notes(240, 5)]
ROOT = Path(__file__).parents[3]


class InterruptedByTest(Exception):
    """Raised by a progress callback to end the work."""


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory):
    """A saved tokenizer of 1,000 pieces."""
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(NOTES, 1000, 0.9999).save(path)
    return path


@pytest.fixture
def corpus(tmp_path):
    """A file of notes, a line each, and a file of terms with a blank and a duplicate."""
    (tmp_path / "text.txt").write_text("\n".join(NOTES), encoding="utf-8")
    terms = clinical_terms()
    (tmp_path / "terms.txt").write_text("\n".join(["", *terms, terms[0]]), encoding="utf-8")
    return tmp_path


@pytest.fixture
def config(corpus, tokenizer_directory):
    """Settings over that corpus."""
    data = DataConfig(
        train=str(corpus / "text.txt"),
        terms=str(corpus / "terms.txt"),
        document="line",
        max_source_tokens=40,
        max_target_tokens=60,
        validation_share=0.1,
    )
    return Config(data=data, tokenizer=TokenizerConfig(str(tokenizer_directory)), batch=BatchConfig(examples_per_update=8))


def changed(config, section, **values):
    """`config` with other values in one section."""
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def ids_of(store, split):
    """Full ids of each example."""
    bounds = itertools.pairwise(split.offsets.tolist())
    return [store.active_to_full[np.asarray(split.tokens[first:last])].tolist() for first, last in bounds]


def squeezed(texts):
    """Texts without spaces."""
    return {text.replace(" ", "") for text in texts}


def spelled(store, split):
    """Text of each document without spaces, from the tokens of its examples; each example is a text of its own."""
    documents = {}
    for example, ids in enumerate(ids_of(store, split)):
        documents.setdefault(int(split.documents[example]), []).append(store.tokenizer.decode(ids).replace(" ", ""))
    return ["".join(parts) for _, parts in sorted(documents.items())]


def files_of(directory):
    """Content of every file of a store but the time-stamped ones."""
    names = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name not in ("report.json", "meta.json")]
    return {str(path.relative_to(directory)): path.read_bytes() for path in names}


def test_the_examples_of_a_document_spell_it(config, corpus):
    """No character is lost or doubled, no chunk is too long, and every document is on exactly one side."""
    store = prepare(config, corpus / "store")
    train, validation = spelled(store, store.train), spelled(store, store.validation)
    assert sorted(train + validation) == sorted(squeezed(NOTES))
    assert not set(train) & set(validation) and validation
    for split in (store.train, store.validation):
        lengths = np.diff(split.offsets)
        assert lengths.min() >= 1 and lengths.max() <= config.data.max_source_tokens - 1
        assert (np.diff(split.documents) >= 0).all() and (split.pairs == -1).all()
    assert store.report["chunked_documents_share"] > 0
    arrays = {"tokens.bin", "offsets.npy", "terms.npy", "documents.npy", "pairs.npy"}
    others = {"vocabulary.npz", "terms.txt", "tokenizer", "report.json", "meta.json", "validation"}
    assert {path.name for path in store.directory.iterdir()} == arrays | others
    assert {path.name for path in (store.directory / "validation").iterdir()} == arrays


def test_an_example_has_the_ids_of_its_own_text(config, corpus):
    """Also one that continues a document: it is encoded as a text that begins there, as any reader of it would."""
    store = prepare(config, corpus / "store")
    examples = [ids for split in (store.train, store.validation) for ids in ids_of(store, split)]
    assert len(examples) > len(set(NOTES)) + 100
    assert [store.tokenizer.encode_marked(store.tokenizer.decode(ids)).tolist() for ids in examples] == examples


def test_a_store_of_an_earlier_version_is_trained_as_it_was_made(config, corpus):
    """Its sources are read token by token: a run over it goes on with the same examples, and no id outside its vocabulary."""
    store = prepare(config, corpus / "store")
    assert Dataset.over(store, config).table.gap_encoding is not None
    meta = json.loads((corpus / "store" / "meta.json").read_text(encoding="utf-8"))
    del meta["tokenizer_files"]
    (corpus / "store" / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    old = prepare(config, corpus / "store")
    assert not old.encodes_gaps and Dataset.over(old, config).table.gap_encoding is None


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused_before_the_text_is_read(config, corpus, monkeypatch):
    """The config.json of the model has the number of rows."""
    (corpus / "model").mkdir()
    (corpus / "model" / "config.json").write_text(json.dumps({"model_type": "t5", "vocab_size": 100}), encoding="utf-8")
    monkeypatch.setattr("resilient_t5.data.store.prepare.read_corpus", None)
    with pytest.raises(DataError, match="ids, and the model has 100 rows"):
        prepare(changed(config, "model", name_or_path=str(corpus / "model")), corpus / "store")


def test_every_recorded_occurrence_is_the_term(config, corpus):
    """The tokens of an occurrence hold the term's text; occurrences are sorted and lie inside their example."""
    store = prepare(config, corpus / "store")
    assert store.terms == TermMatcher(clinical_terms()).terms
    found = 0
    for split in (store.train, store.validation):
        order = np.lexsort((split.terms[:, 1], split.terms[:, 0]))
        assert (order == np.arange(len(order))).all()
        for example, start, end, term in split.terms.tolist():
            first = int(split.offsets[example])
            assert 0 <= start < end <= split.offsets[example + 1] - first
            text = store.tokenizer.decode(store.active_to_full[split.tokens[first + start : first + end]])
            assert store.terms[term].casefold() in text.casefold()
            found += 1
    assert found == store.report["terms"]["occurrences"] > 1000
    lost = store.report["terms"]["cut_by_chunks"]
    matcher = TermMatcher(store.terms)
    assert found + lost == sum(len(matcher.find(note)) for note in set(NOTES))
    assert store.report["terms"]["duplicates_dropped"] == 1 and store.report["terms"]["blanks_dropped"] == 1


@given(
    st.lists(st.lists(st.sampled_from(NOTES[:6]), min_size=0, max_size=4).map(" ".join), min_size=1, max_size=5),
    st.integers(8, 40),
    st.integers(0, 4),
)
@settings(max_examples=40, deadline=None)
def test_examples_of_a_batch_are_those_of_its_texts_alone(tokenizer_directory, texts, max_tokens, overlap_tokens):
    """Texts laid end to end give what each text alone gives, terms included, with and without overlap."""
    tokenizer = load_tokenizer(str(tokenizer_directory))
    matcher = TermMatcher(clinical_terms())

    def cut(some):
        batch = tokenizer.encode_batch(some)
        spans, _ = find_terms(matcher, some, batch)
        limits = {"max_tokens": max_tokens, "overlap_tokens": overlap_tokens}
        return cut_examples(some, batch, spans, tokenizer=tokenizer, **limits)

    together, lost = cut(texts)
    alone = [cut([text]) for text in texts]
    assert together.tokens.tolist() == [i for examples, _ in alone for i in examples.tokens.tolist()]
    assert together.lengths.tolist() == [i for examples, _ in alone for i in examples.lengths.tolist()]
    rows, first = [], 0
    for examples, _ in alone:
        rows += [[row[0] + first, *row[1:]] for row in examples.terms.tolist()]
        first += len(examples.lengths)
    assert together.terms.tolist() == rows
    assert all(0 <= start < end <= together.lengths[example] for example, start, end, _ in rows)
    assert lost == sum(count for _, count in alone)


def test_a_store_is_reused_while_nothing_changed(config, corpus, monkeypatch):
    """The second call opens the existing store and reads no text, also after the file was copied."""
    first = prepare(config, corpus / "store")
    before = (corpus / "store" / "meta.json").stat().st_mtime_ns
    monkeypatch.setattr("resilient_t5.data.store.prepare.read_corpus", None)
    text = (corpus / "text.txt").read_bytes()
    (corpus / "text.txt").unlink()
    (corpus / "text.txt").write_bytes(text)
    again = prepare(config, corpus / "store")
    assert again.fingerprint == first.fingerprint
    assert (corpus / "store" / "meta.json").stat().st_mtime_ns == before
    # The longest target cuts pairs only, and there are none.
    prepare(changed(config, "data", max_target_tokens=61), corpus / "store")
    prepare(changed(config, "run", seed=43), corpus / "store")


def test_a_store_of_something_else_is_refused_by_name(config, corpus):
    """Each change of settings, text, terms or tokenizer is named, and nothing is written."""
    prepare(config, corpus / "store")
    before = files_of(corpus / "store")
    with pytest.raises(DataError, match=r"data\.max_source_tokens 40 -> 48; data\.overlap_tokens 0 -> 3") as error:
        prepare(changed(config, "data", max_source_tokens=48, overlap_tokens=3), corpus / "store")
    assert "data.store" in error.value.hint
    with pytest.raises(DataError, match=r"data\.terms \(not given now\)"):
        prepare(changed(config, "data", terms=None), corpus / "store")
    with pytest.raises(DataError, match=r"tokenizer.train_vocab_size None -> 900"):
        prepare(dataclasses.replace(config, tokenizer=TokenizerConfig(None, 900)), corpus / "store")
    with (corpus / "text.txt").open("a", encoding="utf-8") as file:
        file.write("\none more line")
    with pytest.raises(DataError, match=r"the content of data\.train"):
        prepare(config, corpus / "store")
    assert files_of(corpus / "store") == before


def test_a_foreign_directory_is_refused_and_left_alone(config, corpus):
    """Nothing is written into a directory that holds something else."""
    (corpus / "store").mkdir()
    (corpus / "store" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"thesis\.txt"):
        prepare(config, corpus / "store")
    assert [path.name for path in (corpus / "store").iterdir()] == ["thesis.txt"]


def test_one_document_is_held_out_where_chance_holds_out_none(config, corpus):
    """A corpus of few documents still has one to evaluate on, always the same."""
    few = changed(config, "data", validation_share=1e-9)
    first, second = prepare(few, corpus / "a"), prepare(few, corpus / "b")
    assert spelled(first, first.validation) == spelled(second, second.validation)
    assert len(spelled(first, first.validation)) == 1
    assert sorted(spelled(first, first.train) + spelled(first, first.validation)) == sorted(squeezed(NOTES))


def test_a_single_document_cannot_be_split(config, corpus):
    """One document leaves nothing to train on: an error, and no store."""
    (corpus / "text.txt").write_text(NOTES[0], encoding="utf-8")
    with pytest.raises(DataError, match="has 1 document"):
        prepare(config, corpus / "store")
    assert not (corpus / "store").exists()


def test_training_text_that_is_also_validation_text_is_dropped(config, corpus):
    """With separate validation files, no document is in both splits."""
    (corpus / "validation.txt").write_text("\n".join(NOTES[:20]), encoding="utf-8")
    store = prepare(changed(config, "data", validation=str(corpus / "validation.txt")), corpus / "store")
    assert sorted(spelled(store, store.validation)) == sorted(squeezed(NOTES[:20]))
    assert sorted(spelled(store, store.train)) == sorted(squeezed(NOTES) - squeezed(NOTES[:20]))


def test_validation_text_of_another_corpus_keeps_every_token(config, corpus):
    """What only the validation text holds is active too: no id is replaced, so each text reads as it would alone."""
    other = ["Rumpelstilzchen 1847: quite another language, \u00fcber alles gesagt.", "Zwei wackere M\u00f6nche jagen Pyxie."]
    (corpus / "other.txt").write_text("\n".join(other), encoding="utf-8")
    alone = prepare(config, corpus / "alone")
    store = prepare(changed(config, "data", validation=str(corpus / "other.txt")), corpus / "store")
    expected_texts = [store.tokenizer.decode(store.tokenizer.encode_batch([text])[0].ids.tolist()) for text in other]
    assert sorted(spelled(store, store.validation)) == sorted(squeezed(expected_texts))
    added = np.setdiff1d(store.active_to_full, alone.active_to_full)
    assert len(added) > 0
    seen = store.active_to_full[np.asarray(store.validation.tokens)]
    assert np.isin(added, seen).any()


def test_pairs_are_stored_as_they_are(config, corpus):
    """Source, then target, in the same tokens; sentinels are sentinels; what is too long is cut and counted."""
    rows = [{"inputs": f"{note[:30]}<extra_id_0>{note[40:]}", "targets": f"<extra_id_0>{note[30:40]}"} for note in NOTES]
    rows[0] = {"inputs": "word " * 100 + "<extra_id_0>", "targets": "<extra_id_0> " + "word " * 100}
    path = corpus / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    store = prepare(changed(config, "data", train=str(path)), corpus / "store")
    tokenizer = store.tokenizer
    assert store.report["pairs"] == len({tuple(row.items()) for row in rows})
    assert 0 < store.report["truncated_share"] < 1
    expected = {
        tuple(np.concatenate([tokenizer.encode_marked(row["inputs"])[:39], tokenizer.encode_marked(row["targets"])[:59]]))
        for row in rows
    }
    found = set()
    for split in (store.train, store.validation):
        assert (split.pairs > 0).all()
        for example in range(len(split)):
            ids = store.active_to_full[split.tokens[split.offsets[example] : split.offsets[example + 1]]]
            target = ids[split.pairs[example] :]
            assert target[0] == tokenizer.sentinel_ids[0]
            found.add(tuple(ids))
    assert found == expected
    with pytest.raises(DataError, match=r"data.max_target_tokens 60 -> 61"):
        prepare(changed(config, "data", train=str(path), max_target_tokens=61), corpus / "store")


def test_terms_that_never_occur_are_an_error(config, corpus):
    """A terms file without a match is an error, and no store is written."""
    (corpus / "terms.txt").write_text("zzzz\nqqqq\n", encoding="utf-8")
    with pytest.raises(DataError, match="none of the 2 terms"):
        prepare(config, corpus / "store")
    assert not (corpus / "store").exists()
    assert prepare(changed(config, "data", terms=None), corpus / "store").report["terms"]["listed"] == 0


@pytest.mark.parametrize(("key", "value"), [("train", "missing.txt"), ("terms", "missing.txt"), ("validation", "missing.txt")])
def test_a_missing_file_is_named(config, corpus, key, value):
    """A file that is not there is a data error with its name, before anything is written."""
    with pytest.raises(DataError) as error:
        prepare(changed(config, "data", **{key: value}), corpus / "store")
    assert "missing.txt" in str(error.value)
    assert not (corpus / "store").exists()


def test_the_built_in_corpus_prepares_with_its_own_terms(tmp_path):
    """builtin:clinical, a trained tokenizer: the active vocabulary is the whole one, and the seed is part of the store."""
    config = Config(
        data=DataConfig(train="builtin:clinical", sample_notes=120), tokenizer=TokenizerConfig(None, 700), run=RunConfig(seed=1)
    )
    store = prepare(config, tmp_path / "store")
    assert store.report["terms"]["found"] > 10
    assert store.active_to_full.tolist() == list(range(store.tokenizer.size))
    assert store.report["bytes"] == sum(len(note.text.encode()) for note in generate_notes(120, 1))
    with pytest.raises(DataError, match=r"the content of data\.train"):
        prepare(changed(config, "run", seed=2), tmp_path / "store")
    with pytest.raises(DataError, match="cannot be mixed"):
        prepare(changed(config, "data", train=["builtin:clinical", "x.txt"]), tmp_path / "other")


def test_the_report_measures_the_content_of_the_store(config, corpus):
    """The names that scripts rely on, with values that agree with the arrays."""
    store = prepare(config, corpus / "store")
    report = store.report
    assert report["bytes"] == (corpus / "text.txt").stat().st_size
    continued = len(store.train) + len(store.validation) - len(set(NOTES))
    stored = len(store.train.tokens) + len(store.validation.tokens)
    assert stored - continued <= report["tokens"] <= stored, "an example that continues a document may begin with one more"
    assert report["characters"] == sum(map(len, set(NOTES)))
    assert report["tokens_per_character"] == pytest.approx(report["tokens"] / report["characters"])
    assert report["examples"] == len(store.train) and report["validation_examples"] == len(store.validation)
    assert report["updates_per_epoch"] == pytest.approx(len(store.train) / 8)
    with_term = sum(len(np.unique(split.terms[:, 0])) for split in (store.train, store.validation))
    assert report["terms"]["examples_with_term_share"] == pytest.approx(with_term / (len(store.train) + len(store.validation)))
    assert sum(report["terms"]["per_term"].values()) == report["terms"]["occurrences"]
    assert report["terms"]["found"] == len(report["terms"]["per_term"])
    assert report["active_vocabulary"] == {"size": len(store.active_to_full), "full_size": store.tokenizer.size}
    assert report["unknown_share"] == 0 and report["truncated_share"] == 0
    assert 20 < report["peak_memory_mib"] < 4000 and report["seconds"] > 0 and report["megabytes_per_s"] > 0


@pytest.mark.parametrize(
    ("megabytes", "words"),
    [(2, "take it as a trial"), (25.6, "enough to align terminology"), (300, "enough for stable domain restoration")],
)
def test_the_size_of_a_corpus_is_read_in_words(megabytes, words):
    """25 MB align terminology, 256 MB restore stably; the report places a corpus on this scale."""
    assert words in scale_reading(int(megabytes * 1e6))


def test_progress_is_told_and_may_stop_the_work(config, corpus):
    """Progress ends at the size of the input; an exception from it leaves no trace."""
    calls = []
    prepare(config, corpus / "store", lambda done, total: calls.append((done, total)))
    size = (corpus / "text.txt").stat().st_size
    assert calls[-1] == (size, size)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config, corpus / "other", stop)
    assert sorted(path.name for path in corpus.iterdir()) == ["store", "terms.txt", "text.txt"]


def test_the_built_in_corpus_tells_how_much_is_done_and_never_that_it_waits(tmp_path):
    """Its size is not known before, and (0, 0) is the sign of another process that makes the same store."""
    calls = []
    data = DataConfig(train="builtin:clinical", sample_notes=100)
    config = Config(data=data, tokenizer=TokenizerConfig(train_vocab_size=700))
    prepare(config, tmp_path / "store", lambda done, total: calls.append((done, total)))
    assert calls[-1][0] > 10_000 and calls[-1][1] == 0 and (0, 0) not in calls


def test_a_killed_prepare_leaves_nothing_that_passes_for_a_store(config, corpus):
    """SIGKILL in the middle: no store exists; the next preparation removes the leftovers and writes it."""
    code = (
        "import os, sys, signal, pathlib\n"
        "from resilient_t5.config.schema import *\n"
        "from resilient_t5.data.store.prepare import prepare\n"
        "text, tokenizer, store = sys.argv[1:]\n"
        "config = Config(data=DataConfig(train=text), tokenizer=TokenizerConfig(tokenizer))\n"
        "prepare(config, pathlib.Path(store), lambda done, total: os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    arguments = [config.data.train, config.tokenizer.name_or_path, str(corpus / "store")]
    killed = subprocess.run([sys.executable, "-c", code, *arguments], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL
    assert list(corpus.glob(".store.making-*")) and not (corpus / "store").exists()
    with pytest.raises(DataError, match="no prepared corpus"):
        Store.open(corpus / "store")
    prepare(config, corpus / "store").verify()
    assert sorted(path.name for path in corpus.iterdir()) == ["store", "terms.txt", "text.txt"]


def test_two_processes_make_one_store(config, corpus, monkeypatch):
    """A process that waited for another one opens the other's store instead of making its own."""
    made = prepare(config, corpus / "made")
    with only_maker(corpus / "store", lambda: None):

        def finish_other(done, total):
            if not (corpus / "store").exists():
                (corpus / "made").rename(corpus / "store")
                raise InterruptedByTest  # the lock is ours until the block ends

        with pytest.raises(InterruptedByTest):
            prepare(config, corpus / "store", finish_other)
    monkeypatch.setattr("resilient_t5.data.store.prepare.read_corpus", None)
    assert prepare(config, corpus / "store").fingerprint == made.fingerprint


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(config, tmp_path):
    """Ten times the text, prepared in fresh processes: the peak grows by less than a fifth."""
    code = (
        "import sys, pathlib\n"
        "from resilient_t5.config.schema import *\n"
        "from resilient_t5.data.store.prepare import prepare\n"
        "text, tokenizer, store = sys.argv[1:]\n"
        "config = Config(data=DataConfig(train=text), tokenizer=TokenizerConfig(tokenizer))\n"
        "print(prepare(config, pathlib.Path(store)).report['peak_memory_mib'])\n"
    )
    peaks = []
    for times in (40, 400):
        path = tmp_path / f"{times}.txt"
        path.write_text("\n".join(f"{i} {note}" for i in range(times) for note in NOTES), encoding="utf-8")
        arguments = [str(path), config.tokenizer.name_or_path, str(tmp_path / f"store{times}")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, check=True)
        peaks.append(float(done.stdout))
    assert peaks[1] < 1.2 * peaks[0]
