"""How to use an exported model: its task, length limits, gaps, and the ids it was trained to write.

Stored as `restoration.json` next to the weights; without the file the defaults of T5 apply. The content is validated
before it is used.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from resilient_t5.config.sections import DocumentMode
from resilient_t5.errors import DataError

CONFIG_FILE = "restoration.json"
FORMAT = 1
MAX_BYTES = 16 * 2**20
MAX_TOKENS = 2**20
SENTINELS = 100
DOCUMENT_MODES = get_args(DocumentMode)


@dataclass(frozen=True, eq=False)
class RestorationConfig:
    """Inference settings that training determined; the defaults are those of a pretrained T5."""

    task: Literal["restore", "correct"] = "restore"
    """`restore` fills gaps, `correct` rewrites the whole text."""
    max_source_tokens: int = 512
    """Maximum encoder input, end token included."""
    max_target_tokens: int = 256
    """Maximum output for one input, end token included."""
    max_sentinels: int = 27
    """Maximum gaps in one input."""
    document: DocumentMode = "auto"
    """How training cut plain text into documents; an input never spans two."""
    trained_ids: np.ndarray | None = None
    """Ascending int64 full-vocabulary ids whose rows were trained; None for all. Answers hold no other ids."""

    def sha256(self) -> str:
        """Hash of the trained ids; "all" when the whole vocabulary was trained."""
        if self.trained_ids is None:
            return "all"
        return hashlib.sha256(self.trained_ids.astype("<i8").tobytes()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Content of restoration.json, with the ids as ranges [first, last]."""
        runs = None if self.trained_ids is None else _to_runs(self.trained_ids)
        return {"format": FORMAT, **asdict(self), "trained_ids": runs, "trained_ids_sha256": self.sha256()}

    def write(self, directory: Path) -> None:
        """Write restoration.json into `directory`."""
        (directory / CONFIG_FILE).write_text(json.dumps(self.to_json()) + "\n", encoding="utf-8")


def read_restoration_config(directory: Path) -> RestorationConfig | None:
    """Read restoration.json from a model directory; None if there is none.

    Raises:
        DataError: the file is damaged.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError("it is far too large")
        return _validated(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DataError(f"{CONFIG_FILE} is damaged: {error}", where=str(path), hint="Export the model again") from error


def _validated(content: dict[str, Any]) -> RestorationConfig:
    if content["format"] != FORMAT:
        raise ValueError(f"it has format {content['format']!r}, but this version reads format {FORMAT}")
    numbers = {}
    limits = {"max_source_tokens": (4, MAX_TOKENS), "max_target_tokens": (4, MAX_TOKENS), "max_sentinels": (1, SENTINELS)}
    for key, (low, high) in limits.items():
        numbers[key] = content[key]
        if type(content[key]) is not int or not low <= content[key] <= high:
            raise ValueError(f"{key} is {content[key]!r}, not a number from {low} to {high}")
    if content["task"] not in ("restore", "correct") or content["document"] not in DOCUMENT_MODES:
        raise ValueError(f"task is {content['task']!r} and document is {content['document']!r}")
    ids = None if content["trained_ids"] is None else _from_runs(content["trained_ids"])
    config = RestorationConfig(task=content["task"], document=content["document"], trained_ids=ids, **numbers)
    if content["trained_ids_sha256"] != config.sha256():
        raise ValueError("trained_ids do not match their hash")
    return config


def _to_runs(ids: np.ndarray) -> list[list[int]]:
    cuts = np.flatnonzero(np.diff(ids) != 1) + 1
    return [[int(run[0]), int(run[-1])] for run in np.split(ids, cuts)]


def _from_runs(runs: list[list[int]]) -> np.ndarray:
    bounds = np.array(runs, dtype=np.int64).reshape(-1, 2)
    first, last = bounds[:, 0], bounds[:, 1]
    if not len(bounds) or first[0] < 0 or last[-1] >= 2**24:
        raise ValueError("trained_ids are out of range")
    if bool((first > last).any()) or bool((first[1:] <= last[:-1]).any()):
        raise ValueError("trained_ids do not ascend")
    return np.concatenate([np.arange(a, b + 1) for a, b in bounds.tolist()])
