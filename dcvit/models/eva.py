"""timm's `Eva` and `Beit`: EVA, EVA-02, DINOv3, Perception Encoder, ViTs with rotary positions, BEiT.

Attention knows the position of tokens by a rotation of queries and keys (`rope`), or by a bias for each pair of
positions. timm's model computes these once and passes them to each block. An adapter's blocks take only a state, so
here each block holds its position arguments (`PositionedBlock`).

A model is rebuilt from the timm architecture and the arguments that timm recorded, and compared with the result part
by part. A part that would be lost is thus refused by name before any work.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.layers.attention import AttentionRope
from timm.models import get_model_args
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Beit
from timm.models.beit import Block as BeitBlock
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from dcvit.costs import BlockCost, Cost
from dcvit.errors import UnsupportedModelError
from dcvit.models.blocks import compressed, mlp_sublayer_cost
from dcvit.models.building import without_values
from dcvit.models.isotropic import IsotropicView, require_one_answer
from dcvit.models.modeling.eva import ARCHITECTURE, FILES, build
from dcvit.models.modeling.shared import CompressedBlock, DroppedBlock, TimmModule
from dcvit.models.rebuild import ANOTHER_MODEL, base_of, layer_settings, num_params, require_class, require_same

__all__ = ["EvaView", "PositionedBlock"]

PositionArguments = dict[str, Any]
"""The arguments that timm's model passes to a block besides its tokens."""


