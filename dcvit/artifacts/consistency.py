"""Checks that the parts of a saved result agree with each other.

`dcvit.serialization` checks each value of a file separately. This module checks relations between values: every block
exists and is named once, lists that belong together have equal lengths, and figures that are used as divisors are
positive.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from dcvit.history import Plan

if TYPE_CHECKING:
    from dcvit.history import ModelFigures, Report

__all__ = ["require_consistent"]


def require_consistent(plan: Plan, report: "Report") -> None:
    """Refuse a plan and a report that contradict themselves or each other.

    Args:
        plan: The plan of a saved result.
        report: Its report. Values that earlier versions did not record are not compared.

    Raises:
        ValueError: If two values contradict each other; the message names both.
    """
    depth = len(report.blocks or report.blocks_after) or None
    _check_plan(plan, depth)
    _check_shapes(plan, report)
    _check_course(plan, report, depth)
    for name, figures in (("teacher", report.teacher), ("student", report.student)):
        _check_figures(f"report.{name}", figures, plan.budget.metric)
    for name in ("top1", "file_size", "activation_memory"):
        before, after = getattr(report.teacher, name), getattr(report.student, name)
        resaved = name == "file_size" and before is None  # saving measures the student; old results lack the teacher's
        if (before is None) != (after is None) and not resaved:
            raise ValueError(f"report.teacher.{name} is {before} and report.student.{name} {after}: expected both")
    if "dcvit" not in report.versions:
        raise ValueError("report.versions has no dcvit")
    _check_range("report.num_images", report.num_images, 1)
    _check_range("report.agreement", report.agreement, 0, 1)
    _check_range("report.latency_batch", report.latency_batch, 1)
    _check_above_0("report.latency_ratio", report.latency_ratio)


def _check_plan(plan: Plan, depth: int | None) -> None:
    for name, blocks in (
        ("candidates", plan.candidates),
        ("blocks", plan.blocks),
        ("pruned", plan.pruned),
        ("convolved", plan.convolved),
        ("kept_units", tuple(plan.kept_units)),
    ):
        _check_blocks(f"plan.{name}", blocks, depth)
    if not plan.blocks:
        raise ValueError("plan.blocks is empty: expected the blocks that were compressed")
    if plan.num_blocks != len(plan.blocks):
        raise ValueError(f"plan.num_blocks is {plan.num_blocks}, but plan.blocks names {len(plan.blocks)}")
    for name, part, whole_name, whole in (
        ("pruned", plan.pruned, "blocks", plan.blocks),
        ("convolved", plan.convolved, "pruned", plan.pruned),
        ("kept_units", plan.kept_units, "blocks", plan.blocks),
        ("kept_heads", plan.kept_heads, "blocks", plan.blocks),
        ("token_keep_rates", plan.token_keep_rates, "blocks", plan.blocks),
        ("attention_of", plan.attention_of, "blocks", plan.blocks),
        ("mlp_of", plan.mlp_of, "blocks", plan.blocks),
        ("attention_of", plan.attention_of.values(), "attention_of", plan.attention_of),
        ("mlp_of", plan.mlp_of.values(), "mlp_of", plan.mlp_of),
    ):
        _check_within(f"plan.{name}", part, f"plan.{whole_name}", whole)
    if plan.kept_units:
        _check_within("plan.blocks", plan.blocks, "plan.kept_units", plan.kept_units)
    for name, kept in (("kept_units", plan.kept_units), ("kept_heads", plan.kept_heads)):
        for block, indices in kept.items():
            _check_ascending(f"plan.{name}[{block}]", indices)


def _check_shapes(plan: Plan, report: "Report") -> None:
    """Compare the blocks before and after with the units that the plan says were kept."""
    before, after = report.blocks, report.blocks_after
    if before and after and len(before) != len(after):
        raise ValueError(f"report.blocks_after has {len(after)} blocks, report.blocks {len(before)}")
    for block, kept in plan.kept_units.items():
        if before and kept and kept[-1] >= (hidden := before[block].hidden_features):
            raise ValueError(f"plan.kept_units[{block}] keeps hidden unit {kept[-1]} of {hidden}")
        if after and len(kept) != (left := after[block].hidden_features):
            raise ValueError(
                f"plan.kept_units[{block}] keeps {len(kept)} hidden units, report.blocks_after[{block}] has {left}"
            )
    for block, (old, new) in enumerate(zip(before, after, strict=False)):  # after is empty in older results
        if old != new and block not in plan.blocks:
            raise ValueError(f"report.blocks_after[{block}] is not report.blocks[{block}], but it was not compressed")


def _check_course(plan: Plan, report: "Report", depth: int | None) -> None:
    """Check the probes and recoveries."""
    for name, probes in (("probes", report.probes), ("pruning_probes", report.pruning_probes)):
        _check_blocks(f"report.{name}", [probe.block for probe in probes], depth)
        for probe in probes:
            if (curve := probe.sensitivity) is None:
                continue
            where = f"report.{name}: sensitivity of block {probe.block}"
            if len(curve.units) != len(curve.losses):
                raise ValueError(f"{where} has {len(curve.units)} units and {len(curve.losses)} losses")
            _check_ascending(where, curve.units)
    _check_blocks("report.reconstructions", [one.block for one in report.reconstructions], depth)
    if len(report.steps) not in (0, 1, len(plan.blocks)):
        raise ValueError(f"report.steps has {len(report.steps)} entries for {len(plan.blocks)} blocks")


def _check_figures(where: str, figures: "ModelFigures", metric: str) -> None:
    spent = "latency_ms" if metric == "latency" else metric
    if getattr(figures, spent) is None:
        raise ValueError(f"{where}.{spent} is None: expected a number above 0")
    for name in ("macs", "params", "latency_ms", "file_size", "activation_memory"):
        _check_above_0(f"{where}.{name}", getattr(figures, name))
    _check_range(f"{where}.top1", figures.top1, 0, 1)


def _check_range(where: str, value: float | None, least: float, most: float = math.inf) -> None:
    if value is not None and not least <= value <= most:
        raise ValueError(f"{where} is {value}: expected {least} to {most}")


def _check_above_0(where: str, value: float | None) -> None:
    if value is not None and not 0 < value < math.inf:
        raise ValueError(f"{where} is {value}: expected a number above 0")


def _check_blocks(where: str, blocks: Sequence[int], depth: int | None) -> None:
    """Refuse blocks that do not exist or are named twice."""
    seen: set[int] = set()
    for block in blocks:
        if block in seen:
            raise ValueError(f"{where} names block {block} twice")
        if block < 0 or (depth is not None and block >= depth):
            raise ValueError(f"{where} names block {block}" + (f": the model has {depth}, from 0" if depth else ""))
        seen.add(block)


def _check_within(where: str, part: Iterable[int], whole_name: str, whole: Collection[int]) -> None:
    if missing := sorted(set(part) - set(whole)):
        raise ValueError(f"{where} names block {missing[0]}, which {whole_name} does not")


def _check_ascending(where: str, values: Sequence[int]) -> None:
    if list(values) != sorted(set(values)) or (values and values[0] < 0):
        raise ValueError(f"{where}: expected numbers from 0, ascending, each once")
