"""A model of a model's latency, calibrated from measured blocks.

With o the latency of the original, b of one whole block and c(h) of a compressed block with h hidden nodes, k
compressed blocks of L take

    t(k, h) = rest + (L − k) · b + k · c(h),   rest = o − L · b

b and c are measured, c at a few widths between which it is interpolated.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dcvit.latency import Stopwatch, example_images, measure_latency, time_forward
from dcvit.models import adapter_for
from dcvit.progress import Progress, silent
from dcvit.surgery import unrecovered

__all__ = ["LatencyModel", "PlannedLatency", "StructureTiming", "calibrate", "time_structures"]

WIDTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the hidden nodes at which a compressed block is measured."""

_measure = partial(measure_latency, runs=1000, warmup=3, max_seconds=20.0, precision=0.004)
"""One measurement while planning: until ratios are known to 0.4 %, which on a busy machine the seconds end."""


@dataclass(frozen=True)
class LatencyModel:
    """What the parts of a model take, in milliseconds a batch.

    Attributes:
        batch_size: Images a batch.
        depth: Blocks of the model, L.
        original_ms: The whole original.
        block_ms: One block as it is.
        compressed_ms: Hidden nodes kept, ascending, and what a compressed block with them takes.
    """

    batch_size: int
    depth: int
    original_ms: float
    block_ms: float
    compressed_ms: tuple[tuple[int, float], ...]

    @property
    def rest_ms(self) -> float:
        """What is not blocks."""
        return self.original_ms - self.depth * self.block_ms

    def compressed(self, hidden_features: int) -> float:
        """c(h), in milliseconds; never less than with fewer nodes."""
        widths, times = zip(*self.compressed_ms, strict=True)
        return float(np.interp(hidden_features, widths, np.maximum.accumulate(times)))

    def predict(self, num_blocks: int, hidden_features: int) -> float:
        """t(k, h), in milliseconds."""
        whole = (self.depth - num_blocks) * self.block_ms
        return self.rest_ms + whole + num_blocks * self.compressed(hidden_features)


@dataclass(frozen=True)
class StructureTiming:
    """One structure that was timed in turn with the original.

    Attributes:
        num_blocks: Compressed blocks.
        hidden_features: Hidden nodes that each keeps.
        ratio: Its latency over the original's.
        error: The ratio's standard error.
    """

    num_blocks: int
    hidden_features: int
    ratio: float
    error: float

    @property
    def structure(self) -> tuple[int, int]:
        """Of compressed blocks the number, and the hidden nodes that each keeps."""
        return self.num_blocks, self.hidden_features


@dataclass(frozen=True)
class PlannedLatency:
    """How a plan came to its latency.

    Attributes:
        model: The calibrated latency model.
        goal: The latency asked for over the original's.
        ratio: That of the planned structure with weights not recovered yet, the mean of its timings.
        timings: All on the way, in order; one structure may have several.
    """

    model: LatencyModel
    goal: float
    ratio: float
    timings: tuple[StructureTiming, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)


@torch.no_grad()
def calibrate(
    model: nn.Module,
    blocks: Sequence[int],
    batch_size: int,
    *,
    stopwatch: Stopwatch = time_forward,
    progress: Progress = silent,
) -> LatencyModel:
    """Measure the original, its whole blocks, and those blocks compressed at five widths, in turn.

    Blocks are timed as chains, one after another as in the model: on a busy machine a run that is much shorter than
    the original's is disturbed more rarely, and its ratio to the original's would be too small.

    Args:
        model: The original, on the device that the figures are to be of.
        blocks: Which blocks; they must be of one size.
        batch_size: Images a batch.
        stopwatch: Times one run.
        progress: Told after each round.
    """
    adapter = adapter_for(model)
    images = example_images(model, batch_size)
    nodes = adapter.hidden_features(model, blocks[0])
    widths = sorted({round(share * nodes) for share in WIDTHS})

    def chain(of: nn.Module) -> nn.Module:
        return nn.Sequential(*(adapter.block(of, block) for block in blocks)).eval()

    subjects: dict[str | int, nn.Module] = {"original": model, "blocks": chain(model)}
    subjects |= {width: chain(unrecovered(model, dict.fromkeys(blocks, width))) for width in widths}
    inputs: dict[str | int, Tensor] = dict.fromkeys(subjects, adapter.embed(model, images)) | {"original": images}
    latency = _measure(subjects, inputs, stopwatch=stopwatch, progress=progress, stage="calibration")
    original_ms = latency["original"].median_ms

    def one(name: str | int) -> float:
        return original_ms * latency[name].ratio_to(latency["original"]) / len(blocks)

    return LatencyModel(
        batch_size=batch_size,
        depth=adapter.num_blocks(model),
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
    """Time structures with weights not recovered, in turn with the original.

    Args:
        model: The original.
        structures: k and the hidden nodes kept, for each.
        candidates: Blocks to compress; the first k are.
        batch_size: Images a batch.
        stopwatch: Times one run.
        progress: Told after each round.
    """
    subjects: dict[tuple[int, int] | None, nn.Module] = {None: model}
    subjects |= {(k, hidden): unrecovered(model, dict.fromkeys(candidates[:k], hidden)) for k, hidden in structures}
    stage = "timing " + ", ".join(f"{k} blocks of {hidden}" for k, hidden in structures)
    latency = _measure(subjects, example_images(model, batch_size), stopwatch=stopwatch, progress=progress, stage=stage)
    original = latency[None]
    return tuple(
        StructureTiming(k, hidden, (timed := latency[k, hidden]).ratio_to(original), timed.ratio_error(original))
        for k, hidden in structures
    )
