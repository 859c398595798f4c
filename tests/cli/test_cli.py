"""The command line as a person and a program use it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dcvit
from dcvit.cli import main
from dcvit.cli.compress import COMMAND
from dcvit.demo.comparison import DEMO_CONFIG, PUBLISHED_DEMO_CONFIG
from dcvit.methods import METHODS
from dcvit.runtime.progress import TerminalProgress
from dcvit.search.plan import plan as make_plan
from tests.conftest import QUICK, SYNTHESIS, slow_but

FEW = ["--synthesis-iterations", "2", "--synthesis-images", "2", "--tv-exponent", "1"]
PAPER = dcvit.DCViT.paper()
DISTILLATION = ["--recovery", "distillation", "--epochs", "1", "--learning-rate", "1e-4"]


def quickly(*args: Any, **kwargs: Any) -> dcvit.CompressionResult:
    """`dcvit.compress`, on fewer views and without the refinement where blocks are reconstructed."""
    model, images, budget, config = args
    if isinstance(config.recovery, dcvit.config.ReconstructionConfig):
        config = replace(config, recovery=replace(config.recovery, num_views=10, num_rows=1000, refinement_steps=0))
    return dcvit.compress(model, images, budget, config, **kwargs)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of real photographs, which scikit-image ships."""
    from skimage import data

    folder = tmp_path_factory.mktemp("photographs")
    for name in ("astronaut", "coffee", "chelsea", "rocket"):
        Image.fromarray(getattr(data, name)()).save(folder / f"{name}.jpg")
    Image.fromarray(data.camera()).save(folder / "camera.png")  # grey
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recovery", "stage"),
    [([], "reconstruction: loss"), pytest.param(DISTILLATION, "probes: loss", marks=pytest.mark.slow)],
    ids=["default", "distillation"],
)
def test_compress_a_timm_model_from_photographs(
    recovery: list[str],
    stage: str,
    photographs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dcvit.cli.compress.compress", quickly)
    out = str(tmp_path / "out")
    model = ["vit_tiny_patch16_224", "--random-weights"]
    code, text, progress = run(
        capsys,
        "compress",
        *model,
        "--data",
        str(photographs),
        "--macs",
        "0.85",
        "--out",
        out,
        "--candidates",
        "3,4,5",
        *recovery,
        *FEW,
    )
    assert code == 0, progress
    assert "compressed" in text
    assert stage in progress
    result = json.loads((Path(out) / "result.json").read_text())
    assert result["student"]["macs"] <= 0.85 * result["teacher"]["macs"]
    assert set(result["blocks"]) <= {3, 4, 5}

    code, text, _ = run(capsys, "evaluate", f"local-dir:{out}", "--data", str(photographs), "--json")
    assert code == 0
    values = json.loads(text)
    assert values["macs"]["with_attention_products"] == result["student"]["macs"]
    assert values["images"] == 5
    assert values["top1"] is None
    steps, blocks = (result["report"][name] for name in ("steps", "reconstructions"))
    assert (len(steps), len(blocks)) == ((len(result["blocks"]), 0) if recovery else (0, len(result["blocks"])))

    page = Path(out) / "report.html"
    written = page.read_bytes()
    page.unlink()
    code, text, _ = run(capsys, "report", out)
    assert (code, text) == (0, f"Report: {page}\n")
    assert page.read_bytes() == written

    code, _, error = run(capsys, "compress", *model, "--data", str(photographs), "--macs", "0.9", "--out", out, *FEW)
    assert code == 2
    assert "earlier result" in error
    assert json.loads((Path(out) / "result.json").read_text()) == result


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], dcvit.config.ReconstructionConfig()),
        (["--recovery", "reconstruction"], dcvit.config.ReconstructionConfig()),
        (["--epochs", "3"], dcvit.config.ReconstructionConfig(epochs=3)),
        (["--recovery", "distillation"], dcvit.config.DistillationConfig()),
        (
            ["--recovery", "distillation", "--epochs", "3", "--learning-rate", "0.01"],
            dcvit.config.DistillationConfig(epochs=3, learning_rate=0.01),
        ),
        (["--preset", "fast"], dcvit.DCViT.fast().recovery),
        (["--preset", "default"], dcvit.config.ReconstructionConfig()),
        (["--preset", "best"], dcvit.DCViT.best().recovery),
        (["--preset", "paper"], PAPER.recovery),
        (["--preset", "paper", "--recovery", "distillation", "--epochs", "3"], replace(PAPER.distillation, epochs=3)),
        (["--preset", "paper", "--learning-rate", "0.01"], replace(PAPER.distillation, learning_rate=0.01)),
    ],
)
def test_options_of_the_recovery(
    options: list[str], expected: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dcvit.DCViT] = []

    def caught(*args: Any, **kwargs: Any) -> None:
        seen.append(args[3])
        raise KeyboardInterrupt

    monkeypatch.setattr("dcvit.cli.compress.compress", caught)
    out = str(tmp_path / "out")
    assert (
        main(["compress", "demo", "--data", "digits", "--macs", "0.75", "--seed", "4", "--out", out, *options]) == 130
    )
    (config,) = seen
    assert config.recovery == expected
    others = PAPER if "paper" in options else dcvit.DCViT()
    assert config == others.with_(recovery=config.recovery, seed=4)


