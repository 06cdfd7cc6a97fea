"""A small canvas for diagrams: axes with round ticks, lines, bands, marks and text, written as PNG.

Everything is drawn at twice its size and scaled down, which smooths the lines. Pillow comes along with tensorboard;
its built-in font covers Latin text, so names in other scripts are shown as question marks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from resilient_t5.errors import StorageError

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
            raise StorageError(f"cannot write the picture: {error.strerror}", where=str(path), mend="Name it: --png") from None


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
