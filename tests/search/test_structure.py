"""The search of the structure: which blocks, in which way, and how many hidden nodes each keeps."""

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dcvit
from dcvit.history import Cut, Recoverability
from dcvit.models import compressible
from dcvit.search.allocate import LEVELS, Part, Way, search_structure
from dcvit.search.plan import plan, search

HIDDEN, ATTENTION, NODE = 2 * LEVELS, 1000, 7


def profile(seed: int) -> Recoverability:
    rng = np.random.default_rng(seed)
    nodes = (0, HIDDEN // 8, HIDDEN // 4, HIDDEN // 2, HIDDEN)
    return Recoverability(nodes, tuple(np.sort(rng.exponential(size=len(nodes)))[::-1].tolist()))


def attention_parts(blocks: Sequence[Recoverability]) -> list[Part]:
    """Blocks of one size that lose their attention."""
    return [Part((i,), (Way(False, ATTENTION, NODE, profile),)) for i, profile in enumerate(blocks)]


def saving_of(parts: Sequence[Part], cuts: Mapping[int, Cut]) -> int:
    return sum(part.saving(cuts[part.blocks[0]]) for part in parts if part.blocks[0] in cuts)


def loss_of(parts: Sequence[Part], cuts: Mapping[int, Cut]) -> float:
    return sum(part.loss(cuts[part.blocks[0]]) for part in parts if part.blocks[0] in cuts)


def test_losses_between_are_interpolated() -> None:
    assert Recoverability((0, 10, 20), (8.0, 4.0, 3.0)).loss(5) == pytest.approx(6.0)


@pytest.mark.parametrize("saving", [1000, 1001, 2222, 3000, 4321, 5600])
def test_it_saves_enough_and_less_than_a_node_more(saving: int) -> None:
    parts = attention_parts([profile(i) for i in range(4)])
    cuts = search_structure(parts, saving)
    assert all(0 <= cut.hidden_features <= HIDDEN for cut in cuts.values())
    assert saving <= saving_of(parts, cuts) < saving + NODE


def test_a_block_that_loses_nothing_gives_up_its_nodes_first() -> None:
    nodes = (0, HIDDEN)
    parts = attention_parts([Recoverability(nodes, (0.1, 0.1)), Recoverability(nodes, (5.0, 0.1))])
    assert search_structure(parts, 2 * ATTENTION + HIDDEN * NODE, num_blocks=2) == {0: Cut(0), 1: Cut(HIDDEN)}


def test_blocks_come_in_ascending_order_of_loss() -> None:
    parts = attention_parts([profile(i) for i in range(5)])
    found = search_structure(parts, 4 * ATTENTION, num_blocks=4)
    losses = [parts[block].loss(cut) for block, cut in found.items()]
    assert losses == sorted(losses)


def test_attention_goes_where_that_loses_less_than_nodes() -> None:
    """One block has no use for its attention, the other has none for its nodes."""
    nodes = (0, HIDDEN)
    idle_attention = (
        Way(False, ATTENTION, NODE, Recoverability(nodes, (9.0, 0.1))),
        Way(True, 0, NODE, Recoverability(nodes, (9.0, 0.0))),
    )
    idle_nodes = (
        Way(False, ATTENTION, NODE, Recoverability(nodes, (8.0, 8.0))),
        Way(True, 0, NODE, Recoverability(nodes, (0.2, 0.0))),
    )
    parts = [Part((0,), idle_attention), Part((1,), idle_nodes)]
    found = search_structure(parts, ATTENTION + HIDDEN // 2 * NODE)
    assert found == {0: Cut(HIDDEN), 1: Cut(HIDDEN // 2, attention=True)}


def test_a_pruned_block_keeps_a_node_and_loses_one() -> None:
    nodes = (0, HIDDEN)
    parts = [Part((0,), (Way(True, 0, NODE, Recoverability(nodes, (1.0, 0.0))),))]
    assert search_structure(parts, 1) == {0: Cut(HIDDEN - 1, attention=True)}
    assert search_structure(parts, (HIDDEN - 1) * NODE) == {0: Cut(1, attention=True)}
    with pytest.raises(ValueError, match="all blocks cannot save"):
        search_structure(parts, HIDDEN * NODE)


@pytest.mark.parametrize("share", [0.9, 0.8, 0.62])
def test_the_plan_says_what_the_search_found(share: float, model: nn.Module) -> None:
    budget = dcvit.Budget(macs=share)
    fewest = plan(model, budget)
    hidden = compressible(model).hidden_features(fewest.candidates[0])
    nodes = (0, hidden // 2, hidden)
    rng = np.random.default_rng(0)
    compressed, pruned = (
        {b: Recoverability(nodes, tuple(np.sort(rng.exponential(size=3))[::-1].tolist())) for b in blocks}
        for blocks in (fewest.candidates, range(4))
    )
    found, cuts = search(model, fewest, compressed, pruned, dcvit.DCViT())
    left = sum(cut.hidden_features for cut in cuts.values())
    assert found.num_blocks == len(cuts)
    assert found.pruned == tuple(sorted(block for block, cut in cuts.items() if cut.attention))
    assert found.hidden_features == left // len(cuts)
    assert found.drop_ratio == pytest.approx(1 - left / len(cuts) / hidden)
    node = budget.amount(compressible(model).cost().blocks[0].hidden_node)
    assert found.target - node < budget.amount(found.cost) <= found.target
    config = dcvit.DCViT(num_blocks=fewest.num_blocks)  # then no other block is touched
    fixed, cuts = search(model, plan(model, budget, config), compressed, pruned, config)
    assert fixed.num_blocks == len(cuts) == fewest.num_blocks
    assert not fixed.pruned


def test_compress_keeps_what_the_search_found(model: nn.Module, images: Tensor) -> None:
    recovery = dcvit.config.ReconstructionConfig(num_views=8, num_rows=64, epochs=0, refinement_steps=0)
    config = dcvit.DCViT(recovery=recovery, ablation=dcvit.config.Ablation(ranking_images="few-shot"))
    result = dcvit.compress(model, images, dcvit.Budget(macs=0.7), config)
    compressed, pruned = (
        {trial.block: trial.recoverability for trial in trials if trial.recoverability is not None}
        for trials in (result.report.trials, result.report.pruning_trials)
    )
    assert sorted(compressed) == [1, 2]
    assert sorted(pruned) == [0, 1, 2, 3]
    assert all(len(p.nodes) == len(p.losses) > 2 for p in (*compressed.values(), *pruned.values()))
    _, wanted = search(model, plan(model, dcvit.Budget(macs=0.7)), compressed, pruned, config)
    assert {block: len(nodes) for block, nodes in result.plan.kept_nodes.items()} == {
        block: cut.hidden_features for block, cut in wanted.items()
    }
    assert result.plan.pruned == tuple(sorted(block for block, cut in wanted.items() if cut.attention))
    assert len({cut.hidden_features for cut in wanted.values()}) > 1
    for block, shape in enumerate(result.report.blocks_after):
        assert shape.attention == (block not in wanted or wanted[block].attention)
    assert compressible(result.model).cost().total == result.plan.cost
    assert torch.isfinite(result.model(images)).all()


def brute_force(parts: Sequence[Part], saving: int, num_blocks: int | None) -> float:
    """The least loss over every structure of whole numbers of nodes that saves no node too much, if there is one."""
    best: dict[bool, float] = {True: float("inf"), False: float("inf")}
    grain = max(way.node for part in parts for way in part.ways)
    for cuts in product(*[[None, *part.cuts(1)] for part in parts]):
        chosen = [(part, cut) for part, cut in zip(parts, cuts, strict=True) if cut is not None]
        if num_blocks not in (None, sum(len(part.blocks) for part, _ in chosen)):
            continue
        saved = sum(part.saving(cut) for part, cut in chosen)
        if saved >= saving:
            exact = saved - saving <= grain
            best[exact] = min(best[exact], sum(part.loss(cut) for part, cut in chosen))
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
    for size, attention, node, pruned_node, hidden, scale, of_attention in shapes:
        nodes = tuple(range(hidden + 1))
        pruned = tuple(scale * (hidden - n) ** 1.5 for n in nodes)
        compressed = tuple(of_attention + loss for loss in pruned)
        ways = (
            Way(False, attention, node, Recoverability(nodes, compressed)),
            Way(True, 0, pruned_node, Recoverability(nodes, pruned)),
        )
        parts.append(Part(tuple(range(first, first + size)), ways))
        first += size
    saving = max(1, int(share * sum(part.saving(part.smallest()) for part in parts)))
    num_blocks = sum(len(part.blocks) for part in parts) if fixed else None
    cuts = search_structure(parts, saving, num_blocks=num_blocks)
    assert saving_of(parts, cuts) >= saving
    if not fixed:
        for part in parts:  # those of a part go together, to equal numbers of nodes
            assert len({cuts.get(block) for block in part.blocks}) == 1
    # Here a quantum is one unit, so nothing is rounded.
    assert loss_of(parts, cuts) <= brute_force(parts, saving, num_blocks) * (1 + 1e-12) + 1e-12


def sizes_differ() -> list[Part]:
    return [
        Part((0,), (Way(False, 100_000, 1000, Recoverability((0, 300), (4.0, 1.0))),)),
        Part((1, 2), (Way(False, 150_000, 777, Recoverability((0, 300), (9.0, 8.0))),)),
    ]


def test_the_search_gives_back_what_rounding_saved_too_much() -> None:
    parts = sizes_differ()
    cuts = search_structure(parts, 333_333)
    assert cuts.keys() == {0}
    assert 0 <= saving_of(parts, cuts) - 333_333 < 1000
    rounded = search_structure(parts, 333_333, round_to=8)
    assert rounded[0].hidden_features % 8 == 0
    assert 0 <= saving_of(parts, rounded) - 333_333 < 8000


@pytest.mark.parametrize("beyond", [0, 1, 50, 999])
def test_so_many_blocks_save_all_that_they_can(beyond: int) -> None:
    """Down to the last unit, which quanta hide; those that lose least."""
    attention, node = 100_003, 1009
    profiles = [profile(i) for i in range(6)]
    parts = [Part((i,), (Way(False, attention, node, of),)) for i, of in enumerate(profiles)]
    saving = 3 * (attention + HIDDEN * node) - beyond
    found = search_structure(parts, saving, num_blocks=3)
    assert len(found) == 3
    assert saving <= saving_of(parts, found) < saving + node
    assert set(found) == set(sorted(range(6), key=lambda i: profiles[i].loss(0))[:3])
    with pytest.raises(ValueError, match="3 blocks cannot save"):
        search_structure(parts, 3 * (attention + HIDDEN * node) + 1, num_blocks=3)


@pytest.mark.parametrize("round_to", [8, 12])
def test_the_least_that_a_pruned_block_keeps_is_a_multiple_too(round_to: int) -> None:
    way = Way(True, 0, NODE, Recoverability((0, HIDDEN), (1.0, 0.0)))
    parts = [Part((0,), (way,)), Part((1,), (way,))]
    most = 2 * (HIDDEN - round_to) * NODE
    assert search_structure(parts, most, round_to=round_to) == {0: Cut(round_to, True), 1: Cut(round_to, True)}
    with pytest.raises(ValueError, match="all blocks cannot save"):
        search_structure(parts, most + 1, round_to=round_to)


def test_the_search_refuses_what_cannot_be_saved() -> None:
    parts = [
        Part((0,), (Way(False, 10, 1, Recoverability((0, 5), (2.0, 1.0))),)),
        Part((1,), (Way(False, 20, 2, Recoverability((0, 5), (2.0, 1.0))),)),
    ]
    assert search_structure(parts, 45) == {0: Cut(0), 1: Cut(0)}
    with pytest.raises(ValueError, match="all blocks cannot save 46"):
        search_structure(parts, 46)
    with pytest.raises(ValueError, match="1 blocks cannot save 31"):
        search_structure(parts, 31, num_blocks=1)
