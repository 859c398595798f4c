# SPDX-License-Identifier: Apache-2.0
"""Models that dcvit compressed, in torch and timm alone.

dcvit puts this file beside the weights of every model that it saves, so that a model also loads where dcvit is not
installed:

    import sys, timm
    sys.path.insert(0, "FOLDER")
    import modeling_dcvit  # makes the architectures known to timm
    model = timm.create_model("local-dir:FOLDER", pretrained=True)

It is a module of dcvit too, which builds its models with it and only replaces the blocks' MLP by a faster one. One file
serves all families: a vision transformer is `dcvit_vision_transformer`, an Eva or Beit `dcvit_eva`, a Swin
`dcvit_swin_transformer`, a CNN of residual blocks `dcvit_residual_cnn`.
"""

import copy
import inspect
import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import timm
import torch
from timm.layers import (
    BatchNormAct2d,
    GluMlp,
    LayerNorm,
    LayerNormFp32,
    LayerScale,
    Mlp,
    QuickGELU,
    RmsNorm,
    RmsNormFp32,
    SimpleNorm,
    SimpleNormFp32,
    SwiGLU,
    SwiGLUPacked,
    resample_abs_pos_embed,
    resize_rel_pos_bias_table,
)
from timm.layers.activations import GELU, GELUTanh
from timm.layers.attention import maybe_add_mask, resolve_self_attn_mask
from timm.models import build_model_with_cfg, register_model, regnet, resnet
from timm.models._efficientnet_blocks import EdgeResidual, InvertedResidual, SqueezeExcite
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.efficientnet import EfficientNet
from timm.models.eva import Eva, EvaBlockPostNorm
from timm.models.eva import checkpoint_filter_fn as fit_eva_checkpoint
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer import checkpoint_filter_fn as fit_swin_checkpoint
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "ACTIVATIONS",
    "ARCHITECTURE",
    "BLOCKS",
    "CNN_ARCHITECTURE",
    "CNN_FILES",
    "EVA_ARCHITECTURE",
    "EVA_FILES",
    "MLPS",
    "NORMS",
    "POST_NORM",
    "SWIN_ARCHITECTURE",
    "CompressedBlock",
    "ConvolutionalAttention",
    "CutBeit",
    "DroppedBlock",
    "FusingBlock",
    "MlpHalf",
    "Pointwise",
    "PointwiseBlock",
    "SharedBlock",
    "build",
    "build_cnn",
    "build_eva",
    "build_swin",
    "cnn_places",
    "cnn_stages",
    "create",
    "create_cnn",
    "create_eva",
    "create_swin",
    "cut_cnn",
    "dcvit_eva",
    "dcvit_residual_cnn",
    "dcvit_swin_transformer",
    "dcvit_vision_transformer",
    "expansion",
    "filter_path",
    "first_layers",
    "keep_filters",
    "keep_heads",
    "keep_hidden_nodes",
    "last_activation",
    "layer_scale",
    "parameter_names",
    "require_arguments",
    "require_base",
    "shape_arguments",
    "share_weights",
    "swin_places",
]

ARCHITECTURE = "dcvit_vision_transformer"
"""The name under which timm's registry knows compressed vision transformers."""

EVA_ARCHITECTURE = "dcvit_eva"
"""That of compressed Evas and Beits."""

SWIN_ARCHITECTURE = "dcvit_swin_transformer"
"""That of compressed Swins."""

CNN_ARCHITECTURE = "dcvit_residual_cnn"
"""That of compressed CNNs."""

EVA_FILES = ("timm.models.eva", "timm.models.beit")
"""Where timm has the architectures that a compressed Eva or Beit may be of."""

CNN_FILES = ("timm.models.resnet", "timm.models.efficientnet", "timm.models.regnet")
"""Likewise of a compressed CNN."""

LARGEST_ARGUMENT = 1 << 16
"""No size of timm's architectures is above it."""

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

POST_NORM = (ResPostBlock, SwinTransformerV2Block, EvaBlockPostNorm)
"""Blocks whose norms lie behind attention and MLP."""

KERNEL = 3
"""Side of the convolutions in `SharedBlock` and `ConvolutionalAttention`."""


class MlpHalf(nn.Module):
    """The second half of a transformer block, x + ls2(mlp(norm2(x))), under the parameter names of timm's `Block`.

    Args:
        block: A timm `Block`, `ResPostBlock`, or block of a Swin, an Eva or a Beit; its MLP branch is taken over, not
            copied.
    """

    norm2: TimmModule
    mlp: TimmModule
    ls2: TimmModule
    drop_path2: TimmModule

    def __init__(self, block: TimmModule) -> None:
        super().__init__()
        self.post_norm = isinstance(block, POST_NORM)
        self.norm2 = block.norm2
        self.mlp = block.mlp
        self.ls2 = layer_scale(block)
        self.drop_path2 = block.drop_path2

    def mlp_half(self, x: Tensor) -> Tensor:
        """Tokens `[B, N, D]` or `[B, H, W, D]`, to the same shape."""
        branch: Tensor = self.norm2(self.mlp(x)) if self.post_norm else self.ls2(self.mlp(self.norm2(x)))
        return x + self.drop_path2(branch)

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """A Swin tells its blocks the image size; without windows it makes no difference."""


