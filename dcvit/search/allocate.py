"""Search of the structure: which blocks to compress or prune, and how many hidden units each of them keeps.

The published method computes the structure (`dcvit.search.plan.plan`): as few blocks as meet the budget lose their
attention, and all of them lose the same share of hidden units. But blocks differ, and many have hidden units that the
others nearly determine. These can be dropped while the attention stays. A probe estimates the loss of each block at any
number of units (`SensitivityCurve`), for each of the two ways: without attention (compressed) and with it (pruned).
Small losses of different blocks add up. So the best structure has the smallest sum of losses among those that meet the
budget,

    min over blocks, ways w and units n   Σ loss_bw(n_b)   so that   Σ (attention_bw + (H_b − n_b) · unit_b) ≈ o − p,

where attention_bw is the cost of the block's attention if it is removed, else 0, and unit_b the cost of a hidden unit.
≈ means at least that, and as close as whole steps of units allow. (If less than one attention has to be saved, blocks
are pruned, even if removing an attention would lose little.) Dynamic programming over the blocks finds the structure.
Numbers of units are multiples of H / 64, and savings are counted in steps of 1/2048 of the required saving. The excess
saving after rounding is given back unit by unit.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dcvit.history import BlockSpec, SensitivityCurve

__all__ = ["Part", "Way", "require_units", "search_structure"]

LEVELS = 64
"""Number of steps between no hidden unit and all of them."""

QUANTA = 2048
"""Number of steps between no saving and the required saving."""


def require_units(units: Sequence[int], available: int) -> None:
    """Refuse indices that are not distinct hidden units of a block in ascending order.

    Args:
        units: The indices.
        available: Number of hidden units of the block.

    Raises:
        ValueError: If an index is out of range, repeated or out of order.
    """
    if list(units) != sorted({unit for unit in units if 0 <= unit < available}):
        raise ValueError(f"its hidden units are not distinct indices below {available} in ascending order")


@dataclass(frozen=True)
class Way:
    """One way to make a part smaller: compress it (without attention) or prune it (with attention).

    Attributes:
        attention: Whether the attention stays.
        saving: Saving of all its blocks together before any hidden unit is dropped, in the budget's metric.
        unit_saving: Saving if each of its blocks drops one hidden unit, in the budget's metric.
        sensitivity: Sum of the blocks' losses by the number of hidden units kept.
    """

    attention: bool
    saving: int
    unit_saving: int
    sensitivity: SensitivityCurve


@dataclass(frozen=True)
class Part:
    """Blocks of one size that are compressed or pruned together, or not at all.

    Attributes:
        blocks: The blocks, which all keep the same number of hidden units.
        ways: The ways to make them smaller.
    """

    blocks: tuple[int, ...]
    ways: tuple[Way, ...]

    @property
    def hidden_features(self) -> int:
        """Number of hidden units of each block."""
        return self.ways[0].sensitivity.units[-1]

    def smallest(self, round_to: int = 1) -> BlockSpec:
        """Return the spec that saves most."""
        return max(self._of((0, round_to)), key=self.saving)

    def way(self, spec: BlockSpec) -> Way:
        """Return the way that a spec belongs to."""
        return next(way for way in self.ways if way.attention == spec.attention)

    def saving(self, spec: BlockSpec) -> int:
        """Return the total saving of the blocks under a spec."""
        way = self.way(spec)
        return way.saving + (self.hidden_features - spec.hidden_features) * way.unit_saving

    def loss(self, spec: BlockSpec) -> float:
        """Return the total loss of the blocks under a spec."""
        return self.way(spec).sensitivity.loss(spec.hidden_features)

    def specs(self, round_to: int) -> tuple[BlockSpec, ...]:
        """Return the specs that the search considers."""
        hidden = self.hidden_features
        return tuple(self._of(sorted({*range(0, hidden + 1, _unit(hidden, round_to)), hidden})))

    def _of(self, numbers: Sequence[int]) -> Iterator[BlockSpec]:
        for way in self.ways:
            # A pruned block keeps at least one hidden unit and drops at least one.
            yield from (
                BlockSpec(n, way.attention) for n in numbers if not way.attention or 0 < n < self.hidden_features
            )


def search_structure(
    parts: Sequence[Part], saving: int, *, num_blocks: int | None = None, round_to: int = 1
) -> dict[int, BlockSpec]:
    """Find the structure with the smallest loss that saves enough.

    The search considers structures that exceed the required saving by at most one step of the numbers of units. If
    there are none, it considers all structures that save enough.

    Args:
        parts: The candidates.
        saving: The required saving, in the budget's metric.
        num_blocks: Number of blocks to compress or prune; `None` for any number.
        round_to: Numbers of hidden units are multiples of it; a block may also keep all of them.

    Returns:
        The specs of the compressed and pruned blocks, smallest loss first.

    Raises:
        ValueError: If the parts cannot save that much.
    """
    quantum = max(1, saving // QUANTA)
    needed = -(-saving // quantum)
    specs = [part.specs(round_to) for part in parts]
    # The saving exceeds the requirement by at most one step of the unit grids, unless only larger savings suffice.
    grain = max(_unit(part.hidden_features, round_to) * way.unit_saving for part in parts for way in part.ways)
    found = _least_loss(parts, specs, quantum, range(needed, needed - (-grain // quantum) + 1), num_blocks)
    if found is None:
        most = sum(part.saving(part.smallest(round_to)) for part in parts) // quantum
        found = _least_loss(parts, specs, quantum, range(needed, most + 1), num_blocks)
    if found is None:  # rounding to quanta may hide that the smallest structure suffices
        found = _most_saving(parts, num_blocks, round_to)
        if found is None or _saving(parts, found) < saving:
            raise ValueError(f"search_structure: {num_blocks or 'all'} blocks cannot save {saving}.")
    _give_back(parts, found, _saving(parts, found) - saving, round_to)
    order = sorted(found, key=lambda i: (parts[i].loss(found[i]) / len(parts[i].blocks), i))
    return {block: found[i] for i in order for block in parts[i].blocks}


def _least_loss(
    parts: Sequence[Part], specs: Sequence[Sequence[BlockSpec]], quantum: int, allowed: range, num_blocks: int | None
) -> dict[int, BlockSpec] | None:
    """Find the structure with the smallest loss by dynamic programming over the parts.

    Args:
        parts: The candidates.
        specs: The considered specs of each part.
        quantum: Size of a quantum, in the budget's metric.
        allowed: Allowed savings, in quanta.
        num_blocks: See `search_structure`.

    Returns:
        The spec of each chosen part, by the part's index; `None` if no structure has an allowed saving.
    """
    if not allowed:
        return None
    # Indexed by the number of chosen blocks (if it matters) and the quanta saved: the smallest loss, and the last spec
    # that leads to it.
    counted = num_blocks is not None
    sums = np.full((sum(len(part.blocks) for part in parts) + 1 if counted else 1, allowed.stop), np.inf)
    sums[0, 0] = 0.0
    steps: list[np.ndarray] = []
    savings = [
        [part.saving(spec) // quantum for spec in considered] for part, considered in zip(parts, specs, strict=True)
    ]
    for part, considered, quanta in zip(parts, specs, savings, strict=True):
        step = len(part.blocks) if counted else 0
        best, choice = sums.copy(), np.full(sums.shape, -1)
        for number, (spec, saved) in enumerate(zip(considered, quanta, strict=True)):
            if saved < allowed.stop:
                moved = sums[: len(sums) - step, : allowed.stop - saved] + part.loss(spec)
                target = best[step:, saved:]
                better = moved < target
                target[better] = moved[better]
                choice[step:, saved:][better] = number
        steps.append(choice)
        sums = best
    count = num_blocks or 0
    if count >= len(sums) or not np.isfinite(sums[count, allowed.start :]).any():
        return None
    at = allowed.start + int(sums[count, allowed.start :].argmin())
    found: dict[int, BlockSpec] = {}
    for i in reversed(range(len(parts))):
        number = int(steps[i][count, at])
        if number >= 0:
            found[i] = specs[i][number]
            count -= len(parts[i].blocks) if counted else 0
            at -= savings[i][number]
    return found


def _most_saving(parts: Sequence[Part], num_blocks: int | None, round_to: int) -> dict[int, BlockSpec] | None:
    """Find the structure that saves most with `num_blocks` blocks, or with all; of equal ones, the smallest loss.

    Returns:
        The spec of each chosen part, by the part's index; `None` if no parts have `num_blocks` blocks together.
    """
    best: dict[int, tuple[int, float, tuple[int, ...]]] = {0: (0, 0.0, ())}  # by number of blocks: saving, −loss, parts
    specs = [part.smallest(round_to) for part in parts]
    for i, (part, spec) in enumerate(zip(parts, specs, strict=True)):
        for count, (saved, kept, chosen) in sorted(best.items(), reverse=True):
            more = (saved + part.saving(spec), kept - part.loss(spec), (*chosen, i))
            total = count + len(part.blocks)
            best[total] = max(best.get(total, more), more)
    found = best.get(max(best) if num_blocks is None else num_blocks)
    return None if found is None else {i: specs[i] for i in found[2]}


def _unit(hidden_features: int, round_to: int) -> int:
    """Return the step between the considered numbers of hidden units."""
    return -(-max(1, hidden_features // LEVELS) // round_to) * round_to


def _saving(parts: Sequence[Part], specs: Mapping[int, BlockSpec]) -> int:
    return sum(parts[i].saving(spec) for i, spec in specs.items())


def _give_back(parts: Sequence[Part], specs: dict[int, BlockSpec], left: int, round_to: int) -> None:
    """Turn the excess saving into more hidden units, in place.

    Parts with the cheapest units come last, since these fill the smallest remainder.
    """
    units = {i: parts[i].way(spec).unit_saving for i, spec in specs.items()}
    for i in sorted(specs, key=lambda i: -units[i]):
        hidden, spec = parts[i].hidden_features, specs[i]
        more = min(left // max(units[i], 1), hidden - spec.hidden_features)
        more -= 0 if spec.hidden_features + more == hidden else more % round_to
        left -= more * units[i]
        specs[i] = BlockSpec(spec.hidden_features + more, spec.attention)
        if spec.attention and specs[i].hidden_features == hidden:  # nothing is left to prune
            del specs[i]
