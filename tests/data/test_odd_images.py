"""Images as people have them, and as strangers make them: other bit depths, sources, folders, and files that attack."""

import hashlib
import io
import os
import re
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import dcvit
from dcvit import load_images
from dcvit.cli import main
from dcvit.cli.inputs import load_data
from dcvit.compression.compress import checked_images
from dcvit.data import images as images_module
from dcvit.data.images import image_files
from dcvit.demo import load_digits
from dcvit.errors import ImagesError, ImagesWarning
from dcvit.models import load_model, preprocessing


def noise(number: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, shape or (40, 50, 3), dtype=np.uint8)


def picture(number: int) -> Image.Image:
    return Image.fromarray(noise(number))


def save_pictures(folder: Path, *names: str) -> None:
    """Pictures that differ, under these names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(int(hashlib.sha1(name.encode()).hexdigest()[:8], 16)).save(folder / name, format="PNG")


# More than 8 bits.


def deep_digits(count: int) -> tuple[list[np.ndarray], Tensor]:
    """Digits with values from 1000 to 1192, as a 16-bit camera gives them, and as 8 bits have them."""
    digits = load_digits()
    levels = ((digits.test_images[:count, 0] * dcvit.demo.digits.STD + dcvit.demo.digits.MEAN) * 16).round()
    return [array.astype(np.uint16) for array in (levels * 12 + 1000).numpy()], digits.test_labels[:count]


@pytest.mark.parametrize(
    ("dtype", "suffix", "mode"),
    [("<u2", "png", "I;16"), (">u2", "tif", "I;16B"), ("i4", "tif", "I"), ("f4", "tif", "F")],
)
def test_images_of_more_than_8_bits_are_scaled_by_the_range_of_the_set(
    dtype: str, suffix: str, mode: str, tmp_path: Path
) -> None:
    demo = load_model("demo")
    arrays, labels = deep_digits(50)
    low, high = min(a.min() for a in arrays), max(a.max() for a in arrays)
    for number, array in enumerate(arrays):
        Image.fromarray(array.astype(dtype)).save(tmp_path / f"{number:02d}.{suffix}")
    with Image.open(tmp_path / f"00.{suffix}") as image:
        assert image.mode == mode
    with pytest.warns(ImagesWarning, match=f"50 images have 16 or 32 bits .* from {low} .black. to {high} .white."):
        few_shot = load_images(tmp_path, demo)
    expected = torch.from_numpy(np.stack(arrays).astype(np.float64) - low) / (high - low)
    pixels = torch.stack(list(few_shot.pixels))[:, 0]
    torch.testing.assert_close(pixels.double(), expected, rtol=0, atol=0.51 / 255)  # of rounding to 8 bits
    assert float((demo(few_shot.normalised).argmax(-1) == labels).double().mean()) > 0.9


def test_a_data_set_of_deep_pictures_is_scaled_alike(tmp_path: Path) -> None:
    demo = load_model("demo")
    arrays, _ = deep_digits(8)
    for number, array in enumerate(arrays):
        Image.fromarray(array).save(tmp_path / f"{number}.png")
    pictures = [Image.fromarray(array) for array in arrays]
    sources: list[Any] = [tmp_path, pictures, DataLoader(pictures, collate_fn=list), iter(pictures)]  # type: ignore[arg-type]
    loaded = []
    for source in sources:
        with pytest.warns(ImagesWarning, match="8 images have 16 or 32 bits"):
            loaded.append(load_images(source, demo).normalised)
    assert all(torch.equal(other, loaded[0]) for other in loaded)


def test_deep_and_ordinary_pictures_together_are_refused(model: nn.Module) -> None:
    deep = Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40))
    for pictures in ([deep, picture(1)], [picture(1), picture(2), deep]):
        with pytest.raises(
            ImagesError, match=r"1 of the first [23] images have 16 or 32 bits .*; convert them to 8 bits"
        ):
            load_images(pictures, model)


def test_a_deep_picture_with_nan_is_left_out(model: nn.Module, tmp_path: Path) -> None:
    for number in range(4):
        values = noise(number, 40, 40).astype(np.float32)
        values[0, 0] = float("nan") if number == 2 else 0
        Image.fromarray(values).save(tmp_path / f"{number}.tif")
    with pytest.warns(ImagesWarning) as told:
        few_shot = load_images(tmp_path, model)
    assert "2.tif' (it has NaN or infinite pixels). They are left out" in str(told[0].message) + str(told[1].message)
    assert len(few_shot) == 3


def test_the_transform_never_saturates(model: nn.Module) -> None:
    with pytest.raises(ImagesError, match="mode 'I;16', more than 8 bits"):
        preprocessing(model).transform(Image.fromarray(np.full((8, 8), 1000, dtype=np.uint16)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_other_modes_of_8_bits_are_taken(mode: str, model: nn.Module) -> None:
    grey = Image.fromarray(noise(1, 40, 40))
    given = grey.convert(mode)
    if mode == "P":
        given.info["transparency"] = bytes(range(256))  # of which Pillow warns
    found = load_images([given], model).pixels[0]
    if mode == "1":
        assert set(found.unique().tolist()) == {0.0, 1.0}
    else:
        assert float((found.mean(0) - torch.from_numpy(np.array(grey)) / 255).abs().mean()) < 0.02


def test_a_mode_that_pillow_cannot_convert_is_refused(model: nn.Module) -> None:
    with pytest.raises(ImagesError, match="Image 0 cannot be used: conversion from La"):
        load_images([picture(0).convert("LA").convert("La")], model)


def test_16_bit_colours_keep_their_upper_8_bits(model: nn.Module, tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    values = noise(1, 40, 40, 3)
    tifffile.imwrite(tmp_path / "a.tif", values.astype(np.uint16) * 256 + 77, photometric="rgb")
    found = load_images(tmp_path, model).pixels[0]
    assert torch.equal(found, torch.from_numpy(values).permute(2, 0, 1) / 255)


def test_files_of_several_pictures_are_reported(model: nn.Module, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "stack.tif", save_all=True, append_images=[picture(1), picture(2)])
    with pytest.warns(ImagesWarning, match=r"1 of 1 files hold several images, and only the first .*stack\.tif"):
        few_shot = load_images(tmp_path, model)
    assert torch.equal(few_shot.normalised[0], preprocessing(model).transform(picture(0)))


# Images with nothing in them, and copies.


def test_images_that_are_all_alike_are_refused(model: nn.Module, tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        picture(0).save(tmp_path / name)
    for source in (tmp_path, torch.randn(1, 3, 32, 32).expand(3, -1, -1, -1), [picture(0)] * 2):
        with pytest.raises(ImagesError, match=r"All [23] images are the same, pixel by pixel"):
            load_images(source, model)
    assert len(load_images([picture(0)], model)) == 1


def test_copies_are_reported(model: nn.Module, tmp_path: Path) -> None:
    for number in range(9):
        picture(number % 4).save(tmp_path / f"{number}.png")
    with pytest.warns(ImagesWarning, match=r"5 of 9 images are copies of others: '.*4\.png' \(of '.*0\.png'\), .*"):
        load_images(tmp_path, model)
    images = torch.randn(5, 3, 32, 32)
    images[3] = images[1]
    with pytest.warns(ImagesWarning, match=r"1 of 5 images are copies of others: image 3 \(of image 1\)\."):
        load_images(images, model)


def test_images_of_nearly_one_colour_are_reported(model: nn.Module, tmp_path: Path) -> None:
    save_pictures(tmp_path, "a.png", "b.png")
    nearly = np.full((40, 50, 3), 200, dtype=np.uint8) + noise(1) % 3
    Image.fromarray(nearly).save(tmp_path / "grey.jpg")
    with pytest.warns(ImagesWarning, match=r"1 of 3 images are of one colour, or nearly: '.*grey\.jpg'"):
        load_images(tmp_path, model)
    images = torch.randn(4, 3, 32, 32) * 40 + 500  # normalised in a way of one's own
    images[2] = 510
    with pytest.warns(ImagesWarning, match="1 of 4 images are of one colour, or nearly: image 2"):
        load_images(images, model)


# Sources.


class Stream(IterableDataset[Any]):
    """Items one after another; it may say how many."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


