"""The model and the images that the arguments name."""

import argparse
from collections.abc import Sequence
from pathlib import Path

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
    chosen = files
    if num_images is not None:
        if not 1 <= num_images <= len(files):
            raise ImagesError(
                f"--num-images {num_images}: expected 1 to {len(files)}, which the folder {data!r} holds."
            )
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[:num_images]
        chosen = [files[i] for i in sorted(order.tolist())]
    images = load_images(chosen, model)
    return images, _folder_labels(Path(data), files, images.files or (), model)


def digits_by_default(arguments: argparse.Namespace) -> int | None:
    """50 images of the digits unless told otherwise: their other use is as a test set."""
    wanted: int | None = arguments.num_images
    return 50 if wanted is None and arguments.data == "digits" else wanted


def _folder_labels(
    folder: Path, files: Sequence[Path], chosen: Sequence[Path], model: nn.Module
) -> torch.Tensor | None:
    """Labels of chosen files from the subfolders that all files lie in, if there is one for each class."""

    def top(file: Path) -> str | None:
        first, *rest = file.relative_to(folder).parts
        return first if rest else None

    folders = {top(file) for file in files}
    classes = sorted(name for name in folders if name is not None)
    if None in folders or len(classes) != adapter_for(model).num_classes(model):
        return None
    number = {name: i for i, name in enumerate(classes)}
    return torch.tensor([number[name] for file in chosen if (name := top(file)) is not None])
