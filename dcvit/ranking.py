"""Steps 2 and 4: try every candidate block alone, and rank them by how well they recover.

Source: DC-ViT (arXiv 2403.18708), sections 3.2 and 3.3. Latency does not tell the blocks of a ViT apart, so the metric
loss does (`dcvit.metric`).

A trial recovers its candidate by mimicking, as published (`rank`), or by block reconstruction (`rank_reconstructed`).
With one block cut, a student's tokens before that block are the teacher's: those trials share one pass of the teacher
over the views and one over the metric's images.
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from dcvit.config import CompressionConfig
from dcvit.images import FewShotImages
from dcvit.metric import Metric
from dcvit.planning import Plan
from dcvit.progress import Progress, silent
from dcvit.reconstruction import Reconstruction, TeacherStates, error_curve, reconstruct_block
from dcvit.recovery import Recovery, recover
from dcvit.seeding import derive_seed
from dcvit.structure import Recoverability
from dcvit.surgery import compress_block, draw_kept_nodes

__all__ = ["Ranking", "Trial", "rank", "rank_reconstructed", "run_trials"]


@dataclass(frozen=True)
class Trial:
    """One candidate block compressed alone and recovered.

    Attributes:
        block: The block, from 0.
        metric_loss: What it is ranked by, lower is better.
        recovery: How the mimicking went; `None` where the block was reconstructed.
        reconstruction: How the reconstruction went; `None` where the student mimicked.
        seconds: Wall-clock time.
        recoverability: The metric loss expected at other numbers of hidden nodes, where the block was reconstructed.
    """

    block: int
    metric_loss: float
    recovery: Recovery | None = None
    reconstruction: Reconstruction | None = None
    seconds: float = 0.0
    recoverability: Recoverability | None = None


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
    metric: Metric,
    plan: Plan,
    config: CompressionConfig,
    *,
    progress: Progress = silent,
) -> Ranking:
    """Compress each candidate block alone, let it mimic, and sort by metric loss, as published.

    Args:
        teacher: The original, frozen.
        images: The few-shot set.
        metric: What the candidates are ranked by.
        plan: Says which blocks are candidates and how many hidden nodes they keep.
        config: Its `recovery.learning_rate` must be a number.
        progress: Told after each epoch.
    """
    kept = {block: draw_kept_nodes(teacher, block, plan.hidden_features, config.seed) for block in plan.candidates}

    def cut(block: int) -> nn.Module:
        return compress_block(teacher, block, kept[block], config.impl)

    def score(student: nn.Module, _: Recovery) -> float:
        return metric.loss(student)

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
    """Cut, recover by mimicking and score each candidate alone.

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
            config.mimicking,
            seed=derive_seed(config.seed, "trial", block),
            impl=config.impl,
            progress=progress,
            stage=f"trial of block {block}",
        )
        trial = Trial(block, score(student, recovery), recovery, seconds=recovery.seconds)
        if best is None or trial.metric_loss < min(t.metric_loss for t in trials):
            best = student
        trials.append(trial)
    assert best is not None
    return _best_first(trials), best


def rank_reconstructed(
    teacher: nn.Module,
    states: TeacherStates,
    metric: Metric,
    candidates: Sequence[int],
    hidden_features: int,
    config: CompressionConfig,
    *,
    progress: Progress = silent,
) -> tuple[tuple[Trial, ...], dict[int, tuple[int, ...]]]:
    """Reconstruct each candidate block alone, in closed form, and sort by metric loss.

    What a block would lose at another size is its metric loss in proportion to what the closed form misses there.

    Args:
        teacher: The original, frozen.
        states: The teacher's tokens for the images that blocks are reconstructed on.
        metric: What the candidates are ranked by.
        candidates: Blocks to try.
        hidden_features: How many hidden nodes they keep.
        config: Its `recovery` must be a `ReconstructionConfig`.
        progress: Told after each trial.

    Returns:
        The trials, best first, and the hidden nodes that each kept, by block.
    """
    recovery = config.reconstruction
    trials: list[Trial] = []
    kept: dict[int, tuple[int, ...]] = {}
    for block in candidates:
        start = time.perf_counter()
        rows, seed = states.rows(block).thinned(), derive_seed(config.seed, "trial", block)
        order, errors = error_curve(teacher, block, rows, recovery, seed)
        student = copy.deepcopy(teacher)
        kept[block], reconstruction = reconstruct_block(
            student, block, hidden_features, rows, recovery,
            kept=order[:hidden_features] if hidden_features <= len(order) else None,
            step_size=0.0, epochs=0, refit=False, seed=seed, impl=config.impl,
        )  # fmt: skip
        loss = metric.loss(student, block)
        profile = _in_proportion(errors, hidden_features, loss) if errors else None
        trials.append(Trial(block, loss, None, reconstruction, time.perf_counter() - start, profile))
        progress("trials", len(trials), len(candidates), loss)
    return _best_first(trials), kept


def _in_proportion(errors: Mapping[int, float], hidden_features: int, loss: float) -> Recoverability:
    """The metric loss at every number of hidden nodes, from that at one and the errors at all."""
    nodes, missed = tuple(errors), np.array(list(errors.values()))
    scale = loss / max(float(np.interp(hidden_features, nodes, missed)), 1e-12)
    return Recoverability(nodes, tuple((scale * missed).tolist()))


def _best_first(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    return tuple(sorted(trials, key=lambda trial: (trial.metric_loss, trial.block)))
