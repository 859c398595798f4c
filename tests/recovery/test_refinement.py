"""The distillation after reconstruction: it gains, it never harms, and only near the compressed blocks."""

import copy
from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor, nn

import dcvit
from dcvit.context import RunContext
from dcvit.history import Refinement
from dcvit.models import compressible
from dcvit.models.surgery import compress_block
from dcvit.models.teacher import freeze
from dcvit.recovery.calibration import TeacherStates, Views, draw_views
from dcvit.recovery.distill import output_tokens
from dcvit.recovery.finetune import READ_SHARE, Schedule, num_steps, refine, token_weight
from dcvit.runtime.spill import SpilledBuffer
from tests.variants import VARIANTS, Variant

CONFIG = dcvit.config.ReconstructionConfig(num_views=24, refinement_batch=4)


def problem(model: nn.Module, count: int = 6) -> tuple[nn.Module, nn.Module, Views, Tensor]:
    """A student without two blocks' attention, its teacher, views, and what the teacher makes of them."""
    teacher = freeze(model)
    images = torch.randn(count, *compressible(teacher).input_size())
    views = draw_views(teacher, dcvit.load_images(images, teacher), CONFIG, seed=0)
    states = TeacherStates(teacher, views, 64, keep_output=True)
    assert states.output is not None
    student = compress_block(compress_block(teacher, 1, range(30)), 2, range(30))
    return student, teacher, views, states.output[:]


def refined(student: nn.Module, views: Views, targets: Tensor, steps: int = 40, seed: int = 0) -> Refinement:
    return refine(student, views, SpilledBuffer([targets]), [2, 1], CONFIG, Schedule(steps), RunContext(seed))


def held_out_error(student: nn.Module, views: Views, targets: Tensor) -> float:
    tokens, weight = output_tokens(student, views.images[views.held_out], 64), token_weight(student, targets)
    squares = (tokens - targets[views.held_out]).square().mean(dim=(0, 2))
    return float((squares if weight is None else squares * weight).mean())


def test_a_variant_gains(representative: Variant) -> None:
    student, _, views, targets = problem(representative.create())
    before, spec = held_out_error(student, views, targets), copy.deepcopy(student)
    report = refined(student, views, targets)
    assert report.error_before == pytest.approx(before, rel=1e-3)
    assert report.error_after == pytest.approx(held_out_error(student, views, targets), rel=1e-3)
    assert report.error_after < 0.9 * report.error_before
    old = dict(spec.named_parameters())
    changed = {name.split(".")[1] for name, p in student.named_parameters() if not torch.equal(p, old[name])}
    assert changed == {"1", "2", "3"}  # from the first compressed block to one after the last
    assert all(name.startswith("blocks.") for name, p in student.named_parameters() if not torch.equal(p, old[name]))
    assert not any(p.requires_grad for p in student.parameters())


def test_the_tokens_that_the_head_reads_weigh_more() -> None:
    tokens = torch.randn(2, 5, 32)
    weight = token_weight(VARIANTS["plain"].create(), tokens)  # one class token of five
    assert weight is not None
    torch.testing.assert_close(weight, torch.tensor([5 * READ_SHARE, *[5 * (1 - READ_SHARE) / 4] * 4]))
    averaged = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=2, global_pool="avg", class_token=False
    )
    assert token_weight(averaged, tokens[:, :4]) is None


def test_a_student_that_cannot_gain_comes_out_as_it_went_in(model: nn.Module) -> None:
    """On the held-out images it is right already, on the others something else is wanted: every step harms."""
    student, _, views, targets = problem(model)
    before = copy.deepcopy(student.state_dict())
    judged = views.held_out.view(-1, 1, 1)
    report = refined(student, views, torch.where(judged, output_tokens(student, views.images[:], 64), targets))
    assert report.error_after == report.error_before == pytest.approx(0, abs=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_the_best_student_seen_comes_out(model: nn.Module) -> None:
    """Where the images learnt from are few and wrong, the error on the others rises again."""
    student, _, views, targets = problem(model, count=2)
    wrong = targets + 0.3 * torch.randn_like(targets) * ~views.held_out.view(-1, 1, 1)
    told: list[float] = []
    report = refine(
        student,
        views,
        SpilledBuffer([wrong]),
        [1, 2],
        CONFIG,
        Schedule(160),
        RunContext(
            progress=lambda stage, done, total, loss: told.append(loss) if done and stage == "refinement" else None
        ),
    )
    assert 0 < report.steps < 160
    assert told == sorted(told, reverse=True)
    assert report.error_after == told[-1] == pytest.approx(held_out_error(student, views, targets), rel=1e-3)


def test_held_out_images_only_validate(model: nn.Module) -> None:
    """What the teacher makes of them changes what is chosen at most, not what is learnt."""
    student, _, views, targets = problem(model)
    states = []
    for held_out in (targets, targets + 0.01 * views.held_out.view(-1, 1, 1)):
        copied = copy.deepcopy(student)
        report = refined(copied, views, held_out)
        states.append((copied.state_dict(), report.step_size, report.steps))
    assert states[0][1:] == states[1][1:]
    assert all(torch.equal(value, states[1][0][name]) for name, value in states[0][0].items())


def test_same_seed_same_student(model: nn.Module) -> None:
    student, _, views, targets = problem(model)
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    students = []
    for seed in (3, 3, 4):
        students.append(copy.deepcopy(student))
        refined(students[-1], views, targets, seed=seed)
    assert torch.equal(torch.rand(2), expected)
    first, again, other = (list(s.state_dict().values()) for s in students)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_steps_are_what_is_paid_for(model: nn.Module) -> None:
    """At most `refinement_steps`, forward and backward of each within `refinement_macs`; or none."""
    macs = compressible(model).cost().total.macs("with_attention_products")
    config = replace(CONFIG, refinement_steps=1000, refinement_batch=50)
    assert num_steps(model, config) == 1000
    found = []
    for paid in (3000, 1500, 1000, 700):
        steps = num_steps(model, replace(config, refinement_macs=paid * 3.0 * 50 * macs))
        assert steps <= min(1000, paid)
        found.append(steps)
    assert found == sorted(found, reverse=True)
    assert found[0] == 1000 > found[-1] > 0
    assert num_steps(model, replace(config, refinement_macs=1.0)) == 0
    assert num_steps(model, replace(config, refinement_steps=0)) == 0
    larger = VARIANTS["plain"].create(depth=8)
    assert num_steps(larger, replace(config, refinement_macs=1000 * 3.0 * 50 * macs)) < found[2]
