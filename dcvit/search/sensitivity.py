"""Steps 2 and 4: try every candidate block alone, and rank them by how well they recover.

Source: DC-ViT (arXiv 2403.18708), sections 3.2 and 3.3. Latency does not tell the blocks of a ViT apart, so the metric
loss does (`dcvit.metrics.fidelity`).

A probe recovers its candidate by distillation, as published (`rank`), or by block reconstruction (`rank_reconstructed`).
With one block cut, a student's tokens before that block are the teacher's: reconstructed probes share one pass of the
teacher over the views and one over the metric's images. Probes that mimic train in lock step
(`dcvit.recovery.distill`): their seed is the same, so that all see the same views, which the teacher sees once.

With `halving` probes stop early as in successive halving (Jamieson and Talwalkar, arXiv 1502.07943). Those that go on
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
from dcvit.history import BlockSpec, Plan, Probe, SensitivityCurve, curve_units
from dcvit.metrics.fidelity import Metric
from dcvit.models import compressible
from dcvit.models.surgery import compress_block, copy_blocks, draw_kept_units, share_parameters
from dcvit.recovery.calibration import TeacherStates
from dcvit.recovery.distill import Candidate, Selection, recover_together, updated_parameters
from dcvit.recovery.reconstruct import BlockProblem, error_curve, reconstruct_block
from dcvit.runtime.checkpoint import Entry, require_alike
from dcvit.runtime.optim import or_infinite
from dcvit.runtime.process_state import own_state
from dcvit.search.allocate import require_units
from dcvit.serialization import from_plain

__all__ = ["RUNGS", "Contest", "Ranking", "rank", "rank_reconstructed", "run_probes"]

RUNGS = (0.5, 0.75)
"""Shares of the epochs after the warm-up at which the worse half of the probes stops.

Earlier the learning rate is near its peak, and the order of the blocks not yet settled. Measured on the digits test bed
(100 epochs, four few-shot sets, three budgets) the chosen blocks were the same in 12 of 12 cases by cross-entropy and
in 10 of 12 by the distillation metric, where near ties changed places, for three quarters of the epochs. With rungs at
0.25 and 0.5 it was 8 and 10 of 12. On the photographs (40 epochs, one set, two budgets) all were the same, in runs too
short to settle (24 epochs on 25 digits) 1 of 4. So `halving` is off by default.
"""


@dataclass(frozen=True)
class Ranking:
    """All probes, best first.

    Attributes:
        probes: In ascending order of metric loss; blocks of equal loss in ascending order. Those that were stopped come
            last, later ones before earlier ones.
        student: The recovered student of the best probe, which is the first progressive step.
        kept_units: For each candidate, the hidden units that it keeps.
    """

    probes: tuple[Probe, ...]
    student: nn.Module
    kept_units: Mapping[int, tuple[int, ...]]

    @property
    def blocks(self) -> tuple[int, ...]:
        """The candidates, best first."""
        return tuple(probe.block for probe in self.probes)


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
        plan: Says which blocks are candidates and how many hidden units they keep.
        config: Its `learning_rate` must be a number.
        context: Its store keeps the probes, all together, for they end together, and the best student; its ranks share
            the candidates.
        halving: Whether hopeless probes stop early.
    """
    kept = {block: draw_kept_units(teacher, block, plan.hidden_features, context.seed) for block in plan.candidates}

    def pruned(block: int) -> nn.Module:
        return compress_block(teacher, block, kept[block])

    best: list[nn.Module] = []

    def tried() -> Entry:
        contest = Contest(plan.candidates, pruned, metric.loss, plan.num_blocks, halving)
        probes, student = run_probes(teacher, images, contest, config, context)
        best.append(student)
        return Entry([asdict(probe) for probe in probes], student.state_dict())

    def restore(entry: Entry) -> None:
        best[:] = [pruned(entry.values[0]["block"])]
        best[0].load_state_dict(dict(entry.tensors))

    def check(entry: Entry) -> None:
        probes = from_plain(tuple[Probe, ...], entry.values, "trials")
        if sorted(probe.block for probe in probes) != sorted(plan.candidates) or probes != _best_first(probes):
            raise ValueError("it does not hold a probe of each candidate, best first")
        for probe in probes:
            probe.require_distilled(config, halving=halving)
        require_alike(entry.tensors, pruned(probes[0].block).state_dict())

    entry = context.store.entry("trials", tried, restore, check=check, together=True)
    return Ranking(from_plain(tuple[Probe, ...], entry.values, "trials"), best[0], kept)


@dataclass(frozen=True)
class Contest:
    """What blocks are tried for.

    Attributes:
        candidates: The blocks.
        pruned: Gives the student in which a block is cut.
        score: Gives a student's metric loss.
        num_chosen: How many blocks will be taken, which halving never goes below.
        halving: Whether hopeless probes stop early.
        updated: Gives the parameters of a student that recover; those that the config names where it gives none.
    """

    candidates: Sequence[int]
    pruned: Callable[[int], nn.Module]
    score: Callable[[nn.Module], float]
    num_chosen: int
    halving: bool = False
    updated: Callable[[nn.Module], Sequence[nn.Parameter]] = lambda student: ()


