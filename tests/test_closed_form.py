"""The closed form: what it minimises, where it applies, and what it leaves alone."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import dcvit
from dcvit.closed_form import fit_second_layer
from dcvit.compression import freeze
from dcvit.models import adapter_for
from dcvit.recovery import output_tokens, recover
from dcvit.surgery import compress_block, draw_kept_nodes, drop_block
from tests.variants import VARIANTS, Variant


def block_error(student: nn.Module, teacher: nn.Module, images: Tensor, block: int) -> float:
    """Mean squared difference of a block's output, given each model's own input."""
    outputs = []
    for model in (student, teacher):
        handle = adapter_for(model).block(model, block).register_forward_hook(lambda m, a, out: outputs.append(out))
        adapter_for(model).tokens(model, images)
        handle.remove()
    return float((outputs[0] - outputs[1]).square().mean())


def test_every_variant_fits_its_block(variant: Variant) -> None:
    teacher = freeze(variant.create())
    images = torch.randn(12, *adapter_for(teacher).input_size(teacher))
    student = compress_block(teacher, 1, draw_kept_nodes(teacher, 1, 40, seed=0))
    before = block_error(student, teacher, images, 1)
    untouched = {n: p.clone() for n, p in student.named_parameters() if not n.startswith("blocks.1.mlp.fc2")}
    fitted = fit_second_layer(student, teacher, [images[:5], images[5:]], 1)
    assert fitted == (variant is not VARIANTS["post_norm"])  # a norm behind the layer: no linear problem
    if fitted:
        assert block_error(student, teacher, images, 1) < 0.7 * before
    assert all(torch.equal(p, untouched[n]) for n, p in student.named_parameters() if n in untouched)


def test_it_is_the_ridge_regression_of_the_docstring(model: nn.Module) -> None:
    """Against numpy's least squares on the stacked equations, with LayerScale, for the smallest penalty."""
    import numpy as np

    from dcvit import closed_form

    teacher = freeze(VARIANTS["layer_scale"].create())
    images = torch.randn(30, 3, 32, 32)
    student = compress_block(teacher, 2, draw_kept_nodes(teacher, 2, 10, seed=0))
    layer, scale = adapter_for(student).output_layer(student, 2) or (None, None)
    assert layer is not None
    assert scale is not None
    hidden, target = closed_form._equations(student, teacher, images, 2, layer, scale)
    expected, *_ = np.linalg.lstsq(hidden.flatten(0, 1).numpy(), target.flatten(0, 1).numpy(), rcond=None)
    assert fit_second_layer(student, teacher, [images], 2)
    fitted = torch.cat([layer.weight.T, layer.bias[None]]).detach().numpy()
    # 150 equations for 11 unknowns leave the chosen penalty little to do.
    assert np.abs(fitted - expected).max() < 0.1 * np.abs(expected).max()


def test_what_is_already_right_stays(model: nn.Module) -> None:
    """If nothing is missing, the fit gives back the layer that is there."""
    teacher = freeze(model)
    with torch.no_grad():
        teacher.blocks[1].attn.proj.weight.zero_()
        teacher.blocks[1].attn.proj.bias.zero_()
    images = torch.randn(80, 3, 32, 32)
    student = compress_block(teacher, 1, range(192))
    before = copy.deepcopy(student.blocks[1].mlp.fc2.weight)
    assert fit_second_layer(student, teacher, list(images.split(40)), 1)
    torch.testing.assert_close(student.blocks[1].mlp.fc2.weight, before, rtol=0.02, atol=2e-3)


def test_a_dropped_block_has_nothing_to_fit(model: nn.Module, images: Tensor) -> None:
    teacher = freeze(model)
    assert not fit_second_layer(drop_block(teacher, 1), teacher, [images], 1)


@pytest.mark.parametrize("kept", [0, 1, 30])
@pytest.mark.parametrize("count", [1, 2, 6])
def test_few_images_and_few_nodes(model: nn.Module, images: Tensor, kept: int, count: int) -> None:
    teacher = freeze(model)
    student = compress_block(teacher, 1, range(kept))
    before = block_error(student, teacher, images[:count], 1)
    assert fit_second_layer(student, teacher, [images[:count]], 1)
    assert block_error(student, teacher, images[:count], 1) < before


def test_recovery_starts_from_it(model: nn.Module, images: Tensor) -> None:
    teacher = freeze(model)
    few_shot = dcvit.load_images(images, teacher)
    student = compress_block(teacher, 1, draw_kept_nodes(teacher, 1, 60, seed=0))
    settings = dcvit.RecoveryConfig(epochs=0, learning_rate=1e-4, augmentation=None)
    recovery = recover(student, teacher, few_shot, [1], settings)
    assert recovery.loss_closed_form is not None
    assert recovery.loss_closed_form < 0.5 * recovery.loss_before
    assert recovery.loss_after == recovery.loss_closed_form
    second = compress_block(student, 2, draw_kept_nodes(teacher, 2, 60, seed=0))
    first_layer = copy.deepcopy(second.blocks[1].mlp.fc2.weight)
    recover(second, teacher, few_shot, [1, 2], settings, new_blocks=[2])
    assert torch.equal(second.blocks[1].mlp.fc2.weight, first_layer)
    assert not torch.equal(second.blocks[2].mlp.fc2.weight, student.blocks[2].mlp.fc2.weight[:, :60])
    without = recover(second, teacher, few_shot, [1, 2], replace(settings, closed_form=False))
    assert without.loss_closed_form is None


def test_a_fixed_number_of_views(model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `num_views` the teacher sees each view once, however many epochs there are."""
    from dcvit import recovery as module

    teacher = freeze(model)
    drawn: list[Tensor] = []
    real = module.augment
    monkeypatch.setattr(module, "augment", lambda *args: drawn.append(real(*args)) or drawn[-1])
    student = compress_block(teacher, 1, range(60))
    settings = dcvit.RecoveryConfig(
        epochs=7,
        learning_rate=1e-4,
        batch_size=4,
        augmentation=dcvit.AugmentationConfig(num_views=3),
        closed_form=False,
    )
    recovery = recover(student, teacher, dcvit.load_images(images, teacher), [1], settings)
    assert len(drawn) == 3
    assert recovery.losses[0] != recovery.losses[3]
    tokens = output_tokens(teacher, drawn[0], 64)
    assert tokens.shape[0] == len(images)
