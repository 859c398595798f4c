"""What methods for the whole data end with: the student mimics the original's output tokens."""

from collections.abc import Sequence

from torch import nn

from dcvit.methods.registry import Task
from dcvit.recovery import Recovery, find_learning_rate, recover
from dcvit.seeding import derive_seed

__all__ = ["mimic"]


def mimic(task: Task, student: nn.Module, blocks: Sequence[int]) -> Recovery:
    """Train a student, in place, to give the output tokens of the original.

    Args:
        task: Of its config mimicking, seed and impl are read.
        student: The smaller model.
        blocks: Those of its blocks that are not the original's.
    """
    config = task.config

    def find() -> float:
        return find_learning_rate(
            student, task.teacher, task.images, blocks, config.mimicking,
            seed=derive_seed(config.seed, "learning rate"), impl=config.impl, progress=task.progress,
        )  # fmt: skip

    with task.timer("learning rate"):
        mimicking = config.mimicking.with_learning_rate(find)
    with task.timer("compression"):
        return recover(
            student, task.teacher, task.images, blocks, mimicking,
            seed=derive_seed(config.seed, "recovery"), impl=config.impl, progress=task.progress,
        )  # fmt: skip
