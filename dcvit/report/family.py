"""The report of a family: several sizes of one model against the original and against block dropping."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, get_args

from dcvit.errors import DcvitError, SaveFolderError
from dcvit.report.charts import Group, Point, amount, number, scatter
from dcvit.report.page import Figure, Key, Page, Section, Table, settings_table
from dcvit.report.svg import Marker, finite
from dcvit.serialization import field_types, from_plain

__all__ = ["FamilyPoint", "Kind", "family_page", "saved_family_page"]

FAMILY = "family.json"

Kind = Literal["original", "dcvit", "block dropping"]
Cost = Literal["macs", "latency_ms"]
Quality = Literal["agreement", "top1"]

STYLES: Mapping[Kind, tuple[str, Marker]] = {
    "block dropping": ("other", "triangle"),
    "dcvit": ("accent", "circle"),
    "original": ("plain", "diamond"),
}
"""Colour and shape of each kind of point, in the order of drawing."""

SAME: Mapping[Cost, float] = {"macs": 0.005, "latency_ms": 0.03}
"""Relative differences of cost that are ignored: a budget is met to 0.5 %, and a latency is measured to about 3 %."""

COST_NAMES: Mapping[Cost, str] = {"macs": "MACs", "latency_ms": "latency"}
QUALITY_NAMES: Mapping[Quality, str] = {"agreement": "agreement with the original", "top1": "top-1"}


@dataclass(frozen=True)
class FamilyPoint:
    """One model of a comparison.

    Attributes:
        name: Name of the model in the table.
        kind: Method that made the model.
        macs: MACs per image.
        params: Number of parameters.
        latency_ms: Latency of one batch in milliseconds; `None` if it was not measured.
        agreement: Agreement with the original, in [0, 1]; `None` if it was not measured.
        top1: Top-1 accuracy, in [0, 1]; `None` if it was not measured.
    """

    name: str
    kind: Kind
    macs: int
    params: int
    latency_ms: float | None = None
    agreement: float | None = None
    top1: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise DcvitError(f"kind={self.kind!r}: expected one of {', '.join(map(repr, get_args(Kind)))}.")


def family_page(
    points: Sequence[FamilyPoint],
    *,
    title: str,
    text: Sequence[str] = (),
    evaluated_on: str,
    latency_of: str = "one batch",
    settings: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
) -> Page:
    """Return a page that shows the cost and the accuracy of each size.

    Args:
        points: One original, the members of the family, and the models that they are compared with.
        title: The heading.
        text: Sentences that describe how the family was made.
        evaluated_on: The images on which agreement and top-1 were measured, for example `"797 held-out digits"`.
        latency_of: What was timed, for example `"a batch of 64 on two CPU cores"`.
        settings: Settings of the run, nested to any depth.
        versions: Versions of the software that made the family.

    Raises:
        DcvitError: If there is not exactly one original.
    """
    originals = [point for point in points if point.kind == "original"]
    if len(originals) != 1:
        raise DcvitError(f"A family has {len(originals)} points of kind 'original': expected exactly one.")
    (original,) = originals
    ordered = sorted(points, key=lambda point: (-point.macs, point.kind, point.name))
    pairs: list[tuple[Cost, Quality]] = [
        (cost, quality)
        for cost, quality in product(SAME, QUALITY_NAMES)
        if sum(_has(point, cost, quality) for point in points) > 1
    ]
    figures = [_figure(ordered, original, cost, quality, latency_of) for cost, quality in pairs]
    sections = [
        Section("The sizes", _summary(ordered, pairs), [_table(ordered, original, pairs)]),
        Section("Accuracy against cost", [f"Evaluated on {evaluated_on}."], figures),
    ]
    tables = [
        settings_table(values, name) for name, values in (("Settings", settings), ("Versions", versions)) if values
    ]
    if tables:
        sections.append(Section("Settings and versions", items=tables))
    missing = [
        f"{name} of any model: it was not measured"
        for attribute, name in (*COST_NAMES.items(), *QUALITY_NAMES.items())
        if all(getattr(point, attribute) is None for point in points)
    ]
    return Page(title, text, sections=sections, not_recorded=missing)


def saved_family_page(index: Mapping[str, Any]) -> Page:
    """Return the page of a family from the values of its `family.json`.

    Raises:
        SaveFolderError: If a value that the page needs is missing or invalid.
    """
    try:
        saved = from_plain(_Index, {name: index[name] for name in field_types(_Index)}, FAMILY)
        for point in saved.points:
            if point.macs <= 0 or point.params <= 0:
                raise ValueError(f"the point {point.name!r} has {point.macs} MACs and {point.params} parameters")
        return family_page(
            saved.points,
            title=f"{saved.model} in {len(saved.members)} sizes",
            text=[f"Compressed from one search, with {saved.num_images} unlabelled images."],
            evaluated_on=saved.evaluated_on,
            settings=saved.settings,
            versions=saved.versions,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise SaveFolderError(f"{FAMILY} is not an index of a family ({error}): sweep again.") from error


@dataclass(frozen=True)
class _Index:
    """The values of `family.json` that a page shows."""

    model: str
    num_images: int
    members: tuple[Mapping[str, Any], ...]
    points: tuple[FamilyPoint, ...]
    evaluated_on: str
    settings: Mapping[str, Any]
    versions: Mapping[str, str]


def block_dropping_wins(point: FamilyPoint, points: Sequence[FamilyPoint], cost: Cost, quality: Quality) -> bool:
    """Return whether a point belongs to a pair in which block dropping costs no more than dcvit and is better.

    Costs that differ by no more than `SAME` count as equal.
    """
    known = [other for other in points if _has(other, cost, quality)]
    dropped = [other for other in known if other.kind == "block dropping"]
    ours = [other for other in known if other.kind == "dcvit"]
    return any(
        point in (winner, loser) and _beats(winner, loser, cost, quality) for winner, loser in product(dropped, ours)
    )


def _beats(winner: FamilyPoint, loser: FamilyPoint, cost: Cost, quality: Quality) -> bool:
    cheaper: bool = getattr(winner, cost) <= getattr(loser, cost) * (1 + SAME[cost])
    better: bool = getattr(winner, quality) > getattr(loser, quality)
    return cheaper and better


def _has(point: FamilyPoint, cost: Cost, quality: Quality) -> bool:
    return len(finite([getattr(point, cost), getattr(point, quality)])) == 2


def _summary(points: Sequence[FamilyPoint], pairs: Sequence[tuple[Cost, Quality]]) -> list[str]:
    """Return one sentence for each cost and quality that says where block dropping wins, if anywhere."""
    sentences = []
    for cost, quality in pairs:
        if not any(point.kind == "block dropping" and _has(point, cost, quality) for point in points):
            continue
        beaten = [
            point.name
            for point in points
            if point.kind == "dcvit" and block_dropping_wins(point, points, cost, quality)
        ]
        where = f"Block dropping is ahead of {', '.join(beaten)}" if beaten else "Block dropping is nowhere ahead"
        sentences.append(f"{where} in {QUALITY_NAMES[quality]} at the same {COST_NAMES[cost]} or less.")
    return sentences


def _table(points: Sequence[FamilyPoint], original: FamilyPoint, pairs: Sequence[tuple[Cost, Quality]]) -> Table:
    """Return a table of all points. The rows where block dropping wins are marked and name the quality and the cost."""
    rows, marked = [], set()
    for index, point in enumerate(points):
        won = [
            f"{QUALITY_NAMES[quality]} by {COST_NAMES[cost]}"
            for cost, quality in pairs
            if block_dropping_wins(point, points, cost, quality)
        ]
        if won:
            marked.add(index)
        rows.append(
            (
                point.name, point.kind, amount(point.macs), _percent(point.macs / original.macs, 2),
                amount(point.params), number(point.latency_ms), _percent(point.agreement, 2), _percent(point.top1, 2),
                ", ".join(won),
            )
        )  # fmt: skip
    head = ("model", "made by", "MACs", "MACs, %", "parameters", "latency, ms", "agreement, %", "top-1, %",
            "block dropping wins in")  # fmt: skip
    return Table(head, rows, frozenset(marked))


def _figure(
    points: Sequence[FamilyPoint], original: FamilyPoint, cost: Cost, quality: Quality, latency_of: str
) -> Figure:
    shown = [point for point in points if _has(point, cost, quality)]

    def x(point: FamilyPoint) -> float:
        value: float = getattr(point, cost)
        return 100 * value / original.macs if cost == "macs" else value

    def y(point: FamilyPoint) -> float:
        return 100 * float(getattr(point, quality))

    x_label = "MACs, % of the original" if cost == "macs" else "latency, ms"
    y_label = f"{QUALITY_NAMES[quality]}, %"
    groups = [
        Group(
            css,
            marker,
            [
                Point(x(point), y(point), f"{point.name}: {x_label} {x(point):.2f}, {y_label} {y(point):.2f}")
                for point in shown
                if point.kind == kind
            ],
            joined=kind != "original",
        )
        for kind, (css, marker) in STYLES.items()
    ]
    table = Table(
        ("model", "made by", x_label, y_label),
        [(point.name, point.kind, f"{x(point):.2f}", f"{y(point):.2f}") for point in shown],
        frozenset(i for i, point in enumerate(shown) if block_dropping_wins(point, points, cost, quality)),
    )
    present = {point.kind for point in shown}
    return Figure(
        f"{QUALITY_NAMES[quality].capitalize()} against {COST_NAMES[cost]}",
        lambda width: scatter(width, [group for group in groups if group.points], x_label, y_label),
        table,
        "Up and to the left is better." + (f" Latency of {latency_of}." if cost == "latency_ms" else ""),
        [Key(kind, css, marker) for kind, (css, marker) in STYLES.items() if kind in present],
    )


def _percent(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}"
