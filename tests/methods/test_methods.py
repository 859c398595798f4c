"""The methods behind `compress(method=...)`: what defines each, on cases small enough to check by hand."""

import copy
import json
import re
from dataclasses import fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

import dcvit
from dcvit.artifacts.card import pruning_kind, shared_weights
from dcvit.artifacts.result import read_record, save_model
from dcvit.budget import METRICS
from dcvit.context import RunContext
from dcvit.data.images import load_images
from dcvit.methods import FSKD, METHODS, EViT, MiR, Practise, Task, method_of
from dcvit.methods.baselines import autoformer
from dcvit.methods.baselines.cd import cd, mix
from dcvit.methods.baselines.fskd import absorb, fit_map, fskd
from dcvit.methods.baselines.groups import PrunableGroup, Space, gated, open_gates, scores_of
from dcvit.methods.baselines.layerwise import l1_norms, layer_pairs
from dcvit.methods.baselines.mir import distil_features, evenly_spaced, features, mir
from dcvit.methods.baselines.practise import practise
from dcvit.methods.baselines.s2vite import first_order_scores
from dcvit.methods.baselines.spvit import Equations, fit_convolutions
from dcvit.methods.baselines.vtp import learn_gates
from dcvit.metrics.cost import spent
from dcvit.models import DroppedBlock, compressible
from dcvit.models.modeling.variations import ConvolutionalAttention, FusingBlock
from dcvit.models.teacher import freeze
from dcvit.models.vision_transformer import convolution_of, fuse_tokens
from dcvit.recovery.calibration import draw_views
from dcvit.recovery.ridge import NormalEquations
from tests.conftest import PUBLISHED, quick, slow_but
from tests.variants import REPRESENTATIVES, VARIANTS, Variant
from tests.without_dcvit import output_without_dcvit, run_without

UNAUGMENTED = {"augmentation": None, "num_rows": 10**6}
BUDGETS = {"evit": dcvit.Budget(macs=0.8), "mini_deit": dcvit.Budget(params=0.7)}
"""What they can save; of so few tokens evit cannot more."""

DEPTH = 6


@pytest.fixture
def deep() -> Any:
    return VARIANTS["plain"].create(depth=DEPTH)


