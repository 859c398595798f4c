"""Models that other tools have wrapped or changed: each is refused with a next step, or converted to a plain model."""

import copy
import reprlib
from collections.abc import Iterator

import torch
from timm.layers import BatchNormAct2d
from timm.layers.norm_act import FrozenBatchNormAct2d, SyncBatchNormAct
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torchvision.ops import FrozenBatchNorm2d

from dcvit.errors import UnsupportedModelError
from dcvit.models.modeling.shared import TimmModule

__all__ = [
    "attribute_path",
    "class_name",
    "require_module",
    "require_plain_parts",
    "supported_alternative",
    "with_plain_norms",
]

_MERGE = "merge the adapters into the weights first, model = model.merge_and_unload()"
_MERGE_AROUND = (
    "merge the adapters into the weights first, with the model that get_peft_model returned: "
    "model = peft_model.merge_and_unload()"
)
_PLAIN_WEIGHTS = "pass the model as it was before, with its weights as plain tensors, and convert the compressed model"
_GATHER = (
    "gather the weights first, torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True, "
    "and load them into a model of timm.create_model"
)

_TOOLS = {
    "peft.peft_model": _MERGE,
    "peft": _MERGE_AROUND,
    "torch.distributed.fsdp": _GATHER,
    "torch.distributed.tensor": _GATHER,
    "torch.ao": _PLAIN_WEIGHTS,
    "torchao": _PLAIN_WEIGHTS,
    "torch.sparse": _PLAIN_WEIGHTS,
    "bitsandbytes": _PLAIN_WEIGHTS,
    "optimum": _PLAIN_WEIGHTS,
    "torch.jit": "create the model with timm.create_model, load the script's state_dict() into it, and pass that",
    "torch.fx": "pass the model that the graph was made of",
}
"""The user's next step by the package of a module's or tensor's class; the first package that fits counts."""

_REMOVERS: dict[type, str] = {
    prune.BasePruningMethod: "torch.nn.utils.prune.remove",
    WeightNorm: "torch.nn.utils.remove_weight_norm",
    SpectralNorm: "torch.nn.utils.remove_spectral_norm",
}
"""The function that makes a weight plain again, by the class of the hook that computes it."""

_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")
"""The attribute in which `torch.compile`, and activation checkpointing, keep the module that they wrap."""

_BATCH_NORMS = (nn.SyncBatchNorm, SyncBatchNormAct, FrozenBatchNorm2d, FrozenBatchNormAct2d)
"""Norms that compute the same as `BatchNorm2d` in evaluation mode."""


def require_module(model: object, expected: str = "a timm model") -> None:
    """Refuse what is not a module, such as a result in place of its model.

    Args:
        model: The caller's argument `model`.
        expected: What it may be, for the message.

    Raises:
        UnsupportedModelError: If it is not a module.
    """
    if isinstance(model, nn.Module):
        return
    kind = type(model).__name__
    if isinstance(getattr(model, "model", None), nn.Module):
        raise UnsupportedModelError(
            f"model is a {kind}: expected {expected}; pass the one that it holds, result.model."
        )
    raise UnsupportedModelError(
        f"model={reprlib.repr(model)} is a {kind}: expected {expected}. Create one with timm.create_model."
    )


def supported_alternative(model: nn.Module, classes: tuple[type[nn.Module], ...]) -> str | None:
    """Return the user's next step for a model of an unsupported class, as a clause; `None` if none is known.

    Args:
        model: The model, which may be a wrapper.
        classes: The supported classes.
    """
    if (step := _tool_step(type(model))) is not None:
        return step
    inner = [f"{attribute_path(name)} (a {type(part).__qualname__})" for name, part in _outermost(model, classes)]
    if inner:
        one = inner[0] if len(inner) == 1 else f"one of {', '.join(inner)}"
        return f"pass the model inside of it, {one}; the wrapper can hold the compressed model afterwards"
    return None


