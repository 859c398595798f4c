"""Methods to compare with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from dcvit.config import CompressionConfig
from dcvit.images import FewShotImages
from dcvit.models import adapter_for, require_supported
from dcvit.planning import choose_candidates
from dcvit.progress import Progress, silent
from dcvit.ranking import Trial, run_trials
from dcvit.recovery import Recovery, find_learning_rate, mimicking_loss, output_tokens, recover
from dcvit.seeding import derive_seed
from dcvit.surgery import drop_block

__all__ = ["BlockDropping", "block_dropping", "drop_blocks"]


@dataclass(frozen=True)
class BlockDropping:
    """What `block_dropping` gives back.

    Attributes:
        model: The smaller model.
        blocks: The blocks that were dropped, best first.
        trials: The trial of each candidate, best first.
        recovery: The final recovery.
    """

    model: nn.Module
    blocks: tuple[int, ...]
    trials: tuple[Trial, ...]
    recovery: Recovery


def block_dropping(
    teacher: nn.Module,
    images: FewShotImages,
    num_blocks: int,
    config: CompressionConfig,
    *,
    trials: Sequence[Trial] | None = None,
    progress: Progress = silent,
) -> BlockDropping:
    """Drop whole blocks, as PRACTISE (arXiv 2202.07861) does it on a ViT.

    Each candidate is dropped alone and recovered; its score is the mimicking loss on the few-shot images per latency
    saved. The blocks of a ViT save the same latency, so the loss alone orders them. The best are then dropped at once
    and recovered, for `num_blocks` times the epochs of a trial: as long as progressive compression of as many blocks.

    Args:
        teacher: The original, frozen.
        images: The few-shot set.
        num_blocks: How many blocks go.
        config: Candidates, mimicking and seed; the rest is not used.
        trials: Those of an earlier call with the same model, images and config, which need not be run again.
        progress: Told after each epoch.
    """
    candidates = choose_candidates(require_supported(teacher).cost(teacher), config.candidates)
    seed, impl = config.seed, config.impl
    if config.mimicking.learning_rate == "auto":
        block = candidates[len(candidates) // 2]
        rate = find_learning_rate(
            drop_block(teacher, block), teacher, images, [block], config.mimicking,
            seed=derive_seed(seed, "learning rate"), impl=impl, progress=progress,
        )  # fmt: skip
        config = replace(config, recovery=replace(config.mimicking, learning_rate=rate))
    targets = output_tokens(teacher, images.normalised, config.mimicking.batch_size)
    if trials is None:
        trials, _ = run_trials(
            teacher,
            images,
            candidates,
            lambda block: drop_block(teacher, block),
            lambda student: mimicking_loss(student, targets, images, config.mimicking, impl=impl),
            config,
            num_chosen=num_blocks,
            progress=progress,
        )
    blocks = tuple(trial.block for trial in trials[:num_blocks])
    student = drop_blocks(teacher, blocks)
    recovery = recover(
        student,
        teacher,
        images,
        blocks,
        replace(config.mimicking, epochs=config.mimicking.epochs * num_blocks),
        seed=derive_seed(seed, "step", num_blocks),
        impl=impl,
        progress=progress,
        stage=f"recovery without blocks {', '.join(map(str, sorted(blocks)))}",
    )
    return BlockDropping(adapter_for(student).rebuild(student).eval(), blocks, tuple(trials), recovery)


def drop_blocks(model: nn.Module, blocks: Sequence[int]) -> nn.Module:
    """A copy of the model without some blocks, not recovered."""
    for block in blocks:
        model = drop_block(model, block)
    return model
