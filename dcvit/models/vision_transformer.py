"""timm's `VisionTransformer`: ViT, DeiT, DINOv2, CLIP, SigLIP and the like.

A model is rebuilt from the sizes of its modules and not from its name. `_model_args` reads every constructor argument
off the model, builds a twin on the meta device and compares the two module by module. A part that would be lost is
thus refused by name before any work.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import (
    GluMlp,
    LayerScale,
    Mlp,
    PatchEmbed,
    SwiGLU,
)
from timm.layers.attention import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from dcvit.costs import BlockCost, Cost, linear_cost
from dcvit.errors import UnsupportedModelError
from dcvit.models.blocks import attention_sublayer, compressed, mlp_sublayer_cost
from dcvit.models.building import without_values
from dcvit.models.isotropic import IsotropicView, has_post_norm, require_one_answer
from dcvit.models.modeling.shared import ACTIVATIONS, CompressedBlock, DroppedBlock, TimmModule
from dcvit.models.modeling.variations import (
    ConvolutionalAttention,
    FusingBlock,
    SharedBlock,
    keep_heads,
    share_weights,
)
from dcvit.models.modeling.vision_transformer import ARCHITECTURE, BLOCKS, build
from dcvit.models.rebuild import (
    ANOTHER_MODEL,
    layer_settings,
    named_key,
    norm_spec,
    num_classes,
    num_params,
    require_class,
    require_same,
    timm_type,
)

__all__ = [
    "VisionTransformerView",
    "convolution_of",
    "create_vision_transformer",
    "fuse_tokens",
    "head_layer",
    "keep_block_heads",
    "num_heads",
    "place_convolution",
    "share_block_weights",
    "shareable",
]

DERIVED_BLOCKS = (FusingBlock, SharedBlock)
"""Blocks that other methods make of timm's `Block`."""


class VisionTransformerView(IsotropicView):
    """timm's `VisionTransformer` and `VisionTransformerDistilled`.

    Modifications:
        - a compressed block (`CompressedBlock`) loses `norm1`, `attn`, `ls1` and `drop_path1`, and the rows of
          `mlp.fc1` and columns of `mlp.fc2` of the removed hidden units (of a SwiGLU, both gate and value);
        - a pruned block loses only those rows and columns;
        - a dropped block becomes a `DroppedBlock`;
        - a block may lose heads, have a `ConvolutionalAttention` instead of its attention, or become a `FusingBlock`,
          which drops tokens after its attention;
        - consecutive blocks may become `SharedBlock`s, of which one owns the shared attention, MLP or both;
        - everything else, parameter names included, stays.
    """

    family = "vit"
    models = "ViT, DeiT, DeiT-III, DINOv2, CLIP, SigLIP, AIMv2, BEiT-3"
    classes: tuple[type[nn.Module], ...] = (VisionTransformer, VisionTransformerDistilled)
    source = "arXiv 2010.11929, 2012.12877"
    architecture = ARCHITECTURE

    @property
    def tv_exponent(self) -> float:
        """The exponent β as published: 1 for DeiT (by its distillation token or timm's name), 0.6 for ViT."""
        name = str(getattr(self.model, "pretrained_cfg", {}).get("architecture", ""))
        deit = isinstance(self.model, VisionTransformerDistilled) or name.startswith("deit")
        return 1.0 if deit else 0.6

    def check(self) -> None:
        require_class(self.model, self.classes)
        require_one_answer(self.model)
        self._model_args()
        shared = [block for block, module in enumerate(self.model.blocks) if isinstance(module, SharedBlock)]
        if shared:
            raise UnsupportedModelError(
                f"The blocks {', '.join(map(str, shared))} share weights, and compressing one would change the others: "
                "compress the original, to a smaller budget."
            )

    def embed(self, images: Tensor) -> Tensor:
        return self.model.norm_pre(self.model.patch_drop(self.model._pos_embed(self.model.patch_embed(images))))

    def run_blocks(self, state: Tensor, first: int, stop: int) -> Tensor:
        return self.model.blocks[first:stop](state)

    def _block_costs(self) -> tuple[list[BlockCost], int]:
        tokens = self.model.patch_embed.num_patches + self.model.num_prefix_tokens
        blocks = []
        for block in self.model.blocks:
            before, tokens = tokens, block.tokens_after(tokens) if isinstance(block, FusingBlock) else tokens
            blocks.append(_block_cost(block, before, tokens))
        return blocks, tokens

    def sublayers(self, block: int) -> tuple[Callable[[Tensor], Tensor], nn.Module] | None:
        module = self.model.blocks[block]
        if not isinstance(module, Block):
            return None
        return partial(attention_sublayer, module), compressed(module)

    def _model_args(self) -> dict[str, Any]:
        """Return the constructor arguments of the model, read off its modules, as JSON values.

        Raises:
            UnsupportedModelError: If they do not reproduce the model; the message names the first part that differs.
        """
        args = _read_model_args(self.model)
        with without_values():
            twin = build(**args)
        require_same(self.model, twin, "VisionTransformer")
        return args


