"""A model of a model's latency, calibrated with measured blocks.

Let o be the latency of the original, b that of one whole block, and c(h) that of a compressed block with h hidden
units. A model of L blocks, of which k are compressed, takes

    t(k, h) = rest + (L − k) · b + k · c(h),   rest = o − L · b

b and c are measured. c is measured at a few widths, and interpolated between them.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from dcvit.history import LatencyModel, StructureTiming
from dcvit.metrics.latency import PRECISE_TIMING, Stopwatch, example_images, measure_latency, time_forward
from dcvit.models import compressible
from dcvit.models.surgery import pruned_skeleton
from dcvit.runtime.progress import Progress, silent

__all__ = ["calibrate", "time_structures"]

WIDTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the hidden units at which a compressed block is measured."""

TIMING = replace(PRECISE_TIMING, warmup=3)
"""Timing of one measurement while planning."""


@torch.no_grad()
def calibrate(
    model: nn.Module,
    blocks: Sequence[int],
    batch_size: int,
    *,
    stopwatch: Stopwatch = time_forward,
    progress: Progress = silent,
) -> LatencyModel:
    """Measure the original, its whole blocks, and those blocks compressed to five widths, in turn.

    Blocks are timed as chains, one after another as in the model. On a busy machine a run that is much shorter than the
    original's is disturbed more rarely, and its ratio to the original's would be too small.

    Args:
        model: The original model, on the device to measure.
        blocks: The blocks to measure, which must be of one size.
        batch_size: Images per batch.
        stopwatch: Times one run.
        progress: Called after each round.
    """
    view = compressible(model)
    images = example_images(model, batch_size)
    units = view.hidden_features(blocks[0])
    widths = sorted({round(share * units) for share in WIDTHS})

    def chain(of: nn.Module) -> nn.Module:
        return nn.Sequential(*(compressible(of).block(block) for block in blocks)).eval()

    subjects: dict[str | int, nn.Module] = {"original": model, "blocks": chain(model)}
    subjects |= {width: chain(pruned_skeleton(model, dict.fromkeys(blocks, width))) for width in widths}
    inputs: dict[str | int, Tensor] = dict.fromkeys(subjects, view.embed(images)) | {"original": images}
    latency = measure_latency(subjects, inputs, TIMING, stopwatch=stopwatch, progress=progress, stage="calibration")
    original_ms = latency["original"].median_ms

    def one(name: str | int) -> float:
        return original_ms * latency[name].ratio_to(latency["original"]) / len(blocks)

    return LatencyModel(
        batch_size=batch_size,
        depth=view.num_blocks(),
        original_ms=original_ms,
        block_ms=one("blocks"),
        compressed_ms=tuple((width, one(width)) for width in widths),
    )


def time_structures(
    model: nn.Module,
    structures: Sequence[tuple[int, int]],
    candidates: Sequence[int],
    batch_size: int,
    *,
    stopwatch: Stopwatch,
    progress: Progress,
) -> tuple[StructureTiming, ...]:
    """Time pruned skeletons of structures, whose weights are not recovered, in turn with the original.

    Args:
        model: The original model.
        structures: k and the number of kept hidden units of each structure.
        candidates: Candidate blocks, of which the first k are compressed.
        batch_size: Images per batch.
        stopwatch: Times one run.
        progress: Called after each round.
    """
    subjects: dict[tuple[int, int] | None, nn.Module] = {None: model}
    subjects |= {(k, hidden): pruned_skeleton(model, dict.fromkeys(candidates[:k], hidden)) for k, hidden in structures}
    stage = "timing " + ", ".join(f"{k} blocks of {hidden}" for k, hidden in structures)
    images = example_images(model, batch_size)
    latency = measure_latency(subjects, images, TIMING, stopwatch=stopwatch, progress=progress, stage=stage)
    original = latency[None]
    return tuple(
        StructureTiming(k, hidden, (timed := latency[k, hidden]).ratio_to(original), timed.ratio_error(original))
        for k, hidden in structures
    )
