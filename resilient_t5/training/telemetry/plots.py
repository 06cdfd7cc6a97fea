"""Pictures as PNG: of a replay, of the frontier of a comparison, and of the resilience curves of models.

A replay shows windows, phases, second descent and stop. Resilience curves have one panel for each kind of damage.

`Canvas` is a small canvas for diagrams: axes with round ticks, lines, bands, marks and text. Everything is drawn at twice
its size and scaled down, which smooths the lines. Pillow comes along with tensorboard; its built-in font covers Latin text,
so names in other scripts are shown as question marks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from resilient_t5.errors import StorageError
from resilient_t5.training.convergence.phases import Phase
from resilient_t5.training.convergence.replay import Replay, ReplayComparison, lowest
from resilient_t5.training.convergence.scoring import Comparison, Summary, summary
from resilient_t5.training.convergence.trend import HORIZON_WINDOWS

if TYPE_CHECKING:
    from resilient_t5.restoration.scoring.resilience import Curve, Point

SCALE = 2
INK, MUTED, GRID, PAPER = (33, 37, 41), (108, 117, 125), (228, 231, 235), (255, 255, 255)
Color = tuple[int, int, int]


@dataclass(frozen=True)
class Axes:
    """A rectangle on the canvas, in pixels, and the data range that it shows."""

    left: float
    top: float
    right: float
    bottom: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        """Pixels of `value`; outside the range it lies outside the rectangle."""
        low, high = self.x_range
        return self.left + (value - low) / ((high - low) or 1.0) * (self.right - self.left)

    def y(self, value: float) -> float:
        """Pixels of `value`, held within the rectangle."""
        low, high = self.y_range
        share = (value - low) / ((high - low) or 1.0)
        return self.bottom - min(max(share, 0.0), 1.0) * (self.bottom - self.top)

    def shows(self, value: float) -> bool:
        """Whether `value` lies within the range drawn."""
        return self.y_range[0] <= value <= self.y_range[1]


class Canvas:
    """A white page of `width` x `height` pixels."""

    def __init__(self, width: int, height: int):
        self.size = (width, height)
        self._image = Image.new("RGB", (width * SCALE, height * SCALE), PAPER)
        self._draw = ImageDraw.Draw(self._image)

    def line(self, points: Sequence[tuple[float, float]], color: Color, width: float = 1.5, dash: float = 0.0) -> None:
        """A line through `points`; with `dash` pixels on and off."""
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        pixels = max(1, round(width * SCALE))
        if not dash:
            self._draw.line(scaled, fill=color, width=pixels, joint="curve")
            return
        for (x1, y1), (x2, y2) in zip(scaled[:-1], scaled[1:], strict=True):
            length = math.hypot(x2 - x1, y2 - y1)
            for number in range(math.ceil(length / (2 * dash * SCALE))):
                begin = 2 * dash * SCALE * number / length
                end = min(1.0, begin + dash * SCALE / length)
                ends = [(x1 + (x2 - x1) * share, y1 + (y2 - y1) * share) for share in (begin, end)]
                self._draw.line(ends, fill=color, width=pixels)

    def area(self, points: Sequence[tuple[float, float]], color: Color) -> None:
        """A filled polygon."""
        self._draw.polygon([(x * SCALE, y * SCALE) for x, y in points], fill=color)

    def box(self, left: float, top: float, right: float, bottom: float, color: Color) -> None:
        """A filled rectangle."""
        self._draw.rectangle((left * SCALE, top * SCALE, right * SCALE, bottom * SCALE), fill=color)

    def dot(self, x: float, y: float, radius: float, color: Color, hollow: bool = False) -> None:
        """A disc, or a ring with a white middle."""
        where = ((x - radius) * SCALE, (y - radius) * SCALE, (x + radius) * SCALE, (y + radius) * SCALE)
        self._draw.ellipse(where, fill=PAPER if hollow else color, outline=color, width=2 * SCALE)

    def text(self, x: float, y: float, text: str, color: Color = INK, size: int = 14, *, anchor: str = "lm") -> None:
        """One line; `anchor` is Pillow's: horizontal l, m, r and vertical t, m, b."""
        self._draw.text((x * SCALE, y * SCALE), _latin(text), fill=color, font=_font(size), anchor=anchor)

    def tag(self, x: float, y: float, text: str, color: Color, size: int = 13, *, anchor: str = "lm") -> None:
        """Text on a white label, legible above lines; kept on the page."""
        width = text_width(text, size)
        left = x - {"l": 0.0, "m": width / 2, "r": width}[anchor[0]]
        left = min(max(left, 6.0), self.size[0] - width - 6.0)
        self.box(left - 4, y - size * 0.75, left + width + 4, y + size * 0.75, PAPER)
        self.text(left, y, text, color, size)

    def frame(self, axes: Axes, title: str = "", ticks: int = 5) -> None:
        """Horizontal grid with numbers on the left, a title above, and the bottom line."""
        for value in round_ticks(*axes.y_range, ticks):
            self.line([(axes.left, axes.y(value)), (axes.right, axes.y(value))], GRID, 1)
            self.text(axes.left - 8, axes.y(value), f"{value:.6g}", MUTED, 13, anchor="rm")
        self.line([(axes.left, axes.bottom), (axes.right, axes.bottom)], MUTED, 1)
        self.text(axes.left, axes.top - 12, title, MUTED, 13)

    def x_numbers(self, axes: Axes, title: str, ticks: int = 10) -> None:
        """Numbers and a title below."""
        for value in round_ticks(*axes.x_range, ticks):
            self.line([(axes.x(value), axes.bottom), (axes.x(value), axes.bottom + 5)], MUTED, 1)
            self.text(axes.x(value), axes.bottom + 9, f"{value:,.6g}", MUTED, 13, anchor="mt")
        self.text((axes.left + axes.right) / 2, axes.bottom + 30, title, MUTED, 13, anchor="mt")

    def save(self, path: Path) -> None:
        """Write the PNG.

        Raises:
            StorageError: it cannot be written there.
        """
        try:
            self._image.resize(self.size, Image.Resampling.LANCZOS).save(path, format="PNG", optimize=True)
        except OSError as error:
            raise StorageError(f"cannot write the picture: {error.strerror}", where=str(path), hint="Name it: --png") from None


