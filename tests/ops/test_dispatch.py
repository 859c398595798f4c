"""The selector, and what it may and may not import."""

import subprocess
import sys
import textwrap
from pathlib import Path

import matrix
import pytest
import torch

import dcvit.ops
from dcvit.ops import _dispatch
from dcvit.ops._dispatch import Implementation, select

X = torch.zeros(2)


def op(name: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.aten, name).default


TABLE = {
    "cuda": Implementation(op("sin"), "cuda", (torch.float32,)),
    "cpp": Implementation(op("cos"), "cpu", (torch.float32,)),
    "triton": Implementation(op("tan"), "cpu", (torch.float32, torch.float64), missing=lambda: "it is on holiday"),
}


def test_auto_takes_the_first_that_does_not_refuse() -> None:
    both = {"tan": TABLE["triton"], "first": Implementation(op("exp"), "cpu", (torch.float64,)), **TABLE}
    assert select("f", "auto", TABLE, {"x": X}) == op("cos")
    assert select("f", "auto", both, {"x": X.double()}) == op("exp")
    assert select("f", "auto", both, {"x": X}) == op("cos")


def test_auto_leaves_out_what_does_not_gain() -> None:
    slow = {"tan": Implementation(op("tan"), "cpu", (torch.float32,), gains=lambda tensors: len(tensors["x"]) > 9)}
    assert select("f", "auto", slow, {"x": torch.zeros(9)}) is None
    assert select("f", "auto", slow, {"x": torch.zeros(10)}) == op("tan")
    assert select("f", "tan", slow, {"x": torch.zeros(9)}) == op("tan")


def test_what_auto_takes_on_a_gpu() -> None:
    table = sys.modules["dcvit.ops.dropped_mlp"].IMPLEMENTATIONS
    weight = torch.zeros(2, 2, requires_grad=True)
    assert table["cuda"].gains({"x": X, "w1": weight})
    assert not table["cuda"].gains({"x": X, "w1": weight.detach()})
    with torch.no_grad():
        assert not table["cuda"].gains({"x": X, "w1": weight})
    assert not table["triton"].gains({"x": X, "w1": weight})
    table = sys.modules["dcvit.ops.distillation_loss"].IMPLEMENTATIONS
    assert table["triton"].gains({"student": torch.zeros(2, 1, 1, 1), "teacher": None})
    assert not table["triton"].gains({"student": torch.zeros(1, 1, 1, 1), "teacher": None})
    assert not table["triton"].gains({"student": torch.zeros(2, 1, 1), "teacher": None})


def test_auto_ends_at_eager() -> None:
    assert select("f", "auto", TABLE, {"x": X.half()}) is None
    assert select("f", "auto", TABLE, {"x": X.to("meta")}) is None
    assert select("f", "auto", {}, {"x": X}) is None


def test_eager_is_never_refused() -> None:
    assert select("f", "eager", TABLE, {"x": X.int(), "y": X.to("meta")}) is None


@pytest.mark.parametrize(
    ("impl", "tensors", "reason"),
    [
        ("cuda", {"x": X}, "it runs on cuda tensors, and x is on cpu"),
        ("cpp", {"x": X.half()}, "it takes torch.float32, and x is torch.float16"),
        ("cpp", {"x": X, "w": X.double()}, "all tensors must share a dtype, and w is torch.float64, x torch.float32"),
        ("cpp", {"x": X, "b": None, "w": X.to("meta")}, "all tensors must share a device, and w is on meta, x on cpu"),
        ("triton", {"x": X}, "it is on holiday"),
    ],
)
def test_a_choice_that_cannot_run_says_why(impl: str, tensors: dict[str, torch.Tensor | None], reason: str) -> None:
    with pytest.raises(
        ValueError, match=f"^f: impl='{impl}' cannot run: {reason}. Pass impl='auto' to use one that can.$"
    ):
        select("f", impl, TABLE, tensors)


def test_an_unknown_choice_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"impl='fast' is unknown\. Choose one of auto, eager, cuda, cpp, triton"):
        select("f", "fast", TABLE, {"x": X})


def test_every_op_has_the_same_selector() -> None:
    for name in set(dcvit.ops.__all__) - {"Impl", "availability"}:
        table = sys.modules[f"dcvit.ops.{name}"].IMPLEMENTATIONS
        # torch's own attention serves GPUs.
        assert list(table) == (["cpp"] if name == "attention" else ["cpp", "cuda", "triton"]), name
        assert {"auto", "eager", *table} <= set(_dispatch.Impl.__args__)


