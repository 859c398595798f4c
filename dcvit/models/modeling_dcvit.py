# SPDX-License-Identifier: Apache-2.0
"""A vision transformer that dcvit compressed, in torch and timm alone.

dcvit puts this file beside the weights of every model that it saves, so that a model also loads where dcvit is not
installed:

    import sys, timm
    sys.path.insert(0, "FOLDER")
    import modeling_dcvit  # makes the architecture known to timm
    model = timm.create_model("local-dir:FOLDER", pretrained=True)

It is a module of dcvit too, which builds its models with it and only replaces the blocks' MLP by a faster one.
"""

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeAlias

import timm
import torch
from timm.layers import (
    GluMlp,
    LayerNorm,
    LayerNormFp32,
    Mlp,
    QuickGELU,
    RmsNorm,
    RmsNormFp32,
    SimpleNorm,
    SimpleNormFp32,
    SwiGLU,
    SwiGLUPacked,
)
from timm.layers.activations import GELU, GELUTanh
from timm.models import build_model_with_cfg, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

__all__ = [
    "ACTIVATIONS",
    "ARCHITECTURE",
    "BLOCKS",
    "MLPS",
    "NORMS",
    "CompressedBlock",
    "DroppedBlock",
    "MlpHalf",
    "build",
    "create",
    "dcvit_vision_transformer",
    "keep_hidden_nodes",
]

ARCHITECTURE = "dcvit_vision_transformer"
"""The name under which timm's registry knows compressed vision transformers."""

TimmModule: TypeAlias = Any
"""A module of timm's, whose attributes its type does not tell."""

# What `config.json` names.
NORMS: dict[str, type[nn.Module]] = {
    "layernorm": LayerNorm,
    "layernormfp32": LayerNormFp32,
    "rmsnorm": RmsNorm,
    "rmsnormfp32": RmsNormFp32,
    "simplenorm": SimpleNorm,
    "simplenormfp32": SimpleNormFp32,
    "torch_layernorm": nn.LayerNorm,
}
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "timm_gelu": GELU,
    "gelu_tanh": GELUTanh,
    "quick_gelu": QuickGELU,
    "silu": nn.SiLU,
    "relu": nn.ReLU,
}
BLOCKS: dict[str, type[nn.Module]] = {"pre_norm": Block, "res_post_norm": ResPostBlock}
MLPS: dict[str, Any] = {"mlp": Mlp, "swiglu": SwiGLU, "swiglu_packed": SwiGLUPacked}


class MlpHalf(nn.Module):
    """The second half of a transformer block, x + ls2(mlp(norm2(x))), under the parameter names of timm's `Block`.

    Args:
        block: A timm `Block` or `ResPostBlock`; its MLP branch is taken over, not copied.
    """

    norm2: TimmModule
    mlp: TimmModule
    ls2: TimmModule
    drop_path2: TimmModule

    def __init__(self, block: TimmModule) -> None:
        super().__init__()
        self.post_norm = isinstance(block, ResPostBlock)
        self.norm2 = block.norm2
        self.mlp = block.mlp
        self.ls2 = nn.Identity() if self.post_norm else block.ls2
        self.drop_path2 = block.drop_path2

    def mlp_half(self, x: Tensor) -> Tensor:
        """Tokens `[B, N, D]` to `[B, N, D]`."""
        branch: Tensor = self.norm2(self.mlp(x)) if self.post_norm else self.ls2(self.mlp(self.norm2(x)))
        return x + self.drop_path2(branch)


class CompressedBlock(MlpHalf):
    """A transformer block without attention and with fewer hidden nodes."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens `[B, N, D]` to `[B, N, D]`; the attention arguments of timm's blocks have nothing to act on."""
        return self.mlp_half(x)


