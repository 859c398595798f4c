"""The few-shot set: what is taken, and what is refused in one sentence."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import dcvit
from dcvit.data.augment import augment
from dcvit.data.images import FewShotImages, load_images
from dcvit.errors import ImagesWarning
from dcvit.models import preprocessing
from dcvit.runtime.seeding import generator
from tests.variants import VARIANTS


class Photographs(Dataset[Any]):
    """PIL images with labels."""

    def __init__(self, count: int = 3) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        pixels = np.random.default_rng(index).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        return Image.fromarray(pixels), index


def test_every_kind_of_source_gives_the_same_images(model: nn.Module, images: Tensor) -> None:
    labels = torch.arange(len(images))
    sources: list[Any] = [
        images,
        TensorDataset(images),
        TensorDataset(images, labels),
        DataLoader(TensorDataset(images, labels), batch_size=4),
        DataLoader(images, batch_size=4),  # type: ignore[arg-type]
        DataLoader(images, batch_size=4, collate_fn=list),  # type: ignore[arg-type]
        DataLoader(TensorDataset(images, labels), batch_size=4, collate_fn=list),
        DataLoader(
            TensorDataset(images, labels), batch_size=4, collate_fn=lambda items: tuple(zip(*items, strict=True))
        ),
        list(images),
    ]
    for source in sources:
        assert torch.equal(load_images(source, model).normalised, images)


def test_pil_images_and_folders_get_timms_preprocessing(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    photographs = Photographs()
    for index in range(len(photographs)):
        photographs[index][0].save(tmp_path / "a" / f"{index}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    transform = preprocessing(model).transform
    expected = torch.stack([transform(photographs[i][0]) for i in range(3)])
    files = [tmp_path / "a" / f"{index}.png" for index in range(3)]
    of_pictures = DataLoader(photographs, batch_size=2, collate_fn=list)
    for source in (photographs, of_pictures, tmp_path, str(tmp_path), files, list(map(str, files))):
        few_shot = load_images(source, model)
        assert torch.equal(few_shot.normalised, expected)
        assert few_shot.pixels[0].shape == (3, 40, 50)


def test_pixels_of_files_are_theirs_and_no_larger_than_crops_need(model: nn.Module, tmp_path: Path) -> None:
    """Of a model for 32 pixels at most 116, so that a crop of 8 % of the area has 32."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    Image.fromarray(np.full((300, 400, 3), (255, 0, 51), dtype=np.uint8)).save(tmp_path / "b.png")
    with pytest.warns(ImagesWarning, match=r"1 of 2 images are of one colour, or nearly: '.*b\.png'"):
        small, large = load_images(tmp_path, model).pixels
    assert torch.equal(small, torch.from_numpy(noise).permute(2, 0, 1) / 255)
    assert large.shape == (3, 116, 155)
    assert torch.equal(large.flatten(1).amax(1), torch.tensor([1.0, 0.0, 0.2]))
    mixed = load_images([Image.fromarray(noise), torch.randn(3, 32, 32)], model).pixels
    assert [picture.shape[-1] for picture in mixed[:]] == [50, 32]


