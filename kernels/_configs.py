"""Tile sizes of the kernels, apart from them: the one place to change when a new GPU or model size comes.

All choices are functions of shapes and dtypes. They are tables and not measured when a kernel first runs, because a
choice that a noisy measurement makes changes the order of a reduction, and so the result, from run to run.

What bounds a tile: 64 Ki registers and 164 KiB (sm_80) to 228 KiB (sm_90) of shared memory per multiprocessor, and
99 KiB per block on consumer cards. `python -m benchmarks gpu-static` compiles every row of every table and fails if one
spills.
"""

from typing import NamedTuple

import torch
from dcvit.kernels._launch import cdiv, power_of_two


class Launch(NamedTuple):
    """How the compiler arranges one program.

    Attributes:
        num_warps: Warps that share the program's tile.
        num_stages: Depth of the software pipeline of loads.
    """

    num_warps: int
    num_stages: int


# Kernels that move memory: a thread should have a few 16-byte loads under way, and a tile should not be padded.

TOKEN_WIDTHS = (256, 128, 64)
TOKEN_TILE = 4096
TOKEN_LAUNCH = Launch(num_warps=8, num_stages=1)


def token_tile(width: int) -> tuple[int, int]:
    """Rows and columns of a tile of tokens `[M, D]`: 256 columns for d 768 and 1024, 128 for 384, 64 for 192."""
    fitting = [columns for columns in TOKEN_WIDTHS if width % columns == 0]
    columns = fitting[0] if fitting else min(power_of_two(width), TOKEN_WIDTHS[0])
    return TOKEN_TILE // columns, columns


FLAT_TILE = 4096
FLAT_PROGRAMS = 512
FLAT_LAUNCH = Launch(num_warps=8, num_stages=1)


PIXEL_TILE = (32, 32)
"""Rows of 128 bytes, a cache line; 224, 384 and 256 pixels are multiples of 32, but not of 64 or more."""

PIXEL_LAUNCH = Launch(num_warps=4, num_stages=1)
PIXEL_PROGRAMS = 1024


def pixel_parts(batch: int, channels: int, height: int, width: int) -> int:
    """Programs that share an image: a power of two, enough to fill a large GPU with the whole batch."""
    tiles = channels * cdiv(height, PIXEL_TILE[0]) * cdiv(width, PIXEL_TILE[1])
    return power_of_two(max(1, min(cdiv(PIXEL_PROGRAMS, batch), tiles)))


SUM_TILE = 1024
"""Numbers that the one program of a final sum reads at a time."""


def is_half(dtype: torch.dtype) -> bool:
    """Whether tensor cores multiply `dtype`."""
    return dtype in (torch.float16, torch.bfloat16)


# Matrix products. Half precision runs on tensor cores, whose operands wait in shared memory: 128 x 128 x 64 takes
# 32 KiB for each stage. float32 is held to eager's error, so it is multiplied by the ordinary units, which want an
# accumulator that leaves room for the operands in registers.


class Product(NamedTuple):
    """Tiles of a matrix product.

    Attributes:
        rows: Rows of the result that a program computes.
        columns: Columns of the result that a program computes.
        depth: Terms that it adds at a time.
        launch: How the compiler arranges it.
    """

    rows: int
    columns: int
    depth: int
    launch: Launch


HALF_PRODUCTS = {
    "few rows": Product(16, 64, 64, Launch(num_warps=4, num_stages=3)),
    "narrow": Product(128, 64, 64, Launch(num_warps=4, num_stages=3)),
    "wide": Product(128, 128, 64, Launch(num_warps=8, num_stages=3)),
    # Rows that are not aligned are loaded number by number, each with an address.
    "unaligned": Product(128, 64, 64, Launch(num_warps=8, num_stages=3)),
    # GELU and its slope beside the accumulator: with 128 columns a thread needs more than its 255 registers.
    "hidden gradient": Product(128, 64, 64, Launch(num_warps=8, num_stages=3)),
}
FLOAT_PRODUCTS = {
    "few rows": Product(16, 64, 32, Launch(num_warps=4, num_stages=2)),
    "narrow": Product(64, 64, 32, Launch(num_warps=8, num_stages=2)),
    "wide": Product(64, 64, 32, Launch(num_warps=8, num_stages=2)),
    "unaligned": Product(64, 64, 32, Launch(num_warps=8, num_stages=2)),
    "hidden gradient": Product(64, 64, 32, Launch(num_warps=8, num_stages=2)),
    # Both operands lie across the sum; 32 terms at a time spill on sm_80.
    "weight gradient": Product(64, 64, 16, Launch(num_warps=8, num_stages=2)),
}


def product(dtype: torch.dtype, rows: int, columns: int, lengths: tuple[int, int], kind: str | None = None) -> Product:
    """Tiles for a result `[rows, columns]`.

    Widths 192 and 320 are multiples of 64 but not of 128; beyond 512 the wide tile's reuse outweighs its padding.

    Args:
        dtype: Of the operands.
        rows: Of the result.
        columns: Of the result.
        lengths: Of the rows of the matrices, in memory: a length that is no multiple of 16 leaves them unaligned.
        kind: The row to take where the table has it; of little use to a result of a few rows.
    """
    table = HALF_PRODUCTS if is_half(dtype) else FLOAT_PRODUCTS
    if rows <= 16:
        return table["few rows"]
    if kind in table:
        return table[kind]
    if any(length % 16 for length in lengths):
        return table["unaligned"]
    return table["wide" if columns % 128 == 0 or columns > 512 else "narrow"]


GROUP_ROWS = 8
"""Row tiles that are computed one after the other for each column tile, so that operands are found in the cache."""

SPLIT_PROGRAMS = 264
"""Two programs for each multiprocessor of an H100: the number that a weight gradient is split into at least."""

SPLIT_ROWS = 1024
"""Rows below which a split of a weight gradient does not pay for its partial result."""


def weight_splits(rows: int, tiles: int) -> int:
    """Parts into which the sum over `rows` tokens is split, for a weight gradient of `tiles` tiles."""
    return max(1, min(cdiv(SPLIT_PROGRAMS, tiles), rows // SPLIT_ROWS))


# LayerNorm, whole rows at a time.

NORM_TILE = 4096
NORM_LAUNCH = Launch(num_warps=8, num_stages=1)
NORM_PROGRAMS = 512


def norm_tile(width: int) -> tuple[int, int]:
    """Rows and columns of a tile that holds whole rows of tokens `[M, D]`."""
    columns = power_of_two(width)
    return max(1, NORM_TILE // columns), columns


WEIGHT_SUM_TILE = (8, 128)
WEIGHT_SUM_LAUNCH = Launch(num_warps=4, num_stages=1)
COLUMN_SUM_TILE = (64, 16)
