"""The comparison of methods: what is asked for, its table, the ablations, and ImageNet on a folder made here."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import dcvit
from benchmarks import compare
from benchmarks.compare import Record, Request
from benchmarks.contestants import ABLATIONS, OTHER_DOMAIN, config_of, images_of
from benchmarks.methods import BEDS
from benchmarks.testbeds import TestBed, digits, measure
from benchmarks.testbeds.imagenet import imagenet
from benchmarks.testbeds.train_photographs import RECIPES, train
from dcvit.errors import DcvitError
from dcvit.methods import METHODS
from dcvit.models import compressible, require_supported


def record(method: str = "dcvit", seed: int = 0, agreement: float = 0.9, **request: object) -> Record:
    """A finished run on the digits."""
    asked = replace(Request("digits", method, 0.25, seed, num_images=50, threads=1), **request)  # type: ignore[arg-type]
    return Record(
        request=asked, code="c1", header="a machine", macs=0.749, params=0.75, latency=0.8, agreement=agreement,
        top1=None, error=0.1, original_top1=0.964, seconds=36.0,
    )  # fmt: skip


def rows(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_puts_dcvit_first_and_the_best_in_bold() -> None:
    runs = [record("fskd", agreement=0.95), record(seed=1, agreement=0.92), record(agreement=0.9)]
    text = compare.report(runs)
    titles, _, first, second = rows(text)
    assert first[titles.index("method")] == "dcvit"
    assert first[titles.index("agreement %")] == "91.0 ± 1.4"
    assert second[titles.index("agreement %")] == "**95.0**"
    assert (first[titles.index("seeds")], first[titles.index("latency %")]) == ("2", "80 ± 0")
    assert "### digits (original: 96.4 % top-1)" in text
    assert "--beds digits --methods dcvit fskd --budgets 0.25 --seeds 2 --num-images 50" in text


def test_the_table_tells_epochs_apart() -> None:
    name = "all blocks at once"
    runs = [
        record(epochs=5), record(epochs=20, seed=1), record("fskd", epochs=5),
        record("mir", epochs=5), record("mir", epochs=20), record(ablation=name, epochs=100),
    ]  # fmt: skip
    text = compare.report(runs)
    assert [(row[2], row[3], row[-1]) for row in rows(text) if row[0] == "25%"] == [
        ("dcvit", "2", "–"), ("fskd", "1", "–"), ("mir", "1", "5"), ("mir", "1", "20"), (f"dcvit, {name}", "1", "100"),
    ]  # fmt: skip
    assert [line.rpartition(" ")[2] for line in text.splitlines() if "python -m" in line] == ["5", "20", "100"]


def test_a_few_shot_set_counts_once() -> None:
    """Epochs that a method does not read do not make two runs of one."""
    runs = [record(agreement=0.7), record(epochs=5), record("mir"), record("mir", epochs=5), record(seed=1)]
    assert compare.latest(runs) == runs[1:]


def test_a_record_survives_the_file() -> None:
    assert Record.from_dict(asdict(record(ablation="all blocks at once"))) == record(ablation="all blocks at once")


def test_a_method_is_left_out_where_it_does_not_handle_the_family() -> None:
    options = compare._parser().parse_args(["--budgets", "0.2", "--seeds", "1"])
    asked = {(request.bed, request.method) for request in compare._requests(options)}
    for bed, family in compare.FAMILIES.items():
        able = {name for name, method in METHODS.items() if family in method.families and "macs" in method.metrics}
        assert {name for b, name in asked if b == bed} == able
    assert compare.FAMILIES.keys() == BEDS.keys()


def test_budgets_are_of_macs_or_of_parameters() -> None:
    options = compare._parser().parse_args(["--beds", "digits", "--budgets", "0.3", "--seeds", "1", "--unit", "params"])
    asked = compare._requests(options)
    assert {request.unit for request in asked} == {"params"}
    assert {request.method for request in asked} == set(METHODS) - {"evit"}
    runs = [record("evit"), record(unit="params"), record("mini_deit", unit="params", agreement=0.8)]
    text = compare.report(runs)
    assert [row[0] for row in rows(text)[2:]] == ["25%", "25% of params", "25% of params"]
    assert "--methods evit --budgets 0.25 --seeds 1 --num-images 50\n" in text
    assert "--methods dcvit mini_deit --budgets 0.25 --seeds 1 --num-images 50 --unit params\n" in text
    before = asdict(record())
    del before["request"]["unit"]  # which earlier versions did not write
    assert Record.from_dict(before) == record()


def test_ablations_have_a_table_of_their_own() -> None:
    name = "class token only"
    text = compare.report([record(), record(ablation=name, agreement=0.5), record("cd", agreement=0.4)])
    whole, ablated = text.split("### digits, ablations of the published procedure")
    assert [row[2] for row in rows(whole)[2:]] == ["dcvit", "cd"]
    assert [row[2] for row in rows(ablated)[2:]] == [f"dcvit, {name}"]
    assert "--methods dcvit cd --budgets 0.25" in whole
    assert f"--beds digits --ablate '{name}' --budgets 0.25" in whole
    assert compare.report([record(ablation=name)]).count("python -m") == 1


def test_ablations_are_of_the_published_procedure() -> None:
    options = compare._parser().parse_args(["--beds", "digits", "--budgets", "0.2", "--seeds", "1", "--ablate"])
    asked = compare._requests(options)
    assert [request.ablation for request in asked] == list(ABLATIONS)
    assert {request.method for request in asked} == {"dcvit"}
    bed = digits(0)
    configs = {name: config_of("dcvit", bed, 0, 40, name) for name in ABLATIONS}
    published = configs.pop("published")
    assert published.distillation.epochs == 40
    assert published.distillation.warmup_epochs == 2
    assert published.structure == "fewest"
    assert configs.pop(OTHER_DOMAIN) == published
    assert all(config != published for config in configs.values())
    with pytest.raises(SystemExit):
        compare._parser().parse_args(["--ablate", "nothing"])


def test_images_of_another_domain_fit_the_model() -> None:
    bed = digits(0)
    foreign = images_of(bed, 0, OTHER_DOMAIN)
    assert foreign.shape == bed.images.shape
    assert not torch.equal(foreign, bed.images)
    assert torch.equal(images_of(bed, 0), bed.images)
    dcvit.load_images(foreign, bed.model)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
    other = TestBed("photographs", model, torch.randn(6, 3, 32, 32), torch.randn(2, 3, 32, 32))
    assert images_of(other, 0, OTHER_DOMAIN).shape == (6, 3, 32, 32)


def test_an_interrupted_table_goes_on_where_it_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[str] = []

    def run_command(command: str, request: dict[str, object], threads: int) -> tuple[dict[str, object], float]:
        made.append(str(request["method"]))
        if request["method"] == "cd" and len(made) < 3:
            raise DcvitError("it broke")
        found = asdict(record())
        return {key: value for key, value in found.items() if key not in ("request", "code")}, 1.0

    monkeypatch.setattr(compare, "run_command", run_command)
    monkeypatch.setattr("benchmarks.runs.prepare_bed", lambda bed: None)
    monkeypatch.setattr("benchmarks.runs.code_version", lambda measured: "c1")
    arguments = ["--beds", "digits", "--budgets", "0.25", "--methods", "dcvit", "cd", "--seeds", "1"]
    arguments += ["--out", str(tmp_path / "runs.jsonl"), "--results", str(tmp_path / "RESULTS.md")]
    assert compare.main(arguments) == 1
    assert "cd: it broke" in capsys.readouterr().err
    assert compare.main(arguments) == 0
    assert made == ["dcvit", "cd", "cd"]
    assert compare.main(["--table", *arguments]) == 0
    assert "| 25% | 50 | cd | 1 |" in (tmp_path / "RESULTS.md").read_text()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """ImageNet in small: three classes of four images."""
    for part in ("train", "val"):
        for label in range(3):
            place = tmp_path / part / f"n{label}"
            place.mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (40, 36), (60 * label, 20 * number, 80)).save(place / f"{number}.png")
    return tmp_path


def test_imagenet_draws_from_train_and_evaluates_on_val(folder: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=3).eval()
    bed = imagenet(folder, 2021, 5, model=model, num_held_out=7)
    assert bed.images.shape == (5, 3, 32, 32)
    assert bed.held_out.shape == (7, 3, 32, 32)
    assert bed.labels is not None
    assert set(bed.labels.tolist()) <= {0, 1, 2}
    other = imagenet(folder, 2022, 5, model=model, num_held_out=7)
    assert torch.equal(other.held_out, bed.held_out)
    assert not torch.equal(other.images, bed.images)
    assert measure(bed, model).agreement == 1
    with pytest.raises(DcvitError, match="val has 3 folders, the model 1000 classes"):
        imagenet(folder, 2021, model=timm.create_model("vit_tiny_patch16_224", depth=1), num_held_out=1)
    with pytest.raises(DcvitError, match="there is no folder train in it"):
        imagenet(folder / "val", 2021, model=model, num_held_out=1)


def test_imagenet_takes_the_paper_s_seeds_and_samples(folder: Path) -> None:
    options = compare._parser().parse_args(["--imagenet", str(folder), "--budgets", "0.166", "--methods", "dcvit"])
    asked = compare._requests(options)
    assert {request.seed for request in asked} == {2021, 2022, 2023, 2024, 2025}
    assert {request.num_images for request in asked} == {50, 100, 500, 1000}
    assert {request.bed for request in asked} == {"deit_base_patch16_224"}


@pytest.mark.parametrize("bed", ["swin", "resnet"])
def test_the_beds_models_are_trained_by_one_recipe(bed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.testbeds.train_photographs.NUM_CROPS", 36)
    model: nn.Module = train(bed, epochs=1)
    require_supported(model)
    assert compressible(model).input_size() == (3, 64, 64)
    fresh = RECIPES[bed].create(RECIPES[bed].architecture)
    assert model.state_dict().keys() == fresh.state_dict().keys()
