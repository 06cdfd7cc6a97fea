"""Picture of a comparison of stopping rules: descent forgone over updates spent."""

from pathlib import Path

from benchmarks.stopping_rules.scoring import Comparison, summary
from resilient_t5.training.telemetry.plots import BEST, EVALUATION, STOP, new_figure

OURS = ("seed", "thorough", "short", "seed-code", "given")
LABELLED_PATIENCES = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30)


def draw_frontier(comparison: Comparison, path: Path) -> None:
    """Draw anchored patience as a line with its standard error and every rule as a dot, ours filled.

    Raises:
        StorageError: the file cannot be written.
    """
    frontier = {patience: summary(scores) for patience, scores in comparison.sweep.items()}
    rules = {name: summary(scores) for name, scores in comparison.rules.items()}
    with new_figure(13, 8, path) as figure:
        axes = figure.subplots()
        axes.set_title(f"Stopping rules on {len(comparison.curves)} recorded curves", loc="left", fontsize=15)
        spent = [one.updates_percent for one in frontier.values()]
        forgone = [one.forgone_percent for one in frontier.values()]
        low, high = ([one.forgone_percent + sign * one.forgone_se for one in frontier.values()] for sign in (-1, 1))
        axes.fill_between(spent, low, high, color=EVALUATION, alpha=0.12, linewidth=0)
        axes.plot(spent, forgone, ".-", color=EVALUATION, label="anchored patience, with its windows and standard error")
        for patience in LABELLED_PATIENCES:
            one = frontier[patience]
            offset = {"xytext": (-4, -12), "textcoords": "offset points", "ha": "center", "fontsize": 8}
            axes.annotate(str(patience), (one.updates_percent, one.forgone_percent), color=EVALUATION, **offset)
        for name, one in rules.items():
            ours = name.startswith(OURS)
            axes.errorbar(
                one.updates_percent,
                one.forgone_percent,
                yerr=one.forgone_se,
                color=BEST if ours else STOP,
                marker="o",
                markerfacecolor=BEST if ours else "white",
                linewidth=0.8,
            )
        _label_rules(axes, {name: (one.updates_percent, one.forgone_percent) for name, one in rules.items()})
        axes.set_ylim(bottom=0)
        axes.set_xlabel("updates spent (% of the recording)")
        axes.set_ylabel("descent forgone (%), mean and standard error")
        axes.legend(loc="upper right")


def _label_rules(axes, points: dict[str, tuple[float, float]]) -> None:
    """Write each name above its dot, higher where another name is in the way."""
    placed: list[tuple[float, float]] = []
    for name, (x, y) in sorted(points.items(), key=lambda item: item[1]):
        at = y + 0.25
        while any(abs(at - other) < 0.28 and abs(x - left) < 9 for left, other in placed):
            at += 0.28
        placed.append((x, at))
        color = BEST if name.startswith(OURS) else STOP
        axes.annotate(
            name, (x, y), (x + 0.3, at), color=color, fontsize=9, arrowprops={"arrowstyle": "-", "color": color, "lw": 0.5}
        )