def text_width(text: str, size: int) -> float:
    """Width of one line in pixels."""
    return _font(size).getlength(_latin(text)) / SCALE


def round_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    raw = span / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    gap = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / gap - 1e-9), math.floor(high / gap + 1e-9)
    return [number * gap for number in range(first, last + 1)]


def _latin(text: str) -> str:
    return text.encode("latin-1", errors="replace").decode("latin-1")


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * SCALE)


WIDTH, HEIGHT, LEFT, RIGHT = 1500, 980, 90, 1465
BAND: dict[Phase, Color] = {
    Phase.WARMUP: (233, 236, 239),
    Phase.OBSERVE: (224, 236, 250),
    Phase.DESCENT: (221, 243, 226),
    Phase.PLATEAU: (255, 240, 205),
    Phase.SECONDARY_CONVERGENCE: (186, 230, 201),
    Phase.COOLDOWN: (203, 233, 235),
    Phase.SATURATED: (250, 214, 214),
    Phase.STOPPED: (240, 170, 170),
}
EVALUATION, FORGONE, TRAINING, GAIN = (28, 85, 158), (150, 178, 212), (176, 184, 196), (106, 76, 147)
ANCHOR, USED, INTERVAL, ERROR = (200, 110, 20), (214, 158, 46), (219, 210, 232), (226, 236, 248)
STOP, BEST, SECOND, UNTRAINED, OTHER = (192, 28, 40), (24, 122, 62), (20, 108, 60), (244, 245, 247), (122, 44, 130)