def test_a_built_kernel_is_found_in_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "extension_problem", lambda: "never built")
    found = _dispatch.define(
        "tests_probe", "(Tensor x) -> Tensor", kernel=lambda x: x.clone(), fake=lambda x: torch.empty_like(x)
    )
    assert _dispatch.cpp(found, torch.float32).missing() == "never built"
    with torch.library._scoped_library("dcvit", "IMPL") as library:
        library.impl("tests_probe", lambda x: x.clone(), "CPU")
        assert _dispatch.cpp(found, torch.float32).missing() is None
        assert _dispatch.cuda(found, torch.float32).missing() == "never built"


def test_a_broken_extension_is_distinguished_from_a_missing_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "ops").mkdir()
    monkeypatch.setattr(_dispatch, "__file__", str(tmp_path / "ops" / "_dispatch.py"))
    assert "never built" in str(_dispatch.extension_problem.__wrapped__())
    (tmp_path / "_C.abi3.so").write_text("built for another torch")
    assert "does not load with torch" in str(_dispatch.extension_problem.__wrapped__())
    (tmp_path / "_C.json").write_text('{"only": "2.9.0"}')
    assert "supports only torch 2.9.0" in str(_dispatch.extension_problem.__wrapped__())


@pytest.mark.parametrize("op", sorted(set(dcvit.ops.__all__) - {"Impl", "availability"}))
def test_forward_and_backward_are_compiled_together(op: str) -> None:
    table = sys.modules[f"dcvit.ops.{op}"].IMPLEMENTATIONS
    for impl, key in (("cpp", "CPU"), ("cuda", "CUDA")):
        missing = table[impl].missing() if impl in table else "no such implementation"  # loads the extension
        assert matrix.has_kernel(f"dcvit::{op}", key) == (missing is None)


def test_half_a_family_is_noticed() -> None:
    with torch.library._scoped_library("dcvit", "IMPL") as library:
        library.impl("tv_prior", lambda *args: None, "XPU")
        with pytest.raises(AssertionError, match=r"without those of .*tv_prior_backward"):
            matrix.has_kernel("dcvit::tv_prior", "XPU")


# What must work without Triton and without the extension, in a process that cannot import or load them. The package's
# own __init__ is left out: it imports what other parts need.

BLOCK = """
import sys, types, torch

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "timm", "torchvision") or name.startswith("dcvit.kernels"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

def load_library(path):
    raise OSError("loading is blocked")

sys.meta_path.insert(0, Block())
torch.ops.load_library = load_library
sys.modules["dcvit"] = types.ModuleType("dcvit")
sys.modules["dcvit"].__path__ = ["dcvit"]
from dcvit.ops import attention, dropped_mlp, distillation_loss, synthesis_step, tv_prior
x, w1, w2 = torch.randn(3, 4), torch.randn(8, 4), torch.randn(4, 8)
images = torch.rand(4, 2, 3, 5, 5)
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", BLOCK + textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])


def test_torch_is_enough() -> None:
    done = run("""
        assert "torch._dynamo" not in sys.modules, "importing it takes a second"
        x.requires_grad_()
        dropped_mlp(x, w1, None, w2, None).sum().backward()
        assert x.grad is not None
        attention(torch.randn(2, 5, 3, 2, 16))
        distillation_loss(images[0], images[0, 0])
        tv_prior(images[0], beta=1.0)
        synthesis_step(*images, low=torch.zeros(3), high=torch.ones(3), step=1, lr=0.1, beta=1.0)
        torch.ops.dcvit.tv_prior(images[0], 1.0, 1.0, 1.0)
    """)
    assert done.returncode == 0, done.stderr


def test_the_block_bites() -> None:
    done = run("""
        for impl in ("cpp", "cuda", "triton"):
            try:
                dropped_mlp(x, w1, None, w2, None, impl=impl)
            except Exception as error:
                print(str(error).replace("\\n", " "))
    """)
    assert done.returncode == 0, done.stderr
    built = list((Path(_dispatch.__file__).parents[1]).glob("_C*.so"))
    extension = "loading is blocked" if built else "never built"
    lines = done.stdout.splitlines()
    for line, (impl, reason) in zip(
        lines, {"cpp": extension, "cuda": extension, "triton": "Triton is not installed"}.items(), strict=True
    ):
        assert f"dropped_mlp: impl={impl!r} cannot run: " in line
        assert reason in line
