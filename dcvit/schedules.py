"""Learning rates over time."""

import math

__all__ = ["warmup_cosine"]


def warmup_cosine(step: int, total: int, warmup: int) -> float:
    """The share of the peak learning rate at a step: a linear rise, then half a cosine to zero.

    Args:
        step: From 0 to `total` − 1.
        total: Number of steps.
        warmup: Steps of the rise; the share at step `warmup` − 1 is 1. Cut to `total` if longer.
    """
    warmup = min(warmup, total)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
