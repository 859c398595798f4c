"""Step 1: from a budget to the structure that meets it (how many blocks, how many hidden nodes).

Source: DC-ViT (arXiv 2403.18708), section 3.1; METHOD step 1. With o the cost of the original, p the target, a the
cost of one attention and m of one MLP:

    k   = ceil((o − p) / (a + m))          blocks are compressed
    r_d from  o − p = k · (a + r_d · m)    the share of their hidden nodes that is dropped

The formulas hold for MACs and for parameters alike. Hidden nodes are whole, so the number kept is rounded down: a
budget is an upper bound, met to within one hidden node per compressed block. At r_d = 1 none is left, and a compressed
block adds a constant to its input; so the budgets that dropping whole blocks can meet are met in the same way.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from dcvit.config import CompressionConfig
from dcvit.costs import MAC_CONVENTIONS, Cost, MacConvention, ModelCost
from dcvit.errors import BudgetError
from dcvit.models import require_supported
from dcvit.structure import Recoverability, search_structure

__all__ = ["Budget", "Plan", "plan", "search"]


@dataclass(frozen=True)
class Budget:
    """What the compressed model may cost: MACs per image or parameters, one of the two.

    Attributes:
        macs: A float in (0, 1) is a fraction of the original, an int an absolute number of MACs per image.
        params: Likewise for the number of parameters.
        convention: Which MACs count, see `dcvit.costs.MacConvention`.

    Raises:
        BudgetError: If neither or both are given, or a value is out of range.
    """

    macs: float | int | None = None
    params: float | int | None = None
    convention: MacConvention = "with_attention_products"

    def __post_init__(self) -> None:
        if (self.macs is None) == (self.params is None):
            raise BudgetError(
                f"Budget(macs={self.macs!r}, params={self.params!r}): expected exactly one of the two, "
                "for example Budget(macs=0.75) for three quarters of the original's MACs."
            )
        if self.convention not in MAC_CONVENTIONS:
            raise BudgetError(f"convention={self.convention!r}: expected one of {', '.join(MAC_CONVENTIONS)}.")
        value = self.value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BudgetError(f"{self.unit}={value!r}: expected a float (fraction) or an int (absolute number).")
        if isinstance(value, float) and not 0.0 < value < 1.0:
            raise BudgetError(
                f"{self.unit}={value!r}: a float is a fraction of the original and lies between 0 and 1, both "
                f"excluded. Pass an int for an absolute number of {self.unit}."
            )
        if isinstance(value, int) and value <= 0:
            raise BudgetError(f"{self.unit}={value!r}: an absolute number of {self.unit} must be positive.")

    @property
    def unit(self) -> str:
        """`"macs"` or `"params"`."""
        return "macs" if self.macs is not None else "params"

    @property
    def value(self) -> float | int:
        """The figure that was given."""
        value = self.macs if self.macs is not None else self.params
        assert value is not None
        return value

    def amount(self, cost: Cost) -> int:
        """How much of this budget's unit a part costs."""
        return cost.macs(self.convention) if self.unit == "macs" else cost.params

    def target(self, cost: Cost) -> int:
        """The absolute target for a model of this cost."""
        value = self.value
        return int(value * self.amount(cost)) if isinstance(value, float) else value


