"""Load the model and the images that the arguments name."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from dcvit.data.images import FewShotImages, image_files, is_hidden, load_images, named
from dcvit.demo import load_digits
from dcvit.errors import DcvitError, ImagesError
from dcvit.models import compressible, load_model
from dcvit.runtime.progress import Progress, silent
from dcvit.runtime.seeding import seeded

__all__ = ["Data", "digits_by_default", "load_data", "load_named_model"]


def load_named_model(name: str, arguments: argparse.Namespace, *, pretrained: bool | None = None) -> nn.Module:
    """Load a model onto the device of the arguments, with random weights if the arguments ask for them.

    Raises:
        DcvitError: If the device cannot be used.
    """
    with seeded(0, "random weights"):
        model = load_model(name, pretrained=not arguments.random_weights if pretrained is None else pretrained)
    try:
        return model.to(arguments.device)
    except (RuntimeError, AssertionError) as error:
        raise DcvitError(f"--device {arguments.device}: not usable here ({str(error).splitlines()[0]}).") from error


class Data(NamedTuple):
    """The images that an argument names.

    Attributes:
        images: The images.
        labels: Class of each image, `[N]`, if the data has labels for the model.
        unlabelled: Reason why there are no labels; `None` if there are labels.
    """

    images: FewShotImages
    labels: torch.Tensor | None
    unlabelled: str | None


def load_data(
    data: str, model: nn.Module, num_images: int | None = None, seed: int = 0, progress: Progress = silent
) -> Data:
    """Load images, and their labels if the data has labels for this model.

    Raises:
        ImagesError: If `num_images` is not between 1 and the number of files.
    """
    device = next(model.parameters()).device
    if data == "digits":
        digits = load_digits()
        if num_images is None:
            return Data(load_images(digits.test_images.to(device), model), digits.test_labels, None)
        return Data(load_images(digits.few_shot(num_images, seed).to(device), model), None, "they are few-shot images")
    files = image_files(Path(data))
    chosen = files
    if num_images is not None:
        if not 1 <= num_images <= len(files):
            raise ImagesError(
                f"--num-images {num_images}: expected 1 to {len(files)}, which the folder {data!r} holds."
            )
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[:num_images]
        chosen = [files[i] for i in sorted(order.tolist())]
    images = load_images(chosen, model, progress)
    classes, unlabelled = _classes(Path(data), files, compressible(model).num_classes())
    if unlabelled is not None:
        return Data(images, None, unlabelled)
    labels = torch.tensor([classes.index(_top(Path(data), file)) for file in images.files or ()])
    return Data(images, labels, None)


def digits_by_default(arguments: argparse.Namespace) -> int | None:
    """Return the number of images; 50 by default for the digits, because all of them are used as the test set."""
    requested: int | None = arguments.num_images
    return 50 if requested is None and arguments.data == "digits" else requested


def _classes(folder: Path, files: Sequence[Path], expected: int) -> tuple[list[str], str | None]:
    """Return the names of a folder's subfolders, and the reason if they are not the model's classes.

    A subfolder without images counts too: without it, every later class would get a wrong index.
    """
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not is_hidden(entry.name))
    filled = {_top(folder, file) for file in files}
    empty = [repr(name) for name in names if name not in filled]
    without = f" Without images: {named(empty)}." if empty else ""
    if stray := [repr(file.name) for file in files if file.parent == folder]:
        return names, f"there are images outside of its subfolders, one for each class: {named(stray)}."
    if len(names) != expected:
        hidden = [repr(entry.name) for entry in folder.iterdir() if is_hidden(entry.name)]
        left_out = f" Hidden: {named(sorted(hidden))}." if hidden else ""
        return names, (
            f"it has {len(names)} subfolders, and the model {expected} classes: expected one for each, in alphabetical "
            f"order.{without}{left_out}"
        )
    return names, None


def _top(folder: Path, file: Path) -> str:
    """Return the first part of a file's path relative to a folder."""
    return file.relative_to(folder).parts[0]
