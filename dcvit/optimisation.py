"""What gradient steps need: learning rates over time and relative to what they change, parameters that take them."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

__all__ = ["least", "or_infinite", "relative_adam", "set_step_size", "trainable", "warmup_cosine"]

Name = TypeVar("Name")

SMALLEST_SIZE = 1e-3
"""The root mean square that a tensor is taken to have at least: biases often start at zero."""


def relative_adam(module: nn.Module, step_size: float) -> torch.optim.Adam:
    """Adam on all parameters of a module, whose steps are a share of each tensor's root mean square.

    So one number serves tensors and models of any scale.

    Args:
        module: Its parameters are updated.
        step_size: The share.
    """
    groups = []
    for parameter in module.parameters():
        size = max(float(parameter.detach().square().mean().sqrt()), SMALLEST_SIZE) if parameter.numel() else 1.0
        groups.append({"params": [parameter], "lr": step_size * size, "size": size})
    return torch.optim.Adam(groups, fused=True)


def set_step_size(optimizer: torch.optim.Adam, step_size: float) -> None:
    """Change the step size of `relative_adam`."""
    for group in optimizer.param_groups:
        group["lr"] = step_size * group["size"]


def or_infinite(loss: float) -> float:
    """The loss, infinite where training that diverged made it NaN, which does not compare."""
    return math.inf if math.isnan(loss) else loss


def least(losses: Mapping[Name, float]) -> Name:
    """What has the least loss: the first of equals, and one that diverged only if all have."""
    return min(losses, key=lambda name: or_infinite(losses[name]))


@contextmanager
def trainable(module: nn.Module) -> Iterator[None]:
    """All parameters of a module take gradients for a block of code; afterwards those that did before."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    module.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


def warmup_cosine(step: int, total: int, warmup: int) -> float:
    """The share of the peak learning rate at a step: a linear rise, then half a cosine to zero.

    Args:
        step: From 0 to `total` − 1.
        total: Number of steps.
        warmup: Steps of the rise; the share at step `warmup` − 1 is 1. Cut to `total` if longer.
    """
    warmup = min(warmup, total)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
