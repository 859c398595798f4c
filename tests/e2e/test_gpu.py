"""Whole compressions on a GPU; `tests/ops` has the kernels. Skipped without one, unless DCVIT_TEST_GPU=1."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import dcvit
from dcvit.errors import MemoryWarning
from dcvit.methods import METHODS
from dcvit.models import compressible, unfuse
from tests.conftest import CUT, CUT_REFINED, PUBLISHED, QUICK, REFINED, quick
from tests.models import test_cnn, test_swin
from tests.variants import EVA_VARIANTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() and os.environ.get("DCVIT_TEST_GPU") != "1", reason="torch sees no GPU"
    ),
]

BUDGET = dcvit.Budget(macs=0.7)
CONFIGS = {"searched": QUICK, "refined": REFINED, "cut": CUT, "cut and refined": CUT_REFINED, "published": PUBLISHED}


@pytest.fixture
def model(model: nn.Module) -> nn.Module:
    return model.to("cuda")


@pytest.fixture
def images(images: Tensor) -> Tensor:
    return images.to("cuda")


def assert_met(result: dcvit.CompressionResult, original: nn.Module, share: float = 0.7) -> None:
    """Within the budget, on the GPU, and what it computes is finite."""
    before, after = (compressible(m).cost().total.macs("with_attention_products") for m in (original, result.model))
    assert after <= share * before
    assert all(tensor.is_cuda for tensor in result.model.state_dict().values())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_vit_is_compressed_saved_and_loaded(name: str, model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    result = dcvit.compress(model, images, BUDGET, CONFIGS[name])
    assert_met(result, model)
    result.save(tmp_path / "small")
    loaded = dcvit.load(tmp_path / "small").model
    with torch.no_grad():
        expected = result.model(images)
        assert torch.isfinite(expected).all()
        assert torch.equal(loaded.to("cuda")(images), expected)
        on_cpu = loaded.to("cpu")(images.cpu())
    torch.testing.assert_close(expected.cpu(), on_cpu, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "dcvit"])
def test_every_method(name: str, model: nn.Module, images: Tensor) -> None:
    assert_met(dcvit.compress(model, images, BUDGET, quick(name)), model)


@pytest.mark.parametrize(
    "create",
    [
        EVA_VARIANTS["dinov3"].create,
        lambda: test_swin.create(1),
        lambda: test_swin.create(2),
        lambda: test_cnn.create("bottleneck"),
        lambda: test_cnn.create("mobilenet"),
    ],
    ids=["eva", "swin", "swinv2", "resnet", "mobilenet"],
)
def test_other_families(create: Any, images: Tensor) -> None:
    original = create().to("cuda")
    assert_met(dcvit.compress(original, images, dcvit.Budget(macs=0.8), QUICK), original, 0.8)


def test_the_same_call_ends_the_same(model: nn.Module, images: Tensor) -> None:
    first, second = (dcvit.compress(model, images, BUDGET, CUT_REFINED).model.state_dict() for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_a_run_goes_on(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    expected = dcvit.compress(model, images, BUDGET, REFINED, run_dir=tmp_path / "run").model.state_dict()
    entries = sorted((tmp_path / "run" / "units").glob("*.json"))
    assert len(entries) > 3
    for entry in entries[1::2]:
        entry.unlink()
    again = dcvit.compress(model, images, BUDGET, REFINED, run_dir=tmp_path / "run").model.state_dict()
    for name, tensor in expected.items():
        assert torch.equal(tensor, again[name]), name


def test_a_family_and_a_latency_budget(model: nn.Module, images: Tensor) -> None:
    for member in dcvit.sweep(model, images, (0.8, 0.7), QUICK).members:
        assert_met(member, model, 0.8)
    deep = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=8).eval().to("cuda")
    result = dcvit.compress(deep, images, dcvit.Budget(latency=0.8), QUICK)
    assert result.plan.num_blocks > 0


def test_a_named_device(model: nn.Module, images: Tensor) -> None:
    result = dcvit.compress(model.to("cpu"), images.cpu(), BUDGET, QUICK, devices=["cuda:0"])
    assert_met(result, model)


def test_too_little_memory_halves_what_passes_at_once() -> None:
    original = timm.create_model("vit_tiny_patch16_224", depth=4).eval().to("cuda")
    images = torch.randn(32, 3, 224, 224, device="cuda")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    config = PUBLISHED.with_(recovery=replace(PUBLISHED.distillation, batch_size=32, epochs=1, warmup_epochs=0))
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 400 * 2**20) / total)
    try:
        with pytest.warns(MemoryWarning, match=r"ran out of memory .*going on with \d+ images at once"):
            result = dcvit.compress(original, images, BUDGET, config)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_met(result, original)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_student_in_half_precision(dtype: torch.dtype, model: nn.Module, images: Tensor) -> None:
    student = dcvit.compress(model, images, BUDGET, CUT).model.to(dtype)
    with torch.no_grad():
        fused = student(images.to(dtype))
        unfuse(student)
        eager = student(images.to(dtype))
    torch.testing.assert_close(fused, eager, rtol=5e-2, atol=5e-2)
