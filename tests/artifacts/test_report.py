"""Reports: what they show, that they are sound HTML without requests, and how a browser lays them out."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

import dcvit
from dcvit.artifacts.result import SAVED_FILES, read_record
from dcvit.report import FamilyPoint, Page, family_page, run_page, write_report
from dcvit.report.charts import Curve, Group, Point, amount, block_bars, curves, number, scatter
from dcvit.report.page import Figure, Table
from dcvit.report.svg import Scale
from tests.conftest import CUT, CUT_REFINED, PUBLISHED, QUICK
from tests.variants import VARIANTS

CONFIGS = {"reconstructed": CUT, "refined": CUT_REFINED, "searched": QUICK, "published": PUBLISHED}
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
VOID = {"meta", "link", "img"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved result of each procedure, with its report."""
    torch.manual_seed(0)
    folders = {}
    for name, config in CONFIGS.items():
        images = torch.randn(6, 3, 32, 32)
        result = dcvit.compress(VARIANTS["plain"].create(), images, dcvit.Budget(macs=0.62), config)
        folders[name] = tmp_path_factory.mktemp("runs") / name
        result.save(folders[name])
        write_report(folders[name])
    return folders


def family() -> list[FamilyPoint]:
    """Four members, and block dropping at two of their sizes: ahead at 60 % of the MACs, behind at 80 %."""
    points = [FamilyPoint("original", "original", 1000, 500, 20.0, 1.0, 0.9)]
    for share, agreement in ((0.9, 0.97), (0.8, 0.94), (0.7, 0.9), (0.6, 0.8)):
        points.append(
            FamilyPoint(f"{share:.0%}", "dcvit", int(1000 * share), 400, 20 * share, agreement, agreement - 0.1)
        )
    points.append(FamilyPoint("1 block less", "block dropping", 802, 400, 16.1, 0.9, 0.8))
    points.append(FamilyPoint("2 blocks less", "block dropping", 602, 300, 12.1, 0.85, 0.69))
    return points


def made_up_page() -> Page:
    return family_page(family(), title="A family", evaluated_on="images", settings={"seed": 0}, versions={"torch": "2"})


@pytest.fixture(params=[*CONFIGS, "family"])
def page(request: pytest.FixtureRequest, runs: dict[str, Path]) -> str:
    """The text of each kind of page."""
    name = request.param
    return made_up_page().html() if name == "family" else (runs[name] / "report.html").read_text(encoding="utf-8")


