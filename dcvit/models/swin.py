"""timm's `SwinTransformer` and `SwinTransformerV2`.

Blocks are numbered through all stages. They form pairs: the first uses windows, the second windows shifted by half, so
that tokens on both sides of a window's border attend to each other. The attention of a pair is removed as a whole
(DC-ViT, arXiv 2403.18708). As in `dcvit.models.vision_transformer`, a model is rebuilt from the sizes of its modules.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.layers import Mlp, PatchEmbed
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from torch import Tensor, nn

from dcvit.costs import BlockCost, Cost, ModelCost, linear_cost
from dcvit.errors import UnsupportedModelError
from dcvit.models.base import ModelView, OutputLayer
from dcvit.models.blocks import compressed, mlp_sublayer_cost
from dcvit.models.building import without_values
from dcvit.models.modeling.shared import ACTIVATIONS, CompressedBlock, DroppedBlock, TimmModule, keep_hidden_units
from dcvit.models.modeling.swin import ARCHITECTURE, build, swin_places
from dcvit.models.rebuild import (
    ANOTHER_MODEL,
    layer_settings,
    named_key,
    norm_spec,
    num_classes,
    num_params,
    rebuilt,
    require_class,
    require_same,
    saved_config,
    timm_type,
)

__all__ = ["SwinView"]

_WHOLE = (SwinTransformerBlock, SwinTransformerV2Block)


class SwinView(ModelView):
    """timm's `SwinTransformer` and `SwinTransformerV2`. A state is `[B, H, W, D]`.

    Modifications:
        - a compressed block (`CompressedBlock`) loses its attention with `norm1`, so it has no windows, no shift and no
          padding, and the rows of `mlp.fc1` and columns of `mlp.fc2` of the removed hidden units;
        - a dropped block becomes a `DroppedBlock`;
        - a pruned block loses only those rows and columns;
        - everything else, patch merging and parameter names included, stays.
    """

    family = "swin"
    models = "Swin, Swin v2, S3"
    classes: tuple[type[nn.Module], ...] = (SwinTransformer, SwinTransformerV2)
    source = "arXiv 2103.14030, 2111.09883"
    removed = "attention"
    keeps_ends = True
    pointwise_units = True
    mac_weight = 1.0

    @property
    def tv_exponent(self) -> float:
        """The exponent β as published for Swin."""
        return 1.0

    def check(self) -> None:
        require_class(self.model, self.classes)
        depths = [len(stage.blocks) for stage in self.model.layers]
        if 0 in depths:
            raise UnsupportedModelError(
                f"Stage {depths.index(0)} of the model has no blocks (depths={depths}): expected at least one block in "
                f"each stage. {ANOTHER_MODEL}"
            )
        if not self.model.head.global_pool.pool_type and self.num_classes():
            raise UnsupportedModelError(
                "The model classifies each position (global_pool=''): call model.reset_classifier(0) for a backbone, "
                "or give it a pooling, model.reset_classifier(num_classes, 'avg')."
            )
        self._model_args()

    def input_size(self) -> tuple[int, int, int]:
        height, width = self.model.patch_embed.img_size
        return self.model.patch_embed.proj.in_channels, height, width

    def dynamic_input(self) -> bool:
        return not self.model.patch_embed.strict_img_size

    def tokens(self, images: Tensor) -> Tensor:
        return self.as_tokens(self.model.forward_features(images))

    def embed(self, images: Tensor) -> Tensor:
        return self.model.patch_embed(images)

    def prepare(self, state: Tensor, block: int) -> Tensor:
        """Merge patches before the first block of a stage."""
        blocks, index = swin_places(self.model)[block]
        stage = next(stage for stage in self.model.layers if stage.blocks is blocks)
        return state if index or isinstance(stage.downsample, nn.Identity) else stage.downsample(state)

    def run_blocks(self, state: Tensor, first: int, stop: int) -> Tensor:
        for block in range(first, stop):
            state = self.block(block)(self.prepare(state, block))
        return state

    def as_tokens(self, state: Tensor) -> Tensor:
        return state.flatten(1, 2)

    def from_tokens(self, tokens: Tensor) -> Tensor:
        return tokens.unsqueeze(2)

    def num_blocks(self) -> int:
        return sum(len(stage.blocks) for stage in self.model.layers)

    def groups(self) -> Sequence[tuple[int, ...]]:
        """Return the pairs of each stage; a last block without a partner forms its own group."""
        groups: list[tuple[int, ...]] = []
        first = 0
        for stage in self.model.layers:
            stop = first + len(stage.blocks)
            groups += [tuple(range(block, min(block + 2, stop))) for block in range(first, stop, 2)]
            first = stop
        return groups

    def final_norm(self, state: Tensor) -> Tensor:
        return self.as_tokens(self.model.norm(state))

    def logits(self, tokens: Tensor) -> Tensor:
        # The pooling does not depend on the order of the tokens.
        return self.model.forward_head(self.from_tokens(tokens))

    def has_class_token(self) -> bool:
        return False

    def features(self, tokens: Tensor) -> Tensor:
        # Without pooling the features are the mean over the tokens.
        features = self.model.forward_head(self.from_tokens(tokens), pre_logits=True)
        return features if features.ndim == 2 else features.mean(dim=(1, 2))

    def hidden_features(self, block: int) -> int:
        module: TimmModule = self.block(block)
        return 0 if isinstance(module, DroppedBlock) else int(module.mlp.fc2.in_features)

    def cost(self) -> ModelCost:
        # Windows are counted with their padding.
        grid = self.model.patch_embed.grid_size
        conv = self.model.patch_embed.proj
        outside = Cost(weight_macs=grid[0] * grid[1] * conv.weight.numel())
        blocks = []
        for stage in self.model.layers:
            if not isinstance(stage.downsample, nn.Identity):
                grid = tuple(-(-side // 2) for side in grid)
                outside += Cost(weight_macs=grid[0] * grid[1] * stage.downsample.reduction.weight.numel())
            blocks += [_block_cost(block, grid) for block in stage.blocks]
        if isinstance(self.model.head.fc, nn.Linear):
            outside += Cost(weight_macs=self.model.head.fc.weight.numel())
        parts = [part for block in blocks for part in (block.attention, block.mlp)]
        macs = Cost(
            outside.weight_macs + sum(part.weight_macs for part in parts), sum(part.attention_macs for part in parts)
        )
        return ModelCost(total=macs + Cost(params=num_params(self.model)), blocks=tuple(blocks))

    def compress_block(self, block: int, kept: Sequence[int]) -> None:
        blocks, index = swin_places(self.model)[block]
        module = blocks[index]
        keep_hidden_units(module.mlp, torch.as_tensor(kept, dtype=torch.int64))
        blocks[index] = module if isinstance(module, CompressedBlock) else compressed(module)

    def prune_block(self, block: int, kept: Sequence[int]) -> None:
        blocks, index = swin_places(self.model)[block]
        keep_hidden_units(blocks[index].mlp, torch.as_tensor(kept, dtype=torch.int64))

    def prune_obstacle(self, block: int) -> str | None:
        return None if self.hidden_features(block) else "has no hidden units"

    def hidden_filters(self, block: int) -> Tensor:
        module: TimmModule = self.block(block)
        return module.mlp.fc1.weight

    def hidden_layer(self, block: int) -> nn.Linear:
        module: TimmModule = self.block(block)
        return module.mlp.fc2

    def drop_block(self, block: int) -> None:
        blocks, index = swin_places(self.model)[block]
        blocks[index] = DroppedBlock()

    def block(self, block: int) -> nn.Module:
        blocks, index = swin_places(self.model)[block]
        module: nn.Module = blocks[index]
        return module

    def sublayers(self, block: int) -> tuple[Callable[[Tensor], Tensor], nn.Module] | None:
        module: TimmModule = self.block(block)
        if not isinstance(module, SwinTransformerBlock):
            return None
        return lambda state: state + module.drop_path1(module._attn(module.norm1(state))), compressed(module)

    def output_layer(self, block: int) -> OutputLayer | None:
        """Return the last layer of a block's MLP; `None` in version 2, where a norm follows it."""
        module: TimmModule = self.block(block)
        if isinstance(module, (SwinTransformerV2Block, DroppedBlock)) or getattr(module, "post_norm", False):
            return None
        return OutputLayer(module.mlp.fc2)

    def absorbing_layers(self, block: int) -> tuple[None, None]:
        return None, None

    def parameters(self, first_block: int, last_block: int) -> list[nn.Parameter]:
        # Patch merging belongs to the block after it.
        found = list(self.model.patch_embed.parameters()) if first_block == 0 else []
        number = 0
        for stage in self.model.layers:
            for index, block in enumerate(stage.blocks):
                if first_block <= number <= last_block:
                    found += [*(stage.downsample.parameters() if index == 0 else ()), *block.parameters()]
                number += 1
        return found

    def body_parameters(self) -> list[nn.Parameter]:
        return [*self.model.patch_embed.parameters(), *self.model.layers.parameters(), *self.model.norm.parameters()]

    def rebuild(self) -> nn.Module:
        return rebuilt(self.model, ARCHITECTURE, self.config())

    def config(self) -> Mapping[str, Any]:
        return saved_config(
            self.model, ARCHITECTURE, self._model_args(), input_size=self.input_size(),
            first_conv="patch_embed.proj",
            classifier="head.fc", fixed_input_size=not self.dynamic_input(),
        )  # fmt: skip

    def _model_args(self) -> dict[str, Any]:
        """Return the constructor arguments of the model, read off its modules, as JSON values.

        Raises:
            UnsupportedModelError: If they do not reproduce the model; the message names the first part that differs.
        """
        args = _read_model_args(self.model)
        with without_values():
            twin = build(**args)
        require_same(self.model, twin, "Swin")
        return args


