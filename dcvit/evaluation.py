"""How good a model is."""

import torch
from torch import Tensor, nn

from dcvit.models import adapter_for

__all__ = ["agreement", "top1"]


@torch.no_grad()
def predictions(model: nn.Module, images: Tensor, batch_size: int = 64) -> Tensor:
    """The most likely class of each image `[N, C, H, W]`, as `[N]`."""
    return torch.cat([model(batch).argmax(-1) for batch in images.split(batch_size)])


def top1(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 64) -> float:
    """Share of the images `[N, C, H, W]` whose most likely class is their label `[N]`, in [0, 1]."""
    return float((predictions(model, images, batch_size) == labels.to(images.device)).double().mean())


def agreement(student: nn.Module, teacher: nn.Module, images: Tensor, batch_size: int = 64) -> float | None:
    """Share of the images for which two models name the same class, in [0, 1]; `None` for models without classes."""
    if adapter_for(teacher).num_classes(teacher) < 2:
        return None
    same = predictions(student, images, batch_size) == predictions(teacher, images, batch_size)
    return float(same.double().mean())
