"""The last step of the full-data methods: distillation of the original's output tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from dcvit.config import DistillationConfig, MethodConfig
from dcvit.history import Recovery
from dcvit.methods.registry import Task
from dcvit.recovery.distill import find_learning_rate, recover

__all__ = ["DistilledConfig", "distil"]


@dataclass(frozen=True)
class DistilledConfig(MethodConfig):
    """Settings of the methods that end with distillation.

    Attributes:
        candidates: See `MethodConfig`. `None` is all blocks.
        seed: See `MethodConfig`.
        impl: See `MethodConfig`.
        distillation: How the student recovers.
    """

    distillation: DistillationConfig = field(default_factory=DistillationConfig)


def distil(task: Task[DistilledConfig], student: nn.Module, blocks: Sequence[int]) -> Recovery:
    """Train a student in place by distillation of the original's output tokens.

    Args:
        task: Its config holds the settings.
        student: The smaller model.
        blocks: The student's blocks that differ from the original's.
    """
    distillation, context = task.config.distillation, task.context

    def find() -> float:
        return find_learning_rate(
            student, task.teacher, task.images, blocks, distillation, context.derived("learning rate")
        )

    with context.timer("learning rate"):
        distillation = distillation.with_learning_rate(find)
    with context.timer("compression"):
        return recover(student, task.teacher, task.images, blocks, distillation, context.derived("recovery"))
