"""metrics.jsonl, the truth about a run; the TensorBoard event files are drawn from its rows.

One JSON object per line. Whatever depends on the clock or the machine ends in _s, _per_s, _mib, _share or is `time`, so
two runs can be compared by dropping those. A log that cannot be written (a full disk, a dead terminal) is counted and
never ends a run.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from resilient_t5.training.telemetry.console import Console
from resilient_t5.training.telemetry.tensorboard import TensorBoardWriter

QUIET_EVENTS = ("delete", "sweep")


AUDIT_KINDS = ("start", "end", "save", "guard", "signal")
"""Rows that stay when a run goes back to an older update; all others beyond it are dropped."""


class MetricsLog:
    """Writes the rows of one run.

    Args:
        directory: of the run; None writes nothing anywhere.
        from_update: the update that the run goes on from; 0 for a new one.
        evaluated_update: the last update whose evaluation is part of that state, below 0 for none; None: `from_update`.
        tensorboard: draw the rows, too.
    """

    def __init__(self, directory: Path | None, *, from_update: int, evaluated_update: int | None = None, tensorboard: bool):
        self.path = Path(os.devnull) if directory is None else directory / "metrics.jsonl"
        self.write_errors = 0
        self._board: TensorBoardWriter | None = None
        if directory is None:
            self._file = self.path.open("a", encoding="utf-8")
            return
        drop_rows_beyond(self.path, from_update, from_update if evaluated_update is None else evaluated_update)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = TensorBoardWriter(directory / "tensorboard", from_update=from_update) if tensorboard else None

    def row(self, kind: str, update: int, **values: Any) -> dict[str, Any]:
        """Append one row, draw it, and return it as it was written."""
        row = {"kind": kind, "update": update, "time": datetime.now().astimezone().isoformat(timespec="milliseconds"), **values}
        with self._counting_errors():
            self._file.write(json.dumps(plain(row), ensure_ascii=False) + "\n")
            self._file.flush()
            if self._board is not None:
                self._board.draw(row)
        return row

    def text(self, tag: str, markdown: str, update: int) -> None:
        """Show a text in TensorBoard only."""
        with self._counting_errors():
            if self._board is not None:
                self._board.text(tag, markdown, update)

    def picture(self, tag: str, path: Path, update: int) -> None:
        """Show a PNG file in TensorBoard too."""
        with self._counting_errors():
            if self._board is not None:
                self._board.picture(tag, path, update)

    def outcome(self, settings: Mapping[str, Any], finals: Mapping[str, float | None], update: int) -> None:
        """Show in TensorBoard what was set and what came of it; what was not measured is left out."""
        plain_settings = {
            key: value if isinstance(value, (bool, int, float)) else str(value) for key, value in settings.items()
        }
        with self._counting_errors():
            if self._board is not None:
                self._board.outcome(plain_settings, {k: v for k, v in finals.items() if v is not None}, update)

    def flush(self) -> None:
        """Push everything to the operating system."""
        with self._counting_errors():
            self._file.flush()
            if self._board is not None:
                self._board.flush()

    def close(self) -> None:
        """Flush and close all files."""
        self.flush()
        with self._counting_errors():
            self._file.close()
            if self._board is not None:
                self._board.close()

    @contextmanager
    def _counting_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self.write_errors += 1


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


class AuditTrail:
    """What the vault did, as `save` rows and console lines; kept until there is a log to write it to.

    Args:
        deadline_s: seconds that a SIGTERM leaves for a save; one that takes longer is warned of, once.
    """

    def __init__(self, deadline_s: float = float("inf")) -> None:
        self._deadline_s = deadline_s
        self._kept: list[tuple[str, dict[str, Any]]] = []
        self._log: tuple[MetricsLog, Console] | None = None

    def __call__(self, event: str, fields: dict[str, Any]) -> None:
        """Note one event of the vault."""
        if self._log is None:
            self._kept.append((event, fields))
            return
        telemetry, display = self._log
        update = fields.get("update", 0)
        telemetry.row("save", update, event=event, **{key: value for key, value in fields.items() if key != "update"})
        if event == "save":
            size_mib = fields["bytes"] / (1 << 20)
            display.line(
                f"saved  {update:>6} {fields['name']} ({fields['reason']}) {size_mib:.1f} MiB in {fields['save_s']:.2f} s"
            )
            if fields["save_s"] > self._deadline_s:
                display.line(
                    f"save   warning: a save takes longer than run.deadline_s {self._deadline_s:g}: after SIGTERM the newest"
                    " state may not be saved; raise it, and the time that whoever sends the signal waits"
                )
                self._deadline_s = float("inf")
        elif event not in QUIET_EVENTS:
            display.line(f"checkpoint {event}: " + ", ".join(f"{key} {value}" for key, value in fields.items()))

    def attach(self, telemetry: MetricsLog, display: Console) -> None:
        """Open the log, and tell what was kept."""
        self._log = (telemetry, display)
        kept, self._kept = self._kept, []
        for event, fields in kept:
            self(event, fields)