def test_demo_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fewer = replace(
        DEMO_CONFIG.reconstruction, num_views=20, num_rows=1000, epochs=2, step_sizes=(0.03,), refinement_steps=0
    )
    monkeypatch.setattr("dcvit.cli.demo.DEMO_CONFIG", replace(DEMO_CONFIG, recovery=fewer, synthesis=SYNTHESIS))
    monkeypatch.setattr("dcvit.cli.demo.PUBLISHED_DEMO_CONFIG", replace(PUBLISHED_DEMO_CONFIG, synthesis=SYNTHESIS))
    digits = dcvit.demo.load_digits()
    smaller = replace(digits, test_images=digits.test_images[:100], test_labels=digits.test_labels[:100])
    monkeypatch.setattr("dcvit.cli.demo.load_digits", lambda: smaller)
    out = tmp_path / "demo"
    code, text, _ = run(capsys, "demo", "--seeds", "2", "--epochs", "1", "--num-images", "8", "--out", str(out))
    assert code == 0
    lines = [line for line in text.splitlines() if "±" in line and "mean" not in line]
    assert [line.split("  ")[0].strip() for line in lines] == [
        "original", "block dropping, not recovered", "block dropping (PRACTISE)",
        "DC-ViT as published, shortened", "dcvit",
    ]  # fmt: skip
    assert "dcvit is " in text
    assert " points " in text
    assert text.splitlines()[-1] == f"Report: {out / 'report.html'}"
    page = (out / "report.html").read_text()
    assert "Methods compared" in page
    assert "demo, compressed to 75.0" in page
    values = json.loads((out / "result.json").read_text())
    wanted = (
        "teacher student budget blocks hidden_features drop_ratio agreement distillation_loss seconds seed versions"
    )
    assert values.keys() >= set(wanted.split())
    original, raw, practise, published, ours = values["comparison"]
    assert published["macs"] == ours["macs"]
    assert original["top1"] == {"mean": values["teacher"]["top1"], "std": 0.0}
    assert original["agreement"]["mean"] == 1.0
    assert values["student"]["top1"] == ours["rows"][0]["top1"]
    # At equal MACs: below block dropping's by less than one hidden unit in each compressed block.
    assert raw["macs"] == practise["macs"]
    assert 0 <= practise["macs"] - ours["macs"] < 2 * 64 * 17 * len(values["blocks"])
    assert dcvit.load(out).model(dcvit.demo.load_digits().test_images[:2]).shape == (2, 10)


