"""Triton kernels of `dcvit.ops.dropped_mlp`; the schema there says what arguments and results are.

Two matrix products forward, four backward, each with what stands around it fused. Rows of `w1` and columns of `w2` are
gathered while their tiles are loaded. M rows (tokens), D wide, K kept nodes of H, E wide output:

    forward   stats     mean and 1/std of each row
              hidden    u = LayerNorm(x) W1[idx]^T + b1[idx]; a = GELU(u)            LayerNorm on load
              output    y = x + scale (a W2[:, idx]^T + b2)
    backward  hidden    du = (scale dy) W2[:, idx] * GELU'(u); a = GELU(u) again
              input     dh = du W1[idx], which is dx without LayerNorm
              norm      dx from dh, and the LayerNorm's own gradients
              weight    du^T LayerNorm(x) for w1 and b1; dy^T a for w2, b2 and scale

Sums over tokens are split among programs that each leave a partial result; a small kernel adds those in a fixed order.
Vectors of a width are made contiguous, which copies only where someone passes a strided one; matrices never are.
"""

import torch
import triton
import triton.language as tl
from dcvit.kernels import _configs
from dcvit.kernels._interpreter import dot, round_to
from dcvit.kernels._launch import cdiv, on
from torch import Tensor

# Shared by the kernels.


@triton.jit
def _tile_of(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column tile of a program: GROUP row tiles share a column tile before the next column comes."""
    group = program // (GROUP * tiles_n)
    first = group * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    within = program % (GROUP * tiles_n)
    return first + within % size, within // size


@triton.jit
def _kept(idx, node, kept):
    """Which hidden nodes the kept ones are, in 64 bits."""
    hidden = node.to(tl.int64) if idx is None else tl.load(idx + node, node < kept, other=0)
    return hidden  # noqa: RET504 - a return cannot hold a choice that is made when the kernel is compiled


@triton.jit
def _vector(address, offset, size):
    """A part of a vector in float32, 0 beyond its end."""
    return tl.load(address + offset, offset < size, other=0.0).to(tl.float32)


@triton.jit
def _stats_of(stats, row, rows):
    """Mean and 1/std of rows, [R, 1] each."""
    address = stats + row.to(tl.int64) * 2
    mean, rstd = tl.load(address, row < rows, other=0.0), tl.load(address + 1, row < rows, other=0.0)
    return mean[:, None], rstd[:, None]


@triton.jit
def _gelu(u):
    return 0.5 * u * (1 + tl.erf(u * 0.7071067811865476))


@triton.jit
def _gelu_slope(u):
    return 0.5 * (1 + tl.erf(u * 0.7071067811865476)) + u * 0.3989422804014327 * tl.exp(-0.5 * u * u)


# Forward.


@triton.jit
def dropped_mlp_stats_fwd_kernel(
    x, stats, rows, width, x_m, x_d, eps,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Mean and 1/std of each row, `stats[M, 2]`."""
    row, column = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_WIDTH)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    offset = row.to(tl.int64)[:, None] * x_m + column.to(tl.int64)[None, :] * x_d
    value = tl.load(x + offset, inside, other=0.0).to(tl.float32)
    mean = tl.sum(value, axis=1) / width
    centred = tl.where(inside, value - mean[:, None], 0.0)
    std = tl.sqrt_rn(tl.sum(centred * centred, axis=1) / width + eps)
    tl.store(stats + row.to(tl.int64) * 2, mean, row < rows)
    tl.store(stats + row.to(tl.int64) * 2 + 1, tl.div_rn(tl.full((BLOCK_ROWS,), 1.0, tl.float32), std), row < rows)


