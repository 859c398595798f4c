"""Helpers of the launchers."""

import contextlib
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor


def on(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which the device of `tensor` is current, because Triton launches on the current device.

    Args:
        tensor: Any tensor of the call.

    Raises:
        RuntimeError: If the tensor is on the CPU, and Triton was not imported in interpreter mode.
    """
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    # Triton decides when it is imported whether its own functions, such as sum, are interpreted.
    if tensor.device.type == "cpu" and isinstance(tl.sum, triton.JITFunction):
        raise RuntimeError(
            "Triton kernels got tensors on cpu, expected cuda. To run them there, for tests, set TRITON_INTERPRET=1 "
            "before Triton is first imported; torch._dynamo, torchvision and dcvit import it, too."
        )
    return contextlib.nullcontext()


def cdiv(a: int, b: int) -> int:
    """Return `a / b`, rounded up."""
    return -(-a // b)


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`, and at least 1."""
    return 1 << max(number - 1, 0).bit_length()