@pytest.mark.slow
def test_latency_of_a_compressed_model_and_its_original(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = str(tmp_path / "small"), tmp_path / "figures" / "latency.json"
    result = dcvit.compress(
        dcvit.models.load_model("demo"), dcvit.demo.load_digits().few_shot(6, 0), dcvit.Budget(macs=0.7), QUICK
    )
    replace(result, report=replace(result.report, model="demo")).save(folder)
    asked = ["latency", folder, "--original", "--batch-size", "4", "--runs", "3", "--warmup", "1"]
    code, text, error = run(capsys, *asked, "--json", str(file))
    assert code == 0, error
    values = json.loads(file.read_text())
    assert [row["model"] for row in values["rows"]] == ["demo", folder]
    assert [row["runs"] for row in values["rows"]] == [3, 3]
    assert values["rows"][0]["ratio"] == 1
    assert values["rows"][1]["weight_bytes"] == 4 * result.report.student.params
    assert values.keys() == {*("rows", "batch_size", "warmup", "device", "clock", "threads", "load", "versions")}
    for row in values["rows"]:
        assert f"{row['median_ms']:.2f}" in text
        assert row["median_ms"] <= row["p95_ms"]

    code, _, error = run(capsys, *asked, "--json", str(file))
    assert code == 2
    assert "replace it with overwrite=True (--overwrite)" in error
    assert json.loads(file.read_text()) == values
    assert run(capsys, *asked, "--json", str(file), "--overwrite")[0] == 0
    assert json.loads(file.read_text()) != values
    assert run(capsys, *asked, "--json", str(tmp_path))[0] == 2

    code, text, _ = run(capsys, *asked, "--json")
    assert code == 0
    assert [row["model"] for row in json.loads(text)["rows"]] == ["demo", folder]
    (Path(folder) / "result.json").unlink()
    code, _, error = run(capsys, *asked)
    assert code == 2
    assert "has no result.json" in error


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (["--latency-ms", "12"], dcvit.Budget(latency_ms=12.0)),
        (["--latency-ms", "12", "--latency-batch", "8"], dcvit.Budget(latency_ms=12.0, batch_size=8)),
        (["--latency", "0.75"], dcvit.Budget(latency=0.75)),
        (["--file-size", "0.8"], dcvit.Budget(file_size=0.8)),
        (["--file-size", "1.2M"], dcvit.Budget(file_size=1_200_000)),
        (["--activation-memory", "3M", "--memory-batch", "32"],
         dcvit.Budget(activation_memory=3_000_000, batch_size=32)),
        (["--params", "300K"], dcvit.Budget(params=300_000)),
    ],
)  # fmt: skip
def test_options_of_the_budget(
    option: list[str], expected: dcvit.Budget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, ...]] = []

    def caught(*args: Any, **kwargs: Any) -> None:
        seen.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr("dcvit.cli.compress.compress", caught)
    asked = ["compress", "demo", "--data", "digits", "--out", str(tmp_path / "out"), "--round-to", "8"]
    asked += ["--structure", "fewest"]
    assert main([*asked, *option]) == 130
    ((_, _, budget, config),) = seen
    assert budget == expected
    assert config.round_to == 8
    assert config.structure == "fewest"


@pytest.mark.slow
def test_a_latency_budget_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopwatch(module: Any, inputs: Any) -> float:
        return sum(parameter.numel() for parameter in module.parameters()) / 1e8

    def timed(*args: Any, **kwargs: Any) -> dcvit.CompressionResult:
        return quickly(*args, **kwargs, stopwatch=stopwatch)

    monkeypatch.setattr("dcvit.cli.compress.compress", timed)
    out = str(tmp_path / "out")
    code, text, error = run(
        capsys, "compress", "demo", "--data", "digits", "--latency", "0.7", "--out", out, "--num-images", "6", *FEW
    )
    assert code == 0, error
    values = json.loads((Path(out) / "result.json").read_text())
    ratio = values["student"]["params"] / values["teacher"]["params"]
    assert abs(ratio / 0.7 - 1) <= 0.03
    assert f"at batch 64: asked 0.7000, planned structure {ratio:.4f}, finished model {ratio:.4f}" in text
    assert "calibration: " in error
    assert "calibration: loss" not in error

    values["report"]["latency_ratio"] = 0.75
    assert "+7.1 % from the goal, more than when planned" in COMMAND.show({**values, "out": out, "page": "page"})


