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
from dataclasses import dataclass, replace

from torch import nn

from dcvit.config import MethodConfig
from dcvit.errors import BudgetError, DcvitError
from dcvit.methods.budgets import plan_of, require_blocks, target
from dcvit.methods.registry import Method, Outcome, Task, register
from dcvit.metrics.cost import spent
from dcvit.models import compressible
from dcvit.models.surgery import copy_blocks
from dcvit.models.vision_transformer import fuse_tokens

__all__ = ["EViT", "evit", "fusing_blocks"]

STEPS = 1000
"""The shares that are tried are multiples of 1 / `STEPS`."""


@dataclass(frozen=True)
class EViT(MethodConfig):
    """EViT (arXiv 2202.07800): tokens that the class token attends to least fused into one; no weight changed.

    Attributes:
        candidates: The blocks where tokens end, from 0; `None` is `fusing_blocks`.
        seed: See `MethodConfig`. Nothing is drawn, so it changes nothing.
        impl: See `MethodConfig`.
        batch_size: Images that pass through a model at once, to see how the result agrees with the original. Changes
            speed and memory, and figures by rounding alone.
    """

    batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise DcvitError(f"batch_size={self.batch_size!r}: expected 1 or more.")

    @property
    def micro_batch_size(self) -> int:
        """Images that pass through a model at once."""
        return self.batch_size

    def with_micro_batch_at_most(self, count: int) -> "EViT":
        """The same with at most so many images at once."""
        return replace(self, batch_size=min(count, self.batch_size))


def evit(task: Task[EViT]) -> Outcome:
    """Keep the tokens of most attention.

    Args:
        task: What to compress, and to which budget.

    Raises:
        BudgetError: If the budget cannot be met, or a candidate is no block.
        UnsupportedModelError: If the model has no class token.
    """
    teacher, budget = task.teacher, task.budget
    wanted = target(teacher, budget)
    blocks = task.config.candidates or fusing_blocks(compressible(teacher).num_blocks())
    require_blocks(teacher, blocks)
    with task.context.timer("compression"):
        step = bisect_right(range(1, STEPS), wanted, key=lambda step: spent(_fused(teacher, blocks, step), budget))
        if not step:
            raise BudgetError(
                f"macs={budget.value!r} asks for {wanted:,}: with one patch token behind the blocks {list(blocks)} "
                f"{spent(_fused(teacher, blocks, 1), budget):,} are left. Ask for more, or name earlier blocks in "
                "`candidates`."
            )
        student = _fused(teacher, blocks, step)
    plan = plan_of(teacher, student, budget, blocks, blocks, token_keep_rates=dict.fromkeys(blocks, step / STEPS))
    return Outcome(student, plan)


register(
    Method(
        name="evit",
        config=EViT,
        title="tokens that the class token attends to least fused into one, in three blocks; no weight changed",
        source="EViT, arXiv 2202.07800",
        families=("vit",),
        compress=evit,
        metrics=("macs",),
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
