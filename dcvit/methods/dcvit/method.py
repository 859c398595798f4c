"""DC-ViT and its extensions: prune attention and hidden units of the blocks that recover best, to meet any budget.

Source: Zhang, Zhou and Wang, "Dense Vision Transformer Compression with Few Samples" (CVPR 2024, arXiv 2403.18708).
    A sensitivity probe compresses each block on its own, and blocks are ranked by how well the model recovers
    (`dcvit.search.sensitivity`). The ranking uses images that the model itself synthesises (`dcvit.data.synthesis`).
    The best blocks are compressed, and the student is trained by distillation of the teacher's output tokens.

There are two procedures:

- A `DistillationConfig` selects the published one. A formula gives the number of blocks, which are compressed one after
  another with distillation after each (`compress_blocks`).
- A `ReconstructionConfig`, the default, fits each compressed block to the residual of the teacher's block
  (`reconstruct_blocks`). The structure is searched (`dcvit.search.allocate`), and distillation refines the whole model
  at the end. All work that does not depend on the budget is done first (`prepare`), so that several sizes can share it
  (`dcvit.compression.sweep`).
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
    """Remove the attention and prune the MLP of the blocks that recover best, so that any budget is met (DC-ViT).

    As an extension, a block can keep its attention and lose only a part of its MLP, see `dcvit.search.allocate`.

    Args:
        task: The model, the images, the budget and the settings.
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
    """Return the plan. A plan from measured latency is stored, because a new measurement could change it."""

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
        title="attention and hidden units pruned from the blocks that recover best, to meet any budget",
        source="DC-ViT, arXiv 2403.18708",
        families=("vit", "eva", "swin", "cnn"),
        compress=dcvit,
        metrics=METRICS,
        resumable=True,
    )
)


def make_proxy_set(teacher: nn.Module, images: FewShotImages, config: DCViT, context: RunContext) -> ProxySet:
    """Return the images that blocks are ranked on, by `config.ablation.ranking_images`; store synthesised images."""
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
            raise ValueError("it has other tensors than expected")
        require_synthesized(restored(entry), teacher, config.synthesis)

    return restored(context.store.entry("metric-set", synthesized, check=check)).to(images.normalised.device)


@dataclass(frozen=True)
class _Losses:
    """The values in a proxy set's checkpoint entry, see `ProxySet`."""

    loss: float
    losses: tuple[float, ...]
