"""How an export is to be used: its task, its lengths, its gaps, and the ids it was trained to write.

`restoration.json` lies beside the weights. Without it (a checkpoint from elsewhere) T5's own habits are taken. The file
is hostile until it is checked.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from resilient_t5.errors import DataError

USAGE_FILE = "restoration.json"
FORMAT = 1
MAX_BYTES = 16 * 2**20
MAX_TOKENS = 2**20
SENTINELS = 100
DocumentMode = Literal["auto", "file", "blank_line", "line"]
DOCUMENT_MODES = ("auto", "file", "blank_line", "line")


@dataclass(frozen=True, eq=False)
class Usage:
    """What training settled about how the model is asked; the defaults are those of a pretrained T5."""

    task: Literal["restore", "correct"] = "restore"
    """`restore` fills gaps, `correct` writes the whole text anew."""
    max_source_tokens: int = 512
    """Longest encoder input, end mark included."""
    max_target_tokens: int = 256
    """Longest answer to one input, end mark included."""
    max_sentinels: int = 27
    """Most gaps in one input."""
    document: DocumentMode = "auto"
    """What a document was in plain text; no input ever held parts of two."""
    trained_ids: np.ndarray | None = None
    """Ascending int64 full-vocabulary ids whose rows were trained; None: all. No answer may hold another."""

    def sha256(self) -> str:
        """Hash of the trained ids; "all" when the whole vocabulary was trained."""
        if self.trained_ids is None:
            return "all"
        return hashlib.sha256(self.trained_ids.astype("<i8").tobytes()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The content of restoration.json; the ids as runs [first, last]."""
        return {
            "format": FORMAT,
            "task": self.task,
            "max_source_tokens": self.max_source_tokens,
            "max_target_tokens": self.max_target_tokens,
            "max_sentinels": self.max_sentinels,
            "document": self.document,
            "trained_ids": None if self.trained_ids is None else _runs(self.trained_ids),
            "trained_ids_sha256": self.sha256(),
        }

    def write(self, directory: Path) -> None:
        """Write restoration.json into `directory`."""
        (directory / USAGE_FILE).write_text(json.dumps(self.to_json()) + "\n", encoding="utf-8")


def read_usage(directory: Path) -> Usage | None:
    """The usage that lies beside a model; None when there is none.

    Raises:
        DataError: the file is damaged.
    """
    path = directory / USAGE_FILE
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError("it is far too large")
        return _checked(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DataError(f"{USAGE_FILE} is damaged: {error}", where=str(path), hint="Export the model again") from error


def _checked(content: dict[str, Any]) -> Usage:
    if content["format"] != FORMAT:
        raise ValueError(f"it has format {content['format']!r}, and this version reads format {FORMAT}")
    numbers = {}
    for key, low, high in (
        ("max_source_tokens", 4, MAX_TOKENS),
        ("max_target_tokens", 4, MAX_TOKENS),
        ("max_sentinels", 1, SENTINELS),
    ):
        numbers[key] = content[key]
        if type(content[key]) is not int or not low <= content[key] <= high:
            raise ValueError(f"{key} is {content[key]!r}, not a number from {low} to {high}")
    if content["task"] not in ("restore", "correct") or content["document"] not in DOCUMENT_MODES:
        raise ValueError(f"task is {content['task']!r} and document is {content['document']!r}")
    ids = None if content["trained_ids"] is None else _ids_of(content["trained_ids"])
    usage = Usage(task=content["task"], document=content["document"], trained_ids=ids, **numbers)
    if content["trained_ids_sha256"] != usage.sha256():
        raise ValueError("the trained ids are not those that were written")
    return usage


def _runs(ids: np.ndarray) -> list[list[int]]:
    cuts = np.flatnonzero(np.diff(ids) != 1) + 1
    return [[int(run[0]), int(run[-1])] for run in np.split(ids, cuts)]


def _ids_of(runs: list[list[int]]) -> np.ndarray:
    bounds = np.array(runs, dtype=np.int64).reshape(-1, 2)
    flat = bounds.reshape(-1)
    if not len(bounds) or flat[0] < 0 or flat[-1] >= 2**24 or bool((bounds[:, 0] > bounds[:, 1]).any()):
        raise ValueError("the trained ids are no runs of ids")
    if bool((bounds[1:, 0] <= bounds[:-1, 1]).any()):
        raise ValueError("the trained ids do not ascend")
    return np.concatenate([np.arange(first, last + 1) for first, last in bounds.tolist()])
