"""One seed for everything, and no trace in the caller's random state."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["derive_seed", "seeded"]


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A seed for one purpose, independent of the others.

    Args:
        seed: The user's seed.
        *purpose: What it is for, for example `("trial", 3)`.
    """
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in purpose]
    return int(np.random.SeedSequence([seed, *words]).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def seeded(seed: int, *purpose: str | int) -> Iterator[torch.Generator]:
    """Seed torch for a block of code and restore the caller's state after it.

    Yields:
        A CPU generator with the same seed.
    """
    derived = derive_seed(seed, *purpose)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(derived)
        if devices:  # else `torch.manual_seed` would leave the seed to a GPU that is first used later
            torch.cuda.manual_seed_all(derived)
        yield torch.Generator().manual_seed(derived)
