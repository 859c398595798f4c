"""The precision of matrix products and convolutions: full for compressing, and the caller's for timing models.

Autocast is a setting of each thread, and all other settings belong to the process. So threads that compress at the same
time share full precision: the first one sets it, and the last one to leave restores what was set before.
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
    """Torch's settings for products and convolutions of float32 tensors.

    Torch has older and newer settings, and refuses to read an older one that the newer ones contradict.

    Attributes:
        matmul: `torch.get_float32_matmul_precision()`; `None` if that cannot be read.
        cudnn_tf32: `torch.backends.cudnn.allow_tf32`; `None` if that cannot be read.
        backends: The `fp32_precision` of the products of cuBLAS and oneDNN, of the convolutions and recurrent layers of
            cuDNN, and of the convolutions of oneDNN. `"none"` means that neither the backend nor torch as a whole has
            one.
        autocast: The dtypes to which autocast casts on the CPU and on the GPU; `None` without autocast.
    """

    matmul: str | None
    cudnn_tf32: bool | None
    backends: tuple[str, ...]
    autocast: tuple[torch.dtype | None, torch.dtype | None]

    @classmethod
    def current(cls) -> "Precision":
        """Return the present settings."""
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
        """Return the present settings, or those from before any thread began to compute in full precision."""
        return _SHARED.before()

    def is_full_on(self, device: torch.device) -> bool:
        """Return whether a device computes float32 in full precision, apart from autocast."""
        return all(
            precision in ("none", "ieee")
            for precision, its_device in zip(self.backends, _BACKEND_DEVICES, strict=True)
            if its_device == device.type
        )

    @contextmanager
    def autocast_only(self) -> Iterator[None]:
        """Apply only the autocast dtypes within a `with` block, and restore the previous ones afterwards."""
        with ExitStack() as stack:
            for device, dtype in zip(_DEVICES, self.autocast, strict=True):
                stack.enter_context(torch.autocast(device, dtype, enabled=dtype is not None))
            try:
                yield
            finally:
                torch.clear_autocast_cache()  # else an outer autocast reuses the casts, and times less

    def set_for_all(self, before: "Precision") -> None:
        """Apply these settings to the whole process.

        Args:
            before: The settings until now. Older settings that could not be read there are left as they are.
        """
        # The older settings come first, because they overwrite the newer ones.
        if self.matmul is not None and before.matmul is not None:
            torch.set_float32_matmul_precision(self.matmul)
        if self.cudnn_tf32 is not None and before.cudnn_tf32 is not None:
            torch.backends.cudnn.allow_tf32 = self.cudnn_tf32
        for backend, precision in zip(_backends(), self.backends, strict=True):
            backend.fp32_precision = "none"  # follow the global setting, also if it changes later
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision


FULL = Precision(matmul="highest", cudnn_tf32=False, backends=("ieee",) * 5, autocast=(None, None))
"""Full precision, in the tensors' own dtype. Sums of squares, and what is solved from them, are useless in less."""


class _Shared:
    """Full precision as a setting of the process, for as long as any thread computes in it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._depths: dict[int, int] = {}  # number of nested blocks in full precision, by thread
        self._before = FULL

    def before(self) -> Precision:
        """Return the settings from before full precision, with this thread's autocast."""
        with self._changed:
            current = Precision.current()
            return replace(self._before, autocast=current.autocast) if self._depths else current

    def enter(self, depth: int = 1) -> None:
        """Enter full precision in this thread for `depth` more nested blocks."""
        with self._changed:
            if not self._depths:
                self._before = Precision.current()
                FULL.set_for_all(self._before)
            thread = threading.get_ident()
            self._depths[thread] = self._depths.get(thread, 0) + depth

    def leave(self, depth: int = 1) -> None:
        """Leave full precision in this thread for `depth` nested blocks."""
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
        """Compute in another precision within a `with` block, one thread at a time.

        The thread leaves full precision, and waits until no other thread computes in it. So two waiting threads do not
        wait for each other. There is no wait if both precisions are the same on the device.
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
    """Compute in full precision within a `with` block.

    The previous settings are restored once no other thread computes in full precision.
    """
    _SHARED.enter()
    try:
        with FULL.autocast_only():
            yield
    finally:
        _SHARED.leave()


@dataclass(frozen=True)
class InPrecision:
    """A stopwatch that always times in one precision, whatever its caller's is."""

    stopwatch: Callable[[nn.Module, Tensor], float]
    precision: Precision

    def __call__(self, model: nn.Module, inputs: Tensor) -> float:
        """See `dcvit.metrics.latency.Stopwatch`."""
        with _SHARED.set_aside(self.precision, inputs.device), self.precision.autocast_only():
            return self.stopwatch(model, inputs)


def _backends() -> tuple[Any, ...]:
    """Return the objects that hold torch's newer settings."""
    cudnn: Any = torch.backends.cudnn
    onednn: Any = torch.backends.mkldnn
    return torch.backends.cuda.matmul, onednn.matmul, cudnn.conv, cudnn.rnn, onednn.conv


_BACKEND_DEVICES = ("cuda", "cpu", "cuda", "cuda", "cpu")
"""The type of device on which each of `_backends` computes."""


def _readable(read: Callable[[], T]) -> T | None:
    """Return a setting, or `None` if torch refuses to read it."""
    try:
        return read()
    except RuntimeError:
        return None
