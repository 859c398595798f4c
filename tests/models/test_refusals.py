"""Models that other tools have wrapped or changed: each is taken, or refused with what the user passes instead."""

import argparse
import copy
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, prune

import dcvit
from dcvit.errors import UnsupportedModelError
from dcvit.models import compressible, families, load_model, require_supported
from dcvit.search.plan import plan
from tests.conftest import QUICK, quick
from tests.models.test_cnn import create as cnn
from tests.models.test_swin import create as swin
from tests.variants import EVA_VARIANTS, VARIANTS
from tests.without_dcvit import output_without_dcvit

MIR = quick("mir")
"""A method that drops blocks, which is quick for a CNN."""


def vit() -> Any:
    return VARIANTS["plain"].create()


class Wrapper(nn.Module):
    """A user's module around a timm model."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Any:
        return [part(x) for part in self.children()]


def of_package(name: str, kind: type[nn.Module]) -> type[nn.Module]:
    """A class that says of itself that it is of a package, which need not be installed."""
    return type(kind.__name__, (kind,), {"__module__": name})


def with_part(name: str, make: Callable[[Any], nn.Module], model: Any = None) -> nn.Module:
    """A ViT in which one part is replaced by what is made of it."""
    model = vit() if model is None else model
    model.set_submodule(name, make(model.get_submodule(name)))
    return model


def renamed(part: nn.Module, package: str) -> nn.Module:
    part.__class__ = of_package(package, type(part))
    return part


def parametrized(model: Any) -> Any:
    parametrizations.weight_norm(model.blocks[1].mlp.fc1)
    return model


def pruned(model: Any) -> Any:
    prune.l1_unstructured(model.blocks[1].mlp.fc1, "weight", amount=0.5)
    return model


def with_old_spectral_norm(model: Any) -> Any:
    torch.nn.utils.spectral_norm(model.blocks[2].attn.proj)
    return model


class Quantised(Tensor):
    """A tensor of a class of its own, as quantisers have them."""


def with_weight_of_a_class(model: Any) -> Any:
    model.blocks[0].mlp.fc1.weight = nn.Parameter(model.blocks[0].mlp.fc1.weight.as_subclass(Quantised))
    return model


def with_another_part(model: Any) -> Any:
    model.projector = nn.Linear(48, 8)
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "torch.compile": (lambda: torch.compile(vit()), "pass the model inside of it, model._orig_mod (a VisionTrans"),
    "DataParallel": (lambda: nn.DataParallel(vit()), "pass the model inside of it, model.module (a VisionTrans"),
    "average": (
        lambda: torch.optim.swa_utils.AveragedModel(cnn("basic")),
        "pass the model inside of it, model.module (a ResNet)",
    ),
    "EMA of timm": (lambda: timm.utils.ModelEmaV3(vit()), "pass the model inside of it, model.module (a VisionTrans"),
    "user's module": (lambda: Wrapper(backbone=vit(), head=nn.Linear(10, 2)), "model.backbone (a VisionTransformer)"),
    "two in one": (
        lambda: Wrapper(teacher=vit(), student=swin(1)),
        "one of model.teacher (a VisionTransformer), model.student (a SwinTransformer)",
    ),
    "sequence": (lambda: nn.Sequential(nn.Identity(), vit()), "pass the model inside of it, model[1] (a VisionTra"),
    "compiled wrapper": (
        lambda: torch.compile(Wrapper(encoder=nn.DataParallel(vit()))),
        "model._orig_mod.encoder.module (a VisionTransformer)",
    ),
    "script": (
        lambda: torch.jit.trace(nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2)),
        "create the model with timm.create_model, load the script's state_dict() into it",
    ),
    "graph": (lambda: torch.fx.symbolic_trace(nn.Linear(2, 2)), "pass the model that the graph was made of"),
    "torchvision": (torchvision.models.resnet18, "Create one of these with timm.create_model"),
    "PEFT": (
        lambda: of_package("peft.peft_model", Wrapper)(base_model=vit()),
        "merge the adapters into the weights first, model = model.merge_and_unload()",
    ),
    "adapters inside": (
        lambda: with_part("blocks.1.attn.qkv", lambda part: renamed(part, "peft.tuners.lora.layer")),
        "part blocks.1.attn.qkv is a peft.tuners.lora.layer.Linear: merge the adapters",
    ),
    "FSDP": (
        lambda: of_package("torch.distributed.fsdp.fully_sharded_data_parallel", Wrapper)(inner=vit()),
        "gather the weights first",
    ),
    "quantised layer": (
        lambda: with_part("blocks.0.mlp.fc2", lambda part: renamed(part, "torch.ao.nn.quantized.dynamic.modules")),
        "part blocks.0.mlp.fc2 is a torch.ao.nn.quantized.dynamic.modules.Linear: pass the model as it was before",
    ),
    "bitsandbytes": (
        lambda: with_part("blocks.0.mlp.fc1", lambda part: renamed(part, "bitsandbytes.nn.modules")),
        "pass the model as it was before, with its weights as plain tensors",
    ),
    "quantised weight": (
        lambda: with_weight_of_a_class(vit()),
        "blocks.0.mlp.fc1.weight is a tests.models.test_refusals.Quantised: pass the model as it was before",
    ),
    "parametrized": (
        lambda: parametrized(vit()),
        "call torch.nn.utils.parametrize.remove_parametrizations(model.blocks[1].mlp.fc1, 'weight')",
    ),
    "pruned": (lambda: pruned(vit()), "call torch.nn.utils.prune.remove(model.blocks[1].mlp.fc1, 'weight')"),
    "spectral norm": (
        lambda: with_old_spectral_norm(vit()),
        "call torch.nn.utils.remove_spectral_norm(model.blocks[2].attn.proj, 'weight')",
    ),
    "head of layers": (
        lambda: with_part("head", lambda head: nn.Sequential(nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 5))),
        "head, model.head = model.head, torch.nn.Identity(), and set it afterwards: result.model.head = head.",
    ),
    "head without bias": (
        lambda: with_part("fc", lambda head: nn.Linear(head.in_features, 5, bias=False), cnn("basic")),
        "head, model.fc = model.fc, torch.nn.Identity(), and set it afterwards: result.model.fc = head.",
    ),
    "part beside": (lambda: with_another_part(vit()), "with del model.projector, and set it on result.model"),
    "changed part": (
        lambda: with_part("blocks.2.mlp.act", lambda part: nn.ReLU()),
        "Replace it by timm's own part, or pass a model that timm.create_model created with such a part.",
    ),
    "group norms": (lambda: timm.create_model("resnet50_gn"), "their norms are GroupNorm. Put a BatchNorm2d"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_next_step(name: str) -> None:
    make, step = REFUSED[name]
    model = make()
    with pytest.raises(UnsupportedModelError, match=re.escape(step)) as refused:
        dcvit.compress(model, torch.randn(2, 3, 32, 32), dcvit.Budget(macs=0.8), QUICK)
    assert not re.search(r"dcvit/|_read_model_args|_base\b|adapter in", str(refused.value))  # nothing internal
    assert str(refused.value).endswith(".")


@pytest.mark.parametrize("name", ["torch.compile", "user's module", "sequence", "two in one", "compiled wrapper"])
def test_what_a_refusal_says_to_pass_is_taken(name: str) -> None:
    model = REFUSED[name][0]()
    with pytest.raises(UnsupportedModelError) as refused:
        require_supported(model)
    path = re.search(r"(model[\w.\[\]]+) \(a", str(refused.value))
    assert path is not None
    require_supported(eval(path[1], {"model": model}))


def follow(model: Any, **names: Any) -> None:
    """Run the code that a refusal ends with, as the user would, until the model is taken."""
    for _ in range(10):
        try:
            require_supported(model)
        except UnsupportedModelError as refused:
            step = str(refused).rsplit(": ", 1)[1].removesuffix(".")
            exec(step, {"model": model, "copy": copy, **names})
        else:
            return
    pytest.fail("the model is refused after ten steps")


def test_adapters_are_merged_as_the_refusal_says() -> None:
    """The caller may have kept the PEFT model, or have only its inner model at hand."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(vit(), peft.LoraConfig(target_modules=["fc1", "qkv"], init_lora_weights=False))
    images = torch.randn(2, 3, 32, 32)
    expected = adapted(images)
    inner = adapted.base_model.model
    with pytest.raises(UnsupportedModelError, match=r"part blocks\.0\.attn\.qkv is a peft\.tuners.*peft_model\.merge"):
        require_supported(inner)
    follow(inner, peft_model=adapted)
    torch.testing.assert_close(inner(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["", "blocks.1"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_are_brought_back_as_the_refusal_says(where: str, part: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, images = vit(), torch.randn(2, 3, 32, 32)
    expected, offloaded = model(images), model.get_submodule(part)
    if where == "cpu":
        accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(offloaded, tmp_path, execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match=r"accelerate .*remove_hook_from_module\(model, recurse=True\)"):
        require_supported(model)
    follow(model, accelerate=accelerate)
    assert torch.equal(model(images), expected)


SHARED: dict[str, tuple[Callable[[], Any], tuple[str, ...], str]] = {
    "MLP": (vit, ("blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp"), "model.blocks[1].mlp"),
    "attention": (vit, ("blocks.1.attn", "blocks.3.attn"), "model.blocks[3].attn"),
    "layer": (vit, ("blocks.0.mlp.fc1", "blocks.1.mlp.fc1"), "model.blocks[1].mlp.fc1"),
    "weight": (vit, ("blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.weight"), "model.blocks[1].mlp.fc1.weight"),
    "block": (vit, ("blocks.0", "blocks.1"), "model.blocks[1]"),
    "EVA": (EVA_VARIANTS["dinov3"].create, ("blocks.0.attn", "blocks.1.attn"), "model.blocks[1].attn"),
    "Swin": (lambda: swin(1), ("layers.0.blocks.0.mlp", "layers.0.blocks.1.mlp"), "model.layers[0].blocks[1].mlp"),
    "CNN": (lambda: cnn("basic"), ("layer2.1.conv1", "layer2.1.conv2"), "model.layer2[1].conv2"),
}
"""A model, the parts of it that become one, and the part that a refusal names."""


@pytest.mark.parametrize("name", SHARED)
def test_shared_parts_are_copied_as_the_refusal_says(name: str) -> None:
    make, (first, *others), named = SHARED[name]
    model = make()
    shared = functools.reduce(getattr, first.split("."), model)
    for other in others:
        holder, _, attribute = other.rpartition(".")
        setattr(model.get_submodule(holder), attribute, shared)
    images = torch.randn(2, *compressible(model).input_size())
    expected = model(images)
    with pytest.raises(UnsupportedModelError, match=re.escape(f"is shared with {first}: ")) as refused:
        require_supported(model)
    assert f" {named} = copy.deepcopy({named})" in str(refused.value)
    follow(model)
    assert torch.equal(model(images), expected)


def test_a_head_can_be_taken_off_and_put_back_as_the_refusal_says() -> None:
    model: Any = REFUSED["head of layers"][0]()
    images = torch.randn(6, 3, 32, 32)
    head, model.head = model.head, nn.Identity()
    result = dcvit.compress(model, images, dcvit.Budget(macs=0.9), QUICK)
    student: Any = result.model
    student.head = head
    assert student(images).shape == (6, 5)


def test_no_refusal_of_dcvit_names_its_own_functions() -> None:
    for file in (Path(dcvit.__file__).parent / "models").glob("*.py"):
        assert not re.search(r"or extend|own cost and rebuild|needs an adapter", file.read_text()), file.name


# What can be rebuilt is taken.

HEADS: dict[str, tuple[Callable[[], Any], str]] = {
    "vit": (vit, "head"),
    "backbone": (VARIANTS["backbone"].create, "head"),
    "eva": (EVA_VARIANTS["dinov3"].create, "head"),
    "swin": (lambda: swin(1), "head.fc"),
    "cnn": (lambda: cnn("basic"), "fc"),
    "efficientnet": (lambda: cnn("mobilenet"), "classifier"),
    "regnet": (lambda: cnn("regnet"), "head.fc"),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_that_was_replaced_is_read_off_the_model(kind: str, tmp_path: Path) -> None:
    """`model.num_classes` still says what the head was before."""
    make, name = HEADS[kind]
    model = make()
    width = compressible(model).features(compressible(model).tokens(torch.zeros(1, *compressible(model).input_size())))
    model.set_submodule(name, nn.Linear(width.shape[-1], 5))
    images = torch.randn(4, *compressible(model).input_size())
    view = require_supported(model)
    assert view.num_classes() == 5
    rebuilt: Any = view.rebuild()
    assert rebuilt.num_classes == 5
    torch.testing.assert_close(rebuilt(images), model(images))


def test_a_head_that_was_taken_off_makes_a_backbone() -> None:
    model = with_part("head", lambda head: nn.Identity())
    assert require_supported(model).num_classes() == 0
    assert require_supported(model).rebuild()(torch.randn(1, 3, 32, 32)).shape == (1, 48)


NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "synchronised": nn.SyncBatchNorm.convert_sync_batchnorm,
    "timm's synchronised": timm.layers.convert_sync_batchnorm,
    "frozen": timm.layers.freeze_batch_norm_2d,
}


def with_norms(kind: str, change: str) -> tuple[Any, Any]:
    """A CNN whose norms another tool has changed, and the same as it was."""
    plain = cnn(kind)
    changed = NORMS[change](copy.deepcopy(plain))
    assert not any(type(module) is nn.BatchNorm2d for module in changed.modules())
    return changed.eval().requires_grad_(False), plain


@pytest.mark.parametrize("change", ["synchronised", "frozen"])
@pytest.mark.parametrize("how", ["hook", "forward"])
def test_what_changes_the_output_of_such_a_norm_is_refused(change: str, how: str) -> None:
    model, _ = with_norms("basic", change)
    norm = next(module for module in model.modules() if "BatchNorm" in type(module).__name__)
    if how == "hook":
        norm.register_forward_hook(lambda _module, _args, output: 3 * output + 1)
    else:
        norm.forward = lambda x: 3 * x + 1
    images = torch.randn(4, *compressible(require_supported(model).model).input_size())
    with pytest.raises(UnsupportedModelError, match=r"hook|replaced forward"):
        dcvit.compress(model, images, dcvit.Budget(macs=0.9))


@pytest.mark.parametrize(
    ("kind", "change"),
    [("basic", "synchronised"), ("basic", "frozen"), ("mobilenet", "timm's synchronised"), ("regnet", "frozen")],
)
def test_synchronised_and_frozen_norms_are_taken(kind: str, change: str) -> None:
    model, plain = with_norms(kind, change)
    images = torch.randn(2, 3, 32, 32)
    view, expected = require_supported(model), require_supported(plain)
    assert view.cost() == expected.cost()
    for each in (view, expected):
        block = next(block for block, of in enumerate(each.cost().blocks) if of.compressible)
        each.model = copy.deepcopy(each.model)
        each.compress_block(block, range(3))
    student = view.rebuild()
    torch.testing.assert_close(student(images), expected.rebuild()(images))
    assert any(isinstance(module, nn.BatchNorm2d) for module in student.modules())


@pytest.mark.slow
@pytest.mark.parametrize("change", ["synchronised", "frozen"])
def test_a_compression_of_them_gives_the_weights_that_plain_norms_give(change: str, tmp_path: Path) -> None:
    """What is saved has plain norms, which compute the same; the caller's model stays as it is."""
    model, plain = with_norms("basic", change)
    images, budget = torch.randn(6, 3, 32, 32), dcvit.Budget(macs=0.9)
    before = copy.deepcopy(model)
    assert plan(model, budget, QUICK) == plan(plain, budget, QUICK)
    result, expected = (dcvit.compress(one, images, budget, MIR) for one in (model, plain))
    assert all(torch.equal(a, b) for a, b in zip(result.model.parameters(), expected.model.parameters(), strict=True))
    torch.testing.assert_close(model.state_dict(), before.state_dict(), rtol=0, atol=0)
    assert {type(module) for module in model.modules()} == {type(module) for module in before.modules()}
    result.save(tmp_path / "small")
    loaded = load_model(f"local-dir:{tmp_path / 'small'}")
    torch.testing.assert_close(loaded(images), result.model(images))


def for_small_images(kind: str, **convolution: Any) -> Any:
    """A CNN whose stem keeps the size of small images, as its users change it."""
    model = cnn(kind)
    settings = {"kernel_size": 3, "stride": 1, "padding": 1, "bias": False, **convolution}
    holder, name = {"basic": (model, "conv1"), "regnet": (model.stem if kind == "regnet" else None, "conv")}.get(
        kind, (model, "conv_stem")
    )
    first = getattr(holder, name)
    setattr(holder, name, nn.Conv2d(first.in_channels, first.out_channels, **settings))
    if kind == "basic":
        model.maxpool = nn.Identity()
    return model.requires_grad_(False)


STEMS: dict[str, Callable[[], Any]] = {
    "CIFAR": lambda: for_small_images("basic"),
    "with bias": lambda: for_small_images("basic", bias=True),
    "efficientnet": lambda: for_small_images("mobilenet"),
    "regnet": lambda: for_small_images("regnet", kernel_size=5, padding="same"),
    "no pooling": lambda: with_part("maxpool", lambda part: nn.Identity(), cnn("basic")),
    "deep stem": lambda: with_part(
        "conv1",
        lambda part: nn.Conv2d(3, 64, 3, 1, 1),
        timm.create_model("resnet18d", pretrained_cfg_overlay={"input_size": (3, 32, 32)}).eval(),
    ),
}


@pytest.mark.parametrize("kind", STEMS)
def test_a_stem_for_small_images_is_rebuilt(kind: str, tmp_path: Path) -> None:
    model, images = STEMS[kind](), torch.randn(6, 3, 32, 32)
    compressible(model).check()
    rebuilt = compressible(model).rebuild()
    torch.testing.assert_close(rebuilt(images), model(images))


@pytest.mark.slow
def test_a_student_with_such_a_stem_is_saved_and_loads_with_dcvit_and_without(tmp_path: Path) -> None:
    images = torch.randn(6, 3, 32, 32)
    result = dcvit.compress(STEMS["CIFAR"](), images, dcvit.Budget(macs=0.9), MIR)
    result.save(tmp_path / "small")
    expected = result.model(images)
    torch.testing.assert_close(dcvit.load(tmp_path / "small").model(images), expected)
    torch.testing.assert_close(output_without_dcvit(tmp_path / "small", images), expected)


def test_a_stem_that_cannot_be_rebuilt_is_refused_by_name() -> None:
    model = with_part("conv1", lambda part: nn.Conv2d(3, 16, 3, 1, 2, dilation=2), cnn("basic"))
    with pytest.raises(UnsupportedModelError, match=r"part conv1 is Conv2d\(.*dilation=\(2, 2\).*Replace it by timm"):
        require_supported(model)


@pytest.mark.slow
def test_a_model_that_is_compiled_in_place_is_taken() -> None:
    model, images = vit(), torch.randn(6, 3, 32, 32)
    expected = dcvit.compress(model, images, dcvit.Budget(macs=0.9), QUICK).model(images)
    model.compile(backend="eager")
    torch.testing.assert_close(dcvit.compress(model, images, dcvit.Budget(macs=0.9), QUICK).model(images), expected)


def test_every_class_of_timms_is_named_to_a_stranger() -> None:
    with pytest.raises(UnsupportedModelError) as refused:
        require_supported(nn.Linear(2, 2))
    assert all(one.__name__ in str(refused.value) for family in families() for one in family.classes)


@pytest.mark.parametrize("wrap", [torch.compile, checkpoint_wrapper])
@pytest.mark.parametrize("kind", ["ViT", "CNN"])
def test_a_wrapped_block_is_refused_by_the_module_inside(kind: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    model: Any = VARIANTS["plain"].create() if kind == "ViT" else cnn("basic")
    blocks, name = (model.blocks, "blocks") if kind == "ViT" else (model.layer2, "layer2")
    blocks[1] = wrap(blocks[1])
    with pytest.raises(UnsupportedModelError, match=r"in its place, (.*)\.$") as caught:
        require_supported(model)
    step = str(caught.value).split("in its place, ")[1].removesuffix(".")
    assert step.startswith(f"model.{name}[1] = ")
    exec(step, {"model": model})  # as the user would
    require_supported(model)


@pytest.mark.parametrize("call", [dcvit.fuse, dcvit.unfuse, load_model, compressible, require_supported])
def test_what_is_no_model_is_refused_with_the_next_step(call: Callable[[Any], object]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"a Namespace: expected .* pass the one that it holds, result\.mo"):
        call(argparse.Namespace(model=vit()))  # as a result has it
    with pytest.raises(UnsupportedModelError, match=r"^model=7 is a int: expected .*timm\.create_model\.$"):
        call(7)


@pytest.mark.parametrize("call", [dcvit.fuse, dcvit.unfuse])
def test_a_name_cannot_be_fused(call: Callable[[Any], object]) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"model='vit_tiny' is a str: expected a model\. Create one with tim"
    ):
        call("vit_tiny")
