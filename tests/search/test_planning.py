"""Budgets and the structures that meet them."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dcvit
from dcvit.artifacts.result import save_model
from dcvit.costs import MAC_CONVENTIONS, MacConvention, file_size
from dcvit.history import Plan, SensitivityCurve
from dcvit.metrics.memory import trace_activation_memory
from dcvit.models import compressible
from dcvit.models.surgery import compress_block, draw_kept_units, pruned_skeleton
from dcvit.search.plan import plan as make_plan
from dcvit.search.plan import search
from tests.variants import VARIANTS, Variant

MODEL = VARIANTS["plain"].create(depth=12)
COST = compressible(MODEL).cost()
FEWEST = dcvit.DCViT(structure="fewest")
BLOCK = COST.blocks[1]


def build(model: nn.Module, plan: Plan) -> nn.Module:
    for block in plan.candidates[: plan.num_blocks]:
        model = compress_block(model, block, draw_kept_units(model, block, plan.hidden_features, seed=0))
    return model


@settings(deadline=None, max_examples=12, derandomize=True)
@given(
    fraction=st.floats(0.35, 0.97),
    metric=st.sampled_from(["macs", "params"]),
    convention=st.sampled_from(MAC_CONVENTIONS),
)
def test_any_budget_in_range_is_met_within_a_hidden_unit_per_block(
    fraction: float, metric: str, convention: MacConvention
) -> None:
    budget = dcvit.Budget(**{metric: fraction}, convention=convention)
    plan = make_plan(MODEL, budget)
    unit = budget.amount(BLOCK.hidden_unit)
    actual = budget.amount(compressible(build(MODEL, plan)).cost().total)
    assert 0 <= plan.target - actual < plan.num_blocks * unit
    assert actual == budget.amount(plan.cost)
    # The published formulas: k = ceil((o - p) / (a + m)), o - p = k (a + r_d m) before rounding.
    excess = budget.amount(COST.total) - plan.target
    attention, hidden = budget.amount(BLOCK.attention), BLOCK.hidden_features
    mlp = budget.amount(BLOCK.mlp)
    fewest = -(-excess // (attention + mlp))
    assert (
        plan.num_blocks == fewest or metric == "params"
    )  # some parameters of an MLP stay, so there it may be one more
    assert plan.num_blocks <= fewest + 1
    assert plan.drop_ratio * hidden == pytest.approx(hidden - plan.hidden_features)
    assert abs(plan.drop_ratio * hidden * unit - (excess / plan.num_blocks - attention)) <= unit


def test_every_variant_meets_its_budget(variant: Variant) -> None:
    model = variant.create()
    for budget in (dcvit.Budget(macs=0.8), dcvit.Budget(params=0.8), dcvit.Budget(params=0.7)):
        plan = make_plan(model, budget)
        actual = budget.amount(compressible(build(model, plan)).cost().total)
        unit = budget.amount(compressible(model).cost().blocks[1].hidden_unit)
        assert 0 <= plan.target - actual < plan.num_blocks * unit


def test_absolute_budget_is_the_fraction_of_it() -> None:
    whole = COST.total.macs("with_attention_products")
    absolute = make_plan(MODEL, dcvit.Budget(macs=int(0.75 * whole)))
    assert replace(absolute, budget=dcvit.Budget(macs=0.75)) == make_plan(MODEL, dcvit.Budget(macs=0.75))


@pytest.mark.parametrize("value", [0.72, 5_000_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_file_size_is_met_by_the_saved_file(value: float | int, dtype: torch.dtype, tmp_path: Path) -> None:
    model = VARIANTS["plain"].create(depth=12, embed_dim=96).to(dtype)

    def saved(model: nn.Module) -> int:
        save_model(model, tmp_path / "saved")
        return (tmp_path / "saved" / "model.safetensors").stat().st_size

    original = saved(model)
    assert file_size(model.state_dict()) == original
    plan = make_plan(model, dcvit.Budget(file_size=value))
    assert plan.target == (value if isinstance(value, int) else int(value * original))
    student = build(model, plan)
    actual = saved(student)
    assert file_size(student.state_dict()) == actual
    unit = plan.num_blocks * (2 * 96 + 1) * dtype.itemsize
    header = original - sum(t.nbytes for t in model.state_dict().values())
    assert 0 <= plan.target - actual < unit + header


def test_file_size_out_of_range_is_said_in_bytes() -> None:
    whole = file_size(MODEL.state_dict())
    with pytest.raises(dcvit.errors.BudgetError, match=rf"file_size=0.01 asks for {int(0.01 * whole):,} of {whole:,}"):
        make_plan(MODEL, dcvit.Budget(file_size=0.01))


@pytest.mark.slow
def test_activation_memory_needs_every_block() -> None:
    original = trace_activation_memory(MODEL, 16)
    with pytest.raises(
        dcvit.errors.BudgetError, match="2 blocks stay uncompressed, so no choice of hidden units lowers it"
    ) as caught:
        make_plan(MODEL, dcvit.Budget(activation_memory=0.9, batch_size=16))
    assert f"{original:,} is all that 10 compressed blocks can meet" in str(caught.value)
    assert "Allow all 12 blocks" in str(caught.value)

    everything = dcvit.DCViT(candidates=tuple(range(12)))
    # The hidden units of the attention-free blocks take 10 of the original's 12 units, so hidden units decide.
    for budget in (
        dcvit.Budget(activation_memory=0.6, batch_size=16),
        dcvit.Budget(activation_memory=150_000, batch_size=16),
    ):
        plan = make_plan(MODEL, budget, everything)
        assert plan.num_blocks == 12
        assert trace_activation_memory(build(MODEL, plan), budget.batch_size) <= plan.target
        larger = replace(plan, hidden_features=plan.hidden_features + 1)
        assert trace_activation_memory(build(MODEL, larger), budget.batch_size) > plan.target
    with pytest.raises(dcvit.errors.BudgetError, match="12 compressed blocks can meet"):
        make_plan(MODEL, dcvit.Budget(activation_memory=0.01), everything)
    with pytest.raises(dcvit.errors.BudgetError, match="12 compressed blocks can meet"):
        make_plan(MODEL, dcvit.Budget(activation_memory=10**12), everything)


@pytest.mark.parametrize("budget", [dcvit.Budget(macs=0.78), dcvit.Budget(params=0.715), dcvit.Budget(file_size=0.75)])
def test_kept_hidden_units_are_rounded_down_within_the_budget(budget: dcvit.Budget) -> None:
    exact = make_plan(MODEL, budget)
    rounded = make_plan(MODEL, budget, dcvit.DCViT(round_to=8))
    assert exact.hidden_features % 8
    assert rounded.num_blocks == exact.num_blocks
    assert rounded.hidden_features == exact.hidden_features - exact.hidden_features % 8
    assert rounded.cost.params < exact.cost.params


def test_rounding_to_nothing_takes_one_block_more_or_is_refused() -> None:
    whole = COST.total - (BLOCK.attention + BLOCK.mlp) * 3
    budget = dcvit.Budget(macs=(whole + BLOCK.hidden_unit * 9).macs("with_attention_products"))
    assert (make_plan(MODEL, budget).num_blocks, make_plan(MODEL, budget).hidden_features) == (3, 3)
    more = make_plan(MODEL, budget, dcvit.DCViT(round_to=8))
    assert more.num_blocks == 4
    assert more.hidden_features >= 8
    with pytest.raises(dcvit.errors.BudgetError, match=r"round_to=8: macs=\d+ leaves each of 3 blocks 3 hidden units"):
        make_plan(MODEL, budget, dcvit.DCViT(round_to=8, num_blocks=3))
    nothing = dcvit.Budget(macs=whole.macs("with_attention_products"))
    assert make_plan(MODEL, nothing, dcvit.DCViT(round_to=8)).hidden_features == 0
    with pytest.raises(dcvit.errors.BudgetError, match="a block has only 192 hidden units"):
        make_plan(MODEL, budget, dcvit.DCViT(round_to=193))


def test_plan_of_a_latency_says_who_measures() -> None:
    with pytest.raises(
        dcvit.errors.BudgetError,
        match=r"latency_ms=12: latency has to be measured, call dcvit.search.latency.plan_latency",
    ):
        make_plan(MODEL, dcvit.Budget(latency_ms=12))


def test_more_blocks_lose_less_each() -> None:
    fewest = make_plan(MODEL, dcvit.Budget(macs=0.75))
    more = make_plan(MODEL, dcvit.Budget(macs=0.75), dcvit.DCViT(num_blocks=fewest.num_blocks + 1))
    assert more.num_blocks == fewest.num_blocks + 1
    assert more.hidden_features > fewest.hidden_features


def test_candidates() -> None:
    assert make_plan(MODEL, dcvit.Budget(macs=0.75)).candidates == tuple(range(1, 11))
    config = dcvit.DCViT(candidates=(10, 2, 5, 2))
    assert config.candidates == (2, 5, 10)
    assert make_plan(MODEL, dcvit.Budget(macs=0.9), config).candidates == (2, 5, 10)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "exactly one of macs, params, file_size"),
        ({"macs": 0.5, "params": 0.5}, r"Budget\(macs=0.5, params=0.5\): expected exactly one"),
        ({"macs": 0}, "must be positive"),
        ({"macs": 0.0}, "fraction of the original"),
        ({"macs": -5}, "must be positive"),
        ({"macs": 1.5}, "Pass an int for an absolute number of macs"),
        ({"params": 1.0}, "fraction of the original"),
        ({"macs": float("nan")}, "fraction of the original"),
        ({"macs": True}, "expected a float"),
        ({"macs": "0.75"}, "expected a float"),
        ({"macs": 0.75, "convention": "thop"}, "with_attention_products"),
        ({"file_size": 1.5}, "Pass an int for an absolute number of file_size"),
        ({"activation_memory": 0}, "must be positive"),
        ({"activation_memory": 0.5, "batch_size": 0}, "batch_size=0"),
        ({"latency": 12}, "For milliseconds pass latency_ms="),
        ({"latency": 1.2}, "For milliseconds pass latency_ms="),
        ({"latency_ms": 0}, "pass a fraction of the original as latency="),
        ({"latency_ms": float("inf")}, "positive number of milliseconds"),
        ({"latency_ms": "12"}, "expected a float"),
    ],
)
def test_malformed_budgets(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(dcvit.errors.BudgetError, match=message):
        dcvit.Budget(**kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("fraction", [0.05, 0.999])
def test_unreachable_budget_says_what_can_be_met(fraction: float) -> None:
    with pytest.raises(dcvit.errors.BudgetError) as caught:
        make_plan(MODEL, dcvit.Budget(macs=fraction), FEWEST)
    low, high = (float(x) for x in str(caught.value).split("(")[2].split(")")[0].split(" to "))
    assert make_plan(MODEL, dcvit.Budget(macs=low + 1e-4), FEWEST).num_blocks == 10
    assert make_plan(MODEL, dcvit.Budget(macs=high - 1e-4), FEWEST).num_blocks == 1
    with pytest.raises(dcvit.errors.BudgetError):
        make_plan(MODEL, dcvit.Budget(macs=low - 2e-4), FEWEST)
    assert ("Allow all 12 blocks" in str(caught.value)) == (fraction == 0.05)


def test_gaps_of_models_whose_attention_outweighs_the_mlp() -> None:
    """With more tokens than twice the width, one block's range and two blocks' do not meet."""
    model = VARIANTS["plain"].create(img_size=256, patch_size=16, embed_dim=24, num_heads=2)
    cost = compressible(model).cost()
    block = cost.blocks[1]
    assert block.attention.macs("with_attention_products") > block.mlp.macs("with_attention_products")
    total = cost.total.macs("with_attention_products")
    between = total - (block.attention + block.mlp).macs("with_attention_products") - 1
    with pytest.raises(dcvit.errors.BudgetError, match=r" or .* to "):
        make_plan(model, dcvit.Budget(macs=between), FEWEST)
    unit = block.hidden_unit.macs("with_attention_products")
    assert (
        between - 12 * unit
        < make_plan(model, dcvit.Budget(macs=between)).cost.macs("with_attention_products")
        <= between
    )


@pytest.mark.parametrize("metric", ["macs", "params"])
def test_pruning_reaches_budgets_that_attention_is_too_large_for(metric: str) -> None:
    total, unit = (getattr(cost, metric) if metric == "params" else cost.macs("with_attention_products")
                   for cost in (COST.total, BLOCK.hidden_unit))  # fmt: skip
    for target in (total - 1, total - 5 * unit, int(0.99 * total)):
        plan = make_plan(MODEL, dcvit.Budget(**{metric: target}))
        assert plan.pruned
        assert target - unit < dcvit.Budget(**{metric: target}).amount(plan.cost) <= target
    with pytest.raises(
        dcvit.errors.BudgetError, match=r"10 candidate blocks can meet [\d,]+ to [\d,]+ \(0.\d+ to [\d.]+\)"
    ):
        make_plan(MODEL, dcvit.Budget(**{metric: total}))
    least = make_plan(MODEL, dcvit.Budget(**{metric: total - unit}))
    assert (least.num_blocks, least.hidden_features) == (1, BLOCK.hidden_features - 1)
    assert least.pruned in [(block,) for block in range(12)]


def test_what_may_be_pruned() -> None:
    """The ends too, unless the caller names candidates; nothing where the number of compressed blocks is fixed."""
    everything = dcvit.search.space.search_space(MODEL, dcvit.DCViT())
    assert everything.prunable == tuple((block,) for block in range(12))
    named = dcvit.search.space.search_space(MODEL, dcvit.DCViT(candidates=(3, 5)))
    assert named.prunable == named.groups == ((3,), (5,))
    for config in (dcvit.DCViT(num_blocks=2), FEWEST, dcvit.DCViT.paper()):
        assert dcvit.search.space.search_space(MODEL, config).prunable == ()
    post_norm = VARIANTS["post_norm"].create()
    assert dcvit.search.space.search_space(post_norm, dcvit.DCViT()).prunable == ()


def test_so_many_blocks_meet_the_least_that_they_are_said_to_meet() -> None:
    """The search too, whatever blocks lose."""
    config = dcvit.DCViT(num_blocks=3)
    with pytest.raises(dcvit.errors.BudgetError, match="can meet") as refused:
        make_plan(MODEL, dcvit.Budget(macs=0.01), config)
    found = re.search(r"can meet ([\d,]+) to", str(refused.value))
    assert found is not None
    lowest = int(found.group(1).replace(",", ""))
    cost = compressible(MODEL).cost()
    for target in (lowest, lowest + 1, lowest + 4999):
        planned = make_plan(MODEL, dcvit.Budget(macs=target), config)
        losses = {
            block: SensitivityCurve((0, of.hidden_features), (1.0 + block, 0.5)) for block, of in enumerate(cost.blocks)
        }
        chosen, specs = search(MODEL, planned, losses, {}, config)
        assert len(specs) == 3
        assert chosen.cost.macs("with_attention_products") <= target


def test_more_blocks_are_named_where_some_have_nothing_to_remove() -> None:
    config = dcvit.DCViT(candidates=(1,))
    with pytest.raises(dcvit.errors.BudgetError, match=r"candidates=\(0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11\)"):
        make_plan(pruned_skeleton(MODEL, {3: 10}), dcvit.Budget(macs=0.2), config)


def test_bad_choices() -> None:
    with pytest.raises(dcvit.errors.BudgetError, match="block 12 does not exist"):
        make_plan(MODEL, dcvit.Budget(macs=0.75), dcvit.DCViT(candidates=(1, 12)))
    with pytest.raises(dcvit.errors.BudgetError, match="only 10 candidate blocks"):
        make_plan(MODEL, dcvit.Budget(macs=0.75), dcvit.DCViT(num_blocks=11))
    with pytest.raises(dcvit.errors.BudgetError, match="asks for"):
        make_plan(MODEL, dcvit.Budget(macs=0.75), dcvit.DCViT(num_blocks=1))


def test_plan_survives_json() -> None:
    plan = replace(
        make_plan(MODEL, dcvit.Budget(params=0.7)), blocks=(3, 1), kept_units={3: (0, 2), 1: (1, 5)}, pruned=(1,)
    )
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
