"""The teacher: a checked and frozen copy of the original."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from dcvit.models import remove_state_hooks, require_supported, unfuse

__all__ = ["evaluating", "freeze"]


def freeze(model: nn.Module) -> nn.Module:
    """Return a copy of a model as teacher, in evaluation mode, without gradients and without fused blocks.

    The copy shares nothing with the original. It has no hooks of `state_dict`; if the original has any, a warning lists
    them.

    Raises:
        UnsupportedModelError: If the model cannot be compressed.
    """
    teacher: nn.Module = unfuse(copy.deepcopy(require_supported(model).model))
    remove_state_hooks(teacher)
    return teacher.eval().requires_grad_(False)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a `with` statement, and restore the mode of each module afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