class CountedStream(Stream):
    def __len__(self) -> int:
        return len(self.items)


class Uncounted(Dataset[Any]):
    """A map-style data set without a length."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class Listed(Uncounted):
    def __len__(self) -> int:
        return len(self.items)


def test_data_sets_of_every_kind_are_read(model: nn.Module, images: Tensor) -> None:
    pairs = list(zip(images, range(len(images)), strict=True))
    tables = [{"label": i, "image": image} for i, image in enumerate(images)]
    values = [{"pixel_values": image, "labels": i} for i, image in enumerate(images)]
    sources: dict[str, Any] = {
        "stream with a length": CountedStream(pairs),
        "stream": Stream(images),
        "map-style without a length": Uncounted(pairs),
        "generator": (image for image in images),
        "items that are tables": Listed(tables),
        "tables of pixel values": Stream(values),
        "tables in tuples": [(table, 1) for table in tables],
        "batches": Stream(images.split(4)),
        "loader without batches": DataLoader(Listed(pairs), batch_size=None),
        "loader of a stream without batches": DataLoader(CountedStream(pairs), batch_size=None),
        "loader of ready batches": DataLoader(Stream(list(images.split(4))), batch_size=None),
        "loader with a batch sampler": DataLoader(Listed(pairs), batch_sampler=[[0, 1, 2], [3, 4, 5]]),
        "loader of a stream": DataLoader(CountedStream(pairs), batch_size=4),
        "batches that are tables": DataLoader(Listed(tables), batch_size=4),
        "batches of pixel values": DataLoader(Listed(values), batch_size=4),
        "tables with labels": DataLoader(Listed([(table, 1) for table in tables]), batch_size=4),
        "lists of tables": DataLoader(Listed(tables), batch_size=4, collate_fn=list),
        "tables of lists": DataLoader(
            Listed(tables), batch_size=4, collate_fn=lambda items: {"image": [item["image"] for item in items]}
        ),
    }
    for name, source in sources.items():
        assert torch.equal(load_images(source, model).normalised, images), name


def test_pictures_in_tables_are_read(model: nn.Module) -> None:
    expected = load_images([picture(0), picture(1)], model).normalised
    tables = [{"img": picture(number), "label": 0} for number in range(2)]
    for source in (tables, Stream(tables), DataLoader(Listed(tables), batch_size=None)):
        assert torch.equal(load_images(source, model).normalised, expected)


def test_the_error_for_a_table_without_an_image_lists_its_keys(model: nn.Module) -> None:
    tables = [{"photo": torch.randn(3, 32, 32), "label": 1}]
    for source in (tables, DataLoader(Listed(tables))):
        with pytest.raises(ImagesError, match=r"keys 'photo', 'label': expected .* 'pixel_values', 'image'"):
            load_images(source, model)


def test_a_picture_that_cannot_be_read_is_named(model: nn.Module) -> None:
    content = io.BytesIO()
    picture(0).save(content, "PNG")
    cut = Image.open(io.BytesIO(content.getvalue()[:3000]))
    with pytest.raises(ImagesError, match=r"Image 1 cannot be used: .*truncated"):
        load_images([picture(1), cut], model)


def test_the_number_of_images_read_is_reported(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    save_pictures(tmp_path, "a.png", "b.png")
    for source, total in ((Listed(images), 6), (Stream(images), images_module.MOST_UNCOUNTED), (tmp_path, 2)):
        told: list[tuple[str, int, int, float | None]] = []
        load_images(source, model, progress=lambda *step, told=told: told.append(step))
        count = 2 if source is tmp_path else 6
        assert [done for _, done, _, _ in told] == [*range(count + 1), count]
        assert told[0] == ("images", 0, total, None)
        assert told[-1] == ("images", count, count, None)
        assert all(done < of for _, done, of, _ in told[:-1])  # a stage ends once


def test_a_compression_tells_how_many_are_read(model: nn.Module, images: Tensor) -> None:
    told = []
    checked_images(Stream(images), None, model, lambda stage, done, total, loss: told.append((stage, done)))
    assert told[-1] == ("images", 6)


def test_a_source_without_end_ends_in_a_sentence(
    model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless() -> Iterator[Tensor]:
        while True:
            yield from images

    class Generated(Uncounted):
        def __getitem__(self, index: int) -> Tensor:
            return images[index % 6]

    monkeypatch.setattr(images_module, "MOST_UNCOUNTED", 20)
    for source in (
        endless(),
        Generated(None),
        DataLoader(Generated(None), batch_size=None, sampler=iter(range(10**9))),
    ):
        with pytest.raises(ImagesError, match=r"The images do not end: 20 were read\. Pass a part .*islice"):
            load_images(source, model)
    assert len(load_images(Listed(torch.randn(30, 3, 32, 32)), model)) == 30  # which says how many it has


def test_lists_of_images_lose_none(model: nn.Module, images: Tensor) -> None:
    collated = {
        "pairs": lambda items: ([image for image, _ in items], [label for _, label in items]),
        "tuples": lambda items: tuple(zip(*items, strict=True)),
        "images alone": lambda items: [image for image, _ in items],
        "items": lambda items: items,
        "items without labels": lambda items: [(image,) for image, _ in items],
    }
    pairs = [(image, i) for i, image in enumerate(images)]
    sources: dict[str, Any] = {
        "lists": [list(images[:2]), list(images[2:4]), list(images[4:])],
        "a list": [list(images)],
        "a stream of lists": Stream([[image] for image in images]),
        "a table": {"image": images, "label": list(range(6))},
        "a table of a list": {"image": list(images)},
        "pairs of pictures, of which the first counts": [(image, images[0]) for image in images],
        "loader of pairs without batches": DataLoader(
            Listed([(image, images[0]) for image in images]), batch_size=None
        ),
    } | {
        f"{name}, {size} at once": DataLoader(Listed(pairs), batch_size=size, collate_fn=collate)
        for name, collate in collated.items() for size in (1, 2, 4)
    }  # fmt: skip
    for name, source in sources.items():
        assert torch.equal(load_images(source, model).normalised, images), name


def test_the_error_for_a_table_of_something_else_lists_its_keys(model: nn.Module, images: Tensor) -> None:
    with pytest.raises(ImagesError, match=r"keys 'train', 'test': expected .* 'pixel_values', 'image'"):
        load_images({"train": images, "test": images}, model)


def test_tensors_that_are_not_dense_are_refused(model: nn.Module, images: Tensor) -> None:
    sources: list[Any] = [images.to_sparse(), list(images.to_sparse().unbind()), [images[0], images[1].to_sparse()]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        sources.append(torch.nested.nested_tensor(list(images)))
    for source in sources:
        with pytest.raises(ImagesError, match=r"(The images|Image [01]): a .*, expected a dense one\. Call its to_den"):
            load_images(source, model)


class TooShort(Uncounted):
    """A map-style data set that says it has more items than it has."""

    def __len__(self) -> int:
        return len(self.items) + 3


def test_a_data_set_shorter_than_it_says_is_a_sentence(model: nn.Module, images: Tensor) -> None:
    for source in (TooShort(list(images)), DataLoader(TooShort(list(images)), batch_size=4)):
        with pytest.raises(ImagesError, match=r"has fewer items than its length says \(.*\): let __len__ count"):
            load_images(source, model)


def test_pictures_and_tensors_keep_their_order(model: nn.Module, images: Tensor) -> None:
    prepared = preprocessing(model).transform
    mixed = [picture(0), images[0], *(picture(i) for i in range(1, 130)), images[1], images[2], picture(130)]
    found = load_images(mixed, model)
    for i, item in enumerate(mixed):
        assert torch.equal(found.normalised[i], item if isinstance(item, Tensor) else prepared(item)), i
        if isinstance(item, Image.Image):
            assert torch.equal(found.pixels[i], torch.from_numpy(np.array(item)).permute(2, 0, 1) / 255)


# Folders.


def test_links_are_followed_once_and_hidden_names_left_out(tmp_path: Path) -> None:
    save_pictures(tmp_path / "elsewhere", "far.png")
    data = tmp_path / "data"
    save_pictures(
        data, "a/1.png", "b/2.png", ".ipynb_checkpoints/1-checkpoint.png", "@eaDir/1.png", "a/.thumbs/1.png",
        "a/._1.png",
    )  # fmt: skip
    (data / "linked").symlink_to(tmp_path / "elsewhere")
    (data / "a" / "up").symlink_to(data)
    (data / "a" / "self").symlink_to("self")
    (data / "0").symlink_to(data / "b")  # sorted before, but the folder itself comes first
    (data / "c").symlink_to(tmp_path / "nowhere")
    with pytest.warns(ImagesWarning) as told:
        files = image_files(data)
    assert [str(path.relative_to(data)) for path in files] == ["a/1.png", "b/2.png", "linked/far.png"]
    message = str(told[0].message)
    assert len(told) == 1
    for name in (".ipynb_checkpoints", "@eaDir", "a/.thumbs", "a/._1.png"):
        assert f"{str(data / name)!r}" in message
    assert "have names that begin with '.' or '@'" in message
    assert f"{str(data / '0')!r}, {str(data / 'a/up')!r} lead to a folder that is read already" in message
    assert f"{str(data / 'a/self')!r}" in message
    assert f"{str(data / 'c')!r}" in message


def test_a_web_of_links_is_read_once(tmp_path: Path) -> None:
    """Thirty folders with two links each to the next: as paths they would be a billion."""
    for number in range(30):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_pictures(folder, f"{number}.png")
        for name in "ab":
            (folder / name).symlink_to(tmp_path / str(number + 1))
    with pytest.warns(ImagesWarning, match="and [0-9]+ more lead to a folder that is read already"):
        assert len(image_files(tmp_path)) == 30


def test_formats_that_are_not_read_are_reported(model: nn.Module, tmp_path: Path) -> None:
    save_pictures(tmp_path, "a.png", "b.gif", "c.avif", "d.heic", "e.jfif", "f.dcm")
    (tmp_path / "README.md").touch()
    with pytest.warns(ImagesWarning, match=r"b\.gif', .*c\.avif', .*d\.heic', .*e\.jfif', .*f\.dcm' are of a format"):
        assert len(load_images(tmp_path, model)) == 1
    (tmp_path / "a.png").unlink()
    with pytest.raises(
        ImagesError, match=r"holds no image files \(.*\): .*\. Left out: .*b\.gif.* convert them to PNG"
    ):
        load_images(tmp_path, model)


def test_a_subfolder_that_cannot_be_opened_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pictures(tmp_path, "a/1.png", "locked/2.png")
    open_folder = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == "locked":  # the superuser may open any
            raise PermissionError(13, "Permission denied", str(path))
        return open_folder(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.warns(ImagesWarning, match=r"locked' cannot be opened \(Permission denied\)"):
        assert [path.name for path in image_files(tmp_path)] == ["1.png"]


# Files that attack.


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs")
def test_only_regular_files_are_opened(model: nn.Module, tmp_path: Path) -> None:
    save_pictures(tmp_path, *(f"{number}.png" for number in range(6)))
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(1 << 40)
    (tmp_path / "linked.png").symlink_to(tmp_path / "0.png")  # as a hub's cache has all its files
    with pytest.warns(ImagesWarning) as told:
        few_shot = load_images(tmp_path, model)
    message = str(told[0].message)
    for reason in ("is a FIFO", "is a device", "No such file", "has 1,099,511,627,776 bytes"):
        assert reason in message
    assert [path.name for path in few_shot.files or ()] == [*(f"{number}.png" for number in range(6)), "linked.png"]


def test_a_file_of_a_format_that_runs_a_program_is_not_opened(model: nn.Module, tmp_path: Path) -> None:
    save_pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "c.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.warns(ImagesWarning, match=r"c\.png' \(its content is none of JPEG, PNG"):
        load_images(tmp_path, model)


BOMBS = """
import resource, sys, warnings
import timm, dcvit
warnings.simplefilter("ignore")
model = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(len(dcvit.load_images(sys.argv[1], model).files))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // (1024 if sys.platform == "linux" else 1 << 20))
"""


def png(width: int, height: int, content: bytes = b"") -> bytes:
    """A grey picture of any size in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(content or (b"\0" + bytes(width)) * min(height, 1 << 16))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.slow
