"""What every launcher needs and no kernel sees."""

import contextlib
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor


def on(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the device of `tensor` the current one, on which Triton launches.

    Args:
        tensor: Any tensor of the call.

    Raises:
        RuntimeError: If it is on the CPU, and kernels were not imported to run there.
    """
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    # Triton's own functions, such as sum, are made to be interpreted only when it is imported.
    if tensor.device.type == "cpu" and isinstance(tl.sum, triton.JITFunction):
        raise RuntimeError(
            "Triton kernels got tensors on cpu, expected cuda. To run them there, for tests, set TRITON_INTERPRET=1 "
            "before Triton is first imported; torch._dynamo, torchvision and dcvit import it, too."
        )
    return contextlib.nullcontext()


def cdiv(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return -(-a // b)


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`, at least 1."""
    return 1 << max(number - 1, 0).bit_length()
