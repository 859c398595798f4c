"""The MLP of a compressed block: d -> kept hidden units -> d.

Source: DC-ViT (arXiv 2403.18708). A compressed block has no attention and keeps a part of its MLP. With the LayerNorm
in front, LayerScale and the residual, this op is the whole block:

    u = LayerNorm(x) W1[idx]^T + b1[idx],   z = GELU(u) W2[:, idx]^T + b2,   y = x + scale * z
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.nn import functional as F

from dcvit.ops import _dispatch
from dcvit.ops._dispatch import Impl


def dropped_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    idx: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    scale: Tensor | None = None,
    residual: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Apply an MLP with exact (erf) GELU, of which only some hidden units are kept.

    Every floating input that requires a gradient gets one. The rows of `w1` and `b1` and the columns of `w2` that are
    not kept get zeros.

    Args:
        x: Tokens, `[..., D]`.
        w1: First layer, `[H, D]`.
        b1: Its bias, `[H]`.
        w2: Second layer, `[E, H]`.
        b2: Its bias, `[E]`.
        idx: The kept hidden units, int64 `[K]`, distinct and in `[0, H)`; `None` keeps all, so K = H.
        norm_weight: Weight of a LayerNorm in front, `[D]`; `None` leaves the LayerNorm out.
        norm_bias: Its bias, `[D]`.
        norm_eps: Its epsilon.
        scale: LayerScale, `[E]`, multiplied with the second layer's output.
        residual: Whether `x` is added to the output, which needs E = D.
        impl: The implementation that runs.

    Returns:
        The output, `[..., E]`, in the dtype of `x`.

    Raises:
        ValueError: If shapes do not fit, or `impl` names an implementation that does not support the call.
        TypeError: If `idx` is not int64.
    """
    _check(x, w1, b1, w2, b2, idx, norm_weight, norm_bias, scale, residual)
    tensors = {
        "x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2,
        "norm_weight": norm_weight, "norm_bias": norm_bias, "scale": scale,
    }  # fmt: skip
    op = _dispatch.select("dropped_mlp", impl, IMPLEMENTATIONS, tensors)
    if op is None:
        return eager(x, w1, b1, w2, b2, idx, norm_weight, norm_bias, norm_eps, scale, residual)
    save = _trains(tensors)
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor
    y, _, _ = _dispatch.call(op, rows, w1, b1, w2, b2, idx, norm_weight, norm_bias, norm_eps, scale, residual, save)
    return y.reshape(*x.shape[:-1], w2.shape[0])


def _trains(tensors: Mapping[str, Tensor | None]) -> bool:
    """Return whether a backward may follow."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors.values())


def _check(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    idx: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    residual: bool,
) -> None:
    if x.dim() < 1 or w1.dim() != 2 or w2.dim() != 2:
        raise ValueError(
            f"dropped_mlp: x is {list(x.shape)}, w1 {list(w1.shape)}, w2 {list(w2.shape)}; "
            "expected [..., D], [H, D] and [E, H]."
        )
    hidden, width = w1.shape
    out = w2.shape[0]
    for name, tensor, shape in (
        ("x", x, (*x.shape[:-1], width)),
        ("b1", b1, (hidden,)),
        ("w2", w2, (out, hidden)),
        ("b2", b2, (out,)),
        ("norm_weight", norm_weight, (width,)),
        ("norm_bias", norm_bias, (width,)),
        ("scale", scale, (out,)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"dropped_mlp: {name} is {list(tensor.shape)}, expected {list(shape)} for w1 {list(w1.shape)} "
                f"and w2 {list(w2.shape)}."
            )
    if idx is not None and idx.dtype != torch.int64:
        raise TypeError(f"dropped_mlp: idx is {idx.dtype}, expected torch.int64; convert it with idx.long().")
    if idx is not None and idx.device != x.device:
        raise ValueError(f"dropped_mlp: idx is on {idx.device}, expected {x.device}, where x is; move it.")
    if idx is not None and idx.dim() != 1:
        raise ValueError(f"dropped_mlp: idx is {list(idx.shape)}, expected [K].")
    if norm_bias is not None and norm_weight is None:
        raise ValueError("dropped_mlp: norm_bias is given without norm_weight; pass both, or neither.")
    if residual and out != width:
        raise ValueError(f"dropped_mlp: residual=True adds x to the output, but they are {width} and {out} wide.")


# Eager: the specification.


def eager(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    idx: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    scale: Tensor | None,
    residual: bool,
) -> Tensor:
    """Compute the op in plain torch."""
    h = x if norm_weight is None else F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, norm_eps)
    z = F.linear(F.gelu(F.linear(h, *_kept(w1, b1, idx))), _kept_columns(w2, idx), b2)
    y = z if scale is None else z * scale
    return x + y if residual else y


def _kept(w1: Tensor, b1: Tensor | None, idx: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return (w1, b1) if idx is None else (w1[idx], None if b1 is None else b1[idx])


def _kept_columns(w2: Tensor, idx: Tensor | None) -> Tensor:
    return w2 if idx is None else w2[:, idx]


# Schema, with the kernels and fakes that go with it. M rows, K kept hidden units.
#
# If `save` is set, the forward returns what its backward needs: the pre-activations u [M, K] in the dtype of x, and, if
# there is a LayerNorm, the rows' mean and 1/std [M, 2] in at least float32. Outputs that are not saved have no rows.
# The backward returns the gradients of _INPUTS. Bit i of `output_mask` requests the i-th; the others have no elements.

_INPUTS = ("x", "w1", "b1", "w2", "b2", "norm_weight", "norm_bias", "scale")

_SCHEMA = (
    "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? idx, Tensor? norm_weight, Tensor? norm_bias, "
    "float norm_eps, Tensor? scale, bool residual, bool save) -> (Tensor y, Tensor pre, Tensor stats)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor x, Tensor w1, Tensor w2, Tensor? b2, Tensor? idx, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor? scale, bool residual, Tensor pre, Tensor stats, int output_mask) -> "
    "(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor norm_weight, Tensor norm_bias, Tensor scale)"
)


def forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    idx: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    scale: Tensor | None,
    residual: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the forward op where no compiled kernel is installed."""
    y = eager(x, w1, b1, w2, b2, idx, norm_weight, norm_bias, norm_eps, scale, residual)
    _, pre, stats = _fake(x, w1, b1, w2, b2, idx, norm_weight, save)
    if save and norm_weight is not None:
        wide = x.to(stats.dtype)
        mean = wide.mean(-1, keepdim=True)
        rstd = ((wide - mean).square().mean(-1, keepdim=True) + norm_eps).rsqrt()
        stats = torch.cat((mean, rstd), dim=-1)
        x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, norm_eps)
    if save:
        pre = F.linear(x, *_kept(w1, b1, idx))
    return y, pre, stats


