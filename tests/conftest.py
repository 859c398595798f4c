"""Fixtures that several test files share."""

import os
from collections.abc import Iterable
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

# Read when Triton is imported, which dcvit's imports do.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import dcvit
from dcvit.compression.finish import finish
from dcvit.methods import METHODS
from dcvit.metrics.latency import Timing
from tests.variants import EVA_VARIANTS, REPRESENTATIVES, VARIANTS, Variant

SYNTHESIS = dcvit.config.SynthesisConfig(num_images=3, iterations=3, warmup_iterations=1)

QUICK = dcvit.DCViT(
    recovery=dcvit.config.ReconstructionConfig(
        num_views=60,
        num_rows=300,
        epochs=2,
        step_sizes=(0.03,),
        batch_rows=16,
        refinement_steps=0,
        batch_size=4,
    ),
    synthesis=SYNTHESIS,
)
"""Block reconstruction with the defaults, but smaller amounts and no refinement; it takes half a second."""

REFINED = QUICK.with_(
    recovery=replace(QUICK.reconstruction, refinement_views=60, refinement_steps=200, refinement_batch=4)
)
"""The same with the refinement, of as few steps as are worth it."""

CUT = QUICK.with_(structure="fewest")
CUT_REFINED = REFINED.with_(structure="fewest")
"""Both remove the attention of every compressed block, as published; a search would only prune hidden units here."""

PUBLISHED = dcvit.DCViT.paper(
    recovery=dcvit.config.DistillationConfig(epochs=2, learning_rate=1e-4, warmup_epochs=1, batch_size=4),
    synthesis=SYNTHESIS,
)
"""The published procedure likewise."""

PARTS = {
    "distillation": PUBLISHED.distillation,
    "training": dcvit.config.TrainingConfig(epochs=2, learning_rate=1e-4, warmup_epochs=1, batch_size=4),
    "calibration": dcvit.config.CalibrationConfig(num_views=60, num_rows=300, batch_size=4),
}


def quick(name: str, **changes: Any) -> dcvit.config.MethodConfig:
    """The settings of a method, as by default but for the amounts.

    Args:
        name: The method.
        **changes: Of its fields, or of those of its parts.
    """
    config = QUICK if name == "dcvit" else METHODS[name].config()
    config = config.with_(**{of.name: PARTS[of.name] for of in fields(config) if of.name in PARTS})
    for of in fields(config):
        part = getattr(config, of.name)
        mine = {key: changes.pop(key) for key in list(changes) if is_dataclass(part) and hasattr(part, key)}
        config = config.with_(**{of.name: replace(part, **mine)}) if mine else config
    return config.with_(**changes)


def slow_but(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Parameters of a test, of which all but some are slow; a tuple holds one for each argument."""
    return [
        value
        if value in quick
        else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
        for value in values
    ]


# The models here are too small to share between threads; other processes' threads would only slow them down.
torch.set_num_threads(int(os.environ.get("DCVIT_TEST_THREADS", "1")))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _rough_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time few passes where the latency is a rough figure anyway."""
    few = Timing(runs=5, warmup=1)
    monkeypatch.setattr("dcvit.compression.compress.finish", partial(finish, timing=few))
    for module in ("cli.evaluate", "cli.sweep", "demo.comparison"):
        monkeypatch.setattr(f"dcvit.{module}.QUICK_TIMING", few)


@pytest.fixture(params=slow_but([*VARIANTS, *EVA_VARIANTS], *REPRESENTATIVES))
def variant(request: pytest.FixtureRequest) -> Variant:
    """Each variant of an isotropic vision transformer in turn; those that are not representative are slow."""
    return (VARIANTS | EVA_VARIANTS)[request.param]


@pytest.fixture(params=REPRESENTATIVES)
def representative(request: pytest.FixtureRequest) -> Variant:
    """Five of them, for what takes longer than a look at an adapter."""
    return (VARIANTS | EVA_VARIANTS)[request.param]


@pytest.fixture
def model() -> nn.Module:
    """A small plain ViT with 10 classes for 32x32 images."""
    return VARIANTS["plain"].create()


@pytest.fixture
def images() -> Tensor:
    """Six normalised images for `model`."""
    return torch.randn(6, 3, 32, 32)
