"""Measures of how close a student is to a test bed's model, on the held-out images."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.testbeds.bed import TestBed, output_tokens

__all__ = ["Measures", "measure"]


@dataclass(frozen=True)
class Measures:
    """The comparison of a student with its teacher.

    Attributes:
        error: r = ‖s − t‖² / ‖t − mean(t)‖² over all output tokens; 0 is exact, 1 is as good as a constant. For a
            student with fewer tokens, it is taken over the tokens that both have, such as the class token.
        agreement: Share of images for which both predict the same class.
        top1: Share of images whose class is predicted correctly; `None` without labels.
        cosine_class: Mean cosine similarity of the class token; `None` without a class token.
        cosine_patch: Mean cosine similarity of the other tokens; `None` for a student with fewer tokens.
    """

    error: float
    agreement: float
    top1: float | None
    cosine_class: float | None
    cosine_patch: float | None


def measure(bed: TestBed, student: nn.Module) -> Measures:
    """Compare a student with a bed's model on the bed's held-out images.

    Args:
        bed: The test bed, whose model has one class token in front, or none.
        student: The student, in evaluation mode.
    """
    teacher_tokens = bed.teacher_tokens
    student_tokens = output_tokens(student, bed.held_out)
    agreed = bed.predictions(student, student_tokens) == bed.predictions(bed.model, teacher_tokens)
    top1 = bed.top1(student, student_tokens)
    prefix = int(getattr(bed.model, "num_prefix_tokens", 0))
    alike = student_tokens.shape == teacher_tokens.shape
    if not alike:
        student_tokens, teacher_tokens = student_tokens[:, :prefix], teacher_tokens[:, :prefix]
    cosine = F.cosine_similarity(student_tokens, teacher_tokens, dim=-1).double()
    return Measures(
        error=relative_error(student_tokens, teacher_tokens),
        agreement=float(agreed.double().mean()),
        top1=top1,
        cosine_class=float(cosine[:, 0].mean()) if prefix else None,
        cosine_patch=float(cosine[:, prefix:].mean()) if alike else None,
    )


def relative_error(student: Tensor, teacher: Tensor) -> float:
    """Compute ‖s − t‖² / ‖t − mean(t)‖² of tokens `[M, T, D]` in float64; mean(t) is over images and tokens."""
    mean = teacher.mean((0, 1), dtype=torch.float64)
    missed = sum(float((s.double() - t.double()).square().sum()) for s, t in zip(student, teacher, strict=True))
    spread = sum(float((t.double() - mean).square().sum()) for t in teacher)
    return missed / spread
