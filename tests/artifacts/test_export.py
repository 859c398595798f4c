"""Models as files for other runtimes: they compute what the model does, or are not there."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dcvit
from dcvit.artifacts import export
from dcvit.artifacts.export import ExportFormat, compare_rounded, export_model
from dcvit.models import compressible, load_model
from dcvit.models.surgery import compress_block, draw_kept_units, drop_block
from tests.conftest import slow_but
from tests.variants import VARIANTS
from tests.without_dcvit import run_without

MISSING = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install 'dcvit[export]'")

FORMATS = [pytest.param("onnx", marks=[needs_onnx, pytest.mark.slow]), "torch-export"]


def cut(name: str) -> nn.Module:
    """A model whose block 1 is compressed and whose block 2 is dropped."""
    model = load_model("demo") if name == "demo" else VARIANTS[name].create()
    kept = draw_kept_units(model, 1, 20, seed=0)
    student = drop_block(compress_block(model, 1, kept), 2)
    return compressible(student).rebuild().eval()


def images_for(model: nn.Module, count: int) -> Tensor:
    return torch.randn(count, *compressible(model).input_size())


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


@needs_onnx
@pytest.mark.parametrize("name", slow_but(["demo", "plain", "distilled", "registers"], "plain"))
def test_onnx_equals_pytorch_at_every_batch_size(name: str, tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    student = cut(name)
    exported = export_model(student, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    for count in (1, 5):
        images = images_for(student, count)
        (output,) = session.run(["logits"], {"images": images.numpy()})
        with torch.no_grad():
            assert relative_error(torch.from_numpy(output), student(images)) < 1e-4

    assert exported.errors.keys() == {1, 3}
    assert max(exported.errors.values()) < exported.tolerance == 1e-4
    assert exported.num_bytes == exported.path.stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    model = onnx.load(exported.path)
    assert {node.domain for node in model.graph.node} == {""}  # operators of the standard alone
    told = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert told["input_size"] == list(compressible(student).input_size())
    assert told["mean"] == pytest.approx(list(student.pretrained_cfg["mean"]))


@pytest.mark.slow
def test_program_runs_without_dcvit_and_timm(tmp_path: Path) -> None:
    students = {name: cut(name) for name in ("plain", "backbone")}
    for name, student in students.items():
        export_model(student, tmp_path / f"{name}.pt2", format="torch-export")
        save_file({f"{count}": images_for(student, count) for count in (1, 5)}, tmp_path / f"{name}.images")
    code = """
import json
import torch
from safetensors.torch import load_file, save_file
for name in ("plain", "backbone"):
    told = {"dcvit.json": ""}
    model = torch.export.load(f"{name}.pt2", extra_files=told).module()
    images = load_file(f"{name}.images")
    save_file({count: model(batch).detach().contiguous() for count, batch in images.items()}, f"{name}.outputs")
    print(json.loads(told["dcvit.json"])["std"])
