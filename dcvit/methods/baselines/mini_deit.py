"""Mini-DeiT: consecutive blocks share the weights of attention and MLP, and each has a small transformation of its own.

Source: Zhang, Peng, Wu, Liu, Xiao, Fu and Yuan, "MiniViT: Compressing Vision Transformers with Weight Multiplexing"
(CVPR 2022, arXiv 2204.07154). Each block keeps its norms. Its transformation is

    of attention   linear maps across the heads, one before the softmax and one behind it, each [H, H]
    of the MLP     a depthwise convolution of the patches, added to the MLP's input

This reduces the parameters and the file size, but not the MACs.

Choices and differences of this implementation:

- The paper shares attention and MLP of every two blocks, or of more for smaller models, and trains on ImageNet for 300
  epochs. Here attention and MLP are shared separately, so that more sizes exist. The choice is greedy: at each step one
  block takes over the attention or the MLP of the block before it, whichever adds least distillation loss for what it
  saves, until the budget is met. Where possible, the last step exceeds the needed saving by less than one attention.
  The result is runs of blocks of any length, whose weights start as those of their first block.
- On the digits at 70 % of the parameters (50 images, 20 epochs at 1e-3) the student agreed with the original in 90.8 %
  of 400 held-out images. With the sum of losses that were measured one by one it was 82.7 %. With the last three of the
  paper's pairs, which leave 64 %, it was 87.3 %. Starting from the mean of a run's weights, it was 86.8 %.
- The transformations start as identities and zeros, not at random, so that with equal weights nothing changes. The
  linear maps have no bias, as in the published code of Mini-DeiT. The convolution, which that code has only for
  Mini-Swin, is 3×3 instead of 7×7, has no norm of its own and no bias, and leaves out class token and registers.
- There are no labels. Of the paper's distillation (of classes, of relations of queries, keys and values, and of hidden
  states) only distillation of all output tokens remains.
- Fused attention does not allow maps between its products, so a shared attention writes [H, N, N] values per image. On
  the digits at 70 % of the parameters the model took 1.3 times as long as the original.
"""

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

from torch import nn

from dcvit.budget import Budget
from dcvit.errors import BudgetError, UnsupportedModelError
from dcvit.methods.baselines.distillation import DistilledConfig, distil
from dcvit.methods.budgets import plan_of, require_blocks, target
from dcvit.methods.registry import Method, Outcome, Task, register
from dcvit.metrics.cost import spent
from dcvit.models import compressible
from dcvit.models.surgery import copy_blocks
from dcvit.models.vision_transformer import share_block_weights, shareable
from dcvit.recovery.distill import output_tokens, token_loss
from dcvit.runtime.progress import Progress, silent

__all__ = ["Join", "MiniDeiT", "choose", "joins", "mini_deit", "owners", "sharing"]

Part = Literal["attention", "mlp"]
Join = tuple[Part, int]
"""A part, and the number of a block that takes over that part's weights from the block before it."""


@dataclass(frozen=True)
class MiniDeiT(DistilledConfig):
    """Settings of MiniViT's Mini-DeiT (arXiv 2204.07154): consecutive blocks share weights."""


def mini_deit(task: Task[MiniDeiT]) -> Outcome:
    """Share weights between consecutive blocks, and train the student by distillation.

    Args:
        task: The model, the images, the budget and the settings.

    Raises:
        BudgetError: If the budget cannot be met.
        UnsupportedModelError: If no two consecutive blocks can share.
    """
    teacher, budget, distillation = task.teacher, task.budget, task.config.distillation
    limit = target(teacher, budget)
    able = joins(teacher, task.config.candidates)
    if (least := spent(sharing(teacher, able), budget)) > limit:
        raise BudgetError(
            f"{budget.metric}={budget.value!r} asks for {limit:,}: with one attention and one MLP for all blocks that "
            f"may share {least:,} are left. Ask for more, or allow more blocks in `candidates`."
        )
    with task.context.timer("ranking"):
        targets = output_tokens(teacher, task.images.normalised, distillation.micro_batch_size)

        def loss(chosen: Collection[Join]) -> float:
            return token_loss(sharing(teacher, chosen), targets, task.images, distillation, impl=task.context.impl)

        chosen = choose(teacher, able, loss, budget, progress=task.context.progress)
    student = copy.deepcopy(sharing(teacher, chosen))
    attention_of, mlp_of = owners(chosen, "attention"), owners(chosen, "mlp")
    blocks = tuple(sorted({*attention_of, *mlp_of}))
    recovery = distil(task, student, blocks)
    candidates = task.config.candidates or range(compressible(teacher).num_blocks())
    plan = plan_of(teacher, student, budget, blocks, candidates, attention_of=attention_of, mlp_of=mlp_of)
    return Outcome(student, plan, learning_rate=recovery.learning_rate, steps=(recovery,))


