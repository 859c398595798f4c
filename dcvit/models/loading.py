"""From a model's name to the model, and from a model to its preprocessing."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from timm.data import DEFAULT_CROP_PCT, create_transform, resolve_model_data_config
from torch import Tensor, nn

from dcvit.errors import ImagesError, UnsupportedModelError
from dcvit.models.adapter import adapter_for

__all__ = [
    "CONFIG_FILE",
    "DEMO_MODEL",
    "WEIGHTS_FILE",
    "Preprocessing",
    "hub_repository",
    "input_size",
    "is_deep",
    "load_model",
    "preprocessing",
]

DEMO_MODEL = "demo"
"""The name of the embedded model."""


CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"

LARGEST_NUMBER = 1 << 16
"""In a model's config, unless its weights have larger sizes."""

LARGEST = 3.6
"""Times the model's input that an image's shorter side need have: a crop of 8 % of its area is then no smaller."""

MOST_TIMES = 4
"""A model may have so many times the values of its file: tables that are computed are not stored."""


@dataclass(frozen=True)
class Preprocessing:
    """How a model wants its images.

    Attributes:
        input_size: Channels, height, width.
        mean: Per channel, in [0, 1] pixels.
        std: Per channel.
        resized: Height and width that the transform resizes an image to cover before it crops.
        convert: From a PIL image to one of 8 bits in the model's channels. It refuses images of more than 8 bits.
        shrink: From a PIL image to the same, or to one of `LARGEST` times the model's size if it is larger.
        transform: timm's evaluation transform, from a PIL image to a normalised tensor `[C, H, W]`.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resized: tuple[int, int]
    convert: Callable[[Image.Image], Image.Image]
    shrink: Callable[[Image.Image], Image.Image]
    transform: Callable[[Image.Image], Tensor]

    @property
    def pixel_range(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest normalised value of each channel, two tensors `[C]`."""
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return (0 - mean) / std, (1 - mean) / std

    def normalised(self, pixels: Tensor) -> Tensor:
        """Images `[N, C, H, W]` as the model takes them, from pixels in [0, 1]."""
        return (pixels - self._per_channel(self.mean, pixels)) / self._per_channel(self.std, pixels)

    def pixels(self, normalised: Tensor) -> Tensor:
        """The inverse of `normalised`."""
        return normalised * self._per_channel(self.std, normalised) + self._per_channel(self.mean, normalised)

    @staticmethod
    def _per_channel(values: tuple[float, ...], images: Tensor) -> Tensor:
        return images.new_tensor(values).view(-1, 1, 1)


def load_model(model: str | nn.Module, *, pretrained: bool = True) -> nn.Module:
    """A model in evaluation mode, from a name or as it is.

    Args:
        model: A timm model, or a name: `demo`, or one that `timm.create_model` takes (`vit_tiny_patch16_224`,
            `local-dir:FOLDER`, `hf-hub:OWNER/NAME`).
        pretrained: Load the weights that belong to the name; `False` initialises them at random.

    Raises:
        UnsupportedModelError: If the name is unknown, its weights cannot be had, or a folder holds no model.
    """
    if isinstance(model, nn.Module):
        return model
    if not isinstance(model, str):
        raise UnsupportedModelError(f"model={model!r}: expected a timm model or a name, got {type(model).__name__}.")
    name = f"local-dir:{_demo_folder()}" if model == DEMO_MODEL else model
    try:
        if name.startswith("local-dir:"):
            _check_folder(Path(name.removeprefix("local-dir:")))
        loaded: nn.Module = timm.create_model(name, pretrained=pretrained)
    except UnsupportedModelError:
        raise
    except Exception as error:  # timm raises whatever its hub, registry or file reader raises
        raise UnsupportedModelError(_why_not_loaded(model, error)) from error
    return loaded.eval()


def hub_repository(name: str) -> str | None:
    """The hub repository of the weights that `load_model` loads for a name, `None` if they come from elsewhere."""
    if name.startswith("hf-hub:"):
        return name.removeprefix("hf-hub:").partition("@")[0]
    if name == DEMO_MODEL or name.startswith("local-dir:"):
        return None
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return None if config is None else config.hf_hub_id


def _demo_folder() -> Path:
    return Path(__file__).parent.parent / "demo"


