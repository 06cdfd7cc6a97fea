"""Stores on disk: whole or not at all, refused by name, read only. Run: python -m pytest tests/data/store/test_store.py"""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from resilient_t5.config.schema import Config, DataConfig, TokenizerConfig
from resilient_t5.data.corpus.sample import generate_notes
from resilient_t5.data.examples import Examples
from resilient_t5.data.store.build import Streams, choose_active
from resilient_t5.data.store.prepare import prepare
from resilient_t5.data.store.store import META, Store
from resilient_t5.data.tokenizer.tokenizer import train_tokenizer
from resilient_t5.errors import DataError, DiskFull, StorageError
from resilient_t5.files import making, only_maker, storage_errors

NOTES = [note.text for note in generate_notes(200, 5)]


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory):
    """A saved tokenizer of 700 pieces."""
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(NOTES, 700, 0.999).save(path)
    return path


@pytest.fixture
def store_directory(tmp_path, tokenizer_directory):
    """A fresh store of a small corpus."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(NOTES), encoding="utf-8")
    data = DataConfig(train=str(text), max_source_tokens=32)
    prepare(Config(data=data, tokenizer=TokenizerConfig(str(tokenizer_directory))), tmp_path / "store")
    return tmp_path / "store"


def test_a_store_is_read_only(store_directory):
    """No reader can change what other readers see."""
    store = Store.open(store_directory)
    store.verify()
    for array in (store.train.tokens, store.train.offsets, store.validation.documents):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_a_directory_without_its_meta_file_is_half_a_store(store_directory):
    """meta.json is the commit: without it the directory is refused as half a store."""
    (store_directory / META).unlink()
    with pytest.raises(DataError, match="half a store"):
        Store.open(store_directory)


def test_what_is_absent_or_foreign_is_named(tmp_path):
    """No directory, an empty one, one with other files, and a file in its place each have their own message."""
    with pytest.raises(DataError, match="no prepared corpus"):
        Store.open(tmp_path / "nothing")
    with pytest.raises(DataError, match="no prepared corpus"):
        Store.open(tmp_path)
    (tmp_path / "letter.txt").write_text("x")
    with pytest.raises(DataError, match=r"not a store \(it contains letter.txt"):
        Store.open(tmp_path)
    with pytest.raises(DataError, match="names a file"):
        Store.open(tmp_path / "letter.txt")


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy", "validation/terms.npy", "vocabulary.npz", "report.json"])
def test_a_cut_or_missing_file_is_found_at_opening(store_directory, name):
    """A file of the wrong size, or none, makes the store damaged; the error names the file."""
    content = (store_directory / name).read_bytes()
    (store_directory / name).write_bytes(content[:-1])
    with pytest.raises(DataError, match=name):
        Store.open(store_directory)
    (store_directory / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        Store.open(store_directory)


def test_one_changed_bit_is_found_by_verify(store_directory):
    """Sizes alone cannot see it; the sha256 sums do."""
    path = store_directory / "tokens.bin"
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"tokens\.bin"):
        Store.open(store_directory).verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format": 99}, "format 99"), ({"files": None}, "cannot be read"), ({"fingerprint": None, "counts": {}}, "damaged")],
)
def test_a_meta_file_of_another_kind_is_refused(store_directory, change, message):
    """An unknown format and a malformed meta.json are data errors, not crashes."""
    meta = json.loads((store_directory / META).read_text(encoding="utf-8"))
    (store_directory / META).write_text(json.dumps({**meta, **change}), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        Store.open(store_directory)
    (store_directory / META).write_text("[1, 2", encoding="utf-8")
    with pytest.raises(DataError, match="cannot be read"):
        Store.open(store_directory)


def test_a_failed_making_leaves_nothing(tmp_path):
    """When the body raises, neither the directory nor a temporary one stays."""
    with pytest.raises(RuntimeError), only_maker(tmp_path / "new", lambda: None), making(tmp_path / "new") as temporary:
        (temporary / "file").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_a_killed_maker_is_swept(tmp_path):
    """The next preparation removes the temporary directory of a killed one."""
    dead = tmp_path / ".new.making-abc"
    dead.mkdir()
    (dead / "file").write_text("half")
    with only_maker(tmp_path / "new", lambda: None), making(tmp_path / "new") as temporary:
        (temporary / "file").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert (tmp_path / "new" / "file").read_text() == "whole"


def test_nothing_is_ever_written_over(tmp_path):
    """A rename onto a directory that came to hold something fails and leaves it as it is."""
    (tmp_path / "new").mkdir()
    with (
        pytest.raises(StorageError),
        storage_errors(tmp_path / "new"),
        only_maker(tmp_path / "new", lambda: None),
        making(tmp_path / "new") as temporary,
    ):
        (temporary / "file").write_text("ours")
        (tmp_path / "new" / "theirs").write_text("theirs")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["theirs"]


def test_a_second_maker_waits_for_the_first(tmp_path):
    """While another live process holds the lock, the poll is called; the temporary directory of the first is not swept."""
    code = (
        "import sys, time, pathlib\n"
        "from resilient_t5.files import making, only_maker\n"
        "new = pathlib.Path(sys.argv[1])\n"
        "with only_maker(new, lambda: None), making(new) as temporary:\n"
        "    (temporary / 'file').write_text('first')\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    new = tmp_path / "new"
    environment = {"PYTHONPATH": str(Path(__file__).parents[3])}
    first = subprocess.Popen(
        [sys.executable, "-c", code, str(new)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert first.stdin is not None and first.stdout is not None
    assert first.stdout.readline() == b"held\n"
    polls = []

    def poll():
        polls.append(time.monotonic())
        assert len(list(tmp_path.glob(".new.making-*"))) <= 1
        if len(polls) == 2:
            first.stdin.close()

    with only_maker(new, poll):
        assert (new / "file").read_text() == "first"
    assert len(polls) >= 2
    assert first.wait() == 0
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_full_disk_has_its_own_error(tmp_path):
    """ENOSPC becomes DiskFull, any other errno StorageError with the file's name."""
    with pytest.raises(DiskFull), storage_errors(tmp_path):
        raise OSError(28, "No space left on device")
    with pytest.raises(StorageError, match="some.file"), storage_errors(tmp_path):
        raise PermissionError(13, "Permission denied", "some.file")


