"""What lies in a saved folder beside the weights: the card, the module for where dcvit is not installed, the upload."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch import nn

import dcvit
from dcvit.artifacts.card import model_card
from dcvit.artifacts.hub import push_to_hub
from dcvit.artifacts.result import SAVED_FILES, save_model
from dcvit.models import compressible, hub_repository
from dcvit.models.surgery import compress_block, draw_kept_units, drop_block
from tests.conftest import CUT, QUICK
from tests.variants import EVA_VARIANTS, VARIANTS, Variant
from tests.without_dcvit import run_without


def cut(model: nn.Module, kept: int = 7) -> nn.Module:
    """Block 1 compressed, block 2 dropped, block 3 left without an MLP."""
    for block, count in ((1, kept), (3, 0)):
        model = compress_block(model, block, draw_kept_units(model, block, count, seed=0))
    return drop_block(model, 2)


@pytest.fixture(scope="module")
def result() -> dcvit.CompressionResult:
    return dcvit.compress(VARIANTS["plain"].create(), torch.randn(2, 3, 32, 32), dcvit.Budget(macs=0.8), CUT)


@pytest.fixture
def folder(result: dcvit.CompressionResult, tmp_path: Path) -> Path:
    result.save(tmp_path / "small")
    return tmp_path / "small"


# Without dcvit.


LOAD_EACH = """
import os, sys, warnings
import dcvit, timm
warnings.filterwarnings("ignore", "This process.*is multi-threaded", DeprecationWarning)
for folder in sys.argv[1:]:
    child = os.fork()
    if not child:
        print(type(timm.create_model(f"local-dir:{folder}", pretrained=True)).__name__, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_importing_dcvit_makes_saved_models_known_to_timm(tmp_path: Path) -> None:
    """Each is loaded in a process that has seen no model of a family."""
    names = ("vit_tiny_patch16_224", "eva02_tiny_patch14_224", "swin_tiny_patch4_window7_224", "resnet18")
    models = {tmp_path / name: timm.create_model(name) for name in names}
    for folder, model in models.items():
        save_model(model, folder)
    done = subprocess.run([sys.executable, "-c", LOAD_EACH, *models], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [type(model).__name__ for model in models.values()]


@pytest.mark.parametrize("variants", [VARIANTS, EVA_VARIANTS], ids=["vit", "eva"])
def test_every_variant_loads_without_dcvit(variants: dict[str, Variant], tmp_path: Path) -> None:
    """With the file of any model of the family."""
    expected, folder = {}, next(iter(variants))
    for name, variant in variants.items():
        student = compressible(cut(variant.create())).rebuild().eval()
        save_model(student, tmp_path / name)
        images = torch.randn(2, *compressible(student).input_size())
        save_file({"images": images}, tmp_path / f"{name}.images")
        with torch.no_grad():
            expected[name] = student(images)
    architecture = compressible(student).config()["architecture"]
    code = f"""
import timm, torch
from safetensors.torch import load_file, save_file
try:
    timm.create_model("local-dir:{folder}", pretrained=True)
except RuntimeError as error:
    assert "Unknown model ({architecture})" in str(error)
else:
    raise SystemExit("timm knows the architecture by itself: the module is not needed")
sys.path.insert(0, "{folder}")
import modeling_dcvit
for name in {list(variants)}:
    model = timm.create_model(f"local-dir:{{name}}", pretrained=True).eval()
    assert type(model.blocks[1]) is modeling_dcvit.CompressedBlock
    with torch.no_grad():
        save_file({{"output": model(load_file(f"{{name}}.images")["images"]).contiguous()}}, f"{{name}}.output")
"""
    run_without(code, tmp_path)
    for name, output in expected.items():
        # The same computation, but for the order in which dcvit's fused op sums.
        torch.testing.assert_close(load_file(tmp_path / f"{name}.output")["output"], output, rtol=1e-4, atol=1e-4)


def test_the_card_says_how_to_load_without_dcvit(folder: Path, result: dcvit.CompressionResult, tmp_path: Path) -> None:
    with_dcvit, without = re.findall(r"```python\n(.+?)```", (folder / "README.md").read_text(), re.DOTALL)
    without = without.replace("FOLDER", str(folder))
    printed = run_without(f"{without}\nprint(sum(p.numel() for p in model.parameters()))", tmp_path)
    assert int(printed) == result.report.student.params
    names: dict[str, Any] = {}
    exec(with_dcvit.replace("FOLDER", str(folder)), names)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(names["model"](images), result.model(images))


def test_beside_dcvit_the_module_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))
    import modeling_dcvit  # type: ignore[import-not-found]

    loaded: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert modeling_dcvit.ARCHITECTURE == "dcvit_vision_transformer"
    assert isinstance(loaded.blocks[int(next(iter(dcvit.load(folder).plan.blocks)))], dcvit.models.CompressedBlock)


