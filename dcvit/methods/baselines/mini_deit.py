"""Mini-DeiT: consecutive blocks share the weights of attention and MLP, each with a small transformation of its own.

Source: Zhang, Peng, Wu, Liu, Xiao, Fu and Yuan, "MiniViT: Compressing Vision Transformers with Weight Multiplexing"
(CVPR 2022, arXiv 2204.07154). Each block keeps its norms. Its transformation is

    of attention   linear maps across the heads, one before the softmax and one behind it, each [H, H]
    of the MLP     a depthwise convolution of the patches, added to what the MLP takes

so that parameters and the file become smaller, and MACs do not.

As it is applied here:

- The paper shares both parts of every two blocks, or of more for smaller models, and trains on ImageNet for 300 epochs.
  Here attention and MLP share for themselves, so that more sizes exist, and which do is measured: one block at a time
  takes the attention or the MLP of the block before it, that which adds least to the distillation loss for what it saves,
  until the budget is met; the last one leaves less over than an attention, where it can. So runs of any length come
  about, whose weights begin as those of their first block. On the digits at 70 % of the parameters (50 images, 20
  epochs at 1e-3) that agreed with the original in 90.8 % of 400 held-out images; adding up losses that were measured
  one by one, in 82.7 %; the last three of the paper's pairs, which leave 64 %, in 87.3 %. Beginning with the mean of a
  run's weights, it was 86.8 %.
- The transformations begin as identities and zeros, not at random: with equal weights nothing changes. The linear maps
  have no bias, as in the published code of Mini-DeiT; the convolution, which that code has for Mini-Swin alone, is 3×3
  instead of 7×7, has no norm of its own and no bias, and passes class token and registers by.
- There are no labels: of the distillation (classes, relations of queries, keys and values, hidden states) the distillation
  of all output tokens is left.
- Fused attention has no place for maps between its products: an attention that is shared writes [H, N, N] values for
  each image. On the digits at 70 % of the parameters the model took 1.3 times as long as the original.
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
"""A part, and a block whose weights of it become those of the block before."""


@dataclass(frozen=True)
class MiniDeiT(DistilledConfig):
    """MiniViT's Mini-DeiT (arXiv 2204.07154): consecutive blocks share weights."""


def mini_deit(task: Task[MiniDeiT]) -> Outcome:
    """Let parts of consecutive blocks share their weights, and the student mimic the original.

    Args:
        task: What to compress, with what, to which budget.

    Raises:
        BudgetError: If the budget cannot be met.
        UnsupportedModelError: If no two consecutive blocks can share.
    """
    teacher, budget, distillation = task.teacher, task.budget, task.config.distillation
    wanted = target(teacher, budget)
    able = joins(teacher, task.config.candidates)
    if (least := spent(sharing(teacher, able), budget)) > wanted:
        raise BudgetError(
            f"{budget.metric}={budget.value!r} asks for {wanted:,}: with one attention and one MLP for all blocks that "
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
        title="attention and MLP weights shared by consecutive blocks, then the output tokens mimicked",
        source="MiniViT, arXiv 2204.07154",
        families=("vit",),
        compress=mini_deit,
        metrics=("params", "file_size"),
    )
)


def joins(model: nn.Module, candidates: Collection[int] | None = None) -> list[Join]:
    """What could share: of each candidate that follows another one, and is of its size, attention and MLP.

    Raises:
        BudgetError: If a candidate is no block.
        UnsupportedModelError: If nothing could.
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
    """Of each block in a run, the first block of the run, whose weights of a part it has; that of itself, too."""
    found: dict[int, int] = {}
    for block in sorted(block for kind, block in chosen if kind == part):
        found[block] = found.setdefault(block - 1, block - 1)
    return found


def sharing(model: nn.Module, chosen: Collection[Join]) -> nn.Module:
    """A copy of a model in which parts share; weights are the model's."""
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
    """Which parts share so that a budget is met: one after the other, the one of least added loss for what it saves.

    Args:
        model: The original.
        able: What could share.
        loss: Of the model in which some parts share.
        budget: What is left may cost so much; with all that could share it is met.
        progress: Told after each choice, with the loss so far.
    """
    wanted, original = target(model, budget), spent(model, budget)
    attention = original - min(spent(sharing(model, {join}), budget) for join in able if join[0] == "attention")
    chosen: set[Join] = set()
    left, lost = original, 0.0
    progress("sharing", 0, original - wanted, None)
    while left > wanted:
        costs = {join: spent(sharing(model, chosen | {join}), budget) for join in able if join not in chosen}
        # The last join is to leave less over than an attention would save.
        looked_at = [join for join, cost in costs.items() if wanted - cost < attention] or list(costs)
        losses = {join: loss(chosen | {join}) for join in looked_at}
        best = min(looked_at, key=lambda join: (losses[join] - lost) / (left - costs[join]))
        chosen.add(best)
        left, lost = costs[best], losses[best]
        progress("sharing", original - max(left, wanted), original - wanted, lost)
    return chosen
