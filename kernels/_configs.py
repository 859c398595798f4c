"""Tile sizes of the kernels: the only place to change for a new GPU or model size.

All choices are functions of shapes and dtypes. They are fixed and not measured when a kernel first runs, because noisy
measurements would choose differently from run to run. That would change the order of a reduction, and so its result.

A tile is limited by 64 Ki registers and 164 KiB (sm_80) to 228 KiB (sm_90) of shared memory per multiprocessor, and
99 KiB per block on consumer cards. `python -m benchmarks gpu-static` compiles the kernels for the shapes of its cases
and fails if one spills.
"""

from typing import NamedTuple

from dcvit.kernels._launch import cdiv, power_of_two


class Launch(NamedTuple):
    """Compiler options of a launch.

    Attributes:
        num_warps: Warps that share the program's tile.
        num_stages: Depth of the software pipeline of loads.
    """

    num_warps: int
    num_stages: int


# Memory-bound kernels: a thread should have a few 16-byte loads in flight, and a tile should not need padding.

TOKEN_WIDTHS = (256, 128, 64)
TOKEN_TILE = 4096
TOKEN_LAUNCH = Launch(num_warps=8, num_stages=1)


def token_tile(width: int) -> tuple[int, int]:
    """Return rows and columns of a tile of tokens `[M, D]`: 256 columns for D 768 and 1024, 128 for 384, 64 for 192."""
    fitting = [columns for columns in TOKEN_WIDTHS if width % columns == 0]
    columns = fitting[0] if fitting else min(power_of_two(width), TOKEN_WIDTHS[0])
    return TOKEN_TILE // columns, columns


FLAT_TILE = 4096
FLAT_PROGRAMS = 512
FLAT_LAUNCH = Launch(num_warps=8, num_stages=1)


PIXEL_TILE = (32, 32)
"""Rows of 128 bytes, a cache line. 224, 256 and 384 px are all multiples of 32, but 224 is not one of 64."""

PIXEL_LAUNCH = Launch(num_warps=4, num_stages=1)
PIXEL_PROGRAMS = 1024


def pixel_parts(batch: int, channels: int, height: int, width: int) -> int:
    """Return the number of programs per image, a power of two with which the batch fills a large GPU."""
    tiles = channels * cdiv(height, PIXEL_TILE[0]) * cdiv(width, PIXEL_TILE[1])
    return power_of_two(max(1, min(cdiv(PIXEL_PROGRAMS, batch), tiles)))


SUM_TILE = 1024
"""Number of values that the single program of a final sum reads at a time."""


COLUMN_PROGRAMS = 1056
"""Number of programs that add up the columns of a matrix: eight for each multiprocessor of an H100."""


def column_parts(rows: int, columns: int, tile: tuple[int, int]) -> int:
    """Return the number of programs that share the rows of each column tile of a matrix."""
    return max(1, min(cdiv(rows, tile[0]), COLUMN_PROGRAMS // cdiv(columns, tile[1])))


# LayerNorm, which processes whole rows.

NORM_TILE = 4096
NORM_LAUNCH = Launch(num_warps=8, num_stages=1)
NORM_PROGRAMS = 512


def norm_tile(width: int) -> tuple[int, int]:
    """Return rows and columns of a tile that holds whole rows of tokens `[M, D]`."""
    columns = power_of_two(width)
    return max(1, NORM_TILE // columns), columns
