"""Closed-form recovery: the kept MLP's second layer as the solution of a ridge regression.

A compressed block computes x + γ ⊙ (W h + b), where h are its kept hidden nodes. N images of T tokens give N·T
equations for W and b: the output that the teacher's block has, minus what the student's block gets as input. One pass
over the images and one linear solve fit the block's whole missing output, attention included, before any gradient step:

    min over W, b of  Σ ‖(y_teacher − x_student) / γ − W h − b‖² + λ ‖W‖²

As in CORP (arXiv 2602.05243) and ReplaceMe (arXiv 2505.02819). h and x are the student's own, so that the errors of the
blocks before are made good too.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dcvit.models import adapter_for

__all__ = ["fit_second_layer"]

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""λ as a share of the mean squared norm of a hidden node; the one that predicts held-out images best is taken."""

HELD_OUT_EVERY = 5
"""One image of so many is held out to choose λ."""


@torch.no_grad()
def fit_second_layer(student: nn.Module, teacher: nn.Module, batches: Iterable[Tensor], block: int) -> bool:
    """Fit the second MLP layer of a compressed block, in place.

    Args:
        student: The cut model.
        teacher: The original.
        batches: Images `[B, C, H, W]`, at least one in all.
        block: A compressed block of the student, from 0.

    Returns:
        Whether there was anything to fit: not in a dropped block, nor where a norm follows the layer.
    """
    output = adapter_for(student).output_layer(student, block)
    if output is None:
        return False
    layer, scale = output
    used, held_out = _Equations(), _Equations()
    count = 0
    for images in batches:
        hidden, target = _equations(student, teacher, images, block, layer, scale)
        judged = torch.arange(count, count + len(images), device=images.device) % HELD_OUT_EVERY == 1
        used.add(hidden[~judged], target[~judged])
        held_out.add(hidden[judged], target[judged])
        count += len(images)
    has_bias = layer.bias is not None
    # With one image there is none to hold out: the middle of the range.
    ridge = RIDGES[len(RIDGES) // 2]
    if count > 1:
        ridge = min(RIDGES, key=lambda share: held_out.error(used.solve(share, has_bias)))
    solution = (used + held_out).solve(ridge, has_bias)
    layer.weight.copy_(solution[: layer.in_features].T)
    if has_bias:
        layer.bias.copy_(solution[layer.in_features])
    return True


def _equations(
    student: nn.Module, teacher: nn.Module, images: Tensor, block: int, layer: nn.Linear, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Hidden nodes with a column of ones `[B, N, K + 1]`, and what the layer should make of them `[B, N, D]`."""
    adapter = adapter_for(student)
    seen: dict[str, Tensor] = {}
    hooks = [
        adapter.block(teacher, block).register_forward_hook(lambda module, args, out: seen.update(wanted=out)),
        adapter.block(student, block).register_forward_pre_hook(lambda module, args: seen.update(given=args[0])),
        layer.register_forward_pre_hook(lambda module, args: seen.update(hidden=args[0])),
    ]
    try:
        adapter.tokens(teacher, images)
        adapter.tokens(student, images)
    finally:
        for hook in hooks:
            hook.remove()
    hidden = seen["hidden"].double()
    missing = (seen["wanted"] - seen["given"]).double()
    if scale is not None:
        # A channel that LayerScale switches off asks for nothing.
        missing = torch.where(scale.abs() > 1e-12, missing / scale.double(), 0.0)
    return torch.cat([hidden, hidden.new_ones(*hidden.shape[:-1], 1)], dim=-1), missing


@dataclass
class _Equations:
    """The normal equations of a least-squares problem, in float64, summed over what was added."""

    gram: Tensor | float = 0.0
    moment: Tensor | float = 0.0

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Add equations with inputs `[..., K + 1]` and targets `[..., D]`."""
        inputs, targets = inputs.flatten(0, -2), targets.flatten(0, -2)
        self.gram = self.gram + inputs.T @ inputs
        self.moment = self.moment + inputs.T @ targets

    def __add__(self, other: "_Equations") -> "_Equations":
        return _Equations(self.gram + other.gram, self.moment + other.moment)

    def solve(self, ridge: float, has_bias: bool) -> Tensor:
        """Weights `[K + 1, D]` under a ridge penalty; the last row, of the ones, is the bias and not penalised."""
        assert isinstance(self.gram, Tensor)
        assert isinstance(self.moment, Tensor)
        nodes = len(self.gram) - 1
        gram, moment = self.gram.clone(), self.moment
        gram.diagonal()[:nodes] += max(ridge * float(gram.diagonal()[:nodes].mean()), torch.finfo(gram.dtype).tiny)
        if not has_bias:
            solution: Tensor = torch.linalg.solve(gram[:nodes, :nodes], moment[:nodes])
            return torch.cat([solution, solution.new_zeros(1, solution.shape[1])])
        result: Tensor = torch.linalg.solve(gram, moment)
        return result

    def error(self, weights: Tensor) -> float:
        """Sum of squared residuals of some weights, but for a constant of the data."""
        assert isinstance(self.gram, Tensor)
        assert isinstance(self.moment, Tensor)
        return float((weights * (self.gram @ weights - 2 * self.moment)).sum())
