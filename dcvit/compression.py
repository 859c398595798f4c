"""The whole method: plan, try and rank, then compress block by block (DC-ViT, arXiv 2403.18708)."""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from dcvit.config import CompressionConfig
from dcvit.evaluation import agreement, measure_latency
from dcvit.images import FewShotImages, Images, load_images
from dcvit.models import adapter_for, load_model, require_supported
from dcvit.ops import Impl
from dcvit.planning import Budget, Plan, plan
from dcvit.progress import Progress, silent
from dcvit.ranking import Trial, rank
from dcvit.recovery import Recovery, find_learning_rate, recover
from dcvit.results import CompressionResult, ModelFigures, Report
from dcvit.seeding import derive_seed
from dcvit.surgery import choose_impl, compress_block, draw_kept_nodes
from dcvit.synthesis import MetricSet, synthesize

__all__ = ["compress", "compress_blocks", "freeze", "fuse"]


def compress(
    model: str | nn.Module,
    images: Images | FewShotImages,
    budget: Budget,
    config: CompressionConfig | None = None,
    *,
    metric_set: MetricSet | None = None,
    progress: Progress = silent,
) -> CompressionResult:
    """Make a model smaller and faster from a few unlabelled images.

    Args:
        model: A timm model, or a name that `timm.create_model` takes (its pretrained weights are loaded). Unchanged.
        images: The few-shot set, see `dcvit.images.load_images`. Labels are never read.
        budget: What the result may cost, `Budget(macs=0.75)` for example.
        config: Every knob; `CompressionConfig.paper()` holds the published settings.
        metric_set: Images to rank blocks on, in place of what `config.metric_set` names.
        progress: Told how it goes, see `dcvit.progress`.

    Returns:
        The compressed model, the plan that it follows, and a report.

    Raises:
        UnsupportedModelError: If the model cannot be compressed.
        ImagesError: If the images do not fit the model.
        BudgetError: If the budget cannot be met.
        All of them before any long work.
    """
    config = config or CompressionConfig()
    timer = _Timer()
    with timer("prepare"):
        original = freeze(load_model(model))
        chosen_plan = plan(original, budget, config)
        few_shot = load_images(images, original)
        teacher = fuse(original, config.impl)
    with timer("metric set"):
        if metric_set is None:
            metric_set = _metric_set(teacher, few_shot, config, progress)
    with timer("learning rate"):
        config = _resolve_learning_rate(teacher, few_shot, chosen_plan, config, progress)
    with timer("ranking"):
        ranking = rank(teacher, few_shot, metric_set, chosen_plan, config, progress=progress)
        blocks = ranking.blocks[: chosen_plan.num_blocks]
        chosen_plan = replace(chosen_plan, blocks=blocks, kept_nodes={b: ranking.kept_nodes[b] for b in blocks})
    with timer("compression"):
        student, steps = compress_blocks(
            teacher, ranking.student, few_shot, chosen_plan, config, first=ranking.trials[0].recovery, progress=progress
        )
        student = adapter_for(student).rebuild(student).eval()
    with timer("report"):
        report = _report(model, original, student, few_shot, chosen_plan, config, ranking.trials, steps)
    return CompressionResult(student, chosen_plan, replace(report, seconds=timer.seconds))


def compress_blocks(
    teacher: nn.Module,
    first_student: nn.Module,
    images: FewShotImages,
    chosen_plan: Plan,
    config: CompressionConfig,
    *,
    first: Recovery,
    progress: Progress = silent,
) -> tuple[nn.Module, tuple[Recovery, ...]]:
    """Step 5: compress the chosen blocks one after another, recovering after each.

    Args:
        teacher: The original, frozen.
        first_student: The recovered student of the best trial, in which the first block is compressed already.
        images: The few-shot set.
        chosen_plan: With `blocks` and `kept_nodes` filled in.
        config: Its `recovery.learning_rate` must be a number. With `progressive=False` all blocks are compressed at
            once and recovered for as many epochs as the steps would have taken together.
        first: The recovery of the best trial.
        progress: Told after each epoch.

    Returns:
        The student, and the recovery of each step.
    """
    blocks, kept, recovery = chosen_plan.blocks, chosen_plan.kept_nodes, config.recovery
    if config.progressive:
        student, steps = first_student, [first]
        schedule = [blocks[: count + 1] for count in range(1, len(blocks))]
    else:
        student, steps = teacher, []
        schedule = [blocks]
        recovery = replace(recovery, epochs=recovery.epochs * len(blocks))
    done = len(steps)
    for cut in schedule:
        new = cut[done:]
        for block in new:
            student = compress_block(student, block, kept[block], config.impl)
        done = len(cut)
        steps.append(
            recover(
                student,
                teacher,
                images,
                cut,
                recovery,
                new_blocks=new,
                seed=derive_seed(config.seed, "step", done),
                impl=config.impl,
                progress=progress,
                stage=f"compression, block {done} of {len(blocks)}",
            )
        )
    return student, tuple(steps)


