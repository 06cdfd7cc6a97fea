"""The prepared corpus on disk, opened read-only: memory maps shared by any number of processes.

A store is a directory with `tokens.bin`, `offsets.npy`, `terms.npy`, `documents.npy`, `pairs.npy` of the training split, the
same files in `validation/`, and `vocabulary.npz`, `terms.txt`, `tokenizer/`, `report.json` and `meta.json`. `meta.json` is
written last; a directory without it is not a store. Sizes are checked on every open, sha256 sums by `Store.verify`.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from resilient_t5.data.ragged import Split
from resilient_t5.data.tokenizer.tokenizer import TextTokenizer, load_tokenizer
from resilient_t5.errors import DataError, StorageError

FORMAT = 1
META = "meta.json"
REPORT = "report.json"
TERMS = "terms.txt"
VOCABULARY = "vocabulary.npz"
TOKENIZER = "tokenizer"
TOKENIZER_RECORD = "tokenizer_files"  # in meta.json: the files that decided the ids
SPLITS = {"train": "", "validation": "validation"}
SPLIT_FILES = ("tokens.bin", "offsets.npy", "terms.npy", "documents.npy", "pairs.npy")


class Store:
    """A complete store. Use `Store.open`."""

    def __init__(self, directory: Path, meta: dict[str, Any]):
        self.directory = directory
        self.meta = meta
        self.fingerprint: str = meta["fingerprint"]
        self.train = _open_split(directory, "train", meta)
        self.validation = _open_split(directory, "validation", meta)
        with np.load(directory / VOCABULARY, allow_pickle=False) as arrays:
            self.active_to_full: np.ndarray = arrays["active_to_full"]
        self.terms: list[str] = (directory / TERMS).read_text(encoding="utf-8").split("\n")[:-1]
        self.report: dict[str, Any] = json.loads((directory / REPORT).read_text(encoding="utf-8"))

    @classmethod
    def open(cls, directory: Path) -> "Store":
        """Open a store.

        Raises:
            DataError: no store, an incomplete one, an unknown format, or missing or truncated files.
            StorageError: it cannot be read.
        """
        directory = Path(directory)
        meta = read_meta(directory)
        _check_sizes(directory, meta)
        try:
            return cls(directory, meta)
        except OSError as error:
            raise StorageError(f"cannot read the store: {error.strerror or error}", where=str(directory)) from error
        except (KeyError, ValueError, TypeError) as error:
            raise _damaged(directory, f"{type(error).__name__}: {error}") from error

    @property
    def encodes_gaps(self) -> bool:
        """Whether sources are encoded as the tokenizer encodes texts with gaps; False for a store of an earlier version.

        Its active vocabulary lacks ids that occur only after gaps, and a run on it must continue unchanged.
        """
        return TOKENIZER_RECORD in self.meta

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """Tokenizer of the store; loaded on first access."""
        return load_tokenizer(str(self.directory / TOKENIZER))

    def verify(self) -> None:
        """Read every file and compare its sha256.

        Raises:
            DataError: a file has changed.
        """
        for name, expected in self.meta["files"].items():
            if sha256_of(self.directory / name) != expected["sha256"]:
                raise _damaged(self.directory, f"{name} has changed since it was written")


def store_state(directory: Path) -> Literal["absent", "store", "other"]:
    """Content of a directory: nothing (or it does not exist), a store, or something else, which must not be overwritten."""
    if (directory / META).is_file():
        return "store"
    if directory.is_dir() and not any(directory.iterdir()):
        return "absent"
    return "other" if directory.exists() or directory.is_symlink() else "absent"


def read_meta(directory: Path) -> dict[str, Any]:
    """The `meta.json` of a store.

    Raises:
        DataError: there is none, or it has another format.
    """
    state = store_state(directory)
    if state == "absent":
        raise DataError("there is no prepared corpus", where=str(directory), hint="Make it with bin/prepare.")
    if state == "other":
        raise not_a_store(directory)
    try:
        meta: dict[str, Any] = json.loads((directory / META).read_text(encoding="utf-8"))
        found = meta["format"]
        sound = all(isinstance(entry["bytes"], int) for entry in meta["files"].values()) and meta["identity"] is not None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(directory, f"{META} cannot be read") from error
    if found != FORMAT or not sound:
        raise DataError(
            f"this store has format {found}, and this version reads format {FORMAT}",
            where=str(directory),
            hint="Prepare it anew in another directory (data.store).",
        )
    return meta


def not_a_store(directory: Path) -> DataError:
    """Error for a directory with other content or an incomplete store."""
    if not directory.is_dir():
        return DataError("data.store names a file, not a directory", where=str(directory), hint="Name another directory.")
    ours = [name for name in (*SPLIT_FILES, VOCABULARY) if (directory / name).exists()]
    if ours:
        what = f"this is half a store: it has {', '.join(ours)} but no {META}"
    else:
        first = sorted(entry.name for entry in directory.iterdir())[0]
        what = f"this directory is not a store (it contains {first}); nothing was written"
    return DataError(what, where=str(directory), hint="Name another directory with data.store, or remove this one.")


def sha256_of(path: Path) -> str:
    """sha256 of a file, in hexadecimal; about 1 GiB/s."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"cannot read the file: {error.strerror}", where=str(path)) from error


def _damaged(directory: Path, why: str) -> DataError:
    return DataError(
        f"the store is damaged: {why}", where=str(directory), hint="Remove it, or prepare it anew in another directory."
    )


def _check_sizes(directory: Path, meta: dict[str, Any]) -> None:
    for name, expected in meta["files"].items():
        path = directory / name
        if ".." in Path(name).parts or Path(name).is_absolute() or not path.is_file():
            raise _damaged(directory, f"{name} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise _damaged(directory, f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}")


def _open_split(directory: Path, split: str, meta: dict[str, Any]) -> Split:
    folder = directory / SPLITS[split]
    counts = meta["counts"][split]
    names = ("offsets", "terms", "documents", "pairs")
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
    dtype = np.dtype(meta["dtype"])
    path = folder / "tokens.bin"
    tokens = np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)
    examples = counts["examples"]
    shapes = {name: array.shape for name, array in arrays.items()}
    expected = {"offsets": (examples + 1,), "terms": (counts["terms"], 4), "documents": (examples,), "pairs": (examples,)}
    if shapes != expected or len(tokens) != counts["tokens"] or int(arrays["offsets"][-1]) != len(tokens):
        raise ValueError(f"the arrays of {split} do not fit together")
    return Split(tokens, **arrays)
