"""The resilience curves of one or several models as a picture: one panel for each kind of damage."""

from collections.abc import Sequence
from pathlib import Path

from resilient_t5.restoration.scoring.resilience import Curve, Point
from resilient_t5.training.drawing import INK, MUTED, Axes, Canvas, Color, text_width

COLORS: tuple[Color, ...] = ((28, 85, 158), (192, 28, 40), (24, 122, 62), (106, 76, 147), (200, 110, 20), (90, 90, 90))
PANEL, GAP, LEFT, TOP, HEIGHT = 430, 70, 80, 130, 380
NAMES = {"masks": "tokens masked, %", "noise": "visible tokens noised, % (masks as trained)", "both": "masked and noised, %"}


def draw_resilience(models: Sequence[tuple[str, Sequence[Curve]]], path: Path) -> None:
    """Draw the term restoration rate over the damage, with its 95 % interval; the majority guess is dashed.

    Args:
        models: (name, curves) of each model; all have the same kinds of damage in the same order.
        path: the PNG.

    Raises:
        StorageError: it cannot be written there.
    """
    panels = max(len(curves) for _, curves in models)
    canvas = Canvas(LEFT + panels * (PANEL + GAP), TOP + HEIGHT + 70 + 24 * len(models))
    canvas.text(LEFT, 34, "Resilience: masked terms written back exactly, on unseen documents", INK, 22)
    canvas.text(LEFT, 66, "bars: 95 % interval over documents; dashed: majority guess from the neighbouring words", MUTED, 15)
    for number in range(panels):
        left = LEFT + number * (PANEL + GAP)
        shown = [(name, curves[number]) for name, curves in models if number < len(curves)]
        highest = max(point.level for _, curve in shown for point in curve.points)
        axes = Axes(left, TOP, left + PANEL, TOP + HEIGHT, (0.0, 100 * highest), (0.0, 1.0))
        canvas.frame(axes, "term restoration rate" if number == 0 else "", 5)
        canvas.x_numbers(axes, NAMES[shown[0][1].damage], 5)
        for index, (_, curve) in enumerate(shown):
            _draw_curve(canvas, axes, curve, COLORS[index % len(COLORS)])
    for index, (name, curves) in enumerate(models):
        y, color = TOP + HEIGHT + 72 + 24 * index, COLORS[index % len(COLORS)]
        canvas.line([(LEFT, y), (LEFT + 30, y)], color, 3)
        areas = ", ".join(f"{curve.damage} {curve.area:.3f}" for curve in curves)
        label = f"{name}   area: {areas}"
        canvas.text(LEFT + 40, y, label if text_width(label, 15) < panels * PANEL else name, INK, 15)
    canvas.save(path)


def _draw_curve(canvas: Canvas, axes: Axes, curve: Curve, color: Color) -> None:
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
