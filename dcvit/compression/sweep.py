"""The dense family: many sizes of one model from one search.

Work that does not depend on the budget is done once: the proxy set, the views and the teacher's tokens for them, the
sensitivity probes of each block over the number of hidden units, and the search for step sizes. Each size then costs
only the reconstruction of its blocks and, if distillation refines it, a share of a single compression's steps.
"""

import json
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from dcvit.artifacts.result import (
    FAMILY_FILE,
    REPORT_FILE,
    RESULT_FILE,
    CompressionResult,
    check_folder,
    check_output_folder,
    check_report_file,
    load,
    read_json,
    read_together,
)
from dcvit.artifacts.saving import replacing_folder, require_writable, write_text
from dcvit.budget import ADDITIVE, Budget
from dcvit.compression.compress import DEFAULT, checked_images, open_store
from dcvit.compression.finish import finish
from dcvit.compression.out_of_memory import within_memory
from dcvit.config import DCViT
from dcvit.context import RunContext
from dcvit.costs import MacConvention
from dcvit.data.images import FewShotImages, Images
from dcvit.data.synthesis import ProxySet
from dcvit.errors import BudgetError, DcvitError, SaveFolderError
from dcvit.history import ModelFigures, Plan
from dcvit.methods import Task, make_proxy_set, method_of
from dcvit.methods.dcvit.reconstructed import Prepared, compress_prepared, prepare
from dcvit.metrics.latency import QUICK_TIMING, Timing, measure_latency, time_forward
from dcvit.models import compressible, fuse, load_model
from dcvit.models.surgery import copy_blocks
from dcvit.models.teacher import freeze
from dcvit.recovery.finetune import STEP_SIZES, Schedule
from dcvit.report import FamilyPoint
from dcvit.runtime.environment import versions
from dcvit.runtime.files import digest, is_draft, kind_of
from dcvit.runtime.precision import InPrecision, Precision
from dcvit.runtime.process_state import own_state
from dcvit.runtime.progress import Progress, Timer, silent
from dcvit.search.plan import plan
from dcvit.serialization import from_plain

__all__ = ["DEFAULT_SHARES", "Family", "check_family_folder", "load_family", "sweep"]

DEFAULT_SHARES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
"""The default budgets of a sweep: shares of the original's MACs."""

REFINEMENT_SHARE = 1 / 3
"""The share of a single compression's refinement steps, and about of its views, that each member gets.

The step size is searched for the first member only.
"""

TIMING = replace(QUICK_TIMING, max_seconds=10.0)
"""How all members are timed, in turn."""

ONE_RUN = Timing(runs=1, warmup=1)
"""How a single member is timed before all are timed together."""

NEAR = 0.005
"""How far a member may be below a target, as a share of the original, before a new member is compressed."""

FORMAT = 1

DIGEST = "result_sha256"
"""The key of a member's SHA-256 of `result.json` in the index; `result.json` has those of the other files."""

MEMBER = r"macs-[0-9]{1,19}"
"""The pattern of members' folder names, see `Family.name`."""


