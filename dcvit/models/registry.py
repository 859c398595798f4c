"""The lookup of a model's adapter."""

import torch
from torch import nn

from dcvit.errors import UnsupportedModelError
from dcvit.models.base import ModelView
from dcvit.models.foreign import (
    class_name,
    require_module,
    require_plain_parts,
    supported_alternative,
    with_plain_norms,
)

__all__ = ["compressible", "families", "require_supported"]


def families() -> tuple[type[ModelView], ...]:
    """Return the adapter class of each family."""
    from dcvit.models.cnn import CnnView
    from dcvit.models.eva import EvaView
    from dcvit.models.swin import SwinView
    from dcvit.models.vision_transformer import VisionTransformerView

    return VisionTransformerView, EvaView, SwinView, CnnView


def compressible(model: nn.Module) -> ModelView:
    """Return the adapter of a model's family. The call is cheap and does not look inside the model.

    Raises:
        UnsupportedModelError: If no family fits.
    """
    require_module(model)
    for family in families():
        if isinstance(model, family.classes):
            return family(model)
    kind = class_name(type(model))
    classes = tuple(one for family in families() for one in family.classes)
    if (step := supported_alternative(model, classes)) is not None:
        raise UnsupportedModelError(f"The model is a {kind}, and not one of timm's models: {step}.")
    raise UnsupportedModelError(
        f"Models of type {kind} are not supported; timm's {', '.join(one.__name__ for one in classes)} are (`dcvit "
        "families` lists the families). Create one of these with timm.create_model; weights of the same architecture "
        "may load into it."
    )


def require_supported(model: nn.Module) -> ModelView:
    """Return the adapter of a model after checking that all its parts are supported.

    The adapter's model is usually `model` itself. If that has synchronised or frozen BatchNorms, it is a model that
    shares its weights and has plain BatchNorms instead.

    Raises:
        UnsupportedModelError: If a part is not supported, and names it: its type, a dtype other than float32 or
            float64, a device other than CPU or CUDA, or more than one dtype or device.
    """
    compressible(model)
    require_plain_parts(model)
    view = compressible(with_plain_norms(model))
    tensors = [*model.parameters(), *model.buffers()]
    placements = {(tensor.dtype, tensor.device) for tensor in tensors if tensor.is_floating_point()}
    if len(placements) != 1:
        listed = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in placements))
        raise UnsupportedModelError(
            f"The model's parameters are {listed or 'no floats'}: expected all of one dtype, on one device; move them "
            "there, model.to(torch.float32), model.to('cpu')."
        )
    ((dtype, device),) = placements
    if device.type == "meta":
        raise UnsupportedModelError("The model is on the meta device, without weights: load it on a CPU or a GPU.")
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedModelError(
            f"The model is on {device}: compression runs on a CPU or a CUDA GPU, move it there."
        )
    if dtype not in (torch.float32, torch.float64):
        raise UnsupportedModelError(
            f"The model's parameters are {dtype}: recovery needs full precision, call model.float() first "
            "(the compressed model can be cast back)."
        )
    view.check()
    return view
