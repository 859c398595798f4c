"""The original as teacher: frozen, checked, its MLPs computed by the ops."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from dcvit.errors import NonFiniteError
from dcvit.images import FewShotImages
from dcvit.models import adapter_for, require_supported
from dcvit.ops import Impl
from dcvit.surgery import choose_impl, copy_blocks

__all__ = ["evaluating", "freeze", "fuse", "require_finite"]

FINITE_IMAGES = 8
"""So many images are passed through a model to see whether its values stay finite."""


def freeze(model: nn.Module) -> nn.Module:
    """A copy of a model as teacher: evaluation mode, no gradients, nothing shared with the caller's.

    Raises:
        UnsupportedModelError: If the model cannot be compressed.
    """
    require_supported(model)
    return copy.deepcopy(model).eval().requires_grad_(False)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode for a block of code; afterwards each part of it as before."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@torch.no_grad()
def require_finite(model: nn.Module, images: FewShotImages) -> None:
    """Refuse a model that has, or makes of images, values that are NaN or infinite.

    Raises:
        NonFiniteError: Naming the weight, or the first block after which they appear.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            raise NonFiniteError(
                f"{bad:,} of {tensor.numel():,} values of {name} are NaN or infinite: load the model's weights again."
            )
    adapter = adapter_for(model)
    state, where = adapter.embed(model, images.normalised[:FINITE_IMAGES]), "what precedes block 0"
    for block in range(adapter.num_blocks(model)):
        if not bool(state.isfinite().all()):
            break
        state, where = adapter.run_blocks(model, state, block, block + 1), f"block {block}"
    if not bool(state.isfinite().all()):
        raise NonFiniteError(
            f"Of the first {min(len(images), FINITE_IMAGES)} images {where} makes values that are NaN or infinite: "
            "check how images are normalised, and that the weights are not of a lower precision."
        )


def fuse(teacher: nn.Module, impl: Impl) -> nn.Module:
    """The teacher with its blocks' MLPs computed by `dcvit.ops`; students cut from it inherit that.

    With `impl="eager"` it is the teacher itself, and on a GPU, where whole blocks have not been measured with it.
    """
    if impl == "eager" or next(teacher.parameters()).device.type != "cpu":
        choose_impl(teacher, impl)
        return teacher
    fused = copy_blocks(teacher, ())
    adapter_for(fused).fuse(fused)
    choose_impl(fused, impl)
    return fused