@dataclass
class Family:
    """Compressed models of one original, largest first.

    Attributes:
        original: Figures of the original.
        members: The compressed models.
    """

    original: ModelFigures
    members: list[CompressionResult]
    _search: "_Search | None" = field(default=None, repr=False)

    def at(
        self,
        *,
        macs: float | int | None = None,
        params: float | int | None = None,
        latency_ms: float | None = None,
        progress: Progress = silent,
    ) -> CompressionResult:
        """Return the best member whose cost does not exceed a target.

        Exactly one of the three targets must be set. A family that `sweep` returned compresses a new member if no
        member is at most 0.5 % of the original below the target. A loaded family cannot do that, and returns its
        largest member within the target.

        Args:
            macs: A share of the original, or an absolute number of MACs per image.
            params: A share of the original, or an absolute number of parameters.
            latency_ms: The latency in milliseconds of the batch of few-shot images on which the members were timed.
            progress: Called with the state of a new member's compression.

        Raises:
            BudgetError: If the target is out of range, or if not exactly one target is set.
        """
        targets = [name for name, value in (("macs", macs), ("params", params), ("latency_ms", latency_ms)) if value]
        if len(targets) != 1:
            raise BudgetError(
                f"Family.at({', '.join(targets)}): expected exactly one of macs, params and latency_ms, for example "
                "family.at(macs=0.8)."
            )
        if latency_ms is not None:
            return self._within_latency(latency_ms, progress)
        budget = Budget(macs=macs, params=params, convention=self._convention)
        original: int = getattr(self.original, budget.metric)
        target = budget.target_of(original)

        def amount(member: CompressionResult) -> int:
            spent: int = getattr(member.report.student, budget.metric)
            return spent

        best = max((m for m in self.members if amount(m) <= target), key=amount, default=None)
        if best is not None and target - amount(best) <= NEAR * original:
            return best
        if self._search is not None:
            return self._add(budget, progress)
        if best is not None:
            return best
        smallest = min(map(amount, self.members))
        raise BudgetError(
            f"{budget.metric}={budget.value!r} asks for {target:,}: the smallest member has {smallest:,}. Ask for more "
            "or sweep again with this budget."
        )

    def save(
        self,
        folder: str | Path,
        *,
        overwrite: bool = False,
        points: Sequence[FamilyPoint] | None = None,
        evaluated_on: str | None = None,
        page: Callable[[Mapping[str, Any]], str] | None = None,
    ) -> dict[str, Any]:
        """Save each member to its own folder, and list the members in `family.json`; all files or none.

        Args:
            folder: The folder; it is created if missing.
            overwrite: Whether to replace an earlier family in that folder, with all its members. Nothing else is ever
                replaced.
            points: The figures that the report shows; by default, the members' own.
            evaluated_on: The images on which those figures were measured.
            page: Makes the HTML of `report.html` from the contents of `family.json`.

        Returns:
            The contents of `family.json`.

        Raises:
            SaveFolderError: If the folder holds something else, or holds an earlier family and `overwrite` is not set.
                Also if it cannot be written; an earlier family is then kept.
        """
        check_family_folder(folder, overwrite=overwrite)
        report = self.members[0].report
        index: dict[str, Any] = {
            "format": FORMAT,
            "model": report.model,
            "num_images": report.num_images,
            "original": asdict(self.original),
            "members": [{"folder": self.name(member), **self.figures(member)} for member in self.members],
            "points": [asdict(point) for point in (self.points() if points is None else points)],
            "evaluated_on": evaluated_on or f"the {report.num_images} few-shot images",
            "settings": report.settings,
            "versions": versions(),
        }
        with replacing_folder(folder, first=FAMILY_FILE) as draft:
            for member, entry in zip(self.members, index["members"], strict=True):
                member.save(draft / entry["folder"])
                entry[DIGEST] = digest(draft / entry["folder"] / RESULT_FILE)
            write_text(draft / FAMILY_FILE, json.dumps(index, indent=2) + "\n")
            if page is not None:
                write_text(draft / REPORT_FILE, page(index))
        return index

    def points(self) -> list[FamilyPoint]:
        """Return the original and the members, with their own figures, for `dcvit.report.family_page`."""
        first = self.original
        points = [FamilyPoint("original", "original", first.macs, first.params, first.latency_ms, None, first.top1)]
        for member in self.members:
            student = member.report.student
            points.append(
                FamilyPoint(
                    self.name(member), "dcvit", student.macs, student.params, student.latency_ms,
                    member.report.agreement, student.top1,
                )
            )  # fmt: skip
        return points

    @staticmethod
    def name(member: CompressionResult) -> str:
        """Return the name of a member's folder."""
        return f"macs-{member.report.student.macs}"

    def figures(self, member: CompressionResult) -> dict[str, Any]:
        """Return the figures of a member for the index: budget, structure, cost and quality."""
        report = member.report
        return {
            "budget": member.plan.to_dict()["budget"],
            "blocks": {str(block): len(member.plan.kept_units[block]) for block in member.plan.blocks},
            "pruned": list(member.plan.pruned),
            "macs_share": report.student.macs / self.original.macs,
            **asdict(report.student),
            "agreement": report.agreement,
            "distillation_loss": report.distillation_loss,
        }

    @property
    def _convention(self) -> MacConvention:
        return self.members[0].plan.budget.convention

    def _add(self, budget: Budget, progress: Progress) -> CompressionResult:
        search = self._search
        assert search is not None
        planned = plan(search.original, budget, search.config)

        def compressed(config: DCViT) -> CompressionResult:
            return search.compress(planned, config, RunContext(config.seed, config.impl, progress=progress))

        member = within_memory(compressed, search.config)
        for known in self.members:
            if _alike(known, member):
                return known
        (member,) = _timed(search, [member], self.original.latency_ms)
        self.members.append(member)
        self.members.sort(key=lambda other: other.report.student.macs, reverse=True)
        return member

    def _within_latency(self, latency_ms: float, progress: Progress) -> CompressionResult:
        """Return the largest member that is fast enough, or compress a new one if a larger one may be fast enough."""
        fitting = [member for member in self.members if member.report.student.latency_ms <= latency_ms]
        best = max(fitting, key=lambda member: member.report.student.macs, default=None)
        if best is None:
            fastest = min(member.report.student.latency_ms for member in self.members)
            raise BudgetError(
                f"latency_ms={latency_ms:g}: the fastest member takes {fastest:.3g} ms. Ask for more, or sweep smaller "
                "budgets."
            )
        larger = [member for member in self.members if member.report.student.macs > best.report.student.macs]
        if self._search is None or not larger:
            return best
        # Latency is almost linear in the MACs between two sizes, so interpolation gives the MACs of the target.
        above = min(larger, key=lambda member: member.report.student.macs)
        low, high = best.report.student, above.report.student
        macs = int(np.interp(latency_ms, [low.latency_ms, high.latency_ms], [low.macs, high.macs]))
        if macs - low.macs <= NEAR * self.original.macs or high.macs - macs <= NEAR * self.original.macs:
            return best
        found = self._add(Budget(macs=macs, convention=self._convention), progress)
        return found if found.report.student.latency_ms <= latency_ms else best


