"""The steps of the method, one by one: distillation, synthesis, class distributions, ranking."""

import copy
import math
from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dcvit
from dcvit.context import RunContext
from dcvit.methods.baselines.practise import Practise, block_dropping
from dcvit.methods.budgets import candidate_groups
from dcvit.models import compressible, preprocessing
from dcvit.models.pseudo_head import class_logits, num_classes
from dcvit.models.surgery import compress_block, draw_kept_units, drop_block
from dcvit.models.teacher import freeze
from dcvit.recovery import distill as recovery_module
from dcvit.recovery.distill import find_learning_rate, output_tokens, recover, updated_parameters
from dcvit.runtime.optim import least, or_infinite, relative_adam, set_share, warmup_cosine
from dcvit.search.plan import plan as make_plan
from tests.conftest import PUBLISHED
from tests.variants import VARIANTS, Variant

PLAIN = dcvit.config.DistillationConfig(epochs=30, learning_rate=1e-3, warmup_epochs=3, augmentation=None)


def probe(model: nn.Module, block: int = 1, kept: int = 60) -> tuple[nn.Module, nn.Module]:
    teacher = freeze(model)
    return compress_block(teacher, block, draw_kept_units(teacher, block, kept, seed=0)), teacher


def test_recovery_reduces_the_distillation_loss_and_reports_it(model: nn.Module, images: Tensor) -> None:
    student, teacher = probe(model)
    few_shot = dcvit.load_images(images, teacher)

    def loss() -> float:
        difference = output_tokens(student, images, 64) - output_tokens(teacher, images, 64)
        return float(difference.square().mean())

    before = loss()
    recovery = recover(student, teacher, few_shot, [1], PLAIN)
    assert recovery.loss_before == pytest.approx(before)
    assert recovery.loss_after == pytest.approx(loss())
    assert recovery.loss_after < 0.5 * recovery.loss_before
    assert recovery.losses[0] == pytest.approx(before)
    assert len(recovery.losses) == 30


