"""The image prior of 50 images and its gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import Case, copies, draw, measure
from dcvit.ops import tv_prior


@pytest.mark.parametrize("shape", [(50, 3, 224, 224)], ids=lambda shape: "x".join(map(str, shape)))
def test_tv_prior(benchmark: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    images = draw(*shape).requires_grad_()

    def call(function: Callable[..., Tensor]) -> object:
        return torch.autograd.grad(function(images, beta=0.6), images)

    # Images are read for the norms and again for the gradient, which is written.
    count = 3 * images.nbytes
    name = f"forward + backward {list(shape)}"
    measure(benchmark, Case(name, "tv_prior", tv_prior, call, {"images": images}, copies(count), bytes=count))
