"""Block reconstruction: what all sizes share (`prepare`), and what one size adds (`compress_prepared`)."""

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
"""Views of held-out images that the metric looks at."""


@dataclass(frozen=True)
class Prepared:
    """What block reconstruction learns of a model and its images before a budget matters: all sizes share it.

    Attributes:
        teacher: The original, frozen.
        views: The images that blocks are reconstructed on.
        states: The teacher's tokens for them.
        probes: Of each candidate, least metric loss first.
        pruning_probes: Of each block that may keep its attention and lose hidden units only, likewise.
        prunable_orders: Of those blocks, their hidden units, most useful first; not always all.
        step_size: Of the gradient steps on a block.
        refinement_steps: Of the distillation at the end; 0 where there is none.
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
    """Whether the structure is searched: only costs that add up can be."""
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
    """The step size of reconstruction, found on the candidate of median metric loss."""
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
    """Draw views, pass them through the teacher, try each candidate block, and find the step size.

    Args:
        teacher: The original, frozen.
        images: The few-shot set.
        proxy_set: Images to rank blocks on.
        planned: Says which blocks are candidates, and about how many hidden units they will keep.
        config: Its `recovery` must be a `ReconstructionConfig`.
        context: Its store keeps the probes, its ranks share the work.
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
            tried = round((1 - planned.drop_ratio) * hidden)
            if searches:  # in the middle of what the search may choose
                tried = min(max(tried, hidden // 8), hidden // 2)
            specs[block] = BlockSpec(tried)
        probes, orders = rank_reconstructed(teacher, states, metric, specs, recovery, context)
        pruned = {block: BlockSpec(max(3 * view.hidden_features(block) // 8, 1), attention=True) for block in prunable}
        pruning_probes, prunable_orders = rank_reconstructed(
            teacher, states, metric, pruned, recovery, context, stage="pruning trials"
        )
    with context.timer("step size"):
        step_size = 0.0
        if recovery.epochs and views.validates:  # which judge
            find = partial(_step_size, teacher, states, specs, probes, orders, config, context)
            check = partial(require_one_of, recovery.step_sizes)
            step_size = context.store.entry("step-size", lambda: Entry(find()), check=check).values
    return Prepared(teacher, views, states, probes, pruning_probes, prunable_orders, step_size, steps)


def _structure(prepared: Prepared, planned: Plan, config: DCViT) -> tuple[Plan, dict[int, BlockSpec]]:
    """The plan that is followed, and what each block that is cut keeps, best first."""
    compressed, pruned = (
        {t.block: t.sensitivity for t in probes if t.sensitivity is not None}
        for probes in (prepared.probes, prepared.pruning_probes)
    )
    closed_form = len(compressed) == len(prepared.probes)
    if not closed_form and not search_space(prepared.teacher, config).equal:
        # Then a block is presumed to lose twice as much without any hidden unit as with all.
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
    """The values of the unit of a block.

    Attributes:
        kept: The hidden units that it keeps, ascending.
        report: How its reconstruction went.
    """

    kept: tuple[int, ...]
    report: Reconstruction


def _work(specs: Mapping[int, BlockSpec]) -> dict[int, int]:
    """About how long each cut takes, for the progress: 2 for a pruned block, 4 for one that loses its attention.

    And 1 for each whole block between it and the cut in front, which its views are passed through. So measured on
    ViT-B/16, where a pruned block took 18 to 39 s, another 51 to 84 s, and passing a whole one 12 to 17 s.
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
    """Cut blocks of a copy of the teacher, front to back, each on what the ones before it give.

    Args:
        prepared: What all sizes share. Pruned blocks keep the units that their probes found most useful.
        specs: What each block keeps.
        config: Its `recovery` must be a `ReconstructionConfig`.
        context: Its store keeps each block; its ranks pass a share of the views through the student each.
        refit: Learn from the held-out images too once they have judged; not if they are to judge again.

    Returns:
        The student, the hidden units kept in each block, and how each reconstruction went.
    """
    student = _Student(prepared, specs, config.reconstruction, context, refit=refit)
    work = _work(specs)
    done, total = 0, sum(work.values())
    kept, reports = {}, []
    # A stage of its own: what the first block takes says how long the others will.
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
    """A copy of the teacher whose blocks are cut, and this rank's tokens up to the block that is the next.

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
        # What changes, by the refinement too, which goes one block further, is the student's own.
        depth = compressible(prepared.teacher).num_blocks()
        self.model = copy_blocks(prepared.teacher, range(min(specs), min(max(specs) + 2, depth)))
        self._firsts, self._counts = context.processes.batches(len(prepared.views.images), config.batch_size)
        self._at, self._tokens = 0, SpilledBuffer()

    def embed(self) -> None:
        """Pass the views through the blocks in front of the first that is cut."""
        view, images = compressible(self._prepared.teacher), self._prepared.views.images
        progress, count = self._context.progress, len(self._firsts)

        def embedded() -> Iterator[Tensor]:
            for done, first in enumerate(self._firsts, 1):
                yield view.embed(images[first : first + self._config.batch_size])
                # Once the batch is through the blocks, and the next one is asked for.
                progress("blocks in front", done, count, None)

        progress("blocks in front", 0, count, None)
        self._pass(embedded(), min(self._specs))

    def reconstruct(self, block: int) -> _ReconstructedBlock:
        """Cut a block and fit what is left of it, or take it from the store; in place, front to back."""
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
        """The units that its probe chose for a pruned block, if it chose as many."""
        spec = self._specs[block]
        order = self._prepared.prunable_orders[block] if spec.attention else ()
        return order[: spec.hidden_features] if 0 < spec.hidden_features <= len(order) else None

    @torch.no_grad()
    def _inputs(self, block: int, state: Tensor) -> Tensor:
        """What is fitted to the teacher's block gets these tokens `[B, N, D]`: the block's, or its MLP's."""
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
        # The inputs of a convolution are many: a row of them is as long as ten of a ViT's.
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
            raise ValueError("it keeps other hidden units than it should")
        alike = copy_blocks(self.model, [block])
        prune_mlp(alike, block, found.kept, keep_attention=spec.attention)
        require_alike(entry.tensors, compressible(alike).block(block).state_dict())


def compress_prepared(
    prepared: Prepared,
    planned: Plan,
    config: DCViT,
    context: RunContext,
    *,
    refinement: Schedule | None = None,
) -> Outcome:
    """One size: choose its structure, reconstruct its blocks, and let it mimic.

    Args:
        prepared: What all sizes share.
        planned: The fewest blocks that meet the budget.
        config: What `prepare` was given.
        context: Its store keeps each block, and the refined student; its ranks share the work.
        refinement: How long it mimics, where that is not `prepared`'s.
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
    """Let a student mimic, in place; or take it from the store."""
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
    """Block reconstruction, to one size."""
    prepared = prepare(task.teacher, task.images, proxy_set, planned, task.config, task.context)
    return compress_prepared(prepared, planned, task.config, task.context)
