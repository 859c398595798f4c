"""The whole method: plan, try and rank, then compress block by block (DC-ViT, arXiv 2403.18708)."""

import copy
import gc
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcvit.config import CompressionConfig, MimickingConfig, ReconstructionConfig
from dcvit.costs import file_size
from dcvit.distributed import ALONE, Ranks, on_devices
from dcvit.errors import DcvitError, MemoryWarning, NonFiniteError
from dcvit.evaluation import closeness
from dcvit.images import FewShotImages, Images, load_images
from dcvit.latency import Stopwatch, example_images, measure_latency, time_forward
from dcvit.latency_planning import plan_latency
from dcvit.memory import trace_activation_memory
from dcvit.methods import METHODS, Method, Outcome, Task, Timer, register
from dcvit.methods import method as find_method
from dcvit.methods.budgets import flat
from dcvit.metric import Metric
from dcvit.models import adapter_for, hub_repository, load_model, require_supported
from dcvit.ops import Impl
from dcvit.planning import ADDITIVE, UNITS, Budget, Plan, search, search_space, searched
from dcvit.progress import Progress, silent
from dcvit.ranking import Trial, rank, rank_reconstructed
from dcvit.reconstruction import (
    Reconstruction,
    TeacherStates,
    Views,
    draw_views,
    find_step_size,
    reconstruct_block,
)
from dcvit.records import from_plain
from dcvit.recovery import Recovery, find_learning_rate, recover
from dcvit.refinement import HELD_OUT_EVERY, STEP_SIZES, Refinement, num_steps, refine
from dcvit.results import BlockShape, CompressionResult, ModelFigures, Report, versions
from dcvit.run_store import NOTHING_KEPT, MemoryStore, Store, Unit, digest_images, digest_model, open_run
from dcvit.seeding import derive_seed
from dcvit.stacks import Stack
from dcvit.structure import Cut, Recoverability
from dcvit.surgery import choose_impl, compress_block, copy_blocks, cut_block, draw_kept_nodes
from dcvit.synthesis import MetricSet, synthesize

__all__ = [
    "DCVIT",
    "compress",
    "compress_blocks",
    "dense",
    "freeze",
    "fuse",
    "open_store",
    "reconstruct_blocks",
    "require_finite",
]

FINITE_IMAGES = 8
"""So many images are passed through a model to see whether its values stay finite."""

PASS_SECONDS = 0.25
"""What a pass may take that is timed for the report, whose latency is a rough figure."""

HELD_OUT_VIEWS = 50
"""Views of held-out images that the metric looks at."""


