"""The hot paths of compression: one function per op, each with interchangeable implementations.

Every op takes `impl="auto" | "eager" | "cpp" | "cuda" | "triton"`. The eager implementation is the specification, in
plain torch. "auto" takes the first implementation that supports the inputs and is faster than eager. Any other choice
runs, or raises an error that gives the reason.
"""

import importlib

from dcvit.ops import _dispatch
from dcvit.ops._dispatch import Impl
from dcvit.ops.attention import attention
from dcvit.ops.distillation_loss import distillation_loss
from dcvit.ops.dropped_mlp import dropped_mlp
from dcvit.ops.synthesis_step import synthesis_step
from dcvit.ops.tv_prior import tv_prior

__all__ = ["Impl", "attention", "availability", "distillation_loss", "dropped_mlp", "synthesis_step", "tv_prior"]


def availability() -> dict[str, str | None]:
    """Return, for each implementation, why it cannot run on this machine; `None` if it can."""
    ops = ("attention", "dropped_mlp", "distillation_loss", "synthesis_step", "tv_prior")
    return _dispatch.availability({op: importlib.import_module(f"dcvit.ops.{op}").IMPLEMENTATIONS for op in ops})