def test_pixels_are_the_images_in_0_1(model: nn.Module) -> None:
    images = torch.rand(2, 3, 32, 32) * 2 - 1  # the model's mean and std are 0.5
    few_shot = load_images(images, model)
    torch.testing.assert_close(torch.stack(list(few_shot.pixels)), images / 2 + 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:0], "There are no images"),
        (lambda x: x[0], r"shape \[3, 32, 32\]: expected .* here \[N, 3, 32, 32\]"),
        (lambda x: x[:, :1], "1 channels .* takes 3"),
        (lambda x: x[..., :30], "32x30: the model takes 32x32"),
        (lambda x: x.double(), r"torch\.float64: expected torch\.float32"),
        (lambda x: (x * 40).byte(), r"torch\.uint8: expected torch\.float32"),
        (lambda x: x.masked_fill(torch.arange(6).view(-1, 1, 1, 1) == 2, float("nan")), r"images \[2\] have NaN"),
        (lambda x: x / 0, "have NaN or infinite pixels"),
        (lambda x: x.to("meta"), "images are on meta, the model on cpu"),
        (lambda x: 7, "images is a int"),
        (lambda x: TensorDataset(x[:0]), "There are no images"),
        (lambda x: [{"image": 1}], "An image is a int"),
        (lambda x: ["a", "b"], "2 of 2 files cannot be read as images: 'a'"),
        (lambda x: FewShotImages(x[:, :, :4], list(x), (0.0,), (1.0,)), "images are 4x32: the model takes 32x32"),
        (lambda x: "/nowhere/at/all", "is not a folder"),
    ],
)
def test_bad_images(model: nn.Module, images: Tensor, change: Any, message: str) -> None:
    with pytest.raises(dcvit.errors.ImagesError, match=message):
        dcvit.compress(model, change(images), dcvit.Budget(macs=0.75))


