"""Steps 2 and 4: try every candidate block alone, and rank them by how well they recover.

Source: DC-ViT (arXiv 2403.18708), sections 3.2 and 3.3. Latency does not tell the blocks of a ViT apart, so the metric
loss does (`dcvit.metrics.fidelity`).

A trial recovers its candidate by mimicking, as published (`rank`), or by block reconstruction (`rank_reconstructed`).
With one block cut, a student's tokens before that block are the teacher's: reconstructed trials share one pass of the
teacher over the views and one over the metric's images. Trials that mimic train in lock step
(`dcvit.recovery.distill`): their seed is the same, so that all see the same views, which the teacher sees once.

With `halving` trials stop early as in successive halving (Jamieson and Talwalkar, arXiv 1502.07943). Those that go on
train as they would have without it.
"""

import copy
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
from torch import nn

from dcvit.config import DistillationConfig, ReconstructionConfig
from dcvit.context import STANDALONE, RunContext
from dcvit.data.images import FewShotImages
from dcvit.history import Cut, Plan, Recoverability, Trial, curve_nodes
from dcvit.metrics.fidelity import Metric
from dcvit.models import compressible
from dcvit.models.surgery import compress_block, copy_blocks, draw_kept_nodes, share_parameters
from dcvit.recovery.calibration import TeacherStates
from dcvit.recovery.distill import Candidate, Selection, recover_together, updated_parameters
from dcvit.recovery.reconstruct import BlockProblem, error_curve, reconstruct_block
from dcvit.runtime.checkpoint import Unit, require_alike
from dcvit.runtime.optim import or_infinite
from dcvit.runtime.process_state import own_state
from dcvit.search.allocate import require_nodes
from dcvit.serialization import from_plain

__all__ = ["RUNGS", "Contest", "Ranking", "rank", "rank_reconstructed", "run_trials"]

RUNGS = (0.5, 0.75)
"""Shares of the epochs after the warm-up at which the worse half of the trials stops.

Earlier the learning rate is near its peak, and the order of the blocks not yet settled. Measured on the digits test bed
(100 epochs, four few-shot sets, three budgets) the chosen blocks were the same in 12 of 12 cases by cross-entropy and
in 10 of 12 by the mimicking metric, where near ties changed places, for three quarters of the epochs. With rungs at
0.25 and 0.5 it was 8 and 10 of 12. On the photographs (40 epochs, one set, two budgets) all were the same, in runs too
short to settle (24 epochs on 25 digits) 1 of 4. So `halving` is off by default.
"""


