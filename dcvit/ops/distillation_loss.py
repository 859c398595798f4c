"""The feature distillation loss of several candidates against one teacher.

Source: DC-ViT (arXiv 2403.18708): the mean squared error between all output tokens of student and teacher. Candidates
that are probed together share the teacher's tokens, which a kernel reads only once for all of them.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.nn import functional as F

from dcvit.ops import _dispatch
from dcvit.ops._dispatch import Impl


def distillation_loss(student: Tensor, teacher: Tensor, *, weight: Tensor | None = None, impl: Impl = "auto") -> Tensor:
    """Return the mean squared error of each candidate's tokens; teacher and weights get no gradients.

        loss_c = sum_{b,n,d} weight_n (student_{c,b,n,d} - teacher_{b,n,d})^2 / (B D sum_n weight_n)

    The loss of no tokens is NaN, like any mean in torch.

    Args:
        student: Tokens of C candidates, `[C, B, N, D]`, or of one candidate, `[B, N, D]`.
        teacher: The teacher's tokens, `[B, N, D]`.
        weight: Token weights, `[N]`, for example 1 for CLS and 0 elsewhere; `None` gives all tokens the same weight.
        impl: The implementation that runs.

    Returns:
        The losses, `[C]`, or one loss, `[]`, in float32 for half precision and the dtype of `student` otherwise.

    Raises:
        ValueError: If shapes do not fit, or `impl` names an implementation that does not support the call.
    """
    if student.dim() not in (3, 4) or student.shape[-3:] != teacher.shape:
        raise ValueError(
            f"distillation_loss: student is {list(student.shape)} and teacher {list(teacher.shape)}; "
            "expected [C, B, N, D] or [B, N, D], and [B, N, D]."
        )
    if weight is not None and weight.shape != teacher.shape[1:2]:
        raise ValueError(
            f"distillation_loss: weight is {list(weight.shape)}, expected [{teacher.shape[1]}], one weight per token."
        )
    op = _dispatch.select("distillation_loss", impl, IMPLEMENTATIONS, {"student": student, "teacher": teacher})
    candidates = student if student.dim() == 4 else student.unsqueeze(0)
    if weight is not None:
        weight = weight.detach().to(torch.promote_types(student.dtype, torch.float32))
    if op is None:
        losses = eager(candidates, teacher, weight)
    else:
        losses, _ = _dispatch.call(op, candidates, teacher.detach(), weight, _saves_unit(student))
    return losses if student.dim() == 4 else losses.squeeze(0)


def _saves_unit(student: Tensor) -> bool:
    # `unit` (see the schema) costs the forward one write and saves the backward two reads. Its values are of the order
    # 1 / (B N D), which underflows in float16 before it is multiplied with a loss scale. A compiled graph could not
    # reuse its memory.
    needed = torch.is_grad_enabled() and student.requires_grad
    return needed and student.dtype != torch.float16 and not torch.compiler.is_compiling()


# Eager: the specification.


def eager(student: Tensor, teacher: Tensor, weight: Tensor | None) -> Tensor:
    """Compute the op in plain torch, for students `[C, B, N, D]`."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    student = student.to(dtype)
    teacher = teacher.detach().to(dtype).expand_as(student)
    squares = F.mse_loss(student, teacher, reduction="none")
    if weight is None:
        return squares.mean(dim=(1, 2, 3))
    return (squares.mean(dim=(1, 3)) * weight).sum(-1) / weight.sum()


# Schema, with the kernels and fakes that go with it. `weight` is float32, or float64 if student is.
#
# If `with_unit` is set, the forward also returns `unit` [C, B, N, D], from the same pass over memory; otherwise `unit`
# has no elements. It is the student's gradient for the case that each loss has the gradient 1. The first backward
# rescales it in place, which costs nothing if the gradients are indeed 1, and returns it. Any later backward computes
# the gradient again.

_SCHEMA = "(Tensor student, Tensor teacher, Tensor? weight, bool with_unit) -> (Tensor losses, Tensor unit)"
_BACKWARD_SCHEMA = "(Tensor grad, Tensor student, Tensor teacher, Tensor? weight) -> Tensor"
_RESCALE_SCHEMA = "(Tensor(a!) unit, Tensor grad) -> ()"


