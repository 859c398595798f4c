"""Crops of the photographs in scikit-image and scikit-learn, from two disjoint regions of each.

The few-shot region is to the left of a vertical line. Training sets, images for linear probes and few-shot sets are
cropped from it. The held-out region is to the right of the line. A crop's label is its photograph.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dcvit.errors import DcvitError
from dcvit.models.loading import preprocessing
from dcvit.runtime.seeding import generator

__all__ = ["COLOUR", "GREY", "PHOTOGRAPHS", "Crops", "Region", "crops", "load_photograph", "normalised"]

COLOUR = (
    "astronaut",
    "chelsea",
    "china.jpg",
    "coffee",
    "flower.jpg",
    "hubble_deep_field",
    "immunohistochemistry",
    "retina",
    "rocket",
    "stereo_motorcycle",
)
"""Colour photographs: names in `skimage.data`, and files of `sklearn.datasets.load_sample_image`."""

GREY = ("brick", "camera", "coins", "grass", "gravel", "moon", "page", "text")
PHOTOGRAPHS = COLOUR + GREY

HELD_OUT_SHARE = 0.4
"""Share of a photograph's width that is the held-out region."""

SIDE = (0.5, 1.0)
"""Range of a crop's uniformly drawn side, as a share of the held-out region's shorter side, for both regions."""

Region = Literal["few-shot", "held-out"]


@dataclass(frozen=True)
class Crops:
    """Square crops.

    Attributes:
        pixels: Pixels in [0, 1], `[N, 3, size, size]`.
        labels: Index of each crop's photograph, `[N]`.
        boxes: Left, top, right and bottom of each crop in its photograph, in pixels.
    """

    pixels: Tensor
    labels: Tensor
    boxes: tuple[tuple[int, int, int, int], ...]


def crops(photographs: Sequence[str], region: Region, count: int, size: int, seed: int) -> Crops:
    """Draw crops at random positions and scales. The numbers of crops per photograph differ by one at most.

    Args:
        photographs: Names from `COLOUR` and `GREY`.
        region: Region of each photograph.
        count: Number of crops.
        size: Side to which the crops are resized, in pixels.
        seed: Seed of the photographs, positions and scales. The two regions draw independently.

    Raises:
        DcvitError: If `count` is less than 1.
    """
    if count < 1:
        raise DcvitError(f"num_images={count}: expected at least 1, 50 is usual.")
    drawing = generator(seed, "crops", region)
    rounds = -(-count // len(photographs))
    order = torch.cat([torch.randperm(len(photographs), generator=drawing) for _ in range(rounds)])
    draws = torch.rand(count, 3, generator=drawing, dtype=torch.float64).tolist()
    labels = order[:count]
    images = [load_photograph(photographs[label]) for label in labels.tolist()]
    boxes = [_box(*image.size, region, *draw) for image, draw in zip(images, draws, strict=True)]
    resized = [
        image.resize((size, size), Image.Resampling.BICUBIC, box=box) for image, box in zip(images, boxes, strict=True)
    ]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in resized])).permute(0, 3, 1, 2)
    return Crops(pixels.contiguous().float() / 255, labels, tuple(boxes))


def split_column(width: int) -> int:
    """Return the first column of the held-out region."""
    return round(width * (1 - HELD_OUT_SHARE))


def _box(width: int, height: int, region: Region, x: float, y: float, scale: float) -> tuple[int, int, int, int]:
    """Return the box of the crop that three numbers in [0, 1) determine."""
    column = split_column(width)
    start, stop = (0, column) if region == "few-shot" else (column, width)
    side = int(min(width - column, height) * (SIDE[0] + (SIDE[1] - SIDE[0]) * scale))
    left, top = start + int(x * (stop - start - side + 1)), int(y * (height - side + 1))
    return left, top, left + side, top + side


@lru_cache(maxsize=len(PHOTOGRAPHS))
def load_photograph(name: str) -> Image.Image:
    """Load a photograph of `COLOUR` or `GREY` in RGB, from an installed package.

    Raises:
        DcvitError: If scikit-image or scikit-learn is not installed.
    """
    try:
        import skimage.data
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise DcvitError(
            f"{name}: the photographs come with scikit-image and scikit-learn: pip install 'dcvit[bench]'."
        ) from error
    if name.endswith(".jpg"):
        image: Any = load_sample_image(name)
    elif name == "stereo_motorcycle":
        image = skimage.data.stereo_motorcycle()[0]  # the left view, because the right one is almost the same
    else:
        image = getattr(skimage.data, name)()
    return Image.fromarray(image).convert("RGB")


def normalised(pixels: Tensor, model: nn.Module) -> Tensor:
    """Normalise pixels in [0, 1], `[N, 3, H, W]`, for a model."""
    prep = preprocessing(model)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (prep.mean, prep.std))
    return (pixels - mean) / std
