"""Which structures a config allows of a model, and what each of them saves."""

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

__all__ = ["LOST_ATTENTION", "SearchSpace", "choose_candidates", "search_space", "searched"]

LOST_ATTENTION = 1.5
"""What a block loses with its attention counts so many times what it loses by pruning.

A probe cuts one block of an intact model. Where others are cut as well, what only attention could have told is missed
more than units are, so the losses of probes alone let too many blocks lose their attention. Measured on held-out
images, r with 1, 1.5 and 2: the digits (mean of two few-shot sets) at 50 % of the MACs 0.053, 0.048 and 0.048, at 40 %
0.097, 0.083 and 0.084; DINOv2 ViT-S at 50 % 0.290, 0.312 and 0.344. The photographs at 50 %, with 1.5 and 2: 0.025 and
0.026.
"""


def searched(config: DCViT) -> bool:
    """Whether a config leaves the structure to a search; distillation has no probes that could guide it."""
    return config.structure == "searched" and isinstance(config.recovery, ReconstructionConfig)


@dataclass(frozen=True)
class SearchSpace:
    """The structures that a config allows of a model: k of some blocks, and how many hidden units they keep.

    Attributes:
        cost: Of the original.
        candidates: The blocks among which the k are chosen, from 0.
        groups: The candidates, those together that are compressed together.
        prunable: Likewise the blocks that may keep their attention and lose hidden units only.
        counts: The k allowed.
        round_to: Kept units are a multiple of it.
    """

    cost: ModelCost
    candidates: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    prunable: tuple[tuple[int, ...], ...]
    counts: Sequence[int]
    round_to: int

    @property
    def equal(self) -> bool:
        """Whether every candidate is of one size and compressed for itself."""
        first = self.cost.blocks[self.candidates[0]]
        return len(self.groups) == len(self.candidates) and all(self.cost.blocks[i] == first for i in self.candidates)

    @property
    def block(self) -> BlockCost:
        """The cost of one candidate block.

        Raises:
            BudgetError: If they differ in size.
        """
        if not self.equal:
            alone = len(self.groups) == len(self.candidates)
            raise BudgetError(
                f"candidates={list(self.candidates)}: the blocks differ in size or go in pairs, so no one drop ratio "
                f"fits them all. Ask for one of {', '.join(ADDITIVE)} with block reconstruction and a searched "
                "structure, DCViT(recovery=ReconstructionConfig(), structure='searched')"
                + (", or pass candidates of one size in DCViT(candidates=...)." if alone else ".")
            )
        return self.cost.blocks[self.candidates[0]]

    def parts(
        self,
        amount: Callable[[Cost], int],
        compressed: Mapping[int, SensitivityCurve],
        pruned: Mapping[int, SensitivityCurve],
    ) -> list[Part]:
        """What can be cut on its own, for `search_structure`.

        Args:
            amount: What a part takes of the budget's unit.
            compressed: What each candidate would lose without its attention.
            pruned: What each block would lose with it, of those that may be pruned and of which it is known.
        """
        found = []
        for group in sorted({*self.groups, *self.prunable}):
            of = self.cost.blocks[group[0]]
            ways = []
            for attention, profiles in ((False, compressed), (True, pruned)):
                if attention and of.hidden_features <= self.round_to:
                    continue  # nothing less would be a multiple
                if group in (self.prunable if attention else self.groups) and all(b in profiles for b in group):
                    units = profiles[group[0]].units
                    weight = 1.0 if attention else LOST_ATTENTION
                    losses = tuple(weight * sum(profiles[b].loss(kept) for b in group) for kept in units)
                    saving = 0 if attention else len(group) * amount(of.attention)
                    unit = len(group) * amount(of.unit(attention))
                    ways.append(Way(attention, saving, unit, SensitivityCurve(units, losses)))
            if ways:
                found.append(Part(group, tuple(ways)))
        return found

    def parts_alike(self, amount: Callable[[Cost], int]) -> list[Part]:
        """The same, were all blocks alike to lose."""
        blocks = enumerate(self.cost.blocks)
        alike = {block: SensitivityCurve((0, of.hidden_features), (1.0, 1.0)) for block, of in blocks}
        return self.parts(amount, alike, alike)

    def savings(self, amount: Callable[[Cost], int]) -> tuple[int, int]:
        """The least that a cut of one part can save, and the most that cuts of all can."""
        parts = self.parts_alike(amount)
        # A block that is pruned can save as little as one hidden unit, which is as good as nothing.
        least = min(1 if way.attention else way.saving for part in parts for way in part.ways)
        return least, sum(part.saving(part.smallest(self.round_to)) for part in parts)

    def cost_of(self, specs: Mapping[int, BlockSpec]) -> Cost:
        """What a model costs of which some blocks are cut."""
        total = self.cost.total
        for block, spec in specs.items():
            of = self.cost.blocks[block]
            total -= of.unit(spec.attention) * (of.hidden_features - spec.hidden_features)
            total -= Cost() if spec.attention else of.attention
        return total

    def fields(self, specs: Mapping[int, BlockSpec]) -> dict[str, Any]:
        """What a `Plan` says of a structure."""
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
        """The hidden units that a block may keep."""
        return range(0, self.block.hidden_features + 1, self.round_to)

    def plan(self, budget: Budget, target: int | float, specs: Mapping[int, BlockSpec], **fields: Any) -> Plan:
        """The plan of a structure that meets a budget."""
        return Plan(budget=budget, target=target, candidates=self.candidates, **self.fields(specs), **fields)

    def alike(self, k: int, kept: int) -> dict[int, BlockSpec]:
        """The structure that compresses k blocks to `kept` hidden units each; which blocks does not matter."""
        return dict.fromkeys(self.candidates[:k], BlockSpec(kept))

    def more_blocks(self, lower: str = "go lower") -> str:
        """How to allow more blocks, if there are any."""
        all_of_them = tuple(i for i, block in enumerate(self.cost.blocks) if block.compressible)
        if len(all_of_them) <= len(self.candidates):
            return ""
        whole = len(all_of_them) == len(self.cost.blocks)
        named = f"tuple(range({len(all_of_them)}))" if whole else str(all_of_them)
        listed = ",".join(map(str, all_of_them))
        return (
            f" Allow all {len(all_of_them)} blocks with DCViT(candidates={named}), --candidates {listed}, to {lower}."
        )


