"""The whole method: plan, try and rank, then compress block by block (DC-ViT, arXiv 2403.18708)."""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from dcvit.config import CompressionConfig, MimickingConfig
from dcvit.costs import file_size
from dcvit.evaluation import agreement
from dcvit.images import FewShotImages, Images, load_images
from dcvit.latency import Stopwatch, example_images, measure_latency, time_forward
from dcvit.latency_planning import plan_latency
from dcvit.memory import trace_activation_memory
from dcvit.metric import Metric
from dcvit.models import adapter_for, load_model, require_supported
from dcvit.ops import Impl, mimic_loss
from dcvit.planning import Budget, Plan, plan_options
from dcvit.progress import Progress, silent
from dcvit.ranking import Trial, rank, rank_reconstructed
from dcvit.reconstruction import (
    Reconstruction,
    TeacherStates,
    Views,
    draw_views,
    find_step_size,
    reconstruct_block,
)
from dcvit.recovery import Recovery, find_learning_rate, output_tokens, recover
from dcvit.refinement import Refinement, num_steps, refine
from dcvit.results import CompressionResult, ModelFigures, Report
from dcvit.seeding import derive_seed
from dcvit.surgery import choose_impl, compress_block, draw_kept_nodes
from dcvit.synthesis import MetricSet, synthesize

__all__ = ["compress", "compress_blocks", "freeze", "fuse", "reconstruct_blocks"]

HELD_OUT_VIEWS = 50
"""Views of held-out images that the metric looks at."""


