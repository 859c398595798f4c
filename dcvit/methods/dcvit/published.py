"""The published procedure: distillation in every sensitivity probe, and after each block."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial

from torch import nn

from dcvit.config import DCViT, DistillationConfig
from dcvit.context import RunContext
from dcvit.data.images import FewShotImages
from dcvit.data.synthesis import ProxySet
from dcvit.history import Plan, Recovery
from dcvit.methods.registry import Outcome, Task
from dcvit.metrics.fidelity import Metric
from dcvit.models.surgery import compress_block, draw_kept_units
from dcvit.recovery.distill import find_learning_rate, recover
from dcvit.runtime.checkpoint import Entry, require_alike, require_one_of
from dcvit.search.sensitivity import rank
from dcvit.serialization import from_plain

__all__ = ["compress_blocks"]


def _resolve_learning_rate(
    teacher: nn.Module,
    images: FewShotImages,
    chosen_plan: Plan,
    config: DCViT,
    context: RunContext,
) -> DCViT:
    """Return the config with `learning_rate="auto"` replaced by the rate found on the middle candidate."""

    def find() -> float:
        block = chosen_plan.candidates[len(chosen_plan.candidates) // 2]
        kept = draw_kept_units(teacher, block, chosen_plan.hidden_features, context.seed)
        student = compress_block(teacher, block, kept)
        return find_learning_rate(
            student, teacher, images, [block], config.distillation, context.derived("learning rate")
        )

    check = partial(require_one_of, config.distillation.learning_rates)
    kept_rate = partial(context.store.entry, "learning-rate", lambda: Entry(find()), check=check)
    return replace(config, recovery=config.distillation.with_learning_rate(lambda: kept_rate().values))


def compress_blocks(
    teacher: nn.Module,
    first_student: nn.Module,
    images: FewShotImages,
    chosen_plan: Plan,
    config: DCViT,
    context: RunContext,
    *,
    first: Recovery,
) -> tuple[nn.Module, tuple[Recovery, ...]]:
    """Compress the chosen blocks one after another, with distillation after each (DC-ViT's progressive compression).

    Args:
        teacher: The original, frozen.
        first_student: The recovered student of the best probe. Its first chosen block is already compressed.
        images: The few-shot set.
        chosen_plan: The plan, with `blocks` and `kept_units` filled in.
        config: Its `recovery.learning_rate` must be a number. With `Ablation(progressive=False)` all blocks are
            compressed at once, and the student recovers for as many epochs as all steps would have taken together.
        context: Its store keeps each step. Its processes share the work.
        first: The recovery of the best probe.

    Returns:
        The student, and the recovery of each step.
    """
    blocks, recovery = chosen_plan.blocks, config.distillation
    if config.ablation.progressive:
        student, steps, counts = first_student, [first], range(2, len(blocks) + 1)
    else:
        student, steps, counts = teacher, [], range(len(blocks), len(blocks) + 1)
        recovery = replace(recovery, epochs=recovery.epochs * len(blocks))
    done = len(steps)
    for count in counts:
        for block in blocks[done:count]:
            student = compress_block(student, block, chosen_plan.kept_units[block])
        done = count
        steps.append(_recovered(student, teacher, images, blocks, count, recovery, context))
    return student, tuple(steps)


def _recovered(
    student: nn.Module,
    teacher: nn.Module,
    images: FewShotImages,
    blocks: Sequence[int],
    done: int,
    config: DistillationConfig,
    context: RunContext,
) -> Recovery:
    """Recover a student in place after `done` of the chosen blocks are compressed, or restore it from the store."""

    def recovered() -> Entry:
        step = recover(
            student, teacher, images, blocks[:done], config, context.derived("step", done),
            stage=f"compression, block {done} of {len(blocks)}",
        )  # fmt: skip
        return Entry(asdict(step), student.state_dict())

    def restore(entry: Entry) -> None:
        student.load_state_dict(dict(entry.tensors))

    def check(entry: Entry) -> None:
        from_plain(Recovery, entry.values).require_run(config)
        require_alike(entry.tensors, student.state_dict())

    entry = context.store.entry(f"step-{done}", recovered, restore, check=check, together=True)
    return from_plain(Recovery, entry.values)


def published(task: Task[DCViT], planned: Plan, proxy_set: ProxySet) -> Outcome:
    """Run the published procedure: distillation in each sensitivity probe, and after each compressed block."""
    teacher, images, context = task.teacher, task.images, task.context
    with context.timer("learning rate"):
        config = _resolve_learning_rate(teacher, images, planned, task.config, context)
    with context.timer("ranking"):
        metric = Metric(teacher, [proxy_set.images], config.ablation.metric, config.distillation.micro_batch_size)
        ranking = rank(teacher, images, metric, planned, config.distillation, context, halving=config.halving)
        blocks = ranking.blocks[: planned.num_blocks]
        chosen_plan = replace(planned, blocks=blocks, kept_units={b: ranking.kept_units[b] for b in blocks})
    with context.timer("compression"):
        first = ranking.probes[0].recovery
        assert first is not None
        student, steps = compress_blocks(teacher, ranking.student, images, chosen_plan, config, context, first=first)
    return Outcome(student, chosen_plan, ranking.probes, steps[-1].learning_rate, steps=steps)
