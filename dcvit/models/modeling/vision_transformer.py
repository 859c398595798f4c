# SPDX-License-Identifier: Apache-2.0
"""Vision transformers that dcvit compressed, in torch and timm alone."""

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
    """The model that the `model_args` of a `config.json` describe, freshly initialised.

    Args:
        img_size: Height and width of the images, or both as one number.
        intermediate_size: Hidden units of the widest MLP; a packed SwiGLU counts gate and value.
        layer_scale: Whether the blocks have LayerScale.
        norm_layer: Key into `NORMS` and epsilon of the blocks' norms.
        embed_norm_layer: Likewise of the norm after the patch embedding.
        act_layer: Key into `ACTIVATIONS`.
        block_fn: Key into `BLOCKS`.
        mlp_layer: Key into `MLPS`.
        distilled: Whether it has DeiT's distillation token.
        per_layer_config: By the number of a block: `skip`, the parts that it lacks; `intermediate_size`, its hidden
            units; `num_attention_heads`, if it lost heads; `token_mixer`, "convolution" if one takes the attention's
            place; `token_keep_rate`, if tokens end there; `attention_of` and `mlp_of`, the blocks whose weights it has,
            if it shares them, which may be itself.
        kwargs: More arguments of timm's `VisionTransformer`.

    Raises:
        ValueError: If a block asks for what this file does not hold.
    """
    embed_dim = kwargs["embed_dim"]
    model: TimmModule = (VisionTransformerDistilled if distilled else VisionTransformer)(
        img_size=img_size if isinstance(img_size, int) else tuple(img_size),
        patch_size=tuple(kwargs.pop("patch_size")),
        # Half a unit up: int(embed_dim * ratio) inside timm must not lose a unit to rounding.
        mlp_ratio=(intermediate_size + 0.5) / embed_dim,
        init_values=1e-5 if layer_scale else None,  # any value: the saved one is loaded over it
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
                "modeling_dcvit.py is for the model beside it: load each in a process of its own, or install dcvit."
            )
        for keys, change in VARIATIONS.items():
            if settings.keys() & keys:
                change(model, number, per_layer_config)
    return model


def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build a model the way timm builds its own, with its weights if `pretrained`; the arguments are `build`'s."""
    return build_model_with_cfg(
        build,
        ARCHITECTURE,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **kwargs,
    )


def dcvit_vision_transformer(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Timm's entry point for vision transformers that dcvit compressed; the arguments come from `config.json`."""
    return create(pretrained, **kwargs)


# A module of dcvit registers it whatever a saved folder's file registered before, which need not know all of its parts.
if __package__ or not timm.is_model(ARCHITECTURE):
    register_model(dcvit_vision_transformer)
