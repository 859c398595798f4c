# SPDX-License-Identifier: Apache-2.0
"""Vision transformers that dcvit compressed; this file needs only torch and timm."""

from collections.abc import Mapping
from typing import Any

import timm
from timm.layers import Mlp, SwiGLU, SwiGLUPacked
from timm.models import build_model_with_cfg, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer, checkpoint_filter_fn
from torch import nn

from dcvit.models.modeling.shared import ACTIVATIONS, TimmModule, compress_blocks, norm_from
from dcvit.models.modeling.variations import VARIATIONS

__all__ = ["ARCHITECTURE", "BLOCKS", "MLPS", "build", "create", "dcvit_vision_transformer"]

ARCHITECTURE = "dcvit_vision_transformer"
"""The name under which timm's registry knows compressed vision transformers."""


BLOCKS: dict[str, type[nn.Module]] = {"pre_norm": Block, "res_post_norm": ResPostBlock}
MLPS: dict[str, Any] = {"mlp": Mlp, "swiglu": SwiGLU, "swiglu_packed": SwiGLUPacked}


def build(
    *,
    img_size: Any,
    intermediate_size: int,
    layer_scale: bool,
    norm_layer: Mapping[str, Any],
    embed_norm_layer: Mapping[str, Any] | None = None,  # timm leaves out arguments that are None
    act_layer: str,
    block_fn: str,
    mlp_layer: str,
    distilled: bool,
    per_layer_config: Mapping[str, Mapping[str, Any]],
    **kwargs: Any,
) -> nn.Module:
    """Build the model that the `model_args` of a `config.json` describe, freshly initialised.

    Args:
        img_size: Height and width of the images, or both as one number.
        intermediate_size: Hidden units of the widest MLP; a packed SwiGLU counts gate and value.
        layer_scale: Whether the blocks have LayerScale.
        norm_layer: Key into `NORMS` and epsilon of the blocks' norms.
        embed_norm_layer: Key into `NORMS` and epsilon of the norm after the patch embedding.
        act_layer: Key into `ACTIVATIONS`.
        block_fn: Key into `BLOCKS`.
        mlp_layer: Key into `MLPS`.
        distilled: Whether the model has DeiT's distillation token.
        per_layer_config: Settings by the number of a block. `skip` lists the parts that it lacks, and
            `intermediate_size` is its number of hidden units. Optional keys are `num_attention_heads` (the heads left),
            `token_mixer` ("convolution" if one replaces the attention), `token_keep_rate` (if it drops tokens), and
            `attention_of` and `mlp_of` (the owners of shared weights, which may be the block itself).
        kwargs: More arguments of timm's `VisionTransformer`.

    Raises:
        ValueError: If a block has a setting that this file does not support.
    """
    embed_dim = kwargs["embed_dim"]
    model: TimmModule = (VisionTransformerDistilled if distilled else VisionTransformer)(
        img_size=img_size if isinstance(img_size, int) else tuple(img_size),
        patch_size=tuple(kwargs.pop("patch_size")),
        # Half a unit is added, so that int(embed_dim * ratio) in timm does not lose a unit to rounding.
        mlp_ratio=(intermediate_size + 0.5) / embed_dim,
        init_values=1e-5 if layer_scale else None,  # any value: the saved weights replace it
        norm_layer=norm_from(norm_layer),
        embed_norm_layer=None if embed_norm_layer is None else norm_from(embed_norm_layer),
        act_layer=ACTIVATIONS[act_layer],
        block_fn=BLOCKS[block_fn],
        mlp_layer=MLPS[mlp_layer],
        **kwargs,
    )
    compress_blocks([(model.blocks, index) for index in range(len(model.blocks))], per_layer_config)
    known = {"skip", "intermediate_size", *(key for keys in VARIATIONS for key in keys)}
    for number, settings in per_layer_config.items():
        if unknown := settings.keys() - known:
            raise ValueError(
                f"per_layer_config: block {number} has {min(unknown)!r}, which is unknown here. A saved folder's "
                "modeling_dcvit.py is for the model beside it: load each in a separate process, or install dcvit."
            )
        for keys, change in VARIATIONS.items():
            if settings.keys() & keys:
                change(model, number, per_layer_config)
    return model


def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build a model as timm builds its own, with weights if `pretrained`; the other arguments are `build`'s."""
    return build_model_with_cfg(
        build,
        ARCHITECTURE,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **kwargs,
    )


def dcvit_vision_transformer(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create a compressed vision transformer: timm's entry point, whose arguments come from `config.json`."""
    return create(pretrained, **kwargs)


# dcvit's own module always registers it, because a saved folder's file may have registered a version with fewer parts.
if __package__ or not timm.is_model(ARCHITECTURE):
    register_model(dcvit_vision_transformer)
