"""The throughput picture: a bar for every side in three panels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resilient_t5.training.telemetry.plots import BEST, new_figure

PEER = "#96b2d4"
NAMES = {
    "script": "usual script, as it is",
    "script_mended": "usual script, fixed",
    "tuned_trainer": "tuned Seq2SeqTrainer",
    "ours": "resilient_t5",
}
PANELS = (
    ("examples per second (more is better)", "examples_per_s", "{:.2f}"),
    ("counted operations per example, GFLOP (less is better)", "gflop_per_example", "{:.0f}"),
    ("peak memory of training, MiB (less is better)", "peak_mib", "{:.0f}"),
)


def draw_throughput(result: dict[str, Any], sides: Sequence[str], path: Path) -> None:
    """Draw the comparison of `bin/benchmark throughput`.

    Raises:
        StorageError: the file cannot be written.
    """
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    with new_figure(12, 1 + 3 * (0.6 + 0.4 * len(sides)), path) as figure:
        figure.suptitle(f"Training {result['model']} on the same masked examples: {result['device']}", x=0.01, ha="left")
        panels = figure.subplots(len(PANELS), 1)
        for axes, (title, key, number_format) in zip(panels, PANELS, strict=True):
            figures = [result["sides"][side] for side in sides]
            values = [one[key] if one else 0.0 for one in figures]
            colors = [BEST if side.startswith("ours") else PEER for side in sides]
            bars = axes.barh([NAMES[side] for side in sides], values, color=colors)
            labels = [number_format.format(one[key]) if one else "does not fit into the memory given" for one in figures]
            axes.bar_label(bars, labels, padding=4)
            axes.set_title(title, loc="left", fontsize=10)
            axes.invert_yaxis()
            axes.margins(x=0.15)
            axes.grid(visible=False)
        figure.supxlabel(f"medians of {result['rounds']} interleaved rounds; {versions}", fontsize=9)