def _read_model_args(model: TimmModule) -> dict[str, Any]:
    """Return every constructor argument of `VisionTransformer` that shapes the model, and `per_layer_config`."""
    embed = model.patch_embed
    if type(embed) is not PatchEmbed:
        raise UnsupportedModelError(
            f"patch_embed is a {type(embed).__qualname__}; only timm's PatchEmbed (one strided convolution) is "
            f"supported. {ANOTHER_MODEL}"
        )
    if embed.img_size is None:
        raise UnsupportedModelError("patch_embed.img_size is None: call model.set_input_size(img_size=...) first.")
    for i, block in enumerate(model.blocks):
        if not isinstance(block, (*BLOCKS.values(), CompressedBlock, DroppedBlock, *DERIVED_BLOCKS)):
            raise UnsupportedModelError(
                f"blocks.{i} is a {type(block).__qualname__}; supported are timm's Block and ResPostBlock, whose MLP "
                f"follows the attention. {ANOTHER_MODEL}"
            )
    embed_dim = int(model.embed_dim)
    head_norm = model.norm if not isinstance(model.norm, nn.Identity) else model.fc_norm
    block = _representative_block(model)
    # `build` creates all blocks as wide as the widest one, and then removes hidden units.
    mlps = [b.mlp for b in model.blocks if not isinstance(b, DroppedBlock)] or [block.mlp]
    mlp = max(mlps, key=lambda mlp: mlp.fc2.in_features)
    intermediate_size = max(_fc1_features(mlp), 2)  # timm warns if it initialises an MLP without units
    if model.attn_pool is not None and model.attn_pool.mlp is not None:  # as wide as an uncompressed block
        intermediate_size = max(intermediate_size, model.attn_pool.mlp.fc1.out_features)
    widest = intermediate_size // (2 if type(mlp) is GluMlp else 1)
    per_layer = {
        str(i): settings
        for i, module in enumerate(model.blocks)
        if (settings := _layer_settings(module, widest, embed_dim)) is not None
    }
    args: dict[str, Any] = {
        "img_size": list(embed.img_size),
        "patch_size": list(embed.patch_size),
        "in_chans": embed.proj.in_channels,
        "num_classes": num_classes(model),
        "global_pool": model.global_pool,
        "embed_dim": embed_dim,
        "depth": len(model.blocks),
        **_attention_args(model),
        "intermediate_size": intermediate_size,
        "proj_bias": mlp.fc2.bias is not None,  # timm has one argument for this and for attention's last layer
        "scale_mlp_norm": not isinstance(mlp.norm, nn.Identity),
        "layer_scale": isinstance(getattr(block, "ls2", None), LayerScale),
        "class_token": model.cls_token is not None,
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "no_embed_class": bool(model.no_embed_class),
        "reg_tokens": 0 if model.reg_token is None else model.reg_token.shape[1],
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "final_norm": not isinstance(head_norm, nn.Identity),
        "fc_norm": not isinstance(model.fc_norm, nn.Identity),
        "pool_include_prefix": bool(model.pool_include_prefix),
        "dynamic_img_size": bool(model.dynamic_img_size),
        "dynamic_img_pad": bool(embed.dynamic_img_pad),
        "embed_norm_layer": None if isinstance(embed.norm, nn.Identity) else norm_spec("patch_embed.norm", embed.norm),
        "norm_layer": norm_spec("blocks.*.norm2", block.norm2),
        "act_layer": named_key(ACTIVATIONS, "blocks.*.mlp.act", type(mlp.act)),
        "block_fn": "res_post_norm" if has_post_norm(block) else "pre_norm",
        "mlp_layer": _mlp_key(mlp),
        "distilled": isinstance(model, VisionTransformerDistilled),
        "per_layer_config": per_layer,
    }
    return args


def _representative_block(model: TimmModule) -> TimmModule:
    """Return a block with the norms, LayerScale and order that all blocks share; preferably one with attention."""
    remaining = [block for block in model.blocks if not isinstance(block, DroppedBlock)]
    if remaining:
        return next((block for block in remaining if hasattr(block, "attn")), remaining[0])
    # All blocks were dropped, and none will be built. The norms around the blocks have the same type.
    norms = [norm for norm in (model.norm, model.fc_norm, model.norm_pre) if not isinstance(norm, nn.Identity)]
    with without_values():
        block = Block(int(model.embed_dim), num_heads=1)
    block.norm2 = norms[0] if norms else block.norm2
    block.mlp = getattr(model.attn_pool, "mlp", None) or block.mlp
    return block


