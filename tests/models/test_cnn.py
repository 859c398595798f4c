"""CNNs of residual blocks: structure, cost, search, saved form, and what BatchNorm adds."""

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import EcaModule
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dcvit
from dcvit.context import RunContext
from dcvit.data.synthesis import FIRST_BN_WEIGHT, bn_prior
from dcvit.errors import UnsupportedModelError
from dcvit.history import BlockSpec
from dcvit.methods import Practise, Task
from dcvit.methods.baselines.adaptors import absorb_adaptors, adaptors, insert_adaptors
from dcvit.methods.baselines.cd import cd, mix
from dcvit.methods.baselines.fskd import fskd
from dcvit.methods.baselines.layerwise import LayerPair, l1_norms
from dcvit.models import DroppedBlock, OutputLayer, compressible, require_supported
from dcvit.models.modeling.cnn import PointwiseBlock, cnn_places, filter_path
from dcvit.models.surgery import drop_block
from dcvit.models.teacher import freeze
from dcvit.recovery.calibration import TeacherStates, draw_views
from dcvit.recovery.reconstruct import BlockProblem, reconstruct_block
from dcvit.search.space import choose_candidates
from tests.conftest import QUICK, quick, slow_but
from tests.without_dcvit import output_without_dcvit

SIZE = 32
CNNS: dict[str, tuple[str, dict[str, Any]]] = {
    "basic": ("resnet18", {"layers": (2, 3, 2, 2), "channels": (16, 16, 24, 32)}),
    "bottleneck": ("resnet26", {"layers": (3, 2, 2, 1), "channels": (16, 16, 16, 16)}),
    "resnext": ("resnext50_32x4d", {"layers": (2, 2, 1, 1), "channels": (16, 16, 16, 16)}),
    "squeeze_excite": ("seresnet50", {"layers": (2, 2, 1, 1), "channels": (16, 16, 16, 16)}),
    "mobilenet": ("mobilenetv2_035", {}),
    "efficientnet": ("efficientnet_b0", {}),
    "mnasnet": ("mnasnet_small", {}),
    "edge": ("efficientnet_es", {}),
    "regnet": ("regnety_002", {}),
}


def create(kind: str, **changes: Any) -> Any:
    """A small CNN whose BatchNorms have seen something."""
    name, sizes = CNNS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        overlay = {"input_size": (3, SIZE, SIZE)}
        model = timm.create_model(name, num_classes=7, pretrained_cfg_overlay=overlay, **(sizes | changes))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.1)
    return model.eval().requires_grad_(False)


@pytest.fixture(params=slow_but(CNNS, "basic", "bottleneck", "squeeze_excite", "mobilenet", "regnet"))
def cnn(request: pytest.FixtureRequest) -> Any:
    return create(request.param)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, SIZE, SIZE)


def cut(model: nn.Module) -> nn.Module:
    """A copy with the first block compressed, the second dropped, the last without a hidden unit."""
    view, student = compressible(model), copy.deepcopy(model)
    last = view.num_blocks() - 1
    compressible(student).compress_block(0, range(0, 12, 2))
    if last > 1:
        compressible(student).drop_block(1)
    compressible(student).compress_block(last, [])
    return student


def test_the_parts_in_order_are_the_model(cnn: Any, images: Tensor) -> None:
    require_supported(cnn)
    for model in (cnn, cut(cnn)):
        state = compressible(model).embed(images)
        for block in range(compressible(model).num_blocks()):
            given = compressible(model).prepare(state, block)
            before = given.clone()
            alone = compressible(model).block(block)(given)
            assert torch.equal(given, before)  # an activation in place would spoil what a block is fitted to
            state = compressible(model).run_blocks(state, block, block + 1)
            assert torch.equal(state, alone)
        tokens = compressible(model).final_norm(state)
        assert torch.equal(tokens, compressible(model).tokens(images))
        torch.testing.assert_close(compressible(model).logits(tokens), model(images), rtol=1e-4, atol=1e-4)


def test_the_cost_is_what_torch_counts(cnn: Any) -> None:
    for model in (cnn, cut(cnn)):
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(1, 3, SIZE, SIZE))
        total = compressible(model).cost().total
        assert 2 * total.weight_macs == counter.get_total_flops()
        assert total.params == sum(parameter.numel() for parameter in model.parameters())