def draw_replay(result: Replay, path: Path, beside: ReplayComparison | None = None) -> None:
    """Three panels above one axis of updates: losses, patience used, projected gain; and where another rule stops."""
    windows, rules = result.windows, result.rules
    x_range = (windows[0].update - 0.5 * rules.every, windows[-1].update + 0.5 * rules.every)
    values = [window.loss for window in windows if math.isfinite(window.loss)]
    loss = Axes(LEFT, 150, RIGHT, 610, x_range, _loss_range(values))
    patience = Axes(LEFT, 668, RIGHT, 752, x_range, (0, rules.patience * 1.15))
    gain = Axes(LEFT, 810, RIGHT, 905, x_range, _gain_range(result))
    canvas = Canvas(WIDTH, HEIGHT)
    for axes in (loss, patience, gain):
        _bands(canvas, axes, result)
    canvas.frame(loss, "loss (nats per target token)", 7)
    canvas.frame(patience, f"judged windows without a counted gain (patience {rules.patience})", 2)
    canvas.frame(gain, f"projected gain over {HORIZON_WINDOWS} windows with its 80 % interval; dashed: worth waiting for", 3)
    canvas.x_numbers(gain, "update")
    _losses(canvas, loss, result)
    _patience(canvas, patience, result)
    _gain(canvas, gain, result)
    if beside is not None:
        _other_stop(canvas, (loss, patience, gain), beside)
    _marks(canvas, (loss, patience, gain), result)
    _head(canvas, result)
    canvas.save(path)


def _loss_range(values: Sequence[float]) -> tuple[float, float]:
    """All but a steep beginning: what lies above is drawn at the upper edge."""
    if not values:
        return 0.0, 1.0
    ordered = sorted(values)
    low, upper = ordered[0], ordered[math.ceil(0.9 * len(ordered)) - 1]
    high = min(ordered[-1], upper + 0.6 * (upper - low))
    margin = 0.06 * (high - low) or abs(low) * 0.05 or 1.0
    return low - 2 * margin, high + margin


