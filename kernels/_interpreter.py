"""A replacement for an operation in which the interpreter of Triton 3.8 differs from a GPU.

The interpreter truncates float32 to bfloat16, and a GPU rounds to nearest. When compiled, the function is the plain
conversion.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """Convert a float32 value to `dtype`, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        value = bits.to(tl.float32, bitcast=True)
    return value.to(dtype)
