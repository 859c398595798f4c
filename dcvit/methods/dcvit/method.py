"""DC-ViT and beyond: attention and hidden units out of the blocks that recover best, so that any budget is met.

Source: Zhang, Zhou and Wang, "Dense Vision Transformer Compression with Few Samples" (CVPR 2024, arXiv 2403.18708).
    Blocks are tried alone and ranked by how well they recover (`dcvit.search.sensitivity`) on images that the model
    itself synthesises (`dcvit.data.synthesis`); the best are cut, and the student mimics the teacher's output tokens.

There are two procedures. With a `DistillationConfig` it is the published one: a formula says how many blocks are cut,
and they are cut one after another, with distillation after each (`compress_blocks`). With a `ReconstructionConfig`, the
default, each cut block is fitted to what the teacher's adds (`reconstruct_blocks`), the structure is searched
(`dcvit.search.allocate`), and distillation refines the whole at the end. All that does not depend on the budget is then
done first (`prepare`), so that many sizes can share it (`dcvit.compression.sweep`).
"""

from dataclasses import asdict, dataclass, replace

from torch import nn

from dcvit.budget import METRICS
from dcvit.config import DCViT, DistillationConfig
from dcvit.context import RunContext
from dcvit.data.images import FewShotImages
from dcvit.data.synthesis import ProxySet, require_synthesized, synthesize
from dcvit.history import Plan
from dcvit.methods.dcvit.published import published
from dcvit.methods.dcvit.reconstructed import reconstructed
from dcvit.methods.registry import Method, Outcome, Task, register
from dcvit.models import fuse
from dcvit.models.surgery import copy_blocks
from dcvit.runtime.checkpoint import Entry
from dcvit.search.latency import plan_latency, require_planned
from dcvit.serialization import from_plain

__all__ = [
    "dcvit",
    "make_proxy_set",
]


def dcvit(task: Task[DCViT]) -> Outcome:
    """DC-ViT: attention and a part of the MLP out of the blocks that recover best, so that any budget is met.

    Beyond it, a block may keep its attention and lose a part of its MLP alone, see `dcvit.search.allocate`.

    Args:
        task: What to compress, with what, to which budget.
    """
    context = task.context
    with context.timer("prepare"):
        planned = _planned(task)
        task = replace(task, teacher=fuse(copy_blocks(task.teacher, ()), context.impl))
    with context.timer("proxy set"):
        proxy_set = task.proxy_set
        if proxy_set is None:
            proxy_set = make_proxy_set(task.teacher, task.images, task.config, context)
    if isinstance(task.config.recovery, DistillationConfig):
        outcome = published(task, planned, proxy_set)
    else:
        outcome = reconstructed(task, planned, proxy_set)
    return replace(outcome, proxy_set=proxy_set)


def _planned(task: Task[DCViT]) -> Plan:
    """The plan; one that was measured is kept, for it would come out otherwise the next time."""

    def found() -> Plan:
        return plan_latency(
            task.teacher, task.budget, task.config, stopwatch=task.stopwatch, progress=task.context.progress
        )

    if not task.budget.measured:
        return found()
    kept = task.context.store.entry(
        "plan",
        lambda: Entry(found().to_dict()),
        check=lambda entry: require_planned(Plan.from_dict(entry.values), task.teacher, task.budget, task.config),
    )
    return Plan.from_dict(kept.values)


register(
    Method(
        name="dcvit",
        config=DCViT,
        title="attention and hidden units out of the blocks that recover best, to any budget",
        source="DC-ViT, arXiv 2403.18708",
        families=("vit", "eva", "swin", "cnn"),
        compress=dcvit,
        metrics=METRICS,
        resumable=True,
    )
)


def make_proxy_set(teacher: nn.Module, images: FewShotImages, config: DCViT, context: RunContext) -> ProxySet:
    """What blocks are ranked on, as `config.ablation.ranking_images` says; synthesised images are kept in the store."""
    if config.ablation.ranking_images == "few-shot":
        return ProxySet(images.normalised)

    def synthesized() -> Entry:
        made = synthesize(teacher, config.synthesis, context)
        assert made.targets is not None
        values = asdict(_Losses(made.loss, made.losses))
        return Entry(values, {"images": made.images, "targets": made.targets})

    def restored(entry: Entry) -> ProxySet:
        losses = from_plain(_Losses, entry.values)
        return ProxySet(entry.tensors["images"], entry.tensors["targets"], losses.loss, losses.losses)

    def check(entry: Entry) -> None:
        if entry.tensors.keys() != {"images", "targets"}:
            raise ValueError("its tensors are others than they should be")
        require_synthesized(restored(entry), teacher, config.synthesis)

    return restored(context.store.entry("metric-set", synthesized, check=check)).to(images.normalised.device)


@dataclass(frozen=True)
class _Losses:
    """The values of the unit of a proxy set, see `ProxySet`."""

    loss: float
    losses: tuple[float, ...]
