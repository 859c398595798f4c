"""Class distributions of any model, including one without classes.

Blocks are ranked by the cross-entropy between two class distributions, and the proxy set is made for target classes.
A backbone (`num_classes=0`, or a single output, whose softmax is constant) has no classes. It gets a fixed random head:

    logits = √d · Q · f / ‖f‖,      Q ∈ R^{d×d} orthogonal, drawn once

on its pooled features f ∈ R^d. A rotation is sound for ranking, because a downstream head is also a linear map of f. It
keeps all distances and angles between features and prefers no direction, so two students differ through the head as
much as their features do. Any candidate that changes f changes the distribution. If f is spread over all directions,
the factor √d gives each logit unit variance, at which a softmax is neither flat nor saturated. Synthesis and ranking
use the same head, and it needs no data.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcvit.models import compressible
from dcvit.runtime.seeding import generator

__all__ = ["class_logits", "num_classes"]


def num_classes(model: nn.Module) -> int:
    """Return the number of classes: those of the model's head, or of the random head, which has one per feature."""
    view = compressible(model)
    classes = view.num_classes()
    if classes > 1:
        return classes
    channels, height, width = view.input_size()
    blank = next(model.parameters()).new_zeros(1, channels, height, width)
    with torch.no_grad():
        return int(view.features(view.tokens(blank)).shape[-1])


def class_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return class logits `[B, K]` from output tokens `[B, N, D]`, through the model's head or the random one."""
    view = compressible(model)
    if view.num_classes() > 1:
        return view.logits(tokens)
    features = view.features(tokens)
    width = features.shape[-1]
    logits: Tensor = width**0.5 * F.normalize(features, dim=-1) @ _rotation(width).to(features).T
    return logits


@lru_cache(maxsize=4)
def _rotation(width: int) -> Tensor:
    """Return the orthogonal matrix Q of a width, which is the same in every process."""
    drawing = generator(0, "random head", width)
    with torch.inference_mode(False):  # the cached tensor outlives the caller's inference mode
        square = torch.randn(width, width, generator=drawing, dtype=torch.float64, device="cpu")
        rotation: Tensor = torch.linalg.qr(square).Q
    return rotation
