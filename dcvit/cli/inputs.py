"""The model and the images that the arguments name."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcvit.demo import load_digits
from dcvit.errors import DcvitError, ImagesError
from dcvit.images import FewShotImages, image_files, load_images
from dcvit.models import adapter_for, load_model
from dcvit.seeding import seeded

__all__ = ["digits_by_default", "load_data", "load_named_model"]


def load_named_model(name: str, arguments: argparse.Namespace, *, pretrained: bool | None = None) -> nn.Module:
    """A model on the device of the arguments, with its weights unless they ask for random ones."""
    with seeded(0, "random weights"):
        model = load_model(name, pretrained=not arguments.random_weights if pretrained is None else pretrained)
    try:
        return model.to(arguments.device)
    except (RuntimeError, AssertionError) as error:
        raise DcvitError(f"--device {arguments.device}: not usable here ({str(error).splitlines()[0]}).") from error


def load_data(
    data: str, model: nn.Module, num_images: int | None = None, seed: int = 0
) -> tuple[FewShotImages, torch.Tensor | None]:
    """Images, and labels where the data has them for this model."""
    device = next(model.parameters()).device
    if data == "digits":
        digits = load_digits()
        if num_images is None:
            return load_images(digits.test_images.to(device), model), digits.test_labels
        return load_images(digits.few_shot(num_images, seed).to(device), model), None
    files = image_files(Path(data))
    if num_images is not None:
        if num_images > len(files):
            raise ImagesError(f"--num-images {num_images}: the folder {data!r} holds only {len(files)} images.")
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[:num_images]
        files = [files[i] for i in sorted(order.tolist())]
    return load_images(data if num_images is None else _Files(files), model), _folder_labels(Path(data), files, model)


def digits_by_default(arguments: argparse.Namespace) -> int | None:
    """50 images of the digits unless told otherwise: their other use is as a test set."""
    wanted: int | None = arguments.num_images
    return 50 if wanted is None and arguments.data == "digits" else wanted


class _Files(torch.utils.data.Dataset[Any]):
    """Some image files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        with Image.open(self.files[index]) as image:
            image.load()
            return image


def _folder_labels(folder: Path, files: Sequence[Path], model: nn.Module) -> torch.Tensor | None:
    """Labels from subfolders, if there is one for each class."""
    classes = sorted({file.relative_to(folder).parts[0] for file in files if len(file.relative_to(folder).parts) > 1})
    if not classes or len(classes) != adapter_for(model).num_classes(model):
        return None
    return torch.tensor([classes.index(file.relative_to(folder).parts[0]) for file in files])
