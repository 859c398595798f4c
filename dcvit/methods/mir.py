"""MiR: let a smaller network mimic the features before the head, then put it before the original's head.

Source: Wang, Liu, Ma, Yong, Chai and Wu, "Compressing Models with Few Samples: Mimicking then Replacing" (CVPR 2022,
arXiv 2201.02620). Nothing between is compared, and no label is read: all layers before the head learn together that the
head's input stays what it was.

As it is applied here:

- The smaller network is the original without whole blocks, as many as the budget asks for. MiR takes any pruned network
  and prunes filters in its experiments; how to choose is not its subject, so the blocks are spread evenly over the
  candidates.
- What is mimicked are the pooled features, the very input of the head. The paper finds the map before the pooling
  better by 0.5 to 2 points; that is what `practise` mimics.
- The norms keep the original's statistics, and AdamW with warm-up and cosine, as of all mimicking here, takes the place
  of SGD with steps.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcvit.augmentation import augment
from dcvit.config import MimickingConfig
from dcvit.images import FewShotImages
from dcvit.methods.budgets import candidate_groups, fewest_blocks, flat, plan_of
from dcvit.methods.practise import drop_blocks
from dcvit.methods.registry import Method, Outcome, Task, register
from dcvit.models import adapter_for
from dcvit.optimisation import least, warmup_cosine
from dcvit.progress import Progress, silent
from dcvit.recovery import Recovery, split_held_out
from dcvit.seeding import derive_seed, generator

__all__ = ["MIR", "evenly_spaced", "features", "mimic_features", "mir"]

T = TypeVar("T")


def mir(task: Task) -> Outcome:
    """Drop evenly spaced blocks, and let the rest mimic the input of the original's head.

    Args:
        task: Of its config candidates, seed and the mimicking's epochs, learning rates, weight decay, warm-up, batch
            size and augmentation are read. As many epochs as `practise` has after its trials, so many a dropped block.

    Raises:
        DcvitError: If the config's recovery is not mimicking.
        BudgetError: If the budget cannot be met.
    """
    teacher, budget, config, mimicking = task.teacher, task.budget, task.config, task.config.mimicking
    groups = candidate_groups(teacher, config.candidates)
    blocks = fewest_blocks(teacher, budget, lambda count: evenly_spaced(groups, count), len(groups))
    student = drop_blocks(teacher, blocks)

    def find() -> float:
        seed = derive_seed(config.seed, "learning rate")
        return _find_learning_rate(student, teacher, task.images, config.mimicking, seed, task.progress)

    with task.timer("learning rate"):
        mimicking = replace(mimicking.with_learning_rate(find), epochs=mimicking.epochs * len(blocks))
    with task.timer("compression"):
        seed = derive_seed(config.seed, "mir")
        recovery = mimic_features(student, teacher, task.images, mimicking, seed=seed, progress=task.progress)
    plan = plan_of(teacher, student, budget, blocks, flat(groups))
    return Outcome(student, plan, learning_rate=recovery.learning_rate, steps=(recovery,))


MIR = register(
    Method(
        name="mir",
        title="evenly spaced blocks dropped, the features before the head mimicked",
        source="MiR, arXiv 2201.02620",
        families=("vit", "eva", "swin", "cnn"),
        recovery=MimickingConfig,
        compress=mir,
    )
)


def evenly_spaced(candidates: Sequence[T], count: int) -> tuple[T, ...]:
    """So many of the candidates, in the middle of as many equal parts."""
    return tuple(candidates[(2 * i + 1) * len(candidates) // (2 * count)] for i in range(count))


def features(model: nn.Module, images: Tensor) -> Tensor:
    """What the head is given `[B, D]`, for images `[B, C, H, W]`."""
    adapter = adapter_for(model)
    return adapter.features(model, adapter.tokens(model, images))


@torch.enable_grad()
def mimic_features(
    student: nn.Module,
    teacher: nn.Module,
    images: FewShotImages,
    config: MimickingConfig,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> Recovery:
    """Train all of a student before its pooling, in place, to give its head what the teacher's is given.

    Args:
        student: The smaller model; pooling and head stay the teacher's.
        teacher: The original; untouched.
        images: The few-shot set.
        config: Its `learning_rate` must be a number.
        seed: Orders and augments the images.
        progress: Told after each epoch.

    Returns:
        The losses are mean squared errors of the features.
    """
    start, rate = time.perf_counter(), config.learning_rate
    if rate == "auto":
        raise ValueError("learning_rate='auto': mimic_features needs a number.")
    student.eval().requires_grad_(False)
    parameters = adapter_for(student).body_parameters(student)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=config.weight_decay, fused=True)
    before, losses = _error(student, teacher, images, config), []
    progress("mimicking", 0, config.epochs, None)
    drawing = generator(seed, "recovery")
    for epoch in range(config.epochs):
        for group in optimizer.param_groups:
            group["lr"] = rate * warmup_cosine(epoch, config.epochs, config.warmup_epochs)
        total = torch.zeros((), dtype=torch.float64, device=images.normalised.device)
        for chosen in torch.randperm(len(images), generator=drawing).split(config.batch_size):
            views = images.normalised[chosen]
            if config.augmentation is not None:
                views = augment(images, chosen.tolist(), config.augmentation, drawing)
            optimizer.zero_grad(set_to_none=True)
            for part in views.split(config.at_once):
                with torch.no_grad():
                    wanted = features(teacher, part)
                loss = F.mse_loss(features(student, part), wanted) * (len(part) / len(views))
                loss.backward()
                total += loss.detach().double() * len(chosen)
            optimizer.step()
        losses.append(float(total) / len(images))
        progress("mimicking", epoch + 1, config.epochs, losses[-1])
    student.requires_grad_(False)
    after = _error(student, teacher, images, config)
    return Recovery(before, after, tuple(losses), rate, time.perf_counter() - start)


def _find_learning_rate(
    student: nn.Module,
    teacher: nn.Module,
    images: FewShotImages,
    config: MimickingConfig,
    seed: int,
    progress: Progress,
) -> float:
    """The learning rate of `config.learning_rates` after which held-out images are mimicked best."""
    judged, used = split_held_out(images, seed)
    errors: dict[float, float] = {}
    for rate in config.learning_rates:
        candidate, settings = copy.deepcopy(student), replace(config, learning_rate=rate)
        mimic_features(candidate, teacher, used, settings, seed=seed, progress=progress)
        errors[rate] = _error(candidate, teacher, judged, config)
    return least(errors)


@torch.no_grad()
def _error(student: nn.Module, teacher: nn.Module, images: FewShotImages, config: MimickingConfig) -> float:
    """Mean squared error of the features on the unaugmented images."""
    batches = images.normalised.split(config.at_once)
    total = sum(float((features(student, x) - features(teacher, x)).square().mean()) * len(x) for x in batches)
    return total / len(images)
