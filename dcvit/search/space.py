"""The structures that a config allows for a model, and their savings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dcvit.budget import ADDITIVE, Budget
from dcvit.config import DCViT, ReconstructionConfig
from dcvit.costs import BlockCost, Cost, ModelCost
from dcvit.errors import BudgetError
from dcvit.history import BlockSpec, Plan, SensitivityCurve
from dcvit.models import compressible, require_supported
from dcvit.search.allocate import Part, Way

__all__ = ["ATTENTION_LOSS_WEIGHT", "SearchSpace", "choose_candidates", "search_space", "searched"]

ATTENTION_LOSS_WEIGHT = 1.5
"""Weight of a block's loss without its attention, relative to its loss by pruning.

A probe compresses one block of an intact model. If other blocks are compressed too, information that only attention
provides is missed more than hidden units are. The probes' losses without this weight would therefore remove the
attention of too many blocks. Measured r of held-out images with weights 1, 1.5 and 2: the digits (mean of two few-shot
sets) at 50 % of the MACs 0.053, 0.048 and 0.048, at 40 % 0.097, 0.083 and 0.084; DINOv2 ViT-S at 50 % 0.290, 0.312 and
0.344. The photographs at 50 %, with 1.5 and 2: 0.025 and 0.026.
"""


def searched(config: DCViT) -> bool:
    """Return whether a config searches the structure; distillation has no sensitivity curves to guide a search."""
    return config.structure == "searched" and isinstance(config.recovery, ReconstructionConfig)


@dataclass(frozen=True)
class SearchSpace:
    """The structures that a config allows for a model: which k blocks are compressed, and how many hidden units remain.

    Attributes:
        cost: Cost of the original model.
        candidates: The blocks among which the k are chosen, from 0.
        groups: The candidates, grouped by which blocks are compressed together.
        prunable: The blocks that may keep their attention and lose only hidden units, grouped in the same way.
        counts: The allowed values of k.
        round_to: The number of hidden units kept is a multiple of it.
    """

    cost: ModelCost
    candidates: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    prunable: tuple[tuple[int, ...], ...]
    counts: Sequence[int]
    round_to: int

    @property
    def equal(self) -> bool:
        """Whether all candidates have one size and are compressed separately."""
        first = self.cost.blocks[self.candidates[0]]
        return len(self.groups) == len(self.candidates) and all(self.cost.blocks[i] == first for i in self.candidates)

    @property
    def block(self) -> BlockCost:
        """The cost of one candidate block.

        Raises:
            BudgetError: If they differ in size.
        """
        if not self.equal:
            separate = len(self.groups) == len(self.candidates)
            raise BudgetError(
                f"candidates={list(self.candidates)}: the blocks differ in size or are compressed in pairs, so no "
                f"single drop ratio fits them all. Ask for one of {', '.join(ADDITIVE)} with block reconstruction and "
                "a searched structure, DCViT(recovery=ReconstructionConfig(), structure='searched')"
                + (", or pass candidates of one size in DCViT(candidates=...)." if separate else ".")
            )
        return self.cost.blocks[self.candidates[0]]

    def parts(
        self,
        amount: Callable[[Cost], int],
        compressed: Mapping[int, SensitivityCurve],
        pruned: Mapping[int, SensitivityCurve],
    ) -> list[Part]:
        """Return the parts among which `search_structure` chooses.

        Args:
            amount: Function that returns the cost of a part in the budget's metric.
            compressed: Sensitivity curve of each candidate without its attention.
            pruned: Sensitivity curve with attention of the prunable blocks for which it is known.
        """
        found = []
        for group in sorted({*self.groups, *self.prunable}):
            of = self.cost.blocks[group[0]]
            ways = []
            for attention, curves in ((False, compressed), (True, pruned)):
                if attention and of.hidden_features <= self.round_to:
                    continue  # no smaller multiple of round_to is left
                if group in (self.prunable if attention else self.groups) and all(b in curves for b in group):
                    units = curves[group[0]].units
                    weight = 1.0 if attention else ATTENTION_LOSS_WEIGHT
                    losses = tuple(weight * sum(curves[b].loss(kept) for b in group) for kept in units)
                    saving = 0 if attention else len(group) * amount(of.attention)
                    unit = len(group) * amount(of.unit_cost(attention))
                    ways.append(Way(attention, saving, unit, SensitivityCurve(units, losses)))
            if ways:
                found.append(Part(group, tuple(ways)))
        return found

    def uniform_parts(self, amount: Callable[[Cost], int]) -> list[Part]:
        """Return the parts as if all blocks were equally sensitive."""
        blocks = enumerate(self.cost.blocks)
        alike = {block: SensitivityCurve((0, of.hidden_features), (1.0, 1.0)) for block, of in blocks}
        return self.parts(amount, alike, alike)

    def savings(self, amount: Callable[[Cost], int]) -> tuple[int, int]:
        """Return the smallest saving of a single part, and the largest saving of all parts together."""
        parts = self.uniform_parts(amount)
        # A pruned block can drop a single hidden unit, which saves next to nothing.
        least = min(1 if way.attention else way.saving for part in parts for way in part.ways)
        return least, sum(part.saving(part.smallest(self.round_to)) for part in parts)

    def cost_of(self, specs: Mapping[int, BlockSpec]) -> Cost:
        """Return the cost of a model in which some blocks are compressed or pruned."""
        total = self.cost.total
        for block, spec in specs.items():
            of = self.cost.blocks[block]
            total -= of.unit_cost(spec.attention) * (of.hidden_features - spec.hidden_features)
            total -= Cost() if spec.attention else of.attention
        return total

    def fields(self, specs: Mapping[int, BlockSpec]) -> dict[str, Any]:
        """Return the fields of a `Plan` that describe a structure."""
        left = sum(spec.hidden_features for spec in specs.values())
        hidden = sum(self.cost.blocks[block].hidden_features for block in specs)
        return {
            "num_blocks": len(specs),
            "hidden_features": left // len(specs),
            "drop_ratio": (hidden - left) / hidden,
            "cost": self.cost_of(specs),
            "pruned": tuple(sorted(block for block, spec in specs.items() if spec.attention)),
        }

    @property
    def widths(self) -> range:
        """The numbers of hidden units that a block may keep."""
        return range(0, self.block.hidden_features + 1, self.round_to)

    def plan(self, budget: Budget, target: int | float, specs: Mapping[int, BlockSpec], **fields: Any) -> Plan:
        """Return the plan of a structure that meets a budget."""
        return Plan(budget=budget, target=target, candidates=self.candidates, **self.fields(specs), **fields)

    def alike(self, k: int, kept: int) -> dict[int, BlockSpec]:
        """Return a structure that compresses k blocks to `kept` hidden units each; which blocks does not matter."""
        return dict.fromkeys(self.candidates[:k], BlockSpec(kept))

    def more_blocks(self, lower: str = "go lower") -> str:
        """Return a hint on how to allow more blocks, or an empty string if there are none."""
        available = tuple(i for i, block in enumerate(self.cost.blocks) if block.compressible)
        if len(available) <= len(self.candidates):
            return ""
        whole = len(available) == len(self.cost.blocks)
        named = f"tuple(range({len(available)}))" if whole else str(available)
        listed = ",".join(map(str, available))
        return f" Allow all {len(available)} blocks with DCViT(candidates={named}), --candidates {listed}, to {lower}."


def choose_candidates(
    model: nn.Module, requested: tuple[int, ...] | None, cost: ModelCost | None = None
) -> tuple[int, ...]:
    """Return the blocks that may be compressed.

    Args:
        model: The model.
        requested: The caller's choice. `None` takes all compressible blocks, without the first and the last in families
            that keep them (`ModelView.keeps_ends`).
        cost: Cost of the model, if it is already known.

    Raises:
        BudgetError: If a requested block does not exist or has nothing to remove, if a block is requested without the
            blocks that are compressed together with it, or if there is no block to compress.
    """
    view = compressible(model)
    cost, groups = cost or view.cost(), view.groups()
    depth = len(cost.blocks)
    if requested is None:
        inner = groups[1:-1] if view.keeps_ends and len(groups) > 2 else groups
        candidates = tuple(
            block for group in inner if all(cost.blocks[i].compressible for i in group) for block in group
        )
        if not candidates:
            considered = [block for group in inner for block in group]
            raise BudgetError(
                f"None of the blocks {considered} has {view.removed} left to remove: compress the original, to "
                "a smaller budget."
            )
        return candidates
    for block in requested:
        if not 0 <= block < depth:
            raise BudgetError(
                f"candidates={list(requested)}: block {block} does not exist, the model has 0 to {depth - 1}."
            )
        if not cost.blocks[block].compressible:
            raise BudgetError(
                f"candidates={list(requested)}: block {block} has no {view.removed} left to remove; leave it out."
            )
    for group in groups:
        present = [block for block in group if block in requested]
        if present and len(present) < len(group):
            raise BudgetError(
                f"candidates={list(requested)}: blocks {list(group)} are compressed together; pass all of them or none."
            )
    return requested


def search_space(model: nn.Module, config: DCViT) -> SearchSpace:
    """Return the structures that a config's `candidates`, `num_blocks` and `round_to` allow.

    Raises:
        UnsupportedModelError: If no adapter handles the model.
        BudgetError: If the settings do not fit the model.
    """
    view = require_supported(model)
    cost = view.cost()
    groups = view.groups()
    candidates = choose_candidates(view.model, config.candidates, cost)
    counts: Sequence[int] = range(1, len(candidates) + 1)
    if config.num_blocks is not None:
        if config.num_blocks > len(candidates):
            raise BudgetError(
                f"num_blocks={config.num_blocks}: there are only {len(candidates)} candidate blocks "
                f"({list(candidates)}). Ask for fewer, or allow more in DCViT(candidates=...)."
            )
        counts = (config.num_blocks,)
    fewest = min(cost.blocks[i].hidden_features for i in candidates)
    if config.round_to > fewest:
        raise BudgetError(f"round_to={config.round_to}: a block has only {fewest} hidden units; pass a smaller one.")
    chosen = tuple(group for group in groups if group[0] in candidates)
    prunable: tuple[tuple[int, ...], ...] = ()
    if searched(config) and config.num_blocks is None:
        prunable = tuple(
            group
            for group in (groups if config.candidates is None else chosen)
            if all(view.sublayers(block) is not None for block in group)
        )
    return SearchSpace(cost, candidates, chosen, prunable, counts, config.round_to)
