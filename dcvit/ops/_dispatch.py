"""How ops are made known to torch, and which implementation of an op runs.

An op is a schema in the namespace `dcvit`, written in Python so that op, fake and autograd exist without a compiler.
Implementations come in as

- the overload `dcvit::<op>`: `csrc/` registers its kernels for the dispatch keys CPU ("cpp") and CUDA ("cuda");
- the overload `dcvit::<op>.triton`: `dcvit/kernels/<op>.py` launches Triton kernels, which share those devices.

Whether csrc was built is asked of torch's dispatcher. Where it was not, the overload falls back to reference kernels in
plain torch: they keep `torch.ops.dcvit`, `torch.library.opcheck` and exported programs working, but `impl=` never
counts them as an implementation.
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
"""The one spelling of the selector that every op takes as `impl=`."""

_Function = TypeVar("_Function", bound=Callable[..., Any])

_LIBRARY = torch.library.Library("dcvit", "DEF")
_DIRECT: dict[OpOverload, type[torch.autograd.Function]] = {}


# --- making ops known to torch ---------------------------------------------------------------------------------------


def define(name: str, schema: str, *, kernel: Callable[..., Any], fake: Callable[..., Any]) -> OpOverload:
    """Define `dcvit::<name>` and return it.

    Args:
        name: The op, with `.overload` if it is not the default one.
        schema: Arguments and returns, as in `"(Tensor x) -> Tensor"`.
        kernel: Runs on every device for which no other kernel is registered.
        fake: Makes outputs of the right shape, dtype and device without data.
    """
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dcvit::{name}", fake, lib=_LIBRARY)
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.dcvit, packet), overload or "default")
    assert isinstance(op, OpOverload)
    return op


def register_autograd(op: OpOverload, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Give `op` a derivative; `backward` and `setup_context` are those of `torch.library.register_autograd`.

    The derivative is computed as the op was, without autocast.
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
    """The `limit` of ops with matrix products."""
    if torch.is_autocast_enabled(first.device.type):
        return "autocast casts the inputs of matrix products, which eager code leaves to torch"
    return None


def call(op: OpOverload, *args: Any) -> Any:
    """`op(*args)`, without what torch's registered autograd does around it in Python.

    That took 100 us forward and backward with cold caches, as much as a small op; the derivative is the same.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
        return _DIRECT[op].apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def refuse_double_backward(op: OpOverload) -> None:
    """Make `op`, which computes a first derivative, refuse to be differentiated again."""

    def backward(_ctx: Any, *_grads: Tensor) -> None:
        raise RuntimeError(
            f"{op.name()} has no second derivative: only the eager implementation can be differentiated twice. "
            "Pass impl='eager'."
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
    """`dcvit.kernels.<op>.<function>`, imported when it is first called because Triton is optional."""

    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(f"dcvit.kernels.{op}"), function)(*args)

    return launch


# --- choosing an implementation --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Implementation:
    """An implementation other than eager, and the inputs that it takes.

    Attributes:
        op: What runs.
        device: The device type that it runs on.
        dtypes: The floating dtypes that it takes; all tensors of a call share one.
        missing: Says why the implementation is not there, or `None` if it is.
        limit: Says, of the first tensor, why the op refuses it for a reason of its own, or `None` if it does not.
        gains: Whether it is faster than eager with the given tensors, by `python -m benchmarks kernels`. "auto" asks.
    """

    op: OpOverload
    device: str
    dtypes: tuple[torch.dtype, ...]
    missing: Callable[[], str | None] = lambda: None
    limit: Callable[[Tensor], str | None] = lambda first: None
    gains: Callable[[Mapping[str, Tensor | None]], bool] = lambda tensors: True

    def refuses(self, tensors: Mapping[str, Tensor | None]) -> str | None:
        """Say why the call cannot run here, or return `None` if it can."""
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
            return "torch.func transforms and forward-mode differentiation see through eager code only"
        return self.limit(first)


