"""The matrix that every op passes with every implementation.

A test module describes its op once, in a subclass of `OpMatrix` or `DifferentiableMatrix` named `Test…`, and may add
tests of its own. `conftest.py` generates each for every case, dtype and implementation: for all if the test takes
`impl`, for all but eager if it takes `kernel`. Besides the public implementations there are three that only tests know:

- "reference": the plain-torch kernels behind the op's schema, which run where nothing was compiled;
- "host": the bodies of `csrc/cuda`, compiled for the CPU by `cuda_host.py`;
- "interpreted": the Triton kernels on the CPU, in Triton's interpreter.
"""

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from dcvit.errors import DcvitError
from dcvit.ops import _dispatch

NAMES = ("eager", "reference", "cpp", "host", "interpreted", "cuda", "triton")
NATIVE_NAMES = ("cpp", "host")
GPU_NAMES = ("cuda", "triton")
ALL_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Inputs = dict[str, Any]
Draw = Callable[[int, int], int]
Results = dict[str, Tensor]


class OpMatrix:
    """What a test module says about its op, and the tests that follow from it.

    Attributes:
        function: The public function, as a `staticmethod`; its name is that of the op and of its module.
        cases: Inputs of the public function by case, in float64; "small" is used where one case is enough, and "tiny",
            if there is one, where each number costs a call.
        gradients: Inputs that have a gradient.
        mutated: Inputs that are changed in place.
        dtypes: What the op itself takes; an implementation may take fewer.
        random: Inputs of a random size, in float64, from a function that draws an integer between two.
    """

    function: ClassVar[Callable[..., Tensor]]
    cases: ClassVar[Mapping[str, Callable[[], Inputs]]]
    gradients: ClassVar[tuple[str, ...]] = ()
    mutated: ClassVar[tuple[str, ...]] = ()
    dtypes: ClassVar[tuple[torch.dtype, ...]] = ALL_DTYPES
    random: ClassVar[Callable[[Draw], Inputs]]

    # The matrix

    def test_budget(self, kernel: str, case: str, dtype: torch.dtype) -> None:
        inputs = self.inputs(case, dtype, kernel)
        self.assert_within_budget(self.run(kernel, inputs), inputs)

    def test_non_contiguous(self, impl: str) -> None:
        inputs = {name: _non_contiguous(value) for name, value in self.inputs("small", torch.float32, impl).items()}
        assert not any(isinstance(value, Tensor) and value.is_contiguous() for value in inputs.values())
        self.assert_within_budget(self.run(impl, inputs, cotangent=_expanded), inputs, cotangent=_expanded)

    def test_poisoned_memory(self, kernel: str) -> None:
        inputs = self.inputs("small", torch.float32, kernel)
        clean = self.run(kernel, inputs)
        with poisoned_memory():
            poisoned = self.run(kernel, inputs)
        for name, value in clean.items():
            assert torch.isfinite(value).all(), name
            assert torch.equal(value, poisoned[name]), f"{name} depends on memory that the call did not write"

    def test_any_size_strides_and_dtype(self, kernel: str) -> None:
        """Under the sanitizers of `make check-native` this shows that nothing out of bounds is touched."""
        examples = int(os.environ.get("DCVIT_FUZZ", "40" if kernel in ("cpp", "host") else "4"))

        @settings(max_examples=examples, deadline=None, database=None, derandomize="DCVIT_FUZZ" not in os.environ,
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(st.data())
        def run(data: st.DataObject) -> None:
            torch.manual_seed(data.draw(st.integers(0, 2**31)))
            made = type(self).random(lambda low, high: data.draw(st.integers(low, high)))
            dtype = data.draw(st.sampled_from(self.dtypes_of(kernel)))
            inputs = {name: value for name, value in made.items() if value is not None}
            for name, value in inputs.items():
                if isinstance(value, Tensor):
                    value = value.to(device_of(kernel), None if name == "idx" else dtype)
                    inputs[name] = _laid_out(value, data)
            self.assert_within_budget(self.run(kernel, inputs), inputs)

        run()

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks at copies
    def test_opcheck(self, kernel: str) -> None:
        inputs = self.inputs("small", torch.float32, kernel)
        with Recorder() as recorder:
            self.run(kernel, inputs)
            if self.gradients:
                self.run(kernel, inputs, passes=2)
        assert recorder.calls, "no op of dcvit was called"
        for op, args in recorder.calls.items():
            if self.gradients and op._schema.name == f"dcvit::{self.function.__name__}":
                for arg in args:
                    if isinstance(arg, Tensor) and arg.is_floating_point():
                        arg.requires_grad_()
            torch.library.opcheck(op, args)

    def test_compile(self, impl: str) -> None:
        inputs = self.inputs("small", torch.float32, impl)
        torch.compiler.reset()
        compiled = torch.compile(functools.partial(self.call, impl), fullgraph=True, backend="aot_eager")
        self.assert_within_budget(self.run(impl, inputs, call=compiled), inputs)

    # How the tests above run the op

    @classmethod
    def dtypes_of(cls, kernel: str) -> tuple[torch.dtype, ...]:
        found, _ = implementation(cls, kernel)
        return cls.dtypes if found is None else tuple(dtype for dtype in cls.dtypes if dtype in found.dtypes)

    @classmethod
    def module(cls) -> ModuleType:
        # By name, because the package's attribute of that name is the function.
        return importlib.import_module(f"dcvit.ops.{cls.function.__name__}")

    @classmethod
    def inputs(cls, case: str, dtype: torch.dtype, impl: str) -> Inputs:
        torch.manual_seed(0)
        device = device_of(impl)
        return {
            name: value.to(device, dtype if value.is_floating_point() else None) if isinstance(value, Tensor) else value
            for name, value in cls.cases[case]().items()
            if value is not None
        }

    @classmethod
    def call(cls, impl: str, inputs: Inputs) -> Results:
        """Call the public function; outputs by name, changed inputs included."""
        inputs = {name: value.clone() if name in cls.mutated else value for name, value in inputs.items()}
        output = cls.function(**inputs, impl=impl)
        return {"output": output} | {name: inputs[name] for name in cls.mutated}

    @classmethod
    def run(
        cls,
        impl: str,
        inputs: Inputs,
        *,
        gradients: tuple[str, ...] | None = None,
        cotangent: Callable[[Tensor], Tensor] | None = None,
        passes: int = 1,
        call: Callable[[Inputs], Results] | None = None,
    ) -> Results:
        """Outputs, and gradients of the last of `passes` backward passes, by name."""
        wanted = [name for name in (gradients or cls.gradients) if name in inputs]
        inputs = inputs | {name: _leaf(inputs[name]) for name in wanted}
        results = (call or functools.partial(cls.call, impl))(inputs)
        if not wanted:
            return results
        output = results["output"]
        weights = (cotangent or _random_like)(output)
        for last in [False] * (passes - 1) + [True]:
            grads = torch.autograd.grad(output, [inputs[name] for name in wanted], weights, retain_graph=not last)
        detached = {name: value.detach() for name, value in results.items()}
        return detached | {f"gradient of {name}": grad for name, grad in zip(wanted, grads, strict=True)}

    @classmethod
    def assert_within_budget(
        cls, results: Results, inputs: Inputs, *, cotangent: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Hold `results` to the error of eager in the same dtype, against eager in float64.

        A tensor's error is its largest. To eager's is added what rounding alone does to the largest value, four times:
        eager's own error can be zero by luck, above all in a scalar, and a sum in another order rounds otherwise.
        In float64 nothing better than eager serves as truth, so both may err: by the 45 roundings that a sum of 2000
        terms, the longest here, is expected to gather.
        """
        double = {
            name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()
        }
        eager = cls.run("eager", inputs, cotangent=cotangent)
        truth = cls.run("eager", double, cotangent=cotangent)
        for name, value in results.items():
            assert value.dtype == eager[name].dtype, f"{name} is {value.dtype}, eager's {eager[name].dtype}"
            assert value.shape == eager[name].shape, f"{name} is {list(value.shape)}, eager's {list(eager[name].shape)}"
            assert torch.equal(value.isnan(), truth[name].isnan()), f"NaN in {name}"
            exact = truth[name].nan_to_num()
            error, allowed = (_largest(x.nan_to_num().double() - exact) for x in (value, eager[name]))
            roundings = 2 * 45 if value.dtype == torch.float64 else 4
            allowed += roundings * torch.finfo(value.dtype).eps * _largest(exact)
            assert error <= allowed, f"{name} is off by {error:.3e}, allowed are {allowed:.3e}"


class DifferentiableMatrix(OpMatrix):
    """The tests of an op that has gradients."""

    def test_gradcheck(self, impl: str) -> None:
        inputs = self.inputs("tiny" if "tiny" in self.cases else "small", torch.float64, impl)
        names = [name for name in self.gradients if inputs.get(name) is not None]

        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            return tuple(self.call(impl, inputs | dict(zip(names, tensors, strict=True))).values())

        tensors = [inputs[name].requires_grad_() for name in names]
        assert torch.autograd.gradcheck(function, tensors)
        if impl == "eager":
            assert torch.autograd.gradgradcheck(function, tensors)

    def test_backward_twice(self, kernel: str) -> None:
        inputs = self.inputs("small", torch.float32, kernel)
        self.assert_within_budget(self.run(kernel, inputs, passes=2), inputs)

    def test_single_gradients(self, kernel: str) -> None:
        inputs = self.inputs("small", torch.float32, kernel)
        for name in self.gradients:
            results = self.run(kernel, inputs, gradients=(name,))
            assert f"gradient of {name}" in results
            self.assert_within_budget(results, inputs)

    def test_backward_under_autocast(self, kernel: str) -> None:
        """It is the derivative of what was computed, which autocast had no part in."""
        inputs = self.inputs("small", torch.float32, kernel)
        first = inputs[self.gradients[0]].requires_grad_()
        gradients = []
        for enabled in (False, True):
            output = self.call(kernel, inputs)["output"]
            with torch.autocast(first.device.type, torch.bfloat16, enabled=enabled):
                gradients += torch.autograd.grad(output.sum(), first)
        assert torch.equal(*gradients)

    @pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning")  # of torch's own forward mode
    def test_forward_mode_is_left_to_eager(self, kernel: str) -> None:
        inputs = self.inputs("small", torch.float32, kernel)
        name = self.gradients[0]
        tangents = []
        with forward_ad.dual_level():
            inputs[name] = forward_ad.make_dual(inputs[name], torch.ones_like(inputs[name]))
            for impl in ("auto", "eager"):
                tangents.append(forward_ad.unpack_dual(self.call(impl, inputs)["output"]).tangent)
            with pytest.raises(DcvitError, match=rf"impl='{kernel}' cannot run: .*forward-mode"):
                self.call(kernel, inputs)
        assert tangents[0] is not None
        assert torch.equal(*tangents)

    def test_a_batch_of_gradients(self, kernel: str) -> None:
        inputs = self.inputs("small", torch.float32, kernel)
        first = inputs[self.gradients[0]].requires_grad_()
        output = self.call(kernel, inputs)["output"]
        grads = torch.randn(3, *output.shape, device=output.device)
        (together,) = torch.autograd.grad(output, first, grads, retain_graph=True, is_grads_batched=True)
        for grad, found in zip(grads, together, strict=True):
            (alone,) = torch.autograd.grad(output, first, grad, retain_graph=True)
            torch.testing.assert_close(found, alone)

    def test_double_backward_is_refused(self, kernel: str) -> None:
        inputs = self.inputs("small", torch.float32, kernel)
        first = inputs[self.gradients[0]].requires_grad_()
        output = self.call(kernel, inputs)["output"]
        (gradient,) = torch.autograd.grad(output.sum(), first, create_graph=True)
        with pytest.raises(RuntimeError, match=r"no second derivative.*Pass impl='eager'"):
            torch.autograd.grad(gradient.sum(), first)


def names(matrix: type[OpMatrix]) -> list[str]:
    """Those of `NAMES` that the op has."""
    backend = {"cpp": "cpp", "host": "cuda", "cuda": "cuda", "interpreted": "triton", "triton": "triton"}
    table = matrix.module().IMPLEMENTATIONS
    return [name for name in NAMES if name not in backend or backend[name] in table]


def device_of(impl: str) -> str:
    """Where an implementation runs."""
    return "cuda" if impl in GPU_NAMES else "cpu"


def implementation(matrix: type[OpMatrix], name: str) -> tuple[_dispatch.Implementation | None, str | None]:
    """What `name` stands for in the op's table, `None` for eager, and why it cannot be tested here."""
    table = matrix.module().IMPLEMENTATIONS
    if name == "eager":
        return None, None
    if name == "reference":
        op = _test_overload(matrix.function.__name__, ".reference")
        return replace(table["cpp"], op=op, dtypes=matrix.dtypes, missing=lambda: None), None
    if name == "host":
        op = _test_overload(matrix.function.__name__, ".host")
        problem = None if importlib.util.find_spec("cuda_host") else "csrc/cuda has no host build yet"
        return replace(table["cuda"], op=op, device="cpu", missing=_host_problem(op)), problem
    if name == "interpreted":
        return replace(table["triton"], device="cpu"), table["triton"].missing()
    problem = table[name].missing()
    if name in GPU_NAMES and not torch.cuda.is_available():
        problem = problem or "no GPU"
    return table[name], problem


@functools.cache
def _test_overload(op: str, overload: str) -> Any:
    """An overload that runs the plain-torch kernels until another kernel is registered for a device."""
    module = importlib.import_module(f"dcvit.ops.{op}")
    kernels = [getattr(module, name) for name in ("forward", "backward", "rescale") if hasattr(module, name)]
    return module.define_overload(overload, *kernels)


def has_kernel(op: str, key: str) -> bool:
    """Whether the whole family of `op`, `dcvit::<name><overload>`, is compiled for `key`; it must not be in part.

    What is not compiled runs in plain torch, and a test of the implementation would not notice.
    """
    name, dot, overload = op.removeprefix("dcvit::").partition(".")
    family = [f"dcvit::{name}{part}{dot}{overload}" for part in ("", "_backward", "_rescale")]
    defined = [member for member in family if hasattr(torch.ops.dcvit, member.removeprefix("dcvit::").split(".")[0])]
    found = [member for member in defined if torch._C._dispatch_has_kernel_for_dispatch_key(member, key)]
    assert found in ([], defined), f"{key} kernels of {found} without those of {sorted({*defined} - {*found})}"
    return bool(found)


def _host_problem(op: Any) -> Callable[[], str | None]:
    # Asked when a test runs, not when it is collected, because the answer takes a compiler.
    def problem() -> str | None:
        reason: str | None = importlib.import_module("cuda_host").load()
        return reason or (None if has_kernel(op.name(), "CPU") else f"the host build holds no {op.name()}")

    return torch.compiler.assume_constant_result(problem)


class Recorder(TorchDispatchMode):
    """Remembers the last arguments of each op of dcvit that runs inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "dcvit":
            self.calls[func] = tuple(arg.clone() if isinstance(arg, Tensor) else arg for arg in args)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill the memory that torch hands out with NaN, and with glibc what malloc hands out with 3.4e38."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    # Tensors that kernels make through the stable ABI are not filled by torch.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    m_perturb = -6
    torch.use_deterministic_algorithms(True)
    if mallopt:
        mallopt(m_perturb, 0x80)  # new memory gets its complement, 0x7f
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        if mallopt:
            mallopt(m_perturb, 0)


def _largest(difference: Tensor) -> float:
    return difference.abs().max().item() if difference.numel() else 0.0


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _random_like(output: Tensor) -> Tensor:
    # The same values for each dtype: drawn in bfloat16, which the others hold exactly up to float16's range.
    generator = torch.Generator().manual_seed(1)
    return torch.randn(output.shape, generator=generator, dtype=torch.bfloat16).to(output.device, output.dtype)


def _expanded(output: Tensor) -> Tensor:
    return output.new_full((), 0.75).expand(output.shape)


def _laid_out(value: Tensor, data: st.DataObject) -> Tensor:
    """The same values somewhere within a larger tensor: with a distance to its start, steps, and dimensions swapped."""
    steps = [data.draw(st.integers(1, 2)) for _ in value.shape]
    order = data.draw(st.permutations(range(value.dim())))
    before = data.draw(st.integers(0, 3))
    larger = value.new_zeros(before + math.prod(size * step for size, step in zip(value.shape, steps, strict=True)))
    within = larger[before:].view([value.shape[i] * steps[i] for i in order])
    within = within[tuple(slice(None, None, steps[i]) for i in order)]
    found = within.permute([order.index(i) for i in range(value.dim())])
    return found.copy_(value)


def _non_contiguous(value: Any) -> Any:
    """The same values with other strides; transposed where there are two dimensions to transpose."""
    if not isinstance(value, Tensor):
        return value
    if value.dim() >= 2:
        return value.mT.contiguous().mT
    spread = value.new_zeros(2 * len(value))
    spread[::2] = value
    return spread[::2]
