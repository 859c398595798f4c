"""A report as a page: sections of figures, tables and pictures, in one HTML file that needs nothing else.

Every figure is drawn twice, for a desk and for a phone; CSS shows the one that fits. Its numbers stand in a table.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from dcvit._version import __version__
from dcvit.report.charts import marker_sample
from dcvit.report.svg import Marker, Svg
from dcvit.runtime.files import well_formed

__all__ = ["Figure", "Gallery", "Key", "Page", "Picture", "Section", "Table", "Tile", "settings_table"]

WIDE, NARROW = 720, 340
"""Widths of the drawings in CSS pixels, for a desk and for a phone."""


@dataclass(frozen=True)
class Table:
    """Rows of text.

    Attributes:
        head: Names of the columns.
        rows: The cells.
        marked: Indices of the rows that stand out.
        title: Stands above it.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[int] = frozenset()
    title: str = ""


@dataclass(frozen=True)
class Key:
    """An entry of a legend."""

    text: str
    css: str
    marker: Marker

    @property
    def sample(self) -> Markup:
        """The marker itself."""
        return Markup(marker_sample(self.css, self.marker))


@dataclass(frozen=True)
class Figure:
    """A chart with its numbers.

    Attributes:
        title: What it shows.
        draw: From a width to the drawing.
        table: Every number in it.
        text: What to see in it.
        legend: What its marks mean.
        open: Whether the table is shown from the start.
    """

    title: str
    draw: Callable[[float], Svg]
    table: Table
    text: str = ""
    legend: Sequence[Key] = ()
    open: bool = False

    @property
    def wide(self) -> Markup:
        """The drawing for a desk."""
        return Markup(self.draw(WIDE).markup())

    @property
    def narrow(self) -> Markup:
        """The drawing for a phone."""
        return Markup(self.draw(NARROW).markup())


@dataclass(frozen=True)
class Picture:
    """An image as a data URI, with what it shows."""

    uri: str
    caption: str


@dataclass(frozen=True)
class Gallery:
    """Pictures in a grid.

    Attributes:
        pictures: The pictures.
        pixelated: Whether they are so small that their pixels are to be seen.
    """

    pictures: Sequence[Picture]
    pixelated: bool


@dataclass(frozen=True)
class Section:
    """A heading, sentences and what they speak of."""

    title: str
    text: Sequence[str] = ()
    items: Sequence[Figure | Table | Gallery] = ()


@dataclass(frozen=True)
class Tile:
    """A figure that is looked for first."""

    name: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Page:
    """A whole report.

    Attributes:
        title: The heading.
        text: What was done.
        tiles: The figures looked for first.
        sections: The rest.
        not_recorded: What could not be shown, and why.
    """

    title: str
    text: Sequence[str]
    tiles: Sequence[Tile] = ()
    sections: Sequence[Section] = ()
    not_recorded: Sequence[str] = field(default=())

    def html(self) -> str:
        """The page."""
        return well_formed(_template().render(page=self, version=__version__))


def settings_table(values: Mapping[str, Any], title: str = "") -> Table:
    """Nested settings as a table of names and values."""
    rows: list[tuple[str, str]] = []

    def collect(prefix: str, nested: Mapping[str, Any]) -> None:
        for name, value in nested.items():
            if isinstance(value, Mapping):
                collect(f"{prefix}{name}.", value)
            else:
                rows.append((f"{prefix}{name}", _plain(value)))

    collect("", values)
    return Table(("setting", "value"), rows, title=title)


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


@lru_cache(maxsize=1)
def _template() -> Template:
    loader = PackageLoader("dcvit.report", package_path=".")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.tests["figure"] = lambda item: isinstance(item, Figure)
    environment.tests["gallery"] = lambda item: isinstance(item, Gallery)
    return environment.get_template("page.html")
