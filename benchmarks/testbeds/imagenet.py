"""The paper's own protocol, for whoever has the data: a timm model on ImageNet."""

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
"""Which draw the few-shot sets: five, as in the paper."""


def imagenet(
    root: Path, seed: int, num_images: int = 50, *, model: str | nn.Module = "deit_base_patch16_224", num_held_out: int
) -> TestBed:
    """A timm model with few-shot images of the training set, judged on the validation set.

    Args:
        root: Holds `train` and `val`, a folder for each class in each, in the order of the model's classes by name.
        seed: Draws the few-shot set, and which validation images judge: the same for every seed.
        num_images: Few-shot images.
        model: A timm model, or its name.
        num_held_out: Validation images; all if there are fewer.

    Raises:
        DcvitError: If a folder is missing, or its classes are not as many as the model's.
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
    """So many images `[N, C, H, W]` and their classes `[N]`, drawn without replacement."""
    chosen = torch.randperm(len(data), generator=generator(seed, "imagenet"))[:count].tolist()
    images, labels = zip(*(data[index] for index in chosen), strict=True)
    return torch.stack(images), torch.tensor(labels)
