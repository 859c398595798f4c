"""Registration of ops with torch, and selection of the implementation that runs.

An op is a schema in the namespace `dcvit`. It is written in Python, so that op, fake and autograd exist without a
compiler. Its implementations are registered as

- the overload `dcvit::<op>`, for which `csrc/` registers kernels with the dispatch keys CPU ("cpp") and CUDA ("cuda");
- the overload `dcvit::<op>.triton`, for which `dcvit/kernels/<op>.py` launches Triton kernels on the same devices.

Torch's dispatcher says whether the kernels of `csrc/` were built. If they were not, the overload falls back to
reference kernels in plain torch. These keep `torch.ops.dcvit`, `torch.library.opcheck` and exported programs working,
but `impl=` never counts them as an implementation.
"""

import functools
import importlib
import importlib.machinery
import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.flop_counter import flop_registry, register_flop_formula

from dcvit.errors import DcvitError

Impl = Literal["auto", "eager", "cpp", "cuda", "triton"]
"""The values of the selector `impl=` that every op takes."""

_Function = TypeVar("_Function", bound=Callable[..., Any])

_LIBRARY = torch.library.Library("dcvit", "DEF")
_DIRECT: dict[OpOverload, type[torch.autograd.Function]] = {}


# --- registering ops with torch --------------------------------------------------------------------------------------


def define(name: str, schema: str, *, kernel: Callable[..., Any], fake: Callable[..., Any]) -> OpOverload:
    """Define `dcvit::<name>` and return it.

    Args:
        name: The op's name, followed by `.overload` for any overload but the default one.
        schema: The arguments and returns, as in `"(Tensor x) -> Tensor"`.
        kernel: The kernel for every device for which no other kernel is registered.
        fake: A function that makes outputs of the right shape, dtype and device, without data.
    """
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dcvit::{name}", fake, lib=_LIBRARY)
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.dcvit, packet), overload or "default")
    assert isinstance(op, OpOverload)
    return op


def register_autograd(op: OpOverload, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Register a derivative of `op`, with the arguments of `torch.library.register_autograd`.

    The derivative is computed without autocast, like the op.
    """
    backward = _without_autocast(backward)
    torch.library.register_autograd(op.name(), backward, setup_context=setup_context, lib=_LIBRARY)

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                result = op(*args)
            setup_context(ctx, args, result)
            return result

    Direct.backward = staticmethod(backward)  # type: ignore[method-assign]
    _DIRECT[op] = Direct


def _without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    def computed(ctx: Any, *grads: Tensor | None) -> Any:
        device = next((grad.device.type for grad in grads if grad is not None), None)
        if device is None or not torch.is_autocast_enabled(device):
            return backward(ctx, *grads)
        with torch.autocast(device, enabled=False):
            return backward(ctx, *grads)

    return computed


def no_autocast(first: Tensor) -> str | None:
    """Refuse autocast; ops with matrix products use this as their `limit`."""
    if torch.is_autocast_enabled(first.device.type):
        return "autocast casts the inputs of matrix products, and only the eager implementation leaves them to torch"
    return None


def call(op: OpOverload, *args: Any) -> Any:
    """Return `op(*args)`, without the Python overhead of torch's registered autograd; the derivative is the same.

    The overhead was 100 us for forward and backward with cold caches, as much as a small op takes.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
        return _DIRECT[op].apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def refuse_double_backward(op: OpOverload) -> None:
    """Make `op`, which computes a first derivative, raise an error if it is differentiated again."""

    def backward(_ctx: Any, *_grads: Tensor) -> None:
        raise RuntimeError(
            f"{op.name()} has no second derivative: only the eager implementation can be differentiated twice. "
            "Pass impl='eager', or, if the model is fused, call dcvit.unfuse(model) first."
        )

    register_autograd(op, backward, setup_context=lambda ctx, inputs, output: None)


def count_flops(op: OpOverload, formula: Callable[..., int]) -> None:
    """Tell torch's `FlopCounterMode` what `op` computes.

    Args:
        op: The op.
        formula: The operations of its products, from its arguments, of tensors their shapes.
    """

    def counted(*args: Any, out_shape: object = None, **kwargs: Any) -> int:
        return formula(*args, **kwargs)

    if op.overloadpacket not in flop_registry:  # an op's formula is that of all of its overloads
        register_flop_formula(op.overloadpacket)(counted)


def launcher(op: str, function: str) -> Callable[..., Any]:
    """Return `dcvit.kernels.<op>.<function>`, which is imported at its first call because Triton is optional."""

    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(f"dcvit.kernels.{op}"), function)(*args)

    return launch


# --- choosing an implementation --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Implementation:
    """An implementation other than eager, with the inputs that it supports.

    Attributes:
        op: The overload that runs.
        device: The device type that it supports.
        dtypes: The floating dtypes that it supports; all tensors of a call share one.
        missing: Returns why the implementation is not installed, or `None` if it is.
        limit: Returns why this op does not support the first tensor, or `None` if it does.
        gains: Returns whether the implementation is faster than eager for these tensors, as measured by
            `python -m benchmarks kernels`. Only "auto" uses it.
    """

    op: OpOverload
    device: str
    dtypes: tuple[torch.dtype, ...]
    missing: Callable[[], str | None] = lambda: None
    limit: Callable[[Tensor], str | None] = lambda first: None
    gains: Callable[[Mapping[str, Tensor | None]], bool] = lambda tensors: True

    def refuses(self, tensors: Mapping[str, Tensor | None]) -> str | None:
        """Return why the call cannot run with this implementation, or `None` if it can."""
        if reason := self.missing():
            return reason
        name, first = next((name, tensor) for name, tensor in tensors.items() if tensor is not None)
        device, dtype = first.device, first.dtype
        if device.type != self.device:
            return f"it runs on {self.device} tensors, and {name} is on {device}"
        if dtype not in self.dtypes:
            return f"it takes {', '.join(map(str, self.dtypes))}, and {name} is {dtype}"
        for other, tensor in tensors.items():
            if tensor is None:
                continue
            if tensor.dtype is not dtype:
                return f"all tensors must share a dtype, and {other} is {tensor.dtype}, {name} {dtype}"
            if tensor.device != device:
                return f"all tensors must share a device, and {other} is on {tensor.device}, {name} on {device}"
        if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
            return "only the eager implementation supports torch.func transforms and forward-mode differentiation"
        return self.limit(first)


