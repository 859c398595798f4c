"""The search of the structure: which blocks, and how many hidden nodes each keeps."""

from itertools import combinations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dcvit
from dcvit.models import adapter_for
from dcvit.planning import plan, search
from dcvit.structure import LEVELS, Part, Recoverability, search_structure, search_unequal_structure

HIDDEN, ATTENTION, NODE = 2 * LEVELS, 1000, 7


def profile(seed: int) -> Recoverability:
    rng = np.random.default_rng(seed)
    nodes = (0, HIDDEN // 8, HIDDEN // 4, HIDDEN // 2, HIDDEN)
    return Recoverability(nodes, tuple(np.sort(rng.exponential(size=len(nodes)))[::-1].tolist()))


def saved(structure: dict[int, int]) -> int:
    return sum(ATTENTION + (HIDDEN - kept) * NODE for kept in structure.values())


def test_losses_between_are_interpolated() -> None:
    assert Recoverability((0, 10, 20), (8.0, 4.0, 3.0)).loss(5) == pytest.approx(6.0)


@pytest.mark.parametrize("saving", [1000, 1001, 2222, 3000, 4321, 5600])
def test_it_saves_enough_and_less_than_a_node_more(saving: int) -> None:
    structure = search_structure({i: profile(i) for i in range(4)}, saving, ATTENTION, NODE, range(1, 5))
    assert all(0 <= kept <= HIDDEN for kept in structure.values())
    assert saving <= saved(structure) < saving + NODE


@pytest.mark.parametrize("seed", range(5))
def test_no_structure_on_the_grid_promises_less_loss(seed: int) -> None:
    blocks = {i: profile(10 * seed + i) for i in range(3)}
    saving, unit = 3 * ATTENTION + 40 * NODE, HIDDEN // LEVELS
    found = search_structure(blocks, saving, ATTENTION, NODE, range(1, 4))
    levels = range(0, HIDDEN + 1, unit)
    tables = {block: [profile.loss(kept) for kept in levels] for block, profile in blocks.items()}
    best = min(
        sum(tables[block][i] for block, i in zip(chosen, kept, strict=True))
        for count in (1, 2, 3)
        for chosen in combinations(blocks, count)
        for kept in product(range(len(levels)), repeat=count)
        if sum(ATTENTION + (HIDDEN - levels[i]) * NODE for i in kept) >= saving
    )
    assert sum(blocks[block].loss(kept) for block, kept in found.items()) <= best + 1e-12


def test_a_block_that_loses_nothing_gives_up_its_nodes_first() -> None:
    nodes = (0, HIDDEN)
    blocks = {0: Recoverability(nodes, (0.1, 0.1)), 1: Recoverability(nodes, (5.0, 0.1))}
    found = search_structure(blocks, 2 * ATTENTION + HIDDEN * NODE, ATTENTION, NODE, [2])
    assert found == {0: 0, 1: HIDDEN}


def test_blocks_come_in_ascending_order_of_loss() -> None:
    blocks = {i: profile(i) for i in range(5)}
    found = search_structure(blocks, 4 * ATTENTION, ATTENTION, NODE, [4])
    losses = [blocks[block].loss(kept) for block, kept in found.items()]
    assert losses == sorted(losses)


def test_what_cannot_be_saved_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot save"):
        search_structure({0: profile(0)}, 10 * ATTENTION, ATTENTION, NODE, [1])


@pytest.mark.parametrize("share", [0.9, 0.8, 0.62])
def test_the_plan_says_what_the_search_found(share: float, model: nn.Module) -> None:
    budget = dcvit.Budget(macs=share)
    fewest = plan(model, budget)
    hidden = adapter_for(model).hidden_features(model, fewest.candidates[0])
    nodes = (0, hidden // 2, hidden)
    rng = np.random.default_rng(0)
    profiles = {
        b: Recoverability(nodes, tuple(np.sort(rng.exponential(size=3))[::-1].tolist())) for b in fewest.candidates
    }
    found, kept = search(model, fewest, profiles, dcvit.CompressionConfig())
    assert found.num_blocks == len(kept)
    assert found.hidden_features == sum(kept.values()) // len(kept)
    assert found.drop_ratio == pytest.approx(1 - sum(kept.values()) / len(kept) / hidden)
    node = budget.amount(adapter_for(model).cost(model).blocks[0].hidden_node)
    assert found.target - node < budget.amount(found.cost) <= found.target
    fixed, of_more = search(model, plan(model, budget, dcvit.CompressionConfig(num_blocks=fewest.num_blocks)),
                            profiles, dcvit.CompressionConfig(num_blocks=fewest.num_blocks))  # fmt: skip
    assert fixed.num_blocks == len(of_more) == fewest.num_blocks


def test_compress_keeps_what_the_search_found(model: nn.Module, images: Tensor) -> None:
    recovery = dcvit.ReconstructionConfig(num_views=8, num_rows=64, epochs=0, refinement_steps=0)
    config = dcvit.CompressionConfig(recovery=recovery, metric_set="images")
    result = dcvit.compress(model, images, dcvit.Budget(macs=0.7), config)
    kept = {block: len(nodes) for block, nodes in result.plan.kept_nodes.items()}
    profiles = {trial.block: trial.recoverability for trial in result.report.trials}
    assert all(p is not None and len(p.nodes) == len(p.losses) > 2 for p in profiles.values())
    _, wanted = search(
        model, plan(model, dcvit.Budget(macs=0.7)), {b: p for b, p in profiles.items() if p is not None}, config
    )
    assert kept == wanted
    assert len(set(kept.values())) > 1
    assert adapter_for(result.model).cost(result.model).total == result.plan.cost
    assert torch.isfinite(result.model(images)).all()


def brute_force(parts: list[Part], saving: int, num_blocks: int | None) -> float:
    """The least loss over every structure of whole numbers of nodes."""
    best = float("inf")
    for kept in product(*[[None, *range(part.hidden_features + 1)] for part in parts]):
        chosen = [(part, n) for part, n in zip(parts, kept, strict=True) if n is not None]
        if num_blocks not in (None, sum(len(part.blocks) for part, _ in chosen)):
            continue
        if sum(part.saving(n) for part, n in chosen) >= saving:
            best = min(best, sum(part.recoverability.loss(n) for part, n in chosen))
    return best


def loss_of(parts: list[Part], kept: dict[int, int]) -> float:
    return sum(part.recoverability.loss(kept[part.blocks[0]]) for part in parts if part.blocks[0] in kept)


def saving_of(parts: list[Part], kept: dict[int, int]) -> int:
    return sum(part.saving(kept[part.blocks[0]]) for part in parts if part.blocks[0] in kept)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(1, 2), st.integers(1, 50), st.integers(1, 9), st.integers(1, 6), st.floats(0.1, 5)),
        min_size=1, max_size=4,
    ),
    st.floats(0.05, 0.95),
    st.booleans(),
)  # fmt: skip
def test_the_unequal_search_finds_the_least_loss(
    shapes: list[tuple[int, int, int, int, float]], share: float, fixed: bool
) -> None:
    parts, first = [], 0
    for size, attention, node, hidden, scale in shapes:
        losses = tuple(scale * (hidden + 1 - n) ** 1.5 for n in range(hidden + 1))
        parts.append(
            Part(tuple(range(first, first + size)), attention, node, Recoverability(tuple(range(hidden + 1)), losses))
        )
        first += size
    saving = max(1, int(share * sum(part.saving(0) for part in parts)))
    num_blocks = sum(len(part.blocks) for part in parts) if fixed else None
    kept = search_unequal_structure(parts, saving, num_blocks=num_blocks)
    assert saving_of(parts, kept) >= saving
    assert num_blocks in (None, len(kept))
    for part in parts:  # those of a part go together, to equal numbers of nodes
        assert len({kept.get(block) for block in part.blocks}) == 1
    # Here a quantum is one unit, so nothing is rounded.
    assert loss_of(parts, kept) <= brute_force(parts, saving, num_blocks) * (1 + 1e-12)


