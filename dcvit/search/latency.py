"""Step 1 for latency: find the structure that meets a latency budget on this device.

The latency model (`dcvit.metrics.latency_model`) proposes k and the number of hidden units kept. The proposed structure
is timed in alternation with the original, and the measured saving corrects the model. This repeats until a structure
meets the budget. Latency depends only on the structure, so planning uses pruned skeletons without recovery, before any
long computation.
"""

from collections.abc import Iterable
from statistics import mean

import torch
from torch import nn

from dcvit.budget import Budget
from dcvit.config import DCViT
from dcvit.errors import BudgetError
from dcvit.history import LatencyModel, Plan, PlannedLatency, StructureTiming
from dcvit.metrics.latency import Stopwatch, time_forward
from dcvit.metrics.latency_model import calibrate, time_structures
from dcvit.runtime.progress import Progress, silent
from dcvit.search.plan import plan
from dcvit.search.space import SearchSpace, search_space

__all__ = ["TOLERANCE", "plan_latency", "require_planned"]

TOLERANCE = 0.03
"""Largest relative deviation of a structure's latency from the goal."""

CLOSE = 0.01
"""Relative deviation at which the search stops; the rest of the tolerance is for noise."""

MAX_TIMINGS = 12
"""Largest number of timings before the search fails."""

MAX_REPEATS = 3
"""Largest number of timings of one structure.

On a busy machine a single timing can be off by as much as the tolerance; the mean of several is closer.
"""


def plan_latency(
    model: nn.Module,
    budget: Budget,
    config: DCViT | None = None,
    *,
    latency_model: LatencyModel | None = None,
    stopwatch: Stopwatch = time_forward,
    progress: Progress = silent,
) -> Plan:
    """Find k and r_d for a latency, by measuring on the model's device.

    Args:
        model: The original model, in evaluation mode.
        budget: A budget of `latency` or `latency_ms`, with its batch size. Budgets of other metrics are passed to
            `plan`.
        config: The method's config, whose `candidates`, `num_blocks` and `round_to` bound the choice.
        latency_model: Result of an earlier `calibrate` at this batch size; by default it is calibrated here.
        stopwatch: Function that times one run.
        progress: Callback that is called after each round of timing.

    Returns:
        The plan with the measurements in `latency`. The blocks are not chosen yet.

    Raises:
        UnsupportedModelError: If no adapter handles the model.
        BudgetError: If no structure was found within 3 % of the target (the message says what can be met), or the
            device has not enough memory for a batch.
    """
    config = config or DCViT()
    if not budget.measured:
        return plan(model, budget, config)
    space = search_space(model, config)
    _ = space.block  # raises with advice if blocks differ in size
    try:
        return _measured_plan(model, budget, space, latency_model, stopwatch, progress)
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
    raise BudgetError(
        f"batch_size={budget.batch_size}: the device ran out of memory for a batch of this size ({reason}). Pass a "
        "smaller batch_size in the budget."
    )


def _measured_plan(
    model: nn.Module,
    budget: Budget,
    space: SearchSpace,
    latency_model: LatencyModel | None,
    stopwatch: Stopwatch,
    progress: Progress,
) -> Plan:
    """Plan the structure as `plan_latency` describes."""
    if latency_model is None:
        latency_model = calibrate(model, space.candidates, budget.batch_size, stopwatch=stopwatch, progress=progress)
    elif latency_model.batch_size != budget.batch_size:
        raise BudgetError(
            f"batch_size={budget.batch_size}: the latency model was calibrated at {latency_model.batch_size}; "
            "calibrate it again."
        )
    goal = _goal(budget, latency_model)

    def measure(*structures: tuple[int, int]) -> tuple[StructureTiming, ...]:
        return time_structures(
            model, structures, space.candidates, budget.batch_size, stopwatch=stopwatch, progress=progress
        )

    timings: list[StructureTiming] = []
    if goal < 1:
        gain = 1.0  # measured saving over the saving that the latency model predicts
        while len(timings) < MAX_TIMINGS:
            structure = _propose(latency_model, space, goal, gain)
            if sum(timing.structure == structure for timing in timings) == MAX_REPEATS:
                break
            timings += measure(structure)
            if abs(_mean_ratios(timings)[structure] / goal - 1) <= CLOSE:
                break
            gain = _gain(latency_model, goal, timings)
        ratios = _mean_ratios(timings)
        best = min(ratios, key=lambda structure: abs(ratios[structure] - goal))
        if abs(ratios[best] / goal - 1) <= TOLERANCE:
            return space.plan(
                budget,
                goal * latency_model.original_ms,
                space.alike(*best),
                latency=PlannedLatency(latency_model, goal, ratios[best], tuple(timings)),
            )
    ends = measure((space.counts[-1], 0), (space.counts[0], space.widths[-1]))
    raise BudgetError(_not_met(budget, goal, latency_model, space, timings, ends))


