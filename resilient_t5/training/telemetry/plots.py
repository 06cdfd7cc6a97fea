"""Pictures of a replayed run and of resilience curves, drawn with matplotlib as PNG, SVG or PDF.

matplotlib is imported inside the functions, since its import takes most of a second. Only its object-oriented interface
is used, so there is no global figure and no display.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from resilient_t5.errors import StorageError
from resilient_t5.training.convergence.phases import Phase
from resilient_t5.training.convergence.replay import Replay, ReplayComparison, lowest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from resilient_t5.restoration.scoring.resilience import Curve

FORMATS = {".svg": "svg", ".pdf": "pdf"}
"""Format by the suffix of the path; any other suffix is written as PNG."""
FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "SimHei",
    "PingFang SC",
)
"""Font families by preference; the later ones are used for Chinese text where they are installed."""
PHASE_COLORS = {
    Phase.WARMUP: "#e9ecef",
    Phase.OBSERVE: "#e0ecfa",
    Phase.DESCENT: "#ddf3e2",
    Phase.PLATEAU: "#fff0cd",
    Phase.SECONDARY_CONVERGENCE: "#bae6c9",
    Phase.COOLDOWN: "#cbe9eb",
    Phase.SATURATED: "#fad6d6",
    Phase.STOPPED: "#f0aaaa",
}
EVALUATION, TRAINING, RESTORATION, ANCHOR = "#1c559e", "#8a94a3", "#6a4c93", "#c86e14"
BEST, STOP, OTHER, PATIENCE = "#187a3e", "#c01c28", "#7a2c82", "#d69e2e"
MODEL_COLORS = (EVALUATION, STOP, BEST, RESTORATION, ANCHOR, "#5a5a5a")
MARKED_WINDOWS = 150
"""Up to this many evaluations each one has a marker."""


@contextmanager
def new_figure(width: float, height: float, path: Path) -> Iterator["Figure"]:
    """Yield an empty figure of `width` x `height` inches and write it to `path` at the end.

    Raises:
        StorageError: the file cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import fontManager

    installed = set(fontManager.get_font_names())
    style = matplotlib.rc_context(
        {
            "font.family": [name for name in FONTS if name in installed],
            "text.parse_math": False,
            "axes.grid": True,
            "grid.color": "#e4e7eb",
        }
    )
    with style, warnings.catch_warnings():
        # A character that no installed font has is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        try:
            figure.savefig(path, format=FORMATS.get(path.suffix.lower(), "png"), dpi=110)
        except OSError as error:
            raise StorageError(f"cannot write the picture: {error.strerror}", where=str(path), hint="Name it: --png") from None


def draw_replay(result: Replay, path: Path, other: ReplayComparison | None = None) -> None:
    """Draw the losses of a run with its phases, best and stop, and the patience used; optionally the stop of another rule.

    Raises:
        StorageError: the file cannot be written.
    """
    rules = result.rules
    with new_figure(13, 7.5, path) as figure:
        figure.suptitle(result.curve.name[:110], x=0.01, ha="left", fontsize=15)
        loss, patience = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1))
        loss.set_title(
            f"start {rules.start:,}, judged from {rules.judge_from:,}, patience {rules.patience} windows of {rules.every:,} "
            f"updates, counted gain {rules.min_gain:g} or {100 * rules.min_gain_rel:g} % ({rules.anchor_rule})",
            loc="left",
            fontsize=10,
        )
        _shade_phases(loss, patience, result)
        _plot_losses(loss, result)
        _plot_restoration(loss, result)
        _mark_decisions(loss, result)
        if other is not None:
            _mark_other(loss, other)
        _plot_patience(patience, result)
        patience.set_xlim(result.windows[0].update - 0.5 * rules.every, result.windows[-1].update + 0.5 * rules.every)
        figure.legend(loc="outside lower center", ncols=4, frameon=False)


