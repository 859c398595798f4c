import copy
import pickle
import subprocess
import sys
from typing import ClassVar

import matrix
import pytest
import torch
from torch import Tensor, nn

from dcvit.ops import dropped_mlp


def make(
    *rows: int,
    width: int = 24,
    hidden: int = 40,
    kept: int | None = 17,
    out: int | None = None,
    norm: bool = True,
    bias: bool = True,
    scale: bool = True,
    residual: bool = True,
) -> matrix.Inputs:
    """Inputs of a block's MLP, or of what is left of it if parts are switched off."""
    out = out or width

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    return {
        "x": draw(*rows, width),
        "w1": draw(hidden, width) / width**0.5,
        "b1": draw(hidden) if bias else None,
        "w2": draw(out, hidden) / hidden**0.5,
        "b2": draw(out) if bias else None,
        "idx": None if kept is None else torch.randperm(hidden)[:kept].sort().values,
        "norm_weight": 1 + draw(width) / 4 if norm else None,
        "norm_bias": draw(width) if norm and bias else None,
        "scale": draw(out) if scale else None,
        "residual": residual,
    }


class TestMatrix(matrix.DifferentiableMatrix):
    function = staticmethod(dropped_mlp)
    gradients = ("x", "w1", "b1", "w2", "b2", "norm_weight", "norm_bias", "scale")
    random = staticmethod(
        lambda draw: make(
            draw(0, 3), draw(1, 20), width=draw(1, 40), hidden=(hidden := draw(1, 90)), kept=draw(0, hidden),
            norm=bool(draw(0, 1)), bias=bool(draw(0, 1)), scale=bool(draw(0, 1)), residual=bool(draw(0, 1)),
        )
    )  # fmt: skip
    cases: ClassVar = {
        "small": lambda: make(2, 3),
        "tiny": lambda: make(2, width=3, hidden=5, kept=3),
        "tokens_197": lambda: make(2, 197, width=48, hidden=192, kept=96),
        "tokens_257": lambda: make(1, 257, width=40, hidden=160, kept=None),
        "hidden_1535": lambda: make(5, width=16, hidden=1537, kept=1535),
        "one_row": lambda: make(1),
        "one_token": lambda: make(),
        "no_rows": lambda: make(0, 5),
        "one_kept": lambda: make(3, kept=1),
        "bare": lambda: make(3, 7, out=31, norm=False, bias=False, scale=False, residual=False),
        "none_kept": lambda: make(3, kept=0),
        "no_bias": lambda: make(3, 7, bias=False),
        "no_residual": lambda: make(3, 7, out=13, residual=False),
        "no_scale": lambda: make(3, 7, scale=False),
        "unnormalised": lambda: make(3, 7, norm=False),
    }

    @classmethod
    def call(cls, impl: str, inputs: matrix.Inputs) -> matrix.Results:
        return super().call(impl, {"b1": None, "b2": None} | inputs)

    def test_dropped_hidden_units_get_no_gradient(self, impl: str) -> None:
        inputs = self.inputs("small", torch.float32, impl)
        results = self.run(impl, inputs)
        dropped = torch.ones(inputs["w1"].shape[0], dtype=torch.bool, device=inputs["idx"].device)
        dropped[inputs["idx"]] = False
        for name, gradient in (("w1", results["gradient of w1"]), ("b1", results["gradient of b1"][:, None])):
            assert (gradient[dropped] == 0).all(), name
            assert (gradient[~dropped] != 0).any(dim=1).all(), name
        assert (results["gradient of w2"][:, dropped] == 0).all()
        assert (results["gradient of w2"][:, ~dropped] != 0).any(dim=0).all()

    def test_a_hidden_unit_that_does_not_exist_is_refused(self, kernel: str) -> None:
        if kernel in matrix.GPU_NAMES:  # where it ends every use of the device
            run = subprocess.run([sys.executable, "-c", MISSING_NODE, kernel], capture_output=True, text=True)
            assert run.returncode
            assert "CUDA error" in run.stderr
            return
        inputs = self.inputs("small", torch.float32, kernel)
        inputs["idx"][2] = inputs["w1"].shape[0]
        with pytest.raises(
            (RuntimeError, IndexError), match=r"expected idx in|expected place >= 0|out of (range|bounds)"
        ):
            self.call(kernel, inputs)

    def test_order_of_kept_hidden_units(self, impl: str) -> None:
        inputs = self.inputs("small", torch.float32, impl)
        inputs["idx"] = inputs["idx"].flip(0)
        self.assert_within_budget(self.run(impl, inputs), inputs)

    def test_inference_saves_nothing(self, kernel: str) -> None:
        inputs = self.inputs("small", torch.float32, kernel)
        with matrix.Recorder() as recorder:
            self.call(kernel, inputs)
        (op,) = recorder.calls
        _, pre, stats = op(*recorder.calls[op])
        assert pre.numel() == stats.numel() == 0

    def test_autocast(self, kernel: str) -> None:
        inputs = self.inputs("small", torch.float32, kernel)
        device = inputs["x"].device.type
        with torch.autocast(device, torch.bfloat16):
            assert torch.equal(self.call("auto", inputs)["output"], self.call("eager", inputs)["output"])
            with pytest.raises(ValueError, match=f"impl='{kernel}' cannot run: autocast"):
                self.call(kernel, inputs)


