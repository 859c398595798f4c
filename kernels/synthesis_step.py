"""Triton kernels of `dcvit.ops.synthesis_step`; its schema describes arguments and results.

There are two passes, because the gradient needs the norms of all pixels. The update is in place, but its gradient needs
the old values of each pixel's eight neighbours. A GPU does not order the programs of one kernel, nor the warps of one
program between a load and a store. A program that wrote its pixels would thus change values that its neighbours, or its
own later loads, still have to read. The first pass therefore copies the images. The second pass reads pixels only from
that copy, and only writes `images`. The two kernels run one after the other on one stream. The copy adds one write to
the eight passes over memory that cannot be avoided (read the images twice, read gradient and both moments, write images
and both moments).
"""

import triton
import triton.language as tl
from dcvit.kernels import _configs
from dcvit.kernels._launch import on
from dcvit.kernels.tv_prior import launch_norms, offsets_of, prior_gradient, slopes_of, tile_of
from torch import Tensor


@triton.jit
def synthesis_step_fwd_kernel(
    images, snapshot, grad, exp_avg, exp_avg_sq, norms, image_norms, low, high,
    batch, channels, height, width,
    images_b, images_c, images_h, images_w, grad_b, grad_c, grad_h, grad_w,
    avg_b, avg_c, avg_h, avg_w, square_b, square_c, square_h, square_w, low_c, high_c,
    beta: tl.float64, tv_weight: tl.float64, l2_weight: tl.float64,
    beta1, one_minus_beta1, beta2, one_minus_beta2, correction2, eps, step_size,
    PARTS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Add the prior's gradient, and apply Adam and the clipping; `snapshot` holds the images before the step."""
    image, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    number = image.to(tl.int64)
    right, down, diagonal, antidiagonal, l2 = slopes_of(
        norms, image_norms, image, batch, beta, tv_weight, l2_weight
    )  # fmt: skip
    tiles = channels * tl.cdiv(height, BLOCK_H) * tl.cdiv(width, BLOCK_W)
    for tile in range(part, tiles, PARTS):
        channel_32, row, column = tile_of(tile, height, width, BLOCK_H, BLOCK_W)
        inside = (row < height) & (column < width)
        channel = channel_32.to(tl.int64)
        plane = (number * channels + channel) * height * width
        pixel, slope = prior_gradient(
            snapshot + plane + offsets_of(row, column, width, 1),
            row, column, height, width, width, 1, right, down, diagonal, antidiagonal, l2,
        )  # fmt: skip

        address = grad + number * grad_b + channel * grad_c + offsets_of(row, column, grad_h, grad_w)
        slope += tl.load(address, inside, other=0.0)
        address = exp_avg + number * avg_b + channel * avg_c + offsets_of(row, column, avg_h, avg_w)
        mean = beta1 * tl.load(address, inside, other=0.0) + one_minus_beta1 * slope
        tl.store(address, mean, inside)
        address = exp_avg_sq + number * square_b + channel * square_c + offsets_of(row, column, square_h, square_w)
        square = beta2 * tl.load(address, inside, other=0.0) + one_minus_beta2 * slope * slope
        tl.store(address, square, inside)

        # Correctly rounded like eager's division and root, unlike the GPU's fast versions.
        root = tl.sqrt_rn(tl.div_rn(square, tl.zeros_like(square) + correction2))
        moved = pixel - step_size * tl.div_rn(mean, root + eps)
        # A NaN pixel stays NaN, as with torch.clamp.
        lowest, highest = tl.load(low + channel * low_c), tl.load(high + channel * high_c)
        moved = tl.maximum(moved, lowest, propagate_nan=tl.PropagateNan.ALL)
        moved = tl.minimum(moved, highest, propagate_nan=tl.PropagateNan.ALL)
        address = images + number * images_b + channel * images_c + offsets_of(row, column, images_h, images_w)
        tl.store(address, moved, inside)


def synthesis_step(
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
    """Launch `dcvit::synthesis_step`."""
    if len(images) == 0:
        return images.new_full((), float("nan"))
    parts = _configs.pixel_parts(*images.shape)
    block_h, block_w = _configs.PIXEL_TILE
    snapshot = images.new_empty(images.shape)
    with on(images):
        value, norms, image_norms = launch_norms(images, snapshot, beta, tv_weight, l2_weight)
        synthesis_step_fwd_kernel[(len(images) * parts,)](
            images, snapshot, grad, exp_avg, exp_avg_sq, norms, image_norms, low, high, *images.shape,
            *images.stride(), *grad.stride(), *exp_avg.stride(), *exp_avg_sq.stride(), low.stride(0), high.stride(0),
            beta, tv_weight, l2_weight,
            beta1, 1 - beta1, beta2, 1 - beta2, 1 - beta2**step, eps, lr / (1 - beta1**step),
            PARTS=parts, BLOCK_H=block_h, BLOCK_W=block_w, **_configs.PIXEL_LAUNCH._asdict(),
        )  # fmt: skip
    return value
