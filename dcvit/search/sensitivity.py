"""Steps 2 and 4: probe the sensitivity of every candidate block, and rank the blocks by their loss after recovery.

Source: DC-ViT (arXiv 2403.18708), sections 3.2 and 3.3. All blocks of a ViT have the same latency, so they are ranked
by the metric loss (`dcvit.metrics.fidelity`).

A probe compresses one block and recovers it by distillation, as published (`rank`), or by block reconstruction
(`rank_reconstructed`). With only one block compressed, the student's tokens before that block equal the teacher's. So
reconstructed probes share one pass of the teacher over the views and one over the metric's images. Distilled probes
train in lock step (`dcvit.recovery.distill`): they have the same seed, so all see the same views, and the teacher runs
once on each.

With `halving` probes stop early as in successive halving (Jamieson and Talwalkar, arXiv 1502.07943). The probes that
continue train as they would without halving.
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

Earlier, the learning rate is near its peak, and the order of the blocks is not yet settled. Measured on the digits test
bed (100 epochs, four few-shot sets, three budgets), with three quarters of the epochs: the chosen blocks were the same
in 12 of 12 cases by cross-entropy, and in 10 of 12 by the distillation metric, where near ties swapped. With rungs at
0.25 and 0.5 they were the same in 8 and 10 of 12 cases. On the photographs (40 epochs, one set, two budgets) all were
the same. In runs too short to settle (24 epochs on 25 digits) 1 of 4 was the same. So `halving` is off by default.
"""

_ENTRIES = {"probes": "trials", "pruning probes": "pruning-trials"}
"""Names on disk of the checkpoint entries of each stage, kept as in earlier versions so that their runs can resume."""


