"""Block reconstruction: its inputs, its objective, that it never harms, and what it does not change."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dcvit
from dcvit.context import RunContext
from dcvit.data.images import FewShotImages
from dcvit.errors import ImagesWarning
from dcvit.history import BlockSpec, Reconstruction
from dcvit.models import compressible
from dcvit.models.modeling.shared import POST_NORM
from dcvit.models.surgery import compress_block, draw_kept_units
from dcvit.models.teacher import freeze
from dcvit.recovery import calibration as module
from dcvit.recovery.calibration import Rows, TeacherStates, Views, draw_views
from dcvit.recovery.reconstruct import (
    RIDGE_WITHOUT_VALIDATION,
    BlockProblem,
    Descent,
    choose_units,
    find_step_size,
    reconstruct_block,
)
from dcvit.recovery.ridge import RIDGES
from tests.variants import VARIANTS, Variant

CONFIG = dcvit.config.ReconstructionConfig(num_views=36, num_rows=360, step_sizes=(0.03,), batch_rows=32, batch_size=5)

BLOCK, KEPT = 1, 40


@dataclass
class Problem:
    """One block of a model to reconstruct."""

    teacher: nn.Module
    images: FewShotImages
    views: Views
    states: TeacherStates
    rows: Rows

    @classmethod
    def of(
        cls, model: nn.Module, count: int = 12, config: dcvit.config.ReconstructionConfig = CONFIG, block: int = BLOCK
    ) -> "Problem":
        teacher = freeze(model)
        dtype = next(teacher.parameters()).dtype
        images = dcvit.load_images(torch.randn(count, *compressible(teacher).input_size(), dtype=dtype), teacher)
        views = draw_views(teacher, images, config, seed=0)
        states = TeacherStates(teacher, views, config.batch_size)
        return cls(teacher, images, views, states, states.rows(block))

    def solve(
        self,
        config: dcvit.config.ReconstructionConfig = CONFIG,
        *,
        count: int = KEPT,
        kept: Sequence[int] | None = None,
        step_size: float = 0.03,
        epochs: int = 2,
        **changes: Any,
    ) -> tuple[nn.Module, tuple[int, ...], Reconstruction]:
        student = copy.deepcopy(self.teacher)
        units, report = reconstruct_block(
            student,
            BlockProblem(BLOCK, BlockSpec(count), self.rows, kept),
            config,
            Descent(step_size, epochs),
            **changes,
        )
        return student, units, report

    @property
    def post_norm(self) -> bool:
        """Whether no linear layer ends the block."""
        teacher: Any = self.teacher
        return isinstance(teacher.blocks[BLOCK], POST_NORM)

    def error(self, student: nn.Module, chosen: Tensor | None = None) -> float:
        """Share of what the teacher's block adds that a student's does not, on some rows."""
        inputs, targets = (x if chosen is None else x[chosen] for x in (self.rows.inputs, self.rows.targets))
        with torch.no_grad():
            missed = compressible(student).block(BLOCK)(inputs[None])[0] - targets
        return float(missed.square().sum() / (targets - inputs).square().sum())


def changed(student: nn.Module, teacher: nn.Module) -> set[str]:
    """Parameters of a student that are not the teacher's; of a pruned layer, all parameters."""
    before = {name.replace("gamma_2", "ls2.gamma"): p for name, p in teacher.named_parameters()}
    after = {name.replace("gamma_2", "ls2.gamma"): p for name, p in student.named_parameters()}
    return {name for name, p in after.items() if not torch.equal(p, before[name])}


def state(student: nn.Module) -> list[Tensor]:
    return list(student.state_dict().values())


# What is learnt from.


