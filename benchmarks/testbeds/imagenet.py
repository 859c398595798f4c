"""The paper's protocol for users who have ImageNet: a timm model with ImageNet images."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.datasets import ImageFolder

from benchmarks.testbeds.bed import TestBed
from dcvit.errors import DcvitError
from dcvit.models import load_model
from dcvit.models.loading import preprocessing
from dcvit.models.teacher import freeze
from dcvit.runtime.seeding import generator

__all__ = ["SEEDS", "imagenet"]

SEEDS = (2021, 2022, 2023, 2024, 2025)
"""Seeds of the few-shot sets: five, as in the paper."""


def imagenet(
    root: Path, seed: int, num_images: int = 50, *, model: str | nn.Module = "deit_base_patch16_224", num_held_out: int
) -> TestBed:
    """Return the bed of a timm model, with few-shot images of the training set, evaluated on the validation set.

    Args:
        root: Folder with `train` and `val`. Each has one folder per class, whose sorted names are in the order of the
            model's classes.
        seed: Seed of the few-shot set. The drawn validation images are the same for every seed.
        num_images: Number of few-shot images.
        model: A timm model, or its name.
        num_held_out: Number of validation images; all are used if there are fewer.

    Raises:
        DcvitError: If a folder is missing, or the number of classes is not the model's.
    """
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise DcvitError(f"--imagenet {root}: there is no folder {part} in it; expected train and val.")
    loaded = freeze(load_model(model))
    transform = preprocessing(loaded).transform
    train, val = (ImageFolder(str(root / part), transform) for part in ("train", "val"))
    classes = int(getattr(loaded, "num_classes", 0))
    if len(val.classes) != classes:
        raise DcvitError(f"--imagenet {root}: val has {len(val.classes)} folders, the model {classes} classes.")
    few_shot, _ = _drawn(train, num_images, seed)
    held_out, labels = _drawn(val, num_held_out, 0)
    name = model if isinstance(model, str) else type(model).__name__
    return TestBed(f"imagenet, {name}", loaded, few_shot, held_out, labels)


def _drawn(data: ImageFolder, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw `count` images `[N, C, H, W]` and their classes `[N]`, without replacement."""
    chosen = torch.randperm(len(data), generator=generator(seed, "imagenet"))[:count].tolist()
    images, labels = zip(*(data[index] for index in chosen), strict=True)
    return torch.stack(images), torch.tensor(labels)
