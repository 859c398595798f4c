"""Steps 2 and 4: try every candidate block alone, and rank them by how well they recover.

Source: DC-ViT (arXiv 2403.18708), sections 3.2 and 3.3. Latency does not tell the blocks of a ViT apart, so the metric
loss does: the cross-entropy between the class distributions of teacher and candidate on the metric set.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dcvit.classes import class_logits
from dcvit.config import CompressionConfig
from dcvit.images import FewShotImages
from dcvit.models import adapter_for
from dcvit.planning import Plan
from dcvit.progress import Progress, silent
from dcvit.recovery import Recovery, recover
from dcvit.seeding import derive_seed
from dcvit.surgery import compress_block, draw_kept_nodes
from dcvit.synthesis import MetricSet

__all__ = ["Ranking", "Trial", "metric_loss", "rank", "run_trials"]


@dataclass(frozen=True)
class Trial:
    """One candidate block compressed alone and recovered.

    Attributes:
        block: The block, from 0.
        metric_loss: What it is ranked by, lower is better.
        recovery: How the recovery went.
    """

    block: int
    metric_loss: float
    recovery: Recovery


@dataclass(frozen=True)
class Ranking:
    """All trials, best first.

    Attributes:
        trials: In ascending order of metric loss; blocks of equal loss in ascending order.
        student: The recovered student of the best trial, which is the first progressive step.
        kept_nodes: For each candidate, the hidden nodes that it keeps.
    """

    trials: tuple[Trial, ...]
    student: nn.Module
    kept_nodes: Mapping[int, tuple[int, ...]]

    @property
    def blocks(self) -> tuple[int, ...]:
        """The candidates, best first."""
        return tuple(trial.block for trial in self.trials)


def rank(
    teacher: nn.Module,
    images: FewShotImages,
    metric_set: MetricSet,
    plan: Plan,
    config: CompressionConfig,
    *,
    progress: Progress = silent,
) -> Ranking:
    """Compress each candidate block alone, recover it, and sort by metric loss.

    Args:
        teacher: The original, frozen.
        images: The few-shot set.
        metric_set: What the metric loss is measured on.
        plan: Says which blocks are candidates and how many hidden nodes they keep.
        config: Its `recovery.learning_rate` must be a number.
        progress: Told after each epoch.
    """
    kept = {block: draw_kept_nodes(teacher, block, plan.hidden_features, config.seed) for block in plan.candidates}

    def cut(block: int) -> nn.Module:
        return compress_block(teacher, block, kept[block], config.impl)

    def score(student: nn.Module, _: Recovery) -> float:
        return metric_loss(student, teacher, metric_set, config.recovery.batch_size)

    trials, student = run_trials(teacher, images, plan.candidates, cut, score, config, progress=progress)
    return Ranking(trials, student, kept)


def run_trials(
    teacher: nn.Module,
    images: FewShotImages,
    candidates: Sequence[int],
    cut: Callable[[int], nn.Module],
    score: Callable[[nn.Module, Recovery], float],
    config: CompressionConfig,
    *,
    progress: Progress = silent,
) -> tuple[tuple[Trial, ...], nn.Module]:
    """Cut, recover and score each candidate alone.

    Args:
        teacher: The original, frozen.
        images: The few-shot set.
        candidates: Blocks to try.
        cut: Gives the student in which a block is cut.
        score: Gives a recovered student's metric loss.
        config: Its `recovery.learning_rate` must be a number.
        progress: Told after each epoch.

    Returns:
        The trials, best first, and the recovered student of the best. Only that one is held in memory.
    """
    trials: list[Trial] = []
    best: nn.Module | None = None
    for block in candidates:
        student = cut(block)
        recovery = recover(
            student,
            teacher,
            images,
            [block],
            config.recovery,
            seed=derive_seed(config.seed, "trial", block),
            impl=config.impl,
            progress=progress,
            stage=f"trial of block {block}",
        )
        trial = Trial(block, score(student, recovery), recovery)
        if best is None or trial.metric_loss < min(t.metric_loss for t in trials):
            best = student
        trials.append(trial)
    assert best is not None
    return tuple(sorted(trials, key=lambda trial: (trial.metric_loss, trial.block))), best


@torch.no_grad()
def metric_loss(student: nn.Module, teacher: nn.Module, metric_set: MetricSet, batch_size: int = 64) -> float:
    """Cross-entropy between the class distributions of teacher and student, averaged over the metric set."""
    total = 0.0
    for images in metric_set.images.split(batch_size):
        expected, found = _log_probabilities(teacher, images), _log_probabilities(student, images)
        total += float(-(expected.exp() * found).sum())
    return total / len(metric_set.images)


def _log_probabilities(model: nn.Module, images: Tensor) -> Tensor:
    return class_logits(model, adapter_for(model).tokens(model, images)).log_softmax(-1)
