"""`dcvit.compress` as a whole."""

import copy
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import dcvit
from dcvit.errors import HooksWarning
from dcvit.history import BlockSpec
from dcvit.models import blocks, compressible, fuse
from dcvit.models.surgery import compress_block, copy_blocks
from dcvit.models.teacher import freeze
from dcvit.ops import attention
from dcvit.recovery.calibration import TeacherStates, draw_views
from dcvit.recovery.distill import output_tokens
from dcvit.recovery.reconstruct import BlockProblem, reconstruct_block
from dcvit.recovery.ridge import RIDGES
from tests.conftest import CUT, CUT_REFINED, PUBLISHED, QUICK, REFINED, slow_but
from tests.variants import EVA_VARIANTS, REPRESENTATIVES, VARIANTS, Variant

both_procedures = pytest.mark.parametrize("config", [REFINED, PUBLISHED], ids=["default", "published"])


def state_of(result: dcvit.CompressionResult) -> list[Tensor]:
    return list(result.model.state_dict().values())


def same(a: dcvit.CompressionResult, b: dcvit.CompressionResult) -> bool:
    left, right = state_of(a), state_of(b)
    return len(left) == len(right) and all(
        x.shape == y.shape and torch.equal(x, y) for x, y in zip(left, right, strict=True)
    )


@pytest.mark.slow
@both_procedures
def test_the_callers_precision_does_not_count(model: nn.Module, config: dcvit.DCViT) -> None:
    images, budget = torch.rand(5, 3, 32, 32), dcvit.Budget(macs=0.8)
    expected = dcvit.compress(model, images, budget, config)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = dcvit.compress(model, images, budget, config)
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert same(found, expected)


@pytest.mark.parametrize(
    ("name", "config"),
    slow_but(
        [(name, config) for config in (QUICK, REFINED, PUBLISHED) for name in REPRESENTATIVES],
        *((name, QUICK) for name in REPRESENTATIVES[1:]),
        ("plain", REFINED),
        ("plain", PUBLISHED),
    ),
    ids=[f"{name}-{way}" for way in ("not refined", "default", "published") for name in REPRESENTATIVES],
)
def test_a_variant_end_to_end(name: str, config: dcvit.DCViT, tmp_path: Path) -> None:
    model = (VARIANTS | EVA_VARIANTS)[name].create()
    before = copy.deepcopy(model.state_dict())
    images = torch.randn(5, *compressible(model).input_size())
    result = dcvit.compress(model, images, dcvit.Budget(macs=0.8), config)

    view = compressible(result.model)
    assert view.cost().total == result.plan.cost
    assert result.report.student.macs <= result.plan.target
    recovered = result.report.steps if config is PUBLISHED else result.report.reconstructions
    assert len(result.plan.blocks) == result.plan.num_blocks == len(recovered)
    kept = [len(result.plan.kept_units[block]) for block in result.plan.blocks]
    assert sum(kept) // len(kept) == result.plan.hidden_features
    assert len(set(kept)) == 1 or config is not PUBLISHED  # of the published structure all keep as many
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (result.report.agreement is None) == (model.num_classes == 0)

    result.save(tmp_path / "out")
    loaded = dcvit.load(tmp_path / "out")
    rebuilt = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        expected = result.model(images)
        assert torch.equal(loaded.model(images), expected)
        assert torch.equal(rebuilt(images), expected)
    assert loaded.plan == result.plan
    assert asdict(loaded.report) == asdict(result.report)


def test_fused_blocks_compute_what_timms_do(variant: Variant) -> None:
    teacher = variant.create().double()
    images = torch.randn(3, *compressible(teacher).input_size(), dtype=torch.float64)
    fused = fuse(copy_blocks(teacher, ()))
    with torch.no_grad():
        expected = teacher(images)
        # In float64 a wrong term shows, and the order of sums does not.
        torch.testing.assert_close(fused(images), expected, rtol=1e-9, atol=1e-9)
        assert torch.equal(compressible(fused).rebuild()(images), expected)
    shared = dict(teacher.named_parameters())
    assert shared.keys() == dict(fused.named_parameters()).keys()
    assert all(parameter is shared[name] for name, parameter in fused.named_parameters())
    assert compressible(fused).cost() == compressible(teacher).cost()


def test_whole_blocks_run_the_op_unless_someone_listens(model: nn.Module, images: Tensor) -> None:
    calls: list[int] = []
    model.blocks[1].register_forward_hook(lambda *_: calls.append(0))  # the block is called, whatever it calls
    model.blocks[2].mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
    fused = fuse(model)
    ran: list[str] = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(blocks, "dropped_mlp", lambda x, *_, impl, **__: (ran.append(impl), x)[1])
        fused(images)
    assert ran == ["auto"] * (len(fused.blocks) - 1), "block 2 runs its modules"
    assert calls == [0, 1]