# Half precision.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision(dtype: torch.dtype, folder: Path, result: dcvit.CompressionResult) -> None:
    half = folder.parent / "half"
    result.save(half, dtype=dtype)
    stored = load_file(half / "model.safetensors")
    loaded = dcvit.load(half).model
    for name, weight in result.model.state_dict().items():
        assert stored[name].dtype == dtype
        assert torch.equal(loaded.state_dict()[name], weight.to(dtype).float())
    sizes = [(path / "model.safetensors").stat().st_size for path in (half, folder)]
    assert sizes[0] / sizes[1] == pytest.approx(0.5, abs=0.03)
    assert [dcvit.load(path).report.student.file_size for path in (half, folder)] == sizes
    name = str(dtype).removeprefix("torch.")
    assert f"Weights are stored in {name}." in (half / "README.md").read_text()
    assert "Weights are stored in float32." in (folder / "README.md").read_text()


def test_a_dtype_that_cannot_hold_the_weights_is_refused(result: dcvit.CompressionResult, tmp_path: Path) -> None:
    large = compress_block(result.model, 3, range(4))
    with torch.no_grad():
        large.head.weight[0, 0] = 1e5  # type: ignore[index, operator, union-attr]
    with pytest.raises(dcvit.errors.DtypeError, match=r"head\.weight holds 1e\+05"):
        replace(result, model=large).save(tmp_path / "out", dtype=torch.float16)
    with pytest.raises(dcvit.errors.DtypeError, match=r"expected one of torch\.float32"):
        result.save(tmp_path / "out", dtype=torch.int8)
    assert not list(tmp_path.iterdir())
    replace(result, model=large).save(tmp_path / "out", dtype=torch.bfloat16)


# The model card.


def test_card_has_the_figures(folder: Path, result: dcvit.CompressionResult) -> None:
    text, report = (folder / "README.md").read_text(), result.report
    assert f"| MACs per image | {report.teacher.macs:,} | {report.student.macs:,} |" in text
    assert f"| parameters | {report.teacher.params:,} | {report.student.params:,} |" in text
    assert "MACs are counted with attention products." in text
    assert f"{100 * (report.agreement or 0):.2f} %" in text
    assert "top-1" not in text  # nothing was labelled
    assert f"{result.plan.hidden_features} hidden units" in text
    assert "from 2 unlabelled images" in text
    assert f"timm {timm.__version__}" in text
    assert "mean (0.5, 0.5, 0.5)" in text
    for kept, told in (
        ((0, 3, 4), "where on average 5 hidden units of the MLP are left (3 to 7)."),
        ((0, 1, 2, 3, 4, 5, 6), "where 5 hidden units of the MLP are left.\n"),
    ):
        plan = replace(result.plan, blocks=(1, 2), hidden_features=5, kept_units={1: kept, 2: tuple(range(7))})
        assert told in replace(result, plan=plan).files()["README.md"]
    labelled = replace(report, teacher=replace(report.teacher, top1=0.875), student=replace(report.student, top1=0.75))
    assert "| top-1, % | 87.50 | 75.00 | |" in replace(result, report=labelled).files()["README.md"]


