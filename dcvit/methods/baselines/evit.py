"""EViT: after some attentions, keep the tokens that the class token attends to most and fuse the rest into one.

Source: Liang, Ge, Tong, Song, Wang and Xie, "Not All Patches Are What You Need: Expediting Vision Transformers via
Token Reorganizations" (ICLR 2022, arXiv 2202.07800). Three blocks keep a share of the patch tokens: those with the most
attention from the class token, averaged over the heads. The others become one token, their sum weighted by that
attention.

Choices and differences of this implementation:

- The three blocks are those at a quarter, half and three quarters of the depth, the paper's 4th, 7th and 10th of 12.
- The weights of the fused token are divided by their sum, so it is a mean and has the size of a token. The paper trains
  with the sum, which a pretrained model has not seen.
- No weight changes, so no images are needed. The share is the largest that meets the budget, to a thousandth. It saves
  only MACs, not parameters.
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
"""Shares of tokens are multiples of 1 / `STEPS`."""


@dataclass(frozen=True)
class EViT(MethodConfig):
    """Settings of EViT (arXiv 2202.07800): fuse the tokens that the class token attends to least; change no weight.

    Attributes:
        candidates: The blocks that fuse tokens, from 0; `None` is `fusing_blocks`.
        seed: See `MethodConfig`. Nothing is drawn at random, so it has no effect.
        impl: See `MethodConfig`.
        batch_size: Images per forward pass when the result is compared with the original. It changes speed and memory,
            and the figures only by rounding.
    """

    batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise DcvitError(f"batch_size={self.batch_size!r}: expected 1 or more.")

    @property
    def micro_batch_size(self) -> int:
        """Images per forward pass."""
        return self.batch_size

    def with_micro_batch_at_most(self, count: int) -> "EViT":
        """Return the same config with a micro-batch of at most `count` images."""
        return replace(self, batch_size=min(count, self.batch_size))


def evit(task: Task[EViT]) -> Outcome:
    """Keep the tokens with the most attention from the class token, and fuse the rest.

    Args:
        task: The model, the budget and the settings.

    Raises:
        BudgetError: If the budget cannot be met, or a candidate does not exist.
        UnsupportedModelError: If the model has no class token.
    """
    teacher, budget = task.teacher, task.budget
    limit = target(teacher, budget)
    blocks = task.config.candidates or fusing_blocks(compressible(teacher).num_blocks())
    require_blocks(teacher, blocks)
    with task.context.timer("compression"):
        step = bisect_right(range(1, STEPS), limit, key=lambda step: spent(_fused(teacher, blocks, step), budget))
        if not step:
            raise BudgetError(
                f"macs={budget.value!r} asks for {limit:,}: with one patch token behind the blocks {list(blocks)} "
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
    """Return the blocks at a quarter, half and three quarters of a depth."""
    return tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))


def _fused(model: nn.Module, blocks: Sequence[int], step: int) -> nn.Module:
    """Return a copy that keeps `step` thousandths of the tokens. Its weights are the model's own tensors."""
    student = copy_blocks(model, ())
    for block in blocks:
        fuse_tokens(student, block, step / STEPS)
    return student
