# SPDX-License-Identifier: Apache-2.0
"""Swins that dcvit compressed; this file needs only torch and timm."""

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
    """Build the Swin that the `model_args` of a `config.json` describe, freshly initialised.

    Args:
        version: The version of the architecture, 1 or 2.
        img_size: Height and width of the images, or both as one number.
        patch_size: Height and width of a patch.
        window_size: Height and width of the windows of each stage.
        norm_layer: Key into `NORMS` and epsilon.
        per_layer_config: Settings by the number of a block, through all stages: `skip` lists the parts that it lacks,
            and `intermediate_size` is its number of hidden units.
        act_layer: Key into `ACTIVATIONS`, only for version 2.
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
    """Return the list of blocks and the index in it of each block, through all stages."""
    layers: TimmModule = model.layers
    return [(stage.blocks, index) for stage in layers for index in range(len(stage.blocks))]


def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build a Swin as timm builds its own models, with weights if `pretrained`; the other arguments are `build`'s."""
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
    """Return saved weights for a Swin built at another image size, whose windows may be smaller.

    timm resamples the position biases of version 1. If no shape differs, its function is not called, because it would
    mistake the parameters' names for those of Microsoft's checkpoints.
    """
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if "relative_position" in name}
    if any(name in state and state[name].shape != shape for name, shape in shapes.items()):
        return checkpoint_filter_fn(state, model)
    return state


def dcvit_swin_transformer(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create a compressed Swin: timm's entry point, whose arguments come from `config.json`."""
    return create(pretrained, **kwargs)


# dcvit's own module always registers it, because a saved folder's file may have registered a version with fewer parts.
if __package__ or not timm.is_model(ARCHITECTURE):
    register_model(dcvit_swin_transformer)