class Strict(HTMLParser):
    """Refuses tags that are not closed in order; remembers attributes and the cells of tables."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.cells: list[str] = []
        self.marked: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        self.addresses += [values[name] or "" for name in ("src", "href", "srcset", "action") if name in values]
        self.ids += [values["id"] or ""] if "id" in values else []
        if tag == "tr" and values.get("class") == "marked":
            self.marked.append([])
        if tag in ("td", "th"):
            self.cells.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data
            if self.marked and "tr" in self.open:
                self.marked[-1].append(data)


def parsed(text: str) -> Strict:
    parser = Strict()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


def drawings(text: str) -> Iterator[ElementTree.Element]:
    for markup in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        yield ElementTree.fromstring(markup)


def figures(text: str) -> list[str]:
    """The charts; pictures of the gallery are figures, too, without a drawing."""
    return [one for one in re.findall(r"<figure>.*?</figure>", text, re.DOTALL) if "<svg" in one]


def test_pages_are_sound_and_need_nothing_else(page: str) -> None:
    parser = parsed(page)
    assert page.startswith("<!doctype html>")
    assert parser.tags & {"script", "iframe", "object", "style"} == {"style"}
    assert all(address.startswith("data:") for address in parser.addresses)
    assert not re.search(r"https?:|//\w|url\(|@import", re.sub(r"data:image/\w+;base64,[\w+/=]+", "", page))
    assert len(set(parser.ids)) == len(parser.ids)
    assert len(list(drawings(page))) >= 2 * len(figures(page)) > 0
    for drawing in drawings(page):
        for element in drawing.iter():
            assert not any("nan" in value.lower() or "inf" in value for value in element.attrib.values())


def test_every_number_of_a_chart_is_in_its_table(page: str) -> None:
    for figure in figures(page):
        cells = parsed(figure).cells
        numbers = {one for cell in cells for one in re.findall(r"[\d.,e+-]*\d", cell)}
        wide, narrow = (drawing for drawing in drawings(figure) if float(drawing.attrib["width"]) > 100)
        titles = [element.text or "" for element in wide.iter("title")]
        assert titles
        assert titles == [element.text for element in narrow.iter("title")]
        for title in titles:
            shown = re.findall(r"[\d.,e+-]*\d", title.partition(": ")[2])
            assert set(shown) <= numbers, (title, numbers)


def test_the_page_says_what_was_done(runs: dict[str, Path]) -> None:
    for name, folder in runs.items():
        record, text = read_record(folder), (folder / "report.html").read_text(encoding="utf-8")
        shown = [" ".join(html.unescape(cell).split()) for cell in parsed(text).cells]
        pairs = dict(pairwise(shown))
        recovery = CONFIGS[name].recovery
        assert pairs["recovery.batch_size"] == str(recovery.batch_size)
        assert pairs["synthesis.iterations"] == "3"
        assert pairs["torch"] == torch.__version__
        for probe in record.report.probes:
            assert number(probe.metric_loss) in shown
            assert probe.reconstruction is None or number(probe.reconstruction.error_before) in shown
            assert probe.recovery is None or number(probe.recovery.loss_before) in shown
        for stage, seconds in record.report.seconds.items():
            assert pairs[stage] == f"{seconds:.2f} s"
        assert record.images is not None
        assert text.count("<img ") == len(record.images.pixels) == 3
        assert "Not recorded" not in text


def tables(page: Page) -> dict[str, Table]:
    """All tables of a page, those of figures under the figure's title."""
    items = [item for section in page.sections for item in section.items]
    found = {item.title: item for item in items if isinstance(item, Table)}
    return found | {item.title: item.table for item in items if isinstance(item, Figure)}


def test_tables_hold_what_was_recorded(runs: dict[str, Path]) -> None:
    record = read_record(runs["refined"])
    shown = tables(run_page(record))
    assert shown["Validation error of each chosen block, front to back"].rows == [
        (
            str(one.block), number(one.error_before), number(one.error_closed_form), number(one.error_after),
            number(one.ridge), str(one.epochs),
        )
        for one in record.report.reconstructions
    ]  # fmt: skip
    assert record.report.refinement is not None
    assert shown["Distillation of the whole student"].rows == [
        ("0", number(record.report.refinement.error_before)),
        *((str(steps), number(error)) for steps, error in record.report.refinement.validations),
    ]
    kept = record.plan.kept_units
    assert shown["Blocks, from the first at the top to the last"].rows == [
        (str(block), "yes", "no" if block in kept else "yes", "192", str(len(kept[block])) if block in kept else "192")
        for block in range(4)
    ]
    expected = shown["Expected loss by the hidden units that a block keeps"]
    (profile,) = {probe.block: probe.sensitivity for probe in record.report.probes if probe.block == 1}.values()
    assert profile is not None
    column = next(index for index, name in enumerate(expected.head) if name.startswith("block 1"))
    assert [row[column] for row in expected.rows] == [number(loss) for loss in profile.losses]
    assert {name for name in expected.head if "✓" in name} == {f"block {block} ✓" for block in kept}
    searched = read_record(runs["searched"])
    assert searched.plan.pruned
    expected = tables(run_page(searched))["Expected loss by the hidden units that a block keeps, with attention"]
    assert {name for name in expected.head if "✓" in name} == {f"block {block} ✓" for block in searched.plan.pruned}
    published = read_record(runs["published"])
    losses = [step.losses for step in published.report.steps]
    assert tables(run_page(published))["Distillation after each step of compression"].rows == [
        (str(epoch + 1), *(number(of_step[epoch]) for of_step in losses)) for epoch in range(2)
    ]


