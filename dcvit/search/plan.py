"""Step 1: from a budget to the structure that meets it (how many blocks, how many hidden units).

Source: DC-ViT (arXiv 2403.18708). With o the cost of the original, p the target, a the cost of one attention and m of
one MLP:

    k   = ceil((o − p) / (a + m))          blocks are compressed
    r_d from  o − p = k · (a + r_d · m)    the share of their hidden units that is dropped

The formulas hold for MACs, for parameters and for the bytes that parameters take in a file. Hidden units are whole, so
the number kept is rounded down: a budget is an upper bound, met to within one hidden unit per compressed block. At
r_d = 1 none is left, and a compressed block adds a constant to its input; so the budgets that dropping whole blocks can
meet are met in the same way.

They presume blocks of one size, and that each loses its attention. Where the structure is searched
(`dcvit.search.allocate`) a block may also keep its attention and lose hidden units only, and sizes may differ (Swin,
CNNs). What a structure loses only probes tell, so a plan made before them shows that the budget can be met, not how it
will be.

The peak of activation memory is no sum over blocks, so there the structure is searched. Latency is measured, see
`dcvit.search.latency`.
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
    """Find k and r_d for a budget. Nothing is computed with the model, so it is quick.

    Args:
        model: The original model.
        budget: What the compressed model may cost; of latency, see `dcvit.search.latency.plan_latency`.
        config: Its `candidates`, `num_blocks` and `round_to` bound the choice.

    Returns:
        The plan, with the blocks not chosen yet.

    Raises:
        UnsupportedModelError: If no adapter handles the model.
        BudgetError: If the target cannot be met; the message says what can. If the budget is of latency.
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
    amount, original = _linear_unit(model, budget), spent(model, budget)
    target = budget.target_of(original)
    attention, unit = amount(block.attention), amount(block.hidden_unit)

    def reachable(k: int) -> tuple[int, int]:
        """The smallest and the largest target that k blocks can meet."""
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
        if not kept:  # the budget asks for that
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
    """The structure of least metric loss that meets a plan's budget: which blocks are cut, and what each keeps.

    Args:
        model: The original model.
        planned: What `plan` says for it; its budget is one of `ADDITIVE`.
        compressed: What each candidate would lose without its attention, by the units that it keeps.
        pruned: What each block would lose with its attention.
        config: Its `num_blocks` fixes the number of blocks, its `round_to` the numbers of units.

    Returns:
        The plan, and what each block that is cut keeps, best first.
    """
    space = search_space(model, config)
    amount = _linear_unit(model, planned.budget)
    saving = math.ceil(spent(model, planned.budget) - planned.target)
    parts = space.parts(amount, compressed, pruned)
    specs = search_structure(parts, saving, num_blocks=config.num_blocks, round_to=config.round_to)
    return replace(planned, **space.fields(specs)), specs


def _plan_searched(model: nn.Module, budget: Budget, space: SearchSpace, config: DCViT) -> Plan:
    """A structure that meets the budget, were all blocks alike to lose."""
    amount, original = _linear_unit(model, budget), spent(model, budget)
    target = budget.target_of(original)
    if not searched(config):
        _ = space.block  # says what to do
    parts = space.parts_alike(amount)
    least, most = space.savings(amount)
    lowest, highest = original - most, original - least
    if lowest <= target <= highest:
        try:
            specs = search_structure(parts, original - target, num_blocks=config.num_blocks, round_to=config.round_to)
        except ValueError as error:
            raise BudgetError(
                f"num_blocks={config.num_blocks}: {budget.metric}={budget.value!r} cannot be met by as many of the "
                f"candidates {list(space.candidates)}. Leave it out, or pass another number."
            ) from error
        return space.plan(budget, target, specs)
    raise BudgetError(_out_of_range(budget, original, target, [(lowest, highest)], space))


def _linear_unit(model: nn.Module, budget: Budget) -> Callable[[Cost], int]:
    """What a part takes of a budget's unit.

    A file has a header beyond its parts, taken to be as long as the original's: a compressed model names fewer tensors,
    so its file is smaller by some hundred bytes a block.
    """
    if budget.metric != "file_size":
        return budget.amount
    size = next(model.parameters()).element_size()
    return lambda part: size * part.params


def _plan_activation_memory(model: nn.Module, budget: Budget, space: SearchSpace) -> Plan:
    """The most hidden units with which no moment of a pass takes more than the target.

    Blocks run one after another, so the peak is that of the largest: it falls only if every block is compressed.
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
                f"{asked}, but the peak is that of one block, and {whole} blocks stay whole, so no choice of hidden "
                f"units lowers it: {original:,} is all that {k} compressed blocks can meet."
                + space.more_blocks("lower it, at the price of all attention")
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
    """Say which targets can be met, and how to get nearer to the one that cannot."""
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
