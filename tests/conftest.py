"""Fixtures that several test files share."""

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

# Read when Triton is imported, which dcvit's imports do.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import dcvit
from tests.variants import EVA_VARIANTS, VARIANTS, Variant

SYNTHESIS = dcvit.SynthesisConfig(num_images=3, iterations=3, warmup_iterations=1)

QUICK = dcvit.CompressionConfig(
    recovery=dcvit.ReconstructionConfig(
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
"""Block reconstruction, as by default but for the amounts and the refinement, in half a second."""

REFINED = QUICK.with_(
    recovery=replace(QUICK.reconstruction, refinement_views=60, refinement_steps=200, refinement_batch=4)
)
"""The same with the refinement, of as few steps as are worth it."""

CUT = QUICK.with_(structure="fewest")
CUT_REFINED = REFINED.with_(structure="fewest")
"""Both where every cut block loses its attention, as published; a search finds that here only nodes need go."""

PUBLISHED = dcvit.CompressionConfig.paper(
    recovery=dcvit.MimickingConfig(epochs=2, learning_rate=1e-4, warmup_epochs=1, batch_size=4), synthesis=SYNTHESIS
)
"""The published procedure likewise."""


# The models here are too small to share between threads; other processes' threads would only slow them down.
torch.set_num_threads(int(os.environ.get("DCVIT_TEST_THREADS", "1")))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[*VARIANTS, *EVA_VARIANTS])
def variant(request: pytest.FixtureRequest) -> Variant:
    """Each variant of an isotropic vision transformer in turn."""
    return (VARIANTS | EVA_VARIANTS)[request.param]


@pytest.fixture
def model() -> nn.Module:
    """A small plain ViT with 10 classes for 32x32 images."""
    return VARIANTS["plain"].create()


@pytest.fixture
def images() -> Tensor:
    """Six normalised images for `model`."""
    return torch.randn(6, 3, 32, 32)
