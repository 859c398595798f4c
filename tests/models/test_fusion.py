"""`dcvit.fuse` and `dcvit.unfuse`: students are plain modules; the fused path steps aside for whoever looks."""

import copy
import functools
import io
import pickle
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from timm.layers import LayerNorm, Mlp
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
)
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import dcvit
from dcvit.models import CompressedBlock, blocks, compressible
from dcvit.models.surgery import compress_block, drop_block
from dcvit.ops import attention, dropped_mlp
from tests.conftest import CUT
from tests.variants import EVA_VARIANTS, VARIANTS

TOKENS = torch.randn(2, 5, 48)


def student() -> nn.Module:
    """A model with a whole block, a compressed, a dropped and a pruned one."""
    model = drop_block(compress_block(VARIANTS["plain"].create(), 1, range(20)), 2)
    compressible(model).prune_block(3, range(30))
    return compressible(model).rebuild()


@contextmanager
def op_calls() -> Iterator[list[str]]:
    """The fused ops that are called in a block of code."""
    called: list[str] = []

    def counting(name: str, op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(op)
        def counted(*args: Any, **kwargs: Any) -> Tensor:
            called.append(name)
            return op(*args, **kwargs)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "dropped_mlp", counting("mlp", dropped_mlp))
        patch.setattr(blocks, "attention", counting("attention", attention))
        yield called


def test_a_result_is_of_plain_modules(images: Tensor) -> None:
    model = VARIANTS["plain"].create()
    result = dcvit.compress(model, images, dcvit.Budget(macs=0.75), CUT)
    assert result.plan.blocks
    with op_calls() as called, torch.no_grad():
        result.model(images)
    assert not called
    assert not any(type(module) in blocks.PLAIN or hasattr(module, "impl") for module in result.model.modules())


def test_fuse_changes_speed_and_unfuse_undoes_it() -> None:
    model = student()
    images, names = torch.randn(2, 3, 32, 32), list(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    with torch.no_grad():
        expected = model(images)
        with op_calls() as called:
            assert dcvit.fuse(model) is model
            found = model(images)
        assert called == ["attention", "mlp", "mlp", "attention", "mlp"]  # block 1 has no attention, block 2 nothing
        # Float32, four layers: only the order of sums may differ.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert list(model.state_dict()) == names
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(images), found)
        assert torch.equal(compressible(model).rebuild()(images), expected), "what is saved is not fused"
        assert dcvit.unfuse(model) is model
        assert torch.equal(model(images), expected)
    assert [type(module) for module in model.modules()] == kinds


def test_what_a_fused_model_saves_is_what_the_plain_one_saves(images: Tensor) -> None:
    plain = VARIANTS["layer_scale"].create()
    results = [
        dcvit.compress(model, images, dcvit.Budget(macs=0.7), CUT)
        for model in (plain, dcvit.fuse(copy.deepcopy(plain)))
    ]
    first, second = (result.model.state_dict() for result in results)
    assert all(torch.equal(first[name], second[name]) for name in first)


def replace(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs)


WATCHERS: dict[str, Callable[[nn.Module], Any]] = {
    "forward hook": lambda m: m.register_forward_hook(lambda *_: None),
    "forward hook with arguments": lambda m: m.register_forward_hook(lambda *_: None, with_kwargs=True),
    "forward pre-hook": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "full backward hook": lambda m: m.register_full_backward_hook(lambda *_: None),
    "full backward pre-hook": lambda m: m.register_full_backward_pre_hook(lambda *_: None),
    "replaced forward": replace,
    "replaced by a method": lambda m: setattr(m, "forward", types.MethodType(type(m).forward, m)),
}

MLP_PARTS = ["norm2", "mlp", "mlp.fc1", "mlp.act", "mlp.drop1", "mlp.norm", "mlp.fc2", "mlp.drop2", "ls2", "drop_path2"]


ATTENTION_PARTS = ["attn", "attn.q_norm", "attn.k_norm", "attn.attn_drop", "attn.norm", "attn.proj_drop"]


@pytest.mark.parametrize("watcher", WATCHERS)
def test_it_steps_aside_for_whoever_watches_a_part(watcher: str) -> None:
    fused = dcvit.fuse(student()).blocks
    for part in MLP_PARTS:
        block = copy.deepcopy(fused[1])
        WATCHERS[watcher](block.get_submodule(part))
        with op_calls() as called:
            found = block(TOKENS)
        assert not called, part
        assert torch.equal(found, dcvit.unfuse(block)(TOKENS))
    for part in ATTENTION_PARTS:
        block = copy.deepcopy(fused[0])
        WATCHERS[watcher](block.get_submodule(part))
        with op_calls() as called:
            block(TOKENS)
        assert called == ["mlp"], part


