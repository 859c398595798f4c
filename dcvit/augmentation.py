"""Random views of the few-shot images: timm's training augmentation on tensors.

Random resized crop, horizontal flip and colour jitter, as timm's `create_transform(is_training=True)` does them,
drawn from torch's generator so that a seed fixes every view. The work is torchvision's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from dcvit.config import AugmentationConfig
from dcvit.images import FewShotImages

__all__ = ["augment"]


def augment(images: FewShotImages, indices: Sequence[int], config: AugmentationConfig) -> Tensor:
    """One random view of each chosen image, normalised.

    Draws from torch's global generator; wrap the caller in `dcvit.seeding.seeded`.

    Args:
        images: The few-shot set.
        indices: Which images.
        config: How strong.

    Returns:
        Views `[len(indices), C, H, W]`.
    """
    size = images.normalised.shape[-2:]
    channels = images.normalised.shape[1]
    steps: list[torch.nn.Module] = [
        v2.RandomResizedCrop(
            list(size), scale=config.scale, ratio=config.ratio, interpolation=InterpolationMode.BICUBIC, antialias=True
        ),
        v2.RandomHorizontalFlip(config.flip),
    ]
    jitter = config.color_jitter
    if jitter and channels in (1, 3):  # torchvision's colour operations are defined for grey and RGB
        steps.append(v2.ColorJitter(jitter, jitter, jitter if channels == 3 else 0))
    view = v2.Compose(steps)
    mean, std = (images.normalised.new_tensor(values).view(-1, 1, 1) for values in (images.mean, images.std))
    pixels = torch.stack([view(images.pixels[i]).clamp(0, 1) for i in indices])
    return (pixels - mean) / std
