from typing import ClassVar

import matrix
import pytest
import torch

from dcvit.ops import distillation_loss


def make(*shape: int, weight: str | None = None) -> matrix.Inputs:
    """Tokens of students and teacher; weights for no token, CLS only, or drawn."""
    tokens = shape[-2]
    weights = {
        None: None,
        "cls": (torch.arange(tokens) == 0).double(),
        "drawn": torch.rand(tokens, dtype=torch.float64),
    }
    return {
        "student": torch.randn(shape, dtype=torch.float64),
        "teacher": torch.randn(shape[-3:], dtype=torch.float64),
        "weight": weights[weight],
    }


class TestMatrix(matrix.DifferentiableMatrix):
    function = staticmethod(distillation_loss)
    gradients = ("student",)
    random = staticmethod(
        lambda draw: make(draw(1, 4), draw(0, 3), draw(1, 40), draw(1, 70), weight=(None, "cls", "drawn")[draw(0, 2)])
    )
    cases: ClassVar = {
        "small": lambda: make(2, 3, 5, 7, weight="drawn"),
        "one_candidate": lambda: make(2, 5, 7),
        "six_candidates": lambda: make(6, 2, 17, 33, weight="cls"),
        "tokens_197": lambda: make(2, 4, 197, 48),
        "tokens_257": lambda: make(1, 2, 257, 40, weight="drawn"),
        "one_number": lambda: make(1, 1, 1, 1),
        "one_row": lambda: make(3, 1, 1, 1535),
        "no_images": lambda: make(2, 0, 5, 7),
        "no_candidates": lambda: make(0, 2, 5, 7),
    }

    def test_backward_for_plain_loss(self, impl: str) -> None:
        """A loss whose own gradient is 1 takes the gradient that the forward made, the second time a new one."""
        inputs = self.inputs("small", torch.float32, impl)
        for passes in (1, 2):
            results = self.run(impl, inputs, cotangent=torch.ones_like, passes=passes)
            self.assert_within_budget(results, inputs, cotangent=torch.ones_like)

    def test_gradient_is_made_once_and_only_on_demand(self, kernel: str) -> None:
        inputs = self.inputs("small", torch.float32, kernel)
        with matrix.Recorder() as recorder:
            self.call(kernel, inputs)
        (op,) = recorder.calls
        losses, unit = op(*recorder.calls[op])
        assert losses.numel() == 2
        assert unit.numel() == 0
        with matrix.Recorder() as recorder:
            self.run(kernel, inputs)
        assert not any("distillation_loss_backward" in op.name() for op in recorder.calls)

    def test_float16_gradient_survives_loss_scaling(self, impl: str) -> None:
        inputs = self.inputs("small", torch.float16, impl)
        inputs = {name: value.repeat(*([1] * (value.dim() - 1)), 999) for name, value in inputs.items()}
        inputs["weight"] = inputs["weight"][:5] * 0 + 1
        inputs["student"] = (inputs["teacher"] + 1e-3).expand_as(inputs["student"])

        def scaled(output: torch.Tensor) -> torch.Tensor:
            return torch.full_like(output, 2.0**16)

        self.assert_within_budget(self.run(impl, inputs, cotangent=scaled), inputs, cotangent=scaled)


def test_eager_is_the_mean_over_weighted_tokens() -> None:
    torch.manual_seed(0)
    inputs = make(2, 3, 5, 7, weight="drawn")
    student, teacher, weight = inputs.values()
    squares = (student - teacher) ** 2
    expected = [sum(weight[n] * squares[c, :, n].mean() for n in range(5)) / weight.sum() for c in range(2)]
    close = {"rtol": 1e-14, "atol": 0}  # a few roundings of float64
    torch.testing.assert_close(distillation_loss(student, teacher, weight=weight), torch.stack(expected), **close)
    torch.testing.assert_close(
        distillation_loss(student[0], teacher), torch.nn.functional.mse_loss(student[0], teacher), **close
    )
    cls = distillation_loss(student, teacher, weight=torch.eye(5)[0])
    torch.testing.assert_close(cls, squares[:, :, 0].mean(dim=(1, 2)), **close)


@pytest.mark.parametrize("impl", ["auto", "eager"])
def test_half_precision_is_averaged_in_float32(impl: str) -> None:
    student = torch.full((1, 3, 5), 300.0, dtype=torch.float16)  # its square overflows
    loss = distillation_loss(student, torch.zeros_like(student), impl=impl)
    assert loss.dtype == torch.float32
    assert loss.item() == 90000.0


@pytest.mark.parametrize("impl", ["auto", "eager"])
def test_teacher_and_weights_get_no_gradient(impl: str) -> None:
    torch.manual_seed(0)
    inputs = {name: value.requires_grad_() for name, value in make(2, 3, 5, 7, weight="drawn").items()}
    distillation_loss(**inputs, impl=impl).sum().backward()
    assert inputs["student"].grad is not None
    assert inputs["teacher"].grad is None
    assert inputs["weight"].grad is None
    inputs["student"].requires_grad_(False)
    assert not distillation_loss(**inputs, impl=impl).requires_grad


@pytest.mark.parametrize(
    ("student", "teacher", "weight", "message"),
    [
        ((3, 5, 7), (3, 5, 6), None, r"student is \[3, 5, 7\] and teacher \[3, 5, 6\]"),
        ((5, 7), (5, 7), None, r"expected \[C, B, N, D\] or \[B, N, D\]"),
        ((2, 3, 5, 7), (2, 3, 5, 7), None, r"teacher \[2, 3, 5, 7\]"),
        ((3, 5, 7), (3, 5, 7), (3,), r"weight is \[3\], expected \[5\]"),
    ],
)
def test_what_does_not_fit_is_named(
    student: tuple[int, ...], teacher: tuple[int, ...], weight: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        distillation_loss(
            torch.zeros(student), torch.zeros(teacher), weight=None if weight is None else torch.ones(weight)
        )
