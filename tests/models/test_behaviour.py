"""A model whose output does not come only from its modules is refused by name, before any work."""

import functools
import itertools
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

import dcvit
from dcvit.errors import HooksWarning, UnsupportedModelError
from dcvit.metrics.agreement import closeness
from dcvit.models import compressible, require_plain_behaviour
from dcvit.models.teacher import freeze
from tests.conftest import QUICK
from tests.variants import EVA_VARIANTS, VARIANTS


def double(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return 2 * output


def halve(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] / 2,)


def write_in_place(_module: nn.Module, _args: Any, output: Tensor) -> None:
    output.mul_(2)


def replace_forward(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)


def replace_forward_by_method(module: nn.Module) -> None:
    module.forward = types.MethodType(lambda self, x, **_: x, module)


def replace_forward_by_partial(module: nn.Module) -> None:
    module.forward = functools.partial(lambda forward, x, **_: 2 * forward(x), module.forward)


def replace_features(module: Any) -> None:
    module.forward_features = types.MethodType(lambda self, x, **_: 2 * type(self).forward_features(self, x), module)


def look_alike(module: nn.Module) -> None:
    """Give an attention a subclass under the name of timm's."""

    class Changed(Attention):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return 2 * super().forward(*args, **kwargs)

    Changed.__qualname__ = "Attention"
    module.__class__ = Changed


CHANGES: dict[str, tuple[str, Callable[[nn.Module], Any], str]] = {
    "hook of the model": ("", lambda m: m.register_forward_hook(double), "forward hook double on the model"),
    "pre-hook of the model": ("", lambda m: m.register_forward_pre_hook(halve), "forward pre-hook halve on the model"),
    "hook of a block": ("blocks.1", lambda m: m.register_forward_hook(double), "forward hook double on blocks.1"),
    "hook of attention": ("blocks.2.attn", lambda m: m.register_forward_hook(double), "double on blocks.2.attn"),
    "hook of an MLP": ("blocks.2.mlp", lambda m: m.register_forward_hook(double), "double on blocks.2.mlp"),
    "pre-hook of a norm": (
        "norm",
        lambda m: m.register_forward_pre_hook(lambda m, a: (a[0] ** 3,)),
        "pre-hook .* norm",
    ),
    "hook that writes": ("blocks.0.mlp.fc1", lambda m: m.register_forward_hook(write_in_place), "on blocks.0.mlp.fc1"),
    "forward of the model": ("", replace_forward, "replaced forward on the model"),
    "forward of a block": ("blocks.1", replace_forward_by_method, r"replaced forward on blocks\.1"),
    "forward of attention": ("blocks.1.attn", replace_forward_by_partial, r"replaced forward on blocks\.1\.attn"),
    "another method": ("", replace_features, "replaced forward_features on the model"),
    "subclass": ("blocks.3.attn", look_alike, r"class tests\.models\.test_behaviour\.Attention of blocks\.3\.attn"),
}
"""What is changed, how, and what the message says of it."""


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_the_output_is_refused_by_name(name: str, model: nn.Module, images: Tensor) -> None:
    where, change, message = CHANGES[name]
    change(model.get_submodule(where))
    with pytest.raises(UnsupportedModelError, match=rf"model\(images\) differs by .*Found: .*{message}"):
        dcvit.compress(model, images, dcvit.Budget(macs=0.8), QUICK)


def test_a_sweep_refuses_it_too(model: nn.Module, images: Tensor) -> None:
    model.blocks[1].register_forward_hook(double)
    with pytest.raises(UnsupportedModelError, match=r"forward hook double on blocks\.1"):
        dcvit.sweep(model, images, (0.8,), QUICK)


@pytest.mark.parametrize(
    ("register", "hook"),
    [(register_module_forward_hook, double), (register_module_forward_pre_hook, halve)],
    ids=["hook", "pre-hook"],
)
def test_hooks_of_the_process_are_found(register: Any, hook: Any, model: nn.Module, images: Tensor) -> None:
    """They belong to no module, and would be gone where the saved model is loaded."""
    handle = register(hook)
    try:
        with pytest.raises(UnsupportedModelError, match=f"{hook.__name__} of all modules"):
            dcvit.compress(model, images, dcvit.Budget(macs=0.8), QUICK)
    finally:
        handle.remove()