def run_probes(
    teacher: nn.Module,
    images: FewShotImages,
    contest: Contest,
    config: DistillationConfig,
    context: RunContext = STANDALONE,
) -> tuple[tuple[Probe, ...], nn.Module]:
    """Cut, recover by distillation and score each candidate alone, all in lock step.

    Args:
        teacher: The original, frozen.
        images: The few-shot set.
        contest: What is tried.
        config: Its `learning_rate` must be a number.
        context: Its ranks share the candidates, in equal parts.

    Returns:
        The probes, best first, and the recovered student of the best.
    """
    candidates, score = contest.candidates, contest.score
    processes = context.processes
    students: dict[int, nn.Module] = {}
    runs: list[Candidate] = []
    for block in candidates[processes.share(len(candidates))]:
        students[block] = student = contest.pruned(block)
        chosen = tuple(contest.updated(student))
        runs.append(Candidate(student, (block,), updated=chosen or None))
        share_parameters(student, teacher, but=chosen or updated_parameters(student, [block], config))
    recoveries = recover_together(
        runs, teacher, images, config, context.single_process().derived("trial"),
        selection=_halving(score, contest.num_chosen, config) if contest.halving else None, stage="trials",
    )  # fmt: skip
    mine = [
        Probe(block, score(student), recovery, seconds=recovery.seconds, epochs=len(recovery.losses))
        for (block, student), recovery in zip(students.items(), recoveries, strict=True)
    ]
    if processes.size == 1:
        probes = _best_first(mine)
        return probes, copy.deepcopy(students[probes[0].block])  # which may share parameters with the teacher
    found = [
        processes.send(Entry([asdict(probe) for probe in mine]), source).values for source in range(processes.size)
    ]
    probes = _best_first(from_plain(Probe, values) for of_rank in found for values in of_rank)
    best = probes[0].block
    (source,) = (i for i, of_rank in enumerate(found) if any(values["block"] == best for values in of_rank))
    sent = processes.send(Entry(None, students[best].state_dict() if best in students else {}), source)
    student = contest.pruned(best)
    student.load_state_dict(dict(sent.tensors))
    return probes, student


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
    specs: Mapping[int, BlockSpec],
    config: ReconstructionConfig,
    context: RunContext = STANDALONE,
    *,
    stage: str = "trials",
) -> tuple[tuple[Probe, ...], dict[int, tuple[int, ...]]]:
    """Cut each candidate block alone, reconstruct it in closed form, and sort by metric loss.

    What a block would lose at another size is its metric loss in proportion to what the closed form misses there.

    Args:
        teacher: The original, frozen.
        states: The teacher's tokens for the images that blocks are reconstructed on.
        metric: What the candidates are ranked by.
        specs: The blocks to try, and what each keeps; those with attention must be prunable in `states`.
        config: How.
        context: Its store keeps each probe; its progress is told after each.
        stage: What these probes are called there.

    Returns:
        The probes, best first, and by block its hidden units, most useful first: those that its probe kept, and more.
    """

    def tried(block: int, spec: BlockSpec) -> Entry:
        start = time.perf_counter()
        rows = states.mlp_rows(block) if spec.attention else states.rows(block).thinned()
        of_probe, count = context.single_process().derived("trial", block), spec.hidden_features
        curve = error_curve(teacher, block, rows, config, of_probe.seed)
        order = () if curve is None else curve.order
        student = copy_blocks(teacher, [block])
        chosen = order[:count] if count <= len(order) else None
        problem = BlockProblem(block, spec, rows, chosen, None if curve is None else curve.sums)
        kept, reconstruction = reconstruct_block(student, problem, config, context=of_probe, refit=False)
        loss = metric.loss(student, block)
        profile = None if curve is None else _in_proportion(curve.errors, count, loss)
        if spec.attention:
            states.release_mlp_rows([block])
        probe = Probe(block, loss, None, reconstruction, time.perf_counter() - start, profile)
        return Entry(asdict(_ReconstructedProbe(probe, order if count <= len(order) else kept)))

    def on_progress(done: int, entry: Entry | None) -> None:
        context.progress(stage, done, len(specs), None if entry is None else entry.values["trial"]["metric_loss"])

    def check(block: int, spec: BlockSpec, entry: Entry) -> None:
        found = from_plain(_ReconstructedProbe, entry.values)
        hidden = compressible(teacher).hidden_features(block)
        found.probe.require_reconstructed(block, spec.hidden_features, hidden)
        require_units(sorted(found.order), hidden)
        ordered = hidden if config.units == "random" else curve_units(hidden)[-2]  # as `error_curve` does
        if found.probe.sensitivity is None or ordered < spec.hidden_features:
            ordered = spec.hidden_features
        if len(found.order) != ordered or entry.tensors:
            raise ValueError(f"it orders {len(found.order)} hidden units: expected {ordered}")

    names = {f"{stage.replace(' ', '-')}-{block}": block for block in specs}
    entries = context.store.entries(
        {name: partial(tried, block, specs[block]) for name, block in names.items()},
        told,
        {name: partial(check, block, specs[block]) for name, block in names.items()},
    )
    states.release_mlp_rows(block for block, spec in specs.items() if spec.attention)  # of those that others tried
    found = {block: from_plain(_ReconstructedProbe, entries[name].values) for name, block in names.items()}
    return _best_first(of.probe for of in found.values()), {block: of.order for block, of in found.items()}


@dataclass(frozen=True)
class _ReconstructedProbe:
    """The values of the unit of a probe.

    Attributes:
        probe: The probe.
        order: Hidden units of its block, most useful first: those that it kept, and more.
    """

    probe: Probe
    order: tuple[int, ...]


def _in_proportion(errors: Mapping[int, float], hidden_features: int, loss: float) -> SensitivityCurve:
    """The metric loss at every number of hidden units, from that at one and the errors at all."""
    units, missed = tuple(errors), np.array(list(errors.values()))
    scale = loss / max(float(np.interp(hidden_features, units, missed)), 1e-12)
    return SensitivityCurve(units, tuple((scale * missed).tolist()))


def _best_first(probes: Iterable[Probe]) -> tuple[Probe, ...]:
    return tuple(sorted(probes, key=lambda probe: (-probe.epochs, or_infinite(probe.metric_loss), probe.block)))