def layer_scale(block: TimmModule) -> nn.Module:
    """The LayerScale behind a block's MLP, which in timm's Eva and Beit is a parameter alone."""
    if (gamma := getattr(block, "gamma_2", None)) is None:
        found: nn.Module = getattr(block, "ls2", nn.Identity())
        return found
    scale = LayerScale(len(gamma))
    scale.gamma = gamma
    return scale


class CompressedBlock(MlpHalf):
    """A transformer block without attention and with fewer hidden nodes."""

    def forward(self, x: Tensor, **arguments: Any) -> Tensor:
        """Tokens to tokens; the attention arguments of timm's blocks have nothing to act on."""
        return self.mlp_half(x)


class FusingBlock(nn.Module):
    """A transformer block behind whose attention only the tokens that the class token attends to go on.

    The share `keep_rate` of the patch tokens of most attention stays, in their order; one more token is the mean of the
    others, weighted by that attention (EViT, arXiv 2202.07800).

    Args:
        block: A timm `Block` of a model with a class token; its parts are taken over, not copied.
        keep_rate: Share of the patch tokens, in (0, 1); the number is rounded up.
        num_prefix_tokens: Class token and registers, which always stay.
    """

    def __init__(self, block: TimmModule, keep_rate: float, num_prefix_tokens: int = 1) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1, self.drop_path1 = block.norm1, block.attn, block.ls1, block.drop_path1
        self.norm2, self.mlp, self.ls2, self.drop_path2 = block.norm2, block.mlp, block.ls2, block.drop_path2
        self.keep_rate, self.num_prefix_tokens = keep_rate, num_prefix_tokens

    def tokens_after(self, tokens: int) -> int:
        """How many tokens leave the block if so many enter it."""
        patches = tokens - self.num_prefix_tokens
        kept = self._num_kept(patches)
        return tokens if kept >= patches else self.num_prefix_tokens + kept + 1

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens `[B, N, D]` to `[B, M, D]`; there is nothing that a mask of all tokens could mean behind it."""
        mixed, attention = self.attend(self.norm1(x))
        x = self.fuse_tokens(x + self.drop_path1(self.ls1(mixed)), attention)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Attention `[B, N, D]`, and how the class token attends to the patches `[B, P]`, the mean over the heads."""
        logits, value = _logits_and_values(self.attn, x)
        weights = logits.softmax(dim=-1)
        return _projected(self.attn, weights, value), weights[:, :, 0, self.num_prefix_tokens :].mean(dim=1)

    def _num_kept(self, patches: int) -> int:
        return math.ceil(self.keep_rate * patches)

    def fuse_tokens(self, x: Tensor, attention: Tensor) -> Tensor:
        """Keep the tokens `[B, N, D]` of most attention `[B, P]`, and fuse the rest."""
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        kept = self._num_kept(patches.shape[1])
        if kept >= patches.shape[1]:
            return x
        order = attention.topk(patches.shape[1], dim=1).indices  # ONNX knows no stable sort
        first, rest = order[:, :kept].topk(kept, dim=1, largest=False).values, order[:, kept:]
        weight = attention.gather(1, rest)
        weight = weight / weight.sum(dim=1, keepdim=True)
        fused = (weight.unsqueeze(-1) * _taken(patches, rest)).sum(dim=1, keepdim=True)
        return torch.cat([prefix, _taken(patches, first), fused], dim=1)


