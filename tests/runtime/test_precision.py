"""The precision of the work and of the caller, as torch's settings have it."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from dcvit.runtime.precision import FULL, InPrecision, Precision, full_precision

AUTOCAST = torch.autocast("cpu", torch.bfloat16)


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Torch's, as they were before the test."""
    before = Precision.current()
    yield
    torch.backends.fp32_precision = "none"
    before.set_for_all(before)
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
        with full_precision():
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
    with full_precision():
        assert before.matmul is None or torch.get_float32_matmul_precision() == "highest"
        assert before.cudnn_tf32 is None or not torch.backends.cudnn.allow_tf32


def test_a_setting_for_all_counts_afterwards() -> None:
    tf32_for_all()
    with full_precision():
        pass
    torch.backends.fp32_precision = "ieee"
    matmul: Any = torch.backends.cuda.matmul
    assert matmul.fp32_precision == "ieee"


def test_as_before_after_an_error() -> None:
    torch.set_float32_matmul_precision("high")
    before = Precision.current()
    with pytest.raises(KeyError), full_precision():
        raise KeyError
    assert Precision.current() == before


def in_threads(*work: Callable[[], None]) -> None:
    """Run some work at once; an error in it is an error here."""
    with ThreadPoolExecutor(len(work)) as pool:
        for run in [pool.submit(each) for each in work]:
            run.result(timeout=60)


def test_the_last_of_several_threads_restores_what_the_first_found() -> None:
    torch.set_float32_matmul_precision("medium")
    before = Precision.current()
    both, first_left = threading.Barrier(2), threading.Event()

    def first() -> None:
        with full_precision():
            both.wait()
        first_left.set()

    def last() -> None:
        with full_precision():
            both.wait()
            first_left.wait()
            assert Precision.current().backends == FULL.backends
            assert replace(Precision.of_caller(), autocast=before.autocast) == before

    in_threads(first, last)
    assert Precision.current() == before


def test_threads_that_wait_to_time_do_not_wait_for_each_other() -> None:
    """Nor does one that computes see the caller's precision meanwhile."""
    torch.set_float32_matmul_precision("medium")
    caller = Precision.current()
    assert not caller.is_full_on(torch.device("cpu"))
    all_inside, timed = threading.Barrier(3), []

    def timing() -> None:
        with full_precision(), full_precision():
            all_inside.wait()
            for _ in range(20):
                InPrecision(lambda *_: timed.append(Precision.current()) or 0.0, caller)(nn.Identity(), torch.ones(1))
                assert Precision.current().backends == FULL.backends

    def computing() -> None:
        with full_precision():
            all_inside.wait()
            for _ in range(20):
                time.sleep(1e-3)
                assert Precision.current().backends == FULL.backends
            assert not timed

    in_threads(timing, timing, computing)
    assert timed == [caller] * 40
    assert Precision.current() == caller


def test_where_the_device_computes_alike_nothing_is_waited_for() -> None:
    caller = Precision.current()
    assert caller.is_full_on(torch.device("cpu"))
    assert not replace(caller, backends=("ieee", "ieee", "tf32", "ieee", "ieee")).is_full_on(torch.device("cuda"))
    inside, done = threading.Event(), threading.Event()

    def computing() -> None:
        with full_precision():
            inside.set()
            assert done.wait(30)

    def timing() -> None:
        inside.wait()
        with full_precision():
            assert InPrecision(lambda *_: 1.0, caller)(nn.Identity(), torch.ones(1)) == 1
        done.set()

    in_threads(computing, timing)
