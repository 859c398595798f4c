"""Ridge regression from sums: normal equations, held-out error, and which inputs to keep.

    min over W, c of  Σ ‖y − W h − c‖² + λ ‖W − W₀‖²

for inputs h `[K]` and targets y `[D]`. All functions here need only Σ hhᵀ, Σ hyᵀ and Σ ‖y‖², so their memory does not
grow with the number of equations. The constant c is never penalised.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FIRST_RIDGE", "RIDGES", "NormalEquations", "best_ridge", "select_inputs"]

RIDGES = (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
"""Candidates of λ, as shares of the mean squared input."""

FIRST_RIDGE = 1e-2
"""Initial value of the search for λ."""

CHUNK = 4096
"""Number of equations whose products are summed in the inputs' own precision before they are added in float64."""

PRINCIPAL_TARGETS = 64
"""Number of principal directions of the targets in `select_inputs`; they hold nearly all that can be explained."""


@dataclass(frozen=True)
class NormalEquations:
    """Sums over a set of equations, in float64. Adding two instances gives the sums over both sets.

    Attributes:
        gram: Σ ĥĥᵀ `[K + 1, K + 1]`, where ĥ is h with a 1 appended.
        moment: Σ ĥyᵀ `[K + 1, D]`.
        energy: Σ ‖y‖².
        count: Number of equations.
    """

    gram: Tensor
    moment: Tensor
    energy: float
    count: int

    @classmethod
    def of(cls, pairs: Iterable[tuple[Tensor, Tensor]]) -> "NormalEquations":
        """Sum over batches of inputs `[R, K]` and targets `[R, D]`.

        Raises:
            ValueError: If there is no equation.
        """
        gram = moment = None
        energy, count = torch.zeros((), dtype=torch.float64), 0
        for inputs, targets in pairs:
            for h, y in zip(inputs.split(CHUNK), targets.split(CHUNK), strict=True):
                h = torch.cat([h, h.new_ones(len(h), 1)], dim=1)
                products, moments = (h.T @ h).double(), (h.T @ y).double()
                gram = products if gram is None else gram.add_(products)
                moment = moments if moment is None else moment.add_(moments)
                energy = energy.to(y.device) + y.double().square().sum()
                count += len(h)
        if gram is None or moment is None:
            raise ValueError("NormalEquations.of: expected at least one equation.")
        return cls(gram, moment, float(energy), count)

    def __add__(self, other: "NormalEquations") -> "NormalEquations":
        return NormalEquations(
            self.gram + other.gram, self.moment + other.moment, self.energy + other.energy, self.count + other.count
        )

    @property
    def num_inputs(self) -> int:
        """Number of inputs, K."""
        return len(self.gram) - 1

    def of_inputs(self, kept: Tensor) -> "NormalEquations":
        """Return the sums of the same equations with only some inputs, given by index."""
        index = torch.cat([kept, kept.new_tensor([self.num_inputs])])
        return NormalEquations(self.gram[index][:, index], self.moment[index], self.energy, self.count)

    def solve(self, ridge: float, anchor: Tensor | None = None, *, constant: bool = True) -> Tensor:
        """Return the solution: W transposed, with c as the last row, `[K + 1, D]` in float64.

        Args:
            ridge: λ as a share of the mean squared input.
            anchor: W₀ transposed, `[K, D]`; zero by default.
            constant: Whether to fit c; otherwise its row is zero.
        """
        num_inputs = self.num_inputs
        gram, moment = self.gram.clone(), self.moment.clone()
        penalty = self._penalty(ridge)
        gram.diagonal()[:num_inputs] += penalty
        if anchor is not None:
            moment[:num_inputs] += penalty * anchor.double()
        if not constant:
            gram, moment = gram[:num_inputs, :num_inputs], moment[:num_inputs]
        factor, failed = torch.linalg.cholesky_ex(gram)  # half the work of an LU, but rounding can make it fail
        solution: Tensor = torch.linalg.solve(gram, moment) if int(failed) else torch.cholesky_solve(moment, factor)
        return solution if constant else torch.cat([solution, solution.new_zeros(1, solution.shape[1])])

    def error(self, weights: Tensor) -> float:
        """Return the share of the targets' energy that the weights `[K + 1, D]` leave unexplained; 0 is perfect."""
        residual = float((weights * (self.gram @ weights - 2 * self.moment)).sum()) + self.energy
        return max(residual, 0.0) / max(self.energy, torch.finfo(torch.float64).tiny)

    def _penalty(self, ridge: float) -> float:
        mean = float(self.gram.diagonal()[:-1].mean()) if self.num_inputs else 0.0
        return max(ridge * mean, torch.finfo(self.gram.dtype).tiny)


def best_ridge(
    used: NormalEquations,
    held_out: NormalEquations,
    anchor: Tensor | None = None,
    *,
    constant: bool = True,
    near: float = FIRST_RIDGE,
) -> tuple[float, float]:
    """Return the λ of `RIDGES` whose solution has the lowest error on held-out equations, and that error.

    The search goes downhill from an initial λ, since the error first falls with λ and then rises. It needs a third of
    the solutions that a search over all values needs.

    Args:
        used: The training equations.
        held_out: The validation equations.
        anchor: W₀ transposed, `[K, D]`; zero by default.
        constant: Whether to fit c.
        near: Initial λ, one of `RIDGES`.
    """
    errors: dict[float, float] = {}

    def error(ridge: float) -> float:
        if ridge not in errors:
            errors[ridge] = held_out.error(used.solve(ridge, anchor, constant=constant))
        return errors[ridge]

    index = RIDGES.index(near)
    while True:
        around = range(max(index - 1, 0), min(index + 2, len(RIDGES)))
        best = min(around, key=lambda i: error(RIDGES[i]))
        if best == index:
            return RIDGES[index], error(RIDGES[index])
        index = best


