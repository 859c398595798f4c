"""CNNs of residual blocks: structure, cost, search, saved form, and what BatchNorm adds."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dcvit
from dcvit.errors import UnsupportedModelError
from dcvit.methods.adaptors import absorb_adaptors, adaptors, insert_adaptors
from dcvit.models import DroppedBlock, adapter_for, require_supported
from dcvit.models.modeling_dcvit import PointwiseBlock
from dcvit.planning import choose_candidates
from dcvit.surgery import drop_block
from dcvit.synthesis import FIRST_BN_WEIGHT, bn_prior
from tests.conftest import QUICK
from tests.without_dcvit import output_without_dcvit

SIZE = 32
CNNS: dict[str, tuple[str, dict[str, Any]]] = {
    "basic": ("resnet18", {"layers": (2, 3, 2, 2), "channels": (16, 16, 24, 32)}),
    "bottleneck": ("resnet26", {"layers": (3, 2, 2, 1), "channels": (16, 16, 16, 16)}),
    "resnext": ("resnext50_32x4d", {"layers": (2, 2, 1, 1), "channels": (16, 16, 16, 16)}),
    "squeeze_excite": ("seresnet50", {"layers": (2, 2, 1, 1), "channels": (16, 16, 16, 16)}),
    "mobilenet": ("mobilenetv2_035", {}),
    "efficientnet": ("efficientnet_b0", {}),
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


@pytest.fixture(params=CNNS)
def cnn(request: pytest.FixtureRequest) -> Any:
    return create(request.param)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, SIZE, SIZE)


def cut(model: nn.Module) -> nn.Module:
    """A copy with the first block compressed, the second dropped, the last without a hidden node."""
    adapter, student = adapter_for(model), copy.deepcopy(model)
    last = adapter.num_blocks(model) - 1
    adapter.compress_block(student, 0, range(0, 12, 2))
    if last > 1:
        adapter.drop_block(student, 1)
    adapter.compress_block(student, last, [])
    return student


def test_the_parts_in_order_are_the_model(cnn: Any, images: Tensor) -> None:
    adapter = require_supported(cnn)
    for model in (cnn, cut(cnn)):
        state = adapter.embed(model, images)
        for block in range(adapter.num_blocks(model)):
            given = adapter.prepare(model, state, block)
            before = given.clone()
            alone = adapter.block(model, block)(given)
            assert torch.equal(given, before)  # an activation in place would spoil what a block is fitted to
            state = adapter.run_blocks(model, state, block, block + 1)
            assert torch.equal(state, alone)
        tokens = adapter.final_norm(model, state)
        assert torch.equal(tokens, adapter.tokens(model, images))
        torch.testing.assert_close(adapter.logits(model, tokens), model(images), rtol=1e-4, atol=1e-4)


def test_the_cost_is_what_torch_counts(cnn: Any) -> None:
    for model in (cnn, cut(cnn)):
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(1, 3, SIZE, SIZE))
        total = adapter_for(model).cost(model).total
        assert 2 * total.weight_macs == counter.get_total_flops()
        assert total.params == sum(parameter.numel() for parameter in model.parameters())


def test_blocks_cost_what_goes_with_them(cnn: Any) -> None:
    adapter = adapter_for(cnn)
    cost, last = adapter.cost(cnn), adapter.num_blocks(cnn) - 1
    smaller = copy.deepcopy(cnn)
    adapter.compress_block(smaller, 0, range(5))
    adapter.drop_block(smaller, last)
    nodes, dropped = cost.blocks[0].hidden_features - 5, cost.blocks[last]
    saved = cost.blocks[0].attention + cost.blocks[0].hidden_node * nodes + dropped.attention + dropped.mlp
    found = adapter.cost(smaller)
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
    ("kind", "share"), [("basic", 0.9), ("bottleneck", 0.95), ("mobilenet", 0.95), ("regnet", 0.95)]
)
def test_it_meets_the_budget_is_saved_and_loaded(kind: str, share: float, images: Tensor, tmp_path: Path) -> None:
    model = create(kind)
    result = dcvit.compress(model, torch.randn(10, 3, SIZE, SIZE), dcvit.Budget(macs=share), QUICK)
    node = max(b.hidden_node.weight_macs for b in adapter_for(model).cost(model).blocks)
    target = result.plan.target
    assert target - len(result.plan.blocks) * node < result.report.student.macs <= target
    assert result.plan.cost == adapter_for(result.model).cost(result.model).total
    for went in result.report.reconstructions:
        assert went.error_closed_form is not None
        assert went.error_after <= went.error_closed_form < went.error_before == pytest.approx(1, abs=1e-5)
    statistics = [(name, b) for name, b in model.named_buffers() if "running" in name]
    kept = dict(result.model.named_buffers())
    assert all(torch.equal(kept[name], value) for name, value in statistics if name in kept)
    result.save(tmp_path / "small")
    dcvit.write_report(tmp_path / "small")
    expected = result.model(images)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'small'}", pretrained=True).eval()
    assert torch.equal(loaded(images), expected)
    assert torch.equal(dcvit.load(tmp_path / "small").model(images), expected)
    again = dcvit.compress(loaded, torch.randn(6, 3, SIZE, SIZE), dcvit.Budget(macs=0.98), QUICK)
    assert again.report.student.macs < result.report.student.macs


def test_it_loads_without_dcvit(cnn: Any, images: Tensor, tmp_path: Path) -> None:
    model = adapter_for(cnn).rebuild(cut(cnn))
    dcvit.results.save_model(model, tmp_path / "small")
    torch.testing.assert_close(output_without_dcvit(tmp_path / "small", images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "resnet34", "resnet50", "resnet50d", "resnet101", "wide_resnet50_2", "resnext50_32x4d", "seresnext50_32x4d",
        "ecaresnet50d", "resnetblur50", "mobilenetv2_100", "mobilenetv2_140", "efficientnet_b0", "efficientnet_b4",
        "efficientnet_lite0", "efficientnetv2_s", "tf_efficientnet_lite0", "tf_efficientnetv2_s", "mnasnet_100",
        "regnety_160", "regnetx_032", "regnetz_005",
    ],
)  # fmt: skip
def test_timm_models_are_supported(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    adapter = adapter_for(model)
    adapter.check(model)
    assert any(block.compressible for block in adapter.cost(model).blocks)


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
        adapter_for(model).check(model)


@pytest.mark.parametrize("method", ["fskd", "cd"])
def test_methods_that_prune_mlps_refuse_a_cnn(method: str) -> None:
    with pytest.raises(UnsupportedModelError, match="this one is a cnn: choose one of"):
        dcvit.compress(create("basic"), torch.randn(2, 3, SIZE, SIZE), dcvit.Budget(macs=0.95), method=method)


@pytest.mark.parametrize("kind", ["basic", "mobilenet", "regnet"])
@pytest.mark.parametrize("method", ["practise", "mir"])
def test_methods_that_drop_blocks_take_a_cnn(method: str, kind: str, images: Tensor, tmp_path: Path) -> None:
    model = create(kind)
    recovery = dcvit.MimickingConfig(epochs=2, learning_rate=1e-4, batch_size=4, warmup_epochs=0)
    budget = dcvit.Budget(macs=0.97)
    result = dcvit.compress(model, torch.randn(8, 3, SIZE, SIZE), budget, QUICK.with_(recovery=recovery), method=method)
    assert result.report.student.macs <= 0.97 * result.report.teacher.macs
    assert not adaptors(result.model)
    assert result.report.steps[0].loss_after < result.report.steps[0].loss_before
    result.save(tmp_path / "small")
    dcvit.write_report(tmp_path / "small")
    torch.testing.assert_close(dcvit.load(tmp_path / "small").model(images), result.model(images))


@pytest.mark.parametrize("kind", ["basic", "bottleneck", "mobilenet", "edge", "regnet"])
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
    before, behind = adapter_for(by_hand).absorbing_layers(by_hand, 1)
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


def test_only_adaptors_recover_in_a_trial() -> None:
    model = create("basic")
    recovery = dcvit.MimickingConfig(epochs=2, learning_rate=1e-2, batch_size=4)
    few = torch.randn(8, 3, SIZE, SIZE)
    result = dcvit.compress(model, few, dcvit.Budget(macs=0.97), QUICK.with_(recovery=recovery), method="practise")
    for trial in result.report.trials:
        assert trial.recovery is not None
        assert trial.recovery.loss_after < trial.recovery.loss_before


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

    config = dcvit.SynthesisConfig(num_images=4, iterations=30, jitter=0.0, flip=0.0)
    with_prior = dcvit.synthesize(model, config)
    without = dcvit.synthesize(model, dcvit.SynthesisConfig(num_images=4, iterations=30, jitter=0, flip=0, bn_weight=0))
    assert missed(with_prior.images) < 0.9 * missed(without.images)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert isinstance(DroppedBlock()(with_prior.images), Tensor)