def names_of(model: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    targets = {id(p) for p in parameters}
    return {name for name, p in model.named_parameters() if id(p) in targets}


def test_only_the_front_is_updated(model: nn.Module, images: Tensor) -> None:
    student, teacher = probe(model, block=1)
    before = copy.deepcopy(student.state_dict())
    recover(student, teacher, dcvit.load_images(images, teacher), [1], replace(PLAIN, epochs=2))
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    front = ("patch_embed", "cls_token", "pos_embed", "blocks.0.", "blocks.1.", "blocks.2.")
    assert changed == {name for name in before if name.startswith(front)}
    assert names_of(student, updated_parameters(student, [1], PLAIN)) == changed


def test_parts_that_can_be_updated(variant: Variant) -> None:
    model = variant.create()
    everything = {name for name, _ in model.named_parameters()}
    heads = {n for n in everything if n.startswith(("head", "fc_norm", "attn_pool"))}
    updated = {
        part: names_of(model, updated_parameters(model, [2], dcvit.config.DistillationConfig(updated=part)))  # type: ignore[arg-type]
        for part in ("front", "around", "all")
    }
    assert updated["all"] == everything - heads
    assert updated["front"] == updated["all"] - {n for n in everything if n.startswith("norm.")}
    assert updated["around"] == {n for n in everything if n.startswith(("blocks.1", "blocks.2", "blocks.3"))}
    front = names_of(model, updated_parameters(model, [0, 1], dcvit.config.DistillationConfig()))
    assert not any(name.startswith("blocks.3") for name in front)


def test_class_token_ablation(model: nn.Module, images: Tensor) -> None:
    student, teacher = probe(model)
    few_shot = dcvit.load_images(images, teacher)
    difference = output_tokens(student, images, 64)[:, 0] - output_tokens(teacher, images, 64)[:, 0]
    recovery = recover(student, teacher, few_shot, [1], replace(PLAIN, epochs=1, tokens="class"))
    assert recovery.loss_before == pytest.approx(float(difference.square().mean()))


def test_recover_needs_a_learning_rate(model: nn.Module, images: Tensor) -> None:
    student, teacher = probe(model)
    with pytest.raises(ValueError, match="find_learning_rate"):
        recover(student, teacher, dcvit.load_images(images, teacher), [1], dcvit.config.DistillationConfig())


def test_the_learning_rate_is_found_on_held_out_images(model: nn.Module, images: Tensor) -> None:
    student, teacher = probe(model)
    before = copy.deepcopy(student.state_dict())
    few_shot = dcvit.load_images(images, teacher)
    config = replace(PLAIN, learning_rates=(1e-7, 1e-3, 10.0))
    assert find_learning_rate(student, teacher, few_shot, [1], config) == 1e-3
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    one = few_shot.subset([0])
    assert find_learning_rate(student, teacher, one, [1], replace(config, epochs=2)) in config.learning_rates


def test_a_teacher_in_training_mode_answers_as_in_evaluation() -> None:
    """And comes back as it was: its norms have not moved, nor its modes."""
    sizes = {
        "layers": (2, 2, 1, 1),
        "channels": (16, 16, 24, 32),
        "pretrained_cfg_overlay": {"input_size": (3, 64, 64)},
    }
    teacher = timm.create_model("resnet18", num_classes=3, **sizes)
    teacher.layer1.eval()
    before, modes = copy.deepcopy(teacher.state_dict()), [module.training for module in teacher.modules()]
    images = dcvit.load_images(torch.rand(2, 3, 64, 64), teacher)
    config = replace(PLAIN, epochs=1, learning_rate="auto", learning_rates=(1e-4, 1e-3))
    (block,) = candidate_groups(teacher, None)[0]
    student, frozen = drop_block(teacher, block), freeze(teacher)
    rate = find_learning_rate(student, teacher, images, [block], config)
    assert rate == find_learning_rate(student, frozen, images, [block], config)
    settings = config.with_learning_rate(lambda: rate)
    losses = [
        recover(copy.deepcopy(student), original, images, [block], settings).losses for original in (teacher, frozen)
    ]
    assert losses[0] == losses[1]
    assert [module.training for module in teacher.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_losses_that_are_nan_come_last() -> None:
    assert sorted([math.nan, 2.0, 1.0], key=or_infinite)[:2] == [1.0, 2.0]
    assert least({"a": math.nan, "b": 2.0, "c": 1.0, "d": 1.0}) == "c"
    assert least({"a": math.nan, "b": math.nan}) == "a"


def test_a_fixed_number_of_views(model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `fixed_views` the teacher sees each view once, however many epochs there are."""
    student, teacher = probe(model)
    drawn: list[Tensor] = []
    seen: list[int] = []
    real = recovery_module.augment
    monkeypatch.setattr(recovery_module, "augment", lambda *args: drawn.append(real(*args)) or drawn[-1])
    teacher.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    settings = replace(PLAIN, epochs=7, batch_size=4, augmentation=dcvit.config.AugmentationConfig(), fixed_views=3)
    recovery = recover(student, teacher, dcvit.load_images(images, teacher), [1], settings)
    assert len(drawn) == 3
    assert sum(seen) == (1 + 3) * len(images)  # the images themselves, and three views of each
    assert recovery.losses[0] != recovery.losses[3]


def test_blocks_are_dropped_one_by_one(model: nn.Module, images: Tensor) -> None:
    teacher = freeze(model)
    few_shot = dcvit.load_images(images, teacher)
    config = Practise(distillation=PUBLISHED.distillation)
    for number in (0, 3):  # of two candidates
        with pytest.raises(dcvit.DcvitError, match=rf"num_blocks={number}: expected 1 to 2"):
            block_dropping(teacher, few_shot, number, config)
    dropped = block_dropping(teacher, few_shot, 2, config)
    assert dropped.blocks == tuple(probe.block for probe in dropped.probes[:2])
    assert len(dropped.recovery.losses) == 2 * PUBLISHED.distillation.epochs
    cost = compressible(teacher).cost()
    for probe in dropped.probes:
        block = cost.blocks[probe.block]
        share = (block.attention + block.mlp).macs("with_attention_products") / cost.total.macs(
            "with_attention_products"
        )
        assert probe.metric_loss == pytest.approx(probe.recovery.loss_after / share)


def test_steps_are_a_share_of_each_tensors_size() -> None:
    """Adam's first step moves every entry by its learning rate."""
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.fill_(-20.0)
        layer.bias.zero_()  # which is taken to be of size 0.001
    optimizer = relative_adam(layer, 0.1)
    for step_size in (0.1, 0.05):
        set_share(optimizer, step_size / 0.1)
        before = [p.detach().clone() for p in layer.parameters()]
        optimizer.zero_grad()
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        moved = [float((old - new).detach().mean()) for old, new in zip(before, layer.parameters(), strict=True)]
        assert moved == [pytest.approx(step_size * 20, rel=1e-4), pytest.approx(step_size * 1e-3, rel=1e-4)]


def test_warmup_and_cosine() -> None:
    shares = [warmup_cosine(step, 100, 20) for step in range(100)]
    assert shares[:20] == [pytest.approx((i + 1) / 20) for i in range(20)]
    assert shares[20:] == [pytest.approx(0.5 * (1 + math.cos(math.pi * i / 80))) for i in range(80)]
    assert [warmup_cosine(step, 3, 10) for step in range(3)] == [pytest.approx((i + 1) / 3) for i in range(3)]
    assert warmup_cosine(0, 5, 0) == 1


def test_synthesis_lowers_the_loss_within_the_pixel_range(representative: Variant) -> None:
    teacher = freeze(representative.create())
    config = dcvit.config.SynthesisConfig(num_images=4, iterations=25, warmup_iterations=2, jitter=0, flip=0)
    first = dcvit.data.synthesis.synthesize(teacher, replace(config, iterations=1))
    last = dcvit.data.synthesis.synthesize(teacher, config)
    assert last.images.shape == (4, *compressible(teacher).input_size())
    assert last.loss < 0.98 * first.loss
    low, high = (bound.view(-1, 1, 1) for bound in preprocessing(teacher).pixel_range)
    assert (last.images >= low).all()
    assert (last.images <= high).all()
    assert last.targets is not None
    with torch.no_grad():
        logits = class_logits(teacher, compressible(teacher).tokens(last.images))
    prior = dcvit.ops.tv_prior(last.images, beta=compressible(teacher).tv_exponent)
    assert float(F.cross_entropy(logits, last.targets) + prior) == pytest.approx(last.loss, rel=1e-3)


def test_synthesis_repeats_and_does_not_change_the_model(model: nn.Module) -> None:
    teacher = freeze(model)
    before = copy.deepcopy(teacher.state_dict())
    config = dcvit.config.SynthesisConfig(num_images=2, iterations=4)
    again = [dcvit.data.synthesis.synthesize(teacher, config, RunContext(seed)) for seed in (0, 0, 1)]
    assert torch.equal(again[0].images, again[1].images)
    assert not torch.equal(again[0].images, again[2].images)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_random_head_keeps_angles() -> None:
    """Backbones are ranked through a rotation of their features, so no difference between features is lost."""
    teacher = freeze(VARIANTS["backbone"].create())
    view = compressible(teacher)
    images = torch.randn(5, *view.input_size())
    tokens = view.tokens(images)
    logits, features = class_logits(teacher, tokens), view.features(tokens)
    assert num_classes(teacher) == features.shape[1] == logits.shape[1]
    cosines = F.normalize(features, dim=1) @ F.normalize(features, dim=1).T
    torch.testing.assert_close(logits @ logits.T / features.shape[1], cosines)
    assert torch.equal(class_logits(teacher, tokens), logits)


def test_single_output_models_are_ranked_from_features() -> None:
    teacher = freeze(VARIANTS["plain"].create(num_classes=1))
    assert num_classes(teacher) == 48


def test_ranking_tries_every_candidate_and_keeps_the_best(model: nn.Module, images: Tensor) -> None:
    teacher = freeze(model)
    with torch.no_grad():
        teacher.blocks[2].attn.proj.weight.zero_()  # removing the attention of block 2 costs nothing
        teacher.blocks[2].attn.proj.bias.zero_()
    plan = replace(make_plan(teacher, dcvit.Budget(macs=0.9)), hidden_features=190)
    config = PUBLISHED.with_(recovery=replace(PLAIN, epochs=1, learning_rate=1e-6))
    metric = dcvit.metrics.fidelity.Metric(teacher, [torch.randn(8, 3, 32, 32)], config.ablation.metric)
    ranking = dcvit.search.sensitivity.rank(
        teacher, dcvit.load_images(images, teacher), metric, plan, config.distillation
    )
    assert ranking.blocks[0] == 2
    assert sorted(ranking.blocks) == [1, 2]
    losses = [probe.metric_loss for probe in ranking.probes]
    assert losses == sorted(losses)
    assert metric.loss(ranking.student) == pytest.approx(losses[0])
    assert all(len(units) == 190 for units in ranking.kept_units.values())


def test_blocks_sort_as_numbers() -> None:
    """In the reference code block ids are strings, of which "10" comes before "2"."""
    deep = freeze(VARIANTS["plain"].create(depth=12))
    plan = make_plan(deep, dcvit.Budget(macs=0.75))
    config = PUBLISHED.with_(recovery=replace(PUBLISHED.distillation, epochs=0))
    images = dcvit.load_images(torch.randn(1, 3, 32, 32), deep)
    ranking = dcvit.search.sensitivity.rank(
        deep,
        images,
        dcvit.metrics.fidelity.Metric(deep, [images.normalised], config.ablation.metric),
        plan,
        config.distillation,
    )
    order = sorted(ranking.probes, key=lambda probe: (probe.metric_loss, probe.block))
    assert list(ranking.probes) == order
    assert {type(block) for block in ranking.blocks} == {int}


def test_kept_hidden_units_are_seeded_sorted_and_distinct(model: nn.Module) -> None:
    kept = draw_kept_units(model, 1, 50, seed=3)
    assert kept == draw_kept_units(model, 1, 50, seed=3)
    assert kept != draw_kept_units(model, 2, 50, seed=3)
    assert kept != draw_kept_units(model, 1, 50, seed=4)
    assert list(kept) == sorted(set(kept))
    assert 0 <= kept[0] < kept[-1] < 192