@triton.jit
def dropped_mlp_hidden_fwd_kernel(
    x, stats, norm_weight, norm_bias, w1, b1, idx, pre, activation,
    rows, kept, width, x_m, x_d, w1_h, w1_d,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`activation` a, and u as `pre` if it is to be saved, `[M, K]`."""
    tile_m, tile_n = _tile_of(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(kept, COLUMNS), GROUP)
    row, node = tile_m * ROWS + tl.arange(0, ROWS), tile_n * COLUMNS + tl.arange(0, COLUMNS)
    hidden = _kept(idx, node, kept)
    has_row, has_node = (row < rows)[:, None], (node < kept)[None, :]
    x += row.to(tl.int64)[:, None] * x_m
    w1 += hidden[None, :] * w1_h
    if stats is not None:
        mean, rstd = _stats_of(stats, row, rows)
    u = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, width, DEPTH):
        column = start + tl.arange(0, DEPTH)
        has_column, offset = column < width, column.to(tl.int64)
        h = tl.load(x + offset[None, :] * x_d, has_row & has_column[None, :], other=0.0)
        if stats is not None:
            wide = (h.to(tl.float32) - mean) * rstd * _vector(norm_weight, column, width)[None, :]
            if norm_bias is not None:
                wide += _vector(norm_bias, column, width)[None, :]
            h = round_to(wide, x.dtype.element_ty)
        weight = tl.load(w1 + offset[:, None] * w1_d, has_column[:, None] & has_node, other=0.0)
        u = dot(h, weight, u)
    if b1 is not None:
        u += tl.load(b1 + hidden, node < kept, other=0.0).to(tl.float32)[None, :]
    offset = row.to(tl.int64)[:, None] * kept + node[None, :]
    dtype = activation.dtype.element_ty
    if pre is not None:
        tl.store(pre + offset, round_to(u, dtype), has_row & has_node)
    tl.store(activation + offset, round_to(_gelu(u), dtype), has_row & has_node)


@triton.jit
def dropped_mlp_output_fwd_kernel(
    activation, w2, b2, idx, scale, x, y,
    rows, out, kept, w2_e, w2_h, x_m, x_d,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The output `[M, E]`; `x` is given if it is added."""
    tile_m, tile_n = _tile_of(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(out, COLUMNS), GROUP)
    row, column = tile_m * ROWS + tl.arange(0, ROWS), tile_n * COLUMNS + tl.arange(0, COLUMNS)
    has_row, has_column = (row < rows)[:, None], (column < out)[None, :]
    activation += row.to(tl.int64)[:, None] * kept
    w2 += column.to(tl.int64)[None, :] * w2_e
    z = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, kept, DEPTH):
        node = start + tl.arange(0, DEPTH)
        has_node = node < kept
        a = tl.load(activation + node[None, :], has_row & has_node[None, :], other=0.0)
        hidden = _kept(idx, node, kept)
        weight = tl.load(w2 + hidden[:, None] * w2_h, has_node[:, None] & has_column, other=0.0)
        z = dot(a, weight, z)
    if b2 is not None:
        z += _vector(b2, column, out)[None, :]
    if scale is not None:
        z *= _vector(scale, column, out)[None, :]
    if x is not None:
        offset = row.to(tl.int64)[:, None] * x_m + column.to(tl.int64)[None, :] * x_d
        z += tl.load(x + offset, has_row & has_column, other=0.0).to(tl.float32)
    offset = row.to(tl.int64)[:, None] * out + column[None, :]
    tl.store(y + offset, round_to(z, y.dtype.element_ty), has_row & has_column)


# Backward.


