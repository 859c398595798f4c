"""The few-shot set: whatever the caller has, as one checked tensor.

Labels are never read. On the CPU the images lie on disk once they are many (`dcvit.stacks`), unless the caller has them
in a tensor.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dcvit.errors import ImagesError, ImagesWarning
from dcvit.models import adapter_for, preprocessing
from dcvit.models.loading import Preprocessing
from dcvit.stacks import Stack

__all__ = ["IMAGE_SUFFIXES", "FewShotImages", "Images", "check_images", "image_files", "load_images"]

Images = Tensor | Dataset[Any] | DataLoader[Any] | str | Path | Sequence[str | Path]
"""What `compress` takes as images."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class FewShotImages:
    """The few-shot set D_T.

    Attributes:
        normalised: The images as the model takes them, `[N, C, H, W]`.
        pixels: The same images in [0, 1], each `[C, H', W']` at its own size, from which augmentation crops; a large
            file's at a size of which the smallest crop is no smaller than what the model takes.
        mean: Per channel, which the normalisation takes from pixels.
        std: Per channel, by which it divides them.
        files: What each was read from; `None` where they do not come from files.
    """

    normalised: Tensor
    pixels: Sequence[Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    files: tuple[Path, ...] | None = None

    def __len__(self) -> int:
        return len(self.normalised)

    def to(self, device: str | torch.device) -> "FewShotImages":
        """The same on another device."""
        normalised = self.normalised.to(device)
        if isinstance(self.pixels, _Pixels):
            return replace(self, normalised=normalised, pixels=self.pixels.of(normalised))
        return replace(self, normalised=normalised, pixels=[picture.to(device) for picture in self.pixels])

    def subset(self, indices: Sequence[int]) -> "FewShotImages":
        """Some of the images."""
        files = None if self.files is None else tuple(self.files[i] for i in indices)
        normalised = self.normalised[list(indices)]
        if isinstance(self.pixels, _Pixels):
            return replace(self, normalised=normalised, pixels=self.pixels.of(normalised, indices), files=files)
        return replace(self, normalised=normalised, pixels=[self.pixels[i] for i in indices], files=files)


def load_images(images: Images | FewShotImages, model: nn.Module) -> FewShotImages:
    """Collect and check the few-shot images for a model.

    Args:
        images: A normalised tensor `[N, C, H, W]`; a `Dataset` or `DataLoader` of normalised tensors `[C, H, W]`
            or PIL images, alone or as the first of a tuple; a folder, searched recursively; or a list of files.
            PIL images and files get timm's evaluation preprocessing for the model. Files that cannot be read are left
            out, with a warning that names them; there is one, too, where tensors look like pixels.
        model: The model that will see them.

    Returns:
        The images on the model's device.

    Raises:
        ImagesError: If there are none, or any does not fit: size, channels, dtype, device, NaN or infinite pixels; or
            if fewer than half of the files can be read.
    """
    if isinstance(images, FewShotImages):
        check_images(images.normalised, model)
        return images
    prep, parameter = preprocessing(model), next(model.parameters())
    files: list[Path] | None = None
    if isinstance(images, str | Path):
        files = image_files(Path(images))
    elif isinstance(images, list | tuple) and images and all(isinstance(item, str | Path) for item in images):
        files = [Path(item) for item in images]
    readable: list[Path] = []
    if files is not None:
        items: Iterable[Any] = _readable(files, readable)
    elif isinstance(images, Tensor):
        check_images(images, model)
        return _few_shot(images.detach(), _Bytes(), prep)
    elif isinstance(images, DataLoader):
        items = (image for batch in images for image in _of_batch(batch))
    elif hasattr(images, "__getitem__") and hasattr(images, "__len__"):
        items = (_first(images[i]) for i in range(len(images)))
    elif isinstance(images, Iterable):
        items = (_first(item) for item in images)
    else:
        raise ImagesError(
            f"images is a {type(images).__name__}; expected a tensor [N, C, H, W], a Dataset, a DataLoader or a folder."
        )

    normalised, at_own_size = Stack(), _Bytes()
    for number, item in enumerate(items):
        if isinstance(item, Image.Image):
            at_own_size.append(number, prep.to_pixels(item))
            image = prep.transform(item).to(parameter.dtype)
        elif isinstance(item, Tensor):
            image = item
        else:
            raise ImagesError(f"An image is a {type(item).__name__}; expected a tensor [C, H, W] or a PIL image.")
        image = image[None].to(parameter.device)
        check_images(image, model, first=number)
        normalised.append(image)
    if not len(normalised):
        raise ImagesError("There are no images: pass at least one, 50 to 1000 is usual.")
    few_shot = _few_shot(normalised.whole(), at_own_size, prep)
    return few_shot if files is None else replace(few_shot, files=tuple(readable))


def _few_shot(normalised: Tensor, at_own_size: "_Bytes", prep: Preprocessing) -> FewShotImages:
    if not at_own_size:
        _warn_of_pixels(normalised[:8], prep)
    mean, std = (prep.mean, prep.std) if at_own_size else _normalisation(normalised, prep)
    return FewShotImages(normalised, _Pixels(normalised, at_own_size, mean, std), mean, std)


ROUNDING = 1e-2
"""So far beyond [0, 1] pixels still count as inside: interpolation and half precision take them there."""


def _normalisation(normalised: Tensor, prep: Preprocessing) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that make these images of pixels in [0, 1]: the model's, if those do.

    A caller may have normalised in another way, as is usual of microscopy or CT. Views must not be clipped then: what
    is [0, 1] is taken from the images, channel by channel.
    """
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (prep.mean, prep.std))
    ends = torch.stack([torch.stack([x.amin((0, 2, 3)), x.amax((0, 2, 3))]) for x in normalised.split(64)])
    low, high = ends[:, 0].amin(0).double().cpu(), ends[:, 1].amax(0).double().cpu()
    if bool((low * std + mean >= -ROUNDING).all() and (high * std + mean <= 1 + ROUNDING).all()):
        return prep.mean, prep.std
    span = (high - low).clamp_min(1e-6)
    return tuple((-low / span).tolist()), tuple((1 / span).tolist())


def _warn_of_pixels(images: Tensor, prep: Preprocessing) -> None:
    """Say so where images look like pixels that nobody has normalised, by their 256 levels."""
    if set(prep.mean) == {0.0} and set(prep.std) == {1.0}:
        return
    for top in (1, 255):
        levels = images * (255 / top)
        whole = levels.round()
        between = bool(whole.amin() >= 0) and bool(whole.amax() <= 255) and bool(whole.amax() > 1)
        if between and bool(((levels - whole).abs() < 1e-3).all()):
            warnings.warn(
                f"The images look like pixels from 0 to {top} that are not normalised, and the model's configuration "
                f"has mean {prep.mean} and std {prep.std}: normalise them "
                "(timm.data.create_transform(**timm.data.resolve_model_data_config(model))), unless the model was "
                "trained on such.",
                ImagesWarning,
                stacklevel=4,
            )
            return


class _Bytes:
    """Pictures of different sizes, `[C, H, W]` of uint8 each, by number."""

    def __init__(self) -> None:
        self._bytes = Stack()
        self._places: dict[int, tuple[int, torch.Size]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def append(self, number: int, picture: Tensor) -> None:
        self._places[number] = len(self._bytes), picture.shape
        self._bytes.append(picture.flatten())

    def get(self, number: int) -> Tensor | None:
        if number not in self._places:
            return None
        first, shape = self._places[number]
        return self._bytes[first : first + shape.numel()].view(shape)


class _Pixels(Sequence[Tensor]):
    """The images in [0, 1], worked out when they are asked for: from what their files hold, or from the normalised."""

    def __init__(
        self,
        normalised: Tensor,
        at_own_size: _Bytes,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        numbers: Sequence[int] | None = None,
    ) -> None:
        self._normalised, self._at_own_size = normalised, at_own_size
        self._numbers = range(len(normalised)) if numbers is None else numbers  # under which they lie at their own size
        self._given = mean, std
        self._mean, self._std = (torch.tensor(values).view(-1, 1, 1).to(normalised.device) for values in (mean, std))

    def of(self, normalised: Tensor, indices: Sequence[int] | None = None) -> "_Pixels":
        """Those of the same images elsewhere, or of some of them."""
        numbers = self._numbers if indices is None else [self._numbers[i] for i in indices]
        return _Pixels(normalised, self._at_own_size, *self._given, numbers)

    def __len__(self) -> int:
        return len(self._normalised)

    @overload
    def __getitem__(self, number: int) -> Tensor: ...
    @overload
    def __getitem__(self, number: slice) -> list[Tensor]: ...
    def __getitem__(self, number: int | slice) -> Tensor | list[Tensor]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        picture = self._at_own_size.get(self._numbers[number])
        if picture is not None:
            return picture.to(self._normalised.device).float() / 255
        return (self._normalised[number] * self._std + self._mean).clamp(0, 1)


NAMED = 5
"""So many broken files are named."""


def image_files(folder: Path) -> list[Path]:
    """The image files of a folder and its subfolders, sorted by path.

    Raises:
        ImagesError: If the folder does not exist or holds none.
    """
    if not folder.is_dir():
        raise ImagesError(f"{str(folder)!r} is not a folder: expected one with image files.")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ImagesError(f"The folder {str(folder)!r} holds no image files ({', '.join(IMAGE_SUFFIXES)}).")
    return files


def _readable(files: Sequence[Path], read: list[Path]) -> Iterator[Image.Image]:
    """The images of files one by one; at the end it warns of those that cannot be read, or refuses if they are most.

    Args:
        files: The files.
        read: Those that could be read are added to it.
    """
    broken: list[str] = []
    for path in files:
        try:
            with Image.open(path) as image:
                image.load()
        except Exception as error:  # Pillow's readers raise whatever a broken file makes them
            broken.append(f"{str(path)!r} ({' '.join(str(error).split()) or type(error).__name__})")
            continue
        read.append(path)
        yield image
    if not broken:
        return
    listed = ", ".join(broken[:NAMED]) + (f" and {len(broken) - NAMED} more" if len(broken) > NAMED else "")
    problem = f"{len(broken)} of {len(files)} files cannot be read as images: {listed}"
    if 2 * len(broken) > len(files):
        raise ImagesError(f"{problem}: remove or replace them.")
    warnings.warn(f"{problem}. They are left out.", ImagesWarning, stacklevel=3)


def _first(item: Any) -> Any:
    """The image of an (image, label) pair, or of an item that is the image alone."""
    return item[0] if isinstance(item, tuple | list) and len(item) > 0 else item


def _of_batch(batch: Any) -> Iterator[Any]:
    """The images of what a `DataLoader` gives: a batch, one with its labels, or a list of items."""
    first = _first(batch)
    if isinstance(first, Tensor):
        collated = first.ndim == 4
    else:
        collated = isinstance(first, tuple | list) and len(first) > 1 and all(map(_is_image, first))
    yield from first if collated else map(_first, batch)


def _is_image(item: Any) -> bool:
    return item.ndim == 3 if isinstance(item, Tensor) else isinstance(item, Image.Image)


def check_images(images: Tensor, model: nn.Module, name: str = "The images", first: int = 0) -> None:
    """Refuse images that do not fit a model.

    Args:
        images: `[N, C, H, W]`.
        model: The model.
        name: How errors call them.
        first: The number of the first of them, among all.

    Raises:
        ImagesError: If there are none, or size, channels, dtype or device do not fit, or pixels are NaN or infinite.
    """
    adapter = adapter_for(model)
    channels, height, width = adapter.input_size(model)
    parameter, shape = next(model.parameters()), list(images.shape)
    if images.device != parameter.device:
        raise ImagesError(
            f"{name} are on {images.device}, the model on {parameter.device}: move one to the other's device."
        )
    if images.ndim != 4:
        raise ImagesError(f"{name} have shape {shape}: expected [N, C, H, W], here [N, {channels}, {height}, {width}].")
    if len(images) == 0:
        raise ImagesError("There are no images: pass at least one, 50 to 1000 is usual.")
    if images.dtype != parameter.dtype:
        raise ImagesError(
            f"{name} are {images.dtype}: expected {parameter.dtype}, normalised as the model wants it "
            "(timm.data.create_transform(**timm.data.resolve_model_data_config(model)))."
        )
    if shape[1] != channels:
        raise ImagesError(f"{name} have {shape[1]} channels (shape {shape}): the model takes {channels}.")
    if shape[2:] != [height, width]:
        raise ImagesError(
            f"{name} are {shape[2]}x{shape[3]}: the model takes {height}x{width}. Resize them, or "
            + (
                "call model.set_input_size(img_size=...)."
                if hasattr(model, "set_input_size")
                else "set model.pretrained_cfg['input_size']."
            )
        )
    bad = [first + i for i, image in enumerate(images) if not torch.isfinite(image).all()]
    if bad:
        raise ImagesError(f"{name} {bad[:5]} have NaN or infinite pixels: remove or repair them.")
