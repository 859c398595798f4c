"""How often models predict the right class, or the same class as another model."""

import torch
from torch import Tensor, nn

from dcvit.models import compressible
from dcvit.ops import distillation_loss

__all__ = ["agreement", "closeness", "top1"]


@torch.no_grad()
def predictions(model: nn.Module, images: Tensor, batch_size: int = 64) -> Tensor:
    """Return the most likely class `[N]` of each image `[N, C, H, W]`. If memory runs out, the batch is halved."""
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
    """Return the share of the images `[N, C, H, W]` whose most likely class is their label `[N]`, in [0, 1]."""
    return float((predictions(model, images, batch_size) == labels.to(images.device)).double().mean())


def agreement(student: nn.Module, teacher: nn.Module, images: Tensor, batch_size: int = 64) -> float | None:
    """Return the share of the images for which two models predict the same class, in [0, 1]; `None` without classes."""
    if compressible(teacher).num_classes() < 2:
        return None
    same = predictions(student, images, batch_size) == predictions(teacher, images, batch_size)
    return float(same.double().mean())


@torch.no_grad()
def closeness(
    student: nn.Module, teacher: nn.Module, images: Tensor, batch_size: int = 64
) -> tuple[float | None, float]:
    """Return the agreement and the distillation loss of two models. Memory does not grow with the number of images.

    Args:
        student: The compressed model.
        teacher: The original model.
        images: `[N, C, H, W]`.
        batch_size: Images in one pass.

    Returns:
        The share of the images for which they predict the same class, see `agreement`, and the mean squared difference
        of their output tokens. If the student has fewer tokens, the inputs of the heads are compared instead.
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
