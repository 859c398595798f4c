"""MiR: let a smaller network mimic the features before the head, then put it before the original's head.

Source: Wang, Liu, Ma, Yong, Chai and Wu, "Compressing Models with Few Samples: Distillation then Replacing" (CVPR 2022,
arXiv 2201.02620). Nothing between is compared, and no label is read: all layers before the head learn together that the
head's input stays what it was.

As it is applied here:

- The smaller network is the original without whole blocks, as many as the budget asks for. MiR takes any pruned network
  and prunes filters in its experiments; how to choose is not its subject, so the blocks are spread evenly over the
  candidates.
- What is mimicked are the pooled features, the very input of the head. The paper finds the map before the pooling
  better by 0.5 to 2 points; that is what `practise` mimics.
- The norms keep the original's statistics, and AdamW with warm-up and cosine, as of all distillation here, takes the place
  of SGD with steps.
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
    """MiR (arXiv 2201.02620): evenly spaced blocks dropped, the features before the head mimicked.

    Attributes:
        candidates: Blocks that may be dropped, from 0; `None` is all but the first and the last.
        seed: See `MethodConfig`.
        impl: See `MethodConfig`.
        training: How the student learns the features, as many epochs for each dropped block.
    """

    training: TrainingConfig = field(default_factory=TrainingConfig)


def mir(task: Task[MiR]) -> Outcome:
    """Drop evenly spaced blocks, and let the rest mimic the input of the original's head.

    Args:
        task: What to compress, with what, to which budget. As many epochs as `practise` has after its probes, so many
            a dropped block.

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
        title="evenly spaced blocks dropped, the features before the head mimicked",
        source="MiR, arXiv 2201.02620",
        families=("vit", "eva", "swin", "cnn"),
        compress=mir,
    )
)


def evenly_spaced(candidates: Sequence[T], count: int) -> tuple[T, ...]:
    """So many of the candidates, in the middle of as many equal parts."""
    return tuple(candidates[(2 * i + 1) * len(candidates) // (2 * count)] for i in range(count))


def features(model: nn.Module, images: Tensor) -> Tensor:
    """What the head is given `[B, D]`, for images `[B, C, H, W]`."""
    view = compressible(model)
    return view.features(view.tokens(images))


def distil_features(
    student: nn.Module,
    teacher: nn.Module,
    images: FewShotImages,
    config: TrainingConfig,
    context: RunContext = STANDALONE,
) -> Recovery:
    """Train all of a student before its pooling, in place, to give its head what the teacher's is given.

    Args:
        student: The smaller model; pooling and head stay the teacher's.
        teacher: The original; untouched.
        images: The few-shot set.
        config: Its `learning_rate` must be a number.
        context: Its seed orders and augments the images; its progress is told after each epoch.

    Returns:
        The losses are mean squared errors of the features.
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
                wanted = features(teacher, part)
            loss = F.mse_loss(features(student, part), wanted) * (len(part) / len(views))
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
    """The learning rate of `config.learning_rates` after which held-out images are mimicked best."""
    judged, used = split_held_out(images, context.seed)

    def left(rate: float) -> float:
        candidate, settings = copy.deepcopy(student), replace(config, learning_rate=rate)
        distil_features(candidate, teacher, used, settings, replace(context, progress=silent))
        return _error(candidate, teacher, judged, config)

    return pilot_runs(config.learning_rates, left, partial(context.progress, "learning rates"))[0]


@torch.no_grad()
def _error(student: nn.Module, teacher: nn.Module, images: FewShotImages, config: TrainingConfig) -> float:
    """Mean squared error of the features on the unaugmented images."""
    batches = images.normalised.split(config.micro_batch_size)
    total = sum(float((features(student, x) - features(teacher, x)).square().mean()) * len(x) for x in batches)
    return total / len(images)
