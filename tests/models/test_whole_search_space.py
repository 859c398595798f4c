"""Whatever structure a search or a method can choose, of any family, is rebuilt, saved and loaded again."""

import contextlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dcvit
from dcvit.artifacts.result import save_model
from dcvit.errors import DcvitError
from dcvit.methods import METHODS
from dcvit.models import compressible, load_model, require_supported
from tests.conftest import QUICK, quick, slow_but
from tests.models.test_cnn import create as cnn
from tests.models.test_swin import create as swin
from tests.variants import EVA_VARIANTS, REPRESENTATIVES, VARIANTS
from tests.without_dcvit import output_without_dcvit

MODELS: dict[str, Callable[[], Any]] = {
    **{name: variant.create for name, variant in (VARIANTS | EVA_VARIANTS).items()},
    "swin": lambda: swin(1),
    "swin v2": lambda: swin(2),
    "swin of three stages": lambda: swin(1, depths=(2, 2, 2), num_heads=(1, 2, 4)),
    **{kind: lambda kind=kind: cnn(kind) for kind in ("basic", "bottleneck", "mobilenet", "edge", "regnet")},
}


def compress(model: nn.Module, kept: int) -> None:
    view = compressible(model)
    for block in range(view.num_blocks()):
        view.compress_block(block, range(kept))


def prune(model: nn.Module) -> None:
    """As far as a search goes: one hidden unit is left."""
    view = compressible(model)
    for block in range(view.num_blocks()):
        if view.prune_obstacle(block) is None:
            view.prune_block(block, range(1))


def drop(model: nn.Module) -> None:
    for block in range(compressible(model).num_blocks()):
        compressible(model).drop_block(block)


def mix(model: nn.Module) -> None:
    """The whole search space: blocks without attention, without hidden units and without either."""
    for block in range(compressible(model).num_blocks()):
        view = compressible(model)
        if block % 3 == 0:
            view.drop_block(block)
        else:
            view.compress_block(block, range(5 * (block % 3 - 1)))


STRUCTURES: dict[str, Callable[[nn.Module], None]] = {
    "no attention": lambda model: compress(model, 5),
    "no attention and no nodes": lambda model: compress(model, 0),
    "one node": prune,
    "no blocks": drop,
    "all kinds": mix,
}


@pytest.mark.parametrize(
    ("kind", "structure"),
    slow_but(
        itertools.product(MODELS, STRUCTURES),
        *itertools.product(("plain", "swin", "basic"), STRUCTURES),
        *((name, "all kinds") for name in REPRESENTATIVES),
    ),
)
def test_it_is_saved_and_loaded(kind: str, structure: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    STRUCTURES[structure](model)
    view = require_supported(model)  # which evaluation and export ask for a student, too
    images = torch.randn(2, *view.input_size())
    rebuilt = view.rebuild()
    torch.testing.assert_close(rebuilt(images), model(images))
    assert compressible(rebuilt).cost() == view.cost()
    save_model(model, tmp_path / "small")
    torch.testing.assert_close(load_model(f"local-dir:{tmp_path / 'small'}")(images), model(images))


@pytest.mark.parametrize("kind", ["attention_pool", "post_norm", "beit", "swin", "basic"])
def test_without_any_attention_it_loads_without_dcvit(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    mix(model)
    images = torch.randn(2, *compressible(model).input_size())
    save_model(model, tmp_path / "small")
    torch.testing.assert_close(output_without_dcvit(tmp_path / "small", images), model(images))


@pytest.mark.parametrize("kind", slow_but(["plain", "beit"], "plain"))
def test_a_budget_of_memory_may_take_all_attention(kind: str, tmp_path: Path) -> None:
    """Memory at its peak is that of one block, so that such a budget compresses every block."""
    model = MODELS[kind]()
    images = torch.randn(6, *compressible(model).input_size())
    config = QUICK.with_(candidates=tuple(range(4)))
    result = dcvit.compress(model, images, dcvit.Budget(activation_memory=0.85), config)
    assert not any(block.compressible for block in compressible(result.model).cost().blocks)
    result.save(tmp_path / "small")
    torch.testing.assert_close(dcvit.load(tmp_path / "small").model(images), result.model(images))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["plain", "swin"])
def test_a_student_without_attention_is_compressed_again_or_refused(kind: str, method: str) -> None:
    model = MODELS[kind]()
    compress(model, 5)
    images = torch.randn(6, *compressible(model).input_size())
    with contextlib.suppress(DcvitError):  # any other error fails
        result = dcvit.compress(model, images, dcvit.Budget(params=0.99), quick(method))
        assert result.report.student.params < result.report.teacher.params
