"""The table of methods, with the inputs and results that they share.

Each method's module registers it. The table is complete after `import dcvit.methods`.
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
    """The inputs of a method.

    Attributes:
        teacher: The original, frozen.
        images: The few-shot set.
        budget: What the student may cost.
        config: The method's settings. Their type identifies the method.
        context: How the run is carried out. Its seed and impl are the config's.
        stopwatch: Times one forward pass, for latency budgets.
        proxy_set: The caller's images to rank blocks on, if there are any.
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
    """The result of a method.

    Attributes:
        student: The compressed model.
        plan: Its structure. A block of `blocks` that is not in `kept_units` was dropped whole.
        probes: The sensitivity probes of the candidate blocks, best first, if the method makes any.
        pruning_probes: The probes of the blocks that can keep their attention and lose only hidden units, best first.
        learning_rate: The learning rate of distillation or the step size of reconstruction, as configured or found; 0
            without gradient steps.
        steps: A report of each distillation.
        reconstructions: A report of each fitted block, front to back.
        refinement: A report of the distillation that follows reconstruction.
        proxy_set: The images that blocks were ranked on.
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
        name: The name that `dcvit.compress(method=...)` accepts; it stands for the default `config`.
        config: The type of its settings. An instance selects the method in that call.
        title: What it does, in one line.
        source: The paper.
        families: The model families that it supports, see `ModelView.family`.
        compress: Runs the method. It refuses unsupported inputs before any long work.
        metrics: The budget metrics that it supports, see `dcvit.budget.METRICS`.
        resumable: Whether it keeps checkpoint entries in its context's store, so that a killed run can resume, and
            shares its work over the context's processes.
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
        """Refuse a model of a family that the method does not support.

        Raises:
            UnsupportedModelError: If so; the message names the methods that support the family.
        """
        family = compressible(model).family
        if family not in self.families:
            others = ", ".join(other.name for other in METHODS.values() if family in other.families)
            raise UnsupportedModelError(
                f"method={self.name!r} handles models of the family {' or '.join(self.families)}, and this one is a "
                f"{family}: choose one of {others}."
            )

    def require_metric(self, budget: Budget) -> None:
        """Refuse a budget whose metric the method does not support.

        Raises:
            BudgetError: If so; the message names the methods that support the metric.
        """
        if budget.metric not in self.metrics:
            others = ", ".join(other.name for other in METHODS.values() if budget.metric in other.metrics)
            raise BudgetError(
                f"{budget.metric}={budget.value!r}: method={self.name!r} meets only budgets of "
                f"{', '.join(self.metrics)}; ask for one of these, or choose one of {others}."
            )


METHODS: dict[str, Method] = {}
"""All methods, by name."""


def register(method: Method) -> None:
    """Add a method to the table."""
    METHODS[method.name] = method


def method_of(choice: str | MethodConfig) -> tuple[Method, MethodConfig]:
    """Return the method that a config or a name selects, and its settings.

    Args:
        choice: A config, or the name of a method, which stands for its default config.

    Raises:
        DcvitError: If it is neither.
    """
    if isinstance(choice, str) and choice in METHODS:
        return METHODS[choice], METHODS[choice].config()
    for method in METHODS.values():
        if type(choice) is method.config:
            return method, choice
    types = ", ".join(method.config.__name__ for method in METHODS.values())
    raise DcvitError(
        f"method={choice!r}: expected a config ({types}), or the name of a method, one of {', '.join(METHODS)} "
        "(`dcvit methods` describes them)."
    )