def test_a_backward_hook_on_fc1_fires() -> None:
    model, fired = dcvit.fuse(student()), []
    model.blocks[1].mlp.fc1.register_full_backward_hook(lambda *_: fired.append(1))
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert fired == [1]


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Wrapped(Tensor):
    """A tensor of another type, as of quantised weights."""


def wrap_weight(model: Any) -> None:
    fc1 = model.blocks[1].mlp.fc1
    fc1.weight = nn.Parameter(fc1.weight.detach().as_subclass(Wrapped))


def buffer_weight(model: Any) -> None:
    fc1 = model.blocks[1].mlp.fc1
    weight = fc1.weight.detach()
    del fc1.weight
    fc1.register_buffer("weight", weight)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "parametrization": lambda m: nn.utils.parametrize.register_parametrization(
        m.blocks[1].mlp.fc1, "weight", Doubled()
    ),
    "pruning": lambda m: prune.random_unstructured(m.blocks[1].mlp.fc2, "weight", 0.5),
    "weights of another type": wrap_weight,
    "another layer": lambda m: setattr(m.blocks[1].mlp, "fc1", type("Low", (nn.Linear,), {})(48, 20)),
    "a weight that is a buffer": buffer_weight,
}


@pytest.mark.parametrize("name", CHANGES)
def test_it_steps_aside_for_layers_that_are_not_ordinary(name: str) -> None:
    model = dcvit.fuse(student())
    CHANGES[name](model)
    with op_calls() as called:
        found = model.blocks[1](TOKENS)
    assert not called
    assert torch.equal(found, dcvit.unfuse(model).blocks[1](TOKENS))


@pytest.mark.parametrize("part", ["mlp.drop1", "mlp.drop2", "attn.attn_drop", "attn.proj_drop"])
def test_dropout_that_is_switched_on_by_itself_drops(part: str) -> None:
    """As for uncertainties: the model is in evaluation mode, and only its dropouts are not."""
    block = dcvit.fuse(VARIANTS["plain"].create()).blocks[0]  # type: ignore[index]
    dropout = block.get_submodule(part)
    dropout.p, block.attn.fused_attn = 0.5, False
    dropout.train()
    assert not torch.equal(block(TOKENS), block(TOKENS))


def test_a_replaced_dropout_is_called() -> None:
    block = dcvit.fuse(VARIANTS["plain"].create()).blocks[0]  # type: ignore[index]
    block.attn.proj_drop = nn.Tanh()
    with op_calls() as called:
        block(TOKENS)
    assert called == ["mlp"]


PATCHED: dict[str, tuple[type[nn.Module], list[str]]] = {
    "block": (Block, ["mlp"]),
    "compressed block": (CompressedBlock, ["attention", "mlp", "attention", "mlp"]),
    "attention": (Attention, ["mlp", "mlp", "mlp"]),
    "MLP": (Mlp, ["attention", "attention"]),
    "linear layer": (nn.Linear, ["attention", "attention"]),
    "activation": (nn.GELU, ["attention", "attention"]),
    "norm": (LayerNorm, ["attention", "attention"]),
    "identity": (nn.Identity, []),
    "dropout": (nn.Dropout, []),
}
"""A class whose `forward` is replaced, and the ops that are still called."""


