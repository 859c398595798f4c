"""Isolation from the state of the caller's process and thread, which must not change results and is left as it was."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from dcvit.runtime.precision import full_precision

__all__ = ["own_state"]


@contextmanager
def own_state() -> Iterator[None]:
    """Run a block of code, or a decorated function, as in a new process, whatever the caller has set.

    The code runs in full precision without autocast. It has gradients, even under `torch.no_grad()` and
    `torch.inference_mode()`. It runs on the CPU where no device is named. Apart from the precision, settings that all
    threads share stay as they are: the default dtype, the random generators and the number of threads. So every new
    tensor names its dtype, and every random number comes from a separate generator (`dcvit.runtime.seeding.generator`).
    """
    with ExitStack() as stack:
        stack.enter_context(full_precision())
        stack.enter_context(torch.inference_mode(False))  # this also enables gradients
        if torch.get_default_device().type != "cpu":  # else it would only slow down every call of torch
            stack.enter_context(torch.device("cpu"))
        yield
