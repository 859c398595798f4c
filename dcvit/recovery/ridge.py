"""Ridge regression from sums: normal equations, held-out error, and which inputs to keep.

    min over W, c of  Σ ‖y − W h − c‖² + λ ‖W − W₀‖²

for inputs h `[K]` and targets y `[D]`. Everything below needs only Σ hhᵀ, Σ hyᵀ and Σ ‖y‖², so its memory does not grow
with the number of equations. The constant c is never penalised.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FIRST_RIDGE", "RIDGES", "NormalEquations", "best_ridge", "select_inputs"]

RIDGES = (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
"""Candidates of λ, as shares of the mean squared input."""

FIRST_RIDGE = 1e-2
"""Where the search for λ begins."""

CHUNK = 4096
"""Equations whose products are summed in the inputs' own precision before they are added in float64."""

PRINCIPAL_TARGETS = 64
"""Directions of the targets that `select_inputs` looks at; they hold nearly all that can be explained."""


@dataclass(frozen=True)
class NormalEquations:
    """The sums over some equations, in float64; two of them add up.

    Attributes:
        gram: Σ ĥĥᵀ `[K + 1, K + 1]`, where ĥ is h and a one.
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
        """The sums over batches of inputs `[R, K]` and targets `[R, D]`, at least one batch."""
        gram = moment = None
        energy, count = torch.zeros((), dtype=torch.float64), 0
        for residual, targets in pairs:
            for h, y in zip(residual.split(CHUNK), targets.split(CHUNK), strict=True):
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
        """K."""
        return len(self.gram) - 1

    def of_inputs(self, kept: Tensor) -> "NormalEquations":
        """The same equations with only some inputs, given by index."""
        index = torch.cat([kept, kept.new_tensor([self.num_inputs])])
        return NormalEquations(self.gram[index][:, index], self.moment[index], self.energy, self.count)

    def solve(self, ridge: float, anchor: Tensor | None = None, *, constant: bool = True) -> Tensor:
        """W transposed, and c as its last row: `[K + 1, D]` in float64.

        Args:
            ridge: λ as a share of the mean squared input.
            anchor: W₀ transposed `[K, D]`; zero if not given.
            constant: Whether there is a c; its row is zero otherwise.
        """
        residual = self.num_inputs
        gram, moment = self.gram.clone(), self.moment.clone()
        penalty = self._penalty(ridge)
        gram.diagonal()[:residual] += penalty
        if anchor is not None:
            moment[:residual] += penalty * anchor.double()
        if not constant:
            gram, moment = gram[:residual, :residual], moment[:residual]
        factor, failed = torch.linalg.cholesky_ex(gram)  # half the work of an LU, but rounding may make it fail
        solution: Tensor = torch.linalg.solve(gram, moment) if int(failed) else torch.cholesky_solve(moment, factor)
        return solution if constant else torch.cat([solution, solution.new_zeros(1, solution.shape[1])])

    def error(self, weights: Tensor) -> float:
        """Share of the targets' energy that some weights `[K + 1, D]` leave unexplained; 0 is perfect."""
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
    """The λ of `RIDGES` whose solution of some equations explains others best, and its error on those.

    Downhill from one of them, which needs a third of the solutions that trying them all does: the error first falls
    with λ, then rises.

    Args:
        used: The equations that are solved.
        held_out: Those that judge.
        anchor: W₀ transposed `[K, D]`; zero if not given.
        constant: Whether there is a c.
        near: The λ of `RIDGES` to begin with.
    """
    errors: dict[float, float] = {}

    def error(ridge: float) -> float:
        if ridge not in errors:
            errors[ridge] = held_out.error(used.solve(ridge, anchor, constant=constant))
        return errors[ridge]

    place = RIDGES.index(near)
    while True:
        around = range(max(place - 1, 0), min(place + 2, len(RIDGES)))
        best = min(around, key=lambda i: error(RIDGES[i]))
        if best == place:
            return RIDGES[place], error(RIDGES[place])
        place = best