def test_numbers_as_they_are_shown() -> None:
    assert [number(value) for value in (None, 3, 1234567, 0.123456, 1234.56, 98765.4, 1e-5)] == [
        "–", "3", "1,234,567", "0.1235", "1235", "98,765", "1e-05",
    ]  # fmt: skip
    assert [amount(value).replace("\N{NO-BREAK SPACE}", " ") for value in (17_563_000_000, 402_122, 12)] == [
        "17.56 G", "402.1 k", "12",
    ]  # fmt: skip


def test_curves_are_recorded(runs: dict[str, Path]) -> None:
    reconstructed, refined = (read_record(runs[name]).report for name in ("reconstructed", "refined"))
    for went in reconstructed.reconstructions:
        assert len(went.errors) == QUICK.reconstruction.epochs
        if went.epochs:
            assert went.errors[went.epochs - 1] == min(went.errors) < went.error_before
    assert refined.refinement is not None
    steps, errors = zip(*refined.refinement.validations, strict=True)
    assert steps == tuple(range(25, 201, 25))
    assert refined.refinement.error_after == min(refined.refinement.error_before, *errors)
    images = read_record(runs["refined"]).images
    assert images is not None
    assert len(images.losses) == 3


def test_chosen_blocks_stand_out(runs: dict[str, Path]) -> None:
    for folder in runs.values():
        record = read_record(folder)
        page = run_page(record)
        probes = next(section for section in page.sections if section.title == "Which blocks recover")
        for figure in probes.items[:2]:
            column = figure.table.head.index("block")  # type: ignore[union-attr]
            rows = [figure.table.rows[index] for index in figure.table.marked]  # type: ignore[union-attr]
            assert {int(row[column]) for row in rows} == set(record.plan.blocks) - set(record.plan.pruned)
        (drawing, _) = drawings(figures((folder / "report.html").read_text())[0].partition('<div class="wide">')[2])
        bars = {
            (bar.find("title").text or "").split(":")[0]: bar.attrib["class"]  # type: ignore[union-attr]
            for bar in drawing.iter("rect")
        }
        chosen = {name for name, css in bars.items() if css == "accent"}
        assert chosen == {f"block {block}" for block in set(record.plan.blocks) - set(record.plan.pruned)}
        assert len(bars) == len(record.plan.candidates)


def test_bars_are_as_long_as_their_values() -> None:
    root = ElementTree.fromstring(block_bars(720, {1: 0.2, 2: 0.1, 3: 0.4}, [2], "loss").markup())
    heights = [float(bar.attrib["height"]) for bar in root.iter("rect")]
    assert heights[0] / heights[1] == pytest.approx(2, rel=1e-3)
    assert heights[2] / heights[1] == pytest.approx(4, rel=1e-3)


def test_a_line_through_points_goes_from_left_to_right() -> None:
    points = [Point(3.0, 1.0, "c"), Point(1.0, 4.0, "a"), Point(2.0, 3.0, "b")]
    group = Group("accent", "circle", points, joined=True)
    root = ElementTree.fromstring(scatter(720, [group], "MACs", "r").markup())
    (path,) = (part.attrib["d"] for part in root.iter("path") if "curve" in part.attrib.get("class", ""))
    line = [tuple(map(float, pair)) for pair in re.findall(r"(-?[\d.]+)[ ,](-?[\d.]+)", path)]
    marks = [(float(mark.attrib["cx"]), float(mark.attrib["cy"])) for mark in root.iter("circle")]
    assert line == sorted(marks)
    assert len(line) == 3


def test_labels_of_many_curves_do_not_touch() -> None:
    lines = [Curve(f"block {i}", [(0, 1.0), (1, 0.5 + 0.001 * i)]) for i in range(30)]
    root = ElementTree.fromstring(curves(340, lines, "epoch", "loss").markup())
    places = [float(text.attrib["y"]) for text in root.iter("text") if (text.text or "").startswith("block")]
    assert len(places) == 30
    places.sort()
    assert min(b - a for a, b in pairwise(places)) >= 14 - 1e-6
    assert places[0] >= 12
    assert places[-1] <= float(root.attrib["height"])


