"""Which blocks to compress and how many hidden units each of them keeps: the structure, searched.

The published method computes it (`dcvit.search.plan.plan`): as few blocks as meet the budget lose their attention, and
all of them the same share of hidden units. But blocks differ, and many have hidden units that the others nearly
determine, which can go while attention stays. A probe shows for each block, and for each of the two ways of cutting it,
what it would lose at any number of units (`SensitivityCurve`), and as long as losses are small those of different blocks
add up. So the best structure is the one of smallest sum that meets the budget,

    min over blocks, ways w and units n   Σ loss_bw(n_b)   so that   Σ (attention_bw + (H_b − n_b) · node_b) ≈ o − p,

where attention_bw is what the block's attention takes if it goes, else 0; ≈ is at least that, and as near as numbers of
units come. (A budget of less than one attention prunes, however little an attention would be missed.) Dynamic
programming over the blocks finds it: numbers of units are multiples of H / 64, savings are counted in 2048ths of what
must be saved, and what is left over after rounding is given back unit by unit.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dcvit.history import BlockSpec, SensitivityCurve

__all__ = ["Part", "Way", "require_units", "search_structure"]

LEVELS = 64
"""Steps between no hidden unit and all of them."""

QUANTA = 2048
"""Steps between saving nothing and what must be saved."""


def require_units(units: Sequence[int], available: int) -> None:
    """Refuse numbers that are not those of different hidden units of a block, ascending.

    Args:
        units: The numbers.
        available: How many hidden units the block has.

    Raises:
        ValueError: If they are not.
    """
    if list(units) != sorted({unit for unit in units if 0 <= unit < available}):
        raise ValueError(f"it names hidden units that are not different ones of {available} in ascending order")


@dataclass(frozen=True)
class Way:
    """One of the ways to cut a part.

    Attributes:
        attention: Whether attention stays.
        saving: What all its blocks save without dropping a hidden unit, in the budget's unit.
        unit: What they save if each drops one hidden unit.
        sensitivity: The sum of their losses.
    """

    attention: bool
    saving: int
    unit: int
    sensitivity: SensitivityCurve


@dataclass(frozen=True)
class Part:
    """Blocks of one size that are cut together, or not at all.

    Attributes:
        blocks: The blocks; each keeps as many hidden units as the others.
        ways: How they can be cut.
    """

    blocks: tuple[int, ...]
    ways: tuple[Way, ...]

    @property
    def hidden_features(self) -> int:
        """Hidden units of each block."""
        return self.ways[0].sensitivity.units[-1]

    def smallest(self, round_to: int = 1) -> BlockSpec:
        """The cut that saves most."""
        return max(self._of((0, round_to)), key=self.saving)

    def way(self, spec: BlockSpec) -> Way:
        """The way of a cut."""
        return next(way for way in self.ways if way.attention == spec.attention)

    def saving(self, spec: BlockSpec) -> int:
        """What they save in all by a cut."""
        way = self.way(spec)
        return way.saving + (self.hidden_features - spec.hidden_features) * way.unit

    def loss(self, spec: BlockSpec) -> float:
        """What they lose in all by a cut."""
        return self.way(spec).sensitivity.loss(spec.hidden_features)

    def specs(self, round_to: int) -> tuple[BlockSpec, ...]:
        """Those that are looked at."""
        hidden = self.hidden_features
        return tuple(self._of(sorted({*range(0, hidden + 1, _unit(hidden, round_to)), hidden})))

    def _of(self, numbers: Sequence[int]) -> Iterator[BlockSpec]:
        for way in self.ways:
            # A pruned block has an MLP, and a smaller one than before.
            yield from (
                BlockSpec(n, way.attention) for n in numbers if not way.attention or 0 < n < self.hidden_features
            )


def search_structure(
    parts: Sequence[Part], saving: int, *, num_blocks: int | None = None, round_to: int = 1
) -> dict[int, BlockSpec]:
    """The structure of least loss among those that save enough, and hardly more: within a step of the numbers of units.

    Where there are none, among all that save enough.

    Args:
        parts: The candidates.
        saving: What must be saved, in the budget's unit.
        num_blocks: How many blocks are to be cut; `None` leaves it open.
        round_to: Numbers of hidden units are multiples of it; a block may keep all of them, too.

    Returns:
        What each block that is cut keeps: least loss first.

    Raises:
        ValueError: If the parts cannot save as much.
    """
    quantum = max(1, saving // QUANTA)
    needed = -(-saving // quantum)
    specs = [part.specs(round_to) for part in parts]
    # No more is to be saved than grids of numbers of units ask for, unless nothing else saves enough.
    grain = max(_unit(part.hidden_features, round_to) * way.unit for part in parts for way in part.ways)
    found = _least_loss(parts, specs, quantum, range(needed, needed - (-grain // quantum) + 1), num_blocks)
    if found is None:
        most = sum(part.saving(part.smallest(round_to)) for part in parts) // quantum
        found = _least_loss(parts, specs, quantum, range(needed, most + 1), num_blocks)
    if found is None:  # unless rounding to quanta hid that the smallest of all can
        found = _most_saving(parts, num_blocks, round_to)
        if found is None or _saving(parts, found) < saving:
            raise ValueError(f"search_structure: {num_blocks or 'all'} blocks cannot save {saving}.")
    _give_back(parts, found, _saving(parts, found) - saving, round_to)
    order = sorted(found, key=lambda i: (parts[i].loss(found[i]) / len(parts[i].blocks), i))
    return {block: found[i] for i in order for block in parts[i].blocks}


def _least_loss(
    parts: Sequence[Part], specs: Sequence[Sequence[BlockSpec]], quantum: int, wanted: range, num_blocks: int | None
) -> dict[int, BlockSpec] | None:
    """Dynamic programming over the parts.

    Args:
        parts: The candidates.
        specs: Those of each that are looked at.
        quantum: What a quantum is.
        wanted: How many quanta may be saved.
        num_blocks: See `search_structure`.

    Returns:
        The cut of each part that is cut, by its number; `None` if none save as much.
    """
    if not wanted:
        return None
    # By cut blocks (where their number matters) and quanta saved: the least loss, and the last cut on the way to it.
    counted = num_blocks is not None
    sums = np.full((sum(len(part.blocks) for part in parts) + 1 if counted else 1, wanted.stop), np.inf)
    sums[0, 0] = 0.0
    steps: list[np.ndarray] = []
    savings = [
        [part.saving(spec) // quantum for spec in looked_at] for part, looked_at in zip(parts, specs, strict=True)
    ]
    for part, looked_at, quanta in zip(parts, specs, savings, strict=True):
        step = len(part.blocks) if counted else 0
        best, choice = sums.copy(), np.full(sums.shape, -1)
        for number, (spec, saved) in enumerate(zip(looked_at, quanta, strict=True)):
            if saved < wanted.stop:
                moved = sums[: len(sums) - step, : wanted.stop - saved] + part.loss(spec)
                place = best[step:, saved:]
                better = moved < place
                place[better] = moved[better]
                choice[step:, saved:][better] = number
        steps.append(choice)
        sums = best
    count = num_blocks or 0
    if count >= len(sums) or not np.isfinite(sums[count, wanted.start :]).any():
        return None
    at = wanted.start + int(sums[count, wanted.start :].argmin())
    found: dict[int, BlockSpec] = {}
    for i in reversed(range(len(parts))):
        number = int(steps[i][count, at])
        if number >= 0:
            found[i] = specs[i][number]
            count -= len(parts[i].blocks) if counted else 0
            at -= savings[i][number]
    return found


def _most_saving(parts: Sequence[Part], num_blocks: int | None, round_to: int) -> dict[int, BlockSpec] | None:
    """The smallest cuts of so many blocks, or of all: those that save most and, of equals, lose least.

    Returns:
        The cut of each part that is cut, by its number; `None` if none have as many blocks.
    """
    best: dict[int, tuple[int, float, tuple[int, ...]]] = {0: (0, 0.0, ())}  # by cut blocks: saved, not lost, parts
    specs = [part.smallest(round_to) for part in parts]
    for i, (part, spec) in enumerate(zip(parts, specs, strict=True)):
        for count, (saved, kept, chosen) in sorted(best.items(), reverse=True):
            more = (saved + part.saving(spec), kept - part.loss(spec), (*chosen, i))
            place = count + len(part.blocks)
            best[place] = max(best.get(place, more), more)
    found = best.get(max(best) if num_blocks is None else num_blocks)
    return None if found is None else {i: specs[i] for i in found[2]}


def _unit(hidden_features: int, round_to: int) -> int:
    """The distance of the numbers of hidden units that are looked at."""
    return -(-max(1, hidden_features // LEVELS) // round_to) * round_to


def _saving(parts: Sequence[Part], specs: Mapping[int, BlockSpec]) -> int:
    return sum(parts[i].saving(spec) for i, spec in specs.items())


def _give_back(parts: Sequence[Part], specs: dict[int, BlockSpec], left: int, round_to: int) -> None:
    """In place: what is saved beyond need as more hidden units, the cheapest last, for they fill the smallest rest."""
    units = {i: parts[i].way(spec).unit for i, spec in specs.items()}
    for i in sorted(specs, key=lambda i: -units[i]):
        hidden, spec = parts[i].hidden_features, specs[i]
        more = min(left // max(units[i], 1), hidden - spec.hidden_features)
        more -= 0 if spec.hidden_features + more == hidden else more % round_to
        left -= more * units[i]
        specs[i] = BlockSpec(spec.hidden_features + more, spec.attention)
        if spec.attention and specs[i].hidden_features == hidden:  # nothing is left to prune
            del specs[i]
