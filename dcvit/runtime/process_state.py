"""The state of the caller's process and thread, which decides nothing of what dcvit computes, and is left as it was."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from dcvit.runtime.precision import full_precision

__all__ = ["own_state"]


@contextmanager
def own_state() -> Iterator[None]:
    """Work in a block of code, or in the function that it decorates, as in a new process, whatever the caller has set.

    In full precision without autocast; with gradients, under `torch.no_grad()` and `torch.inference_mode()` too; and on
    the CPU where no device is named. What torch has only for all threads is not touched, but for the precision: the
    default dtype, the random generators and the number of threads. So every tensor of random or new numbers has its
    dtype named, and every random number a generator of its own (`dcvit.runtime.seeding.generator`).
    """
    with ExitStack() as stack:
        stack.enter_context(full_precision())
        stack.enter_context(torch.inference_mode(False))  # which enables gradients, too
        if torch.get_default_device().type != "cpu":  # else it would only slow down every call of torch
            stack.enter_context(torch.device("cpu"))
        yield
