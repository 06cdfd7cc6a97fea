"""The console: a live view on a terminal, stable plain lines elsewhere; every line goes to train.log.

Our own text is ASCII; text from data is printed without markup and with unknown characters replaced, so a narrow or
legacy terminal survives it.

The live view, a bar with the numbers of the last updates and the last word of everything else, stands below the lines that
scroll away and is gone when the run ends. Rows are folded at the width of the terminal, by cells and not by characters, and
samples are cut there, so Chinese text and narrow windows keep its shape.
"""

import sys
import time
from collections.abc import Iterator, Mapping
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
from resilient_t5.training.telemetry.timing import Left, readable

REFRESH_PER_S = 4
KEPT_ROWS = ("numbers", "phase", "restore", "sample")
"""The rows below the bar, in this order; a row that nothing was said for is left out."""


class LiveProgress:
    """The bar and the kept rows; `rich` paints it from a thread of its own, this class only holds what to paint."""

    def __init__(self, console: RichConsole, update: int, total_updates: int):
        self.update, self.total_updates = update, total_updates
        self._rows: dict[str, str] = {}
        self._live = Live(self, console=console, refresh_per_second=REFRESH_PER_S, transient=True)

    def start(self) -> None:
        """Show it."""
        self._live.start()

    def stop(self) -> None:
        """Take it away; what scrolled by above stays."""
        self._live.stop()

    def advance(self, update: int) -> None:
        """Move the bar; costs next to nothing, the painter looks a few times a second."""
        self.update = update

    def keep(self, row: str, text: str) -> None:
        """Show `text` in a row of KEPT_ROWS until the next one."""
        self._rows[row] = text

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> Iterator[RenderableType]:
        """The view as rich paints it."""
        table: Any = Table.grid(expand=True, padding=(0, 1))
        table.add_column(no_wrap=True)
        table.add_column(ratio=1)
        table.add_column(no_wrap=True)
        share = self.update / max(1, self.total_updates)
        bar = ProgressBar(total=max(1, self.total_updates), completed=self.update)
        table.add_row(Text(f"update {self.update}/{self.total_updates}"), bar, Text(f"{share:6.1%}"))
        yield table
        for row in KEPT_ROWS:
            if row in self._rows:
                cut = row == "sample"
                yield Text(self._rows[row], no_wrap=cut, overflow="ellipsis" if cut else "fold")


class Console:
    """Prints the lines of a run and, on a terminal, keeps one live view below them.

    Args:
        mode: `auto`, `live`, `plain` or `quiet`, as in the configuration.
        log: file that gets every line, with a time stamp; None writes no file.
    """

    def __init__(self, mode: str, log: Path | None):
        self.quiet = mode == "quiet"
        self.console = RichConsole(file=sys.stdout, markup=False, highlight=False, soft_wrap=True)
        self._live = not self.quiet and (mode == "live" or (mode == "auto" and self.console.is_terminal))
        self._log = None if log is None else log.open("a", encoding="utf-8")
        self._view: LiveProgress | None = None

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._view is not None:
            self._view.stop()
        if self._log is not None:
            self._log.close()

    def line(self, text: str, *, keep: str = "") -> None:
        """Print one line, with the time of day; a terminal or disk that is gone never ends a run.

        Args:
            text: the line.
            keep: row of the live view that also holds the text until its next line; `numbers` stands there only, since
                it comes too often to scroll by.
        """
        stamped = f"{time.strftime('%H:%M:%S')} {text}"
        if self._view is not None and keep:
            self._view.keep(keep, self._printable(text))
        try:
            if not self.quiet and (self._view is None or keep != "numbers"):
                self.console.print(self._printable(stamped))
            if self._log is not None:
                self._log.write(stamped + "\n")
                self._log.flush()
        except OSError:
            self.quiet = True

    def begin(self, update: int, total_updates: int) -> None:
        """Show the live view of a run that stands at `update`, where there is a terminal for it."""
        if self._live:
            self._view = LiveProgress(self.console, update, total_updates)
            self._view.start()

    def advance(self, update: int) -> None:
        """Move the bar of the live view, if there is one."""
        if self._view is not None:
            self._view.advance(update)

    def _printable(self, text: str) -> str:
        """`text` with what this terminal cannot write replaced."""
        encoding = self.console.encoding or "ascii"
        return text.encode(encoding, errors="replace").decode(encoding)


def train_line(row: Mapping[str, Any], total_updates: int, left: Left) -> str:
    """The console line of a training row."""
    update = row["update"]
    return (
        f"update {update:>6}/{total_updates} {100 * update / total_updates:5.1f}% ep {row['epoch']:.2f}"
        f" | loss {row['loss']:.4f} | lr {row['learning_rate']:.2e} | grad {row['gradient_norm']:.2f}"
        f" | {tokens_text(row['tokens_per_s'])} tok/s {row['update_s']:.3g} s/update"
        f" | mem {row['memory_mib']:.0f} MiB | eta {left.text()}"
    )


def evaluation_line(row: Mapping[str, Any], is_best: bool) -> str:
    """The console line of an evaluation row."""
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
    """The console line of a restoration row."""
    if row["term_rate"] is None:
        return f"restore{row['update']:>6} no masked term among {row['n_examples']} examples | span match {row['span_match']}"
    majority = row["majority_rate"]
    return (
        f"restore{row['update']:>6} term restoration {row['term_rate']:.3f}"
        f" [{row['term_rate_low']:.3f}, {row['term_rate_high']:.3f}] n={row['n']}"
        f" | majority guess {'?' if majority is None else f'{majority:.3f}'} | {readable(row['restoration_s'])}"
    )


def phase_line(verdict: Verdict) -> str:
    """The console line of a verdict: the phase, why the run goes on or stops, and what happened beside that."""
    return f"phase  {verdict.phase.name} {format_verdict(verdict)}"


def tokens_text(tokens_per_s: float) -> str:
    """Tokens a second in at most five characters."""
    return f"{tokens_per_s:.0f}" if tokens_per_s < 1000 else f"{tokens_per_s / 1000:.1f}k"
