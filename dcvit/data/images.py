"""The few-shot set: the caller's images as one checked tensor.

Labels are never read. On the CPU a large set is kept on disk (`dcvit.runtime.spill`), unless the caller passes a
tensor.
"""

import hashlib
import math
import os
import warnings
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import length_hint
from pathlib import Path
from typing import Any, overload

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from dcvit.errors import ImagesError, ImagesWarning, NonFiniteError, UnsupportedModelError
from dcvit.models import compressible, preprocessing
from dcvit.models.loading import Preprocessing, is_deep
from dcvit.runtime.files import open_regular
from dcvit.runtime.progress import Progress, silent
from dcvit.runtime.spill import SpilledBuffer

__all__ = [
    "FINITE_IMAGES",
    "IMAGE_KEYS",
    "IMAGE_SUFFIXES",
    "MOST_UNCOUNTED",
    "FewShotImages",
    "Images",
    "check_images",
    "first_images",
    "image_files",
    "is_hidden",
    "load_images",
    "named",
    "require_finite",
]

Images = Tensor | Dataset[Any] | DataLoader[Any] | Iterable[Any] | str | Path | Sequence[str | Path]
"""What `compress` accepts as images."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "GIF")
"""Formats that are read, by content, whatever the suffix. One of Pillow's other readers starts a program (EPS)."""

UNREAD_SUFFIXES = (
    ".gif", ".avif", ".heic", ".heif", ".jfif", ".jpe", ".jp2", ".j2k", ".jxl", ".tga", ".ico", ".psd", ".svg", ".pbm",
    ".pnm", ".exr", ".hdr", ".dcm", ".nii", ".npy", ".mha", ".nd2", ".czi", ".svs", ".raw", ".dng", ".cr2", ".nef",
    ".arw",
)  # fmt: skip
"""Suffixes of image files that are left out with a warning. Other files, such as texts, are left out without one."""

IMAGE_KEYS = ("pixel_values", "image", "images", "img")
"""Keys under which an item or batch that is a dict holds its images. The first key that exists is used."""

MOST_UNCOUNTED = 10_000
"""Number of images that are read at most from a source without a length, which may be endless."""

MOST_PIXELS = 1 << 27
"""Largest number of pixels of an image, also after it is resized and before it is cropped; 512 MiB."""

MOST_BYTES = 1 << 30
"""Largest size of an image file, in bytes."""

CONVERT = "convert them to 8 bits, for values below 4096 by Image.fromarray((array / 16).astype('uint8'))"

NEARLY_CONSTANT = 2 / 255
"""Standard deviation, for pixels from 0 to 1, below which a warning names an image."""

MICRO_BATCH_SIZE = 64
"""Number of images that are normalised and checked in one step."""

NAMED = 5
"""Number of files that one message names."""


