"""Contestants of `python -m benchmarks compare`: each method with its defaults, and the paper's ablations."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.methods import parts_of, suited
from benchmarks.testbeds import TestBed
from benchmarks.testbeds.crops import PHOTOGRAPHS, crops
from dcvit.config import DCViT, DistillationConfig, MethodConfig, SynthesisConfig, TrainingConfig
from dcvit.demo import load_digits
from dcvit.methods import METHODS
from dcvit.models.loading import preprocessing

__all__ = ["ABLATIONS", "OTHER_DOMAIN", "PUBLISHED", "config_of", "images_of"]

PUBLISHED = "published"
"""Name of the published procedure. Each ablation changes one thing of it."""

OTHER_DOMAIN = "images of another domain"

Change = Callable[[DCViT], DCViT]


def _distillation(**changes: object) -> Change:
    return lambda config: replace(config, recovery=replace(config.distillation, **changes))  # type: ignore[arg-type]


def _ablated(**changes: object) -> Change:
    return lambda config: replace(config, ablation=replace(config.ablation, **changes))  # type: ignore[arg-type]


ABLATIONS: dict[str, Change] = {
    PUBLISHED: lambda config: config,
    "few-shot images as proxy set": _ablated(ranking_images="few-shot"),
    "class token only": _distillation(tokens="class"),
    "all blocks updated": _distillation(updated="all"),
    "blocks around updated": _distillation(updated="around"),
    "all blocks at once": _ablated(progressive=False),
    OTHER_DOMAIN: lambda config: config,
}
"""The paper's ablations, by name."""


def config_of(name: str, bed: TestBed, seed: int, epochs: int | None, ablation: str | None = None) -> MethodConfig:
    """Return the settings of a method on a test bed.

    Args:
        name: Name of the method.
        bed: The test bed, which determines the random views.
        seed: Seed of the method.
        epochs: Epochs of each recovery by distillation, of which a twentieth are warm-up; `None` for the method's own.
        ablation: One of `ABLATIONS`, which changes the published procedure.
    """
    config = METHODS[name].config()
    if ablation is not None:
        config = DCViT.paper(recovery=DistillationConfig(), synthesis=SynthesisConfig())
    config = suited(config, bed).with_(seed=seed)
    if epochs is not None:
        for part, settings in parts_of(config, TrainingConfig).items():
            config = config.with_(**{part: replace(settings, epochs=epochs, warmup_epochs=epochs // 20)})
    return ABLATIONS[ablation](config) if ablation is not None and isinstance(config, DCViT) else config


def images_of(bed: TestBed, seed: int, ablation: str | None = None) -> Tensor:
    """Return the few-shot set, normalised, `[N, C, H, W]`.

    It is the bed's own, except for the ablation `OTHER_DOMAIN`. That one uses as many images of another domain: digits
    for a model of photographs, and crops of photographs for a model of digits.
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
