"""The search of the structure: which blocks, in which way, and how many hidden units each keeps."""

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dcvit
from dcvit.history import BlockSpec, SensitivityCurve
from dcvit.models import compressible
from dcvit.search.allocate import LEVELS, Part, Way, search_structure
from dcvit.search.plan import plan, search

HIDDEN, ATTENTION, NODE = 2 * LEVELS, 1000, 7


def profile(seed: int) -> SensitivityCurve:
    rng = np.random.default_rng(seed)
    units = (0, HIDDEN // 8, HIDDEN // 4, HIDDEN // 2, HIDDEN)
    return SensitivityCurve(units, tuple(np.sort(rng.exponential(size=len(units)))[::-1].tolist()))


def attention_parts(blocks: Sequence[SensitivityCurve]) -> list[Part]:
    """Blocks of one size that lose their attention."""
    return [Part((i,), (Way(False, ATTENTION, NODE, profile),)) for i, profile in enumerate(blocks)]


def saving_of(parts: Sequence[Part], specs: Mapping[int, BlockSpec]) -> int:
    return sum(part.saving(specs[part.blocks[0]]) for part in parts if part.blocks[0] in specs)


def loss_of(parts: Sequence[Part], specs: Mapping[int, BlockSpec]) -> float:
    return sum(part.loss(specs[part.blocks[0]]) for part in parts if part.blocks[0] in specs)


def test_losses_between_are_interpolated() -> None:
    assert SensitivityCurve((0, 10, 20), (8.0, 4.0, 3.0)).loss(5) == pytest.approx(6.0)


@pytest.mark.parametrize("saving", [1000, 1001, 2222, 3000, 4321, 5600])
def test_it_saves_enough_and_less_than_a_hidden_unit_more(saving: int) -> None:
    parts = attention_parts([profile(i) for i in range(4)])
    specs = search_structure(parts, saving)
    assert all(0 <= spec.hidden_features <= HIDDEN for spec in specs.values())
    assert saving <= saving_of(parts, specs) < saving + NODE


def test_a_block_that_loses_nothing_gives_up_its_hidden_units_first() -> None:
    units = (0, HIDDEN)
    parts = attention_parts([SensitivityCurve(units, (0.1, 0.1)), SensitivityCurve(units, (5.0, 0.1))])
    assert search_structure(parts, 2 * ATTENTION + HIDDEN * NODE, num_blocks=2) == {
        0: BlockSpec(0),
        1: BlockSpec(HIDDEN),
    }


def test_blocks_come_in_ascending_order_of_loss() -> None:
    parts = attention_parts([profile(i) for i in range(5)])
    found = search_structure(parts, 4 * ATTENTION, num_blocks=4)
    losses = [parts[block].loss(spec) for block, spec in found.items()]
    assert losses == sorted(losses)


def test_attention_is_removed_if_that_loses_less_than_hidden_units() -> None:
    """One block does not need its attention, another one does not need its hidden units."""
    units = (0, HIDDEN)
    idle_attention = (
        Way(False, ATTENTION, NODE, SensitivityCurve(units, (9.0, 0.1))),
        Way(True, 0, NODE, SensitivityCurve(units, (9.0, 0.0))),
    )
    idle_units = (
        Way(False, ATTENTION, NODE, SensitivityCurve(units, (8.0, 8.0))),
        Way(True, 0, NODE, SensitivityCurve(units, (0.2, 0.0))),
    )
    parts = [Part((0,), idle_attention), Part((1,), idle_units)]
    found = search_structure(parts, ATTENTION + HIDDEN // 2 * NODE)
    assert found == {0: BlockSpec(HIDDEN), 1: BlockSpec(HIDDEN // 2, attention=True)}


def test_a_pruned_block_keeps_a_hidden_unit_and_loses_one() -> None:
    units = (0, HIDDEN)
    parts = [Part((0,), (Way(True, 0, NODE, SensitivityCurve(units, (1.0, 0.0))),))]
    assert search_structure(parts, 1) == {0: BlockSpec(HIDDEN - 1, attention=True)}
    assert search_structure(parts, (HIDDEN - 1) * NODE) == {0: BlockSpec(1, attention=True)}
    with pytest.raises(ValueError, match="all blocks cannot save"):
        search_structure(parts, HIDDEN * NODE)


@pytest.mark.parametrize("share", [0.9, 0.8, 0.62])
def test_the_plan_says_what_the_search_found(share: float, model: nn.Module) -> None:
    budget = dcvit.Budget(macs=share)
    fewest = plan(model, budget)
    hidden = compressible(model).hidden_features(fewest.candidates[0])
    units = (0, hidden // 2, hidden)
    rng = np.random.default_rng(0)
    compressed, pruned = (
        {b: SensitivityCurve(units, tuple(np.sort(rng.exponential(size=3))[::-1].tolist())) for b in blocks}
        for blocks in (fewest.candidates, range(4))
    )
    found, specs = search(model, fewest, compressed, pruned, dcvit.DCViT())
    left = sum(spec.hidden_features for spec in specs.values())
    assert found.num_blocks == len(specs)
    assert found.pruned == tuple(sorted(block for block, spec in specs.items() if spec.attention))
    assert found.hidden_features == left // len(specs)
    assert found.drop_ratio == pytest.approx(1 - left / len(specs) / hidden)
    unit = budget.amount(compressible(model).cost().blocks[0].hidden_unit)
    assert found.target - unit < budget.amount(found.cost) <= found.target
    config = dcvit.DCViT(num_blocks=fewest.num_blocks)  # then no other block is touched
    fixed, specs = search(model, plan(model, budget, config), compressed, pruned, config)
    assert fixed.num_blocks == len(specs) == fewest.num_blocks
    assert not fixed.pruned


def test_compress_keeps_what_the_search_found(model: nn.Module, images: Tensor) -> None:
    recovery = dcvit.config.ReconstructionConfig(num_views=8, num_rows=64, epochs=0, refinement_steps=0)
    config = dcvit.DCViT(recovery=recovery, ablation=dcvit.config.Ablation(ranking_images="few-shot"))
    result = dcvit.compress(model, images, dcvit.Budget(macs=0.7), config)
    compressed, pruned = (
        {probe.block: probe.sensitivity for probe in probes if probe.sensitivity is not None}
        for probes in (result.report.probes, result.report.pruning_probes)
    )
    assert sorted(compressed) == [1, 2]
    assert sorted(pruned) == [0, 1, 2, 3]
    assert all(len(p.units) == len(p.losses) > 2 for p in (*compressed.values(), *pruned.values()))
    _, wanted = search(model, plan(model, dcvit.Budget(macs=0.7)), compressed, pruned, config)
    assert {block: len(units) for block, units in result.plan.kept_units.items()} == {
        block: spec.hidden_features for block, spec in wanted.items()
    }
    assert result.plan.pruned == tuple(sorted(block for block, spec in wanted.items() if spec.attention))
    assert len({spec.hidden_features for spec in wanted.values()}) > 1
    for block, shape in enumerate(result.report.blocks_after):
        assert shape.attention == (block not in wanted or wanted[block].attention)
    assert compressible(result.model).cost().total == result.plan.cost
    assert torch.isfinite(result.model(images)).all()


def brute_force(parts: Sequence[Part], saving: int, num_blocks: int | None) -> float:
    """The least loss over all structures that save no hidden unit too much, if there is one."""
    best: dict[bool, float] = {True: float("inf"), False: float("inf")}
    grain = max(way.unit_saving for part in parts for way in part.ways)
    for specs in product(*[[None, *part.specs(1)] for part in parts]):
        chosen = [(part, spec) for part, spec in zip(parts, specs, strict=True) if spec is not None]
        if num_blocks not in (None, sum(len(part.blocks) for part, _ in chosen)):
            continue
        saved = sum(part.saving(spec) for part, spec in chosen)
        if saved >= saving:
            exact = saved - saving <= grain
            best[exact] = min(best[exact], sum(part.loss(spec) for part, spec in chosen))
    return best[True] if np.isfinite(best[True]) else best[False]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 2), st.integers(1, 50), st.integers(1, 9), st.integers(1, 9), st.integers(2, 6),
            st.floats(0.1, 5), st.floats(0.0, 2.0),
        ),
        min_size=1, max_size=4,
    ),
    st.floats(0.05, 0.95),
    st.booleans(),
)  # fmt: skip
def test_the_search_finds_the_least_loss(
    shapes: list[tuple[int, int, int, int, int, float, float]], share: float, fixed: bool
) -> None:
    parts, first = [], 0
    for size, attention, unit, pruned_unit, hidden, scale, of_attention in shapes:
        units = tuple(range(hidden + 1))
        pruned = tuple(scale * (hidden - n) ** 1.5 for n in units)
        compressed = tuple(of_attention + loss for loss in pruned)
        ways = (
            Way(False, attention, unit, SensitivityCurve(units, compressed)),
            Way(True, 0, pruned_unit, SensitivityCurve(units, pruned)),
        )
        parts.append(Part(tuple(range(first, first + size)), ways))
        first += size
    saving = max(1, int(share * sum(part.saving(part.smallest()) for part in parts)))
    num_blocks = sum(len(part.blocks) for part in parts) if fixed else None
    specs = search_structure(parts, saving, num_blocks=num_blocks)
    assert saving_of(parts, specs) >= saving
    if not fixed:
        for part in parts:  # those of a part go together, to equal numbers of hidden units
            assert len({specs.get(block) for block in part.blocks}) == 1
    # Here a quantum is one unit, so nothing is rounded.
    assert loss_of(parts, specs) <= brute_force(parts, saving, num_blocks) * (1 + 1e-12) + 1e-12


def sizes_differ() -> list[Part]:
    return [
        Part((0,), (Way(False, 100_000, 1000, SensitivityCurve((0, 300), (4.0, 1.0))),)),
        Part((1, 2), (Way(False, 150_000, 777, SensitivityCurve((0, 300), (9.0, 8.0))),)),
    ]


def test_the_search_gives_back_what_rounding_saved_too_much() -> None:
    parts = sizes_differ()
    specs = search_structure(parts, 333_333)
    assert specs.keys() == {0}
    assert 0 <= saving_of(parts, specs) - 333_333 < 1000
    rounded = search_structure(parts, 333_333, round_to=8)
    assert rounded[0].hidden_features % 8 == 0
    assert 0 <= saving_of(parts, rounded) - 333_333 < 8000


@pytest.mark.parametrize("beyond", [0, 1, 50, 999])
def test_so_many_blocks_save_all_that_they_can(beyond: int) -> None:
    """Down to the last unit, which quanta hide; those that lose least."""
    attention, unit = 100_003, 1009
    profiles = [profile(i) for i in range(6)]
    parts = [Part((i,), (Way(False, attention, unit, of),)) for i, of in enumerate(profiles)]
    saving = 3 * (attention + HIDDEN * unit) - beyond
    found = search_structure(parts, saving, num_blocks=3)
    assert len(found) == 3
    assert saving <= saving_of(parts, found) < saving + unit
    assert set(found) == set(sorted(range(6), key=lambda i: profiles[i].loss(0))[:3])
    with pytest.raises(ValueError, match="3 blocks cannot save"):
        search_structure(parts, 3 * (attention + HIDDEN * unit) + 1, num_blocks=3)


@pytest.mark.parametrize("round_to", [8, 12])
def test_the_least_that_a_pruned_block_keeps_is_a_multiple_too(round_to: int) -> None:
    way = Way(True, 0, NODE, SensitivityCurve((0, HIDDEN), (1.0, 0.0)))
    parts = [Part((0,), (way,)), Part((1,), (way,))]
    most = 2 * (HIDDEN - round_to) * NODE
    assert search_structure(parts, most, round_to=round_to) == {
        0: BlockSpec(round_to, True),
        1: BlockSpec(round_to, True),
    }
    with pytest.raises(ValueError, match="all blocks cannot save"):
        search_structure(parts, most + 1, round_to=round_to)


def test_the_search_refuses_what_cannot_be_saved() -> None:
    parts = [
        Part((0,), (Way(False, 10, 1, SensitivityCurve((0, 5), (2.0, 1.0))),)),
        Part((1,), (Way(False, 20, 2, SensitivityCurve((0, 5), (2.0, 1.0))),)),
    ]
    assert search_structure(parts, 45) == {0: BlockSpec(0), 1: BlockSpec(0)}
    with pytest.raises(ValueError, match="all blocks cannot save 46"):
        search_structure(parts, 46)
    with pytest.raises(ValueError, match="1 blocks cannot save 31"):
        search_structure(parts, 31, num_blocks=1)
