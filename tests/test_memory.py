"""The memory that a pass is said to take against what the allocator gives out."""

import pytest
import torch
from torch import nn

from dcvit.latency import example_images
from dcvit.memory import measure_peak_memory, trace_activation_memory
from dcvit.surgery import choose_impl, unrecovered
from tests.variants import VARIANTS, Variant

BATCH = 40  # so many that blocks, and not the scratch space of the first convolution, set the peak


def measured(model: nn.Module, batch_size: int = BATCH) -> int:
    images = example_images(model, batch_size)
    with torch.no_grad():
        model(images)
        return measure_peak_memory(lambda: model(images), images.device)


def test_the_trace_is_what_the_allocator_says(variant: Variant) -> None:
    model = variant.create()
    for hidden in ({}, {1: 10}, {1: 0, 2: 5}):
        structure = unrecovered(model, hidden)
        assert trace_activation_memory(structure, BATCH) == measured(structure)


def test_one_whole_block_sets_the_peak() -> None:
    """So that leaving attention out of some blocks saves no memory at the peak, by the allocator too."""
    model = VARIANTS["plain"].create()
    original = measured(model)
    assert measured(unrecovered(model, dict.fromkeys(range(3), 0))) == original
    assert measured(unrecovered(model, dict.fromkeys(range(4), 0))) < original


def test_compressed_blocks_take_what_the_plain_implementation_does() -> None:
    structure = unrecovered(VARIANTS["plain"].create(), dict.fromkeys(range(4), 150))
    choose_impl(structure, "eager")
    assert trace_activation_memory(structure, BATCH) == measured(structure)
    choose_impl(structure, "auto")
    assert trace_activation_memory(structure, BATCH) >= measured(structure)


@pytest.mark.parametrize("batch_size", [16, 10**6])
def test_it_grows_with_the_batch_and_computes_nothing(batch_size: int) -> None:
    """Computed, a million images would take more memory than there is."""
    model = VARIANTS["plain"].create()
    assert trace_activation_memory(model, batch_size) == batch_size * trace_activation_memory(model, 8) // 8
