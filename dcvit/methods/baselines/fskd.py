"""FSKD: fit a 1×1 convolution after each pruned layer to the teacher's features, and absorb it.

Source: Li, Li, Liu and Zhang, "Few Sample Knowledge Distillation for Efficient Network Compression" (CVPR 2020, arXiv
1812.01839). The convolution Q after a layer of the student solves

    min over Q of  Σ ‖Q s − t‖²

where s is the output of the student's layer on the student's own activations, and t that of the teacher's layer on the
teacher's. Q is D×D, so few images determine it, and it can be multiplied into the layer's weights. Blocks are aligned
one after another, front to back. This is one pass of block coordinate descent.

Choices and differences of this implementation:

- In a CNN, Q follows the layer that takes a residual block's hidden filters. It precedes that layer's BatchNorm, whose
  statistics stay. Only one convolution's filters are pruned, and only in blocks that do not change the shape; the paper
  aligns blocks of any kind.
- The method is transferred to ViTs, which the paper does not cover. Hidden units of the MLPs take the place of filters.
  Q is a D×D linear map at the end of each MLP and is absorbed into `fc2` and its bias.
- Filters are chosen by L1 norm, the same share in each block. The paper uses networks that others pruned.
- Directions that the images do not determine stay unchanged (λ → 0 towards the identity,
  `dcvit.methods.baselines.layerwise.RIDGE`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dcvit.methods.baselines.layerwise import RIDGE, Equations, Layer, LayerwiseConfig, fit_layerwise
from dcvit.methods.registry import Method, Outcome, Task, register
from dcvit.models import compressible
from dcvit.recovery.ridge import NormalEquations

__all__ = ["FSKD", "absorb", "fit_map", "fskd"]


@dataclass(frozen=True)
class FSKD(LayerwiseConfig):
    """Settings of FSKD (arXiv 1812.01839): prune hidden units or filters by L1 norm, then fit a linear map."""


def fskd(task: Task[FSKD]) -> Outcome:
    """Prune hidden units or filters by L1 norm, and align each block with the teacher's by a linear map.

    Args:
        task: See `dcvit.methods.baselines.layerwise.fit_layerwise`.
    """
    return fit_layerwise(task, _fit)


register(
    Method(
        name="fskd",
        config=FSKD,
        title="hidden units or filters pruned by L1 norm, a linear map after them fitted to the original's features",
        source="FSKD, arXiv 1812.01839",
        families=("vit", "eva", "swin", "cnn"),
        compress=fskd,
    )
)


def fit_map(equations: NormalEquations) -> Tensor:
    """Return Q `[D, D]` in float64, from the equations of the student's features `[R, D]` and the teacher's."""
    identity = torch.eye(equations.num_inputs, dtype=torch.float64, device=equations.gram.device)
    return equations.solve(RIDGE, identity, constant=False)[:-1].T


@torch.no_grad()
def absorb(layer: nn.Linear | nn.Conv2d, linear_map: Tensor) -> None:
    """Multiply a linear map `[D, D]` of a layer's output into the layer, in place, computed in float64."""
    weight = linear_map.double() @ layer.weight.double().flatten(1)
    layer.weight.copy_(weight.view_as(layer.weight))
    if layer.bias is not None:
        layer.bias.copy_(linear_map.double() @ layer.bias.double())


def _fit(layer: Layer) -> tuple[float, float]:
    pairs = zip(
        layer.pairs(layer.student, layer.student_states), layer.pairs(layer.teacher, layer.teacher_states), strict=True
    )
    equations = Equations.of((own.output, theirs.output, own.held_out) for own, theirs in pairs)
    absorb(compressible(layer.student).hidden_layer(layer.block), fit_map(equations.every))

    def error(linear_map: Tensor) -> float:
        return equations.held_out.error(torch.cat([linear_map.T, linear_map.new_zeros(1, len(linear_map))]))

    learnt = fit_map(equations.used)
    return error(torch.eye(len(learnt)).to(learnt)), error(learnt)
