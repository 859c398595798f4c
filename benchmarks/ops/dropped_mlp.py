"""The MLP of a compressed block at ViT shapes, in training and in inference; the reference is its matrix products."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import Case, device, draw, measure
from dcvit.ops import dropped_mlp

BATCH = 64
SHAPES = [
    (197, 192, 256),
    (197, 192, 768),
    (197, 384, 768),
    (197, 768, 256),
    (197, 768, 1536),
    (197, 768, 3072),
    (257, 1024, 1024),
    (257, 1024, 3072),
]
"""Tokens, width and kept hidden units. The whole MLP has max(4 * width, kept) hidden units."""


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize(
    ("tokens", "width", "kept"),
    SHAPES,
    ids=["-".join(f"{k}{v}" for k, v in zip("ndk", s, strict=True)) for s in SHAPES],
)
def test_dropped_mlp(benchmark: Any, tokens: int, width: int, kept: int, mode: str) -> None:
    torch.manual_seed(0)
    hidden, rows, training = max(4 * width, kept), BATCH * tokens, mode == "train"

    x, cotangent = draw(BATCH, tokens, width), draw(BATCH, tokens, width)
    w1, w2 = draw(hidden, width) / width**0.5, draw(width, hidden) / hidden**0.5
    tensors = {
        "x": x, "w1": w1, "b1": draw(hidden), "w2": w2, "b2": draw(width),
        "norm_weight": draw(width), "norm_bias": draw(width),
    }  # fmt: skip
    idx = torch.randperm(hidden, device=device())[:kept].sort().values
    if not training:  # the finished student holds only the kept hidden units
        tensors |= {"w1": w1[idx], "b1": tensors["b1"][idx], "w2": w2[:, idx].contiguous()}
        idx = None
    for tensor in tensors.values():
        tensor.requires_grad_(training)

    def call(function: Callable[..., Tensor]) -> object:
        with torch.set_grad_enabled(training):
            y = function(**tensors, idx=idx, residual=True)
        return y, torch.autograd.grad(y, list(tensors.values()), cotangent) if training else None

    a, b, wide, narrow = draw(rows, width), draw(rows, kept), draw(kept, width), draw(width, kept)
    y, u = torch.empty_like(a), torch.empty_like(b)

    def products() -> None:
        torch.mm(a, wide.T, out=u)
        torch.mm(b, narrow.T, out=y)
        if training:
            torch.mm(b.T, a, out=wide)
            torch.mm(a.T, b, out=narrow)
            torch.mm(a, narrow, out=u)
            torch.mm(b, wide, out=y)
            wide.copy_(w1[:kept].detach())
            narrow.copy_(w2[:, :kept].detach())

    results = x.nbytes + sum(tensor.nbytes for tensor in tensors.values()) if training else 0
    flops = 2 * 2 * rows * width * kept * (3 if training else 1)
    name = f"{'forward + backward' if training else 'inference'} [{BATCH}, {tokens}, {width}], {kept} kept"
    measure(benchmark, Case(name, "dropped_mlp", dropped_mlp, call, tensors, products, flops=flops, results=results))
