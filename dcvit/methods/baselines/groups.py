"""The common part of `s2vite`, `vtp`, `autoformer` and `spvit`: prune groups of a ViT by score to meet a budget.

A prunable group is a hidden unit, an attention head or, for `spvit`, a whole attention, which a convolution replaces.
The methods differ only in the scores. The budget is never exceeded: groups are removed in the order of their scores
until it is met, then hidden units are restored, best first, while they fit. Each block keeps at least one hidden unit,
and at least one head if heads are pruned.
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
"""One number per prunable group of a block, `[U]`, by kind and block."""

LEAST: Mapping[Kind, int] = {"head": 1, "unit": 1, "attention": 0}
"""The number of groups of a kind that each block keeps at least."""


@dataclass(frozen=True)
class PrunableGroup:
    """A head, a hidden unit or the attention of a block."""

    kind: Kind
    block: int
    number: int


@dataclass(frozen=True)
class Structure:
    """The kept heads and hidden units of each block, ascending, and the convolutions that replace attentions."""

    heads: Mapping[int, tuple[int, ...]]
    units: Mapping[int, tuple[int, ...]]
    convolutions: Mapping[int, ConvolutionalAttention] = field(default_factory=dict)

    def of(self, model: nn.Module) -> nn.Module:
        """Return a copy of a model with this structure.

        Weights that are not pruned are shared with the model, and the convolutions are not copied.
        """
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
    """The search space of a model's structures.

    Args:
        model: A vision transformer.
        candidates: The blocks that may lose groups; all by default.
        kinds: The kinds of groups that may be pruned.

    Attributes:
        convolutions: The convolution that can replace the attention, by block, if attentions may be pruned. Its weights
            start as zeros and are fitted in place.

    Raises:
        BudgetError: If a candidate is not a block with heads and hidden units.
        UnsupportedModelError: If attentions may be pruned but a convolution cannot replace them.
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
        """Return all prunable groups, block by block."""
        return [
            PrunableGroup(kind, block, number)
            for block in self.blocks for kind in self.kinds for number in range(self.count(kind, block))
        ]  # fmt: skip

    def count(self, kind: Kind, block: int) -> int:
        """Return the number of groups of a kind in a block."""
        return 1 if kind == "attention" else self.heads[block] if kind == "head" else self.units[block]

    def without(self, removed: Sequence[PrunableGroup]) -> Structure:
        """Return the structure without the given groups."""
        pruned = set(removed)

        def kept(kind: Kind, counts: Mapping[int, int]) -> dict[int, tuple[int, ...]]:
            return {
                block: tuple(n for n in range(count) if PrunableGroup(kind, block, n) not in pruned)
                for block, count in counts.items()
            }

        convolutions = {
            block: one for block, one in self.convolutions.items() if PrunableGroup("attention", block, 0) in pruned
        }
        return Structure(kept("head", self.heads), kept("unit", self.units), convolutions)

    def require(self, budget: Budget) -> int:
        """Return a budget as an absolute number.

        Raises:
            BudgetError: If it is not below the original's cost, or if even the fewest groups in each block exceed it.
        """
        if budget in self._required:
            return self._required[budget]
        limit = target(self.model, budget)
        least = self.without([group for group in self.groups() if group.number >= LEAST[group.kind]])
        if (left := spent(least.of(self.model), budget)) > limit:
            kept = "a convolution for the attention" if self.convolutions else "one head"
            raise BudgetError(
                f"{budget.metric}={budget.value!r} asks for {limit:,}: with {kept} and one hidden unit in each of "
                f"{len(self.blocks)} blocks {left:,} are left. Ask for more, or allow more blocks in "
                "`candidates`."
            )
        self._required[budget] = limit
        return limit

    def best(self, scores: Mapping[PrunableGroup, float], budget: Budget) -> Structure:
        """Return the structure that meets a budget and keeps the groups of highest score. Ties go to the first groups.

        Raises:
            BudgetError: See `require`.
        """
        limit = self.require(budget)
        order = sorted(self.groups(), key=lambda group: scores[group])
        last: dict[tuple[Kind, int], PrunableGroup] = {(group.kind, group.block): group for group in order}
        order = [group for group in order if not LEAST[group.kind] or last[group.kind, group.block] is not group]

        saved = self.savings(budget)
        missing = spent(self.model, budget) - limit
        totals = list(accumulate((saved[group.kind, group.block] for group in order), initial=0))
        count = bisect_left(totals, missing)
        # The last head or attention may have made room for hidden units that were removed earlier.
        units = [group for group in reversed(order[:count]) if group.kind == "unit"]
        room = totals[min(count, len(order))] - missing
        restored = set()
        for group in units:
            room -= saved[group.kind, group.block]
            if room < 0:
                break
            restored.add(group)
        removed = [group for group in order[:count] if group not in restored]
        # A file's header can be longer than the savings predict.
        pruned = set(removed)
        left = (group for group in order if group.kind == "unit" and group not in pruned)
        while spent(self.without(removed).of(self.model), budget) > limit:
            removed.append(next(left))
        return self.without(removed)

    def savings(self, budget: Budget) -> dict[tuple[Kind, int], int]:
        """Return the cost of one group in the budget's metric, by kind and block.

        All groups of a kind in a block cost the same.
        """
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
    """Multiply the output of each head and each hidden unit by a gate, within the context.

    An attention with the gate g outputs g times its own result plus 1 − g times that of its convolution.

    Args:
        model: The model to gate.
        gates: The gates by kind and block: `[U]`, or `[B, U]` with separate gates for each image of a batch.
        convolutions: The convolutions by block; needed for gates of attentions.
    """
    handles = []
    for (kind, block), gate in gates.items():
        if kind == "attention":
            handles.append(_blended(model, block, gate, (convolutions or {})[block]))
            continue
        layer = head_layer(model, block) if kind == "head" else compressible(model).hidden_layer(block)

        def multiply(_: nn.Module, inputs: tuple[Tensor, ...], gate: Tensor = gate) -> tuple[Tensor, ...]:
            # [B, N, U * C] as U groups of C channels
            groups = inputs[0].unflatten(-1, (gate.shape[-1], -1))
            factor = gate.unsqueeze(-1) if gate.ndim == 1 else gate[:, None, :, None]
            return ((groups * factor).flatten(-2), *inputs[1:])

        handles.append(layer.register_forward_pre_hook(multiply))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _blended(model: TimmModule, block: int, gate: Tensor, convolution: ConvolutionalAttention) -> RemovableHandle:
    def blend(_: nn.Module, inputs: tuple[Tensor, ...], attended: Tensor) -> Tensor:
        convolved: Tensor = convolution(inputs[0])
        return convolved + gate.view(-1, 1, 1) * (attended - convolved)

    handle: RemovableHandle = model.blocks[block].attn.register_forward_hook(blend)
    return handle


