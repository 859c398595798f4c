"""VTP: learn a gate for each head and hidden unit under an L1 penalty, and prune those with small gates.

Source: Zhu, Tang and Han, "Vision Transformer Pruning" (arXiv 2104.08500). With gates a on the dimensions of a
transformer it minimises

    L + λ ‖a‖₁

prunes the dimensions whose gates are below a threshold, and trains the rest.

Choices and differences of this implementation:

- The gates act on attention heads and hidden units, because removing those leaves a smaller timm model. The paper gates
  single dimensions of queries, keys, values and MLP, and gathers them at run time.
- The paper trains gates and weights together on labelled ImageNet for 100 epochs, and for another 100 after pruning.
  Here only the gates are trained, on the few-shot images. L is the distillation loss relative to the tokens' variance.
  The student is then trained by distillation of the output tokens.
- The budget determines the threshold.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch import Tensor

from dcvit.methods.baselines.distillation import DistilledConfig
from dcvit.methods.baselines.groups import Gates, Kind, Space, gated, open_gates, recovered, scores_of
from dcvit.methods.registry import Method, Outcome, Task, register
from dcvit.models import compressible
from dcvit.recovery.distill import output_tokens
from dcvit.runtime.optim import descend
from dcvit.runtime.progress import Progress, silent

__all__ = ["LEARNING_RATE", "SPARSITY", "STEPS", "VTP", "learn_gates", "vtp"]

SPARSITY = 0.1
"""λ, which weighs the mean of the gates. The loss is 1 for a student that knows only the mean token."""

LEARNING_RATE = 0.02
STEPS = 100
"""Number of Adam steps on the gates, one batch each."""


@dataclass(frozen=True)
class VTP(DistilledConfig):
    """Settings of VTP (arXiv 2104.08500): heads and hidden units with small learnt gates are pruned."""


def vtp(task: Task[VTP]) -> Outcome:
    """Prune the heads and hidden units with the smallest learnt gates, and train the rest by distillation.

    Args:
        task: The model, the images, the budget and the settings.

    Raises:
        BudgetError: If the budget cannot be met.
    """
    distillation = task.config.distillation
    space = Space(task.teacher, task.config.candidates)
    space.require(task.budget)
    with task.context.timer("ranking"):
        batches = task.images.normalised.split(distillation.batch_size)
        gates = learn_gates(
            space, batches, micro_batch_size=distillation.micro_batch_size, progress=task.context.progress
        )
        structure = space.best(scores_of(gates), task.budget)
    return recovered(task, space, structure)


register(
    Method(
        name="vtp",
        config=VTP,
        title="heads and hidden units with small learnt, L1-penalised gates pruned, then the output tokens distilled",
        source="VTP, arXiv 2104.08500",
        families=("vit",),
        compress=vtp,
    )
)


def learn_gates(
    space: Space,
    batches: tuple[Tensor, ...],
    *,
    sparsity: float = SPARSITY,
    prices: Mapping[tuple[Kind, int], float] | None = None,
    steps: int = STEPS,
    micro_batch_size: int | None = None,
    progress: Progress = silent,
) -> Gates:
    """Return the gates after some steps of Adam. None is below 0.

    Args:
        space: The original's space.
        batches: Batches of images, `[B, C, H, W]` each, taken in turn.
        sparsity: λ.
        prices: The weight of a gate in the penalised mean, by kind and block; equal weights by default.
        steps: Number of steps.
        micro_batch_size: Images per forward pass; a whole batch by default.
        progress: Called after each step.
    """
    model = space.model
    gates = open_gates(space, next(model.parameters()).device)
    for gate in gates.values():
        gate.requires_grad_()
    optimizer = torch.optim.Adam(gates.values(), lr=LEARNING_RATE)
    weights = {key: 1.0 if prices is None else prices.get(key, 0.0) for key in gates}
    total = sum(weights[key] * gate.numel() for key, gate in gates.items())
    passed = micro_batch_size or max(map(len, batches))
    targets = [output_tokens(model, images, passed) for images in batches]
    spreads = [(tokens - tokens.mean(dim=(0, 1))).square().mean() for tokens in targets]
    loss = 0.0

    def backward(number: int) -> None:
        nonlocal loss
        images, tokens = batches[number], targets[number]
        with gated(model, gates, space.convolutions):
            penalty = torch.stack([weights[key] * gate.abs().sum() for key, gate in gates.items()]).sum() / total
            objective = sparsity * penalty
            objective.backward()
            for part, theirs in zip(images.split(passed), tokens.split(passed), strict=True):
                error = (compressible(model).tokens(part) - theirs).square().mean() / spreads[number]
                error = error * len(part) / len(images)
                error.backward()
                objective = objective.detach() + error.detach()
        loss = float(objective)

    progress("gates", 0, steps, None)
    for step in descend(optimizer, islice(cycle(range(len(batches))), steps), backward, lambda step: 1.0):
        with torch.no_grad():
            for gate in gates.values():
                gate.clamp_(min=0)
        progress("gates", step, steps, loss)
    return {key: gate.detach() for key, gate in gates.items()}
