"""Swin transformers of both versions: structure, cost, search, saved form."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dcvit
from dcvit.artifacts.result import save_model
from dcvit.errors import BudgetError, UnsupportedModelError
from dcvit.models import CompressedBlock, DroppedBlock, compressible, require_supported
from dcvit.search.plan import plan
from tests.conftest import QUICK, quick, slow_but
from tests.without_dcvit import output_without_dcvit

NAMES = {1: "swin_tiny_patch4_window7_224", 2: "swinv2_tiny_window8_256"}


def create(version: int, **changes: Any) -> Any:
    """A small Swin of two stages with 2 and 5 blocks."""
    sizes = {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (2, 5), "num_heads": (2, 4), "window_size": 4}
    model = timm.create_model(NAMES[version], num_classes=7, **(sizes | changes)).eval().requires_grad_(False)
    if version == 2:  # timm starts its norms at zero, where blocks add nothing
        for stage in model.layers:
            for block in stage.blocks:
                nn.init.uniform_(block.norm1.weight, 0.2, 1.0)
                nn.init.uniform_(block.norm2.weight, 0.2, 1.0)
    return model


@pytest.fixture(params=[1, 2])
def swin(request: pytest.FixtureRequest) -> Any:
    return create(request.param)


def cut(model: nn.Module) -> nn.Module:
    """Two pairs compressed, the single block at the end dropped."""
    view = compressible(model)
    for block, kept in {2: [], 3: [], 4: range(0, 128, 2), 5: range(0, 128, 2)}.items():
        view.compress_block(block, list(kept))
    view.drop_block(6)
    return model


def test_the_parts_in_order_are_the_model(swin: Any) -> None:
    view, images = require_supported(swin), torch.randn(2, 3, 32, 32)
    state = view.embed(images)
    for block in range(view.num_blocks()):
        alone = view.block(block)(view.prepare(state, block))
        state = view.run_blocks(state, block, block + 1)
        assert torch.equal(state, alone)
    tokens = view.final_norm(state)
    assert tokens.shape == (2, 64, 32)
    assert torch.equal(tokens, view.tokens(images))
    torch.testing.assert_close(view.logits(tokens), swin(images))


def test_pairs_go_together_within_a_stage(swin: Any) -> None:
    assert list(compressible(swin).groups()) == [(0, 1), (2, 3), (4, 5), (6,)]
    shifts = [any(block.shift_size) for stage in swin.layers for block in stage.blocks]
    assert shifts == [False, True, False, True, False, True, False]


@pytest.mark.parametrize("size", [32, 36, 44])  # 36 and 44: windows are padded
@pytest.mark.parametrize("version", [1, 2])
def test_the_cost_is_what_torch_counts(version: int, size: int) -> None:
    model, images = create(version, img_size=size), torch.randn(1, 3, size, size)
    for one in (model, cut(model)):
        with FlopCounterMode(display=False) as counter:
            one(images)
        total = compressible(one).cost().total
        assert 2 * total.macs("with_attention_products") == counter.get_total_flops()
        assert total.params == sum(parameter.numel() for parameter in one.parameters())


def test_a_block_costs_what_goes_with_it(swin: Any) -> None:
    view = compressible(swin)
    before = view.cost()
    view.compress_block(4, range(50))
    saved = before.total - view.cost().total
    assert saved == before.blocks[4].attention + before.blocks[4].hidden_unit * 78
    assert not view.cost().blocks[4].compressible


@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple")  # timm's, resizing position biases
def test_compressed_blocks_take_images_of_any_size(swin: Any) -> None:
    model = cut(create(1 if isinstance(swin, timm.models.SwinTransformer) else 2, strict_img_size=False))
    rebuilt = compressible(model).rebuild()
    for size in (32, 40, 44):
        images = torch.randn(1, 3, size, size)
        torch.testing.assert_close(rebuilt(images), model(images))
    cut(swin).set_input_size(img_size=48)
    images = torch.randn(1, 3, 48, 48)
    assert compressible(swin).input_size() == (3, 48, 48)
    torch.testing.assert_close(compressible(swin).rebuild()(images), swin(images))


@cache
def compressed(version: int) -> dcvit.CompressionResult:
    """The result of the pair search, for all tests that look at one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return dcvit.compress(create(version), torch.randn(8, 3, 32, 32), dcvit.Budget(macs=0.8), QUICK)


