"""Building a model that a file describes: within bounds, and without a trace in the caller's random state."""

import math
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Building", "TooLargeError"]

MOST_OPERATIONS = 15_000
"""Of torch, to build a model. The largest models of timm take 7,000."""

_WITH_GENERATOR = {"default": "generator", "low": "low_generator"}
"""By the name of an overload that draws from torch's own generator, that of the one which takes a generator."""


class TooLargeError(ValueError):
    """A description asks for a larger model than is built."""


class Building(TorchDispatchMode):
    """The operations of this thread while a model is built.

    On the meta device they take no memory, and so tell what the model would take before anything is built. Random
    numbers come from a generator of this object, so that neither the caller's state nor another thread's changes.

    Args:
        most_bytes: Of all tensors that the operations make, temporary ones and buffers included.
    """

    def __init__(self, most_bytes: float = math.inf) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._most_bytes = most_bytes
        self._bytes = self._operations = 0
        self._generator = torch.Generator().manual_seed(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded in func.tags:
            func = getattr(func.overloadpacket, _WITH_GENERATOR.get(func._overloadname, ""), func)
            if any(argument.name == "generator" for argument in func._schema.arguments):
                kwargs["generator"] = self._generator
        result = func(*args, **kwargs)
        self._operations += 1
        if not func._schema.is_mutable:
            self._bytes += sum(t.numel() * t.element_size() for t in tree_leaves(result) if isinstance(t, torch.Tensor))
        if self._operations > MOST_OPERATIONS:
            raise TooLargeError(f"more than {MOST_OPERATIONS:,} operations")
        if self._bytes > self._most_bytes:
            raise TooLargeError(f"more than {self._most_bytes:,} bytes")
        return result
