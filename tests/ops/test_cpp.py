"""What is special to the CPU kernels: threads, blocks of rows, and the range of kept hidden units."""

from collections.abc import Callable, Iterator
from typing import Any

import matrix
import pytest
import test_attention
import test_distillation_loss
import test_dropped_mlp
import test_synthesis_step
import test_tv_prior
import torch

from tests.conftest import slow_but

CASES: dict[str, tuple[type[matrix.OpMatrix], Callable[[], matrix.Inputs]]] = {
    # More rows than a block, and than the backward takes in a pass, and the last block is shorter.
    "dropped_mlp": (test_dropped_mlp.TestMatrix, lambda: test_dropped_mlp.make(2567, width=8, hidden=40, kept=33)),
    "dropped_mlp, whole": (test_dropped_mlp.TestMatrix, lambda: test_dropped_mlp.make(2567, width=8, kept=None)),
    "attention": (test_attention.TestMatrix, lambda: test_attention.make(37, 19, 3, 16)),
    "distillation_loss": (
        test_distillation_loss.TestMatrix,
        lambda: test_distillation_loss.make(2, 7, 197, 129, weight="drawn"),
    ),
    "tv_prior": (test_tv_prior.TestMatrix, lambda: test_tv_prior.make(5, 3, 97, 131)),
    "synthesis_step": (test_synthesis_step.TestMatrix, lambda: test_synthesis_step.make(5, 3, 97, 131)),
}

pytestmark = pytest.mark.native


@pytest.fixture(autouse=True)
def _built() -> Iterator[None]:
    _, problem = matrix.implementation(test_tv_prior.TestMatrix, "cpp")
    if problem is not None:
        pytest.skip(f"cpp: {problem}")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def results(name: str, threads: int, dtype: torch.dtype = torch.float32) -> tuple[Any, matrix.Inputs, matrix.Results]:
    test, make = CASES[name]
    torch.manual_seed(0)
    inputs = {
        key: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in make().items()
    }
    torch.set_num_threads(threads)
    return test, inputs, test.run("cpp", inputs)


@pytest.mark.parametrize("threads", slow_but([1, 2, 3, 5], 1, 3))
@pytest.mark.parametrize("name", CASES)
def test_any_number_of_threads(name: str, threads: int) -> None:
    test, inputs, found = results(name, threads)
    test.assert_within_budget(found, inputs)


@pytest.mark.parametrize("name", CASES)
def test_the_same_from_run_to_run(name: str) -> None:
    _, _, first = results(name, 3)
    _, _, second = results(name, 3)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize("name", ["attention", "distillation_loss", "tv_prior", "synthesis_step"])
def test_the_same_for_any_number_of_threads(name: str) -> None:
    """The sums are over parts that depend only on the shape; for matrix products the BLAS decides."""
    _, _, one = results(name, 1)
    _, _, three = results(name, 3)
    for key, value in one.items():
        assert torch.equal(value, three[key]), key


@pytest.mark.parametrize("unit", [-1, 40])
def test_hidden_units_out_of_range_are_named(unit: int) -> None:
    inputs = test_dropped_mlp.make(3)
    inputs["idx"][2] = unit
    with pytest.raises(RuntimeError, match=rf"expected idx in \[0, 40\), got {unit} at 2"):
        test_dropped_mlp.dropped_mlp(**inputs, impl="cpp")
