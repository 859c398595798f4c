"""`dcvit.compress` as a whole."""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import dcvit
from dcvit.compression import fuse
from dcvit.models import MlpHalf, adapter_for, vision_transformer
from dcvit.ops import attention
from tests.conftest import QUICK
from tests.variants import Variant


def state_of(result: dcvit.CompressionResult) -> list[Tensor]:
    return list(result.model.state_dict().values())


def same(a: dcvit.CompressionResult, b: dcvit.CompressionResult) -> bool:
    left, right = state_of(a), state_of(b)
    return len(left) == len(right) and all(
        x.shape == y.shape and torch.equal(x, y) for x, y in zip(left, right, strict=True)
    )


def test_every_variant_end_to_end(variant: Variant, tmp_path: Path) -> None:
    model = variant.create()
    before = copy.deepcopy(model.state_dict())
    images = torch.randn(5, *adapter_for(model).input_size(model))
    result = dcvit.compress(model, images, dcvit.Budget(macs=0.8), QUICK)

    adapter = adapter_for(result.model)
    assert adapter.cost(result.model).total == result.plan.cost
    assert result.report.student.macs <= result.plan.target
    assert len(result.plan.blocks) == result.plan.num_blocks == len(result.report.steps)
    assert all(len(result.plan.kept_nodes[b]) == result.plan.hidden_features for b in result.plan.blocks)
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
    images = torch.randn(3, *adapter_for(teacher).input_size(teacher), dtype=torch.float64)
    fused = fuse(teacher, "auto")
    with torch.no_grad():
        expected = teacher(images)
        # In float64 a wrong term shows, and the order of sums does not.
        torch.testing.assert_close(fused(images), expected, rtol=1e-9, atol=1e-9)
        assert torch.equal(adapter_for(fused).rebuild(fused)(images), expected)
    shared = dict(teacher.named_parameters())
    assert shared.keys() == dict(fused.named_parameters()).keys()
    assert all(parameter is shared[name] for name, parameter in fused.named_parameters())
    assert adapter_for(fused).cost(fused) == adapter_for(teacher).cost(teacher)


def test_whole_blocks_run_the_op_unless_someone_listens(model: nn.Module, images: Tensor) -> None:
    calls: list[int] = []
    model.blocks[1].register_forward_hook(lambda *_: None)
    model.blocks[2].mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
    fused = fuse(model, "auto")
    assert [isinstance(block, MlpHalf) for block in fused.blocks] == [True, False] + [True] * (len(fused.blocks) - 2)
    ran: list[str] = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(vision_transformer, "dropped_mlp", lambda x, *_, impl, **__: (ran.append(impl), x)[1])
        fused(images)
    assert ran == ["auto"] * (len(fused.blocks) - 2), "blocks 1 and 2 keep their modules"
    assert calls == [1]
    assert fuse(model, "eager") is model


def test_whole_blocks_run_the_attention_op_unless_something_is_between(model: nn.Module, images: Tensor) -> None:
    calls: list[int] = []
    model.blocks[1].attn.attn_drop.register_forward_hook(lambda *_: calls.append(1))
    model.blocks[2].attn.register_forward_pre_hook(lambda *_: calls.append(2))
    model.blocks[3].attn.q_norm = nn.LayerNorm(model.blocks[3].attn.head_dim)
    fused = fuse(model, "auto")
    ran: list[str] = []

    def counted(qkv: Tensor, *, impl: Any) -> Tensor:
        ran.append(impl)
        return attention(qkv, impl=impl)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(vision_transformer, "attention", counted)
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


def test_the_callers_model_and_random_state_are_untouched(model: nn.Module, images: Tensor) -> None:
    model.train()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    dcvit.compress(model, images, dcvit.Budget(macs=0.8), QUICK)
    assert torch.equal(torch.rand(3), expected)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_same_seed_same_result(model: nn.Module, images: Tensor) -> None:
    runs = [dcvit.compress(model, images, dcvit.Budget(macs=0.8), replace(QUICK, seed=seed)) for seed in (3, 3, 4)]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_recovery_pays(model: nn.Module, images: Tensor) -> None:
    recovery = dcvit.RecoveryConfig(epochs=30, augmentation=None, learning_rates=(1e-7, 1e-3), closed_form=False)
    config = replace(QUICK, recovery=recovery)
    result = dcvit.compress(model, images, dcvit.Budget(macs=0.7), config)
    assert result.report.learning_rate == 1e-3
    assert all(step.loss_after < 0.7 * step.loss_before for step in result.report.steps)
    assert result.report.mimic_loss == result.report.steps[-1].loss_after
    assert set(result.report.seconds) == {"prepare", "metric set", "learning rate", "ranking", "compression", "report"}


