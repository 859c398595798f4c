"""Every supported VisionTransformer: its cost, how it is compressed, saved and rebuilt, and what is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dcvit
from dcvit.artifacts.result import save_model
from dcvit.costs import Cost
from dcvit.models import CompressedBlock, DroppedBlock, compressible, load_model, require_supported
from dcvit.models.modeling.shared import POST_NORM
from dcvit.models.surgery import compress_block, draw_kept_units, drop_block
from dcvit.models.vision_transformer import convolution_of, fuse_tokens, keep_block_heads, place_convolution
from dcvit.search.plan import plan as make_plan
from tests.conftest import slow_but
from tests.variants import SMALL, VARIANTS, Variant


def images_for(model: nn.Module, count: int = 2) -> Tensor:
    return torch.randn(count, *compressible(model).input_size())


def counted_macs(model: nn.Module) -> tuple[int, int]:
    """MACs per image as torch counts them: of all products, and of those with a weight."""
    model = copy.deepcopy(model).requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # torch counts no FLOPs for the CPU's fused attention
        if isinstance(module, CompressedBlock):
            module.impl = "eager"
    images = images_for(model, 1)
    with FlopCounterMode(display=False) as counter:
        model(images)
    total = counter.get_total_flops() // 2
    batched = {
        name: sum(counts.get(op, 0) for op in (torch.ops.aten.bmm, torch.ops.aten.baddbmm)) // 2
        for name, counts in counter.get_flop_counts().items()
    }
    # Less those of its layers: torch 2.9 runs a linear layer without a bias as a batched product, too.
    attention = sum(
        count - sum(batched[part] for part in batched if part.rpartition(".")[0] == name)
        for name, count in batched.items()
        if name.endswith((".attn", ".attn_pool"))
    )
    return total, total - attention


def cut(model: nn.Module, kept: int = 7) -> nn.Module:
    """Block 1 compressed, block 2 dropped."""
    return drop_block(compress_block(model, 1, draw_kept_units(model, 1, kept, seed=0)), 2)


def convolved(model: Any) -> Any:
    """In place: convolutions for the attention of blocks 0 and 1, of fewer heads in the latter; weights drawn."""
    keep_block_heads(model, 1, (0, 2))
    for block in (0, 1):
        convolution = convolution_of(model, block)
        for parameter in (*convolution.conv.parameters(), convolution.mean, convolution.prefix):
            nn.init.normal_(parameter)
        place_convolution(model, block, convolution)
    return model


def test_costs_are_what_torch_counts(variant: Variant) -> None:
    models = [variant.create(), cut(variant.create())]
    if variant in VARIANTS.values():
        models.append(convolved(variant.create()))
    for model in models:
        cost = compressible(model).cost().total
        total, with_weights = counted_macs(model)
        assert cost.macs("with_attention_products") == total
        assert cost.macs("without_attention_products") == with_weights
        assert cost.params == sum(p.numel() for p in model.parameters())


def test_vit_base_costs_what_the_literature_says() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    cost = compressible(model).cost().total
    assert round(cost.macs("with_attention_products") / 1e9, 2) == 17.56
    assert round(cost.macs("without_attention_products") / 1e9, 2) == 16.85
    assert cost.params == 86_567_656


def test_compressing_a_block_saves_its_block_cost(variant: Variant) -> None:
    model = variant.create()
    view = compressible(model)
    whole = view.cost()
    block = whole.blocks[1]
    compressed = compress_block(model, 1, draw_kept_units(model, 1, 7, seed=0))
    saved = block.attention + block.hidden_unit * (block.hidden_features - 7)
    assert compressible(compressed).cost().total == whole.total - saved
    dropped = drop_block(model, 1)
    assert compressible(dropped).cost().total == whole.total - block.attention - block.mlp
    assert compressible(dropped).cost().blocks[1].attention == Cost()


def test_parts_run_one_by_one_are_the_whole(variant: Variant) -> None:
    whole = variant.create()
    for model in (whole, cut(whole)):
        view, images = compressible(model), images_for(model)
        seen: list[Tensor] = []
        handles = [
            block.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0])) for block in model.blocks
        ]
        with torch.no_grad():
            expected = view.tokens(images)
            for handle in handles:
                handle.remove()
            embedded = view.embed(images)
            assert torch.equal(embedded, seen[0])
            assert torch.equal(view.final_norm(view.run_blocks(embedded, 0, 4)), expected)
            assert torch.equal(view.run_blocks(embedded, 0, 0), embedded)
            assert torch.equal(view.run_blocks(embedded, 0, 2), seen[2])
            assert torch.equal(view.block(1)(seen[1]), seen[2])
            assert torch.equal(view.run_blocks(seen[1], 1, 3), seen[3])
            assert torch.equal(view.final_norm(view.run_blocks(seen[2], 2, 4)), expected)


def test_keeping_every_hidden_unit_removes_only_the_attention_branch(variant: Variant) -> None:
    model = variant.create()
    view = compressible(model)
    student = compress_block(model, 1, range(view.hidden_features(1)))
    reference = copy.deepcopy(model)
    block = reference.blocks[1]
    branch_end = block.norm1 if isinstance(block, POST_NORM) else block.attn
    branch_end.forward = lambda x, **_: torch.zeros_like(x)
    images = images_for(model)
    with torch.no_grad():
        torch.testing.assert_close(student(images), reference(images), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(student(images), model(images), rtol=1e-3, atol=1e-3)


def test_dropping_hidden_units_is_zeroing_them(variant: Variant) -> None:
    """The kept hidden units compute what they computed before: zeroing the others' outgoing weights changes nothing."""
    model = variant.create()
    if not isinstance(model.blocks[1].mlp.norm, nn.Identity):
        pytest.skip("a norm over the hidden units sees which are there")
    hidden = compressible(model).hidden_features(1)
    kept = draw_kept_units(model, 1, hidden // 3, seed=1)
    all_kept = compress_block(model, 1, range(hidden))
    gone = sorted(set(range(hidden)) - set(kept))
    with torch.no_grad():
        all_kept.blocks[1].mlp.fc2.weight[:, gone] = 0
        images = images_for(model)
        torch.testing.assert_close(compress_block(model, 1, kept)(images), all_kept(images), rtol=1e-4, atol=1e-5)


def test_saved_model_is_a_timm_model(variant: Variant, tmp_path: Path) -> None:
    student = cut(variant.create())
    view = compressible(student)
    rebuilt = view.rebuild().eval()
    save_model(rebuilt, tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = images_for(student)
    with torch.no_grad():
        expected = student(images)
        assert torch.equal(rebuilt(images), expected)
        assert torch.equal(loaded(images), expected)
    assert compressible(loaded).cost() == view.cost()
    assert list(loaded.pretrained_cfg["mean"]) == list(student.pretrained_cfg["mean"])


def test_a_compressed_model_can_be_compressed_again(variant: Variant) -> None:
    student = compressible(cut(variant.create())).rebuild()
    chosen = make_plan(student, dcvit.Budget(macs=0.8), dcvit.DCViT(candidates=(0, 3)))
    again = student
    for block in chosen.candidates[: chosen.num_blocks]:
        again = compress_block(again, block, draw_kept_units(again, block, chosen.hidden_features, seed=0))
    assert compressible(again).cost().total == chosen.cost
    with pytest.raises(dcvit.errors.BudgetError, match="block 1 has no attention left"):
        make_plan(student, dcvit.Budget(macs=0.8), dcvit.DCViT(candidates=(1,)))


def test_student_is_an_ordinary_module(variant: Variant) -> None:
    model = variant.create()
    student = compressible(cut(model)).rebuild().eval()
    images = images_for(student)
    with torch.no_grad():
        tokens = student.forward_features(images)
        assert torch.equal(student.forward_head(tokens), student(images))
        final, intermediates = student.forward_intermediates(images, indices=[1, 2, 3])
        assert torch.equal(final, tokens)
        assert torch.equal(intermediates[0], intermediates[1])  # block 2 was dropped
        assert not torch.equal(intermediates[1], intermediates[2])
        assert torch.equal(copy.deepcopy(student)(images), student(images))


@pytest.mark.parametrize("name", slow_but(["plain", "swiglu_packed", "layer_scale"], "swiglu_packed"))
def test_student_fine_tunes(name: str) -> None:
    student = compressible(cut(VARIANTS[name].create())).rebuild().train()
    images, labels = images_for(student, 8), torch.arange(8) % 10
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(student(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    compressed = student.blocks[1]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in compressed.parameters())


@pytest.mark.parametrize(
    "name", slow_but(["plain", "distilled", "registers", "attention_pool", "swiglu_packed"], "plain")
)
def test_student_compiles_in_one_graph(name: str) -> None:
    student = compressible(cut(VARIANTS[name].create())).rebuild().eval()
    images = images_for(student)
    with torch.no_grad():
        compiled = torch.compile(student, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), student(images))


def test_student_honours_hooks_dropout_and_autocast(model: nn.Module) -> None:
    student = compress_block(model, 1, range(20))
    images = images_for(student)
    seen: list[Tensor] = []
    student.blocks[1].mlp.fc1.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        hooked = student(images)
    assert [list(t.shape) for t in seen] == [[2, 5, 20]]
    student.blocks[1].mlp.fc1._forward_hooks.clear()
    with torch.no_grad():
        torch.testing.assert_close(student(images), hooked)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert student(images).dtype == torch.bfloat16
    student.train()
    student.blocks[1].mlp.drop1.p = 0.5
    assert not torch.equal(student(images), student(images))


@pytest.mark.parametrize(
    ("name", "sizes", "part"),
    [
        ("vit_base_patch16_18x2_224", SMALL, "ParallelThingsBlock"),
        ("vit_base_patch16_xp_224", SMALL, "ParallelScalingBlock"),
        ("vit_dwee_patch16_reg1_gap_256", SMALL, "DiffAttention"),
        ("vit_base_r26_s32_224", {**SMALL, "img_size": 64}, "HybridEmbed"),
        ("densenet121", {"block_config": (2, 2)}, "DenseNet"),
        ("swinv2_cr_tiny_224", {"depths": (1, 1), "num_heads": (3, 3)}, "SwinTransformerV2Cr"),
    ],
)
def test_what_cannot_be_handled_is_refused_by_name(name: str, sizes: dict[str, Any], part: str) -> None:
    model = timm.create_model(name, **sizes)
    with pytest.raises(dcvit.errors.UnsupportedModelError, match=part):
        require_supported(model)
    with pytest.raises(dcvit.errors.UnsupportedModelError, match=part):
        dcvit.compress(model, torch.randn(2, 3, 224, 224), dcvit.Budget(macs=0.75))


def test_a_changed_part_is_refused_by_name(model: nn.Module) -> None:
    model.blocks[2].attn.proj = nn.Sequential(model.blocks[2].attn.proj)
    with pytest.raises(dcvit.errors.UnsupportedModelError, match=r"blocks\.2\.attn\.proj"):
        require_supported(model)


def test_dtype_and_device_are_checked(model: nn.Module) -> None:
    with pytest.raises(dcvit.errors.UnsupportedModelError, match=r"torch\.float16.*model\.float\(\)"):
        require_supported(copy.deepcopy(model).half())
    with pytest.raises(dcvit.errors.UnsupportedModelError, match="meta device"):
        require_supported(copy.deepcopy(model).to("meta"))
    mixed = copy.deepcopy(model)
    mixed.head.double()
    with pytest.raises(dcvit.errors.UnsupportedModelError, match=r"float32 on cpu, torch\.float64 on cpu"):
        require_supported(mixed)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_convolutions_are_rebuilt(variant: Variant) -> None:
    model = convolved(variant.create())
    images = images_for(model)
    with torch.no_grad():
        expected = model(images)
        again = compressible(model).rebuild()
        assert torch.equal(again(images), expected)
        for parameter in (again.blocks[1].attn.conv.weight, again.blocks[1].attn.mean):
            parameter.zero_()
            assert not torch.equal(again(images), expected), "which counts"


@pytest.mark.parametrize("convolved", [(0,), (0, 1, 2, 3)])
def test_attention_arguments_are_read_from_the_blocks_that_have_one(convolved: tuple[int, ...]) -> None:
    model: Any = VARIANTS["plain"].create(qk_norm=True, qkv_bias=False)
    for block in convolved:
        place_convolution(model, block, convolution_of(model, block))
    images = images_for(model)
    with torch.no_grad():
        assert torch.equal(compressible(model).rebuild()(images), model(images))


def test_convolutions_run_on_grids_of_other_sizes() -> None:
    model = convolved(VARIANTS["dynamic_size"].create())
    convolution = model.blocks[0].attn
    tokens = torch.randn(2, 10, 48)  # a class token and 3 × 3 patches
    convolution.grid = (2, 2)
    by_square = convolution(tokens)
    convolution.grid = (3, 3)
    assert torch.equal(convolution(tokens), by_square)
    convolution.grid = (9, 1)
    assert not torch.equal(convolution(tokens), by_square)
    model.blocks[0].attn.grid = (2, 2)
    assert model(torch.randn(1, 3, 48, 48)).shape == (1, 10)
    with pytest.raises(ValueError, match=r"8 patches are neither the grid of 2 × 2 .* nor a square, .*img_size="):
        model(torch.randn(1, 3, 32, 64))


def test_tokens_do_not_end_where_convolutions_run(model: nn.Module) -> None:
    fusing = copy.deepcopy(model)
    fuse_tokens(fusing, 2, 0.5)
    with pytest.raises(dcvit.errors.UnsupportedModelError, match=r"blocks\.2 drops tokens, .* whole grid"):
        convolution_of(fusing, 0)
    with pytest.raises(dcvit.errors.UnsupportedModelError, match=r"blocks\.0 has a convolution over the grid"):
        fuse_tokens(convolved(model), 2, 0.5)


def test_names() -> None:
    assert type(load_model("vit_tiny_patch16_224", pretrained=False)).__name__ == "VisionTransformer"
    with pytest.raises(dcvit.errors.UnsupportedModelError, match=r"vit_tny_patch16.*Similar names: .*vit_"):
        load_model("vit_tny_patch16")
    with pytest.raises(dcvit.errors.UnsupportedModelError, match=r"no config\.json"):
        load_model("local-dir:/nowhere")
    with pytest.raises(dcvit.errors.UnsupportedModelError, match="expected a timm model or a name"):
        load_model(3)  # type: ignore[arg-type]


def test_hand_built_model(tmp_path: Path) -> None:
    """A model that did not come from timm's registry, without a pretrained_cfg."""
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5).eval()
    student = compress_block(model, 1, range(9))
    save_model(student, tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded(images), student(images))


def test_loaded_model_adapts_like_timms_own(model: nn.Module, tmp_path: Path) -> None:
    save_model(cut(model), tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=3, img_size=64).eval()
    assert loaded(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    kept = list(draw_kept_units(model, 1, 7, seed=0))
    assert torch.equal(loaded.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight[kept])
    assert isinstance(loaded.blocks[2], DroppedBlock)