def _attention_args(model: TimmModule) -> dict[str, Any]:
    """Return the constructor arguments of the attention; without any attention left, the missing ones are unused."""
    remaining = [block.attn for block in model.blocks if hasattr(block, "attn")]
    if not remaining:  # only attention pooling uses the number
        return {"num_heads": 1 if model.attn_pool is None else model.attn_pool.num_heads}
    attention = next((one for one in remaining if not isinstance(one, ConvolutionalAttention)), remaining[0])
    convolved = isinstance(attention, ConvolutionalAttention)  # then all are
    if type(attention) is not Attention and not convolved:
        raise UnsupportedModelError(
            f"blocks.*.attn is a {type(attention).__qualname__}; only timm's Attention, whose cost is known, is "
            f"supported. {ANOTHER_MODEL}"
        )
    return {
        "num_heads": int(model.embed_dim) // attention.head_dim,
        "qkv_bias": (attention.v if convolved else attention.qkv).bias is not None,
        "qk_norm": not convolved and not isinstance(attention.q_norm, nn.Identity),
        "scale_attn_norm": not isinstance(attention.norm, nn.Identity),
    }


def create_vision_transformer(model_args: Mapping[str, Any], pretrained_cfg: Mapping[str, Any]) -> nn.Module:
    """Create a randomly initialised `VisionTransformer` that can be saved with its preprocessing.

    Args:
        model_args: Arguments of timm's `VisionTransformer`.
        pretrained_cfg: `mean`, `std` and other preprocessing settings, as in timm's models.
    """
    model = VisionTransformer(**model_args)
    model.pretrained_cfg = dict(pretrained_cfg)
    return model


def num_heads(model: TimmModule, block: int) -> int:
    """Return the number of heads of a block's attention, 0 if it has none."""
    attn = getattr(model.blocks[block], "attn", None)
    return 0 if attn is None or isinstance(attn, ConvolutionalAttention) else int(attn.num_heads)


def head_layer(model: TimmModule, block: int) -> nn.Module:
    """Return the layer of a block that takes the concatenated outputs of its heads."""
    layer: nn.Module = model.blocks[block].attn.proj
    return layer


def keep_block_heads(model: TimmModule, block: int, kept: Sequence[int]) -> None:
    """Remove from a block's attention, in place, all heads but `kept`, at least one."""
    keep_heads(model.blocks[block].attn, torch.as_tensor(kept, dtype=torch.int64))


def convolution_of(model: TimmModule, block: int) -> ConvolutionalAttention:
    """Return a convolution, with zero mixing weights, that can replace a block's attention; the model stays unchanged.

    Raises:
        UnsupportedModelError: If a block of the model drops tokens, because the remaining ones form no grid.
    """
    for i, module in enumerate(model.blocks):
        if isinstance(module, FusingBlock):
            raise UnsupportedModelError(
                f"blocks.{i} drops tokens, and a convolution needs the whole grid of patches: use another method."
            )
    return ConvolutionalAttention(model.blocks[block].attn, model.patch_embed.grid_size, model.num_prefix_tokens)


def place_convolution(model: TimmModule, block: int, convolution: ConvolutionalAttention) -> None:
    """Replace a block's attention, in place, by a convolution, which is not copied."""
    model.blocks[block].attn = convolution


def fuse_tokens(model: TimmModule, block: int, keep_rate: float) -> None:
    """Make a block drop patch tokens after its attention, in place, and keep the share `keep_rate`; see `FusingBlock`.

    Raises:
        UnsupportedModelError: If the model has no class token, the block is not timm's `Block`, or a convolution runs
            over the grid of patches.
    """
    if model.cls_token is None:
        raise UnsupportedModelError(
            "The model has no class token, whose attention would select the tokens to keep: use another method."
        )
    if timm_type(model.blocks[block]) is not Block:
        raise UnsupportedModelError(
            f"blocks.{block} is a {type(model.blocks[block]).__qualname__}; only timm's Block can drop tokens: use "
            "another method."
        )
    for i, module in enumerate(model.blocks):
        if isinstance(getattr(module, "attn", None), ConvolutionalAttention):
            raise UnsupportedModelError(
                f"blocks.{i} has a convolution over the grid of patches, from which no tokens can be dropped: use "
                "another method."
            )
    model.blocks[block] = FusingBlock(model.blocks[block], keep_rate, model.num_prefix_tokens)


def shareable(model: TimmModule, first: int, second: int) -> bool:
    """Return whether two blocks can share weights: both are timm's `Block`, with parts of the same types and sizes."""
    blocks = [model.blocks[first], model.blocks[second]]
    if any(timm_type(block) is not Block or type(block.attn) is not Attention for block in blocks):
        return False
    shapes = [{name: tensor.shape for name, tensor in block.named_parameters()} for block in blocks]
    return shapes[0] == shapes[1] and type(blocks[0].mlp) is type(blocks[1].mlp)