def test_values_that_are_not_finite_are_left_out() -> None:
    lines = [Curve("good", [(0, 1.0), (1, 0.5)]), Curve("bad", [(0, float("nan")), (1, float("inf"))])]
    root = ElementTree.fromstring(curves(340, lines, "epoch", "loss").markup())
    assert sum(element.attrib["class"].endswith("curve") for element in root.iter("path")) == 1
    bars = ElementTree.fromstring(block_bars(340, {0: float("inf"), 1: 1.0}, [], "loss").markup())
    assert len(list(bars.iter("rect"))) == 1


@pytest.mark.parametrize("values", [[0.5], [1.0, 1.0], [1e-7, 3.0], [0.0], [-2.0, 3.0], [96.1, 96.4], [2e9, 3e9]])
def test_scales(values: list[float]) -> None:
    for log in (False, True):
        scale = Scale.over(values, 200.0, 0.0, log=log)
        assert all(0 < scale(value) < 200 for value in values)
        ticks = scale.ticks()
        assert 1 <= len(ticks) <= 8
        assert ticks == sorted(set(ticks))
        assert all(-1e-6 <= scale(tick) <= 200 + 1e-6 for tick in ticks)
    scale = Scale.over(values, 0.0, 100.0, zero=True)
    assert scale(0) == 0


def test_points_lie_where_their_values_are() -> None:
    points = [Point(50, 90, "a"), Point(75, 95, "b"), Point(100, 100, "c")]
    root = ElementTree.fromstring(scatter(720, [Group("accent", "circle", points)], "MACs", "top-1").markup())
    x, y = ([float(circle.attrib[name]) for circle in root.iter("circle")] for name in ("cx", "cy"))
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.02)
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.02)
    assert x[0] < x[1]
    assert y[0] > y[1]


def test_texts_are_escaped(runs: dict[str, Path], tmp_path: Path) -> None:
    name = '<script>alert("x")</script>&'
    folder = shutil.copytree(runs["reconstructed"], tmp_path / "run")
    values = json.loads((folder / "result.json").read_text())
    values["report"]["model"] = name
    values["report"]["seconds"] = {name: 1.0}
    values["report"]["settings"] = {name: name}
    (folder / "result.json").write_text(json.dumps(values))
    text = write_report(folder).read_text()
    assert "<script" not in text
    assert name in parsed(text).cells
    assert any(name in (element.text or "") for drawing in drawings(text) for element in drawing.iter("text"))
    point = FamilyPoint(name, "original", 1, 1, 1.0, 1.0)
    assert "<script" not in family_page([point, replace(point, kind="dcvit")], title=name, evaluated_on=name).html()


