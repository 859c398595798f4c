"""Methods and test beds that `python -m benchmarks recovery` compares."""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from statistics import median
from typing import Any, TypeVar

from torch import nn

import dcvit
from benchmarks.naive import naive_closed_form
from benchmarks.testbeds import TestBed, digits, dinov2, efficientnet, photographs, resnet, swin
from dcvit.budget import Budget
from dcvit.config import CalibrationConfig, DCViT, MethodConfig, SynthesisConfig, TrainingConfig
from dcvit.context import RunContext
from dcvit.data.images import load_images
from dcvit.data.synthesis import synthesize
from dcvit.errors import BudgetError
from dcvit.history import Plan
from dcvit.methods.baselines.practise import Practise, block_dropping
from dcvit.models import compressible, fuse
from dcvit.models.surgery import compress_block, draw_kept_units
from dcvit.models.teacher import freeze
from dcvit.recovery.distill import recover
from dcvit.runtime.progress import Progress, silent
from dcvit.search.plan import plan
from dcvit.search.space import choose_candidates

__all__ = [
    "BEDS",
    "GRADIENT_METHODS",
    "METHODS",
    "RECOVERY_BEDS",
    "Info",
    "Options",
    "num_whole_blocks",
    "parts_of",
    "suited",
]

Config = TypeVar("Config", bound=MethodConfig)
Part = TypeVar("Part")

BEDS: dict[str, Callable[..., TestBed]] = {
    "digits": digits,
    "photographs": photographs,
    "dinov2": dinov2,
    "swin": swin,
    "resnet": resnet,
    "efficientnet": efficientnet,
}
"""Test beds by name: functions of a seed, which draws the few-shot set, and of the number of images."""

RECOVERY_BEDS = ("digits", "photographs", "dinov2")
"""Test beds that `recovery` measures by default."""

PROXY_SET_SHARE = 0.25
"""Share of an allowance that synthesis may take, so that the recoveries get most of it."""

TIMED_STEPS = 5
"""Number of steps whose median time is the time of one step."""


@dataclass(frozen=True)
class Options:
    """Options of a run beyond test bed, budget and seed.

    Attributes:
        allowance: Seconds that a gradient method may take; `None` lets it run as published.
        progress: Callback that reports the progress.
    """

    allowance: float | None = None
    progress: Progress = silent


@dataclass(frozen=True)
class Info:
    """Information about how a method made its model.

    Attributes:
        seconds: Wall-clock time of the compression.
        blocks: The blocks that were compressed or dropped, best first.
        epochs: Epochs of each recovery, for the published procedures; else `None`.
        iterations: Iterations of the synthesis, for the published procedure; else `None`.
    """

    seconds: float
    blocks: tuple[int, ...]
    epochs: int | None = None
    iterations: int | None = None


Method = Callable[[TestBed, Budget, int, Options], tuple[nn.Module, Info]]
"""A function from test bed, budget, seed and options to the compressed model."""


def default(bed: TestBed, budget: Budget, seed: int, options: Options) -> tuple[nn.Module, Info]:
    """Compress with the default settings of `dcvit.compress`."""
    return _compress(bed, budget, DCViT(seed=seed), options)


def closed_form_only(bed: TestBed, budget: Budget, seed: int, options: Options) -> tuple[nn.Module, Info]:
    """Compress with the default settings, but without gradient steps on the student's weights."""
    return _compress(bed, budget, DCViT.fast(seed=seed), options)


def naive(bed: TestBed, budget: Budget, seed: int, options: Options) -> tuple[nn.Module, Info]:
    """Compress with the naive closed form of `benchmarks.naive`."""
    start = time.perf_counter()
    model, blocks = naive_closed_form(bed.model, load_images(bed.images, bed.model), budget, bed.augmentation, seed)
    return model, Info(time.perf_counter() - start, blocks)


def paper(bed: TestBed, budget: Budget, seed: int, options: Options) -> tuple[nn.Module, Info]:
    """Compress with DC-ViT as published, with as many epochs as the allowance permits."""
    config = _published(bed, budget, seed, options)
    model, info = _compress(bed, budget, config, options)
    return model, replace(info, epochs=config.distillation.epochs, iterations=config.synthesis.iterations)


def whole_blocks(bed: TestBed, budget: Budget, seed: int, options: Options) -> tuple[nn.Module, Info]:
    """Drop as few whole blocks as meet the budget (PRACTISE), with the epochs of `paper`."""
    count = num_whole_blocks(bed.model, budget)
    config = _published(bed, budget, seed, options)
    start = time.perf_counter()
    images = load_images(bed.images, bed.model)
    practise = Practise(distillation=config.distillation, seed=seed)
    dropped = block_dropping(bed.model, images, count, practise, progress=options.progress)
    return dropped.model, Info(time.perf_counter() - start, dropped.blocks, config.distillation.epochs)


METHODS: dict[str, Method] = {
    "default": default,
    "closed form only": closed_form_only,
    "naive closed form": naive,
    "paper": paper,
    "block dropping (PRACTISE)": whole_blocks,
}