def select(
    name: str, impl: str, implementations: Mapping[str, Implementation], tensors: Mapping[str, Tensor | None]
) -> OpOverload | None:
    """Select the implementation of a call.

    Args:
        name: The public function's name, for messages.
        impl: "eager", a key of `implementations`, or "auto" for the first one that supports the call and is faster than
            eager.
        implementations: The op's implementations, in order of preference.
        tensors: The floating inputs of the call by name; `None` for an optional one that is left out.

    Returns:
        The overload to call, or `None` for eager.

    Raises:
        DcvitError: If `impl` is unknown, or names an implementation that does not support the call.
    """
    if impl == "eager":
        return None
    if impl == "auto":
        for implementation in implementations.values():
            if implementation.refuses(tensors) is None and implementation.gains(tensors):
                return implementation.op
        return None
    if impl not in implementations:
        known = ", ".join(("auto", "eager", *implementations))
        raise DcvitError(f"{name}: impl={impl!r} is unknown. Choose one of {known}.")
    if reason := implementations[impl].refuses(tensors):
        raise DcvitError(f"{name}: impl={impl!r} cannot run: {reason}. Pass impl='auto' to use one that can.")
    return implementations[impl].op


def cpp(op: OpOverload, *dtypes: torch.dtype, **options: Any) -> Implementation:
    """Return the kernel that `csrc/cpu` registers for `op`."""
    return Implementation(op, "cpu", dtypes, missing=_missing_kernel(op, "CPU"), **options)


def cuda(op: OpOverload, *dtypes: torch.dtype, **options: Any) -> Implementation:
    """Return the kernel that `csrc/cuda` registers for `op`."""
    return Implementation(op, "cuda", dtypes, missing=_missing_kernel(op, "CUDA"), **options)


def triton(op: OpOverload, *dtypes: torch.dtype, **options: Any) -> Implementation:
    """Return the launcher in `dcvit/kernels` for the overload `op`."""
    module = f"dcvit.kernels.{op._schema.name.removeprefix('dcvit::')}"

    @_constant_in_graphs
    def missing() -> str | None:
        if not _exists("triton"):
            return "Triton is not installed (pip install triton)"
        if not _exists(module):
            return f"{module} is not part of this installation"
        return None

    return Implementation(op, "cuda", dtypes, missing=missing, **options)


def _missing_kernel(op: OpOverload, key: str) -> Callable[[], str | None]:
    @functools.cache
    def reason() -> str | None:
        problem = extension_problem()
        if torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key):
            return None
        return problem or _build_note(key) or f"the compiled extension has no {key} kernel of {op.name()}"

    return _constant_in_graphs(lambda: reason())


@functools.cache
def extension_problem() -> str | None:
    """Load the compiled extension, once, and return why it cannot be used; `None` if it can."""
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    built = [file for suffix in suffixes if (file := _build() / f"_C{suffix}").is_file()]
    if not built:
        reason = _build_note("CPU") or "reinstall dcvit where a C++ compiler is found"
        return f"the compiled extension was never built ({reason})"
    only = _build_note("only")
    if only not in (None, torch.__version__):  # it might load nevertheless, and crash
        return f"the compiled extension supports only torch {only}, not torch {torch.__version__} (reinstall dcvit)"
    try:
        torch.ops.load_library(built[0])
    except OSError as error:
        built_for = _build_note("torch")
        origin = f", built against torch {built_for}," if built_for else ""
        return f"the compiled extension{origin} does not load with torch {torch.__version__} (reinstall dcvit): {error}"
    return None


def _build() -> Path:
    """Return the folder of the compiled extension: `$DCVIT_KERNELS` if it is set, otherwise the package."""
    return Path(os.environ.get("DCVIT_KERNELS") or Path(__file__).parent.parent)


def _build_note(about: str) -> str | None:
    """Return an entry of the notes that setup.py made about the build, or `None`.

    The entry "torch" is the version that it was built for, and "only" the single version that can load it, if there is
    only one. The entries "CPU" and "CUDA" say why there are no kernels for that device.
    """
    try:
        note: dict[str, str | None] = json.loads((_build() / "_C.json").read_text())
    except OSError:
        return None
    return note.get(about.lower())


def _constant_in_graphs(function: _Function) -> _Function:
    # Installed packages do not change while a graph exists, and dynamo cannot trace the checks for them. This is the
    # effect of torch.compiler.assume_constant_result, which would import dynamo and so take a second.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@functools.cache
def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package does not exist either
        return False


def availability(implementations: Mapping[str, Mapping[str, Implementation]]) -> dict[str, str | None]:
    """Return, for each implementation, why no op can use it on this machine; `None` if an op can.

    Args:
        implementations: The implementations of each op.
    """
    reasons: dict[str, str | None] = {"eager": None}
    for name in ("cpp", "cuda", "triton"):
        tables = [table[name] for table in implementations.values() if name in table]
        problems = [table.missing() for table in tables]
        if all(problems):
            reasons[name] = problems[0]
        else:
            reasons[name] = (
                "torch sees no GPU" if tables[0].device == "cuda" and not torch.cuda.is_available() else None
            )
    return reasons
