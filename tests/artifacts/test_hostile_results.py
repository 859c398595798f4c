"""Saved folders that someone else made, or changed: what is read is checked, and nothing in them leaves the folder."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

import dcvit
from dcvit.artifacts.hub import push_to_hub
from dcvit.artifacts.result import SAVED_FILES, original_name, read_record
from dcvit.report import write_report
from dcvit.report.family import saved_family_page
from tests.artifacts.test_saved_model import LocalHub
from tests.conftest import CUT_REFINED

SECRET = "-----BEGIN PRIVATE KEY-----"


@pytest.fixture(scope="module")
def result() -> dcvit.CompressionResult:
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return dcvit.compress("demo", images, dcvit.Budget(macs=0.7), CUT_REFINED)


@pytest.fixture(scope="module")
def saved(result: dcvit.CompressionResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("saved")
    result.save(place / "small")
    dcvit.Family(result.report.teacher, [result]).save(place / "family")
    write_report(place / "small")
    write_report(place / "family")
    return place


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved / "small", tmp_path / "small")


@pytest.fixture
def family(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved / "family", tmp_path / "family")


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    """Whatever hangs ends after 10 seconds."""

    def ended(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("nothing was answered within 10 seconds")

    before = signal.signal(signal.SIGALRM, ended)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def change(folder: Path, *steps: Any, to: Any, file: str = "result.json") -> None:
    """Put a value, or what a function makes of it, into a JSON file, at a place given by keys and indices."""
    values = json.loads((folder / file).read_text())
    *way, last = steps
    holder = values
    for step in way:
        holder = holder[step]
    holder[last] = to(holder[last]) if callable(to) else to
    (folder / file).write_text(json.dumps(values))


# Special files.


def large(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)  # it holds nothing and takes no room


SPECIAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "FIFO": (os.mkfifo, "is a FIFO"),
    "folder": (Path.mkdir, "is a folder"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "is a link"),
    "link": (lambda path: path.symlink_to(Path(__file__)), "is a link"),
    "large": (large, "more than the"),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["result.json", "metric_set.safetensors"])
def test_what_is_no_regular_file_of_moderate_size_is_refused(kind: str, name: str, folder: Path) -> None:
    make, told = SPECIAL[kind]
    (folder / name).unlink()
    make(folder / name)
    for call in (dcvit.load, write_report, *([original_name] if name == "result.json" else [])):
        with pytest.raises(dcvit.errors.SaveFolderError, match=told):
            call(folder)


@pytest.mark.parametrize("kind", SPECIAL)
def test_the_same_of_the_index_of_a_family(kind: str, family: Path) -> None:
    make, told = SPECIAL[kind]
    (family / "family.json").unlink()
    make(family / "family.json")
    for call in (dcvit.load_family, write_report):
        with pytest.raises(dcvit.errors.SaveFolderError, match=told):
            call(family)


@pytest.mark.parametrize("kind", SPECIAL)
def test_only_a_report_is_replaced_by_a_report(kind: str, folder: Path) -> None:
    (folder / "report.html").unlink()
    SPECIAL[kind][0](folder / "report.html")
    with pytest.raises(dcvit.errors.SaveFolderError, match="is not a report that dcvit wrote"):
        write_report(folder)
    assert not (folder / "nowhere").exists()


def test_a_member_is_a_folder_in_the_family_s_own(family: Path, folder: Path) -> None:
    (member,) = (path for path in family.iterdir() if path.is_dir())
    shutil.rmtree(member)
    member.symlink_to(folder)
    with pytest.raises(dcvit.errors.SaveFolderError, match="is a link: put the member's folder itself"):
        dcvit.load_family(family)


# Text that is no result.


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("9" * 5_000, "a number has 5,000 digits"),
        ('{"report": {"model": ' + "9" * 5_000 + "}}", "a number has 5,000 digits"),
    ],
    ids=["lists", "tables", "number", "number inside"],
)
def test_json_that_exhausts_a_parser_is_refused(text: str, told: str, folder: Path) -> None:
    (folder / "result.json").write_text(text)
    for call in (dcvit.load, write_report, original_name):
        with pytest.raises(dcvit.errors.SaveFolderError, match=told):
            call(folder)


@pytest.mark.parametrize("place", ["model", "settings"])
def test_values_nested_deeply_are_refused(place: str, folder: Path) -> None:
    value: Any = {"one": 1}
    for _ in range(700):
        value = {"more": value}
    change(folder, "report", place, to=value)
    with pytest.raises(
        dcvit.errors.SaveFolderError, match=rf"Report\.{place}.* (is nested more than 16 deep|expected str)"
    ):
        write_report(folder)


# Values that do not fit each other.

STEP = {"loss_before": 1.0, "loss_after": 1.0, "losses": [], "learning_rate": 1.0, "seconds": 1.0}
CONTRADICTIONS: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "candidate twice": (("plan", "candidates"), [1, 2, 1], "plan.candidates names block 1 twice"),
    "candidate beyond": (("plan", "candidates"), [1, 64], "plan.candidates names block 64: the model has 8, from 0"),
    "negative block": (("plan", "candidates"), [-1], "plan.candidates names block -1"),
    "block twice": (("plan", "blocks"), lambda blocks: [*blocks, blocks[0]], "plan.blocks names block . twice"),
    "no block": (("plan", "blocks"), [], "plan.blocks is empty"),
    "block less": (("plan", "blocks"), lambda blocks: blocks[1:], "plan.num_blocks is ., but plan.blocks names"),
    "pruned elsewhere": (("plan", "pruned"), [0], "plan.pruned names block 0, which plan.blocks does not"),
    "convolved": (("plan", "convolved"), [1], "plan.convolved names block 1, which plan.pruned does not"),
    "kept of no block": (("plan", "kept_units", "0"), [0], "plan.kept_units names block 0, which plan.blocks does not"),
    "kept of one less": (("plan", "kept_units"), lambda kept: dict([*kept.items()][1:]), "which plan.kept_units does"),
    "heads of no block": (("plan", "kept_heads"), {"0": [0]}, "plan.kept_heads names block 0, which plan.blocks"),
    "owner": (("plan", "mlp_of"), {"1": 2}, "plan.mlp_of names block 1|plan.mlp_of names block 2"),
    "report of a block beyond": (("report", "probes", 0, "block"), 9, "report.probes names block 9"),
    "probe twice": (("report", "probes"), lambda probes: [probes[0], *probes], "report.probes names block . twice"),
    "losses cut": (
        ("report", "probes", 0, "sensitivity", "losses"),
        lambda losses: losses[1:],
        "sensitivity of block . has .* units and .* losses",
    ),
    "nodes mixed": (
        ("report", "probes", 0, "sensitivity", "units"),
        lambda units: units[::-1],
        "sensitivity of block .: expected numbers from 0, ascending",
    ),
    "blocks cut": (("report", "blocks_after"), lambda shapes: shapes[1:], "report.blocks_after has 7 blocks"),
    "another block": (
        ("report", "blocks_after", 0, "hidden_features"), 5, r"report\.blocks_after\[0\] is not report\.blocks\[0\]"
    ),
    "reconstructed twice": (
        ("report", "reconstructions"), lambda made: [*made, made[0]], "report.reconstructions names block . twice"
    ),
    "steps": (("report", "steps"), [STEP] * 7, "report.steps has 7 entries for"),
    "nothing to divide by": (("report", "teacher", "macs"), 0, "report.teacher.macs is 0: expected a number above 0"),
    "no images": (("report", "num_images"), 0, "report.num_images is 0: expected 1 to"),
    "agreement": (("report", "agreement"), 7.0, "report.agreement is 7.0: expected 0 to 1"),
    "versions": (("report", "versions"), {}, "report.versions has no dcvit"),
    **{
        f"{name} of {whose} alone": (
            ("report", whose, name), value,
            rf"report\.teacher\.{name} is .* and report\.student\.{name} .*: expected both",
        )
        for name, value in (("top1", 0.5), ("activation_memory", 1000)) for whose in ("teacher", "student")
    },
    "file_size of the original alone": (
        ("report", "student", "file_size"), None, r"report\.teacher\.file_size is .* and .*: expected both"
    ),
    "no bytes": (("report", "teacher", "file_size"), 0, "report.teacher.file_size is 0: expected a number above 0"),
    "no batch": (("report", "latency_batch"), 0, "report.latency_batch is 0: expected 1 to"),
    "no time": (("report", "latency_ratio"), -1.0, "report.latency_ratio is -1.0: expected a number above 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_result_that_contradicts_itself_is_refused(name: str, folder: Path) -> None:
    place, to, told = CONTRADICTIONS[name]
    change(folder, *place, to=to)
    for call in (read_record, dcvit.load, write_report):
        with pytest.raises(dcvit.errors.SaveFolderError, match=told):
            call(folder)


def test_kept_hidden_units_are_those_of_the_blocks(folder: Path) -> None:
    result = json.loads((folder / "result.json").read_text())
    (block, *_) = result["plan"]["kept_units"]
    hidden = result["report"]["blocks"][int(block)]["hidden_features"]
    change(folder, "plan", "kept_units", block, to=lambda kept: kept[::-1])
    with pytest.raises(
        dcvit.errors.SaveFolderError, match=r"plan\.kept_units\[.\]: expected numbers from 0, ascending"
    ):
        read_record(folder)
    change(folder, "plan", "kept_units", block, to=lambda kept: [*kept[::-1], hidden])  # they count from 0
    with pytest.raises(dcvit.errors.SaveFolderError, match=rf"keeps hidden unit {hidden} of {hidden}"):
        read_record(folder)
    change(folder, "plan", "kept_units", block, to=lambda kept: kept[:-2])
    with pytest.raises(dcvit.errors.SaveFolderError, match=r"keeps .* hidden units, report\.blocks_after\[.\] has"):
        read_record(folder)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"pixels": torch.zeros(2, 8, 8, dtype=torch.uint8)}, "pixels torch.uint8"),
        ({"pixels": torch.zeros(2, 1, 8, 8)}, "pixels torch.float32"),
        ({"pixels": torch.zeros(0, 1, 8, 8, dtype=torch.uint8)}, "pixels torch.uint8"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets torch.int64 \[3\]"),
        ({"losses": torch.zeros(())}, "losses torch.float32"),
    ],
    ids=["flat", "float", "empty", "targets", "losses"],
)
def test_a_proxy_set_holds_images(tensors: dict[str, torch.Tensor], told: str, folder: Path) -> None:
    valid = {
        "pixels": torch.zeros(2, 1, 8, 8, dtype=torch.uint8),
        "targets": torch.zeros(2, dtype=torch.int64),
        "losses": torch.zeros(3),
    }
    save_file({**valid, **tensors}, folder / "metric_set.safetensors")
    for call in (dcvit.load, write_report):
        with pytest.raises(dcvit.errors.SaveFolderError, match=told):
            call(folder)


def test_a_proxy_set_of_another_model_is_refused(folder: Path) -> None:
    """Of a result without digests, as earlier versions saved it; else those tell before the shape does."""
    result = json.loads((folder / "result.json").read_text())
    del result["digests"]
    (folder / "result.json").write_text(json.dumps(result))
    pixels, targets = torch.zeros(2, 3, 9, 9, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    save_file({"pixels": pixels, "targets": targets, "losses": torch.zeros(3)}, folder / "metric_set.safetensors")
    with pytest.raises(
        dcvit.errors.SaveFolderError, match=r"images of the size \(3, 9, 9\), the model takes \(1, 8, 8\)"
    ):
        dcvit.load(folder)


@pytest.mark.parametrize(
    ("place", "to", "told"),
    [
        (("points",), [], "0 points of kind 'original'"),
        (("points", 1, "kind"), "original", "2 points of kind 'original'"),
        (("points", 1, "kind"), ["dcvit"], "kind"),
        (("points", 0, "macs"), 0, "'original' has 0 MACs"),
        (("points", 0, "macs"), "many", "macs is 'many': expected int"),
        (("points", 0), 3, "is 3: expected a table"),
        (("members",), {}, "members is {}: expected a list"),
        (("settings",), [], "settings is"),
        (("versions",), {"dcvit": 3}, "expected str"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(place: tuple[Any, ...], to: Any, told: str, family: Path) -> None:
    change(family, *place, to=to, file="family.json")
    with pytest.raises(dcvit.DcvitError, match=told):
        write_report(family)


def test_a_member_is_named_once(family: Path) -> None:
    change(family, "members", to=lambda members: members * 2, file="family.json")
    with pytest.raises(dcvit.errors.SaveFolderError, match="names a member twice"):
        dcvit.load_family(family)


@pytest.mark.parametrize("name", ["a" * 5_000, "a\0b", "\udc80", "small", "..", "macs-1/../.."])
def test_a_member_s_name_is_one_that_dcvit_gives(name: str, family: Path) -> None:
    change(family, "members", 0, "folder", to=name, file="family.json")
    with pytest.raises(dcvit.errors.SaveFolderError, match="expected a folder beside it, such as macs-1000"):
        dcvit.load_family(family)


def test_values_that_no_chart_can_show_are_left_out(folder: Path, family: Path) -> None:
    for probe, error in enumerate((1e308, 5e-324)):
        change(folder, "report", "probes", probe, "metric_loss", to=error)
    change(folder, "report", "refinement", "validations", to=[[2**62, 1.0], [2**62 + 1, 1e308], [2**62 + 2, -1e308]])
    assert "1e+308" in write_report(folder).read_text()
    change(family, "points", 1, "latency_ms", to=1e308, file="family.json")
    change(family, "points", 1, "agreement", to=float("inf"), file="family.json")
    write_report(family)


# Names that are more than a name.


@pytest.mark.parametrize("name", ["deit\udc80", "\ud800", "a\x00b"])
def test_a_name_that_utf_8_cannot_hold_comes_as_its_escape(
    name: str, folder: Path, result: dcvit.CompressionResult, tmp_path: Path
) -> None:
    change(folder, "report", "model", to=name)
    shown = name.encode("utf-8", "backslashreplace").decode()
    assert shown.replace("\0", "") in write_report(folder).read_text(encoding="utf-8").replace("\0", "")
    named = replace(result, report=replace(result.report, model=name))
    named.save(tmp_path / "named")
    assert shown in (tmp_path / "named" / "README.md").read_text(encoding="utf-8")


HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "[free](https://evil.example)",
    "![x](https://evil.example/x.png)",
    "https://evil.example",
    "www.evil.example",
    "`<b>`",
    "a\n\n<script>alert(1)</script>",
    "a\n---\nlicense: mit\n---\n",
    "&lt;b&gt;",
    "# Heading",
    "| a | b |",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_card_shows_names_as_words_or_code(name: str, result: dcvit.CompressionResult) -> None:
    report = replace(
        result.report, model=name, method=name, base_model=name, versions={**result.report.versions, name: name}
    )
    model = result.model
    before = dict(model.pretrained_cfg)
    model.pretrained_cfg = {**before, "license": name}
    try:
        text = replace(result, report=report).files()["README.md"]
    finally:
        model.pretrained_cfg = before
    card = ModelCard(text)
    read = card.data.to_dict()
    assert read["base_model"] == name
    assert read["license_name"] == name
    assert read["library_name"] == "timm"
    outside = "".join(card.text.split("```")[::2])  # without blocks of code
    code = outside.split("`")
    assert len(code) % 2 == 1
    plain = "".join(code[::2])  # without code in a line
    for part in ("<", "evil", "](", "script", "&lt;", "Heading", "a | b"):
        assert part not in plain, part
    assert [line for line in outside.splitlines() if line.startswith("#")] == [
        f"# `{' '.join(name.replace('`', chr(39)).split())}`, compressed",
        "## Figures", "## How to load", "## Images", "## Licence", "## Versions",
    ]  # fmt: skip


# Uploads.


@pytest.mark.parametrize("name", SAVED_FILES)
def test_push_follows_no_link(name: str, folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / name, tmp_path / "outside")
    (folder / name).symlink_to(Path("..") / "outside")
    hub = LocalHub(tmp_path / "hub")
    with pytest.raises(dcvit.errors.SaveFolderError, match="is a link"):
        push_to_hub(folder, "someone/small", api=hub)
    assert not (tmp_path / "hub").exists()


def test_push_writes_card_and_module_anew(folder: Path, tmp_path: Path) -> None:
    module = (folder / "modeling_dcvit.py").read_bytes()
    (folder / "modeling_dcvit.py").write_text("import os\nos.system('true')\n")
    (folder / "README.md").write_text(SECRET)
    hub = LocalHub(tmp_path / "hub")
    push_to_hub(folder, "someone/small", api=hub)
    uploaded = tmp_path / "hub" / "someone" / "small"
    assert sorted(path.name for path in uploaded.iterdir()) == sorted(SAVED_FILES)
    assert (uploaded / "modeling_dcvit.py").read_bytes() == module
    assert SECRET not in (uploaded / "README.md").read_text()
    assert "Weights are stored in float32." in (uploaded / "README.md").read_text()
    for name in ("modeling_dcvit.py", "README.md"):
        (folder / name).unlink()
    push_to_hub(folder, "someone/again", api=hub)
    assert (uploaded.parent / "again" / "README.md").read_bytes() == (uploaded / "README.md").read_bytes()


def test_the_uploaded_card_names_the_dtype_of_the_weights(result: dcvit.CompressionResult, tmp_path: Path) -> None:
    result.save(tmp_path / "half", dtype=torch.bfloat16)
    push_to_hub(tmp_path / "half", "someone/half", api=LocalHub(tmp_path / "hub"))
    card = (tmp_path / "hub" / "someone" / "half" / "README.md").read_text()
    assert card == (tmp_path / "half" / "README.md").read_text()
    assert "Weights are stored in bfloat16." in card


def test_an_index_as_it_is_saved_has_a_page(family: Path) -> None:
    assert saved_family_page(json.loads((family / "family.json").read_text())).html().startswith("<!doctype html>")