@triton.jit
def dropped_mlp_hidden_bwd_kernel(
    grad, scale, w2, idx, pre, grad_pre, activation,
    rows, kept, out, grad_m, grad_e, w2_e, w2_h,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`grad_pre` du, and `activation` a if a weight gradient needs it, `[M, K]`."""
    tile_m, tile_n = _tile_of(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(kept, COLUMNS), GROUP)
    row, node = tile_m * ROWS + tl.arange(0, ROWS), tile_n * COLUMNS + tl.arange(0, COLUMNS)
    has_row, has_node = (row < rows)[:, None], (node < kept)[None, :]
    dtype = grad_pre.dtype.element_ty
    grad += row.to(tl.int64)[:, None] * grad_m
    w2 += _kept(idx, node, kept)[None, :] * w2_h
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, out, DEPTH):
        column = start + tl.arange(0, DEPTH)
        has_column, offset = column < out, column.to(tl.int64)
        value = tl.load(grad + offset[None, :] * grad_e, has_row & has_column[None, :], other=0.0)
        if scale is not None:
            value = round_to(value.to(tl.float32) * _vector(scale, column, out)[None, :], dtype)
        weight = tl.load(w2 + offset[:, None] * w2_e, has_column[:, None] & has_node, other=0.0)
        total = dot(value, weight, total)
    offset = row.to(tl.int64)[:, None] * kept + node[None, :]
    u = tl.load(pre + offset, has_row & has_node, other=0.0).to(tl.float32)
    tl.store(grad_pre + offset, round_to(total * _gelu_slope(u), dtype), has_row & has_node)
    if activation is not None:
        tl.store(activation + offset, round_to(_gelu(u), dtype), has_row & has_node)


@triton.jit
def dropped_mlp_input_bwd_kernel(
    grad_pre, w1, idx, grad, grad_h,
    rows, width, kept, w1_h, w1_d, grad_m, grad_e,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The gradient of what the first layer sees, `[M, D]`; `grad` is given if it is added here."""
    tile_m, tile_n = _tile_of(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(width, COLUMNS), GROUP)
    row, column = tile_m * ROWS + tl.arange(0, ROWS), tile_n * COLUMNS + tl.arange(0, COLUMNS)
    has_row, has_column = (row < rows)[:, None], (column < width)[None, :]
    grad_pre += row.to(tl.int64)[:, None] * kept
    w1 += column.to(tl.int64)[None, :] * w1_d
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, kept, DEPTH):
        node = start + tl.arange(0, DEPTH)
        has_node = node < kept
        value = tl.load(grad_pre + node[None, :], has_row & has_node[None, :], other=0.0)
        hidden = _kept(idx, node, kept)
        weight = tl.load(w1 + hidden[:, None] * w1_h, has_node[:, None] & has_column, other=0.0)
        total = dot(value, weight, total)
    if grad is not None:
        offset = row.to(tl.int64)[:, None] * grad_m + column.to(tl.int64)[None, :] * grad_e
        total += tl.load(grad + offset, has_row & has_column, other=0.0).to(tl.float32)
    offset = row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(grad_h + offset, round_to(total, grad_h.dtype.element_ty), has_row & has_column)


