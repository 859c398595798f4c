"""The largest structure that meets a budget, where whole blocks go or MLPs alone are pruned.

What a structure costs is read off a model that has it, not calculated from its parts, so that every budget that a
structure decides is met exactly from below.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from dcvit.budget import Budget
from dcvit.errors import BudgetError
from dcvit.history import Plan
from dcvit.metrics.cost import spent
from dcvit.models import compressible
from dcvit.models.surgery import copy_blocks
from dcvit.search.space import choose_candidates

__all__ = ["candidate_groups", "fewest_blocks", "flat", "plan_of", "require_blocks", "target", "widest_mlps"]


def target(model: nn.Module, budget: Budget) -> int:
    """A budget as an absolute number, for an original.

    Raises:
        BudgetError: If the budget is not below the original.
    """
    original = spent(model, budget)
    wanted = budget.target_of(original)
    if wanted >= original:
        raise BudgetError(f"{budget.metric}={budget.value!r}: the original has only {original:,}. Ask for less.")
    return wanted


def plan_of(
    teacher: nn.Module,
    student: nn.Module,
    budget: Budget,
    blocks: Sequence[int],
    candidates: Sequence[int],
    **more: Any,
) -> Plan:
    """The plan that a student follows, read off it.

    Args:
        teacher: The original.
        student: The smaller model, in which blocks have the same numbers.
        budget: What it meets.
        blocks: Those that are not the original's, at least one.
        candidates: Those that might have been.
        more: Further fields of the plan.
    """
    compressible(teacher)
    left, hidden = (sum(compressible(model).hidden_features(block) for block in blocks) for model in (student, teacher))
    return Plan(
        budget=budget,
        target=target(teacher, budget),
        num_blocks=len(blocks),
        hidden_features=left // len(blocks),
        drop_ratio=(hidden - left) / hidden,
        candidates=tuple(candidates),
        cost=compressible(student).cost().total,
        blocks=tuple(blocks),
        **more,
    )


def candidate_groups(model: nn.Module, wanted: tuple[int, ...] | None) -> list[tuple[int, ...]]:
    """The blocks that may go, those together that go together: each alone in a ViT, shifted pairs in a Swin.

    Args:
        model: The original.
        wanted: The caller's candidates; see `dcvit.search.space.choose_candidates` where there are none.

    Raises:
        BudgetError: See `dcvit.search.space.choose_candidates`.
    """
    candidates = choose_candidates(model, wanted)
    return [group for group in compressible(model).groups() if group[0] in candidates]


def require_blocks(model: nn.Module, candidates: Sequence[int]) -> None:
    """Refuse candidates of which one is no block.

    Raises:
        BudgetError: If that is so.
    """
    depth = compressible(model).num_blocks()
    if not set(candidates) <= set(range(depth)):
        raise BudgetError(f"candidates={list(candidates)}: the model's blocks are 0 to {depth - 1}.")


def flat(groups: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """The blocks of some groups, in their order."""
    return tuple(block for group in groups for block in group)


def fewest_blocks(
    model: nn.Module, budget: Budget, choose: Callable[[int], Sequence[tuple[int, ...]]], most: int
) -> tuple[int, ...]:
    """The fewest whole blocks without which a model meets a budget.

    Args:
        model: The original.
        budget: What is left may cost so much.
        choose: Which groups of blocks go if so many go.
        most: How many groups may go.

    Raises:
        BudgetError: If it cannot be met.
    """
    wanted = target(model, budget)
    left = spent(model, budget)
    blocks: tuple[int, ...] = ()
    for count in range(1, most + 1):
        blocks = flat(choose(count))
        smaller = copy_blocks(model, ())
        for block in blocks:
            compressible(smaller).drop_block(block)
        left = spent(smaller, budget)
        if left <= wanted:
            return blocks
    raise BudgetError(
        f"{budget.metric}={budget.value!r} asks for {wanted:,}: without all {len(blocks)} blocks that may go {left:,} "
        "are left. Ask for more, or allow more blocks in `candidates`."
    )


def widest_mlps(model: nn.Module, budget: Budget, candidates: Sequence[int], round_to: int) -> dict[int, int]:
    """How many hidden units each block may keep, all the same share, so that a model meets a budget.

    Args:
        model: The original.
        budget: What is left may cost so much.
        candidates: The blocks that lose units.
        round_to: Kept units are a multiple of it, or all of a block's.

    Raises:
        BudgetError: If it cannot be met with one unit, or one multiple, a block.
    """
    view, wanted = compressible(model), target(model, budget)
    hidden = {block: view.hidden_features(block) for block in candidates}
    widest = max(hidden.values())

    def kept(step: int) -> dict[int, int]:
        shares = {block: units * step // widest for block, units in hidden.items()}
        return {block: min(hidden[block], max(round_to, n - n % round_to)) for block, n in shares.items()}

    def cost(step: int) -> int:
        return spent(_pruned(model, kept(step)), budget)

    step = bisect_right(range(1, widest), wanted, key=cost)
    if not step:
        raise BudgetError(
            f"{budget.metric}={budget.value!r} asks for {wanted:,}: with {round_to} hidden "
            f"{'unit' if round_to == 1 else 'units'} in each of {len(hidden)} blocks {cost(1):,} are left. Ask for "
            "more; this method keeps everything else."
        )
    return kept(step)


def _pruned(model: nn.Module, kept: Mapping[int, int]) -> nn.Module:
    """A model whose MLPs are so narrow, for what it costs."""
    smaller = copy_blocks(model, ())
    for block, units in kept.items():
        compressible(smaller).prune_block(block, range(units))
    return smaller
