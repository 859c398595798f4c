"""The type of a test bed."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from dcvit.config import AugmentationConfig
from dcvit.models import compressible
from dcvit.recovery import distill as recovery

__all__ = ["TestBed", "output_tokens"]


@dataclass(frozen=True, eq=False)
class TestBed:
    """A pretrained model, few-shot images to compress it with, and held-out images to evaluate the result on.

    Attributes:
        name: Name in tables.
        model: The original, frozen and in evaluation mode.
        images: The few-shot set, normalised, `[N, C, H, W]`.
        held_out: The held-out images, normalised, `[M, C, H, W]`; they are the same for every seed.
        labels: Class of each held-out image, `[M]`; `None` without labels.
        probe: For a model without a head, a linear probe from pooled features `[B, D]` to class logits, fitted on the
            original and frozen; else `None`.
        augmentation: Random views that suit the images; its `flip` also suits synthesised images.
    """

    __test__: ClassVar[bool] = False  # keeps pytest from collecting the class because of its name

    name: str
    model: nn.Module
    images: Tensor
    held_out: Tensor
    labels: Tensor | None = None
    probe: nn.Module | None = None
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)

    @cached_property
    def teacher_tokens(self) -> Tensor:
        """The original's output tokens on the held-out images, `[M, T, D]`, computed once."""
        return output_tokens(self.model, self.held_out)

    @torch.no_grad()
    def predictions(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """Return the most likely class `[M]` for a model's output tokens `[M, T, D]`, from its head or the probe."""
        view = compressible(model)
        tokens = tokens.to(next(model.parameters()).device)
        if self.probe is None:
            return view.logits(tokens).argmax(-1).cpu()
        logits: Tensor = self.probe(view.features(tokens).cpu())
        return logits.argmax(-1)

    def top1(self, model: nn.Module, tokens: Tensor) -> float | None:
        """Return the top-1 accuracy of a model's output tokens `[M, T, D]`; `None` without labels."""
        if self.labels is None:
            return None
        return float((self.predictions(model, tokens) == self.labels).double().mean())


def output_tokens(model: nn.Module, images: Tensor, batch_size: int = 50) -> Tensor:
    """Compute a model's output tokens after the final norm, `[M, T, D]` on the CPU, for images `[M, C, H, W]`."""
    return recovery.output_tokens(model, images.to(next(model.parameters()).device), batch_size).cpu()