def _check_folder(folder: Path) -> None:
    """Refuse a folder without a model, or whose config asks for another than its weights are of.

    timm builds what a config says before it looks at the weights, and a forged number would take all memory.
    """
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise UnsupportedModelError(
                f"local-dir:{folder}: there is no {file} in that folder; expected a folder that dcvit or timm saved."
            )
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as weights:
            names = weights.keys()
            shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in names}
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UnsupportedModelError(
            f"local-dir:{folder} is damaged ({type(error).__name__}: {error}): save or download it again."
        ) from error
    most = max(LARGEST_NUMBER, len(shapes), *(size for shape in shapes.values() for size in shape), 0)
    too_large = next((number for number in _integers(config) if abs(number) > most), None)
    if too_large is not None:
        raise UnsupportedModelError(
            f"local-dir:{folder}: {CONFIG_FILE} holds the number {too_large}, and no size of the weights is above "
            f"{most}: the two are not of one model; save or download it again."
        )
    found, stored = 0, sum(math.prod(shape) for shape in shapes.values())
    with suppress(NotImplementedError), torch.device("meta"):  # which a few of timm's models cannot be built on
        model = timm.create_model(f"local-dir:{folder}", pretrained=False)
        found = sum(tensor.numel() for tensor in model.state_dict().values())
    if found > MOST_TIMES * stored + LARGEST_NUMBER:
        raise UnsupportedModelError(
            f"local-dir:{folder}: {CONFIG_FILE} describes a model of {found:,} values, {WEIGHTS_FILE} holds "
            f"{stored:,}: the two are not of one model; save or download it again."
        )


def _integers(values: Any) -> Iterator[int]:
    """The integers in nested tables and lists."""
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list):
        if isinstance(values, int):
            yield values
        return
    for value in values:
        yield from _integers(value)


def _why_not_loaded(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split())
    if not name.startswith(("local-dir:", "hf-hub:")) and not timm.is_model(name.split(".")[0]):
        similar = get_close_matches(name.split(".")[0], timm.list_models(), n=5)
        hint = f" Similar names: {', '.join(similar)}." if similar else " `timm.list_models()` lists the names."
        if Path(name).is_dir():
            hint = f" There is a folder of that name: for the model in it pass local-dir:{name}."
        return f"model={name!r}: timm knows no model of that name ({reason}).{hint}"
    return (
        f"model={name!r} could not be loaded: {type(error).__name__}: {reason}. Its weights may be out of reach: "
        "pass a model object, local-dir:FOLDER, or pretrained=False (--random-weights) for random ones."
    )


def _at_most(image: Image.Image, side: int) -> Image.Image:
    """An image whose shorter side is at most so long."""
    shorter = min(image.size)
    if shorter <= side:
        return image
    width, height = (round(length * side / shorter) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)


def is_deep(image: Image.Image) -> bool:
    """Return whether an image is grey of 16 or 32 bits per pixel."""
    return image.mode.startswith(("I", "F"))


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model takes, of any family of timm's.

    Raises:
        UnsupportedModelError: If that cannot be told.
    """
    try:
        return adapter_for(model).input_size(model)
    except UnsupportedModelError:
        size = getattr(model, "pretrained_cfg", {}).get("input_size")
        if size is None:
            raise
        channels, height, width = size
        return channels, height, width


def preprocessing(model: nn.Module) -> Preprocessing:
    """Timm's own evaluation preprocessing for a model.

    Raises:
        UnsupportedModelError: If its configuration does not say what that is.
    """
    try:
        return _preprocessing(model)
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"The model's pretrained_cfg does not tell how its images are prepared ({type(error).__name__}: {error}): "
            "expected input_size, interpolation, crop_pct, mean and std as timm's models have them."
        ) from error


def _preprocessing(model: nn.Module) -> Preprocessing:
    config = resolve_model_data_config(model)
    channels, height, width = adapter_for(model).input_size(model)
    mean, std = tuple(map(float, config["mean"])), tuple(map(float, config["std"]))
    if len(mean) != channels or len(std) != channels:  # timm's defaults are RGB; other channels get their average
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise ValueError(f"mean={mean}, std={std}")
    mode = {1: "L", 3: "RGB"}.get(channels)

    def convert(image: Image.Image) -> Image.Image:
        if mode is None:
            raise UnsupportedModelError(
                f"The model takes {channels} channels, but an image file has 1 or 3. Pass the images as a tensor."
            )
        if is_deep(image):  # Pillow would make all that is above 255 white
            raise ImagesError(
                f"The image has mode {image.mode!r}, more than 8 bits per pixel: scale its values to 0 to 255 and "
                "convert it to mode 'L'."
            )
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # without this step Pillow warns
        return image if image.mode == mode else image.convert(mode)

    crop_share = config["crop_pct"] or DEFAULT_CROP_PCT
    evaluate = create_transform(
        input_size=(channels, height, width),
        is_training=False,
        mean=mean,
        std=std,
        interpolation=config["interpolation"],
        crop_pct=crop_share,
        crop_mode=config["crop_mode"],
    )
    return Preprocessing(
        input_size=(channels, height, width),
        mean=mean,
        std=std,
        resized=(math.ceil(height / crop_share), math.ceil(width / crop_share)),
        convert=convert,
        shrink=lambda image: _at_most(image, math.ceil(LARGEST * max(height, width))),
        transform=lambda image: evaluate(convert(image)),
    )
