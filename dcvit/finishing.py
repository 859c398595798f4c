"""The end of every compression: the compressed model as an ordinary one, with its figures."""

from dataclasses import asdict, replace

from torch import Tensor, nn

from dcvit.config import CompressionConfig
from dcvit.costs import file_size
from dcvit.distributed import ALONE, Ranks
from dcvit.evaluation import closeness
from dcvit.images import FewShotImages
from dcvit.latency import Stopwatch, example_images, measure_latency, time_forward
from dcvit.memory import trace_activation_memory
from dcvit.methods.registry import Outcome, Timer
from dcvit.models import adapter_for, hub_repository
from dcvit.records import from_plain
from dcvit.results import BlockShape, CompressionResult, ModelFigures, Report
from dcvit.run_store import Unit
from dcvit.synthesis import MetricSet

__all__ = ["finish"]

PASS_SECONDS = 0.25
"""What a pass may take that is timed for the report, whose latency is a rough figure."""


def finish(
    model: str | nn.Module,
    original: nn.Module,
    images: FewShotImages,
    metric_set: MetricSet | None,
    outcome: Outcome,
    config: CompressionConfig,
    timer: Timer,
    stopwatch: Stopwatch = time_forward,
    runs: int = 50,
    method: str = "dcvit",
    ranks: Ranks = ALONE,
) -> CompressionResult:
    """The compressed model as an ordinary one, with its figures.

    Args:
        model: What the caller named.
        original: That model, loaded.
        images: The few-shot set.
        metric_set: What blocks were ranked on, if on any.
        outcome: What the procedure arrived at.
        config: What it was given.
        timer: Has the time of its stages.
        stopwatch: Times a forward pass.
        runs: Forward passes that are timed, at most.
        method: The procedure's name.
        ranks: The processes that arrived there: the first measures, while the others wait.
    """
    with timer("report"):
        student = adapter_for(outcome.student).rebuild(outcome.student).eval()

        def measured() -> Unit:
            return Unit(asdict(_report(model, original, student, images, outcome, config, stopwatch, runs, method)))

        report = from_plain(Report, ranks.of_first(measured).values)
    return CompressionResult(student, outcome.plan, replace(report, seconds=dict(timer.seconds)), metric_set)


def _report(
    model: str | nn.Module,
    teacher: nn.Module,
    student: nn.Module,
    images: FewShotImages,
    outcome: Outcome,
    config: CompressionConfig,
    stopwatch: Stopwatch,
    runs: int,
    method: str,
) -> Report:
    adapter, batch_size, budget = adapter_for(teacher), config.recovery.at_once, outcome.plan.budget
    subjects = {"teacher": teacher, "student": student}
    if budget.measured:
        batch = example_images(teacher, budget.batch_size)
        latency = measure_latency(subjects, batch, runs=1000, max_seconds=20.0, precision=0.004, stopwatch=stopwatch)
    else:
        batch = _quick_batch(teacher, images.normalised[:batch_size], stopwatch)
        latency = measure_latency(subjects, batch, runs=runs, warmup=1, max_seconds=3.0, stopwatch=stopwatch)
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
    same, loss = closeness(student, teacher, images.normalised, batch_size)
    return Report(
        model=model if isinstance(model, str) else type(model).__qualname__,
        teacher=figures["teacher"],
        student=figures["student"],
        num_images=len(images),
        agreement=same,
        mimic_loss=loss,
        learning_rate=outcome.learning_rate,
        trials=outcome.trials,
        pruning_trials=outcome.pruning_trials,
        reconstructions=outcome.reconstructions,
        refinement=outcome.refinement,
        steps=outcome.steps,
        seed=config.seed,
        settings=config.to_dict(),
        family=adapter_for(teacher).family,
        blocks=_shapes(teacher),
        blocks_after=_shapes(student),
        method=method,
        base_model=hub_repository(model) if isinstance(model, str) else None,
        latency_ratio=latency["student"].ratio_to(latency["teacher"]),
        latency_batch=len(batch),
    )


def _quick_batch(model: nn.Module, images: Tensor, stopwatch: Stopwatch) -> Tensor:
    """As many of some images as pass in `PASS_SECONDS`, at least one."""
    one = min(stopwatch(model, images[:1]) for _ in range(2))
    return images[: max(1, int(PASS_SECONDS / one))]


def _shapes(model: nn.Module) -> tuple[BlockShape, ...]:
    return tuple(BlockShape(b.compressible, b.hidden_features) for b in adapter_for(model).cost(model).blocks)
