"""Tile sizes of the kernels, apart from them: the one place to change when a new GPU or model size comes.

All choices are functions of shapes and dtypes. They are tables and not measured when a kernel first runs, because a
choice that a noisy measurement makes changes the order of a reduction, and so the result, from run to run.

What bounds a tile: 64 Ki registers and 164 KiB (sm_80) to 228 KiB (sm_90) of shared memory per multiprocessor, and
99 KiB per block on consumer cards. `python -m benchmarks gpu-static` compiles the kernels for the shapes of its cases
and fails if one spills.
"""

from typing import NamedTuple

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


COLUMN_PROGRAMS = 1056
"""Eight programs for each multiprocessor of an H100: so many share a matrix whose columns they add up."""


def column_parts(rows: int, columns: int, tile: tuple[int, int]) -> int:
    """Programs that share the rows of each column tile of a matrix."""
    return max(1, min(cdiv(rows, tile[0]), COLUMN_PROGRAMS // cdiv(columns, tile[1])))


# LayerNorm, whole rows at a time.

NORM_TILE = 4096
NORM_LAUNCH = Launch(num_warps=8, num_stages=1)
NORM_PROGRAMS = 512


def norm_tile(width: int) -> tuple[int, int]:
    """Rows and columns of a tile that holds whole rows of tokens `[M, D]`."""
    columns = power_of_two(width)
    return max(1, NORM_TILE // columns), columns
