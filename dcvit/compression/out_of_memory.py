"""Fewer images at once where a device's memory does not suffice."""

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
    """What some work comes to; each time that memory runs out it begins anew, with half as many images at once.

    Args:
        work: Given the settings. What it keeps in a store is not done again.
        config: The settings to begin with.
        processes: The processes that share the work.

    Raises:
        DcvitError: If memory does not suffice for one image, or for one of several ranks.
    """
    while True:
        try:
            return work(config)
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            halved = config.halved()
        # Outside of the handler, whose traceback holds on to tensors.
        if halved is None or processes.size > 1:
            raise DcvitError(
                f"The device ran out of memory ({reason}). "
                + (
                    f"It was rank {processes.rank}'s; set batch_size and micro_batch lower, "
                    if processes.size > 1
                    else "So it does with one image at once; "
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