def _gain_range(result: Replay) -> tuple[float, float]:
    known = [(verdict.phase, gain) for verdict in result.verdicts if (gain := verdict.statistics["gain"]) is not None]
    # The steep beginning would flatten what the judgement looks at.
    gains = sorted(gain for phase, gain in known if phase > Phase.OBSERVE) or sorted(gain for _, gain in known)
    if not gains:
        return -1.0, 1.0
    middle = gains[len(gains) // 10 : len(gains) - len(gains) // 10] or gains
    far = max(abs(value) for value in middle) * 1.6 or 1e-3
    return -far, far


def _bands(canvas: Canvas, axes: Axes, result: Replay) -> None:
    """The phase of each window, from half-way before it to half-way after it; what was never trained is plain grey."""
    half = 0.5 * result.rules.every
    for window, verdict in zip(result.windows, result.verdicts, strict=False):
        left, right = (min(max(axes.x(edge), axes.left), axes.right) for edge in (window.update - half, window.update + half))
        canvas.box(left, axes.top, right, axes.bottom, BAND[verdict.phase])
    if len(result.verdicts) < len(result.windows):
        begin = axes.x(result.verdicts[-1].update + half)
        canvas.box(begin, axes.top, axes.right, axes.bottom, UNTRAINED)
    for window in result.windows if len(result.windows) <= 150 else ():
        canvas.line([(axes.x(window.update), axes.bottom), (axes.x(window.update), axes.bottom - 4)], MUTED, 1)


def _losses(canvas: Canvas, axes: Axes, result: Replay) -> None:
    done = len(result.verdicts)
    known = [(w.update, w.train_loss) for w in result.windows if w.train_loss is not None and axes.shows(w.train_loss)]
    train = [(axes.x(update), axes.y(value)) for update, value in known]
    if len(train) > 1:
        canvas.line(train, TRAINING, 1.5)
    rest = done - 1 if done < len(result.windows) else done
    for runs, color in ((_runs(result, rest, len(result.windows)), FORGONE), (_runs(result, 0, done), EVALUATION)):
        for run in runs:
            points = [(axes.x(update), axes.y(loss)) for update, loss in run]
            if len(points) > 1:
                canvas.line(points, color, 2.2)
            for (x, y), (_, loss) in zip(points, run, strict=True):
                if not axes.shows(loss):
                    canvas.area([(x - 5, y + 8), (x + 5, y + 8), (x, y)], color)
                elif len(result.windows) <= 150:
                    canvas.dot(x, y, 2.6, color)
    anchor = [(v.update, v.statistics["anchor"]) for v in result.verdicts]
    steps: list[tuple[float, float]] = []
    for update, level in anchor:
        if level is not None:
            steps += [(axes.x(update), steps[-1][1])] if steps else []
            steps.append((axes.x(update), axes.y(level)))
    if len(steps) > 1:
        canvas.line(steps, ANCHOR, 1.4)


def _runs(result: Replay, begin: int, end: int) -> list[list[tuple[int, float]]]:
    """Stretches of finite losses."""
    runs: list[list[tuple[int, float]]] = [[]]
    for window in result.windows[max(0, begin) : end]:
        if math.isfinite(window.loss):
            runs[-1].append((window.update, window.loss))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _patience(canvas: Canvas, axes: Axes, result: Replay) -> None:
    width = max(1.0, 0.34 * (axes.x(result.rules.every) - axes.x(0)))
    for verdict in result.verdicts:
        used = verdict.statistics["plateau"] or 0.0
        if used:
            canvas.box(axes.x(verdict.update) - width, axes.y(used), axes.x(verdict.update) + width, axes.bottom - 1, USED)
    limit = axes.y(result.rules.patience)
    canvas.line([(axes.left, limit), (axes.right, limit)], STOP, 1.3, dash=5)


def _gain(canvas: Canvas, axes: Axes, result: Replay) -> None:
    rows = [(verdict.update, verdict.statistics) for verdict in result.verdicts if verdict.statistics["gain"] is not None]
    upper = [(axes.x(update), axes.y(s["gain_high"] or 0.0)) for update, s in rows]
    lower = [(axes.x(update), axes.y(s["gain_low"] or 0.0)) for update, s in rows]
    if len(rows) > 1:
        canvas.area([*upper, *reversed(lower)], INTERVAL)
        canvas.line([(axes.x(update), axes.y(s["gain"] or 0.0)) for update, s in rows], GAIN, 2)
        canvas.line([(axes.x(update), axes.y(s["worth"] or 0.0)) for update, s in rows], INK, 1, dash=4)
    canvas.line([(axes.left, axes.y(0)), (axes.right, axes.y(0))], MUTED, 1)


def _marks(canvas: Canvas, panels: Sequence[Axes], result: Replay) -> None:
    """Second descents, the best that is kept, the lowest of the recording, and the stop."""
    axes = panels[0]
    free = axes.left
    for verdict in result.verdicts:
        if "secondary_convergence" in verdict.events or "change_point" in verdict.events:
            x = axes.x(verdict.update)
            counted = verdict.phase is Phase.SECONDARY_CONVERGENCE
            _upright(canvas, panels, x, SECOND, width=1.5 if counted else 1.0, dash=6 if counted else 2)
            text = "secondary convergence"
            if x > free and "secondary_convergence" in verdict.events:
                canvas.tag(x, axes.top + 16, text, SECOND, anchor="mm")
                free = x + text_width(text, 13) + 12
    least = lowest(result.curve.losses, 0, len(result.windows))
    if least >= len(result.verdicts):
        x, y = axes.x(result.windows[least].update), axes.y(result.windows[least].loss)
        canvas.dot(x, y, 6, STOP, hollow=True)
        canvas.tag(x, y - 20, f"never reached: {result.windows[least].loss:.4g}", STOP, anchor="mm")
    stopped = result.stopped
    if stopped is not None:
        x = axes.x(stopped.update)
        _upright(canvas, panels, x, STOP, width=2.6)
        canvas.tag(x + 8, axes.top + 44, f"stop: {stopped.stop} at {stopped.update:,}", STOP, 15)
    if result.best is not None:
        x, y = axes.x(result.best.update), axes.y(result.best.loss)
        canvas.dot(x, y, 6, BEST)
        canvas.tag(
            x,
            y + (20 if y < axes.bottom - 40 else -22),
            f"best {result.best.loss:.4g} at {result.best.update:,}",
            BEST,
            anchor="mm",
        )


def _other_stop(canvas: Canvas, panels: Sequence[Axes], beside: ReplayComparison) -> None:
    """The stop and the best of a rule that did not steer the run."""
    axes, other = panels[0], beside.replay
    if other.stopped is not None:
        x = axes.x(other.stopped.update)
        _upright(canvas, panels, x, OTHER, width=2.6, dash=9)
        canvas.tag(x + 8, axes.top + 74, f"{beside.name} stops: {other.stopped.stop} at {other.stopped.update:,}", OTHER, 15)
    if other.best is not None:
        x, y = axes.x(other.best.update), axes.y(other.best.loss)
        canvas.dot(x, y, 6, OTHER)
        canvas.tag(x, y + 20, f"{beside.name} keeps {other.best.loss:.4g} at {other.best.update:,}", OTHER, anchor="mm")


def _upright(canvas: Canvas, panels: Sequence[Axes], x: float, color: Color, *, width: float, dash: float = 0.0) -> None:
    for axes in panels:
        canvas.line([(x, axes.top), (x, axes.bottom)], color, width, dash)


def _head(canvas: Canvas, result: Replay) -> None:
    """Title, the rules, and the legend of the phases that occur."""
    rules = result.rules
    canvas.text(LEFT, 34, result.curve.name[:110], INK, 22)
    counted = f"{rules.min_gain:g} or {100 * rules.min_gain_rel:g} %"
    told = (
        f"start {rules.start:,}, judged from {rules.judge_from:,}, patience {rules.patience} windows of {rules.every:,} updates"
    )
    canvas.text(LEFT, 66, f"{told}, counted gain {counted} against the anchor ({rules.anchor_rule})", MUTED, 15)
    x = float(LEFT)
    occurring = {verdict.phase for verdict in result.verdicts}
    entries: list[tuple[Color, str, bool]] = [(BAND[p], p.name.replace("_", " "), True) for p in Phase if p in occurring]
    entries += [(EVALUATION, "evaluation loss", False), (ANCHOR, "anchor", False)]
    if any(window.train_loss is not None for window in result.windows):
        entries.append((TRAINING, "training loss", False))
    for color, name, is_band in entries:
        if is_band:
            canvas.box(x, 92, x + 22, 110, color)
        else:
            canvas.line([(x, 101), (x + 22, 101)], color, 2.4)
        canvas.text(x + 28, 101, name, INK, 13)
        x += 44 + text_width(name, 13)


def draw_frontier(comparison: Comparison, path: Path) -> None:
    """Descent forgone over updates spent: the line of anchored patience, and every rule as a dot."""
    frontier = {patience: summary(scores) for patience, scores in comparison.sweep.items()}
    rules = {name: summary(scores) for name, scores in comparison.rules.items()}
    everything = [*frontier.values(), *rules.values()]
    top = max(one.forgone_percent + one.forgone_se for one in everything) * 1.06
    low = min(one.updates_percent for one in everything)
    axes = Axes(LEFT, 120, RIGHT, 850, (max(0.0, low - 4), 102.0), (0.0, top))
    canvas = Canvas(WIDTH, 930)
    canvas.text(LEFT, 34, f"Stopping rules on {len(comparison.curves)} recorded curves", INK, 22)
    line = "line: anchored patience, its windows beside the points, with its standard error. Dots: ours filled, peers hollow"
    canvas.text(LEFT, 66, line, MUTED, 15)
    canvas.frame(axes, "descent forgone, % (mean +- standard error)", 8)
    canvas.x_numbers(axes, "updates spent, % of the recording")
    points = [(axes.x(one.updates_percent), one) for one in frontier.values()]
    upper = [(x, axes.y(one.forgone_percent + one.forgone_se)) for x, one in points]
    canvas.area([*upper, *((x, axes.y(one.forgone_percent - one.forgone_se)) for x, one in reversed(points))], ERROR)
    canvas.line([(x, axes.y(one.forgone_percent)) for x, one in points], EVALUATION, 2.4)
    for patience, one in frontier.items():
        x, y = axes.x(one.updates_percent), axes.y(one.forgone_percent)
        canvas.dot(x, y, 3, EVALUATION)
        if patience in (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30):
            canvas.text(x, y + 14, str(patience), EVALUATION, 12, anchor="mm")
    _rule_dots(canvas, axes, rules)
    canvas.save(path)


def _rule_dots(canvas: Canvas, axes: Axes, rules: dict[str, Summary]) -> None:
    """Ours filled, peers hollow; labels step aside where one already stands."""
    taken: list[tuple[float, float, float]] = []
    ours = ("seed", "thorough", "short", "seed-code")
    for name, one in sorted(rules.items(), key=lambda item: item[1].updates_percent):
        color = BEST if name.startswith(ours) else STOP
        x, y = axes.x(one.updates_percent), axes.y(one.forgone_percent)
        ends = [(x, axes.y(one.forgone_percent + side * one.forgone_se)) for side in (-1, 1)]
        canvas.line(ends, color, 1)
        canvas.dot(x, y, 5, color, hollow=not name.startswith(ours))
        width = text_width(name, 14)
        left = x + 10 if x + 10 + width < axes.right else x - 10 - width
        at = y - 16
        while any(abs(at - other) < 18 and left < right and begin < left + width for other, begin, right in taken):
            at -= 18
        taken.append((at, left, left + width))
        canvas.line([(x, y), (left, at + 4)], color, 0.8)
        canvas.text(left, at, name, color, 14)


COLORS: tuple[Color, ...] = ((28, 85, 158), (192, 28, 40), (24, 122, 62), (106, 76, 147), (200, 110, 20), (90, 90, 90))
PANEL, PANEL_GAP, PANEL_LEFT, PANEL_TOP, PANEL_HEIGHT = 430, 70, 80, 130, 380
NAMES = {"masks": "tokens masked, %", "noise": "visible tokens noised, % (masks as trained)", "both": "masked and noised, %"}


def draw_resilience(models: "Sequence[tuple[str, Sequence[Curve]]]", path: Path) -> None:
    """Draw the term restoration rate over the damage, with its 95 % interval; the majority guess is dashed.

    Args:
        models: (name, curves) of each model; all have the same kinds of damage in the same order.
        path: the PNG.

    Raises:
        StorageError: it cannot be written there.
    """
    panels = max(len(curves) for _, curves in models)
    canvas = Canvas(PANEL_LEFT + panels * (PANEL + PANEL_GAP), PANEL_TOP + PANEL_HEIGHT + 70 + 24 * len(models))
    canvas.text(PANEL_LEFT, 34, "Resilience: masked terms written back exactly, on unseen documents", INK, 22)
    legend = "bars: 95 % interval over documents; dashed: majority guess from the neighbouring words"
    canvas.text(PANEL_LEFT, 66, legend, MUTED, 15)
    for number in range(panels):
        left = PANEL_LEFT + number * (PANEL + PANEL_GAP)
        shown = [(name, curves[number]) for name, curves in models if number < len(curves)]
        highest = max(point.level for _, curve in shown for point in curve.points)
        axes = Axes(left, PANEL_TOP, left + PANEL, PANEL_TOP + PANEL_HEIGHT, (0.0, 100 * highest), (0.0, 1.0))
        canvas.frame(axes, "term restoration rate" if number == 0 else "", 5)
        canvas.x_numbers(axes, NAMES[shown[0][1].damage], 5)
        for index, (_, curve) in enumerate(shown):
            _draw_curve(canvas, axes, curve, COLORS[index % len(COLORS)])
    for index, (name, curves) in enumerate(models):
        y, color = PANEL_TOP + PANEL_HEIGHT + 72 + 24 * index, COLORS[index % len(COLORS)]
        canvas.line([(PANEL_LEFT, y), (PANEL_LEFT + 30, y)], color, 3)
        areas = ", ".join(f"{curve.damage} {curve.area:.3f}" for curve in curves)
        label = f"{name}   area: {areas}"
        canvas.text(PANEL_LEFT + 40, y, label if text_width(label, 15) < panels * PANEL else name, INK, 15)
    canvas.save(path)


def _draw_curve(canvas: Canvas, axes: Axes, curve: "Curve", color: Color) -> None:
    points: list[Point] = [point for point in curve.points if point.rate.n]
    guesses = [(axes.x(100 * point.level), axes.y(point.majority.rate)) for point in points if point.majority.n]
    if len(guesses) > 1:
        canvas.line(guesses, color, 1.2, dash=5)
    line = [(axes.x(100 * point.level), axes.y(point.rate.rate)) for point in points]
    if len(line) > 1:
        canvas.line(line, color, 2.4)
    for (x, y), point in zip(line, points, strict=True):
        canvas.line([(x, axes.y(point.rate.low)), (x, axes.y(point.rate.high))], color, 1.2)
        canvas.dot(x, y, 4, color)