def test_progressive_steps_start_from_the_best_trial(model: nn.Module, images: Tensor) -> None:
    config = dcvit.CompressionConfig(
        recovery=replace(QUICK.recovery, epochs=1), synthesis=QUICK.synthesis, candidates=(0, 1, 2, 3), num_blocks=3
    )
    seen: list[str] = []

    def progress(stage: str, done: int, total: int, loss: float) -> None:
        if done == total:
            seen.append(stage)

    result = dcvit.compress(model, images, dcvit.Budget(macs=0.6), config, progress=progress)
    trials = [f"trial of block {block}" for block in range(4)]
    assert seen == ["synthesis", *trials, "compression, block 2 of 3", "compression, block 3 of 3"]
    assert result.report.steps[0] == result.report.trials[0].recovery
    assert result.plan.blocks == tuple(trial.block for trial in result.report.trials[:3])


def test_all_at_once_trains_as_long(model: nn.Module, images: Tensor) -> None:
    config = replace(QUICK, progressive=False, num_blocks=2)
    result = dcvit.compress(model, images, dcvit.Budget(macs=0.8), config)
    (step,) = result.report.steps
    assert len(step.losses) == 2 * QUICK.recovery.epochs


def test_metric_set_can_be_swapped(model: nn.Module, images: Tensor) -> None:
    stages: set[str] = set()
    given = dcvit.MetricSet(torch.randn(4, 3, 32, 32))
    dcvit.compress(
        model, images, dcvit.Budget(macs=0.8), QUICK, metric_set=given, progress=lambda stage, *_: stages.add(stage)
    )
    assert "synthesis" not in stages


CHANGES: dict[str, Callable[[dcvit.CompressionConfig], dcvit.CompressionConfig]] = {
    "recovery.epochs": lambda c: replace(c, recovery=replace(c.recovery, epochs=3)),
    "recovery.learning_rate": lambda c: replace(c, recovery=replace(c.recovery, learning_rate=2e-4)),
    "recovery.learning_rates": lambda c: replace(
        c, recovery=replace(c.recovery, learning_rate="auto", learning_rates=(3e-4,))
    ),
    "recovery.weight_decay": lambda c: replace(c, recovery=replace(c.recovery, weight_decay=0.5)),
    "recovery.warmup_epochs": lambda c: replace(c, recovery=replace(c.recovery, warmup_epochs=2)),
    "recovery.batch_size": lambda c: replace(c, recovery=replace(c.recovery, batch_size=2)),
    "recovery.tokens": lambda c: replace(c, recovery=replace(c.recovery, tokens="class")),
    "recovery.updated": lambda c: replace(c, recovery=replace(c.recovery, updated="all")),
    "recovery.augmentation": lambda c: replace(c, recovery=replace(c.recovery, augmentation=None)),
    "recovery.closed_form": lambda c: replace(c, recovery=replace(c.recovery, closed_form=False)),
    "synthesis.num_images": lambda c: replace(c, synthesis=replace(c.synthesis, num_images=4)),
    "synthesis.iterations": lambda c: replace(c, synthesis=replace(c.synthesis, iterations=5)),
    "synthesis.learning_rate": lambda c: replace(c, synthesis=replace(c.synthesis, learning_rate=0.1)),
    "synthesis.betas": lambda c: replace(c, synthesis=replace(c.synthesis, betas=(0.9, 0.99))),
    "synthesis.warmup_iterations": lambda c: replace(c, synthesis=replace(c.synthesis, warmup_iterations=3)),
    "synthesis.jitter": lambda c: replace(c, synthesis=replace(c.synthesis, jitter=0.5)),
    "synthesis.flip": lambda c: replace(c, synthesis=replace(c.synthesis, flip=0.0)),
    "synthesis.tv_exponent": lambda c: replace(c, synthesis=replace(c.synthesis, tv_exponent=1.0)),
    "synthesis.tv_weight": lambda c: replace(c, synthesis=replace(c.synthesis, tv_weight=0.1)),
    "synthesis.l2_weight": lambda c: replace(c, synthesis=replace(c.synthesis, l2_weight=0.1)),
    "candidates": lambda c: replace(c, candidates=(2, 3)),
    "num_blocks": lambda c: replace(c, num_blocks=2),
    "metric_set": lambda c: replace(c, metric_set="images"),
    "progressive": lambda c: replace(c, progressive=False, num_blocks=2),
    "seed": lambda c: replace(c, seed=1),
}


def field_names(config: Any, prefix: str = "") -> set[str]:
    names = set()
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value) and not isinstance(value, dcvit.AugmentationConfig):
            names |= field_names(value, field.name + ".")
        else:
            names.add(prefix + field.name)
    return names


def test_every_config_field_is_covered() -> None:
    """`impl` is covered by the tests of the ops; augmentation's own fields by tests/test_images.py."""
    assert field_names(dcvit.CompressionConfig()) == CHANGES.keys() | {"impl"}


