"""metrics.jsonl, the truth about a run, and the TensorBoard event files drawn from its rows.

One JSON object per line. Whatever depends on the clock or the machine ends in _s, _per_s, _mib, _share or is `time`, so
two runs can be compared by dropping those. A log that cannot be written (a full disk, a dead terminal) is counted and
never ends a run.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

AUDIT_KINDS = ("start", "end", "save", "guard", "signal")
"""Rows that stay when a run goes back to an older update; all others beyond it are dropped."""

GROUPS = {
    "train": ("train", "performance"),
    "evaluation": ("evaluation", "convergence"),
    "restoration": ("restoration", None),
    "save": ("checkpoint", "checkpoint"),
}
"""TensorBoard group of a row's values: those that depend on the run, those that depend on the machine."""

MACHINE_ENDINGS = ("_s", "_per_s", "_mib", "_wait_share")
CONVERGENCE_PREFIX = "convergence_"


class Telemetry:
    """Writes the rows of one run.

    Args:
        directory: of the run.
        from_update: the update that the run goes on from; 0 for a new one.
        evaluated_update: the last update whose evaluation is part of that state, below 0 for none; None: `from_update`.
        tensorboard: draw the rows, too.
    """

    def __init__(self, directory: Path, *, from_update: int, evaluated_update: int | None = None, tensorboard: bool):
        self.path = directory / "metrics.jsonl"
        self.write_errors = 0
        drop_rows_beyond(self.path, from_update, from_update if evaluated_update is None else evaluated_update)
        self._file = self.path.open("a", encoding="utf-8")
        # TensorBoard's Python loader ignores the first purge mark of a run, so even the first writer sets one.
        purge_from = 0 if from_update == 0 else from_update + 1
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=purge_from) if tensorboard else None

    def row(self, kind: str, update: int, **values: Any) -> dict[str, Any]:
        """Append one row, draw it, and return it as it was written."""
        row = {"kind": kind, "update": update, "time": datetime.now().astimezone().isoformat(timespec="milliseconds"), **values}
        try:
            self._file.write(json.dumps(plain(row), ensure_ascii=False) + "\n")
            self._file.flush()
            if self._board is not None:
                draw(self._board, row)
        except OSError:
            self.write_errors += 1
        return row

    def text(self, tag: str, markdown: str, update: int) -> None:
        """Show a text in TensorBoard only."""
        if self._board is not None:
            self._board.add_text(tag, markdown, update)

    def flush(self) -> None:
        """Push everything to the operating system."""
        try:
            self._file.flush()
            if self._board is not None:
                self._board.flush()
        except OSError:
            self.write_errors += 1

    def close(self) -> None:
        """Flush and close all files."""
        self.flush()
        self._file.close()
        if self._board is not None:
            self._board.close()


def draw(board: SummaryWriter, row: Mapping[str, Any]) -> None:
    """Draw one row's numbers as scalars; the x axis is the update everywhere."""
    groups = GROUPS.get(row["kind"])
    if groups is None:
        return
    for name, value in row.items():
        if name in ("kind", "update", "time") or isinstance(value, (bool, str)) or not isinstance(value, (int, float)):
            continue
        if name.startswith(CONVERGENCE_PREFIX):
            board.add_scalar(f"convergence/{name.removeprefix(CONVERGENCE_PREFIX)}", value, row["update"])
        else:
            machine = name.endswith(MACHINE_ENDINGS) and groups[1] is not None and row["kind"] == "train"
            board.add_scalar(f"{groups[1] if machine else groups[0]}/{name}", value, row["update"])


def plain(value: Any) -> Any:
    """`value` with every non-finite float as a string, since JSON has no NaN and hiding one is worse."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics.jsonl; a torn last line, as a kill leaves it, is passed over."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and "kind" in row and isinstance(row.get("update"), int):
                yield row


def drop_rows_beyond(path: Path, update: int, evaluated_update: int) -> None:
    """Keep the audit trail, training rows up to `update`, and what evaluations up to `evaluated_update` said.

    An evaluation that a state does not know of will be done again. The file is replaced whole.
    """
    if not path.exists():
        return
    last = {"train": update}
    kept = [
        row for row in read_rows(path) if row["kind"] in AUDIT_KINDS or row["update"] <= last.get(row["kind"], evaluated_update)
    ]
    temporary = path.with_name(".tmp-metrics.jsonl")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
