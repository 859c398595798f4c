"""Helpers of the adapters that rebuild a model from its saved form, and refuse a model that would lose a part."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import timm
import torch
from timm.layers import DropPath, PatchDropout, PatchDropoutWithIndices
from timm.models.beit import Beit
from torch import nn

from dcvit.errors import UnsupportedModelError
from dcvit.models.blocks import PLAIN
from dcvit.models.building import without_values
from dcvit.models.foreign import attribute_path
from dcvit.models.modeling.eva import PrunedBeit
from dcvit.models.modeling.shared import NORMS, CompressedBlock, DroppedBlock, TimmModule, require_base

__all__ = [
    "ANOTHER_MODEL",
    "base_of",
    "layer_settings",
    "named_key",
    "norm_spec",
    "num_classes",
    "num_params",
    "rebuilt",
    "require_class",
    "require_same",
    "saved_config",
    "timm_type",
]

ANOTHER_MODEL = "Choose another model: `dcvit families` lists what dcvit compresses."
"""The user's next step if a part of an architecture is not supported."""

_STATELESS = (nn.Identity, nn.Dropout, DropPath, PatchDropout, PatchDropoutWithIndices)
"""Modules that do nothing at inference. Drop rates are training settings, which timm's exports leave out too."""

_TIMM_TYPES: dict[type[nn.Module], type[nn.Module]] = {**PLAIN, PrunedBeit: Beit}
"""The type that stands in for dcvit's own subclass of a timm type."""


def require_class(model: TimmModule, classes: Collection[type[nn.Module]]) -> None:
    """Refuse a model of a subclass of timm's classes, because its behaviour is unknown.

    Raises:
        UnsupportedModelError: If the model's type is not one of `classes`.
    """
    if timm_type(model) not in classes:
        raise UnsupportedModelError(
            f"The model is a {type(model).__qualname__}, a subclass that dcvit does not know, and it could not be "
            "rebuilt from its saved form. If it computes what timm's own class does, pass that: create it with "
            "timm.create_model, and load yours.state_dict() into it."
        )


def num_classes(model: TimmModule) -> int:
    """Return the number of classes, 0 for a backbone. It is read off the head, which may have been replaced."""
    head = _head(model)
    return 0 if isinstance(head, nn.Identity) else int(getattr(head, "out_features", model.num_classes))


def _head(model: TimmModule) -> TimmModule:
    """Return the last layer of a model; of DeiT's two heads, that of the class token."""
    head = model.get_classifier()
    return head[0] if isinstance(head, tuple) else head


def require_same(model: nn.Module, twin: nn.Module, family: str) -> None:
    """Refuse a model that differs from the model rebuilt from its saved form.

    Args:
        model: The model.
        twin: The rebuilt model, on the meta device.
        family: The name of the twin's architecture, for the message.

    Raises:
        UnsupportedModelError: If they differ; the message names the first part that does.
    """
    original, found = _signature(model), _signature(twin)
    for name in sorted(original.keys() | found.keys()):
        if original.get(name) != found.get(name):
            if (first := _first_name(model, name)) != name:
                path = attribute_path(name)
                raise UnsupportedModelError(
                    f"The model's part {name} is shared with {first}: it could not be rebuilt from its saved form, in "
                    f"which each has its own. Copy it: {path} = copy.deepcopy({path})."
                )
            raise UnsupportedModelError(
                f"The model's part {name or '(root)'} is {original.get(name, 'absent')}, where a "
                f"{family} built from its sizes has {found.get(name, 'nothing')}: it could not be rebuilt from its "
                f"saved form. {_next_step(twin, name)}"
            )


def _first_name(model: nn.Module, name: str) -> str:
    """Return the first of the names that a model has for a module or a tensor; `name` itself if it has no such part."""
    parts = dict([*model.named_modules(remove_duplicate=False), *_named_tensors(model)])
    return next((first for first, part in parts.items() if name in parts and part is parts[name]), name)


def _next_step(twin: TimmModule, name: str) -> str:
    """Return the user's next step for a part that could not be rebuilt."""
    head = next((path for path, module in twin.named_modules() if module is _head(twin)), None)
    if head is not None and f"{name}.".startswith(f"{head}."):
        return (
            "For a head, dcvit takes one nn.Linear with a bias; compress the model without yours, head, "
            f"model.{head} = model.{head}, torch.nn.Identity(), and set it afterwards: result.model.{head} = head."
        )
    added = name.partition(".")[0]
    if not hasattr(twin, added):
        return f"Remove it before, with del model.{added}, and set it on result.model afterwards."
    return "Replace it by timm's own part, or pass a model that timm.create_model created with such a part."


