from typing import ClassVar

import matrix
import pytest
import torch

from dcvit.ops import tv_prior


def make(*shape: int, beta: float = 0.6, tv_weight: float = 0.3, l2_weight: float = 0.2) -> matrix.Inputs:
    images = torch.randn(shape, dtype=torch.float64)
    return {"images": images, "beta": beta, "tv_weight": tv_weight, "l2_weight": l2_weight}


def constant(image: float) -> matrix.Inputs:
    """Two images of which one is constant, so that its differences, or also its norm, are zero."""
    inputs = make(2, 3, 4, 5)
    inputs["images"][0] = image
    return inputs


def flat() -> matrix.Inputs:
    inputs = make(2, 3, 4, 5)
    inputs["images"].fill_(0.5)
    return inputs


def zero() -> matrix.Inputs:
    inputs = make(2, 3, 4, 5)
    inputs["images"].zero_()
    return inputs


class TestMatrix(matrix.DifferentiableMatrix):
    function = staticmethod(tv_prior)
    gradients = ("images",)
    random = staticmethod(lambda draw: make(draw(1, 3), draw(1, 4), draw(2, 40), draw(2, 40)))
    cases: ClassVar = {
        "small": lambda: make(2, 3, 5, 4),
        "odd": lambda: make(3, 3, 33, 37),
        "wide": lambda: make(2, 1, 3, 257),
        "beta_1": lambda: make(2, 3, 16, 17, beta=1.0),
        "beta_2": lambda: make(2, 3, 16, 17, beta=2.0),
        "one_row": lambda: make(2, 3, 1, 7),
        "one_column": lambda: make(2, 3, 7, 1),
        "one_pixel": lambda: make(2, 3, 1, 1),
        "no_images": lambda: make(0, 3, 5, 4),
        "one_image_zero": lambda: constant(0.0),
        "flat": flat,
        "zero": zero,
        "no_tv": lambda: make(2, 3, 5, 4, tv_weight=0.0),
        "no_l2": lambda: make(2, 3, 5, 4, l2_weight=0.0),
    }


def test_eager_is_the_sum_over_neighbours() -> None:
    torch.manual_seed(0)
    inputs = make(2, 3, 5, 4)
    x, beta = inputs["images"], inputs["beta"]
    value = 0.2 * sum(image.pow(2).sum().sqrt() for image in x) / 2
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        squares = [
            (x[:, :, row + down, column + right] - x[:, :, row, column]).pow(2).sum()
            for row in range(5)
            for column in range(4)
            if row + down < 5 and 0 <= column + right < 4
        ]
        value += 0.3 * sum(squares).sqrt() ** beta
    torch.testing.assert_close(tv_prior(**inputs), value, rtol=1e-14, atol=0)  # a few roundings of float64


@pytest.mark.parametrize("beta", [0.6, 1.0])
def test_a_zero_norm_contributes_no_gradient(beta: float) -> None:
    images = torch.zeros(2, 3, 4, 5, requires_grad=True)
    for impl in ("auto", "eager"):
        (gradient,) = torch.autograd.grad(tv_prior(images, beta=beta, impl=impl), images)
        assert (gradient == 0).all()


def test_half_precision_is_computed_in_float32() -> None:
    images = torch.full((1, 3, 200, 200), 300.0, dtype=torch.float16)  # its squares overflow
    value = tv_prior(images, beta=1.0)
    assert value.dtype == torch.float32
    assert value.isfinite()


@pytest.mark.parametrize(
    ("images", "beta", "message"),
    [
        (torch.zeros(3, 5, 5), 0.6, r"images is \[3, 5, 5\], expected \[B, C, H, W\]"),
        (torch.zeros(1, 3, 5, 5), 0.0, "beta=0.0, expected a positive exponent"),
    ],
)
def test_what_does_not_fit_is_named(images: torch.Tensor, beta: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tv_prior(images, beta=beta)
