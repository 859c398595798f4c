"""Blocks that share weights (`method="mini_deit"`): what they compute, cost and learn, and how they are saved."""

import copy
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dcvit
from dcvit.artifacts.result import save_model
from dcvit.costs import file_size
from dcvit.methods.baselines.mini_deit import Join, choose, joins, owners, sharing
from dcvit.metrics.cost import spent
from dcvit.metrics.memory import trace_activation_memory
from dcvit.models import compressible, load_model
from dcvit.models.modeling.variations import SharedBlock
from dcvit.models.teacher import freeze
from dcvit.models.vision_transformer import convolution_of, place_convolution
from tests.conftest import quick, slow_but
from tests.variants import SMALL, VARIANTS
from tests.without_dcvit import output_without_dcvit

WIDTH, HEADS = 48, 3
RUN: tuple[Join, ...] = (("attention", 2), ("attention", 3), ("mlp", 2))
"""Blocks 1, 2 and 3 with one attention, and 1 and 2 with one MLP."""


def images_for(model: nn.Module, count: int = 2) -> Tensor:
    return torch.randn(count, *compressible(model).input_size())


def num_params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def with_equal_blocks(name: str = "plain", **changes: Any) -> Any:
    """A model in float64 in which the blocks of `RUN` have equal weights, and norms of their own."""
    model: Any = VARIANTS[name].create(**changes).double()
    for block in (2, 3):
        model.blocks[block].attn.load_state_dict(model.blocks[1].attn.state_dict())
    model.blocks[2].mlp.load_state_dict(model.blocks[1].mlp.state_dict())
    return model


def shared(model: nn.Module, chosen: Collection[Join] = RUN) -> Any:
    """A copy whose weights are its own, with transformations that are no identities."""
    student: Any = copy.deepcopy(sharing(model, chosen))
    for name, parameter in student.named_parameters():
        if name.endswith(("mix_logits", "mix_weights", "local")):
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return student


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "post_norm"])
def test_equal_weights_are_lost_and_nothing_else(name: str) -> None:
    model = with_equal_blocks(name)
    student: Any = copy.deepcopy(sharing(model, RUN))
    images = images_for(model).double()
    with torch.no_grad():
        torch.testing.assert_close(student(images), model(images), rtol=1e-10, atol=1e-10)  # float64 rounding
    attention, mlp = num_params(model.blocks[1].attn), num_params(model.blocks[1].mlp)
    transformations = 3 * 2 * model.blocks[1].attn.num_heads ** 2 + 2 * 9 * model.embed_dim
    assert num_params(student) == num_params(model) - 2 * attention - mlp + transformations
    cost = compressible(student).cost()
    assert cost.total.params == num_params(student)
    for found, block in zip(cost.blocks, student.blocks, strict=True):
        assert found.attention.params + found.mlp.params == num_params(block)
    again: Any = compressible(student).rebuild().eval()
    assert again.blocks[3].attn is again.blocks[1].attn
    with torch.no_grad():
        assert torch.equal(again(images), student(images))


def test_costs_are_what_torch_counts() -> None:
    student = shared(VARIANTS["registers"].create())
    for module in student.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # torch counts no FLOPs for the CPU's fused attention
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        student(images_for(student, 1))
    assert 2 * compressible(student).cost().total.macs("with_attention_products") == counter.get_total_flops()


def test_owners_are_the_first_of_their_runs() -> None:
    chosen: list[Join] = [("mlp", 6), ("mlp", 2), ("attention", 4), ("mlp", 3)]
    assert owners(chosen, "mlp") == {1: 1, 2: 1, 3: 1, 5: 5, 6: 5}
    assert owners(chosen, "attention") == {3: 3, 4: 3}


