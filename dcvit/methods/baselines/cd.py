"""Cross distillation: each pruned layer learns on the teacher's activations and on the student's own.

Source: Bai, Wu, King and Lyu, "Few Shot Network Compression via Cross Distillation" (AAAI 2020, arXiv 1911.09450). With
x_T and x_S what teacher and student give before a layer, T that layer of the teacher and S of the student, it minimises

    μ ‖S(x_T) − T(x_T)‖² + (1 − μ) ‖S(x_S) − T(x_S)‖²

The first term, correction, knows nothing of the errors made before; the second, imitation, follows the student's own
activations. μ is constant, 0.6 as the authors' code has it.

As it is applied here:

- A layer's loss is quadratic in its weights, so the minimum is solved for instead of approached by Adam.
- Which filters go is fixed beforehand, by L1 norm as in `fskd`, not found by a proximal step.
- In a CNN the layer is the one behind a residual block's hidden filters, a 1×1 convolution, or a 3×3 one, which takes
  patches. The block up to that layer makes them of x_T and x_S. Other convolutions stay as they are, and so do the
  statistics of every BatchNorm.
- To a ViT it is transferred: the layer is `fc2`, whose input are the MLP's hidden units; the block before that layer,
  attention included, makes them of x_T and x_S.
- The authors fine-tune on labels in the end. Here there are none.
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
    """Cross Distillation (arXiv 1911.09450): hidden units or filters pruned by L1 norm, the layer after them fitted."""


def cd(task: Task[CD]) -> Outcome:
    """Prune hidden units or filters by L1 norm, and fit the layer behind them on both networks' activations.

    Args:
        task: See `dcvit.methods.baselines.layerwise.fit_layerwise`.
    """
    return fit_layerwise(task, _fit)


register(
    Method(
        name="cd",
        config=CD,
        title="hidden units or filters pruned by L1 norm, the layer after them fitted on both networks' activations",
        source="Cross Distillation, arXiv 1911.09450",
        families=("vit", "eva", "swin", "cnn"),
        compress=cd,
    )
)


def mix(correction: NormalEquations, imitation: NormalEquations, mixing: float = MIXING) -> NormalEquations:
    """The equations of μ times the correction and 1 − μ times the imitation."""
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
    """The equations of one of the terms: both networks on the states of one."""
    pairs = zip(layer.pairs(layer.student, states), layer.pairs(layer.teacher, states), strict=True)
    return Equations.of((own.hidden, theirs.output, own.held_out) for own, theirs in pairs)


def _mixed(correction: Equations, imitation: Equations) -> Equations:
    judging = None
    if correction.judging is not None and imitation.judging is not None:
        judging = mix(correction.judging, imitation.judging)
    return Equations(mix(correction.used, imitation.used), judging)