def test_image_bombs_are_left_out_and_take_no_memory(tmp_path: Path) -> None:
    save_pictures(tmp_path, *(f"{number}.png" for number in range(5)))
    for name, size in {
        "tall": (1, 20_000),
        "taller": (1, 60_000),
        "wide": (60_000, 2),
        "huge": (60_000, 60_000),
    }.items():
        (tmp_path / f"{name}.png").write_bytes(png(*size, content=b"\0" if name == "huge" else b""))
    with pytest.warns(ImagesWarning, match=r"4 of 9 files .*tall\.png' \(it is 1 x 20,000 pixels, and 249 x 4,980,000"):
        load_images(tmp_path, load_model("vit_tiny_patch16_224", pretrained=False))
    found = subprocess.run([sys.executable, "-c", BOMBS, tmp_path], capture_output=True, text=True, check=True)
    count, megabytes = map(int, found.stdout.split())
    assert count == 5
    assert megabytes < 300


# Labels.


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Sixty labelled digits in ten subfolders."""
    digits = load_digits()
    for number in range(60):
        pixels = (digits.test_images[number, 0] * dcvit.demo.digits.STD + dcvit.demo.digits.MEAN) * 255
        folder = tmp_path / "data" / str(int(digits.test_labels[number]))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.round().byte().numpy()).save(folder / f"{number}.png")
    return tmp_path / "data"


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "kind", ["missing", "hidden", "linked to nowhere", "stray", "one more", "another in its place"]
)
def test_why_there_are_no_labels(kind: str, classes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    three = classes / "3"
    if kind == "stray":
        save_pictures(classes, "cover.png")
        expected = "there are images outside of its subfolders, one for each class: 'cover.png'"
    elif kind == "one more":
        (classes / "masks").mkdir()
        expected = "it has 11 subfolders, and the model 10 classes: .* Without images: 'masks'"
    else:
        three.rename(classes.parent / "three" if kind != "hidden" else classes / ".3")
        if kind == "linked to nowhere":
            three.symlink_to(classes / "nothing")
        if kind == "another in its place":  # what made ten folders of nine
            save_pictures(classes, ".ipynb_checkpoints/a.png")
        hidden = {"hidden": "Hidden: '.3'", "another in its place": "Hidden: '.ipynb_checkpoints'"}.get(kind, "")
        expected = f"it has 9 subfolders, and the model 10 classes: .*{hidden}"
    assert main(["evaluate", "demo", "--data", str(classes)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "no labels" in shown
    assert re.search(f"The data has no labels: {expected}", shown), shown


@pytest.mark.parametrize("kind", ["whole", "empty", "linked"])
def test_labels_never_shift(kind: str, classes: Path) -> None:
    demo = load_model("demo")
    three = classes / "3"
    if kind == "empty":
        for file in three.iterdir():
            file.unlink()
    if kind == "linked":
        three.rename(classes.parent / "three")
        three.symlink_to(classes.parent / "three")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load_data(str(classes), demo)
    assert data.unlabelled is None
    assert data.labels is not None
    assert data.labels.tolist() == [int(file.parent.name) for file in data.images.files or ()]
    assert len(data.labels) == 60 or kind == "empty"
