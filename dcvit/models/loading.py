"""From a model's name to the model, and from a model to its preprocessing."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.data import DEFAULT_CROP_PCT, create_transform, resolve_model_data_config
from timm.models._hub import _parse_model_cfg
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dcvit.errors import ImagesError, UnsupportedModelError
from dcvit.models.building import Building, TooLargeError
from dcvit.models.modeling import cnn, eva, swin, vision_transformer
from dcvit.models.modeling.shared import parameter_names, require_arguments, shape_arguments
from dcvit.models.registry import compressible
from dcvit.runtime.files import UnusableFileError, open_regular, own_file, read_table

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

MOST_CONFIG_BYTES = 4 << 20
"""Of a model's config. The names of 21,841 classes take 2 MB."""

MOST_HEADER_BYTES = 4 << 20
"""Of the names and sizes in a file of weights. Those of timm's largest models take 0.5 MB."""

MOST_WEIGHT_BYTES = 64 << 30
"""Of a file of weights. Those of timm's largest model, of 7 billion values, take 27 GB."""

SMALL_BYTES = 256 << 20
"""A model of so many bytes is built whatever its file holds: what was dropped or is computed is not stored."""

MOST_TIMES = 16
"""A larger one may make so many times the values that its file holds, as float32."""

LARGEST_SIDE = 512
"""Of the images of a model of a family that dcvit does not know, unless timm's own takes larger ones: some of them loop
over all pairs of patches in Python."""

_RATES = {"drop_path_rate", "drop_rate"}
"""Arguments that do not shape a model, and that any of timm's takes."""

_ARGUMENTS = {
    vision_transformer.ARCHITECTURE: parameter_names([vision_transformer.build, VisionTransformer]),
    eva.ARCHITECTURE: parameter_names([eva.build]) | _RATES,
    swin.ARCHITECTURE: parameter_names([swin.build, SwinTransformer, SwinTransformerV2]),
    cnn.ARCHITECTURE: parameter_names([cnn.build]) | _RATES,
}
"""Those that the models take which dcvit saves, by the name of their architecture."""

_ARGUMENTS_OF_ALL = {"global_pool", "img_size", "in_chans", "num_classes"} | _RATES
"""Those that a model of a family that dcvit does not know may be stored with."""

_TABLES = ("base_args", "embed_norm_layer", "norm_layer", "per_layer_config", "stem")
"""Of these arguments, those that are tables. Who takes them looks at their entries."""

_FILES = (
    *eva.FILES,
    *cnn.FILES,
    *(f"timm.models.{name}" for name in ("deit", "swin_transformer", "swin_transformer_v2", "vision_transformer")),
)
"""Where timm has the families that dcvit knows."""

_SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load")
"""What a `pretrained_cfg` says of where weights lie. A folder's own lie in the folder."""


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
        crop: timm's evaluation transform up to the normalisation, from a PIL image to levels of 8 bits `[C, H, W]`.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resized: tuple[int, int]
    convert: Callable[[Image.Image], Image.Image]
    shrink: Callable[[Image.Image], Image.Image]
    crop: Callable[[Image.Image], Tensor]

    def transform(self, image: Image.Image) -> Tensor:
        """A PIL image as the model takes it, `[C, H, W]`, as timm's evaluation transform makes it."""
        return self.normalised(self.crop(image).float() / 255)

    @property
    def pixel_range(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest normalised value of each channel, two tensors `[C]`."""
        mean, std = (torch.tensor(values, dtype=torch.float32) for values in (self.mean, self.std))
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
            loaded = _load_folder(Path(name.removeprefix("local-dir:")), pretrained=pretrained)
        else:
            loaded = timm.create_model(name, pretrained=pretrained)
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


def _load_folder(folder: Path, *, pretrained: bool) -> nn.Module:
    """The model of a folder, which a stranger may have made.

    Its two files are read here, and timm gets only what was found harmless: it builds a model, and has nothing to
    read, download or cache. What building takes is found out on the meta device first.
    """
    try:
        config = read_table(own_file(folder, CONFIG_FILE), most=MOST_CONFIG_BYTES)
        weights_file = own_file(folder, WEIGHTS_FILE)
        stored = _stored_shapes(weights_file)
    except FileNotFoundError as error:
        raise UnsupportedModelError(
            f"local-dir:{folder}: there is no {Path(error.filename).name} in that folder; expected a folder that dcvit "
            "or timm saved."
        ) from error
    except UnusableFileError as error:
        raise UnsupportedModelError(f"local-dir:{folder}: {error}: copy the model's own file to there.") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise UnsupportedModelError(
            f"local-dir:{folder} is damaged ({type(error).__name__}: {error}): save or download it again."
        ) from error
    _require_numbers(folder, config, stored)
    build = _builder(folder, config)
    _require_one_model(folder, build, stored)
    if not pretrained:
        return build()
    with torch.device("cpu"), Building():
        model = build()
    model.load_state_dict(load_file(weights_file))
    return model


def _stored_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file, by name."""
    with open_regular(file, most=MOST_WEIGHT_BYTES) as opened:
        header = int.from_bytes(opened.read(8), "little")
    if header > MOST_HEADER_BYTES:
        raise ValueError(f"the header of {file.name} has {header:,} bytes, more than {MOST_HEADER_BYTES:,}")
    with safe_open(file, framework="pt") as weights:
        return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118


def _require_numbers(folder: Path, config: dict[str, Any], stored: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a config with a number that is no size of a model whose weights these are."""
    sizes = [size for shape in stored.values() if 0 not in shape for size in shape]  # an empty tensor has any sizes
    most = max(LARGEST_NUMBER, *sizes, 0)
    too_large = next((number for number in _integers(config) if abs(number) > most), None)
    if too_large is not None:
        raise UnsupportedModelError(
            f"local-dir:{folder}: {CONFIG_FILE} holds the number {too_large}, and no size of the weights is above "
            f"{most}: the two are not of one model; save or download it again."
        )


def _builder(folder: Path, config: dict[str, Any]) -> Callable[[], nn.Module]:
    """What builds the model of a config, as timm reads it, from values that can lead to nothing else."""
    cfg, architecture, args = _parse_model_cfg(config, {})
    if not (isinstance(architecture, str) and architecture.isidentifier() and timm.is_model(architecture)):
        raise UnsupportedModelError(
            f"local-dir:{folder}: {CONFIG_FILE} names the architecture {architecture!r}; expected a name that "
            "timm.list_models() has, or one of dcvit's."
        )
    values: Mapping[str, Any] = args
    names: Collection[str]
    if architecture in _ARGUMENTS:
        names = _ARGUMENTS[architecture]
        values = {name: value for name, value in args.items() if name not in _TABLES}
    elif timm.model_entrypoint(architecture).__module__ in _FILES:
        names = shape_arguments(architecture)
    else:
        names = _ARGUMENTS_OF_ALL
        _require_small_images(folder, architecture, [args.get("img_size"), cfg.get("input_size")])
    require_arguments("model_args", values, names)
    own = {"source": "local-dir", "file": str(folder)}  # as timm has it, and pretrained_model_args likewise
    cfg = {name: value for name, value in cfg.items() if name not in _SOURCES} | own
    recorded = {"pretrained_model_args": dict(args)} if args else {}
    return lambda: timm.create_model(architecture, pretrained=False, pretrained_cfg=cfg, **args, **recorded)


def _require_small_images(folder: Path, architecture: str, sizes: list[Any]) -> None:
    """Refuse images of which a model could be built only in a very long time."""
    own = timm.get_pretrained_cfg(architecture, allow_unregistered=True)
    most = max(LARGEST_SIDE, *(own.input_size if own is not None else ()))
    side = next((number for number in _integers(sizes) if number > most), None)
    if side is not None:
        raise UnsupportedModelError(
            f"local-dir:{folder}: {CONFIG_FILE} holds an image side of {side} for {architecture}; at most {most} is "
            "loaded from a folder: create the model with timm.create_model, and pass that."
        )


def _require_one_model(folder: Path, build: Callable[[], nn.Module], stored: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a model that is larger than the weights let expect, or has others."""
    values = sum(map(math.prod, stored.values()))
    try:
        with torch.device("meta"), Building(max(SMALL_BYTES, MOST_TIMES * 4 * values)):
            described = {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}
    except TooLargeError as error:
        raise UnsupportedModelError(
            f"local-dir:{folder}: {CONFIG_FILE} describes a model whose building takes {error}, and {WEIGHTS_FILE} "
            f"holds {values:,} values: the two are not of one model; save or download it again."
        ) from error
    for name in sorted(described.keys() | stored.keys()):
        if described.get(name) != stored.get(name):
            raise UnsupportedModelError(
                f"local-dir:{folder}: {name} is {_shape(stored.get(name))} in {WEIGHTS_FILE} and "
                f"{_shape(described.get(name))} in the model of {CONFIG_FILE}: the two are not of one model; save or "
                "download it again."
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {list(shape)}"


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
    if name.startswith("local-dir:"):
        return (
            f"model={name!r} could not be loaded: {type(error).__name__}: {reason.removesuffix('.')}. Save or download "
            "the folder again, or create the model yourself, with timm.create_model, and pass that."
        )
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
        return compressible(model).input_size()
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
    channels, height, width = compressible(model).input_size()
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
        normalize=False,  # it would divide in torch's default dtype, whatever that is
    )
    return Preprocessing(
        input_size=(channels, height, width),
        mean=mean,
        std=std,
        resized=(math.ceil(height / crop_share), math.ceil(width / crop_share)),
        convert=convert,
        shrink=lambda image: _at_most(image, math.ceil(LARGEST * max(height, width))),
        crop=lambda image: evaluate(convert(image)),
    )
