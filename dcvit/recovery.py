"""Steps 2 and 5: token mimicking, which makes a cut student behave like its teacher again.

Source: DC-ViT (arXiv 2403.18708), section 3.2. The loss is the mean squared error between all output tokens of student
and teacher after the final norm; only the front part of the student is updated, which is both more accurate than
updating everything and cheaper in the backward pass.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dcvit.augmentation import augment
from dcvit.config import AugmentationConfig, MimickingConfig
from dcvit.images import FewShotImages
from dcvit.models import adapter_for
from dcvit.ops import Impl, mimic_loss
from dcvit.optimisation import warmup_cosine
from dcvit.progress import Progress, silent
from dcvit.seeding import seeded

__all__ = ["Recovery", "find_learning_rate", "mimicking_loss", "output_tokens", "recover", "updated_parameters"]

HELD_OUT_SHARE = 0.2
"""Share of the few-shot images on which learning rates are compared."""


@dataclass(frozen=True)
class Recovery:
    """What a recovery did.

    Attributes:
        loss_before: Mimicking loss on the unaugmented few-shot images before the first step.
        loss_after: The same after the last step.
        losses: Training loss of each epoch.
        learning_rate: The peak learning rate.
        seconds: Wall-clock time.
    """

    loss_before: float
    loss_after: float
    losses: tuple[float, ...]
    learning_rate: float
    seconds: float


def recover(
    student: nn.Module,
    teacher: nn.Module,
    images: FewShotImages,
    blocks: Sequence[int],
    config: MimickingConfig,
    *,
    seed: int = 0,
    impl: Impl = "auto",
    progress: Progress = silent,
    stage: str = "recovery",
) -> Recovery:
    """Train a cut student, in place, to reproduce the teacher's output tokens.

    Both stay in evaluation mode: the target is a function of the image alone, without dropout or stochastic depth.

    Args:
        student: The cut model; its weights change.
        teacher: The original; untouched.
        images: The few-shot set.
        blocks: The compressed blocks of the student, which decide what is updated.
        config: Its `learning_rate` must be a number; resolve `"auto"` with `find_learning_rate`.
        seed: Orders and augments the images.
        impl: Implementation of the ops.
        progress: Told after each epoch.
        stage: The name under which it is told.

    Raises:
        ValueError: If the learning rate is `"auto"`.
    """
    if config.learning_rate == "auto":
        raise ValueError("learning_rate='auto': recover needs a number, find_learning_rate finds one.")
    start = time.perf_counter()
    parameters = updated_parameters(student, blocks, config)
    student.eval().requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    weight = token_weight(student, images, config)
    targets = output_tokens(teacher, images.normalised, config.batch_size)
    loss_before = mimicking_loss(student, targets, images, config, impl=impl)

    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    losses: list[float] = []
    with seeded(seed, "recovery"):
        views = _Views(teacher, images, targets, config)
        for epoch in range(config.epochs):
            rate = config.learning_rate * warmup_cosine(epoch, config.epochs, config.warmup_epochs)
            for group in optimizer.param_groups:
                group["lr"] = rate
            total = 0.0
            for indices in torch.randperm(len(images)).split(config.batch_size):
                chosen = indices.tolist()
                inputs, target = views.of(epoch, chosen)
                loss = mimic_loss(adapter_for(student).tokens(student, inputs), target, weight=weight, impl=impl)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total += loss.item() * len(chosen)
            losses.append(total / len(images))
            progress(stage, epoch + 1, config.epochs, losses[-1])
    student.requires_grad_(False)
    return Recovery(
        loss_before=loss_before,
        loss_after=mimicking_loss(student, targets, images, config, impl=impl),
        losses=tuple(losses),
        learning_rate=config.learning_rate,
        seconds=time.perf_counter() - start,
    )


class _Views:
    """What the student sees in each epoch, and the teacher's tokens for it."""

    def __init__(self, teacher: nn.Module, images: FewShotImages, tokens: Tensor, config: MimickingConfig) -> None:
        self._teacher, self._images, self._config = teacher, images, config
        augmentation = config.augmentation
        everyone = range(len(images))
        self._fixed: list[tuple[Tensor, Tensor]] | None = None
        if augmentation is None:
            self._fixed = [(images.normalised, tokens)]
        elif augmentation.num_views is not None:
            count = min(augmentation.num_views, config.epochs)
            self._fixed = [self._draw(everyone, augmentation) for _ in range(count)]

    def of(self, epoch: int, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Views `[B, C, H, W]` of the chosen images and the teacher's tokens `[B, N, D]` for them."""
        if self._fixed is not None:
            views, tokens = self._fixed[epoch % len(self._fixed)]
            return views[chosen], tokens[chosen]
        assert self._config.augmentation is not None
        return self._draw(chosen, self._config.augmentation)

    def _draw(self, chosen: Sequence[int], augmentation: AugmentationConfig) -> tuple[Tensor, Tensor]:
        views = augment(self._images, chosen, augmentation)
        return views, output_tokens(self._teacher, views, self._config.batch_size)


def find_learning_rate(
    student: nn.Module,
    teacher: nn.Module,
    images: FewShotImages,
    blocks: Sequence[int],
    config: MimickingConfig,
    *,
    seed: int = 0,
    impl: Impl = "auto",
    progress: Progress = silent,
) -> float:
    """The learning rate that recovers best, judged on images held out of the recovery.

    Each candidate recovers a copy of the student on four fifths of the images; the fifth left out decides. A single
    image serves both ends. The student is not changed.

    Args:
        student: A cut model.
        teacher: The original.
        images: The few-shot set.
        blocks: The compressed blocks of the student.
        config: `learning_rates` holds the candidates.
        seed: Splits, orders and augments the images.
        impl: Implementation of the ops.
        progress: Told after each epoch.
    """
    with seeded(seed, "held out"):
        order = torch.randperm(len(images)).tolist()
    held_out = max(1, round(len(images) * HELD_OUT_SHARE))
    judged, used = images.subset(order[:held_out]), images.subset(order[held_out:] or order)
    target = output_tokens(teacher, judged.normalised, config.batch_size)
    scores: dict[float, float] = {}
    for rate in config.learning_rates:
        copied = copy.deepcopy(student)
        settings = replace(config, learning_rate=rate)
        recover(
            copied,
            teacher,
            used,
            blocks,
            settings,
            seed=seed,
            impl=impl,
            progress=progress,
            stage=f"learning rate {rate:g}",
        )
        loss = mimicking_loss(copied, target, judged, config, impl=impl)
        scores[rate] = loss if loss == loss else float("inf")  # a diverged recovery scores NaN
    return min(scores, key=scores.__getitem__)


def updated_parameters(student: nn.Module, blocks: Sequence[int], config: MimickingConfig) -> list[nn.Parameter]:
    """The parameters that recovery updates, for the compressed blocks of a student.

    Published (`updated="front"`): everything up to one block after the last compressed one. The final norm and the
    head lie behind the front and stay as they are.
    """
    adapter = adapter_for(student)
    last = max(blocks) + 1
    if config.updated == "all":
        return adapter.body_parameters(student)
    first = 0 if config.updated == "front" else max(0, min(blocks) - 1)
    return adapter.parameters(student, first, last)


def token_weight(student: nn.Module, images: FewShotImages, config: MimickingConfig) -> Tensor | None:
    """Token weights `[N]` of the loss; `None` weighs all alike."""
    if config.tokens == "all":
        return None
    tokens = output_tokens(student, images.normalised[:1], 1)
    weight = tokens.new_zeros(tokens.shape[1])
    weight[0] = 1
    return weight


@torch.no_grad()
def output_tokens(model: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    """Output tokens `[N, T, D]` of a model for images `[N, C, H, W]`, without gradients."""
    adapter = adapter_for(model)
    return torch.cat([adapter.tokens(model, batch) for batch in images.split(batch_size)])


@torch.no_grad()
def mimicking_loss(
    student: nn.Module, targets: Tensor, images: FewShotImages, config: MimickingConfig, *, impl: Impl = "auto"
) -> float:
    """The mimicking loss of a student on the unaugmented images, against the teacher's tokens `[N, T, D]`."""
    tokens = output_tokens(student, images.normalised, config.batch_size)
    return float(mimic_loss(tokens, targets, weight=token_weight(student, images, config), impl=impl))