def test_synthesize(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file

    out = str(tmp_path / "set")
    code, text, _ = run(capsys, "synthesize", "demo", "--num-images", "4", "--iterations", "3", "--out", out, "--json")
    assert code == 0
    assert json.loads(text)["images"] == [4, 1, 8, 8]
    tensors = load_file(Path(out) / "metric_set.safetensors")
    assert tensors["images"].shape == (4, 1, 8, 8)
    assert tensors["targets"].shape == (4,)
    with Image.open(Path(out) / "images.png") as image:
        assert image.size[0] > 8
    code, _, error = run(capsys, "synthesize", "demo", "--out", out)
    assert code == 2
    assert "is not empty" in error


def digits_by_label(folder: Path, count: int) -> None:
    """Test images in one subfolder for each class."""
    digits = dcvit.demo.load_digits()
    for i in range(count):
        label = int(digits.test_labels[i])
        pixels = (digits.test_images[i, 0] * dcvit.demo.digits.STD + dcvit.demo.digits.MEAN).numpy() * 255
        (folder / str(label)).mkdir(exist_ok=True)
        Image.fromarray(np.round(pixels).astype(np.uint8)).save(folder / str(label) / f"{i}.png")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the command line shows them
@pytest.mark.parametrize("num_images", slow_but([[], ["--num-images", "101"]], []), ids=["all", "some"])
def test_a_broken_file_among_labelled_ones(
    num_images: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is left out of the images and of the labels, and the rest keep theirs."""
    data = tmp_path / "data"
    data.mkdir()
    digits_by_label(data, 100)
    (data / "3" / "0.png").write_bytes(b"broken")  # the first of its folder
    code, text, error = run(
        capsys, "compress", "demo", "--data", str(data), "--macs", "0.99", "--method", "fskd", "--out",
        str(tmp_path / "out"), *num_images, "--json",
    )  # fmt: skip
    assert code == 0, error
    assert "dcvit: warning: 1 of 101 files cannot be read" in error
    assert json.loads(text)["teacher"]["top1"] > 0.9


@pytest.mark.parametrize("count", slow_but(["0", "-3", "99"], "99"))
def test_as_many_images_as_there_are(count: str, photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = run(
        capsys, "compress", "vit_tiny_patch16_224", "--random-weights", "--data", str(photographs), "--macs", "0.9",
        "--num-images", count, "--out", "never",
    )  # fmt: skip
    assert code == 2
    assert f"--num-images {count}: expected 1 to 5" in error


@pytest.mark.slow
def test_a_method_that_keeps_nothing_leaves_the_run_of_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder = tmp_path / "out.run"
    run_folder.mkdir()
    (run_folder / "run.json").write_text("{}")
    code, _, error = run(
        capsys, "compress", "demo", "--data", "digits", "--num-images", "5", "--macs", "0.9", "--method", "fskd",
        "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert code == 0, error
    assert (run_folder / "run.json").is_file()


@pytest.mark.slow
def test_a_refused_budget_does_not_stop_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dcvit.cli.compress.compress", quickly)
    for macs, wanted in (("0.01", 2), ("0.75", 0)):
        code, _, error = run(
            capsys, "compress", "demo", "--data", "digits", "--num-images", "6", "--macs", macs, "--out",
            str(tmp_path / "out"), *FEW,
        )  # fmt: skip
        assert code == wanted, error
    assert not (tmp_path / "out.run").exists()


@pytest.mark.slow
def test_evaluate_reads_labels_from_subfolders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits_by_label(tmp_path, 100)
    code, text, _ = run(capsys, "evaluate", "demo", "--data", str(tmp_path), "--teacher", "demo", "--json")
    assert code == 0
    values = json.loads(text)
    assert values["top1"] > 0.9
    assert values["agreement"] == 1.0
    code, text, _ = run(capsys, "evaluate", "demo", "--data", "digits")
    assert code == 0
    assert "top-1 %" in text


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capsys, "info")
    assert code == 0
    assert f"dcvit {dcvit.__version__}" in text
    assert "eager" in text
    code, text, _ = run(capsys, "info", "deit_tiny_patch16_224", "--random-weights", "--json")
    assert code == 0
    values = json.loads(text)["model"]
    assert values["candidates"] == list(range(1, 11))
    low, high = values["budget"]["macs"]
    model = dcvit.models.load_model("deit_tiny_patch16_224", pretrained=False)
    assert make_plan(model, dcvit.Budget(macs=low + 1e-6)).num_blocks == 12
    assert make_plan(model, dcvit.Budget(macs=high - 1e-6)).num_blocks == 1


def test_info_of_blocks_that_differ(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capsys, "info", "swin_tiny_patch4_window7_224", "--random-weights", "--json")
    assert code == 0
    values = json.loads(text)["model"]
    assert values["hidden_features"] == [768] * 2 + [1536] * 6
    low, high = values["budget"]["macs"]
    model = dcvit.models.load_model("swin_tiny_patch4_window7_224", pretrained=False)
    assert make_plan(model, dcvit.Budget(macs=low + 1e-6)).num_blocks == 12
    assert make_plan(model, dcvit.Budget(macs=high - 1e-6)).num_blocks == 2
    code, text, _ = run(capsys, "info", "swin_tiny_patch4_window7_224", "--random-weights")
    assert "768 to 1,536" in text


def test_families_and_their_methods(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capsys, "families", "--json")
    assert code == 0
    families = {family["name"]: family for family in json.loads(text)["families"]}
    assert families.keys() == {"vit", "eva", "swin", "cnn"}
    assert families["vit"]["methods"] == ["dcvit", *sorted(set(METHODS) - {"dcvit"}, key=list(METHODS).index)]
    assert set(families["swin"]["methods"]) == {name for name, one in METHODS.items() if "swin" in one.families}
    assert all(family["source"].startswith("arXiv") for family in families.values())
    code, text, _ = run(capsys, "families")
    assert "SwinTransformerV2" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "demo", "--data", "digits", "--macs", "0", "--out", "OUT"], "must be positive"),
        (["compress", "demo", "--data", "digits", "--macs", "1.5", "--out", "OUT"], "Pass an int"),
        (["compress", "demo", "--data", "digits", "--macs", "0.01", "--out", "OUT"], "can meet"),
        (["compress", "demo", "--data", "/nowhere", "--macs", "0.75", "--out", "OUT"], "is not a folder"),
        (["compress", "demo", "--data", "digits", "--num-images", "9999", "--macs", "0.7", "--out", "OUT"], "1 to 10"),
        (["compress", "demmo", "--data", "digits", "--macs", "0.75", "--out", "OUT"], "timm knows no model"),
        (["compress", "local-dir:/nowhere", "--data", "digits", "--macs", "0.75", "--out", "OUT"], r"no config.json"),
        (["compress", "vit_tiny_patch16_224", "--random-weights", "--data", "digits", "--macs", "0.75", "--out", "OUT"],
         "1 channels"),
        (["compress", "densenet121", "--random-weights", "--data", "digits", "--macs", "0.75", "--out", "OUT"],
         "DenseNet"),
        (["compress", "demo", "--data", "digits", "--macs", "0.75", "--out", "OUT", "--device", "qpu"], "--device"),
        (["compress", "demo", "--data", "digits", "--latency", "12", "--out", "OUT"], "pass latency_ms="),
        (["compress", "demo", "--data", "digits", "--activation-memory", "0.9", "--out", "OUT"], "stay uncompressed"),
        (["compress", "demo", "--data", "digits", "--file-size", "1K", "--out", "OUT"], "file_size=1000 asks for"),
        (["compress", "demo", "--data", "digits", "--macs", "0.8", "--round-to", "0", "--out", "OUT"], "round_to=0"),
        (["compress", "demo", "--data", "digits", "--macs", ".7", "--method", "fskd", "--run-dir", ".", "--out", "OUT"],
         "--run-dir: --method fskd does not read it"),
        (["latency", "demo", "--modes", "eager,int8", "--json", "OUT"], "mode='int8': expected one of eager, compile"),
        (["latency", "demo", "--runs", "0", "--json", "OUT"], "runs=0"),
        (["latency", "demo", "--threads", "0"], "--threads 0"),
        (["latency", "demo", "--original"], "none of demo is a folder of a compressed model"),
        (["demo", "--seeds", "0", "--out", "OUT"], "--seeds 0"),
        (["report", "OUT"], "is not a folder"),
        (["compress", "demo", "--data", "digits", "--macs", "0.75", "--out", "OUT", "--learning-rate", "0.01"],
         "add --recovery distillation"),
        (["compress", "demo", "--data", "digits", "--macs", "0.75", "--out", "OUT", "--recovery", "reconstruction",
          "--preset", "paper"], "leave one of the two out"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, text, error = run(capsys, *(str(out) if a == "OUT" else a for a in arguments))
    assert code == 2
    assert text == ""
    assert message in error
    assert error.startswith("dcvit: error: ")
    assert len(error.strip().splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments", [[], ["frobnicate"], ["compress"], ["compress", "demo", "--data", "digits", "--out", "x"]]
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: dcvit" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["demo", "compress", "sweep", "report", "synthesize", "evaluate", "export", "push", "info"]
)
def test_help_explains_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.count("\n") > 10
    assert not any(f"(default: {nothing})" in text for nothing in ("None", "False", "()"))
    assert ("--seed " not in text) or "(default: 0)" in text
    options = text.split("options:")[1]
    for entry in options.split("\n  -")[1:]:
        described = " ".join(entry.split()[1:])
        assert len(described) > 8, f"{command}: an option without an explanation: {entry!r}"


def test_interrupt_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dcvit.cli.compress.compress", interrupted)
    code, _, error = run(
        capsys, "compress", "demo", "--data", "digits", "--macs", "0.75", "--out", str(tmp_path / "out")
    )
    assert code == 130
    assert "interrupted" in error


@pytest.mark.slow
def test_module_runs_as_a_program(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "dcvit", "--version"], capture_output=True, text=True, check=True, cwd=Path.cwd()
    )
    assert finished.stdout.strip() == f"dcvit {dcvit.__version__}"


class Screen:
    """A stream that remembers, and says whether it is a terminal."""

    def __init__(self, terminal: bool) -> None:
        self.terminal = terminal
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        """Nothing is buffered."""

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_shows_loss_and_time(terminal: bool) -> None:
    screen = Screen(terminal)
    progress = TerminalProgress(screen, interval=0.0)  # type: ignore[arg-type]
    progress("probes", 0, 3, None)
    for done in range(1, 4):
        progress("probes", done, 3, 0.5 / done)
    lines = screen.text.splitlines()
    assert lines[-1].startswith("probes: loss 0.1667")
    if terminal:
        assert "\r" in screen.text
        assert "%" in screen.text
    else:
        assert "\r" not in screen.text
        assert lines[0].startswith("probes: 1/3, loss 0.5, ")
        assert lines[0].endswith("s left")


def test_the_time_left_counts_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("dcvit.runtime.progress.time.monotonic", lambda: now)
    screen = Screen(terminal=False)
    progress = TerminalProgress(screen, interval=0.0)  # type: ignore[arg-type]
    progress("reconstruction", 0, 4, None)
    now += 7
    progress("reconstruction", 1, 4, 0.5)
    assert screen.text == "reconstruction: 1/4, loss 0.5, 21 s left\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_the_time_left_leaves_out_what_an_earlier_run_finished(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("dcvit.runtime.progress.time.monotonic", lambda: now)
    screen = Screen(terminal)
    progress = TerminalProgress(screen, interval=0.0)  # type: ignore[arg-type]
    progress("probes", 6, 10, None)
    assert ("6/10" in screen.text) == terminal
    now += 7
    progress("probes", 7, 10, 0.5)
    if not terminal:
        assert screen.text == "probes: 7/10, loss 0.5, 21 s left\n"
    progress.close()


def test_environment_is_not_needed() -> None:
    """No variable steers the command line unseen."""
    assert not [name for name in os.environ if name.startswith("DCVIT_") and name != "DCVIT_TEST_GPU"]
