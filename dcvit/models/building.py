"""Building of models: of one that a file describes, within limits, and of one without values on the meta device."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Building", "TooLargeError", "without_values"]

MOST_OPERATIONS = 15_000
"""The largest number of torch operations to build a model. timm's largest models take 7,000."""

_WITH_GENERATOR = {"default": "generator", "low": "low_generator"}
"""The overload that takes a generator, by the overload that draws from torch's own generator."""


class TooLargeError(ValueError):
    """Raised if a description asks for a model above the limits."""


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Return the result of an operation; on the meta device without running what would only set a tensor's values.

    There torch decomposes an initialisation into many operations, which take most of the time that building takes.
    """
    in_place = func._schema.name.endswith("_") and torch.Tag.inplace_view not in func.tags
    if in_place and isinstance(args[0], torch.Tensor) and args[0].is_meta:
        return args[0]
    return func(*args, **kwargs)


class _WithoutValues(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def without_values() -> Iterator[None]:
    """Make new tensors on the meta device, and leave out their initialisation. It draws no random numbers."""
    with torch.device("meta"), _WithoutValues():  # type: ignore[no-untyped-call]
        yield


class Building(TorchDispatchMode):
    """A mode that counts and limits the torch operations of this thread while a model is built.

    On the meta device the operations take no memory, so they show what a model would take before it is built. Random
    numbers come from this object's generator, so that neither the caller's random state nor another thread's changes.

    Args:
        most_bytes: The limit for all tensors that the operations make, including temporary ones and buffers.
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
        result = _run(func, args, kwargs)
        self._operations += 1
        if not func._schema.is_mutable:
            self._bytes += sum(t.numel() * t.element_size() for t in tree_leaves(result) if isinstance(t, torch.Tensor))
        if self._operations > MOST_OPERATIONS:
            raise TooLargeError(f"more than {MOST_OPERATIONS:,} operations")
        if self._bytes > self._most_bytes:
            raise TooLargeError(f"more than {self._most_bytes:,} bytes")
        return result