@dataclass(frozen=True)
class Ranking:
    """All trials, best first.

    Attributes:
        trials: In ascending order of metric loss; blocks of equal loss in ascending order. Those that were stopped come
            last, later ones before earlier ones.
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


@own_state()
def rank(
    teacher: nn.Module,
    images: FewShotImages,
    metric: Metric,
    plan: Plan,
    config: DistillationConfig,
    context: RunContext = STANDALONE,
    *,
    halving: bool = False,
) -> Ranking:
    """Compress each candidate block alone, let it mimic, and sort by metric loss, as published.

    Args:
        teacher: The original, frozen.
        images: The few-shot set.
        metric: What the candidates are ranked by.
        plan: Says which blocks are candidates and how many hidden nodes they keep.
        config: Its `learning_rate` must be a number.
        context: Its store keeps the trials, all together, for they end together, and the best student; its ranks share
            the candidates.
        halving: Whether hopeless trials stop early.
    """
    kept = {block: draw_kept_nodes(teacher, block, plan.hidden_features, context.seed) for block in plan.candidates}

    def cut(block: int) -> nn.Module:
        return compress_block(teacher, block, kept[block], context.impl)

    best: list[nn.Module] = []

    def tried() -> Unit:
        contest = Contest(plan.candidates, cut, metric.loss, plan.num_blocks, halving)
        trials, student = run_trials(teacher, images, contest, config, context)
        best.append(student)
        return Unit([asdict(trial) for trial in trials], student.state_dict())

    def restore(unit: Unit) -> None:
        best[:] = [cut(unit.values[0]["block"])]
        best[0].load_state_dict(dict(unit.tensors))

    def check(unit: Unit) -> None:
        trials = from_plain(tuple[Trial, ...], unit.values, "trials")
        if sorted(trial.block for trial in trials) != sorted(plan.candidates) or trials != _best_first(trials):
            raise ValueError("it does not hold a trial of each candidate, best first")
        for trial in trials:
            trial.require_mimicked(config, halving=halving)
        require_alike(unit.tensors, cut(trials[0].block).state_dict())

    unit = context.store.unit("trials", tried, restore, check=check, together=True)
    return Ranking(from_plain(tuple[Trial, ...], unit.values, "trials"), best[0], kept)


@dataclass(frozen=True)
class Contest:
    """What blocks are tried for.

    Attributes:
        candidates: The blocks.
        cut: Gives the student in which a block is cut.
        score: Gives a student's metric loss.
        num_chosen: How many blocks will be taken, which halving never goes below.
        halving: Whether hopeless trials stop early.
        updated: Gives the parameters of a student that recover; those that the config names where it gives none.
    """

    candidates: Sequence[int]
    cut: Callable[[int], nn.Module]
    score: Callable[[nn.Module], float]
    num_chosen: int
    halving: bool = False
    updated: Callable[[nn.Module], Sequence[nn.Parameter]] = lambda student: ()


def run_trials(
    teacher: nn.Module,
    images: FewShotImages,
    contest: Contest,
    config: DistillationConfig,
    context: RunContext = STANDALONE,
) -> tuple[tuple[Trial, ...], nn.Module]:
    """Cut, recover by mimicking and score each candidate alone, all in lock step.

    Args:
        teacher: The original, frozen.
        images: The few-shot set.
        contest: What is tried.
        config: Its `learning_rate` must be a number.
        context: Its ranks share the candidates, in equal parts.

    Returns:
        The trials, best first, and the recovered student of the best.
    """
    candidates, score = contest.candidates, contest.score
    ranks = context.ranks
    students: dict[int, nn.Module] = {}
    runs: list[Candidate] = []
    for block in candidates[ranks.share(len(candidates))]:
        students[block] = student = contest.cut(block)
        chosen = tuple(contest.updated(student))
        runs.append(Candidate(student, (block,), updated=chosen or None))
        share_parameters(student, teacher, but=chosen or updated_parameters(student, [block], config))
    recoveries = recover_together(
        runs, teacher, images, config, context.alone().derived("trial"),
        selection=_halving(score, contest.num_chosen, config) if contest.halving else None, stage="trials",
    )  # fmt: skip
    mine = [
        Trial(block, score(student), recovery, seconds=recovery.seconds, epochs=len(recovery.losses))
        for (block, student), recovery in zip(students.items(), recoveries, strict=True)
    ]
    if ranks.size == 1:
        trials = _best_first(mine)
        return trials, copy.deepcopy(students[trials[0].block])  # which may share parameters with the teacher
    found = [ranks.send(Unit([asdict(trial) for trial in mine]), source).values for source in range(ranks.size)]
    trials = _best_first(from_plain(Trial, values) for of_rank in found for values in of_rank)
    best = trials[0].block
    (source,) = (i for i, of_rank in enumerate(found) if any(values["block"] == best for values in of_rank))
    sent = ranks.send(Unit(None, students[best].state_dict() if best in students else {}), source)
    student = contest.cut(best)
    student.load_state_dict(dict(sent.tensors))
    return trials, student


def _halving(score: Callable[[nn.Module], float], fewest: int, config: DistillationConfig) -> Selection:
    """After each rung the better half goes on, and never fewer than `fewest`."""
    warmup = min(config.warmup_epochs, config.epochs)
    rungs = {warmup + round(share * (config.epochs - warmup)) for share in RUNGS} - {0, config.epochs}

    def selection(epochs: int, students: Mapping[int, nn.Module]) -> Collection[int]:
        wanted = max(fewest, -(-len(students) // 2))
        if epochs not in rungs or len(students) <= wanted:
            return students
        losses = {position: or_infinite(score(student)) for position, student in students.items()}
        return sorted(students, key=losses.__getitem__)[:wanted]

    return selection


def rank_reconstructed(
    teacher: nn.Module,
    states: TeacherStates,
    metric: Metric,
    cuts: Mapping[int, Cut],
    config: ReconstructionConfig,
    context: RunContext = STANDALONE,
    *,
    stage: str = "trials",
) -> tuple[tuple[Trial, ...], dict[int, tuple[int, ...]]]:
    """Cut each candidate block alone, reconstruct it in closed form, and sort by metric loss.

    What a block would lose at another size is its metric loss in proportion to what the closed form misses there.

    Args:
        teacher: The original, frozen.
        states: The teacher's tokens for the images that blocks are reconstructed on.
        metric: What the candidates are ranked by.
        cuts: The blocks to try, and what each keeps; those with attention must be prunable in `states`.
        config: How.
        context: Its store keeps each trial; its progress is told after each.
        stage: What these trials are called there.

    Returns:
        The trials, best first, and by block its hidden nodes, most useful first: those that its trial kept, and more.
    """

    def tried(block: int, cut: Cut) -> Unit:
        start = time.perf_counter()
        rows = states.mlp_rows(block) if cut.attention else states.rows(block).thinned()
        of_trial, count = context.alone().derived("trial", block), cut.hidden_features
        curve = error_curve(teacher, block, rows, config, of_trial.seed)
        order = () if curve is None else curve.order
        student = copy_blocks(teacher, [block])
        chosen = order[:count] if count <= len(order) else None
        problem = BlockProblem(block, cut, rows, chosen, None if curve is None else curve.sums)
        kept, reconstruction = reconstruct_block(student, problem, config, context=of_trial, refit=False)
        loss = metric.loss(student, block)
        profile = None if curve is None else _in_proportion(curve.errors, count, loss)
        if cut.attention:
            states.give_up_mlp_rows([block])
        trial = Trial(block, loss, None, reconstruction, time.perf_counter() - start, profile)
        return Unit(asdict(_ReconstructedTrial(trial, order if count <= len(order) else kept)))

    def told(done: int, unit: Unit | None) -> None:
        context.progress(stage, done, len(cuts), None if unit is None else unit.values["trial"]["metric_loss"])

    def check(block: int, cut: Cut, unit: Unit) -> None:
        found = from_plain(_ReconstructedTrial, unit.values)
        hidden = compressible(teacher).hidden_features(block)
        found.trial.require_reconstructed(block, cut.hidden_features, hidden)
        require_nodes(sorted(found.order), hidden)
        ordered = hidden if config.nodes == "random" else curve_nodes(hidden)[-2]  # as `error_curve` does
        if found.trial.recoverability is None or ordered < cut.hidden_features:
            ordered = cut.hidden_features
        if len(found.order) != ordered or unit.tensors:
            raise ValueError(f"it orders {len(found.order)} hidden nodes: expected {ordered}")

    names = {f"{stage.replace(' ', '-')}-{block}": block for block in cuts}
    units = context.store.units(
        {name: partial(tried, block, cuts[block]) for name, block in names.items()},
        told,
        {name: partial(check, block, cuts[block]) for name, block in names.items()},
    )
    states.give_up_mlp_rows(block for block, cut in cuts.items() if cut.attention)  # of those that others tried
    found = {block: from_plain(_ReconstructedTrial, units[name].values) for name, block in names.items()}
    return _best_first(of.trial for of in found.values()), {block: of.order for block, of in found.items()}


@dataclass(frozen=True)
class _ReconstructedTrial:
    """The values of the unit of a trial.

    Attributes:
        trial: The trial.
        order: Hidden nodes of its block, most useful first: those that it kept, and more.
    """

    trial: Trial
    order: tuple[int, ...]


def _in_proportion(errors: Mapping[int, float], hidden_features: int, loss: float) -> Recoverability:
    """The metric loss at every number of hidden nodes, from that at one and the errors at all."""
    nodes, missed = tuple(errors), np.array(list(errors.values()))
    scale = loss / max(float(np.interp(hidden_features, nodes, missed)), 1e-12)
    return Recoverability(nodes, tuple((scale * missed).tolist()))


def _best_first(trials: Iterable[Trial]) -> tuple[Trial, ...]:
    return tuple(sorted(trials, key=lambda trial: (-trial.epochs, or_infinite(trial.metric_loss), trial.block)))
