"""Ridge regression from sums, against numpy on the equations themselves."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dcvit.recovery import ridge as regression
from dcvit.recovery.ridge import RIDGES, NormalEquations, best_ridge, select_inputs

Array = NDArray[np.float64]

CLOSE = {"rtol": 1e-8, "atol": 1e-10}
"""float64 on well-conditioned problems of a few dozen equations: what is left is rounding, squared by the normal
equations."""


def problem(
    rows: int = 40, residual: int = 6, targets: int = 3, noise: float = 0.5, seed: int = 0
) -> tuple[Array, ...]:
    """Inputs that are not centred, targets with a constant, and the weights behind them."""
    draw = np.random.default_rng(seed)
    h = draw.normal(size=(rows, residual)) * np.linspace(0.5, 2, residual) + 0.7
    weights = draw.normal(size=(residual, targets))
    return h, h @ weights + 1.3 + noise * draw.normal(size=(rows, targets)), weights


def equations(h: Array, y: Array) -> NormalEquations:
    return NormalEquations.of([(torch.from_numpy(h), torch.from_numpy(y))])


def ridge_regression(
    h: Array, y: Array, ridge: float, anchor: Array | None = None, *, constant: bool = True
) -> tuple[Array, float]:
    """The solution `[K + 1, D]` and the minimum: numpy's least squares, the penalty as one more equation an input."""
    residual, targets = h.shape[1], y.shape[1]
    penalty = np.sqrt(ridge * np.square(h).sum(0).mean())
    ones = np.full((len(h), 1), float(constant))
    left = np.block([[h, ones], [penalty * np.eye(residual), np.zeros((residual, 1))]])
    right = np.concatenate([y, penalty * (np.zeros((residual, targets)) if anchor is None else anchor)])
    solution = np.linalg.lstsq(left, right, rcond=None)[0]
    return solution, float(np.square(left @ solution - right).sum())


def left_over(h: Array, y: Array, solution: Array) -> float:
    return float(np.square(y - h @ solution[:-1] - solution[-1]).sum() / np.square(y).sum())


def test_sums_are_those_of_the_equations_however_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    h, y, _ = problem(rows=23)
    extended = np.concatenate([h, np.ones((23, 1))], axis=1)
    x, t = torch.from_numpy(h), torch.from_numpy(y)
    monkeypatch.setattr(regression, "CHUNK", 4)
    for sums in (
        NormalEquations.of([(x, t)]),
        NormalEquations.of([(x[:9], t[:9]), (x[9:], t[9:])]),
        NormalEquations.of([(x[:2], t[:2])]) + NormalEquations.of([(x[2:], t[2:])]),
    ):
        np.testing.assert_allclose(sums.gram, extended.T @ extended, rtol=1e-12)
        np.testing.assert_allclose(sums.moment, extended.T @ y, rtol=1e-12)
        assert sums.energy == pytest.approx(np.square(y).sum(), rel=1e-12)
        assert (sums.count, sums.num_inputs) == (23, 6)
    single = NormalEquations.of([(x.float(), t.float())])
    assert single.gram.dtype == single.moment.dtype == torch.float64
    with pytest.raises(ValueError, match="at least one equation"):
        NormalEquations.of([])


def test_sums_of_some_inputs_are_those_of_their_equations() -> None:
    h, y, _ = problem()
    some, direct = equations(h, y).of_inputs(torch.tensor([4, 0])), equations(h[:, [4, 0]], y)
    assert torch.allclose(some.gram, direct.gram)
    assert torch.allclose(some.moment, direct.moment)
    assert (some.energy, some.count) == (direct.energy, direct.count)


@pytest.mark.parametrize("rows", [40, 5])  # more equations than unknowns, and fewer
@pytest.mark.parametrize("ridge", [1e-3, 1.0])
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("constant", [True, False])
def test_solution_is_numpys_with_the_penalty_as_equations(
    rows: int, ridge: float, anchored: bool, constant: bool
) -> None:
    h, y, weights = problem(rows)
    anchor = weights + 0.5 if anchored else None
    expected, _ = ridge_regression(h, y, ridge, anchor, constant=constant)
    found = equations(h, y).solve(ridge, None if anchor is None else torch.from_numpy(anchor), constant=constant)
    np.testing.assert_allclose(found[:-1], expected[:-1], **CLOSE)
    np.testing.assert_allclose(found[-1], expected[-1] if constant else np.zeros(3), **CLOSE)


def test_the_constant_is_not_penalised() -> None:
    """However large the penalty, the mean is met: weights go to the anchor, the constant to what is then missing."""
    h, y, weights = problem()
    found = equations(h, y).solve(1e9, torch.from_numpy(weights))
    np.testing.assert_allclose(found[:-1], weights, rtol=1e-6)
    np.testing.assert_allclose(found[-1], (y - h @ weights).mean(0), rtol=1e-6)


def test_error_is_the_share_that_is_left() -> None:
    h, y, _ = problem()
    sums = equations(h, y)
    solution = np.random.default_rng(1).normal(size=(7, 3))
    assert sums.error(torch.from_numpy(solution)) == pytest.approx(left_over(h, y, solution), rel=1e-10)
    assert sums.error(torch.zeros(7, 3, dtype=torch.float64)) == pytest.approx(1.0)
    exact = equations(h, h @ solution[:-1] + solution[-1])
    assert 0 <= exact.error(torch.from_numpy(solution)) < 1e-12