def compress(
    model: str | nn.Module,
    images: Images | FewShotImages,
    budget: Budget,
    config: CompressionConfig | None = None,
    *,
    method: str = "dcvit",
    metric_set: MetricSet | None = None,
    run_dir: str | Path | None = None,
    ranks: Ranks = ALONE,
    devices: Sequence[str] = (),
    progress: Progress = silent,
    stopwatch: Stopwatch = time_forward,
) -> CompressionResult:
    """Make a model smaller and faster from a few unlabelled images.

    Args:
        model: A timm model, or a name that `timm.create_model` takes (its pretrained weights are loaded). Unchanged.
        images: The few-shot set, see `dcvit.images.load_images`. Labels are never read.
        budget: What the result may cost, `Budget(macs=0.75)` for example.
        config: Every knob; `CompressionConfig.paper()` holds the published settings. The method's own if not given.
        method: One of `dcvit.methods.METHODS`.
        metric_set: Images to rank blocks on, in place of what `config.metric_set` names.
        run_dir: A folder for finished work, see `dcvit.run_store`: the same call with the same folder goes on where an
            earlier one was stopped, and ends with the same weights. It can be deleted in the end.
        ranks: The processes that share the work, see `dcvit.distributed`: each calls this with the same arguments.
        devices: Start such processes on this machine, one for each, and share the work over them:
            `["cuda:0", "cuda:1"]` or `["cpu"] * 2`. A script must then guard what it does by
            `if __name__ == "__main__"`, and `progress` must be picklable.
        progress: Told how it goes, see `dcvit.progress`.
        stopwatch: Times one pass, for a latency budget and for the report.

    Returns:
        The compressed model, the plan that it follows, and a report.

    Raises:
        DcvitError: If there is no such method, or it does not read what it is given.
        DistributedError: If a rank is given something else than the first.
        UnsupportedModelError: If the model cannot be compressed, or not by that method.
        ImagesError: If the images do not fit the model.
        BudgetError: If the budget cannot be met, or is of what that method does not save.
        NonFiniteError: If a weight is NaN or infinite, or a block of the original makes such values of the images.
        RunStoreError: If `run_dir` is in use, or holds something else, or a run of other settings, model or images; and
            later, if it cannot be written.
        All of them before any long work.
    """
    chosen = find_method(method)
    chosen.require_unit(budget)
    config = config or chosen.config()
    if run_dir is not None and not chosen.resumable:
        raise DcvitError(
            f"run_dir with method={method!r}: only {_resumable()} goes on where it was stopped; leave it out."
        )
    if metric_set is not None and method != DCVIT.name:
        raise DcvitError(f"metric_set with method={method!r}: only {DCVIT.name} ranks on one, leave it out.")
    if ranks.size > 1 or len(devices) > 1:
        _require_shareable(chosen, config, ranks, devices)
    if len(devices) > 1:
        arguments = {"method": method, "metric_set": metric_set, "run_dir": run_dir, "stopwatch": stopwatch}
        result = on_devices(devices, partial(_as_rank, model, images, budget, config, arguments, progress))
        assert result is not None  # the first process gives it
        return result
    timer = Timer()
    with timer("prepare"):
        original = freeze(load_model(model))
        if devices:
            original, images = original.to(devices[0]), _moved(images, devices[0])
        chosen.require_family(original)
        few_shot = load_images(images, original)
        require_finite(original, few_shot)
    with open_store(run_dir, original, few_shot, metric_set, config, ranks, budget=budget.to_dict()) as store:
        if run_dir is None and ranks.size == 1:
            store = MemoryStore()  # what is finished is not done again if memory runs out
        task = Task(original, few_shot, budget, config, timer, progress, stopwatch, metric_set, store, ranks)

        def completed(task: Task) -> CompressionResult:
            outcome = chosen.compress(task)
            return finish(
                model, original, few_shot, outcome.metric_set, outcome, task.config, timer, stopwatch,
                method=method, ranks=ranks,
            )  # fmt: skip

        return _within_memory(completed, task)


def _within_memory(work: Callable[[Task], CompressionResult], task: Task) -> CompressionResult:
    """What a task comes to, with fewer images at once where the device's memory does not suffice.

    Raises:
        DcvitError: If it does not suffice for one image, or for one of several ranks.
    """
    while True:
        try:
            return work(task)
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            halved = task.config.halved()
        # Outside of the handler, whose traceback holds on to tensors.
        if halved is None or task.ranks.size > 1:
            raise DcvitError(
                f"The device ran out of memory ({reason}). "
                + (f"It was rank {task.ranks.rank}'s; " if task.ranks.size > 1 else "One image is too much; ")
                + "set batch_size and micro_batch lower, take fewer views and rows, or compress on the CPU."
            )
        gc.collect()
        torch.cuda.empty_cache()
        warnings.warn(
            f"The device ran out of memory ({reason}): going on with {halved.at_once} images at once.",
            MemoryWarning,
            stacklevel=3,
        )
        task = replace(task, config=halved)