def test_heads_are_mixed_before_and_behind_the_softmax() -> None:
    block = shared(VARIANTS["plain"].create(qk_norm=True)).blocks[2]
    x = torch.randn(2, 5, WIDTH)
    attn = block.attn
    query, key, value = attn.qkv(x).view(2, 5, 3, HEADS, -1).unbind(2)
    query, key = attn.q_norm(query), attn.k_norm(key)
    logits = torch.einsum("bnhc,bmhc->bhnm", query, key) / 4  # heads of 16 channels
    weights = torch.einsum("gh,bhnm->bgnm", block.mix_logits, logits).softmax(-1)
    weights = torch.einsum("gh,bhnm->bgnm", block.mix_weights, weights)
    expected = attn.proj(torch.einsum("bhnm,bmhc->bnhc", weights, value).flatten(2))
    torch.testing.assert_close(block.attend(x), expected, rtol=1e-5, atol=1e-5)  # float32, another order of sums
    # A mask hides tokens whatever the maps are.
    changed = x.clone()
    changed[:, 4] += 1
    for mask in ({"is_causal": True}, {"attn_mask": torch.ones(5, 5).tril().bool()}):
        before, after = (block.attend(tokens, **mask) for tokens in (x, changed))
        torch.testing.assert_close(before[:, :4], after[:, :4])
        assert not torch.allclose(before[:, 4], after[:, 4])


def test_the_convolution_looks_at_patches_around() -> None:
    model: Any = VARIANTS["registers"].create(
        img_size=(28, 42)
    )  # 2 × 3 patches behind a class token and four registers
    block = copy.deepcopy(sharing(model, [("mlp", 1)])).blocks[0]  # type: ignore[index]
    block.local.data[7, 0, 1, 0] = 2.0  # twice the left neighbour, in one channel
    x = torch.randn(1, 5 + 6, WIDTH)
    expected = x.clone()
    for row in range(2):
        for column in (1, 2):
            expected[0, 5 + 3 * row + column, 7] += 2 * x[0, 5 + 3 * row + column - 1, 7]
    torch.testing.assert_close(block.look_around(x), expected)


def test_patches_of_other_images_are_a_square_or_refused() -> None:
    student = shared(VARIANTS["dynamic_size"].create())
    assert student(torch.randn(1, 3, 48, 48)).shape == (1, 10)
    with pytest.raises(ValueError, match=r"6 patches are neither the grid of 2 × 2 .* nor a square"):
        student(torch.randn(1, 3, 32, 48))


def test_both_blocks_teach_the_shared_weights() -> None:
    model = with_equal_blocks().requires_grad_(True)
    student: Any = copy.deepcopy(sharing(model, RUN))
    images = images_for(model).double()
    for net in (model, student):
        net(images).square().sum().backward()
    for blocks, part in (((1, 2, 3), "attn.qkv.weight"), ((1, 2), "mlp.fc2.weight")):
        gradients = [cast(Tensor, model.blocks[block].get_parameter(part).grad) for block in blocks]
        owned = student.blocks[1].get_parameter(part).grad
        torch.testing.assert_close(owned, sum(gradients), rtol=1e-9, atol=1e-9)  # float64 rounding
        assert all(float(gradient.norm()) > 1e-3 for gradient in gradients)
    assert float(student.blocks[2].mix_logits.grad.norm()) > 0
    assert float(student.blocks[2].local.grad.norm()) > 0


def test_a_copy_shares_with_itself() -> None:
    student = shared(VARIANTS["plain"].create())
    twin = copy.deepcopy(student)
    assert twin.blocks[2].mlp is twin.blocks[1].mlp
    assert twin.blocks[2].mlp is not student.blocks[2].mlp
    assert twin.double().blocks[2].mlp.fc1.weight.dtype == torch.float64
    assert student.blocks[2].mlp.fc1.weight.dtype == torch.float32
    assert trace_activation_memory(student, 2) > 0