def select_inputs(equations: NormalEquations, count: int, ridge: float = 1e-2, *, group: int = 1) -> Tensor:
    """Which inputs to keep so that the rest is missed least: greedy forward selection.

    Each step takes the input that lowers the regression's error most, given those taken before (orthogonal least
    squares, Chen, Billings and Luo 1989), by a Cholesky factorisation that pivots on that gain. The targets are seen
    through their `PRINCIPAL_TARGETS` directions of largest moment.

    Args:
        equations: Sums over all inputs.
        count: How many to keep.
        ridge: λ as a share of the mean squared input.
        group: So many inputs in a row are kept or dropped together.

    Returns:
        The indices `[count]` of inputs, or of groups of them, most useful first.
    """
    gram, moment = _centred(equations, ridge)
    return _select_one_by_one(gram, moment, count) if group == 1 else _select_groups(gram, moment, count, group)


def _centred(equations: NormalEquations, ridge: float) -> tuple[Tensor, Tensor]:
    """The sums without the constant, penalised, and with few directions of the targets: `[K, K]` and `[K, ≤ D]`."""
    residual = equations.num_inputs
    # The constant comes first: it is always there.
    ones, total = equations.gram[:residual, residual], equations.gram[residual, residual]
    gram = equations.gram[:residual, :residual] - torch.outer(ones, ones) / total
    moment = equations.moment[:residual] - torch.outer(ones, equations.moment[residual]) / total
    gram.diagonal().add_(equations._penalty(ridge))
    if moment.shape[1] > PRINCIPAL_TARGETS:
        moment = moment @ torch.linalg.eigh(moment.T @ moment).eigenvectors[:, -PRINCIPAL_TARGETS:]
    return gram, moment


def _select_one_by_one(gram: Tensor, moment: Tensor, count: int) -> Tensor:
    residual = len(gram)
    diagonal = gram.diagonal().clone()
    floor = 1e-12 * float(diagonal.max()) if residual else 0.0
    factor = gram.new_zeros(count, residual)  # rows of Lᵀ
    chosen = torch.empty(count, dtype=torch.int64, device=gram.device)
    taken = torch.zeros(residual, dtype=torch.bool, device=gram.device)
    for step in range(count):  # which a GPU is never waited for in
        gain = (moment.square().sum(1) / diagonal).masked_fill_(taken, -1.0)
        pivot = gain.argmax(0, keepdim=True)
        root = diagonal.index_select(0, pivot).sqrt_()
        before = factor[:step].index_select(1, pivot).squeeze(1) @ factor[:step]
        column = (gram.index_select(0, pivot).squeeze(0) - before) / root
        factor[step] = column
        moment -= torch.outer(column, moment.index_select(0, pivot).squeeze(0) / root)
        # What is left of an input that the chosen ones nearly span is rounding: it must not look like a gain.
        diagonal = (diagonal - column.square()).clamp_min(floor)
        chosen[step : step + 1] = pivot
        taken.index_fill_(0, pivot, True)
    return chosen


def _select_groups(gram: Tensor, moment: Tensor, count: int, size: int) -> Tensor:
    """The same with groups of inputs: the gain of each is that of all its inputs together."""
    residual, targets = moment.shape
    groups = residual // size
    places = torch.arange(residual, device=gram.device).view(groups, size)
    # What the chosen ones leave of each group: its own products, and those with the targets.
    own = gram[places[:, :, None], places[:, None, :]].clone()
    floor = 1e-12 * own.diagonal(dim1=1, dim2=2).amax()
    left = moment.view(groups, size, targets).clone()
    factor = gram.new_zeros(count * size, residual)  # rows of Lᵀ
    chosen: list[int] = []
    taken = torch.zeros(groups, dtype=torch.bool, device=gram.device)
    identity = torch.eye(size, dtype=gram.dtype, device=gram.device)
    for step in range(count):
        roots = torch.linalg.cholesky(own + floor * identity)
        half = torch.linalg.solve_triangular(roots, left, upper=False)
        pivot = int(half.square().sum((1, 2)).masked_fill(taken, -1.0).argmax())
        index, done = places[pivot], step * size
        products = gram[index] - factor[:done, index].T @ factor[:done]
        rows = torch.linalg.solve_triangular(roots[pivot], products, upper=False)
        factor[done : done + size] = rows
        by_group = rows.view(size, groups, size).transpose(0, 1)
        own -= by_group.transpose(1, 2) @ by_group
        left -= by_group.transpose(1, 2) @ half[pivot]
        chosen.append(pivot)
        taken[pivot] = True
        # A chosen group is spanned: what rounding leaves of it must not stop the factorisation.
        own[pivot] = identity
        left[pivot] = 0
    return torch.tensor(chosen, dtype=torch.int64, device=gram.device)
