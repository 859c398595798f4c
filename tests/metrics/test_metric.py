"""How far a student is from its teacher: the formulas, and what may be left out of computing them."""

import math

import pytest
import torch
from torch import Tensor, nn

import dcvit
from dcvit.metrics.fidelity import Metric
from dcvit.models import compressible
from dcvit.models.pseudo_head import class_logits
from dcvit.models.surgery import compress_block
from dcvit.models.teacher import freeze
from tests.variants import VARIANTS, Variant

ROUNDING = 1e-4
"""Of float32 sums over a few hundred tokens, relative; a wrong term is off by far more."""


def cut(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    teacher = freeze(model)
    return compress_block(teacher, 2, range(30)), teacher


@pytest.mark.parametrize("name", ["plain", "distilled", "backbone"])
def test_cross_entropy_of_two_distributions(name: str) -> None:
    student, teacher = cut(VARIANTS[name].create())
    view = compressible(teacher)
    images = torch.randn(5, *view.input_size())
    p, q = (class_logits(m, compressible(m).tokens(images)).softmax(-1) for m in (teacher, student))
    cross, own = (float(-(p * other.log()).sum(-1).mean()) for other in (q, p))
    metric = Metric(teacher, [images], "cross_entropy", batch_size=2)
    assert metric.loss(student) == pytest.approx(cross - own, rel=1e-3)  # of two numbers that are much larger
    assert metric.loss(teacher) == 0 < metric.loss(student)


def relative_error(student: nn.Module, teacher: nn.Module, images: Tensor) -> float:
    """R of the docstring; the mean is that of all tokens of all images, channel by channel."""
    s, t = (compressible(m).tokens(images).double() for m in (student, teacher))
    return float((s - t).square().sum() / (t - t.mean(dim=(0, 1))).square().sum())


def test_relative_distillation_error(variant: Variant) -> None:
    student, teacher = cut(variant.create())
    images = torch.randn(5, *compressible(teacher).input_size())
    expected = relative_error(student, teacher, images)
    for batch_size in (2, 64):
        metric = Metric(teacher, [images], "distillation", batch_size)
        assert metric.loss(student) == pytest.approx(expected, rel=ROUNDING)


def test_a_mean_and_a_scale_of_the_tokens_do_not_count(model: nn.Module) -> None:
    """1 is what answering with the mean token would get, whatever the tokens' size."""
    teacher = freeze(model)
    images = torch.randn(4, 3, 32, 32)
    mean = compressible(teacher).tokens(images).mean(dim=(0, 1))
    constant = freeze(model)
    constant.norm.weight.zero_()
    constant.norm.bias.copy_(mean)
    assert Metric(teacher, [images], "distillation").loss(constant) == pytest.approx(1.0, rel=ROUNDING)


@pytest.mark.parametrize("kind", ["distillation", "cross_entropy"])
def test_several_sets_give_the_geometric_mean(model: nn.Module, kind: dcvit.config.MetricKind) -> None:
    student, teacher = cut(model)
    sets = [torch.randn(3, 3, 32, 32), torch.zeros(2, 3, 32, 32)]
    single = [Metric(teacher, [images], kind).loss(student) for images in sets]
    assert single[0] != pytest.approx(single[1], rel=1e-3)  # else any mean would do
    assert Metric(teacher, sets, kind).loss(student) == pytest.approx(math.sqrt(single[0] * single[1]), rel=1e-9)


def test_the_teacher_is_at_no_distance(representative: Variant) -> None:
    teacher = freeze(representative.create())
    shape = compressible(teacher).input_size()
    assert Metric(teacher, [torch.randn(4, *shape)], "distillation", 3).loss(teacher) == 0
    several = Metric(teacher, [torch.randn(4, *shape), torch.randn(2, *shape)], "distillation")
    assert several.loss(teacher) == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize("kind", ["distillation", "cross_entropy"])
def test_blocks_before_the_first_compressed_one_need_not_run(
    representative: Variant, kind: dcvit.config.MetricKind
) -> None:
    student, teacher = cut(representative.create())
    images = torch.randn(5, *compressible(teacher).input_size())
    metric = Metric(teacher, [images, images[:2] + 1], kind, batch_size=2)
    whole = metric.loss(student)
    ran: list[int] = []
    for block in range(4):
        student.blocks[block].register_forward_hook(lambda *_, block=block: ran.append(block))  # type: ignore[index, operator]
    for first in (0, 1, 2):
        ran.clear()
        assert metric.loss(student, first) == whole
        assert set(ran) == set(range(first, 4))
