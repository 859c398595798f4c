"""What a model costs, in the metric of a budget."""

from torch import nn

from dcvit.budget import Budget
from dcvit.costs import file_size
from dcvit.metrics.memory import trace_activation_memory
from dcvit.models import compressible

__all__ = ["spent"]


def spent(model: nn.Module, budget: Budget) -> int:
    """Return what a model costs, in a budget's metric.

    Raises:
        BudgetError: If the metric is latency, which has to be measured.
    """
    if budget.metric == "file_size":
        return file_size(model.state_dict())
    if budget.metric == "activation_memory":
        return trace_activation_memory(model, budget.batch_size)
    return budget.amount(compressible(model).cost().total)