@dataclass(frozen=True)
class Plan:
    """The structure that meets a budget; `compress` fills in which blocks and nodes.

    Attributes:
        budget: The budget that is met.
        target: The budget as an absolute number, of MACs per image or parameters.
        num_blocks: k, how many blocks are compressed.
        hidden_features: Hidden nodes that each compressed block keeps; where they differ, their mean, rounded down.
        drop_ratio: r_d, the share of the compressed blocks' hidden nodes that is dropped.
        candidates: The blocks among which the k are chosen, from 0.
        cost: What the compressed model will cost.
        blocks: The chosen blocks in the order of compression, best first; empty until ranked.
        kept_nodes: For each chosen block, the indices of the hidden nodes kept, ascending.
    """

    budget: Budget
    target: int
    num_blocks: int
    hidden_features: int
    drop_ratio: float
    candidates: tuple[int, ...]
    cost: Cost
    blocks: tuple[int, ...] = ()
    kept_nodes: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values for JSON."""
        return {
            "budget": {self.budget.unit: self.budget.value, "convention": self.budget.convention},
            "target": self.target,
            "num_blocks": self.num_blocks,
            "hidden_features": self.hidden_features,
            "drop_ratio": self.drop_ratio,
            "candidates": list(self.candidates),
            "cost": {
                "weight_macs": self.cost.weight_macs,
                "attention_macs": self.cost.attention_macs,
                "params": self.cost.params,
            },
            "blocks": list(self.blocks),
            "kept_nodes": {str(block): list(nodes) for block, nodes in self.kept_nodes.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Plan":
        """The inverse of `to_dict`."""
        return cls(
            budget=Budget(**values["budget"]),
            target=values["target"],
            num_blocks=values["num_blocks"],
            hidden_features=values["hidden_features"],
            drop_ratio=values["drop_ratio"],
            candidates=tuple(values["candidates"]),
            cost=Cost(**values["cost"]),
            blocks=tuple(values["blocks"]),
            kept_nodes={int(block): tuple(nodes) for block, nodes in values["kept_nodes"].items()},
        )


def plan(model: nn.Module, budget: Budget, config: CompressionConfig | None = None) -> Plan:
    """Find k and r_d for a budget.

    Args:
        model: The original model.
        budget: What the compressed model may cost.
        config: Its `candidates` and `num_blocks` bound the choice.

    Returns:
        The plan, with the blocks not chosen yet.

    Raises:
        UnsupportedModelError: If no adapter handles the model.
        BudgetError: If the target cannot be met; the message says what can.
    """
    config = config or CompressionConfig()
    cost = require_supported(model).cost(model)
    candidates = choose_candidates(cost, config.candidates)
    block = cost.blocks[candidates[0]]
    if any(cost.blocks[i] != block for i in candidates):
        raise BudgetError(
            f"candidates={list(candidates)}: the blocks differ in size, so no one drop ratio fits them all. "
            "Pass candidates of one size in CompressionConfig(candidates=...)."
        )

    original, target = budget.amount(cost.total), budget.target(cost.total)
    attention, mlp, node = (budget.amount(c) for c in (block.attention, block.mlp, block.hidden_node))

    def reachable(k: int) -> tuple[int, int]:
        """The smallest and the largest target that k blocks can meet."""
        return original - k * (attention + block.hidden_features * node), original - k * attention

    excess = original - target
    counts: Iterable[int]
    if config.num_blocks is None:
        fewest = max(1, -(-excess // (attention + mlp)))
        counts = range(fewest, len(candidates) + 1)
    elif config.num_blocks <= len(candidates):
        counts = (config.num_blocks,)
    else:
        raise BudgetError(
            f"num_blocks={config.num_blocks}: there are only {len(candidates)} candidate blocks "
            f"({list(candidates)}). Ask for fewer, or allow more in CompressionConfig(candidates=...)."
        )
    for k in counts:
        lowest, highest = reachable(k)
        if lowest <= target <= highest:
            break
    else:
        allowed = range(1, len(candidates) + 1) if config.num_blocks is None else (config.num_blocks,)
        raise BudgetError(_out_of_range(budget, original, target, [reachable(k) for k in allowed], candidates, cost))

    dropped = -(-(excess - k * attention) // (k * node))  # rounded up: the budget is an upper bound
    kept = block.hidden_features - dropped
    student = cost.total - (block.attention + block.hidden_node * dropped) * k
    return Plan(
        budget=budget,
        target=target,
        num_blocks=k,
        hidden_features=kept,
        drop_ratio=dropped / block.hidden_features,
        candidates=candidates,
        cost=student,
    )


def search(
    model: nn.Module, fewest: Plan, profiles: Mapping[int, Recoverability], config: CompressionConfig
) -> tuple[Plan, dict[int, int]]:
    """The structure of least metric loss that meets a plan's budget: which blocks, and how many nodes each keeps.

    Args:
        model: The original model.
        fewest: What `plan` says for it.
        profiles: What each candidate would lose, by the nodes that it keeps.
        config: Its `num_blocks` fixes the number of blocks.

    Returns:
        The plan, and the hidden nodes that each compressed block keeps, by block, best first.
    """
    cost, budget = require_supported(model).cost(model), fewest.budget
    block = cost.blocks[fewest.candidates[0]]
    saving = budget.amount(cost.total) - fewest.target
    counts = range(fewest.num_blocks, (len(fewest.candidates) if config.num_blocks is None else fewest.num_blocks) + 1)
    kept = search_structure(profiles, saving, budget.amount(block.attention), budget.amount(block.hidden_node), counts)
    left = sum(kept.values())
    dropped = len(kept) * block.hidden_features - left
    found = replace(
        fewest,
        num_blocks=len(kept),
        hidden_features=left // len(kept),
        drop_ratio=dropped / (len(kept) * block.hidden_features),
        cost=cost.total - block.attention * len(kept) - block.hidden_node * dropped,
    )
    return found, kept


def choose_candidates(cost: ModelCost, wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    """The blocks that may be compressed: the caller's, or all that can but the first and the last.

    Raises:
        BudgetError: If a wanted block does not exist or has nothing to remove, or none is left.
    """
    depth = len(cost.blocks)
    if wanted is None:
        inner = range(1, depth - 1) if depth > 2 else range(depth)
        candidates = tuple(i for i in inner if cost.blocks[i].compressible)
        if not candidates:
            raise BudgetError(f"None of the blocks {list(inner)} has attention left to remove.")
        return candidates
    for block in wanted:
        if not 0 <= block < depth:
            raise BudgetError(
                f"candidates={list(wanted)}: block {block} does not exist, the model has 0 to {depth - 1}."
            )
        if not cost.blocks[block].compressible:
            raise BudgetError(f"candidates={list(wanted)}: block {block} has no attention left to remove.")
    return wanted


def _out_of_range(
    budget: Budget,
    original: int,
    target: int,
    ranges: list[tuple[int, int]],
    candidates: tuple[int, ...],
    cost: ModelCost,
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
    hint = ""
    more = sum(block.compressible for block in cost.blocks)
    if target < merged[0][0] and more > len(candidates):
        hint = (
            f" Allow all {more} blocks with CompressionConfig(candidates=tuple(range({len(cost.blocks)}))) to go lower."
        )
    return (
        f"{budget.unit}={budget.value!r} asks for {target:,} of {original:,} ({fraction(target)}); "
        f"{len(candidates)} candidate blocks can meet {spans}.{hint}"
    )
