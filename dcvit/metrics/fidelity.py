"""Step 4: how far a student is from its teacher, on images that it was not trained on.

Published (`"cross_entropy"`, DC-ViT, arXiv 2403.18708): the cross-entropy between the class distributions of teacher
and student, on the synthesised proxy set. The teacher's entropy is subtracted, so that 0 is perfect. This is the
Kullback-Leibler divergence, which ranks students in the same order.

Default (`"distillation"`): the relative distillation error over all output tokens,

    r = ‖s − t‖² / ‖t − mean(t)‖²,

on the proxy set and, if there are any, on the few-shot images held out of the reconstruction; the geometric mean of
the two. Each set has its own bias. Synthesised images are far from photographs, which exaggerates the first blocks.
Held-out images are few, and much like the training images. All tokens say more than one class distribution, and a
backbone without classes allows no other metric.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dcvit.config import MetricKind
from dcvit.models import compressible
from dcvit.models.pseudo_head import class_logits
from dcvit.runtime.spill import SpilledBuffer

__all__ = ["Metric"]


class Metric:
    """The distance of students from a teacher, on sets of images.

    Args:
        teacher: The original model.
        image_sets: Sets of normalised images `[M, C, H, W]`. For several sets, the losses' geometric mean is taken.
        kind: What is compared.
        batch_size: Images in one pass.
    """

    def __init__(
        self, teacher: nn.Module, image_sets: Sequence[Tensor], kind: MetricKind, batch_size: int = 64
    ) -> None:
        self._validations = [_Validation(teacher, images, kind, batch_size) for images in image_sets]

    def loss(self, student: nn.Module, first_block: int | None = None) -> float:
        """Return how far a student is from its teacher; lower is better.

        Args:
            student: The student.
            first_block: A block before which the student equals the teacher, so that the earlier ones are not computed;
                `None` if that is not known of any.
        """
        losses = [validation.loss(student, first_block) for validation in self._validations]
        if len(losses) == 1:
            return losses[0]
        return math.exp(sum(math.log(max(loss, 1e-30)) for loss in losses) / len(losses))


class _Validation:
    """The teacher's tokens before each block, and its outputs, for one set of images."""

    def __init__(self, teacher: nn.Module, images: Tensor, kind: MetricKind, batch_size: int) -> None:
        view = compressible(teacher)
        self._images, self._kind, self._batch_size = images, kind, batch_size
        depth = view.num_blocks()
        with torch.no_grad():
            self._before = [SpilledBuffer() for _ in range(depth)]
            outputs = []
            for batch in images.split(batch_size):
                tokens = view.embed(batch)
                for block, before in enumerate(self._before):
                    before.append(tokens)
                    tokens = view.run_blocks(tokens, block, block + 1)
                outputs.append(view.final_norm(tokens))
            self._expected = [self._outputs(teacher, tokens) for tokens in outputs]
        mean = torch.cat([tokens.flatten(0, 1) for tokens in outputs]).mean(0)
        self._spread = sum(float((tokens - mean).double().square().sum()) for tokens in outputs)

    @torch.no_grad()
    def loss(self, student: nn.Module, first_block: int | None) -> float:
        view = compressible(student)
        depth, size = len(self._before), self._batch_size
        total = 0.0
        for images, before, expected in zip(
            self._images.split(size), self._before[first_block or 0].split(size), self._expected, strict=True
        ):
            tokens = before if first_block is not None else view.embed(images)
            tokens = view.final_norm(view.run_blocks(tokens, first_block or 0, depth))
            found = self._outputs(student, tokens)
            if self._kind == "cross_entropy":
                total += float((expected.exp() * (expected - found)).sum())
            else:
                total += float((expected - found).double().square().sum())
        return total / (len(self._images) if self._kind == "cross_entropy" else max(self._spread, 1e-30))

    def _outputs(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """Return log-probabilities `[B, K]` of output tokens `[B, N, D]`, or the tokens themselves."""
        return class_logits(model, tokens).log_softmax(-1) if self._kind == "cross_entropy" else tokens
