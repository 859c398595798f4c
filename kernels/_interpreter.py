"""What the interpreter of Triton 3.8 does differently from a GPU, and what kernels use instead.

It multiplies the bits of bfloat16 operands as integers, and cuts float32 off to bfloat16 where a GPU rounds to nearest.
Compiled, both functions are the plain operation.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, total):
    """Sum of `total` and a b, added in float32; float32 operands are not rounded to TF32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """A float32 value in `dtype`, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        value = bits.to(tl.float32, bitcast=True)
    return value.to(dtype)