@pytest.mark.parametrize("version", [1, 2])
def test_the_pair_search_meets_the_budget(version: int) -> None:
    swin, result = create(version), compressed(version)
    original = compressible(swin).cost()
    left = result.report.student.macs / result.report.teacher.macs
    unit = max(block.hidden_unit.macs("with_attention_products") for block in original.blocks)
    target = result.plan.target
    assert target - 2 * len(result.plan.blocks) * unit < result.report.student.macs <= target
    assert left <= 0.8
    assert result.plan.cost == compressible(result.model).cost().total
    for group in compressible(swin).groups():
        kept = {len(result.plan.kept_units[block]) if block in result.plan.blocks else None for block in group}
        assert len(kept) == 1
    blocks = [block for stage in result.model.layers for block in stage.blocks]
    assert [i for i, block in enumerate(blocks) if isinstance(block, CompressedBlock)] == sorted(
        set(result.plan.blocks) - set(result.plan.pruned)
    )


def test_reconstruction_brings_the_model_back() -> None:
    """A compressed block of version 1 comes nearer to what it replaces; nothing else would notice a wrong token."""
    result = dcvit.compress(create(1), torch.randn(10, 3, 32, 32), dcvit.Budget(macs=0.7), QUICK)
    assert result.report.reconstructions
    for block in result.report.reconstructions:
        assert block.error_closed_form is not None
        assert block.error_closed_form < block.error_before
        assert block.error_after <= block.error_closed_form


@pytest.mark.parametrize("version", [1, 2])
def test_it_is_saved_and_loaded_with_dcvit_and_without(version: int, tmp_path: Path) -> None:
    images, result = torch.randn(3, 3, 32, 32), compressed(version)
    result.save(tmp_path / "small")
    dcvit.write_report(tmp_path / "small")
    expected = result.model(images)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'small'}", pretrained=True).eval()
    assert torch.equal(loaded(images), expected)
    assert torch.equal(dcvit.load(tmp_path / "small").model(images), expected)
    # The same computation, but for the order in which dcvit's fused op sums.
    torch.testing.assert_close(output_without_dcvit(tmp_path / "small", images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple")  # timm's, resizing position biases
@pytest.mark.parametrize("version", [1, 2])
def test_a_saved_model_loads_at_an_image_size_that_shrinks_windows(version: int, tmp_path: Path) -> None:
    model = cut(create(version))
    save_model(compressible(model).rebuild(), tmp_path / "small")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'small'}", pretrained=True, img_size=6).eval()
    model.set_input_size(img_size=6, window_size=(4, 4))
    images = torch.randn(2, 3, 6, 6)
    assert loaded.layers[0].blocks[0].window_size == (3, 3)
    torch.testing.assert_close(loaded(images), model(images))


def test_a_saved_model_gives_features(swin: Any, tmp_path: Path) -> None:
    model = cut(swin)
    save_model(compressible(model).rebuild(), tmp_path / "small")
    stages = timm.create_model(f"local-dir:{tmp_path / 'small'}", pretrained=True, features_only=True).eval()
    images = torch.randn(2, 3, 32, 32)
    found, expected = stages(images), model.forward_intermediates(images, intermediates_only=True)
    assert [list(one.shape) for one in found] == [[2, 16, 16, 16], [2, 8, 8, 32]]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.permute(0, 3, 1, 2), other)