def saved_config(
    model: TimmModule,
    architecture: str,
    args: Mapping[str, Any],
    *,
    input_size: tuple[int, int, int],
    first_conv: str | None,
    classifier: str | list[str] | None,
    **of_input: Any,
) -> Mapping[str, Any]:
    """Return a model's `config.json`, as timm reads it.

    Args:
        model: The model.
        architecture: The name of its builder in timm's registry.
        args: The builder's arguments, including `num_classes` and `global_pool`.
        input_size: Channels, height and width of its images.
        first_conv: The name of the layer that takes the images.
        classifier: The name of the head, or the names of several heads.
        **of_input: More settings of the input that timm records.
    """
    return {
        "architecture": architecture,
        "num_classes": args["num_classes"],
        "num_features": int(model.num_features),
        "global_pool": args["global_pool"],
        "model_args": args,
        "pretrained_cfg": {
            **_preprocessing_cfg(model),
            "input_size": input_size,
            **of_input,
            "num_classes": args["num_classes"],
            "first_conv": first_conv,
            "classifier": classifier,
        },
    }


def base_of(base: Any, args: Mapping[str, Any], files: Collection[str]) -> dict[str, Any]:
    """Return the entries of `config.json` for the timm architecture that a model is built from, and its arguments.

    Raises:
        UnsupportedModelError: If a saved file with these entries would be refused.
    """
    try:
        require_base(base, args, files)
    except ValueError as error:
        raise UnsupportedModelError(
            f"The model could not be rebuilt from its saved form: {error} Create it with timm.create_model, by that "
            "name and with such arguments."
        ) from error
    return {"base": base, "base_args": args}


def rebuilt(model: TimmModule, architecture: str, config: Mapping[str, Any]) -> nn.Module:
    """Return a new timm model of an architecture, with the weights of an existing model.

    Args:
        model: The model whose weights, device, dtype and mode the new one gets.
        architecture: A name in timm's registry.
        config: The model's `config.json`.
    """
    weight = next(model.parameters())
    pretrained_cfg = {**config["pretrained_cfg"], "architecture": architecture}
    with without_values():
        new: nn.Module = timm.create_model(architecture, pretrained_cfg=pretrained_cfg, **config["model_args"])
    new.to(weight.dtype).to_empty(device=weight.device)
    # Hooks may change what `state_dict` returns, and it leaves out non-persistent buffers.
    tensors = dict(_named_tensors(model))
    with torch.no_grad():
        for name, tensor in _named_tensors(new):
            tensor.copy_(tensors[name])
    return new.train(model.training)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters and buffers of a model; shared ones under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _preprocessing_cfg(model: TimmModule) -> dict[str, Any]:
    """Return preprocessing, licence and labels from a model's `pretrained_cfg`, but not the source of its weights."""
    source = getattr(model, "pretrained_cfg", {})
    keep = ("interpolation", "crop_pct", "crop_mode", "mean", "std", "license", "label_names", "label_descriptions")
    return {key: source[key] for key in keep if source.get(key) is not None}


def _signature(model: TimmModule) -> dict[str, str]:
    """Return the type and settings of each module, and the shape of each parameter and buffer, by name."""
    parts = {
        name: f"{timm_type(module).__qualname__}({module.extra_repr()})"
        for name, module in model.named_modules()
        if not isinstance(module, _STATELESS)
    }
    tensors = {name: f"Tensor{list(t.shape)}" for name, t in [*model.named_parameters(), *model.named_buffers()]}
    norms = {
        name + ".eps": str(getattr(module, "eps", None))
        for name, module in model.named_modules()
        if isinstance(module, tuple(NORMS.values()))
    }
    return parts | tensors | norms


def timm_type(module: nn.Module) -> type[nn.Module]:
    """Return a module's type; for dcvit's own subclasses of timm's blocks, timm's type."""
    return _TIMM_TYPES.get(type(module), type(module))


def layer_settings(block: TimmModule, widest: int) -> dict[str, Any] | None:
    """Return a compressed or pruned block's settings, with the keys of transformers' `per_layer_config`.

    Return `None` for a whole block of `widest` hidden units.
    """
    if isinstance(block, DroppedBlock):
        return {"skip": ["attention", "mlp"]}
    hidden = int(block.mlp.fc2.in_features)
    if isinstance(block, CompressedBlock):
        return {"skip": ["attention"], "intermediate_size": hidden}
    return {"skip": [], "intermediate_size": hidden} if hidden < widest else None


def named_key(table: Mapping[str, type[nn.Module]], part: str, kind: type[nn.Module]) -> str:
    """Return the key of a type in a table of the modelling files.

    Raises:
        UnsupportedModelError: If the type is not in the table; the message names the part.
    """
    for key, value in table.items():
        if value is kind:
            return key
    raise UnsupportedModelError(
        f"{part} is a {kind.__qualname__}; supported are {', '.join(t.__qualname__ for t in table.values())}. "
        f"{ANOTHER_MODEL}"
    )


def norm_spec(part: str, norm: TimmModule) -> dict[str, Any]:
    """Return the entry of `config.json` for a norm."""
    return {"type": named_key(NORMS, part, type(norm)), "eps": norm.eps}


def num_params(module: TimmModule) -> int:
    """Return the number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())