@dataclass(frozen=True)
class Ranking:
    """All probes, best first.

    Attributes:
        probes: The probes in ascending order of metric loss, then of block. Stopped probes come last, those stopped
            later before those stopped earlier.
        student: The recovered student of the best probe, which is the first progressive step.
        kept_units: The hidden units that each candidate keeps.
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
    """Compress each candidate block on its own, train it by distillation, and sort by metric loss, as published.

    Args:
        teacher: The original model, frozen.
        images: The few-shot set.
        metric: The metric that ranks the candidates.
        plan: The plan with the candidates and the number of hidden units that they keep.
        config: Settings of the distillation. Its `learning_rate` must be a number.
        context: Context of the run. Its store keeps all probes in one entry, since they end together, with the best
            student. Its processes share the candidates.
        halving: Whether the worse probes stop early.

    Returns:
        The probes, best first, with the student of the best one.
    """
    kept = {block: draw_kept_units(teacher, block, plan.hidden_features, context.seed) for block in plan.candidates}

    def pruned(block: int) -> nn.Module:
        return compress_block(teacher, block, kept[block])

    best: list[nn.Module] = []

    def run() -> Entry:
        contest = Contest(plan.candidates, pruned, metric.loss, plan.num_blocks, halving)
        probes, student = run_probes(teacher, images, contest, config, context)
        best.append(student)
        return Entry([asdict(probe) for probe in probes], student.state_dict())

    def restore(entry: Entry) -> None:
        best[:] = [pruned(entry.values[0]["block"])]
        best[0].load_state_dict(dict(entry.tensors))

    def check(entry: Entry) -> None:
        probes = from_plain(tuple[Probe, ...], entry.values, "probes")
        if sorted(probe.block for probe in probes) != sorted(plan.candidates) or probes != _best_first(probes):
            raise ValueError("it does not hold a probe of each candidate, best first")
        for probe in probes:
            probe.require_distilled(config, halving=halving)
        require_alike(entry.tensors, pruned(probes[0].block).state_dict())

    entry = context.store.entry(_ENTRIES["probes"], run, restore, check=check, together=True)
    return Ranking(from_plain(tuple[Probe, ...], entry.values, "probes"), best[0], kept)


@dataclass(frozen=True)
class Contest:
    """Candidates of a ranking, and how they are compressed and scored.

    Attributes:
        candidates: The blocks.
        pruned: Function that returns the student in which a block is compressed.
        score: Function that returns a student's metric loss.
        num_chosen: Number of blocks that will be chosen; halving keeps at least as many probes.
        halving: Whether the worse probes stop early.
        updated: Function that returns the parameters of a student to update. If it returns none, the config selects
            them.
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
    """Compress each candidate on its own, recover it by distillation and score it, all in lock step.

    Args:
        teacher: The original model, frozen.
        images: The few-shot set.
        contest: The candidates, and how they are compressed and scored.
        config: Settings of the distillation. Its `learning_rate` must be a number.
        context: Context of the run. Its processes share the candidates, in equal parts.

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
        selection=_halving(score, contest.num_chosen, config) if contest.halving else None, stage="probes",
    )  # fmt: skip
    mine = [
        Probe(block, score(student), recovery, seconds=recovery.seconds, epochs=len(recovery.losses))
        for (block, student), recovery in zip(students.items(), recoveries, strict=True)
    ]
    if processes.size == 1:
        probes = _best_first(mine)
        return probes, copy.deepcopy(students[probes[0].block])  # a copy, as it may share parameters with the teacher
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
    """Return a selection that keeps the better half of the probes at each rung, and at least `fewest`."""
    warmup = min(config.warmup_epochs, config.epochs)
    rungs = {warmup + round(share * (config.epochs - warmup)) for share in RUNGS} - {0, config.epochs}

    def selection(epochs: int, students: Mapping[int, nn.Module]) -> Collection[int]:
        num_kept = max(fewest, -(-len(students) // 2))
        if epochs not in rungs or len(students) <= num_kept:
            return students
        losses = {position: or_infinite(score(student)) for position, student in students.items()}
        return sorted(students, key=losses.__getitem__)[:num_kept]

    return selection


def rank_reconstructed(
    teacher: nn.Module,
    states: TeacherStates,
    metric: Metric,
    specs: Mapping[int, BlockSpec],
    config: ReconstructionConfig,
    context: RunContext = STANDALONE,
    *,
    stage: str = "probes",
) -> tuple[tuple[Probe, ...], dict[int, tuple[int, ...]]]:
    """Compress or prune each candidate block on its own, reconstruct it in closed form, and sort by metric loss.

    The metric loss of a block at other numbers of hidden units is estimated in proportion to the closed form's error.

    Args:
        teacher: The original model, frozen.
        states: The teacher's tokens for the images that blocks are reconstructed on.
        metric: The metric that ranks the candidates.
        specs: The blocks to probe with their specs. Blocks that keep their attention must be prunable in `states`.
        config: Settings of the reconstruction.
        context: Context of the run. Its store keeps each probe; its progress callback is called after each.
        stage: Name of the stage in the store and in progress reports.

    Returns:
        The probes, best first, and each block's hidden units, most useful first. These include those that the probe
        kept.
    """

    def run_one(block: int, spec: BlockSpec) -> Entry:
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
        sensitivity = None if curve is None else _in_proportion(curve.errors, count, loss)
        if spec.attention:
            states.release_mlp_rows([block])
        probe = Probe(block, loss, None, reconstruction, time.perf_counter() - start, sensitivity)
        return Entry(asdict(_ReconstructedProbe(probe, order if count <= len(order) else kept)))

    def on_progress(done: int, entry: Entry | None) -> None:
        context.progress(stage, done, len(specs), None if entry is None else entry.values["probe"]["metric_loss"])

    def check(block: int, spec: BlockSpec, entry: Entry) -> None:
        found = from_plain(_ReconstructedProbe, entry.values)
        hidden = compressible(teacher).hidden_features(block)
        found.probe.require_reconstructed(block, spec.hidden_features, hidden)
        require_units(sorted(found.order), hidden)
        ordered = hidden if config.units == "random" else curve_units(hidden)[-2]  # as `error_curve` does
        if found.probe.sensitivity is None or ordered < spec.hidden_features:
            ordered = spec.hidden_features
        if len(found.order) != ordered or entry.tensors:
            raise ValueError(f"it has {len(found.order)} hidden units in order: expected {ordered}")

    names = {f"{_ENTRIES[stage]}-{block}": block for block in specs}
    entries = context.store.entries(
        {name: partial(run_one, block, specs[block]) for name, block in names.items()},
        on_progress,
        {name: partial(check, block, specs[block]) for name, block in names.items()},
    )
    states.release_mlp_rows(block for block, spec in specs.items() if spec.attention)  # also of other processes' probes
    found = {block: from_plain(_ReconstructedProbe, entries[name].values) for name, block in names.items()}
    return _best_first(of.probe for of in found.values()), {block: of.order for block, of in found.items()}


@dataclass(frozen=True)
class _ReconstructedProbe:
    """Values of the checkpoint entry of a probe.

    Attributes:
        probe: The probe.
        order: Hidden units of its block, most useful first; they include those that the probe kept.
    """

    probe: Probe
    order: tuple[int, ...]


def _in_proportion(errors: Mapping[int, float], hidden_features: int, loss: float) -> SensitivityCurve:
    """Scale a curve of errors to the metric loss measured at one number of hidden units."""
    units, values = tuple(errors), np.array(list(errors.values()))
    scale = loss / max(float(np.interp(hidden_features, units, values)), 1e-12)
    return SensitivityCurve(units, tuple((scale * values).tolist()))


def _best_first(probes: Iterable[Probe]) -> tuple[Probe, ...]:
    return tuple(sorted(probes, key=lambda probe: (-probe.epochs, or_infinite(probe.metric_loss), probe.block)))
