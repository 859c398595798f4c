"""Models that other tools have wrapped or changed: each is refused with what to pass instead, or made plain again."""

import copy
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

__all__ = ["require_plain_parts", "what_to_pass", "with_plain_norms"]

_MERGE = "merge the adapters into the weights first, model = model.merge_and_unload()"
_PLAIN_WEIGHTS = "pass the model as it was before, with its weights as plain tensors, and treat the compressed one so"
_GATHER = (
    "gather the weights first, torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True, "
    "and load them into a model of timm.create_model"
)

_TOOLS = {
    "peft": _MERGE,
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
"""By the package of a module's or a tensor's class, what to do about it."""

_HOOKS: dict[type, str] = {
    prune.BasePruningMethod: "torch.nn.utils.prune.remove",
    WeightNorm: "torch.nn.utils.remove_weight_norm",
    SpectralNorm: "torch.nn.utils.remove_spectral_norm",
}
"""By the class of a hook that computes a weight, what makes it a plain one again."""

_LIKE_BATCH_NORM = (nn.SyncBatchNorm, SyncBatchNormAct, FrozenBatchNorm2d, FrozenBatchNormAct2d)
"""What computes in evaluation mode as `BatchNorm2d` does."""


def what_to_pass(model: nn.Module, classes: tuple[type[nn.Module], ...]) -> str | None:
    """The next step for a model that is of none of some classes, as a clause; `None` where none is known.

    Args:
        model: The model, which may be a wrapper.
        classes: Those that are supported.
    """
    if (step := _tool_step(type(model))) is not None:
        return step
    held = [f"{_path(name)} (a {type(part).__qualname__})" for name, part in _outermost(model, classes)]
    if held:
        one = held[0] if len(held) == 1 else f"one of {', '.join(held)}"
        return f"pass the model that it holds, {one}; what is around it can hold the compressed one afterwards"
    return None


def require_plain_parts(model: nn.Module) -> None:
    """Refuse a model some of whose weights are not plain tensors of timm's own modules.

    Raises:
        UnsupportedModelError: Naming the first part, and what makes it plain again.
    """
    for name, module in model.named_modules():
        if (step := _tool_step(type(module)) or _weight_step(name, module)) is not None:
            raise UnsupportedModelError(f"The model's part {name or '(root)'} is a {_kind(module)}: {step}.")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer):
            step = _tool_step(type(tensor)) or _PLAIN_WEIGHTS
            raise UnsupportedModelError(f"The model's {name} is a {_kind(tensor)}: {step}.")


def with_plain_norms(model: nn.Module) -> nn.Module:
    """The model, or one that shares its weights and has `BatchNorm2d`s where it has synchronised or frozen ones.

    In evaluation mode they compute the same; the others cannot be told from a saved form, which timm's own has not.
    """
    found = [name for name, module in model.named_modules() if isinstance(module, _LIKE_BATCH_NORM)]
    if not found:
        return model
    plain = copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})
    for name in found:
        plain.set_submodule(name, _batch_norm(plain.get_submodule(name)))
    return plain


def _batch_norm(norm: TimmModule) -> nn.BatchNorm2d:
    """A `BatchNorm2d` with the weights and statistics of a norm that computes the same in evaluation mode."""
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
    return made


def _tool_step(kind: type) -> str | None:
    """What to do about a class of another tool, told by its package."""
    package = f"{kind.__module__}."
    return next((step for tool, step in _TOOLS.items() if package.startswith(f"{tool}.")), None)


def _weight_step(name: str, module: nn.Module) -> str | None:
    """What to do about a module some of whose weights are computed from others in each pass."""
    if is_parametrized(module):
        weight = next(iter(module.parametrizations))  # type: ignore[arg-type]
        return f"call torch.nn.utils.parametrize.remove_parametrizations({_path(name)}, {weight!r})"
    for hook in module._forward_pre_hooks.values():
        for kind, call in _HOOKS.items():
            if isinstance(hook, kind):
                weight = getattr(hook, "_tensor_name", None) or getattr(hook, "name", "weight")
                return f"call {call}({_path(name)}, {weight!r})"
    return None


def _outermost(model: nn.Module, classes: tuple[type[nn.Module], ...]) -> Iterator[tuple[str, nn.Module]]:
    """The modules of some classes that a model holds, but for those within one another."""
    inside: str | None = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(f"{inside}."):
            continue
        if isinstance(module, classes):
            inside = name
            yield name, module


def _path(name: str) -> str:
    """A module's name as the user writes it."""
    parts = name.split(".") if name else []
    return "model" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in parts)


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
