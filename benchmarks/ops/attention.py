"""Attention over few tokens and its gradient: shapes of the embedded model, and of ViT-Ti and ViT-S on small images."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import Case, draw, measure
from dcvit.ops import attention

SHAPES = [(25, 17, 4, 16), (64, 50, 3, 64), (64, 65, 6, 64)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_attention(benchmark: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    batch, tokens, heads, size = shape
    qkv, grad = draw(batch, tokens, 3, heads, size).requires_grad_(), draw(batch, tokens, heads * size)
    q, p = draw(batch * heads, tokens, size), draw(batch * heads, tokens, tokens)

    def call(function: Callable[..., Tensor]) -> object:
        return torch.autograd.grad(function(qkv), qkv, grad)

    def products() -> None:  # two forward, four backward
        for _ in range(2):
            q @ q.mT
        for _ in range(4):
            p @ q

    name = f"forward + backward {[batch, tokens, 3, heads, size]}"
    flops = 2 * 6 * batch * heads * tokens * tokens * size
    measure(benchmark, Case(name, "attention", attention, call, {"qkv": qkv}, products, flops=flops))
