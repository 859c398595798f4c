"""Kinds of chart, each a function from values and a width to a drawing."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from dcvit.report.svg import Box, Marker, Scale, Svg, axes, finite, text_width

__all__ = [
    "SERIES",
    "Curve",
    "Group",
    "Point",
    "Row",
    "amount",
    "block_bars",
    "block_stages",
    "block_structure",
    "curves",
    "dot_rows",
    "marker_sample",
    "number",
    "row_bars",
    "scatter",
]

SERIES = 8
"""How many colours the page defines for curves, `s0` and on; further curves begin again and are told by their label."""

LINE_HEIGHT = 14
"""Distance of two labels that do not touch."""


@dataclass(frozen=True)
class Point:
    """A point and what is said of it where the pointer rests."""

    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Curve:
    """Points joined by a line that carries its name."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Group:
    """Points of one kind: colour (`css`), shape, and whether a line joins them."""

    css: str
    marker: Marker
    points: Sequence[Point]
    joined: bool = False


@dataclass(frozen=True)
class Row:
    """One row of dots: single values and their mean."""

    name: str
    css: str
    values: Sequence[float]
    mean: float


def number(value: float | None) -> str:
    """A value as tables and labels show it: four significant digits."""
    if value is None:
        return "–"
    if isinstance(value, int) or 10_000 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def amount(value: int) -> str:
    """A number of MACs or parameters with its unit, four significant digits."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= size:
            return f"{value / size:.4g}\N{NO-BREAK SPACE}{unit}"
    return str(value)


def marker_sample(css: str, marker: Marker) -> str:
    """A point alone, for a legend."""
    svg = Svg(16, 16, "")
    svg.marker(marker, 8, 8, css)
    return svg.markup()


def block_bars(width: float, values: Mapping[int, float], chosen: Collection[int], y_label: str) -> Svg:
    """A bar for each block, the chosen ones in colour."""
    svg, box, y = _canvas(width, 230, f"{y_label} of each candidate block", values.values(), zero=True)
    centres, pitch = _columns(box, values)
    axes(svg, box, y, y_label, "block", [(centre, str(block)) for block, centre in centres.items()])
    for block, value in values.items():
        if finite([value]):
            size = min(0.7 * pitch, 40.0)
            title = f"block {block}: {number(value)}"
            css = "accent" if block in chosen else "plain"
            svg.rect(centres[block] - size / 2, y(value), size, box.bottom - y(value), css, title)
    return svg


def block_stages(
    width: float,
    stages: Sequence[tuple[str, Marker, Mapping[int, float | None]]],
    chosen: Collection[int],
    y_label: str,
) -> Svg:
    """For each block its value at several stages, joined by a line; the chosen ones in colour.

    Args:
        width: Of the drawing.
        stages: Name, marker and values by block, in the order in which they were reached.
        chosen: The blocks in colour.
        y_label: What the values are.
    """
    label = f"{y_label} of each block: {', '.join(name for name, _, _ in stages)}"
    svg, box, y = _canvas(width, 260, label, [v for _, _, values in stages for v in values.values()], log=True)
    blocks = sorted({block for _, _, values in stages for block in values})
    centres, _ = _columns(box, blocks)
    axes(svg, box, y, y_label, "block", [(centre, str(block)) for block, centre in centres.items()])
    for block, x in centres.items():
        colour = "accent" if block in chosen else "plain"
        known = finite([values.get(block) for _, _, values in stages])
        if known:
            svg.line(x, y(min(known)), x, y(max(known)), f"{colour} stem")
        for name, marker, values in stages:
            for value in finite([values.get(block)]):
                svg.marker(marker, x, y(value), colour, f"block {block}, {name}: {number(value)}")
    return svg


def block_structure(
    width: float,
    before: Sequence[tuple[bool, int]],
    after: Sequence[tuple[bool, int]],
    names: tuple[str, str, str],
) -> Svg:
    """The blocks of two models side by side, the first at the top: attention, and an MLP as wide as its hidden units.

    What the second lost stands there as an outline.

    Args:
        width: Of the drawing.
        before: Of each block whether it has attention, and its hidden units.
        after: The same of the second model.
        names: What attention, MLP and hidden units are called.
    """
    mixing, pointwise, units = names
    pitch, top = (20, 46) if len(before) <= 16 else (17, 46)
    svg = Svg(width, top + pitch * len(before) + 6, "Architecture before and after compression, block by block")
    margin, gap = 26.0, 16.0
    panel = (width - margin - gap) / 2
    attention = 0.28 * panel
    widest = max(*(hidden for _, hidden in (*before, *after)), 1)
    unit = (panel - attention - 6) / widest
    for index, (title, blocks) in enumerate((("original", before), ("compressed", after))):
        left = margin + index * (panel + gap)
        mlp = left + attention + 6
        svg.label(left, 14, title, "label strong")
        svg.label(left, 36, mixing)
        svg.label(max(mlp, left + text_width(mixing) + 4), 36, pointwise)
        for block, ((has, hidden), (had, all_hidden)) in enumerate(zip(blocks, before, strict=True)):
            y, size, cut = top + pitch * block, pitch - 5, (has, hidden) != (had, all_hidden)
            css = "accent" if cut else "plain"
            if index == 0:
                svg.label(margin - 8, y + size - 3, str(block), anchor="end")
            if had:
                state = mixing if has else f"{mixing} removed"
                svg.rect(left, y, attention, size, css if has else "ghost", f"block {block}: {state}")
            if hidden < all_hidden:
                svg.rect(mlp, y, unit * all_hidden, size, "ghost", f"block {block}: {number(all_hidden)} {units}")
            svg.rect(mlp, y, unit * hidden, size, css, f"block {block}: {number(hidden)} {units}")
    return svg


def curves(width: float, lines: Sequence[Curve], x_label: str, y_label: str) -> Svg:
    """Curves with their names at their ends."""
    room = 14 + max((text_width(line.name) for line in lines), default=0.0)
    values = [value for line in lines for _, value in line.points]
    height = max(280, 70 + LINE_HEIGHT * len(lines))
    svg, box, y = _canvas(width, height, f"{y_label} against {x_label}", values, right=room, log=True)
    places = [place for line in lines for place, _ in line.points] or [0.0]
    span = max(places) - min(places)
    x = Scale(min(places), max(places) if span else min(places) + 1, box.left + 6, box.right - 6)
    whole = [tick for tick in x.ticks(8) if tick == int(tick)]  # epochs, steps and iterations
    axes(svg, box, y, y_label, x_label, [(x(tick), f"{tick:,.0f}") for tick in whole])
    ends: list[tuple[float, str, str]] = []
    for index, line in enumerate(lines):
        css = f"s{index % SERIES}"
        drawn = [(place, value) for place, value in line.points if finite([value])]
        if not drawn:
            continue
        svg.path([(x(place), y(value)) for place, value in drawn], f"{css} curve")
        for place, value in drawn if len(drawn) <= 12 else drawn[-1:]:
            title = f"{line.name}, {x_label} {number(place)}: {number(value)}"
            svg.marker("dot", x(place), y(value), css, title)
        ends.append((y(drawn[-1][1]), line.name, css))
    for position, name, css in _apart(ends, box.top, box.bottom + 10):
        svg.label(box.right + 4, position + 4, name, f"label {css}")
    return svg


def scatter(width: float, groups: Sequence[Group], x_label: str, y_label: str) -> Svg:
    """Points of several kinds; those drawn last lie on top."""
    points = [point for group in groups for point in group.points]
    svg, box, y = _canvas(width, 320, f"{y_label} against {x_label}", [point.y for point in points], right=18)
    x = Scale.over([point.x for point in points], box.left, box.right)
    axes(svg, box, y, y_label, x_label, [(x(tick), f"{tick:g}") for tick in x.ticks(6 if width < 500 else 9)])
    for group in groups:
        if group.joined:
            ordered = sorted((point.x, point.y) for point in group.points)
            svg.path([(x(a), y(b)) for a, b in ordered], f"{group.css} curve")
    for group in groups:
        for point in group.points:
            svg.marker(group.marker, x(point.x), y(point.y), group.css, point.title)
    return svg


def dot_rows(width: float, rows: Sequence[Row], x_label: str) -> Svg:
    """A row for each name: a small dot for each value, a bar for their mean."""
    pitch, top = 48, 8
    svg = Svg(width, top + pitch * len(rows) + 42, f"{x_label} by method")
    left, right, bottom = 10.0, width - 74, top + pitch * len(rows)
    x = Scale.over([value for row in rows for value in row.values], left, right)
    for tick in x.ticks(5):
        svg.line(x(tick), top, x(tick), bottom, "grid")
        svg.label(x(tick), bottom + 16, f"{tick:g}", anchor="middle")
    svg.label((left + right) / 2, bottom + 34, x_label, "label strong", anchor="middle")
    for index, row in enumerate(rows):
        y = top + pitch * index + 34
        svg.label(left, y - 20, row.name)
        svg.line(left, y, right, y, "axis")
        svg.rect(x(row.mean) - 2, y - 9, 4, 18, row.css, f"{row.name}, mean: {number(row.mean)}")
        for value in row.values:
            svg.marker("dot", x(value), y, row.css, f"{row.name}: {number(value)}")
        svg.label(width - 4, y + 4, number(row.mean), "label strong", anchor="end")
    return svg


def row_bars(width: float, values: Mapping[str, float], texts: Mapping[str, str], label: str) -> Svg:
    """A bar for each name, with its value as a text behind it."""
    pitch = 24
    svg = Svg(width, pitch * len(values) + 6, label)
    left = 12 + max((text_width(name) for name in values), default=0.0)
    right = width - 10 - max((text_width(text) for text in texts.values()), default=0.0)
    x = Scale(0.0, max([*finite(values.values()), 1e-12]), left, right)
    for index, (name, value) in enumerate(values.items()):
        y = pitch * index + 4
        svg.label(left - 8, y + 13, name, anchor="end")
        end = x(value) if finite([value]) else left
        svg.rect(left, y, max(end - left, 1.0), pitch - 7, "accent", f"{name}: {texts[name]}")
        svg.label(max(end, left + 1) + 6, y + 13, texts[name])
    return svg


def _canvas(
    width: float,
    height: float,
    label: str,
    values: Iterable[float | None],
    *,
    right: float = 10.0,
    log: bool = False,
    zero: bool = False,
) -> tuple[Svg, Box, Scale]:
    """An empty drawing, the box between its axes, and the vertical scale for some values; see `Scale.over`."""
    top, bottom = 26.0, height - 44
    y = Scale.over(values, bottom, top, log=log, zero=zero)
    left = 12 + max((text_width(f"{tick:g}") for tick in y.ticks()), default=0.0)
    return Svg(width, height, label), Box(left, top, width - right, bottom), y


def _columns(box: Box, blocks: Collection[int]) -> tuple[dict[int, float], float]:
    """The middle of each block's column, and the distance of two."""
    ordered = sorted(blocks)
    pitch = (box.right - box.left) / max(len(ordered), 1)
    return {block: box.left + pitch * (index + 0.5) for index, block in enumerate(ordered)}, pitch


def _apart(ends: Sequence[tuple[float, str, str]], top: float, bottom: float) -> list[tuple[float, str, str]]:
    """Labels moved apart until none touches another, downwards first and then back up from the bottom."""
    ordered = sorted(ends)
    places = [max(top, position) for position, _, _ in ordered]
    for index in range(1, len(places)):
        places[index] = max(places[index], places[index - 1] + LINE_HEIGHT)
    limit = bottom
    for index in reversed(range(len(places))):
        places[index] = min(places[index], limit)
        limit = places[index] - LINE_HEIGHT
    return [(place, name, css) for place, (_, name, css) in zip(places, ordered, strict=True)]