def compress(
    model: str | nn.Module,
    images: Images | FewShotImages,
    budget: Budget,
    config: CompressionConfig | None = None,
    *,
    metric_set: MetricSet | None = None,
    progress: Progress = silent,
    stopwatch: Stopwatch = time_forward,
) -> CompressionResult:
    """Make a model smaller and faster from a few unlabelled images.

    Args:
        model: A timm model, or a name that `timm.create_model` takes (its pretrained weights are loaded). Unchanged.
        images: The few-shot set, see `dcvit.images.load_images`. Labels are never read.
        budget: What the result may cost, `Budget(macs=0.75)` for example.
        config: Every knob; `CompressionConfig.paper()` holds the published settings.
        metric_set: Images to rank blocks on, in place of what `config.metric_set` names.
        progress: Told how it goes, see `dcvit.progress`.
        stopwatch: Times one pass, for a latency budget and for the report.

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
        few_shot = load_images(images, original)
        plans = plan_options(original, budget, config, partial(plan_latency, stopwatch=stopwatch, progress=progress))
        teacher = fuse(original, config.impl)
    with timer("metric set"):
        if metric_set is None:
            metric_set = _metric_set(teacher, few_shot, config, progress)
    procedure = _published if isinstance(config.recovery, MimickingConfig) else _reconstructed
    outcome = procedure(teacher, few_shot, metric_set, plans, config, timer, progress)
    with timer("report"):
        student = adapter_for(outcome.student).rebuild(outcome.student).eval()
        report = _report(model, original, student, few_shot, outcome, config, stopwatch)
    return CompressionResult(student, outcome.plan, replace(report, seconds=timer.seconds))


@dataclass(frozen=True)
class _Outcome:
    """What a procedure arrives at."""

    student: nn.Module
    plan: Plan
    trials: tuple[Trial, ...]
    learning_rate: float
    steps: tuple[Recovery, ...] = ()
    reconstructions: tuple[Reconstruction, ...] = ()
    refinement: Refinement | None = None


def _published(
    teacher: nn.Module,
    images: FewShotImages,
    metric_set: MetricSet,
    plans: Sequence[Plan],
    config: CompressionConfig,
    timer: "_Timer",
    progress: Progress,
) -> _Outcome:
    """The published procedure: mimicking after each cut, in the trials and block by block."""
    chosen_plan = plans[0]
    with timer("learning rate"):
        config = _resolve_learning_rate(teacher, images, chosen_plan, config, progress)
    with timer("ranking"):
        metric = Metric(teacher, [metric_set.images], config.metric, config.mimicking.batch_size)
        ranking = rank(teacher, images, metric, chosen_plan, config, progress=progress)
        blocks = ranking.blocks[: chosen_plan.num_blocks]
        chosen_plan = replace(chosen_plan, blocks=blocks, kept_nodes={b: ranking.kept_nodes[b] for b in blocks})
    with timer("compression"):
        first = ranking.trials[0].recovery
        assert first is not None
        student, steps = compress_blocks(
            teacher, ranking.student, images, chosen_plan, config, first=first, progress=progress
        )
    return _Outcome(student, chosen_plan, ranking.trials, steps[-1].learning_rate, steps=steps)


def _reconstructed(
    teacher: nn.Module,
    images: FewShotImages,
    metric_set: MetricSet,
    plans: Sequence[Plan],
    config: CompressionConfig,
    timer: "_Timer",
    progress: Progress,
) -> _Outcome:
    """Block reconstruction, in the trials and of the chosen blocks; then mimicking that cannot harm."""
    recovery = config.reconstruction
    steps = num_steps(teacher, recovery)
    with timer("views"):
        views = draw_views(teacher, images, recovery, config.seed)
        refines = steps > 0 and bool(views.held_out.any())
        states = TeacherStates(teacher, views, recovery.batch_size, keep_output=refines)
        image_sets = [metric_set.images]
        if config.metric == "mimicking" and bool(views.held_out.any()):
            image_sets.append(views.images[views.held_out][:HELD_OUT_VIEWS])
        metric = Metric(teacher, image_sets, config.metric, recovery.batch_size)
    with timer("ranking"):
        descends = recovery.epochs > 0 or recovery.trial_epochs > 0
        step_size = _step_size(teacher, states, plans[0], config) if descends else 0.0
        # Trials tell which number of blocks is best only if what they show is what comes out.
        options = plans[:1] if refines else plans
        chosen, trials = rank_reconstructed(teacher, states, metric, options, config, step_size, progress=progress)
        blocks = tuple(trial.block for trial in trials[: chosen.num_blocks])
    with timer("compression"):
        student, kept, reconstructions = reconstruct_blocks(
            teacher, views, states, dict.fromkeys(blocks, chosen.hidden_features), config, step_size,
            refit=not refines, progress=progress,
        )  # fmt: skip
    refinement = None
    if refines:
        with timer("refinement"):
            assert states.output is not None
            refinement = refine(
                student, views, states.output, blocks, recovery, steps,
                seed=derive_seed(config.seed, "refinement"), impl=config.impl, progress=progress,
            )  # fmt: skip
    chosen = replace(chosen, blocks=blocks, kept_nodes={block: kept[block] for block in blocks})
    return _Outcome(student, chosen, trials, step_size, reconstructions=reconstructions, refinement=refinement)


def reconstruct_blocks(
    teacher: nn.Module,
    views: Views,
    states: TeacherStates,
    hidden_features: Mapping[int, int],
    config: CompressionConfig,
    step_size: float,
    *,
    refit: bool = True,
    progress: Progress = silent,
) -> tuple[nn.Module, dict[int, tuple[int, ...]], tuple[Reconstruction, ...]]:
    """Compress blocks of a copy of the teacher, front to back, each on what the ones before it give.

    Args:
        teacher: The original, frozen.
        views: The images that blocks are reconstructed on.
        states: The teacher's tokens for them.
        hidden_features: How many hidden nodes each block keeps, by block.
        config: Its `recovery` must be a `ReconstructionConfig`.
        step_size: Of the gradient steps.
        refit: Learn from the held-out images too once they have judged; not if they are to judge again.
        progress: Told after each block.

    Returns:
        The student, the hidden nodes kept in each block, and how each reconstruction went.
    """
    recovery = config.reconstruction
    student = copy.deepcopy(teacher)
    adapter = adapter_for(student)
    batches = [adapter.embed(teacher, images) for images in views.images.split(recovery.batch_size)]
    at, kept, reports = 0, {}, []
    for done, block in enumerate(sorted(hidden_features), 1):
        with torch.no_grad():
            batches = [adapter.run_blocks(student, tokens, at, block) for tokens in batches]
        at = block
        rows = states.rows(block, views.rows(torch.cat(batches)))
        kept[block], report = reconstruct_block(
            student, block, hidden_features[block], rows, recovery,
            step_size=step_size, epochs=recovery.epochs, refit=refit,
            seed=derive_seed(config.seed, "reconstruction", block), impl=config.impl,
        )  # fmt: skip
        reports.append(report)
        progress("reconstruction", done, len(hidden_features), report.error_after)
    return student, kept, tuple(reports)


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
    blocks, kept, recovery = chosen_plan.blocks, chosen_plan.kept_nodes, config.mimicking
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
    if config.mimicking.learning_rate != "auto":
        return config
    block = chosen_plan.candidates[len(chosen_plan.candidates) // 2]
    kept = draw_kept_nodes(teacher, block, chosen_plan.hidden_features, config.seed)
    student = compress_block(teacher, block, kept, config.impl)
    rate = find_learning_rate(
        student,
        teacher,
        images,
        [block],
        config.mimicking,
        seed=derive_seed(config.seed, "learning rate"),
        impl=config.impl,
        progress=progress,
    )
    return replace(config, recovery=replace(config.mimicking, learning_rate=rate))


def _step_size(teacher: nn.Module, states: TeacherStates, chosen_plan: Plan, config: CompressionConfig) -> float:
    """The step size of reconstruction, found on the middle candidate."""
    recovery = config.reconstruction
    block = chosen_plan.candidates[len(chosen_plan.candidates) // 2]
    rows = states.rows(block)
    return find_step_size(
        teacher, block, chosen_plan.hidden_features, rows, recovery,
        seed=derive_seed(config.seed, "step size"), impl=config.impl,
    )  # fmt: skip


def _report(
    model: str | nn.Module,
    teacher: nn.Module,
    student: nn.Module,
    images: FewShotImages,
    outcome: _Outcome,
    config: CompressionConfig,
    stopwatch: Stopwatch,
) -> Report:
    adapter, batch_size, budget = adapter_for(teacher), config.recovery.batch_size, outcome.plan.budget
    subjects = {"teacher": teacher, "student": student}
    if budget.measured:
        batch = example_images(teacher, budget.batch_size)
        latency = measure_latency(subjects, batch, runs=1000, max_seconds=20.0, precision=0.004, stopwatch=stopwatch)
    else:
        batch = images.normalised[:batch_size]
        latency = measure_latency(subjects, batch, runs=50, warmup=1, max_seconds=3.0, stopwatch=stopwatch)
    figures = {
        name: ModelFigures(
            macs=(cost := adapter.cost(subject).total).macs(budget.convention),
            params=cost.params,
            latency_ms=latency[name].median_ms,
            file_size=file_size(subject.state_dict()),
            activation_memory=(
                trace_activation_memory(subject, budget.batch_size) if budget.unit == "activation_memory" else None
            ),
        )
        for name, subject in subjects.items()
    }
    return Report(
        model=model if isinstance(model, str) else type(model).__qualname__,
        teacher=figures["teacher"],
        student=figures["student"],
        num_images=len(images),
        agreement=agreement(student, teacher, images.normalised),
        mimic_loss=float(mimic_loss(*(output_tokens(m, images.normalised, batch_size) for m in (student, teacher)))),
        learning_rate=outcome.learning_rate,
        trials=outcome.trials,
        reconstructions=outcome.reconstructions,
        refinement=outcome.refinement,
        steps=outcome.steps,
        seed=config.seed,
        latency_ratio=latency["student"].ratio_to(latency["teacher"]),
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
