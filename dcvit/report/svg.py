"""Drawing primitives: an SVG element tree, scales, markers and axes.

Colours are CSS classes, which the page defines for light and dark mode. Text keeps its own size, so each drawing is
made for the width at which it is shown and is never scaled.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal
from xml.etree import ElementTree

__all__ = ["Box", "Marker", "Scale", "Svg", "axes", "finite", "text_width"]

Marker = Literal["circle", "ring", "dot", "diamond", "triangle"]
"""Shapes of a point: `ring` is hollow, `dot` is small. Kinds of point differ in shape, not only in colour."""

CHARACTER = 7.2
"""A generous width of an average character of the labels, which are 12 units high."""

LARGEST = 1e100
"""Largest value that is drawn. Larger values are left out like infinite ones; values below its inverse count as 0."""

LOG_FROM = 5.0
"""Smallest ratio of the largest to the smallest value for which a logarithmic scale is used."""


def text_width(text: str) -> float:
    """Estimate the width of a label."""
    return CHARACTER * len(text)


def finite(values: Iterable[float | None]) -> list[float]:
    """Return the values that can be drawn."""
    return [value for value in values if value is not None and abs(value) < LARGEST]


class Svg:
    """A drawing.

    Args:
        width: Width in CSS pixels.
        height: Height in CSS pixels.
        label: Description of the drawing for screen readers.
    """

    def __init__(self, width: float, height: float, label: str) -> None:
        self.width = width
        size = {"width": _text(width), "height": _text(height), "viewBox": f"0 0 {_text(width)} {_text(height)}"}
        self._root = ElementTree.Element("svg", {**size, "role": "img", "aria-label": label})

    def add(self, tag: str, css: str, *, title: str = "", text: str = "", **attributes: float | str) -> None:
        """Add an element.

        Args:
            tag: SVG name of the element.
            css: CSS classes.
            title: Text that is shown when the pointer is on the element.
            text: Text content.
            **attributes: Further attributes; `_` in a name stands for `-`.
        """
        values = {name.replace("_", "-"): _text(value) for name, value in attributes.items()}
        element = ElementTree.SubElement(self._root, tag, {"class": css, **values})
        element.text = text
        if title:
            ElementTree.SubElement(element, "title").text = title

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str) -> None:
        """Add a straight line."""
        self.add("line", css, x1=x1, y1=y1, x2=x2, y2=y2)

    def path(self, points: Sequence[tuple[float, float]], css: str) -> None:
        """Add a line through points."""
        self.add("path", css, d="M" + "L".join(f"{_text(x)} {_text(y)}" for x, y in points))

    def rect(self, x: float, y: float, width: float, height: float, css: str, title: str = "") -> None:
        """Add a rectangle."""
        self.add("rect", css, title=title, x=x, y=y, width=max(width, 0.0), height=max(height, 0.0), rx=2)

    def label(self, x: float, y: float, text: str, css: str = "label", anchor: str = "start") -> None:
        """Add a line of text; y is its baseline."""
        self.add("text", css, text=text, x=x, y=y, text_anchor=anchor)

    def marker(self, kind: Marker, x: float, y: float, css: str, title: str = "") -> None:
        """Add a point."""
        if kind == "diamond":
            self.add("path", css, title=title, d=f"M{_text(x)} {_text(y - 7)}l7 7l-7 7l-7 -7z")
        elif kind == "triangle":
            self.add("path", css, title=title, d=f"M{_text(x)} {_text(y - 6)}l6.5 11h-13z")
        else:
            css = f"{css} ring" if kind == "ring" else css
            self.add("circle", css, title=title, cx=x, cy=y, r=3 if kind == "dot" else 5)

    def markup(self) -> str:
        """Return the drawing as an element of an HTML page."""
        return ElementTree.tostring(self._root, encoding="unicode")


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic mapping from values to positions.

    Attributes:
        low: The value at `start`.
        high: The value at `stop`.
        start: Position of the low end.
        stop: Position of the high end.
        log: Whether the scale is logarithmic.
    """

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    @classmethod
    def over(
        cls, values: Iterable[float | None], start: float, stop: float, *, log: bool = False, zero: bool = False
    ) -> "Scale":
        """Return a scale that shows the values with a small margin around them.

        Args:
            values: The values to show.
            start: Position of the low end.
            stop: Position of the high end.
            log: Whether to use a logarithmic scale if the values are positive and far enough apart.
            zero: Whether to begin at zero.
        """
        known = finite(values) or [0.0, 1.0]
        low, high = (0.0 if abs(end) < 1 / LARGEST else end for end in (min(known), max(known)))
        if log and low > 0 and high / low >= LOG_FROM:
            air = (high / low) ** 0.06
            return cls(low / air, high * air, start, stop, log=True)
        if zero:
            return cls(0.0, 1.06 * high if high > 0 else 1.0, start, stop)
        air = 0.08 * (high - low) or 0.08 * abs(high) or 1.0
        return cls(low - air, high + air, start, stop)

    def __call__(self, value: float) -> float:
        """Return the position of a value."""
        transform = math.log if self.log else float
        low, high = transform(self.low), transform(self.high)
        if low == high:  # unequal integers can become equal floats
            return self.start
        return self.start + (transform(value) - low) / (high - low) * (self.stop - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Return round values on the scale, at most about `most` of them."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for multiples in (range(1, 10), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
                found = [multiple * 10.0**decade for decade in decades for multiple in multiples]
                found = [value for value in found if self.low <= value <= self.high]
                if len(found) <= most:
                    return found
            return found[:: -(-len(found) // most)]
        rough = (self.high - self.low) / most
        magnitude = 10.0 ** math.floor(math.log10(rough))
        step = next(multiple * magnitude for multiple in (1, 2, 5, 10) if multiple * magnitude >= rough * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]


@dataclass(frozen=True)
class Box:
    """The part of a drawing between the axes."""

    left: float
    top: float
    right: float
    bottom: float


def axes(
    svg: Svg,
    box: Box,
    y: Scale,
    y_label: str,
    x_label: str,
    x_ticks: Sequence[tuple[float, str]],
) -> None:
    """Draw grid, ticks and labels.

    Args:
        svg: The drawing.
        box: The part of the drawing between the axes.
        y: The scale of the vertical axis.
        y_label: Label of the vertical axis, drawn above it.
        x_label: Label of the horizontal axis, drawn below it.
        x_ticks: Positions on the horizontal axis and their labels. If labels would touch, some are left out.
    """
    for value in y.ticks():
        svg.line(box.left, y(value), box.right, y(value), "grid")
        svg.label(box.left - 6, y(value) + 4, f"{value:g}", anchor="end")
    svg.line(box.left, box.bottom, box.right, box.bottom, "axis")
    widest = max((text_width(text) for _, text in x_ticks), default=0.0) + 8
    apart = min((b - a for (a, _), (b, _) in pairwise(x_ticks)), default=widest)
    every = max(1, math.ceil(widest / apart)) if apart > 0 else 1
    for position, text in x_ticks[::every]:
        svg.line(position, box.bottom, position, box.bottom + 4, "axis")
        svg.label(position, box.bottom + 17, text, anchor="middle")
    suffix = " (log)" if y.log else ""
    svg.label(2, 12, y_label + suffix, "label strong")
    svg.label((box.left + box.right) / 2, box.bottom + 35, x_label, "label strong", anchor="middle")


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
