"""Triton kernels of `dcvit.ops.dropped_mlp`; its schema describes arguments and results.

torch, and thus cuBLAS, computes the matrix products, two forward and four backward. The kernels compute the steps
between them, and read each tensor once. There are M rows (tokens), width D, K kept hidden units and output width E. W1
and W2 stand for their kept parts:

    forward   norm      h = LayerNorm(x)
              (product) u = h W1^T + b1
              gelu      a = GELU(u)
              (product) z = a W2^T
              output    y = x + scale (z + b2)
    backward  (product) da = dy (scale W2)
              hidden    du = da * GELU'(u), its sum over tokens, which is the gradient of b1; a = GELU(u) again
              (product) du^T LayerNorm(x) for w1; dy^T a for w2 and scale; dh = du W1, which is dx without LayerNorm
              norm      dx from dh, and the LayerNorm's own gradients

Sums over tokens are split among programs. Each stores a partial sum, and these are added in a fixed order.
"""

import torch
import triton
import triton.language as tl
from dcvit.kernels import _configs
from dcvit.kernels._interpreter import round_to
from dcvit.kernels._launch import cdiv, on
from torch import Tensor
from torch.nn import functional as F

# Functions that several kernels use.


@triton.jit
def _vector(address, offset, size):
    """Load a part of a vector in float32, with 0 beyond its end."""
    return tl.load(address + offset, offset < size, other=0.0).to(tl.float32)


@triton.jit
def _stats_of(stats, row, rows):
    """Load mean and 1/std of rows, [R, 1] each."""
    address = stats + row.to(tl.int64) * 2
    mean, rstd = tl.load(address, row < rows, other=0.0), tl.load(address + 1, row < rows, other=0.0)
    return mean[:, None], rstd[:, None]


@triton.jit
def _gelu(u):
    return 0.5 * u * (1 + tl.erf(u * 0.7071067811865476))


@triton.jit
def _gelu_slope(u):
    return 0.5 * (1 + tl.erf(u * 0.7071067811865476)) + u * 0.3989422804014327 * tl.exp(-0.5 * u * u)


# Kernels of the forward pass.


