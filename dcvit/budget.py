"""What a compressed model may cost."""

import math
from dataclasses import dataclass
from typing import Any

from dcvit.costs import MAC_CONVENTIONS, Cost, MacConvention
from dcvit.errors import BudgetError
from dcvit.serialization import plain_numbers

__all__ = ["ADDITIVE", "METRICS", "PER_BATCH", "Budget"]

PER_BATCH = ("activation_memory", "latency", "latency_ms")
"""Those that depend on the batch size."""


@dataclass(frozen=True)
class Budget:
    """What the compressed model may cost, in exactly one of these units.

    Attributes:
        macs: MACs per image. A float in (0, 1) is a fraction of the original, an int an absolute number.
        params: Number of parameters, likewise.
        file_size: Bytes of the saved weights (`model.safetensors`), likewise.
        activation_memory: Peak bytes of the activations of one inference pass over a batch, likewise; weights and the
            input are not counted, see `dcvit.metrics.memory`.
        latency: Time of one inference pass over a batch on the model's device, a fraction in (0, 1) of the original's.
            It is measured, and met to within 3 %, see `dcvit.search.latency`.
        latency_ms: The same in milliseconds, an int or a float. The original is timed once to turn them into a
            fraction; from then on models are timed in turn, so that a change of the machine's load moves no goal.
        batch_size: Images a batch, for `activation_memory` and latency.
        convention: Which MACs count, see `dcvit.costs.MacConvention`.

    Raises:
        BudgetError: If none or several are given, or a value is out of range.
    """

    macs: float | int | None = None
    params: float | int | None = None
    convention: MacConvention = "with_attention_products"
    file_size: float | int | None = None
    activation_memory: float | int | None = None
    latency: float | None = None
    latency_ms: float | int | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        plain_numbers(self)
        given = {metric: getattr(self, metric) for metric in METRICS if getattr(self, metric) is not None}
        if len(given) != 1:
            shown = ", ".join(f"{metric}={value!r}" for metric, value in given.items())
            raise BudgetError(
                f"Budget({shown}): expected exactly one of {', '.join(METRICS)}, "
                "for example Budget(macs=0.75) for three quarters of the original's MACs."
            )
        if self.convention not in MAC_CONVENTIONS:
            raise BudgetError(f"convention={self.convention!r}: expected one of {', '.join(MAC_CONVENTIONS)}.")
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise BudgetError(f"batch_size={self.batch_size!r}: expected an int, 1 or more.")
        value, metric = self.value, self.metric
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BudgetError(f"{metric}={value!r}: expected a float (fraction) or an int (absolute number).")
        if metric == "latency_ms":
            if not 0 < value < math.inf:
                raise BudgetError(
                    f"latency_ms={value!r}: expected a positive number of milliseconds; "
                    "a fraction of the original goes into latency=."
                )
            return
        if isinstance(value, float) and not 0.0 < value < 1.0:
            raise BudgetError(
                f"{metric}={value!r}: a float is a fraction of the original and lies between 0 and 1, both "
                f"excluded. {self._absolute}"
            )
        if isinstance(value, int) and (metric == "latency" or value <= 0):
            wanted = (
                "expected a fraction of the original" if metric == "latency" else "an absolute number must be positive"
            )
            raise BudgetError(f"{metric}={value!r}: {wanted}. {self._absolute}")

    @property
    def metric(self) -> str:
        """The name of the field that is given, for example `"macs"`."""
        return next(metric for metric in METRICS if getattr(self, metric) is not None)

    @property
    def value(self) -> float | int:
        """The figure that was given."""
        value: float | int = getattr(self, self.metric)
        return value

    @property
    def measured(self) -> bool:
        """Whether it is of latency, which planning has to measure."""
        return self.metric in ("latency", "latency_ms")

    @property
    def _absolute(self) -> str:
        if self.metric == "latency":
            return "For milliseconds pass latency_ms=."
        return f"Pass an int for an absolute number of {self.metric}."

    def amount(self, cost: Cost) -> int:
        """How many MACs or parameters a part costs.

        Raises:
            BudgetError: If the budget is of something that a part's cost does not tell.
        """
        if self.metric not in ("macs", "params"):
            raise BudgetError(f"{self.metric}: a part's cost tells MACs and parameters only.")
        return cost.macs(self.convention) if self.metric == "macs" else cost.params

    def target(self, cost: Cost) -> int:
        """The absolute target for a model of this cost, of MACs or parameters."""
        return self.target_of(self.amount(cost))

    def target_of(self, original: int) -> int:
        """The absolute target where the original has `original` of this budget's unit."""
        value = self.value
        return int(value * original) if isinstance(value, float) else value

    def to_dict(self) -> dict[str, Any]:
        """The arguments that make this budget."""
        batch = {"batch_size": self.batch_size} if self.metric in PER_BATCH else {}
        return {self.metric: self.value, "convention": self.convention, **batch}


METRICS = ("macs", "params", "file_size", "activation_memory", "latency", "latency_ms")
"""What a budget can be of; the names of `Budget`'s fields."""


ADDITIVE = ("macs", "params", "file_size")
"""Those of which every block and every hidden unit takes its own part, whatever else is compressed."""