def choose_candidates(
    model: nn.Module, wanted: tuple[int, ...] | None, cost: ModelCost | None = None
) -> tuple[int, ...]:
    """The blocks that may be compressed: the caller's, or all that can, without the ends where the family keeps them.

    Args:
        model: The model.
        wanted: The caller's.
        cost: The model's, where it is known.

    Raises:
        BudgetError: If a wanted block does not exist or has nothing to remove, one is wanted without those that go with
            it, or none is left.
    """
    view = compressible(model)
    cost, groups = cost or view.cost(), view.groups()
    depth = len(cost.blocks)
    if wanted is None:
        inner = groups[1:-1] if view.keeps_ends and len(groups) > 2 else groups
        candidates = tuple(
            block for group in inner if all(cost.blocks[i].compressible for i in group) for block in group
        )
        if not candidates:
            looked_at = [block for group in inner for block in group]
            raise BudgetError(
                f"None of the blocks {looked_at} has {view.removed} left to remove: compress the original, to "
                "a smaller budget."
            )
        return candidates
    for block in wanted:
        if not 0 <= block < depth:
            raise BudgetError(
                f"candidates={list(wanted)}: block {block} does not exist, the model has 0 to {depth - 1}."
            )
        if not cost.blocks[block].compressible:
            raise BudgetError(
                f"candidates={list(wanted)}: block {block} has no {view.removed} left to remove; leave it out."
            )
    for group in groups:
        present = [block for block in group if block in wanted]
        if present and len(present) < len(group):
            raise BudgetError(
                f"candidates={list(wanted)}: blocks {list(group)} are compressed together; pass all of them or none."
            )
    return wanted


def search_space(model: nn.Module, config: DCViT) -> SearchSpace:
    """What a config's `candidates`, `num_blocks` and `round_to` allow.

    Raises:
        UnsupportedModelError: If no adapter handles the model.
        BudgetError: If they do not fit the model.
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