@pytest.mark.parametrize(
    ("license_", "data", "text"),
    [
        ("apache-2.0", {"license": "apache-2.0"}, "as its timm configuration gives it: apache-2.0."),
        ("dinov3-license", {"license": "other", "license_name": "dinov3-license"}, "gives it: dinov3-license."),
        ("unknown", {}, "Unknown: the original's configuration names none."),
        (None, {}, "Unknown: the original's configuration names none."),
    ],
)
def test_front_matter_is_what_the_hub_reads(
    license_: str | None, data: dict[str, str], text: str, result: dcvit.CompressionResult
) -> None:
    config = dict(compressible(result.model).config())
    config["pretrained_cfg"] = {**config["pretrained_cfg"], "license": license_}
    values = replace(result, report=replace(result.report, base_model="timm/vit")).to_dict()
    card = ModelCard(model_card(values, config))
    read = card.data.to_dict()
    assert {key: read.get(key) for key in ("license", "license_name") if key in read} == data
    assert read["library_name"] == "timm"
    assert read["base_model"] == "timm/vit"
    assert read["pipeline_tag"] == "image-classification"
    assert {"timm", "dcvit"} < set(read["tags"])
    assert text in card.text


@pytest.mark.parametrize(
    "change",
    [{"mean": "abc"}, {"mean": [None, 0.5, 0.5]}, {"mean": {"r": 1}}, {"std": [0.0, 1.0, 1.0]}, {"std": True},
     {"std": ["a", 1, 1]}, {"interpolation": ["bicubic"]}, {"crop_pct": "all"}, {"input_size": 7}],
    ids=str,
)  # fmt: skip
def test_preprocessing_that_makes_no_sense_is_refused(
    change: dict[str, Any], result: dcvit.CompressionResult, tmp_path: Path
) -> None:
    result.save(tmp_path / "small")
    file = tmp_path / "small" / "config.json"
    config = json.loads(file.read_text())
    config["pretrained_cfg"] |= change
    file.write_text(json.dumps(config))
    with pytest.raises(dcvit.errors.SaveFolderError, match="holds a broken model"):
        dcvit.load(tmp_path / "small")


def test_card_of_a_backbone_from_who_knows_where() -> None:
    model = VARIANTS["backbone"].create()
    model.pretrained_cfg = {}
    result = dcvit.compress(model, torch.randn(1, 3, 28, 28), dcvit.Budget(macs=0.85), QUICK)
    card = ModelCard(result.files()["README.md"])
    data = card.data.to_dict()
    assert data["pipeline_tag"] == "image-feature-extraction"
    assert data.keys().isdisjoint({"license", "base_model"})
    assert "from 1 unlabelled image:" in card.text
    assert "mean (0.485, 0.456, 0.406)" in card.text  # timm's default
    assert "same class" not in card.text


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("deit_small_patch16_224", "timm/deit_small_patch16_224.fb_in1k"),
        ("vit_tiny_patch16_224.augreg_in21k", "timm/vit_tiny_patch16_224.augreg_in21k"),
        ("hf-hub:someone/vit", "someone/vit"),
        ("hf-hub:someone/vit@v2", "someone/vit"),
        ("local-dir:somewhere", None),
        ("demo", None),
        ("dcvit_vision_transformer", None),
    ],
)
def test_where_the_weights_of_a_name_come_from(name: str, repository: str | None) -> None:
    assert hub_repository(name) == repository


# The hub.