def _shade_phases(loss: "Axes", patience: "Axes", result: Replay) -> None:
    """Shade each phase from the evaluation that began it to the one that ended it, the last one by half a window."""
    updates = [verdict.update for verdict in result.verdicts]
    ends = [*updates[1:], updates[-1] + 0.5 * result.rules.every]
    labelled: set[Phase] = set()
    for phase, members in groupby(zip(result.verdicts, ends, strict=True), key=lambda member: member[0].phase):
        span = list(members)
        label = None if phase in labelled else phase.name.replace("_", " ")
        labelled.add(phase)
        for axes in (loss, patience):
            axes.axvspan(
                span[0][0].update, span[-1][1], color=PHASE_COLORS[phase], linewidth=0, label=label if axes is loss else None
            )


def _plot_losses(axes: "Axes", result: Replay) -> None:
    windows, done = result.windows, len(result.verdicts)
    marker = "o" if len(windows) <= MARKED_WINDOWS else None
    updates = [window.update for window in windows]
    losses = [window.loss if math.isfinite(window.loss) else math.nan for window in windows]
    axes.plot(updates[:done], losses[:done], color=EVALUATION, marker=marker, markersize=4, label="evaluation loss", zorder=3)
    if done < len(windows):
        axes.plot(updates[done - 1 :], losses[done - 1 :], color=EVALUATION, alpha=0.4, label="after the stop")
    if any(window.loss_se for window in windows):
        low, high = ([w.loss + sign * (w.loss_se or 0.0) for w in windows] for sign in (-1, 1))
        axes.fill_between(updates, low, high, color=EVALUATION, alpha=0.2, linewidth=0, label="standard error")
    training = [(w.update, w.train_loss) for w in windows if w.train_loss is not None and math.isfinite(w.train_loss)]
    if training:
        axes.plot(*zip(*training, strict=True), color=TRAINING, label="training loss")
    anchors = [(v.update, anchor) for v in result.verdicts if (anchor := v.statistics["anchor"]) is not None]
    if anchors:
        axes.step(*zip(*anchors, strict=True), where="post", color=ANCHOR, linestyle=":", label="last counted loss")
    missing = [window.update for window in windows if not math.isfinite(window.loss)]
    if missing:
        axes.plot(missing, [0.98] * len(missing), "x", color=STOP, transform=axes.get_xaxis_transform(), label="not finite")
    _use_log_scale(axes, losses)
    axes.set_ylabel("loss (nats per target token)")


