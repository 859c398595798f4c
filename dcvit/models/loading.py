"""Loading of models by name, and the preprocessing of a model's images."""

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
from dcvit.models.foreign import require_module
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
"""The largest number accepted in a model's config, unless its weights have larger sizes."""

LARGEST_RESIZE = 3.6
"""The factor, times the input size, to which an image's shorter side is reduced: a crop of 8 % then fills the input."""

MOST_CONFIG_BYTES = 4 << 20
"""The size limit of a model's config. The names of 21,841 classes take 2 MB."""

MOST_HEADER_BYTES = 4 << 20
"""The size limit of a weight file's header. Those of timm's largest models take 0.5 MB."""

MOST_WEIGHT_BYTES = 64 << 30
"""The size limit of a weight file. timm's largest model, with 7 billion values, takes 27 GB."""

ALWAYS_ALLOWED_BYTES = 256 << 20
"""The size up to which a model may exceed its file: dropped or computed tensors are not stored."""

MOST_VALUES_PER_STORED_VALUE = 16
"""The largest number of values, as float32, that a larger model may create per value in its file."""

LARGEST_SIDE = 512
"""The largest image side for families that dcvit does not support, unless timm's default is larger.

Some of these models loop over all pairs of patches in Python.
"""

_RATES = {"drop_path_rate", "drop_rate"}
"""Arguments of any timm model that do not change its shape."""

_ARGUMENTS = {
    vision_transformer.ARCHITECTURE: parameter_names([vision_transformer.build, VisionTransformer]),
    eva.ARCHITECTURE: parameter_names([eva.build]) | _RATES,
    swin.ARCHITECTURE: parameter_names([swin.build, SwinTransformer, SwinTransformerV2]),
    cnn.ARCHITECTURE: parameter_names([cnn.build]) | _RATES,
}
"""The arguments of the models that dcvit saves, by architecture."""

_COMMON_ARGUMENTS = {"global_pool", "img_size", "in_chans", "num_classes"} | _RATES
"""The arguments accepted for a stored model of a family that dcvit does not support."""

_TABLE_ARGUMENTS = ("base_args", "embed_norm_layer", "norm_layer", "per_layer_config", "stem")
"""The arguments that are tables; the functions that take them check their entries."""

_FILES = (
    *eva.FILES,
    *cnn.FILES,
    *(f"timm.models.{name}" for name in ("deit", "swin_transformer", "swin_transformer_v2", "vision_transformer")),
)
"""timm's modules of the supported families."""

