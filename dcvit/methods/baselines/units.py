"""What `s2vite`, `vtp`, `autoformer` and `spvit` share: units of a ViT, of which some are kept to meet a budget.

Units are hidden nodes, and attention heads or, for `spvit`, whole attentions, in whose place a convolution comes. The
methods differ in which go. The budget is met exactly from below: units go in the order of their scores until it is
met, then nodes come back, best first, while there is room. Each block keeps a node, and a head where heads go.
"""

import copy
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dcvit.budget import Budget
from dcvit.errors import BudgetError
from dcvit.methods.baselines.mimicking import DistilledConfig, mimic
from dcvit.methods.budgets import plan_of, target
from dcvit.methods.registry import Outcome, Task
from dcvit.metrics.cost import spent
from dcvit.models import compressible
from dcvit.models.modeling.shared import TimmModule
from dcvit.models.modeling.variations import ConvolutionalAttention
from dcvit.models.surgery import copy_blocks
from dcvit.models.vision_transformer import convolution_of, head_layer, keep_block_heads, num_heads, place_convolution

__all__ = ["Gates", "Kind", "Space", "Structure", "Unit", "gated", "open_gates", "recovered", "scores_of"]

Kind = Literal["head", "node", "attention"]
Gates = Mapping[tuple[Kind, int], Tensor]
"""A number for each unit of a block `[U]`, by kind and block."""

LEAST: Mapping[Kind, int] = {"head": 1, "node": 1, "attention": 0}
"""How many units of a kind each block keeps."""


@dataclass(frozen=True)
class Unit:
    """A head, a hidden node or the attention of a block."""

    kind: Kind
    block: int
    number: int


@dataclass(frozen=True)
class Structure:
    """What is kept: of each block the heads and the hidden nodes, ascending; and what comes for attentions that go."""

    heads: Mapping[int, tuple[int, ...]]
    nodes: Mapping[int, tuple[int, ...]]
    convolutions: Mapping[int, ConvolutionalAttention] = field(default_factory=dict)

    def of(self, model: nn.Module) -> nn.Module:
        """A copy of a model that has it; weights that stay whole are shared with the model, convolutions not copied."""
        student = copy_blocks(model, ())
        for block, convolution in self.convolutions.items():
            place_convolution(student, block, convolution)
        for block, heads in self.heads.items():
            if len(heads) < num_heads(model, block):
                keep_block_heads(student, block, heads)
        for block, nodes in self.nodes.items():
            if len(nodes) < compressible(model).hidden_features(block):
                compressible(student).prune_block(block, nodes)
        return student


class Space:
    """The structures of a model.

    Args:
        model: A vision transformer.
        candidates: The blocks that may lose units; all if `None`.
        kinds: What may go.

    Attributes:
        convolutions: Where attentions may go, by block what comes in their place; of zeros, to be fitted in place.

    Raises:
        BudgetError: If a candidate is no block with heads and nodes.
        UnsupportedModelError: If attentions may go and a convolution cannot come in their place.
    """

    def __init__(
        self, model: nn.Module, candidates: Sequence[int] | None = None, kinds: tuple[Kind, ...] = ("head", "node")
    ) -> None:
        self.model, self.kinds, self._adapter = model, kinds, compressible(model)
        able = [
            block for block in range(self._adapter.num_blocks())
            if num_heads(model, block) and self._adapter.hidden_features(block)
        ]  # fmt: skip
        for block in candidates or ():
            if block not in able:
                raise BudgetError(
                    f"candidates={list(candidates or ())}: block {block} has no heads and hidden nodes; {able} have."
                )
        self.blocks = tuple(candidates or able)
        self.heads = {block: num_heads(model, block) for block in self.blocks}
        self.nodes = {block: self._adapter.hidden_features(block) for block in self.blocks}
        self.convolutions = {block: convolution_of(model, block) for block in self.blocks if "attention" in kinds}
        self._required: dict[Budget, int] = {}
        self._savings: dict[tuple[str, str], dict[tuple[Kind, int], int]] = {}

    def units(self) -> list[Unit]:
        """All that may go, block by block."""
        return [
            Unit(kind, block, number)
            for block in self.blocks for kind in self.kinds for number in range(self.count(kind, block))
        ]  # fmt: skip

    def count(self, kind: Kind, block: int) -> int:
        """How many units of a kind a block has."""
        return 1 if kind == "attention" else self.heads[block] if kind == "head" else self.nodes[block]

    def without(self, removed: Sequence[Unit]) -> Structure:
        """All but some units."""
        gone = set(removed)

        def kept(kind: Kind, counts: Mapping[int, int]) -> dict[int, tuple[int, ...]]:
            return {
                block: tuple(n for n in range(count) if Unit(kind, block, n) not in gone)
                for block, count in counts.items()
            }

        convolutions = {block: one for block, one in self.convolutions.items() if Unit("attention", block, 0) in gone}
        return Structure(kept("head", self.heads), kept("node", self.nodes), convolutions)

    def require(self, budget: Budget) -> int:
        """A budget as an absolute number.

        Raises:
            BudgetError: If it is not below the original, or not met with the fewest units in each block.
        """
        if budget in self._required:
            return self._required[budget]
        wanted = target(self.model, budget)
        least = self.without([unit for unit in self.units() if unit.number >= LEAST[unit.kind]])
        if (left := spent(least.of(self.model), budget)) > wanted:
            kept = "a convolution for the attention" if self.convolutions else "one head"
            raise BudgetError(
                f"{budget.unit}={budget.value!r} asks for {wanted:,}: with {kept} and one hidden node in each of "
                f"{len(self.blocks)} blocks {left:,} are left. Ask for more, or allow more blocks in "
                "`candidates`."
            )
        self._required[budget] = wanted
        return wanted

    def best(self, scores: Mapping[Unit, float], budget: Budget) -> Structure:
        """The structure that meets a budget and keeps the units of highest score; of equal ones the first.

        Raises:
            BudgetError: See `require`.
        """
        wanted = self.require(budget)
        order = sorted(self.units(), key=lambda unit: scores[unit])
        last: dict[tuple[Kind, int], Unit] = {(unit.kind, unit.block): unit for unit in order}
        order = [unit for unit in order if not LEAST[unit.kind] or last[unit.kind, unit.block] is not unit]

        saved = self.savings(budget)
        missing = spent(self.model, budget) - wanted
        totals = list(accumulate((saved[unit.kind, unit.block] for unit in order), initial=0))
        count = bisect_left(totals, missing)
        # The last head or attention may have left room for nodes that went before.
        nodes = [unit for unit in reversed(order[:count]) if unit.kind == "node"]
        room = totals[min(count, len(order))] - missing
        back = set()
        for unit in nodes:
            room -= saved[unit.kind, unit.block]
            if room < 0:
                break
            back.add(unit)
        removed = [unit for unit in order[:count] if unit not in back]
        # A file's header may be longer than the savings tell.
        gone = set(removed)
        left = (unit for unit in order if unit.kind == "node" and unit not in gone)
        while spent(self.without(removed).of(self.model), budget) > wanted:
            removed.append(next(left))
        return self.without(removed)

    def savings(self, budget: Budget) -> dict[tuple[Kind, int], int]:
        """What one unit takes, by kind and block, in a budget's unit; all of a block take the same."""
        key = budget.unit, budget.convention
        if key not in self._savings:
            original = spent(self.model, budget)
            self._savings[key] = {
                (kind, block): original - spent(self.without([Unit(kind, block, 0)]).of(self.model), budget)
                for block in self.blocks for kind in self.kinds if self.count(kind, block) > LEAST[kind]
            }  # fmt: skip
        return self._savings[key]


