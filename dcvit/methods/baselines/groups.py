"""What `s2vite`, `vtp`, `autoformer` and `spvit` share: units of a ViT, of which some are kept to meet a budget.

Units are hidden units, and attention heads or, for `spvit`, whole attentions, in whose place a convolution comes. The
methods differ in which go. The budget is met exactly from below: units go in the order of their scores until it is
met, then units come back, best first, while there is room. Each block keeps a unit, and a head where heads go.
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
from dcvit.methods.baselines.distillation import DistilledConfig, distil
from dcvit.methods.budgets import plan_of, target
from dcvit.methods.registry import Outcome, Task
from dcvit.metrics.cost import spent
from dcvit.models import compressible
from dcvit.models.modeling.shared import TimmModule
from dcvit.models.modeling.variations import ConvolutionalAttention
from dcvit.models.surgery import copy_blocks
from dcvit.models.vision_transformer import convolution_of, head_layer, keep_block_heads, num_heads, place_convolution

__all__ = ["Gates", "Kind", "PrunableGroup", "Space", "Structure", "gated", "open_gates", "recovered", "scores_of"]

Kind = Literal["head", "unit", "attention"]
Gates = Mapping[tuple[Kind, int], Tensor]
"""A number for each unit of a block `[U]`, by kind and block."""

LEAST: Mapping[Kind, int] = {"head": 1, "unit": 1, "attention": 0}
"""How many units of a kind each block keeps."""


@dataclass(frozen=True)
class PrunableGroup:
    """A head, a hidden unit or the attention of a block."""

    kind: Kind
    block: int
    number: int


@dataclass(frozen=True)
class Structure:
    """What is kept: of each block the heads and the hidden units, ascending; and what comes for attentions that go."""

    heads: Mapping[int, tuple[int, ...]]
    units: Mapping[int, tuple[int, ...]]
    convolutions: Mapping[int, ConvolutionalAttention] = field(default_factory=dict)

    def of(self, model: nn.Module) -> nn.Module:
        """A copy of a model that has it; weights that stay whole are shared with the model, convolutions not copied."""
        student = copy_blocks(model, ())
        for block, convolution in self.convolutions.items():
            place_convolution(student, block, convolution)
        for block, heads in self.heads.items():
            if len(heads) < num_heads(model, block):
                keep_block_heads(student, block, heads)
        for block, units in self.units.items():
            if len(units) < compressible(model).hidden_features(block):
                compressible(student).prune_block(block, units)
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
        BudgetError: If a candidate is no block with heads and units.
        UnsupportedModelError: If attentions may go and a convolution cannot come in their place.
    """

    def __init__(
        self, model: nn.Module, candidates: Sequence[int] | None = None, kinds: tuple[Kind, ...] = ("head", "unit")
    ) -> None:
        self.model, self.kinds, self._view = model, kinds, compressible(model)
        able = [
            block for block in range(self._view.num_blocks())
            if num_heads(model, block) and self._view.hidden_features(block)
        ]  # fmt: skip
        for block in candidates or ():
            if block not in able:
                raise BudgetError(
                    f"candidates={list(candidates or ())}: block {block} has no heads and hidden units; {able} have."
                )
        self.blocks = tuple(candidates or able)
        self.heads = {block: num_heads(model, block) for block in self.blocks}
        self.units = {block: self._view.hidden_features(block) for block in self.blocks}
        self.convolutions = {block: convolution_of(model, block) for block in self.blocks if "attention" in kinds}
        self._required: dict[Budget, int] = {}
        self._savings: dict[tuple[str, str], dict[tuple[Kind, int], int]] = {}

    def groups(self) -> list[PrunableGroup]:
        """All that may go, block by block."""
        return [
            PrunableGroup(kind, block, number)
            for block in self.blocks for kind in self.kinds for number in range(self.count(kind, block))
        ]  # fmt: skip

    def count(self, kind: Kind, block: int) -> int:
        """How many units of a kind a block has."""
        return 1 if kind == "attention" else self.heads[block] if kind == "head" else self.units[block]

    def without(self, removed: Sequence[PrunableGroup]) -> Structure:
        """All but some units."""
        gone = set(removed)

        def kept(kind: Kind, counts: Mapping[int, int]) -> dict[int, tuple[int, ...]]:
            return {
                block: tuple(n for n in range(count) if PrunableGroup(kind, block, n) not in gone)
                for block, count in counts.items()
            }

        convolutions = {
            block: one for block, one in self.convolutions.items() if PrunableGroup("attention", block, 0) in gone
        }
        return Structure(kept("head", self.heads), kept("unit", self.units), convolutions)

    def require(self, budget: Budget) -> int:
        """A budget as an absolute number.

        Raises:
            BudgetError: If it is not below the original, or not met with the fewest units in each block.
        """
        if budget in self._required:
            return self._required[budget]
        wanted = target(self.model, budget)
        least = self.without([group for group in self.groups() if group.number >= LEAST[group.kind]])
        if (left := spent(least.of(self.model), budget)) > wanted:
            kept = "a convolution for the attention" if self.convolutions else "one head"
            raise BudgetError(
                f"{budget.metric}={budget.value!r} asks for {wanted:,}: with {kept} and one hidden unit in each of "
                f"{len(self.blocks)} blocks {left:,} are left. Ask for more, or allow more blocks in "
                "`candidates`."
            )
        self._required[budget] = wanted
        return wanted

    def best(self, scores: Mapping[PrunableGroup, float], budget: Budget) -> Structure:
        """The structure that meets a budget and keeps the units of highest score; of equal ones the first.

        Raises:
            BudgetError: See `require`.
        """
        wanted = self.require(budget)
        order = sorted(self.groups(), key=lambda group: scores[group])
        last: dict[tuple[Kind, int], PrunableGroup] = {(group.kind, group.block): group for group in order}
        order = [group for group in order if not LEAST[group.kind] or last[group.kind, group.block] is not group]

        saved = self.savings(budget)
        missing = spent(self.model, budget) - wanted
        totals = list(accumulate((saved[group.kind, group.block] for group in order), initial=0))
        count = bisect_left(totals, missing)
        # The last head or attention may have left room for units that went before.
        units = [group for group in reversed(order[:count]) if group.kind == "unit"]
        room = totals[min(count, len(order))] - missing
        back = set()
        for group in units:
            room -= saved[group.kind, group.block]
            if room < 0:
                break
            back.add(group)
        removed = [group for group in order[:count] if group not in back]
        # A file's header may be longer than the savings tell.
        gone = set(removed)
        left = (group for group in order if group.kind == "unit" and group not in gone)
        while spent(self.without(removed).of(self.model), budget) > wanted:
            removed.append(next(left))
        return self.without(removed)

    def savings(self, budget: Budget) -> dict[tuple[Kind, int], int]:
        """What one unit takes, by kind and block, in a budget's unit; all of a block take the same."""
        key = budget.metric, budget.convention
        if key not in self._savings:
            original = spent(self.model, budget)
            self._savings[key] = {
                (kind, block): original - spent(self.without([PrunableGroup(kind, block, 0)]).of(self.model), budget)
                for block in self.blocks for kind in self.kinds if self.count(kind, block) > LEAST[kind]
            }  # fmt: skip
        return self._savings[key]


@contextmanager
def gated(
    model: nn.Module, gates: Gates, convolutions: Mapping[int, ConvolutionalAttention] | None = None
) -> Iterator[None]:
    """Multiply what each head and each hidden unit gives by a gate while the context lasts.

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
            groups = given[0].unflatten(-1, (gate.shape[-1], -1))
            factor = gate.unsqueeze(-1) if gate.ndim == 1 else gate[:, None, :, None]
            return ((groups * factor).flatten(-2), *given[1:])

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
        or len(structure.units[block]) < space.units[block]
        or block in structure.convolutions
    )  # fmt: skip
    recovery = distil(task, student, cut)
    plan = plan_of(
        task.teacher, student, task.budget, cut, space.blocks,
        kept_units={block: structure.units[block] for block in cut},
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


def scores_of(gates: Gates) -> dict[PrunableGroup, float]:
    """What stands in the gates, unit by unit."""
    return {
        PrunableGroup(kind, block, number): value
        for (kind, block), values in gates.items() for number, value in enumerate(values.tolist())
    }  # fmt: skip
