"""The memory that a pass is said to take against what the allocator gives out, and what happens where it runs out."""

from collections import Counter
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

import dcvit
from dcvit.compression import compress as compression
from dcvit.errors import MemoryWarning
from dcvit.methods.dcvit import method, reconstructed
from dcvit.metrics.agreement import top1
from dcvit.metrics.latency import example_images
from dcvit.metrics.memory import measure_peak_memory, trace_activation_memory
from dcvit.models import fuse
from dcvit.models.surgery import pruned_skeleton
from tests.conftest import PUBLISHED, QUICK, REFINED, slow_but
from tests.variants import VARIANTS, Variant

BUDGET = dcvit.Budget(macs=0.7)
BATCH = 40  # so many that blocks, and not the scratch space of the first convolution, set the peak


def measured(model: nn.Module, batch_size: int = BATCH) -> int:
    images = example_images(model, batch_size)
    with torch.no_grad():
        model(images)
        return measure_peak_memory(lambda: model(images), images.device)


def test_the_trace_is_what_the_allocator_says(variant: Variant) -> None:
    model = variant.create()
    for hidden in ({}, {1: 10}, {1: 0, 2: 5}):
        structure = pruned_skeleton(model, hidden)
        assert trace_activation_memory(structure, BATCH) == measured(structure)


def test_one_whole_block_sets_the_peak() -> None:
    """So that leaving attention out of some blocks saves no memory at the peak, by the allocator too."""
    model = VARIANTS["plain"].create()
    original = measured(model)
    assert measured(pruned_skeleton(model, dict.fromkeys(range(3), 0))) == original
    assert measured(pruned_skeleton(model, dict.fromkeys(range(4), 0))) < original


def test_compressed_blocks_take_what_the_plain_implementation_does() -> None:
    structure = pruned_skeleton(VARIANTS["plain"].create(), dict.fromkeys(range(4), 150))
    assert trace_activation_memory(structure, BATCH) == measured(structure)
    fuse(structure)
    assert trace_activation_memory(structure, BATCH) >= measured(structure)


@pytest.mark.parametrize("batch_size", [16, 10**6])
def test_it_grows_with_the_batch_and_computes_nothing(batch_size: int) -> None:
    """Computed, a million images would take more memory than there is."""
    model = VARIANTS["plain"].create()
    assert trace_activation_memory(model, batch_size) == batch_size * trace_activation_memory(model, 8) // 8


def cramp(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Let attention run out of memory for more images than so many."""
    forward = Attention.forward

    def cramped(self: Attention, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(x) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(Attention, "forward", cramped)
    monkeypatch.setattr("dcvit.data.images.FINITE_IMAGES", most)


@pytest.mark.parametrize(
    "config", slow_but([QUICK, REFINED, PUBLISHED], QUICK), ids=["searched", "refined", "published"]
)
def test_out_of_memory_halves_what_passes_at_once(
    config: dcvit.DCViT, model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, impl="eager")
    wanted = dcvit.compress(model, images, BUDGET, config)
    cramp(monkeypatch, most=2)
    with pytest.warns(MemoryWarning, match=r"out of memory \(CUDA.*\): going on with 2 images at once"):
        found = dcvit.compress(model, images, BUDGET, config)
    assert found.plan == wanted.plan
    assert [probe.block for probe in found.report.probes] == [probe.block for probe in wanted.report.probes]
    assert found.report.distillation_loss == pytest.approx(wanted.report.distillation_loss, rel=0.1)


@pytest.mark.slow
def test_what_was_finished_before_memory_ran_out_is_kept(
    model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy set and the probes are worked out once, and the first block again."""
    calls = Counter[str]()

    def counted(steps: ModuleType, name: str) -> None:
        function = getattr(steps, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            if name == "reconstruct_block" and calls[name] == 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return function(*args, **kwargs)

        monkeypatch.setattr(steps, name, call)

    counted(method, "synthesize")
    counted(reconstructed, "find_step_size")
    counted(reconstructed, "reconstruct_block")
    with pytest.warns(MemoryWarning, match="going on with 2 images at once"):
        found = dcvit.compress(model, images, BUDGET, QUICK)
    assert calls == {"synthesize": 1, "find_step_size": 1, "reconstruct_block": 1 + len(found.plan.blocks)}


@pytest.mark.slow
def test_a_sweep_goes_on_with_fewer_images_at_once(
    model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of its second size: what came before is not done again."""
    calls = Counter[str]()
    synthesize, reconstruct = method.synthesize, reconstructed.reconstruct_blocks

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls["synthesize"] += 1
        return synthesize(*args, **kwargs)

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls["sizes"] += 1
        if calls["sizes"] == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return reconstruct(*args, **kwargs)

    monkeypatch.setattr(method, "synthesize", counted)
    monkeypatch.setattr(reconstructed, "reconstruct_blocks", failing)
    with pytest.warns(MemoryWarning, match="going on with 2 images at once"):
        family = dcvit.sweep(model, images, (0.9, 0.8), QUICK)
    assert len(family.members) == 2
    assert calls == {"synthesize": 1, "sizes": 4}
    calls["sizes"] = 1
    with pytest.warns(MemoryWarning, match="going on with one image at once"):
        family.at(macs=0.85)


@pytest.mark.slow
def test_where_a_sweep_needed_fewer_images_its_end_does_not_take_more(
    model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    cramp(monkeypatch, most=2)
    with pytest.warns(MemoryWarning, match="going on with 2 images at once"):
        family = dcvit.sweep(model, images, (0.9,), QUICK.with_(impl="eager"))
    (member,) = family.members
    assert member.report.latency_batch == 2
    assert top1(member.model, images, torch.zeros(len(images), dtype=torch.long)) >= 0


def test_a_budget_of_more_images_than_memory_holds_is_refused(
    model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    cramp(monkeypatch, most=2)
    budget = dcvit.Budget(latency=0.8, batch_size=16)
    with pytest.raises(
        dcvit.errors.BudgetError, match=r"batch_size=16: the device ran out of memory .* smaller batch_size"
    ):
        dcvit.compress(model, images, budget, QUICK.with_(impl="eager"))


def test_memory_that_does_not_suffice_for_one_image_is_an_error(
    model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    cramp(monkeypatch, most=0)
    monkeypatch.setattr(compression, "require_finite", lambda *args: None)
    monkeypatch.setattr(compression, "require_plain_behaviour", lambda *args: None)
    with (
        pytest.warns(MemoryWarning),
        pytest.raises(dcvit.DcvitError, match=r"ran out of memory \(CUDA.*\)\. Even one image at a time does not fit"),
    ):
        dcvit.compress(model, images, BUDGET, replace(QUICK, impl="eager"))