def _read_model_args(model: TimmModule) -> dict[str, Any]:
    """Return every constructor argument that shapes the model, and `per_layer_config`."""
    embed = model.patch_embed
    if type(embed) is not PatchEmbed:
        raise UnsupportedModelError(
            f"patch_embed is a {type(embed).__qualname__}; only timm's PatchEmbed is supported. {ANOTHER_MODEL}"
        )
    blocks = [blocks[index] for blocks, index in swin_places(model)]
    for i, block in enumerate(blocks):
        if timm_type(block) not in (*_WHOLE, CompressedBlock, DroppedBlock):
            raise UnsupportedModelError(
                f"Block {i} is a {type(block).__qualname__}; supported are timm's SwinTransformerBlock and "
                f"SwinTransformerV2Block. {ANOTHER_MODEL}"
            )
        if not isinstance(block, DroppedBlock) and type(block.mlp) is not Mlp:
            raise UnsupportedModelError(
                f"Block {i}: mlp is a {type(block.mlp).__qualname__}; only Mlp is supported. {ANOTHER_MODEL}"
            )
    dims = [_width(stage) for stage in model.layers]
    first = isinstance(model, SwinTransformer)
    ratios = [_ratio(stage, dim if first else max(dims)) for stage, dim in zip(model.layers, dims, strict=True)]
    if not first:  # version 2 has one ratio for all stages
        ratios = [max(ratios)] * len(ratios)
    made = [int(dim * r) for stage, dim, r in zip(model.layers, dims, ratios, strict=True) for _ in stage.blocks]
    args: dict[str, Any] = {
        "version": 1 if first else 2,
        "img_size": list(embed.img_size),
        "patch_size": list(embed.patch_size),
        "in_chans": embed.proj.in_channels,
        "num_classes": num_classes(model),
        "global_pool": model.head.global_pool.pool_type,
        "embed_dim": dims[0],
        "depths": [len(stage.blocks) for stage in model.layers],
        "mlp_ratio": ratios if first else ratios[0],
        "strict_img_size": bool(embed.strict_img_size),
        "norm_layer": norm_spec("norm", model.norm),
        "per_layer_config": {
            str(i): settings
            for i, (block, widest) in enumerate(zip(blocks, made, strict=True))
            if (settings := layer_settings(block, widest)) is not None
        },
        **_attention_args(model, blocks, dims),
    }
    mlp = next((block.mlp for block in blocks if not isinstance(block, DroppedBlock)), None)
    if not first and mlp is not None:
        args["act_layer"] = named_key(ACTIVATIONS, "mlp.act", type(mlp.act))
    return args


