"""MiR: train a smaller network to match the features before the head, then attach the original's head.

Source: Wang, Liu, Ma, Yong, Chai and Wu, "Compressing Models with Few Samples: Mimicking then Replacing" (CVPR 2022,
arXiv 2201.02620). No intermediate features are compared, and no labels are used. All layers before the head are trained
together so that the head's input stays the same.

Choices and differences of this implementation:

- The smaller network is the original without some whole blocks, as many as the budget requires. MiR accepts any pruned
  network and prunes filters in its experiments. It does not say how to choose them, so the blocks are spread evenly
  over the candidates.
- The student matches the pooled features, which are the input of the head. The paper finds the feature map before
  pooling better by 0.5 to 2 points; `practise` uses that one.
- The norms keep the original's statistics. AdamW with warm-up and a cosine schedule, as in all distillation here,
  replaces SGD with steps.
"""

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcvit.config import MethodConfig, TrainingConfig
from dcvit.context import STANDALONE, RunContext
from dcvit.data.augment import augment
from dcvit.data.images import FewShotImages
from dcvit.history import Recovery
from dcvit.methods.baselines.practise import drop_blocks
from dcvit.methods.budgets import candidate_groups, fewest_blocks, flat, plan_of
from dcvit.methods.registry import Method, Outcome, Task, register
from dcvit.models import compressible
from dcvit.recovery.distill import split_held_out
from dcvit.runtime.optim import descend, pilot_runs, warmup_cosine
from dcvit.runtime.progress import silent

__all__ = ["MiR", "distil_features", "evenly_spaced", "features", "mir"]

T = TypeVar("T")


@dataclass(frozen=True)
class MiR(MethodConfig):
    """Settings of MiR (arXiv 2201.02620): drop evenly spaced blocks, and match the features before the head.

    Attributes:
        candidates: Blocks that may be dropped, from 0; `None` is all but the first and the last.
        seed: See `MethodConfig`.
        impl: See `MethodConfig`.
        training: How the student is trained. `epochs` counts for each dropped block.
    """

    training: TrainingConfig = field(default_factory=TrainingConfig)


def mir(task: Task[MiR]) -> Outcome:
    """Drop evenly spaced blocks, and train the rest to match the input of the original's head.

    The number of epochs per dropped block is the same as that of `practise` after its probes.

    Args:
        task: The model, the images, the budget and the settings.

    Raises:
        BudgetError: If the budget cannot be met.
    """
    teacher, budget, context = task.teacher, task.budget, task.context
    config, distillation = task.config, task.config.training
    groups = candidate_groups(teacher, config.candidates)
    blocks = fewest_blocks(teacher, budget, lambda count: evenly_spaced(groups, count), len(groups))
    student = drop_blocks(teacher, blocks)

    def find() -> float:
        return _find_learning_rate(student, teacher, task.images, config.training, context.derived("learning rate"))

    with task.context.timer("learning rate"):
        distillation = replace(distillation.with_learning_rate(find), epochs=distillation.epochs * len(blocks))
    with task.context.timer("compression"):
        recovery = distil_features(student, teacher, task.images, distillation, context.derived("mir"))
    plan = plan_of(teacher, student, budget, blocks, flat(groups))
    return Outcome(student, plan, learning_rate=recovery.learning_rate, steps=(recovery,))


register(
    Method(
        name="mir",
        config=MiR,
        title="evenly spaced blocks dropped, the features before the head distilled",
        source="MiR, arXiv 2201.02620",
        families=("vit", "eva", "swin", "cnn"),
        compress=mir,
    )
)


def evenly_spaced(candidates: Sequence[T], count: int) -> tuple[T, ...]:
    """Return `count` candidates, each from the middle of one of `count` equal parts."""
    return tuple(candidates[(2 * i + 1) * len(candidates) // (2 * count)] for i in range(count))


def features(model: nn.Module, images: Tensor) -> Tensor:
    """Return the inputs of the head `[B, D]` for images `[B, C, H, W]`."""
    view = compressible(model)
    return view.features(view.tokens(images))


def distil_features(
    student: nn.Module,
    teacher: nn.Module,
    images: FewShotImages,
    config: TrainingConfig,
    context: RunContext = STANDALONE,
) -> Recovery:
    """Train all weights of a student before its pooling, in place, to match the inputs of the teacher's head.

    Args:
        student: The smaller model. Pooling and head stay the teacher's.
        teacher: The original, which does not change.
        images: The few-shot set.
        config: Its `learning_rate` must be a number.
        context: Its seed determines the order and augmentation of the images. Its progress is called after each epoch.

    Returns:
        A report whose losses are mean squared errors of the features.
    """
    start, rate = time.perf_counter(), config.learning_rate
    if rate == "auto":
        raise ValueError("learning_rate='auto': distil_features needs a number.")
    student.eval().requires_grad_(False)
    parameters = compressible(student).body_parameters()
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=config.weight_decay, fused=True)
    before, losses = _error(student, teacher, images, config), list[float]()
    total = torch.zeros((), dtype=torch.float64, device=images.normalised.device)
    drawing = context.generator("recovery")

    def batches() -> Iterator[Tensor]:
        for _ in range(config.epochs):
            yield from torch.randperm(len(images), generator=drawing).split(config.batch_size)

    def backward(chosen: Tensor) -> None:
        views = images.normalised[chosen]
        if config.augmentation is not None:
            views = augment(images, chosen.tolist(), config.augmentation, drawing)
        for part in views.split(config.micro_batch_size):
            with torch.no_grad():
                targets = features(teacher, part)
            loss = F.mse_loss(features(student, part), targets) * (len(part) / len(views))
            loss.backward()
            total.add_(loss.detach().double() * len(chosen))

    per_epoch = -(-len(images) // config.batch_size)
    context.progress("distillation", 0, config.epochs, None)
    for step in descend(
        optimizer,
        batches(),
        backward,
        lambda step: warmup_cosine(step // per_epoch, config.epochs, config.warmup_epochs),
    ):
        if step % per_epoch == 0:
            losses.append(float(total) / len(images))
            total.zero_()
            context.progress("distillation", len(losses), config.epochs, losses[-1])
    student.requires_grad_(False)
    after = _error(student, teacher, images, config)
    return Recovery(before, after, tuple(losses), rate, time.perf_counter() - start)


def _find_learning_rate(
    student: nn.Module,
    teacher: nn.Module,
    images: FewShotImages,
    config: TrainingConfig,
    context: RunContext,
) -> float:
    """Return the learning rate of `config.learning_rates` with the least error on held-out images."""
    validation, used = split_held_out(images, context.seed)

    def error(rate: float) -> float:
        candidate, settings = copy.deepcopy(student), replace(config, learning_rate=rate)
        distil_features(candidate, teacher, used, settings, replace(context, progress=silent))
        return _error(candidate, teacher, validation, config)

    return pilot_runs(config.learning_rates, error, partial(context.progress, "learning rates"))[0]


@torch.no_grad()
def _error(student: nn.Module, teacher: nn.Module, images: FewShotImages, config: TrainingConfig) -> float:
    """Return the mean squared error of the features on the unaugmented images."""
    batches = images.normalised.split(config.micro_batch_size)
    total = sum(float((features(student, x) - features(teacher, x)).square().mean()) * len(x) for x in batches)
    return total / len(images)
