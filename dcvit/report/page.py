"""A report as a page: sections of figures, tables and pictures, in one self-contained HTML file.

Every figure is drawn twice, once for a desktop screen and once for a phone; CSS shows the one that fits. A table below
each figure lists its numbers.
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
"""Widths of the drawings in CSS pixels, for a desktop screen and for a phone."""


@dataclass(frozen=True)
class Table:
    """Rows of text.

    Attributes:
        head: Names of the columns.
        rows: Cells of each row.
        marked: Indices of the rows that are highlighted.
        title: Caption above the table.
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
        """The marker as markup."""
        return Markup(marker_sample(self.css, self.marker))


@dataclass(frozen=True)
class Figure:
    """A chart with its numbers.

    Attributes:
        title: The heading.
        draw: Function that makes the drawing for a width in CSS pixels.
        table: Every number in the chart.
        text: Explanation of the chart.
        legend: Entries that explain the markers.
        open: Whether the table is expanded at first.
    """

    title: str
    draw: Callable[[float], Svg]
    table: Table
    text: str = ""
    legend: Sequence[Key] = ()
    open: bool = False

    @property
    def wide(self) -> Markup:
        """The drawing for a desktop screen."""
        return Markup(self.draw(WIDE).markup())

    @property
    def narrow(self) -> Markup:
        """The drawing for a phone."""
        return Markup(self.draw(NARROW).markup())


@dataclass(frozen=True)
class Picture:
    """An image as a data URI, with its caption."""

    uri: str
    caption: str


@dataclass(frozen=True)
class Gallery:
    """Pictures in a grid.

    Attributes:
        pictures: The pictures.
        pixelated: Whether the pictures are so small that they are enlarged without smoothing.
    """

    pictures: Sequence[Picture]
    pixelated: bool


@dataclass(frozen=True)
class Section:
    """A heading, sentences, and the figures, tables and galleries that they describe."""

    title: str
    text: Sequence[str] = ()
    items: Sequence[Figure | Table | Gallery] = ()


@dataclass(frozen=True)
class Tile:
    """A key figure at the top of the page."""

    name: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Page:
    """A whole report.

    Attributes:
        title: The heading.
        text: Sentences that describe how the model was made.
        tiles: The key figures.
        sections: The sections below the key figures.
        not_recorded: Items that could not be shown, each with the reason.
    """

    title: str
    text: Sequence[str]
    tiles: Sequence[Tile] = ()
    sections: Sequence[Section] = ()
    not_recorded: Sequence[str] = field(default=())

    def html(self) -> str:
        """Render the page as HTML."""
        return well_formed(_template().render(page=self, version=__version__))


def settings_table(values: Mapping[str, Any], title: str = "") -> Table:
    """Return nested settings as a table of dotted names and values."""
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