def select(
    name: str, impl: str, implementations: Mapping[str, Implementation], tensors: Mapping[str, Tensor | None]
) -> OpOverload | None:
    """Choose what runs a call.

    Args:
        name: The public function, for messages.
        impl: "eager", a key of `implementations`, or "auto" for the first of them that does not refuse and gains.
        implementations: The op's table, in order of preference.
        tensors: The floating inputs of the call by name; `None` where an optional one is left out.

    Returns:
        The overload to call, or `None` for eager.

    Raises:
        DcvitError: If `impl` is unknown, or names an implementation that refuses the call.
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
        raise DcvitError(f"{name}: impl={impl!r} cannot run: {reason}. Pass impl='auto' to take what can.")
    return implementations[impl].op


def cpp(op: OpOverload, *dtypes: torch.dtype, **asked: Any) -> Implementation:
    """The kernel that `csrc/cpu` registers for `op`."""
    return Implementation(op, "cpu", dtypes, missing=_missing_kernel(op, "CPU"), **asked)


def cuda(op: OpOverload, *dtypes: torch.dtype, **asked: Any) -> Implementation:
    """The kernel that `csrc/cuda` registers for `op`."""
    return Implementation(op, "cuda", dtypes, missing=_missing_kernel(op, "CUDA"), **asked)


def triton(op: OpOverload, *dtypes: torch.dtype, **asked: Any) -> Implementation:
    """The launcher in `dcvit/kernels` behind the overload `op`."""
    module = f"dcvit.kernels.{op._schema.name.removeprefix('dcvit::')}"

    @_constant_in_graphs
    def missing() -> str | None:
        if not _exists("triton"):
            return "Triton is not installed (pip install triton)"
        if not _exists(module):
            return f"{module} is not part of this installation"
        return None

    return Implementation(op, "cuda", dtypes, missing=missing, **asked)


def _missing_kernel(op: OpOverload, key: str) -> Callable[[], str | None]:
    @functools.cache
    def asked() -> str | None:
        problem = extension_problem()
        if torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key):
            return None
        return problem or _build_note(key) or f"the compiled extension holds no {key} kernel of {op.name()}"

    return _constant_in_graphs(lambda: asked())


@functools.cache
def extension_problem() -> str | None:
    """Load the compiled extension, once, and say what is wrong with it; `None` if nothing is."""
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    built = [file for suffix in suffixes if (file := _build() / f"_C{suffix}").is_file()]
    if not built:
        reason = _build_note("CPU") or "reinstall dcvit where a C++ compiler is found"
        return f"the compiled extension was never built ({reason})"
    only = _build_note("only")
    if only not in (None, torch.__version__):  # it might load all the same, and crash
        return f"the compiled extension serves torch {only} alone, not torch {torch.__version__} (reinstall dcvit)"
    try:
        torch.ops.load_library(built[0])
    except OSError as error:
        was = _build_note("torch")
        return (
            f"the compiled extension{f', built against torch {was},' if was else ''} does not load with torch "
            f"{torch.__version__} (reinstall dcvit): {error}"
        )
    return None


def _build() -> Path:
    """Where the compiled extension is: in the package, or in `$DCVIT_KERNELS`, a folder with another build of it."""
    return Path(os.environ.get("DCVIT_KERNELS") or Path(__file__).parent.parent)


def _build_note(about: str) -> str | None:
    """What setup.py kept of the build.

    That is the "torch" that it was for, the "only" torch that can load it if others cannot, or why there are no kernels
    for "CPU" or "CUDA".
    """
    try:
        note: dict[str, str | None] = json.loads((_build() / "_C.json").read_text())
    except OSError:
        return None
    return note.get(about.lower())


def _constant_in_graphs(function: _Function) -> _Function:
    # What is installed does not change while a graph lives, and dynamo cannot trace the questions that find it out.
    # This is torch.compiler.assume_constant_result, without the second that its import of dynamo takes.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@functools.cache
def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even its parent package is there
        return False


def availability(implementations: Mapping[str, Mapping[str, Implementation]]) -> dict[str, str | None]:
    """For each implementation, why no op can run with it on this machine; `None` if some can.

    Args:
        implementations: The tables of the ops, by op.
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
