"""`DCViT.paper()` is the published procedure: what is updated, in what order, at which learning rate."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dcvit
from dcvit.data import synthesis as synthesis_module
from dcvit.recovery import distill as recovery_module

PAPER = dcvit.DCViT.paper()


def test_published_settings() -> None:
    recovery = PAPER.distillation
    assert (recovery.epochs, recovery.learning_rate, recovery.weight_decay) == (2000, 3e-5, 1e-4)
    assert (recovery.warmup_epochs, recovery.batch_size) == (20, 64)
    assert (recovery.tokens, recovery.updated, recovery.fixed_views) == ("all", "front", None)
    assert recovery.augmentation == dcvit.config.AugmentationConfig((0.08, 1.0), (3 / 4, 4 / 3), 0.5, 0.3)
    synthesis = PAPER.synthesis
    assert (synthesis.num_images, synthesis.iterations, synthesis.warmup_iterations) == (50, 2000, 100)
    assert (synthesis.learning_rate, synthesis.betas) == (0.25, (0.5, 0.9))
    assert (round(synthesis.jitter * 224), synthesis.flip) == (30, 0.5)
    assert (synthesis.tv_exponent, synthesis.tv_weight, synthesis.l2_weight) == (None, 1e-4, 1e-5)
    assert PAPER.ablation == dcvit.config.Ablation("synthetic", "cross_entropy", progressive=True, halving=False)
    assert (PAPER.structure, PAPER.candidates, PAPER.num_blocks) == ("fewest", None, None)
    assert dcvit.DCViT.paper(seed=5) == replace(PAPER, seed=5)


class Recorder(torch.optim.AdamW):
    """AdamW that notes what it is given and does at each step."""

    runs: list["Recorder"] = []  # noqa: RUF012 (reset by the fixture)

    def __init__(self, parameters: Any, **kwargs: Any) -> None:
        super().__init__(parameters, **kwargs)
        self.rates: list[float] = []
        self.first_kwargs = kwargs
        self.batches: list[int] = []
        Recorder.runs.append(self)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.rates.append(self.param_groups[0]["lr"])
        super().step(closure)


def published_rate(epoch: int, epochs: int, warmup: int) -> float:
    """Linear warm-up of the learning rate (not of the loss), then a cosine to zero, epoch by epoch."""
    if epoch < warmup:
        return 3e-5 * (epoch + 1) / warmup
    return 3e-5 * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


@pytest.fixture
def tiny() -> nn.Module:
    """Twelve blocks, as the published candidates 1 to 10 need, and little else."""
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=8, patch_size=4, embed_dim=8, depth=12, num_heads=2, num_classes=4, weight_init="jax"
    )
    nn.init.normal_(model.head.weight)
    return model.eval()


def test_the_published_procedure_step_by_step(tiny: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's config, except that the numbers of epochs and iterations are reduced to a hundredth."""
    epochs, iterations = 24, 20
    config = PAPER.with_(
        recovery=replace(PAPER.distillation, epochs=epochs), synthesis=replace(PAPER.synthesis, iterations=iterations)
    )
    Recorder.runs = []
    monkeypatch.setattr(recovery_module.torch.optim, "AdamW", Recorder)

    updated: list[tuple[list[int], set[str]]] = []
    views: list[Tensor] = []
    trained_together: list[int] = []
    synthesis_rates: list[float] = []
    real_parameters, real_augment = recovery_module.updated_parameters, recovery_module.augment
    real_loss, real_step = recovery_module.distillation_loss, synthesis_module.synthesis_step

    def parameters(student: nn.Module, blocks: Any, settings: Any) -> list[nn.Parameter]:
        chosen = real_parameters(student, blocks, settings)
        wanted = {id(p) for p in chosen}
        updated.append((list(blocks), {name for name, p in student.named_parameters() if id(p) in wanted}))
        return chosen

    def augment(images: Any, indices: Any, settings: Any, generator: torch.Generator) -> Tensor:
        views.append(real_augment(images, indices, settings, generator))
        return views[-1]

    def distillation_loss(student: Tensor, teacher: Tensor, *, weight: Tensor | None, impl: Any) -> Tensor:
        value = real_loss(student, teacher, weight=weight, impl=impl)
        if student.requires_grad:
            assert weight is None
            assert student.shape[1:] == teacher.shape == (50, 5, 8)  # CLS and four patches: all tokens
            torch.testing.assert_close(value, (student - teacher).square().mean(dim=(1, 2, 3)))
            trained_together.append(len(student))
        return value

    def step(*args: Any, **kwargs: Any) -> Tensor:
        synthesis_rates.append(kwargs["lr"])
        assert (kwargs["betas"], kwargs["beta"]) == ((0.5, 0.9), 0.6)
        return real_step(*args, **kwargs)

    monkeypatch.setattr(recovery_module, "updated_parameters", parameters)
    monkeypatch.setattr(recovery_module, "augment", augment)
    monkeypatch.setattr(recovery_module, "distillation_loss", distillation_loss)
    monkeypatch.setattr(synthesis_module, "synthesis_step", step)

    images = torch.rand(50, 3, 8, 8) * 2 - 1
    result = dcvit.compress(tiny, images, dcvit.Budget(macs=0.8), config)
    plan = result.plan
    assert plan.num_blocks == 3

    # Step 3 first: 50 images, Adam's rate warmed up over 100 iterations (here all of them).
    assert synthesis_rates == [pytest.approx(0.25 * (i + 1) / iterations) for i in range(iterations)]

    # Step 2: a separate student probes each of blocks 1 to 10. Step 5: the chosen blocks are added, best first.
    order = list(plan.blocks)
    assert [blocks for blocks, _ in updated] == [[b] for b in range(1, 11)] + [order[:2], order[:3]]
    assert order == [probe.block for probe in result.report.probes[:3]]
    assert [probe.epochs for probe in result.report.probes] == [epochs] * 10, "none stops early"

    # What is updated: the stem and all blocks up to one after the last compressed one. Never norm and head.
    for blocks, names in updated:
        last = max(blocks) + 1
        assert {n for n in names if not n.startswith("blocks.")} == {
            "cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias",
        }  # fmt: skip
        assert {int(n.split(".")[1]) for n in names if n.startswith("blocks.")} == set(range(last + 1))

    # At which rate: one step an epoch (50 images, batch 64), warm-up of 20 epochs.
    assert len(Recorder.runs) == 10 + 2
    for run in Recorder.runs:
        assert run.first_kwargs["weight_decay"] == 1e-4
        assert run.rates == [pytest.approx(published_rate(epoch, epochs, 20)) for epoch in range(epochs)]

    # On which images: new random views each epoch, all 50 in one batch, the same for all probes.
    assert len(views) == (1 + 2) * epochs
    assert trained_together == [4, 4, 2] * epochs + [1] * 2 * epochs
    assert all(view.shape == (50, 3, 8, 8) for view in views)
    assert not torch.equal(views[0], views[1])
