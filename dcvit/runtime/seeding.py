"""Random numbers from one seed, by separate generators that other threads neither disturb nor depend on."""

import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["derive_seed", "generator", "seeded"]

_GLOBAL_STATE = threading.RLock()


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a seed for one purpose, independent of those for others.

    Args:
        seed: The user's seed.
        *purpose: The purpose, for example `("probe", 3)`.
    """
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in purpose]
    return int(np.random.SeedSequence([seed, *words]).generate_state(1, np.uint64)[0] >> 1)


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Return a new random generator for one purpose, on the CPU, so that a seed means the same on every device.

    Args:
        seed: The user's seed.
        *purpose: See `derive_seed`.
    """
    return torch.Generator("cpu").manual_seed(derive_seed(seed, *purpose))


@contextmanager
def seeded(seed: int, *purpose: str | int) -> Iterator[None]:
    """Seed torch's global generators within a `with` block, one thread at a time; then restore the caller's state.

    It is for code that takes no generator, such as a model's initialisation. Another thread that draws from the global
    generators meanwhile does disturb it, so use `generator` for everything else.
    """
    derived = derive_seed(seed, *purpose)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with _GLOBAL_STATE, torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(derived)
        if devices:  # else `torch.manual_seed` would also seed a GPU that is first used later
            torch.cuda.manual_seed_all(derived)
        yield
