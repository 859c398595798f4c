"""Gradient steps: the loop, learning rates over time, steps relative to the weights, and the best weights seen."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

__all__ = [
    "Best",
    "descend",
    "least",
    "or_infinite",
    "pilot_runs",
    "relative_adam",
    "set_share",
    "trainable",
    "warmup_cosine",
]

Name = TypeVar("Name")
Batch = TypeVar("Batch")

SMALLEST_SIZE = 1e-3
"""The least root mean square that a tensor is assumed to have, because biases often start at zero."""


def relative_adam(module: nn.Module, step_size: float) -> torch.optim.Adam:
    """Return Adam for all parameters of a module, with steps that are a share of each tensor's root mean square.

    So one step size serves tensors and models of any scale.

    Args:
        module: The module whose parameters are updated.
        step_size: The share.
    """
    groups = []
    for parameter in module.parameters():
        size = max(float(parameter.detach().square().mean().sqrt()), SMALLEST_SIZE) if parameter.numel() else 1.0
        groups.append({"params": [parameter], "lr": step_size * size, "peak": step_size, "size": size})
    return torch.optim.Adam(groups, fused=True)


def descend(
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    backward: Callable[[Batch], object],
    share: Callable[[int], float],
) -> Iterator[int]:
    """Take a gradient step on each batch, and yield the number of steps so far, so that the caller can validate.

    Args:
        optimizer: Updates the parameters.
        batches: The training batches.
        backward: Adds up the gradients of a batch.
        share: Returns the share of the optimizer's learning rate at a step, from 0.
    """
    for step, batch in enumerate(batches):
        set_share(optimizer, share(step))
        optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            backward(batch)
        optimizer.step()
        yield step + 1


def set_share(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set the learning rate to a share of the one that the optimizer was made with."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("peak", group["lr"]) * share * group.get("size", 1.0)


def or_infinite(loss: float) -> float:
    """Return the loss, or infinity if diverged training made it NaN, which cannot be compared."""
    return math.inf if math.isnan(loss) else loss


def least(losses: Mapping[Name, float]) -> Name:
    """Return the name with the least loss, and the first of equals. A diverged one wins only if all diverged."""
    return min(losses, key=lambda name: or_infinite(losses[name]))


@contextmanager
def trainable(module: nn.Module) -> Iterator[None]:
    """Let all parameters of a module take gradients within a `with` block, and restore their flags afterwards."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    module.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


class Best:
    """The best weights of a module that validation has seen.

    Args:
        module: The module.
        error: The validation error of its present weights.

    Attributes:
        error: The least validation error so far.
        at: When that was seen; 0 is the start.
    """

    def __init__(self, module: nn.Module, error: float) -> None:
        self.error, self.at = error, 0
        self._module, self._weights = module, copy.deepcopy(module.state_dict())

    def see(self, error: float, at: int) -> None:
        """Keep the module's weights if their error is less than any before."""
        if error < self.error:
            self.error, self.at, self._weights = error, at, copy.deepcopy(self._module.state_dict())

    def restore(self) -> None:
        """Load the best weights into the module."""
        self._module.load_state_dict(self._weights)


def pilot_runs(
    rates: Sequence[float], run: Callable[[float], float], progress: Callable[[int, int, float | None], object]
) -> tuple[float, float]:
    """Find a learning rate or step size by a short run of each candidate.

    Args:
        rates: The candidates.
        run: Trains with one of them, and returns the validation error.
        progress: Called as progress(runs done, all runs, error) at the start and after each run.

    Returns:
        The candidate with the least error, and that error.
    """
    errors: dict[float, float] = {}
    progress(0, len(rates), None)
    for rate in rates:
        errors[rate] = run(rate)
        progress(len(errors), len(rates), errors[rate])
    best = least(errors)
    return best, errors[best]


def warmup_cosine(step: int, total: int, warmup: int) -> float:
    """Return the share of the peak learning rate at a step: a linear rise, then half a cosine to zero.

    Args:
        step: From 0 to `total` − 1.
        total: Number of steps.
        warmup: Number of steps of the rise, at most `total`; the share at step `warmup` − 1 is 1.
    """
    warmup = min(warmup, total)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
