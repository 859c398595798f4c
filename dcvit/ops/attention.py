"""Self-attention of few tokens, from the packed projection to the merged heads.

Source: Attention Is All You Need (arXiv 1706.03762), section 3.2, as in timm's `Attention`:

    out = softmax(q k^T / sqrt(E)) v  for each image and head, with q, k and v [N, E]

torch's fused attention multiplies blocks with the BLAS. For 17 tokens and heads of size 16, a product takes less time
than its call, and the copies that split and merge the heads take as long again. A kernel that reads and writes the
packed layout avoids both.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.nn import functional as F

from dcvit.ops import _dispatch
from dcvit.ops._dispatch import Impl

HEAD_DIM_MULTIPLE = 16
"""The divisor of supported head sizes: heads are read in whole vectors, and a vector of AVX-512 holds 16 numbers."""


def attention(qkv: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Attend from every token to every token of the same image.

    Args:
        qkv: Queries, keys and values of H heads of size E, `[B, N, 3, H, E]`.
        impl: The implementation that runs.

    Returns:
        The heads side by side, `[B, N, H * E]`.

    Raises:
        ValueError: If the shape does not fit, or `impl` names an implementation that does not support the call.
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"attention: qkv is {list(qkv.shape)}, expected [B, N, 3, H, E].")
    op = _dispatch.select("attention", impl, IMPLEMENTATIONS, {"qkv": qkv})
    if op is None:
        return eager(qkv)
    out: Tensor
    out, _ = _dispatch.call(op, qkv, torch.is_grad_enabled() and qkv.requires_grad)
    return out


# Eager: the specification.


def eager(qkv: Tensor) -> Tensor:
    """Compute the op in plain torch.

    On the CPU, torch's fused attention has no second derivative, but its "math" backend has one.
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


# Schema, with the kernels and fakes that go with it.
#
# If `save` is set, the forward also returns the probabilities [B, H, keys, queries], which its backward needs;
# otherwise their batch size is 0. They take N / 3E of the memory of qkv.

_SCHEMA = "(Tensor qkv, bool save) -> (Tensor out, Tensor probabilities)"
_BACKWARD_SCHEMA = "(Tensor grad, Tensor qkv, Tensor probabilities) -> Tensor"


def forward(qkv: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    """Compute the forward op where no compiled kernel is installed."""
    q, k, _ = qkv[: len(qkv) if save else 0].permute(2, 0, 3, 1, 4).unbind(0)
    probabilities = ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1)
    return eager(qkv), probabilities.mT.contiguous()


def _fake(qkv: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    batch, tokens, _, heads, size = qkv.shape
    return qkv.new_empty(batch, tokens, heads * size), qkv.new_empty(batch if save else 0, heads, tokens, tokens)


def backward(grad: Tensor, qkv: Tensor, probabilities: Tensor) -> Tensor:
    """Compute the backward op where no compiled kernel is installed."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    grad = grad.unflatten(-1, qkv.shape[3:]).transpose(1, 2)
    probabilities, grad_p = probabilities.mT, grad @ v.mT
    mean = (probabilities * grad_p).sum(-1, keepdim=True)
    grad_s = probabilities * (grad_p - mean) * q.shape[-1] ** -0.5
    gradients = (grad_s @ k, grad_s.mT @ q, probabilities.mT @ grad)
    return torch.stack(gradients).permute(1, 3, 0, 2, 4).contiguous()


def _backward_fake(_grad: Tensor, qkv: Tensor, _probabilities: Tensor) -> Tensor:
    return qkv.new_empty(qkv.shape)


# Autograd, the same for every overload.


def define_overload(overload: str, forward: Any, backward: Any) -> OpOverload:
    """Define `dcvit::attention<overload>` and its backward with the given kernels; the default overload is ""."""
    op = _dispatch.define(f"attention{overload}", _SCHEMA, kernel=forward, fake=_fake)
    op_backward = _dispatch.define(
        f"attention_backward{overload}", _BACKWARD_SCHEMA, kernel=backward, fake=_backward_fake
    )
    _dispatch.register_autograd(op, functools.partial(_autograd, op_backward), _setup_context)
    _dispatch.refuse_double_backward(op_backward)
    _dispatch.count_flops(op, lambda qkv, _save: 2 * _product_flops(qkv))
    _dispatch.count_flops(op_backward, lambda _grad, qkv, _probabilities: 4 * _product_flops(qkv))
    return op


def _product_flops(qkv: list[int]) -> int:
    images, tokens, _, heads, size = qkv
    return 2 * images * heads * tokens * tokens * size


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, _ = inputs
    _, probabilities = output
    ctx.mark_non_differentiable(probabilities)
    ctx.set_materialize_grads(False)  # avoids a zero gradient as large as `probabilities`
    ctx.save_for_backward(qkv, probabilities)


def _autograd(op_backward: OpOverload, ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None]:
    if grad is None:
        return None, None
    return _dispatch.call(op_backward, grad, *ctx.saved_tensors), None


# Implementations, in order of preference. There is none for GPUs, where torch's fused attention is as fast.


def _limit(qkv: Tensor) -> str | None:
    tokens, size = qkv.shape[1], qkv.shape[4]
    if size == 0 or size % HEAD_DIM_MULTIPLE:
        return f"it takes head sizes that are multiples of {HEAD_DIM_MULTIPLE}, and the size is {size}"
    if tokens > 3 * size:
        return (
            f"the probabilities of {tokens} tokens take more memory than qkv; with a head size of {size}, it takes up "
            f"to {3 * size} tokens"
        )
    return _dispatch.no_autocast(qkv)


_OP = define_overload("", forward, backward)

IMPLEMENTATIONS = {"cpp": _dispatch.cpp(_OP, torch.float32, torch.float64, limit=_limit)}