def test_the_active_vocabulary_covers_corpus_terms_and_specials(tokenizer_directory):
    """What occurs, what terms need, specials, sentinels and bytes; a multiple of 64, ascending, nothing twice."""
    from resilient_t5.data.tokenizer.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(tokenizer_directory))
    frequencies = np.zeros(tokenizer.size, dtype=np.int64)
    frequencies[[500, 501, tokenizer.size - 101]] = 1
    active = choose_active(frequencies, tokenizer, ["hypertension"])
    needed = {500, 501, *tokenizer.special_ids.tolist(), *tokenizer.byte_ids.tolist()}
    needed |= set(tokenizer.encode_batch(["hypertension"])[0].ids.tolist())
    assert needed <= set(active.tolist())
    assert len(active) % 64 == 0 and (np.diff(active) > 0).all()
    assert len(active) - len(needed) < 64


@pytest.mark.parametrize("size", [300, 70_000])
def test_streams_map_back_to_the_ids_that_were_written(tmp_path, monkeypatch, size):
    """active_to_full[tokens] are the ids that were added, in their order, in uint16 or, beyond 65,536, uint32."""
    monkeypatch.setattr("resilient_t5.data.store.build.TOKENS_AT_ONCE", 7)
    random = np.random.default_rng(1)
    written, streams = [], Streams(tmp_path / "streams", size)
    for _ in range(6):
        lengths = random.integers(1, 9, 4).astype(np.int32)
        tokens = random.integers(0, size, int(lengths.sum())).astype(np.int32)
        terms = np.array([[1, 0, 1, 7], [3, 0, 1, 8]], dtype=np.int32)
        documents = np.array([0, 0, 1, 2], dtype=np.int32)
        streams.add("train", Examples(tokens, lengths, documents, np.full(4, -1, np.int32), terms), 3)
        written.append(tokens)
    streams.close()
    dtype = streams.write_splits(tmp_path, np.arange(size, dtype=np.int32))
    assert dtype == ("uint16" if size <= 65_536 else "uint32")
    assert streams.counts["train"] == {
        "examples": 24, "documents": 18, "tokens": sum(map(len, written)), "terms": 12, "with_term": 12,
    }  # fmt: skip
    assert np.fromfile(tmp_path / "tokens.bin", dtype).tolist() == np.concatenate(written).tolist()
    assert np.load(tmp_path / "documents.npy").tolist() == [d + 3 * k for k in range(6) for d in (0, 0, 1, 2)]
    assert np.load(tmp_path / "terms.npy")[:, 0].tolist() == [e + 4 * k for k in range(6) for e in (1, 3)]
    offsets = np.load(tmp_path / "offsets.npy")
    assert offsets[-1] == sum(map(len, written)) and len(offsets) == 25
    assert np.load(tmp_path / "validation" / "terms.npy").shape == (0, 4)
