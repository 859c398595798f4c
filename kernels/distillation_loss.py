"""Triton kernels of `dcvit.ops.distillation_loss`; its schema describes arguments and results.

A program reads one tile of the teacher's tokens `[B * N, D]` once and loops over the candidates. For each candidate it
sums the squared differences and, in the same pass, writes the gradient. The partial sums go to a buffer, and a second
kernel adds them in a fixed order.
"""

import torch
import triton
import triton.language as tl
from dcvit.kernels import _configs
from dcvit.kernels._interpreter import round_to
from dcvit.kernels._launch import cdiv, on
from torch import Tensor


@triton.jit
def _tile(rows, width, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Return rows [R, 1] and columns [1, W] of this program's tile."""
    column_tiles = tl.cdiv(width, BLOCK_WIDTH)
    row = tl.program_id(0) // column_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(0) % column_tiles * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    return row[:, None], column[None, :]


@triton.jit
def _offsets(row, column, tokens, stride_b, stride_n, stride_d):
    """Return offsets [R, W] into tokens [B, N, D], in 64 bits."""
    batch, token = row // tokens, row % tokens
    return batch.to(tl.int64) * stride_b + token.to(tl.int64) * stride_n + column.to(tl.int64) * stride_d


@triton.jit
def _weights(weight, stride, row, rows, tokens):
    """Load the weights of the tile's rows [R, 1]."""
    if weight is None:
        result = tl.full(row.shape, 1.0, tl.float32)
    else:
        result = tl.load(weight + (row % tokens).to(tl.int64) * stride, row < rows, other=0.0)
    return result


@triton.jit
def _sum_of_weights(weight, stride, tokens, BLOCK: tl.constexpr):
    """Sum the weights [N]. Every program does it in the same order; the weights are few and stay in the cache."""
    if weight is None:
        result = tokens * 1.0
    else:
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, tokens, BLOCK):
            token = start + tl.arange(0, BLOCK)
            total += tl.load(weight + token.to(tl.int64) * stride, token < tokens, other=0.0)
        result = tl.sum(total)
    return result


