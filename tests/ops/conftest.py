"""Generates the tests of `matrix.OpMatrix` for every implementation, case and dtype.

`DCVIT_TEST_GPU=1` says that this machine has a GPU: what would be skipped for want of one fails instead.
"""

import importlib
import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported

import matrix


def _mend_interpreter() -> None:
    """Let Triton 3.5, that of torch 2.9, interpret with NumPy 2.4, to which an array of one number is no scalar."""
    try:
        if not version("triton").startswith("3.5."):
            return
    except PackageNotFoundError:
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def mended(tensor: Any) -> None:
        patch(tensor)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = mended


_mend_interpreter()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    argument = _implementation_argument(metafunc.cls, metafunc.fixturenames)
    if argument is None:
        return
    rows = []
    for name in matrix.names(metafunc.cls):
        if name == "eager" and argument == "kernel":
            continue
        found, problem = matrix.implementation(metafunc.cls, name)
        dtypes = [dtype for dtype in metafunc.cls.dtypes if found is None or dtype in found.dtypes]
        if problem is not None:
            # One skip tells it, instead of one for each test.
            if metafunc.definition.originalname == "test_opcheck":
                rows.append((name, None, None))
        elif "case" in metafunc.fixturenames:
            rows += [(name, case, dtype) for case in metafunc.cls.cases for dtype in dtypes]
        elif "gradcheck" not in metafunc.definition.originalname or torch.float64 in dtypes:
            rows.append((name, None, None))
    if "case" in metafunc.fixturenames:
        ids = [f"{name}-{case}-{str(dtype).removeprefix('torch.')}" for name, case, dtype in rows]
        values = [pytest.param(name, case, dtype, marks=_marks(name, case, dtype)) for name, case, dtype in rows]
        metafunc.parametrize((argument, "case", "dtype"), values, ids=ids)
    else:
        metafunc.parametrize(argument, [pytest.param(name, marks=_marks(name)) for name, _, _ in rows])


def _marks(name: str, case: str | None = None, dtype: torch.dtype | None = None) -> list[pytest.MarkDecorator]:
    """Quick is float32 of each case, and every dtype of the small one; the interpreter takes long for more than that.

    The host build takes as long to compile as the quick tests run.
    """
    found = [pytest.mark.native] if name in matrix.NATIVE_NAMES else []
    found += [pytest.mark.gpu] if name in matrix.GPU_NAMES else []
    unusual = case not in (None, "small"), dtype not in (None, torch.float32)
    if name == "host" or (any if name == "interpreted" else all)(unusual):
        found.append(pytest.mark.slow)
    return found


@pytest.fixture(autouse=True)
def _implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the implementation under test into the op's table, or skip with the reason."""
    argument = _implementation_argument(request.cls, request.fixturenames)
    if argument is None:
        return
    name = request.getfixturevalue(argument)
    found, problem = matrix.implementation(request.cls, name)
    if found is not None:
        problem = problem or found.missing()
        monkeypatch.setitem(request.cls.module().IMPLEMENTATIONS, name, found)
    if problem is not None and name in matrix.GPU_NAMES and os.environ.get("DCVIT_TEST_GPU") == "1":
        pytest.fail(f"{name}: {problem}")
    if problem is not None:
        pytest.skip(f"{name}: {problem}")


def _implementation_argument(cls: type | None, arguments: list[str]) -> str | None:
    """The argument that names the implementation, in tests of a matrix."""
    if cls is None or not issubclass(cls, matrix.OpMatrix):
        return None
    return next((argument for argument in ("impl", "kernel") if argument in arguments), None)