@dataclass
class _Search:
    """The state that all members share, from which another member can be compressed."""

    model: str | nn.Module
    original: nn.Module
    images: FewShotImages
    proxy_set: ProxySet
    prepared: Prepared
    config: DCViT
    step_sizes: Sequence[float] = STEP_SIZES

    @own_state()
    def compress(self, planned: Plan, config: DCViT, context: RunContext) -> CompressionResult:
        """Compress a member, which is not yet timed with the others; `config` may have smaller micro-batches."""
        refinement = Schedule(round(REFINEMENT_SHARE * self.prepared.refinement_steps), self.step_sizes)
        outcome = compress_prepared(self.prepared, planned, config, context, refinement=refinement)
        if outcome.refinement is not None and outcome.refinement.step_size > 0:
            self.step_sizes = (outcome.refinement.step_size,)
        task = Task(self.original, self.images, planned.budget, config, context)
        return finish(self.model, task, replace(outcome, proxy_set=self.proxy_set), timing=ONE_RUN)


def sweep(
    model: str | nn.Module,
    images: Images | FewShotImages,
    budgets: Iterable[float | int | Budget] = DEFAULT_SHARES,
    method: str | DCViT = DEFAULT,
    *,
    proxy_set: ProxySet | None = None,
    run_dir: str | Path | None = None,
    progress: Progress = silent,
) -> Family:
    """Compress a model to many sizes from one search.

    Args:
        model: A timm model, or a name that `timm.create_model` takes. The model is not changed.
        images: The few-shot set, see `dcvit.data.images.load_images`. Labels are never read.
        budgets: The members' largest costs: shares of the original's MACs, absolute numbers of MACs, or `Budget`s.
        method: The config. Its `recovery` must be a `ReconstructionConfig`, as in all presets except `DCViT.paper()`.
        proxy_set: Images to rank blocks on, instead of synthesised ones.
        run_dir: A folder for checkpoints, as for `dcvit.compress`.
        progress: Called with the state of the work.

    Returns:
        The family, largest member first.

    Raises:
        UnsupportedModelError, ImagesError, RunStoreError: As for `dcvit.compress`.
        BudgetError: If there is no budget, two are the same, or one cannot be met.
        DcvitError: If `method` is not a `DCViT` config, or recovers by distillation.
        All of these are raised before any long work.
    """
    _, config = method_of(method)
    if not isinstance(config, DCViT):
        raise DcvitError(f"method={method!r}: a sweep supports only dcvit's own method; pass DCViT() or leave it out.")
    recovery = config.reconstruction  # distillation has no probes that several sizes could share
    fewer = max(recovery.num_views, round(REFINEMENT_SHARE * recovery.refinement_views))
    config = config.with_(recovery=replace(recovery, refinement_views=min(fewer, recovery.refinement_views)))
    with own_state():
        timer = Timer()
        with timer("prepare"):
            original = freeze(load_model(model))
            config = config.with_tv_exponent(compressible(original).tv_exponent)
            plans = _plans(original, budgets, config)
            few_shot = checked_images(images, proxy_set, original, progress)
            teacher = fuse(copy_blocks(original, ()), config.impl)
        targets = [planned.budget.to_dict() for planned in plans]
        with open_store(run_dir, original, few_shot, proxy_set, config, budgets=targets) as store:
            context = RunContext(config.seed, config.impl, progress=progress, store=store, timer=timer)

            def searched(config: DCViT) -> tuple[_Search, list[CompressionResult]]:
                with timer("proxy set"):
                    ranked_on = proxy_set or make_proxy_set(teacher, few_shot, config, context)
                prepared = prepare(teacher, few_shot, ranked_on, plans[len(plans) // 2], config, context)
                search = _Search(model, original, few_shot, ranked_on, prepared, config)
                members: list[CompressionResult] = []
                for planned in plans:
                    of_member = replace(context.within(f"size-{len(members) + 1}"), timer=Timer())
                    member = search.compress(planned, config, of_member)
                    if not members:  # the first member's time includes what all share
                        seconds = {**timer.seconds, **member.report.seconds}
                        member = replace(member, report=replace(member.report, seconds=seconds))
                    members.append(member)
                    progress("sizes", len(members), len(plans), member.report.distillation_loss)
                return search, members

            search, members = within_memory(searched, config)
    # In a small model, several budgets may give the same structure.
    members = [m for i, m in enumerate(members) if not any(_alike(m, other) for other in members[:i])]
    members = _timed(search, members)
    return Family(members[0].report.teacher, members, search)


def _alike(one: CompressionResult, other: CompressionResult) -> bool:
    """Return whether two members have equal costs, as members of the same structure do."""
    costs = [(member.report.student.macs, member.report.student.params) for member in (one, other)]
    return costs[0] == costs[1]


def _timed(
    search: _Search, members: Sequence[CompressionResult], original_ms: float | None = None
) -> list[CompressionResult]:
    """Return the members with comparable latencies, which were measured in turn with the original's.

    Args:
        search: The state that the members share.
        members: The members.
        original_ms: The original's latency when other members were timed. Latencies are scaled by it, so that they
            compare with those of the other members.
    """
    models = {"original": search.original, **{str(i): member.model for i, member in enumerate(members)}}
    batch = search.images.normalised[: min(members[0].plan.budget.batch_size, search.config.micro_batch_size)]
    clock = InPrecision(time_forward, Precision.of_caller())
    latency = measure_latency(models, batch, TIMING, stopwatch=clock)
    ours = latency["original"].median_ms
    theirs = ours if original_ms is None else original_ms
    timed = []
    for i, member in enumerate(members):
        report, found = member.report, latency[str(i)]
        report = replace(
            report,
            teacher=replace(report.teacher, latency_ms=theirs),
            student=replace(report.student, latency_ms=found.median_ms * theirs / ours),
            latency_ratio=found.ratio_to(latency["original"]),
            latency_batch=len(batch),
        )
        timed.append(replace(member, report=report))
    return timed


def _plans(original: nn.Module, budgets: Iterable[float | int | Budget], config: DCViT) -> list[Plan]:
    """Return the plan of each budget, largest first.

    Raises:
        BudgetError: If there is no budget, two give the same structure, their metrics or conventions differ, or one
            cannot be met.
    """
    targets = [budget if isinstance(budget, Budget) else Budget(macs=budget) for budget in budgets]
    if not targets:
        raise BudgetError("budgets=(): expected at least one, for example (0.9, 0.8, 0.7).")
    if len({(budget.metric, budget.convention) for budget in targets}) > 1:
        raise BudgetError("budgets: expected one metric and one convention for all, so that they can be ordered.")
    if targets[0].metric not in ADDITIVE:
        raise BudgetError(
            f"budgets of {targets[0].metric}: expected one of {', '.join(ADDITIVE)}; use Family.at for a latency."
        )
    plans = sorted((plan(original, budget, config) for budget in targets), key=lambda p: p.target, reverse=True)
    for larger, smaller in pairwise(plans):
        if larger.cost == smaller.cost:
            raise BudgetError(
                f"budgets: {larger.budget.value!r} and {smaller.budget.value!r} give the same structure; leave one of "
                "them out."
            )
    return plans


def check_family_folder(folder: str | Path, *, overwrite: bool) -> None:
    """Refuse a folder to which a family cannot be saved, before any long work.

    Raises:
        SaveFolderError: If it is a file, cannot be written, holds something else, or holds an earlier family and
            `overwrite` is not set. Also if that family is broken, or holds a file that dcvit did not write.
    """
    folder = Path(folder)
    check_folder(folder)
    require_writable(folder)
    present = {name for name in os.listdir(folder) if not is_draft(name)} if folder.is_dir() else set()
    if not present:
        return
    if FAMILY_FILE not in present:
        raise SaveFolderError(f"{str(folder)!r} holds something else: name a folder that is empty or does not exist.")
    if not overwrite:
        raise SaveFolderError(
            f"{str(folder)!r} holds an earlier family: name another folder, or pass overwrite (--overwrite)."
        )
    check_report_file(folder / REPORT_FILE)
    earlier = [name for name in _read_index(folder).folders if kind_of(folder / name) in (None, "a folder")]
    foreign = sorted(present - {FAMILY_FILE, REPORT_FILE, *earlier})
    if foreign:
        raise SaveFolderError(
            f"{str(folder)!r} holds something else beside an earlier family ({', '.join(foreign[:3])}), which "
            "would be deleted: move that away, or name another folder."
        )
    for name in earlier:
        check_output_folder(folder / name, overwrite=True)


def load_family(folder: str | Path) -> Family:
    """Load a family that `Family.save` wrote.

    Args:
        folder: The folder with `family.json`.

    Raises:
        SaveFolderError: If it holds no family, or a member is missing, broken, or from another family.
    """
    return read_together(Path(folder) / FAMILY_FILE, lambda: _load_family(Path(folder)))


def _load_family(folder: Path) -> Family:
    index = _read_index(folder)
    members = []
    for name, recorded in zip(index.folders, index.digests, strict=True):
        if (folder / name).is_symlink():
            raise SaveFolderError(f"{str(folder / name)!r} is a link: put the member's folder itself in its place.")
        members.append(load(folder / name))
        if recorded not in (None, digest(folder / name / RESULT_FILE)):  # earlier versions saved no digests
            raise SaveFolderError(
                f"{str(folder / name)!r} is not the member that {FAMILY_FILE} was saved with: copy the whole folder "
                "again, or sweep again."
            )
    return Family(index.original, members)


@dataclass(frozen=True)
class _Index:
    """The part of `family.json` that is needed to load a family."""

    original: ModelFigures
    folders: tuple[str, ...]
    digests: tuple[Any, ...]


def _read_index(folder: Path) -> _Index:
    """Read the index of a family.

    Raises:
        SaveFolderError: If it is not an index, or names members that are not folders beside it.
    """
    path = folder / FAMILY_FILE
    index = read_json(path)
    try:
        original = from_plain(ModelFigures, index["original"])
        names = [member["folder"] for member in index["members"]]
        digests = tuple(member.get(DIGEST) for member in index["members"])
    except (AttributeError, LookupError, TypeError) as error:
        raise SaveFolderError(
            f"{str(path)!r} is not an index of a family ({error!r}): sweep again, to another folder."
        ) from error
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(MEMBER, name):
            raise SaveFolderError(
                f"{str(path)!r} names the member {reprlib.repr(name)}: expected a folder beside it, such as macs-1000."
            )
    if len(set(names)) < len(names):
        raise SaveFolderError(f"{str(path)!r} names a member twice: sweep again, to another folder.")
    if not names:
        raise SaveFolderError(f"{str(path)!r} lists no members: sweep again, to another folder.")
    return _Index(original, tuple(names), digests)