register(
    Method(
        name="mini_deit",
        config=MiniDeiT,
        title="attention and MLP weights shared by consecutive blocks, then the output tokens distilled",
        source="MiniViT, arXiv 2204.07154",
        families=("vit",),
        compress=mini_deit,
        metrics=("params", "file_size"),
    )
)


def joins(model: nn.Module, candidates: Collection[int] | None = None) -> list[Join]:
    """Return all possible joins: attention and MLP of each candidate that follows another one of the same size.

    Raises:
        BudgetError: If a candidate does not exist.
        UnsupportedModelError: If there are no such candidates.
    """
    depth = compressible(model).num_blocks()
    allowed = set(range(depth) if candidates is None else candidates)
    require_blocks(model, sorted(allowed))
    found: list[Join] = [
        (part, block)
        for block in range(1, depth) if {block - 1, block} <= allowed and shareable(model, block - 1, block)
        for part in ("attention", "mlp")
    ]  # fmt: skip
    if not found:
        raise UnsupportedModelError(
            f"Of the blocks {sorted(allowed)} no two consecutive ones are timm's Blocks of one size, so none can share "
            "weights: allow others in `candidates`, or use another method."
        )
    return found


def owners(chosen: Collection[Join], part: Part) -> dict[int, int]:
    """Map each block of a run, the first one included, to the run's first block, whose weights of a part it uses."""
    found: dict[int, int] = {}
    for block in sorted(block for kind, block in chosen if kind == part):
        found[block] = found.setdefault(block - 1, block - 1)
    return found


def sharing(model: nn.Module, chosen: Collection[Join]) -> nn.Module:
    """Return a copy of a model with the chosen parts shared. Its weights are the model's own tensors."""
    student = copy_blocks(model, ())
    share_block_weights(student, owners(chosen, "attention"), owners(chosen, "mlp"))
    return student


def choose(
    model: nn.Module,
    able: Collection[Join],
    loss: Callable[[Collection[Join]], float],
    budget: Budget,
    *,
    progress: Progress = silent,
) -> set[Join]:
    """Choose parts to share one after another until a budget is met, each time the one of least added loss per saving.

    Args:
        model: The original.
        able: The possible joins.
        loss: Returns the loss of the model with some parts shared.
        budget: What the smaller model may cost. It must be met when all possible joins are made.
        progress: Called after each choice, with the loss so far.
    """
    limit, original = target(model, budget), spent(model, budget)
    attention = original - min(spent(sharing(model, {join}), budget) for join in able if join[0] == "attention")
    chosen: set[Join] = set()
    left, lost = original, 0.0
    progress("sharing", 0, original - limit, None)
    while left > limit:
        costs = {join: spent(sharing(model, chosen | {join}), budget) for join in able if join not in chosen}
        # The last join should exceed the needed saving by less than what one attention saves.
        looked_at = [join for join, cost in costs.items() if limit - cost < attention] or list(costs)
        losses = {join: loss(chosen | {join}) for join in looked_at}
        best = min(looked_at, key=lambda join: (losses[join] - lost) / (left - costs[join]))
        chosen.add(best)
        left, lost = costs[best], losses[best]
        progress("sharing", original - max(left, limit), original - limit, lost)
    return chosen
