"""Who takes part in `python -m benchmarks compare`: each method as it is by default, and the paper's ablations."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.methods import suited
from benchmarks.testbeds import TestBed
from benchmarks.testbeds.crops import PHOTOGRAPHS, crops
from dcvit.config import CompressionConfig, MimickingConfig, SynthesisConfig
from dcvit.demo import load_digits
from dcvit.methods import method
from dcvit.models.loading import preprocessing

__all__ = ["ABLATIONS", "OTHER_DOMAIN", "PUBLISHED", "config_of", "images_of"]

PUBLISHED = "published"
"""The published procedure, from which each ablation changes one thing."""

OTHER_DOMAIN = "images of another domain"

Change = Callable[[CompressionConfig], CompressionConfig]


def _mimicking(**changes: object) -> Change:
    return lambda config: replace(config, recovery=replace(config.mimicking, **changes))  # type: ignore[arg-type]


ABLATIONS: dict[str, Change] = {
    PUBLISHED: lambda config: config,
    "few-shot images as metric set": lambda config: replace(config, metric_set="images"),
    "class token alone mimicked": _mimicking(tokens="class"),
    "all blocks updated": _mimicking(updated="all"),
    "blocks around updated": _mimicking(updated="around"),
    "all blocks at once": lambda config: replace(config, progressive=False),
    OTHER_DOMAIN: lambda config: config,
}
"""Of the paper, by name."""


def config_of(name: str, bed: TestBed, seed: int, epochs: int | None, ablation: str | None = None) -> CompressionConfig:
    """The settings of a method on a test bed.

    Args:
        name: The method.
        bed: Says which views suit its images.
        seed: Of all that is random.
        epochs: Of each recovery by mimicking, with a twentieth of them to warm up; the method's own if not given.
        ablation: One of `ABLATIONS`, of the published procedure.
    """
    config = method(name).config()
    if ablation is not None:
        beta = 1.0 if bed.name.startswith(("deit", "swin")) else 0.6  # of the total variation, as published
        config = CompressionConfig.paper(recovery=MimickingConfig(), synthesis=SynthesisConfig(tv_exponent=beta))
    config = replace(suited(config, bed), seed=seed)
    if isinstance(config.recovery, MimickingConfig) and epochs is not None:
        config = _mimicking(epochs=epochs, warmup_epochs=epochs // 20)(config)
    return config if ablation is None else ABLATIONS[ablation](config)


def images_of(bed: TestBed, seed: int, ablation: str | None = None) -> Tensor:
    """The few-shot set, normalised: the bed's, or as many of another domain.

    Digits for a model of photographs, crops of photographs for one of digits.
    """
    if ablation != OTHER_DOMAIN:
        return bed.images
    count, channels, height, width = bed.images.shape
    if bed.name == "digits":
        pixels = crops(PHOTOGRAPHS, "few-shot", count, height, seed).pixels.mean(dim=1, keepdim=True)
    else:
        data = load_digits()
        images = data.few_shot(count, seed)
        low, high = images.amin(), images.amax()
        pixels = F.interpolate((images - low) / (high - low), size=(height, width), mode="bilinear")
        pixels = pixels.expand(-1, channels, -1, -1)
    prep = preprocessing(bed.model)
    return prep.normalised(pixels.to(torch.float32)).contiguous()