def require_planned(found: Plan, model: nn.Module, budget: Budget, config: DCViT) -> None:
    """Refuse a plan that `plan_latency` could not return on any device.

    Args:
        found: The plan.
        model: The original model.
        budget: The latency budget.
        config: The config that the plan was made with.

    Raises:
        ValueError: If the plan does not fit the budget, the model or the config.
    """
    space, measured = search_space(model, config), found.latency
    structure = found.num_blocks, found.hidden_features
    if measured is None or measured.model.original_ms <= 0 or measured.model.batch_size != budget.batch_size:
        raise ValueError("its latency was not measured as the budget requires")
    goal = _goal(budget, measured.model)
    within = measured.goal == goal < 1 and abs(measured.ratio / goal - 1) <= TOLERANCE
    if not within or _mean_ratios(measured.timings).get(structure) != measured.ratio:
        raise ValueError(f"its latency is {measured.ratio} of the original's: expected {goal}")
    target = goal * measured.model.original_ms
    if (
        structure[0] not in space.counts
        or structure[1] not in space.widths
        or found != space.plan(budget, target, space.alike(*structure), latency=measured)
    ):
        raise ValueError(f"its figures do not fit {structure[0]} blocks with {structure[1]} hidden units")


def _goal(budget: Budget, model: LatencyModel) -> float:
    """Return the required latency as a share of the original's."""
    return float(budget.value if budget.metric == "latency" else budget.value / model.original_ms)


def _mean_ratios(timings: Iterable[StructureTiming]) -> dict[tuple[int, int], float]:
    """Return the mean latency ratio of each structure's timings."""
    by_structure: dict[tuple[int, int], list[float]] = {}
    for timing in timings:
        by_structure.setdefault(timing.structure, []).append(timing.ratio)
    return {structure: mean(ratios) for structure, ratios in by_structure.items()}


def _saving(model: LatencyModel, k: int, kept: int) -> float:
    """Return the share of the original's latency that the latency model predicts as saved, always above 0."""
    return max(1 - model.predict(k, kept) / model.original_ms, 1e-4)


def _gain(model: LatencyModel, goal: float, timings: Iterable[StructureTiming]) -> float:
    """Return the measured saving over the predicted saving, with larger weights for timings near the goal."""
    saved = predicted = 0.0
    for timing in timings:
        weight = (abs(timing.ratio / goal - 1) + CLOSE) ** -2  # averages out noise; distant timings hardly count
        saved += weight * (1 - timing.ratio)
        predicted += weight * _saving(model, *timing.structure)
    return max(saved, 0.01 * predicted) / predicted


def _propose(model: LatencyModel, space: SearchSpace, goal: float, gain: float) -> tuple[int, int]:
    """Return the fewest blocks that save enough, and the most hidden units with which they still do.

    If no structure saves enough, return the smallest one.
    """
    required = 1 - goal
    k = next((k for k in space.counts if gain * _saving(model, k, 0) >= required), space.counts[-1])
    kept = max((h for h in space.widths if gain * _saving(model, k, h) >= required), default=0)
    return k, kept


def _not_met(
    budget: Budget,
    goal: float,
    model: LatencyModel,
    space: SearchSpace,
    timings: list[StructureTiming],
    ends: tuple[StructureTiming, ...],
) -> str:
    """Return an error message with the requested latency, the reachable range and the nearest structure."""
    original = model.original_ms
    low, high = (end.ratio for end in ends)
    ratios = _mean_ratios((*timings, *ends))
    nearest = min(ratios, key=lambda structure: abs(ratios[structure] - goal))
    return (
        f"{budget.metric}={budget.value!r} asks for {goal:.4f} of the original's {original:.3f} ms at batch "
        f"{model.batch_size}; measured, {len(space.candidates)} candidate blocks reach {low:.4f} to {high:.4f} "
        f"({low * original:.3f} to {high * original:.3f} ms). Nearest is {ratios[nearest]:.4f}, {nearest[0]} "
        f"blocks with {nearest[1]} hidden units each." + (space.more_blocks() if goal < low else "")
    )
