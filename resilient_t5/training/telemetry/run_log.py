"""RunLog: one call per event writes the metrics.jsonl row, the TensorBoard scalars and the console line.

A write error (full disk, closed terminal) is counted in `write_errors` and never ends the run.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from resilient_t5.training.state import RunState
from resilient_t5.training.telemetry import metrics_log
from resilient_t5.training.telemetry.console import Console, checkpoint_line, slow_save_line
from resilient_t5.training.telemetry.metrics_log import plain
from resilient_t5.training.telemetry.tensorboard import TensorBoardWriter

Row = dict[str, Any]


class RunLog:
    """The log of one run. Call `open_at` before the first event; checkpoint events before that are queued.

    Args:
        console: prints the lines.
        directory: the run directory; None on ranks that do not write.
        tensorboard: also write TensorBoard event files.
        deadline_s: time between SIGTERM and exit; a slower save causes one warning.
    """

    def __init__(self, console: Console, directory: Path | None, *, tensorboard: bool = False, deadline_s: float = math.inf):
        self.console, self.directory = console, directory
        self.write_errors = 0
        self._tensorboard, self._deadline_s = tensorboard, deadline_s
        self._is_open = False
        self._queued: list[tuple[str, Row]] = []
        self._file: TextIOWrapper | None = None
        self._board: TensorBoardWriter | None = None

    def open_at(self, state: RunState) -> None:
        """Open, or reopen after a rollback, at `state`; rows of later updates are dropped."""
        self.close()
        if self.directory is not None:
            path = self.directory / "metrics.jsonl"
            metrics_log.drop_rows_beyond(path, state.update, state.evaluated_update)
            self._file = path.open("a", encoding="utf-8")
            if self._tensorboard:
                self._board = TensorBoardWriter(self.directory / "tensorboard", from_update=state.update)
        self._is_open = True
        queued, self._queued = self._queued, []
        for event, fields in queued:
            self.checkpoint_event(event, fields)

    def event(self, kind: str, update: int, *, line: str | Callable[[Row], str] = "", keep: str = "", **fields: Any) -> None:
        """Write the row of one event, and its console line if there is one.

        Args:
            kind: the row's kind.
            update: the update that it belongs to.
            line: the console line, or a function that formats it from the row.
            keep: row of the live view that shows the line; see `Console.line`.
            fields: the row's other values.
        """
        row = {"kind": kind, "update": update, "time": datetime.now().astimezone().isoformat(timespec="milliseconds"), **fields}
        with self.counting_errors():
            if self._file is not None:
                self._file.write(json.dumps(plain(row), ensure_ascii=False) + "\n")
                self._file.flush()
        self.draw(lambda board: board.row(row))
        if text := line if isinstance(line, str) else line(row):
            self.line(text, keep=keep)

    def line(self, text: str, *, keep: str = "") -> None:
        """Print a console line that has no row."""
        self.console.line(text, keep=keep)

    def checkpoint_event(self, event: str, fields: Row) -> None:
        """Log one event of the CheckpointManager as a `save` row."""
        if not self._is_open:
            self._queued.append((event, fields))
            return
        values = {key: value for key, value in fields.items() if key != "update"}
        self.event("save", fields.get("update", 0), line=checkpoint_line(event, fields), event=event, **values)
        if event == "save" and fields["save_s"] > self._deadline_s:
            self.line(slow_save_line(self._deadline_s))
            self._deadline_s = math.inf

    def draw(self, write: Callable[[TensorBoardWriter], None]) -> None:
        """Call `write` with the TensorBoard writer, if there is one."""
        with self.counting_errors():
            if self._board is not None:
                write(self._board)

    def rows(self, kind: str) -> Iterator[Row]:
        """Yield the rows of one kind from metrics.jsonl, as written so far."""
        if self.directory is not None:
            yield from (row for row in metrics_log.read_rows(self.directory / "metrics.jsonl") if row["kind"] == kind)

    def close(self) -> None:
        """Close the files. May be called twice."""
        with self.counting_errors():
            if self._file is not None:
                self._file.close()
            if self._board is not None:
                self._board.close()
        self._file = self._board = None

    @contextmanager
    def counting_errors(self) -> Iterator[None]:
        """Count an OSError of the block in `write_errors` instead of raising it."""
        try:
            yield
        except OSError:
            self.write_errors += 1