@pytest.mark.parametrize("method", ["forward", "__call__"])
@pytest.mark.parametrize("name", PATCHED)
def test_it_steps_aside_for_methods_that_are_replaced_on_classes(name: str, method: str) -> None:
    """Each call reaches the method, as without fusing."""
    kind, still_called = PATCHED[name]
    model, images, original = dcvit.fuse(student()), torch.randn(2, 3, 32, 32), getattr(kind, method)
    calls: list[str] = []

    def counting(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, op_calls() as ops, torch.no_grad():
        patch.setattr(kind, method, counting)
        model(images)
        fused = len(calls)
        dcvit.unfuse(model)(images)
    assert len(calls) == 2 * fused > 0
    # A block is called in any case.
    assert method == "__call__" or ops == still_called


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Intercepting(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def global_hook(register: Callable[..., Any]) -> Iterator[None]:
    handle = register(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


STATES: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "dispatch mode": Watching,
    "function mode": Intercepting,
    "global forward hook": lambda: global_hook(register_module_forward_hook),
    "global forward pre-hook": lambda: global_hook(register_module_forward_pre_hook),
    "global backward hook": lambda: global_hook(register_module_full_backward_hook),
    "flop counter": lambda: FlopCounterMode(display=False),
    "forward-mode differentiation": forward_ad.dual_level,
}


@pytest.mark.parametrize("state", STATES)
def test_it_steps_aside_while_something_watches_all_modules(state: str) -> None:
    model, images = dcvit.fuse(student()), torch.randn(2, 3, 32, 32)
    with op_calls() as called, STATES[state]():
        model(images)
    assert not called
    with op_calls() as called:
        model(images)
    assert called


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch scripts its own formulas
def test_forward_derivatives_are_those_of_the_modules() -> None:
    """The kernels have none; an implementation that is asked for by name would refuse the call."""
    plain, images, tangent = student(), torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    derivatives = []
    for model in (plain, dcvit.fuse(copy.deepcopy(plain), impl="cpp")):
        with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            derivatives.append(forward_ad.unpack_dual(model(forward_ad.make_dual(images, tangent))).tangent)
    torch.testing.assert_close(derivatives[1], derivatives[0])


@pytest.mark.parametrize("block", [0, 1], ids=["whole", "compressed"])
def test_a_second_derivative_is_refused_with_the_next_step(block: int) -> None:
    fused = dcvit.fuse(student()).blocks[block]  # type: ignore[index]
    tokens = TOKENS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(fused(tokens).square().sum(), tokens, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*impl='eager'.*dcvit\.unfuse\(model\)"):
        gradient.sum().backward()
    with sdpa_kernel(SDPBackend.MATH):
        (gradient,) = torch.autograd.grad(dcvit.unfuse(fused)(tokens).square().sum(), tokens, create_graph=True)
        gradient.sum().backward()


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace is deprecated, and warns of what it takes for constants
def test_it_steps_aside_for_tracers() -> None:
    images, model = torch.randn(2, 3, 32, 32), dcvit.fuse(student())
    with op_calls() as called, torch.no_grad():
        traced = torch.jit.trace(dcvit.fuse(student()), images, check_trace=False)  # which would run the model, too
        program = torch.export.export(dcvit.fuse(student()), (images,))
        dcvit.fuse(student()).to("meta")(images.to("meta"))
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            model.blocks(fake.from_tensor(TOKENS))
    assert not called
    assert "dcvit::" not in str(traced.inlined_graph)
    assert not [node for node in program.graph.nodes if "dcvit" in str(node.target)]


def test_flops_are_those_of_the_modules() -> None:
    images = torch.randn(2, 3, 32, 32)
    counts = []
    for model in (student(), dcvit.fuse(student())):
        with FlopCounterMode(display=False) as counter:
            model(images).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("needs", [(0, 1, 3), (1,), (3,), (0, 1, 2, 3, 4)])
def test_the_ops_themselves_are_counted(needs: tuple[int, ...]) -> None:
    shapes = ((7, 16), (24, 16), (24,), (16, 24), (16,))
    inputs = [torch.randn(shape, requires_grad=i in needs) for i, shape in enumerate(shapes)]
    qkv = torch.randn(2, 5, 3, 4, 16, requires_grad=True)
    counts = []
    for impl in ("eager", "cpp"):
        with FlopCounterMode(display=False) as counter:
            dropped_mlp(*inputs, impl=impl).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    counts = []
    for impl in ("eager", "cpp"):
        # Of torch's fused attention on a CPU it knows no products.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            attention(qkv.detach(), impl=impl)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    "create", [EVA_VARIANTS["dinov3"].create, VARIANTS["post_norm"].create], ids=["eva", "post norm"]
)
def test_blocks_of_other_kinds_compute_as_before(create: Callable[[], nn.Module]) -> None:
    model, images = compress_block(create(), 1, range(20)), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(dcvit.fuse(copy.deepcopy(model))(images), model(images), rtol=1e-4, atol=1e-5)


def test_a_whole_model_can_be_pickled_by_torch() -> None:
    file, model, images = io.BytesIO(), student(), torch.randn(2, 3, 32, 32)
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(images), model(images))
