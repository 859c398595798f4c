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
from dcvit.history import Cut, Plan, Reconstruction, Recoverability, Refinement, Trial
from dcvit.methods.budgets import flat
from dcvit.methods.registry import Outcome, Task
from dcvit.metrics.fidelity import Metric
from dcvit.models import compressible
from dcvit.models.surgery import copy_blocks, cut_block
from dcvit.recovery.calibration import TeacherStates, Views, draw_views
from dcvit.recovery.finetune import REFINEMENT_HELD_OUT_EVERY, Schedule, num_steps, refine
from dcvit.recovery.reconstruct import BlockProblem, Descent, find_step_size, reconstruct_block
from dcvit.runtime.checkpoint import Unit, require_alike, require_one_of
from dcvit.runtime.spill import Stack
from dcvit.search.allocate import require_nodes
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
        trials: Of each candidate, least metric loss first.
        pruning_trials: Of each block that may keep its attention and lose hidden nodes only, likewise.
        prunable_orders: Of those blocks, their hidden nodes, most useful first; not always all.
        step_size: Of the gradient steps on a block.
        refinement_steps: Of the mimicking at the end; 0 where there is none.
    """

    teacher: nn.Module
    views: Views
    states: TeacherStates
    trials: tuple[Trial, ...]
    pruning_trials: tuple[Trial, ...]
    prunable_orders: Mapping[int, tuple[int, ...]]
    step_size: float
    refinement_steps: int


def _searches(planned: Plan, config: DCViT) -> bool:
    """Whether the structure is searched: only costs that add up can be."""
    return searched(config) and planned.budget.unit in ADDITIVE


def _step_size(
    teacher: nn.Module,
    states: TeacherStates,
    cuts: Mapping[int, Cut],
    trials: Sequence[Trial],
    orders: Mapping[int, tuple[int, ...]],
    config: DCViT,
    context: RunContext,
) -> float:
    """The step size of reconstruction, found on the candidate of median metric loss."""
    block = trials[len(trials) // 2].block
    kept = orders[block][: cuts[block].hidden_features]
    problem = BlockProblem(block, cuts[block], states.rows(block).thinned(), kept)
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
        planned: Says which blocks are candidates, and about how many hidden nodes they will keep.
        config: Its `recovery` must be a `ReconstructionConfig`.
        context: Its store keeps the trials, its ranks share the work.
    """
    recovery, adapter = config.reconstruction, compressible(teacher)
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
        if config.ablation.metric == "mimicking" and views.validates:
            image_sets.append(views.images[views.validation[:HELD_OUT_VIEWS]])
        metric = Metric(teacher, image_sets, config.ablation.metric, recovery.batch_size)
    with context.timer("ranking"):
        cuts = {}
        for block in planned.candidates:
            hidden = adapter.hidden_features(block)
            tried = round((1 - planned.drop_ratio) * hidden)
            if searches:  # in the middle of what the search may choose
                tried = min(max(tried, hidden // 8), hidden // 2)
            cuts[block] = Cut(tried)
        trials, orders = rank_reconstructed(teacher, states, metric, cuts, recovery, context)
        pruned = {block: Cut(max(3 * adapter.hidden_features(block) // 8, 1), attention=True) for block in prunable}
        pruning_trials, prunable_orders = rank_reconstructed(
            teacher, states, metric, pruned, recovery, context, stage="pruning trials"
        )
    with context.timer("step size"):
        step_size = 0.0
        if recovery.epochs and views.validates:  # which judge
            find = partial(_step_size, teacher, states, cuts, trials, orders, config, context)
            check = partial(require_one_of, recovery.step_sizes)
            step_size = context.store.unit("step-size", lambda: Unit(find()), check=check).values
    return Prepared(teacher, views, states, trials, pruning_trials, prunable_orders, step_size, steps)


def _structure(prepared: Prepared, planned: Plan, config: DCViT) -> tuple[Plan, dict[int, Cut]]:
    """The plan that is followed, and what each block that is cut keeps, best first."""
    compressed, pruned = (
        {t.block: t.recoverability for t in trials if t.recoverability is not None}
        for trials in (prepared.trials, prepared.pruning_trials)
    )
    closed_form = len(compressed) == len(prepared.trials)
    if not closed_form and not search_space(prepared.teacher, config).equal:
        # Then a block is presumed to lose twice as much without any hidden node as with all.
        for trial in prepared.trials:
            hidden = compressible(prepared.teacher).hidden_features(trial.block)
            compressed[trial.block] = Recoverability((0, hidden), (2 * trial.metric_loss, trial.metric_loss))
    if len(compressed) == len(prepared.trials) and _searches(planned, config):
        return search(prepared.teacher, planned, compressed, pruned, config)
    ordered = [trial.block for trial in prepared.trials]
    if closed_form:
        ordered.sort(key=lambda block: (compressed[block].loss(planned.hidden_features), block))
    return planned, dict.fromkeys(ordered[: planned.num_blocks], Cut(planned.hidden_features))


@dataclass(frozen=True)
class _ReconstructedBlock:
    """The values of the unit of a block.

    Attributes:
        kept: The hidden nodes that it keeps, ascending.
        report: How its reconstruction went.
    """

    kept: tuple[int, ...]
    report: Reconstruction


def _work(cuts: Mapping[int, Cut]) -> dict[int, int]:
    """About how long each cut takes, for the progress: 2 for a pruned block, 4 for one that loses its attention.

    And 1 for each whole block between it and the cut in front, which its views are passed through. So measured on
    ViT-B/16, where a pruned block took 18 to 39 s, another 51 to 84 s, and passing a whole one 12 to 17 s.
    """
    blocks = sorted(cuts)
    between = [0, *(after - before - 1 for before, after in pairwise(blocks))]
    return {block: (2 if cuts[block].attention else 4) + whole for block, whole in zip(blocks, between, strict=True)}


def reconstruct_blocks(
    prepared: Prepared,
    cuts: Mapping[int, Cut],
    config: DCViT,
    context: RunContext,
    *,
    refit: bool = True,
) -> tuple[nn.Module, dict[int, tuple[int, ...]], tuple[Reconstruction, ...]]:
    """Cut blocks of a copy of the teacher, front to back, each on what the ones before it give.

    Args:
        prepared: What all sizes share. Pruned blocks keep the nodes that their trials found most useful.
        cuts: What each block keeps.
        config: Its `recovery` must be a `ReconstructionConfig`.
        context: Its store keeps each block; its ranks pass a share of the views through the student each.
        refit: Learn from the held-out images too once they have judged; not if they are to judge again.

    Returns:
        The student, the hidden nodes kept in each block, and how each reconstruction went.
    """
    student = _Student(prepared, cuts, config.reconstruction, context, refit=refit)
    work = _work(cuts)
    done, total = 0, sum(work.values())
    kept, reports = {}, []
    # A stage of its own: what the first block takes says how long the others will.
    student.embed()
    context.progress("reconstruction", done, total, None)
    for block in sorted(cuts):
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
        cuts: Mapping[int, Cut],
        config: ReconstructionConfig,
        context: RunContext,
        *,
        refit: bool,
    ) -> None:
        self._prepared, self._cuts, self._config, self._context = prepared, cuts, config, context
        self._refit = refit
        # What changes, by the refinement too, which goes one block further, is the student's own.
        depth = compressible(prepared.teacher).num_blocks()
        self.model = copy_blocks(prepared.teacher, range(min(cuts), min(max(cuts) + 2, depth)))
        self._firsts, self._counts = context.ranks.batches(len(prepared.views.images), config.batch_size)
        self._at, self._tokens = 0, Stack()

    def embed(self) -> None:
        """Pass the views through the blocks in front of the first that is cut."""
        adapter, images = compressible(self._prepared.teacher), self._prepared.views.images
        progress, count = self._context.progress, len(self._firsts)

        def embedded() -> Iterator[Tensor]:
            for done, first in enumerate(self._firsts, 1):
                yield adapter.embed(images[first : first + self._config.batch_size])
                # Once the batch is through the blocks, and the next one is asked for.
                progress("blocks in front", done, count, None)

        progress("blocks in front", 0, count, None)
        self._pass(embedded(), min(self._cuts))

    def reconstruct(self, block: int) -> _ReconstructedBlock:
        """Cut a block and fit what is left of it, or take it from the store; in place, front to back."""
        if self._at < block:
            self._pass(self._tokens.split(self._config.batch_size), block)
        unit = self._context.store.unit(
            f"block-{block}",
            partial(self._reconstructed, block),
            partial(self._restore, block),
            check=partial(self._check, block),
            together=True,
        )
        return from_plain(_ReconstructedBlock, unit.values)

    @torch.no_grad()
    def _pass(self, batches: Iterable[Tensor], stop: int) -> None:
        view = compressible(self.model)
        self._tokens = Stack(view.run_blocks(batch, self._at, stop) for batch in batches)
        self._at = stop

    def _chosen(self, block: int) -> tuple[int, ...] | None:
        """The nodes that its trial chose for a pruned block, if it chose as many."""
        cut = self._cuts[block]
        order = self._prepared.prunable_orders[block] if cut.attention else ()
        return order[: cut.hidden_features] if 0 < cut.hidden_features <= len(order) else None

    @torch.no_grad()
    def _given(self, block: int, state: Tensor) -> Tensor:
        """What is fitted to the teacher's block gets these tokens `[B, N, D]`: the block's, or its MLP's."""
        view = compressible(self.model)
        state = view.prepare(state, block)
        if self._cuts[block].attention:
            halves = view.halves(block)
            assert halves is not None
            state = halves[0](state)
        return view.as_tokens(state)

    def _reconstructed(self, block: int) -> Unit:
        prepared, cut, config = self._prepared, self._cuts[block], self._config
        batches = (self._given(block, batch) for batch in self._tokens.split(config.batch_size))
        # The inputs of a convolution are many: a row of them is as long as ten of a ViT's.
        few = cut.attention and not compressible(self.model).pointwise_nodes
        given = prepared.views.rows_of_all(batches, self._firsts[0], few=few)
        given = self._context.ranks.gather(given if self._counts else given[:0])
        problem = BlockProblem(block, cut, prepared.states.rows(block, given, few=few), self._chosen(block))
        kept, report = reconstruct_block(
            self.model, problem, config, Descent(prepared.step_size, config.epochs),
            self._context.derived("reconstruction", block), refit=self._refit,
        )  # fmt: skip
        values = asdict(_ReconstructedBlock(kept, report))
        return Unit(values, compressible(self.model).block(block).state_dict())

    def _restore(self, block: int, unit: Unit) -> None:
        keep_attention = self._cuts[block].attention
        cut_block(self.model, block, unit.values["kept"], self._context.impl, keep_attention=keep_attention)
        compressible(self.model).block(block).load_state_dict(dict(unit.tensors))

    def _check(self, block: int, unit: Unit) -> None:
        found, cut = from_plain(_ReconstructedBlock, unit.values), self._cuts[block]
        found.report.require_of(block, self._config.epochs)
        require_nodes(found.kept, compressible(self.model).hidden_features(block))
        nodes = self._chosen(block)
        if len(found.kept) != cut.hidden_features or (nodes is not None and found.kept != tuple(sorted(nodes))):
            raise ValueError("it keeps other hidden nodes than it should")
        alike = copy_blocks(self.model, [block])
        cut_block(alike, block, found.kept, self._context.impl, keep_attention=cut.attention)
        require_alike(unit.tensors, compressible(alike).block(block).state_dict())


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
        chosen, cuts = _structure(prepared, planned, config)
        student, kept, reconstructions = reconstruct_blocks(prepared, cuts, config, context, refit=schedule.steps == 0)
    found = None
    if schedule.steps:
        with context.timer("refinement"):
            found = _refined(student, prepared, tuple(cuts), config.reconstruction, schedule, context)
    chosen = replace(chosen, blocks=tuple(cuts), kept_nodes={block: kept[block] for block in cuts})
    return Outcome(
        student, chosen, prepared.trials, prepared.step_size,
        pruning_trials=prepared.pruning_trials, reconstructions=reconstructions, refinement=found,
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
    wanted = prepared.states.output
    assert wanted is not None

    def refined() -> Unit:
        found = refine(student, prepared.views, wanted, blocks, config, schedule, context.derived("refinement"))
        return Unit(asdict(found), student.state_dict())

    def restore(unit: Unit) -> None:
        student.load_state_dict(dict(unit.tensors))

    def check(unit: Unit) -> None:
        from_plain(Refinement, unit.values).require_run(schedule.steps, schedule.step_sizes)
        require_alike(unit.tensors, student.state_dict())

    unit = context.store.unit("refinement", refined, restore, check=check, together=True)
    return from_plain(Refinement, unit.values)


def reconstructed(task: Task[DCViT], planned: Plan, proxy_set: ProxySet) -> Outcome:
    """Block reconstruction, to one size."""
    prepared = prepare(task.teacher, task.images, proxy_set, planned, task.config, task.context)
    return compress_prepared(prepared, planned, task.config, task.context)
