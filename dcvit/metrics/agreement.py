"""How good a model is."""

import torch
from torch import Tensor, nn

from dcvit.models import compressible
from dcvit.ops import distillation_loss

__all__ = ["agreement", "closeness", "top1"]


@torch.no_grad()
def predictions(model: nn.Module, images: Tensor, batch_size: int = 64) -> Tensor:
    """The most likely class of each image `[N, C, H, W]`, as `[N]`; where memory runs out fewer pass at once."""
    found: list[Tensor] = []
    while (done := sum(map(len, found))) < len(images):
        try:
            found.append(model(images[done : done + batch_size]).argmax(-1))
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
            batch_size //= 2
    return torch.cat(found)


def top1(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 64) -> float:
    """Share of the images `[N, C, H, W]` whose most likely class is their label `[N]`, in [0, 1]."""
    return float((predictions(model, images, batch_size) == labels.to(images.device)).double().mean())


def agreement(student: nn.Module, teacher: nn.Module, images: Tensor, batch_size: int = 64) -> float | None:
    """Share of the images for which two models name the same class, in [0, 1]; `None` for models without classes."""
    if compressible(teacher).num_classes() < 2:
        return None
    same = predictions(student, images, batch_size) == predictions(teacher, images, batch_size)
    return float(same.double().mean())


@torch.no_grad()
def closeness(
    student: nn.Module, teacher: nn.Module, images: Tensor, batch_size: int = 64
) -> tuple[float | None, float]:
    """How two models agree, and the distillation loss of the one against the other; memory does not grow with the images.

    Args:
        student: The one.
        teacher: The other.
        images: `[N, C, H, W]`.
        batch_size: So many pass at once.

    Returns:
        The share of the images for which they name the same class, as `agreement` has it, and the mean squared
        difference of their output tokens; where the student has fewer of them, of what the heads take.
    """
    views = [compressible(model) for model in (student, teacher)]
    loss = 0.0
    for batch in images.split(batch_size):
        tokens = [view.tokens(batch) for view in views]
        compared = tokens
        if tokens[0].shape != tokens[1].shape:
            pooled = [view.features(of) for view, of in zip(views, tokens, strict=True)]
            compared = [features.unsqueeze(1) for features in pooled]
        loss += len(batch) * float(distillation_loss(compared[0], compared[1]))
    return agreement(student, teacher, images, batch_size), loss / len(images)