@pytest.mark.parametrize("noise", [0.01, 1.0, 10.0])
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("constant", [True, False])
def test_best_ridge_predicts_the_held_out_best(noise: float, anchored: bool, constant: bool) -> None:
    h, y, weights = problem(rows=60, residual=12, noise=noise)
    anchor = weights if anchored else None
    errors = {}
    for ridge in RIDGES:
        solution, _ = ridge_regression(h[:15], y[:15], ridge, anchor, constant=constant)
        errors[ridge] = left_over(h[15:], y[15:], solution)
    ridge, error = best_ridge(
        equations(h[:15], y[:15]),
        equations(h[15:], y[15:]),
        None if anchor is None else torch.from_numpy(anchor),
        constant=constant,
    )
    assert ridge == min(errors, key=errors.__getitem__)
    assert error == pytest.approx(errors[ridge], rel=1e-6)


def test_more_noise_asks_for_more_ridge() -> None:
    """The candidates reach far enough to tell clean equations from noisy ones."""
    chosen = []
    for noise in (1e-3, 10.0):
        h, y, _ = problem(rows=60, residual=12, noise=noise)
        chosen.append(best_ridge(equations(h[:15], y[:15]), equations(h[15:], y[15:]))[0])
    assert chosen[0] < 1e-2 < 1e-1 < chosen[1]


@pytest.mark.parametrize(("targets", "ridge"), [(2, 1e-2), (2, 0.3), (70, 1e-2)])
def test_selection_is_greedy(targets: int, ridge: float) -> None:
    """Each input is the one that lowers the penalised minimum most, found by solving for all of them."""
    draw = np.random.default_rng(3)
    h = draw.normal(size=(40, 7)) + draw.normal(size=(40, 1))  # correlated: what one explains, others explain too
    y = h @ draw.normal(size=(7, targets)) + 2.0
    # λ is a share of the mean over all inputs, however many are chosen.
    penalty = ridge * np.square(h).sum(0).mean()

    def minimum(chosen: list[int]) -> float:
        share = penalty / np.square(h[:, chosen]).sum(0).mean()
        return ridge_regression(h[:, chosen], y, share)[1]

    expected: list[int] = []
    while len(expected) < 7:
        rest = [i for i in range(7) if i not in expected]
        expected.append(min(rest, key=lambda i: minimum([*expected, i])))
    assert expected != sorted(expected)
    assert select_inputs(equations(h, y), 7, ridge).tolist() == expected
    assert select_inputs(equations(h, y), 3, ridge).tolist() == expected[:3]


def test_selection_finds_what_the_targets_are_made_of() -> None:
    draw = np.random.default_rng(0)
    h = draw.normal(size=(300, 30)) + draw.normal(size=(300, 1))
    support = [3, 7, 8, 19, 28]
    weights = draw.normal(size=(5, 4)) * np.array([[1], [1], [1], [0.3], [0.3]])
    chosen = select_inputs(equations(h, h[:, support] @ weights + 5.0), 5, ridge=1e-4)
    assert sorted(chosen.tolist()) == support


def test_selection_takes_no_input_twice_whatever_they_are() -> None:
    """Copies, sums, constants and dead hidden units: once a direction is chosen, nothing is left of its copies."""
    draw = np.random.default_rng(0)
    base = draw.normal(size=(50, 3))
    sums, constant, dead = base[:, :1] + base[:, 1:2], np.full((50, 1), 4.0), np.zeros((50, 1))
    h = np.concatenate([base, base, base, sums, constant, dead], axis=1)
    sums_of = equations(h, base @ draw.normal(size=(3, 5)))
    order = select_inputs(sums_of, 12, ridge=1e-6)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(12))
    independent: Tensor = torch.from_numpy(h)[:, order[:3]]
    assert torch.linalg.matrix_rank(independent) == 3
    assert select_inputs(sums_of, 5, ridge=1e-6).tolist() == order[:5].tolist()
    assert select_inputs(sums_of, 0).tolist() == []


def test_selection_of_inputs_that_are_all_dead() -> None:
    dead = equations(np.zeros((9, 4)), np.ones((9, 2)))
    assert sorted(select_inputs(dead, 4).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("targets", [2, 5])
def test_selection_of_groups_takes_the_one_of_largest_gain_each_time(targets: int) -> None:
    """Against the regression error of every group in turn, in float64."""
    h, y, _ = problem(rows=80, residual=15, targets=targets, noise=2.0)
    sums, ridge, size = equations(h, y), 1e-2, 3
    penalty = np.sqrt(ridge * np.square(h).sum(0).mean())

    def error(groups: list[int]) -> float:
        chosen = [group * size + i for group in groups for i in range(size)]
        columns = [[h[:, chosen], np.ones((len(h), 1))], [penalty * np.eye(len(chosen)), np.zeros((len(chosen), 1))]]
        left = np.block(columns)
        right = np.concatenate([y, np.zeros((len(chosen), targets))])
        solution = np.linalg.lstsq(left, right, rcond=None)[0]
        return float(np.square(right - left @ solution).sum())

    expected: list[int] = []
    for _ in range(5):
        expected.append(min(set(range(5)) - set(expected), key=lambda group: error([*expected, group])))
    assert select_inputs(sums, 5, ridge, group=size).tolist() == expected
    assert select_inputs(sums, 2, ridge, group=size).tolist() == expected[:2]
    assert select_inputs(sums, 0, ridge, group=size).tolist() == []


def test_selection_of_groups_that_are_copies_or_dead() -> None:
    draw = np.random.default_rng(0)
    base = draw.normal(size=(60, 4))
    h = np.concatenate([base, base, np.zeros((60, 2)), base[:, :2]], axis=1)
    order = select_inputs(equations(h, base @ draw.normal(size=(4, 3))), 6, ridge=1e-6, group=2).tolist()
    assert sorted(order) == list(range(6))
    assert np.linalg.matrix_rank(h[:, [2 * group + i for group in order[:2] for i in (0, 1)]]) == 4