@contextmanager
def gated(
    model: nn.Module, gates: Gates, convolutions: Mapping[int, ConvolutionalAttention] | None = None
) -> Iterator[None]:
    """Multiply what each head and each hidden node gives by a gate while the context lasts.

    An attention of the gate g gives g of its own and 1 − g of what the convolution does that may come in its place.

    Args:
        model: Whose units they are.
        gates: By kind and block `[U]`, or `[B, U]` for each image of a batch its own.
        convolutions: By block, where there are gates of attentions.
    """
    handles = []
    for (kind, block), gate in gates.items():
        if kind == "attention":
            handles.append(_blended(model, block, gate, (convolutions or {})[block]))
            continue
        layer = head_layer(model, block) if kind == "head" else compressible(model).hidden_layer(block)

        def multiply(_: nn.Module, given: tuple[Tensor, ...], gate: Tensor = gate) -> tuple[Tensor, ...]:
            # [B, N, U * C] as U units of C channels
            units = given[0].unflatten(-1, (gate.shape[-1], -1))
            factor = gate.unsqueeze(-1) if gate.ndim == 1 else gate[:, None, :, None]
            return ((units * factor).flatten(-2), *given[1:])

        handles.append(layer.register_forward_pre_hook(multiply))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _blended(model: TimmModule, block: int, gate: Tensor, convolution: ConvolutionalAttention) -> RemovableHandle:
    def blend(_: nn.Module, given: tuple[Tensor, ...], attended: Tensor) -> Tensor:
        convolved: Tensor = convolution(given[0])
        return convolved + gate.view(-1, 1, 1) * (attended - convolved)

    handle: RemovableHandle = model.blocks[block].attn.register_forward_hook(blend)
    return handle


def recovered(task: Task[DistilledConfig], space: Space, structure: Structure) -> Outcome:
    """The student of a structure, which then mimics the original's output tokens.

    Args:
        task: Its config says how.
        space: Of the original.
        structure: What is kept.
    """
    student = copy.deepcopy(structure.of(task.teacher))
    cut = tuple(
        block for block in space.blocks
        if len(structure.heads[block]) < space.heads[block]
        or len(structure.nodes[block]) < space.nodes[block]
        or block in structure.convolutions
    )  # fmt: skip
    recovery = mimic(task, student, cut)
    plan = plan_of(
        task.teacher, student, task.budget, cut, space.blocks,
        kept_nodes={block: structure.nodes[block] for block in cut},
        pruned=cut,
        kept_heads={b: structure.heads[b] for b in cut if len(structure.heads[b]) < space.heads[b]},
        convolved=tuple(b for b in cut if b in structure.convolutions),
    )  # fmt: skip
    return Outcome(student, plan, learning_rate=recovery.learning_rate, steps=(recovery,))


def open_gates(space: Space, device: torch.device) -> dict[tuple[Kind, int], Tensor]:
    """A gate of 1 for each unit."""
    return {
        (kind, b): torch.ones(space.count(kind, b), dtype=torch.float32, device=device)
        for b in space.blocks for kind in space.kinds
    }  # fmt: skip


def scores_of(gates: Gates) -> dict[Unit, float]:
    """What stands in the gates, unit by unit."""
    return {
        Unit(kind, block, number): value
        for (kind, block), values in gates.items() for number, value in enumerate(values.tolist())
    }  # fmt: skip