class LocalHub(HfApi):  # type: ignore[misc]
    """The hub as a folder: each repository a subfolder, filled with what the client would upload."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root
        self.private: dict[str, bool] = {}

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:  # type: ignore[override]
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        self.private[repo_id] = private
        return f"https://hub.example/{repo_id}"

    def upload_folder(  # type: ignore[override]
        self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], commit_message: str
    ) -> None:
        files = [str(path.relative_to(folder_path)) for path in sorted(folder_path.rglob("*")) if path.is_file()]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            shutil.copy(folder_path / name, self.root / repo_id / name)


def test_push_uploads_only_the_saved_files(folder: Path, result: dcvit.CompressionResult, tmp_path: Path) -> None:
    for name in ("notes.txt", "model.onnx", ".env", "sub/README.md", "sub/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("private")
    hub = LocalHub(tmp_path / "hub")
    assert push_to_hub(folder, "someone/small", private=True, api=hub) == "https://hub.example/someone/small"
    assert hub.private == {"someone/small": True}
    uploaded = tmp_path / "hub" / "someone" / "small"
    assert sorted(path.name for path in uploaded.iterdir()) == sorted(SAVED_FILES)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(dcvit.load(uploaded).model(images), result.model(images))
    push_to_hub(folder, "someone/small", api=hub)  # a new version of it


def test_push_refuses_before_the_upload(folder: Path, tmp_path: Path) -> None:
    hub = LocalHub(tmp_path / "hub")
    with pytest.raises(dcvit.errors.HubError, match="expected OWNER/NAME"):
        push_to_hub(folder, "a/b/c", api=hub)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(dcvit.errors.SaveFolderError, match="broken model"):
        push_to_hub(folder, "someone/small", api=hub)
    weights.unlink()
    with pytest.raises(dcvit.errors.SaveFolderError, match=r"has no model\.safetensors"):
        push_to_hub(folder, "someone/small", api=hub)
    assert not (tmp_path / "hub").exists()


def test_push_says_what_the_hub_said(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: object, **kwargs: object) -> None:
        raise PermissionError("403 Forbidden:\n  no right to write")

    monkeypatch.setattr(LocalHub, "upload_folder", refuses)
    with pytest.raises(dcvit.errors.HubError, match=r"403 Forbidden: no right to write\)\. `hf auth login`"):
        push_to_hub(folder, "someone/small", api=LocalHub(tmp_path / "hub"))


# The command line.


def test_export_and_push_on_the_command_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dcvit.cli import main

    def run(*arguments: str) -> tuple[int, str, str]:
        return (main(list(arguments)), *capsys.readouterr())

    code, text, _ = run("export", str(folder), "--format", "timm", "--dtype", "float16", "--json")
    assert code == 0
    values = json.loads(text)
    assert Path(values["out"]) == folder.with_name("small-float16")
    assert 0 < max(values["errors"].values()) < values["tolerance"]
    assert load_file(Path(values["out"]) / "model.safetensors")["head.weight"].dtype == torch.float16
    code, _, error = run("export", str(folder), "--format", "timm", "--dtype", "float16")
    assert code == 2
    assert "earlier result" in error

    code, text, _ = run("export", str(folder), "--format", "torch-export")
    assert code == 0
    assert "model.pt2: " in text
    assert "(allowed 1.0e-04)" in text
    assert torch.export.load(folder / "model.pt2").module()(torch.randn(4, 3, 32, 32)).shape == (4, 10)
    code, _, error = run("export", str(folder), "--format", "torch-export")
    assert code == 2
    assert "--overwrite" in error
    code, _, error = run("export", str(tmp_path / "nowhere"))
    assert code == 2
    assert error.count("\n") == 1

    monkeypatch.setattr("dcvit.artifacts.hub.HfApi", lambda **kwargs: LocalHub(tmp_path / "hub"))
    code, text, _ = run("push", str(folder), "someone/small")
    assert code == 0
    assert "https://hub.example/someone/small" in text
    assert (tmp_path / "hub" / "someone" / "small" / "README.md").is_file()
    assert not (tmp_path / "hub" / "someone" / "small" / "model.pt2").exists()