@triton.jit
def dropped_mlp_norm_fwd_kernel(
    x, norm_weight, norm_bias, known, stats, h, rows, width, x_m, x_d, eps,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute LayerNorm `h[M, D]`.

    Mean and 1/std of each row are those in `known`, if given. Else they are computed, and stored in `stats[M, 2]` if
    that is given.
    """
    row, column = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_WIDTH)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    start, offset = row.to(tl.int64)[:, None], column.to(tl.int64)[None, :]
    value = tl.load(x + start * x_m + offset * x_d, inside, other=0.0).to(tl.float32)
    if known is not None:
        mean, rstd = _stats_of(known, row, rows)
    else:
        average = tl.sum(value, axis=1) / width
        mean = average[:, None]
        centred = tl.where(inside, value - mean, 0.0)
        std = tl.sqrt_rn(tl.sum(centred * centred, axis=1) / width + eps)
        inverse = tl.div_rn(tl.full((BLOCK_ROWS,), 1.0, tl.float32), std)
        rstd = inverse[:, None]
        if stats is not None:
            tl.store(stats + row.to(tl.int64) * 2, average, row < rows)
            tl.store(stats + row.to(tl.int64) * 2 + 1, inverse, row < rows)
    result = (value - mean) * rstd * _vector(norm_weight, column, width)[None, :]
    if norm_bias is not None:
        result += _vector(norm_bias, column, width)[None, :]
    tl.store(h + start * width + offset, round_to(result, h.dtype.element_ty), inside)


@triton.jit
def dropped_mlp_gelu_fwd_kernel(pre, activation, size, BLOCK: tl.constexpr):
    """Compute the activations a from all u; `activation` and `pre` may share memory."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(pre + offset, offset < size, other=0.0).to(tl.float32)
    tl.store(activation + offset, round_to(_gelu(u), activation.dtype.element_ty), offset < size)


@triton.jit
def dropped_mlp_output_fwd_kernel(
    z, b2, scale, x, y, rows, out, x_m, x_d, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    """Compute the output `y[M, E]`, which may share memory with z. `x` is added if it is given."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside, start, offset = (row < rows)[:, None] & (column < out)[None, :], row.to(tl.int64)[:, None], column[None, :]
    value = tl.load(z + start * out + offset, inside, other=0.0).to(tl.float32)
    if b2 is not None:
        value += _vector(b2, column, out)[None, :]
    if scale is not None:
        value *= _vector(scale, column, out)[None, :]
    if x is not None:
        value += tl.load(x + start * x_m + offset.to(tl.int64) * x_d, inside, other=0.0).to(tl.float32)
    tl.store(y + start * out + offset, round_to(value, y.dtype.element_ty), inside)


# Kernels of the backward pass.


@triton.jit
def dropped_mlp_hidden_bwd_kernel(
    pre, grad, grad_pre, activation, partial, rows, kept, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    """Compute du in `grad_pre`, which may share memory with da in `grad`.

    Also store a in `activation` and the partial sums of du in `partial[P, K]`, if these are given.
    """
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    has_column = (column < kept)[None, :]
    summed = tl.zeros((BLOCK_WIDTH,), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0)):
        row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        inside, offset = (row < rows)[:, None] & has_column, row.to(tl.int64)[:, None] * kept + column[None, :]
        u = tl.load(pre + offset, inside, other=0.0).to(tl.float32)
        slope = tl.load(grad + offset, inside, other=0.0).to(tl.float32) * _gelu_slope(u)
        summed += tl.sum(slope, axis=0)
        tl.store(grad_pre + offset, round_to(slope, grad_pre.dtype.element_ty), inside)
        if activation is not None:
            tl.store(activation + offset, round_to(_gelu(u), activation.dtype.element_ty), inside)
    if partial is not None:
        tl.store(partial + tl.program_id(0) * kept + column, summed, column < kept)


@triton.jit
def dropped_mlp_norm_bwd_kernel(
    grad_h, x, stats, norm_weight, grad, grad_x, partial,
    rows, width, x_m, x_d, grad_m, grad_e,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of the LayerNorm.

    The gradient of x is stored in `grad_x` if that is given, which may be `grad_h`; `grad` is added to it if given.
    Partial sums of the gradients of the norm's weight and bias are stored in `partial[2, programs, D]`.
    """
    column = tl.arange(0, BLOCK_WIDTH)
    has_column, offset = (column < width)[None, :], column.to(tl.int64)[None, :]
    weight = _vector(norm_weight, column, width)[None, :]
    grad_weight, grad_bias = tl.zeros((BLOCK_WIDTH,), tl.float32), tl.zeros((BLOCK_WIDTH,), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0)):
        row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        inside, start = (row < rows)[:, None] & has_column, row.to(tl.int64)[:, None]
        mean, rstd = _stats_of(stats, row, rows)
        value = tl.load(x + start * x_m + offset * x_d, inside, other=0.0).to(tl.float32)
        normalised = tl.where(inside, (value - mean) * rstd, 0.0)
        outer = tl.load(grad_h + start * width + offset, inside, other=0.0).to(tl.float32)
        grad_weight += tl.sum(outer * normalised, axis=0)
        grad_bias += tl.sum(outer, axis=0)
        if grad_x is not None:
            inner = outer * weight
            projection = tl.sum(inner * normalised, axis=1)[:, None] / width
            result = rstd * (inner - tl.sum(inner, axis=1)[:, None] / width - normalised * projection)
            if grad is not None:
                result += tl.load(grad + start * grad_m + offset * grad_e, inside, other=0.0).to(tl.float32)
            tl.store(grad_x + start * width + offset, round_to(result, grad_x.dtype.element_ty), inside)
    partial += tl.program_id(0) * width + column
    tl.store(partial, grad_weight, column < width)
    tl.store(partial + tl.num_programs(0) * width, grad_bias, column < width)


# Launchers.


def dropped_mlp(
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
    """Launch `dcvit::dropped_mlp`."""
    normed = norm_weight is not None
    b2, norm_weight, norm_bias, scale = map(_contiguous, (b2, norm_weight, norm_bias, scale))
    first, second = _kept(w1, idx, 0), _kept(w2, idx, 1)
    stats = x.new_empty(x.shape[0] if save and normed else 0, 2, dtype=torch.float32)
    with on(x):
        h = _layer_norm(x, norm_weight, norm_bias, norm_eps, None, stats if save else None) if normed else x
        pre = F.linear(h, first, None if b1 is None else _kept(b1, idx, 0))
        activation = torch.empty_like(pre) if save else pre
        _gelu_of(pre, activation)
        finish = scale is not None or residual
        y = F.linear(activation, second, None if finish else b2)
        if finish:
            _finish(y, b2, scale, x if residual else None)
    return y, pre if save else pre.new_empty(0, second.shape[1]), stats


def dropped_mlp_backward(
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
    """Launch `dcvit::dropped_mlp_backward`."""
    need_x, need_w1, need_b1, need_w2, need_b2, need_nw, need_nb, need_scale = (
        bool(output_mask >> i & 1) for i in range(8)
    )
    hidden, normed = w1.shape[0], norm_weight is not None
    norm_weight, norm_bias, pre = _contiguous(norm_weight), _contiguous(norm_bias), pre.contiguous()
    second = _kept(w2, idx, 1)
    need_h = need_x or need_nw or need_nb
    # Outputs must not share memory.
    grad_x, grad_w1, grad_b1, grad_w2, grad_b2, grad_nw, grad_nb, grad_scale = (x.new_empty(0) for _ in range(8))
    activation = torch.empty_like(pre) if need_w2 or need_scale else None
    with on(x):
        if need_h or need_w1 or need_b1:
            grad_pre = grad @ (second if scale is None else second * scale[:, None])
            partial = _through_gelu(pre, grad_pre, activation)
        elif activation is not None:
            _gelu_of(pre, activation)
        if need_w1:
            h = _layer_norm(x, norm_weight, norm_bias, 0.0, stats, None) if normed else x
            grad_w1 = _spread(grad_pre.mT @ h, idx, 0, hidden)
            del h
        if need_b1:
            grad_b1 = _spread(partial.sum(0).to(x.dtype), idx, 0, hidden)
        if need_h:
            grad_x = grad_pre @ _kept(w1, idx, 0)
            if normed:
                sums = _through_norm(grad_x, x, stats, norm_weight, grad if residual else None, need_x)
                if need_nw:
                    grad_nw = sums[0].to(x.dtype, copy=True)
                if need_nb:
                    grad_nb = sums[1].to(x.dtype, copy=True)
            elif residual:
                _finish(grad_x, None, None, grad)
            if not need_x:
                grad_x = x.new_empty(0)
        # The gradient of scale is sum_m dy z with z = a W2^T + b2. For each output, this is sum_k G W2 + b2 sum_m dy,
        # where G = dy^T a is the gradient of w2 without the scale.
        if activation is not None:
            outer = grad.mT @ activation
            if need_w2:
                grad_w2 = _spread(outer if scale is None else outer * scale[:, None], idx, 1, hidden)
        if need_b2 or need_scale:
            summed = grad.sum(0, dtype=torch.float32)
        if need_b2:
            grad_b2 = (summed if scale is None else summed * scale).to(x.dtype)
        if need_scale:
            along = (outer.float() * second).sum(1)
            grad_scale = (along if b2 is None else along + b2 * summed).to(x.dtype)
    return grad_x, grad_w1, grad_b1, grad_w2, grad_b2, grad_nw, grad_nb, grad_scale


def _kept(tensor: Tensor, idx: Tensor | None, dim: int) -> Tensor:
    return tensor if idx is None else tensor.index_select(dim, idx)


def _spread(kept: Tensor, idx: Tensor | None, dim: int, hidden: int) -> Tensor:
    """Undo `_kept`, with zeros for what was not kept."""
    if idx is None:
        return kept
    shape = list(kept.shape)
    shape[dim] = hidden
    return kept.new_zeros(shape).index_copy_(dim, idx, kept)


def _layer_norm(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    known: Tensor | None,
    stats: Tensor | None,
) -> Tensor:
    rows, width = x.shape
    h = x.new_empty(x.shape)
    if rows > 0:
        block_rows, block_width = _configs.norm_tile(width)
        dropped_mlp_norm_fwd_kernel[(cdiv(rows, block_rows),)](
            x, norm_weight, norm_bias, known, stats, h, rows, width, *x.stride(), eps,
            BLOCK_ROWS=block_rows, BLOCK_WIDTH=block_width, **_configs.NORM_LAUNCH._asdict(),
        )  # fmt: skip
    return h


def _gelu_of(pre: Tensor, activation: Tensor) -> None:
    """Write GELU of `pre` into `activation`."""
    size = pre.numel()
    if size > 0:
        dropped_mlp_gelu_fwd_kernel[(cdiv(size, _configs.FLAT_TILE),)](
            pre, activation, size, BLOCK=_configs.FLAT_TILE, **_configs.FLAT_LAUNCH._asdict()
        )


def _finish(y: Tensor, b2: Tensor | None, scale: Tensor | None, x: Tensor | None) -> None:
    """Apply bias, scale and residual to `y` in place."""
    rows, out = y.shape
    if rows == 0:
        return
    block_rows, block_width = _configs.token_tile(out)
    dropped_mlp_output_fwd_kernel[(cdiv(rows, block_rows), cdiv(out, block_width))](
        y, b2, scale, x, y, rows, out, *(y if x is None else x).stride(),
        BLOCK_ROWS=block_rows, BLOCK_WIDTH=block_width, **_configs.TOKEN_LAUNCH._asdict(),
    )  # fmt: skip


def _through_gelu(pre: Tensor, grad: Tensor, activation: Tensor | None) -> Tensor:
    """Replace the gradient of the activations by that of the pre-activations; return its partial sums `[P, K]`."""
    rows, kept = pre.shape
    if pre.numel() == 0:
        return pre.new_zeros(1, kept, dtype=torch.float32)
    block_rows, block_width = _configs.token_tile(kept)
    parts, tiles = _configs.column_parts(rows, kept, (block_rows, block_width)), cdiv(kept, block_width)
    partial = pre.new_empty(parts, kept, dtype=torch.float32)
    dropped_mlp_hidden_bwd_kernel[(parts, tiles)](
        pre, grad, grad, activation, partial, rows, kept,
        BLOCK_ROWS=block_rows, BLOCK_WIDTH=block_width, **_configs.TOKEN_LAUNCH._asdict(),
    )  # fmt: skip
    return partial


def _through_norm(
    grad_h: Tensor, x: Tensor, stats: Tensor, norm_weight: Tensor | None, grad: Tensor | None, need_x: bool
) -> Tensor:
    """Replace the gradient of h by that of x, if needed; return those of the norm's weight and bias `[2, D]`."""
    rows, width = x.shape
    if rows == 0:
        return stats.new_zeros(2, width)
    block_rows, block_width = _configs.norm_tile(width)
    parts = min(cdiv(rows, block_rows), _configs.NORM_PROGRAMS)
    partial = stats.new_empty(2, parts, width)
    dropped_mlp_norm_bwd_kernel[(parts,)](
        grad_h, x, stats, norm_weight, grad, grad_h if need_x else None, partial,
        rows, width, *x.stride(), *(x if grad is None else grad).stride(),
        BLOCK_ROWS=block_rows, BLOCK_WIDTH=block_width, **_configs.NORM_LAUNCH._asdict(),
    )  # fmt: skip
    return partial.sum(1)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
