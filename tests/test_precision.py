"""The precision of the work and of the caller, as torch's settings have it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from dcvit.precision import FULL, InPrecision, Precision

AUTOCAST = torch.autocast("cpu", torch.bfloat16)


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Torch's, as they were before the test."""
    before = Precision.current()
    with before.applied():
        yield
        torch.backends.fp32_precision = "none"
    assert Precision.current() == before


def nothing() -> None:
    """Leave all as torch has it."""


def tf32_for_all() -> None:
    torch.backends.fp32_precision = "tf32"


def tf32_for_products() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def convolutions_alone() -> None:
    conv: Any = torch.backends.cudnn.conv
    conv.fp32_precision = "ieee"


CALLERS = {
    "default": nothing,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "no TF32 in cuDNN": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "newer setting for all": tf32_for_all,
    "newer setting of products": tf32_for_products,
    "newer setting of convolutions": convolutions_alone,
}
callers = pytest.mark.parametrize("caller", CALLERS.values(), ids=CALLERS.keys())


@callers
@pytest.mark.parametrize("autocast", [nullcontext(), AUTOCAST], ids=["without autocast", "with autocast"])
def test_full_precision_then_as_before(caller: Any, autocast: AbstractContextManager[Any]) -> None:
    caller()
    with autocast:
        before = Precision.current()
        with FULL.applied():
            assert Precision.current().backends == FULL.backends
            assert Precision.current().autocast == (None, None)
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
            timed = InPrecision(lambda model, inputs: float(Precision.current() == before), before)
            assert timed(torch.nn.Identity(), torch.ones(1)) == 1
            assert Precision.current().backends == FULL.backends
        assert Precision.current() == before


@callers
def test_the_older_settings_can_be_read_in_full_precision(caller: Any) -> None:
    """Where they could be before: torch's compiler reads them."""
    caller()
    before = Precision.current()
    with FULL.applied():
        assert before.matmul is None or torch.get_float32_matmul_precision() == "highest"
        assert before.cudnn_tf32 is None or not torch.backends.cudnn.allow_tf32


def test_a_setting_for_all_counts_afterwards() -> None:
    tf32_for_all()
    with FULL.applied():
        pass
    torch.backends.fp32_precision = "ieee"
    matmul: Any = torch.backends.cuda.matmul
    assert matmul.fp32_precision == "ieee"


def test_as_before_after_an_error() -> None:
    torch.set_float32_matmul_precision("high")
    before = Precision.current()
    with pytest.raises(KeyError), FULL.applied():
        raise KeyError
    assert Precision.current() == before
