"""The throughput picture: a bar for every side in three panels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resilient_t5.training.telemetry.plots import INK, MUTED, Canvas, Color, text_width

WIDTH, LEFT, RIGHT, BAR = 1200, 210, 1010, 30
OURS, PEER = (24, 122, 62), (150, 178, 212)
NAMES = {
    "script": "usual script, as it is",
    "script_mended": "usual script, mended",
    "tuned_trainer": "tuned Seq2SeqTrainer",
    "ours": "resilient_t5",
    "ours_compiled": "resilient_t5, compiled",
}
PANELS = (
    ("examples a second (more is better)", "examples_per_s", "{:.2f}"),
    ("counted operations an example, GFLOP (less is better)", "gflop_per_example", "{:.0f}"),
    ("peak memory of training, MiB (less is better)", "peak_mib", "{:.0f}"),
)


def draw_throughput(result: dict[str, Any], sides: Sequence[str], path: Path) -> None:
    """Write the PNG.

    Raises:
        StorageError: it cannot be written there.
    """
    panel = 70 + len(sides) * (BAR + 10)
    canvas = Canvas(WIDTH, 110 + panel * len(PANELS))
    canvas.text(30, 34, f"Training {result['model']} on the same masked examples: {result['device']}", INK, 22)
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    canvas.text(30, 66, f"medians of {result['rounds']} interleaved rounds; {versions}", MUTED, 14)
    for number, (title, key, form) in enumerate(PANELS):
        _panel(canvas, 110 + number * panel, title, [(side, result["sides"][side], key, form) for side in sides])
    canvas.save(path)


def _panel(canvas: Canvas, top: float, title: str, rows: Sequence[tuple[str, Any, str, str]]) -> None:
    canvas.text(30, top, title, MUTED, 15)
    longest = max((figures[key] for _, figures, key, _ in rows if figures), default=1.0)
    for number, (side, figures, key, form) in enumerate(rows):
        y = top + 38 + number * (BAR + 10)
        color: Color = OURS if side.startswith("ours") else PEER
        canvas.text(LEFT - 12, y, NAMES[side], INK, 15, anchor="rm")
        if figures is None:
            canvas.text(LEFT, y, "does not fit into the memory given", MUTED, 15)
            continue
        end = LEFT + max(2.0, figures[key] / longest * (RIGHT - LEFT))
        canvas.box(LEFT, y - BAR / 2, end, y + BAR / 2, color)
        told = form.format(figures[key])
        canvas.text(min(end + 8, WIDTH - text_width(told, 15) - 8), y, told, INK, 15)
