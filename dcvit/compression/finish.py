"""The last step of every compression: the compressed model becomes an ordinary one, and its figures are measured."""

from dataclasses import asdict, replace

from torch import Tensor, nn

from dcvit.artifacts.result import CompressionResult
from dcvit.config import MethodConfig
from dcvit.costs import file_size
from dcvit.history import BlockShape, ModelFigures, Report
from dcvit.methods.registry import Outcome, Task
from dcvit.metrics.agreement import closeness
from dcvit.metrics.cost import spent
from dcvit.metrics.latency import PRECISE_TIMING, QUICK_TIMING, Stopwatch, Timing, example_images, measure_latency
from dcvit.models import compressible, hub_repository
from dcvit.runtime.checkpoint import Entry
from dcvit.serialization import from_plain

__all__ = ["finish"]

PASS_SECONDS = 0.25
"""The longest pass that is timed for a report, in which latency is a rough figure."""


def finish(
    model: str | nn.Module,
    task: Task[MethodConfig],
    outcome: Outcome,
    *,
    method: str = "dcvit",
    timing: Timing = QUICK_TIMING,
) -> CompressionResult:
    """Return the compressed model as an ordinary model, with its plan and report.

    Args:
        model: The model or name that the caller passed; `task.teacher` is the loaded model.
        task: The inputs of the method. The main process of its context measures, while the others wait.
        outcome: The result of the method.
        method: The method's name.
        timing: How often passes are timed for budgets that are not measured on the machine.
    """
    context = task.context
    with context.timer("report"):
        student = compressible(outcome.student).rebuild().eval()

        def measured() -> Entry:
            return Entry(asdict(_report(model, student, task, outcome, timing, method)))

        report = from_plain(Report, context.processes.of_first(measured).values)
    seconds = dict(context.timer.seconds)
    return CompressionResult(student, outcome.plan, replace(report, seconds=seconds), outcome.proxy_set)


def _report(
    model: str | nn.Module, student: nn.Module, task: Task[MethodConfig], outcome: Outcome, timing: Timing, method: str
) -> Report:
    teacher, images, stopwatch = task.teacher, task.images, task.stopwatch
    batch_size, budget = task.config.micro_batch_size, outcome.plan.budget
    subjects = {"teacher": teacher, "student": student}
    if budget.measured:
        batch = example_images(teacher, budget.batch_size)
        latency = measure_latency(subjects, batch, PRECISE_TIMING, stopwatch=stopwatch)
    else:
        batch = _quick_batch(teacher, images.normalised[:batch_size], stopwatch)
        latency = measure_latency(subjects, batch, timing, stopwatch=stopwatch)
    figures = {
        name: ModelFigures(
            macs=(cost := compressible(subject).cost().total).macs(budget.convention),
            params=cost.params,
            latency_ms=latency[name].median_ms,
            file_size=file_size(subject.state_dict()),
            activation_memory=(spent(subject, budget) if budget.metric == "activation_memory" else None),
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
        distillation_loss=loss,
        learning_rate=outcome.learning_rate,
        probes=outcome.probes,
        pruning_probes=outcome.pruning_probes,
        reconstructions=outcome.reconstructions,
        refinement=outcome.refinement,
        steps=outcome.steps,
        seed=task.config.seed,
        settings=task.config.to_dict(),
        family=compressible(teacher).family,
        blocks=_shapes(teacher),
        blocks_after=_shapes(student),
        method=method,
        base_model=hub_repository(model) if isinstance(model, str) else None,
        latency_ratio=latency["student"].ratio_to(latency["teacher"]),
        latency_batch=len(batch),
    )


def _quick_batch(model: nn.Module, images: Tensor, stopwatch: Stopwatch) -> Tensor:
    """Return as many of the images as pass through the model in `PASS_SECONDS`, at least one."""
    one = min(stopwatch(model, images[:1]) for _ in range(2))
    return images[: max(1, int(PASS_SECONDS / one))]


def _shapes(model: nn.Module) -> tuple[BlockShape, ...]:
    return tuple(BlockShape(b.compressible, b.hidden_features) for b in compressible(model).cost().blocks)
