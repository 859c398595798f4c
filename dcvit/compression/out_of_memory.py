"""Smaller micro-batches for a device that runs out of memory."""

import gc
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from dcvit.config import MethodConfig
from dcvit.errors import DcvitError, MemoryWarning
from dcvit.runtime.distributed import SINGLE_PROCESS, ProcessGroup

__all__ = ["within_memory"]

Config = TypeVar("Config", bound=MethodConfig)
Found = TypeVar("Found")


def within_memory(work: Callable[[Config], Found], config: Config, processes: ProcessGroup = SINGLE_PROCESS) -> Found:
    """Return the result of some work; restart it with micro-batches of half the size if memory runs out.

    Args:
        work: A function of the settings. Entries that it keeps in a store are not computed again.
        config: The settings of the first attempt.
        processes: The processes that share the work.

    Raises:
        DcvitError: If a micro-batch of one image does not fit, or if memory runs out in one of several processes.
    """
    while True:
        try:
            return work(config)
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            halved = config.halved()
        # This is outside of the handler, because its traceback keeps tensors in memory.
        if halved is None or processes.size > 1:
            raise DcvitError(
                f"The device ran out of memory ({reason}). "
                + (
                    f"This happened in rank {processes.rank}; set batch_size and micro_batch lower, "
                    if processes.size > 1
                    else "Even one image at a time does not fit; "
                )
                + "take fewer views, rows and synthesised images, or compress on the CPU."
            )
        gc.collect()
        torch.cuda.empty_cache()
        images = "one image" if halved.micro_batch_size == 1 else f"{halved.micro_batch_size} images"
        warnings.warn(
            f"The device ran out of memory ({reason}): going on with {images} at once.",
            MemoryWarning,
            stacklevel=3,
        )
        config = halved