GRADIENT_METHODS = frozenset({"paper", "block dropping (PRACTISE)"})
"""Methods that an allowance shortens."""


def num_whole_blocks(model: nn.Module, budget: Budget) -> int:
    """Return the smallest number of whole blocks that must be dropped to meet a budget.

    Raises:
        BudgetError: If the budget is not met even without all candidate blocks.
    """
    cost = compressible(model).cost()
    left, target = budget.amount(cost.total), budget.target(cost.total)
    candidates = choose_candidates(model, None, cost)
    for count, block in enumerate(candidates):
        if left <= target:
            return count
        left -= budget.amount(cost.blocks[block].attention + cost.blocks[block].mlp)
    if left <= target:
        return len(candidates)
    raise BudgetError(
        f"{budget.metric}={budget.value!r} asks for {target:,}: without all {len(candidates)} candidate blocks, "
        f"{left:,} are left. Choose a larger budget."
    )


def _compress(bed: TestBed, budget: Budget, config: DCViT, options: Options) -> tuple[nn.Module, Info]:
    start = time.perf_counter()
    result = dcvit.compress(bed.model, bed.images, budget, suited(config, bed), progress=options.progress)
    return result.model, Info(time.perf_counter() - start, result.plan.blocks)


def suited(config: Config, bed: TestBed) -> Config:
    """Return the config with the random views that suit a test bed's images."""
    changes: dict[str, Any] = {
        name: replace(part, augmentation=bed.augmentation)
        for kind in (CalibrationConfig, TrainingConfig)
        for name, part in parts_of(config, kind).items()
    }
    for name, part in parts_of(config, SynthesisConfig).items():
        changes[name] = replace(part, flip=bed.augmentation.flip)
    return config.with_(**changes)


def parts_of(config: MethodConfig, kind: type[Part]) -> dict[str, Part]:
    """Return the parts of a method's config that have a type, by field."""
    return {of.name: part for of in fields(config) if isinstance(part := getattr(config, of.name), kind)}


def _published(bed: TestBed, budget: Budget, seed: int, options: Options) -> DCViT:
    """Return the published settings, with as many iterations and epochs as the allowance permits."""
    config = suited(DCViT.paper(seed=seed), bed)
    if options.allowance is None:
        return config
    planned = plan(bed.model, budget, config)
    iteration, epoch = _step_seconds(bed, planned, config)
    return shortened(config, options.allowance, len(planned.candidates) + planned.num_blocks, iteration, epoch)


def shortened(config: DCViT, allowance: float, recoveries: int, iteration: float, epoch: float) -> DCViT:
    """Shorten a published config so that it fits into an allowance, to one iteration and one epoch at least.

    Args:
        config: The published settings, whose iterations and epochs are upper limits.
        allowance: Seconds for the synthesis and all recoveries.
        recoveries: Number of recoveries, L + k.
        iteration: Seconds of one iteration of the synthesis.
        epoch: Seconds of one epoch of a recovery.
    """

    def fitting(seconds: float, each: float, most: int) -> int:
        return max(1, min(most, int(seconds / each)))

    synthesis, recovery = config.synthesis, config.distillation
    iterations = fitting(PROXY_SET_SHARE * allowance, iteration, synthesis.iterations)
    epochs = fitting((allowance - iterations * iteration) / recoveries, epoch, recovery.epochs)
    # The warm-up keeps its share. At full length it would take up all of a short schedule.
    warmup_iterations = round(synthesis.warmup_iterations * iterations / synthesis.iterations)
    warmup_epochs = round(recovery.warmup_epochs * epochs / recovery.epochs)
    return replace(
        config,
        synthesis=replace(synthesis, iterations=iterations, warmup_iterations=warmup_iterations),
        recovery=replace(recovery, epochs=epochs, warmup_epochs=warmup_epochs),
    )


def _step_seconds(bed: TestBed, planned: Plan, config: DCViT) -> tuple[float, float]:
    """Measure the seconds of a synthesis iteration, and of an epoch of the longest recovery, the last candidate's."""
    teacher, block = fuse(freeze(bed.model), config.impl), planned.candidates[-1]
    kept = draw_kept_units(teacher, block, planned.hidden_features, config.seed)
    student, images = compress_block(teacher, block, kept), load_images(bed.images, teacher)
    steps = TIMED_STEPS + 1
    synthesis = replace(config.synthesis, iterations=steps)
    recovery = replace(config.distillation, epochs=steps)
    return (
        _seconds_each(lambda progress: synthesize(teacher, synthesis, RunContext(progress=progress))),
        _seconds_each(
            lambda progress: recover(student, teacher, images, [block], recovery, RunContext(progress=progress))
        ),
    )


def _seconds_each(run: Callable[[Progress], object]) -> float:
    """Return the median seconds between two progress reports of `run`."""
    times: list[float] = []
    run(lambda *_: times.append(time.perf_counter()))
    return median(after - before for before, after in pairwise(times))