def test_blocks_pruned_without_losing_attention_are_saved(swin: Any) -> None:
    view, images = compressible(swin), torch.randn(2, 3, 32, 32)
    for block, kept in {0: 64, 1: 64, 3: 100, 4: 7}.items():
        view.prune_block(block, range(kept))
        assert view.hidden_layer(block).weight.shape[1] == len(view.hidden_filters(block)) == kept
    rebuilt = view.rebuild()
    torch.testing.assert_close(rebuilt(images), swin(images))
    assert compressible(rebuilt).cost() == view.cost()


@pytest.mark.parametrize(
    "name",
    slow_but(
        [name for name in timm.list_models("swin*") if "cr" not in name],
        "swin_tiny_patch4_window7_224",
        "swinv2_tiny_window8_256",
    ),
)
def test_every_swin_of_timm_is_supported(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    view = compressible(model)
    view.check()
    assert len(view.cost().blocks) == view.num_blocks()


def test_what_cannot_be_done_is_refused_by_name(swin: Any) -> None:
    images: Tensor = torch.randn(4, 3, 32, 32)
    with pytest.raises(BudgetError, match=r"blocks \[2, 3\] are compressed together; pass all of them or none"):
        dcvit.compress(swin, images, dcvit.Budget(macs=0.9), QUICK.with_(candidates=(2, 4, 5)))
    for config in (
        dcvit.DCViT.paper(candidates=(0, 1, 2, 3)),
        QUICK.with_(structure="fewest", candidates=(0, 1, 2, 3)),
    ):
        with pytest.raises(BudgetError, match=r"the blocks differ in size.*structure='searched'"):
            plan(swin, dcvit.Budget(macs=0.9), config)
    with pytest.raises(BudgetError, match="candidate blocks can meet"):
        plan(swin, dcvit.Budget(macs=0.1), QUICK)
    with pytest.raises(BudgetError, match=r"num_blocks=3: macs=0\.8 cannot be met by that many"):
        plan(swin, dcvit.Budget(macs=0.8), QUICK.with_(num_blocks=3))
    with pytest.raises(UnsupportedModelError, match=r"SwinTransformerV2Cr are not supported;"):
        require_supported(timm.create_model("swinv2_cr_tiny_ns_224"))
    with pytest.raises(UnsupportedModelError, match=r"Stage 1 of the model has no blocks \(depths=\[2, 0\]\)"):
        require_supported(create(1, depths=(2, 0)))
    with pytest.raises(UnsupportedModelError, match="classifies each position"):
        require_supported(create(1, global_pool=""))
    assert isinstance(DroppedBlock()(images), Tensor)


@pytest.mark.slow
@pytest.mark.parametrize("method", slow_but(["practise", "mir", "fskd", "cd"], "practise", "cd"))
def test_every_method_takes_a_swin(method: str, swin: Any, tmp_path: Path) -> None:
    training = {"epochs": 1, "learning_rate": 1e-3, "warmup_epochs": 5} if method in ("practise", "mir") else {}
    result = dcvit.compress(swin, torch.randn(6, 3, 32, 32), dcvit.Budget(macs=0.7), quick(method, **training))
    assert result.report.student.macs <= 0.7 * result.report.teacher.macs
    if method in ("practise", "mir"):
        blocks = set(result.plan.blocks)
        assert all(blocks >= set(group) for group in compressible(swin).groups() if blocks & set(group))
    result.save(tmp_path / "small")
    dcvit.write_report(tmp_path / "small")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(dcvit.load(tmp_path / "small").model(images), result.model(images))


@pytest.mark.slow
def test_layerwise_fits_bring_a_swin_nearer() -> None:
    model, images = create(1), torch.randn(12, 3, 32, 32)
    losses = {
        method: dcvit.compress(model, images, dcvit.Budget(macs=0.8), quick(method)).report for method in ("fskd", "cd")
    }
    for report in losses.values():
        assert all(block.error_after < block.error_before for block in report.reconstructions)