def select_inputs(equations: NormalEquations, count: int, ridge: float = 1e-2, *, group: int = 1) -> Tensor:
    """Select the inputs to keep by greedy forward selection.

    Each step takes the input that lowers the regression's error most, given those already taken (orthogonal least
    squares, Chen, Billings and Luo 1989). This is a Cholesky factorisation that pivots on that gain. The targets are
    projected onto their `PRINCIPAL_TARGETS` directions of largest moment.

    Args:
        equations: Sums over all inputs.
        count: Number of inputs, or groups of them, to keep.
        ridge: λ as a share of the mean squared input.
        group: Number of consecutive inputs that are kept or dropped together.

    Returns:
        The indices `[count]` of inputs, or of groups of them, most useful first.
    """
    gram, moment = _centred(equations, ridge)
    return _select_one_by_one(gram, moment, count) if group == 1 else _select_groups(gram, moment, count, group)


def _centred(equations: NormalEquations, ridge: float) -> tuple[Tensor, Tensor]:
    """Return the penalised sums without the constant, for the principal targets: `[K, K]` and `[K, ≤ D]`."""
    num_inputs = equations.num_inputs
    # The constant is eliminated first, since it is always kept.
    ones, total = equations.gram[:num_inputs, num_inputs], equations.gram[num_inputs, num_inputs]
    gram = equations.gram[:num_inputs, :num_inputs] - torch.outer(ones, ones) / total
    moment = equations.moment[:num_inputs] - torch.outer(ones, equations.moment[num_inputs]) / total
    gram.diagonal().add_(equations._penalty(ridge))
    if moment.shape[1] > PRINCIPAL_TARGETS:
        moment = moment @ torch.linalg.eigh(moment.T @ moment).eigenvectors[:, -PRINCIPAL_TARGETS:]
    return gram, moment


def _select_one_by_one(gram: Tensor, moment: Tensor, count: int) -> Tensor:
    num_inputs = len(gram)
    diagonal = gram.diagonal().clone()
    floor = 1e-12 * float(diagonal.max()) if num_inputs else 0.0
    factor = gram.new_zeros(count, num_inputs)  # rows of Lᵀ
    chosen = torch.empty(count, dtype=torch.int64, device=gram.device)
    taken = torch.zeros(num_inputs, dtype=torch.bool, device=gram.device)
    for step in range(count):  # without synchronising with the GPU
        gain = (moment.square().sum(1) / diagonal).masked_fill_(taken, -1.0)
        pivot = gain.argmax(0, keepdim=True)
        root = diagonal.index_select(0, pivot).sqrt_()
        before = factor[:step].index_select(1, pivot).squeeze(1) @ factor[:step]
        column = (gram.index_select(0, pivot).squeeze(0) - before) / root
        factor[step] = column
        moment -= torch.outer(column, moment.index_select(0, pivot).squeeze(0) / root)
        # If the chosen inputs nearly span another one, its remainder is rounding error and must not look like a gain.
        diagonal = (diagonal - column.square()).clamp_min(floor)
        chosen[step : step + 1] = pivot
        taken.index_fill_(0, pivot, True)
    return chosen


def _select_groups(gram: Tensor, moment: Tensor, count: int, size: int) -> Tensor:
    """Select groups of inputs as `_select_one_by_one` selects inputs, by the joint gain of a group's inputs."""
    num_inputs, targets = moment.shape
    groups = num_inputs // size
    indices = torch.arange(num_inputs, device=gram.device).view(groups, size)
    # For each group, the part that the chosen groups leave: its own products, and its products with the targets.
    own = gram[indices[:, :, None], indices[:, None, :]].clone()
    floor = 1e-12 * own.diagonal(dim1=1, dim2=2).amax()
    left = moment.view(groups, size, targets).clone()
    factor = gram.new_zeros(count * size, num_inputs)  # rows of Lᵀ
    chosen: list[int] = []
    taken = torch.zeros(groups, dtype=torch.bool, device=gram.device)
    identity = torch.eye(size, dtype=gram.dtype, device=gram.device)
    for step in range(count):
        roots = torch.linalg.cholesky(own + floor * identity)
        whitened = torch.linalg.solve_triangular(roots, left, upper=False)
        pivot = int(whitened.square().sum((1, 2)).masked_fill(taken, -1.0).argmax())
        index, done = indices[pivot], step * size
        products = gram[index] - factor[:done, index].T @ factor[:done]
        rows = torch.linalg.solve_triangular(roots[pivot], products, upper=False)
        factor[done : done + size] = rows
        by_group = rows.view(size, groups, size).transpose(0, 1)
        own -= by_group.transpose(1, 2) @ by_group
        left -= by_group.transpose(1, 2) @ whitened[pivot]
        chosen.append(pivot)
        taken[pivot] = True
        # The remainder of a chosen group is rounding error, which must not make the factorisation fail.
        own[pivot] = identity
        left[pivot] = 0
    return torch.tensor(chosen, dtype=torch.int64, device=gram.device)