@pytest.fixture(autouse=True)
def _short_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the methods evolve and learn gates for a few steps only."""
    monkeypatch.setattr(autoformer, "POPULATION", 5)
    monkeypatch.setattr(autoformer, "GENERATIONS", 2)
    for method in ("spvit", "vtp"):
        monkeypatch.setattr(f"dcvit.methods.baselines.{method}.learn_gates", partial(learn_gates, steps=20))


@cache
def compressed(name: str) -> dcvit.CompressionResult:
    """The result of a method, for all tests that look at one."""
    return dcvit.compress(
        VARIANTS["plain"].create(depth=DEPTH), some_images(), BUDGETS.get(name, dcvit.Budget(macs=0.7)), quick(name)
    )


def some_images() -> Tensor:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def task(model: nn.Module, images: Tensor, budget: dcvit.Budget, config: dcvit.config.MethodConfig) -> Task[Any]:
    teacher = freeze(model)
    return Task(teacher, dcvit.load_images(images, teacher), budget, config, RunContext())


# The table.


def test_every_entry_is_complete() -> None:
    assert set(METHODS) == {
        "autoformer", "cd", "dcvit", "evit", "fskd", "mini_deit", "mir", "practise", "s2vite", "spvit", "vtp",
    }  # fmt: skip
    for name, entry in METHODS.items():
        assert method_of(name) == (entry, entry.config())
        assert method_of(entry.config(seed=5)) == (entry, entry.config(seed=5))
        assert entry.name == name
        assert all(getattr(entry, field.name) for field in fields(entry) if field.name != "resumable")
        assert entry.resumable == (name == "dcvit")
        assert set(entry.metrics) <= set(METRICS)
        assert re.search(r"arXiv \d{4}\.\d{5}$", entry.source)
        assert entry.config.__name__.lower() == name.replace("_", "")
        assert getattr(dcvit.methods, entry.config.__name__) is entry.config


def test_an_unknown_name_is_refused_with_the_list(model: nn.Module, images: Tensor) -> None:
    told = r"expected a config \(.*DCViT.*\), or the name of a method, one of .*dcvit.*`dcvit methods`"
    for given in ("dcvi", dcvit.DCViT, None):
        with pytest.raises(dcvit.DcvitError, match=told):
            dcvit.compress(model, images, dcvit.Budget(macs=0.7), method=given)  # type: ignore[arg-type]
    with pytest.raises(dcvit.DcvitError, match="a sweep supports only dcvit's own method"):
        dcvit.sweep(model, images, method=FSKD())  # type: ignore[arg-type]


def test_what_a_method_cannot_do_is_refused(model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = dcvit.Budget(macs=0.7)
    with pytest.raises(dcvit.DcvitError, match="only dcvit uses a proxy set"):
        dcvit.compress(model, images, budget, method="mir", proxy_set=dcvit.data.synthesis.ProxySet(images))
    with pytest.raises(
        dcvit.errors.BudgetError, match=r"latency=0\.7: method='fskd' meets only budgets of macs, params, file_size"
    ):
        dcvit.compress(model, images, dcvit.Budget(latency=0.7), method="fskd")
    monkeypatch.setitem(METHODS, "fskd", replace(METHODS["fskd"], families=("swin",)))
    with pytest.raises(
        dcvit.errors.UnsupportedModelError, match=r"of the family swin, and this one is a vit: choose .*dcvit"
    ):
        dcvit.compress(model, images, budget, method="fskd")


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("dcvit", "evit", "mini_deit")])
def test_budgets_out_of_range_are_refused(name: str, model: nn.Module, images: Tensor) -> None:
    for budget, text in (
        (dcvit.Budget(macs=0.01), r"macs=0\.01 asks for [\d,]+: with.* are left\. Ask for more"),
        (dcvit.Budget(params=10**9), r"params=1000000000: the original has only [\d,]+\. Ask for less"),
    ):
        with pytest.raises(dcvit.errors.BudgetError, match=text):
            dcvit.compress(model, images, budget, quick(name))


# All of them.


@pytest.mark.parametrize("metric", slow_but(["macs", "params", "file_size"], "macs"))
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("evit", "mini_deit")])
def test_budgets_are_met_from_below(name: str, metric: str, deep: nn.Module) -> None:
    budget = dcvit.Budget(**{metric: 0.7})
    result = compressed(name) if metric == "macs" else dcvit.compress(deep, some_images(), budget, quick(name))
    original, used = spent(deep, budget), spent(result.model, budget)
    assert used <= 0.7 * original
    # Nothing is wasted: less than the next size is left over, a block or a hidden unit in each block.
    step = original / DEPTH if result.plan.hidden_features == 0 else original * 2 / 192
    assert used > 0.7 * original - step
    assert result.plan.cost == compressible(result.model).cost().total


@pytest.mark.parametrize("name", METHODS)
def test_results_are_saved_reported_and_loaded(name: str, images: Tensor, tmp_path: Path) -> None:
    result = compressed(name)
    assert result.report.method == name
    result.save(tmp_path / "small")
    with torch.no_grad():
        expected = result.model(images)
        assert torch.equal(dcvit.load(tmp_path / "small").model(images), expected)
        assert torch.equal(
            timm.create_model(f"local-dir:{tmp_path / 'small'}", pretrained=True).eval()(images), expected
        )
    loaded = dcvit.load(tmp_path / "small")
    assert loaded.plan == result.plan
    assert loaded.report == replace(result.report, settings=loaded.report.settings)
    card, page = (tmp_path / "small" / "README.md").read_text(), dcvit.write_report(tmp_path / "small").read_text()
    blocks = ", ".join(map(str, sorted(result.plan.blocks)))
    if name == "dcvit":
        assert "with the method" not in card
        without = sorted(set(result.plan.blocks) - set(result.plan.pruned))
        assert result.plan.pruned
        assert ("without the attention of" in card) == bool(without)
        assert f"of the blocks {blocks} (counted from 0) on average {result.plan.hidden_features} hidden units" in card
        listed = ", ".join(f"{block} ({len(result.plan.kept_units[block])})" for block in result.plan.pruned)
        assert (
            f"These blocks lost hidden units and keep their attention (hidden units that each keeps): {listed}." in page
        )
        return
    assert f"with the method {name}" in card
    assert f"by the method {name}" in page
    assert "synthesised images:" not in page  # which they do not need
    if name == "evit":
        assert f"after the attention of the blocks {blocks} (counted from 0), only 0.333 of the patch tokens" in card
        assert (
            f"These blocks keep only a share of the patch tokens behind their attention: {blocks[0]} (0.333)," in page
        )
    elif name == "mini_deit":
        told = "; ".join(shared_weights(result.plan.to_dict()))
        assert re.match(r"one attention for the blocks \d, \d|one MLP for the blocks \d, \d", told)
        assert f": {told}. Blocks count from 0, and each has its own transformation." in card
        assert f"Weights are shared: {told}." in page
    elif name in ("s2vite", "vtp", "autoformer"):
        heads = ", ".join(f"{block} ({len(kept)})" for block, kept in result.plan.kept_heads.items())
        assert (
            f"with fewer attention heads in the block{'s' * (len(result.plan.kept_heads) > 1)} {heads}: " in card
        ) == (bool(heads))
        assert (f"These blocks lost attention heads (heads that each keeps): {heads}." in page) == bool(heads)
    elif name == "spvit":
        assert f"of the blocks {blocks} (counted from 0) " in card
        assert ("attention stays" in card) == (not result.plan.convolved)
    elif name in ("practise", "mir"):
        assert f": without the blocks {blocks} (counted from 0)." in card
        assert f"These blocks were dropped whole: {blocks}." in page
        assert ("Which blocks recover" in page) == (name == "practise")
    else:
        kept = result.plan.hidden_features
        assert (
            f"attention stays; of the blocks {blocks} (counted from 0) {kept} hidden units of the MLP are left" in card
        )
        assert (
            f"These blocks lost hidden units and keep their attention (hidden units that each keeps): 0 ({kept})"
            in page
        )


# evit draws nothing; tests/e2e/test_compression.py shows it of dcvit, with the refinement.
@pytest.mark.parametrize("name", slow_but([name for name in METHODS if name != "evit"], "practise", "vtp"))
def test_the_same_seed_gives_the_same_result(name: str, deep: nn.Module) -> None:
    before, budget = copy.deepcopy(deep.state_dict()), BUDGETS.get(name, dcvit.Budget(macs=0.7))
    again, other = (dcvit.compress(deep, some_images(), budget, quick(name, seed=seed)).model for seed in (0, 1))
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (compressed(name).model, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert len(weights[0]) != len(weights[2]) or not torch.equal(weights[0], weights[2])
    assert all(torch.equal(value, before[key]) for key, value in deep.state_dict().items())


@pytest.mark.parametrize("name", slow_but(["fskd", "cd"], "cd"))
def test_layers_are_fitted_in_a_variant(name: str, representative: Variant) -> None:
    model = representative.create()
    images = torch.randn(6, *compressible(model).input_size())
    result = dcvit.compress(model, images, dcvit.Budget(macs=0.8), quick(name, **UNAUGMENTED))
    assert spent(result.model, result.plan.budget) <= result.plan.target
    assert result.report.distillation_loss == result.report.distillation_loss
    assert [one.block for one in result.report.reconstructions] == list(result.plan.blocks)


@pytest.mark.parametrize(
    "name",
    slow_but(
        [name for name in METHODS if name not in ("dcvit", "fskd", "cd", "evit")], "mini_deit", "mir", "practise", "vtp"
    ),
)
def test_a_smaller_micro_batch_changes_only_rounding(
    name: str, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[int] = []
    embed = PatchEmbed.forward
    monkeypatch.setattr(PatchEmbed, "forward", lambda self, x: (passed.append(len(x)), embed(self, x))[1])
    images = load_images(torch.randn(6, 3, 32, 32), model)
    outputs = []
    for micro_batch in (None, 2):
        config = quick(name, learning_rate=1e-3, micro_batch=micro_batch)
        task = Task(freeze(model), images, BUDGETS.get(name, dcvit.Budget(macs=0.8)), config, RunContext())
        passed.clear()
        student = METHODS[name].compress(task).student
        assert max(passed) == config.micro_batch_size == (micro_batch or 4)
        with torch.no_grad():
            outputs.append(student(images.normalised))
    torch.testing.assert_close(*outputs, rtol=1e-2, atol=1e-2)


# Pruned MLPs.


def test_pruned_blocks_of_unequal_widths_load_without_dcvit(tmp_path: Path) -> None:
    """Block 0 pruned, 1 compressed and widest, 2 dropped, 3 pruned further."""
    expected = {}
    images = {}
    for name in ("plain", "swiglu_packed", "swiglu_rmsnorm", "mlp_norm"):
        model = VARIANTS[name].create()
        view = compressible(model)
        hidden = view.hidden_features(0)
        view.prune_block(0, range(hidden // 2))
        view.compress_block(1, range(hidden - 1))
        view.drop_block(2)
        view.prune_block(3, range(1, hidden // 3))
        cost = view.cost().blocks
        assert [block.hidden_features for block in cost] == [hidden // 2, hidden - 1, 0, hidden // 3 - 1]
        assert [block.compressible for block in cost] == [True, False, False, True]
        student = view.rebuild().eval()
        assert compressible(student).config()["model_args"]["per_layer_config"] == {
            "0": {"skip": [], "intermediate_size": hidden // 2},
            "2": {"skip": ["attention", "mlp"]},
            "3": {"skip": [], "intermediate_size": hidden // 3 - 1},
            "1": {"skip": ["attention"], "intermediate_size": hidden - 1},
        }
        images[name] = torch.randn(2, *view.input_size())
        save_model(student, tmp_path / name)
        with torch.no_grad():
            expected[name] = student(images[name])
            torch.testing.assert_close(model(images[name]), expected[name])
    torch.save(images, tmp_path / "images.pt")
    code = f"""
