"""Which blocks to compress and how many hidden nodes each of them keeps: the structure, searched.

The published method computes it (`dcvit.planning.plan`): as few blocks as meet the budget, all with the same share of
hidden nodes. But blocks differ. A trial shows for each what it would lose at any number of nodes (`Recoverability`),
and as long as losses are small those of different blocks add up. So the best structure is the one of smallest sum that
meets the budget,

    min over S and n   Σ_{b ∈ S} loss_b(n_b)   so that   Σ_{b ∈ S} (attention + (H − n_b) · node) ≥ o − p,

which dynamic programming over the blocks finds: numbers of nodes are multiples of H / 64, and what is left over after
rounding is given back node by node.

Blocks of one size differ only in the numbers of nodes, which are counted exactly (`search_structure`). Where sizes
differ, as from stage to stage of a Swin or a CNN, what is counted is what they save (`search_unequal_structure`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Part", "Recoverability", "search_structure", "search_unequal_structure"]

LEVELS = 64
"""Steps between no hidden node and all of them."""

QUANTA = 2048
"""Steps between saving nothing and what must be saved, for blocks of different sizes."""


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


@dataclass(frozen=True)
class Part:
    """Blocks of one size that are compressed together, or not at all.

    Attributes:
        blocks: The blocks; each keeps as many hidden nodes as the others.
        attention: What all of them save by their attention, in the budget's unit.
        node: What they save if each drops one hidden node.
        recoverability: The sum of their losses.
    """

    blocks: tuple[int, ...]
    attention: int
    node: int
    recoverability: Recoverability

    @property
    def hidden_features(self) -> int:
        """Hidden nodes of each block."""
        return self.recoverability.nodes[-1]

    def saving(self, kept: int) -> int:
        """What they save in all if each keeps so many hidden nodes."""
        return self.attention + (self.hidden_features - kept) * self.node


def search_unequal_structure(
    parts: Sequence[Part], saving: int, *, num_blocks: int | None = None, round_to: int = 1
) -> dict[int, int]:
    """The structure of least loss that saves enough, of blocks that differ in size.

    Args:
        parts: The candidates.
        saving: What must be saved, in the budget's unit.
        num_blocks: How many blocks are to be compressed; `None` leaves it open.
        round_to: Numbers of hidden nodes are multiples of it; a block may keep all of them, too.

    Returns:
        The hidden nodes that each compressed block keeps, by block: least loss first.

    Raises:
        ValueError: If the parts cannot save as much.
    """
    quantum = max(1, saving // QUANTA)
    needed = -(-saving // quantum)
    # By compressed blocks and quanta saved (what is saved beyond need counts as need): least loss, and how it came.
    sums = np.full((sum(len(part.blocks) for part in parts) + 1, needed + 1), np.inf)
    sums[0, 0] = 0.0
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    levels = [_levels(part, round_to) for part in parts]
    for part, kept in zip(parts, levels, strict=True):
        best, choice, source = sums.copy(), np.full(sums.shape, -1), np.tile(np.arange(needed + 1), (len(sums), 1))
        for level, nodes in enumerate(kept):
            quanta, loss = min(part.saving(nodes) // quantum, needed), part.recoverability.loss(nodes)
            rows = sums[: len(sums) - len(part.blocks)] + loss
            moved = np.full(rows.shape, np.inf)
            origin = np.zeros(rows.shape, dtype=np.int64)
            moved[:, quanta:] = rows[:, : needed + 1 - quanta]
            origin[:, quanta:] = np.arange(needed + 1 - quanta)
            beyond = needed - quanta + rows[:, needed - quanta :].argmin(axis=1)
            moved[:, needed], origin[:, needed] = rows[np.arange(len(rows)), beyond], beyond
            place = slice(len(part.blocks), None)
            better = moved < best[place]
            best[place][better], choice[place][better] = moved[better], level
            source[place][better] = origin[better]
        steps.append((choice, source))
        sums = best
    count = int(sums[:, needed].argmin()) if num_blocks is None else num_blocks
    found: dict[int, int] = {}  # hidden nodes by number of the part
    if count < len(sums) and np.isfinite(sums[count, needed]):
        quanta = needed
        for i in reversed(range(len(parts))):
            choice, source = steps[i]
            level, origin_of = int(choice[count, quanta]), int(source[count, quanta])
            if level >= 0:
                found[i] = levels[i][level]
                count, quanta = count - len(parts[i].blocks), origin_of
    else:  # unless rounding to quanta hid that all of them together can
        found = dict.fromkeys(range(len(parts)), 0)
        if num_blocks not in (None, len(sums) - 1) or sum(part.saving(0) for part in parts) < saving:
            raise ValueError(f"search_unequal_structure: {num_blocks or 'all'} blocks cannot save {saving}.")
    _give_back(parts, found, sum(parts[i].saving(kept) for i, kept in found.items()) - saving, round_to)
    order = sorted(found, key=lambda i: (parts[i].recoverability.loss(found[i]) / len(parts[i].blocks), i))
    return {block: found[i] for i in order for block in parts[i].blocks}


def _levels(part: Part, round_to: int) -> list[int]:
    """The numbers of hidden nodes that are looked at."""
    hidden = part.hidden_features
    unit = -(-max(1, hidden // LEVELS) // round_to) * round_to
    return sorted({*range(0, hidden + 1, unit), hidden})


def _give_back(parts: Sequence[Part], kept: dict[int, int], left: int, round_to: int) -> None:
    """In place: what is saved beyond need as more hidden nodes, the cheapest last, for they fill the smallest rest."""
    for i in sorted(kept, key=lambda i: -parts[i].node):
        more = min(left // max(parts[i].node, 1), parts[i].hidden_features - kept[i])
        more -= 0 if kept[i] + more == parts[i].hidden_features else more % round_to
        kept[i] += more
        left -= more * parts[i].node


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
