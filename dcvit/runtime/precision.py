"""The precision of matrix products and convolutions: of the work, and of the caller, in which models are timed.

Autocast is a setting of each thread, all others are the process's. So the threads that compress at the same time share
full precision: the first of them sets it, and the last one to leave restores what was set before.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["FULL", "InPrecision", "Precision", "full_precision"]

T = TypeVar("T")

_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Precision:
    """What torch makes of products and convolutions of float32 tensors.

    Torch has older settings and newer ones, and refuses to read the older where the newer say something else.

    Attributes:
        matmul: `torch.get_float32_matmul_precision()`; `None` where that cannot be read.
        cudnn_tf32: `torch.backends.cudnn.allow_tf32`; `None` where that cannot be read.
        backends: `fp32_precision` of the products of cuBLAS and oneDNN, and of the convolutions and recurrent layers of
            cuDNN and the convolutions of oneDNN; `"none"` where it has none of its own and none is set for all.
        autocast: What a CPU's and a GPU's operators are cast to, `None` without autocast.
    """

    matmul: str | None
    cudnn_tf32: bool | None
    backends: tuple[str, ...]
    autocast: tuple[torch.dtype | None, torch.dtype | None]

    @classmethod
    def current(cls) -> "Precision":
        """What is set now."""
        on_cpu, on_gpu = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None for device in _DEVICES
        )
        return cls(
            matmul=_readable(torch.get_float32_matmul_precision),
            cudnn_tf32=_readable(lambda: torch.backends.cudnn.allow_tf32),
            backends=tuple(backend.fp32_precision for backend in _backends()),
            autocast=(on_cpu, on_gpu),
        )

    @classmethod
    def of_caller(cls) -> "Precision":
        """What is set now, or was before this thread or another began to compute in full precision."""
        return _SHARED.before()

    def is_full_on(self, device: torch.device) -> bool:
        """Whether float32 is computed as such on a device, autocast aside."""
        return all(
            precision in ("none", "ieee")
            for precision, its_device in zip(self.backends, _BACKEND_DEVICES, strict=True)
            if its_device == device.type
        )

    @contextmanager
    def autocast_alone(self) -> Iterator[None]:
        """Cast as this says in a block of code, then as before."""
        with ExitStack() as stack:
            for device, dtype in zip(_DEVICES, self.autocast, strict=True):
                stack.enter_context(torch.autocast(device, dtype, enabled=dtype is not None))
            try:
                yield
            finally:
                torch.clear_autocast_cache()  # else an outer autocast keeps what was cast, and the next pass is faster

    def set_for_all(self, before: "Precision") -> None:
        """Make the process's settings these.

        Args:
            before: What they were. Older settings that could not be read then are left alone, to be as they were.
        """
        # The older first: they write the newer, too.
        if self.matmul is not None and before.matmul is not None:
            torch.set_float32_matmul_precision(self.matmul)
        if self.cudnn_tf32 is not None and before.cudnn_tf32 is not None:
            torch.backends.cudnn.allow_tf32 = self.cudnn_tf32
        for backend, precision in zip(_backends(), self.backends, strict=True):
            backend.fp32_precision = "none"  # what is set for all counts, and will where that is changed later
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision


FULL = Precision(matmul="highest", cudnn_tf32=False, backends=("ieee",) * 5, autocast=(None, None))
"""That of the tensors' own dtype: sums of squares, and what is solved from them, are worth nothing in less."""


class _Shared:
    """Full precision as the process's setting, for as long as a thread computes in it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._depths: dict[int, int] = {}  # of blocks of code that compute in it, one inside the other, by thread
        self._before = FULL

    def before(self) -> Precision:
        """What was set before, and this thread's autocast."""
        with self._changed:
            current = Precision.current()
            return replace(self._before, autocast=current.autocast) if self._depths else current

    def enter(self, depth: int = 1) -> None:
        """Compute in full precision in this thread, in so many blocks more."""
        with self._changed:
            if not self._depths:
                self._before = Precision.current()
                FULL.set_for_all(self._before)
            thread = threading.get_ident()
            self._depths[thread] = self._depths.get(thread, 0) + depth

    def leave(self, depth: int = 1) -> None:
        """No longer compute in it, in so many blocks."""
        with self._changed:
            thread = threading.get_ident()
            self._depths[thread] -= depth
            if not self._depths[thread]:
                del self._depths[thread]
            if not self._depths:
                self._before.set_for_all(self._before)
            self._changed.notify_all()

    @contextmanager
    def set_aside(self, precision: Precision, device: torch.device) -> Iterator[None]:
        """Compute in another precision in a block of code, one thread at a time.

        It waits until no other thread computes in full precision, and does not itself meanwhile, so that two that wait
        do not wait for each other. Where both precisions are the same on the device there is nothing to wait for.
        """
        with self._changed:
            depth = self._depths.get(threading.get_ident(), 0)
            if depth:
                self.leave(depth)
            try:
                self._changed.wait_for(lambda: not self._depths or precision.is_full_on(device))
                before = Precision.current()
                if not self._depths:
                    precision.set_for_all(before)
                try:
                    yield
                finally:
                    before.set_for_all(before)
            finally:
                if depth:
                    self.enter(depth)


_SHARED = _Shared()


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute in full precision in a block of code; then as before, once no other thread does any more."""
    _SHARED.enter()
    try:
        with FULL.autocast_alone():
            yield
    finally:
        _SHARED.leave()


@dataclass(frozen=True)
class InPrecision:
    """A stopwatch that times in a precision, whatever it is called in."""

    stopwatch: Callable[[nn.Module, Tensor], float]
    precision: Precision

    def __call__(self, model: nn.Module, inputs: Tensor) -> float:
        """See `dcvit.metrics.latency.Stopwatch`."""
        with _SHARED.set_aside(self.precision, inputs.device), self.precision.autocast_alone():
            return self.stopwatch(model, inputs)


def _backends() -> tuple[Any, ...]:
    """Each setting of its own among the newer ones."""
    cudnn: Any = torch.backends.cudnn
    onednn: Any = torch.backends.mkldnn
    return torch.backends.cuda.matmul, onednn.matmul, cudnn.conv, cudnn.rnn, onednn.conv


_BACKEND_DEVICES = ("cuda", "cpu", "cuda", "cuda", "cpu")
"""Of each of them, the device that it computes on."""


def _readable(read: Callable[[], T]) -> T | None:
    """What a setting is; `None` where torch refuses to say."""
    try:
        return read()
    except RuntimeError:
        return None
