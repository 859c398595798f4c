from dataclasses import replace
from typing import ClassVar

import matrix
import pytest
import torch

from dcvit.ops import synthesis_step, tv_prior


def make(*shape: int, step: int = 3, beta: float = 0.6, lr: float = 0.25, l2_weight: float = 0.2) -> matrix.Inputs:
    images, grad, exp_avg, exp_avg_sq = torch.randn(4, *shape, dtype=torch.float64)
    channels = torch.arange(shape[1], dtype=torch.float64)
    return {
        "images": images, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq.square(),
        "step": step, "lr": lr, "beta": beta, "tv_weight": 0.3, "l2_weight": l2_weight,
        "low": -1.5 - channels / 8, "high": 1.25 + channels / 4,
    }  # fmt: skip


def flat() -> matrix.Inputs:
    inputs = make(2, 3, 4, 5)
    inputs["images"].fill_(0.5)
    return inputs


class TestMatrix(matrix.OpMatrix):
    function = staticmethod(synthesis_step)
    mutated = ("images", "exp_avg", "exp_avg_sq")
    dtypes = (torch.float64, torch.float32)
    random = staticmethod(lambda draw: make(draw(1, 3), draw(1, 4), draw(2, 40), draw(2, 40), step=draw(1, 9)))
    cases: ClassVar = {
        "small": lambda: make(2, 3, 5, 4),
        "odd": lambda: make(3, 3, 33, 37),
        "wide": lambda: make(2, 1, 3, 257),
        "wider_than_a_block": lambda: make(1, 1, 3, 2052),
        "wider_and_odd": lambda: make(1, 1, 2, 2311),
        "first_step": lambda: make(2, 3, 16, 17, step=1),
        "late_step": lambda: make(2, 3, 16, 17, step=2000, beta=1.0),
        "one_row": lambda: make(2, 3, 1, 7),
        "one_column": lambda: make(2, 3, 7, 1),
        "one_pixel": lambda: make(2, 3, 1, 1),
        "no_images": lambda: make(0, 3, 5, 4),
        "flat": flat,
        "no_l2": lambda: make(2, 3, 5, 4, l2_weight=0.0),
    }

    def test_only_the_state_changes(self, impl: str) -> None:
        inputs = self.inputs("small", torch.float32, impl)
        before = {name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        versions = {name: inputs[name]._version for name in before}
        synthesis_step(**inputs, impl=impl)
        changed = {name for name in before if not torch.equal(before[name], inputs[name])}
        assert changed == {"images", "exp_avg", "exp_avg_sq"}
        assert {name for name in before if inputs[name]._version > versions[name]} == changed


def test_eager_is_adam_on_network_and_prior() -> None:
    torch.manual_seed(0)
    inputs = make(2, 3, 5, 4)
    low, high = inputs["low"], inputs["high"]
    prior = {name: inputs[name] for name in ("beta", "tv_weight", "l2_weight")}
    images, exp_avg, exp_avg_sq = inputs["images"], torch.zeros(2, 3, 5, 4).double(), torch.zeros(2, 3, 5, 4).double()
    parameter = images.clone().requires_grad_()
    adam = torch.optim.Adam([parameter], lr=0.25, betas=(0.5, 0.9))
    for step in (1, 2, 3):
        grad = torch.randn_like(images)
        value = tv_prior(parameter, **prior)
        (prior_grad,) = torch.autograd.grad(value, parameter)
        parameter.grad = prior_grad + grad
        adam.step()
        with torch.no_grad():
            for channel in range(3):
                parameter[:, channel].clamp_(low[channel], high[channel])
        returned = synthesis_step(
            images, grad, exp_avg, exp_avg_sq, step=step, lr=0.25, low=low, high=high, **prior, impl="eager"
        )
        close = {"rtol": 1e-13, "atol": 1e-14}  # roundings of float64, three steps of them
        torch.testing.assert_close(returned, value.detach(), **close)
        torch.testing.assert_close(images, parameter.detach(), **close)


def test_autograd_sees_what_a_kernel_writes_through_pointers(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(images: torch.Tensor, *_: object) -> torch.Tensor:
        images.numpy().fill(7.0)
        return images.new_zeros(())

    module = TestMatrix.module()
    pointers = replace(module.IMPLEMENTATIONS["cpp"], op=module.define_overload(".pointers", kernel), missing=str)
    monkeypatch.setitem(module.IMPLEMENTATIONS, "pointers", pointers)
    torch.manual_seed(0)
    inputs = make(2, 3, 5, 4)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    product = weight * inputs["images"]
    synthesis_step(**inputs, impl="pointers")
    assert (inputs["images"] == 7).all()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_images_that_require_a_gradient() -> None:
    torch.manual_seed(0)
    inputs = make(2, 3, 5, 4)
    plain = TestMatrix.call("auto", inputs)
    inputs["images"].requires_grad_()
    value = synthesis_step(**inputs)
    assert not value.requires_grad
    assert inputs["images"].is_leaf
    assert torch.equal(inputs["images"], plain["images"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(3, 5, 4)}, ValueError, r"images is \[3, 5, 4\], expected \[B, C, H, W\]"),
        ({"grad": torch.zeros(2, 3, 5, 5)}, ValueError, r"grad is \[2, 3, 5, 5\], expected \[2, 3, 5, 4\]"),
        ({"low": torch.zeros(())}, ValueError, r"low is \[\], expected \[3\]"),
        ({"exp_avg_sq": torch.zeros(2, 3, 5, 4).half()}, TypeError, "exp_avg_sq is torch.float16; convert"),
        ({"step": 0}, ValueError, "step=0, expected the number of the step, from 1"),
        ({"betas": (0.5, 1.0)}, ValueError, r"betas=\(0.5, 1.0\), expected two decays"),
        ({"beta": -1.0}, ValueError, "beta=-1.0, expected a positive exponent"),
    ],
)
def test_what_does_not_fit_is_named(change: matrix.Inputs, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        synthesis_step(**(make(2, 3, 5, 4) | change))