def test_the_unequal_search_gives_back_what_rounding_saved_too_much() -> None:
    parts = [
        Part((0,), 100_000, 1000, Recoverability((0, 300), (4.0, 1.0))),
        Part((1, 2), 150_000, 777, Recoverability((0, 300), (9.0, 8.0))),
    ]
    kept = search_unequal_structure(parts, 333_333)
    assert kept.keys() == {0}
    assert 0 <= saving_of(parts, kept) - 333_333 < 1000
    rounded = search_unequal_structure(parts, 333_333, round_to=8)
    assert rounded[0] % 8 == 0
    assert 0 <= saving_of(parts, rounded) - 333_333 < 8000


def test_the_unequal_search_refuses_what_cannot_be_saved() -> None:
    parts = [
        Part((0,), 10, 1, Recoverability((0, 5), (2.0, 1.0))),
        Part((1,), 20, 2, Recoverability((0, 5), (2.0, 1.0))),
    ]
    assert search_unequal_structure(parts, 45) == {0: 0, 1: 0}
    with pytest.raises(ValueError, match="all blocks cannot save 46"):
        search_unequal_structure(parts, 46)
    with pytest.raises(ValueError, match="1 blocks cannot save 31"):
        search_unequal_structure(parts, 31, num_blocks=1)
