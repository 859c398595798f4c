"""Which blocks to compress and how many hidden nodes each of them keeps: the structure, searched.

The published method computes it (`dcvit.planning.plan`): as few blocks as meet the budget, all with the same share of
hidden nodes. But blocks differ. A trial shows for each what it would lose at any number of nodes (`Recoverability`),
and as long as losses are small those of different blocks add up. So the best structure is the one of smallest sum that
meets the budget,

    min over S and n   Σ_{b ∈ S} loss_b(n_b)   so that   Σ_{b ∈ S} (attention + (H − n_b) · node) ≥ o − p,

which dynamic programming over the blocks finds: numbers of nodes are multiples of H / 64, and what is left over after
rounding is given back node by node.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Recoverability", "search_structure"]

LEVELS = 64
"""Steps between no hidden node and all of them."""


@dataclass(frozen=True)
class Recoverability:
    """What compressing a block alone would cost, by the number of hidden nodes that it keeps.

    Attributes:
        nodes: Numbers of hidden nodes, ascending, from 0 to all.
        losses: The metric loss at each.
    """

    nodes: tuple[int, ...]
    losses: tuple[float, ...]

    def loss(self, kept: int) -> float:
        """The metric loss at any number of hidden nodes, interpolated."""
        return float(np.interp(kept, self.nodes, self.losses))


def search_structure(
    blocks: Mapping[int, Recoverability],
    saving: int,
    attention: int,
    node: int,
    counts: Sequence[int],
    *,
    round_to: int = 1,
) -> dict[int, int]:
    """The structure of least loss that saves enough.

    Args:
        blocks: The candidates, all of the same size.
        saving: What must be saved, in the budget's unit.
        attention: What a compressed block saves by its attention.
        node: What it saves by each hidden node that it drops.
        counts: How many blocks may be compressed.
        round_to: Numbers of hidden nodes are multiples of it; a block may keep all of them, too.

    Returns:
        The hidden nodes that each compressed block keeps, by block: least loss first.

    Raises:
        ValueError: If none of these numbers of blocks can save as much and no more.
    """
    hidden = next(iter(blocks.values())).nodes[-1]
    unit = -(-max(1, hidden // LEVELS) // round_to) * round_to
    levels = hidden // unit
    found: list[tuple[float, dict[int, int]]] = []
    choices = _best_choices(blocks, levels, unit, max(counts))
    for count in counts:
        of_nodes = saving - count * attention
        dropped = -(-of_nodes // node)  # rounded up: the budget is an upper bound
        if of_nodes < 0 or dropped > count * hidden:
            continue
        kept = count * hidden - dropped
        whole = min(kept // unit, count * levels)
        structure = _trace(choices, count, whole, unit)
        left = kept - sum(structure.values())
        for block in sorted(structure, key=lambda b: structure[b]):
            more = min(left, hidden - structure[block])
            more -= 0 if structure[block] + more == hidden else more % round_to
            structure[block] += more
            left -= more
        found.append((sum(blocks[b].loss(n) for b, n in structure.items()), structure))
    if not found:
        raise ValueError(f"search_structure: {list(counts)} blocks cannot save {saving}.")
    _, best = min(found, key=lambda entry: entry[0])
    return dict(sorted(best.items(), key=lambda entry: (blocks[entry[0]].loss(entry[1]), entry[0])))


def _best_choices(blocks: Mapping[int, Recoverability], levels: int, unit: int, most: int) -> dict[int, np.ndarray]:
    """Dynamic programming over the blocks.

    Returns:
        For each block its level, -1 if left whole, in the least sum over it and the blocks before it, by how many of
        them are compressed and how many levels these keep in all: `[most + 1, most · levels + 1]`.
    """
    sums = np.full((most + 1, most * levels + 1), np.inf)
    sums[0, 0] = 0.0
    choices: dict[int, np.ndarray] = {}
    for block, profile in blocks.items():
        losses = [profile.loss(level * unit) for level in range(levels + 1)]
        best, choice = sums.copy(), np.full(sums.shape, -1)
        for level, loss in enumerate(losses):
            moved = sums[:-1, : sums.shape[1] - level] + loss
            place = best[1:, level:]
            better = moved < place
            place[better] = moved[better]
            choice[1:, level:][better] = level
        choices[block], sums = choice, best
    return choices


def _trace(choices: Mapping[int, np.ndarray], count: int, levels: int, unit: int) -> dict[int, int]:
    """The structure behind a least sum."""
    structure: dict[int, int] = {}
    for block, choice in reversed(list(choices.items())):
        level = int(choice[count, levels])
        if level >= 0:
            structure[block] = level * unit
            count, levels = count - 1, levels - level
    return structure
