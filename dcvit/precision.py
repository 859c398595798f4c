"""The precision of matrix products and convolutions: of the work, and of the caller, in which models are timed."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["FULL", "InPrecision", "Precision"]

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
        """That which the caller has set."""
        on_cpu, on_gpu = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None for device in _DEVICES
        )
        return cls(
            matmul=_readable(torch.get_float32_matmul_precision),
            cudnn_tf32=_readable(lambda: torch.backends.cudnn.allow_tf32),
            backends=tuple(backend.fp32_precision for backend in _backends()),
            autocast=(on_cpu, on_gpu),
        )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Compute in this precision in a block of code, or in the function that it decorates; then as before."""
        before = self.current()
        with ExitStack() as stack:
            for device, dtype in zip(_DEVICES, self.autocast, strict=True):
                stack.enter_context(torch.autocast(device, dtype, enabled=dtype is not None))
            self._set(before)
            try:
                yield
            finally:
                before._set(before)
                torch.clear_autocast_cache()  # else an outer autocast keeps what was cast, and the next pass is faster

    def _set(self, before: "Precision") -> None:
        """Make the settings these; older ones that could not be read before are left alone, to be as they were then."""
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


@dataclass(frozen=True)
class InPrecision:
    """A stopwatch that times in a precision, whatever it is called in."""

    stopwatch: Callable[[nn.Module, Tensor], float]
    precision: Precision

    def __call__(self, model: nn.Module, inputs: Tensor) -> float:
        """See `dcvit.latency.Stopwatch`."""
        with self.precision.applied():
            return self.stopwatch(model, inputs)


def _backends() -> tuple[Any, ...]:
    """Each setting of its own among the newer ones."""
    cudnn: Any = torch.backends.cudnn
    onednn: Any = torch.backends.mkldnn
    return torch.backends.cuda.matmul, onednn.matmul, cudnn.conv, cudnn.rnn, onednn.conv


def _readable(read: Callable[[], T]) -> T | None:
    """What a setting is; `None` where torch refuses to say."""
    try:
        return read()
    except RuntimeError:
        return None
