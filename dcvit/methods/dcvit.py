"""DC-ViT and beyond: attention and hidden nodes out of the blocks that recover best, so that any budget is met.

Source: Zhang, Zhou and Wang, "Dense Vision Transformer Compression with Few Samples" (CVPR 2024, arXiv 2403.18708).
Blocks are tried alone and ranked by how well they recover (`dcvit.ranking`) on images that the model itself synthesises
(`dcvit.synthesis`); the best are cut, and the student mimics the teacher's output tokens.

There are two procedures. With a `MimickingConfig` it is the published one: a formula says how many blocks are cut, and
they are cut one after another, with mimicking after each (`compress_blocks`). With a `ReconstructionConfig`, the
default, each cut block is fitted to what the teacher's adds (`reconstruct_blocks`), the structure is searched
(`dcvit.structure`), and mimicking refines the whole at the end. All that does not depend on the budget is then done
first (`prepare`), so that many sizes can share it (`dcvit.family`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from dcvit.config import CompressionConfig, MimickingConfig, ReconstructionConfig
from dcvit.distributed import ALONE, Ranks
from dcvit.images import FewShotImages
from dcvit.latency_planning import plan_latency, require_planned
from dcvit.methods.budgets import flat
from dcvit.methods.registry import Method, Outcome, Task, Timer, register
from dcvit.metric import Metric
from dcvit.models import adapter_for
from dcvit.planning import ADDITIVE, UNITS, Plan, search, search_space, searched
from dcvit.progress import Progress, silent
from dcvit.ranking import Trial, rank, rank_reconstructed
from dcvit.reconstruction import Reconstruction, TeacherStates, Views, draw_views, find_step_size, reconstruct_block
from dcvit.records import from_plain
from dcvit.recovery import Recovery, find_learning_rate, recover
from dcvit.refinement import REFINEMENT_HELD_OUT_EVERY, STEP_SIZES, Refinement, num_steps, refine
from dcvit.run_store import NOTHING_KEPT, Store, Unit, require_alike
from dcvit.seeding import derive_seed
from dcvit.stacks import Stack
from dcvit.structure import Cut, Recoverability, require_nodes
from dcvit.surgery import compress_block, copy_blocks, cut_block, draw_kept_nodes
from dcvit.synthesis import MetricSet, require_synthesized, synthesize
from dcvit.teacher import fuse

__all__ = [
    "DCVIT",
    "Prepared",
    "compress_blocks",
    "compress_prepared",
    "dcvit",
    "make_metric_set",
    "prepare",
    "reconstruct_blocks",
]

HELD_OUT_VIEWS = 50
"""Views of held-out images that the metric looks at."""


def dcvit(task: Task) -> Outcome:
    """DC-ViT: attention and a part of the MLP out of the blocks that recover best, so that any budget is met.

    Beyond it, a block may keep its attention and lose a part of its MLP alone, see `dcvit.structure`.

    Args:
        task: All of its config is read.
    """
    with task.timer("prepare"):
        planned = _planned(task)
        task = replace(task, teacher=fuse(task.teacher, task.config.impl))
    with task.timer("metric set"):
        metric_set = task.metric_set
        if metric_set is None:
            metric_set = make_metric_set(task.teacher, task.images, task.config, task.progress, task.store)
    if isinstance(task.config.recovery, MimickingConfig):
        outcome = _published(task, planned, metric_set)
    else:
        outcome = _reconstructed(task, planned, metric_set)
    return replace(outcome, metric_set=metric_set)


def _planned(task: Task) -> Plan:
    """The plan; one that was measured is kept, for it would come out otherwise the next time."""

    def found() -> Plan:
        return plan_latency(task.teacher, task.budget, task.config, stopwatch=task.stopwatch, progress=task.progress)

    if not task.budget.measured:
        return found()
    kept = task.store.unit(
        "plan",
        lambda: Unit(found().to_dict()),
        check=lambda unit: require_planned(Plan.from_dict(unit.values), task.teacher, task.budget, task.config),
    )
    return Plan.from_dict(kept.values)


DCVIT = register(
    Method(
        name="dcvit",
        title="attention and hidden nodes out of the blocks that recover best, to any budget",
        source="DC-ViT, arXiv 2403.18708",
        families=("vit", "eva", "swin", "cnn"),
        recovery=ReconstructionConfig,
        compress=dcvit,
        units=UNITS,
        resumable=True,
    )
)


def _published(task: Task, planned: Plan, metric_set: MetricSet) -> Outcome:
    """The published procedure: mimicking after each cut, in the trials and block by block."""
    teacher, images, progress, store, ranks = task.teacher, task.images, task.progress, task.store, task.ranks
    with task.timer("learning rate"):
        config = _resolve_learning_rate(teacher, images, planned, task.config, progress, store)
    with task.timer("ranking"):
        metric = Metric(teacher, [metric_set.images], config.metric, config.mimicking.at_once)
        ranking = rank(teacher, images, metric, planned, config, progress=progress, store=store, ranks=ranks)
        blocks = ranking.blocks[: planned.num_blocks]
        chosen_plan = replace(planned, blocks=blocks, kept_nodes={b: ranking.kept_nodes[b] for b in blocks})
    with task.timer("compression"):
        first = ranking.trials[0].recovery
        assert first is not None
        student, steps = compress_blocks(
            teacher, ranking.student, images, chosen_plan, config,
            first=first, progress=progress, store=store, ranks=ranks,
        )  # fmt: skip
    return Outcome(student, chosen_plan, ranking.trials, steps[-1].learning_rate, steps=steps)


def _reconstructed(task: Task, planned: Plan, metric_set: MetricSet) -> Outcome:
    """Block reconstruction, to one size."""
    config, timer, progress, store, ranks = task.config, task.timer, task.progress, task.store, task.ranks
    prepared = prepare(task.teacher, task.images, metric_set, planned, config, timer, progress, store, ranks)
    return compress_prepared(prepared, planned, config, timer, progress=progress, store=store, ranks=ranks)


def _resolve_learning_rate(
    teacher: nn.Module,
    images: FewShotImages,
    chosen_plan: Plan,
    config: CompressionConfig,
    progress: Progress,
    store: Store,
) -> CompressionConfig:
    """The config with a number for `learning_rate="auto"`, found on the middle candidate."""

    def find() -> float:
        block = chosen_plan.candidates[len(chosen_plan.candidates) // 2]
        kept = draw_kept_nodes(teacher, block, chosen_plan.hidden_features, config.seed)
        return find_learning_rate(
            compress_block(teacher, block, kept, config.impl), teacher, images, [block], config.mimicking,
            seed=derive_seed(config.seed, "learning rate"), impl=config.impl, progress=progress,
        )  # fmt: skip

    check = partial(_require_one_of, config.mimicking.learning_rates)
    kept_rate = partial(store.unit, "learning-rate", lambda: Unit(find()), check=check)
    return replace(config, recovery=config.mimicking.with_learning_rate(lambda: kept_rate().values))


def compress_blocks(
    teacher: nn.Module,
    first_student: nn.Module,
    images: FewShotImages,
    chosen_plan: Plan,
    config: CompressionConfig,
    *,
    first: Recovery,
    progress: Progress = silent,
    store: Store = NOTHING_KEPT,
    ranks: Ranks = ALONE,
) -> tuple[nn.Module, tuple[Recovery, ...]]:
    """Step 5: compress the chosen blocks one after another, recovering after each.

    Args:
        teacher: The original, frozen.
        first_student: The recovered student of the best trial, in which the first block is compressed already.
        images: The few-shot set.
        chosen_plan: With `blocks` and `kept_nodes` filled in.
        config: Its `recovery.learning_rate` must be a number. With `progressive=False` all blocks are compressed at
            once and recovered for as many epochs as the steps would have taken together.
        first: The recovery of the best trial.
        progress: Told after each epoch.
        store: Keeps each step.
        ranks: The processes that share the work.

    Returns:
        The student, and the recovery of each step.
    """
    blocks, kept, recovery = chosen_plan.blocks, chosen_plan.kept_nodes, config.mimicking
    if config.progressive:
        student, steps = first_student, [first]
        schedule = [blocks[: count + 1] for count in range(1, len(blocks))]
    else:
        student, steps = teacher, []
        schedule = [blocks]
        recovery = replace(recovery, epochs=recovery.epochs * len(blocks))
    done = len(steps)

    def restore(student: nn.Module, unit: Unit) -> None:
        student.load_state_dict(dict(unit.tensors))

    for cut in schedule:
        new = cut[done:]
        for block in new:
            student = compress_block(student, block, kept[block], config.impl)
        done = len(cut)

        def recovered(student: nn.Module, cut: tuple[int, ...], done: int) -> Unit:
            step = recover(
                student, teacher, images, cut, recovery,
                seed=derive_seed(config.seed, "step", done), impl=config.impl, ranks=ranks, progress=progress,
                stage=f"compression, block {done} of {len(blocks)}",
            )  # fmt: skip
            return Unit(asdict(step), student.state_dict())

        def check(student: nn.Module, unit: Unit) -> None:
            from_plain(Recovery, unit.values).require_run(recovery)
            require_alike(unit.tensors, student.state_dict())

        work = partial(recovered, student, cut, done)
        unit = store.unit(f"step-{done}", work, partial(restore, student), check=partial(check, student), together=True)
        steps.append(from_plain(Recovery, unit.values))
    return student, tuple(steps)


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


def prepare(
    teacher: nn.Module,
    images: FewShotImages,
    metric_set: MetricSet,
    planned: Plan,
    config: CompressionConfig,
    timer: Timer,
    progress: Progress = silent,
    store: Store = NOTHING_KEPT,
    ranks: Ranks = ALONE,
) -> Prepared:
    """Draw views, pass them through the teacher, try each candidate block, and find the step size.

    Args:
        teacher: The original, frozen.
        images: The few-shot set.
        metric_set: Images to rank blocks on.
        planned: Says which blocks are candidates, and about how many hidden nodes they will keep.
        config: Its `recovery` must be a `ReconstructionConfig`.
        timer: Takes the time of the stages.
        progress: Told after each trial.
        store: Keeps the trials.
        ranks: The processes that share the work.
    """
    recovery, adapter = config.reconstruction, adapter_for(teacher)
    steps = num_steps(teacher, recovery)
    space, searches = search_space(teacher, config), _searches(planned, config)
    prunable = flat(space.prunable) if searches else ()
    with timer("views"):
        if steps:
            views = draw_views(
                teacher, images, recovery, config.seed,
                num_views=recovery.refinement_views, held_out_every=REFINEMENT_HELD_OUT_EVERY,
            )  # fmt: skip
        else:
            views = draw_views(teacher, images, recovery, config.seed)
        steps = steps if bool(views.held_out.any()) else 0
        states = TeacherStates(
            teacher,
            views,
            recovery.batch_size,
            prunable=prunable,
            keep_output=steps > 0,
            ranks=ranks,
            progress=progress,
        )
        image_sets = [metric_set.images]
        if config.metric == "mimicking" and bool(views.held_out.any()):
            image_sets.append(views.images[views.held_out.nonzero().flatten()[:HELD_OUT_VIEWS]])
        metric = Metric(teacher, image_sets, config.metric, recovery.batch_size)
    with timer("ranking"):
        cuts = {}
        for block in planned.candidates:
            hidden = adapter.hidden_features(teacher, block)
            tried = round((1 - planned.drop_ratio) * hidden)
            if searches:  # in the middle of what the search may choose
                tried = min(max(tried, hidden // 8), hidden // 2)
            cuts[block] = Cut(tried)
        trials, orders = rank_reconstructed(teacher, states, metric, cuts, config, progress=progress, store=store)
        pruned = {
            block: Cut(max(3 * adapter.hidden_features(teacher, block) // 8, 1), attention=True) for block in prunable
        }
        pruning_trials, prunable_orders = rank_reconstructed(
            teacher, states, metric, pruned, config, progress=progress, stage="pruning trials", store=store
        )
    with timer("step size"):
        step_size = 0.0
        if recovery.epochs and bool(views.held_out.any()):  # which judge
            find = partial(_step_size, teacher, states, cuts, trials, orders, config, progress)
            check = partial(_require_one_of, recovery.step_sizes)
            step_size = store.unit("step-size", lambda: Unit(find()), check=check).values
    return Prepared(teacher, views, states, trials, pruning_trials, prunable_orders, step_size, steps)


def _require_one_of(candidates: Sequence[float], unit: Unit) -> None:
    """Refuse a unit that holds none of the numbers among which one was sought.

    Raises:
        TypeError, ValueError: If that is so.
    """
    if from_plain(float, unit.values) not in candidates:
        raise ValueError(f"it holds {unit.values!r}: expected one of {', '.join(map(str, candidates))}")


def _step_size(
    teacher: nn.Module,
    states: TeacherStates,
    cuts: Mapping[int, Cut],
    trials: Sequence[Trial],
    orders: Mapping[int, tuple[int, ...]],
    config: CompressionConfig,
    progress: Progress,
) -> float:
    """The step size of reconstruction, found on the candidate of median metric loss."""
    block = trials[len(trials) // 2].block
    return find_step_size(
        teacher, block, cuts[block], states.rows(block).thinned(), config.reconstruction,
        kept=orders[block][: cuts[block].hidden_features], seed=derive_seed(config.seed, "step size"),
        impl=config.impl, progress=progress,
    )  # fmt: skip


def compress_prepared(
    prepared: Prepared,
    planned: Plan,
    config: CompressionConfig,
    timer: Timer,
    *,
    refinement_steps: int | None = None,
    refinement_step_sizes: Sequence[float] = STEP_SIZES,
    progress: Progress = silent,
    store: Store = NOTHING_KEPT,
    ranks: Ranks = ALONE,
) -> Outcome:
    """One size: choose its structure, reconstruct its blocks, and let it mimic.

    Args:
        prepared: What all sizes share.
        planned: The fewest blocks that meet the budget.
        config: What `prepare` was given.
        timer: Takes the time of the stages.
        refinement_steps: Steps of the mimicking, where they are not `prepared`'s.
        refinement_step_sizes: Their candidates of the step size.
        progress: Told how it goes.
        store: Keeps each block, and the refined student.
        ranks: The processes that share the work.
    """
    steps = prepared.refinement_steps if refinement_steps is None else refinement_steps
    with timer("compression"):
        chosen, cuts = _structure(prepared, planned, config)
        blocks = tuple(cuts)
        student, kept, reconstructions = reconstruct_blocks(
            prepared.teacher, prepared.views, prepared.states, cuts, config, prepared.step_size,
            prunable_orders=prepared.prunable_orders, refit=steps == 0, progress=progress, store=store,
            ranks=ranks,
        )  # fmt: skip
    refinement = None
    if steps:
        with timer("refinement"):
            wanted = prepared.states.output
            assert wanted is not None

            def refined() -> Unit:
                found = refine(
                    student, prepared.views, wanted, blocks, config.reconstruction, steps,
                    step_sizes=refinement_step_sizes, seed=derive_seed(config.seed, "refinement"), impl=config.impl,
                    ranks=ranks, progress=progress,
                )  # fmt: skip
                return Unit(asdict(found), student.state_dict())

            def restore(unit: Unit) -> None:
                student.load_state_dict(dict(unit.tensors))

            def check(unit: Unit) -> None:
                from_plain(Refinement, unit.values).require_run(steps, refinement_step_sizes)
                require_alike(unit.tensors, student.state_dict())

            found = store.unit("refinement", refined, restore, check=check, together=True)
            refinement = from_plain(Refinement, found.values)
    chosen = replace(chosen, blocks=blocks, kept_nodes={block: kept[block] for block in blocks})
    return Outcome(
        student, chosen, prepared.trials, prepared.step_size,
        pruning_trials=prepared.pruning_trials, reconstructions=reconstructions, refinement=refinement,
    )  # fmt: skip


def _searches(planned: Plan, config: CompressionConfig) -> bool:
    """Whether the structure is searched: only costs that add up can be."""
    return searched(config) and planned.budget.unit in ADDITIVE


def _structure(prepared: Prepared, planned: Plan, config: CompressionConfig) -> tuple[Plan, dict[int, Cut]]:
    """The plan that is followed, and what each block that is cut keeps, best first."""
    compressed, pruned = (
        {t.block: t.recoverability for t in trials if t.recoverability is not None}
        for trials in (prepared.trials, prepared.pruning_trials)
    )
    closed_form = len(compressed) == len(prepared.trials)
    if not closed_form and not search_space(prepared.teacher, config).equal:
        # Then a block is presumed to lose twice as much without any hidden node as with all.
        for trial in prepared.trials:
            hidden = adapter_for(prepared.teacher).hidden_features(prepared.teacher, trial.block)
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


def reconstruct_blocks(
    teacher: nn.Module,
    views: Views,
    states: TeacherStates,
    cuts: Mapping[int, Cut],
    config: CompressionConfig,
    step_size: float,
    *,
    prunable_orders: Mapping[int, tuple[int, ...]],
    refit: bool = True,
    progress: Progress = silent,
    store: Store = NOTHING_KEPT,
    ranks: Ranks = ALONE,
) -> tuple[nn.Module, dict[int, tuple[int, ...]], tuple[Reconstruction, ...]]:
    """Cut blocks of a copy of the teacher, front to back, each on what the ones before it give.

    Args:
        teacher: The original, frozen.
        views: The images that blocks are reconstructed on.
        states: The teacher's tokens for them.
        cuts: What each block keeps.
        config: Its `recovery` must be a `ReconstructionConfig`.
        step_size: Of the gradient steps.
        prunable_orders: See `Prepared`: pruned blocks keep the nodes that their trials found most useful.
        refit: Learn from the held-out images too once they have judged; not if they are to judge again.
        progress: Told after each block.
        store: Keeps each block.
        ranks: The processes that share the work: each passes its share of the views through the student.

    Returns:
        The student, the hidden nodes kept in each block, and how each reconstruction went.
    """
    recovery, adapter = config.reconstruction, adapter_for(teacher)
    at_once, blocks = recovery.batch_size, sorted(cuts)
    # What changes, by the refinement too, which goes one block further, is the student's own.
    student = copy_blocks(teacher, range(blocks[0], min(blocks[-1] + 2, adapter.num_blocks(teacher))))
    firsts, counts = ranks.batches(len(views.images), at_once)
    at, kept, reports = 0, {}, []

    def chosen(block: int, cut: Cut) -> tuple[int, ...] | None:
        """The nodes that its trial chose for a pruned block, if it chose as many."""
        order = prunable_orders[block] if cut.attention else ()
        return order[: cut.hidden_features] if 0 < cut.hidden_features <= len(order) else None

    def reconstructed(block: int, cut: Cut, tokens: Stack) -> Unit:
        batches = (_given(student, batch, block, cut) for batch in tokens.split(at_once))
        # The inputs of a convolution are many: a row of them is as long as ten of a ViT's.
        few = cut.attention and not adapter.pointwise_nodes
        given = views.rows_of_all(batches, firsts[0], few=few)
        rows = states.rows(block, ranks.gather(given if counts else given[:0]), few=few)
        nodes, report = reconstruct_block(
            student, block, cut, rows, recovery,
            kept=chosen(block, cut), step_size=step_size, epochs=recovery.epochs, refit=refit,
            seed=derive_seed(config.seed, "reconstruction", block), impl=config.impl, ranks=ranks,
        )  # fmt: skip
        values = asdict(_ReconstructedBlock(nodes, report))
        return Unit(values, adapter.block(student, block).state_dict())

    def check(block: int, cut: Cut, unit: Unit) -> None:
        found = from_plain(_ReconstructedBlock, unit.values)
        found.report.require_of(block, recovery.epochs)
        require_nodes(found.kept, adapter.hidden_features(student, block))
        nodes = chosen(block, cut)
        if len(found.kept) != cut.hidden_features or (nodes is not None and found.kept != tuple(sorted(nodes))):
            raise ValueError("it keeps other hidden nodes than it should")
        alike = copy_blocks(student, [block])
        cut_block(alike, block, cut, found.kept, config.impl)
        require_alike(unit.tensors, adapter.block(alike, block).state_dict())

    def restore(block: int, cut: Cut, unit: Unit) -> None:
        cut_block(student, block, cut, unit.values["kept"], config.impl)
        adapter.block(student, block).load_state_dict(dict(unit.tensors))

    def passed(batches: Iterable[Tensor], stop: int) -> Stack:
        with torch.no_grad():
            return Stack(adapter.run_blocks(student, batch, at, stop) for batch in batches)

    def embedded() -> Iterator[Tensor]:
        for done, first in enumerate(firsts, 1):
            yield adapter.embed(teacher, views.images[first : first + at_once])
            # Once the batch is through the blocks, and the next one is asked for.
            progress("blocks in front", done, len(firsts), None)

    # A stage of its own: what the first block takes says how long the others will.
    progress("blocks in front", 0, len(firsts), None)
    tokens, at = passed(embedded(), blocks[0]), blocks[0]
    work = _work(cuts)
    done, total = 0, sum(work.values())
    progress("reconstruction", done, total, None)
    for block in blocks:
        if at < block:
            tokens, at = passed(tokens.split(at_once), block), block
        cut = cuts[block]
        unit = store.unit(
            f"block-{block}",
            partial(reconstructed, block, cut, tokens),
            partial(restore, block, cut),
            check=partial(check, block, cut),
            together=True,
        )
        found = from_plain(_ReconstructedBlock, unit.values)
        kept[block] = found.kept
        reports.append(found.report)
        done += work[block]
        progress("reconstruction", done, total, reports[-1].error_after)
    return student, kept, tuple(reports)


def _work(cuts: Mapping[int, Cut]) -> dict[int, int]:
    """About how long each cut takes, for the progress: 2 for a pruned block, 4 for one that loses its attention.

    And 1 for each whole block between it and the cut in front, which its views are passed through. So measured on
    ViT-B/16, where a pruned block took 18 to 39 s, another 51 to 84 s, and passing a whole one 12 to 17 s.
    """
    blocks = sorted(cuts)
    between = [0, *(after - before - 1 for before, after in pairwise(blocks))]
    return {block: (2 if cuts[block].attention else 4) + whole for block, whole in zip(blocks, between, strict=True)}


@torch.no_grad()
def _given(student: nn.Module, state: Tensor, block: int, cut: Cut) -> Tensor:
    """What is fitted to the teacher's block gets these tokens `[B, N, D]`: the block's, or its MLP's."""
    adapter = adapter_for(student)
    state = adapter.prepare(student, state, block)
    if cut.attention:
        halves = adapter.halves(student, block)
        assert halves is not None
        state = halves[0](state)
    return adapter.as_tokens(state)