def test_a_file_holds_shared_weights_once(tmp_path: Path) -> None:
    student = shared(VARIANTS["distilled"].create())
    images = images_for(student)
    with torch.no_grad():
        expected = student(images)
    save_model(student, tmp_path / "small")
    with safe_open(tmp_path / "small" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert names == set(dict(student.named_parameters()))
    assert not any(name.startswith(("blocks.2.attn", "blocks.3.attn", "blocks.2.mlp")) for name in names)
    stored = (tmp_path / "small" / "model.safetensors").stat().st_size
    assert stored == file_size(student.state_dict()) == spent(student, dcvit.Budget(file_size=0.5))
    loaded: Any = timm.create_model(f"local-dir:{tmp_path / 'small'}", pretrained=True).eval()
    for block in (2, 3):
        assert loaded.blocks[block].attn.qkv.weight is loaded.blocks[1].attn.qkv.weight
    assert loaded.blocks[2].mlp.fc1.weight is loaded.blocks[1].mlp.fc1.weight
    assert loaded.blocks[3].mlp.fc1.weight is not loaded.blocks[1].mlp.fc1.weight
    with torch.no_grad():
        assert torch.equal(loaded(images), expected)
    assert torch.equal(output_without_dcvit(tmp_path / "small", images), expected)


def test_a_config_of_weights_that_no_block_owns_is_refused(tmp_path: Path) -> None:
    save_model(shared(VARIANTS["plain"].create()), tmp_path / "small")
    file = tmp_path / "small" / "config.json"
    config = json.loads(file.read_text())
    assert config["model_args"]["per_layer_config"]["3"]["attention_of"] == 1
    config["model_args"]["per_layer_config"]["3"]["attention_of"] = 2  # which has block 1's
    file.write_text(json.dumps(config))
    with pytest.raises(dcvit.errors.UnsupportedModelError, match="block 3 has attention_of=2, and block 2 owns none"):
        load_model(f"local-dir:{tmp_path / 'small'}")


def test_shared_weights_load_at_another_image_size(tmp_path: Path) -> None:
    student = shared(VARIANTS["plain"].create())
    save_model(student, tmp_path / "small")
    larger: Any = timm.create_model(f"local-dir:{tmp_path / 'small'}", pretrained=True, img_size=(32, 48)).eval()
    assert larger.blocks[1].grid == (2, 3)
    assert larger(torch.randn(1, 3, 32, 48)).shape == (1, 10)


@pytest.mark.slow
def test_shared_weights_are_exported(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'dcvit[export]'")
    student = shared(VARIANTS["plain"].create())
    assert max(dcvit.export_model(student, tmp_path / "small.onnx").errors.values()) < 1e-4
    dcvit.export_model(student, tmp_path / "small.pt2", format="torch-export")
    state = torch.export.load(tmp_path / "small.pt2").state_dict
    assert sum(tensor.numel() for tensor in state.values()) == num_params(student)


@pytest.mark.parametrize("metric", ["params", "file_size"])
@pytest.mark.parametrize("share", slow_but([0.9, 0.7, 0.45], 0.7))
def test_the_budget_is_met_and_no_attention_more_would_fit(metric: str, share: float) -> None:
    model = freeze(VARIANTS["plain"].create(depth=6))
    budget = dcvit.Budget(**{metric: share})
    able = joins(model)
    draw = torch.Generator().manual_seed(0)
    losses = dict(zip(able, torch.rand(len(able), generator=draw).tolist(), strict=True))
    chosen = choose(model, able, lambda chosen: sum(losses[join] for join in chosen), budget)
    wanted = budget.target_of(spent(model, budget))
    assert spent(sharing(model, chosen), budget) <= wanted
    assert all(spent(sharing(model, chosen - {join}), budget) > wanted for join in chosen)


def test_what_loses_least_for_what_it_saves_is_shared(images: Tensor) -> None:
    """An MLP saves twice what an attention does; equal weights lose nothing."""
    model = freeze(VARIANTS["plain"].create(depth=6))
    losses = dict.fromkeys(joins(model), 1.0) | {("attention", 3): 0.4, ("mlp", 5): 0.7, ("mlp", 1): 0.9}
    losses["attention", 5] = 0.5  # less than either, but not for what it saves
    # Two MLPs save 36,500 parameters, with an attention 46,000.
    budget = dcvit.Budget(params=num_params(model) - 40_000)
    assert choose(model, list(losses), lambda chosen: sum(losses[join] for join in chosen), budget) == {
        ("mlp", 5), ("attention", 3), ("mlp", 1),
    }  # fmt: skip
    equal: Any = VARIANTS["plain"].create(depth=6)
    equal.blocks[4].attn.load_state_dict(equal.blocks[3].attn.state_dict())
    result = dcvit.compress(equal, images, dcvit.Budget(params=0.97), quick("mini_deit"))
    assert (result.plan.attention_of, result.plan.mlp_of) == ({3: 3, 4: 3}, {})
    assert result.plan.blocks == (3, 4)
    assert result.report.student.params == num_params(result.model) == result.plan.cost.params


def test_distillation_changes_weights_and_transformations(images: Tensor) -> None:
    model = VARIANTS["plain"].create()
    result = dcvit.compress(model, images, dcvit.Budget(params=0.75), quick("mini_deit"))
    block: Any = next(b for b in cast(Any, result.model).blocks if isinstance(b, SharedBlock) and b.mlp_of is not None)
    assert float(block.local.detach().abs().max()) > 0
    assert result.plan.blocks
    owner = block.mlp_of
    assert not torch.equal(
        cast(Any, result.model).blocks[owner].mlp.fc1.weight, cast(Any, model).blocks[owner].mlp.fc1.weight
    )


def test_what_cannot_share_is_refused(images: Tensor) -> None:
    model = VARIANTS["plain"].create()

    def compress(model: nn.Module, budget: dcvit.Budget, **changes: Any) -> object:
        inputs = torch.randn(6, *compressible(model).input_size())
        return dcvit.compress(model, inputs, budget, quick("mini_deit", **changes))

    with pytest.raises(
        dcvit.errors.BudgetError,
        match=r"macs=0\.7: method='mini_deit' meets only budgets of params, file_size; ask .* choose one of .*dcvit",
    ):
        compress(model, dcvit.Budget(macs=0.7))
    with pytest.raises(
        dcvit.errors.BudgetError, match=r"params=0\.1 asks for [\d,]+: with one attention and one MLP .* are left"
    ):
        compress(model, dcvit.Budget(params=0.1))
    with pytest.raises(dcvit.errors.BudgetError, match=r"candidates=\[1, 9\]: the model's blocks are 0 to 3"):
        compress(model, dcvit.Budget(params=0.9), candidates=(1, 9))
    with pytest.raises(
        dcvit.errors.UnsupportedModelError, match=r"Of the blocks \[0, 2\] no two consecutive ones are timm's"
    ):
        compress(model, dcvit.Budget(params=0.9), candidates=(0, 2))
    with pytest.raises(
        dcvit.errors.UnsupportedModelError, match=r"no two consecutive ones are timm's Blocks of one size"
    ):
        compress(VARIANTS["post_norm"].create(), dcvit.Budget(params=0.9))
    with pytest.raises(
        dcvit.errors.UnsupportedModelError, match=r"The blocks 1, 2, 3 share weights, .*compress the original"
    ):
        dcvit.compress(shared(model), images, dcvit.Budget(params=0.9), method="fskd")
    narrower = copy.deepcopy(model)
    compressible(narrower).prune_block(1, range(SMALL["embed_dim"] * 2))  # type: ignore[operator]
    assert {block for _, block in joins(narrower)} == {3}


def test_only_attentions_with_queries_share() -> None:
    model = VARIANTS["plain"].create()
    place_convolution(model, 2, convolution_of(model, 2))
    assert {block for _, block in joins(model)} == {1}
