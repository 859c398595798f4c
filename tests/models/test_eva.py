"""Eva and Beit, beyond what the tests of all variants say: positions, image sizes, refusals."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.eva import Eva
from torch import nn

import dcvit
from dcvit.artifacts.export import export_model
from dcvit.artifacts.result import save_model
from dcvit.errors import BudgetError, UnsupportedModelError
from dcvit.models import compressible, require_supported
from tests.conftest import quick, slow_but
from tests.models.test_models import cut, images_for
from tests.variants import EVA_VARIANTS, Variant

each_variant = pytest.mark.parametrize("variant", EVA_VARIANTS.values(), ids=EVA_VARIANTS)


TIMM = [name for module in ("eva", "beit") for name in timm.list_models(module=module) if not name.startswith("dcvit")]


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_every_eva_and_beit_of_timm_is_supported(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    view = compressible(model)
    view.check()
    cost = view.cost()
    assert len(cost.blocks) == view.num_blocks()
    assert cost.total.params == sum(parameter.numel() for parameter in model.parameters())


@each_variant
def test_a_block_knows_the_position_of_tokens(variant: Variant) -> None:
    """With the patches in another order it does something else to each."""
    model: Any = variant.create()
    view, prefix = compressible(model), model.num_prefix_tokens
    tokens = torch.randn(2, prefix + 4, 48)
    order = [*range(prefix), *(prefix + patch for patch in (3, 1, 0, 2))]
    with torch.no_grad():
        moved = view.block(1)(tokens[:, order])
        told = bool(model.rope) if isinstance(model, Eva) else True
        assert torch.allclose(moved, view.block(1)(tokens)[:, order], atol=1e-5) != told
        sublayers = view.sublayers(1)
        if sublayers is not None:
            attention, mlp = sublayers
            torch.testing.assert_close(mlp(attention(tokens)), view.block(1)(tokens), rtol=1e-4, atol=1e-5)


@each_variant
def test_what_positions_are_made_of_is_updated_with_the_stem(variant: Variant) -> None:
    model: Any = variant.create()
    view = compressible(model)
    known = {id(parameter) for parameter in view.body_parameters()}
    behind = [part for name in ("head", "fc_norm", "attn_pool") if (part := getattr(model, name, None)) is not None]
    head = {id(parameter) for part in behind for parameter in part.parameters()}
    assert known | head == {id(parameter) for parameter in model.parameters()}
    assert not known & head
    first = {id(parameter) for parameter in view.parameters(0, 3)}
    assert first == known - {id(parameter) for parameter in model.norm.parameters()}


@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple")  # timm's, resizing position biases
@pytest.mark.parametrize(
    ("made_for", "loaded_for"),
    slow_but([((3, 5), (3, 5)), ((2, 2), (3, 3)), ((3, 5), (5, 3)), ((2, 8), (4, 4))], ((3, 5), (5, 3))),
)
@each_variant
def test_another_image_size(
    variant: Variant, made_for: tuple[int, int], loaded_for: tuple[int, int], tmp_path: Path
) -> None:
    """A model resized before compression loads at another size as if the finished one had been resized."""
    model: Any = variant.create()
    patch = model.patch_embed.patch_size[0]
    made, wanted = (tuple(side * patch for side in grid) for grid in (made_for, loaded_for))
    model.set_input_size(img_size=made)
    student = cut(model)
    finished: Any = compressible(student).rebuild()
    save_model(finished, tmp_path / "out")
    images = images_for(student)
    with torch.no_grad():
        assert torch.equal(finished(images), student(images))
    finished.set_input_size(img_size=wanted)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, img_size=wanted).eval()
    images = images_for(finished)
    assert images.shape[2:] == wanted
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), finished(images))
    again = compressible(finished).rebuild()
    with torch.no_grad():
        assert torch.equal(again(images), finished(images))


def test_a_finished_model_may_get_another_head_and_patch_size() -> None:
    student: Any = compressible(cut(EVA_VARIANTS["eva02"].create())).rebuild()
    student.reset_classifier(5, "token")
    student.set_input_size(img_size=(32, 32), patch_size=(16, 16))
    images = images_for(student)
    again = compressible(student).rebuild()
    with torch.no_grad():
        assert torch.equal(again(images), student(images))


def test_patches_dropped_in_training_are_none_of_its_structure() -> None:
    require_supported(EVA_VARIANTS["dinov3"].create(patch_drop_rate=0.5))


def test_a_model_of_any_image_size_stays_one(tmp_path: Path) -> None:
    student = cut(EVA_VARIANTS["dinov3"].create())
    save_model(compressible(student).rebuild(), tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(2, 3, 48, 80)
    with torch.no_grad():
        assert torch.equal(loaded(images), student(images))


@pytest.mark.parametrize("method", slow_but(["practise", "mir"], "mir"))
def test_methods_that_drop_blocks(method: str, tmp_path: Path) -> None:
    model = EVA_VARIANTS["dinov3"].create()
    config = quick(method, epochs=1, learning_rate=1e-3, warmup_epochs=5)
    result = dcvit.compress(model, images_for(model, 6), dcvit.Budget(macs=0.8), config)
    assert result.report.student.macs <= 0.8 * result.report.teacher.macs
    result.save(tmp_path / "small")
    dcvit.write_report(tmp_path / "small")
    images = images_for(model)
    with torch.no_grad():
        assert torch.equal(dcvit.load(tmp_path / "small").model(images), result.model(images))


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_but(["dinov3", "eva02", "beit"], "eva02"))
def test_students_compile_and_export(name: str, tmp_path: Path) -> None:
    student = compressible(cut(EVA_VARIANTS[name].create())).rebuild().eval()
    images = images_for(student)
    with torch.no_grad():
        compiled = torch.compile(student, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), student(images))
    export_model(student, tmp_path / "model.pt2", format="torch-export")  # which compares


class Derived(Eva):
    """A subclass."""


def made_by_function() -> nn.Module:
    return timm.models.eva.vit_small_patch16_rope_224(embed_dim=48, depth=2, num_heads=3, rope_temperature=10.0)


def made_by_class() -> nn.Module:
    return Eva(img_size=32, embed_dim=48, depth=2, num_heads=3, num_classes=10)


def of_a_subclass() -> nn.Module:
    model = EVA_VARIANTS["dinov3"].create()
    model.__class__ = Derived
    return model


def with_another_block() -> nn.Module:
    model: Any = EVA_VARIANTS["beit"].create()
    model.blocks[1] = nn.Identity()
    return model


def with_another_attention() -> nn.Module:
    model: Any = EVA_VARIANTS["beit"].create()
    model.blocks[1].attn = nn.Identity()
    return model


def with_another_part() -> nn.Module:
    model: Any = EVA_VARIANTS["eva02"].create()
    model.blocks[2].attn.proj = nn.Sequential(model.blocks[2].attn.proj)
    return model


def without_attention() -> nn.Module:
    model = EVA_VARIANTS["beit"].create()
    for block in range(4):
        compressible(model).compress_block(block, range(5))
    return model


@pytest.mark.parametrize(
    ("create", "message"),
    [
        (made_by_class, "create it with timm.create_model"),
        (made_by_function, "create it with timm.create_model"),
        (of_a_subclass, "The model is a Derived, a subclass"),
        (with_another_block, r"blocks\.1 is a Identity; supported are timm's EvaBlock"),
        (with_another_attention, r"blocks\.1\.attn is a Identity; only timm's EvaAttention"),
        (with_another_part, r"blocks\.2\.attn\.proj"),
        (lambda: EVA_VARIANTS["eva02"].create(norm_layer=nn.LayerNorm), r"norm_layer=.*that config\.json cannot hold"),
    ],
)
def test_what_cannot_be_rebuilt_is_refused_by_name(create: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        require_supported(create())


def test_without_attention_there_is_nothing_to_compress() -> None:
    model = without_attention()
    require_supported(model)  # it can be evaluated, exported and saved
    with pytest.raises(
        BudgetError, match=r"None of the blocks \[1, 2\] has attention left to remove: compress the orig"
    ):
        dcvit.compress(model, images_for(model), dcvit.Budget(macs=0.8))


def test_methods_of_another_family_are_refused() -> None:
    model = EVA_VARIANTS["beit"].create()
    with pytest.raises(UnsupportedModelError, match=r"'evit' handles models of the family vit, and this one is a eva"):
        dcvit.compress(model, images_for(model), dcvit.Budget(macs=0.8), method="evit")
