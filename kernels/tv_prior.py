"""Triton kernels of `dcvit.ops.tv_prior`; its schema describes arguments and results.

The forward is one pass over the images. A program reads every `PARTS`-th tile of one image, in a fixed order. It stores
five sums of squares: of the four differences and of the pixels. A single program then computes the norms and the value
from them, in float64. The backward is one more pass; it computes the slopes ||.||^(beta - 2) from the norms.
"""

import torch
import triton
import triton.language as tl
from dcvit.kernels import _configs
from dcvit.kernels._launch import on
from torch import Tensor


@triton.jit
def tile_of(tile, height, width, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Return channel, rows [H, 1] and columns [1, W] of a tile. Tiles run along columns, then rows, then channels."""
    tiles_w, tiles_h = tl.cdiv(width, BLOCK_W), tl.cdiv(height, BLOCK_H)
    row = tile // tiles_w % tiles_h * BLOCK_H + tl.arange(0, BLOCK_H)
    column = tile % tiles_w * BLOCK_W + tl.arange(0, BLOCK_W)
    return tile // (tiles_w * tiles_h), row[:, None], column[None, :]


@triton.jit
def offsets_of(row, column, stride_h, stride_w):
    """Return offsets of pixels in a channel, in 64 bits."""
    return row.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w


@triton.jit
def _difference(address, pixel, exists):
    """Return the pixel minus its neighbour at `address`, or 0 if there is no neighbour."""
    return tl.where(exists, pixel - tl.load(address, exists, other=0.0), 0.0)


@triton.jit
def tv_prior_fwd_kernel(
    images, partial, snapshot,
    batch, channels, height, width, stride_b, stride_c, stride_h, stride_w,
    PARTS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Store the sums of squares `partial[5, B, PARTS]`, and copy the pixels to `snapshot`, `[B, C, H, W]`, if given."""
    image, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    images += image.to(tl.int64) * stride_b
    zero = tl.zeros((BLOCK_H, BLOCK_W), tl.float32)
    right, down, diagonal, antidiagonal, square = zero, zero, zero, zero, zero
    tiles = channels * tl.cdiv(height, BLOCK_H) * tl.cdiv(width, BLOCK_W)
    for tile in range(part, tiles, PARTS):
        channel, row, column = tile_of(tile, height, width, BLOCK_H, BLOCK_W)
        address = images + channel.to(tl.int64) * stride_c + offsets_of(row, column, stride_h, stride_w)
        inside = (row < height) & (column < width)
        has_right, has_down = inside & (column + 1 < width), inside & (row + 1 < height)
        to_right, to_down = tl.cast(stride_w, tl.int64), tl.cast(stride_h, tl.int64)
        pixel = tl.load(address, inside, other=0.0)
        x = _difference(address + to_right, pixel, has_right)
        y = _difference(address + to_down, pixel, has_down)
        d = _difference(address + to_down + to_right, pixel, has_down & has_right)
        a = _difference(address + to_down - to_right, pixel, has_down & (column > 0))
        right, down, diagonal, antidiagonal = right + x * x, down + y * y, diagonal + d * d, antidiagonal + a * a
        square += pixel * pixel
        if snapshot is not None:
            plane = (image * channels + channel).to(tl.int64) * height * width
            tl.store(snapshot + plane + offsets_of(row, column, width, 1), pixel, inside)
    partial += tl.program_id(0)
    sums = batch * PARTS
    tl.store(partial, tl.sum(right))
    tl.store(partial + sums, tl.sum(down))
    tl.store(partial + 2 * sums, tl.sum(diagonal))
    tl.store(partial + 3 * sums, tl.sum(antidiagonal))
    tl.store(partial + 4 * sums, tl.sum(square))


@triton.jit
def tv_prior_norms_kernel(
    partial, value, norms, image_norms,
    batch, beta: tl.float64, tv_weight: tl.float64, l2_weight: tl.float64,
    PARTS: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Compute the norms and the value from all sums, in one program."""
    part = tl.arange(0, PARTS)[None, :]
    l2 = tl.zeros((BLOCK_B,), tl.float64)
    for start in range(0, batch, BLOCK_B):
        image = start + tl.arange(0, BLOCK_B)
        address = partial + 4 * batch * PARTS + image[:, None] * PARTS + part
        norm = tl.sqrt(tl.sum(tl.load(address, image[:, None] < batch, other=0.0).to(tl.float64), axis=1))
        tl.store(image_norms + image, norm.to(tl.float32), image < batch)
        l2 += norm
    tv = tl.full((), 0.0, tl.float64)
    for direction in tl.static_range(4):
        squares = tl.zeros((BLOCK_B, PARTS), tl.float64)
        for start in range(0, batch, BLOCK_B):
            image = start + tl.arange(0, BLOCK_B)[:, None]
            squares += tl.load(partial + (direction * batch + image) * PARTS + part, image < batch, other=0.0)
        norm = tl.sqrt(tl.sum(squares))
        tl.store(norms + direction, norm.to(tl.float32))
        tv += tl.where(norm > 0, _power(norm, beta), 0.0)
    result = tl.cast(tv_weight, tl.float64) * tv + tl.cast(l2_weight, tl.float64) * tl.sum(l2) / batch
    tl.store(value, result.to(tl.float32))


@triton.jit
def _power(norm, exponent):
    """Return norm^exponent in float64, and 1 for the norm 0."""
    norm = norm.to(tl.float64)
    return tl.exp(tl.cast(exponent, tl.float64) * tl.log(tl.where(norm > 0, norm, 1.0)))


@triton.jit
def _slope(norm, beta, weight):
    """Return the factor of v in the gradient of weight * ||v||^beta: weight * beta * ||v||^(beta - 2), 0 for v = 0."""
    slope = tl.cast(weight, tl.float64) * beta * _power(norm, tl.cast(beta, tl.float64) - 2)
    return tl.where(norm > 0, slope, 0.0).to(tl.float32)


@triton.jit
def slopes_of(norms, image_norms, image, batch, beta, tv_weight, l2_weight):
    """Return the factors of the four differences, and of the pixels, in the gradient."""
    return (
        _slope(tl.load(norms), beta, tv_weight),
        _slope(tl.load(norms + 1), beta, tv_weight),
        _slope(tl.load(norms + 2), beta, tv_weight),
        _slope(tl.load(norms + 3), beta, tv_weight),
        _slope(tl.load(image_norms + image), 1.0, tl.cast(l2_weight, tl.float64) / batch),
    )


@triton.jit
def prior_gradient(address, row, column, height, width, stride_h, stride_w, right, down, diagonal, antidiagonal, l2):
    """Return the pixels at `address` and the prior's gradient there; the last five arguments are `slopes_of`.

    Every difference pulls two pixels together, so each pixel is pulled towards its eight neighbours.
    """
    inside = (row < height) & (column < width)
    has_left, has_right = inside & (column > 0), inside & (column + 1 < width)
    has_up, has_down = row > 0, row + 1 < height
    to_right, to_down = tl.cast(stride_w, tl.int64), tl.cast(stride_h, tl.int64)
    pixel = tl.load(address, inside, other=0.0)
    gradient = l2 * pixel
    gradient += right * (
        _difference(address - to_right, pixel, has_left) + _difference(address + to_right, pixel, has_right)
    )
    gradient += down * (
        _difference(address - to_down, pixel, inside & has_up)
        + _difference(address + to_down, pixel, inside & has_down)
    )
    gradient += diagonal * (
        _difference(address - to_down - to_right, pixel, has_left & has_up)
        + _difference(address + to_down + to_right, pixel, has_right & has_down)
    )
    gradient += antidiagonal * (
        _difference(address - to_down + to_right, pixel, has_right & has_up)
        + _difference(address + to_down - to_right, pixel, has_left & has_down)
    )
    return pixel, gradient


@triton.jit
def tv_prior_bwd_kernel(
    grad, images, norms, image_norms, gradient,
    batch, channels, height, width, stride_b, stride_c, stride_h, stride_w,
    beta: tl.float64, tv_weight: tl.float64, l2_weight: tl.float64,
    PARTS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Store the prior's gradient, `[B, C, H, W]`, times the scalar `grad`."""
    image, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    images += image.to(tl.int64) * stride_b
    factor = tl.load(grad)
    right, down, diagonal, antidiagonal, l2 = slopes_of(
        norms, image_norms, image, batch, beta, tv_weight, l2_weight
    )  # fmt: skip
    tiles = channels * tl.cdiv(height, BLOCK_H) * tl.cdiv(width, BLOCK_W)
    for tile in range(part, tiles, PARTS):
        channel, row, column = tile_of(tile, height, width, BLOCK_H, BLOCK_W)
        address = images + channel.to(tl.int64) * stride_c + offsets_of(row, column, stride_h, stride_w)
        _, result = prior_gradient(
            address, row, column, height, width, stride_h, stride_w, right, down, diagonal, antidiagonal, l2
        )
        plane = (image * channels + channel).to(tl.int64) * height * width
        address = gradient + plane + offsets_of(row, column, width, 1)
        tl.store(address, factor * result, (row < height) & (column < width))


def launch_norms(
    images: Tensor, snapshot: Tensor | None, beta: float, tv_weight: float, l2_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward, which also copies the images to `snapshot` if it is given.

    Args:
        images: Images `[B, C, H, W]`, at least one.
        snapshot: Contiguous buffer for the copy, `[B, C, H, W]`, or `None`.
        beta: Exponent of the difference norms.
        tv_weight: Weight of the total variation.
        l2_weight: Weight of the images' mean 2-norm.

    Returns:
        The value `[]`, the four norms and the images' norms `[B]`.
    """
    batch = len(images)
    parts = _configs.pixel_parts(*images.shape)
    value, norms, image_norms = images.new_empty(()), images.new_empty(4), images.new_empty(batch)
    partial = images.new_empty(5, batch, parts)
    block_h, block_w = _configs.PIXEL_TILE
    tv_prior_fwd_kernel[(batch * parts,)](
        images, partial, snapshot, *images.shape, *images.stride(),
        PARTS=parts, BLOCK_H=block_h, BLOCK_W=block_w, **_configs.PIXEL_LAUNCH._asdict(),
    )  # fmt: skip
    tv_prior_norms_kernel[(1,)](
        partial, value, norms, image_norms, batch, beta, tv_weight, l2_weight,
        PARTS=parts, BLOCK_B=_configs.SUM_TILE // parts, num_warps=8,
    )  # fmt: skip
    return value, norms, image_norms


def tv_prior(images: Tensor, beta: float, tv_weight: float, l2_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `dcvit::tv_prior`."""
    if len(images) == 0:
        return images.new_full((), float("nan")), images.new_zeros(4), images.new_zeros(0)
    with on(images):
        return launch_norms(images, None, beta, tv_weight, l2_weight)


def tv_prior_backward(
    grad: Tensor,
    images: Tensor,
    norms: Tensor,
    image_norms: Tensor,
    beta: float,
    tv_weight: float,
    l2_weight: float,
) -> Tensor:
    """Launch `dcvit::tv_prior_backward`."""
    gradient = torch.empty_like(images, memory_format=torch.contiguous_format)
    if images.numel() == 0:
        return gradient
    parts = _configs.pixel_parts(*images.shape)
    block_h, block_w = _configs.PIXEL_TILE
    with on(images):
        tv_prior_bwd_kernel[(len(images) * parts,)](
            grad, images, norms, image_norms, gradient, *images.shape, *images.stride(), beta, tv_weight, l2_weight,
            PARTS=parts, BLOCK_H=block_h, BLOCK_W=block_w, **_configs.PIXEL_LAUNCH._asdict(),
        )  # fmt: skip
    return gradient
