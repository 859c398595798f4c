"""A check that a model's output comes only from its modules, because only these are compressed and saved.

A hook that changes values, a `forward` replaced on a module, or a subclass with the name of timm's class is neither in
the weights nor in `config.json`, so a student could not have it. The model is therefore called once as its user calls
it, and its output is compared with that of a twin rebuilt from what will be saved.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from dcvit.errors import HooksWarning, UnsupportedModelError
from dcvit.models.foreign import class_name
from dcvit.models.rebuild import timm_type
from dcvit.models.registry import compressible

__all__ = ["TOLERANCE", "remove_state_hooks", "require_plain_behaviour"]

TOLERANCE = 1000.0
"""The largest difference that is accepted, in epsilons of the dtype and relative to the largest output.

Twin and model run the same layers with the same weights, so they normally agree bit for bit. Only the order of sums can
differ, if the caller chose another memory format, unfused attention or a compiler. On the models tried this made at
most 1e-6 in float32, eight epsilons. A hook that is meant to change the output causes far more than a thousand.
"""

_HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}
"""The kind of hook by the attribute that holds it: of a module or, with the prefix "_global", of the process."""

_STATE_HOOKS = {
    "_state_dict_pre_hooks": "state_dict pre-hook",
    "_state_dict_hooks": "state_dict hook",
    "_load_state_dict_pre_hooks": "load_state_dict pre-hook",
    "_load_state_dict_post_hooks": "load_state_dict post-hook",
}
"""The kind of hook of saving and loading by the attribute of a module that holds it; timm's models have none."""

MOST_NAMED = 5
"""The largest number of findings that a message lists."""


@torch.no_grad()
def require_plain_behaviour(model: nn.Module, images: Tensor) -> None:
    """Refuse a model whose output does not come only from its modules; warn of hooks that do not change the output.

    Args:
        model: The model, in evaluation mode.
        images: A few images `[B, C, H, W]`.

    Raises:
        UnsupportedModelError: If the output differs; the message names the hooks, replaced methods and foreign classes.
    """
    twin = compressible(model).rebuild()
    for module in twin.modules():
        module._compiled_call_impl = module.forward  # called instead of all hooks, including those of the process
    expected: Tensor = twin(images)
    found = model(images)
    hooks = list(_hooks(model))
    if (difference := _difference(found, expected)) is not None:
        extras = _listed([*hooks, *_replaced(model), *_foreign(model, twin)])
        raise UnsupportedModelError(
            f"model(images) {difference} what its modules compute, and a compressed model keeps only the modules. "
            f"Found: {extras or 'no hook and no replaced method'}. Remove what changes the output (handle.remove(), "
            "del module.forward), or compress the unchanged model."
        )
    if hooks:
        warnings.warn(
            f"The model has hooks that do not change its output: {_listed(hooks)}. They will also fire "
            "during compression, and the compressed model will not have them.",
            HooksWarning,
            stacklevel=2,
        )


def remove_state_hooks(model: nn.Module) -> None:
    """Remove the hooks of `state_dict` and `load_state_dict` from a model, in place, and warn of them.

    During the work parts of students are saved and loaded, of which such hooks know nothing.
    """
    found = list(_hooks_of_modules(model, _STATE_HOOKS))
    for module in model.modules():
        for attribute in _STATE_HOOKS:
            getattr(module, attribute).clear()
    if found:
        warnings.warn(
            f"The model has hooks that change how it is saved or loaded: {_listed(found)}. Compression does without "
            "them, and the compressed model will not have them.",
            HooksWarning,
            stacklevel=2,
        )


def _listed(found: Sequence[str]) -> str:
    more = len(found) - MOST_NAMED
    return "; ".join([*found[:MOST_NAMED], *([f"and {more} more"] if more > 0 else [])])


def _difference(found: Any, expected: Tensor) -> str | None:
    """Return how an output differs from the expected one, as text before "what"; `None` if it does not."""
    if not isinstance(found, Tensor):
        return f"is a {type(found).__name__}, not"
    if found.shape != expected.shape:
        return f"is {list(found.shape)} and not {list(expected.shape)},"
    largest = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    error = float((found - expected).abs().max() / largest)
    if error <= TOLERANCE * torch.finfo(expected.dtype).eps:  # false for NaN
        return None
    return f"differs by {error:.2g} of the largest output from"


def _hooks(model: nn.Module) -> Iterator[str]:
    """Yield the hooks of a model's modules, and the global hooks of the process."""
    for attribute, kind in _HOOKS.items():
        for hook in getattr(torch_module, f"_global{attribute}").values():
            yield f"{kind} {_name(hook)} of all modules"
    yield from _hooks_of_modules(model, _HOOKS)


def _hooks_of_modules(model: nn.Module, kinds: Mapping[str, str]) -> Iterator[str]:
    """Yield the hooks of some kinds, given as `_HOOKS` is, of a model's modules."""
    for name, module in model.named_modules():
        for attribute, kind in kinds.items():
            for hook in getattr(module, attribute).values():
                yield f"{kind} {_name(hook)} on {name or 'the model'}"


def _replaced(model: nn.Module) -> Iterator[str]:
    """Yield the methods that were replaced on single modules."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if callable(value) and inspect.isfunction(getattr(type(module), attribute, None)):
                yield f"replaced {attribute} on {name or 'the model'}"


def _foreign(model: nn.Module, twin: nn.Module) -> Iterator[str]:
    """Yield the module classes that differ from the twin's."""
    expected = {name: timm_type(module) for name, module in twin.named_modules()}
    for name, module in model.named_modules():
        kind = timm_type(module)
        if name in expected and kind is not expected[name]:
            yield f"class {class_name(kind)} of {name or 'the model'}"


def _name(hook: Callable[..., Any]) -> str:
    hook = getattr(hook, "hook", hook)  # torch wraps hooks of load_state_dict
    return str(getattr(hook, "__qualname__", type(hook).__qualname__)).replace("<locals>.", "")