import sys, timm, torch
sys.path.insert(0, "plain")
import modeling_dcvit
images = torch.load("images.pt")
with torch.no_grad():
    torch.save({{name: timm.create_model(f"local-dir:{{name}}", pretrained=True).eval()(images[name])
                for name in {list(expected)}}}, "outputs.pt")
"""
    run_without(code, tmp_path)
    for name, output in torch.load(tmp_path / "outputs.pt").items():
        torch.testing.assert_close(output, expected[name], rtol=1e-4, atol=1e-4)


def test_pruning_keeps_what_the_hidden_units_compute(model: Any, images: Tensor) -> None:
    """A hidden unit without outgoing weights can be pruned; without incoming ones, its norm is the least."""
    view = compressible(model)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[7] = 0
        model.blocks[1].mlp.fc2.weight[:, 7] = 0
        before = model(images)
        assert int(l1_norms(model, 1).argmin()) == 7
        view.prune_block(1, [unit for unit in range(192) if unit != 7])
        torch.testing.assert_close(model(images), before)


# PRACTISE.


def test_practise_drops_the_blocks_of_least_score(deep: Any, images: Tensor) -> None:
    with torch.no_grad():
        for layer in (deep.blocks[3].attn.proj, deep.blocks[3].mlp.fc2):
            layer.weight.zero_()  # dropping block 3 costs nothing
            layer.bias.zero_()
    config = Practise(distillation=replace(PUBLISHED.distillation, learning_rate=1e-7))
    outcome = practise(task(deep, images, dcvit.Budget(macs=0.7), config))
    assert outcome.plan.blocks == tuple(probe.block for probe in outcome.probes[:3])
    assert outcome.plan.blocks[0] == 3
    assert outcome.probes[0].metric_loss < 1e-3 * outcome.probes[1].metric_loss
    assert [probe.metric_loss for probe in outcome.probes] == sorted(probe.metric_loss for probe in outcome.probes)
    assert len(outcome.steps[0].losses) == 3 * config.distillation.epochs
    student: Any = outcome.student
    assert {i for i, block in enumerate(student.blocks) if isinstance(block, DroppedBlock)} == set(outcome.plan.blocks)


# MiR.


def test_blocks_are_evenly_spaced() -> None:
    assert evenly_spaced(range(1, 11), 1) == (6,)
    assert evenly_spaced(range(1, 11), 2) == (3, 8)
    assert evenly_spaced((2, 4, 6), 3) == (2, 4, 6)
    assert all(len(set(evenly_spaced(range(10), count))) == count for count in range(1, 11))


def test_mir_keeps_the_head_and_changes_all_before_it(deep: Any, images: Tensor) -> None:
    outcome = mir(task(deep, images, dcvit.Budget(macs=0.7), quick("mir")))
    student: Any = outcome.student
    assert torch.equal(student.head.weight, deep.head.weight)
    assert torch.equal(student.head.bias, deep.head.bias)
    for name, parameter in student.named_parameters():
        assert name.startswith("head.") == torch.equal(parameter, deep.get_parameter(name)), name
    assert outcome.steps[0].loss_after < outcome.steps[0].loss_before


def test_only_features_are_distilled(model: Any, images: Tensor) -> None:
    """A student with other tokens but the same class token has nothing to learn."""
    teacher = freeze(model)
    student = copy.deepcopy(teacher)
    last = student.blocks[-1]

    class ClassTokenAlone(nn.Module):
        def forward(self, x: Tensor, **masks: object) -> Tensor:
            out: Tensor = last(x)
            return torch.cat([out[:, :1], 0 * out[:, 1:]], dim=1)

    student.blocks[-1] = ClassTokenAlone()
    few_shot = dcvit.load_images(images, teacher)
    assert not torch.equal(student.forward_features(images), teacher.forward_features(images))
    settings = dcvit.config.TrainingConfig(epochs=1, learning_rate=1e-4, weight_decay=0.0, batch_size=4)
    student.blocks[-1].last = last
    recovery = distil_features(student, teacher, few_shot, settings)
    assert recovery.loss_before == recovery.losses[0] == 0
    student.blocks[-1] = last
    with torch.no_grad():
        last.mlp.fc2.bias.add_(1.0)
    found = distil_features(student, teacher, few_shot, replace(settings, epochs=0))
    expected = (features(student, images) - features(teacher, images)).square().mean()
    assert found.loss_before == pytest.approx(float(expected), rel=1e-5)


def test_mir_finds_a_learning_rate(model: nn.Module, images: Tensor) -> None:
    training = dcvit.config.TrainingConfig(learning_rates=(1e-8, 1e-4), epochs=5, warmup_epochs=1, batch_size=4)
    outcome = mir(task(model, images, dcvit.Budget(macs=0.8), MiR(training=training)))
    assert outcome.learning_rate == 1e-4
    with pytest.raises(ValueError, match="needs a number"):
        distil_features(model, model, dcvit.load_images(images, model), training)


# FSKD.


@pytest.mark.parametrize("bias", [True, False])
def test_an_absorbed_map_changes_nothing(bias: bool) -> None:
    linear_map = torch.randn(5, 5, dtype=torch.float64)
    for layer, given in (
        (nn.Linear(7, 5, bias=bias), torch.randn(3, 7)),
        (nn.Conv2d(7, 5, 3, padding=1, bias=bias), torch.randn(2, 7, 6, 6)),
    ):
        with torch.no_grad():
            output = layer(given)
            expected = torch.einsum("ed,nd...->ne...", linear_map.float(), output)
            absorb(layer, linear_map)
            torch.testing.assert_close(layer(given), expected, rtol=1e-5, atol=1e-6)


def test_the_map_is_the_least_squares_solution() -> None:
    given = torch.randn(200, 6, dtype=torch.float64)
    wanted = given @ torch.randn(6, 6, dtype=torch.float64) + torch.randn(200, 6, dtype=torch.float64)
    found = fit_map(NormalEquations.of([(given, wanted)]))
    torch.testing.assert_close(found.T, torch.linalg.lstsq(given, wanted).solution, rtol=1e-6, atol=1e-6)
    # One equation leaves five of six directions open: there the features stay.
    found = fit_map(NormalEquations.of([(given[:1], wanted[:1])]))
    torch.testing.assert_close(given[:1] @ found.T, wanted[:1], rtol=1e-5, atol=1e-5)
    across = torch.linalg.svd(given[:1]).Vh[1:]
    torch.testing.assert_close(across @ found.T, across, rtol=1e-5, atol=1e-5)


def pruned(deep: Any, images: Tensor, name: str) -> tuple[nn.Module, Any, Any, Any]:
    """The teacher, the fitted student, a copy that is pruned and not fitted, and the views, all in float64."""
    config: Any = quick(name, **UNAUGMENTED)
    given = task(deep.double(), images.double(), dcvit.Budget(macs=0.8), config)
    outcome = {"fskd": fskd, "cd": cd}[name](given)
    bare = copy.deepcopy(given.teacher)
    for block, units in outcome.plan.kept_units.items():
        compressible(bare).prune_block(block, units)
    views = draw_views(given.teacher, given.images, config.calibration, 0)
    return given.teacher, outcome.student, bare, views


def test_fskd_fits_on_the_students_own_activations(deep: Any, images: Tensor) -> None:
    teacher, student, bare, views = pruned(deep, torch.randn(40, 3, 32, 32), "fskd")
    view = compressible(teacher)
    block = 2
    with torch.no_grad():
        state = view.embed(views.images[:])
        own, theirs = (compressible(m).run_blocks(state, 0, block) for m in (student, teacher))
        (given,) = layer_pairs(bare, block, [own], views)
        (wanted,) = layer_pairs(teacher, block, [theirs], views)
        solution = torch.linalg.lstsq(given.output, wanted.output).solution
        fitted, unfitted = (compressible(m).hidden_layer(block) for m in (student, bare))
        assert not torch.equal(fitted.weight, unfitted.weight)
        # Where features hardly vary the identity, weighted with 1e-8, still tells.
        torch.testing.assert_close(fitted(given.hidden), given.output @ solution, rtol=1e-4, atol=1e-5)


# Cross distillation.


@pytest.mark.parametrize(("mixing", "which"), [(1.0, "correction"), (0.0, "imitation")])
def test_the_mix_at_its_ends_is_one_of_its_terms(
    mixing: float, which: str, deep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcvit.methods.baselines.cd.mix", lambda *sides: mix(*sides, mixing))
    teacher, student, bare, views = pruned(deep, torch.randn(40, 3, 32, 32), "cd")
    view = compressible(teacher)
    block = 2
    with torch.no_grad():
        state = view.embed(views.images[:])
        given = compressible(teacher if which == "correction" else student).run_blocks(state, 0, block)
        (hidden,) = layer_pairs(bare, block, [given], views)
        (wanted,) = layer_pairs(teacher, block, [given], views)
        rows = torch.cat([hidden.hidden, torch.ones(len(hidden.hidden), 1)], dim=1)
        solution = torch.linalg.lstsq(rows, wanted.output).solution
        layer = compressible(student).hidden_layer(block)
        missed = (layer(hidden.hidden) - wanted.output).square().mean()
        least = (rows @ solution - wanted.output).square().mean()
        assert float(missed) == pytest.approx(float(least), rel=1e-5, abs=1e-12)


def test_the_mix_weighs_both_terms() -> None:
    x, y = torch.randn(2, 50, 4, dtype=torch.float64), torch.randn(2, 50, 3, dtype=torch.float64)
    mixed = mix(*(NormalEquations.of([(x[side], y[side])]) for side in (0, 1)), 0.6)
    weights = torch.tensor([0.6, 0.4], dtype=torch.float64).sqrt()[:, None, None]
    rows = torch.cat([x, torch.ones(2, 50, 1, dtype=torch.float64)], dim=2) * weights
    expected = torch.linalg.lstsq(rows.flatten(0, 1), (y * weights).flatten(0, 1)).solution
    torch.testing.assert_close(mixed.solve(1e-12), expected)


# The command line.


@pytest.mark.slow
def test_methods_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dcvit.cli import main

    def run(*arguments: str) -> tuple[int, str, str]:
        return (main(list(arguments)), *capsys.readouterr())

    code, text, _ = run("methods", "--json")
    assert code == 0
    assert {entry["name"]: entry["source"] for entry in json.loads(text)["methods"]} == {
        name: entry.source for name, entry in METHODS.items()
    }
    code, text, _ = run("methods")
    assert code == 0
    assert "Cross Distillation, arXiv 1911.09450" in text
    assert re.search(r"mini_deit .* vit  +params, file_size  +MiniViT, arXiv 2204\.07154", text)

    common = ("compress", "demo", "--data", "digits", "--num-images", "5", "--macs", "0.76", "--out")
    code, text, _ = run(*common, str(tmp_path / "fskd"), "--method", "fskd")
    assert code == 0
    assert "Pruned blocks (hidden units kept): 0 (" in text
    code, text, _ = run(
        *common, str(tmp_path / "mir"), "--method", "mir", "--epochs", "1", "--learning-rate", "1e-4"
    )  # fmt: skip
    assert code == 0
    assert "Dropped blocks: 2, 5; agreement" in text
    assert dcvit.load(tmp_path / "mir").report.method == "mir"
    code, text, _ = run(
        *common[:-3], "--params", "0.9", "--out", str(tmp_path / "mini"),
        "--method", "mini_deit", "--epochs", "1", "--learning-rate", "1e-4",
    )  # fmt: skip
    assert code == 0
    assert "Shared weights: one attention for the blocks " in text
    code, text, _ = run(
        *common[:-2], "0.4", "--out", str(tmp_path / "spvit"), "--method", "spvit",
        "--epochs", "1", "--learning-rate", "1e-4",
    )  # fmt: skip
    assert code == 0
    assert re.search(r"Convolved blocks \(hidden units kept\): .*; drop ratio", text)
    for options, told in (
        (("--method", "mir", "--preset", "paper"), "--preset: --method mir does not read it"),
        (("--method", "cd", "--recovery", "distillation"), "--recovery: --method cd does not read it"),
        (("--method", "cd", "--epochs", "3"), "--epochs: --method cd does not read it"),
        (("--method", "evit", "--epochs", "3"), "--epochs: --method evit does not read it"),
        (("--method", "mir", "--round-to", "8"), "--round-to: --method mir does not read it"),
        (("--method", "mir", "--synthesis-images", "3"), "--synthesis-images: --method mir does not read it"),
    ):
        code, _, error = run(*common, str(tmp_path / "no"), *options)
        assert code == 2
        assert told in error


def test_results_of_earlier_versions_know_which_blocks_kept_their_attention(
    model: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    result = dcvit.compress(model, images, dcvit.Budget(macs=0.8), method="fskd")
    result.save(tmp_path)
    file = tmp_path / "result.json"
    values = json.loads(file.read_text())
    assert values["plan"].pop("pruned") == list(result.plan.pruned) != []
    file.write_text(json.dumps(values))
    record = read_record(tmp_path)
    assert record.plan.pruned == result.plan.pruned
    assert pruning_kind(record.values) == "pruned"


# Heads and hidden units as prunable groups.


def test_closed_gates_are_missing_units(deep: nn.Module, images: Tensor) -> None:
    space = Space(freeze(deep))
    removed = [
        PrunableGroup("head", 1, 0),
        PrunableGroup("head", 4, 2),
        *(PrunableGroup("unit", 2, n) for n in range(0, 192, 3)),
    ]
    structure = space.without(removed)
    assert structure.heads[1] == (1, 2)
    assert structure.units[2][:4] == (1, 2, 4, 5)
    gates = open_gates(space, torch.device("cpu"))
    for group in removed:
        gates[group.kind, group.block][group.number] = 0.0
    with torch.no_grad():
        with gated(deep, gates):
            closed = deep(images)
        torch.testing.assert_close(structure.of(deep)(images), closed, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(deep(images), closed, atol=1e-3)


@pytest.mark.parametrize("metric", ["macs", "params"])
def test_the_units_of_highest_score_are_kept(metric: str, deep: nn.Module) -> None:
    budget = dcvit.Budget(**{metric: 0.7})
    space, draw = Space(freeze(deep)), torch.Generator().manual_seed(0)
    scores = dict(zip(space.groups(), torch.rand(len(space.groups()), generator=draw).tolist(), strict=True))
    structure = space.best(scores, budget)
    left = spent(structure.of(deep), budget)
    goal = budget.target_of(spent(deep, budget))
    unit = space.savings(budget)["unit", 0]
    assert goal - unit < left <= goal
    kept = {PrunableGroup("unit", b, n) for b, units in structure.units.items() for n in units}
    kept |= {PrunableGroup("head", b, n) for b, heads in structure.heads.items() for n in heads}
    assert all(structure.heads.values())
    lost = set(scores) - kept
    assert lost
    # But for the last of its kind in a block, no kept group has a smaller score than a pruned one.
    spare = [u for u in kept if sum(1 for v in kept if (v.kind, v.block) == (u.kind, u.block)) > 1]
    assert min(scores[u] for u in spare) > max(scores[u] for u in lost if u.kind == "unit") - 1e-9


def test_s2vite_scores_are_first_order(deep: nn.Module, images: Tensor) -> None:
    """One image: the score is what the loss changes by with the gate, of open gates and of closed ones."""
    model = freeze(deep).double()
    image = images[:1].double()
    space = Space(model)
    structure = space.without([PrunableGroup("head", 2, 1), PrunableGroup("unit", 3, 7)])
    label = model(image).argmax(-1)
    scores = first_order_scores(space, structure, [(image, label)])

    def loss(group: PrunableGroup, change: float) -> float:
        gates = {key: gate.double() for key, gate in open_gates(space, torch.device("cpu")).items()}
        gates["head", 2][1] = gates["unit", 3][7] = 0.0
        gates[group.kind, group.block][group.number] += change
        with torch.no_grad(), gated(model, gates):
            return float(torch.nn.functional.cross_entropy(model(image), label))

    for group in (
        PrunableGroup("head", 2, 1),
        PrunableGroup("unit", 3, 7),
        PrunableGroup("head", 0, 0),
        PrunableGroup("unit", 5, 100),
    ):
        slope = (loss(group, 1e-4) - loss(group, -1e-4)) / 2e-4
        assert float(scores[group.kind, group.block][group.number]) == pytest.approx(abs(slope), rel=1e-3, abs=1e-9)


def test_vtp_closes_the_gates_of_what_does_nothing(deep: nn.Module, images: Tensor) -> None:
    model: Any = freeze(deep)
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight[:, :10] = 0.0
        model.blocks[2].attn.proj.weight[:, :16] = 0.0  # the first head
    gates = learn_gates(Space(model), (images,))
    assert (gates["unit", 1][:10] == 0).all()
    assert gates["head", 2][0] == 0
    others = [*gates["unit", 1][10:], *(head for (kind, _), heads in gates.items() if kind == "head" for head in heads)]
    assert sum(float(gate) > 0 for gate in others) > len(others) / 4


def test_vtp_and_spvit_put_a_price_on_gates(deep: nn.Module, images: Tensor) -> None:
    space = Space(freeze(deep))
    prices = dict.fromkeys(open_gates(space, torch.device("cpu")), 1.0)
    same, dear = (
        learn_gates(space, (images,), prices=each, steps=5) for each in (prices, {**prices, ("head", 3): 1e6})
    )
    equal = learn_gates(space, (images,), steps=5)
    assert all(torch.equal(same[key], equal[key]) for key in equal)
    assert (dear["head", 3] < equal["head", 3]).all()
    assert dear["unit", 0].mean() > equal["unit", 0].mean()


def test_spvit_mixes_neighbours_as_written_by_hand() -> None:
    convolution = convolution_of(VARIANTS["plain"].create(), 0)
    convolution.grid, rows, columns = (2, 3), 2, 3
    value = torch.randn(2, 1 + rows * columns, 48)
    with torch.no_grad():
        convolution.conv.weight[:, 0, 1, 2] = 3.0  # the right neighbour
        convolution.conv.weight[:, 0, 2, 0] = -2.0  # the one below to the left
        convolution.conv.bias.fill_(0.5)
        convolution.mean.fill_(7.0)
        convolution.prefix.copy_(torch.tensor([4.0, 5.0, 6.0]).view(3, 1, 1).expand(3, 1, 48))
        mixed = convolution.mix(value)
    patches = {(r, c): value[:, 1 + r * columns + c] for r in range(rows) for c in range(columns)}
    nothing = torch.zeros_like(value[:, 0])
    mean = value.mean(1)
    expected = [4 * value[:, 0] + 5 * mean + 6]
    expected += [
        3 * patches.get((r, c + 1), nothing) - 2 * patches.get((r + 1, c - 1), nothing) + 7 * mean + 0.5
        for r, c in patches
    ]
    torch.testing.assert_close(mixed, torch.stack(expected, 1), rtol=1e-5, atol=1e-5)  # sums in another order


@pytest.mark.parametrize("variant", ["registers", "distilled", "average_pool", "mlp_norm"])
def test_spvit_makes_uniform_attention_the_mean(variant: str) -> None:
    """In float64; of tokens that the fit has not seen, for the least squares are exact."""
    model: Any = freeze(VARIANTS[variant].create()).double()
    attn = model.blocks[1].attn
    with torch.no_grad():
        attn.qkv.weight[:48] = 0.0
        attn.qkv.bias[:48] = 0.0
    space = Space(model, None, ("attention", "unit"))
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(24, *compressible(model).input_size(), generator=draw)
    fit_convolutions(model, space.convolutions, images.double().split(7))
    tokens = torch.randn(3, model.num_prefix_tokens + 4, 48, generator=draw).double()
    with torch.no_grad():
        torch.testing.assert_close(space.convolutions[1](tokens), attn(tokens), rtol=0, atol=1e-6)
        mean = attn.proj(attn.norm(attn.qkv(tokens)[..., 96:].mean(1, keepdim=True)))
        torch.testing.assert_close(attn(tokens), mean.expand_as(tokens))
        assert not torch.allclose(space.convolutions[2](tokens), model.blocks[2].attn(tokens), rtol=0, atol=1e-5)


def test_spvit_fits_least_squares() -> None:
    inputs, targets = torch.randn(40, 3, 5), torch.randn(40, 3)
    inputs[:, 1, 4] = 2 * inputs[:, 1, 0]  # of which there are many solutions: the smallest is taken
    equations = Equations()
    for part in range(0, 40, 7):
        equations.add(inputs[part : part + 7], targets[part : part + 7])
    wanted = torch.linalg.lstsq(
        inputs.transpose(0, 1).double(), targets.T.double().unsqueeze(-1), driver="gelsd"
    ).solution.squeeze(-1)
    torch.testing.assert_close(equations.solve(), wanted, rtol=1e-6, atol=1e-9)  # normal equations square the condition


def test_spvit_fits_kernels_to_what_attention_gives(deep: nn.Module) -> None:
    """Of one channel of one block, against `torch.linalg.lstsq` on neighbours that are looked up one by one."""
    model: Any = freeze(deep)
    images = torch.randn(10, 3, 32, 32)  # of 2 × 2 patches
    convolution = convolution_of(model, 2)
    seen: dict[str, Tensor] = {}
    attn = model.blocks[2].attn
    attn.qkv.register_forward_hook(lambda _, __, qkv: seen.__setitem__("value", qkv[..., 96 + 5].double()))
    attn.proj.register_forward_pre_hook(lambda _, given: seen.__setitem__("mixed", given[0][..., 5].double()))
    fit_convolutions(model, {2: convolution}, (images,))
    value, mixed = seen["value"], seen["mixed"]
    mean, one = value.mean(1), torch.ones(10).double()
    rows, wanted = [], []
    for r, c in ((0, 0), (0, 1), (1, 0), (1, 1)):
        near = [(r + y, c + x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
        taps = [value[:, 1 + 2 * y + x] if 0 <= min(y, x) <= max(y, x) <= 1 else 0 * one for y, x in near]
        rows.append(torch.stack([*taps, mean, one], 1))
        wanted.append(mixed[:, 1 + 2 * r + c])
    solution = torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted).unsqueeze(1), driver="gelsd").solution.squeeze(1)
    found = torch.cat([convolution.conv.weight[5].flatten(), convolution.mean[5:6], convolution.conv.bias[5:6]])
    torch.testing.assert_close(found.double(), solution, rtol=1e-4, atol=1e-5)  # which is kept in float32
    own = torch.stack([value[:, 0], mean, one], 1)
    solution = torch.linalg.lstsq(own, mixed[:, :1], driver="gelsd").solution.squeeze(1)
    torch.testing.assert_close(convolution.prefix[:, 0, 5].double(), solution, rtol=1e-4, atol=1e-5)
    assert not attn.norm._forward_pre_hooks
    assert torch.equal(convolution.v.weight, attn.qkv.weight[96:])
    assert convolution.proj is attn.proj


def test_spvit_gates_blend_attention_and_convolution(deep: nn.Module, images: Tensor) -> None:
    space = Space(freeze(deep), None, ("attention", "unit"))
    gates = open_gates(space, torch.device("cpu"))
    assert gates["attention", 5].shape == (1,)
    structure = space.without([PrunableGroup("attention", 5, 0)])
    student: Any = structure.of(deep)
    assert [isinstance(block.attn, ConvolutionalAttention) for block in student.blocks] == [False] * 5 + [True]
    with torch.no_grad():
        original, convolved = deep(images), student(images)
        with gated(deep, gates, space.convolutions):
            torch.testing.assert_close(deep(images), original, rtol=1e-5, atol=1e-5)
        gates["attention", 5] = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0]).unsqueeze(1)
        with gated(deep, gates, space.convolutions):
            mixed = deep(images)
    torch.testing.assert_close(mixed[1], original[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[[0, 2, 3, 4, 5]], convolved[[0, 2, 3, 4, 5]], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(original, convolved, atol=1e-3)


def test_spvit_closes_the_gate_of_an_attention_that_a_convolution_replaces(deep: nn.Module, images: Tensor) -> None:
    model: Any = freeze(deep)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:48] *= 100.0  # each token attends to few
            block.attn.proj.weight.mul_(10.0)  # which matters to what comes out
        model.blocks[3].attn.qkv.weight[:48] = 0.0  # no queries: it attends uniformly
        model.blocks[3].attn.qkv.bias[:48] = 0.0
    space, budget = Space(model, None, ("attention", "unit")), dcvit.Budget(macs=0.97)
    fit_convolutions(model, space.convolutions, (images,))
    gates = learn_gates(space, (images,), sparsity=0.001, prices=space.savings(budget))
    assert gates["attention", 3] == 0
    assert min(float(gates["attention", block]) for block in (0, 1, 2, 4, 5)) > 0.9
    structure = space.best(scores_of(gates), budget)
    assert structure.convolutions.keys() == {3}
    assert spent(structure.of(model), budget) <= budget.target_of(spent(model, budget))


@pytest.mark.slow
def test_spvit_goes_down_to_convolutions_and_single_hidden_units(
    deep: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    space = Space(freeze(deep), None, ("attention", "unit"))
    smallest = space.without([group for group in space.groups() if group.number or group.kind == "attention"]).of(deep)
    least = spent(smallest, dcvit.Budget(macs=0.5))
    budget = dcvit.Budget(macs=least)
    with pytest.raises(
        dcvit.errors.BudgetError, match="with a convolution for the attention and one hidden unit in each of 6"
    ):
        dcvit.compress(deep, images, dcvit.Budget(macs=least - 1), quick("spvit"))
    result = dcvit.compress(deep, images, budget, quick("spvit"))
    assert spent(result.model, budget) == least
    assert result.plan.convolved == tuple(range(DEPTH))
    assert set(map(len, result.plan.kept_units.values())) == {1}
    result.save(tmp_path / "small")
    with torch.no_grad():
        expected = result.model(images)
    assert torch.equal(dcvit.load(tmp_path / "small").model(images), expected)
    assert dcvit.load(tmp_path / "small").plan == result.plan
    torch.testing.assert_close(output_without_dcvit(tmp_path / "small", images), expected, rtol=1e-4, atol=1e-5)
    assert max(dcvit.export_model(result.model, tmp_path / "small.onnx").errors.values()) < 1e-4
    card, page = (tmp_path / "small" / "README.md").read_text(), dcvit.write_report(tmp_path / "small").read_text()
    assert "with a convolution in place of the attention of the blocks 0, 1, 2, 3, 4, 5: of the blocks 0," in card
    assert "These blocks have a convolution instead of their attention (hidden units that each keeps): 0 (1)," in page
    assert "lost hidden units and keep their attention" not in page
    assert page.count("<td>convolution</td>") == DEPTH


def test_autoformer_keeps_the_first_of_the_original(deep: nn.Module, images: Tensor) -> None:
    space = Space(freeze(deep))
    genome = {block: (1.0 + block, 1.0) for block in space.blocks}
    structure = space.best(autoformer.entangled(space, genome), dcvit.Budget(macs=0.7))
    for kept in (*structure.heads.values(), *structure.units.values()):
        assert kept == tuple(range(len(kept)))
    assert len(structure.heads[5]) > len(structure.heads[0])
    model, student = cast(Any, deep), cast(Any, structure.of(deep))
    rows = len(structure.units[3])
    assert torch.equal(student.blocks[3].mlp.fc1.weight, model.blocks[3].mlp.fc1.weight[:rows])
    result = dcvit.compress(deep, images, dcvit.Budget(macs=0.7), quick("autoformer"))
    assert all(heads == tuple(range(len(heads))) for heads in result.plan.kept_heads.values())


@pytest.mark.parametrize("block", [-1, 4])
def test_evit_refuses_blocks_that_do_not_exist(block: int, model: nn.Module) -> None:
    config = EViT(candidates=(block,))
    with pytest.raises(dcvit.errors.BudgetError, match=rf"candidates=\[{block}\]: the model's blocks are 0 to 3"):
        dcvit.compress(model, torch.randn(2, 3, 32, 32), dcvit.Budget(macs=0.8), config)


def test_evit_fuses_the_rest_into_its_weighted_mean() -> None:
    block: Any = FusingBlock(VARIANTS["plain"].create().blocks[0], keep_rate=0.4)  # type: ignore[index, operator]
    tokens = torch.arange(12.0).view(1, 6, 2)  # a class token and five patches
    attention = torch.tensor([[0.1, 0.4, 0.05, 0.15, 0.3]])
    fused = (0.1 * tokens[0, 1] + 0.05 * tokens[0, 3] + 0.15 * tokens[0, 4]) / 0.3
    expected = torch.stack([tokens[0, 0], tokens[0, 2], tokens[0, 5], fused])
    torch.testing.assert_close(block.fuse_tokens(tokens, attention), expected[None])
    assert block.tokens_after(6) == 4
    assert block.tokens_after(1) == 1


def test_evit_attends_as_the_block_does(deep: nn.Module, images: Tensor) -> None:
    model: Any = freeze(deep)
    block = model.blocks[2]
    state = compressible(model).run_blocks(compressible(model).embed(images), 0, 2)
    fusing = FusingBlock(copy.deepcopy(block), keep_rate=0.999)
    with torch.no_grad():
        torch.testing.assert_close(fusing(state), block(state), rtol=1e-5, atol=1e-5)
        _, attention = fusing.attend(block.norm1(state))
    assert attention.shape == (6, 4)
    qkv = block.attn.qkv(block.norm1(state)).view(6, 5, 3, 3, 16)
    first = torch.einsum("bhc,bnhc->bhn", qkv[:, 0, 0], qkv[:, :, 1]) / 4
    torch.testing.assert_close(attention, first.softmax(-1)[..., 1:].mean(1), rtol=1e-5, atol=1e-6)


def test_evit_changes_no_weight_and_saves_only_macs(deep: nn.Module, images: Tensor) -> None:
    result = dcvit.compress(deep, images, dcvit.Budget(macs=0.8), quick("evit"))
    for name, weight in result.model.state_dict().items():
        assert torch.equal(weight, deep.state_dict()[name]), name
    assert spent(result.model, result.plan.budget) <= result.plan.target
    with pytest.raises(
        dcvit.errors.BudgetError, match=r"params=0\.8: method='evit' meets only budgets of macs; ask for one"
    ):
        dcvit.compress(deep, images, dcvit.Budget(params=0.8), quick("evit"))
    with pytest.raises(
        dcvit.errors.BudgetError, match=r"macs=0\.3 asks for .* with one patch token behind the blocks \[1, 3, 4\]"
    ):
        dcvit.compress(deep, images, dcvit.Budget(macs=0.3), quick("evit"))
    pooled = VARIANTS["average_pool"].create()
    inputs = torch.randn(6, *compressible(pooled).input_size())
    with pytest.raises(dcvit.errors.UnsupportedModelError, match="no class token"):
        dcvit.compress(pooled, inputs, dcvit.Budget(macs=0.8), quick("evit"))


@pytest.mark.slow
def test_fewer_heads_and_tokens_load_without_dcvit_and_export(deep: nn.Module, images: Tensor, tmp_path: Path) -> None:
    space = Space(freeze(deep))
    student = copy.deepcopy(
        space.without([PrunableGroup("head", 0, 1), PrunableGroup("head", 3, 0), PrunableGroup("unit", 3, 9)]).of(deep)
    )
    fuse_tokens(student, 3, 0.4)
    with torch.no_grad():
        expected = student(images)
    save_model(student, tmp_path / "small")
    torch.testing.assert_close(output_without_dcvit(tmp_path / "small", images), expected, rtol=1e-4, atol=1e-5)
    assert max(dcvit.export_model(student, tmp_path / "small.onnx").errors.values()) < 1e-4


@pytest.mark.parametrize("variant", slow_but(VARIANTS, *REPRESENTATIVES, "distilled", "qk_norm"))
def test_heads_and_hidden_units_are_pruned_in_every_variant(variant: str, tmp_path: Path) -> None:
    model = VARIANTS[variant].create()
    images = torch.randn(6, *compressible(model).input_size())
    space = Space(freeze(model))
    structure = space.without(
        [
            PrunableGroup("head", 1, 0),
            PrunableGroup("unit", 2, 5),
            PrunableGroup("head", 2, 1),
            PrunableGroup("head", 2, 2),
        ]
    )
    student = copy.deepcopy(structure.of(model))
    again = compressible(student).rebuild().eval()
    with torch.no_grad():
        assert torch.equal(again(images), student(images))
    assert compressible(student).cost().total.params == sum(p.numel() for p in student.parameters())
