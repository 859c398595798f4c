"""Step 1: from a budget to the structure that meets it (how many blocks, how many hidden nodes).

Source: DC-ViT (arXiv 2403.18708). With o the cost of the original, p the target, a the cost of one attention and m of
one MLP:

    k   = ceil((o − p) / (a + m))          blocks are compressed
    r_d from  o − p = k · (a + r_d · m)    the share of their hidden nodes that is dropped

The formulas hold for MACs, for parameters and for the bytes that parameters take in a file. Hidden nodes are whole, so
the number kept is rounded down: a budget is an upper bound, met to within one hidden node per compressed block. At
r_d = 1 none is left, and a compressed block adds a constant to its input; so the budgets that dropping whole blocks can
meet are met in the same way.

They presume blocks of one size, and that each loses its attention. Where the structure is searched (`dcvit.structure`)
a block may also keep its attention and lose hidden nodes only, and sizes may differ (Swin, CNNs). What a structure
loses only trials tell, so a plan made before them shows that the budget can be met, not how it will be.

The peak of activation memory is no sum over blocks, so there the structure is searched. Latency is measured, see
`dcvit.latency_planning`.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from dcvit.config import CompressionConfig, ReconstructionConfig, plain_numbers
from dcvit.costs import MAC_CONVENTIONS, BlockCost, Cost, MacConvention, ModelCost, file_size
from dcvit.errors import BudgetError
from dcvit.latency_model import PlannedLatency
from dcvit.memory import trace_activation_memory
from dcvit.models import adapter_for, require_supported
from dcvit.records import from_plain
from dcvit.structure import Cut, Part, Recoverability, Way, search_structure
from dcvit.surgery import unrecovered

__all__ = [
    "ADDITIVE",
    "UNITS",
    "Budget",
    "Plan",
    "SearchSpace",
    "choose_candidates",
    "plan",
    "search",
    "search_space",
    "searched",
]


UNITS = ("macs", "params", "file_size", "activation_memory", "latency", "latency_ms")
"""What a budget can be of; the names of `Budget`'s fields."""

ADDITIVE = ("macs", "params", "file_size")
"""Those of which every block and every hidden node takes its own part, whatever else is compressed."""

PER_BATCH = ("activation_memory", "latency", "latency_ms")
"""Those that depend on the batch size."""

LOST_ATTENTION = 1.5
"""What a block loses with its attention counts so many times what it loses by pruning.

A trial cuts one block of an intact model. Where others are cut as well, what only attention could have told is missed
more than nodes are, so the losses of trials alone let too many blocks lose their attention. Measured on held-out
images, r with 1, 1.5 and 2: the digits (mean of two few-shot sets) at 50 % of the MACs 0.053, 0.048 and 0.048, at 40 %
0.097, 0.083 and 0.084; DINOv2 ViT-S at 50 % 0.290, 0.312 and 0.344. The photographs at 50 %, with 1.5 and 2: 0.025 and
0.026.
"""


