"""timm's `VisionTransformer`: ViT, DeiT, DINOv2, CLIP, SigLIP and the like.

A model is rebuilt from what its modules show, not from its name: `_model_args` reads every constructor argument off
the model, builds a twin on the meta device and compares the two module by module, so that a part which would be lost
is refused by name before any work.
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

MADE_OF_BLOCKS = (FusingBlock, SharedBlock)
"""What timm's `Block` may have become, other than by a cut."""


class VisionTransformerView(IsotropicView):
    """timm's `VisionTransformer` and `VisionTransformerDistilled`.

    Modifications:
        - a compressed block (`CompressedBlock`) loses `norm1`, `attn`, `ls1` and `drop_path1`, and the rows of
          `mlp.fc1` and columns of `mlp.fc2` of the hidden units that are dropped; of a SwiGLU both gate and value;
        - a pruned block loses those rows and columns alone;
        - a dropped block becomes a `DroppedBlock`;
        - a block may lose heads, have a `ConvolutionalAttention` for its attention, and become a `FusingBlock` behind
          whose attention tokens end;
        - consecutive blocks may become `SharedBlock`s, of which one has the attention, the MLP or both of all;
        - everything else, parameter names included, stays.
    """

    family = "vit"
    models = "ViT, DeiT, DeiT-III, DINOv2, CLIP, SigLIP, AIMv2, BEiT-3"
    classes: tuple[type[nn.Module], ...] = (VisionTransformer, VisionTransformerDistilled)
    source = "arXiv 2010.11929, 2012.12877"
    architecture = ARCHITECTURE

    @property
    def tv_exponent(self) -> float:
        """As published for ViT, or else for DeiT, which a distillation token tells, or timm's name of the model."""
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
                f"The blocks {', '.join(map(str, shared))} share weights, and a cut of one would cut the others: "
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
        """The constructor arguments of a model, read off its modules, as values for JSON.

        Raises:
            UnsupportedModelError: Naming the first part that the arguments would not reproduce.
        """
        args = _read_model_args(self.model)
        with torch.device("meta"):
            twin = build(**args)
        require_same(self.model, twin, "VisionTransformer")
        return args


def _read_model_args(model: TimmModule) -> dict[str, Any]:
    """Every constructor argument of `VisionTransformer` that shapes the model, and `per_layer_config`."""
    embed = model.patch_embed
    if type(embed) is not PatchEmbed:
        raise UnsupportedModelError(
            f"patch_embed is a {type(embed).__qualname__}; only timm's PatchEmbed (one strided convolution) is "
            f"supported. {ANOTHER_MODEL}"
        )
    if embed.img_size is None:
        raise UnsupportedModelError("patch_embed.img_size is None: call model.set_input_size(img_size=...) first.")
    for i, block in enumerate(model.blocks):
        if not isinstance(block, (*BLOCKS.values(), CompressedBlock, DroppedBlock, *MADE_OF_BLOCKS)):
            raise UnsupportedModelError(
                f"blocks.{i} is a {type(block).__qualname__}; supported are timm's Block and ResPostBlock, whose MLP "
                f"follows the attention. {ANOTHER_MODEL}"
            )
    embed_dim = int(model.embed_dim)
    head_norm = model.norm if not isinstance(model.norm, nn.Identity) else model.fc_norm
    block = _telling_block(model)
    # Blocks are cut from the widest: what `build` makes loses units and gains none.
    mlps = [b.mlp for b in model.blocks if not isinstance(b, DroppedBlock)] or [block.mlp]
    mlp = max(mlps, key=lambda mlp: mlp.fc2.in_features)
    intermediate_size = max(_fc1_features(mlp), 2)  # of an MLP without units timm would initialise nothing, and warn
    if model.attn_pool is not None and model.attn_pool.mlp is not None:  # which is as wide as the uncut blocks
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
        "proj_bias": mlp.fc2.bias is not None,  # as of attention's last layer
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


def _telling_block(model: TimmModule) -> TimmModule:
    """A block that tells what all have in common: norms, LayerScale, their order. One with attention, if any has it."""
    left = [block for block in model.blocks if not isinstance(block, DroppedBlock)]
    if left:
        return next((block for block in left if hasattr(block, "attn")), left[0])
    # No block is left to tell, and none is built; the norms around the blocks are of the same type.
    norms = [norm for norm in (model.norm, model.fc_norm, model.norm_pre) if not isinstance(norm, nn.Identity)]
    with torch.device("meta"):
        block = Block(int(model.embed_dim), num_heads=1)
    block.norm2 = norms[0] if norms else block.norm2
    block.mlp = getattr(model.attn_pool, "mlp", None) or block.mlp
    return block


def _attention_args(model: TimmModule) -> dict[str, Any]:
    """What attention tells of the constructor's arguments; where none is left, nothing is made of those that are
    missing.
    """
    left = [block.attn for block in model.blocks if hasattr(block, "attn")]
    if not left:  # only a pooling of so many heads
        return {"num_heads": 1 if model.attn_pool is None else model.attn_pool.num_heads}
    attention = next((one for one in left if not isinstance(one, ConvolutionalAttention)), left[0])
    convolved = isinstance(attention, ConvolutionalAttention)  # as all are, then
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
    """A plain, randomly initialised `VisionTransformer` that can be saved with its preprocessing.

    Args:
        model_args: Arguments of timm's `VisionTransformer`.
        pretrained_cfg: `mean`, `std` and the like, as timm's models have them.
    """
    model = VisionTransformer(**model_args)
    model.pretrained_cfg = dict(pretrained_cfg)
    return model


