"""The console: a live view on a terminal, plain lines elsewhere; every line also goes to train.log.

Our own text is ASCII. Text from data is printed without markup, with characters that the terminal cannot encode replaced.
The live view (progress bar, latest numbers, latest line of each KEPT_ROWS row) stays below the scrolling lines and
disappears when the run ends. Rows are folded, and samples cut, by terminal cells, so Chinese text keeps the layout.
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from resilient_t5.training.convergence.machine import format_verdict
from resilient_t5.training.convergence.phases import Verdict
from resilient_t5.training.telemetry.timing import TimeLeft, readable

REFRESH_PER_S = 4
KEPT_ROWS = ("numbers", "phase", "restore", "sample")
"""Rows below the progress bar, in this order; empty ones are not shown."""
QUIET_EVENTS = ("delete", "sweep")
"""Checkpoint events without a console line."""


class LiveProgress:
    """The progress bar and the kept rows. A thread of `rich` renders them; this class holds the values."""

    def __init__(self, console: RichConsole, update: int, total_updates: int):
        self.update, self.total_updates = update, total_updates
        self.rows: dict[str, str] = {}
        """Text of each row of KEPT_ROWS."""
        self.live = Live(self, console=console, refresh_per_second=REFRESH_PER_S, transient=True)

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Render the view."""
        table: Any = Table.grid(expand=True, padding=(0, 1))
        table.add_column(no_wrap=True)
        table.add_column(ratio=1)
        table.add_column(no_wrap=True)
        share = self.update / max(1, self.total_updates)
        bar = ProgressBar(total=max(1, self.total_updates), completed=self.update)
        table.add_row(Text(f"update {self.update}/{self.total_updates}"), bar, Text(f"{share:6.1%}"))
        yield table
        for row in KEPT_ROWS:
            if row in self.rows:
                cut = row == "sample"
                yield Text(self.rows[row], no_wrap=cut, overflow="ellipsis" if cut else "fold")


class Console:
    """Prints the lines of a run and, on a terminal, shows a live view below them.

    Args:
        mode: `auto`, `live`, `plain` or `quiet`, as in the configuration.
        log: file that gets every line with a time stamp; None for no file.
    """

    def __init__(self, mode: str, log: Path | None):
        self.quiet = mode == "quiet"
        self.console = RichConsole(file=sys.stdout, markup=False, highlight=False, soft_wrap=True)
        self._use_view = not self.quiet and (mode == "live" or (mode == "auto" and self.console.is_terminal))
        self._log = None if log is None else log.open("a", encoding="utf-8")
        self._view: LiveProgress | None = None

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._view is not None:
            self._view.live.stop()
        if self._log is not None:
            self._log.close()

    def line(self, text: str, *, keep: str = "") -> None:
        """Print one line with the time of day; an unwritable terminal or disk silences the console instead of raising.

        Args:
            text: the line.
            keep: row of the live view that also shows the text until its next line. `numbers` is shown only there,
                because it changes too often to scroll.
        """
        stamped = f"{time.strftime('%H:%M:%S')} {text}"
        if self._view is not None and keep:
            self._view.rows[keep] = self._printable(text)
        try:
            if not self.quiet and (self._view is None or keep != "numbers"):
                self.console.print(self._printable(stamped))
            if self._log is not None:
                self._log.write(stamped + "\n")
                self._log.flush()
        except OSError:
            self.quiet = True

    def start_view(self, update: int, total_updates: int) -> None:
        """Show the live view if the console is a terminal."""
        if self._use_view:
            self._view = LiveProgress(self.console, update, total_updates)
            self._view.live.start()

    def advance(self, update: int) -> None:
        """Move the progress bar, if it is shown."""
        if self._view is not None:
            self._view.update = update

    def _printable(self, text: str) -> str:
        encoding = self.console.encoding or "ascii"
        return text.encode(encoding, errors="replace").decode(encoding)


