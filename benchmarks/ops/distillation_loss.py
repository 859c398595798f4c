"""The distillation loss of C candidates and its gradient, at the tokens of ViT-B with batch 64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import Case, copies, draw, measure
from dcvit.ops import distillation_loss

SHAPES = [(1, 64, 197, 768), (6, 64, 197, 768), (1, 64, 257, 1024), (1, 64, 197, 192)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_distillation_loss(benchmark: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    student, teacher = draw(*shape).requires_grad_(), draw(*shape[1:])

    def call(function: Callable[..., Tensor]) -> object:
        return torch.autograd.grad(function(student, teacher).sum(), student)

    # Students and teacher are read, gradients written.
    count = teacher.element_size() * (2 * student.numel() + teacher.numel())
    others = {}
    if shape[0] > 1:
        alone = [candidate[None].detach().requires_grad_() for candidate in student]

        def one_by_one() -> None:
            for candidate in alone:
                torch.autograd.grad(distillation_loss(candidate, teacher, impl="eager").sum(), candidate)

        others["eager, C calls"] = one_by_one
    name = f"forward + backward {list(shape)}"
    inputs = {"student": student, "teacher": teacher}
    measure(
        benchmark,
        Case(name, "distillation_loss", distillation_loss, call, inputs, copies(count), bytes=count, others=others),
    )
