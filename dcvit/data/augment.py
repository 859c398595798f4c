"""Random views of the few-shot images: timm's training augmentation on tensors.

Random resized crop, horizontal flip and colour jitter, as timm's `create_transform(is_training=True)` does them. The
work is torchvision's. Its transforms draw from torch's global generator, so what they draw is drawn here, in the same
order, from a generator of one's own; a seed then fixes every view.
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
"""Crops that are drawn before one in the middle is taken."""


def augment(
    images: FewShotImages, indices: Sequence[int], config: AugmentationConfig, generator: torch.Generator
) -> Tensor:
    """One random view of each chosen image, normalised.

    Args:
        images: The few-shot set.
        indices: Which images.
        config: How strong.
        generator: Draws the views, on the CPU.

    Returns:
        Views `[len(indices), C, H, W]`.
    """
    size = images.normalised.shape[-2:]
    mean, std = (images.normalised.new_tensor(values).view(-1, 1, 1) for values in (images.mean, images.std))
    pixels = torch.stack([_view(images.pixels[i], size, config, generator).clamp(0, 1) for i in indices])
    return (pixels - mean) / std


def _view(image: Tensor, size: Sequence[int], config: AugmentationConfig, generator: torch.Generator) -> Tensor:
    """A random view of an image `[C, H, W]` in [0, 1], in another height and width."""
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
    """Top, left, height and width of a random crop, as `torchvision.transforms.v2.RandomResizedCrop` draws it."""
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
    """An image with its brightness, contrast and saturation changed in any order, as `v2.ColorJitter` does it."""
    changes = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation][: 3 if len(image) == 3 else 2]
    order = torch.randperm(4, generator=generator, device="cpu").tolist()  # the fourth is the hue, which stays
    factors = [_uniform(max(0.0, 1 - strength), 1 + strength, generator) for _ in changes]
    for chosen in order:
        if chosen < len(changes):
            image = changes[chosen](image, factors[chosen])
    return image


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    """A random number between two others."""
    return float(torch.empty(1, dtype=torch.float32, device="cpu").uniform_(low, high, generator=generator))


def _below(count: int, generator: torch.Generator) -> int:
    """A random whole number from 0 on below another."""
    return int(torch.randint(count, (1,), generator=generator, device="cpu"))
