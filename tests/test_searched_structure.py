"""The search of the structure: which blocks, and how many hidden nodes each keeps."""

from itertools import combinations, product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dcvit
from dcvit.models import adapter_for
from dcvit.planning import plan, search
from dcvit.structure import LEVELS, Recoverability, search_structure

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