class PositionedBlock(nn.Module):
    """A block together with its position arguments.

    Args:
        block: The block, which is not copied.
        positions: The arguments that it takes besides tokens.
    """

    def __init__(self, block: nn.Module, positions: PositionArguments) -> None:
        super().__init__()
        self.block = block
        self._position_arguments = positions

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens `[B, N, D]` to `[B, N, D]`."""
        moved: Tensor = self.block(x, **self._position_arguments)
        return moved


class EvaView(IsotropicView):
    """timm's `Eva` and `Beit`.

    Modifications:
        - a compressed block (`CompressedBlock`) loses `norm1`, `attn` with its position biases, `gamma_1` and
          `drop_path1`, and the rows of `mlp.fc1` and columns of `mlp.fc2` of the removed hidden units (of a SwiGLU,
          both gate and value); its `gamma_2` is called `ls2.gamma`;
        - a pruned block loses only those rows and columns;
        - a dropped block becomes a `DroppedBlock`;
        - everything else, parameter names included, stays.
    """

    family = "eva"
    models = "EVA, EVA-02, DINOv3, Perception Encoder, RoPE-ViT, BEiT, BEiT v2"
    classes: tuple[type[nn.Module], ...] = (Eva, Beit)
    source = "arXiv 2211.07636, 2303.11331, 2508.10104, 2106.08254"
    architecture = ARCHITECTURE

    def check(self) -> None:
        require_class(self.model, self.classes)
        embed = self.model.patch_embed
        if type(self.model.patch_embed) is not PatchEmbed or self.model.patch_embed.img_size is None:
            raise UnsupportedModelError(
                f"patch_embed is a {type(embed).__qualname__} for images of {embed.img_size}; "
                "only timm's PatchEmbed for images of one size is supported. Where only the size is missing, call "
                "model.set_input_size(img_size=...)."
            )
        require_one_answer(self.model)
        for i, block in enumerate(self.model.blocks):
            if type(block) not in (EvaBlock, EvaBlockPostNorm, BeitBlock) and not isinstance(
                block, (CompressedBlock, DroppedBlock)
            ):
                raise UnsupportedModelError(
                    f"blocks.{i} is a {type(block).__qualname__}; supported are timm's EvaBlock, EvaBlockPostNorm and "
                    f"Beit's Block. {ANOTHER_MODEL}"
                )
            attention = getattr(block, "attn", None)
            if attention is not None and type(attention) not in (EvaAttention, AttentionRope, BeitAttention):
                raise UnsupportedModelError(
                    f"blocks.{i}.attn is a {type(attention).__qualname__}; only timm's EvaAttention, AttentionRope and "
                    f"Beit's Attention, whose cost is known, are supported. {ANOTHER_MODEL}"
                )
        self._model_args()

    def embed(self, images: Tensor) -> Tensor:
        patches = self.model.patch_embed(images)
        if isinstance(self.model, Eva):
            return self.model.norm_pre(self.model._pos_embed(patches)[0])
        tokens = torch.cat([self.model.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        return self.model.pos_drop(tokens if self.model.pos_embed is None else tokens + self.model.pos_embed)

    def run_blocks(self, state: Tensor, first: int, stop: int) -> Tensor:
        positions = _position_arguments(self.model)
        for block in range(first, stop):
            state = self.model.blocks[block](state, **positions[block])
        return state

    def block(self, block: int) -> nn.Module:
        with torch.no_grad():
            return PositionedBlock(self.model.blocks[block], _position_arguments(self.model)[block])

    def sublayers(self, block: int) -> tuple[Callable[[Tensor], Tensor], nn.Module] | None:
        module = self.model.blocks[block]
        if type(module) not in (EvaBlock, BeitBlock):  # in other blocks the norms follow attention and MLP
            return None
        with torch.no_grad():
            return partial(_attention_sublayer, module, _position_arguments(self.model)[block]), compressed(module)

    def _block_costs(self) -> tuple[list[BlockCost], int]:
        tokens = self.model.patch_embed.num_patches + self.model.num_prefix_tokens
        return [_block_cost(block, tokens) for block in self.model.blocks], tokens

    def _stem_parameters(self) -> list[nn.Parameter]:
        shared = (getattr(self.model, name, None) for name in ("rope", "rel_pos_bias"))
        shared_parameters = [parameter for module in shared if module is not None for parameter in module.parameters()]
        return super()._stem_parameters() + shared_parameters

    def _model_args(self) -> dict[str, Any]:
        """Return the arguments of `modeling.eva.build` that describe the model, as JSON values.

        Raises:
            UnsupportedModelError: If they do not reproduce the model; the message names the first part that differs.
        """
        args: dict[str, Any] = {
            **_base(self.model),
            "img_size": list(self.model.patch_embed.img_size),
            "num_classes": self.num_classes(),
            "in_chans": self.model.patch_embed.proj.in_channels,
            "global_pool": self.model.global_pool,
        }
        with without_values():
            whole: TimmModule = build(**args, per_layer_config={})
            args["per_layer_config"] = {
                str(i): settings
                for i, (block, original) in enumerate(zip(self.model.blocks, whole.blocks, strict=False))
                if (settings := layer_settings(block, original.mlp.fc2.in_features)) is not None
            }
            twin = build(**args)
        require_same(self.model, twin, f"{args['base']} of timm")
        return args


def _base(model: TimmModule) -> dict[str, Any]:
    """Return the timm architecture that the model is built from, and its arguments that are not read off the model.

    Raises:
        UnsupportedModelError: If the model does not record them, or an argument is not a JSON value.
    """
    recorded = get_model_args(model)
    if hasattr(model, "dcvit_base"):
        # timm records these two when the pooling or the patches of an existing model are changed.
        changed = {name: recorded[name] for name in ("use_fc_norm", "patch_size") if name in recorded}
        return {"base": model.dcvit_base["base"], "base_args": model.dcvit_base["base_args"] | changed}
    base = getattr(model, "pretrained_cfg", {}).get("architecture")
    if base is None or not timm.is_model(base) or not hasattr(model, "_model_args"):
        raise UnsupportedModelError(
            "The model does not record the timm architecture and the arguments from which it could be rebuilt: "
            "create it with timm.create_model, which records both, and load yours.state_dict() into it."
        )
    read = ("img_size", "num_classes", "in_chans", "global_pool")
    args = {name: value for name, value in recorded.items() if name not in read}
    for name, value in args.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise UnsupportedModelError(
                f"{name}={value!r}: the model was created with an argument that config.json cannot hold. Leave it out."
            ) from error
    return base_of(base, args, FILES)


def _position_arguments(model: TimmModule) -> list[PositionArguments]:
    """Return the position arguments of each block, for images of the model's own size."""
    if isinstance(model, Beit):
        bias = None if model.rel_pos_bias is None else model.rel_pos_bias()
        return [{"shared_rel_pos_bias": bias}] * len(model.blocks)
    if model.rope is None:
        return [{}] * len(model.blocks)
    # As in timm's `_pos_embed`: the rotation of a fixed size is cached.
    fixed = not model.dynamic_img_size and hasattr(model.rope, "feat_shape")
    rope = model.rope.get_embed(**({} if fixed else {"shape": model.patch_embed.grid_size}))
    return [{"rope": rope[block] if model.rope_mixed else rope} for block in range(len(model.blocks))]


def _attention_sublayer(block: TimmModule, positions: PositionArguments, x: Tensor) -> Tensor:
    """Run the attention sublayer of a block, x + gamma_1 ⊙ attn(norm1(x))."""
    mixed: Tensor = block.attn(block.norm1(x), **positions)
    return x + block.drop_path1(mixed if block.gamma_1 is None else block.gamma_1 * mixed)


def _block_cost(block: TimmModule, tokens: int) -> BlockCost:
    if isinstance(block, DroppedBlock):
        return BlockCost(Cost(), Cost(), Cost(), 0)
    mlp, unit = mlp_sublayer_cost(block, tokens)
    hidden = block.mlp.fc2.in_features
    if isinstance(block, CompressedBlock):
        return BlockCost(Cost(), mlp, unit, hidden)
    layers = [layer for layer in block.attn.modules() if isinstance(layer, nn.Linear)]
    macs = tokens * sum(layer.weight.numel() for layer in layers)
    params = num_params(block.norm1) + num_params(block.attn)
    if getattr(block, "gamma_1", None) is not None:
        params += block.gamma_1.numel()
    return BlockCost(Cost(macs, 2 * tokens * tokens * block.attn.proj.in_features, params), mlp, unit, hidden)
