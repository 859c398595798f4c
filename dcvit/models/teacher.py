"""The original as teacher: frozen, checked, its MLPs computed by the ops."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from dcvit.models import compressible, require_supported
from dcvit.models.surgery import choose_impl, copy_blocks
from dcvit.ops import Impl

__all__ = ["evaluating", "freeze", "fuse"]


def freeze(model: nn.Module) -> nn.Module:
    """A copy of a model as teacher: evaluation mode, no gradients, nothing shared with the caller's.

    Raises:
        UnsupportedModelError: If the model cannot be compressed.
    """
    teacher: nn.Module = copy.deepcopy(require_supported(model).model)
    return teacher.eval().requires_grad_(False)


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


def fuse(teacher: nn.Module, impl: Impl) -> nn.Module:
    """The teacher with its blocks' MLPs computed by `dcvit.ops`; students cut from it inherit that.

    With `impl="eager"` it is the teacher itself, and on a GPU, where whole blocks have not been measured with it.
    """
    if impl == "eager" or next(teacher.parameters()).device.type != "cpu":
        choose_impl(teacher, impl)
        return teacher
    fused = copy_blocks(teacher, ())
    compressible(fused).fuse()
    choose_impl(fused, impl)
    return fused