def make_metric_set(
    teacher: nn.Module,
    images: FewShotImages,
    config: CompressionConfig,
    progress: Progress,
    store: Store = NOTHING_KEPT,
) -> MetricSet:
    """What blocks are ranked on, as `config.metric_set` names it; synthesised images are kept in the store."""
    if config.metric_set == "images":
        return MetricSet(images.normalised)

    def synthesized() -> Unit:
        made = synthesize(teacher, config.synthesis, seed=config.seed, impl=config.impl, progress=progress)
        assert made.targets is not None
        values = asdict(_Losses(made.loss, made.losses))
        return Unit(values, {"images": made.images, "targets": made.targets})

    def restored(unit: Unit) -> MetricSet:
        losses = from_plain(_Losses, unit.values)
        return MetricSet(unit.tensors["images"], unit.tensors["targets"], losses.loss, losses.losses)

    def check(unit: Unit) -> None:
        if unit.tensors.keys() != {"images", "targets"}:
            raise ValueError("its tensors are others than they should be")
        require_synthesized(restored(unit), teacher, config.synthesis)

    return restored(store.unit("metric-set", synthesized, check=check)).to(images.normalised.device)


@dataclass(frozen=True)
class _Losses:
    """The values of the unit of a metric set, see `MetricSet`."""

    loss: float
    losses: tuple[float, ...]