def _logits_and_values(attn: TimmModule, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a timm `Attention` puts through the softmax `[B, H, N, N]`, and its values `[B, H, N, C]`."""
    qkv = attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    query, key, value = qkv.unbind(0)
    query, key = attn.q_norm(query), attn.k_norm(key)
    return attn.scale * query @ key.mT, value


def _projected(attn: TimmModule, weights: Tensor, value: Tensor) -> Tensor:
    """What a timm `Attention` gives `[B, N, D]`, of its weights `[B, H, N, N]` and values `[B, H, N, C]`."""
    mixed = attn.norm((weights @ value).transpose(1, 2).flatten(2))
    projected: Tensor = attn.proj_drop(attn.proj(mixed))
    return projected


def _taken(tokens: Tensor, index: Tensor) -> Tensor:
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


class SharedBlock(nn.Module):
    """A transformer block that shares the weights of its attention, of its MLP or of both with blocks next to it.

    A weight transformation of its own tells it from those: linear maps across the heads, before and behind the
    softmax, and a depthwise 3×3 convolution of the patches, which is added to what the MLP takes (MiniViT, arXiv
    2204.07154). They begin as nothing: identities and zeros. Attention that is mapped is computed in the open, `[H, N,
    N]` values for each image, for fused kernels have no place for the maps.

    What is shared belongs to one of the blocks alone. The others hold the same module without registering it, so that
    parameters count once, a file has them once, and they are shared again wherever the model is built.

    Args:
        block: A timm `Block`; its parts are taken over, not copied.
        attention: The attention that it shares, its own if it owns it; `None` where it shares none.
        mlp: Likewise of the MLP.
        attention_of: The number of the block that owns the attention.
        mlp_of: Likewise of the MLP.
        grid: Rows and columns of patches.
        num_prefix_tokens: Class token and the like, which pass the convolution by.
    """

    attn: TimmModule
    mlp: TimmModule
    drop_path1: TimmModule
    drop_path2: TimmModule

    def __init__(
        self,
        block: TimmModule,
        attention: TimmModule,
        mlp: TimmModule,
        *,
        attention_of: int | None,
        mlp_of: int | None,
        grid: tuple[int, int],
        num_prefix_tokens: int,
    ) -> None:
        super().__init__()
        self.norm1, self.ls1, self.drop_path1 = block.norm1, block.ls1, block.drop_path1
        self.norm2, self.ls2, self.drop_path2 = block.norm2, block.ls2, block.drop_path2
        self._hold("attn", block.attn, attention)
        self._hold("mlp", block.mlp, mlp)
        self.attention_of, self.mlp_of = attention_of, mlp_of
        self.grid, self.num_prefix_tokens = grid, num_prefix_tokens
        weight = block.attn.qkv.weight
        if attention is not None:
            self.mix_logits, self.mix_weights = (
                nn.Parameter(torch.eye(self.attn.num_heads).to(weight), requires_grad=weight.requires_grad)
                for _ in range(2)
            )
        if mlp is not None:
            kernel = torch.zeros(weight.shape[1], 1, KERNEL, KERNEL).to(weight)
            self.local = nn.Parameter(kernel, requires_grad=weight.requires_grad)

    def _hold(self, name: str, own: TimmModule, shared: TimmModule) -> None:
        if shared is None or shared is own:
            setattr(self, name, own)
        else:
            self.__dict__[name] = shared  # past nn.Module, which would register it

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens `[B, N, D]` to `[B, N, D]`; the masks are those of timm's `Attention`."""
        attend = self.attn if self.attention_of is None else self.attend
        x = x + self.drop_path1(self.ls1(attend(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        normed = self.norm2(x)
        return x + self.drop_path2(self.ls2(self.mlp(normed if self.mlp_of is None else self.look_around(normed))))

    def attend(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attention `[B, N, D]` with maps across the heads."""
        logits, value = _logits_and_values(self.attn, x)
        logits = _mixed(logits, self.mix_logits)
        logits = maybe_add_mask(logits, resolve_self_attn_mask(x.shape[1], logits, attn_mask, is_causal))
        weights = self.attn.attn_drop(_mixed(logits.softmax(dim=-1), self.mix_weights))
        return _projected(self.attn, weights, value)

    def look_around(self, x: Tensor) -> Tensor:
        """Add the convolution of the patches among the tokens `[B, N, D]` to them.

        Raises:
            ValueError: If they are another number than the model was built for, and in no square.
        """
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        maps = patches.mT.unflatten(2, _grid_of(patches.shape[1], self.grid))
        around = F.conv2d(maps, self.local, padding=KERNEL // 2, groups=len(self.local))
        return torch.cat([prefix, patches + around.flatten(2).mT], dim=1)

    def extra_repr(self) -> str:
        """Whose weights it has."""
        return f"attention_of={self.attention_of}, mlp_of={self.mlp_of}"


def _mixed(attention: Tensor, across: Tensor) -> Tensor:
    """Attention `[B, H, N, N]` with a linear map `[H, H]` across the heads."""
    return (across @ attention.flatten(2)).unflatten(2, attention.shape[2:])


def _grid_of(patches: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of so many patches: those of a model's grid, or of a square.

    Raises:
        ValueError: If they are neither.
    """
    side = math.isqrt(patches)
    if patches == math.prod(grid):
        return grid
    if patches == side * side:
        return side, side
    raise ValueError(
        f"{patches} patches are neither the grid of {grid[0]} × {grid[1]} that the model was built for nor a square, "
        "and cannot be convolved: build it with timm.create_model(..., img_size=(HEIGHT, WIDTH)) of these images."
    )


class ConvolutionalAttention(nn.Module):
    """A convolution over the grid of patches that takes the place of an attention, with its values and its `proj`.

    Of the values v `[B, N, C]` each channel is mixed on its own, with the mean v̄ over all tokens:

        a patch gets                                    (k * v) + m v̄ + b,     k of 3×3, 0 beyond the grid
        a prefix token t (class, distillation, registers)  s_t v_t + m_t v̄ + b_t

    No queries, keys or N² products are left (after SPViT, arXiv 2111.11802). All mixing weights start at zero.

    Args:
        attn: A timm `Attention` without a gate; its `norm` and `proj` are taken over, its values' rows copied.
        grid: Rows and columns of patches. Other numbers of patches are taken for a square.
        num_prefix_tokens: Tokens before the patches.
    """

    def __init__(self, attn: TimmModule, grid: tuple[int, int], num_prefix_tokens: int) -> None:
        super().__init__()
        self.grid, self.num_prefix_tokens = grid, num_prefix_tokens
        self.num_heads, self.head_dim = attn.num_heads, attn.head_dim  # of the attention that it was
        weight, channels = attn.qkv.weight, attn.attn_dim
        self.v = _linear_rows(attn.qkv, torch.arange(2 * channels, 3 * channels, device=weight.device))
        # Nothing is drawn for weights that start at zero.
        self.conv: TimmModule = nn.utils.skip_init(
            nn.Conv2d, channels, channels, KERNEL, padding=KERNEL // 2, groups=channels, device=weight.device,
            dtype=weight.dtype,
        )  # fmt: skip
        self.mean = nn.Parameter(weight.new_zeros(channels))
        self.prefix = nn.Parameter(weight.new_zeros(3, num_prefix_tokens, channels))  # s, m and b
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)
        self.norm, self.proj, self.proj_drop = attn.norm, attn.proj, attn.proj_drop
        for parameter in (*self.conv.parameters(), self.mean, self.prefix):
            parameter.requires_grad_(weight.requires_grad)
        self.train(attn.training)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens `[B, N, D]` to the same shape; the attention's arguments have nothing to act on."""
        mixed: Tensor = self.proj_drop(self.proj(self.norm(self.mix(self.v(x)))))
        return mixed

    def mix(self, value: Tensor) -> Tensor:
        """What the tokens get of values `[B, N, C]`.

        Raises:
            ValueError: If the patches are no grid.
        """
        prefix, patches = self.split(value)
        mean = value.mean(dim=1, keepdim=True)
        own, shared, constant = self.prefix
        mixed = self.conv(patches).flatten(2).mT + self.mean * mean
        return torch.cat([own * prefix + shared * mean + constant, mixed], dim=1)

    def split(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Values `[B, N, C]` as those of the prefix tokens `[B, T, C]` and of the grid `[B, C, H, W]`.

        Raises:
            ValueError: If the patches are no grid.
        """
        prefix, patches = value[:, : self.num_prefix_tokens], value[:, self.num_prefix_tokens :]
        return prefix, patches.mT.unflatten(2, _grid_of(patches.shape[1], self.grid))


class DroppedBlock(nn.Module):
    """What is left of a block that was dropped whole: its output is its input."""

    def forward(self, x: Tensor, **arguments: Any) -> Tensor:
        """Tokens, unchanged."""
        return x

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """A Swin tells its blocks the image size; without windows it makes no difference."""


class Pointwise(nn.Conv2d):
    """A 1×1 convolution with bias, which may have no channels to take or to give."""

    bias: nn.Parameter

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, C, H, W]` to `[B, K, H, W]`."""
        if self.out_channels == 0:
            return x.new_empty(len(x), 0, *x.shape[2:])
        if self.in_channels == 0:
            return self.bias.view(-1, 1, 1).expand(len(x), -1, *x.shape[2:])
        return super().forward(x)


class PointwiseBlock(nn.Module):
    """A residual block that looks at each position alone: act2(x + conv2(act1(conv1(x)))), both convolutions 1×1.

    `conv1` is the block's own first convolution, with the taps of each filter summed and its norm folded in; its
    channels are the hidden nodes. `conv2` starts at zero and takes the place of all that followed.

    Args:
        block: A residual block of timm's, see `expansion`; not changed.
    """

    conv1: Pointwise
    conv2: Pointwise
    act1: TimmModule
    act2: TimmModule

    def __init__(self, block: TimmModule) -> None:
        super().__init__()
        conv, norm, act = expansion(block)
        weight = conv.weight
        with torch.no_grad():
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            shift = norm.bias - norm.running_mean * scale
            if conv.bias is not None:
                shift = shift + conv.bias * scale
            self.conv1 = Pointwise(conv.in_channels, conv.out_channels).to(weight)
            self.conv1.weight.copy_(weight.sum(dim=(2, 3), keepdim=True) * scale.view(-1, 1, 1, 1))
            self.conv1.bias.copy_(shift)
            self.conv2 = Pointwise(conv.out_channels, conv.in_channels).to(weight)
            self.conv2.weight.zero_()
            self.conv2.bias.zero_()
        self.act1 = copy.deepcopy(act)
        name = last_activation(block)
        self.act2 = nn.Identity() if name is None else copy.deepcopy(getattr(block, name))
        self.requires_grad_(weight.requires_grad).train(block.training)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, D, H, W]` to the same shape."""
        return self.act2(x + self.conv2(self.act1(self.conv1(x))))


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
        per_layer_config: By the number of a block: `skip`, the parts that it lacks; `intermediate_size`, its hidden
            nodes; `num_attention_heads`, if it lost heads; `token_mixer`, "convolution" if one takes the attention's
            place; `token_keep_rate`, if tokens end there; `attention_of` and `mlp_of`, the blocks whose weights it has,
            if it shares them, which may be itself.
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
    _compress([(model.blocks, index) for index in range(len(model.blocks))], per_layer_config, compressed_block)
    for number, settings in per_layer_config.items():
        block = model.blocks[int(number)]
        if "num_attention_heads" in settings:
            keep_heads(block.attn, torch.arange(settings["num_attention_heads"]))
        if settings.get("token_mixer") == "convolution":
            block.attn = ConvolutionalAttention(block.attn, model.patch_embed.grid_size, model.num_prefix_tokens)
        if "token_keep_rate" in settings:
            model.blocks[int(number)] = FusingBlock(block, settings["token_keep_rate"], model.num_prefix_tokens)
        owners = {name: settings[name] for name in ("attention_of", "mlp_of") if name in settings}
        for name, owner in owners.items():
            if per_layer_config.get(str(owner), {}).get(name) != owner:
                raise ValueError(f"per_layer_config: block {number} has {name}={owner}, and block {owner} owns none.")
        if owners:
            share_weights(model, int(number), **owners)
    return model


def share_weights(
    model: TimmModule, number: int, *, attention_of: int | None = None, mlp_of: int | None = None
) -> None:
    """In place: a block becomes a `SharedBlock`.

    Args:
        model: Whose blocks they are.
        number: Of the block, a timm `Block`.
        attention_of: The number of the block whose attention it has, its own if others have that; `None` leaves it.
        mlp_of: Likewise of the MLP.
    """
    model.blocks[number] = SharedBlock(
        model.blocks[number],
        None if attention_of is None else model.blocks[attention_of].attn,
        None if mlp_of is None else model.blocks[mlp_of].mlp,
        attention_of=attention_of,
        mlp_of=mlp_of,
        grid=tuple(model.patch_embed.grid_size),
        num_prefix_tokens=model.num_prefix_tokens,
    )


def require_base(base: Any, base_args: Any, files: Collection[str]) -> None:
    """Refuse what a `config.json` says of a timm architecture, unless building it is all that this can lead to.

    `timm.create_model` would also take a folder or a repository for a name, and arguments that read, download or
    cache files.

    Args:
        base: The name of the architecture.
        base_args: Arguments of it.
        files: The modules of timm that it may be of.

    Raises:
        ValueError: If it is not of these modules, or an argument does not shape a model.
    """
    name = base if isinstance(base, str) and base.isidentifier() and timm.is_model(base) else None
    if name is None or timm.model_entrypoint(name).__module__ not in files:
        raise ValueError(
            f"base={base!r}: expected the name of an architecture of {', '.join(files)}, as timm.list_models() has it."
        )
    require_arguments("base_args", base_args, shape_arguments(name))


def shape_arguments(architecture: str) -> set[str]:
    """The arguments of a timm architecture that shape it: those of the classes of modules in its file.

    What `timm.create_model` itself takes, such as where to find weights and where to put them, is not among them.
    """
    file = sys.modules[timm.model_entrypoint(architecture).__module__]
    classes = [value for value in vars(file).values() if isinstance(value, type) and issubclass(value, nn.Module)]
    return parameter_names(base for value in classes for base in value.__mro__ if "timm.models" in base.__module__)


def parameter_names(makers: Iterable[Callable[..., Any]]) -> set[str]:
    """The names of the arguments that functions or classes take, but for where and how numbers are stored."""
    return {name for maker in makers for name in inspect.signature(maker).parameters} - {"device", "dtype"}


def require_arguments(where: str, args: Any, names: Collection[str]) -> None:
    """Refuse arguments from a file that could do more than shape a model.

    Args:
        where: What the file calls them.
        args: By name.
        names: Those that may be there.

    Raises:
        ValueError: Naming the first that may not, or whose value is neither a number, a word nor a list of these.
    """
    if not isinstance(args, Mapping):
        raise ValueError(f"{where}={args!r}: expected a table of arguments.")
    for name, value in args.items():
        if name not in names:
            raise ValueError(f"{where} has {name!r}, which is not among the arguments that shape a model of its kind.")
        if not _is_plain(value):
            raise ValueError(
                f"{where} has {name}={value!r}: expected a word, a number of at most {LARGEST_ARGUMENT}, or a list of "
                "these."
            )


def _is_plain(value: Any, nested: int = 2) -> bool:
    if isinstance(value, (list, tuple)):
        return nested > 0 and all(_is_plain(item, nested - 1) for item in value)
    if isinstance(value, (int, float)):
        return abs(value) <= LARGEST_ARGUMENT  # which NaN is not
    return value is None or value == "" or (isinstance(value, str) and value.isidentifier())


def _create_base(
    base: str, base_args: Mapping[str, Any], files: Collection[str], more: Mapping[str, Any], **read: Any
) -> TimmModule:
    """A timm architecture, whole, that says of itself how it was made.

    Args:
        base: Its name.
        base_args: Arguments that a model does not tell.
        files: The modules of timm that it may be of.
        more: Arguments that are not its own, but of this use of it: drop rates.
        read: Those that are read off it.
    """
    require_base(base, {**base_args, **more}, files)
    model: TimmModule = timm.create_model(base, pretrained=False, **read, **base_args, **more)
    model.dcvit_base = {"base": base, "base_args": dict(base_args)}
    return model


class CutBeit(Beit):  # type: ignore[misc]
    """timm's `Beit`, some of whose blocks may have no attention that would have to be told another image size."""

    blocks: nn.ModuleList

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """As of timm's."""
        blocks = self.blocks
        self.blocks = nn.ModuleList(block for block in blocks if hasattr(block, "attn"))
        try:
            super().set_input_size(*args, **kwargs)
        finally:
            self.blocks = blocks


def build_eva(
    *,
    base: str,
    base_args: Mapping[str, Any],
    img_size: Any,
    num_classes: int,
    in_chans: int,
    global_pool: str,
    per_layer_config: Mapping[str, Mapping[str, Any]],
    compressed_block: type[nn.Module] = CompressedBlock,
    **kwargs: Any,
) -> nn.Module:
    """The Eva or Beit that the `model_args` of a `config.json` describe, freshly initialised.

    Args:
        base: The timm architecture that was compressed.
        base_args: More arguments of it.
        img_size: Height and width of the images, or both as one number.
        num_classes: Classes of the head.
        in_chans: Channels of the images.
        global_pool: The pooling.
        per_layer_config: As `build`'s: `skip` and `intermediate_size`.
        compressed_block: Made of each block whose attention is skipped.
        kwargs: Drop rates, which timm's scripts pass.
    """
    size = img_size if isinstance(img_size, int) else tuple(img_size)
    model = _create_base(
        base,
        base_args,
        EVA_FILES,
        kwargs,
        img_size=size,
        num_classes=num_classes,
        in_chans=in_chans,
        global_pool=global_pool,
    )
    if isinstance(model, Beit):
        model.__class__ = CutBeit
    _compress([(model.blocks, index) for index in range(len(model.blocks))], per_layer_config, compressed_block)
    return model


def build_swin(
    *,
    version: int,
    img_size: Any,
    patch_size: Any,
    window_size: Any,
    norm_layer: Mapping[str, Any],
    per_layer_config: Mapping[str, Mapping[str, Any]],
    act_layer: str | None = None,
    compressed_block: type[nn.Module] = CompressedBlock,
    **kwargs: Any,
) -> nn.Module:
    """The Swin that the `model_args` of a `config.json` describe, freshly initialised.

    Args:
        version: 1 or 2, of the architecture.
        img_size: Height and width of the images, or both as one number.
        patch_size: Likewise of a patch.
        window_size: Likewise of each stage's windows.
        norm_layer: Key into `NORMS` and epsilon.
        per_layer_config: As `build`'s; blocks are numbered through all stages.
        act_layer: Of version 2, key into `ACTIVATIONS`.
        compressed_block: Made of each block whose attention is skipped.
        kwargs: More arguments of timm's `SwinTransformer` or `SwinTransformerV2`.
    """
    if act_layer is not None:
        kwargs["act_layer"] = ACTIVATIONS[act_layer]
    model = (SwinTransformer if version == 1 else SwinTransformerV2)(
        img_size=img_size if isinstance(img_size, int) else tuple(img_size),
        patch_size=tuple(patch_size),
        window_size=tuple(tuple(window) for window in window_size),
        norm_layer=_norm_layer(norm_layer),
        **kwargs,
    )
    _compress(swin_places(model), per_layer_config, compressed_block)
    return model


def swin_places(model: nn.Module) -> list[tuple[TimmModule, int]]:
    """Where the blocks of a Swin are, numbered through all stages: a stage's blocks, and the number among them."""
    layers: TimmModule = model.layers
    return [(stage.blocks, index) for stage in layers for index in range(len(stage.blocks))]


def build_cnn(
    *,
    base: str,
    base_args: Mapping[str, Any],
    num_classes: int,
    in_chans: int,
    global_pool: str,
    per_layer_config: Mapping[str, Mapping[str, Any]],
    **kwargs: Any,
) -> nn.Module:
    """The CNN that the `model_args` of a `config.json` describe, freshly initialised.

    Args:
        base: The timm architecture that was compressed.
        base_args: More arguments of it.
        num_classes: Classes of the head.
        in_chans: Channels of the images.
        global_pool: The pooling.
        per_layer_config: As `build`'s; numbered are the residual blocks, see `cnn_places`. `skip` names `block` or
            `convolution`, or nothing where only filters went; `intermediate_size` is how many are left.
        kwargs: Drop rates, which timm's scripts pass.
    """
    model = _create_base(
        base, base_args, CNN_FILES, kwargs, num_classes=num_classes, in_chans=in_chans, global_pool=global_pool
    )
    cut_cnn(model, per_layer_config)
    return model


def cut_cnn(model: nn.Module, per_layer_config: Mapping[str, Mapping[str, Any]]) -> None:
    """In place: a CNN's blocks become what `per_layer_config` says of them, see `build_cnn`."""
    places = cnn_places(model)
    for number, settings in per_layer_config.items():
        stage, name = places[int(number)]
        if "block" in settings["skip"]:
            setattr(stage, name, DroppedBlock())
            continue
        if "convolution" in settings["skip"]:
            setattr(stage, name, PointwiseBlock(getattr(stage, name)))
        keep_filters(getattr(stage, name), torch.arange(settings["intermediate_size"]))


def cnn_stages(model: TimmModule) -> list[TimmModule]:
    """The sequences of blocks of a ResNet, EfficientNet or RegNet."""
    if isinstance(model, EfficientNet):
        return list(model.blocks)
    prefix = "layer" if isinstance(model, resnet.ResNet) else "s"
    return [
        stage for name, stage in model.named_children() if name.startswith(prefix) and name[len(prefix) :].isdigit()
    ]


def cnn_places(model: TimmModule) -> list[tuple[TimmModule, str]]:
    """Where the residual blocks of a CNN are: a stage, and the name in it. Other blocks have no number."""
    return [
        (stage, name)
        for stage in cnn_stages(model)
        for name, block in stage.named_children()
        if isinstance(block, (PointwiseBlock, DroppedBlock)) or expansion(block) is not None
    ]


def expansion(block: TimmModule) -> Any:
    """The first convolution of a residual block with the norm and the activation behind it.

    `None` unless the block adds to its input, and that convolution is of all channels and has a plain BatchNorm.
    """
    found = first_layers(block)
    if found is None:
        return None
    if type(block) in (resnet.BasicBlock, resnet.Bottleneck):
        adds = block.downsample is None and block.stride == 1
    elif type(block) is regnet.Bottleneck:
        adds = isinstance(block.downsample, nn.Identity)
    else:
        adds = block.has_skip and getattr(block, "conv_s2d", None) is None
    conv, norm, _ = found
    plain = type(norm) in (nn.BatchNorm2d, BatchNormAct2d) and isinstance(conv, nn.Conv2d)
    return found if adds and plain and conv.groups == 1 else None


def first_layers(block: TimmModule) -> tuple[TimmModule, TimmModule, TimmModule] | None:
    """The first convolution of a block with the norm and the activation behind it; `None` of another kind of block."""
    if type(block) in (resnet.BasicBlock, resnet.Bottleneck):
        return block.conv1, block.bn1, block.act1
    if type(block) is InvertedResidual:
        return block.conv_pw, block.bn1, getattr(block.bn1, "act", None)
    if type(block) is EdgeResidual:
        return block.conv_exp, block.bn1, getattr(block.bn1, "act", None)
    if type(block) is regnet.Bottleneck:
        return block.conv1.conv, block.conv1.bn, getattr(block.conv1.bn, "act", None)
    return None


def last_activation(block: TimmModule) -> str | None:
    """The name of the activation behind a residual block's sum; `None` where there is none."""
    if type(block) in (resnet.Bottleneck, regnet.Bottleneck):
        return "act3"
    return "act2" if type(block) in (resnet.BasicBlock, PointwiseBlock) else None


def filter_path(block: TimmModule) -> list[tuple[TimmModule, int]]:
    """The layers of a residual block that hold its hidden filters.

    They are those of its first convolution, of a bottleneck those of the second, whose maps a 1×1 convolution takes.

    Args:
        block: A residual block, see `expansion`, or what a compressed one became.

    Returns:
        From the convolution of the filters to the one that takes what they give, each with the dimension of its weight
        along which they lie.
    """
    if isinstance(block, PointwiseBlock):
        return [(block.conv1, 0), (block.conv2, 1)]
    conv, norm, _ = expansion(block)
    path = [(conv, 0), (norm, 0)]
    if type(block) is resnet.BasicBlock:
        return [*path, (block.conv2, 1)]
    if type(block) is resnet.Bottleneck:
        return [(block.conv2, 0), (block.bn2, 0), (block.conv3, 1)]
    last = block.conv_pwl if hasattr(block, "conv_pwl") else block.conv3.conv
    if type(block) is regnet.Bottleneck:
        path = [(block.conv2.conv, 0), (block.conv2.bn, 0)]
    elif type(block) is InvertedResidual:
        path += [(block.conv_dw, 0), (block.bn2, 0)]
    if type(block.se) is SqueezeExcite:
        path += [(block.se.conv_reduce, 1), (block.se.conv_expand, 0)]
    elif type(block.se) is not nn.Identity:
        path.append((block.se, 0))
    return [*path, (last, 1)]


@torch.no_grad()
def keep_filters(block: TimmModule, kept: Tensor) -> None:
    """In place: only some hidden filters of a block stay.

    Args:
        block: A block of whose `filter_path` every layer is a BatchNorm or a convolution, of all channels or depthwise.
        kept: Their numbers `[K]`, in the order in which they stay.
    """
    for layer, dim in filter_path(block):
        for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
            if tensor.ndim <= dim:  # the bias of what takes the filters; the batches that a BatchNorm counted
                continue
            values = tensor.index_select(dim, kept.to(tensor.device))
            is_parameter = isinstance(tensor, nn.Parameter)
            setattr(layer, name, nn.Parameter(values, requires_grad=tensor.requires_grad) if is_parameter else values)
        if not isinstance(layer, nn.Conv2d):
            layer.num_features = len(kept)
        elif dim == 1:
            layer.in_channels = len(kept)
        else:
            layer.out_channels = len(kept)
            if layer.groups > 1:
                layer.in_channels = layer.groups = len(kept)


def _compress(
    places: Sequence[tuple[TimmModule, int]],
    per_layer_config: Mapping[str, Mapping[str, Any]],
    compressed_block: type[nn.Module],
) -> None:
    for number, settings in per_layer_config.items():
        blocks, index = places[int(number)]
        if "mlp" in settings["skip"]:
            blocks[index] = DroppedBlock()
            continue
        keep_hidden_nodes(blocks[index].mlp, torch.arange(settings["intermediate_size"]))
        if "attention" in settings["skip"]:
            blocks[index] = compressed_block(blocks[index])


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


def create_eva(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build an Eva or Beit the way timm builds its own, with its weights if `pretrained`; see `build_eva`."""
    return build_model_with_cfg(
        build_eva,
        EVA_ARCHITECTURE,
        pretrained,
        pretrained_filter_fn=_fit_eva_weights,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **kwargs,
    )


def _fit_eva_weights(state: dict[str, Tensor], model: TimmModule) -> dict[str, Tensor]:
    """Saved weights for a model built at another image size: what they say of positions is resampled.

    Timm's function for Beit tells the size that weights are of from their number, and so takes it for a square.
    """
    if isinstance(model, Eva):
        fitted: dict[str, Tensor] = fit_eva_checkpoint(state, model)
        return fitted
    patch, grid = model.patch_embed.patch_size, model.patch_embed.grid_size
    height, width = model.pretrained_model_args["img_size"]  # of the weights
    old = height // patch[0], width // patch[1]
    if old == tuple(grid):
        return state

    def resampled(name: str, tensor: Tensor) -> Tensor:
        if name == "pos_embed":
            return resample_abs_pos_embed(tensor, new_size=grid, old_size=old, num_prefix_tokens=1)
        if name.endswith("relative_position_bias_table"):
            shape = model.get_parameter(name).shape
            return resize_rel_pos_bias_table(tensor, new_window_size=grid, new_bias_shape=shape, old_window_size=old)
        return tensor

    return {name: resampled(name, tensor) for name, tensor in state.items()}


def create_swin(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build a Swin the way timm builds its own, with its weights if `pretrained`; the arguments are `build_swin`'s."""
    return build_model_with_cfg(
        build_swin,
        SWIN_ARCHITECTURE,
        pretrained,
        pretrained_strict=True,
        pretrained_filter_fn=_fit_swin_weights,
        feature_cfg={"out_indices": tuple(range(len(kwargs["depths"]))), "flatten_sequential": True},
        **kwargs,
    )


def _fit_swin_weights(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Saved weights for a Swin built at another image size, whose windows may be smaller.

    Timm resamples the position biases of version 1; where none differs in shape its function is left out, because it
    takes a model for one of Microsoft's by its parameters' names.
    """
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if "relative_position" in name}
    if any(name in state and state[name].shape != shape for name, shape in shapes.items()):
        return fit_swin_checkpoint(state, model)
    return state


def create_cnn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build a CNN the way timm builds its own, with its weights if `pretrained`; the arguments are `build_cnn`'s."""
    return build_model_with_cfg(
        build_cnn,
        CNN_ARCHITECTURE,
        pretrained,
        pretrained_strict=True,
        feature_cfg={"out_indices": (0, 1, 2, 3, 4), "flatten_sequential": kwargs["base"].startswith("reg")},
        **kwargs,
    )


def dcvit_eva(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Timm's entry point for Evas and Beits that dcvit compressed; the arguments come from `config.json`."""
    return create_eva(pretrained, **kwargs)


def dcvit_residual_cnn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Timm's entry point for CNNs that dcvit compressed; the arguments come from `config.json`."""
    return create_cnn(pretrained, **kwargs)


def dcvit_swin_transformer(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Timm's entry point for Swins that dcvit compressed; the arguments come from `config.json`."""
    return create_swin(pretrained, **kwargs)


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
    mlp.fc2 = _linear_columns(mlp.fc2, kept)


@torch.no_grad()
def keep_heads(attn: TimmModule, kept: Tensor) -> None:
    """In place: only some heads of a timm `Attention` stay.

    Args:
        attn: The attention, without a gate.
        kept: Their numbers `[H]`, at least one, in the order in which they stay.
    """
    kept = kept.to(attn.qkv.weight.device)
    channels = (kept[:, None] * attn.head_dim + torch.arange(attn.head_dim, device=kept.device)).flatten()
    attn.qkv = _linear_rows(attn.qkv, torch.cat([channels + i * attn.attn_dim for i in range(3)]))
    attn.proj = _linear_columns(attn.proj, channels)
    if not isinstance(attn.norm, nn.Identity):
        attn.norm = _norm_channels(attn.norm, channels)
    attn.num_heads, attn.attn_dim = len(kept), len(channels)


def _norm_layer(spec: Mapping[str, Any]) -> Any:
    return partial(NORMS[spec["type"]], eps=spec["eps"])


def _linear_rows(layer: nn.Linear, rows: Tensor) -> nn.Linear:
    kept = copy.deepcopy(layer)
    kept.out_features = len(rows)
    kept.weight = nn.Parameter(layer.weight[rows], requires_grad=layer.weight.requires_grad)
    if layer.bias is not None:
        kept.bias = nn.Parameter(layer.bias[rows], requires_grad=layer.bias.requires_grad)
    return kept


def _linear_columns(layer: nn.Linear, columns: Tensor) -> nn.Linear:
    kept = copy.deepcopy(layer)
    kept.in_features = len(columns)
    kept.weight = nn.Parameter(layer.weight[:, columns].contiguous(), requires_grad=layer.weight.requires_grad)
    return kept


def _norm_channels(norm: TimmModule, channels: Tensor) -> nn.Module:
    if len(channels) == 0:
        return nn.Identity()
    kept: TimmModule = copy.deepcopy(norm)
    kept.normalized_shape = (len(channels),)
    for name, parameter in norm.named_parameters(recurse=False):
        setattr(kept, name, nn.Parameter(parameter[channels], requires_grad=parameter.requires_grad))
    return kept


# As a module of dcvit, or where dcvit is imported, dcvit registers the architectures, with its own blocks.
if not __package__ and not timm.is_model(ARCHITECTURE):
    register_model(dcvit_vision_transformer)
    register_model(dcvit_eva)
    register_model(dcvit_swin_transformer)
    register_model(dcvit_residual_cnn)
