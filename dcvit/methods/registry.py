"""The table of methods, and what each is given and gives back.

A module that holds a method registers it; after `import dcvit.methods` the table is complete.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from dcvit.config import CompressionConfig, MimickingConfig, ReconstructionConfig
from dcvit.distributed import ALONE, Ranks
from dcvit.errors import BudgetError, DcvitError, UnsupportedModelError
from dcvit.images import FewShotImages
from dcvit.latency import Stopwatch, time_forward
from dcvit.models import adapter_for
from dcvit.planning import ADDITIVE, Budget, Plan
from dcvit.progress import Progress, silent
from dcvit.ranking import Trial
from dcvit.reconstruction import Reconstruction
from dcvit.recovery import Recovery
from dcvit.refinement import Refinement
from dcvit.run_store import NOTHING_KEPT, Store
from dcvit.synthesis import MetricSet

__all__ = ["METHODS", "Method", "Outcome", "Task", "Timer", "method", "register"]


@dataclass
class Timer:
    """Wall-clock seconds of each stage, added up over its runs."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if torch.cuda.is_initialized():
            for device in range(torch.cuda.device_count()):
                if torch.cuda.memory_allocated(device):  # else asking it would set it up
                    torch.cuda.synchronize(device)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Task:
    """What a method is given.

    Attributes:
        teacher: The original, frozen.
        images: The few-shot set.
        budget: What the student may cost.
        config: Every knob; each method says which ones it reads.
        timer: Takes the time of the stages.
        progress: Told how it goes.
        stopwatch: Times one pass, for a budget of latency.
        metric_set: Images of the caller's to rank blocks on.
        store: Keeps finished units of work, see `dcvit.run_store`.
        ranks: The processes that share the work.
    """

    teacher: nn.Module
    images: FewShotImages
    budget: Budget
    config: CompressionConfig
    timer: Timer = field(default_factory=Timer)
    progress: Progress = silent
    stopwatch: Stopwatch = time_forward
    metric_set: MetricSet | None = None
    store: Store = NOTHING_KEPT
    ranks: Ranks = ALONE


@dataclass(frozen=True)
class Outcome:
    """What a method arrives at.

    Attributes:
        student: The compressed model.
        plan: Its structure. A block of `blocks` that is not in `kept_nodes` was dropped whole.
        trials: Of each candidate block, best first, where the method tries them.
        pruning_trials: Of each block that might keep its attention and lose hidden nodes only, likewise.
        learning_rate: Given or found: of the mimicking, or the step size of reconstruction; 0 without gradient steps.
        steps: How each mimicking went.
        reconstructions: How each block was fitted, front to back.
        refinement: How the student mimicked after that.
        metric_set: What blocks were ranked on.
    """

    student: nn.Module
    plan: Plan
    trials: tuple[Trial, ...] = ()
    learning_rate: float = 0.0
    steps: tuple[Recovery, ...] = ()
    reconstructions: tuple[Reconstruction, ...] = ()
    refinement: Refinement | None = None
    metric_set: MetricSet | None = None
    pruning_trials: tuple[Trial, ...] = ()


@dataclass(frozen=True)
class Method:
    """A way to compress a model.

    Attributes:
        name: What `dcvit.compress(method=...)` takes.
        title: What it does, in a line.
        source: The paper.
        families: The model families that it handles, see `ModelAdapter.family`.
        recovery: The kind of `CompressionConfig.recovery` that it reads, with its defaults where no config is given;
            `None` if it changes no weight.
        compress: The method. It refuses what it cannot do before any long work.
        units: What the budgets that it meets are of, see `dcvit.planning.UNITS`.
        resumable: Whether it does its units through `Task.store`, so that a run that was killed goes on, and shares
            its work over `Task.ranks`.
    """

    name: str
    title: str
    source: str
    families: tuple[str, ...]
    recovery: type[ReconstructionConfig] | type[MimickingConfig] | None
    compress: Callable[[Task], Outcome]
    units: tuple[str, ...] = ADDITIVE
    resumable: bool = False

    def config(self) -> CompressionConfig:
        """The settings that it has by default."""
        return CompressionConfig() if self.recovery is None else CompressionConfig(recovery=self.recovery())

    def require_family(self, model: nn.Module) -> None:
        """Refuse a model of a family that the method does not handle.

        Raises:
            UnsupportedModelError: Naming the methods that do.
        """
        family = adapter_for(model).family
        if family not in self.families:
            others = ", ".join(other.name for other in METHODS.values() if family in other.families)
            raise UnsupportedModelError(
                f"method={self.name!r} handles models of the family {' or '.join(self.families)}, and this one is a "
                f"{family}: choose one of {others}."
            )

    def require_unit(self, budget: Budget) -> None:
        """Refuse a budget of what the method does not save.

        Raises:
            BudgetError: Naming the methods that do.
        """
        if budget.unit not in self.units:
            others = ", ".join(other.name for other in METHODS.values() if budget.unit in other.units)
            raise BudgetError(
                f"{budget.unit}={budget.value!r}: method={self.name!r} meets budgets of {', '.join(self.units)} alone; "
                f"ask for one of these, or choose one of {others}."
            )


METHODS: dict[str, Method] = {}
"""All methods, by name."""


def register(method: Method) -> Method:
    """Enter a method in the table."""
    METHODS[method.name] = method
    return method


def method(name: str) -> Method:
    """A method by its name.

    Raises:
        DcvitError: If there is none of that name.
    """
    if name not in METHODS:
        raise DcvitError(f"method={name!r}: expected one of {', '.join(METHODS)} (`dcvit methods` describes them).")
    return METHODS[name]
