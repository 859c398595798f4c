"""Cross distillation: fit each pruned layer on the teacher's activations and on the student's own.

Source: Bai, Wu, King and Lyu, "Few Shot Network Compression via Cross Distillation" (AAAI 2020, arXiv 1911.09450). Let
x_T and x_S be the activations of teacher and student in front of a layer, and T and S the layer in each. It minimises

    μ ‖S(x_T) − T(x_T)‖² + (1 − μ) ‖S(x_S) − T(x_S)‖²

The first term, correction, ignores the errors of earlier layers. The second, imitation, uses the student's own
activations. μ is constant, 0.6 as in the authors' code.

Choices and differences of this implementation:

- A layer's loss is quadratic in its weights, so its minimum is computed in closed form instead of approached by Adam.
- The pruned filters are chosen beforehand by L1 norm, as in `fskd`, not by a proximal step.
- In a CNN the layer is the convolution that follows a residual block's hidden filters: a 1×1 one, or a 3×3 one, whose
  inputs are patches. The block up to that layer computes its inputs from x_T and x_S. Other convolutions and the
  statistics of every BatchNorm stay unchanged.
- The method is transferred to ViTs. There the layer is `fc2`, whose inputs are the MLP's hidden units. The block up to
  that layer, attention included, computes them from x_T and x_S.
- The authors finally fine-tune on labels. Here there are no labels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dcvit.methods.baselines.layerwise import RIDGE, Equations, Layer, LayerwiseConfig, fit_layerwise
from dcvit.methods.registry import Method, Outcome, Task, register
from dcvit.models import compressible
from dcvit.recovery.ridge import NormalEquations
from dcvit.runtime.spill import SpilledBuffer

__all__ = ["CD", "MIXING", "cd", "mix"]

MIXING = 0.6
"""μ, the weight of the correction."""


@dataclass(frozen=True)
class CD(LayerwiseConfig):
    """Settings of cross distillation (arXiv 1911.09450): prune hidden units or filters, and fit the next layer."""


def cd(task: Task[CD]) -> Outcome:
    """Prune hidden units or filters by L1 norm, and fit the next layer on both networks' activations.

    Args:
        task: See `dcvit.methods.baselines.layerwise.fit_layerwise`.
    """
    return fit_layerwise(task, _fit)


register(
    Method(
        name="cd",
        config=CD,
        title="hidden units or filters pruned by L1 norm, the next layer fitted on both networks' activations",
        source="Cross Distillation, arXiv 1911.09450",
        families=("vit", "eva", "swin", "cnn"),
        compress=cd,
    )
)


def mix(correction: NormalEquations, imitation: NormalEquations, mixing: float = MIXING) -> NormalEquations:
    """Return μ times the correction's equations plus 1 − μ times the imitation's."""
    return NormalEquations(
        mixing * correction.gram + (1 - mixing) * imitation.gram,
        mixing * correction.moment + (1 - mixing) * imitation.moment,
        mixing * correction.energy + (1 - mixing) * imitation.energy,
        correction.count,
    )


def _fit(layer: Layer) -> tuple[float, float]:
    equations = _mixed(*(_side(layer, states) for states in (layer.teacher_states, layer.student_states)))
    module = compressible(layer.student).hidden_layer(layer.block)
    anchor, bias = module.weight.double().flatten(1).T, module.bias
    constant = anchor.new_zeros(1, anchor.shape[1]) if bias is None else bias.double()[None]

    def solve(equations: NormalEquations) -> Tensor:
        return equations.solve(RIDGE, anchor, constant=bias is not None)

    before = equations.held_out.error(torch.cat([anchor, constant]))
    after = equations.held_out.error(solve(equations.used))
    solution = solve(equations.every)
    module.weight.copy_(solution[:-1].T.view_as(module.weight))
    if bias is not None:
        bias.copy_(solution[-1])
    return before, after


def _side(layer: Layer, states: SpilledBuffer) -> Equations:
    """Return the equations of one term: inputs of the student's layer and outputs of the teacher's, on given states."""
    pairs = zip(layer.pairs(layer.student, states), layer.pairs(layer.teacher, states), strict=True)
    return Equations.of((own.hidden, theirs.output, own.held_out) for own, theirs in pairs)


def _mixed(correction: Equations, imitation: Equations) -> Equations:
    validation = None
    if correction.validation is not None and imitation.validation is not None:
        validation = mix(correction.validation, imitation.validation)
    return Equations(mix(correction.used, imitation.used), validation)