def test_blocks_cost_what_goes_with_them(cnn: Any) -> None:
    view = compressible(cnn)
    cost, last = view.cost(), view.num_blocks() - 1
    smaller = copy.deepcopy(cnn)
    compressible(smaller).compress_block(0, range(5))
    compressible(smaller).drop_block(last)
    units, dropped = cost.blocks[0].hidden_features - 5, cost.blocks[last]
    saved = cost.blocks[0].attention + cost.blocks[0].hidden_unit * units + dropped.attention + dropped.mlp
    found = compressible(smaller).cost()
    assert found.total == cost.total - saved
    assert not any(found.blocks[block].compressible for block in (0, last))
    assert choose_candidates(cnn, None) == tuple(b for b in range(last + 1) if cost.blocks[b].compressible)


def test_a_compressed_block_starts_as_its_own_first_convolution(images: Tensor) -> None:
    """On an image without edges, where a filter's taps all see the same."""
    model = create("basic")
    block = model.layer2[1]
    flat = torch.rand(1, 16, 1, 1).repeat(1, 1, 6, 6)
    expected = block.act1(block.bn1(block.conv1(flat)))[:, :, 2:4, 2:4]
    pointwise = PointwiseBlock(block)
    torch.testing.assert_close(pointwise.act1(pointwise.conv1(flat))[:, :, 2:4, 2:4], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(pointwise(flat), block.act2(flat))  # before it is fitted it adds nothing


@pytest.mark.parametrize(
    ("kind", "share"),
    slow_but([("basic", 0.9), ("bottleneck", 0.95), ("mobilenet", 0.95), ("regnet", 0.95)], ("basic", 0.9)),
)
def test_it_meets_the_budget_is_saved_and_loaded(kind: str, share: float, images: Tensor, tmp_path: Path) -> None:
    model = create(kind)
    result = dcvit.compress(model, torch.randn(10, 3, SIZE, SIZE), dcvit.Budget(macs=share), QUICK)
    unit = max(b.unit_cost(attention).weight_macs for b in compressible(model).cost().blocks for attention in (0, 1))
    target = result.plan.target
    assert target - len(result.plan.blocks) * unit < result.report.student.macs <= target
    assert result.plan.cost == compressible(result.model).cost().total
    for went in result.report.reconstructions:
        assert went.error_closed_form is not None
        assert went.error_after <= went.error_closed_form <= went.error_before
        if went.block not in result.plan.pruned:  # what takes the place of the rest starts at zero
            assert went.error_closed_form < went.error_before == pytest.approx(1, abs=1e-5)
    statistics = [(name, b) for name, b in model.named_buffers() if "running" in name]
    kept = dict(result.model.named_buffers())
    same = [(kept[name], value) for name, value in statistics if name in kept and kept[name].shape == value.shape]
    assert len(same) > 10
    assert all(torch.equal(found, value) for found, value in same)
    result.save(tmp_path / "small")
    dcvit.write_report(tmp_path / "small")
    expected = result.model(images)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'small'}", pretrained=True).eval()
    assert torch.equal(loaded(images), expected)
    assert torch.equal(dcvit.load(tmp_path / "small").model(images), expected)
    again = dcvit.compress(loaded, torch.randn(6, 3, SIZE, SIZE), dcvit.Budget(macs=0.98), QUICK)
    assert again.report.student.macs < result.report.student.macs