def train_line(row: Mapping[str, Any], total_updates: int, left: TimeLeft) -> str:
    """Format the console line of a training row."""
    update = row["update"]
    return (
        f"update {update:>6}/{total_updates} {100 * update / total_updates:5.1f}% ep {row['epoch']:.2f}"
        f" | loss {row['loss']:.4f} | lr {row['learning_rate']:.2e} | grad {row['gradient_norm']:.2f}"
        f" | {tokens_text(row['tokens_per_s'])} tok/s {row['update_s']:.3g} s/update"
        f" | mem {row['memory_mib']:.0f} MiB | eta {left.text()}"
    )


def evaluation_line(row: Mapping[str, Any], is_best: bool) -> str:
    """Format the console line of an evaluation row."""
    mark = " (best)" if is_best else ""
    terms = of_terms = ""
    if row["loss_terms"] is not None:
        terms, of_terms = f" terms {row['loss_terms']:.4f}", f", of terms {row['term_token_accuracy']:.3f}"
    best = "none so far" if row["best"] is None else f"{row['best']:.4f} at {row['best_update']}"
    return (
        f"eval   {row['update']:>6} loss {row['loss']:.4f}{mark}{terms} | token accuracy {row['token_accuracy']:.3f}{of_terms}"
        f" | best {best} | {readable(row['evaluation_s'])}"
    )


def restoration_line(row: Mapping[str, Any]) -> str:
    """Format the console line of a restoration row."""
    if row["term_rate"] is None:
        return f"restore{row['update']:>6} no masked term among {row['n_examples']} examples | span match {row['span_match']}"
    majority = row["majority_rate"]
    return (
        f"restore{row['update']:>6} term restoration {row['term_rate']:.3f}"
        f" [{row['term_rate_low']:.3f}, {row['term_rate_high']:.3f}] n={row['n']}"
        f" | majority guess {'?' if majority is None else f'{majority:.3f}'} | {readable(row['restoration_s'])}"
    )


def phase_line(verdict: Verdict) -> str:
    """Format the console line of a verdict: the phase, the reason to continue or stop, and the events."""
    return f"phase  {verdict.phase.name} {format_verdict(verdict)}"


def checkpoint_line(event: str, fields: Mapping[str, Any]) -> str:
    """Format the console line of a checkpoint event; empty for QUIET_EVENTS."""
    if event in QUIET_EVENTS:
        return ""
    if event != "save":
        return f"checkpoint {event}: " + ", ".join(f"{key} {value}" for key, value in fields.items())
    size = f"{fields['bytes'] / (1 << 20):.1f} MiB in {fields['save_s']:.2f} s"
    return f"saved  {fields['update']:>6} {fields['name']} ({fields['reason']}) {size}"


def slow_save_line(deadline_s: float) -> str:
    """Format the warning about a save that does not fit between SIGTERM and exit."""
    return (
        f"save   warning: a save takes longer than run.deadline_s {deadline_s:g}, so the newest state may not be saved after"
        " SIGTERM; raise run.deadline_s and the scheduler's grace period"
    )


def guard_line(row: Mapping[str, Any]) -> str:
    """Format the console line of a guard verdict about an update."""
    return f"guard  {row['action']}: {row['why']}; loss {row['loss']:.4g}, gradient norm {row['gradient_norm']:.4g}"


def rollback_line(from_update: int, checkpoint: str, skipped: Sequence[Sequence[int]]) -> str:
    """Format the console line of a rollback; `skipped` are [first, last] ranges of attempted updates."""
    return f"guard  rolled back from update {from_update} to {checkpoint}; attempted updates {skipped} will be skipped"


def halving_line(row: Mapping[str, Any]) -> str:
    """Format the console line of an update that is repeated with smaller micro-batches."""
    return (
        f"guard  update {row['update'] + 1} ran out of memory at micro_tokens {row['former_micro_tokens']}: gradients dropped,"
        f" repeated with micro_tokens {row['micro_tokens']}, which stays in effect"
    )


def tokens_text(tokens_per_s: float) -> str:
    """Format tokens per second in at most five characters."""
    return f"{tokens_per_s:.0f}" if tokens_per_s < 1000 else f"{tokens_per_s / 1000:.1f}k"
