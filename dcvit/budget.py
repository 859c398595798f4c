"""The budget of a compression: a bound on the cost of the compressed model."""

import math
from dataclasses import dataclass
from typing import Any

from dcvit.costs import MAC_CONVENTIONS, Cost, MacConvention
from dcvit.errors import BudgetError
from dcvit.serialization import plain_numbers

__all__ = ["ADDITIVE", "METRICS", "PER_BATCH", "Budget"]

PER_BATCH = ("activation_memory", "latency", "latency_ms")
"""The metrics that depend on the batch size."""


@dataclass(frozen=True)
class Budget:
    """Bound on the cost of the compressed model, in exactly one metric.

    A float in (0, 1) is a fraction of the original model's cost, and an int is an absolute number.

    Attributes:
        macs: MACs per image.
        params: Number of parameters.
        file_size: Size of the saved weights (`model.safetensors`) in bytes.
        activation_memory: Peak memory of the activations of one inference pass over a batch, in bytes. Weights and the
            input are not counted, see `dcvit.metrics.memory`.
        latency: Time of one inference pass over a batch on the model's device, as a fraction of the original's. It is
            measured, and met to within 3 %, see `dcvit.search.latency`.
        latency_ms: Time of one inference pass over a batch, in milliseconds, an int or a float. The original is timed
            once to convert it to a fraction. After that, models are timed in alternation with the original, so a change
            of the machine's load does not change the goal.
        batch_size: Images per batch, for `activation_memory` and latency.
        convention: Which MACs count, see `dcvit.costs.MacConvention`.

    Raises:
        BudgetError: If no metric or several metrics are set, or a value is out of range.
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
        specified = {metric: getattr(self, metric) for metric in METRICS if getattr(self, metric) is not None}
        if len(specified) != 1:
            shown = ", ".join(f"{metric}={value!r}" for metric, value in specified.items())
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
                    "pass a fraction of the original as latency=."
                )
            return
        if isinstance(value, float) and not 0.0 < value < 1.0:
            raise BudgetError(
                f"{metric}={value!r}: a float is a fraction of the original and lies between 0 and 1, both "
                f"excluded. {self._absolute}"
            )
        if isinstance(value, int) and (metric == "latency" or value <= 0):
            expected = (
                "expected a fraction of the original" if metric == "latency" else "an absolute number must be positive"
            )
            raise BudgetError(f"{metric}={value!r}: {expected}. {self._absolute}")

    @property
    def metric(self) -> str:
        """Name of the field that is set, for example `"macs"`."""
        return next(metric for metric in METRICS if getattr(self, metric) is not None)

    @property
    def value(self) -> float | int:
        """Value of that field."""
        value: float | int = getattr(self, self.metric)
        return value

    @property
    def measured(self) -> bool:
        """Whether the metric is latency, which planning has to measure."""
        return self.metric in ("latency", "latency_ms")

    @property
    def _absolute(self) -> str:
        if self.metric == "latency":
            return "For milliseconds pass latency_ms=."
        return f"Pass an int for an absolute number of {self.metric}."

    def amount(self, cost: Cost) -> int:
        """Return the number of MACs or parameters in a cost.

        Raises:
            BudgetError: If the budget's metric is neither of them.
        """
        if self.metric not in ("macs", "params"):
            raise BudgetError(f"{self.metric}: the cost of a part holds only MACs and parameters.")
        return cost.macs(self.convention) if self.metric == "macs" else cost.params

    def target(self, cost: Cost) -> int:
        """Return the absolute target for an original model of this cost, in MACs or parameters."""
        return self.target_of(self.amount(cost))

    def target_of(self, original: int) -> int:
        """Return the absolute target for an original model that costs `original` in the budget's metric."""
        value = self.value
        return int(value * original) if isinstance(value, float) else value

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments that create this budget."""
        batch = {"batch_size": self.batch_size} if self.metric in PER_BATCH else {}
        return {self.metric: self.value, "convention": self.convention, **batch}


METRICS = ("macs", "params", "file_size", "activation_memory", "latency", "latency_ms")
"""The metrics of a budget, which are names of `Budget`'s fields."""


ADDITIVE = ("macs", "params", "file_size")
"""The additive metrics: the cost of a block or hidden unit does not depend on what else is compressed."""