def _use_log_scale(axes: "Axes", losses: Sequence[float]) -> None:
    """Use a logarithmic y axis where the evaluation losses are positive and span more than a decade."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite or min(finite) <= 0 or max(finite) / min(finite) <= 10:
        return
    from matplotlib.ticker import LogLocator, NullFormatter

    lowest_drawn = axes.dataLim.y0 if axes.dataLim.y0 > 0 else min(finite)
    axes.set_yscale("log")
    # A training loss may be many decades below the evaluation losses.
    axes.set_ylim(0.8 * max(lowest_drawn, min(finite) / 5), 1.3 * max(finite))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if max(finite) / min(finite) < 1000 else (1.0,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _plot_restoration(axes: "Axes", result: Replay) -> None:
    rates = [(w.update, 100 * w.series["term_restoration"]) for w in result.windows if "term_restoration" in w.series]
    if not rates:
        return
    right = axes.twinx()
    right.plot(*zip(*rates, strict=True), color=RESTORATION, linestyle="--", marker=".", label="term restoration")
    right.set_ylim(0, max(5.0, 1.1 * max(rate for _, rate in rates)))
    right.set_ylabel("term restoration (%)", color=RESTORATION)
    right.grid(visible=False)


def _mark_decisions(axes: "Axes", result: Replay) -> None:
    """Mark second descents, the best, the stop, and a lowest loss that came after the stop."""
    second = [verdict.update for verdict in result.verdicts if "secondary_convergence" in verdict.events]
    for number, update in enumerate(second):
        axes.axvline(update, color=BEST, linestyle=":", label=None if number else "secondary convergence")
    if (best := result.best) is not None:
        _mark(axes, best.update, best.loss, BEST, "best")
    if (stopped := result.stopped) is not None:
        axes.axvline(stopped.update, color=STOP, linewidth=2, label=f"stop: {stopped.stop} at {stopped.update:,}")
    least = lowest(result.curve.losses, len(result.windows))
    if least >= len(result.verdicts):
        _mark(axes, result.windows[least].update, result.windows[least].loss, STOP, "not reached", "s")


def _mark_other(axes: "Axes", other: ReplayComparison) -> None:
    stopped, best = other.replay.stopped, other.replay.best
    if stopped is not None:
        label = f"{other.name} stops: {stopped.stop} at {stopped.update:,}"
        axes.axvline(stopped.update, color=OTHER, linewidth=2, linestyle="--", label=label)
    if best is not None:
        _mark(axes, best.update, best.loss, OTHER, f"{other.name} keeps", "D")


def _mark(axes: "Axes", update: int, loss: float, color: str, label: str, marker: str = "o") -> None:
    """Mark a loss; only a circle is filled, so that other marks around it remain visible."""
    size, fill = (9, "full") if marker == "o" else (13, "none")
    label = f"{label}: {loss:.4g} at {update:,}"
    axes.plot(update, loss, marker, color=color, markersize=size, fillstyle=fill, zorder=4, label=label)


def _plot_patience(axes: "Axes", result: Replay) -> None:
    from matplotlib.ticker import MaxNLocator

    patience = result.rules.patience
    used = [verdict.statistics["plateau"] or 0.0 for verdict in result.verdicts]
    axes.bar([verdict.update for verdict in result.verdicts], used, width=0.7 * result.rules.every, color=PATIENCE, zorder=3)
    axes.axhline(patience, color=STOP, linestyle="--", linewidth=1)
    axes.set_ylim(0, 1.15 * patience)
    axes.set_ylabel("patience used\n(windows)")
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_xlabel("update")
    axes.xaxis.set_major_formatter("{x:,.0f}")


DAMAGE_LABELS = {
    "masks": "tokens masked (%)",
    "noise": "visible tokens with noise (%), masks as trained",
    "both": "tokens masked and with noise (%)",
}


def draw_resilience(models: "Sequence[tuple[str, Sequence[Curve]]]", path: Path) -> None:
    """Draw the term restoration rate of each model over the damage, one panel for each kind of damage.

    Args:
        models: (name, curves) of each model; all have the same kinds of damage in the same order.
        path: .png, .svg or .pdf.

    Raises:
        StorageError: the file cannot be written.
    """
    count = max(len(curves) for _, curves in models)
    with new_figure(5 * count, 5 + 0.25 * len(models), path) as figure:
        figure.suptitle("Resilience: masked terms restored exactly, on unseen documents", x=0.01, ha="left", fontsize=15)
        panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
        for number, axes in enumerate(panels):
            for index, (name, curves) in enumerate(models):
                areas = ", ".join(f"{curve.damage} {curve.area:.3f}" for curve in curves)
                label = f"{name} (area: {areas})" if number == 0 else None
                _plot_curve(axes, curves[number], MODEL_COLORS[index % len(MODEL_COLORS)], label)
            axes.set_xlabel(DAMAGE_LABELS[models[0][1][number].damage])
            axes.set_xlim(left=-1)
        panels[0].set_ylim(0, 1.03)
        panels[0].set_ylabel("term restoration rate, 95 % interval\n(dashed: majority guess)")
        figure.legend(loc="outside lower left", frameon=False)


def _plot_curve(axes: "Axes", curve: "Curve", color: str, label: str | None) -> None:
    points = [point for point in curve.points if point.rate.n]
    levels = [100 * point.level for point in points]
    rates = [point.rate.rate for point in points]
    below = [max(0.0, point.rate.rate - point.rate.low) for point in points]
    above = [max(0.0, point.rate.high - point.rate.rate) for point in points]
    axes.errorbar(levels, rates, yerr=(below, above), color=color, marker="o", markersize=4, capsize=2, label=label)
    guesses = [(100 * point.level, point.majority.rate) for point in points if point.majority.n]
    if guesses:
        axes.plot(*zip(*guesses, strict=True), color=color, linestyle="--", linewidth=1)