def _attention_args(model: TimmModule, blocks: Sequence[TimmModule], dims: Sequence[int]) -> dict[str, Any]:
    """Return the constructor arguments of the attention; without any attention left, they are placeholders."""
    whole = next((block for block in blocks if isinstance(block, _WHOLE)), None)
    if whole is None:
        return {"num_heads": [1] * len(dims), "window_size": [[7, 7]] * len(dims)}  # timm's default windows
    # A stage without attention gets another stage's sizes, which are then unused.
    of_stage = [next((block for block in stage.blocks if isinstance(block, _WHOLE)), whole) for stage in model.layers]
    heads = [block.attn.num_heads if block.dim == dim else 1 for block, dim in zip(of_stage, dims, strict=True)]
    args: dict[str, Any] = {
        "num_heads": heads,
        "window_size": [list(block.window_size) for block in of_stage],
        "always_partition": bool(whole.always_partition),
    }
    if isinstance(model, SwinTransformer):
        widths = [block.attn.qkv.out_features // 3 for block in of_stage]
        args["qkv_bias"] = whole.attn.qkv.bias is not None
        args["head_dim"] = [
            width // block.attn.num_heads if block.dim == dim else None
            for width, block, dim in zip(widths, of_stage, dims, strict=True)
        ]
    else:
        args["qkv_bias"] = whole.attn.q_bias is not None
        args["pretrained_window_sizes"] = [list(block.attn.pretrained_window_size) for block in of_stage]
    return args


def _width(stage: TimmModule) -> int:
    """Return the number of channels of a stage."""
    if not isinstance(stage.downsample, nn.Identity):
        return int(stage.downsample.reduction.out_features)
    return int(stage.dim)


def _ratio(stage: TimmModule, largest: int) -> float:
    """Return the `mlp_ratio` of a stage's widest block.

    Half a hidden unit (0.5 / `largest`) is added, so that timm's int(dim * ratio) does not lose a unit to rounding.
    """
    widths = [block.mlp.fc1.out_features for block in stage.blocks if not isinstance(block, DroppedBlock)]
    return max(widths, default=0) / _width(stage) + 0.5 / largest


def _block_cost(block: TimmModule, grid: tuple[int, int]) -> BlockCost:
    if isinstance(block, DroppedBlock):
        return BlockCost(Cost(), Cost(), Cost(), 0)
    mlp, unit = mlp_sublayer_cost(block, grid[0] * grid[1])
    hidden, width = block.mlp.fc2.in_features, block.mlp.fc2.out_features
    if isinstance(block, CompressedBlock):
        return BlockCost(Cost(), mlp, unit, hidden)
    attn, area = block.attn, block.window_size[0] * block.window_size[1]
    windows = 1
    for side, window in zip(grid, block.window_size, strict=True):
        windows *= -(-side // window)
    inner = attn.qkv.out_features // 3
    products = linear_cost(width, 3 * inner, windows * area, bias=False)
    products += linear_cost(inner, width, windows * area, bias=False)
    macs = products.weight_macs
    if isinstance(block, SwinTransformerV2Block):  # position bias, computed once per pass for all images
        offsets = (2 * block.window_size[0] - 1) * (2 * block.window_size[1] - 1)
        macs += sum(offsets * layer.weight.numel() for layer in attn.cpb_mlp if isinstance(layer, nn.Linear))
    params = num_params(block.norm1) + num_params(attn)
    return BlockCost(Cost(macs, 2 * windows * area * area * inner, params), mlp, unit, hidden)
