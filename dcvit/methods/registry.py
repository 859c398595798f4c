"""The table of methods, and what each is given and gives back.

A module that holds a method registers it; after `import dcvit.methods` the table is complete.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import nn

from dcvit.budget import ADDITIVE, Budget
from dcvit.config import MethodConfig
from dcvit.context import RunContext
from dcvit.data.images import FewShotImages
from dcvit.data.synthesis import ProxySet
from dcvit.errors import BudgetError, DcvitError, UnsupportedModelError
from dcvit.history import Plan, Probe, Reconstruction, Recovery, Refinement
from dcvit.metrics.latency import Stopwatch, time_forward
from dcvit.models import compressible

__all__ = ["METHODS", "Method", "Outcome", "Task", "method_of", "register"]

Config = TypeVar("Config", bound=MethodConfig, covariant=True)


@dataclass(frozen=True)
class Task(Generic[Config]):
    """What a method is given.

    Attributes:
        teacher: The original, frozen.
        images: The few-shot set.
        budget: What the student may cost.
        config: The method's settings; their type says which method.
        context: How the run is carried out; its seed and impl are the config's.
        stopwatch: Times one pass, for a budget of latency.
        proxy_set: Images of the caller's to rank blocks on.
    """

    teacher: nn.Module
    images: FewShotImages
    budget: Budget
    config: Config
    context: RunContext
    stopwatch: Stopwatch = time_forward
    proxy_set: ProxySet | None = None


@dataclass(frozen=True)
class Outcome:
    """What a method arrives at.

    Attributes:
        student: The compressed model.
        plan: Its structure. A block of `blocks` that is not in `kept_units` was dropped whole.
        probes: Of each candidate block, best first, where the method tries them.
        pruning_probes: Of each block that might keep its attention and lose hidden units only, likewise.
        learning_rate: Given or found: of the distillation, or the step size of reconstruction; 0 without gradient steps.
        steps: How each distillation went.
        reconstructions: How each block was fitted, front to back.
        refinement: How the student mimicked after that.
        proxy_set: What blocks were ranked on.
    """

    student: nn.Module
    plan: Plan
    probes: tuple[Probe, ...] = ()
    learning_rate: float = 0.0
    steps: tuple[Recovery, ...] = ()
    reconstructions: tuple[Reconstruction, ...] = ()
    refinement: Refinement | None = None
    proxy_set: ProxySet | None = None
    pruning_probes: tuple[Probe, ...] = ()


@dataclass(frozen=True)
class Method:
    """A way to compress a model.

    Attributes:
        name: What `dcvit.compress(method=...)` takes for the default of `config`.
        config: The type of its settings, which names the method in that call.
        title: What it does, in a line.
        source: The paper.
        families: The model families that it handles, see `ModelView.family`.
        compress: The method. It refuses what it cannot do before any long work.
        metrics: What the budgets that it meets are of, see `dcvit.budget.METRICS`.
        resumable: Whether it does its units through its context's store, so that a run that was killed goes on, and
            shares its work over the context's ranks.
    """

    name: str
    config: type[MethodConfig]
    title: str
    source: str
    families: tuple[str, ...]
    compress: Callable[[Task[Any]], Outcome]
    metrics: tuple[str, ...] = ADDITIVE
    resumable: bool = False

    def require_family(self, model: nn.Module) -> None:
        """Refuse a model of a family that the method does not handle.

        Raises:
            UnsupportedModelError: Naming the methods that do.
        """
        family = compressible(model).family
        if family not in self.families:
            others = ", ".join(other.name for other in METHODS.values() if family in other.families)
            raise UnsupportedModelError(
                f"method={self.name!r} handles models of the family {' or '.join(self.families)}, and this one is a "
                f"{family}: choose one of {others}."
            )

    def require_metric(self, budget: Budget) -> None:
        """Refuse a budget of what the method does not save.

        Raises:
            BudgetError: Naming the methods that do.
        """
        if budget.metric not in self.metrics:
            others = ", ".join(other.name for other in METHODS.values() if budget.metric in other.metrics)
            raise BudgetError(
                f"{budget.metric}={budget.value!r}: method={self.name!r} meets budgets of {', '.join(self.metrics)} alone; "
                f"ask for one of these, or choose one of {others}."
            )


METHODS: dict[str, Method] = {}
"""All methods, by name."""


def register(method: Method) -> None:
    """Enter a method in the table."""
    METHODS[method.name] = method


def method_of(given: str | MethodConfig) -> tuple[Method, MethodConfig]:
    """The method that a config is of, or a name stands for, and its settings.

    Args:
        given: A config, or the name of a method, which stands for its default config.

    Raises:
        DcvitError: If it is neither.
    """
    if isinstance(given, str) and given in METHODS:
        return METHODS[given], METHODS[given].config()
    for method in METHODS.values():
        if type(given) is method.config:
            return method, given
    types = ", ".join(method.config.__name__ for method in METHODS.values())
    raise DcvitError(
        f"method={given!r}: expected a config ({types}), or the name of a method, one of {', '.join(METHODS)} "
        "(`dcvit methods` describes them)."
    )
