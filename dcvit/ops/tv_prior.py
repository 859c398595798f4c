"""The image prior of the synthesis: total variation and an L2 term.

Source: DC-ViT (arXiv 2403.18708), after DeepInversion (arXiv 1912.08795):

    R(x) = tv_weight * sum_d ||D_d x||_2^beta + l2_weight * mean_b ||x_b||_2

where D_d are the differences to the right, lower and two lower diagonal neighbours, over the whole batch.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from dcvit.ops import _dispatch
from dcvit.ops._dispatch import Impl


def tv_prior(
    images: Tensor, *, beta: float, tv_weight: float = 1e-4, l2_weight: float = 1e-5, impl: Impl = "auto"
) -> Tensor:
    """Return the value of the prior.

    A norm of zero contributes a gradient of zero, although ||.||^beta has none there. The prior of no images is NaN,
    like any mean in torch.

    Args:
        images: The images, `[B, C, H, W]`.
        beta: Exponent of the four difference norms, positive; 0.6 for ViT, 1 for DeiT and Swin in the paper.
        tv_weight: Weight of the total variation.
        l2_weight: Weight of the images' mean 2-norm.
        impl: The implementation that runs.

    Returns:
        The value, `[]`, in float32 for half precision and the dtype of `images` otherwise.

    Raises:
        ValueError: If `images` is not four-dimensional, `beta` is not positive, or `impl` names an implementation that
            does not support the call.
        RuntimeError: If an implementation other than eager is differentiated twice.
    """
    check("tv_prior", images, beta)
    op = _dispatch.select("tv_prior", impl, IMPLEMENTATIONS, {"images": images})
    if op is None:
        return eager(images, beta, tv_weight, l2_weight)
    value: Tensor
    value, _, _ = _dispatch.call(op, images, beta, tv_weight, l2_weight)
    return value


def check(name: str, images: Tensor, beta: float) -> None:
    """Refuse inputs that have no prior; `name` is the called function, for messages."""
    if images.dim() != 4:
        raise ValueError(f"{name}: images is {list(images.shape)}, expected [B, C, H, W].")
    if not beta > 0:
        raise ValueError(f"{name}: beta={beta}, expected a positive exponent, such as 0.6 for ViT or 1 for DeiT.")


# Eager: the specification.


def eager(images: Tensor, beta: float, tv_weight: float, l2_weight: float) -> Tensor:
    """Compute the prior in plain torch."""
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    norms = torch.stack([torch.linalg.vector_norm(difference) for difference in _differences(images)])
    image_norms = torch.linalg.vector_norm(images, dim=(1, 2, 3))
    value: Tensor = tv_weight * _power(norms, beta).sum() + l2_weight * image_norms.mean()
    return value


def _differences(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x[..., :, 1:] - x[..., :, :-1],
        x[..., 1:, :] - x[..., :-1, :],
        x[..., 1:, 1:] - x[..., :-1, :-1],
        x[..., 1:, :-1] - x[..., :-1, 1:],
    )


def _power(norms: Tensor, beta: float) -> Tensor:
    # 0^beta has an infinite slope for beta < 1. The outer mask selects the value, and the inner one prevents
    # 0 * inf = NaN in the gradient.
    positive = norms > 0
    return torch.where(positive, torch.where(positive, norms, 1.0) ** beta, 0.0)


# Schema, with the kernels and fakes that go with it.
#
# The forward also returns the norms that its gradient divides by, in the dtype of the value: those of the four
# differences, in the order of `_differences`, [4], and those of the images, [B].

_SCHEMA = (
    "(Tensor images, float beta, float tv_weight, float l2_weight) -> (Tensor value, Tensor norms, Tensor image_norms)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor images, Tensor norms, Tensor image_norms, float beta, float tv_weight, float l2_weight) "
    "-> Tensor"
)


def forward(images: Tensor, beta: float, tv_weight: float, l2_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the forward op where no compiled kernel is installed."""
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    norms = torch.stack([torch.linalg.vector_norm(difference) for difference in _differences(wide)])
    return eager(images, beta, tv_weight, l2_weight), norms, torch.linalg.vector_norm(wide, dim=(1, 2, 3))


def _fake(images: Tensor, beta: float, tv_weight: float, l2_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(images.dtype, torch.float32)
    return (
        images.new_empty((), dtype=dtype),
        images.new_empty(4, dtype=dtype),
        images.new_empty(images.shape[0], dtype=dtype),
    )


def backward(
    grad: Tensor,
    images: Tensor,
    norms: Tensor,
    image_norms: Tensor,
    beta: float,
    tv_weight: float,
    l2_weight: float,
) -> Tensor:
    """Compute the backward op where no compiled kernel is installed."""
    x = images.to(norms.dtype)
    # d||v||^beta / dv = beta ||v||^(beta - 2) v and d||v|| / dv = v / ||v||.
    slopes = torch.where(norms > 0, tv_weight * beta * norms ** (beta - 2), 0.0)
    slopes_l2 = torch.where(image_norms > 0, l2_weight / (image_norms * len(image_norms)), 0.0)
    gradient = slopes_l2[:, None, None, None] * x
    right, down, diagonal, antidiagonal = (s * d for s, d in zip(slopes, _differences(x), strict=True))
    gradient[..., :, 1:] += right
    gradient[..., :, :-1] -= right
    gradient[..., 1:, :] += down
    gradient[..., :-1, :] -= down
    gradient[..., 1:, 1:] += diagonal
    gradient[..., :-1, :-1] -= diagonal
    gradient[..., 1:, :-1] += antidiagonal
    gradient[..., :-1, 1:] -= antidiagonal
    return (grad * gradient).to(images.dtype)


def _backward_fake(grad: Tensor, images: Tensor, *_: Any) -> Tensor:
    return images.new_empty(images.shape)


# Autograd, the same for every overload.


def define_overload(overload: str, forward: Any, backward: Any) -> OpOverload:
    """Define `dcvit::tv_prior<overload>` and its backward with the given kernels; the default overload is ""."""
    op = _dispatch.define(f"tv_prior{overload}", _SCHEMA, kernel=forward, fake=_fake)
    op_backward = _dispatch.define(
        f"tv_prior_backward{overload}", _BACKWARD_SCHEMA, kernel=backward, fake=_backward_fake
    )
    _dispatch.register_autograd(op, functools.partial(_autograd, op_backward), _setup_context)
    _dispatch.refuse_double_backward(op_backward)
    return op


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    images, *ctx.settings = inputs
    _, norms, image_norms = output
    ctx.mark_non_differentiable(norms, image_norms)
    ctx.save_for_backward(images, norms, image_norms)


def _autograd(op_backward: OpOverload, ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return _dispatch.call(op_backward, grad, *ctx.saved_tensors, *ctx.settings), None, None, None


# Implementations, in order of preference.

_OP = define_overload("", forward, backward)
_OP_TRITON = define_overload(
    ".triton", _dispatch.launcher("tv_prior", "tv_prior"), _dispatch.launcher("tv_prior", "tv_prior_backward")
)

IMPLEMENTATIONS = {
    "cpp": _dispatch.cpp(_OP, torch.float32, torch.float64),
    "cuda": _dispatch.cuda(_OP, torch.float32),
    "triton": _dispatch.triton(_OP_TRITON, torch.float32),
}