def share_block_weights(model: TimmModule, attention_of: Mapping[int, int], mlp_of: Mapping[int, int]) -> None:
    """Let blocks use the weights of other blocks, in place; see `SharedBlock`.

    Args:
        model: The model. The blocks named below must be `shareable`.
        attention_of: The block whose attention each block uses; an owner's entry is its own number.
        mlp_of: The same for the MLP.
    """
    for block in sorted({*attention_of, *mlp_of}):
        share_weights(model, block, attention_of=attention_of.get(block), mlp_of=mlp_of.get(block))


def _layer_settings(block: TimmModule, widest: int, embed_dim: int) -> dict[str, Any] | None:
    """Return the settings of a changed block, with the keys of transformers' `per_layer_config`.

    Return `None` for a whole block with `widest` hidden units and an attention of width `embed_dim`.
    """
    settings = layer_settings(block, widest)
    if isinstance(block, (CompressedBlock, DroppedBlock)):
        return settings
    found: dict[str, Any] = {}
    if block.attn.num_heads * block.attn.head_dim < embed_dim:
        found["num_attention_heads"] = block.attn.num_heads
    if isinstance(block.attn, ConvolutionalAttention):
        found["token_mixer"] = "convolution"
    if isinstance(block, FusingBlock):
        found["token_keep_rate"] = block.keep_rate
    if isinstance(block, SharedBlock):
        owners = {"attention_of": block.attention_of, "mlp_of": block.mlp_of}
        found |= {name: owner for name, owner in owners.items() if owner is not None}
    if found:
        return {"skip": [], "intermediate_size": int(block.mlp.fc2.in_features), **found}
    return settings


def _mlp_key(mlp: TimmModule) -> str:
    if type(mlp) is Mlp:
        return "mlp"
    if type(mlp) is SwiGLU:
        return "swiglu"
    if type(mlp) is GluMlp and not mlp.gate_last:
        return "swiglu_packed"
    raise UnsupportedModelError(
        f"blocks.*.mlp is a {type(mlp).__qualname__}; supported are Mlp, SwiGLU and SwiGLUPacked. {ANOTHER_MODEL}"
    )


def _fc1_features(mlp: TimmModule) -> int:
    """Return the `hidden_features` argument of an MLP's constructor; a packed SwiGLU counts gate and value."""
    return int((mlp.fc1_x if type(mlp) is SwiGLU else mlp.fc1).out_features)


def _block_cost(block: TimmModule, tokens: int, tokens_after: int) -> BlockCost:
    if isinstance(block, DroppedBlock):
        return BlockCost(Cost(), Cost(), Cost(), 0)
    mlp_cost, unit = mlp_sublayer_cost(block, tokens_after)
    hidden, width = block.mlp.fc2.in_features, block.mlp.fc2.out_features
    if isinstance(block, CompressedBlock):
        return BlockCost(Cost(), mlp_cost, unit, hidden)
    attention = block.attn
    inner = attention.num_heads * attention.head_dim
    cost = linear_cost(inner, width, tokens, bias=False)
    if isinstance(attention, ConvolutionalAttention):
        patches = tokens - attention.num_prefix_tokens
        cost += linear_cost(width, inner, tokens, bias=False)
        cost += Cost(weight_macs=patches * attention.conv.weight.numel())
    else:
        cost += linear_cost(width, 3 * inner, tokens, bias=False) + Cost(attention_macs=2 * tokens * tokens * inner)
    params = sum(num_params(block.get_submodule(n)) for n in ("norm1", "attn", "ls1") if hasattr(block, n))
    cost = Cost(cost.weight_macs, cost.attention_macs, params)
    if isinstance(block, SharedBlock):
        attention_cost, local_cost = _transformation_costs(block, tokens)
        cost, mlp_cost = cost + attention_cost, mlp_cost + local_cost
    return BlockCost(cost, mlp_cost, unit, hidden)


def _transformation_costs(block: SharedBlock, tokens: int) -> tuple[Cost, Cost]:
    """Return the added cost of a block's weight transformations, less the shared weights that another block owns."""
    own = dict(block.named_children())
    attention_cost = local_cost = Cost()
    if block.attention_of is not None:
        params = 2 * block.mix_logits.numel()
        owned_elsewhere = 0 if "attn" in own else num_params(block.attn)
        attention_cost = Cost(weight_macs=params * tokens**2, params=params - owned_elsewhere)
    if block.mlp_of is not None:
        params, patches = block.local.numel(), tokens - block.num_prefix_tokens
        local_cost = Cost(weight_macs=params * patches, params=params - (0 if "mlp" in own else num_params(block.mlp)))
    return attention_cost, local_cost
