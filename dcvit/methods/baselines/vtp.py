"""VTP: learn a gate for each unit under an L1 penalty, and prune those whose gate is small.

Source: Zhu, Tang and Han, "Vision Transformer Pruning" (arXiv 2104.08500). With gates a on the dimensions of a
transformer it minimises

    L + λ ‖a‖₁

prunes what is below a threshold, and trains what is left.

As it is applied here:

- Gates stand on attention heads and on hidden units, the units without which a timm model is a smaller timm model; the
  paper gates single dimensions of queries, keys, values and MLP, and gathers them at run time.
- The paper trains gates and weights together on labelled ImageNet, 100 epochs and another 100 after the pruning. Here
  the gates alone learn, on the few-shot images; L is the distillation loss, as a share of the tokens' variance. Then the
  student mimics the original's tokens.
- The threshold is what the budget makes it.
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
"""λ, on the mean of the gates, beside a loss that is 1 where a student knows no more than the mean token."""

LEARNING_RATE = 0.02
STEPS = 100
"""Of Adam on the gates, a batch each."""


@dataclass(frozen=True)
class VTP(DistilledConfig):
    """VTP (arXiv 2104.08500): heads and hidden units of small learnt gates pruned."""


def vtp(task: Task[VTP]) -> Outcome:
    """Prune the heads and units of smallest learnt gates, and let the rest mimic the original.

    Args:
        task: What to compress, with what, to which budget.

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
        title="heads and hidden units of small learnt, L1-penalised gates pruned, then the output tokens mimicked",
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
    """The gates after some steps of Adam, none below 0.

    Args:
        space: Of the original.
        batches: The images, `[B, C, H, W]` each, taken in turn.
        sparsity: λ.
        prices: By kind and block what a gate weighs in the mean that is penalised; all the same if `None`.
        steps: How many.
        micro_batch_size: Images a pass; those of a batch if `None`.
        progress: Told after each step.
    """
    model = space.model
    gates = open_gates(space, next(model.parameters()).device)
    for gate in gates.values():
        gate.requires_grad_()
    optimizer = torch.optim.Adam(gates.values(), lr=LEARNING_RATE)
    weights = {key: 1.0 if prices is None else prices.get(key, 0.0) for key in gates}
    total = sum(weights[key] * gate.numel() for key, gate in gates.items())
    passed = micro_batch_size or max(map(len, batches))
    wanted = [output_tokens(model, images, passed) for images in batches]
    spreads = [(tokens - tokens.mean(dim=(0, 1))).square().mean() for tokens in wanted]
    loss = 0.0

    def backward(number: int) -> None:
        nonlocal loss
        images, tokens = batches[number], wanted[number]
        with gated(model, gates, space.convolutions):
            penalty = torch.stack([weights[key] * gate.abs().sum() for key, gate in gates.items()]).sum() / total
            objective = sparsity * penalty
            objective.backward()
            for part, theirs in zip(images.split(passed), tokens.split(passed), strict=True):
                missed = (compressible(model).tokens(part) - theirs).square().mean() / spreads[number]
                missed = missed * len(part) / len(images)
                missed.backward()
                objective = objective.detach() + missed.detach()
        loss = float(objective)

    progress("gates", 0, steps, None)
    for step in descend(optimizer, islice(cycle(range(len(batches))), steps), backward, lambda step: 1.0):
        with torch.no_grad():
            for gate in gates.values():
                gate.clamp_(min=0)
        progress("gates", step, steps, loss)
    return {key: gate.detach() for key, gate in gates.items()}
