"""Step 1: from a budget to the structure that meets it (how many blocks, how many hidden units).

Source: DC-ViT (arXiv 2403.18708). With o the cost of the original, p the target, a the cost of one attention and m of
one MLP:

    k   = ceil((o − p) / (a + m))          blocks are compressed
    r_d from  o − p = k · (a + r_d · m)    the share of their hidden units that is dropped

The formulas hold for MACs, for parameters and for the bytes of parameters in a file. Numbers of hidden units are whole,
so the number kept is rounded down: a budget is never exceeded, and met to within one hidden unit per compressed block.
At r_d = 1 no hidden unit is left, and a compressed block adds a constant to its input. So every budget that dropping
whole blocks can meet is covered too.

The formulas assume blocks of one size that all lose their attention. If the structure is searched
(`dcvit.search.allocate`), a block may also keep its attention and lose only hidden units, and sizes may differ (Swin,
CNNs). The loss of a structure is known only from probes. A plan made before them shows that the budget can be met, not
with which structure.

Peak activation memory is not a sum over blocks, so a bisection over the number of hidden units finds the structure.
Latency is measured, see `dcvit.search.latency`.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn

from dcvit.budget import Budget
from dcvit.config import DCViT
from dcvit.costs import Cost
from dcvit.errors import BudgetError
from dcvit.history import BlockSpec, Plan, SensitivityCurve
from dcvit.metrics.cost import spent
from dcvit.models import require_supported
from dcvit.models.surgery import pruned_skeleton
from dcvit.search.allocate import search_structure
from dcvit.search.space import SearchSpace, search_space, searched

__all__ = [
    "plan",
    "search",
]


def plan(model: nn.Module, budget: Budget, config: DCViT | None = None) -> Plan:
    """Find k and r_d for a budget. This takes little time, since the model does not run.

    Args:
        model: The original model.
        budget: Bound on the cost of the compressed model; for latency, see `dcvit.search.latency.plan_latency`.
        config: The method's config, whose `candidates`, `num_blocks` and `round_to` bound the choice.

    Returns:
        The plan. The blocks are not chosen yet.

    Raises:
        UnsupportedModelError: If no adapter handles the model.
        BudgetError: If the target cannot be met (the message says what can), or the budget is of latency.
    """
    config = config or DCViT()
    if budget.measured:
        raise BudgetError(
            f"{budget.metric}={budget.value!r}: latency has to be measured, call "
            "dcvit.search.latency.plan_latency(model, budget)."
        )
    model = require_supported(model).model
    space = search_space(model, config)
    if budget.metric == "activation_memory":
        return _plan_activation_memory(model, budget, space)
    if not space.equal:
        return _plan_searched(model, budget, space, config)
    block = space.block
    amount, original = _additive_cost(model, budget), spent(model, budget)
    target = budget.target_of(original)
    attention, unit = amount(block.attention), amount(block.hidden_unit)

    def reachable(k: int) -> tuple[int, int]:
        """Return the smallest and the largest target that k blocks can meet."""
        return original - k * (attention + block.hidden_features * unit), original - k * attention

    excess = original - target
    too_few: tuple[int, int] | None = None
    for k in space.counts:
        lowest, highest = reachable(k)
        if not lowest <= target <= highest:
            continue
        dropped = -(-(excess - k * attention) // (k * unit))  # rounded up: the budget is an upper bound
        kept = block.hidden_features - dropped
        if rounded := kept - kept % config.round_to:
            return space.plan(budget, target, space.alike(k, rounded))
        if not kept:  # the budget requires it
            return space.plan(budget, target, space.alike(k, 0))
        too_few = too_few or (k, kept)
    if space.prunable:
        return _plan_searched(model, budget, space, config)
    if too_few is not None:
        k, kept = too_few
        raise BudgetError(
            f"round_to={config.round_to}: {budget.metric}={budget.value!r} leaves each of {k} blocks {kept} hidden "
            "units, fewer than one multiple. Pass a smaller round_to, or allow more blocks."
        )
    raise BudgetError(_out_of_range(budget, original, target, [reachable(k) for k in space.counts], space))


def search(
    model: nn.Module,
    planned: Plan,
    compressed: Mapping[int, SensitivityCurve],
    pruned: Mapping[int, SensitivityCurve],
    config: DCViT,
) -> tuple[Plan, dict[int, BlockSpec]]:
    """Find the structure with the smallest metric loss that meets a plan's budget.

    Args:
        model: The original model.
        planned: The result of `plan`, with a budget of one of `ADDITIVE`.
        compressed: Sensitivity curve of each candidate without its attention.
        pruned: Sensitivity curve of each block with its attention.
        config: The method's config. `num_blocks` fixes the number of blocks, `round_to` the granularity of units.

    Returns:
        The plan, and the specs of the compressed and pruned blocks, best first.
    """
    space = search_space(model, config)
    amount = _additive_cost(model, planned.budget)
    saving = math.ceil(spent(model, planned.budget) - planned.target)
    parts = space.parts(amount, compressed, pruned)
    specs = search_structure(parts, saving, num_blocks=config.num_blocks, round_to=config.round_to)
    return replace(planned, **space.fields(specs)), specs


def _plan_searched(model: nn.Module, budget: Budget, space: SearchSpace, config: DCViT) -> Plan:
    """Return a plan with a structure that meets the budget, as if all blocks were equally sensitive."""
    amount, original = _additive_cost(model, budget), spent(model, budget)
    target = budget.target_of(original)
    if not searched(config):
        _ = space.block  # raises with advice if blocks differ in size
    parts = space.uniform_parts(amount)
    least, most = space.savings(amount)
    lowest, highest = original - most, original - least
    if lowest <= target <= highest:
        try:
            specs = search_structure(parts, original - target, num_blocks=config.num_blocks, round_to=config.round_to)
        except ValueError as error:
            raise BudgetError(
                f"num_blocks={config.num_blocks}: {budget.metric}={budget.value!r} cannot be met by that many of the "
                f"candidates {list(space.candidates)}. Omit num_blocks, or pass another number."
            ) from error
        return space.plan(budget, target, specs)
    raise BudgetError(_out_of_range(budget, original, target, [(lowest, highest)], space))


def _additive_cost(model: nn.Module, budget: Budget) -> Callable[[Cost], int]:
    """Return a function that gives the cost of a part in a budget's metric.

    The header of a file is assumed to be as long as the original's. A compressed model has fewer tensors, so its file
    is smaller than assumed by some hundred bytes per block.
    """
    if budget.metric != "file_size":
        return budget.amount
    size = next(model.parameters()).element_size()
    return lambda part: size * part.params


def _plan_activation_memory(model: nn.Module, budget: Budget, space: SearchSpace) -> Plan:
    """Plan the most hidden units whose peak activation memory does not exceed the target.

    Blocks run one after another, so the peak is that of the largest block. It falls only if every block is compressed.
    """
    k = space.counts[-1]

    def peak(kept: int) -> int:
        return spent(pruned_skeleton(model, dict.fromkeys(space.candidates[:k], kept)), budget)

    original = spent(model, budget)
    target = budget.target_of(original)
    lowest = peak(0)
    if not lowest <= target < original:
        asked = (
            f"{budget.metric}={budget.value!r} asks for {target:,} of {original:,} bytes at batch {budget.batch_size}"
        )
        whole = sum(block.compressible for block in space.cost.blocks) - k
        if lowest == original and whole:
            raise BudgetError(
                f"{asked}, but the peak is that of one block, and {whole} blocks stay uncompressed, so no choice of "
                f"hidden units lowers it: {original:,} is all that {k} compressed blocks can meet."
                + space.more_blocks("lower it by removing all attention")
            )
        raise BudgetError(f"{asked}; {k} compressed blocks can meet {lowest:,} to {original - 1:,}.")
    kept = space.widths[bisect_right(space.widths, target, key=peak) - 1]
    return space.plan(budget, target, space.alike(k, kept))


def _out_of_range(
    budget: Budget,
    original: int,
    target: int,
    ranges: list[tuple[int, int]],
    space: SearchSpace,
) -> str:
    """Return an error message with the targets that can be met, and how to get closer to the requested one."""
    merged: list[list[int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1][1] = max(high, merged[-1][1])
        else:
            merged.append([low, high])

    def fraction(value: int) -> str:
        return f"{value / original:.4f}"

    spans = " or ".join(f"{low:,} to {high:,} ({fraction(low)} to {fraction(high)})" for low, high in merged)
    hint = space.more_blocks() if target < merged[0][0] else ""
    if budget.value == target <= 100:
        hint = f" An int is an absolute number: for {target} % write {target / 100:g}."
    return (
        f"{budget.metric}={budget.value!r} asks for {target:,} of {original:,} ({fraction(target)}); "
        f"{len(space.candidates)} candidate blocks can meet {spans}.{hint}"
    )
