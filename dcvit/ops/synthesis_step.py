"""One step of the synthesis: the gradient of the prior, Adam, and a clip to the valid pixel range.

Source: DC-ViT (arXiv 2403.18708); Adam as in Kingma and Ba (arXiv 1412.6980), algorithm 1, with the bias corrections
applied as `torch.optim.Adam` does.
"""

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from dcvit.ops import _dispatch
from dcvit.ops._dispatch import Impl
from dcvit.ops.tv_prior import backward as prior_backward
from dcvit.ops.tv_prior import check as check_prior
from dcvit.ops.tv_prior import eager as prior_eager
from dcvit.ops.tv_prior import forward as prior_forward


@torch.no_grad()
def synthesis_step(
    images: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.5, 0.9),
    eps: float = 1e-8,
    beta: float,
    tv_weight: float = 1e-4,
    l2_weight: float = 1e-5,
    low: Tensor,
    high: Tensor,
    impl: Impl = "auto",
) -> Tensor:
    """Update images in place by one step against the gradient of the network's loss plus the prior.

    Args:
        images: The images, `[B, C, H, W]`, float32 or float64; updated in place.
        grad: Gradient of the network's loss with respect to `images`, `[B, C, H, W]`.
        exp_avg: Adam's first moment, `[B, C, H, W]`; updated in place.
        exp_avg_sq: Adam's second moment, `[B, C, H, W]`; updated in place.
        step: Number of this step, from 1.
        lr: Learning rate.
        betas: Decay rates of the moments.
        eps: Term added to the root of the second moment.
        beta: Exponent of the prior's difference norms; see `tv_prior`.
        tv_weight: Weight of the total variation.
        l2_weight: Weight of the images' mean 2-norm.
        low: Lowest valid value of each channel, `[C]`.
        high: Highest valid value of each channel, `[C]`.
        impl: The implementation that runs.

    Returns:
        The value of the prior before the step, `[]`.

    Raises:
        ValueError: If shapes do not fit, a setting is out of range, or `impl` names an implementation that does
            not support the call.
        TypeError: If a tensor is in half precision, in which `exp_avg_sq` would underflow.
    """
    check_prior("synthesis_step", images, beta)
    tensors = {
        "images": images, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "low": low, "high": high,
    }  # fmt: skip
    for name, tensor in tensors.items():
        expected = images.shape[1:2] if name in ("low", "high") else images.shape
        if tensor.shape != expected:
            raise ValueError(
                f"synthesis_step: {name} is {list(tensor.shape)}, expected {list(expected)} for images "
                f"{list(images.shape)}."
            )
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"synthesis_step: {name} is {tensor.dtype}; convert it to torch.float32.")
    if step < 1:
        raise ValueError(f"synthesis_step: step={step}, expected the number of the step, from 1.")
    if not all(0 <= decay < 1 for decay in betas):
        raise ValueError(f"synthesis_step: betas={betas}, expected two decays in [0, 1).")

    op = _dispatch.select("synthesis_step", impl, IMPLEMENTATIONS, tensors)
    run = eager if op is None else op
    settings = (step, lr, *betas, eps, beta, tv_weight, l2_weight, low, high)
    value: Tensor = run(images, grad, exp_avg, exp_avg_sq, *settings)
    if op is not None:
        # A compiled kernel writes through pointers, so autograd would not notice that saved tensors have changed.
        torch.autograd.graph.increment_version((images, exp_avg, exp_avg_sq))
    return value


# Eager: the specification.


def eager(
    images: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    beta: float,
    tv_weight: float,
    l2_weight: float,
    low: Tensor,
    high: Tensor,
) -> Tensor:
    """Compute the step in plain torch, with the prior's gradient from autograd."""
    prior: Tensor
    prior_grad, prior = torch.func.grad_and_value(prior_eager)(images, beta, tv_weight, l2_weight)
    _adam(images, grad + prior_grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps)
    images.clamp_(low[:, None, None], high[:, None, None])
    return prior


def _adam(
    parameter: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = (exp_avg_sq / (1 - beta2**step)).sqrt()
    parameter.addcdiv_(exp_avg, root + eps, value=-lr / (1 - beta1**step))


# Schema, with the kernel and fake that go with it. The op has no derivative, because it is an optimiser step.

_SCHEMA = (
    "(Tensor(a!) images, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, int step, float lr, float beta1, "
    "float beta2, float eps, float beta, float tv_weight, float l2_weight, Tensor low, Tensor high) -> Tensor"
)


def forward(
    images: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    beta: float,
    tv_weight: float,
    l2_weight: float,
    low: Tensor,
    high: Tensor,
) -> Tensor:
    """Compute the op where no compiled kernel is installed."""
    prior, norms, image_norms = prior_forward(images, beta, tv_weight, l2_weight)
    one = torch.ones_like(prior)
    prior_grad = prior_backward(one, images, norms, image_norms, beta, tv_weight, l2_weight)
    _adam(images, grad + prior_grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps)
    images.clamp_(low[:, None, None], high[:, None, None])
    return prior


def _fake(images: Tensor, *_: Any) -> Tensor:
    return images.new_empty(())


def define_overload(overload: str, forward: Any) -> OpOverload:
    """Define `dcvit::synthesis_step<overload>` with the given kernel; the default overload is ""."""
    return _dispatch.define(f"synthesis_step{overload}", _SCHEMA, kernel=forward, fake=_fake)


# Implementations, in order of preference.

_OP = define_overload("", forward)
_OP_TRITON = define_overload(".triton", _dispatch.launcher("synthesis_step", "synthesis_step"))

IMPLEMENTATIONS = {
    "cpp": _dispatch.cpp(_OP, torch.float32, torch.float64),
    "cuda": _dispatch.cuda(_OP, torch.float32),
    "triton": _dispatch.triton(_OP_TRITON, torch.float32),
}