@dataclass(frozen=True)
class FewShotImages:
    """The few-shot set D_T.

    Attributes:
        normalised: The images as the model takes them, `[N, C, H, W]`.
        pixels: The same images in [0, 1], each `[C, H', W']` at its own size, from which augmentation crops. Those of
            large files are shrunk, but even the smallest crop is no smaller than the model's input.
        mean: Per-channel mean that normalisation subtracts from pixels.
        std: Per-channel standard deviation by which normalisation divides them.
        files: The file of each image; `None` if the images do not come from files.
    """

    normalised: Tensor
    pixels: Sequence[Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    files: tuple[Path, ...] | None = None

    def __len__(self) -> int:
        return len(self.normalised)

    def to(self, device: str | torch.device) -> "FewShotImages":
        """Return the images on another device."""
        normalised = self.normalised.to(device)
        if isinstance(self.pixels, _Pixels):
            return replace(self, normalised=normalised, pixels=self.pixels.of(normalised))
        return replace(self, normalised=normalised, pixels=[picture.to(device) for picture in self.pixels])

    def subset(self, indices: Sequence[int]) -> "FewShotImages":
        """Return some of the images."""
        files = None if self.files is None else tuple(self.files[i] for i in indices)
        normalised = self.normalised[list(indices)]
        if isinstance(self.pixels, _Pixels):
            return replace(self, normalised=normalised, pixels=self.pixels.of(normalised, indices), files=files)
        return replace(self, normalised=normalised, pixels=[self.pixels[i] for i in indices], files=files)


def load_images(images: Images | FewShotImages, model: nn.Module, progress: Progress = silent) -> FewShotImages:
    """Collect and check the few-shot images for a model.

    Args:
        images: A normalised tensor `[N, C, H, W]`; a `Dataset`, `DataLoader` or other iterable; a folder, see
            `image_files`; or a list of files. An iterable gives normalised tensors `[C, H, W]` or PIL images: by
            themselves, as the first element of a tuple, or under one of `IMAGE_KEYS` of a dict. PIL images and files
            get timm's evaluation preprocessing for the model. Grey images of 16 or 32 bits are first scaled by the
            range of the whole set, with a warning that names it. Other warnings name files that are left out, copies,
            images of nearly one colour, and tensors that look like pixels.
        model: The model that will see the images.
        progress: Called with the number of images read, as the stage `"images"`, but not for a tensor. For a source
            without a length the total is `MOST_UNCOUNTED`.

    Returns:
        The images on the model's device.

    Raises:
        ImagesError: If there are no images; if any has a wrong size, channels, dtype or device, or NaN or infinite
            pixels; if all are equal; if fewer than half of the files can be read; if only some have more than 8 bits;
            or if a source without a length gives more than `MOST_UNCOUNTED`.
    """
    if isinstance(images, FewShotImages):
        check_images(images.normalised, model)
        return images
    prep, parameter = preprocessing(model), next(model.parameters())
    if isinstance(images, Tensor):
        check_images(images, model)
        images = images.detach()
        return _few_shot(
            images, _Pictures(), prep, [look for part in images.split(MICRO_BATCH_SIZE) for look in _Looks.of(part)]
        )
    if isinstance(images, str | Path):
        images = image_files(Path(images))
    read: list[Path] | None = None
    if isinstance(images, list | tuple) and images and all(isinstance(item, str | Path) for item in images):
        read = []
        items: Iterator[Any] = _readable([Path(item) for item in images], prep, read)
    else:
        items = _prepared(_images_of(images), prep)

    normalised, at_own_size = SpilledBuffer(), _Pictures()
    looks: list[_Looks] = []
    for batch in _batches(_in_8_bits(_counted(items, images, progress), prep), at_own_size, prep, parameter):
        check_images(batch, model, first=len(looks))
        looks += _Looks.of(batch)
        normalised.append(batch)
    if not len(normalised):
        raise ImagesError("There are no images: pass at least one, 50 to 1000 is usual.")
    return _few_shot(normalised.whole(), at_own_size, prep, looks, None if read is None else tuple(read))


def _batches(items: Iterable[Any], at_own_size: "_Pictures", prep: Preprocessing, like: Tensor) -> Iterator[Tensor]:
    """Yield the images in order, normalised `[B, C, H, W]`: pictures in batches, tensors one by one.

    Args:
        items: Pictures of 8 bits, and tensors.
        at_own_size: The pictures are added to it.
        prep: The model's preprocessing.
        like: A tensor whose device all images get, and whose dtype the pictures get.
    """
    levels: list[Tensor] = []

    def prepared() -> Tensor:
        batch = prep.normalised(torch.stack(levels).float() / 255)
        levels.clear()
        return batch.to(like.device, like.dtype)

    for number, item in enumerate(items):
        if isinstance(item, Image.Image):
            at_own_size.append(number, pil_to_tensor(prep.shrink(item)))
            levels.append(prep.crop(item))
        if levels and (isinstance(item, Tensor) or len(levels) == MICRO_BATCH_SIZE):
            yield prepared()
        if isinstance(item, Tensor):
            yield item[None].to(like.device)
    if levels:
        yield prepared()


def _few_shot(
    normalised: Tensor,
    at_own_size: "_Pictures",
    prep: Preprocessing,
    looks: Sequence["_Looks"],
    files: tuple[Path, ...] | None = None,
) -> FewShotImages:
    if not at_own_size:
        _warn_of_pixels(normalised[:8], prep)
    mean, std = (prep.mean, prep.std) if at_own_size else _normalisation(normalised, prep)
    _check_looks(looks, std, files)
    return FewShotImages(normalised, _Pixels(normalised, at_own_size, mean, std), mean, std, files)


def _counted(items: Iterator[Any], source: Any, progress: Progress) -> Iterator[Any]:
    """Yield the same items, report the progress of each, and limit a source without a length."""
    known = length_hint(source.dataset if isinstance(source, DataLoader) else source)
    done, limit = 0, max(known, MOST_UNCOUNTED)
    progress("images", done, known or limit, None)
    for item in items:
        if done == limit:
            raise ImagesError(
                f"The images do not end: {limit:,} were read. Pass a part of them, "
                "list(itertools.islice(images, 1000)); 50 to 1000 is usual."
            )
        done += 1
        progress("images", done, max(known or limit, done + 1), None)
        yield item
    progress("images", done, done, None)


def _in_8_bits(items: Iterable[Any], prep: Preprocessing) -> Iterator[Any]:
    """Yield the same images with 8 bits. Deeper ones come after all are read, scaled by the range of the whole set."""
    deep, low, high = _Pictures(), math.inf, -math.inf
    for number, item in enumerate(items):
        if isinstance(item, Image.Image) and is_deep(item):
            values = pil_to_tensor(item)
            low, high = min(low, float(values.amin())), max(high, float(values.amax()))
            deep.append(number, pil_to_tensor(prep.shrink(item)))
        else:
            yield item
        if len(deep) not in (0, number + 1):
            raise ImagesError(
                f"{len(deep)} of the first {number + 1} images have 16 or 32 bits per pixel and the others 8: no range "
                f"fits both; {CONVERT}, or leave them out."
            )
    if not deep:
        return
    warnings.warn(
        f"The {len(deep)} images have 16 or 32 bits per pixel. They are scaled by the range of all of them, from "
        f"{low:g} (black) to {high:g} (white). For another range: {CONVERT}.",
        ImagesWarning,
        stacklevel=3,
    )
    scale = 255 / (high - low) if high > low else 0.0
    for number in range(len(deep)):
        levels = ((deep[number].double() - low) * scale).round().clamp(0, 255)  # shrinking may overshoot the range
        yield prep.convert(to_pil_image(levels.to(torch.uint8)))


ROUNDING = 1e-2
"""Distance from [0, 1] at which pixels still count as inside: interpolation and half precision overshoot by as much."""


def _normalisation(normalised: Tensor, prep: Preprocessing) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation that make these images of pixels in [0, 1]: the model's if they do.

    A caller may have normalised in another way, as is usual for microscopy or CT. Views must not be clipped then, so
    the range that stands for [0, 1] is taken from the images, channel by channel.
    """
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (prep.mean, prep.std))
    ends = torch.stack([torch.stack([x.amin((0, 2, 3)), x.amax((0, 2, 3))]) for x in normalised.split(64)])
    low, high = ends[:, 0].amin(0).double().cpu(), ends[:, 1].amax(0).double().cpu()
    if bool((low * std + mean >= -ROUNDING).all() and (high * std + mean <= 1 + ROUNDING).all()):
        return prep.mean, prep.std
    span = (high - low).clamp_min(1e-6)
    return tuple((-low / span).tolist()), tuple((1 / span).tolist())


def _warn_of_pixels(images: Tensor, prep: Preprocessing) -> None:
    """Warn if images look like unnormalised pixels, which have 256 levels."""
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


@dataclass(frozen=True)
class _Looks:
    """What shows whether an image is a copy of another one, or of nearly one colour.

    Attributes:
        digest: The digest of its values.
        spread: Their standard deviation, per channel.
    """

    digest: bytes
    spread: Tensor

    @classmethod
    def of(cls, images: Tensor) -> list["_Looks"]:
        """Return the looks of normalised images `[B, C, H, W]`."""
        contents = images.detach().cpu().contiguous().flatten(1).view(torch.uint8).numpy()
        values = images.detach().flatten(2).float()
        spreads = (values - values.mean(2, keepdim=True)).square().mean(2).sqrt()  # ten times as fast as `std`
        return [
            cls(hashlib.sha1(content.data, usedforsecurity=False).digest(), spread)
            for content, spread in zip(contents, spreads, strict=True)
        ]


def _check_looks(looks: Sequence[_Looks], std: tuple[float, ...], files: Sequence[Path] | None) -> None:
    """Refuse images that are all equal, and warn of copies and of images of nearly one colour."""

    def name(number: int) -> str:
        return f"image {number}" if files is None else repr(str(files[number]))

    first: dict[bytes, int] = {}
    originals = [first.setdefault(look.digest, number) for number, look in enumerate(looks)]
    if len(looks) > 1 and len(first) == 1:
        raise ImagesError(
            f"All {len(looks)} images are the same, pixel by pixel: expected different ones. Look at what prepares "
            "them; values beyond what it expects, for example, all become white."
        )
    problems = []
    copies = [f"{name(i)} (of {name(original)})" for i, original in enumerate(originals) if i != original]
    if copies:
        problems.append(
            f"{len(copies)} of {len(looks)} images are copies of others: {named(copies)}. Block reconstruction "
            "validates on some of the images, and errors are estimated too low where it has learnt from a copy: remove "
            "the copies"
        )
    spread = (torch.stack([look.spread for look in looks]).cpu() * torch.tensor(std, dtype=torch.float32)).amax(1)
    constant = [name(i) for i in (spread < NEARLY_CONSTANT).nonzero().flatten().tolist()]
    if constant:
        problems.append(
            f"{len(constant)} of {len(looks)} images are of one colour, or nearly: {named(constant)}. There is nothing "
            "to learn from them: check what prepares them, or remove them"
        )
    if problems:
        warnings.warn(". ".join(problems) + ".", ImagesWarning, stacklevel=4)


def named(names: Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


class _Pictures:
    """Pictures `[C, H, W]` of different sizes and one dtype, by number."""

    def __init__(self) -> None:
        self._values = SpilledBuffer()
        self._offsets: dict[int, tuple[int, torch.Size]] = {}

    def __len__(self) -> int:
        return len(self._offsets)

    def __contains__(self, number: int) -> bool:
        return number in self._offsets

    def append(self, number: int, picture: Tensor) -> None:
        self._offsets[number] = len(self._values), picture.shape
        self._values.append(picture.flatten())

    def __getitem__(self, number: int) -> Tensor:
        first, shape = self._offsets[number]
        return self._values[first : first + shape.numel()].view(shape)


class _Pixels(Sequence[Tensor]):
    """The images in [0, 1], computed on access from the content of their files or from the normalised images."""

    def __init__(
        self,
        normalised: Tensor,
        at_own_size: _Pictures,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        numbers: Sequence[int] | None = None,
    ) -> None:
        self._normalised, self._at_own_size = normalised, at_own_size
        self._numbers = range(len(normalised)) if numbers is None else numbers  # of the images in `at_own_size`
        self._normalisation = mean, std
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32).view(-1, 1, 1).to(normalised.device) for values in (mean, std)
        )

    def of(self, normalised: Tensor, indices: Sequence[int] | None = None) -> "_Pixels":
        """Return the same images on another device, or some of them."""
        numbers = self._numbers if indices is None else [self._numbers[i] for i in indices]
        return _Pixels(normalised, self._at_own_size, *self._normalisation, numbers)

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
        own = self._numbers[number]
        if own in self._at_own_size:
            return self._at_own_size[own].to(self._normalised.device).float() / 255
        return (self._normalised[number] * self._std + self._mean).clamp(0, 1)


def image_files(folder: Path) -> list[Path]:
    """Return the image files of a folder and its subfolders, sorted by path.

    Links to folders are followed, and each folder is read once. Names that begin with `.` or `@` are left out, such as
    folders of thumbnails and checkpoints. A warning names what is left out.

    Raises:
        ImagesError: If the folder does not exist or holds no image files.
    """
    if not os.path.isdir(folder):
        raise ImagesError(f"{str(folder)!r} is not a folder: expected one with image files.")
    files: list[Path] = []
    left_out: defaultdict[str, list[str]] = defaultdict(list)
    folders, links, seen = [folder], deque[Path](), set[tuple[int, int]]()
    while folders or links:
        current = folders.pop() if folders else links.popleft()
        try:
            found = os.stat(current)
            entries = sorted(os.scandir(current), key=lambda entry: entry.name)
        except OSError as error:
            left_out[f"cannot be opened ({error.strerror})"].append(str(current))
            continue
        if (found.st_dev, found.st_ino) in seen:
            left_out["lead to a folder that is read already"].append(str(current))
            continue
        seen.add((found.st_dev, found.st_ino))
        for entry in entries:
            path, is_link = Path(entry.path), entry.is_symlink()
            is_folder = os.path.isdir(path) if is_link else entry.is_dir()
            suffix = path.suffix.lower()
            if is_hidden(entry.name):
                if is_folder or suffix in IMAGE_SUFFIXES:
                    left_out["have names that begin with '.' or '@'"].append(entry.path)
            elif is_folder:
                (links if is_link else folders).append(path)
            elif suffix in IMAGE_SUFFIXES:
                files.append(path)
            elif suffix in UNREAD_SUFFIXES:
                left_out["are of a format that is not read; convert them to PNG or JPEG"].append(entry.path)
            elif is_link and not os.path.exists(path):
                left_out["are links that lead nowhere"].append(entry.path)
    reasons = "; ".join(f"{named([repr(path) for path in paths])} {why}" for why, paths in left_out.items())
    if not files:
        raise ImagesError(
            f"The folder {str(folder)!r} holds no image files ({', '.join(IMAGE_SUFFIXES)}): put some there, or "
            "name another folder." + (f" Left out: {reasons}." if reasons else "")
        )
    if reasons:
        warnings.warn(f"Left out of the folder {str(folder)!r}: {reasons}.", ImagesWarning, stacklevel=2)
    return sorted(files)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of that name is left out: thumbnails (`@eaDir`), `.ipynb_checkpoints`, ..."""
    return name.startswith((".", "@"))


def _readable(files: Sequence[Path], prep: Preprocessing, read: list[Path]) -> Iterator[Image.Image]:
    """Yield the images of files one by one. At the end, warn of unreadable files, or refuse if they are most.

    Args:
        files: The files.
        prep: The model's preprocessing.
        read: The files that could be read are added to it.
    """
    broken: list[str] = []
    stacked: list[str] = []
    for path in files:
        try:
            target = os.path.realpath(path) if path.is_symlink() else path
            with open_regular(target, most=MOST_BYTES) as file, Image.open(file, formats=FORMATS) as opened:
                several = opened.format != "MPO" and getattr(opened, "n_frames", 1) > 1  # MPO: a camera's JPEG
                image = _picture(opened, prep)
        except UnsupportedModelError:
            raise
        except Exception as error:  # Pillow's readers raise errors of many kinds
            broken.append(f"{str(path)!r} ({_reason(error)})")
            continue
        if several:
            stacked.append(repr(str(path)))
        read.append(path)
        yield image
    problem = f"{len(broken)} of {len(files)} files cannot be read as images: {named(broken)}"
    if 2 * len(broken) > len(files):
        raise ImagesError(f"{problem}: remove or replace them.")
    if broken:
        warnings.warn(f"{problem}. They are left out.", ImagesWarning, stacklevel=3)
    if stacked:
        warnings.warn(
            f"{len(stacked)} of {len(files)} files hold several images, and only the first of each is read: "
            f"{named(stacked)}. To use the others, save them as separate files.",
            ImagesWarning,
            stacklevel=3,
        )


def _prepared(items: Iterable[Any], prep: Preprocessing) -> Iterator[Tensor | Image.Image]:
    """Yield the images of a caller's source: tensors unchanged, and pictures as `_picture` returns them."""
    for number, item in enumerate(items):
        if isinstance(item, Tensor):
            _require_dense(item, f"Image {number}")
            yield item
        elif isinstance(item, Image.Image):
            try:
                image = _picture(item, prep)
            except UnsupportedModelError:
                raise
            except Exception as error:  # Pillow reads a file only now
                raise ImagesError(f"Image {number} cannot be used: {_reason(error)}.") from error
            yield image
        else:
            hint = ". Convert arrays with PIL.Image.fromarray(array)" if hasattr(item, "__array__") else ""
            raise ImagesError(f"An image is a {type(item).__name__}; expected a tensor [C, H, W] or a PIL image{hint}.")


def _picture(image: Image.Image, prep: Preprocessing) -> Image.Image:
    """Return an image in memory and in the model's channels; one of more than 8 bits is in Pillow's mode F.

    Raises:
        ImagesError: If it is empty; if it is too large, before or after it is resized for the model; or if it has NaN
            or infinite pixels.
    """
    width, height = image.size
    if not width or not height:
        raise ImagesError(f"it is {width} x {height} pixels")
    growth = max(1.0, prep.resized[0] / height, prep.resized[1] / width)
    if width * height * growth**2 > MOST_PIXELS:
        raise ImagesError(
            f"it is {width:,} x {height:,} pixels, and {width * growth:,.0f} x {height * growth:,.0f} once its shorter "
            f"side fits the model, more than {MOST_PIXELS:,} in all; crop it or scale it down"
        )
    image.load()
    if not is_deep(image):
        return prep.convert(image)
    image = image.convert("F")
    if not pil_to_tensor(image).isfinite().all():
        raise ImagesError("it has NaN or infinite pixels")
    return image


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"its content is none of {', '.join(FORMATS)}, or not as Pillow reads it"
    return " ".join(str(error).split()) or type(error).__name__


def _images_of(source: Any) -> Iterator[Any]:
    """Yield the images of a `Dataset`, a `DataLoader` or another iterable, one by one.

    Raises:
        ImagesError: If the source is none of these, or has fewer items than its length.
    """
    try:
        yield from _read(source)
    except IndexError as error:
        raise ImagesError(
            f"The {type(source).__name__} has fewer items than its length says ({_reason(error)}): let __len__ count "
            "those that __getitem__ gives."
        ) from error


def _read(source: Any) -> Iterator[Any]:
    """Yield the images of a source, see `_images_of`."""
    if isinstance(source, Mapping):
        yield from _of_batch(source)
        return
    if isinstance(source, DataLoader):
        collates = source.batch_sampler is not None
        for batch in source:
            if collates:
                yield from _of_batch(batch)
            else:
                yield from _of_item(tuple(batch) if isinstance(batch, list) else batch)  # torch made it from a tuple
        return
    if hasattr(source, "__iter__") or (hasattr(source, "__getitem__") and not hasattr(source, "__len__")):
        items = iter(source)  # without `__iter__`, Python counts up to an IndexError
    elif hasattr(source, "__getitem__"):
        items = (source[i] for i in range(len(source)))
    else:
        raise ImagesError(
            f"images is a {type(source).__name__}; expected a tensor [N, C, H, W], a Dataset, a DataLoader or a folder."
        )
    for item in items:
        yield from _of_item(item)


def _of_item(item: Any) -> Iterable[Any]:
    """Return the images of a data set's item, which is an image, a batch or a list of images."""
    if isinstance(item, list) and item and all(map(_is_image, item)):
        return item
    image = _image_of(item)
    return list(image) if _is_batch(image) else [image]


def _of_batch(batch: Any) -> Iterable[Any]:
    """Return the images that a `DataLoader` collates: a batch, one with labels, a dict of them, or a list of items."""
    first = _image_of(batch)
    if isinstance(batch, Mapping):
        return list(first) if _is_batch(first) or isinstance(first, list | tuple) else [first]
    if _is_batch(first):
        return list(first)
    images = isinstance(first, tuple | list) and len(first) > 0 and all(map(_is_image, first))
    if images and (len(first) > 1 or not all(_is_image(_image_of(item)) for item in batch)):  # else a list of 1-tuples
        return list(first)
    return map(_image_of, batch)


def _image_of(item: Any) -> Any:
    """Return the image of an item: the item itself, the first element of a tuple, or a value under `IMAGE_KEYS`."""
    if isinstance(item, Mapping):
        found = next((key for key in IMAGE_KEYS if key in item), None)
        if found is None:
            raise ImagesError(
                f"An item is a dict with the keys {named([repr(key) for key in item])}: expected the image under one "
                f"of {', '.join(map(repr, IMAGE_KEYS))}. Rename the key, or pass only the images."
            )
        return item[found]
    if isinstance(item, tuple | list) and len(item) > 0:
        return _image_of(item[0]) if isinstance(item[0], Mapping) else item[0]
    return item


def _is_batch(images: Any) -> bool:
    return isinstance(images, Tensor) and images.ndim == 4


def _is_image(item: Any) -> bool:
    return item.ndim == 3 if isinstance(item, Tensor) else isinstance(item, Image.Image)


def _require_dense(images: Tensor, name: str) -> None:
    """Refuse sparse and nested tensors, which lack operations of torch that images need."""
    if images.is_nested or images.layout != torch.strided:
        kind = "a nested tensor" if images.is_nested else f"a tensor of layout {images.layout}"
        raise ImagesError(f"{name}: {kind}, expected a dense one. Call its to_dense(), or stack its parts.")


def check_images(images: Tensor, model: nn.Module, name: str = "The images", first: int = 0) -> None:
    """Refuse images that do not fit a model.

    Args:
        images: `[N, C, H, W]`.
        model: The model.
        name: What errors call the images.
        first: The number of the first image among all.

    Raises:
        ImagesError: If there are none, if their size, channels, dtype or device do not fit, or if pixels are NaN or
            infinite.
    """
    _require_dense(images, name)
    view = compressible(model)
    channels, height, width = view.input_size()
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
        raise ImagesError(
            f"{name} have {shape[1]} channels (shape {shape}): the model takes {channels}. Convert them, or "
            f"create the model with in_chans={shape[1]}."
        )
    if shape[2:] != [height, width]:
        raise ImagesError(
            f"{name} are {shape[2]}x{shape[3]}: the model takes {height}x{width}. Resize them, or "
            + (
                "call model.set_input_size(img_size=...)."
                if hasattr(model, "set_input_size")
                else "set model.pretrained_cfg['input_size']."
            )
        )
    finite = torch.cat([part.isfinite().flatten(1).all(1) for part in images.split(MICRO_BATCH_SIZE)])
    bad = [first + i for i in (~finite).nonzero().flatten().tolist()]
    if bad:
        raise ImagesError(f"{name} {bad[:5]} have NaN or infinite pixels: remove or repair them.")


FINITE_IMAGES = 8
"""Number of images that are passed through a model to check that its outputs are finite, and those of its modules."""


def first_images(images: FewShotImages) -> Tensor:
    """Return the images that a model is checked on."""
    return images.normalised[:FINITE_IMAGES]


@torch.no_grad()
def require_finite(model: nn.Module, images: FewShotImages) -> None:
    """Refuse a model whose weights are NaN or infinite, or that makes such values of images.

    Raises:
        NonFiniteError: If there are such values. The error names the weight, or the first block that outputs them.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            raise NonFiniteError(
                f"{bad:,} of {tensor.numel():,} values of {name} are NaN or infinite: load the model's weights again."
            )
    view = compressible(model)
    state, where = view.embed(first_images(images)), "the part before block 0"
    for block in range(view.num_blocks()):
        if not bool(state.isfinite().all()):
            break
        state, where = view.run_blocks(state, block, block + 1), f"block {block}"
    if not bool(state.isfinite().all()):
        raise NonFiniteError(
            f"On the first {min(len(images), FINITE_IMAGES)} images {where} outputs NaN or infinite values: "
            "check how images are normalised, and that the weights are not of a lower precision."
        )
