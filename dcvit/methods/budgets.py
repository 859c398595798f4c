"""Search for the largest structure that meets a budget, by dropping whole blocks or pruning only MLPs.

The cost of a structure is read from a model that has it, not added up from its parts. The result therefore never
exceeds a budget whose cost the structure determines.
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
    """Return the budget of an original model as an absolute number.

    Raises:
        BudgetError: If the budget is not below the original's cost.
    """
    original = spent(model, budget)
    limit = budget.target_of(original)
    if limit >= original:
        raise BudgetError(f"{budget.metric}={budget.value!r}: the original has only {original:,}. Ask for less.")
    return limit


def plan_of(
    teacher: nn.Module,
    student: nn.Module,
    budget: Budget,
    blocks: Sequence[int],
    candidates: Sequence[int],
    **more: Any,
) -> Plan:
    """Return the plan that a student follows, as its structure shows.

    Args:
        teacher: The original.
        student: The smaller model. Its blocks have the same numbers as the teacher's.
        budget: The budget that the student meets.
        blocks: The blocks that differ from the original's, at least one.
        candidates: The blocks that were allowed to change.
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


def candidate_groups(model: nn.Module, candidates: tuple[int, ...] | None) -> list[tuple[int, ...]]:
    """Return the blocks that may be dropped, in groups: single blocks of a ViT, shifted pairs of a Swin.

    Args:
        model: The original.
        candidates: The caller's candidates. With `None`, `dcvit.search.space.choose_candidates` chooses them.

    Raises:
        BudgetError: See `dcvit.search.space.choose_candidates`.
    """
    allowed = choose_candidates(model, candidates)
    return [group for group in compressible(model).groups() if group[0] in allowed]


def require_blocks(model: nn.Module, candidates: Sequence[int]) -> None:
    """Refuse candidates that are not blocks of the model.

    Raises:
        BudgetError: If a candidate does not exist.
    """
    depth = compressible(model).num_blocks()
    if not set(candidates) <= set(range(depth)):
        raise BudgetError(f"candidates={list(candidates)}: the model's blocks are 0 to {depth - 1}.")


def flat(groups: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the blocks of all groups, in the groups' order."""
    return tuple(block for group in groups for block in group)


def fewest_blocks(
    model: nn.Module, budget: Budget, choose: Callable[[int], Sequence[tuple[int, ...]]], most: int
) -> tuple[int, ...]:
    """Return the fewest whole blocks that must be dropped to meet a budget.

    Args:
        model: The original.
        budget: What the smaller model may cost.
        choose: Returns the groups of blocks to drop, for a number of groups.
        most: The largest number of groups that may be dropped.

    Raises:
        BudgetError: If the budget cannot be met.
    """
    limit = target(model, budget)
    left = spent(model, budget)
    blocks: tuple[int, ...] = ()
    for count in range(1, most + 1):
        blocks = flat(choose(count))
        smaller = copy_blocks(model, ())
        for block in blocks:
            compressible(smaller).drop_block(block)
        left = spent(smaller, budget)
        if left <= limit:
            return blocks
    raise BudgetError(
        f"{budget.metric}={budget.value!r} asks for {limit:,}: without all {len(blocks)} blocks that may be dropped "
        f"{left:,} are left. Ask for more, or allow more blocks in `candidates`."
    )


def widest_mlps(model: nn.Module, budget: Budget, candidates: Sequence[int], round_to: int) -> dict[int, int]:
    """Return the number of hidden units that each block keeps, the same share in all, so that a model meets a budget.

    Args:
        model: The original.
        budget: What the smaller model may cost.
        candidates: The blocks that lose hidden units.
        round_to: A block keeps a multiple of this many hidden units, or all of them.

    Raises:
        BudgetError: If even `round_to` hidden units per block exceed the budget.
    """
    view, limit = compressible(model), target(model, budget)
    hidden = {block: view.hidden_features(block) for block in candidates}
    widest = max(hidden.values())

    def kept(step: int) -> dict[int, int]:
        shares = {block: units * step // widest for block, units in hidden.items()}
        return {block: min(hidden[block], max(round_to, n - n % round_to)) for block, n in shares.items()}

    def cost(step: int) -> int:
        return spent(_pruned(model, kept(step)), budget)

    step = bisect_right(range(1, widest), limit, key=cost)
    if not step:
        raise BudgetError(
            f"{budget.metric}={budget.value!r} asks for {limit:,}: with {round_to} hidden "
            f"{'unit' if round_to == 1 else 'units'} in each of {len(hidden)} blocks {cost(1):,} are left. Ask for "
            "more; this method keeps everything else."
        )
    return kept(step)


def _pruned(model: nn.Module, kept: Mapping[int, int]) -> nn.Module:
    """Return a copy in which each block keeps the given number of hidden units; only its cost matters."""
    smaller = copy_blocks(model, ())
    for block, units in kept.items():
        compressible(smaller).prune_block(block, range(units))
    return smaller
