"""S2ViTE: prune the heads and hidden units that matter least to the loss, by first-order scores, and allow regrowth.

Source: Chen, Cheng, Gan, Yuan, Zhang and Wang, "Chasing Sparsity in Vision Transformers: An End-to-End Exploration"
(NeurIPS 2021, arXiv 2106.04533). The score of a head or a hidden unit is

    Σ over images of  |∂L / ∂g|

where the gate g multiplies its output. This is the first-order change of the loss when the group is removed, or when it
returns if g = 0. The share of pruned groups grows from round to round. Each round scores all groups anew, so that one
that was pruned early can return in place of one that matters less.

Choices and differences of this implementation:

- The paper trains on labelled ImageNet for 600 epochs between the rounds of exploration. Here `ROUNDS` rounds follow
  one another on the few-shot images without training between them. The student is then trained by distillation of the
  output tokens.
- There are no labels: L is the cross-entropy with the class that the original predicts.
- The paper prunes separate shares of heads and of units. Here one budget decides on both, so a group's score is divided
  by its MACs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcvit.budget import Budget
from dcvit.methods.baselines.distillation import DistilledConfig
from dcvit.methods.baselines.groups import Gates, Space, Structure, gated, open_gates, recovered, scores_of
from dcvit.methods.registry import Method, Outcome, Task, register
from dcvit.metrics.cost import spent
from dcvit.models import compressible
from dcvit.models.pseudo_head import class_logits

__all__ = ["ROUNDS", "S2ViTE", "first_order_scores", "s2vite"]

ROUNDS = 5
"""Number of equal steps in which the budget tightens from the original's cost to the target."""


@dataclass(frozen=True)
class S2ViTE(DistilledConfig):
    """Settings of S2ViTE (arXiv 2106.04533): heads and hidden units pruned by first-order scores."""


def s2vite(task: Task[S2ViTE]) -> Outcome:
    """Prune heads and hidden units by first-order scores in rounds, and train the rest by distillation.

    Args:
        task: The model, the images, the budget and the settings.

    Raises:
        BudgetError: If the budget cannot be met.
    """
    teacher, budget, distillation = task.teacher, task.budget, task.config.distillation
    space = Space(teacher, task.config.candidates)
    limit, original = space.require(budget), spent(teacher, budget)
    macs = space.savings(Budget(macs=0.5))
    structure = space.without(())
    with task.context.timer("ranking"):
        batches = [
            (images, _classes(teacher, images))
            for images in task.images.normalised.split(distillation.micro_batch_size)
        ]
        task.context.progress("scores", 0, ROUNDS, None)
        for number in range(1, ROUNDS + 1):
            scores = scores_of(first_order_scores(space, structure, batches))
            allowed = limit if number == ROUNDS else original - (original - limit) * number // ROUNDS
            step = Budget(**{budget.metric: allowed}, convention=budget.convention)
            by_cost = {group: score / macs.get((group.kind, group.block), 1) for group, score in scores.items()}
            structure = space.best(by_cost, step)
            task.context.progress("scores", number, ROUNDS, None)
    return recovered(task, space, structure)


register(
    Method(
        name="s2vite",
        config=S2ViTE,
        title="heads and hidden units pruned by first-order scores in rounds, then the output tokens distilled",
        source="S2ViTE, arXiv 2106.04533",
        families=("vit",),
        compress=s2vite,
    )
)


def first_order_scores(space: Space, structure: Structure, batches: Sequence[tuple[Tensor, Tensor]]) -> Gates:
    """Return the first-order score of each group, with the gates of a structure's groups open and all others closed.

    Args:
        space: The original's space.
        structure: The groups whose gates are open.
        batches: Images, `[B, C, H, W]` each, and the classes that the original predicts, `[B]`.
    """
    model = space.model
    device = next(model.parameters()).device
    gates = {key: torch.zeros_like(gate) for key, gate in open_gates(space, device).items()}
    for (kind, block), gate in gates.items():
        gate[list((structure.heads if kind == "head" else structure.units)[block])] = 1.0
    totals = {key: torch.zeros_like(gate) for key, gate in gates.items()}
    for images, classes in batches:
        own = {key: gate.expand(len(images), -1).clone().requires_grad_() for key, gate in gates.items()}
        with torch.enable_grad(), gated(model, own):
            loss = F.cross_entropy(class_logits(model, compressible(model).tokens(images)), classes, reduction="sum")
            slopes = torch.autograd.grad(loss, list(own.values()))
        for key, slope in zip(own, slopes, strict=True):
            totals[key] += slope.abs().sum(0)
    return totals


def _classes(model: nn.Module, images: Tensor) -> Tensor:
    """Return the class that a model predicts for each image, `[B]`."""
    with torch.no_grad():
        return class_logits(model, compressible(model).tokens(images)).argmax(-1)
