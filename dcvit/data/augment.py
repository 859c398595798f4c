"""Random views of the few-shot images: timm's training augmentation on tensors.

The views are random resized crops with horizontal flips and colour jitter, as timm's
`create_transform(is_training=True)` makes them with torchvision. Torchvision's transforms draw from torch's global
generator. This module draws the same numbers, in the same order, from a separate generator, so that a seed fixes every
view.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from dcvit.config import AugmentationConfig
from dcvit.data.images import FewShotImages

__all__ = ["augment"]

CROP_ATTEMPTS = 10
"""Number of random crops that are tried before a central one is taken."""


def augment(
    images: FewShotImages, indices: Sequence[int], config: AugmentationConfig, generator: torch.Generator
) -> Tensor:
    """Return one random, normalised view of each chosen image.

    Args:
        images: The few-shot set.
        indices: The indices of the chosen images.
        config: The strength of the augmentation.
        generator: A generator on the CPU that draws the views.

    Returns:
        Views `[len(indices), C, H, W]`.
    """
    size = images.normalised.shape[-2:]
    mean, std = (images.normalised.new_tensor(values).view(-1, 1, 1) for values in (images.mean, images.std))
    pixels = torch.stack([_view(images.pixels[i], size, config, generator).clamp(0, 1) for i in indices])
    return (pixels - mean) / std


def _view(image: Tensor, size: Sequence[int], config: AugmentationConfig, generator: torch.Generator) -> Tensor:
    """Return a random view of an image `[C, H, W]` in [0, 1], resized to a height and width."""
    top, left, height, width = _crop(image.shape[-2], image.shape[-1], config, generator)
    view: Tensor = F.resized_crop(
        image, top, left, height, width, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True
    )
    if _uniform(0, 1, generator) < config.flip:
        view = F.horizontal_flip(view)
    if config.color_jitter and len(image) in (1, 3):  # torchvision's colour operations are defined for grey and RGB
        view = _jittered(view, config.color_jitter, generator)
    return view


def _crop(height: int, width: int, config: AugmentationConfig, generator: torch.Generator) -> tuple[int, int, int, int]:
    """Return top, left, height and width of a random crop, drawn as torchvision's `v2.RandomResizedCrop` draws it."""
    narrowest, widest = (math.log(ratio) for ratio in config.ratio)
    for _ in range(CROP_ATTEMPTS):
        area = height * width * _uniform(*config.scale, generator)
        ratio = math.exp(_uniform(narrowest, widest, generator))
        crop_height, crop_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            top, left = (_below(room + 1, generator) for room in (height - crop_height, width - crop_width))
            return top, left, crop_height, crop_width
    crop_height = min(height, round(width / min(config.ratio)))
    crop_width = min(width, round(height * max(config.ratio)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def _jittered(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Return an image with brightness, contrast and saturation changed in random order, as by `v2.ColorJitter`."""
    changes = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation][: 3 if len(image) == 3 else 2]
    order = torch.randperm(4, generator=generator, device="cpu").tolist()  # the fourth is the hue, which is not changed
    factors = [_uniform(max(0.0, 1 - strength), 1 + strength, generator) for _ in changes]
    for chosen in order:
        if chosen < len(changes):
            image = changes[chosen](image, factors[chosen])
    return image


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    """Return a random number between two others."""
    return float(torch.empty(1, dtype=torch.float32, device="cpu").uniform_(low, high, generator=generator))


def _below(count: int, generator: torch.Generator) -> int:
    """Return a random integer from 0 to `count` − 1."""
    return int(torch.randint(count, (1,), generator=generator, device="cpu"))
