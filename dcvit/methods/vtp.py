"""VTP: learn a gate for each unit under an L1 penalty, and prune those whose gate is small.

Source: Zhu, Tang and Han, "Vision Transformer Pruning" (arXiv 2104.08500). With gates a on the dimensions of a
transformer it minimises

    L + λ ‖a‖₁

prunes what is below a threshold, and trains what is left.

As it is applied here:

- Gates stand on attention heads and on hidden nodes, the units without which a timm model is a smaller timm model; the
  paper gates single dimensions of queries, keys, values and MLP, and gathers them at run time.
- The paper trains gates and weights together on labelled ImageNet, 100 epochs and another 100 after the pruning. Here
  the gates alone learn, on the few-shot images; L is the mimicking loss, as a share of the tokens' variance. Then the
  student mimics the original's tokens.
- The threshold is what the budget makes it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dcvit.config import MimickingConfig
from dcvit.methods.registry import Method, Outcome, Task, register
from dcvit.methods.units import Gates, Kind, Space, gated, open_gates, recovered, scores_of
from dcvit.models import adapter_for
from dcvit.progress import Progress, silent
from dcvit.recovery import output_tokens

__all__ = ["LEARNING_RATE", "SPARSITY", "STEPS", "VTP", "learn_gates", "vtp"]

SPARSITY = 0.1
"""λ, on the mean of the gates, beside a loss that is 1 where a student knows no more than the mean token."""

LEARNING_RATE = 0.02
STEPS = 100
"""Of Adam on the gates, a batch each."""


def vtp(task: Task) -> Outcome:
    """Prune the heads and nodes of smallest learnt gates, and let the rest mimic the original.

    Args:
        task: Of its config candidates (all blocks if `None`), mimicking, seed and impl are read.

    Raises:
        DcvitError: If the config's recovery is not mimicking.
        BudgetError: If the budget cannot be met.
    """
    mimicking = task.config.mimicking
    space = Space(task.teacher, task.config.candidates)
    space.require(task.budget)
    with task.timer("ranking"):
        batches = task.images.normalised.split(mimicking.batch_size)
        gates = learn_gates(space, batches, at_once=mimicking.at_once, progress=task.progress)
        structure = space.best(scores_of(gates), task.budget)
    return recovered(task, space, structure)


VTP = register(
    Method(
        name="vtp",
        title="heads and hidden nodes of small learnt, L1-penalised gates pruned, then the output tokens mimicked",
        source="VTP, arXiv 2104.08500",
        families=("vit",),
        recovery=MimickingConfig,
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
    at_once: int | None = None,
    progress: Progress = silent,
) -> Gates:
    """The gates after some steps of Adam, none below 0.

    Args:
        space: Of the original.
        batches: The images, `[B, C, H, W]` each, taken in turn.
        sparsity: λ.
        prices: By kind and block what a gate weighs in the mean that is penalised; all the same if `None`.
        steps: How many.
        at_once: Images a pass; those of a batch if `None`.
        progress: Told after each step.
    """
    model, adapter = space.model, adapter_for(space.model)
    gates = open_gates(space, next(model.parameters()).device)
    for gate in gates.values():
        gate.requires_grad_()
    optimizer = torch.optim.Adam(gates.values(), lr=LEARNING_RATE)
    weights = {key: 1.0 if prices is None else prices.get(key, 0.0) for key in gates}
    total = sum(weights[key] * gate.numel() for key, gate in gates.items())
    passed = at_once or max(map(len, batches))
    wanted = [output_tokens(model, images, passed) for images in batches]
    spreads = [(tokens - tokens.mean(dim=(0, 1))).square().mean() for tokens in wanted]
    progress("gates", 0, steps, None)
    for step in range(steps):
        number = step % len(batches)
        images, tokens = batches[number], wanted[number]
        optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad(), gated(model, gates, space.convolutions):
            penalty = torch.stack([weights[key] * gate.abs().sum() for key, gate in gates.items()]).sum() / total
            loss = sparsity * penalty
            loss.backward()
            for part, theirs in zip(images.split(passed), tokens.split(passed), strict=True):
                missed = (adapter.tokens(model, part) - theirs).square().mean() / spreads[number]
                missed = missed * len(part) / len(images)
                missed.backward()
                loss = loss.detach() + missed.detach()
        optimizer.step()
        with torch.no_grad():
            for gate in gates.values():
                gate.clamp_(min=0)
        progress("gates", step + 1, steps, float(loss))
    return {key: gate.detach() for key, gate in gates.items()}