def forward(student: Tensor, teacher: Tensor, weight: Tensor | None, with_unit: bool) -> tuple[Tensor, Tensor]:
    """Compute the forward op where no compiled kernel is installed."""
    losses = eager(student, teacher, weight)
    return losses, backward(torch.ones_like(losses), student, teacher, weight) if with_unit else student.new_empty(0)


def _fake(student: Tensor, teacher: Tensor, weight: Tensor | None, with_unit: bool) -> tuple[Tensor, Tensor]:
    losses = student.new_empty(student.shape[0], dtype=torch.promote_types(student.dtype, torch.float32))
    return losses, student.new_empty(student.shape if with_unit else (0,))


def backward(grad: Tensor, student: Tensor, teacher: Tensor, weight: Tensor | None) -> Tensor:
    """Compute the backward op where no compiled kernel is installed."""
    batch, tokens, width = teacher.shape
    if weight is None:
        weight = grad.new_ones(tokens)
    factor = 2 * grad[:, None] * weight / (weight.sum() * (batch * width))
    difference = student.to(grad.dtype) - teacher.to(grad.dtype)
    return (factor[:, None, :, None] * difference).to(student.dtype)


def _backward_fake(grad: Tensor, student: Tensor, teacher: Tensor, weight: Tensor | None) -> Tensor:
    return student.new_empty(student.shape)


def rescale(unit: Tensor, grad: Tensor) -> None:
    """Compute the rescaling op where no compiled kernel is installed."""
    unit.mul_(grad[:, None, None, None])


def _rescale_fake(unit: Tensor, grad: Tensor) -> None:
    return None


# Autograd, the same for every overload.


def define_overload(overload: str, forward: Any, backward: Any, rescale: Any) -> OpOverload:
    """Define `dcvit::distillation_loss<overload>` and its backward with these kernels; the default overload is ""."""
    op = _dispatch.define(f"distillation_loss{overload}", _SCHEMA, kernel=forward, fake=_fake)
    op_backward = _dispatch.define(
        f"distillation_loss_backward{overload}", _BACKWARD_SCHEMA, kernel=backward, fake=_backward_fake
    )
    op_rescale = _dispatch.define(
        f"distillation_loss_rescale{overload}", _RESCALE_SCHEMA, kernel=rescale, fake=_rescale_fake
    )
    _dispatch.register_autograd(op, functools.partial(_autograd, op_backward, op_rescale), _setup_context)
    _dispatch.refuse_double_backward(op_backward)
    return op


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, teacher, weight, with_unit = inputs
    _, unit = output
    ctx.mark_non_differentiable(unit)
    ctx.set_materialize_grads(False)  # avoids a zero gradient as large as `unit`
    ctx.save_for_backward(student, teacher, weight)
    ctx.unit = unit if with_unit else None


def _autograd(
    op_backward: OpOverload, op_rescale: OpOverload, ctx: Any, grad: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    student, teacher, weight = ctx.saved_tensors
    unit, ctx.unit = ctx.unit, None
    # With create_graph, the gradient must be part of the graph, so that a second derivative raises an error. Tensors
    # under a tracer (a subclass, or a batch of gradients) must not change between forward and backward.
    if type(unit) is not Tensor or torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad):
        return _dispatch.call(op_backward, grad, student, teacher, weight), None, None, None
    op_rescale(unit, grad)
    return unit, None, None, None


# Implementations, in order of preference.

_OP = define_overload("", forward, backward, rescale)
_OP_TRITON = define_overload(
    ".triton",
    _dispatch.launcher("distillation_loss", "distillation_loss"),
    _dispatch.launcher("distillation_loss", "distillation_loss_backward"),
    _dispatch.launcher("distillation_loss", "distillation_loss_rescale"),
)


def _has_candidates(tensors: Mapping[str, Tensor | None]) -> bool:
    """Return whether there are several students; for a single one, a launch takes longer than eager's few kernels."""
    student = tensors["student"]
    return student is not None and student.dim() == 4 and len(student) > 1


IMPLEMENTATIONS = {
    "cpp": _dispatch.cpp(_OP, torch.float32, torch.float64, torch.float16, torch.bfloat16),
    "cuda": _dispatch.cuda(_OP, torch.float32, torch.float16, torch.bfloat16),
    "triton": _dispatch.triton(_OP_TRITON, torch.float32, torch.float16, torch.bfloat16, gains=_has_candidates),
}