def test_it_loads_without_dcvit(cnn: Any, images: Tensor, tmp_path: Path) -> None:
    model = compressible(cut(cnn)).rebuild()
    dcvit.artifacts.result.save_model(model, tmp_path / "small")
    torch.testing.assert_close(output_without_dcvit(tmp_path / "small", images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    slow_but([
        "resnet34", "resnet50", "resnet50d", "resnet101", "wide_resnet50_2", "resnext50_32x4d", "seresnext50_32x4d",
        "ecaresnet50d", "resnetblur50", "mobilenetv2_100", "mobilenetv2_140", "efficientnet_b0", "efficientnet_b4",
        "efficientnet_lite0", "efficientnetv2_s", "tf_efficientnet_lite0", "tf_efficientnetv2_s", "mnasnet_100",
        "regnety_160", "regnetx_032", "regnetz_005",
    ], "resnet50", "mobilenetv2_100", "regnetx_032"),
)  # fmt: skip
def test_timm_models_are_supported(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    view = compressible(model)
    view.check()
    assert any(block.compressible for block in view.cost().blocks)


@pytest.mark.parametrize(
    ("name", "changes", "part"),
    [
        ("resnet50_gn", {}, r"None of the model's blocks \(Bottleneck\)"),
        ("resnet18", {"global_pool": ""}, "has no pooling"),
        ("resnet18", {"output_stride": 16}, r"part layer4\.0"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(name: str, changes: dict[str, Any], part: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, **changes)
    with pytest.raises(UnsupportedModelError, match=part):
        compressible(model).check()


# Filters that are pruned.

PRUNABLE = ["basic", "bottleneck", "squeeze_excite", "mobilenet", "mnasnet", "edge"]
ALL_ROWS = QUICK.with_(recovery=replace(QUICK.reconstruction, augmentation=None, num_rows=10**6))
"""The images as they are, at every position."""

LAYERWISE = quick("cd", augmentation=None, num_rows=10**6)
"""The same of the methods that fit layer by layer."""


ROUNDING = 1e-5
"""What rounding in float64 changes of a fitted weight: K eps over λ = 1e-8, for a few hundred inputs K."""


def pruned(model: nn.Module) -> nn.Module:
    """A copy with the first and the last block pruned, and a compressed one pruned again."""
    view, student = compressible(model), copy.deepcopy(model)
    last = view.num_blocks() - 1
    compressible(student).prune_block(last, range(1, view.hidden_features(last), 2))
    if last > 1:
        compressible(student).compress_block(1, range(0, 12, 2))
        compressible(student).prune_block(1, (0, 3))
    compressible(student).prune_block(0, range(7))
    return student


@pytest.mark.parametrize("kind", PRUNABLE)
def test_filters_that_are_zero_can_go(kind: str, images: Tensor) -> None:
    model, block, gone = create(kind), 1, [0, 3, 4]
    view = compressible(model)
    stage, name = cnn_places(model)[block]
    for layer, dim in filter_path(getattr(stage, name)):
        if dim == 0:
            layer.weight[gone] = 0
            for values in (layer.bias, getattr(layer, "running_mean", None)):
                if values is not None:
                    values[gone] = 0
    expected = model(images)
    norms = l1_norms(model, block)
    assert norms.argsort()[: len(gone)].sort().values.tolist() == gone
    view.prune_block(block, [i for i in range(len(norms)) if i not in gone])
    assert view.hidden_features(block) == len(norms) - len(gone)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)  # fewer terms add up in another order


@pytest.mark.parametrize("kind", slow_but(PRUNABLE, "basic", "squeeze_excite", "mobilenet"))
def test_pruned_blocks_are_saved_and_loaded(kind: str, images: Tensor, tmp_path: Path) -> None:
    model = create(kind)
    student = pruned(model)
    view = require_supported(student)
    before = [compressible(model).hidden_features(block) for block in range(compressible(model).num_blocks())]
    last = len(before) - 1
    settings = {"0": {"skip": [], "intermediate_size": 7}}
    if last:
        settings[str(last)] = {"skip": [], "intermediate_size": before[last] // 2}
    if last > 1:
        settings["1"] = {"skip": ["convolution"], "intermediate_size": 2}
    assert view.config()["model_args"]["per_layer_config"] == settings
    assert compressible(model).config()["model_args"]["per_layer_config"] == {}
    expected = student(images)
    assert torch.equal(view.rebuild()(images), expected)
    dcvit.artifacts.result.save_model(view.rebuild(), tmp_path / "small")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'small'}", pretrained=True).eval()
    assert torch.equal(loaded(images), expected)
    torch.testing.assert_close(output_without_dcvit(tmp_path / "small", images), expected, rtol=1e-4, atol=1e-5)
    assert compressible(loaded).config()["model_args"] == view.config()["model_args"]
    with FlopCounterMode(display=False) as counter:
        student(torch.randn(1, 3, SIZE, SIZE))
    total = view.cost().total
    assert (2 * total.weight_macs, total.params) == (
        counter.get_total_flops(),
        sum(p.numel() for p in student.parameters()),
    )


SINGLE_PROCESS = ["basic", "bottleneck", "mobilenet", "edge"]
"""CNNs from which dcvit's own method removes single filters; the remaining filters compute the same as before."""


@pytest.mark.parametrize("kind", slow_but(SINGLE_PROCESS, "basic"))
def test_the_end_of_a_block_follows_from_the_inputs_of_its_last_layer(kind: str, images: Tensor) -> None:
    model = create(kind)
    view = compressible(model)
    cost = view.cost()
    for block in range(view.num_blocks()):
        sublayers, layer = view.sublayers(block), view.output_layer(block)
        assert sublayers is not None
        assert layer is not None
        given = view.prepare(view.run_blocks(view.embed(images), 0, block), block)
        before, expected = given.clone(), view.block(block)(given.clone())
        between = sublayers[0](given)
        assert torch.equal(given, before)
        width = given.shape[1]
        assert torch.equal(between[:, :width], given)
        assert between.shape[1] == width + view.hidden_features(block) * layer.num_patches
        torch.testing.assert_close(sublayers[1](between), expected, rtol=1e-4, atol=1e-4)  # added up in another order
        alone = view.from_tokens(view.as_tokens(between))
        torch.testing.assert_close(view.as_tokens(sublayers[1](alone)), view.as_tokens(expected), rtol=1e-4, atol=1e-4)

        patches, added = rows(between[:, width:]), rows(expected - given)
        constant = added - patches @ layer.weights()
        torch.testing.assert_close(constant, constant[:1].expand_as(constant), rtol=1e-3, atol=1e-4)
        pruned = copy.deepcopy(model)
        compressible(pruned).prune_block(block, range(2, view.hidden_features(block)))
        assert compressible(pruned).cost().total == cost.total - cost.blocks[block].unit_cost(True) * 2


@pytest.mark.parametrize("kind", ["resnext", "squeeze_excite", "efficientnet", "regnet"])
def test_filters_that_others_depend_on_are_not_removed_singly(kind: str) -> None:
    model = create(kind)
    assert not any(compressible(model).sublayers(block) for block in range(compressible(model).num_blocks()))


def test_a_bottleneck_that_widens_does_not_lose_filters() -> None:
    model = create("bottleneck", block_reduce_first=2)
    assert compressible(model).prune_obstacle(0) == (
        "is of type Bottleneck, and its conv2 has more filters than the convolution before it"
    )
    assert compressible(model).hidden_features(0) == 8
    compressible(model).compress_block(0, range(8))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_an_output_layer_adds_what_it_is_set_to(bias: bool, norm: bool) -> None:
    conv = nn.Conv2d(4, 3, 3, bias=bias).requires_grad_(False)
    behind = nn.BatchNorm2d(3).requires_grad_(False).eval()
    behind.running_mean, behind.running_var = torch.randn(3), torch.rand(3) + 0.5
    behind.weight.copy_(torch.tensor([0.5, -2.0, 1.0]))
    layer = OutputLayer(conv, norm=behind if norm else None)
    assert layer.constant == (bias or norm)
    assert layer.num_patches == 9
    solution = torch.randn(4 * 9 + 1, 3)
    if not layer.constant:
        solution[-1] = 0
    layer.set(solution)
    state = torch.randn(2, 4, 5, 5)
    added = behind(conv(state)) if norm else conv(state)
    patches = F.unfold(state, 3).transpose(1, 2)
    torch.testing.assert_close(added.flatten(2).transpose(1, 2), patches @ solution[:-1] + solution[-1])
    torch.testing.assert_close(layer.weights(), solution[:-1])


@pytest.mark.parametrize("kind", slow_but(SINGLE_PROCESS, "basic", "mobilenet"))
@pytest.mark.parametrize("keeps_all", [True, False])
def test_a_pruned_block_is_fitted_to_the_whole_one(kind: str, keeps_all: bool) -> None:
    """With all filters the block is already right. With half of them, the fit is ridge regression on patches."""
    teacher = freeze(create(kind).double())
    view, few = compressible(teacher), torch.randn(24, 3, SIZE, SIZE, dtype=torch.float64)
    config, block = ALL_ROWS.reconstruction, 1
    views = draw_views(teacher, dcvit.load_images(few, teacher), config, seed=0)
    states = TeacherStates(teacher, views, config.batch_size, prunable=[block])
    rows_of_it, student = states.mlp_rows(block), copy.deepcopy(teacher)
    hidden = view.hidden_features(block)
    found = BlockSpec(hidden if keeps_all else hidden // 2, attention=True)
    kept, report = reconstruct_block(student, BlockProblem(block, found, rows_of_it), config, refit=False)
    assert compressible(student).hidden_features(block) == len(kept) == found.hidden_features
    assert report.error_closed_form is not None
    if keeps_all:
        assert report.error_before == pytest.approx(0, abs=1e-20)
        for name, value in student.state_dict().items():
            torch.testing.assert_close(value, teacher.state_dict()[name], rtol=0, atol=1e-8, msg=name)
        return
    assert report.error_after == report.error_closed_form < 0.9 * report.error_before
    given = view.prepare(view.run_blocks(view.embed(few), 0, block), block)
    missed, added = (
        compressible(model).block(block)(given) - (view.block(block)(given) if model is student else given)
        for model in (student, teacher)
    )
    held_out = views.held_out
    error = missed[held_out].square().sum() / added[held_out].square().sum()
    assert float(error) == pytest.approx(report.error_after, rel=1e-6)


def test_a_cnn_meets_a_budget_that_no_whole_convolution_meets(images: Tensor, tmp_path: Path) -> None:
    """Single filters go where the smallest convolution would be too much."""
    model = create("basic")
    result = dcvit.compress(model, torch.randn(10, 3, SIZE, SIZE), dcvit.Budget(macs=0.997), QUICK)
    cost = compressible(model).cost()
    assert min(block.attention.weight_macs for block in cost.blocks) > 0.003 * cost.total.weight_macs
    left = result.plan.target - result.report.student.macs
    assert 0 <= left < min(block.unit_cost(True).weight_macs for block in cost.blocks if block.compressible)
    assert result.plan.pruned == tuple(sorted(result.plan.blocks))
    assert result.plan.cost == compressible(result.model).cost().total
    assert all(probe.sensitivity is not None for probe in result.report.pruning_probes)
    assert len(result.report.pruning_probes) == len(cost.blocks)
    result.save(tmp_path / "small")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'small'}", pretrained=True).eval()
    assert torch.equal(loaded(images), result.model(images))
    page = dcvit.write_report(tmp_path / "small").read_text()
    assert "keep their spatial convolution" in page


@pytest.mark.slow
@pytest.mark.parametrize("kind", slow_but(["basic", "bottleneck", "mobilenet", "mnasnet"], "basic"))
@pytest.mark.parametrize("method", ["fskd", "cd"])
def test_methods_that_prune_filters_take_a_cnn(method: str, kind: str, images: Tensor, tmp_path: Path) -> None:
    model = create(kind)
    view = compressible(model)
    before = copy.deepcopy(model.state_dict())
    config = quick(method, num_rows=3000)
    result = dcvit.compress(model, torch.randn(8, 3, SIZE, SIZE), dcvit.Budget(macs=0.9), config)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    thinner = copy.deepcopy(model)
    for block in result.plan.blocks:
        compressible(thinner).prune_block(block, range(1, view.hidden_features(block)))
    step = view.cost().total.weight_macs - compressible(thinner).cost().total.weight_macs
    assert result.plan.target - step < result.report.student.macs <= result.plan.target
    assert result.plan.pruned == result.plan.blocks == tuple(range(view.num_blocks()))
    assert result.plan.cost == compressible(result.model).cost().total
    first = result.report.reconstructions[0]
    assert first.error_after < first.error_before  # later blocks have fewer positions here than inputs
    statistics = dict(result.model.named_buffers())
    assert torch.equal(statistics["bn1.running_mean"], before["bn1.running_mean"])
    result.save(tmp_path / "small")
    expected = result.model(images)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'small'}", pretrained=True).eval()
    assert torch.equal(loaded(images), expected)
    assert torch.equal(dcvit.load(tmp_path / "small").model(images), expected)
    card, page = (tmp_path / "small" / "README.md").read_text(), dcvit.write_report(tmp_path / "small").read_text()
    assert f"{result.plan.hidden_features} filters are left" in card.replace("on average ", "")
    assert "These blocks lost filters and keep their spatial convolution (filters that each keeps): 0 (" in page
    assert not re.search(r"attention (stays|before|after)|MLP", card + page)


def layers_of(model: nn.Module, few: Tensor, fit: Any, block: int) -> tuple[nn.Conv2d, Any, Any]:
    """A fitted layer; what it takes and gives in the student unfitted, and what the teacher's gives, of own states."""
    teacher = freeze(model.double())
    task = Task(teacher, dcvit.load_images(few.double(), teacher), dcvit.Budget(macs=0.9), LAYERWISE, RunContext())
    outcome = fit(task)
    bare = copy.deepcopy(teacher)
    for number, units in outcome.plan.kept_units.items():
        compressible(bare).prune_block(number, units)

    def watched(model: nn.Module, state: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[tuple[Tensor, Tensor]] = []
        hook = compressible(model).hidden_layer(block).register_forward_hook(lambda _, x, y: seen.append((x[0], y)))
        compressible(model).run_blocks(state, block, block + 1)
        hook.remove()
        return seen[0]

    def before(model: nn.Module) -> Tensor:
        return compressible(model).run_blocks(compressible(model).embed(few.double()), 0, block)

    def both(states: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        (hidden, given), (_, wanted) = watched(bare, before(states)), watched(teacher, before(states))
        return hidden, given, wanted

    fitted = compressible(outcome.student).hidden_layer(block)
    assert isinstance(fitted, nn.Conv2d)
    own, theirs = both(outcome.student), both(teacher)
    return fitted, (*own[:2], theirs[2]), {"imitation": own, "correction": theirs}


def rows(maps: Tensor) -> Tensor:
    """Positions of a map `[B, D, H, W]` as rows `[B·H·W, D]`."""
    return maps.movedim(1, 3).flatten(0, 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["basic", "bottleneck", "mobilenet"])
def test_fskd_aligns_feature_maps_by_least_squares(kind: str) -> None:
    fitted, (hidden, given, wanted), _ = layers_of(create(kind), torch.randn(40, 3, SIZE, SIZE), fskd, 1)
    solution = torch.linalg.lstsq(rows(given), rows(wanted)).solution
    found = F.conv2d(hidden, fitted.weight, padding=fitted.padding)
    # Where features hardly vary the identity, weighted with 1e-8, still tells.
    torch.testing.assert_close(rows(found), rows(given) @ solution, rtol=1e-4, atol=1e-4)
    assert (found - wanted).square().mean() < 0.9 * (given - wanted).square().mean()


@pytest.mark.parametrize(("mixing", "which"), [(1.0, "correction"), (0.0, "imitation")])
@pytest.mark.parametrize("kind", slow_but(["basic", "bottleneck", "mobilenet"], "basic"))
def test_cd_fits_patches_by_least_squares(
    kind: str, mixing: float, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcvit.methods.baselines.cd.mix", lambda *sides: mix(*sides, mixing))
    fitted, _, sides = layers_of(create(kind), torch.randn(40, 3, SIZE, SIZE), cd, 1)
    hidden, given, wanted = sides[which]
    taps = fitted.kernel_size[0]
    assert taps == (3 if kind == "basic" else 1)
    patches = F.unfold(hidden, taps, padding=taps // 2).transpose(1, 2).flatten(0, 1)
    least = patches @ torch.linalg.lstsq(patches, rows(wanted)).solution - rows(wanted)
    missed = F.conv2d(hidden, fitted.weight, padding=fitted.padding) - wanted
    assert float(missed.square().mean()) == pytest.approx(float(least.square().mean()), rel=1e-5)
    assert least.square().mean() < 0.9 * (given - wanted).square().mean()


@pytest.mark.parametrize("kind", ["basic", "mnasnet"])
def test_cd_does_not_change_a_model_that_loses_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = create(kind).double()
    monkeypatch.setattr(
        "dcvit.methods.baselines.layerwise.widest_mlps",
        lambda model, _, blocks, __: {block: compressible(model).hidden_features(block) for block in blocks},
    )
    few = dcvit.load_images(torch.randn(4, 3, SIZE, SIZE, dtype=torch.float64), model)
    student = cd(Task(model, few, dcvit.Budget(macs=0.9), LAYERWISE, RunContext())).student
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=0, atol=ROUNDING, msg=name)


def test_patches_are_those_of_unfold() -> None:
    layer = nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(2, 3))
    state = torch.randn(2, 3, 9, 8)
    output = layer(state)
    all_patches = F.unfold(state, layer.kernel_size, layer.dilation, layer.padding, layer.stride).transpose(1, 2)
    places = torch.stack([torch.randperm(all_patches.shape[1])[:7] for _ in state])
    pair = LayerPair(layer, state, output.flatten(2).transpose(1, 2), places, torch.tensor([True, False]))
    expected = torch.stack([patches[chosen] for patches, chosen in zip(all_patches, places, strict=True)]).flatten(0, 1)
    assert torch.equal(pair.hidden, expected)
    torch.testing.assert_close(pair.hidden @ layer.weight.flatten(1).T + layer.bias, pair.output)
    assert pair.held_out.tolist() == [True] * 7 + [False] * 7


def test_the_batches_change_nothing() -> None:
    model = freeze(create("basic").double())
    few = dcvit.load_images(torch.randn(10, 3, SIZE, SIZE, dtype=torch.float64), model)
    outcomes = []
    for batch_size in (64, 3):
        config = quick("cd", batch_size=batch_size)
        outcomes.append(cd(Task(model, few, dcvit.Budget(macs=0.9), config, RunContext())))
    weights, others = (outcome.student.state_dict() for outcome in outcomes)
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], rtol=0, atol=ROUNDING, msg=name)
    for one, other in zip(*(outcome.reconstructions for outcome in outcomes), strict=True):
        assert (one.error_before, one.error_after) == pytest.approx((other.error_before, other.error_after), rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("resnext", "Bottleneck, and its conv2 has 32 groups, each of which would have to lose equally many filters"),
        ("regnet", r"Bottleneck, and its conv2\.conv has \d+ groups, each"),
    ],
)
@pytest.mark.parametrize("method", ["fskd", "cd"])
def test_grouped_filters_are_refused(method: str, kind: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dcvit.methods.baselines.layerwise.draw_views", None)  # nothing is computed before
    with pytest.raises(
        UnsupportedModelError, match=rf"None of .* block 0 is of type {reason}.* dcvit, practise or mir"
    ):
        dcvit.compress(create(kind), torch.randn(2, 3, SIZE, SIZE), dcvit.Budget(macs=0.95), method)


@pytest.mark.slow
def test_blocks_whose_filters_are_tied_stay_whole() -> None:
    model = freeze(create("efficientnet"))
    stage, name = cnn_places(model)[1]
    getattr(stage, name).se = EcaModule(144)  # a convolution over the channels
    few_shot = dcvit.load_images(torch.randn(2, 3, SIZE, SIZE), model)
    given = Task(model, few_shot, dcvit.Budget(macs=0.9), quick("fskd"), RunContext())
    obstacle = "is of type InvertedResidual, and its se, of type EcaModule, cannot lose single channels"
    assert compressible(model).prune_obstacle(1) == obstacle
    with pytest.raises(
        dcvit.errors.BudgetError, match=rf"candidates=\[0, 1\]: block 1 {obstacle}; \[0, 2, .*\] can lose hidden"
    ):
        fskd(replace(given, config=quick("fskd", candidates=(0, 1))))
    with pytest.raises(dcvit.errors.BudgetError, match=r"block 99 does not exist; \[0, 2, .*\] can lose hidden"):
        fskd(replace(given, config=quick("fskd", candidates=(99,))))
    assert 1 not in fskd(given).plan.blocks


@pytest.mark.slow
@pytest.mark.parametrize("kind", slow_but(["basic", "mobilenet", "regnet"], "basic"))
@pytest.mark.parametrize("method", ["practise", "mir"])
def test_methods_that_drop_blocks_take_a_cnn(method: str, kind: str, images: Tensor, tmp_path: Path) -> None:
    model = create(kind)
    config = quick(method, epochs=2, learning_rate=1e-4, batch_size=4, warmup_epochs=0)
    budget = dcvit.Budget(macs=0.97)
    result = dcvit.compress(model, torch.randn(8, 3, SIZE, SIZE), budget, config)
    assert result.report.student.macs <= 0.97 * result.report.teacher.macs
    assert not adaptors(result.model)
    assert result.report.steps[0].loss_after < result.report.steps[0].loss_before
    result.save(tmp_path / "small")
    dcvit.write_report(tmp_path / "small")
    torch.testing.assert_close(dcvit.load(tmp_path / "small").model(images), result.model(images))


@pytest.mark.parametrize("kind", slow_but(["basic", "bottleneck", "mobilenet", "edge", "regnet"], "basic", "mobilenet"))
def test_an_absorbed_adaptor_leaves_the_outputs_equal(kind: str) -> None:
    """The convolutions next to the gap, each with a 1×1 convolution of its own, against the absorbed ones."""
    model = create(kind).double()
    images = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    dropped = drop_block(model, 1)
    plain = dropped(images)
    insert_adaptors(dropped, [1])
    torch.testing.assert_close(dropped(images), plain, rtol=0, atol=1e-12)
    with torch.no_grad():
        for matrix in adaptors(dropped):
            matrix += 0.1 * torch.randn_like(matrix)
    by_hand = drop_block(model, 1)
    before, behind = compressible(by_hand).absorbing_layers(1)
    maps = adaptors(dropped)
    assert len(maps) == (before is not None) + (behind is not None) > 0
    if before is not None:
        after = maps.pop(0)[:, :, None, None]
        before.register_forward_hook(lambda _, args, output: F.conv2d(output, after))
    if behind is not None:
        first = maps.pop(0)[:, :, None, None]
        behind.register_forward_pre_hook(lambda _, args: F.conv2d(args[0], first))
    expected = by_hand(images)
    assert not torch.allclose(expected, plain)
    torch.testing.assert_close(dropped(images), expected, rtol=0, atol=1e-9)
    absorb_adaptors(dropped)
    assert dropped.state_dict().keys() == drop_block(model, 1).state_dict().keys()
    torch.testing.assert_close(dropped(images), expected, rtol=0, atol=1e-9)


def test_only_adaptors_recover_in_a_probe() -> None:
    model = create("basic")
    recovery = dcvit.config.DistillationConfig(epochs=2, learning_rate=1e-2, batch_size=4)
    few = torch.randn(8, 3, SIZE, SIZE)
    result = dcvit.compress(model, few, dcvit.Budget(macs=0.97), Practise(distillation=recovery))
    for probe in result.report.probes:
        assert probe.recovery is not None
        assert probe.recovery.loss_after < probe.recovery.loss_before


def test_the_batchnorm_prior_is_the_distance_of_the_statistics() -> None:
    norms = [nn.BatchNorm2d(2), nn.BatchNorm2d(3)]
    x, y = torch.randn(4, 2, 5, 5), torch.randn(4, 3, 5, 5)
    for norm in norms:
        norm.running_mean.uniform_(-1, 1)
    assert isinstance(norms[0].running_mean, Tensor)

    def distance(norm: Any, given: Tensor) -> Tensor:
        flat = given.transpose(0, 1).flatten(1)
        variance = flat.var(dim=1, correction=0)
        return (flat.mean(dim=1) - norm.running_mean).norm() + (variance - norm.running_var).norm()

    expected = FIRST_BN_WEIGHT * distance(norms[0], x) + distance(norms[1], y)
    torch.testing.assert_close(bn_prior([(norms[0], x), (norms[1], y)]), expected)


def test_synthesised_images_come_nearer_to_the_statistics() -> None:
    model = create("basic")

    def missed(images: Tensor) -> float:
        inputs: list[tuple[nn.BatchNorm2d, Tensor]] = []
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        handles = [n.register_forward_pre_hook(lambda m, args: inputs.append((m, args[0]))) for n in norms]
        model(images)
        for handle in handles:
            handle.remove()
        return float(bn_prior(inputs))

    config = dcvit.config.SynthesisConfig(num_images=4, iterations=30, jitter=0.0, flip=0.0)
    with_prior = dcvit.data.synthesis.synthesize(model, config)
    without = dcvit.data.synthesis.synthesize(
        model, dcvit.config.SynthesisConfig(num_images=4, iterations=30, jitter=0, flip=0, bn_weight=0)
    )
    assert missed(with_prior.images) < 0.9 * missed(without.images)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert isinstance(DroppedBlock()(with_prior.images), Tensor)