@pytest.mark.parametrize("impl", ["eager", "cpp"])
def test_an_explicit_implementation_runs_in_halves_too(representative: Variant, impl: dcvit.ops.Impl) -> None:
    teacher = fuse(freeze(representative.create()), impl)
    sublayers = compressible(teacher).sublayers(1)
    if sublayers is not None:
        assert getattr(sublayers[1], "impl", "eager") == impl


def test_whole_blocks_run_the_attention_op_unless_something_is_between(model: nn.Module, images: Tensor) -> None:
    calls: list[int] = []
    model.blocks[1].attn.attn_drop.register_forward_hook(lambda *_: calls.append(1))
    model.blocks[2].attn.register_forward_pre_hook(lambda *_: calls.append(2))
    model.blocks[3].attn.q_norm = nn.LayerNorm(model.blocks[3].attn.head_dim)
    fused = fuse(copy_blocks(model, ()))
    ran: list[str] = []

    def counted(qkv: Tensor) -> Tensor:
        ran.append("auto")
        return attention(qkv)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(blocks, "attention", counted)
        for module in [*model.modules(), *fused.modules()]:
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # which calls attn_drop
        torch.testing.assert_close(fused(images), model(images))
        assert ran == ["auto"] * (len(fused.blocks) - 3), "blocks 1 to 3 keep their modules"
        assert calls == [1, 2] * 2
        ran.clear()
        mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
        fused.blocks[0](torch.randn(2, 1, model.embed_dim), attn_mask=mask)
        assert not ran, "the op takes no mask"
        fused.blocks[0].attn.attn_drop.p = 0.5
        fused.blocks[0].train()(torch.randn(2, 5, model.embed_dim))
        assert not ran, "the op has no dropout"


@both_procedures
def test_the_callers_model_and_random_state_are_untouched(
    model: nn.Module, images: Tensor, config: dcvit.DCViT
) -> None:
    model.train()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    dcvit.compress(model, images, dcvit.Budget(macs=0.8), config)
    assert torch.equal(torch.rand(3), expected)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.slow
@both_procedures
def test_without_gradients_all_the_same(model: nn.Module, images: Tensor, config: dcvit.DCViT) -> None:
    with torch.no_grad():
        found = dcvit.compress(model, images, dcvit.Budget(macs=0.8), config)
    wanted = dcvit.compress(model, images, dcvit.Budget(macs=0.8), config)
    assert found.report.distillation_loss == wanted.report.distillation_loss


@pytest.mark.parametrize(
    "config",
    slow_but([CUT_REFINED, REFINED, PUBLISHED], CUT_REFINED, PUBLISHED),
    ids=["refined", "default", "published"],
)
def test_same_seed_same_result(model: nn.Module, config: dcvit.DCViT) -> None:
    budget = dcvit.Budget(macs=0.62)
    again, other = (dcvit.compress(model, few_images(), budget, replace(config, seed=seed)) for seed in (0, 1))
    runs = [outcome(config, budget), again, other]
    assert same(runs[0], runs[1])
    assert runs[0].plan == runs[1].plan
    assert [asdict(run.report)["reconstructions"] for run in runs[:2]] == [
        asdict(runs[0].report)["reconstructions"]
    ] * 2
    assert [probe.metric_loss for probe in runs[0].report.probes] == [t.metric_loss for t in runs[1].report.probes]
    assert not same(runs[0], runs[2])