"""
    printed = run_without(code, tmp_path, "timm")
    assert json.loads(printed.splitlines()[0]) == pytest.approx(list(students["plain"].pretrained_cfg["std"]))
    for name, student in students.items():
        outputs = load_file(tmp_path / f"{name}.outputs")
        for count, images in load_file(tmp_path / f"{name}.images").items():
            with torch.no_grad():
                assert relative_error(outputs[count], student(images)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "dtype"),
    [
        pytest.param("onnx", torch.float16, marks=[needs_onnx, pytest.mark.slow]),
        pytest.param("torch-export", torch.float16, marks=pytest.mark.slow),
        ("torch-export", torch.bfloat16),
    ],
)
def test_half_precision(format: ExportFormat, dtype: torch.dtype, tmp_path: Path) -> None:
    student = cut("plain")
    path = tmp_path / f"half{export.SUFFIXES[format]}"
    exported = export_model(student, path, format=format, dtype=dtype)
    # Rounded, so not as close as float32 is, and within ten epsilons.
    assert 1e-5 < max(exported.errors.values()) < exported.tolerance == 10 * torch.finfo(dtype).eps
    full = export_model(student, tmp_path / f"full{export.SUFFIXES[format]}", format=format)
    saved = sum(parameter.numel() for parameter in student.parameters()) * 2
    assert full.num_bytes - exported.num_bytes == pytest.approx(saved, rel=0.1)
    if format == "torch-export":
        program = torch.export.load(path)
        assert {tensor.dtype for tensor in program.state_dict.values()} == {dtype}


@pytest.mark.slow
@needs_onnx
def test_weights_too_large_for_one_file_get_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(export, "SINGLE_FILE_BYTES", 0)
    student = cut("plain")
    exported = export_model(student, tmp_path / "model.onnx")
    files = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    (weights,) = files.keys() - {"model.onnx"}
    assert re.fullmatch(r"model-[0-9a-f]{16}\.onnx\.data", weights)  # each export's own, so that no other names it
    assert files[weights] > files["model.onnx"]
    assert exported.num_bytes == sum(files.values())
    onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    export_model(student, tmp_path / "model.onnx", overwrite=True)
    assert len(list(tmp_path.iterdir())) == 2
    assert not (tmp_path / weights).exists()
    onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])


def off_by_a_little(trace: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
    """Traces a model whose head is moved by a thousandth of its largest output."""

    def traced(model: Any) -> Any:
        model.head.bias += 1e-3 * model(images_for(model, 2)).abs().max()
        return trace(model)

    return traced


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_a_file_that_differs_is_refused(format: ExportFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = cut("plain")
    path = tmp_path / f"model{export.SUFFIXES[format]}"
    export_model(student, path, format=format)
    earlier = path.read_bytes()
    path.unlink()
    monkeypatch.setattr(export, "_trace", off_by_a_little(export._trace))
    with pytest.raises(dcvit.errors.ExportError, match=r"does not compute what the model does.*at batch size 3"):
        export_model(student, path, format=format)
    assert not list(tmp_path.iterdir())
    path.write_bytes(earlier)
    with pytest.raises(dcvit.errors.ExportError, match="Nothing was written"):
        export_model(student, path, format=format, overwrite=True)
    assert path.read_bytes() == earlier
    assert list(tmp_path.iterdir()) == [path]


def test_half_precision_that_overflows_is_refused(tmp_path: Path) -> None:
    student: Any = cut("plain")
    with torch.no_grad():
        student.patch_embed.proj.weight.mul_(1e6)  # weights fit into float16, what they compute does not
    with pytest.raises(dcvit.errors.ExportError, match=r"nan at batch size 1.*take torch\.float32"):
        export_model(student, tmp_path / "model.pt2", format="torch-export", dtype=torch.float16)
    with torch.no_grad():
        student.patch_embed.proj.weight.mul_(10)
    with pytest.raises(dcvit.errors.DtypeError, match=r"patch_embed\.proj\.weight holds .*beyond the range"):
        export_model(student, tmp_path / "model.pt2", format="torch-export", dtype=torch.float16)
    with pytest.raises(dcvit.errors.DtypeError, match="beyond"):
        compare_rounded(student, torch.float16)
    assert not list(tmp_path.iterdir())


def test_the_model_and_the_random_state_are_untouched(tmp_path: Path) -> None:
    student = dcvit.fuse(cut("plain").double().train())
    kind = type(student.blocks[1])  # type: ignore[index]
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    state = torch.get_rng_state()
    export_model(student, tmp_path / "new" / "model.pt2", format="torch-export")
    assert torch.equal(torch.get_rng_state(), state)
    assert student.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert type(student.blocks[1]) is kind  # type: ignore[index]


@pytest.mark.parametrize(
    ("path", "options", "error", "message"),
    [
        ("model.pt2", {"format": "gguf"}, dcvit.errors.ExportError, "expected one of onnx, torch-export"),
        (
            "model.pt2",
            {"format": "torch-export", "dtype": torch.int8},
            dcvit.errors.DtypeError,
            r"one of torch\.float32, ",
        ),
        ("model.onnx", {"dtype": torch.bfloat16}, dcvit.errors.DtypeError, "cannot run such a model"),
        ("model.bin", {"format": "torch-export"}, dcvit.errors.SaveFolderError, r"does not end in \.pt2"),
        (".", {"format": "torch-export"}, dcvit.errors.SaveFolderError, "is a folder"),
        ("mine.pt2", {"format": "torch-export"}, dcvit.errors.SaveFolderError, "exists: name another file"),
    ],
)
def test_bad_input_is_refused(
    path: str, options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.pt2").write_text("mine")
    with pytest.raises(error, match=message):
        export_model(cut("plain"), tmp_path / path, **options)
    assert (tmp_path / "mine.pt2").read_text() == "mine"
    assert [file.name for file in tmp_path.iterdir()] == ["mine.pt2"]


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else find(name))
    with pytest.raises(
        dcvit.errors.ExportError, match=r"needs onnx, onnxscript, onnxruntime: pip install 'dcvit\[export\]'"
    ):
        export_model(cut("plain"), tmp_path / "model.onnx")
    with pytest.raises(dcvit.errors.UnsupportedModelError, match="Linear"):
        export_model(nn.Linear(2, 2), tmp_path / "model.pt2", format="torch-export")
    assert not list(tmp_path.iterdir())