@triton.jit
def dropped_mlp_norm_bwd_kernel(
    grad_h, x, stats, norm_weight, grad, grad_x, partial,
    rows, width, x_m, x_d, grad_m, grad_e,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradient of x if `grad_x` is given, with `grad` added if that is; `partial[2, programs, D]` for the norm."""
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


@triton.jit
def _sum_of_parts(partial, total, parts, width, BLOCK_PARTS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    column = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    sums = tl.zeros((BLOCK_PARTS, BLOCK_WIDTH), tl.float32)
    for start in range(0, parts, BLOCK_PARTS):
        part = (start + tl.arange(0, BLOCK_PARTS))[:, None]
        inside = (part < parts) & (column < width)[None, :]
        sums += tl.load(partial + part * width + column[None, :], inside, other=0.0)
    tl.store(total + column, round_to(tl.sum(sums, axis=0), total.dtype.element_ty), column < width)


@triton.jit
def dropped_mlp_columns_bwd_kernel(
    partial, grad_weight, grad_bias, parts, width, BLOCK_PARTS: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    """The gradients of the norm's weight and bias `[D]`, where given: `partial[2, P, D]` summed over P, in order."""
    if grad_weight is not None:
        _sum_of_parts(partial, grad_weight, parts, width, BLOCK_PARTS, BLOCK_WIDTH)
    if grad_bias is not None:
        _sum_of_parts(partial + parts * width, grad_bias, parts, width, BLOCK_PARTS, BLOCK_WIDTH)


@triton.jit
def dropped_mlp_weight_bwd_kernel(
    left, right, stats, norm_weight, norm_bias, partial, sums,
    rows, chunk, left_width, right_width, left_m, left_i, right_m, right_j,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """left^T right over `chunk` rows, `partial[S, I, J]`, and left's columns' sums, `sums[S, I]`.

    With `stats`, the LayerNorm of `right` takes its place.
    """
    tiles_j = tl.maximum(tl.cdiv(right_width, COLUMNS), 1)
    tile_i, tile_j = _tile_of(tl.program_id(0), tl.cdiv(left_width, ROWS), tiles_j, GROUP)
    i, j = tile_i * ROWS + tl.arange(0, ROWS), tile_j * COLUMNS + tl.arange(0, COLUMNS)
    has_i, has_j = (i < left_width)[None, :], (j < right_width)[None, :]
    left += i.to(tl.int64)[None, :] * left_i
    right += j.to(tl.int64)[None, :] * right_j
    if stats is not None:
        gamma = _vector(norm_weight, j, right_width)[None, :]
        if norm_bias is not None:
            beta = _vector(norm_bias, j, right_width)[None, :]
    split = tl.program_id(1)
    stop = tl.minimum(rows, (split + 1) * chunk)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    summed = tl.zeros((ROWS,), tl.float32)
    for start in range(split * chunk, stop, DEPTH):
        row = start + tl.arange(0, DEPTH)
        has_row, offset = (row < stop)[:, None], row.to(tl.int64)[:, None]
        a = tl.load(left + offset * left_m, has_row & has_i, other=0.0)
        b = tl.load(right + offset * right_m, has_row & has_j, other=0.0)
        if stats is not None:
            mean, rstd = _stats_of(stats, row, stop)
            wide = (b.to(tl.float32) - mean) * rstd * gamma
            if norm_bias is not None:
                wide += beta
            b = round_to(wide, right.dtype.element_ty)
        total = dot(tl.trans(a), b, total)
        summed += tl.sum(a.to(tl.float32), axis=0)
    address = partial + (split.to(tl.int64) * left_width + i[:, None]) * right_width + j[None, :]
    tl.store(address, total, (i < left_width)[:, None] & has_j)
    if tile_j == 0:
        tl.store(sums + split * left_width + i, summed, i < left_width)


@triton.jit
def dropped_mlp_w1_bwd_kernel(
    partial, sums, idx, grad_w1, grad_b1, splits, kept, width,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Sums over the splits, into the kept rows of `grad_w1` `[H, D]` and `grad_b1` `[H]`, where given."""
    node = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    hidden = _kept(idx, node, kept)
    if grad_w1 is not None:
        column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
        inside = (node < kept)[:, None] & (column < width)[None, :]
        total = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
        for split in range(splits):
            start = tl.cast(split, tl.int64) * kept
            total += tl.load(partial + (start + node)[:, None] * width + column[None, :], inside, other=0.0)
        address = grad_w1 + hidden[:, None] * width + column[None, :]
        tl.store(address, round_to(total, grad_w1.dtype.element_ty), inside)
    if grad_b1 is not None and tl.program_id(1) == 0:
        bias = tl.zeros((BLOCK_ROWS,), tl.float32)
        for split in range(splits):
            bias += tl.load(sums + split * kept + node, node < kept, other=0.0)
        tl.store(grad_b1 + hidden, round_to(bias, grad_b1.dtype.element_ty), node < kept)


@triton.jit
def dropped_mlp_w2_bwd_kernel(
    partial, sums, idx, scale, w2, b2, grad_w2, grad_b2, grad_scale,
    splits, out, kept, hidden_width, w2_e, w2_h,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradients of w2 `[E, H]`, b2 `[E]` and scale `[E]`, where given, from G = dy^T a and the sum of dy.

    The gradient of scale is sum_m dy z with z = a W2^T + b2, which is sum_k G W2 + b2 sum_m dy for each output.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    has_row, start = (row < out)[:, None], row.to(tl.int64)[:, None]
    summed = tl.zeros((BLOCK_ROWS,), tl.float32)
    for split in range(splits):
        summed += tl.load(sums + split * out + row, row < out, other=0.0)
    factor = tl.full((BLOCK_ROWS,), 1.0, tl.float32)
    if scale is not None:
        factor = _vector(scale, row, out)
    if grad_b2 is not None:
        tl.store(grad_b2 + row, round_to(factor * summed, grad_b2.dtype.element_ty), row < out)
    along = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
    for first in range(0, kept, BLOCK_WIDTH):
        node = first + tl.arange(0, BLOCK_WIDTH)
        hidden = _kept(idx, node, kept)[None, :]
        inside = has_row & (node < kept)[None, :]
        total = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
        for split in range(splits):
            address = partial + (tl.cast(split, tl.int64) * out + start) * kept + node[None, :]
            total += tl.load(address, inside, other=0.0)
        if grad_w2 is not None:
            address = grad_w2 + start * hidden_width + hidden
            tl.store(address, round_to(factor[:, None] * total, grad_w2.dtype.element_ty), inside)
        if grad_scale is not None:
            weight = tl.load(w2 + start * w2_e + hidden * w2_h, inside, other=0.0).to(tl.float32)
            along += total * weight
    if grad_scale is not None:
        result = tl.sum(along, axis=1)
        if b2 is not None:
            result += _vector(b2, row, out) * summed
        tl.store(grad_scale + row, round_to(result, grad_scale.dtype.element_ty), row < out)


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
    (rows, width), (out, hidden) = x.shape, w2.shape
    kept = hidden if idx is None else len(idx)
    b1, b2, idx, norm_weight, norm_bias, scale = map(_contiguous, (b1, b2, idx, norm_weight, norm_bias, scale))
    y, activation, pre = x.new_empty(rows, out), x.new_empty(rows, kept), x.new_empty(rows if save else 0, kept)
    stats = x.new_empty(rows if norm_weight is not None else 0, 2, dtype=torch.float32)
    if rows > 0:
        with on(x):
            if norm_weight is not None:
                block_rows, block_width = _configs.norm_tile(width)
                dropped_mlp_stats_fwd_kernel[(cdiv(rows, block_rows),)](
                    x, stats, rows, width, *x.stride(), norm_eps,
                    BLOCK_ROWS=block_rows, BLOCK_WIDTH=block_width, **_configs.NORM_LAUNCH._asdict(),
                )  # fmt: skip
            if kept > 0:
                programs, options = _product(x.dtype, rows, kept, width)
                dropped_mlp_hidden_fwd_kernel[programs](
                    x, None if norm_weight is None else stats, norm_weight, norm_bias, w1, b1, idx,
                    pre if save else None, activation, rows, kept, width, *x.stride(), *w1.stride(), **options,
                )  # fmt: skip
            programs, options = _product(x.dtype, rows, out, kept)
            dropped_mlp_output_fwd_kernel[programs](
                activation, w2, b2, idx, scale, x if residual else None, y,
                rows, out, kept, *w2.stride(), *x.stride(), **options,
            )  # fmt: skip
    return y, pre, stats if save else stats.new_empty(0, 2)


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
    (rows, width), (out, hidden) = x.shape, w2.shape
    kept = hidden if idx is None else len(idx)
    b2, idx, norm_weight, norm_bias, scale = map(_contiguous, (b2, idx, norm_weight, norm_bias, scale))
    need_x, need_w1, need_b1, need_w2, need_b2, need_nw, need_nb, need_scale = (
        bool(output_mask >> i & 1) for i in range(8)
    )
    normed = norm_weight is not None
    # What no kernel reaches stays zero: dropped nodes, and everything if there are no rows.
    make = x.new_empty if idx is None and rows > 0 and kept > 0 else x.new_zeros
    grad_x = x.new_empty(x.shape if need_x else 0)
    grad_w1, grad_b1 = make((hidden, width) if need_w1 else 0), make(hidden if need_b1 else 0)
    grad_w2 = make((out, hidden) if need_w2 else 0)
    grad_b2, grad_scale = x.new_zeros(out if need_b2 else 0), x.new_zeros(out if need_scale else 0)
    grad_norm_weight, grad_norm_bias = x.new_zeros(width if need_nw else 0), x.new_zeros(width if need_nb else 0)
    gradients = (
        grad_x, grad_w1, grad_b1, grad_w2, grad_b2,
        grad_norm_weight, grad_norm_bias, grad_scale,
    )  # fmt: skip
    if rows == 0:
        return gradients

    need_h = need_x or need_nw or need_nb
    need_first = need_w1 or need_b1
    need_second = need_w2 or need_b2 or need_scale
    grad_pre = pre.new_empty(pre.shape)
    activation = pre.new_empty(pre.shape) if need_w2 or need_scale else None
    with on(x):
        if kept > 0 and (need_h or need_first or activation is not None):
            programs, options = _product(x.dtype, rows, kept, out, "hidden gradient")
            dropped_mlp_hidden_bwd_kernel[programs](
                grad, scale, w2, idx, pre, grad_pre, activation,
                rows, kept, out, *grad.stride(), *w2.stride(), **options,
            )  # fmt: skip
        if need_second:
            # Without a gradient of w2 or scale only the sums of grad are wanted: a product with nothing.
            right = grad_pre[:, :0] if activation is None else activation
            splits, partial, sums = _weight_product(grad, right, None, None, None)
            block_rows, block_width = _configs.WEIGHT_SUM_TILE
            dropped_mlp_w2_bwd_kernel[(cdiv(out, block_rows),)](
                partial, sums, idx, scale, w2, b2, *_given((grad_w2, need_w2), (grad_b2, need_b2)),
                grad_scale if need_scale else None, splits, out, right.shape[1], hidden, *w2.stride(),
                BLOCK_ROWS=block_rows, BLOCK_WIDTH=block_width, **_configs.WEIGHT_SUM_LAUNCH._asdict(),
            )  # fmt: skip
        if need_first and kept > 0:
            right = x if need_w1 else x[:, :0]
            splits, partial, sums = _weight_product(grad_pre, right, stats if normed else None, norm_weight, norm_bias)
            block_rows, block_width = _configs.WEIGHT_SUM_TILE
            dropped_mlp_w1_bwd_kernel[(cdiv(kept, block_rows), max(1, cdiv(right.shape[1], block_width)))](
                partial, sums, idx, *_given((grad_w1, need_w1), (grad_b1, need_b1)), splits, kept, width,
                BLOCK_ROWS=block_rows, BLOCK_WIDTH=block_width, **_configs.WEIGHT_SUM_LAUNCH._asdict(),
            )  # fmt: skip
        if need_h:
            grad_h = x.new_empty(x.shape) if normed else grad_x
            programs, options = _product(x.dtype, rows, width, kept)
            dropped_mlp_input_bwd_kernel[programs](
                grad_pre, w1, idx, grad if residual and not normed else None, grad_h,
                rows, width, kept, *w1.stride(), *grad.stride(), **options,
            )  # fmt: skip
            if normed:
                block_rows, block_width = _configs.norm_tile(width)
                parts = min(cdiv(rows, block_rows), _configs.NORM_PROGRAMS)
                partial = stats.new_empty(2, parts, width)
                dropped_mlp_norm_bwd_kernel[(parts,)](
                    grad_h, x, stats, norm_weight, grad if residual else None, grad_x if need_x else None, partial,
                    rows, width, *x.stride(), *grad.stride(),
                    BLOCK_ROWS=block_rows, BLOCK_WIDTH=block_width, **_configs.NORM_LAUNCH._asdict(),
                )  # fmt: skip
                if need_nw or need_nb:
                    block_parts, block_width = _configs.COLUMN_SUM_TILE
                    dropped_mlp_columns_bwd_kernel[(cdiv(width, block_width),)](
                        partial, *_given((grad_norm_weight, need_nw), (grad_norm_bias, need_nb)), parts, width,
                        BLOCK_PARTS=block_parts, BLOCK_WIDTH=block_width,
                    )  # fmt: skip
    return gradients


def _weight_product(
    left: Tensor, right: Tensor, stats: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None
) -> tuple[int, Tensor, Tensor]:
    """Launch left^T right; number of splits, partial products `[S, I, J]` and partial sums of left `[S, I]`."""
    (rows, left_width), right_width = left.shape, right.shape[1]
    tiles = _configs.product(right.dtype, left_width, right_width, (left_width, right_width), "weight gradient")
    count = cdiv(left_width, tiles.rows) * max(1, cdiv(right_width, tiles.columns))
    chunk = cdiv(cdiv(rows, _configs.weight_splits(rows, count)), tiles.depth) * tiles.depth
    splits = cdiv(rows, chunk)
    partial = right.new_empty(splits, left_width, right_width, dtype=torch.float32)
    sums = partial.new_empty(splits, left_width)
    dropped_mlp_weight_bwd_kernel[(count, splits)](
        left, right, stats, norm_weight, norm_bias, partial, sums,
        rows, chunk, left_width, right_width, *left.stride(), *right.stride(), **_options(tiles),
    )  # fmt: skip
    return splits, partial, sums


def _product(
    dtype: torch.dtype, rows: int, columns: int, depth: int, kind: str | None = None
) -> tuple[tuple[int], dict[str, int]]:
    tiles = _configs.product(dtype, rows, columns, (columns, depth), kind)
    return (cdiv(rows, tiles.rows) * cdiv(columns, tiles.columns),), _options(tiles)


def _options(tiles: _configs.Product) -> dict[str, int]:
    return {
        "ROWS": tiles.rows, "COLUMNS": tiles.columns, "DEPTH": tiles.depth, "GROUP": _configs.GROUP_ROWS,
        **tiles.launch._asdict(),
    }  # fmt: skip


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _given(*outputs: tuple[Tensor, bool]) -> list[Tensor | None]:
    return [tensor if needed else None for tensor, needed in outputs]
