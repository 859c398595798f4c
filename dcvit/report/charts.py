"""Charts: each function draws one kind of chart from values and a width."""

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
"""Number of curve colours that the page defines, `s0` to `s7`. Further curves reuse them and differ by their label."""

LINE_HEIGHT = 14
"""Vertical distance at which two labels do not touch, in CSS pixels."""


@dataclass(frozen=True)
class Point:
    """A point and the title that is shown when the pointer rests on it."""

    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Curve:
    """Points joined by a line, which is labelled with its name."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Group:
    """Points of one kind: their colour (`css`), their shape, and whether a line joins them."""

    css: str
    marker: Marker
    points: Sequence[Point]
    joined: bool = False


@dataclass(frozen=True)
class Row:
    """A row of dots, one for each value, and the mean of the values."""

    name: str
    css: str
    values: Sequence[float]
    mean: float


def number(value: float | None) -> str:
    """Format a value for tables and labels, with four significant digits."""
    if value is None:
        return "–"
    if isinstance(value, int) or 10_000 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def amount(value: int) -> str:
    """Format a number of MACs or parameters with its unit prefix and four significant digits."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= size:
            return f"{value / size:.4g}\N{NO-BREAK SPACE}{unit}"
    return str(value)


def marker_sample(css: str, marker: Marker) -> str:
    """Return the markup of a single point, for a legend."""
    svg = Svg(16, 16, "")
    svg.marker(marker, 8, 8, css)
    return svg.markup()


def block_bars(width: float, values: Mapping[int, float], chosen: Collection[int], y_label: str) -> Svg:
    """Draw a bar for each block, with the chosen blocks in colour."""
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
    """Draw each block's values at several stages, joined by a line, with the chosen blocks in colour.

    Args:
        width: Width of the drawing.
        stages: Name, marker and values by block of each stage, in chronological order.
        chosen: The blocks that are drawn in colour.
        y_label: Label of the values.
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
    """Draw the blocks of two models side by side, the first block at the top.

    Each block shows its attention, and an MLP whose width is proportional to its hidden units. What the second model
    lost is drawn as an outline.

    Args:
        width: Width of the drawing.
        before: For each block, whether it has attention, and its number of hidden units.
        after: The same for the second model.
        names: Names of the attention, of the MLP and of the hidden units.
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
            y, size, changed = top + pitch * block, pitch - 5, (has, hidden) != (had, all_hidden)
            css = "accent" if changed else "plain"
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
    """Draw curves, each labelled with its name at its end."""
    room = 14 + max((text_width(line.name) for line in lines), default=0.0)
    values = [value for line in lines for _, value in line.points]
    height = max(280, 70 + LINE_HEIGHT * len(lines))
    svg, box, y = _canvas(width, height, f"{y_label} against {x_label}", values, right=room, log=True)
    positions = [position for line in lines for position, _ in line.points] or [0.0]
    span = max(positions) - min(positions)
    x = Scale(min(positions), max(positions) if span else min(positions) + 1, box.left + 6, box.right - 6)
    whole = [tick for tick in x.ticks(8) if tick == int(tick)]  # epochs, steps and iterations are whole numbers
    axes(svg, box, y, y_label, x_label, [(x(tick), f"{tick:,.0f}") for tick in whole])
    ends: list[tuple[float, str, str]] = []
    for index, line in enumerate(lines):
        css = f"s{index % SERIES}"
        drawn = [(position, value) for position, value in line.points if finite([value])]
        if not drawn:
            continue
        svg.path([(x(position), y(value)) for position, value in drawn], f"{css} curve")
        for position, value in drawn if len(drawn) <= 12 else drawn[-1:]:
            title = f"{line.name}, {x_label} {number(position)}: {number(value)}"
            svg.marker("dot", x(position), y(value), css, title)
        ends.append((y(drawn[-1][1]), line.name, css))
    for height_of_label, name, css in _apart(ends, box.top, box.bottom + 10):
        svg.label(box.right + 4, height_of_label + 4, name, f"label {css}")
    return svg


def scatter(width: float, groups: Sequence[Group], x_label: str, y_label: str) -> Svg:
    """Draw points of several kinds; later groups lie on top of earlier ones."""
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
    """Draw a row for each name, with a small dot for each value and a bar for their mean."""
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
    """Draw a horizontal bar for each name, followed by its value as text."""
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
    """Return an empty drawing, the box between its axes, and the vertical scale of the values; see `Scale.over`."""
    top, bottom = 26.0, height - 44
    y = Scale.over(values, bottom, top, log=log, zero=zero)
    left = 12 + max((text_width(f"{tick:g}") for tick in y.ticks()), default=0.0)
    return Svg(width, height, label), Box(left, top, width - right, bottom), y


def _columns(box: Box, blocks: Collection[int]) -> tuple[dict[int, float], float]:
    """Return the centre of each block's column, and the distance between two columns."""
    ordered = sorted(blocks)
    pitch = (box.right - box.left) / max(len(ordered), 1)
    return {block: box.left + pitch * (index + 0.5) for index, block in enumerate(ordered)}, pitch


def _apart(ends: Sequence[tuple[float, str, str]], top: float, bottom: float) -> list[tuple[float, str, str]]:
    """Move labels apart until none touches another: downwards first, then back up from the bottom."""
    ordered = sorted(ends)
    positions = [max(top, position) for position, _, _ in ordered]
    for index in range(1, len(positions)):
        positions[index] = max(positions[index], positions[index - 1] + LINE_HEIGHT)
    limit = bottom
    for index in reversed(range(len(positions))):
        positions[index] = min(positions[index], limit)
        limit = positions[index] - LINE_HEIGHT
    return [(position, name, css) for position, (_, name, css) in zip(positions, ordered, strict=True)]