def _require_shareable(method: Method, config: CompressionConfig, ranks: Ranks, devices: Sequence[str]) -> None:
    """Refuse what several processes cannot do.

    Raises:
        DcvitError: If that is so.
    """
    if ranks.size > 1 and devices:
        raise DcvitError(
            f"devices={list(devices)} with {ranks.size} ranks: each rank has a device; leave one of them out."
        )
    if not method.resumable:
        raise DcvitError(
            f"method={method.name!r} on several devices: only {_resumable()} shares its work; name one device."
        )
    if isinstance(config.recovery, MimickingConfig) and config.recovery.halving:
        raise DcvitError("halving=True on several devices: no one process sees all trials; leave one of them out.")


def _resumable() -> str:
    """The methods that are, by name."""
    return ", ".join(name for name, method in METHODS.items() if method.resumable)


def _as_rank(
    model: str | nn.Module,
    images: Images | FewShotImages,
    budget: Budget,
    config: CompressionConfig,
    arguments: Mapping[str, Any],
    progress: Progress,
    ranks: Ranks,
    device: str,
) -> CompressionResult | None:
    """`compress` in a process that `on_devices` started; what the first found."""
    original = copy.deepcopy(load_model(model)).to(device)
    result = compress(
        original, _moved(images, device), budget, config,
        ranks=ranks, progress=progress if ranks.leads else silent, **arguments,
    )  # fmt: skip
    if not ranks.leads:
        return None
    report, made = result.report, result.metric_set
    if isinstance(model, str):
        report = replace(report, model=model, base_model=hub_repository(model))
    if made is not None:
        made = replace(made, images=made.images.cpu(), targets=None if made.targets is None else made.targets.cpu())
    return replace(result, model=result.model.cpu(), report=report, metric_set=made)


def _moved(images: Images | FewShotImages, device: str) -> Images | FewShotImages:
    """Images on a device, where they are tensors; others follow the model."""
    return images.to(device) if isinstance(images, Tensor | FewShotImages) else images


def open_store(
    run_dir: str | Path | None,
    model: nn.Module,
    images: FewShotImages,
    metric_set: MetricSet | None,
    config: CompressionConfig,
    ranks: Ranks = ALONE,
    **asked: Any,
) -> AbstractContextManager[Store]:
    """The store of a run (`dcvit.run_store.open_run`), opened with all that its result depends on.

    Args:
        run_dir: Its folder; `None` keeps nothing.
        model: The original.
        images: The few-shot set.
        metric_set: The caller's, if there is one.
        config: Every knob.
        ranks: The processes that share the work.
        **asked: What is asked for, as plain values: a budget, or several.

    Raises:
        RunStoreError: As `open_run` does.
        DistributedError: As `Ranks.store` does.
    """
    if run_dir is None and ranks.size == 1:
        return open_run(None, {})
    fingerprint = {
        **asked,
        "settings": config.to_dict(),
        "model": digest_model(model),
        "images": digest_images(images.normalised),
        "metric_set": None if metric_set is None else digest_images(metric_set.images),
        "device": images.normalised.device.type,
        "versions": {name: version for name, version in versions().items() if name in ("dcvit", "torch")},
    }
    return ranks.store(run_dir, fingerprint)


def dense(task: Task) -> Outcome:
    """DC-ViT: attention and a part of the MLP out of the blocks that recover best, so that any budget is met.

    Beyond it, a block may keep its attention and lose a part of its MLP alone, see `dcvit.structure`.

    Args:
        task: All of its config is read.
    """
    config, timer, progress = task.config, task.timer, task.progress
    with timer("prepare"):
        planned = _planned(task)
        teacher = fuse(task.teacher, config.impl)
    with timer("metric set"):
        metric_set = task.metric_set
        if metric_set is None:
            metric_set = make_metric_set(teacher, task.images, config, progress, task.store)
    if isinstance(config.recovery, MimickingConfig):
        outcome = _published(teacher, task.images, metric_set, planned, config, timer, progress, task.store, task.ranks)
    else:
        prepared = prepare(teacher, task.images, metric_set, planned, config, timer, progress, task.store, task.ranks)
        outcome = compress_prepared(
            prepared, planned, config, timer, progress=progress, store=task.store, ranks=task.ranks
        )
    return replace(outcome, metric_set=metric_set)