@triton.jit
def distillation_loss_fwd_kernel(
    student, teacher, weight, partial, unit,
    candidates, rows, tokens, width, count,
    student_c, student_b, student_n, student_d, teacher_b, teacher_n, teacher_d, weight_n,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """Store the weighted sums of squares of a tile, `partial[c, tile]`, and its part of the gradient `unit`.

    `unit` is the gradient of the students for losses with gradient 1. `count` is B * D, as a float.
    """
    row, column = _tile(rows, width, BLOCK_ROWS, BLOCK_WIDTH)
    inside = (row < rows) & (column < width)
    student += _offsets(row, column, tokens, student_b, student_n, student_d)
    target = tl.load(teacher + _offsets(row, column, tokens, teacher_b, teacher_n, teacher_d), inside, other=0.0)
    target = target.to(tl.float32)
    weights = _weights(weight, weight_n, row, rows, tokens)
    if unit is not None:
        factor = 2 * weights / (_sum_of_weights(weight, weight_n, tokens, BLOCK_TOKENS) * count)
        unit += row.to(tl.int64) * width + column
    for candidate in range(candidates):
        value = tl.load(student + tl.cast(candidate, tl.int64) * student_c, inside, other=0.0)
        difference = value.to(tl.float32) - target
        squares = weights * difference * difference
        tl.store(partial + candidate * tl.num_programs(0) + tl.program_id(0), tl.sum(squares))
        if unit is not None:
            address = unit + tl.cast(candidate, tl.int64) * rows * width
            tl.store(address, round_to(factor * difference, unit.dtype.element_ty), inside)


@triton.jit
def distillation_loss_mean_kernel(
    partial, weight, losses, tiles, tokens, count, weight_n,
    BLOCK: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """Compute the loss of one candidate from the sums of its tiles."""
    candidate = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        total += tl.load(partial + tl.cast(candidate, tl.int64) * tiles + tile, tile < tiles, other=0.0)
    weights = _sum_of_weights(weight, weight_n, tokens, BLOCK_TOKENS)
    tl.store(losses + candidate, (tl.sum(total) / (weights * count)).to(tl.float32))


@triton.jit
def distillation_loss_bwd_kernel(
    grad, student, teacher, weight, gradient,
    candidates, rows, tokens, width, count,
    grad_c, student_c, student_b, student_n, student_d, teacher_b, teacher_n, teacher_d, weight_n,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of a tile for all candidates, whose losses have the gradients `grad`."""
    row, column = _tile(rows, width, BLOCK_ROWS, BLOCK_WIDTH)
    inside = (row < rows) & (column < width)
    student += _offsets(row, column, tokens, student_b, student_n, student_d)
    target = tl.load(teacher + _offsets(row, column, tokens, teacher_b, teacher_n, teacher_d), inside, other=0.0)
    target = target.to(tl.float32)
    weights = _weights(weight, weight_n, row, rows, tokens)
    factor = 2 * weights / (_sum_of_weights(weight, weight_n, tokens, BLOCK_TOKENS) * count)
    gradient += row.to(tl.int64) * width + column
    for candidate in range(candidates):
        value = tl.load(student + tl.cast(candidate, tl.int64) * student_c, inside, other=0.0)
        product = tl.load(grad + tl.cast(candidate, tl.int64) * grad_c) * factor * (value.to(tl.float32) - target)
        address = gradient + tl.cast(candidate, tl.int64) * rows * width
        tl.store(address, round_to(product, gradient.dtype.element_ty), inside)


@triton.jit
def distillation_loss_rescale_kernel(unit, grad, size, grad_c, BLOCK: tl.constexpr):
    """Multiply the gradient of one candidate, `[B * N * D]`, in place. A factor of 1 moves no memory."""
    candidate = tl.program_id(1)
    factor = tl.load(grad + tl.cast(candidate, tl.int64) * grad_c)
    if factor != 1.0:
        unit += tl.cast(candidate, tl.int64) * size
        for tile in range(tl.program_id(0), tl.cdiv(size, BLOCK), tl.num_programs(0)):
            offset = tl.cast(tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            value = tl.load(unit + offset, offset < size).to(tl.float32)
            tl.store(unit + offset, round_to(value * factor, unit.dtype.element_ty), offset < size)


def distillation_loss(
    student: Tensor, teacher: Tensor, weight: Tensor | None, with_unit: bool
) -> tuple[Tensor, Tensor]:
    """Launch `dcvit::distillation_loss`."""
    candidates, batch, tokens, width = student.shape
    losses = student.new_empty(candidates, dtype=torch.float32)
    unit = student.new_empty(student.shape if with_unit else (0,))
    if student.numel() == 0:
        return losses.fill_(float("nan")), unit
    block_rows, block_width = _configs.token_tile(width)
    tiles = cdiv(batch * tokens, block_rows) * cdiv(width, block_width)
    partial = losses.new_empty(candidates, tiles)
    weight_n = 0 if weight is None else weight.stride(0)
    with on(student):
        distillation_loss_fwd_kernel[(tiles,)](
            student, teacher, weight, partial, unit if with_unit else None,
            candidates, batch * tokens, tokens, width, float(batch * width),
            *student.stride(), *teacher.stride(), weight_n,
            BLOCK_ROWS=block_rows, BLOCK_WIDTH=block_width, BLOCK_TOKENS=_configs.SUM_TILE,
            **_configs.TOKEN_LAUNCH._asdict(),
        )  # fmt: skip
        distillation_loss_mean_kernel[(candidates,)](
            partial, weight, losses, tiles, tokens, float(batch * width), weight_n,
            BLOCK=_configs.SUM_TILE, BLOCK_TOKENS=_configs.SUM_TILE,
        )  # fmt: skip
    return losses, unit


def distillation_loss_backward(grad: Tensor, student: Tensor, teacher: Tensor, weight: Tensor | None) -> Tensor:
    """Launch `dcvit::distillation_loss_backward`."""
    candidates, batch, tokens, width = student.shape
    gradient = student.new_empty(student.shape)
    if student.numel() == 0:
        return gradient
    block_rows, block_width = _configs.token_tile(width)
    tiles = cdiv(batch * tokens, block_rows) * cdiv(width, block_width)
    with on(student):
        distillation_loss_bwd_kernel[(tiles,)](
            grad, student, teacher, weight, gradient,
            candidates, batch * tokens, tokens, width, float(batch * width),
            grad.stride(0), *student.stride(), *teacher.stride(), 0 if weight is None else weight.stride(0),
            BLOCK_ROWS=block_rows, BLOCK_WIDTH=block_width, BLOCK_TOKENS=_configs.SUM_TILE,
            **_configs.TOKEN_LAUNCH._asdict(),
        )  # fmt: skip
    return gradient


def distillation_loss_rescale(unit: Tensor, grad: Tensor) -> None:
    """Launch `dcvit::distillation_loss_rescale`."""
    if unit.numel() == 0:
        return
    size = unit[0].numel()
    programs = min(cdiv(size, _configs.FLAT_TILE), _configs.FLAT_PROGRAMS)
    with on(unit):
        distillation_loss_rescale_kernel[(programs, len(unit))](
            unit, grad, size, grad.stride(0), BLOCK=_configs.FLAT_TILE, **_configs.FLAT_LAUNCH._asdict()
        )
