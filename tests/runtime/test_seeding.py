"""One seed for everything, and no trace of it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torchvision.transforms import InterpolationMode, v2

import dcvit
from dcvit.data.augment import augment
from dcvit.runtime.seeding import derive_seed, generator, seeded


def test_a_generator_of_ones_own() -> None:
    """The same for the same seed and purpose, another for another, and torch's are not asked."""
    before = torch.random.get_rng_state()
    first, again, other = (torch.rand(4, generator=generator(3, *purpose)) for purpose in (("a", 1), ("a", 1), ("b",)))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_callers_random_state_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU that has not been used yet, too: torch would keep a seed for it."""
    kept: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", kept.append)
    before = torch.random.get_rng_state()
    with seeded(3, "views"):
        drawn = torch.rand(4)
        assert torch.equal(drawn, torch.rand(4, generator=generator(3, "views")))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not kept
    torch.manual_seed(derive_seed(3, "views"))
    assert len(kept) == 1  # what `seeded` must not do
    assert torch.equal(torch.rand(4), drawn)


@contextmanager
def global_generator(seed: int) -> Iterator[None]:
    """Torch's, in the state of `generator(seed)`."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed))
        yield


@pytest.mark.parametrize("size", [(32, 32), (20, 50), (60, 9)], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(
    "config",
    [
        dcvit.config.AugmentationConfig(),
        dcvit.config.AugmentationConfig(scale=(0.08, 1), ratio=(0.5, 2), flip=0.3, color_jitter=0.9),
        dcvit.config.AugmentationConfig(scale=(1, 1), ratio=(3, 4), color_jitter=0),
    ],
    ids=["default", "strong", "too wide, so from the middle"],
)
def test_views_are_those_of_torchvision(
    size: tuple[int, int], channels: int, config: dcvit.config.AugmentationConfig
) -> None:
    """Its transforms draw from torch's global generator what dcvit draws from its own: the same views of one seed."""
    pixels = torch.rand(8, channels, *size)
    mean, std = (0.0,) * channels, (1.0,) * channels
    images = dcvit.data.images.FewShotImages(torch.zeros(8, channels, 24, 28), list(pixels), mean, std)
    steps: list[nn.Module] = [
        v2.RandomResizedCrop((24, 28), config.scale, config.ratio, InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(config.flip),
    ]
    jitter = config.color_jitter
    if jitter and channels in (1, 3):
        steps.append(v2.ColorJitter(jitter, jitter, jitter if channels == 3 else 0))
    with global_generator(5):
        expected = torch.stack([v2.Compose(steps)(image).clamp(0, 1) for image in pixels])
    assert torch.equal(augment(images, range(8), config, generator(5)), expected)