def num_heads(model: TimmModule, block: int) -> int:
    """Heads of a block's attention; 0 where it has none."""
    attn = getattr(model.blocks[block], "attn", None)
    return 0 if attn is None or isinstance(attn, ConvolutionalAttention) else int(attn.num_heads)


def head_layer(model: TimmModule, block: int) -> nn.Module:
    """The layer of a block that takes what its heads give, one head after the other."""
    layer: nn.Module = model.blocks[block].attn.proj
    return layer


def keep_block_heads(model: TimmModule, block: int, kept: Sequence[int]) -> None:
    """In place: only some heads of a block's attention stay, at least one."""
    keep_heads(model.blocks[block].attn, torch.as_tensor(kept, dtype=torch.int64))


def convolution_of(model: TimmModule, block: int) -> ConvolutionalAttention:
    """A convolution that may take the place of a block's attention, its mixing weights zero; the model stays.

    Raises:
        UnsupportedModelError: If tokens end in a block of the model: what goes on is no grid.
    """
    for i, module in enumerate(model.blocks):
        if isinstance(module, FusingBlock):
            raise UnsupportedModelError(
                f"Tokens end in blocks.{i}; those that go on are no grid, over which a convolution could run: use "
                "another method."
            )
    return ConvolutionalAttention(model.blocks[block].attn, model.patch_embed.grid_size, model.num_prefix_tokens)


def place_convolution(model: TimmModule, block: int, convolution: ConvolutionalAttention) -> None:
    """In place: a convolution, not copied, takes the place of a block's attention."""
    model.blocks[block].attn = convolution


def fuse_tokens(model: TimmModule, block: int, keep_rate: float) -> None:
    """In place: behind a block's attention only the share `keep_rate` of the patch tokens goes on, see `FusingBlock`.

    Raises:
        UnsupportedModelError: If the model has no class token, its block is no plain one, or convolutions run over
            the grid of patches.
    """
    if model.cls_token is None:
        raise UnsupportedModelError(
            "The model has no class token, whose attention says which tokens go on: use another method."
        )
    if timm_type(model.blocks[block]) is not Block:
        raise UnsupportedModelError(
            f"blocks.{block} is a {type(model.blocks[block]).__qualname__}; tokens can end only in timm's Block: use "
            "another method."
        )
    for i, module in enumerate(model.blocks):
        if isinstance(getattr(module, "attn", None), ConvolutionalAttention):
            raise UnsupportedModelError(
                f"blocks.{i} has a convolution over the grid of patches for its attention; tokens cannot end in such a "
                "model: use another method."
            )
    model.blocks[block] = FusingBlock(model.blocks[block], keep_rate, model.num_prefix_tokens)


def shareable(model: TimmModule, first: int, second: int) -> bool:
    """Whether two blocks could have the same weights: both timm's `Block`, their parts of the same kinds and sizes."""
    blocks = [model.blocks[first], model.blocks[second]]
    if any(timm_type(block) is not Block or type(block.attn) is not Attention for block in blocks):
        return False
    shapes = [{name: tensor.shape for name, tensor in block.named_parameters()} for block in blocks]
    return shapes[0] == shapes[1] and type(blocks[0].mlp) is type(blocks[1].mlp)


def share_block_weights(model: TimmModule, attention_of: Mapping[int, int], mlp_of: Mapping[int, int]) -> None:
    """In place: blocks get the weights of other blocks, see `SharedBlock`.

    Args:
        model: Its blocks concerned are `shareable`.
        attention_of: By the number of a block, that of the block whose attention it has; owners name themselves.
        mlp_of: Likewise of the MLP.
    """
    for block in sorted({*attention_of, *mlp_of}):
        share_weights(model, block, attention_of=attention_of.get(block), mlp_of=mlp_of.get(block))


def _layer_settings(block: TimmModule, widest: int, embed_dim: int) -> dict[str, Any] | None:
    """What differs in a block from a whole one of so many hidden units and so wide an attention, in the key names of
    transformers' `per_layer_config`.
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
    """The `hidden_features` argument of an MLP's constructor; a packed SwiGLU counts gate and value."""
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
        mixing, looking = _transformation_costs(block, tokens)
        cost, mlp_cost = cost + mixing, mlp_cost + looking
    return BlockCost(cost, mlp_cost, unit, hidden)


def _transformation_costs(block: SharedBlock, tokens: int) -> tuple[Cost, Cost]:
    """What a block's transformations of its attention and its MLP add, less the weights that another block has."""
    own = dict(block.named_children())
    mixing = looking = Cost()
    if block.attention_of is not None:
        params = 2 * block.mix_logits.numel()
        mixing = Cost(weight_macs=params * tokens**2, params=params - (0 if "attn" in own else num_params(block.attn)))
    if block.mlp_of is not None:
        params, patches = block.local.numel(), tokens - block.num_prefix_tokens
        looking = Cost(weight_macs=params * patches, params=params - (0 if "mlp" in own else num_params(block.mlp)))
    return mixing, looking