class DroppedBlock(nn.Identity):
    """What is left of a block that was dropped whole: its output is its input."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens `[B, N, D]`, unchanged."""
        return x


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
    compressed_block: type[nn.Module] = CompressedBlock,
    **kwargs: Any,
) -> nn.Module:
    """The model that the `model_args` of a `config.json` describe, freshly initialised.

    Args:
        img_size: Height and width of the images, or both as one number.
        intermediate_size: Hidden nodes of the widest MLP; a packed SwiGLU counts gate and value.
        layer_scale: Whether the blocks have LayerScale.
        norm_layer: Key into `NORMS` and epsilon of the blocks' norms.
        embed_norm_layer: Likewise of the norm after the patch embedding.
        act_layer: Key into `ACTIVATIONS`.
        block_fn: Key into `BLOCKS`.
        mlp_layer: Key into `MLPS`.
        distilled: Whether it has DeiT's distillation token.
        per_layer_config: By the number of a block: `skip`, the parts that it lacks, and `intermediate_size`, its
            hidden nodes.
        compressed_block: Made of each block whose attention is skipped.
        kwargs: More arguments of timm's `VisionTransformer`.
    """
    embed_dim = kwargs["embed_dim"]
    model: TimmModule = (VisionTransformerDistilled if distilled else VisionTransformer)(
        img_size=img_size if isinstance(img_size, int) else tuple(img_size),
        patch_size=tuple(kwargs.pop("patch_size")),
        # Half a node up: int(embed_dim * ratio) inside timm must not lose a node to rounding.
        mlp_ratio=(intermediate_size + 0.5) / embed_dim,
        init_values=1e-5 if layer_scale else None,  # any value: the saved one is loaded over it
        norm_layer=_norm_layer(norm_layer),
        embed_norm_layer=None if embed_norm_layer is None else _norm_layer(embed_norm_layer),
        act_layer=ACTIVATIONS[act_layer],
        block_fn=BLOCKS[block_fn],
        mlp_layer=MLPS[mlp_layer],
        **kwargs,
    )
    for index, settings in per_layer_config.items():
        block = model.blocks[int(index)]
        if "mlp" in settings["skip"]:
            model.blocks[int(index)] = DroppedBlock()
            continue
        keep_hidden_nodes(block.mlp, torch.arange(settings["intermediate_size"]))
        if "attention" in settings["skip"]:
            model.blocks[int(index)] = compressed_block(block)
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


@torch.no_grad()
def keep_hidden_nodes(mlp: TimmModule, kept: Tensor) -> None:
    """In place: only some hidden nodes of an MLP stay.

    Args:
        mlp: One of `MLPS`.
        kept: Their numbers `[K]`, in the order in which they stay.
    """
    hidden = mlp.fc2.in_features
    kept = kept.to(mlp.fc2.weight.device)
    if type(mlp) is GluMlp:
        mlp.fc1 = _linear_rows(mlp.fc1, torch.cat([kept, kept + hidden]))
    elif type(mlp) is SwiGLU:
        mlp.fc1_g, mlp.fc1_x = _linear_rows(mlp.fc1_g, kept), _linear_rows(mlp.fc1_x, kept)
    else:
        mlp.fc1 = _linear_rows(mlp.fc1, kept)
    if not isinstance(mlp.norm, nn.Identity):
        mlp.norm = _norm_channels(mlp.norm, kept)
    fc2 = copy.deepcopy(mlp.fc2)
    fc2.in_features = len(kept)
    fc2.weight = nn.Parameter(mlp.fc2.weight[:, kept].contiguous(), requires_grad=mlp.fc2.weight.requires_grad)
    mlp.fc2 = fc2


def _norm_layer(spec: Mapping[str, Any]) -> Any:
    return partial(NORMS[spec["type"]], eps=spec["eps"])


def _linear_rows(layer: nn.Linear, rows: Tensor) -> nn.Linear:
    kept = copy.deepcopy(layer)
    kept.out_features = len(rows)
    kept.weight = nn.Parameter(layer.weight[rows], requires_grad=layer.weight.requires_grad)
    if layer.bias is not None:
        kept.bias = nn.Parameter(layer.bias[rows], requires_grad=layer.bias.requires_grad)
    return kept


def _norm_channels(norm: TimmModule, channels: Tensor) -> nn.Module:
    if len(channels) == 0:
        return nn.Identity()
    kept: TimmModule = copy.deepcopy(norm)
    kept.normalized_shape = (len(channels),)
    for name, parameter in norm.named_parameters(recurse=False):
        setattr(kept, name, nn.Parameter(parameter[channels], requires_grad=parameter.requires_grad))
    return kept


# As a module of dcvit, or where dcvit is imported, dcvit registers the architecture, with its own blocks.
if not __package__ and not timm.is_model(ARCHITECTURE):
    register_model(dcvit_vision_transformer)
