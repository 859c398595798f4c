"""One synthesis step on 50 images: the prior, its gradient, Adam and the clipping of pixels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import Case, copies, draw, measure, settings
from dcvit.ops import synthesis_step


@pytest.mark.parametrize("shape", [(50, 3, 224, 224)], ids=lambda shape: "x".join(map(str, shape)))
def test_synthesis_step(benchmark: Any, shape: tuple[int, ...]) -> None:
    if settings.dtype != torch.float32:
        pytest.skip("it takes only float32")
    torch.manual_seed(0)
    images, grad = draw(2, *shape)
    exp_avg, exp_avg_sq = torch.zeros_like(images), torch.zeros_like(images)
    low, high = images.new_full((shape[1],), -2.0), images.new_full((shape[1],), 2.0)
    tensors = {
        "images": images, "grad": 1e-3 * grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "low": low, "high": high,
    }  # fmt: skip

    def call(function: Callable[..., Tensor]) -> object:
        return function(**tensors, step=100, lr=0.01, beta=0.6)

    # Images are read for the norms. Then images, gradient and moments are read, and images and moments written.
    count = 8 * images.nbytes
    measure(
        benchmark, Case(f"{list(shape)}", "synthesis_step", synthesis_step, call, tensors, copies(count), bytes=count)
    )
