"""Whether a model computes what its modules say, which is all that is compressed and saved.

A hook that changes what it is shown, a `forward` replaced on a module, or a subclass under the name of timm's class is
in no weight and no `config.json`: a student could not have it. So the model is called once as its user calls it, and
compared with a twin that was rebuilt from what will be saved.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from dcvit.errors import HooksWarning, UnsupportedModelError
from dcvit.models.rebuild import timm_type
from dcvit.models.registry import compressible

__all__ = ["TOLERANCE", "require_modules_alone"]

TOLERANCE = 1000.0
"""The largest difference in epsilons of the dtype, relative to the largest output.

Twin and model run the same layers with the same weights, so that they agree bit for bit. Only the order of sums may be
another, where the caller chose another memory format, attention that is not fused, or a compiler: that is 1e-6 at most
in float32 on the models tried, eight epsilons. What a hook is there to change is far above a thousand.
"""

_HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}
"""By the attribute in which torch keeps them, of a module or, with "_global" in front, of the process."""

MOST_NAMED = 5
"""Of what was found, in a message."""


@torch.no_grad()
def require_modules_alone(model: nn.Module, images: Tensor) -> None:
    """Refuse a model whose output is not that of its modules alone; warn of hooks that leave the output as it is.

    Args:
        model: The model, in evaluation mode.
        images: A few images `[B, C, H, W]`.

    Raises:
        UnsupportedModelError: Naming the hooks, replaced methods and foreign classes that were found.
    """
    twin = compressible(model).rebuild()
    for module in twin.modules():
        module._compiled_call_impl = module.forward  # called in place of hooks, of the process's too
    expected: Tensor = twin(images)
    found = model(images)
    hooks = list(_hooks(model))
    if (difference := _difference(found, expected)) is not None:
        extras = _listed([*hooks, *_replaced(model), *_foreign(model, twin)])
        raise UnsupportedModelError(
            f"model(images) {difference} what its modules compute alone, and a compressed model keeps nothing else. "
            f"Found: {extras or 'no hook and no replaced method'}. Remove what changes the output (handle.remove(), "
            "del module.forward), or compress the model that you had before."
        )
    if hooks:
        warnings.warn(
            f"The model has hooks that only watch: {_listed(hooks)}. They will also fire while it is compressed, and "
            "the compressed model will not have them.",
            HooksWarning,
            stacklevel=2,
        )


def _listed(found: Sequence[str]) -> str:
    more = len(found) - MOST_NAMED
    return "; ".join([*found[:MOST_NAMED], *([f"and {more} more"] if more > 0 else [])])


def _difference(found: Any, expected: Tensor) -> str | None:
    """How an output differs from the expected one, as words before "what"; `None` if it does not."""
    if not isinstance(found, Tensor):
        return f"is a {type(found).__name__}, not"
    if found.shape != expected.shape:
        return f"is {list(found.shape)} and not {list(expected.shape)},"
    largest = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    error = float((found - expected).abs().max() / largest)
    if error <= TOLERANCE * torch.finfo(expected.dtype).eps:  # which NaN is not
        return None
    return f"differs by {error:.2g} of the largest output from"


def _hooks(model: nn.Module) -> Iterator[str]:
    """The hooks of a model's modules, and those that the process has for all modules."""
    for attribute, kind in _HOOKS.items():
        for hook in getattr(torch_module, f"_global{attribute}").values():
            yield f"{kind} {_name(hook)} of all modules"
    for name, module in model.named_modules():
        for attribute, kind in _HOOKS.items():
            for hook in getattr(module, attribute).values():
                yield f"{kind} {_name(hook)} on {name or 'the model'}"


def _replaced(model: nn.Module) -> Iterator[str]:
    """The methods that modules have of their own in place of their class's."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if callable(value) and inspect.isfunction(getattr(type(module), attribute, None)):
                yield f"replaced {attribute} on {name or 'the model'}"


def _foreign(model: nn.Module, twin: nn.Module) -> Iterator[str]:
    """The classes of modules that the twin has not."""
    expected = {name: timm_type(module) for name, module in twin.named_modules()}
    for name, module in model.named_modules():
        kind = timm_type(module)
        if name in expected and kind is not expected[name]:
            yield f"class {kind.__module__}.{kind.__qualname__} of {name or 'the model'}"


def _name(hook: Callable[..., Any]) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__qualname__)).replace("<locals>.", "")
