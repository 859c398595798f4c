"""Class distributions, also of a model that has no classes.

Blocks are ranked by the cross-entropy between two class distributions, and the proxy set is made for target classes.
A backbone (`num_classes=0`, or a single output, whose softmax is constant) has neither. It gets a fixed random head:

    logits = √d · Q · f / ‖f‖,      Q ∈ R^{d×d} orthogonal, drawn once

on its pooled features f ∈ R^d. This is sound for ranking because a downstream head is a linear map of the same f: a
rotation keeps every distance and angle between features, favours no direction and loses none, so two students are as
far apart through it as their features are, and any candidate that changes f changes the distribution. For f spread
over all directions the factor √d gives each logit unit variance, the scale at which a softmax is neither flat nor
saturated. The same head serves synthesis and ranking; it needs no data.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcvit.models import compressible
from dcvit.runtime.seeding import generator

__all__ = ["class_logits", "num_classes"]


def num_classes(model: nn.Module) -> int:
    """Classes that a model tells apart: its head's, or those of the random head, one for each feature."""
    view = compressible(model)
    classes = view.num_classes()
    if classes > 1:
        return classes
    channels, height, width = view.input_size()
    blank = next(model.parameters()).new_zeros(1, channels, height, width)
    with torch.no_grad():
        return int(view.features(view.tokens(blank)).shape[-1])


def class_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Class logits `[B, K]` from output tokens `[B, N, D]`, through the model's head or the random one."""
    view = compressible(model)
    if view.num_classes() > 1:
        return view.logits(tokens)
    features = view.features(tokens)
    width = features.shape[-1]
    logits: Tensor = width**0.5 * F.normalize(features, dim=-1) @ _rotation(width).to(features).T
    return logits


@lru_cache(maxsize=4)
def _rotation(width: int) -> Tensor:
    """The orthogonal matrix Q of that width, the same in every process."""
    drawing = generator(0, "random head", width)
    with torch.inference_mode(False):  # it outlives the call
        square = torch.randn(width, width, generator=drawing, dtype=torch.float64, device="cpu")
        rotation: Tensor = torch.linalg.qr(square).Q
    return rotation
