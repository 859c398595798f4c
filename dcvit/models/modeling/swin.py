# SPDX-License-Identifier: Apache-2.0
"""Swins that dcvit compressed, in torch and timm alone."""

from collections.abc import Mapping
from typing import Any

import timm
from timm.models import build_model_with_cfg, register_model
from timm.models.swin_transformer import SwinTransformer, checkpoint_filter_fn
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from dcvit.models.modeling.shared import ACTIVATIONS, TimmModule, compress_blocks, norm_from

__all__ = ["ARCHITECTURE", "build", "create", "dcvit_swin_transformer", "swin_places"]

ARCHITECTURE = "dcvit_swin_transformer"
"""The name under which timm's registry knows compressed Swins."""


def build(
    *,
    version: int,
    img_size: Any,
    patch_size: Any,
    window_size: Any,
    norm_layer: Mapping[str, Any],
    per_layer_config: Mapping[str, Mapping[str, Any]],
    act_layer: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """The Swin that the `model_args` of a `config.json` describe, freshly initialised.

    Args:
        version: 1 or 2, of the architecture.
        img_size: Height and width of the images, or both as one number.
        patch_size: Likewise of a patch.
        window_size: Likewise of each stage's windows.
        norm_layer: Key into `NORMS` and epsilon.
        per_layer_config: By the number of a block, through all stages: `skip`, the parts that it lacks;
            `intermediate_size`, its hidden units.
        act_layer: Of version 2, key into `ACTIVATIONS`.
        kwargs: More arguments of timm's `SwinTransformer` or `SwinTransformerV2`.
    """
    if act_layer is not None:
        kwargs["act_layer"] = ACTIVATIONS[act_layer]
    model = (SwinTransformer if version == 1 else SwinTransformerV2)(
        img_size=img_size if isinstance(img_size, int) else tuple(img_size),
        patch_size=tuple(patch_size),
        window_size=tuple(tuple(window) for window in window_size),
        norm_layer=norm_from(norm_layer),
        **kwargs,
    )
    compress_blocks(swin_places(model), per_layer_config)
    return model


def swin_places(model: nn.Module) -> list[tuple[TimmModule, int]]:
    """Where the blocks of a Swin are, numbered through all stages: a stage's blocks, and the number among them."""
    layers: TimmModule = model.layers
    return [(stage.blocks, index) for stage in layers for index in range(len(stage.blocks))]


def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build a Swin the way timm builds its own, with its weights if `pretrained`; the arguments are `build`'s."""
    return build_model_with_cfg(
        build,
        ARCHITECTURE,
        pretrained,
        pretrained_strict=True,
        pretrained_filter_fn=_fit_weights,
        feature_cfg={"out_indices": tuple(range(len(kwargs["depths"]))), "flatten_sequential": True},
        **kwargs,
    )


def _fit_weights(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Saved weights for a Swin built at another image size, whose windows may be smaller.

    Timm resamples the position biases of version 1; where none differs in shape its function is left out, because it
    takes a model for one of Microsoft's by its parameters' names.
    """
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if "relative_position" in name}
    if any(name in state and state[name].shape != shape for name, shape in shapes.items()):
        return checkpoint_filter_fn(state, model)
    return state


def dcvit_swin_transformer(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Timm's entry point for Swins that dcvit compressed; the arguments come from `config.json`."""
    return create(pretrained, **kwargs)


# A module of dcvit registers it whatever a saved folder's file registered before, which need not know all of its parts.
if __package__ or not timm.is_model(ARCHITECTURE):
    register_model(dcvit_swin_transformer)
