"""The live view of a run on a terminal: a bar, the numbers of the last updates, and the last word of everything else.

It stands below the lines that scroll away and is gone when the run ends. Rows are folded at the width of the terminal, by
cells and not by characters, and samples are cut there, so Chinese text and narrow windows keep its shape.
"""

from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

REFRESH_PER_S = 4
KEPT_ROWS = ("numbers", "phase", "restore", "sample")
"""The rows below the bar, in this order; a row that nothing was said for is left out."""


class LiveView:
    """The bar and the kept rows; `rich` paints it from a thread of its own, this class only holds what to paint."""

    def __init__(self, console: Console, update: int, total_updates: int):
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

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
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