def freeze(model: nn.Module) -> nn.Module:
    """A copy of a model as teacher: evaluation mode, no gradients, nothing shared with the caller's.

    Raises:
        UnsupportedModelError: If the model cannot be compressed.
    """
    require_supported(model)
    return copy.deepcopy(model).eval().requires_grad_(False)


def fuse(teacher: nn.Module, impl: Impl) -> nn.Module:
    """The teacher with its blocks' MLPs computed by `dcvit.ops`; students cut from it inherit that.

    On a GPU, where it is not yet measured what the ops gain, and with `impl="eager"` it is the teacher itself.
    """
    if impl == "eager" or next(teacher.parameters()).device.type != "cpu":
        return teacher
    fused = copy.deepcopy(teacher, {id(parameter): parameter for parameter in teacher.parameters()})
    adapter_for(fused).fuse(fused)
    choose_impl(fused, impl)
    return fused


def _metric_set(teacher: nn.Module, images: FewShotImages, config: CompressionConfig, progress: Progress) -> MetricSet:
    if config.metric_set == "images":
        return MetricSet(images.normalised)
    return synthesize(teacher, config.synthesis, seed=config.seed, impl=config.impl, progress=progress)


def _resolve_learning_rate(
    teacher: nn.Module, images: FewShotImages, chosen_plan: Plan, config: CompressionConfig, progress: Progress
) -> CompressionConfig:
    """The config with a number for `learning_rate="auto"`, found on the middle candidate."""
    if config.recovery.learning_rate != "auto":
        return config
    block = chosen_plan.candidates[len(chosen_plan.candidates) // 2]
    kept = draw_kept_nodes(teacher, block, chosen_plan.hidden_features, config.seed)
    student = compress_block(teacher, block, kept, config.impl)
    rate = find_learning_rate(
        student,
        teacher,
        images,
        [block],
        config.recovery,
        seed=derive_seed(config.seed, "learning rate"),
        impl=config.impl,
        progress=progress,
    )
    return replace(config, recovery=replace(config.recovery, learning_rate=rate))


def _report(
    model: str | nn.Module,
    teacher: nn.Module,
    student: nn.Module,
    images: FewShotImages,
    chosen_plan: Plan,
    config: CompressionConfig,
    trials: tuple[Trial, ...],
    steps: tuple[Recovery, ...],
) -> Report:
    adapter = adapter_for(teacher)
    latency = measure_latency({"teacher": teacher, "student": student}, images.normalised[: config.recovery.batch_size])
    figures = {
        name: ModelFigures(
            macs=(cost := adapter.cost(subject).total).macs(chosen_plan.budget.convention),
            params=cost.params,
            latency_ms=latency[name],
        )
        for name, subject in (("teacher", teacher), ("student", student))
    }
    return Report(
        model=model if isinstance(model, str) else type(model).__qualname__,
        teacher=figures["teacher"],
        student=figures["student"],
        num_images=len(images),
        agreement=agreement(student, teacher, images.normalised),
        mimic_loss=steps[-1].loss_after,
        learning_rate=steps[-1].learning_rate,
        trials=trials,
        steps=steps,
        seed=config.seed,
    )


@dataclass
class _Timer:
    """Wall-clock seconds of each stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.seconds[stage] = time.perf_counter() - start
