"""What the interpreter of Triton 3.8 does differently from a GPU, and what kernels use instead.

It cuts float32 off to bfloat16 where a GPU rounds to nearest. Compiled, the function is the plain operation.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """A float32 value in `dtype`, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        value = bits.to(tl.float32, bitcast=True)
    return value.to(dtype)