def _planned(task: Task) -> Plan:
    """The plan; one that was measured is kept, for it would come out otherwise the next time."""

    def found() -> Plan:
        return plan_latency(task.teacher, task.budget, task.config, stopwatch=task.stopwatch, progress=task.progress)

    if not task.budget.measured:
        return found()
    return Plan.from_dict(task.store.unit("plan", lambda: Unit(found().to_dict())).values)


DCVIT = register(
    Method(
        name="dcvit",
        title="attention and hidden nodes out of the blocks that recover best, to any budget",
        source="DC-ViT, arXiv 2403.18708",
        families=("vit", "swin", "cnn"),
        recovery=ReconstructionConfig,
        compress=dense,
        units=UNITS,
        resumable=True,
    )
)


def _published(
    teacher: nn.Module,
    images: FewShotImages,
    metric_set: MetricSet,
    planned: Plan,
    config: CompressionConfig,
    timer: Timer,
    progress: Progress,
    store: Store,
    ranks: Ranks,
) -> Outcome:
    """The published procedure: mimicking after each cut, in the trials and block by block."""
    with timer("learning rate"):
        config = _resolve_learning_rate(teacher, images, planned, config, progress, store)
    with timer("ranking"):
        metric = Metric(teacher, [metric_set.images], config.metric, config.mimicking.at_once)
        ranking = rank(teacher, images, metric, planned, config, progress=progress, store=store, ranks=ranks)
        blocks = ranking.blocks[: planned.num_blocks]
        chosen_plan = replace(planned, blocks=blocks, kept_nodes={b: ranking.kept_nodes[b] for b in blocks})
    with timer("compression"):
        first = ranking.trials[0].recovery
        assert first is not None
        student, steps = compress_blocks(
            teacher, ranking.student, images, chosen_plan, config,
            first=first, progress=progress, store=store, ranks=ranks,
        )  # fmt: skip
    return Outcome(student, chosen_plan, ranking.trials, steps[-1].learning_rate, steps=steps)


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
                num_views=recovery.refinement_views, held_out_every=HELD_OUT_EVERY,
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
        if recovery.epochs:
            find = partial(_step_size, teacher, states, cuts, trials, orders, config, progress)
            step_size = store.unit("step-size", lambda: Unit(find())).values
    return Prepared(teacher, views, states, trials, pruning_trials, prunable_orders, step_size, steps)


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

            found = store.unit(
                "refinement", refined, lambda unit: student.load_state_dict(dict(unit.tensors)), together=True
            )
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
    at_once = recovery.batch_size
    # What changes, by the refinement too, which goes one block further, is the student's own.
    student = copy_blocks(teacher, range(min(cuts), min(max(cuts) + 2, adapter.num_blocks(teacher))))
    firsts, counts = ranks.batches(len(views.images), at_once)
    at, kept, reports = 0, {}, []

    def reconstructed(block: int, cut: Cut, tokens: Stack) -> Unit:
        batches = (_given(student, batch, block, cut) for batch in tokens.split(at_once))
        # The inputs of a convolution are many: a row of them is as long as ten of a ViT's.
        few = cut.attention and not adapter.pointwise_nodes
        given = views.rows_of_all(batches, firsts[0], few=few)
        rows = states.rows(block, ranks.gather(given if counts else given[:0]), few=few)
        order, count = prunable_orders[block] if cut.attention else (), cut.hidden_features
        nodes, report = reconstruct_block(
            student, block, cut, rows, recovery,
            kept=order[:count] if 0 < count <= len(order) else None,
            step_size=step_size, epochs=recovery.epochs, refit=refit,
            seed=derive_seed(config.seed, "reconstruction", block), impl=config.impl, ranks=ranks,
        )  # fmt: skip
        return Unit({"kept": nodes, "report": asdict(report)}, adapter.block(student, block).state_dict())

    def restore(block: int, cut: Cut, unit: Unit) -> None:
        cut_block(student, block, cut, unit.values["kept"], config.impl)
        adapter.block(student, block).load_state_dict(dict(unit.tensors))

    def passed(batches: Iterable[Tensor], stop: int) -> Stack:
        with torch.no_grad():
            return Stack(adapter.run_blocks(student, batch, at, stop) for batch in batches)

    progress("reconstruction", 0, len(cuts), None)
    tokens = passed((adapter.embed(teacher, views.images[i : i + at_once]) for i in firsts), 0)
    for done, block in enumerate(sorted(cuts), 1):
        tokens = passed(tokens.split(at_once), block)
        at, cut = block, cuts[block]
        work = partial(reconstructed, block, cut, tokens)
        unit = store.unit(f"block-{block}", work, partial(restore, block, cut), together=True)
        kept[block] = tuple(unit.values["kept"])
        reports.append(from_plain(Reconstruction, unit.values["report"]))
        progress("reconstruction", done, len(cuts), reports[-1].error_after)
    return student, kept, tuple(reports)


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

        work = partial(recovered, student, cut, done)
        unit = store.unit(f"step-{done}", work, partial(restore, student), together=True)
        steps.append(from_plain(Recovery, unit.values))
    return student, tuple(steps)