def test_a_report_is_made_again_only_from_the_folder(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(runs["refined"], tmp_path / "run")
    before = (folder / "report.html").read_bytes()
    (folder / "model.safetensors").unlink()
    assert dcvit.write_report(folder).read_bytes() == before
    (folder / "report.html").write_text("<!doctype html><p>mine</p>")
    with pytest.raises(dcvit.errors.SaveFolderError, match="not a report that dcvit wrote"):
        write_report(folder)
    result = dcvit.load(runs["refined"])
    with pytest.raises(dcvit.errors.SaveFolderError, match=r"holds something else \(report\.html\)"):
        result.save(folder, overwrite=True)
    assert (folder / "report.html").read_text().endswith("mine</p>")
    with pytest.raises(dcvit.errors.SaveFolderError, match="is not a folder"):
        write_report(tmp_path / "nowhere")


def older(folder: Path) -> None:
    """Take away what results did not hold before reports were made of them."""
    values = json.loads((folder / "result.json").read_text())
    report = values["report"]
    del report["settings"], report["blocks"], report["refinement"]["validations"]
    for went in (*report["reconstructions"], *(probe["reconstruction"] for probe in report["probes"])):
        del went["errors"]
    (folder / "result.json").write_text(json.dumps(values))
    (folder / "metric_set.safetensors").unlink()


def test_older_results_say_what_is_not_recorded(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(runs["refined"], tmp_path / "run")
    older(folder)
    assert dcvit.load(folder).proxy_set is None
    text = write_report(folder).read_text()
    parsed(text)
    for part in ("the settings", "the original&#39;s blocks", "synthesised images", "the errors over time"):
        assert f"<li>{part}" in text, part
    assert "Architecture before and after" not in text


def test_few_shot_images_are_never_saved(tmp_path: Path) -> None:
    images = torch.randn(3, 3, 32, 32)
    config = replace(QUICK, ablation=dcvit.config.Ablation(ranking_images="few-shot"))
    result = dcvit.compress(VARIANTS["plain"].create(), images, dcvit.Budget(macs=0.8), config)
    result.save(tmp_path / "out")
    assert not (tmp_path / "out" / "metric_set.safetensors").exists()
    assert "few-shot images, which are never saved" in write_report(tmp_path / "out").read_text()


def test_the_proxy_set_is_loaded_again(runs: dict[str, Path], tmp_path: Path) -> None:
    model = VARIANTS["plain"].create()
    made = dcvit.data.synthesis.synthesize(model, QUICK.synthesis)
    result = replace(dcvit.load(runs["reconstructed"]), proxy_set=made)
    result.save(tmp_path / "out")
    loaded = dcvit.load(tmp_path / "out").proxy_set
    assert loaded is not None
    assert made.targets is not None
    # Half of one of 255 steps in pixels; timm's default normalisation divides by 0.5.
    assert (loaded.images - made.images).abs().max() <= 0.5 / 255 / 0.5 + 1e-6
    assert torch.equal(loaded.targets, made.targets) if loaded.targets is not None else False
    assert (loaded.loss, loaded.losses) == (made.loss, made.losses)
    (tmp_path / "out" / "metric_set.safetensors").write_bytes(b"broken")
    with pytest.raises(dcvit.errors.SaveFolderError, match="not a proxy set"):
        dcvit.load(tmp_path / "out")


def test_overwriting_leaves_nothing_stale(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(runs["reconstructed"], tmp_path / "run")
    result = replace(dcvit.load(folder), proxy_set=None)
    result.save(folder, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == sorted(SAVED_FILES)


def test_a_family_marks_where_block_dropping_wins() -> None:
    page = made_up_page()
    (table,) = page.sections[0].items
    marked = {table.rows[index][0]: table.rows[index][-1] for index in table.marked}  # type: ignore[union-attr]
    assert marked == {
        "60%": "agreement with the original by MACs, agreement with the original by latency",
        "2 blocks less": "agreement with the original by MACs, agreement with the original by latency",
    }
    assert "Block dropping is ahead of 60% in agreement with the original at the same MACs or less." in page.html()
    assert "Block dropping is nowhere ahead in top-1 at the same latency or less." in page.html()
    rows = [[row[0] for row in parsed(figure).marked] for figure in figures(page.html())]
    assert rows == [["2 blocks less", "60%"], [], ["2 blocks less", "60%"], []]

    much_dearer = [replace(p, macs=700) if p.name == "2 blocks less" else p for p in family()]
    page = family_page(much_dearer, title="A family", evaluated_on="images")
    assert "Block dropping is nowhere ahead in agreement with the original at the same MACs or less." in page.html()


def test_a_family_says_what_was_not_measured() -> None:
    points = [replace(point, latency_ms=None, top1=None) for point in family()]
    page = family_page(points, title="A family", evaluated_on="images")
    assert page.not_recorded == ["latency of any model: it was not measured", "top-1 of any model: it was not measured"]
    assert len(page.sections[1].items) == 1
    with pytest.raises(dcvit.DcvitError, match="0 points of kind 'original'"):
        family_page(family()[1:], title="", evaluated_on="")
    with pytest.raises(dcvit.DcvitError, match="kind='pruned'"):
        replace(points[0], kind="pruned")  # type: ignore[arg-type]


def test_colours_can_be_read_in_light_and_dark() -> None:
    """Contrast as WCAG 2 defines it: 4.5 for text, 3 for marks (success criteria 1.4.3 and 1.4.11)."""
    css = (Path(dcvit.__file__).parent / "report" / "page.css").read_text()
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S)
    )
    assert light.keys() == dark.keys()

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for colours in (light, dark):
        for text in ("ink", "muted", *(f"s{i}" for i in range(8))):
            for ground in ("page", "card", "mark") if text == "ink" else ("page", "card"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        for mark in ("accent", "other", "plain", "ghost", "axis"):
            assert contrast(colours[mark], colours["card"]) >= 3, mark


PROBE = """
<pre id="found"></pre><script>
const found = [];
addEventListener("load", () => {
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, view = frame.contentWindow, clashes = [];
    page.querySelectorAll("details").forEach((one) => { one.open = true; });
    let shown = 0;
    for (const svg of page.querySelectorAll("svg")) {
      const area = svg.getBoundingClientRect();
      if (!area.width) continue;
      shown += 1;
      const texts = [...svg.querySelectorAll("text")].map((text) => [text.textContent, text.getBoundingClientRect()]);
      texts.forEach(([text, box], i) => {
        if (box.left < area.left - 1 || box.right > area.right + 1
            || box.top < area.top - 1 || box.bottom > area.bottom + 1)
          clashes.push(`${text} leaves ${svg.getAttribute("aria-label")}`);
        for (const [other, at] of texts.slice(i + 1))
          if (Math.min(box.right, at.right) - Math.max(box.left, at.left) > 1
              && Math.min(box.bottom, at.bottom) - Math.max(box.top, at.top) > 3)
            clashes.push(`${text} covers ${other} in ${svg.getAttribute("aria-label")}`);
      });
    }
    found.push({
      name: frame.title, width: view.innerWidth, shown, clashes,
      overflow: page.documentElement.scrollWidth - view.innerWidth,
      broken: [...page.images].filter((image) => !image.complete || !image.naturalWidth).length,
      images: page.images.length, ground: view.getComputedStyle(page.body).backgroundColor,
    });
  }
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="chromium is not installed")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_everything(runs: dict[str, Path], tmp_path: Path, dark: bool) -> None:
    """At the widths of a phone and of a desk: pictures load, nothing overflows, labels touch neither edge nor label."""
    assert BROWSER is not None
    pages = {name: (folder / "report.html").read_text() for name, folder in runs.items()}
    pages["family"] = made_up_page().html()
    frames = "".join(
        f'<iframe title="{name}" width="{width}" height="900" style="border:0" srcdoc="{html.escape(text)}"></iframe>'
        for name, text in pages.items()
        for width in (390, 1000)
    )
    (tmp_path / "probe.html").write_text(f"<!doctype html>{frames}{PROBE}")
    finished = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
            *(["--blink-settings=preferredColorScheme=0"] if dark else []), "--enable-logging=stderr",
            "--dump-dom", (tmp_path / "probe.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert ":CONSOLE" not in finished.stderr
    match = re.search(r'<pre id="found">(.*?)</pre>', finished.stdout, re.DOTALL)
    assert match is not None, finished.stderr
    found: list[dict[str, Any]] = json.loads(html.unescape(match[1]))
    assert [(one["name"], one["width"]) for one in found] == [(name, width) for name in pages for width in (390, 1000)]
    for one in found:
        assert one["overflow"] <= 0, one
        assert one["clashes"] == [], one
        assert one["broken"] == 0, one
        assert one["images"] == (0 if one["name"] == "family" else 3)
        assert one["shown"] >= len(figures(pages[one["name"]]))
        brightness = sum(map(int, re.findall(r"\d+", one["ground"])[:3])) / 3
        assert brightness < 60 if dark else brightness > 200