def test_views_are_the_images_and_whole_rounds_of_views_of_them(model: nn.Module, images: Tensor) -> None:
    """Images of one colour each, and views that keep it, show whose views are held out."""
    colours = torch.linspace(-0.9, 0.9, 11)[:, None, None, None].expand(-1, 3, 32, 32)
    with pytest.warns(ImagesWarning, match="11 of 11 images are of one colour"):
        few_shot = dcvit.load_images(colours, model)
    cropped = dcvit.config.AugmentationConfig(color_jitter=0)
    for every, held_out in ((5, 2), (10, 1)):
        config = replace(CONFIG, num_views=99, augmentation=cropped)
        views = draw_views(model, few_shot, config, seed=0, num_views=36, held_out_every=every)
        assert len(views.images) == 33  # as many whole rounds as fit
        assert torch.equal(views.images[:11], colours)
        first = views.images[:][:, :1, :1, :1]
        torch.testing.assert_close(views.images[:], first.expand(views.images.shape), rtol=0, atol=1e-4)
        shown = {held: {round(float(c), 2) for c in first[views.held_out == held].flatten()} for held in (False, True)}
        assert not shown[False] & shown[True]
        assert (len(shown[False]), len(shown[True])) == (11 - held_out, held_out)
        assert int(views.held_out.sum()) == held_out * 3
    assert len(draw_views(model, few_shot, replace(CONFIG, num_views=30), seed=0).images) == 22


def test_views_are_never_fewer_than_the_images(model: nn.Module, images: Tensor) -> None:
    few_shot = dcvit.load_images(images, model)
    for config in (replace(CONFIG, num_views=1), replace(CONFIG, num_views=11), replace(CONFIG, augmentation=None)):
        views = draw_views(model, few_shot, config, seed=0)
        assert torch.equal(views.images[:], images)
        assert len(views.held_out) == 6
        assert int(views.held_out.sum()) == 1
    twice = draw_views(model, few_shot, replace(CONFIG, num_views=12), seed=0)
    assert len(twice.images) == 12
    assert not torch.equal(twice.images[6:], images)


