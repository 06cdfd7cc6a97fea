"""Files, directories and globs to documents: cleaned, without exact duplicate paragraphs, each assigned to a side of the split.

Everything streams. The only lasting memory is the table of paragraph digests: a fixed 64 MiB at most.
"""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from resilient_t5.config.sections import DataConfig
from resilient_t5.data.corpus.formats import CorpusCounts, file_kind, read_records
from resilient_t5.errors import DataError

KINDS = ".txt, .md, .jsonl, .csv, .tsv, each also packed as .gz or .xz"
BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")


@dataclass(frozen=True, slots=True)
class Document:
    """One document of the corpus.

    `key` decides the side of the split: a digest of the text as in the file, shared by all parts of a document too long for
    memory.
    """

    text: str
    source: str
    target: str | None
    key: int


class SeenParagraphs:
    """Set of paragraph digests of fixed size; when it is full, most new digests replace old ones.

    An open-addressing table of 8-byte digests: 64 MiB at the default size, allocated as it fills; a Python set takes several
    times as much. The probability that any two of n different paragraphs collide is below n^2 / 2**65.
    """

    def __init__(self, slots_log2: int = 23):
        self._mask = (1 << slots_log2) - 1
        self._slots = np.zeros(1 << slots_log2, dtype=np.uint64).data
        self._free = (self._mask + 1) * 3 // 4  # beyond this load, probe chains grow long
        self.forgotten = 0

    def add(self, digest: int) -> bool:
        """Add `digest`, from 0 to 2**64 - 1; True when it is new."""
        digest = digest or 1  # 0 marks an empty slot
        slots, mask = self._slots, self._mask
        slot = digest & mask
        while found := slots[slot]:
            if found == digest:
                return False
            slot = (slot + 1) & mask
        if self._free:
            slots[slot] = digest
            self._free -= 1
        else:
            self.forgotten += 1
            if slots[digest & mask]:  # filling an empty slot would let searches never end
                slots[digest & mask] = digest
        return True


def text_digest(text: str) -> int:
    """64-bit digest of `text`, the same on every machine and in every process."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def find_inputs(inputs: Sequence[str]) -> list[Path]:
    """Resolve `inputs` (files, directories, globs) to files, each once, sorted by path.

    Directories are searched recursively, without hidden names and without following links to directories. In directories and
    globs, files of other kinds are skipped.

    Raises:
        DataError: no inputs, or an input that is missing or has no file of a supported kind.
    """
    if not inputs:
        raise DataError("no input is named", hint="Set data.train to files, folders or globs")
    paths = sorted({path for name in inputs for path in _files_of(name)})
    once: dict[str, Path] = {}
    for path in paths:
        once.setdefault(os.path.realpath(path), path)
    return list(once.values())


def _files_of(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_file():
        if file_kind(path) is None:
            raise DataError(f"{name} has an unsupported extension", hint=f"Supported extensions: {KINDS}")
        return [path]
    if path.is_dir():
        files = _files_under(path)
    elif glob.has_magic(name):
        hits = map(Path, glob.glob(str(path), recursive=True))
        files = [file for hit in hits for file in (_files_under(hit) if hit.is_dir() else [hit])]
    elif path.exists():
        raise DataError(f"{name} is neither a file nor a directory", hint="Write its content into a file first")
    else:
        raise DataError("input is missing", where=name, hint="Check the path; it is relative to the current directory")
    files = [file for file in files if file.is_file() and file_kind(file) is not None]
    if not files:
        raise DataError("input has no text file", where=name, hint=f"Supported extensions: {KINDS}")
    return files


def _files_under(folder: Path) -> list[Path]:
    files = []
    for directory, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(directory, name) for name in names if not name.startswith(".")]
    return files


def read_documents(
    inputs: Sequence[str], settings: DataConfig, counts: CorpusCounts, *, seen: SeenParagraphs | None = None
) -> Iterator[Document]:
    """Documents of the inputs, in the order of the sorted files, cleaned and without exact duplicate paragraphs.

    Paragraphs are separated by blank lines; a document without one is one paragraph. An already masked pair is compared as a
    whole.

    Args:
        inputs: as for `find_inputs`.
        counts: updated while reading.
        seen: known paragraphs, which are dropped. Pass the same object for the validation inputs and then for the training
            inputs to keep validation paragraphs out of training.

    Raises:
        DataError: as `find_inputs` and `read_records`; or no text in the inputs.
    """
    seen = SeenParagraphs() if seen is None else seen
    forgotten = seen.forgotten
    empty = True
    for path in find_inputs(inputs):
        for record in read_records(path, settings, counts):
            text = record.text.strip()
            if not text:
                continue
            empty = False
            digest = text_digest(text)
            kept, dropped = _without_duplicates(text, digest, record.target, seen)
            counts.duplicate_paragraphs_dropped += dropped
            if not kept:
                continue
            counts.documents += 1
            counts.characters += len(kept)
            key = digest if record.part_of is None else text_digest(record.part_of.strip())
            yield Document(kept, f"{path}:{record.line}", record.target, key)
    counts.paragraphs_forgotten += seen.forgotten - forgotten
    if empty:
        raise DataError("the inputs contain no text", where=", ".join(inputs), hint="Check that these are the right files")


def _without_duplicates(text: str, digest: int, target: str | None, seen: SeenParagraphs) -> tuple[str, int]:
    """`text` without known paragraphs, and the number of paragraphs dropped."""
    if target is not None:
        digest = text_digest(f"{text}\0{target}")
    elif "\n" in text:
        paragraphs = BLANK_LINES.split(text)
        if len(paragraphs) > 1:
            kept = [paragraph for paragraph in paragraphs if seen.add(text_digest(paragraph.strip()))]
            dropped = len(paragraphs) - len(kept)
            return ("\n\n".join(kept) if dropped else text), dropped
    return (text, 0) if seen.add(digest) else ("", 1)


def held_out(document: Document, share: float) -> bool:
    """Whether `document` belongs to the held-out `share` (0 to 1); depends on its content only, not on its position or file."""
    return document.key < share * 2.0**64