def test_bad_folders(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(dcvit.errors.ImagesError, match="holds no image files"):
        load_images(tmp_path, model)
    (tmp_path / "broken.png").write_bytes(b"not a png")
    with pytest.raises(
        dcvit.errors.ImagesError, match=r"1 of 1 files cannot be read as images: '.*broken\.png' \(.*remove"
    ):
        load_images(tmp_path, model)


def test_files_that_cannot_be_read_are_named_and_left_out(model: nn.Module, tmp_path: Path) -> None:
    for number in range(8):
        Photographs()[number][0].save(tmp_path / f"{number}.png")
    whole = (tmp_path / "0.png").read_bytes()
    for number in range(7):
        (tmp_path / f"cut{number}.png").write_bytes(whole[: 10 + 6 * number])
    with pytest.warns(ImagesWarning, match=r"7 of 15 files .*cut0\.png.*cut4\.png.* and 2 more\. They are left out"):
        few_shot = load_images(tmp_path, model)
    assert [path.name for path in few_shot.files or ()] == [f"{number}.png" for number in range(8)]
    assert [path.name for path in few_shot.subset([3, 1]).files or ()] == ["3.png", "1.png"]
    for number in range(2):
        (tmp_path / f"empty{number}.jpg").touch()
    with pytest.raises(dcvit.errors.ImagesError, match="9 of 17 files cannot be read"):
        load_images(tmp_path, model)


@pytest.mark.parametrize("top", [1, 255])
def test_pixels_that_nobody_normalised_are_reported(model: nn.Module, top: int) -> None:
    pixels = torch.randint(256, (3, 3, 32, 32)) / 255
    with pytest.warns(ImagesWarning, match=f"like pixels from 0 to {top} that are not normalised"):
        load_images(pixels * top, model)
    load_images((pixels - 0.5) / 0.5, model)
    load_images(torch.rand(3, 3, 32, 32), model)  # not of 256 levels
    with pytest.warns(ImagesWarning, match="of one colour"):
        load_images(torch.zeros(1, 3, 32, 32), model)  # which may be normalised
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    load_images(pixels, model)


def test_files_for_a_model_in_double_precision(model: nn.Module, tmp_path: Path) -> None:
    Photographs()[0][0].save(tmp_path / "a.png")
    assert load_images(tmp_path, copy.deepcopy(model).double()).normalised.dtype == torch.float64


def test_files_for_a_model_of_five_channels_are_refused(tmp_path: Path) -> None:
    Photographs()[0][0].save(tmp_path / "a.png")
    with pytest.raises(dcvit.errors.UnsupportedModelError, match="takes 5 channels"):
        load_images(tmp_path, VARIANTS["rectangle_5_channels"].create())


def test_augmentation_is_seeded_and_does_what_it_says(model: nn.Module) -> None:
    images = load_images(torch.rand(4, 3, 32, 32) - 0.5, model)

    def views(config: dcvit.config.AugmentationConfig, seed: int = 0) -> Tensor:
        return augment(images, [0, 1, 2, 3], config, generator(seed))

    full = dcvit.config.AugmentationConfig()
    assert torch.equal(views(full), views(full))
    assert not torch.equal(views(full), views(full, seed=1))
    still = dcvit.config.AugmentationConfig(scale=(1, 1), ratio=(1, 1), flip=0, color_jitter=0)
    torch.testing.assert_close(views(still), images.normalised, rtol=1e-4, atol=1e-4)
    mirrored = dcvit.config.AugmentationConfig(scale=(1, 1), ratio=(1, 1), flip=1, color_jitter=0)
    torch.testing.assert_close(views(mirrored), images.normalised.flip(-1), rtol=1e-4, atol=1e-4)
    coloured = dcvit.config.AugmentationConfig(scale=(1, 1), ratio=(1, 1), flip=0, color_jitter=0.5)
    assert not torch.allclose(views(coloured), images.normalised, atol=0.05)
    assert not torch.equal(views(full)[0], views(full)[1])
    cropped = dcvit.config.AugmentationConfig(scale=(0.3, 0.3), ratio=(1, 1), flip=0, color_jitter=0)
    assert not torch.allclose(views(cropped), images.normalised, atol=0.05)


def test_a_part_of_the_images_is_read_when_it_is_asked_for(model: nn.Module, tmp_path: Path) -> None:
    for number in range(3):
        Photographs()[number][0].save(tmp_path / f"{number}.png")
    for few_shot in (load_images(tmp_path, model), load_images(torch.rand(3, 3, 32, 32), model)):
        part = few_shot.subset([2, 0]).subset([1, 0])
        assert not isinstance(part.pixels, list)
        assert [picture.shape for picture in part.pixels] == [few_shot.pixels[i].shape for i in (0, 2)]
        for place, number in enumerate((0, 2)):
            assert torch.equal(part.pixels[place], few_shot.pixels[number])
            assert torch.equal(part.normalised[place], few_shot.normalised[number])


def test_images_normalised_in_a_way_of_their_own_are_not_clipped(model: nn.Module) -> None:
    """Z-scores, for example: views are of all their values."""
    images = 2 * torch.randn(4, 3, 32, 32) + torch.tensor([1.0, -3.0, 40.0]).view(3, 1, 1)
    few_shot = load_images(images, model)
    whole = dcvit.config.AugmentationConfig(scale=(1, 1), ratio=(1, 1), flip=0, color_jitter=0)
    assert torch.allclose(augment(few_shot, range(4), whole, generator(0)), images, atol=1e-4)
    pixels = torch.stack(list(few_shot.pixels))
    assert torch.allclose(pixels.amin((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(pixels.amax((0, 2, 3)), torch.ones(3), atol=1e-5)
    usual = preprocessing(model)
    inside = (torch.rand(2, 3, 32, 32) - torch.tensor(usual.mean).view(3, 1, 1)) / torch.tensor(usual.std).view(3, 1, 1)
    assert (load_images(inside, model).mean, load_images(inside, model).std) == (usual.mean, usual.std)


def test_few_shot_images_on_another_device(model: nn.Module, tmp_path: Path) -> None:
    """The pixels follow, whether they are worked out, kept as bytes, or the caller's own."""
    Photographs()[0][0].save(tmp_path / "a.png")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    from_folder, from_tensor = load_images(tmp_path, model), load_images(images, model)
    own = FewShotImages(images, [torch.rand(3, 8, 8)] * 2, (0.5,) * 3, (0.5,) * 3)
    for few_shot in (from_folder, from_tensor, own):
        there = few_shot.to("meta")
        assert there.normalised.device.type == "meta"
        assert all(picture.device.type == "meta" for picture in there.pixels)
        assert [picture.shape for picture in there.pixels] == [picture.shape for picture in few_shot.pixels]
        here = few_shot.to("cpu")
        assert all(torch.equal(a, b) for a, b in zip(here.pixels, few_shot.pixels, strict=True))
