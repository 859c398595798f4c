"""What `s2vite`, `vtp`, `autoformer` and `mini_deit` end with: the student mimics the original's output tokens."""

from collections.abc import Sequence
from dataclasses import replace

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
    config, mimicking = task.config, task.config.mimicking
    if mimicking.learning_rate == "auto":
        with task.timer("learning rate"):
            rate = find_learning_rate(
                student, task.teacher, task.images, blocks, mimicking,
                seed=derive_seed(config.seed, "learning rate"), impl=config.impl, progress=task.progress,
            )  # fmt: skip
            mimicking = replace(mimicking, learning_rate=rate)
    with task.timer("compression"):
        return recover(
            student, task.teacher, task.images, blocks, mimicking,
            seed=derive_seed(config.seed, "recovery"), impl=config.impl, progress=task.progress,
        )  # fmt: skip
