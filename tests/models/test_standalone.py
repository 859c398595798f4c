"""The modelling file of a saved folder: it holds what building its model needs, and nothing else."""

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from dcvit.artifacts.result import save_model
from dcvit.errors import UnsupportedModelError
from dcvit.models import compressible, standalone_source
from dcvit.models.modeling import cnn, eva, shared, variations, vision_transformer
from dcvit.models.modeling import swin as swin_modeling
from dcvit.models.surgery import compress_block, draw_kept_units, drop_block
from dcvit.models.vision_transformer import (
    convolution_of,
    fuse_tokens,
    keep_block_heads,
    place_convolution,
    share_block_weights,
)
from tests.variants import EVA_VARIANTS, VARIANTS
from tests.without_dcvit import output_without_dcvit


def swin() -> nn.Module:
    sizes = {"img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, **sizes).eval()


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "dcvit_vision_transformer": VARIANTS["plain"].create,
    "dcvit_eva": EVA_VARIANTS["dinov3"].create,
    "dcvit_swin_transformer": swin,
    "dcvit_residual_cnn": lambda: timm.create_model("resnet18", num_classes=10).eval(),
}
"""A small model of each architecture."""


def convolve(model: nn.Module) -> None:
    place_convolution(model, 1, convolution_of(model, 1))


VARIATIONS: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "heads": (lambda model: keep_block_heads(model, 1, [0, 2]), "keep_heads"),
    "convolution": (convolve, "ConvolutionalAttention"),
    "fused tokens": (lambda model: fuse_tokens(model, 1, 0.5), "FusingBlock"),
    "shared weights": (lambda model: share_block_weights(model, {1: 1, 2: 1}, {1: 1, 2: 1}), "SharedBlock"),
}
"""What changes a vision transformer's block, and what only a file of such a model defines."""


def varied(name: str) -> nn.Module:
    model = VARIANTS["plain"].create()
    VARIATIONS[name][0](model)
    return model


MODELS = FAMILIES | {name: lambda name=name: varied(name) for name in VARIATIONS}


def source_of(model: nn.Module) -> str:
    return standalone_source(compressible(model).config())


def run_source(source: str) -> dict[str, Any]:
    """What a module defines; it registers nothing, for dcvit has registered its own."""
    module: dict[str, Any] = {"__name__": "modeling_dcvit", "__package__": ""}
    exec(source, module)
    return module


def defined(source: str) -> set[str]:
    """The functions, classes and constants of a module."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names |= {
                part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
            }
    return names


@pytest.mark.parametrize("name", MODELS)
def test_nothing_in_it_is_unused(name: str) -> None:
    source = source_of(MODELS[name]())
    tree = ast.parse(source)
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.asname or alias.name for node in imported for alias in node.names}
    code = re.sub(r'""".*?"""|#[^\n]*', "", source, flags=re.DOTALL)
    entered = set(re.findall(r"@variation\(.*\)\ndef (\w+)", source))  # which their decorators use
    for used in (names | defined(source)) - entered:
        assert len(re.findall(rf"\b{used}\b", code)) > 1, used
    packages = {alias.name for node in imported if isinstance(node, ast.Import) for alias in node.names}
    packages |= {node.module or "" for node in imported if isinstance(node, ast.ImportFrom)}
    assert "dcvit" not in {package.partition(".")[0] for package in packages}


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_same_each_time(name: str) -> None:
    assert source_of(MODELS[name]()) == source_of(MODELS[name]())


@pytest.mark.parametrize("name", VARIATIONS)
def test_only_a_model_that_has_a_variation_brings_its_source(name: str) -> None:
    own = {marker for _, marker in VARIATIONS.values()} & defined(source_of(varied(name)))
    assert own == {VARIATIONS[name][1]}
    for family in FAMILIES.values():
        assert not {marker for _, marker in VARIATIONS.values()} & defined(source_of(family()))


def test_families_have_their_own_sources() -> None:
    found = {name: defined(source_of(create())) for name, create in FAMILIES.items()}
    assert {name for name, names in found.items() if "CompressedBlock" in names} == found.keys() - {
        "dcvit_residual_cnn"
    }
    assert {name for name, names in found.items() if "require_base" in names} == {"dcvit_eva", "dcvit_residual_cnn"}
    own = {
        "PrunedBeit": "dcvit_eva",
        "swin_places": "dcvit_swin_transformer",
        "PointwiseBlock": "dcvit_residual_cnn",
        "BLOCKS": "dcvit_vision_transformer",
    }
    for marker, owner in own.items():
        assert [name for name, names in found.items() if marker in names] == [owner]
    for name, names in found.items():
        assert names & FAMILIES.keys() == {name}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_model_loads_without_dcvit(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name]()
    model = drop_block(compress_block(model, 1, draw_kept_units(model, 1, 7, seed=0)), 2)
    save_model(model, tmp_path / "model")
    images = torch.randn(2, *compressible(model).input_size())
    with torch.no_grad():
        expected: Tensor = compressible(model).rebuild().eval()(images)
    # Another process may sum in another order, for its threads and the alignment of its memory are its own.
    torch.testing.assert_close(output_without_dcvit(tmp_path / "model", images), expected)


@pytest.mark.parametrize("name", VARIATIONS)
def test_a_varied_model_is_built_by_its_own_file(name: str) -> None:
    model = varied(name)
    with torch.no_grad():  # some variations begin as nothing
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    built = run_source(source_of(model))["build"](**compressible(model).config()["model_args"]).eval()
    built.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(built(images), model(images))


@pytest.mark.parametrize("name", VARIATIONS)
def test_a_file_refuses_a_model_that_needs_more(name: str) -> None:
    """Token fusing has no weights: a file that ignored it would load them all, into another model."""
    module = run_source(source_of(FAMILIES["dcvit_vision_transformer"]()))
    args = compressible(varied(name)).config()["model_args"]
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match="for the model beside it: load each in a separate process"),
    ):
        module["build"](**args)


def test_an_architecture_of_none_of_dcvits_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="names the architecture 'resnet18'; expected one of dcvit_"):
        standalone_source({"architecture": "resnet18", "model_args": {}})


@pytest.mark.parametrize(
    "family", [vision_transformer, eva, swin_modeling, cnn], ids=lambda module: module.ARCHITECTURE
)
def test_a_name_is_defined_once(family: ModuleType) -> None:
    """The sources of a file share one namespace."""
    found = [defined(inspect.getsource(module)) - {"__all__"} for module in (shared, variations, family)]
    assert len(set.union(*found)) == sum(map(len, found))


def test_every_variation_is_asked_for_by_keys_of_its_own() -> None:
    keys = [key for keys in variations.VARIATIONS for key in keys]
    assert len(keys) == len(set(keys)) == 5