@pytest.mark.parametrize(("num_rows", "expected"), [(1, 1), (36, 1), (107, 2), (144, 4), (10_000, 5)])
def test_rows_are_distinct_tokens_of_every_view(model: nn.Module, num_rows: int, expected: int) -> None:
    problem = Problem.of(model, config=replace(CONFIG, num_rows=num_rows))
    tokens = problem.views.token_indices(5)
    assert tokens.shape == (36, expected)
    assert all(len(set(row)) == expected and set(row) <= set(range(5)) for row in tokens.tolist())
    if expected < 5:
        assert len({tuple(sorted(row)) for row in tokens.tolist()}) > 1  # not the same ones of each view
    numbered = torch.arange(36 * 5, dtype=torch.float32).view(36, 5, 1)
    targets = [5 * view + token for view, row in enumerate(tokens.tolist()) for token in row]
    assert problem.views.rows(numbered).flatten().tolist() == targets
    held = problem.rows.held_out.tolist()
    assert held == [bool(problem.views.held_out[row // 5]) for row in targets]


def test_views_repeat_with_their_seed(model: nn.Module, images: Tensor) -> None:
    few_shot = dcvit.load_images(images, model)
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first, again, other = (draw_views(model, few_shot, replace(CONFIG, num_rows=72), seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(first.images[:], again.images[:])
    assert torch.equal(first.token_indices(5), again.token_indices(5))
    assert not torch.equal(first.images[6:], other.images[6:])
    assert not torch.equal(first.token_indices(5), other.token_indices(5))


def test_teacher_states_are_what_the_blocks_see(variant: Variant) -> None:
    problem = Problem.of(variant.create(), count=7, config=replace(CONFIG, num_views=14, num_rows=40))
    teacher: Any = problem.teacher
    view = compressible(teacher)
    states = TeacherStates(teacher, problem.views, 5, keep_output=True)
    seen: list[list[Tensor]] = [[] for _ in range(5)]
    for block in range(4):
        teacher.blocks[block].register_forward_pre_hook(lambda _, args, block=block: seen[block].append(args[0]))
    teacher.blocks[3].register_forward_hook(lambda _, args, output: seen[4].append(output))
    with torch.no_grad():
        output = torch.cat([view.tokens(images) for images in problem.views.images.split(5)])
    places = problem.views.token_indices(seen[0][0].shape[1])

    def rows(block: int) -> Tensor:
        whole = torch.cat(seen[block])
        return torch.stack([whole[image, token] for image, row in enumerate(places.tolist()) for token in row])

    for block in range(4):
        assert torch.equal(states.rows(block).inputs, rows(block))
        assert torch.equal(states.rows(block).targets, rows(block + 1))
    assert states.output is not None
    assert torch.equal(states.output[:], output)
    assert problem.states.output is None


def test_few_rows_are_drawn_from_all(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Problem.of(model).rows
    assert rows.thinned() is rows
    monkeypatch.setattr(module, "FEW_ROWS", 36)
    few = rows.thinned()  # every fifth of 180 rows, at even distances, would be of the same images
    assert few.inputs.shape == (36, rows.inputs.shape[1])
    assert torch.equal(few.inputs, rows.thinned().inputs)
    at = [int((rows.inputs == row).all(1).nonzero()[0]) for row in few.inputs]
    assert at == sorted(set(at))
    assert torch.equal(few.targets, rows.targets[at])
    assert torch.equal(few.held_out, rows.held_out[at])
    assert 0 < int(few.held_out.sum()) < 36


# What is minimised.


def test_every_variant_reconstructs_its_block(variant: Variant) -> None:
    problem = Problem.of(variant.create())
    student, kept, report = problem.solve()
    spec = compress_block(problem.teacher, BLOCK, kept)
    held_out, used = problem.rows.held_out, ~problem.rows.held_out
    # Without a linear output layer there are only gradient steps, and few of them.
    assert problem.error(student, used) < (0.97 if problem.post_norm else 0.6) * problem.error(spec, used)
    assert report.error_before == pytest.approx(problem.error(spec, held_out), rel=1e-3)
    assert report.block == BLOCK
    assert report.error_after <= report.error_before
    if problem.post_norm:
        assert report.ridge is report.error_closed_form is None
    else:
        assert report.ridge in RIDGES
        assert report.error_closed_form is not None
        assert report.error_after <= report.error_closed_form < report.error_before

    assert list(kept) == sorted(set(kept))
    assert len(kept) == KEPT
    assert 0 <= kept[0] <= kept[-1] < compressible(problem.teacher).hidden_features(BLOCK)
    assert compressible(student).cost() == compressible(spec).cost()

    names = changed(student, problem.teacher)
    assert names
    assert all(name.startswith(f"blocks.{BLOCK}.") for name in names)
    assert not any(p.requires_grad for p in student.parameters())


def test_errors_are_those_of_the_held_out_images(representative: Variant) -> None:
    """As long as nothing is learnt from them, what comes out has the error that is reported."""
    problem = Problem.of(representative.create())
    for epochs in (0, 2):
        student, _, report = problem.solve(epochs=epochs, refit=False)
        assert problem.error(student, problem.rows.held_out) == pytest.approx(report.error_after, rel=1e-2, abs=1e-6)


def test_gradient_steps_gain_on_the_closed_form(model: nn.Module) -> None:
    problem = Problem.of(model, count=40, config=replace(CONFIG, num_views=200, num_rows=1000))
    with_none, _, closed = problem.solve(count=5, epochs=0)
    student, _, report = problem.solve(count=5, epochs=6)
    assert report.error_closed_form == closed.error_closed_form == closed.error_after
    assert (closed.epochs, 1 <= report.epochs <= 6) == (0, True)
    assert report.error_after < 0.9 * closed.error_after
    assert problem.error(student) < 0.9 * problem.error(with_none)


def test_steps_that_harm_are_undone(representative: Variant) -> None:
    """If the step size destroys the block, the closed form is kept, or without one the pruned block."""
    problem = Problem.of(representative.create())
    student, kept, report = problem.solve(step_size=100.0, refit=False)
    assert report.epochs == 0
    layer = compressible(student).output_layer(BLOCK)
    start = compress_block(problem.teacher, BLOCK, kept)
    fitted = {id(p) for p in layer.layer.parameters()} if layer else set()
    for (name, found), expected in zip(student.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(found, expected) or id(found) in fitted, name
    if report.error_closed_form is not None:
        assert report.error_after <= report.error_closed_form
    else:
        assert report.error_after == report.error_before


def test_held_out_images_are_drawn(model: nn.Module) -> None:
    """With all their views, by the seed: a set that is sorted, or goes through its classes in turn, is no trap."""
    teacher = freeze(model)
    images = dcvit.load_images(torch.rand(20, 3, 32, 32), teacher)
    config = dcvit.config.ReconstructionConfig(num_views=60)
    draws = [draw_views(teacher, images, config, seed).held_out.view(3, 20) for seed in range(4)]
    for held_out in draws:
        assert torch.equal(held_out, held_out[:1].expand(3, -1))
        assert int(held_out[0].sum()) == 4
    assert len({tuple(held_out[0].tolist()) for held_out in draws}) > 1
    assert torch.equal(draws[0], draw_views(teacher, images, config, 0).held_out.view(3, 20))


def ridge_solution(h: Tensor, y: Tensor, ridge: float, anchor: Tensor, constant: bool) -> np.ndarray[Any, Any]:
    """Least squares with the penalty as more equations; the last row is the constant, which has none."""
    residual = h.shape[1]
    penalty = (ridge * h.square().sum(0).mean()).sqrt()
    ones = h.new_full((len(h), 1), float(constant))
    left = torch.cat([torch.cat([h, ones], 1), penalty * torch.eye(residual, residual + 1).to(h)])
    return np.linalg.lstsq(left.numpy(), torch.cat([y, penalty * anchor]).numpy(), rcond=None)[0]


@pytest.mark.parametrize("name", ["layer_scale", "plain", "mlp_norm", "swiglu_packed", "swiglu_rmsnorm"])
@pytest.mark.parametrize("refit", [False, True])
def test_closed_form_is_the_ridge_regression_of_the_docstring(name: str, refit: bool) -> None:
    """It minimises ‖(y − x) − γ ⊙ (W₂ h + b₂)‖² + λ ‖γ ⊙ (W₂ − W₂⁰)‖², in float64, where numpy agrees to rounding."""
    problem = Problem.of(VARIANTS[name].create().double())
    student, kept, report = problem.solve(epochs=0, refit=refit)
    spec = compress_block(problem.teacher, BLOCK, kept)
    output = compressible(spec).output_layer(BLOCK)
    assert output is not None
    layer, gamma = output.layer, output.scale
    assert (gamma is not None) == (name in ("layer_scale", "swiglu_packed"))
    hidden: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, args: hidden.append(args[0][0]))
    with torch.no_grad():
        compressible(spec).block(BLOCK)(problem.rows.inputs[None])
    h, y = hidden[0], problem.rows.targets - problem.rows.inputs
    scale = torch.ones(48).double() if gamma is None else gamma
    used, held_out = ~problem.rows.held_out, problem.rows.held_out
    assert report.ridge is not None
    constant = layer.bias is not None
    assert constant == (name != "swiglu_rmsnorm")
    anchor = (scale[:, None] * layer.weight).T
    errors = {}
    for ridge in RIDGES:
        solution = torch.from_numpy(ridge_solution(h[used], y[used], ridge, anchor, constant))
        missed = y[held_out] - h[held_out] @ solution[:-1] - solution[-1]
        errors[ridge] = float(missed.square().sum() / y[held_out].square().sum())
    assert report.ridge == min(errors, key=errors.__getitem__)
    assert report.error_closed_form == pytest.approx(errors[report.ridge], rel=1e-6)

    learnt = slice(None) if refit else used
    expected = ridge_solution(h[learnt], y[learnt], report.ridge, anchor, constant)
    found = compressible(student).output_layer(BLOCK)
    assert found is not None
    np.testing.assert_allclose((scale[:, None] * found.layer.weight).T.numpy(), expected[:-1], rtol=1e-6, atol=1e-8)
    if constant:
        np.testing.assert_allclose((scale * found.layer.bias).numpy(), expected[-1], rtol=1e-6, atol=1e-8)


def test_what_is_already_right_stays(model: nn.Module) -> None:
    """If nothing is missing, the fit gives back the layer that is there; in float64, so that nothing else moves it."""
    model = model.double()
    with torch.no_grad():
        model.blocks[BLOCK].attn.proj.weight.zero_()
        model.blocks[BLOCK].attn.proj.bias.zero_()
    problem = Problem.of(model)
    student, kept, report = problem.solve(count=192)
    assert kept == tuple(range(192))
    assert max(report.error_before, report.error_after) < 1e-20
    fitted, original = (m.blocks[BLOCK].mlp.fc2 for m in (student, model))
    torch.testing.assert_close(fitted.weight, original.weight)
    torch.testing.assert_close(fitted.bias, original.bias)


def test_a_channel_that_is_switched_off_asks_for_nothing() -> None:
    """Where LayerScale is zero no weight could help: there they stay, and everywhere all is finite."""
    model = VARIANTS["layer_scale"].create()
    with torch.no_grad():
        model.blocks[BLOCK].ls2.gamma[3] = 0
    problem = Problem.of(model)
    student, kept, report = problem.solve(epochs=0)
    before, after = (m.blocks[BLOCK].mlp.fc2 for m in (compress_block(problem.teacher, BLOCK, kept), student))
    same = (before.weight == after.weight).all(1) & (before.bias == after.bias)
    assert same.nonzero().flatten().tolist() == [3]
    assert all(torch.isfinite(p).all() for p in student.parameters())
    assert report.error_after < report.error_before


# Which hidden units stay.


def test_greedy_hidden_units_miss_less_than_random_ones(model: nn.Module) -> None:
    problem = Problem.of(model)
    errors = {}
    for units in ("greedy", "random"):
        config = replace(CONFIG, units=units)  # type: ignore[arg-type]
        student, kept, report = problem.solve(config, count=8, epochs=0)
        errors[units] = report.error_after
        assert torch.equal(
            student.blocks[BLOCK].mlp.fc1.weight, problem.teacher.blocks[BLOCK].mlp.fc1.weight[list(kept)]
        )
        assert (kept == draw_kept_units(problem.teacher, BLOCK, 8, 0)) == (units == "random")
    assert errors["greedy"] < 0.9 * errors["random"]


def test_hidden_units_that_are_chosen_already_stay(model: nn.Module) -> None:
    problem = Problem.of(model)
    student, kept, _ = problem.solve(count=3, kept=[90, 2, 41], epochs=0)
    assert kept == (2, 41, 90)
    assert torch.equal(student.blocks[BLOCK].mlp.fc1.bias, problem.teacher.blocks[BLOCK].mlp.fc1.bias[[2, 41, 90]])


def test_fewer_of_the_most_useful_hidden_units_are_the_first_ones(model: nn.Module) -> None:
    problem = Problem.of(model)
    before = copy.deepcopy(problem.teacher.state_dict())
    most = choose_units(problem.teacher, BLOCK, 20, problem.rows, CONFIG)
    assert choose_units(problem.teacher, BLOCK, 6, problem.rows, CONFIG) == most[:6]
    assert list(most) != sorted(most)
    after = problem.teacher.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


# Little to go on.


def test_no_hidden_unit_at_all(representative: Variant) -> None:
    """A constant is left, or nothing."""
    problem = Problem.of(representative.create())
    student, kept, _ = problem.solve(count=0)
    spec = compress_block(problem.teacher, BLOCK, ())
    layer = compressible(spec).output_layer(BLOCK)
    assert kept == ()
    if layer is not None and layer.layer.bias is not None:
        assert problem.error(student) < problem.error(spec)
        added = compressible(student).block(BLOCK)(problem.rows.inputs[None])[0] - problem.rows.inputs
        mean = (problem.rows.targets - problem.rows.inputs).mean(0)
        torch.testing.assert_close(added, mean.expand_as(added), rtol=1e-4, atol=1e-4)
    else:
        assert problem.error(student) == problem.error(spec)


@pytest.mark.parametrize("count", [1, 40])
def test_only_one_image(count: int, representative: Variant) -> None:
    """None can be held out: a fixed λ, no gradient steps, since none could tell which of them harm."""
    problem = Problem.of(representative.create(), count=1)
    student, kept, report = problem.solve(count=count)
    assert len(kept) == count
    assert report.epochs == 0
    if problem.post_norm:
        assert (report.ridge, report.error_after) == (None, report.error_before)
    else:
        assert report.ridge == RIDGE_WITHOUT_VALIDATION
        assert problem.error(student) == pytest.approx(report.error_after, rel=1e-2)
        assert report.error_after < report.error_before


@pytest.mark.parametrize("images", [2, 6])
@pytest.mark.parametrize("kept", [0, 1, 30])
def test_few_images_and_few_hidden_units(model: nn.Module, images: int, kept: int) -> None:
    config = replace(CONFIG, augmentation=None)
    problem = Problem.of(model, count=images, config=config)
    student, units, _ = problem.solve(config, count=kept)
    assert problem.error(student) < problem.error(compress_block(problem.teacher, BLOCK, units))


def test_a_closed_form_that_harms_is_not_kept() -> None:
    """Two images, one of them held out: too little for 40 hidden units, at any λ."""
    torch.manual_seed(1)
    config = dcvit.config.ReconstructionConfig(num_views=1, num_rows=360, batch_rows=32)
    problem = Problem.of(VARIANTS["swiglu_rmsnorm"].create(), count=2, config=config)
    _, _, report = problem.solve(config)
    assert report.error_closed_form is not None
    assert report.error_after <= report.error_closed_form <= report.error_before


# Choices.


@pytest.mark.parametrize("name", ["plain", "post_norm"])
def test_same_seed_same_block(name: str) -> None:
    problem = Problem.of(VARIANTS[name].create(), count=40, config=replace(CONFIG, num_views=200, num_rows=1000))
    first, again, other = (problem.solve(context=RunContext(seed), count=5)[0] for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(state(first), state(again), strict=True))
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(state(first), state(other), strict=True))


def test_step_size_is_found_on_held_out_images(model: nn.Module) -> None:
    problem = Problem.of(model)
    before = copy.deepcopy(problem.teacher.state_dict())
    sizes = {1e-7: 0.0, 0.02: 0.0, 100.0: 0.0}
    for size in sizes:
        sizes[size] = problem.solve(count=2, step_size=size, epochs=1)[2].error_after
    assert min(sizes, key=sizes.__getitem__) == 0.02
    for candidates in (tuple(sizes), tuple(sizes)[::-1]):
        config = replace(CONFIG, step_sizes=candidates)
        assert find_step_size(problem.teacher, BlockProblem(BLOCK, BlockSpec(2), problem.rows), config) == 0.02
    after = problem.teacher.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("name", ["plain", "layer_scale", "swiglu_packed", "norms_everywhere"])
def test_the_mlp_of_a_block_that_keeps_its_attention(name: str) -> None:
    """Its equations are what its attention gives; its output layer is fitted to the whole block."""
    problem = Problem.of(VARIANTS[name].create())
    view = compressible(problem.teacher)
    states = TeacherStates(problem.teacher, problem.views, CONFIG.batch_size, prunable=(0, BLOCK))
    rows = states.mlp_rows(BLOCK)
    sublayers = view.sublayers(BLOCK)
    assert sublayers is not None
    with torch.no_grad():
        before = view.run_blocks(view.embed(problem.views.images[:]), 0, BLOCK)
        middle = sublayers[0](before)
        torch.testing.assert_close(sublayers[1](middle), view.block(BLOCK)(before))
    torch.testing.assert_close(rows.inputs, problem.views.rows(middle))
    torch.testing.assert_close(rows.targets, problem.rows.targets)
    states.release_mlp_rows([BLOCK])
    with pytest.raises(KeyError):
        states.mlp_rows(BLOCK)

    student = copy.deepcopy(problem.teacher)
    kept, report = reconstruct_block(
        student, BlockProblem(BLOCK, BlockSpec(KEPT, attention=True), rows), CONFIG, Descent(0.03, 2), refit=False
    )
    assert report.epochs == 0
    assert report.errors == ()
    assert report.error_closed_form is not None
    assert report.error_after == report.error_closed_form < report.error_before
    assert len(kept) == KEPT == compressible(student).hidden_features(BLOCK)
    assert all(parameter.startswith(f"blocks.{BLOCK}.mlp.") for parameter in changed(student, problem.teacher))
    with torch.no_grad():
        missed = compressible(student).block(BLOCK)(before) - view.block(BLOCK)(before)
        added = view.block(BLOCK)(before) - middle
        pruned = copy.deepcopy(problem.teacher)
        compressible(pruned).prune_block(BLOCK, kept)
        unfitted = compressible(pruned).block(BLOCK)(before) - view.block(BLOCK)(before)
    assert missed.square().sum() < unfitted.square().sum()
    assert missed.square().sum() < added.square().sum()


def test_few_of_many_rows_are_those_of_the_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FEW_ROWS", 100)
    problem = Problem.of(VARIANTS["plain"].create())
    rows = TeacherStates(problem.teacher, problem.views, CONFIG.batch_size, prunable=(BLOCK,)).mlp_rows(BLOCK)
    thinned = problem.rows.thinned()
    assert len(rows.inputs) == 100
    torch.testing.assert_close(rows.targets, thinned.targets)
    sublayers = compressible(problem.teacher).sublayers(BLOCK)
    assert sublayers is not None
    with torch.no_grad():  # the MLP of what was kept between is what is wanted at the same places
        torch.testing.assert_close(sublayers[1](rows.inputs[None])[0], rows.targets)