def recovered(task: Task[DistilledConfig], space: Space, structure: Structure) -> Outcome:
    """Build the student of a structure, and train it by distillation of the original's output tokens.

    Args:
        task: Its config holds the settings.
        space: The original's space.
        structure: The structure of the student.
    """
    student = copy.deepcopy(structure.of(task.teacher))
    changed = tuple(
        block for block in space.blocks
        if len(structure.heads[block]) < space.heads[block]
        or len(structure.units[block]) < space.units[block]
        or block in structure.convolutions
    )  # fmt: skip
    recovery = distil(task, student, changed)
    plan = plan_of(
        task.teacher, student, task.budget, changed, space.blocks,
        kept_units={block: structure.units[block] for block in changed},
        pruned=changed,
        kept_heads={b: structure.heads[b] for b in changed if len(structure.heads[b]) < space.heads[b]},
        convolved=tuple(b for b in changed if b in structure.convolutions),
    )  # fmt: skip
    return Outcome(student, plan, learning_rate=recovery.learning_rate, steps=(recovery,))


def open_gates(space: Space, device: torch.device) -> dict[tuple[Kind, int], Tensor]:
    """Return a gate of 1 for each group."""
    return {
        (kind, b): torch.ones(space.count(kind, b), dtype=torch.float32, device=device)
        for b in space.blocks for kind in space.kinds
    }  # fmt: skip


def scores_of(gates: Gates) -> dict[PrunableGroup, float]:
    """Return the value of each group's gate."""
    return {
        PrunableGroup(kind, block, number): value
        for (kind, block), values in gates.items() for number, value in enumerate(values.tolist())
    }  # fmt: skip
