"""PRACTISE: drop the whole blocks that recover best for the latency they save.

Source: Wang and Wu, "Practical Network Acceleration with Tiny Sets" (arXiv 2202.07861), sections 3.2 to 3.4. The score
of a block is R(B) / τ(B). R(B) is the distillation loss after only this block is dropped and the rest has recovered on
the few-shot images. τ(B) is the share of latency that dropping it saves. The blocks of least score are dropped
together, and the rest recovers once more. The loss is the mean squared error of the network's features before pooling.

Choices and differences of this implementation:

- τ is a block's share of the MACs. Measured latency varies between runs and could reorder blocks that are nearly
  alike, but equal seeds must give equal results. The blocks of a ViT have equal shares, so only R orders them.
- In a probe of a CNN only the adaptors around the gap are trained (`dcvit.methods.baselines.adaptors`). The final
  recovery trains them together with the weights that the config's `updated` names, and then absorbs them. Where no
  neighbour can absorb an adaptor, the probe trains those weights too.
- A ViT has no place for adaptors: a norm follows the residual stream, and a linear map cannot be moved past it. The
  weights that `updated` names are trained, by default the front of the model, as in DC-ViT's comparison
  (arXiv 2403.18708).
- In a Swin, shifted pairs of blocks are dropped, as in that comparison.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from dcvit.context import RunContext
from dcvit.costs import Cost
from dcvit.data.images import FewShotImages
from dcvit.errors import DcvitError
from dcvit.history import Probe, Recovery
from dcvit.methods.baselines.adaptors import absorb_adaptors, adaptors, insert_adaptors
from dcvit.methods.baselines.distillation import DistilledConfig
from dcvit.methods.budgets import candidate_groups, fewest_blocks, flat, plan_of
from dcvit.methods.registry import Method, Outcome, Task, register
from dcvit.models import compressible, require_supported
from dcvit.models.surgery import drop_block
from dcvit.recovery.distill import find_learning_rate, output_tokens, recover, token_loss
from dcvit.runtime.progress import Progress, silent
from dcvit.search.sensitivity import Contest, run_probes

__all__ = ["BlockDropping", "Practise", "block_dropping", "drop_blocks", "practise"]


@dataclass(frozen=True)
class Practise(DistilledConfig):
    """Settings of PRACTISE (arXiv 2202.07861): drop the whole blocks that recover best for what they save.

    Attributes:
        candidates: Blocks that may be dropped, from 0; `None` is all but the first and the last.
        seed: See `MethodConfig`.
        impl: See `MethodConfig`.
        distillation: How the student recovers, in each probe and at the end.
        halving: Whether unpromising probes stop early, see `dcvit.config.Ablation`.
    """

    halving: bool = False


def practise(task: Task[Practise]) -> Outcome:
    """Drop the fewest whole blocks that meet the budget, those of least score first.

    Args:
        task: The model, the images, the budget and the settings.

    Raises:
        BudgetError: If the budget cannot be met.
    """
    teacher, budget, config = task.teacher, task.budget, task.config
    cost = compressible(teacher).cost()
    groups = candidate_groups(teacher, config.candidates)

    def saving(group: tuple[int, ...]) -> int:
        whole = sum((cost.blocks[block].attention + cost.blocks[block].mlp for block in group), Cost())
        return whole.params if budget.metric == "file_size" else budget.amount(whole)

    # The cheapest blocks give the largest number that may have to be dropped. Halving leaves at least as many probes.
    cheapest = sorted(groups, key=saving)
    most = len(fewest_blocks(teacher, budget, lambda count: cheapest[:count], len(cheapest))) // len(groups[0])
    with task.context.timer("learning rate"):
        config = _with_learning_rate(teacher, task.images, groups, config, task.context)
    with task.context.timer("ranking"):
        probes = _probe_blocks(teacher, task.images, groups, config, most, task.context)
        order = _ordered(probes, groups)
        blocks = fewest_blocks(teacher, budget, lambda count: order[:count], len(order))
    with task.context.timer("compression"):
        student, recovery = _drop_and_recover(teacher, task.images, blocks, config, task.context)
    plan = plan_of(teacher, student, budget, blocks, flat(groups))
    return Outcome(student, plan, probes, recovery.learning_rate, steps=(recovery,))


register(
    Method(
        name="practise",
        config=Practise,
        title="whole blocks dropped: those that recover best for what they save",
        source="PRACTISE, arXiv 2202.07861",
        families=("vit", "eva", "swin", "cnn"),
        compress=practise,
    )
)


@dataclass(frozen=True)
class BlockDropping:
    """The result of `block_dropping`.

    Attributes:
        model: The smaller model.
        blocks: The dropped blocks, best first.
        probes: The probe of each candidate, best first.
        recovery: The report of the final recovery.
    """

    model: nn.Module
    blocks: tuple[int, ...]
    probes: tuple[Probe, ...]
    recovery: Recovery


def block_dropping(
    teacher: nn.Module,
    images: FewShotImages,
    num_blocks: int,
    config: Practise,
    *,
    probes: Sequence[Probe] | None = None,
    progress: Progress = silent,
) -> BlockDropping:
    """Run `practise` for a number of blocks instead of a budget.

    The blocks are dropped together, and the rest recovers for `num_blocks` times the epochs of a probe. Progressive
    compression of as many blocks takes the same number of epochs.

    Args:
        teacher: The original, frozen.
        images: The few-shot set.
        num_blocks: The number of blocks to drop, or of pairs in a Swin.
        config: The settings of the probes and of the final recovery.
        probes: The probes of an earlier call with the same model, images and config, to reuse.
        progress: Called after each epoch.

    Raises:
        DcvitError: If `num_blocks` is less than one or more than the number of candidates.
    """
    require_supported(teacher)
    groups = candidate_groups(teacher, config.candidates)
    if not 1 <= num_blocks <= len(groups):
        raise DcvitError(f"num_blocks={num_blocks}: expected 1 to {len(groups)}, the number of candidates.")
    context = RunContext(config.seed, config.impl, progress=progress)
    config = _with_learning_rate(teacher, images, groups, config, context)
    if probes is None:
        probes = _probe_blocks(teacher, images, groups, config, num_blocks, context)
    blocks = flat(_ordered(probes, groups)[:num_blocks])
    student, recovery = _drop_and_recover(teacher, images, blocks, config, context)
    return BlockDropping(compressible(student).rebuild().eval(), blocks, tuple(probes), recovery)


def drop_blocks(model: nn.Module, blocks: Sequence[int]) -> nn.Module:
    """Return a copy of the model without the given blocks, before any recovery."""
    for block in blocks:
        model = drop_block(model, block)
    return model


def _with_learning_rate(
    teacher: nn.Module,
    images: FewShotImages,
    groups: Sequence[tuple[int, ...]],
    config: Practise,
    context: RunContext,
) -> Practise:
    """Return the config with `learning_rate="auto"` replaced by the rate found on the middle candidate."""
    group = groups[len(groups) // 2]

    def find() -> float:
        return find_learning_rate(
            drop_blocks(teacher, group), teacher, images, group, config.distillation, context.derived("learning rate")
        )

    return replace(config, distillation=config.distillation.with_learning_rate(find))


def _probe_blocks(
    teacher: nn.Module,
    images: FewShotImages,
    groups: Sequence[tuple[int, ...]],
    config: Practise,
    num_chosen: int,
    context: RunContext,
) -> tuple[Probe, ...]:
    """Probe each candidate on its own and return the probes, least score first. A pair is named by its last block."""
    targets = output_tokens(teacher, images.normalised, config.distillation.micro_batch_size)
    original, by_last = _macs(teacher), {group[-1]: group for group in groups}

    saved: dict[nn.Module, float] = {}

    def dropped(block: int) -> nn.Module:
        student = drop_blocks(teacher, by_last[block])
        saved[student] = 1 - _macs(student) / original
        insert_adaptors(student, by_last[block])
        return student

    def score(student: nn.Module) -> float:
        return token_loss(student, targets, images, config.distillation, impl=context.impl) / saved[student]

    contest = Contest(list(by_last), dropped, score, num_chosen, config.halving, adaptors)
    probes, _ = run_probes(teacher, images, contest, config.distillation, context)
    return probes


def _ordered(probes: Sequence[Probe], groups: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the groups of blocks in the order of their probes."""
    by_last = {group[-1]: group for group in groups}
    return [by_last[probe.block] for probe in probes]


def _drop_and_recover(
    teacher: nn.Module, images: FewShotImages, blocks: Sequence[int], config: Practise, context: RunContext
) -> tuple[nn.Module, Recovery]:
    """Return the recovered student without the given blocks, and the report of its recovery."""
    student = drop_blocks(teacher, blocks)
    insert_adaptors(student, blocks)
    recovery = recover(
        student,
        teacher,
        images,
        blocks,
        replace(config.distillation, epochs=config.distillation.epochs * len(blocks)),
        context.derived("step", len(blocks)),
        stage=f"recovery without blocks {', '.join(map(str, sorted(blocks)))}",
    )
    absorb_adaptors(student)
    return student, recovery


def _macs(model: nn.Module) -> int:
    return compressible(model).cost().total.macs("with_attention_products")
