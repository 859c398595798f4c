"""How good and how fast a model is."""

import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dcvit.models import adapter_for

__all__ = ["agreement", "measure_latency", "top1"]


@torch.no_grad()
def predictions(model: nn.Module, images: Tensor, batch_size: int = 64) -> Tensor:
    """The most likely class of each image `[N, C, H, W]`, as `[N]`."""
    return torch.cat([model(batch).argmax(-1) for batch in images.split(batch_size)])


def top1(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 64) -> float:
    """Share of the images `[N, C, H, W]` whose most likely class is their label `[N]`, in [0, 1]."""
    return float((predictions(model, images, batch_size) == labels.to(images.device)).double().mean())


def agreement(student: nn.Module, teacher: nn.Module, images: Tensor, batch_size: int = 64) -> float | None:
    """Share of the images for which two models name the same class, in [0, 1]; `None` for models without classes."""
    if adapter_for(teacher).num_classes(teacher) < 2:
        return None
    same = predictions(student, images, batch_size) == predictions(teacher, images, batch_size)
    return float(same.double().mean())


@torch.no_grad()
def measure_latency(
    models: Mapping[str, nn.Module], images: Tensor, *, max_seconds: float = 3.0, max_rounds: int = 50
) -> dict[str, float]:
    """Median time of one forward pass over a batch, in milliseconds.

    The models take turns, so that a change of the machine's load hits all of them. This serves a report; latency
    for publication comes from `benchmarks/`.

    Args:
        models: What to time, by name.
        images: The batch, `[B, C, H, W]`.
        max_seconds: Stop after the round in which this much time has passed; at least three rounds are run.
        max_rounds: Stop after this many.
    """
    times: dict[str, list[float]] = {name: [] for name in models}

    def timed(model: nn.Module) -> float:
        start = time.perf_counter()
        model(images)
        if images.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for model in models.values():
        timed(model)  # warm-up
    begin = time.perf_counter()
    for round_ in range(max_rounds):
        if round_ >= 3 and time.perf_counter() - begin > max_seconds:
            break
        for name, model in models.items():
            times[name].append(timed(model))
    return {name: 1000 * sorted(values)[len(values) // 2] for name, values in times.items()}