def require_plain_parts(model: nn.Module) -> None:
    """Refuse a model in which not every weight is a plain tensor of one of timm's own modules.

    Raises:
        UnsupportedModelError: If a part is not plain; the message names the first one and how to make it plain.
    """
    for name, module in model.named_modules():
        step = (
            _wrapper_step(name, module)
            or _tool_step(type(module))
            or _reparametrisation_step(name, module)
            or _offload_step(module)
        )
        if step is not None:
            raise UnsupportedModelError(f"The model's part {name or '(root)'} is a {class_name(type(module))}: {step}.")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer):
            step = _tool_step(type(tensor)) or _PLAIN_WEIGHTS
            raise UnsupportedModelError(f"The model's {name} is a {class_name(type(tensor))}: {step}.")


def with_plain_norms(model: nn.Module) -> nn.Module:
    """Return the model with a `BatchNorm2d` in place of each synchronised or frozen one; the weights are shared.

    In evaluation mode they compute the same. timm's saved form cannot hold the others. A model without such norms is
    returned itself.
    """
    found = [name for name, module in model.named_modules() if type(module) in _BATCH_NORMS]
    if not found:
        return model
    plain = copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})
    for name in found:
        plain.set_submodule(name, _batch_norm(plain.get_submodule(name)))
    return plain


def _batch_norm(norm: TimmModule) -> nn.BatchNorm2d:
    """Return a `BatchNorm2d` with the weights and statistics of another kind of batch norm."""
    fused = hasattr(norm, "act")
    momentum = getattr(norm, "momentum", 0.1)
    made = (BatchNormAct2d if fused else nn.BatchNorm2d)(len(norm.weight), norm.eps, momentum)
    made.to(norm.weight).train(norm.training)
    for name in ("weight", "bias"):
        tensor = getattr(norm, name)
        setattr(made, name, nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad))
    made.running_mean, made.running_var = norm.running_mean, norm.running_var
    if hasattr(norm, "num_batches_tracked"):
        made.num_batches_tracked = norm.num_batches_tracked
    if fused:
        made.act, made.drop = norm.act, norm.drop
    # Hooks and a replaced `forward` go along, so that whoever compares outputs sees what they change.
    made.__dict__.update({name: value for name, value in vars(norm).items() if name == "forward" or "_hooks" in name})
    return made


def _tool_step(kind: type) -> str | None:
    """Return the next step for a class of another tool, which its package identifies; `None` for other classes."""
    package = f"{kind.__module__}."
    return next((step for tool, step in _TOOLS.items() if package.startswith(f"{tool}.")), None)


def _wrapper_step(name: str, module: nn.Module) -> str | None:
    """Return the next step for a part that only wraps another module; `None` for other modules."""
    for attribute in _WRAPPED:
        if name and isinstance(module._modules.get(attribute), nn.Module):
            path = attribute_path(name)
            return f"put the module that it wraps in its place, {path} = {path}.{attribute}"
    return None


def _reparametrisation_step(name: str, module: nn.Module) -> str | None:
    """Return the next step for a module that computes a weight from others in each pass; `None` for other modules."""
    if is_parametrized(module):
        weight = next(iter(module.parametrizations))  # type: ignore[arg-type]
        return f"call torch.nn.utils.parametrize.remove_parametrizations({attribute_path(name)}, {weight!r})"
    for hook in module._forward_pre_hooks.values():
        for kind, call in _REMOVERS.items():
            if isinstance(hook, kind):
                weight = getattr(hook, "_tensor_name", None) or getattr(hook, "name", "weight")
                return f"call {call}({attribute_path(name)}, {weight!r})"
    return None


def _offload_step(module: nn.Module) -> str | None:
    """Return the next step for a module whose weights accelerate loads in each pass; `None` for other modules."""
    if hasattr(module, "_hf_hook") and any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        return (
            "bring its weights back from where accelerate keeps them: "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True)"
        )
    return None


def _outermost(model: nn.Module, classes: tuple[type[nn.Module], ...]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost modules of given classes in a model."""
    inside: str | None = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(f"{inside}."):
            continue
        if isinstance(module, classes):
            inside = name
            yield name, module


def attribute_path(name: str) -> str:
    """Return a module's name as a Python expression."""
    parts = name.split(".") if name else []
    return "model" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in parts)


def class_name(kind: type) -> str:
    """Return the full name of a class, for messages."""
    return f"{kind.__module__}.{kind.__qualname__}"