@dataclass(frozen=True)
class Budget:
    """What the compressed model may cost, in exactly one of these units.

    Attributes:
        macs: MACs per image. A float in (0, 1) is a fraction of the original, an int an absolute number.
        params: Number of parameters, likewise.
        file_size: Bytes of the saved weights (`model.safetensors`), likewise.
        activation_memory: Peak bytes of the activations of one inference pass over a batch, likewise; weights and the
            input are not counted, see `dcvit.memory`.
        latency: Time of one inference pass over a batch on the model's device, a fraction in (0, 1) of the original's.
            It is measured, and met to within 3 %, see `dcvit.latency_planning`.
        latency_ms: The same in milliseconds, an int or a float. The original is timed once to turn them into a
            fraction; from then on models are timed in turn, so that a change of the machine's load moves no goal.
        batch_size: Images a batch, for `activation_memory` and latency.
        convention: Which MACs count, see `dcvit.costs.MacConvention`.

    Raises:
        BudgetError: If none or several are given, or a value is out of range.
    """

    macs: float | int | None = None
    params: float | int | None = None
    convention: MacConvention = "with_attention_products"
    file_size: float | int | None = None
    activation_memory: float | int | None = None
    latency: float | None = None
    latency_ms: float | int | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        plain_numbers(self)
        given = {unit: getattr(self, unit) for unit in UNITS if getattr(self, unit) is not None}
        if len(given) != 1:
            shown = ", ".join(f"{unit}={value!r}" for unit, value in given.items())
            raise BudgetError(
                f"Budget({shown}): expected exactly one of {', '.join(UNITS)}, "
                "for example Budget(macs=0.75) for three quarters of the original's MACs."
            )
        if self.convention not in MAC_CONVENTIONS:
            raise BudgetError(f"convention={self.convention!r}: expected one of {', '.join(MAC_CONVENTIONS)}.")
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise BudgetError(f"batch_size={self.batch_size!r}: expected an int, 1 or more.")
        value, unit = self.value, self.unit
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BudgetError(f"{unit}={value!r}: expected a float (fraction) or an int (absolute number).")
        if unit == "latency_ms":
            if not 0 < value < math.inf:
                raise BudgetError(
                    f"latency_ms={value!r}: expected a positive number of milliseconds; "
                    "a fraction of the original goes into latency=."
                )
            return
        if isinstance(value, float) and not 0.0 < value < 1.0:
            raise BudgetError(
                f"{unit}={value!r}: a float is a fraction of the original and lies between 0 and 1, both "
                f"excluded. {self._absolute}"
            )
        if isinstance(value, int) and (unit == "latency" or value <= 0):
            wanted = (
                "expected a fraction of the original" if unit == "latency" else "an absolute number must be positive"
            )
            raise BudgetError(f"{unit}={value!r}: {wanted}. {self._absolute}")

    @property
    def unit(self) -> str:
        """The name of the field that is given, for example `"macs"`."""
        return next(unit for unit in UNITS if getattr(self, unit) is not None)

    @property
    def value(self) -> float | int:
        """The figure that was given."""
        value: float | int = getattr(self, self.unit)
        return value

    @property
    def measured(self) -> bool:
        """Whether it is of latency, which planning has to measure."""
        return self.unit in ("latency", "latency_ms")

    @property
    def _absolute(self) -> str:
        if self.unit == "latency":
            return "For milliseconds pass latency_ms=."
        return f"Pass an int for an absolute number of {self.unit}."

    def amount(self, cost: Cost) -> int:
        """How many MACs or parameters a part costs.

        Raises:
            BudgetError: If the budget is of something that a part's cost does not tell.
        """
        if self.unit not in ("macs", "params"):
            raise BudgetError(f"{self.unit}: a part's cost tells MACs and parameters only.")
        return cost.macs(self.convention) if self.unit == "macs" else cost.params

    def target(self, cost: Cost) -> int:
        """The absolute target for a model of this cost, of MACs or parameters."""
        return self.target_of(self.amount(cost))

    def target_of(self, original: int) -> int:
        """The absolute target where the original has `original` of this budget's unit."""
        value = self.value
        return int(value * original) if isinstance(value, float) else value

    def to_dict(self) -> dict[str, Any]:
        """The arguments that make this budget."""
        batch = {"batch_size": self.batch_size} if self.unit in PER_BATCH else {}
        return {self.unit: self.value, "convention": self.convention, **batch}


