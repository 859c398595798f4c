from typing import Any, ClassVar

import matrix
import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from dcvit.errors import DcvitError
from dcvit.ops import attention


def make(batch: int, tokens: int, heads: int, size: int, spread: float = 1.0) -> matrix.Inputs:
    return {"qkv": torch.randn(batch, tokens, 3, heads, size, dtype=torch.float64) * spread}


class TestMatrix(matrix.DifferentiableMatrix):
    function = staticmethod(attention)
    gradients = ("qkv",)
    dtypes = (torch.float64, torch.float32)
    random = staticmethod(lambda draw: make(draw(0, 3), draw(0, 40), draw(1, 3), 16 * draw(1, 5)))
    cases: ClassVar = {
        "small": lambda: make(2, 5, 2, 16),
        "tiny": lambda: make(1, 2, 1, 16),
        "tokens_17": lambda: make(9, 17, 4, 16),
        "tokens_50": lambda: make(2, 50, 3, 64),
        "tokens_192": lambda: make(1, 192, 2, 64),
        "wide_heads": lambda: make(1, 33, 2, 80),
        "one_token": lambda: make(3, 1, 2, 16),
        "no_images": lambda: make(0, 5, 2, 16),
        "no_tokens": lambda: make(2, 0, 2, 16),
        # One score of a row far above the others, which then have no probability at all.
        "sharp": lambda: make(2, 17, 2, 16, spread=6.0),
    }

    def test_gradcheck(self, impl: str) -> None:
        # torch's fused attention, which is what runs without this, has no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            super().test_gradcheck(impl)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_what_is_not_finite_stays_in_its_image(self, kernel: str, bad: float) -> None:
        inputs = self.inputs("tokens_17", torch.float32, kernel)
        inputs["qkv"][1, 3, 0, 0, 5] = bad
        self.assert_within_budget(self.run(kernel, inputs), inputs)
        finite = self.run(kernel, inputs)["gradient of qkv"].isfinite().flatten(1).all(1)
        assert finite.tolist() == [True, False] + [True] * 7

    @pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning")  # of torch's own forward mode
    def test_forward_mode_is_left_to_eager(self, kernel: str) -> None:
        """Which leaves it to torch's fused attention, which does not have it."""
        inputs = self.inputs("small", torch.float32, kernel)
        with forward_ad.dual_level():
            inputs["qkv"] = forward_ad.make_dual(inputs["qkv"], torch.ones_like(inputs["qkv"]))
            with pytest.raises(NotImplementedError, match="forward AD"):
                self.call("auto", inputs)
            with pytest.raises(DcvitError, match=rf"impl='{kernel}' cannot run: .*forward-mode"):
                self.call(kernel, inputs)

    @pytest.mark.parametrize("part", range(3), ids=["query", "key", "value"])
    def test_nan_of_any_payload_is_nan(self, kernel: str, part: int) -> None:
        """What a GPU makes is not what a CPU makes."""
        inputs = self.inputs("tokens_17", torch.float32, kernel)
        inputs["qkv"].view(torch.int32)[1, 3, part, 0, 5] = 0x7FFFFFFF
        expected = self.call("eager", inputs)["output"].isnan()
        assert expected.any()
        assert torch.equal(self.call(kernel, inputs)["output"].isnan(), expected)

    def test_probabilities_are_kept_only_for_a_backward(self, kernel: str) -> None:
        inputs = self.inputs("small", torch.float32, kernel)
        with matrix.Recorder() as recorder:
            self.call(kernel, inputs)
        (op,) = recorder.calls
        out, probabilities = op(*recorder.calls[op])
        assert out.shape == (2, 5, 32)
        assert probabilities.shape == (0, 2, 5, 5)


@pytest.mark.parametrize("impl", ["auto", "eager"])
def test_attention_is_the_mean_of_values_by_softmax(impl: Any) -> None:
    torch.manual_seed(0)
    (qkv,) = make(2, 3, 2, 16).values()
    out = attention(qkv, impl=impl).view(2, 3, 2, 16)
    for image in range(2):
        for head in range(2):
            q, k, v = qkv[image, :, :, head].unbind(1)
            expected = torch.stack([((q[i] * k).sum(-1) / 4).softmax(-1) @ v for i in range(3)])
            torch.testing.assert_close(out[image, :, head], expected, rtol=1e-13, atol=1e-14)  # roundings of float64


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 49, 3, 2, 16), r"49 tokens .* takes up to 48"),
        ((2, 5, 3, 2, 24), r"multiples of 16, and the size is 24"),
    ],
)
def test_what_the_kernel_leaves_to_eager(shape: tuple[int, ...], message: str) -> None:
    qkv = torch.randn(shape)
    assert torch.equal(attention(qkv), attention(qkv, impl="eager"))
    implementation = TestMatrix.module().IMPLEMENTATIONS["cpp"]
    if implementation.missing() is None:
        with pytest.raises(ValueError, match=message):
            attention(qkv, impl="cpp")


@pytest.mark.parametrize("shape", [(5, 3, 2, 16), (2, 5, 2, 2, 16)])
def test_what_does_not_fit_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"attention: qkv is .*, expected \[B, N, 3, H, E\]"):
        attention(torch.zeros(shape))