_WEIGHT_SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load")
"""The keys of `pretrained_cfg` that say where weights are stored. A folder's weights are in the folder itself."""


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing of a model's images.

    Attributes:
        input_size: Channels, height, width.
        mean: The mean of each channel, for pixels in [0, 1].
        std: The standard deviation of each channel.
        resized: The height and width that the resized image covers before the crop.
        convert: A function that converts a PIL image to 8 bits and the model's channels. It refuses deeper images.
        shrink: A function that reduces a PIL image to `LARGEST_RESIZE` times the model's size if it is larger.
        crop: timm's evaluation transform without normalisation, from a PIL image to 8-bit levels `[C, H, W]`.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resized: tuple[int, int]
    convert: Callable[[Image.Image], Image.Image]
    shrink: Callable[[Image.Image], Image.Image]
    crop: Callable[[Image.Image], Tensor]

    def transform(self, image: Image.Image) -> Tensor:
        """Return a PIL image as a model input `[C, H, W]`, like timm's evaluation transform."""
        return self.normalised(self.crop(image).float() / 255)

    @property
    def pixel_range(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest normalised value of each channel, two tensors `[C]`."""
        mean, std = (torch.tensor(values, dtype=torch.float32) for values in (self.mean, self.std))
        return (0 - mean) / std, (1 - mean) / std

    def normalised(self, pixels: Tensor) -> Tensor:
        """Return model inputs `[N, C, H, W]` from pixels in [0, 1]."""
        return (pixels - self._per_channel(self.mean, pixels)) / self._per_channel(self.std, pixels)

    def pixels(self, normalised: Tensor) -> Tensor:
        """Return pixels in [0, 1] from model inputs, the inverse of `normalised`."""
        return normalised * self._per_channel(self.std, normalised) + self._per_channel(self.mean, normalised)

    @staticmethod
    def _per_channel(values: tuple[float, ...], images: Tensor) -> Tensor:
        return images.new_tensor(values).view(-1, 1, 1)


def load_model(model: str | nn.Module, *, pretrained: bool = True) -> nn.Module:
    """Load a model by name, in evaluation mode; a model object is returned unchanged.

    Args:
        model: A timm model, or a name: `demo`, or one that `timm.create_model` takes (`vit_tiny_patch16_224`,
            `local-dir:FOLDER`, `hf-hub:OWNER/NAME`).
        pretrained: Whether to load the pretrained weights; otherwise they are random.

    Raises:
        UnsupportedModelError: If the name is unknown, its weights cannot be loaded, or a folder holds no model.
    """
    if not isinstance(model, str):
        require_module(model, "a timm model or a name")
        return model
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
    """Return the hub repository from which `load_model` loads a model's weights; `None` for other sources."""
    if name.startswith("hf-hub:"):
        return name.removeprefix("hf-hub:").partition("@")[0]
    if name == DEMO_MODEL or name.startswith("local-dir:"):
        return None
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return None if config is None else config.hf_hub_id


def _demo_folder() -> Path:
    return Path(__file__).parent.parent / "demo"


def _load_folder(folder: Path, *, pretrained: bool) -> nn.Module:
    """Load the model of a folder, whose files are not trusted.

    Its two files are read here, and timm gets only checked values: it builds a model and does not read, download or
    cache anything. The memory that building takes is first measured on the meta device.
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
    """Return the shapes of the tensors in a safetensors file, by name."""
    with open_regular(file, most=MOST_WEIGHT_BYTES) as opened:
        header = int.from_bytes(opened.read(8), "little")
    if header > MOST_HEADER_BYTES:
        raise ValueError(f"the header of {file.name} has {header:,} bytes, more than {MOST_HEADER_BYTES:,}")
    with safe_open(file, framework="pt") as weights:
        return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118


def _require_numbers(folder: Path, config: dict[str, Any], stored: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a config with a number that is too large for a model with these weights."""
    sizes = [size for shape in stored.values() if 0 not in shape for size in shape]  # empty ones may claim any size
    most = max(LARGEST_NUMBER, *sizes, 0)
    too_large = next((number for number in _integers(config) if abs(number) > most), None)
    if too_large is not None:
        raise UnsupportedModelError(
            f"local-dir:{folder}: {CONFIG_FILE} holds the number {too_large}, and no size of the weights is above "
            f"{most}: they belong to different models; save or download it again."
        )


def _builder(folder: Path, config: dict[str, Any]) -> Callable[[], nn.Module]:
    """Return a function that builds the model of a config as timm does, after all its values have been checked."""
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
        values = {name: value for name, value in args.items() if name not in _TABLE_ARGUMENTS}
    elif timm.model_entrypoint(architecture).__module__ in _FILES:
        names = shape_arguments(architecture)
    else:
        names = _COMMON_ARGUMENTS
        _require_small_images(folder, architecture, [args.get("img_size"), cfg.get("input_size")])
    require_arguments("model_args", values, names)
    own = {"source": "local-dir", "file": str(folder)}  # as timm records it; so with pretrained_model_args
    cfg = {name: value for name, value in cfg.items() if name not in _WEIGHT_SOURCES} | own
    recorded = {"pretrained_model_args": dict(args)} if args else {}
    return lambda: timm.create_model(architecture, pretrained=False, pretrained_cfg=cfg, **args, **recorded)


def _require_small_images(folder: Path, architecture: str, sizes: list[Any]) -> None:
    """Refuse an image size for which building the model would take very long."""
    own = timm.get_pretrained_cfg(architecture, allow_unregistered=True)
    most = max(LARGEST_SIDE, *(own.input_size if own is not None else ()))
    side = next((number for number in _integers(sizes) if number > most), None)
    if side is not None:
        raise UnsupportedModelError(
            f"local-dir:{folder}: {CONFIG_FILE} holds an image side of {side} for {architecture}; at most {most} is "
            "loaded from a folder: create the model with timm.create_model, and pass that."
        )


def _require_one_model(folder: Path, build: Callable[[], nn.Module], stored: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a model that is much larger than its stored weights, or whose weights have other names or shapes."""
    values = sum(map(math.prod, stored.values()))
    try:
        with torch.device("meta"), Building(max(ALWAYS_ALLOWED_BYTES, MOST_VALUES_PER_STORED_VALUE * 4 * values)):
            described = {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}
    except TooLargeError as error:
        raise UnsupportedModelError(
            f"local-dir:{folder}: {CONFIG_FILE} describes a model whose building takes {error}, and {WEIGHTS_FILE} "
            f"holds {values:,} values: they belong to different models; save or download it again."
        ) from error
    for name in sorted(described.keys() | stored.keys()):
        if described.get(name) != stored.get(name):
            raise UnsupportedModelError(
                f"local-dir:{folder}: {name} is {_shape(stored.get(name))} in {WEIGHTS_FILE} and "
                f"{_shape(described.get(name))} in the model of {CONFIG_FILE}: they belong to different models; save "
                "or download it again."
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {list(shape)}"


def _integers(values: Any) -> Iterator[int]:
    """Yield the integers in nested tables and lists."""
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
    """Return an image whose shorter side is at most `side` pixels."""
    shorter = min(image.size)
    if shorter <= side:
        return image
    width, height = (round(length * side / shorter) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)


def is_deep(image: Image.Image) -> bool:
    """Return whether an image is greyscale with 16 or 32 bits per pixel."""
    return image.mode.startswith(("I", "F"))


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Return channels, height and width of the images that a timm model takes, also of an unsupported family.

    Raises:
        UnsupportedModelError: If the size is unknown.
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
    """Return timm's evaluation preprocessing for a model.

    Raises:
        UnsupportedModelError: If the model's `pretrained_cfg` does not define it.
    """
    try:
        return _preprocessing(model)
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"The model's pretrained_cfg does not define the preprocessing ({type(error).__name__}: {error}): "
            "expected input_size, interpolation, crop_pct, mean and std as in timm's models."
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
        if is_deep(image):  # Pillow would turn all values above 255 white
            raise ImagesError(
                f"The image has mode {image.mode!r}, more than 8 bits per pixel: scale its values to 0 to 255 and "
                "convert it to mode 'L'."
            )
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # otherwise Pillow warns
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
        normalize=False,  # timm would divide in torch's default dtype, which the caller may have changed
    )
    return Preprocessing(
        input_size=(channels, height, width),
        mean=mean,
        std=std,
        resized=(math.ceil(height / crop_share), math.ceil(width / crop_share)),
        convert=convert,
        shrink=lambda image: _at_most(image, math.ceil(LARGEST_RESIZE * max(height, width))),
        crop=lambda image: evaluate(convert(image)),
    )