def freeze(model: nn.Module) -> nn.Module:
    """A copy of a model as teacher: evaluation mode, no gradients, nothing shared with the caller's.

    Raises:
        UnsupportedModelError: If the model cannot be compressed.
    """
    require_supported(model)
    return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def require_finite(model: nn.Module, images: FewShotImages) -> None:
    """Refuse a model that has, or makes of images, values that are NaN or infinite.

    Raises:
        NonFiniteError: Naming the weight, or the first block after which they appear.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            raise NonFiniteError(
                f"{bad:,} of {tensor.numel():,} values of {name} are NaN or infinite: load the model's weights again."
            )
    adapter = adapter_for(model)
    state, where = adapter.embed(model, images.normalised[:FINITE_IMAGES]), "what precedes block 0"
    for block in range(adapter.num_blocks(model)):
        if not bool(state.isfinite().all()):
            break
        state, where = adapter.run_blocks(model, state, block, block + 1), f"block {block}"
    if not bool(state.isfinite().all()):
        raise NonFiniteError(
            f"Of the first {min(len(images), FINITE_IMAGES)} images {where} makes values that are NaN or infinite: "
            "check how images are normalised, and that the weights are not of a lower precision."
        )


def fuse(teacher: nn.Module, impl: Impl) -> nn.Module:
    """The teacher with its blocks' MLPs computed by `dcvit.ops`; students cut from it inherit that.

    On a GPU, where it is not yet measured what the ops gain, and with `impl="eager"` it is the teacher itself.
    """
    if impl == "eager" or next(teacher.parameters()).device.type != "cpu":
        return teacher
    fused = copy.deepcopy(teacher, {id(parameter): parameter for parameter in teacher.parameters()})
    adapter_for(fused).fuse(fused)
    choose_impl(fused, impl)
    return fused


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
        values = {"loss": made.loss, "losses": made.losses}
        return Unit(values, {"images": made.images, "targets": made.targets})

    unit = store.unit("metric-set", synthesized)
    given, targets = (unit.tensors[name].to(images.normalised.device) for name in ("images", "targets"))
    return MetricSet(given, targets, unit.values["loss"], tuple(unit.values["losses"]))


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

    kept_rate = partial(store.unit, "learning-rate", lambda: Unit(find()))
    return replace(config, recovery=config.mimicking.with_learning_rate(lambda: kept_rate().values))


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


def finish(
    model: str | nn.Module,
    original: nn.Module,
    images: FewShotImages,
    metric_set: MetricSet | None,
    outcome: Outcome,
    config: CompressionConfig,
    timer: Timer,
    stopwatch: Stopwatch = time_forward,
    runs: int = 50,
    method: str = "dcvit",
    ranks: Ranks = ALONE,
) -> CompressionResult:
    """The compressed model as an ordinary one, with its figures.

    Args:
        model: What the caller named.
        original: That model, loaded.
        images: The few-shot set.
        metric_set: What blocks were ranked on, if on any.
        outcome: What the procedure arrived at.
        config: What it was given.
        timer: Has the time of its stages.
        stopwatch: Times a forward pass.
        runs: Forward passes that are timed, at most.
        method: The procedure's name.
        ranks: The processes that arrived there: the first measures, while the others wait.
    """
    with timer("report"):
        student = adapter_for(outcome.student).rebuild(outcome.student).eval()

        def measured() -> Unit:
            return Unit(asdict(_report(model, original, student, images, outcome, config, stopwatch, runs, method)))

        report = from_plain(Report, ranks.of_first(measured).values)
    return CompressionResult(student, outcome.plan, replace(report, seconds=dict(timer.seconds)), metric_set)


def _report(
    model: str | nn.Module,
    teacher: nn.Module,
    student: nn.Module,
    images: FewShotImages,
    outcome: Outcome,
    config: CompressionConfig,
    stopwatch: Stopwatch,
    runs: int,
    method: str,
) -> Report:
    adapter, batch_size, budget = adapter_for(teacher), config.recovery.at_once, outcome.plan.budget
    subjects = {"teacher": teacher, "student": student}
    if budget.measured:
        batch = example_images(teacher, budget.batch_size)
        latency = measure_latency(subjects, batch, runs=1000, max_seconds=20.0, precision=0.004, stopwatch=stopwatch)
    else:
        batch = _quick_batch(teacher, images.normalised[:batch_size], stopwatch)
        latency = measure_latency(subjects, batch, runs=runs, warmup=1, max_seconds=3.0, stopwatch=stopwatch)
    figures = {
        name: ModelFigures(
            macs=(cost := adapter.cost(subject).total).macs(budget.convention),
            params=cost.params,
            latency_ms=latency[name].median_ms,
            file_size=file_size(subject.state_dict()),
            activation_memory=(
                trace_activation_memory(subject, budget.batch_size) if budget.unit == "activation_memory" else None
            ),
        )
        for name, subject in subjects.items()
    }
    same, loss = closeness(student, teacher, images.normalised, batch_size)
    return Report(
        model=model if isinstance(model, str) else type(model).__qualname__,
        teacher=figures["teacher"],
        student=figures["student"],
        num_images=len(images),
        agreement=same,
        mimic_loss=loss,
        learning_rate=outcome.learning_rate,
        trials=outcome.trials,
        pruning_trials=outcome.pruning_trials,
        reconstructions=outcome.reconstructions,
        refinement=outcome.refinement,
        steps=outcome.steps,
        seed=config.seed,
        settings=config.to_dict(),
        family=adapter_for(teacher).family,
        blocks=_shapes(teacher),
        blocks_after=_shapes(student),
        method=method,
        base_model=hub_repository(model) if isinstance(model, str) else None,
        latency_ratio=latency["student"].ratio_to(latency["teacher"]),
        latency_batch=len(batch),
    )


def _quick_batch(model: nn.Module, images: Tensor, stopwatch: Stopwatch) -> Tensor:
    """As many of some images as pass in `PASS_SECONDS`, at least one."""
    one = min(stopwatch(model, images[:1]) for _ in range(2))
    return images[: max(1, int(PASS_SECONDS / one))]


def _shapes(model: nn.Module) -> tuple[BlockShape, ...]:
    return tuple(BlockShape(b.compressible, b.hidden_features) for b in adapter_for(model).cost(model).blocks)