@dataclass(frozen=True)
class Plan:
    """The structure that meets a budget; `compress` fills in which blocks and nodes.

    Attributes:
        budget: The budget that is met.
        target: The budget as an absolute number: MACs per image, parameters, bytes or milliseconds.
        num_blocks: k, how many blocks are cut: compressed, or pruned.
        hidden_features: Hidden nodes that each of them keeps; where they differ, their mean, rounded down.
        drop_ratio: r_d, the share of their hidden nodes that is dropped.
        candidates: The blocks among which those without attention are chosen, from 0.
        cost: What the compressed model will cost.
        blocks: The chosen blocks in the order of compression, best first; empty until ranked.
        kept_nodes: For each chosen block, the indices of the hidden nodes kept, ascending.
        pruned: Those of `blocks` that keep their attention, or have a convolution for it, ascending.
        kept_heads: For each block that lost heads, those that its attention keeps, ascending.
        convolved: The blocks in which a convolution took the place of the attention, ascending.
        token_keep_rates: For each block behind whose attention tokens end, the share of the patch tokens that goes on.
        attention_of: For each block that shares the weights of its attention, the block that owns them, which may be
            itself.
        mlp_of: Likewise of its MLP.
        latency: What was measured to meet a latency budget; `None` for the others.
    """

    budget: Budget
    target: int | float
    num_blocks: int
    hidden_features: int
    drop_ratio: float
    candidates: tuple[int, ...]
    cost: Cost
    blocks: tuple[int, ...] = ()
    kept_nodes: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    pruned: tuple[int, ...] = ()
    kept_heads: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    convolved: tuple[int, ...] = ()
    token_keep_rates: Mapping[int, float] = field(default_factory=dict)
    attention_of: Mapping[int, int] = field(default_factory=dict)
    mlp_of: Mapping[int, int] = field(default_factory=dict)
    latency: PlannedLatency | None = None

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values for JSON."""
        return {
            "budget": self.budget.to_dict(),
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
            "pruned": list(self.pruned),
            "kept_heads": {str(block): list(heads) for block, heads in self.kept_heads.items()},
            "convolved": list(self.convolved),
            "token_keep_rates": {str(block): rate for block, rate in self.token_keep_rates.items()},
            "attention_of": {str(block): owner for block, owner in self.attention_of.items()},
            "mlp_of": {str(block): owner for block, owner in self.mlp_of.items()},
            "latency": None if self.latency is None else self.latency.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Plan":
        """The inverse of `to_dict`.

        Raises:
            TypeError: If a value is missing or of another type.
            BudgetError: If the budget is none.
        """
        return from_plain(cls, values)


def plan(model: nn.Module, budget: Budget, config: CompressionConfig | None = None) -> Plan:
    """Find k and r_d for a budget. Nothing is computed with the model, so it is quick.

    Args:
        model: The original model.
        budget: What the compressed model may cost; of latency, see `dcvit.latency_planning.plan_latency`.
        config: Its `candidates`, `num_blocks` and `round_to` bound the choice.

    Returns:
        The plan, with the blocks not chosen yet.

    Raises:
        UnsupportedModelError: If no adapter handles the model.
        BudgetError: If the target cannot be met; the message says what can. If the budget is of latency.
    """
    config = config or CompressionConfig()
    if budget.measured:
        raise BudgetError(
            f"{budget.unit}={budget.value!r}: latency has to be measured, call dcvit.plan_latency(model, budget)."
        )
    space = search_space(model, config)
    if budget.unit == "activation_memory":
        return _plan_activation_memory(model, budget, space)
    if not space.equal:
        return _plan_searched(model, budget, space, config)
    block = space.block
    amount, beyond = _linear_unit(model, budget, space.cost)
    original = amount(space.cost.total) + beyond
    target = budget.target_of(original)
    attention, node = amount(block.attention), amount(block.hidden_node)

    def reachable(k: int) -> tuple[int, int]:
        """The smallest and the largest target that k blocks can meet."""
        return original - k * (attention + block.hidden_features * node), original - k * attention

    excess = original - target
    too_few: tuple[int, int] | None = None
    for k in space.counts:
        lowest, highest = reachable(k)
        if not lowest <= target <= highest:
            continue
        dropped = -(-(excess - k * attention) // (k * node))  # rounded up: the budget is an upper bound
        kept = block.hidden_features - dropped
        if rounded := kept - kept % config.round_to:
            return space.plan(budget, target, k, rounded)
        if not kept:  # the budget asks for that
            return space.plan(budget, target, k, 0)
        too_few = too_few or (k, kept)
    if space.prunable:
        return _plan_searched(model, budget, space, config)
    if too_few is not None:
        k, kept = too_few
        raise BudgetError(
            f"round_to={config.round_to}: {budget.unit}={budget.value!r} leaves each of {k} blocks {kept} hidden "
            "nodes, fewer than one multiple. Pass a smaller round_to, or allow more blocks."
        )
    raise BudgetError(_out_of_range(budget, original, target, [reachable(k) for k in space.counts], space))


@dataclass(frozen=True)
class SearchSpace:
    """The structures that a config allows of a model: k of some blocks, and how many hidden nodes they keep.

    Attributes:
        cost: Of the original.
        candidates: The blocks among which the k are chosen, from 0.
        groups: The candidates, those together that are compressed together.
        prunable: Likewise the blocks that may keep their attention and lose hidden nodes only.
        counts: The k allowed.
        round_to: Kept nodes are a multiple of it.
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
                "structure, CompressionConfig(recovery=ReconstructionConfig(), structure='searched')"
                + (", or pass candidates of one size in CompressionConfig(candidates=...)." if alone else ".")
            )
        return self.cost.blocks[self.candidates[0]]

    def parts(
        self,
        amount: Callable[[Cost], int],
        compressed: Mapping[int, Recoverability],
        pruned: Mapping[int, Recoverability],
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
                    nodes = profiles[group[0]].nodes
                    weight = 1.0 if attention else LOST_ATTENTION
                    losses = tuple(weight * sum(profiles[b].loss(kept) for b in group) for kept in nodes)
                    saving = 0 if attention else len(group) * amount(of.attention)
                    node = len(group) * amount(of.node(attention))
                    ways.append(Way(attention, saving, node, Recoverability(nodes, losses)))
            if ways:
                found.append(Part(group, tuple(ways)))
        return found

    def parts_alike(self, amount: Callable[[Cost], int]) -> list[Part]:
        """The same, were all blocks alike to lose."""
        blocks = enumerate(self.cost.blocks)
        alike = {block: Recoverability((0, of.hidden_features), (1.0, 1.0)) for block, of in blocks}
        return self.parts(amount, alike, alike)

    def savings(self, amount: Callable[[Cost], int]) -> tuple[int, int]:
        """The least that a cut of one part can save, and the most that cuts of all can."""
        parts = self.parts_alike(amount)
        # A block that is pruned can save as little as one hidden node, which is as good as nothing.
        least = min(1 if way.attention else way.saving for part in parts for way in part.ways)
        return least, sum(part.saving(part.smallest(self.round_to)) for part in parts)

    def cost_of(self, cuts: Mapping[int, Cut]) -> Cost:
        """What a model costs of which some blocks are cut."""
        total = self.cost.total
        for block, cut in cuts.items():
            of = self.cost.blocks[block]
            total -= of.node(cut.attention) * (of.hidden_features - cut.hidden_features)
            total -= Cost() if cut.attention else of.attention
        return total

    def fields(self, cuts: Mapping[int, Cut]) -> dict[str, Any]:
        """What a `Plan` says of a structure."""
        left = sum(cut.hidden_features for cut in cuts.values())
        hidden = sum(self.cost.blocks[block].hidden_features for block in cuts)
        return {
            "num_blocks": len(cuts),
            "hidden_features": left // len(cuts),
            "drop_ratio": (hidden - left) / hidden,
            "cost": self.cost_of(cuts),
            "pruned": tuple(sorted(block for block, cut in cuts.items() if cut.attention)),
        }

    @property
    def widths(self) -> range:
        """The hidden nodes that a block may keep."""
        return range(0, self.block.hidden_features + 1, self.round_to)

    def plan(self, budget: Budget, target: int | float, k: int, kept: int, **fields: Any) -> Plan:
        """The plan that compresses k blocks to `kept` hidden nodes."""
        dropped = self.block.hidden_features - kept
        return Plan(
            budget=budget,
            target=target,
            num_blocks=k,
            hidden_features=kept,
            drop_ratio=dropped / self.block.hidden_features,
            candidates=self.candidates,
            cost=self.cost.total - (self.block.attention + self.block.hidden_node * dropped) * k,
            **fields,
        )

    def more_blocks(self, lower: str = "go lower") -> str:
        """How to allow more blocks, if there are any."""
        all_of_them = tuple(i for i, block in enumerate(self.cost.blocks) if block.compressible)
        if len(all_of_them) <= len(self.candidates):
            return ""
        whole = len(all_of_them) == len(self.cost.blocks)
        named = f"tuple(range({len(all_of_them)}))" if whole else str(all_of_them)
        listed = ",".join(map(str, all_of_them))
        return (
            f" Allow all {len(all_of_them)} blocks with CompressionConfig(candidates={named}), --candidates {listed}, "
            f"to {lower}."
        )


def search_space(model: nn.Module, config: CompressionConfig) -> SearchSpace:
    """What a config's `candidates`, `num_blocks` and `round_to` allow.

    Raises:
        UnsupportedModelError: If no adapter handles the model.
        BudgetError: If they do not fit the model.
    """
    adapter = require_supported(model)
    cost = adapter.cost(model)
    groups = adapter.groups(model)
    candidates = choose_candidates(model, config.candidates, cost)
    counts: Sequence[int] = range(1, len(candidates) + 1)
    if config.num_blocks is not None:
        if config.num_blocks > len(candidates):
            raise BudgetError(
                f"num_blocks={config.num_blocks}: there are only {len(candidates)} candidate blocks "
                f"({list(candidates)}). Ask for fewer, or allow more in CompressionConfig(candidates=...)."
            )
        counts = (config.num_blocks,)
    fewest = min(cost.blocks[i].hidden_features for i in candidates)
    if config.round_to > fewest:
        raise BudgetError(f"round_to={config.round_to}: a block has only {fewest} hidden nodes; pass a smaller one.")
    chosen = tuple(group for group in groups if group[0] in candidates)
    prunable: tuple[tuple[int, ...], ...] = ()
    if searched(config) and config.num_blocks is None:
        prunable = tuple(
            group
            for group in (groups if config.candidates is None else chosen)
            if all(adapter.halves(model, block) is not None for block in group)
        )
    return SearchSpace(cost, candidates, chosen, prunable, counts, config.round_to)


def searched(config: CompressionConfig) -> bool:
    """Whether a config leaves the structure to a search; mimicking has no trials that could guide it."""
    return config.structure == "searched" and isinstance(config.recovery, ReconstructionConfig)


def search(
    model: nn.Module,
    planned: Plan,
    compressed: Mapping[int, Recoverability],
    pruned: Mapping[int, Recoverability],
    config: CompressionConfig,
) -> tuple[Plan, dict[int, Cut]]:
    """The structure of least metric loss that meets a plan's budget: which blocks are cut, and what each keeps.

    Args:
        model: The original model.
        planned: What `plan` says for it; its budget is one of `ADDITIVE`.
        compressed: What each candidate would lose without its attention, by the nodes that it keeps.
        pruned: What each block would lose with its attention.
        config: Its `num_blocks` fixes the number of blocks, its `round_to` the numbers of nodes.

    Returns:
        The plan, and what each block that is cut keeps, best first.
    """
    space = search_space(model, config)
    amount, beyond = _linear_unit(model, planned.budget, space.cost)
    saving = math.ceil(beyond + amount(space.cost.total) - planned.target)
    parts = space.parts(amount, compressed, pruned)
    cuts = search_structure(parts, saving, num_blocks=config.num_blocks, round_to=config.round_to)
    return replace(planned, **space.fields(cuts)), cuts


def _plan_searched(model: nn.Module, budget: Budget, space: SearchSpace, config: CompressionConfig) -> Plan:
    """A structure that meets the budget, were all blocks alike to lose."""
    amount, beyond = _linear_unit(model, budget, space.cost)
    original = amount(space.cost.total) + beyond
    target = budget.target_of(original)
    if not searched(config):
        _ = space.block  # says what to do
    parts = space.parts_alike(amount)
    least, most = space.savings(amount)
    lowest, highest = original - most, original - least
    if lowest <= target <= highest:
        try:
            cuts = search_structure(parts, original - target, num_blocks=config.num_blocks, round_to=config.round_to)
        except ValueError as error:
            raise BudgetError(
                f"num_blocks={config.num_blocks}: {budget.unit}={budget.value!r} cannot be met by as many of the "
                f"candidates {list(space.candidates)}. Leave it out, or pass another number."
            ) from error
        return Plan(budget=budget, target=target, candidates=space.candidates, **space.fields(cuts))
    raise BudgetError(_out_of_range(budget, original, target, [(lowest, highest)], space))


def _linear_unit(model: nn.Module, budget: Budget, cost: ModelCost) -> tuple[Callable[[Cost], int], int]:
    """What a part takes of a budget's unit, and what the whole takes beyond its parts.

    Of a file that is the header, taken as long as the original's: a compressed model names fewer tensors, so its file
    is smaller by some hundred bytes a block.
    """
    if budget.unit != "file_size":
        return budget.amount, 0
    size = next(model.parameters()).element_size()
    return lambda part: size * part.params, file_size(model.state_dict()) - size * cost.total.params


def _plan_activation_memory(model: nn.Module, budget: Budget, space: SearchSpace) -> Plan:
    """The most hidden nodes with which no moment of a pass takes more than the target.

    Blocks run one after another, so the peak is that of the largest: it falls only if every block is compressed.
    """
    k = space.counts[-1]

    def peak(kept: int) -> int:
        return trace_activation_memory(unrecovered(model, dict.fromkeys(space.candidates[:k], kept)), budget.batch_size)

    original = trace_activation_memory(model, budget.batch_size)
    target = budget.target_of(original)
    lowest = peak(0)
    if not lowest <= target < original:
        asked = f"{budget.unit}={budget.value!r} asks for {target:,} of {original:,} bytes at batch {budget.batch_size}"
        whole = sum(block.compressible for block in space.cost.blocks) - k
        if lowest == original and whole:
            raise BudgetError(
                f"{asked}, but the peak is that of one block, and {whole} blocks stay whole, so no choice of hidden "
                f"nodes lowers it: {original:,} is all that {k} compressed blocks can meet."
                + space.more_blocks("lower it, at the price of all attention")
            )
        raise BudgetError(f"{asked}; {k} compressed blocks can meet {lowest:,} to {original - 1:,}.")
    return space.plan(budget, target, k, space.widths[bisect_right(space.widths, target, key=peak) - 1])


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
    adapter = adapter_for(model)
    cost, groups = cost or adapter.cost(model), adapter.groups(model)
    depth = len(cost.blocks)
    if wanted is None:
        inner = groups[1:-1] if adapter.keeps_ends and len(groups) > 2 else groups
        candidates = tuple(
            block for group in inner if all(cost.blocks[i].compressible for i in group) for block in group
        )
        if not candidates:
            looked_at = [block for group in inner for block in group]
            raise BudgetError(f"None of the blocks {looked_at} has {adapter.removed} left to remove.")
        return candidates
    for block in wanted:
        if not 0 <= block < depth:
            raise BudgetError(
                f"candidates={list(wanted)}: block {block} does not exist, the model has 0 to {depth - 1}."
            )
        if not cost.blocks[block].compressible:
            raise BudgetError(f"candidates={list(wanted)}: block {block} has no {adapter.removed} left to remove.")
    for group in groups:
        present = [block for block in group if block in wanted]
        if present and len(present) < len(group):
            raise BudgetError(
                f"candidates={list(wanted)}: blocks {list(group)} are compressed together; pass all of them or none."
            )
    return wanted


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
        f"{budget.unit}={budget.value!r} asks for {target:,} of {original:,} ({fraction(target)}); "
        f"{len(space.candidates)} candidate blocks can meet {spans}.{hint}"
    )
