"""Block reconstruction: the work that all sizes share (`prepare`) and the work of one size (`compress_prepared`)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from dcvit.budget import ADDITIVE
from dcvit.config import DCViT, ReconstructionConfig
from dcvit.context import RunContext
from dcvit.data.images import FewShotImages
from dcvit.data.synthesis import ProxySet
from dcvit.history import BlockSpec, Plan, Probe, Reconstruction, Refinement, SensitivityCurve
from dcvit.methods.budgets import flat
from dcvit.methods.registry import Outcome, Task
from dcvit.metrics.fidelity import Metric
from dcvit.models import compressible
from dcvit.models.surgery import copy_blocks, prune_mlp
from dcvit.recovery.calibration import TeacherStates, Views, draw_views
from dcvit.recovery.finetune import REFINEMENT_HELD_OUT_EVERY, Schedule, num_steps, refine
from dcvit.recovery.reconstruct import BlockProblem, Descent, find_step_size, reconstruct_block
from dcvit.runtime.checkpoint import Entry, require_alike, require_one_of
from dcvit.runtime.spill import SpilledBuffer
from dcvit.search.allocate import require_units
from dcvit.search.plan import search
from dcvit.search.sensitivity import rank_reconstructed
from dcvit.search.space import search_space, searched
from dcvit.serialization import from_plain

__all__ = ["HELD_OUT_VIEWS", "Prepared", "compress_prepared", "prepare", "reconstruct_blocks"]

HELD_OUT_VIEWS = 50
"""Number of views of held-out images that the metric uses."""


@dataclass(frozen=True)
class Prepared:
    """The results of block reconstruction that do not depend on the budget and that all sizes share.

    Attributes:
        teacher: The original, frozen.
        views: The images that blocks are reconstructed on.
        states: The teacher's tokens of these views.
        probes: The sensitivity probes of the candidates, least metric loss first.
        pruning_probes: The probes of the blocks that can keep their attention and lose only hidden units, least metric
            loss first.
        prunable_orders: The hidden units of these blocks, most useful first. An order may leave out some units.
        step_size: The step size of the gradient steps on a block.
        refinement_steps: The number of steps of the final distillation; 0 without one.
    """

    teacher: nn.Module
    views: Views
    states: TeacherStates
    probes: tuple[Probe, ...]
    pruning_probes: tuple[Probe, ...]
    prunable_orders: Mapping[int, tuple[int, ...]]
    step_size: float
    refinement_steps: int


def _searches(planned: Plan, config: DCViT) -> bool:
    """Return whether the structure is searched. The search needs costs that add up over blocks."""
    return searched(config) and planned.budget.metric in ADDITIVE


def _step_size(
    teacher: nn.Module,
    states: TeacherStates,
    specs: Mapping[int, BlockSpec],
    probes: Sequence[Probe],
    orders: Mapping[int, tuple[int, ...]],
    config: DCViT,
    context: RunContext,
) -> float:
    """Find the step size of reconstruction on the candidate of median metric loss."""
    block = probes[len(probes) // 2].block
    kept = orders[block][: specs[block].hidden_features]
    problem = BlockProblem(block, specs[block], states.rows(block).thinned(), kept)
    return find_step_size(teacher, problem, config.reconstruction, context.derived("step size"))


def prepare(
    teacher: nn.Module,
    images: FewShotImages,
    proxy_set: ProxySet,
    planned: Plan,
    config: DCViT,
    context: RunContext,
) -> Prepared:
    """Draw views, pass them through the teacher, probe each candidate block, and find the step size.

    Args:
        teacher: The original, frozen.
        images: The few-shot set.
        proxy_set: Images to rank blocks on.
        planned: The candidates, and about how many hidden units they will keep.
        config: Its `recovery` must be a `ReconstructionConfig`.
        context: Its store keeps the probes. Its processes share the work.
    """
    recovery, view = config.reconstruction, compressible(teacher)
    steps = num_steps(teacher, recovery)
    space, searches = search_space(teacher, config), _searches(planned, config)
    prunable = flat(space.prunable) if searches else ()
    with context.timer("views"):
        if steps:
            views = draw_views(
                teacher, images, recovery, context.seed,
                num_views=recovery.refinement_views, held_out_every=REFINEMENT_HELD_OUT_EVERY,
            )  # fmt: skip
        else:
            views = draw_views(teacher, images, recovery, context.seed)
        steps = steps if views.validates else 0
        states = TeacherStates(
            teacher, views, recovery.batch_size, prunable=prunable, keep_output=steps > 0, context=context
        )
        image_sets = [proxy_set.images]
        if config.ablation.metric == "distillation" and views.validates:
            image_sets.append(views.images[views.validation[:HELD_OUT_VIEWS]])
        metric = Metric(teacher, image_sets, config.ablation.metric, recovery.batch_size)
    with context.timer("ranking"):
        specs = {}
        for block in planned.candidates:
            hidden = view.hidden_features(block)
            probed = round((1 - planned.drop_ratio) * hidden)
            if searches:  # the middle of the range that the search may choose from
                probed = min(max(probed, hidden // 8), hidden // 2)
            specs[block] = BlockSpec(probed)
        probes, orders = rank_reconstructed(teacher, states, metric, specs, recovery, context)
        pruned = {block: BlockSpec(max(3 * view.hidden_features(block) // 8, 1), attention=True) for block in prunable}
        pruning_probes, prunable_orders = rank_reconstructed(
            teacher, states, metric, pruned, recovery, context, stage="pruning probes"
        )
    with context.timer("step size"):
        step_size = 0.0
        if recovery.epochs and views.validates:
            find = partial(_step_size, teacher, states, specs, probes, orders, config, context)
            check = partial(require_one_of, recovery.step_sizes)
            step_size = context.store.entry("step-size", lambda: Entry(find()), check=check).values
    return Prepared(teacher, views, states, probes, pruning_probes, prunable_orders, step_size, steps)


def _structure(prepared: Prepared, planned: Plan, config: DCViT) -> tuple[Plan, dict[int, BlockSpec]]:
    """Return the plan to follow, and the spec of each block that is compressed, best first."""
    compressed, pruned = (
        {t.block: t.sensitivity for t in probes if t.sensitivity is not None}
        for probes in (prepared.probes, prepared.pruning_probes)
    )
    closed_form = len(compressed) == len(prepared.probes)
    if not closed_form and not search_space(prepared.teacher, config).equal:
        # Without sensitivity curves, assume that a block loses twice as much with no hidden unit as with all of them.
        for probe in prepared.probes:
            hidden = compressible(prepared.teacher).hidden_features(probe.block)
            compressed[probe.block] = SensitivityCurve((0, hidden), (2 * probe.metric_loss, probe.metric_loss))
    if len(compressed) == len(prepared.probes) and _searches(planned, config):
        return search(prepared.teacher, planned, compressed, pruned, config)
    ordered = [probe.block for probe in prepared.probes]
    if closed_form:
        ordered.sort(key=lambda block: (compressed[block].loss(planned.hidden_features), block))
    return planned, dict.fromkeys(ordered[: planned.num_blocks], BlockSpec(planned.hidden_features))


@dataclass(frozen=True)
class _ReconstructedBlock:
    """The values in a block's checkpoint entry.

    Attributes:
        kept: The hidden units that the block keeps, ascending.
        report: The report of its reconstruction.
    """

    kept: tuple[int, ...]
    report: Reconstruction


def _work(specs: Mapping[int, BlockSpec]) -> dict[int, int]:
    """Estimate how long each compressed block takes, to scale the progress.

    A block that keeps its attention counts 2, and one that loses it counts 4. Each uncompressed block between it and
    the previous compressed one adds 1, because the views pass through it. On ViT-B/16 these took 18 to 39 s, 51 to
    84 s, and 12 to 17 s.
    """
    blocks = sorted(specs)
    between = [0, *(after - before - 1 for before, after in pairwise(blocks))]
    return {block: (2 if specs[block].attention else 4) + whole for block, whole in zip(blocks, between, strict=True)}


def reconstruct_blocks(
    prepared: Prepared,
    specs: Mapping[int, BlockSpec],
    config: DCViT,
    context: RunContext,
    *,
    refit: bool = True,
) -> tuple[nn.Module, dict[int, tuple[int, ...]], tuple[Reconstruction, ...]]:
    """Compress blocks of a copy of the teacher front to back, each fitted on the outputs of the blocks before it.

    Args:
        prepared: The results that all sizes share. Blocks that keep their attention keep the hidden units that their
            probes found most useful.
        specs: The parts that each block keeps.
        config: Its `recovery` must be a `ReconstructionConfig`.
        context: Its store keeps each block. Each of its processes passes a share of the views through the student.
        refit: Whether to fit on the held-out images too once they have served for validation. Set it to False if they
            are needed for validation again.

    Returns:
        The student, the hidden units kept in each block, and a report of each reconstruction.
    """
    student = _Student(prepared, specs, config.reconstruction, context, refit=refit)
    work = _work(specs)
    done, total = 0, sum(work.values())
    kept, reports = {}, []
    # This is a stage of its own because the time of the first block serves to estimate that of the others.
    student.embed()
    context.progress("reconstruction", done, total, None)
    for block in sorted(specs):
        found = student.reconstruct(block)
        kept[block] = found.kept
        reports.append(found.report)
        done += work[block]
        context.progress("reconstruction", done, total, found.report.error_after)
    return student.model, kept, tuple(reports)


class _Student:
    """A copy of the teacher that is compressed block by block, and this process's tokens in front of the next block.

    Attributes:
        model: The copy.
    """

    def __init__(
        self,
        prepared: Prepared,
        specs: Mapping[int, BlockSpec],
        config: ReconstructionConfig,
        context: RunContext,
        *,
        refit: bool,
    ) -> None:
        self._prepared, self._specs, self._config, self._context = prepared, specs, config, context
        self._refit = refit
        # The student owns all weights that change. Refinement changes one block more than reconstruction does.
        depth = compressible(prepared.teacher).num_blocks()
        self.model = copy_blocks(prepared.teacher, range(min(specs), min(max(specs) + 2, depth)))
        self._firsts, self._counts = context.processes.batches(len(prepared.views.images), config.batch_size)
        self._at, self._tokens = 0, SpilledBuffer()

    def embed(self) -> None:
        """Pass the views through the blocks in front of the first compressed one."""
        view, images = compressible(self._prepared.teacher), self._prepared.views.images
        progress, count = self._context.progress, len(self._firsts)

        def embedded() -> Iterator[Tensor]:
            for done, first in enumerate(self._firsts, 1):
                yield view.embed(images[first : first + self._config.batch_size])
                # Control returns here when the batch has passed the blocks and the next one is requested.
                progress("blocks in front", done, count, None)

        progress("blocks in front", 0, count, None)
        self._pass(embedded(), min(self._specs))

    def reconstruct(self, block: int) -> _ReconstructedBlock:
        """Compress and fit a block in place, or restore it from the store. Call this front to back."""
        if self._at < block:
            self._pass(self._tokens.split(self._config.batch_size), block)
        entry = self._context.store.entry(
            f"block-{block}",
            partial(self._reconstructed, block),
            partial(self._restore, block),
            check=partial(self._check, block),
            together=True,
        )
        return from_plain(_ReconstructedBlock, entry.values)

    @torch.no_grad()
    def _pass(self, batches: Iterable[Tensor], stop: int) -> None:
        view = compressible(self.model)
        self._tokens = SpilledBuffer(view.run_blocks(batch, self._at, stop) for batch in batches)
        self._at = stop

    def _chosen(self, block: int) -> tuple[int, ...] | None:
        """Return the hidden units that the probe chose for a block that keeps its attention, if it ordered enough."""
        spec = self._specs[block]
        order = self._prepared.prunable_orders[block] if spec.attention else ()
        return order[: spec.hidden_features] if 0 < spec.hidden_features <= len(order) else None

    @torch.no_grad()
    def _inputs(self, block: int, state: Tensor) -> Tensor:
        """Return the inputs of the part that is fitted, `[B, N, D]`: of the block, or only of its MLP."""
        view = compressible(self.model)
        state = view.prepare(state, block)
        if self._specs[block].attention:
            sublayers = view.sublayers(block)
            assert sublayers is not None
            state = sublayers[0](state)
        return view.as_tokens(state)

    def _reconstructed(self, block: int) -> Entry:
        prepared, spec, config = self._prepared, self._specs[block], self._config
        batches = (self._inputs(block, batch) for batch in self._tokens.split(config.batch_size))
        # A convolution has many inputs: one of its rows is as long as ten rows of a ViT.
        few = spec.attention and not compressible(self.model).pointwise_units
        inputs = prepared.views.rows_of_all(batches, self._firsts[0], few=few)
        inputs = self._context.processes.gather(inputs if self._counts else inputs[:0])
        problem = BlockProblem(block, spec, prepared.states.rows(block, inputs, few=few), self._chosen(block))
        kept, report = reconstruct_block(
            self.model, problem, config, Descent(prepared.step_size, config.epochs),
            self._context.derived("reconstruction", block), refit=self._refit,
        )  # fmt: skip
        values = asdict(_ReconstructedBlock(kept, report))
        return Entry(values, compressible(self.model).block(block).state_dict())

    def _restore(self, block: int, entry: Entry) -> None:
        keep_attention = self._specs[block].attention
        prune_mlp(self.model, block, entry.values["kept"], keep_attention=keep_attention)
        compressible(self.model).block(block).load_state_dict(dict(entry.tensors))

    def _check(self, block: int, entry: Entry) -> None:
        found, spec = from_plain(_ReconstructedBlock, entry.values), self._specs[block]
        found.report.require_of(block, self._config.epochs)
        require_units(found.kept, compressible(self.model).hidden_features(block))
        units = self._chosen(block)
        if len(found.kept) != spec.hidden_features or (units is not None and found.kept != tuple(sorted(units))):
            raise ValueError("it keeps other hidden units than expected")
        expected = copy_blocks(self.model, [block])
        prune_mlp(expected, block, found.kept, keep_attention=spec.attention)
        require_alike(entry.tensors, compressible(expected).block(block).state_dict())


def compress_prepared(
    prepared: Prepared,
    planned: Plan,
    config: DCViT,
    context: RunContext,
    *,
    refinement: Schedule | None = None,
) -> Outcome:
    """Compress to one size: choose the structure, reconstruct the blocks, and refine the student by distillation.

    Args:
        prepared: The results that all sizes share.
        planned: The plan with the fewest blocks that meet the budget.
        config: The config that `prepare` was called with.
        context: Its store keeps each block and the refined student. Its processes share the work.
        refinement: The schedule of the distillation; `prepared.refinement_steps` by default.
    """
    schedule = refinement or Schedule(prepared.refinement_steps)
    with context.timer("compression"):
        chosen, specs = _structure(prepared, planned, config)
        student, kept, reconstructions = reconstruct_blocks(prepared, specs, config, context, refit=schedule.steps == 0)
    found = None
    if schedule.steps:
        with context.timer("refinement"):
            found = _refined(student, prepared, tuple(specs), config.reconstruction, schedule, context)
    chosen = replace(chosen, blocks=tuple(specs), kept_units={block: kept[block] for block in specs})
    return Outcome(
        student, chosen, prepared.probes, prepared.step_size,
        pruning_probes=prepared.pruning_probes, reconstructions=reconstructions, refinement=found,
    )  # fmt: skip


def _refined(
    student: nn.Module,
    prepared: Prepared,
    blocks: tuple[int, ...],
    config: ReconstructionConfig,
    schedule: Schedule,
    context: RunContext,
) -> Refinement:
    """Refine a student by distillation in place, or restore it from the store."""
    targets = prepared.states.output
    assert targets is not None

    def refined() -> Entry:
        found = refine(student, prepared.views, targets, blocks, config, schedule, context.derived("refinement"))
        return Entry(asdict(found), student.state_dict())

    def restore(entry: Entry) -> None:
        student.load_state_dict(dict(entry.tensors))

    def check(entry: Entry) -> None:
        from_plain(Refinement, entry.values).require_run(schedule.steps, schedule.step_sizes)
        require_alike(entry.tensors, student.state_dict())

    entry = context.store.entry("refinement", refined, restore, check=check, together=True)
    return from_plain(Refinement, entry.values)


def reconstructed(task: Task[DCViT], planned: Plan, proxy_set: ProxySet) -> Outcome:
    """Compress to one size by block reconstruction."""
    prepared = prepare(task.teacher, task.images, proxy_set, planned, task.config, task.context)
    return compress_prepared(prepared, planned, task.config, task.context)
