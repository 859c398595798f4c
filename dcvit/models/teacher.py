"""The original as teacher: frozen and checked."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from dcvit.models import require_supported, unfuse

__all__ = ["evaluating", "freeze"]


def freeze(model: nn.Module) -> nn.Module:
    """A copy of a model as teacher: evaluation mode, no gradients, nothing fused, nothing shared with the caller's.

    Raises:
        UnsupportedModelError: If the model cannot be compressed.
    """
    teacher: nn.Module = unfuse(copy.deepcopy(require_supported(model).model))
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
