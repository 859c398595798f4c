"""EViT: behind some attentions only the tokens that the class token attends to go on, the rest as one.

Source: Liang, Ge, Tong, Song, Wang and Xie, "Not All Patches Are What You Need: Expediting Vision Transformers via
Token Reorganizations" (ICLR 2022, arXiv 2202.07800). In three blocks a share of the patch tokens stays, those of most
attention by the class token, the mean over the heads; the others become one token, their sum weighted by that
attention.

As it is applied here:

- The three blocks are those at a quarter, half and three quarters of the depth, the paper's 4th, 7th and 10th of 12.
- The weights of the fused token are divided by their sum: it is a mean, of the size of a token. The paper trains with
  the sum, which a pretrained model has not seen.
- No weight changes, so no image is needed. The share is the largest that meets the budget, to a thousandth. Only MACs
  can be saved: parameters stay.
"""

from bisect import bisect_right
from collections.abc import Sequence

from torch import nn

from dcvit.errors import BudgetError
from dcvit.methods.budgets import plan_of, require_blocks, spent, target
from dcvit.methods.registry import Method, Outcome, Task, register
from dcvit.models import adapter_for
from dcvit.models.vision_transformer import fuse_tokens
from dcvit.surgery import copy_blocks

__all__ = ["EVIT", "evit", "fusing_blocks"]

STEPS = 1000
"""The shares that are tried are multiples of 1 / `STEPS`."""


def evit(task: Task) -> Outcome:
    """Keep the tokens of most attention.

    Args:
        task: Of its config only candidates are read: the blocks where tokens end, `fusing_blocks` if `None`.

    Raises:
        BudgetError: If the budget cannot be met, or a candidate is no block.
        UnsupportedModelError: If the model has no class token.
    """
    teacher, budget = task.teacher, task.budget
    wanted = target(teacher, budget)
    blocks = task.config.candidates or fusing_blocks(adapter_for(teacher).num_blocks(teacher))
    require_blocks(teacher, blocks)
    with task.timer("compression"):
        step = bisect_right(range(1, STEPS), wanted, key=lambda step: spent(_fused(teacher, blocks, step), budget))
        if not step:
            raise BudgetError(
                f"macs={budget.value!r} asks for {wanted:,}: with one patch token behind the blocks {list(blocks)} "
                f"{spent(_fused(teacher, blocks, 1), budget):,} are left. Ask for more, or name earlier blocks in "
                "CompressionConfig(candidates=...)."
            )
        student = _fused(teacher, blocks, step)
    plan = plan_of(teacher, student, budget, blocks, blocks, token_keep_rates=dict.fromkeys(blocks, step / STEPS))
    return Outcome(student, plan)


EVIT = register(
    Method(
        name="evit",
        title="tokens that the class token attends to least fused into one, in three blocks; no weight changed",
        source="EViT, arXiv 2202.07800",
        families=("vit",),
        recovery=None,
        compress=evit,
        units=("macs",),
    )
)


def fusing_blocks(depth: int) -> tuple[int, ...]:
    """The blocks at a quarter, half and three quarters of a depth."""
    return tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))


def _fused(model: nn.Module, blocks: Sequence[int], step: int) -> nn.Module:
    """A copy that keeps so many thousandths; the weights are the model's."""
    student = copy_blocks(model, ())
    for block in blocks:
        fuse_tokens(student, block, step / STEPS)
    return student