def _fake(
    x: Tensor,
    w1: Tensor,
    _b1: Tensor | None,
    w2: Tensor,
    _b2: Tensor | None,
    idx: Tensor | None,
    norm_weight: Tensor | None,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    save = others[-1]
    rows, kept = x.shape[0], w1.shape[0] if idx is None else idx.shape[0]
    y = x.new_empty(rows, w2.shape[0])
    pre = x.new_empty(rows if save else 0, kept)
    has_stats = save and norm_weight is not None
    stats = x.new_empty(rows if has_stats else 0, 2, dtype=torch.promote_types(x.dtype, torch.float32))
    return y, pre, stats


def backward(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b2: Tensor | None,
    idx: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    residual: bool,
    pre: Tensor,
    stats: Tensor,
    output_mask: int,
) -> tuple[Tensor, ...]:
    """Compute the backward op where no compiled kernel is installed."""
    dtype = x.dtype
    # Everything is computed in at least float32, in which the compiled kernels accumulate.
    wide = torch.promote_types(dtype, torch.float32)
    hidden = w1.shape[0]
    grad, x, pre = grad.to(wide), x.to(wide), pre.to(wide)
    w1, w2 = _kept(w1, None, idx)[0].to(wide), _kept_columns(w2, idx).to(wide)

    activation = F.gelu(pre)
    grad_z = grad if scale is None else grad * scale
    # GELU(u) = u Phi(u), so GELU'(u) = Phi(u) + u phi(u) with the normal distribution's Phi and density phi.
    density = torch.exp(-0.5 * pre * pre) / math.sqrt(2 * math.pi)
    gelu_slope = 0.5 * (1 + torch.erf(pre * math.sqrt(0.5))) + pre * density
    grad_pre = (grad_z @ w2) * gelu_slope
    grad_h = grad_pre @ w1

    if norm_weight is None:
        normalised = h = x
        grad_x = grad_h
    else:
        mean, rstd = stats[:, :1], stats[:, 1:]
        normalised = (x - mean) * rstd
        h = normalised * norm_weight if norm_bias is None else normalised * norm_weight + norm_bias
        grad_n = grad_h * norm_weight
        projection = normalised * (grad_n * normalised).mean(-1, keepdim=True)
        grad_x = rstd * (grad_n - grad_n.mean(-1, keepdim=True) - projection)

    grad_w1, grad_b1, grad_w2 = grad_pre.T @ h, grad_pre.sum(0), grad_z.T @ activation
    if idx is not None:
        grad_w1 = grad_w1.new_zeros(hidden, w1.shape[1]).index_add(0, idx, grad_w1)
        grad_b1 = grad_b1.new_zeros(hidden).index_add(0, idx, grad_b1)
        grad_w2 = grad_w2.new_zeros(w2.shape[0], hidden).index_add(1, idx, grad_w2)
    z = F.linear(activation, w2, None if b2 is None else b2.to(wide))
    gradients = (
        grad_x + grad if residual else grad_x,
        grad_w1,
        grad_b1,
        grad_w2,
        grad_z.sum(0),
        (grad_h * normalised).sum(0),
        grad_h.sum(0),
        (grad * z).sum(0),
    )
    return tuple(
        gradient.to(dtype) if output_mask >> i & 1 else gradient.new_empty(0, dtype=dtype)
        for i, gradient in enumerate(gradients)
    )


def _backward_fake(_grad: Tensor, x: Tensor, w1: Tensor, w2: Tensor, *others: Any) -> tuple[Tensor, ...]:
    output_mask = others[-1]
    (hidden, width), out = w1.shape, w2.shape[0]
    shapes = (x.shape, w1.shape, (hidden,), w2.shape, (out,), (width,), (width,), (out,))
    return tuple(x.new_empty(shape if output_mask >> i & 1 else (0,)) for i, shape in enumerate(shapes))


# Autograd, the same for every overload.


def define_overload(overload: str, forward: Any, backward: Any) -> OpOverload:
    """Define `dcvit::dropped_mlp<overload>` and its backward with the given kernels; the default overload is ""."""
    op = _dispatch.define(f"dropped_mlp{overload}", _SCHEMA, kernel=forward, fake=_fake)
    op_backward = _dispatch.define(
        f"dropped_mlp_backward{overload}", _BACKWARD_SCHEMA, kernel=backward, fake=_backward_fake
    )
    _dispatch.register_autograd(op, functools.partial(_autograd, op_backward), _setup_context)
    _dispatch.refuse_double_backward(op_backward)
    _dispatch.count_flops(op, _flops)
    _dispatch.count_flops(op_backward, _backward_flops)
    return op


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, w1, _, w2, b2, idx, norm_weight, norm_bias, _, scale, residual, _ = inputs
    _, pre, stats = output
    ctx.mark_non_differentiable(pre, stats)
    ctx.set_materialize_grads(False)  # avoids a zero gradient as large as `pre`
    ctx.save_for_backward(x, w1, w2, b2, idx, norm_weight, norm_bias, scale, pre, stats)
    ctx.residual = residual


def _autograd(op_backward: OpOverload, ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * len(ctx.needs_input_grad)
    x, w1, w2, b2, idx, norm_weight, norm_bias, scale, pre, stats = ctx.saved_tensors
    need_x, need_w1, need_b1, need_w2, need_b2, _, need_nw, need_nb, _, need_scale, *_ = ctx.needs_input_grad
    needed = (need_x, need_w1, need_b1, need_w2, need_b2, need_nw, need_nb, need_scale)
    output_mask = sum(1 << i for i, need in enumerate(needed) if need)
    gradients = _dispatch.call(
        op_backward, grad, x, w1, w2, b2, idx, norm_weight, norm_bias, scale, ctx.residual, pre, stats, output_mask
    )
    of = {name: g if need else None for name, g, need in zip(_INPUTS, gradients, needed, strict=True)}
    return (
        of["x"], of["w1"], of["b1"], of["w2"], of["b2"], None,
        of["norm_weight"], of["norm_bias"], None, of["scale"], None, None,
    )  # fmt: skip


# What torch's FlopCounterMode counts where the op itself is called; it knows products alone, as of torch's own ops.


def _flops(x: list[int], w1: list[int], _b1: object, w2: list[int], _b2: object, idx: list[int] | None, *_: Any) -> int:
    kept = w1[0] if idx is None else idx[0]
    return 2 * x[0] * kept * (w1[1] + w2[0])


def _backward_flops(
    _grad: object, x: list[int], w1: list[int], w2: list[int], _b2: object, idx: list[int] | None, *others: Any
) -> int:
    output_mask = others[-1]
    kept, width, out = w1[0] if idx is None else idx[0], w1[1], w2[0]
    needs = {name: bool(output_mask >> i & 1) for i, name in enumerate(_INPUTS)}
    before = any(needs[name] for name in ("x", "w1", "b1", "norm_weight", "norm_bias"))
    into_norm = any(needs[name] for name in ("x", "norm_weight", "norm_bias"))
    products = out * (before + needs["w2"] + needs["scale"]) + width * (into_norm + needs["w1"])
    return 2 * x[0] * kept * products


# Implementations, in order of preference.

_HALF = (torch.float16, torch.bfloat16)
_OP = define_overload("", forward, backward)
_OP_TRITON = define_overload(
    ".triton",
    _dispatch.launcher("dropped_mlp", "dropped_mlp"),
    _dispatch.launcher("dropped_mlp", "dropped_mlp_backward"),
)

IMPLEMENTATIONS = {
    "cpp": _dispatch.cpp(_OP, torch.float32, torch.float64, *_HALF, limit=_dispatch.no_autocast),
    # In inference, torch's own kernels around cuBLAS's products are as few and as fast.
    "cuda": _dispatch.cuda(_OP, torch.float32, *_HALF, limit=_dispatch.no_autocast, gains=_trains),
    # Its launches cost more than they save, except where the products take longer than everything else.
    "triton": _dispatch.triton(_OP_TRITON, torch.float32, *_HALF, limit=_dispatch.no_autocast, gains=lambda _: False),
}