@pytest.mark.parametrize("wrap", ["weight_norm", "spectral_norm", "parametrizations.weight_norm"])
def test_reparametrised_layers_are_refused_by_name(wrap: str, model: nn.Module, images: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older function is deprecated
        functools.reduce(getattr, wrap.split("."), nn.utils)(model.blocks[1].mlp.fc1)
    with pytest.raises(UnsupportedModelError, match=r"The model's part blocks\.1\.mlp\.fc1"):
        dcvit.compress(model, images, dcvit.Budget(macs=0.8), QUICK)


def test_an_output_of_another_kind_is_refused(model: nn.Module, images: Tensor) -> None:
    model.register_forward_hook(lambda _module, _args, output: {"logits": output})
    with pytest.raises(UnsupportedModelError, match=r"model\(images\) is a dict, not what its modules compute,"):
        require_plain_behaviour(model, images)


def test_hooks_that_change_nothing_are_accepted_and_reported(model: nn.Module, images: Tensor) -> None:
    seen: list[int] = []

    def watch(_module: nn.Module, _args: Any, output: Tensor) -> None:
        seen.append(len(output))

    expected = dcvit.compress(model, images, dcvit.Budget(macs=0.8), QUICK)
    model.blocks[1].register_forward_hook(watch)
    model.blocks[1].mlp.register_full_backward_hook(lambda *_: None)
    with pytest.warns(
        HooksWarning, match=r"not change its output: forward hook .*watch on blocks\.1; backward hook .* will also fi"
    ):
        found = dcvit.compress(model, images, dcvit.Budget(macs=0.8), QUICK)
    assert seen
    assert found.report.agreement == expected.report.agreement
    assert not any(module._forward_hooks for module in found.model.modules())


def rename(_module: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    """Change what is saved, as for a program that knows other names."""
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"renamed.{name}"] = state.pop(name)


def round_weights(_module: nn.Module, state: dict[str, Tensor], *_: Any) -> None:
    """Change what is saved, as for a smaller file."""
    state.update({name: tensor.half() for name, tensor in state.items()})


def fail(*_: Any) -> None:
    raise AssertionError("the hook is called for what dcvit saves and loads during its work")


STATE_HOOKS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "_register_state_dict_hook": (lambda m: m._register_state_dict_hook(rename), "state_dict hook rename"),
    "register_state_dict_post_hook": (
        lambda m: m.register_state_dict_post_hook(round_weights),
        "state_dict hook round_weights",
    ),
    "register_state_dict_pre_hook": (lambda m: m.register_state_dict_pre_hook(fail), "state_dict pre-hook fail"),
    "_register_load_state_dict_pre_hook": (
        lambda m: m._register_load_state_dict_pre_hook(fail),
        "load_state_dict pre-hook fail",
    ),
    "register_load_state_dict_pre_hook": (
        lambda m: m.register_load_state_dict_pre_hook(fail),
        "load_state_dict pre-hook fail",
    ),
    "register_load_state_dict_post_hook": (
        lambda m: m.register_load_state_dict_post_hook(fail),
        "load_state_dict post-hook fail",
    ),
}
"""How a hook of what is saved or loaded is registered, and what the warning says of it."""


@pytest.mark.parametrize("name", STATE_HOOKS)
def test_hooks_of_the_state_are_named(name: str) -> None:
    model, (register, found) = VARIANTS["plain"].create(), STATE_HOOKS[name]
    register(model.get_submodule("blocks.1.mlp"))
    with pytest.warns(HooksWarning, match=rf": {found} on blocks\.1\.mlp\. .*will not have them"):
        freeze(model)


def test_hooks_of_the_state_do_not_reach_the_weights(model: Any, images: Tensor) -> None:
    expected = dcvit.compress(model, images, dcvit.Budget(macs=0.8), QUICK)
    for (register, _), where in itertools.product(STATE_HOOKS.values(), ("", "blocks.1", "blocks.1.mlp.fc1")):
        register(model.get_submodule(where))
    with pytest.warns(HooksWarning, match="and 13 more"):
        found = dcvit.compress(model, images, dcvit.Budget(macs=0.8), QUICK)
    assert found.report.teacher.file_size == expected.report.teacher.file_size
    torch.testing.assert_close(found.model.state_dict(), expected.model.state_dict(), rtol=0, atol=0)
    assert len(model.blocks[1]._state_dict_hooks) == 2, "the caller's model keeps its hooks"


@pytest.mark.parametrize("create", [VARIANTS["plain"].create, EVA_VARIANTS["dinov3"].create])
def test_a_model_is_rebuilt_from_its_tensors_and_not_from_what_it_would_save(create: Callable[[], Any]) -> None:
    model, images = create(), torch.randn(2, 3, 32, 32)
    for register, _ in STATE_HOOKS.values():
        register(model.blocks[1])
    assert torch.equal(compressible(model).rebuild()(images), model(images))


def test_the_check_is_one_pass_of_the_first_images(model: nn.Module) -> None:
    seen: list[int] = []
    model.register_forward_hook(lambda _module, _args, output: seen.append(len(output)))
    with pytest.warns(HooksWarning):
        dcvit.compression.compress.checked_images(torch.randn(20, 3, 32, 32), None, freeze(model), lambda *_: None)
    assert seen == [8]


def other_models() -> dict[str, Callable[[], nn.Module]]:
    def swin() -> nn.Module:
        sizes = {"img_size": 32, "window_size": 2, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
        return timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, **sizes).eval()

    return {
        "eva": EVA_VARIANTS["dinov3"].create,
        "swin": swin,
        "cnn": lambda: timm.create_model("resnet18", num_classes=10).eval(),
        "float64": lambda: VARIANTS["plain"].create().double(),
        "channels_last": lambda: VARIANTS["plain"].create().to(memory_format=torch.channels_last),
        "unfused attention": lambda: unfused_attention(),
        "fused": lambda: dcvit.fuse(VARIANTS["plain"].create()),
    }


def unfused_attention() -> nn.Module:
    model = VARIANTS["plain"].create()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


@pytest.mark.parametrize("name", other_models())
def test_models_that_are_their_modules_pass(name: str) -> None:
    model = other_models()[name]()
    images = torch.randn(4, 3, 32, 32, dtype=next(model.parameters()).dtype)
    require_plain_behaviour(freeze(model), images)
    hooked = freeze(model)
    hooked.register_forward_hook(double)
    with pytest.raises(UnsupportedModelError, match="forward hook double on the model"):
        require_plain_behaviour(hooked, images)


def test_agreement_is_of_what_the_models_give_when_called(model: nn.Module, images: Tensor) -> None:
    """By `model(x)`, not by what a view of the model computes."""
    student = freeze(model)
    assert closeness(student, model, images) == (1.0, 0.0)
    student.register_forward_hook(lambda _module, _args, output: output.roll(1, dims=1))
    assert closeness(student, model, images) == (0.0, 0.0)