@pytest.mark.parametrize("name", CHANGES)
def test_every_config_field_changes_the_outcome(name: str, model: nn.Module, images: Tensor) -> None:
    base = replace(QUICK, num_blocks=2) if name == "progressive" else QUICK
    plain, changed = (
        dcvit.compress(model, images, dcvit.Budget(macs=0.82), config) for config in (base, CHANGES[name](base))
    )
    metric_losses = [{t.block: t.metric_loss for t in result.report.trials} for result in (plain, changed)]
    if name.startswith("synthesis.") or name == "metric_set":
        assert metric_losses[0] != metric_losses[1]  # the ranking's yardstick; the trials themselves stay
    else:
        assert not same(plain, changed)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dcvit.RecoveryConfig(epochs=-1), "epochs=-1"),
        (lambda: dcvit.RecoveryConfig(learning_rate=0.0), "learning_rate=0.0"),
        (lambda: dcvit.RecoveryConfig(learning_rate="fast"), "'fast'.*'auto'"),  # type: ignore[arg-type]
        (lambda: dcvit.RecoveryConfig(learning_rates=()), "learning_rates"),
        (lambda: dcvit.RecoveryConfig(batch_size=0), "batch_size=0"),
        (lambda: dcvit.RecoveryConfig(tokens="cls"), "one of 'all', 'class'"),  # type: ignore[arg-type]
        (lambda: dcvit.RecoveryConfig(updated="back"), "one of 'front'"),  # type: ignore[arg-type]
        (lambda: dcvit.AugmentationConfig(scale=(0.5, 0.2)), "scale"),
        (lambda: dcvit.AugmentationConfig(flip=2), "flip=2"),
        (lambda: dcvit.SynthesisConfig(num_images=0), "num_images=0"),
        (lambda: dcvit.SynthesisConfig(betas=(0.5, 1.0)), "betas"),
        (lambda: dcvit.CompressionConfig(candidates=()), "at least one block"),
        (lambda: dcvit.CompressionConfig(candidates=("1", "10")), "ints"),  # type: ignore[arg-type]
        (lambda: dcvit.CompressionConfig(num_blocks=0), "num_blocks=0"),
        (lambda: dcvit.CompressionConfig(impl="fast"), "one of 'auto'"),  # type: ignore[arg-type]
        (lambda: dcvit.CompressionConfig(metric_set="mine"), "'synthetic'"),  # type: ignore[arg-type]
    ],
)
def test_bad_configs(make: Callable[[], object], message: str) -> None:
    with pytest.raises(dcvit.DcvitError, match=message):
        make()


def test_configs_are_frozen() -> None:
    with pytest.raises(AttributeError):
        dcvit.CompressionConfig().seed = 1  # type: ignore[misc]


def test_result_json_has_what_readers_look_for(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    result = dcvit.compress(model, images, dcvit.Budget(params=0.8), QUICK)
    result.save(tmp_path / "out")
    values = json.loads((tmp_path / "out" / "result.json").read_text())
    wanted = "teacher student budget blocks hidden_features drop_ratio agreement mimic_loss seconds seed versions"
    assert values.keys() >= set(wanted.split())
    for name in ("teacher", "student"):
        assert values[name].keys() == {"macs", "params", "top1", "latency_ms"}
    assert values["budget"] == {"params": 0.8, "convention": "with_attention_products"}
    assert values["student"]["params"] <= 0.8 * values["teacher"]["params"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_args"]["per_layer_config"] == {
        str(block): {"skip": ["attention"], "intermediate_size": result.plan.hidden_features}
        for block in sorted(result.plan.blocks)
    }


def test_the_file_shrinks_with_the_parameters(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    from dcvit.results import save_model

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
    from tests.variants import VARIANTS

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
def test_broken_folders_are_told_apart(result: dcvit.CompressionResult, tmp_path: Path, how: str, message: str) -> None:
    save_and_break(result, tmp_path / "out", how)
    with pytest.raises(dcvit.SaveFolderError, match=message):
        dcvit.load(tmp_path / "out")


def test_nothing_is_overwritten(result: dcvit.CompressionResult, tmp_path: Path) -> None:
    with pytest.raises(dcvit.SaveFolderError, match="is not a folder"):
        dcvit.load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(dcvit.SaveFolderError, match="is a file"):
        result.save(tmp_path / "file", overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(dcvit.SaveFolderError, match=r"holds something else \(thesis\.txt\)"):
        result.save(tmp_path / "mine", overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(dcvit.SaveFolderError, match="holds something else"):
        result.save(tmp_path / "other", overwrite=True)
    result.save(tmp_path / "out")
    with pytest.raises(dcvit.SaveFolderError, match="earlier result"):
        result.save(tmp_path / "out")
    result.save(tmp_path / "out", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "result.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine", "other", "out"]