MISSING_NODE = """
import sys
import torch
from dcvit.ops import dropped_mlp
w1, w2 = torch.zeros(40, 24, device="cuda"), torch.zeros(24, 40, device="cuda")
x, idx = torch.zeros(3, 24, device="cuda"), torch.tensor([0, 40], device="cuda")
print(dropped_mlp(x, w1, None, w2, None, idx, impl=sys.argv[1]))
"""


class Block(nn.Module):
    """What is left of a block, from torch's own modules."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
        self.scale = nn.Parameter(torch.randn(width))
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.fc2(self.act(self.fc1(self.norm(x))))


class OpBlock(Block):
    """The same block, through the op."""

    def __init__(self, width: int, hidden: int, idx: Tensor | None = None) -> None:
        super().__init__(width, hidden)
        self.register_buffer("idx", idx)

    def forward(self, x: Tensor) -> Tensor:
        return dropped_mlp(
            x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, self.idx,
            norm_weight=self.norm.weight, norm_bias=self.norm.bias, norm_eps=self.norm.eps,
            scale=self.scale, residual=True,
        )  # fmt: skip


def test_eager_is_the_block_without_the_dropped_hidden_units() -> None:
    torch.manual_seed(0)
    idx = torch.tensor([0, 3, 4, 9])
    whole = OpBlock(6, 10, idx).double()
    small = Block(6, len(idx)).double()
    small.load_state_dict(
        {
            name: value[idx] if name.startswith("fc1") else value[:, idx] if name == "fc2.weight" else value
            for name, value in whole.state_dict().items()
            if name != "idx"
        }
    )
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(whole(x), small(x), rtol=1e-14, atol=1e-14)  # a few roundings of float64
    whole.idx = None
    assert not torch.allclose(whole(x), small(x))


def test_modules_that_use_it_can_be_copied_and_pickled() -> None:
    torch.manual_seed(0)
    block, x = OpBlock(6, 10, torch.tensor([1, 2])), torch.randn(3, 6)
    expected = block(x)
    assert torch.equal(copy.deepcopy(block)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(block))(x), expected)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_shapes_without_data(device: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() if device == "cpu" else torch.device("meta"):
        inputs = make(2, 3, out=7, residual=False)
        inputs["x"].requires_grad_()
        y = dropped_mlp(**inputs)
        assert y.shape == (2, 3, 7)
        (gradient,) = torch.autograd.grad(y.sum(), inputs["x"])
        assert gradient.shape == (2, 3, 24)


def test_torch_func_runs_eager() -> None:
    torch.manual_seed(0)
    inputs = make(4, 3)
    x = inputs.pop("x")
    gradient = torch.func.grad(lambda x: dropped_mlp(x, **inputs).sum())(x)
    leaf = x.clone().requires_grad_()
    dropped_mlp(leaf, **inputs, impl="eager").sum().backward()
    assert torch.equal(gradient, leaf.grad)
    rows = torch.func.vmap(lambda x: dropped_mlp(x, **inputs))(x)
    torch.testing.assert_close(rows, dropped_mlp(x, **inputs), rtol=1e-14, atol=1e-14)  # other products, float64


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 23)}, ValueError, r"x is \[3, 23\], expected \[3, 24\]"),
        ({"w1": torch.zeros(3)}, ValueError, r"w1 \[3\].*expected \[..., D\], \[H, D\] and \[E, H\]"),
        ({"b1": torch.zeros(17)}, ValueError, r"b1 is \[17\], expected \[40\]"),
        ({"w2": torch.zeros(24, 17)}, ValueError, r"w2 is \[24, 17\], expected \[24, 40\]"),
        ({"scale": torch.zeros(1)}, ValueError, r"scale is \[1\], expected \[24\]"),
        ({"idx": torch.zeros(3, dtype=torch.int32)}, TypeError, r"idx is torch.int32.*idx.long\(\)"),
        ({"idx": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, r"idx is \[3, 1\], expected \[K\]"),
        ({"norm_weight": None}, ValueError, "norm_bias is given without norm_weight"),
        ({"w2": torch.zeros(9, 40), "b2": None, "scale": None}, ValueError, "but they are 24 and 9 wide"),
    ],
)
def test_what_does_not_fit_is_named(change: matrix.Inputs, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dropped_mlp(**(make(3) | change))