def test_default_report_says_how_each_block_went(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    """By default, with fewer views: a probe of each candidate, then each chosen block, then the refinement."""
    default = dcvit.DCViT(candidates=(0, 1, 2, 3))
    smaller = replace(default.reconstruction, refinement_views=60, refinement_steps=200, refinement_batch=5)
    result = dcvit.compress(model, images, dcvit.Budget(macs=0.7), default.with_(recovery=smaller))
    report = result.report
    assert sorted(probe.block for probe in report.probes) == [0, 1, 2, 3]
    losses = [probe.metric_loss for probe in report.probes]
    assert losses == sorted(losses)
    assert result.plan.kept_units.keys() == set(result.plan.blocks) <= {0, 1, 2, 3}
    assert len(result.plan.blocks) == result.plan.num_blocks
    for probe in report.probes:
        assert probe.recovery is None
        assert probe.reconstruction is not None
        assert probe.reconstruction.block == probe.block
    assert [went.block for went in report.reconstructions] == sorted(result.plan.blocks)
    for went in (*(probe.reconstruction for probe in report.probes), *report.reconstructions):
        assert went is not None
        assert went.ridge in RIDGES
        assert went.error_closed_form is not None
        assert 0 < went.error_after <= went.error_closed_form < went.error_before
    assert report.refinement is not None
    assert report.refinement.error_after <= report.refinement.error_before
    assert report.steps == ()
    assert report.learning_rate in default.reconstruction.step_sizes

    result.save(tmp_path / "out")
    loaded = dcvit.load(tmp_path / "out")
    assert loaded.report == report
    assert loaded.plan == result.plan
    assert loaded.to_dict() == result.to_dict()
    stored = json.loads((tmp_path / "out" / "result.json").read_text())
    assert stored.pop("digests").keys() == {"config.json", "metric_set.safetensors", "model.safetensors"}
    assert stored == json.loads(json.dumps(result.to_dict()))


def test_the_latency_ratio_is_that_of_the_student_to_its_original(model: nn.Module, images: Tensor) -> None:
    def stopwatch(model: nn.Module, batch: Tensor) -> float:
        return 1e-6 * sum(parameter.numel() for parameter in model.parameters())

    report = dcvit.compress(model, images, dcvit.Budget(params=0.8), QUICK, stopwatch=stopwatch).report
    assert report.latency_ratio == pytest.approx(report.student.params / report.teacher.params)
    assert report.student.latency_ms == pytest.approx(1e-3 * report.student.params)


def test_reconstruction_and_refinement_pay(model: nn.Module) -> None:
    images, results = few_images(), [outcome(config, dcvit.Budget(macs=0.62)) for config in (CUT, CUT_REFINED)]
    bare = freeze(model)
    for block, kept in results[0].plan.kept_units.items():
        bare = compress_block(bare, block, kept)
    tokens = [output_tokens(m, images, 64) for m in (bare, model)]
    losses = [float((tokens[0] - tokens[1]).square().mean()), *(result.report.distillation_loss for result in results)]
    assert losses[1] < 0.1 * losses[0]
    assert losses[2] < 0.9 * losses[1]
    assert results[0].report.refinement is None
    assert results[1].report.seconds.keys() == results[0].report.seconds.keys() | {"refinement"}


@pytest.mark.parametrize("name", ["plain", "post_norm"])
def test_one_image_is_enough(name: str) -> None:
    """No image can be held out, so defaults that need validation are switched off."""
    model = VARIANTS[name].create()
    result = dcvit.compress(model, torch.randn(1, 3, 32, 32), dcvit.Budget(macs=0.8), REFINED)
    assert result.report.refinement is None
    assert all(went.epochs == 0 for went in result.report.reconstructions)
    assert result.report.student.macs <= result.plan.target


@both_procedures
def test_a_block_that_costs_nothing_is_chosen(model: nn.Module, images: Tensor, config: dcvit.DCViT) -> None:
    with torch.no_grad():
        model.blocks[2].attn.proj.weight.zero_()
        model.blocks[2].attn.proj.bias.zero_()
    model.blocks[2].mlp.fc2.weight.data[:, 40:] = 0
    config = config.with_(candidates=(0, 1, 2, 3), num_blocks=1)
    result = dcvit.compress(model, images, dcvit.Budget(macs=0.85), config)
    assert result.plan.blocks == (2,)


def test_recovery_pays(model: nn.Module, images: Tensor) -> None:
    recovery = dcvit.config.DistillationConfig(epochs=30, augmentation=None, learning_rates=(1e-7, 1e-3))
    result = dcvit.compress(model, images, dcvit.Budget(macs=0.7), PUBLISHED.with_(recovery=recovery))
    assert result.report.learning_rate == 1e-3
    assert all(step.loss_after < 0.7 * step.loss_before for step in result.report.steps)
    # The finished model runs timm's own blocks, which sum in another order.
    assert result.report.distillation_loss == pytest.approx(result.report.steps[-1].loss_after, rel=1e-4)
    assert result.report.reconstructions == ()
    assert result.report.refinement is None
    assert set(result.report.seconds) == {"prepare", "proxy set", "learning rate", "ranking", "compression", "report"}


def test_progressive_steps_start_from_the_best_probe(model: nn.Module, images: Tensor) -> None:
    config = PUBLISHED.with_(recovery=replace(PUBLISHED.distillation, epochs=1), candidates=(0, 1, 2, 3), num_blocks=3)
    seen: list[str] = []

    def progress(stage: str, done: int, total: int, loss: float) -> None:
        if done == total:
            seen.append(stage)

    result = dcvit.compress(model, images, dcvit.Budget(macs=0.6), config, progress=progress)
    assert seen == ["synthesis", "probes", "compression, block 2 of 3", "compression, block 3 of 3"]
    assert result.report.steps[0] == result.report.probes[0].recovery
    assert result.plan.blocks == tuple(probe.block for probe in result.report.probes[:3])


def test_all_at_once_trains_as_long(model: nn.Module, images: Tensor) -> None:
    config = ablated(PUBLISHED, progressive=False).with_(num_blocks=2)
    result = dcvit.compress(model, images, dcvit.Budget(macs=0.8), config)
    (step,) = result.report.steps
    assert len(step.losses) == 2 * PUBLISHED.distillation.epochs


@pytest.mark.slow
def test_progress_weighs_blocks_by_the_work_they_are(images: Tensor) -> None:
    """A block without attention counts twice as much as a pruned one; passing a whole block counts half as much."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=8, num_classes=10)
    seen: list[tuple[int, int]] = []

    def progress(stage: str, done: int, total: int, loss: float | None) -> None:
        if stage == "reconstruction":
            seen.append((done, total))

    config = QUICK.with_(candidates=(0, 2, 3, 6))
    plan = dcvit.compress(model, images, dcvit.Budget(macs=0.8), config, progress=progress).plan
    blocks = sorted(plan.blocks)
    assert 0 < len(plan.pruned) < len(blocks) <= blocks[-1] - blocks[0]
    work = [2 if block in plan.pruned else 4 for block in blocks]
    front = [0, *(sum(other not in blocks for other in range(a, b)) for a, b in itertools.pairwise(blocks))]
    done = list(itertools.accumulate(map(sum, zip(work, front, strict=True)), initial=0))
    assert seen == [(count, done[-1]) for count in done]


def test_the_proxy_set_can_be_swapped(model: nn.Module, images: Tensor) -> None:
    stages: set[str] = set()
    given = dcvit.data.synthesis.ProxySet(torch.randn(4, 3, 32, 32))
    dcvit.compress(
        model, images, dcvit.Budget(macs=0.8), QUICK, proxy_set=given, progress=lambda stage, *_: stages.add(stage)
    )
    assert "synthesis" not in stages


@pytest.mark.slow
@both_procedures
def test_blocks_are_ranked_by_the_metric_that_is_asked_for(
    model: nn.Module, images: Tensor, config: dcvit.DCViT, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, found = dcvit.data.synthesis.ProxySet(torch.randn(4, 3, 32, 32)), dict[float, str]()

    class Told(dcvit.metrics.fidelity.Metric):
        def __init__(self, teacher: nn.Module, image_sets: Any, kind: Any, batch_size: int) -> None:
            super().__init__(teacher, image_sets, kind, batch_size)
            self.kind = kind

        def loss(self, *args: Any) -> float:
            loss = super().loss(*args)
            found[loss] = self.kind
            return loss

    for procedure in ("published", "reconstructed"):
        monkeypatch.setattr(f"dcvit.methods.dcvit.{procedure}.Metric", Told)
    for metric in ("cross_entropy", "distillation"):
        result = dcvit.compress(model, images, dcvit.Budget(macs=0.8), ablated(config, metric=metric), proxy_set=given)
        assert {found[probe.metric_loss] for probe in result.report.probes} == {metric}


Change = Callable[[dcvit.DCViT], dcvit.DCViT]


def ablated(config: dcvit.DCViT, **changes: Any) -> dcvit.DCViT:
    return replace(config, ablation=replace(config.ablation, **changes))


def recovery_with(**changes: Any) -> Change:
    return lambda c: replace(c, recovery=replace(c.recovery, **changes))


def synthesis_with(**changes: Any) -> Change:
    return lambda c: replace(c, synthesis=replace(c.synthesis, **changes))


RECONSTRUCTION: dict[str, Change] = {
    "refinement_views": recovery_with(refinement_views=54),
    "num_rows": recovery_with(num_rows=240),
    "units": recovery_with(units="random"),
    "epochs": recovery_with(epochs=3),
    "step_sizes": recovery_with(step_sizes=(0.02,)),
    "batch_rows": recovery_with(batch_rows=12),
    "refinement_steps": recovery_with(refinement_steps=0),
    "refinement_macs": recovery_with(refinement_macs=1e3),
    "refinement_batch": recovery_with(refinement_batch=3),
    "augmentation": recovery_with(augmentation=dcvit.config.AugmentationConfig(flip=0.0)),
}
DISTILLATION: dict[str, Change] = {
    "epochs": recovery_with(epochs=3),
    "learning_rate": recovery_with(learning_rate=2e-4),
    "learning_rates": recovery_with(learning_rate="auto", learning_rates=(3e-4,)),
    "weight_decay": recovery_with(weight_decay=0.5),
    "warmup_epochs": recovery_with(warmup_epochs=2),
    "batch_size": recovery_with(batch_size=2),
    "tokens": recovery_with(tokens="class"),
    "updated": recovery_with(updated="all"),
    "augmentation": recovery_with(augmentation=None),
    "fixed_views": recovery_with(fixed_views=1),
}
SYNTHESIS: dict[str, Change] = {
    "num_images": synthesis_with(num_images=4),
    "iterations": synthesis_with(iterations=5),
    "learning_rate": synthesis_with(learning_rate=0.1),
    "betas": synthesis_with(betas=(0.9, 0.99)),
    "warmup_iterations": synthesis_with(warmup_iterations=3),
    "jitter": synthesis_with(jitter=0.5),
    "flip": synthesis_with(flip=0.0),
    "tv_exponent": synthesis_with(tv_exponent=1.0),
    "tv_weight": synthesis_with(tv_weight=0.1),
    "l2_weight": synthesis_with(l2_weight=0.1),
}
REST: dict[str, Change] = {
    "recovery": lambda c: replace(c, recovery=PUBLISHED.recovery),
    "candidates": lambda c: replace(c, candidates=(2, 3)),
    "num_blocks": lambda c: replace(c, num_blocks=1),
    "round_to": lambda c: replace(c, round_to=16),
    "seed": lambda c: replace(c, seed=1),
}
WITHOUT_REFINEMENT: dict[str, Change] = {"num_views": recovery_with(num_views=54)}
OF_ONE_PROCEDURE: dict[str, tuple[dcvit.DCViT, Change]] = {
    "structure": (QUICK, lambda c: replace(c, structure="fewest")),
}
ABLATION: dict[str, tuple[dcvit.DCViT, Change]] = {
    "ranking_images": (QUICK, lambda c: ablated(c, ranking_images="few-shot")),
    "metric": (PUBLISHED, lambda c: ablated(c, metric="distillation")),
    "progressive": (PUBLISHED, lambda c: ablated(c, progressive=False)),
    "halving": (PUBLISHED, lambda c: ablated(c, halving=True)),
}

CHANGES = [
    *((CUT_REFINED, f"reconstruction.{name}", change) for name, change in RECONSTRUCTION.items()),
    *((QUICK, f"reconstruction.{name}", change) for name, change in WITHOUT_REFINEMENT.items()),
    *((PUBLISHED, f"distillation.{name}", change) for name, change in DISTILLATION.items()),
    *((QUICK, f"synthesis.{name}", change) for name, change in SYNTHESIS.items()),
    *((QUICK, name, change) for name, change in REST.items()),
    *((base, name, change) for name, (base, change) in OF_ONE_PROCEDURE.items()),
    *((base, f"ablation.{name}", change) for name, (base, change) in ABLATION.items()),
]
YARDSTICK = ("synthesis.", "ablation.ranking_images", "ablation.metric", "ablation.halving")
"""Settings that change the probes or their evaluation; the chosen blocks may stay the same."""

BUDGETS = {"reconstruction": 0.62, "structure": 0.803}
"""Where few hidden units are left, gradient steps gain, and so do more blocks."""


def field_names(config: Any) -> set[str]:
    return {field.name for field in fields(config)}


def test_every_config_field_is_covered() -> None:
    """`impl` is covered by the tests of the ops; augmentation's own fields by tests/data/test_images.py.

    `batch_size` of reconstruction changes rounding alone, see the test below, and so does `micro_batch`, see
    tests/metrics/test_memory.py; `lock_step` of distillation nothing, see tests/recovery/test_lock_step.py; `bn_weight`
    is of CNNs, see tests/models/test_cnn.py.
    """
    assert field_names(QUICK.recovery) == RECONSTRUCTION.keys() | WITHOUT_REFINEMENT.keys() | {"batch_size"}
    assert field_names(PUBLISHED.recovery) == DISTILLATION.keys() | {"lock_step", "micro_batch"}
    assert field_names(QUICK.synthesis) == SYNTHESIS.keys() | {"bn_weight", "micro_batch"}
    assert field_names(QUICK) == REST.keys() | OF_ONE_PROCEDURE.keys() | {"synthesis", "ablation", "impl"}
    assert field_names(QUICK.ablation) == ABLATION.keys()


@cache
def outcome(config: dcvit.DCViT, budget: dcvit.Budget) -> dcvit.CompressionResult:
    """Of the same model and images each time; what several tests compare with is computed once."""
    return dcvit.compress(VARIANTS["plain"].create(), few_images(), budget, config)


def few_images() -> Tensor:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "name", "change"),
    # tests/methods/test_configs.py has the fields of distillation, in another method.
    [pytest.param(*case, marks=[pytest.mark.slow] if case[1].startswith("distillation.") else []) for case in CHANGES],
    ids=[f"{'published' if base is PUBLISHED else 'default'}-{name}" for base, name, _ in CHANGES],
)
def test_every_config_field_changes_the_outcome(base: dcvit.DCViT, name: str, change: Change) -> None:
    base = replace(base, num_blocks=2) if name in ("num_blocks", "ablation.progressive") else base
    budget = dcvit.Budget(macs=BUDGETS.get(name.split(".")[0], 0.82))
    plain, changed = outcome(base, budget), outcome(change(base), budget)
    if name.startswith(YARDSTICK):
        metric_losses = [{t.block: t.metric_loss for t in result.report.probes} for result in (plain, changed)]
        assert metric_losses[0] != metric_losses[1]
    else:
        assert not same(plain, changed)


def test_reconstruction_passes_the_configured_number_of_images(model: nn.Module, images: Tensor) -> None:
    passes: dict[int, set[int]] = {}
    for batch_size in (4, 64):
        seen = passes[batch_size] = set()
        teacher = copy.deepcopy(model)
        teacher.patch_embed.register_forward_pre_hook(lambda _, args, seen=seen: seen.add(len(args[0])))
        recovery = replace(QUICK.reconstruction, batch_size=batch_size)
        few_shot = dcvit.load_images(images, teacher)
        views = draw_views(teacher, few_shot, recovery, seed=0)
        TeacherStates(teacher, views, recovery.batch_size)
        with pytest.warns(HooksWarning):
            dcvit.compress(teacher, images, dcvit.Budget(macs=0.82), replace(QUICK, recovery=recovery))
    assert max(passes[4]) <= len(images)  # the report looks at all few-shot images at once
    assert len(views.images) in passes[64]


@pytest.mark.parametrize(
    ("config", "accessor", "message"),
    [
        (QUICK, "distillation", r"recovery=ReconstructionConfig\(.*pass DistillationConfig\(\)"),
        (PUBLISHED, "reconstruction", r"recovery=DistillationConfig\(.*pass ReconstructionConfig\(\)"),
    ],
)
def test_the_kinds_of_recovery_are_distinguished(config: dcvit.DCViT, accessor: str, message: str) -> None:
    with pytest.raises(dcvit.DcvitError, match=message):
        getattr(config, accessor)
    assert (QUICK.reconstruction, PUBLISHED.distillation) == (QUICK.recovery, PUBLISHED.recovery)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dcvit.config.DistillationConfig(epochs=-1), "epochs=-1"),
        (lambda: dcvit.config.DistillationConfig(learning_rate=0.0), "learning_rate=0.0"),
        (lambda: dcvit.config.DistillationConfig(learning_rate="fast"), "'fast'.*'auto'"),  # type: ignore[arg-type]
        (lambda: dcvit.config.DistillationConfig(learning_rates=()), "learning_rates"),
        (lambda: dcvit.config.DistillationConfig(batch_size=0), "batch_size=0"),
        (lambda: dcvit.config.DistillationConfig(tokens="cls"), "one of 'all', 'class'"),  # type: ignore[arg-type]
        (lambda: dcvit.config.DistillationConfig(updated="back"), "one of 'front'"),  # type: ignore[arg-type]
        (lambda: dcvit.config.DistillationConfig(lock_step=0), "lock_step=0"),
        (lambda: dcvit.config.DistillationConfig(fixed_views=0), "fixed_views=0"),
        (lambda: dcvit.config.Ablation(halving=2), "halving=2"),  # type: ignore[arg-type]
        (lambda: dcvit.config.Ablation(progressive=2), "progressive=2"),  # type: ignore[arg-type]
        (lambda: dcvit.config.CalibrationConfig(num_views=0), "num_views=0"),
        (lambda: dcvit.config.TrainingConfig(epochs=-1), "epochs=-1"),
        (lambda: dcvit.methods.Practise(seed=-1), "seed=-1"),
        (lambda: dcvit.methods.FSKD(round_to=0), "round_to=0"),
        (lambda: dcvit.methods.EViT(batch_size=0), "batch_size=0"),
        (lambda: dcvit.config.ReconstructionConfig(num_views=0), "num_views=0"),
        (lambda: dcvit.config.ReconstructionConfig(refinement_views=0), "refinement_views=0"),
        (lambda: dcvit.config.ReconstructionConfig(num_rows=0), "num_rows=0"),
        (lambda: dcvit.config.ReconstructionConfig(units="best"), "one of 'greedy', 'random'"),  # type: ignore[arg-type]
        (lambda: dcvit.config.ReconstructionConfig(epochs=-1), "epochs=-1"),
        (lambda: dcvit.config.ReconstructionConfig(step_sizes=()), r"step_sizes=\(\)"),
        (lambda: dcvit.config.ReconstructionConfig(step_sizes=(0.1, 0.0)), "one or more positive"),
        (lambda: dcvit.config.ReconstructionConfig(batch_rows=0), "batch_rows=0"),
        (lambda: dcvit.config.ReconstructionConfig(refinement_steps=-1), "refinement_steps=-1"),
        (lambda: dcvit.config.ReconstructionConfig(refinement_macs=-1.0), "refinement_macs=-1.0"),
        (lambda: dcvit.config.ReconstructionConfig(refinement_batch=0), "refinement_batch=0"),
        (lambda: dcvit.config.ReconstructionConfig(batch_size=0), "batch_size=0"),
        (lambda: dcvit.config.AugmentationConfig(scale=(0.5, 0.2)), "scale"),
        (lambda: dcvit.config.AugmentationConfig(flip=2), "flip=2"),
        (lambda: dcvit.config.SynthesisConfig(num_images=0), "num_images=0"),
        (lambda: dcvit.config.SynthesisConfig(betas=(0.5, 1.0)), "betas"),
        (lambda: dcvit.DCViT(candidates=()), "at least one block"),
        (lambda: dcvit.DCViT(candidates=("1", "10")), "ints"),  # type: ignore[arg-type]
        (lambda: dcvit.DCViT(num_blocks=0), "num_blocks=0"),
        (lambda: dcvit.DCViT(impl="fast"), "one of 'auto'"),  # type: ignore[arg-type]
        (lambda: dcvit.config.Ablation(ranking_images="mine"), "'synthetic'"),  # type: ignore[arg-type]
        (lambda: dcvit.config.Ablation(metric="mse"), "one of 'distillation', 'cross_entropy'"),  # type: ignore[arg-type]
        (lambda: dcvit.DCViT(structure="most"), "one of 'searched', 'fewest'"),  # type: ignore[arg-type]
        (lambda: dcvit.DCViT(recovery=3), "recovery=3: expected a Recon"),  # type: ignore[arg-type]
    ],
)
def test_bad_configs(make: Callable[[], object], message: str) -> None:
    with pytest.raises(dcvit.DcvitError, match=message):
        make()


def test_configs_and_budgets_take_numbers_of_numpy() -> None:
    config = dcvit.DCViT(
        seed=np.int64(1),  # type: ignore[arg-type]
        candidates=np.arange(1, 3),  # type: ignore[arg-type]
        recovery=dcvit.config.ReconstructionConfig(step_sizes=[np.float32(0.5)], epochs=np.int32(2)),  # type: ignore
    )
    assert config == dcvit.DCViT(
        seed=1, candidates=(1, 2), recovery=dcvit.config.ReconstructionConfig(step_sizes=(0.5,), epochs=2)
    )
    assert type(config.to_dict()["seed"]) is int
    assert dcvit.Budget(macs=np.float32(0.5)) == dcvit.Budget(macs=0.5)  # type: ignore[arg-type]


def test_configs_are_frozen() -> None:
    with pytest.raises(AttributeError):
        dcvit.DCViT().seed = 1  # type: ignore[misc]


def test_result_json_has_what_readers_look_for(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    result = dcvit.compress(model, images, dcvit.Budget(params=0.8), CUT)
    result.save(tmp_path / "out")
    values = json.loads((tmp_path / "out" / "result.json").read_text())
    wanted = (
        "teacher student budget blocks hidden_features drop_ratio agreement distillation_loss seconds seed versions"
    )
    assert values.keys() >= set(wanted.split())
    for name in ("teacher", "student"):
        assert values[name].keys() == {*("macs", "params", "file_size", "activation_memory", "top1", "latency_ms")}
    assert values["budget"] == {"params": 0.8, "convention": "with_attention_products"}
    assert values["student"]["params"] <= 0.8 * values["teacher"]["params"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_args"]["per_layer_config"] == {
        str(block): {"skip": ["attention"], "intermediate_size": len(result.plan.kept_units[block])}
        for block in sorted(result.plan.blocks)
    }


def test_the_file_shrinks_with_the_parameters(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    from dcvit.artifacts.result import save_model

    save_model(model, tmp_path / "teacher")
    result = dcvit.compress(model, images, dcvit.Budget(params=0.7), QUICK)
    result.save(tmp_path / "student")
    sizes = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("teacher", "student")}
    assert sizes["student"] / sizes["teacher"] == pytest.approx(0.7, abs=0.02)
    assert not list(tmp_path.rglob("*.bin")) + list(tmp_path.rglob("*.pt")) + list(tmp_path.rglob("*.pkl"))


def save_and_break(result: dcvit.CompressionResult, folder: Path, how: str) -> None:
    result.save(folder)
    if how == "no weights":
        (folder / "model.safetensors").unlink()
    elif how == "truncated weights":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    elif how == "no result":
        (folder / "result.json").unlink()
    elif how == "bad json":
        (folder / "result.json").write_text("{")
    elif how == "foreign json":
        (folder / "result.json").write_text('{"loss": 1}')
    elif how == "a list":
        (folder / "result.json").write_text("[]")
    elif how == "unknown architecture":
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text.replace("dcvit_vision_transformer", "dcvit_nothing"))


@pytest.fixture(scope="module")
def result() -> dcvit.CompressionResult:
    return dcvit.compress(VARIANTS["plain"].create(), torch.randn(2, 3, 32, 32), dcvit.Budget(macs=0.8), QUICK)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no weights", r"no model\.safetensors"),
        ("truncated weights", "broken model"),
        ("no result", r"has no result\.json"),
        ("bad json", "not valid JSON"),
        ("foreign json", "not a dcvit result"),
        ("a list", "holds a list"),
        ("unknown architecture", "broken model"),
    ],
)
def test_broken_folders_are_distinguished(
    result: dcvit.CompressionResult, tmp_path: Path, how: str, message: str
) -> None:
    save_and_break(result, tmp_path / "out", how)
    with pytest.raises(dcvit.errors.SaveFolderError, match=message):
        dcvit.load(tmp_path / "out")


def test_nothing_is_overwritten(result: dcvit.CompressionResult, tmp_path: Path) -> None:
    with pytest.raises(dcvit.errors.SaveFolderError, match="is not a folder"):
        dcvit.load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(dcvit.errors.SaveFolderError, match="is a file"):
        result.save(tmp_path / "file", overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(dcvit.errors.SaveFolderError, match=r"holds something else \(thesis\.txt\)"):
        result.save(tmp_path / "mine", overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(dcvit.errors.SaveFolderError, match="holds something else"):
        result.save(tmp_path / "other", overwrite=True)
    result.save(tmp_path / "out")
    with pytest.raises(dcvit.errors.SaveFolderError, match="earlier result"):
        result.save(tmp_path / "out")
    (tmp_path / "out" / "model.onnx").write_bytes(b"mine")
    with pytest.raises(dcvit.errors.SaveFolderError, match=r"holds something else \(model\.onnx\)"):
        result.save(tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "model.onnx").unlink()
    result.save(tmp_path / "out", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "metric_set.safetensors",
        "model.safetensors",
        "modeling_dcvit.py",
        "result.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine", "other", "out"]


@pytest.mark.parametrize("config", [QUICK, PUBLISHED], ids=["default", "published"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(
    model: nn.Module, images: Tensor, config: dcvit.DCViT, value: float
) -> None:
    with torch.no_grad():
        model.blocks[2].mlp.fc1.weight[3, 5] = value
    with pytest.raises(dcvit.errors.NonFiniteError, match=r"1 of 9,216 values of blocks\.2\.mlp\.fc1\.weight are NaN"):
        dcvit.compress(model, images, dcvit.Budget(macs=0.8), config)


def test_a_block_that_overflows_is_named(model: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        model.blocks[2].mlp.fc2.bias.fill_(3e38)
        model.blocks[1].mlp.fc2.bias.fill_(3e38)
    for call in (
        lambda: dcvit.compress(model, images, dcvit.Budget(macs=0.8), QUICK),
        lambda: dcvit.compress(model, images, dcvit.Budget(macs=0.8), PUBLISHED),
        lambda: dcvit.sweep(model, images, [0.8], QUICK),
    ):
        with pytest.raises(dcvit.errors.NonFiniteError, match="On the first 6 images block 2 outputs NaN"):
            call()


def test_an_error_that_is_not_finite_names_the_block(model: nn.Module, images: Tensor) -> None:
    """The teacher is sound on the images that were looked at, and a block's wanted output is not."""
    teacher = freeze(model)
    few_shot = dcvit.load_images(images, teacher)
    views = draw_views(teacher, few_shot, QUICK.reconstruction, seed=0)
    states = TeacherStates(teacher, views, 4)
    rows = states.rows(1)
    rows.targets[0] = float("nan")
    with pytest.raises(dcvit.errors.NonFiniteError, match="Block 1: its error is nan"):
        reconstruct_block(copy.deepcopy(teacher), BlockProblem(1, BlockSpec(40), rows), QUICK.reconstruction)
