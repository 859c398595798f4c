"""timm's `VisionTransformer`: ViT, DeiT, DINOv2, CLIP, SigLIP and the like.

A model is rebuilt from what its modules show, not from its name: `_model_args` reads every constructor argument off
the model, builds a twin on the meta device and compares the two module by module, so that a part which would be lost
is refused by name before any work.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import (
    AttentionPoolLatent,
    DropPath,
    GluMlp,
    LayerNorm,
    LayerNormFp32,
    LayerScale,
    Mlp,
    PatchDropout,
    PatchEmbed,
    SwiGLU,
)
from timm.layers.activations import GELU
from timm.layers.attention import Attention
from timm.models import register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from dcvit.costs import BlockCost, Cost, ModelCost, linear_cost
from dcvit.errors import UnsupportedModelError
from dcvit.models import modeling_dcvit
from dcvit.models.modeling_dcvit import (
    ACTIVATIONS,
    ARCHITECTURE,
    BLOCKS,
    NORMS,
    DroppedBlock,
    TimmModule,
    build,
    keep_hidden_nodes,
)
from dcvit.ops import Impl, attention, dropped_mlp
from dcvit.seeding import seeded

__all__ = ["ARCHITECTURE", "CompressedBlock", "DroppedBlock", "VisionTransformerAdapter", "create_vision_transformer"]

_STATELESS = (nn.Identity, nn.Dropout, DropPath, PatchDropout)
"""Modules that do nothing at inference; drop rates are training choices, which timm's exports leave out too."""


_INSIDE_ATTENTION = ("q_norm", "k_norm", "attn_drop", "norm", "proj_drop")
"""Parts of timm's `Attention` that `dcvit.ops.attention` leaves out, because they do nothing."""


class MlpHalf(modeling_dcvit.MlpHalf):
    """The second half of a transformer block, x + ls2(mlp(norm2(x))), under the parameter names of timm's `Block`.

    Where the MLP is the plain one, it is one call of `dcvit.ops.dropped_mlp`, with the norm, LayerScale and residual
    fused; else the modules run one by one.

    Args:
        block: A timm `Block` or `ResPostBlock`; its MLP branch is taken over, not copied.
    """

    def __init__(self, block: TimmModule) -> None:
        super().__init__(block)
        self.impl: Impl = "auto"

    def mlp_half(self, x: Tensor) -> Tensor:
        """Tokens `[B, N, D]` to `[B, N, D]`."""
        # Not by attribute, which nn.Module resolves in Python: that took as long as the op saves on small models.
        parts: dict[str, TimmModule] = self._modules
        norm, mlp, scale = parts["norm2"], parts["mlp"], parts["ls2"]
        # Autocast chooses a precision for each module; it does not see into the op, which would stay in float32.
        if self._fusible(norm, mlp, scale) and not torch.is_autocast_enabled(x.device.type):
            layers, norm_weights = mlp._modules, norm._parameters
            fc1, fc2 = layers["fc1"]._parameters, layers["fc2"]._parameters
            return dropped_mlp(
                x,
                fc1["weight"],
                fc1["bias"],
                fc2["weight"],
                fc2["bias"],
                norm_weight=norm_weights["weight"],
                norm_bias=norm_weights["bias"],
                norm_eps=norm.eps,
                scale=scale._parameters["gamma"] if type(scale) is LayerScale else None,
                residual=True,
                impl=self.impl,
            )
        return super().mlp_half(x)

    def _fusible(self, norm: TimmModule, mlp: TimmModule, scale: TimmModule) -> bool:
        """Whether the fused op computes what the modules would: plain types, no hooks, nothing random active."""
        if self.post_norm or type(mlp) is not Mlp:
            return False
        layers = mlp._modules
        fc1, act, fc2 = layers["fc1"], layers["act"], layers["fc2"]
        return (
            type(norm) in (LayerNorm, LayerNormFp32, nn.LayerNorm)
            and norm._parameters.get("weight") is not None
            and type(fc1) is nn.Linear
            and type(act) in (nn.GELU, GELU)
            and getattr(act, "approximate", "none") == "none"
            and type(layers["norm"]) is nn.Identity
            and type(fc2) is nn.Linear
            and type(scale) in (LayerScale, nn.Identity)
            and not (norm._forward_hooks or mlp._forward_hooks or scale._forward_hooks)
            and not (fc1._forward_hooks or act._forward_hooks or fc2._forward_hooks)
            and not (norm._forward_pre_hooks or mlp._forward_pre_hooks or scale._forward_pre_hooks)
            and not (fc1._forward_pre_hooks or act._forward_pre_hooks or fc2._forward_pre_hooks)
            and not (self.training and (mlp.drop1.p > 0 or mlp.drop2.p > 0 or isinstance(self.drop_path2, DropPath)))
        )


class CompressedBlock(MlpHalf):
    """A transformer block without attention and with fewer hidden nodes."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens `[B, N, D]` to `[B, N, D]`; the attention arguments of timm's blocks have nothing to act on."""
        return self.mlp_half(x)


class WholeBlock(MlpHalf):
    """timm's `Block`, computed with dcvit's ops while a model is compressed; no finished model holds one.

    Args:
        block: A timm `Block`; taken over, not copied.
    """

    def __init__(self, block: TimmModule) -> None:
        super().__init__(block)
        self.norm1, self.attn, self.ls1, self.drop_path1 = block.norm1, block.attn, block.ls1, block.drop_path1

    def forward(self, x: Tensor, **masks: Any) -> Tensor:
        """Tokens `[B, N, D]` to `[B, N, D]`; what timm's `Attention` takes goes to it."""
        attn: TimmModule = self._modules["attn"]
        normed = self.norm1(x)
        if self._plain(attn) and not any(mask is not None and mask is not False for mask in masks.values()):
            qkv = attn.qkv(normed).unflatten(-1, (3, attn.num_heads, attn.head_dim))
            # An explicit choice is of the MLPs: which heads the attention takes depends on the model.
            mixed = attn.proj(attention(qkv, impl="eager" if self.impl == "eager" else "auto"))
        else:
            mixed = attn(normed, **masks)
        return self.mlp_half(x + self.drop_path1(self.ls1(mixed)))

    def _plain(self, attn: TimmModule) -> bool:
        """Whether attention is no more than qkv, softmax and proj: no hooks between, nothing random active."""
        parts: dict[str, TimmModule] = attn._modules
        return (
            type(attn) is Attention
            and type(parts["q_norm"]) is type(parts["k_norm"]) is type(parts["norm"]) is nn.Identity
            and parts.get("gate") is None
            and not (attn._forward_hooks or attn._forward_pre_hooks)
            and not any(parts[name]._forward_hooks or parts[name]._forward_pre_hooks for name in _INSIDE_ATTENTION)
            and not (self.training and (parts["attn_drop"].p > 0 or parts["proj_drop"].p > 0))
        )


class VisionTransformerAdapter:
    """timm's `VisionTransformer` and `VisionTransformerDistilled`.

    Modifications:
        - a compressed block (`CompressedBlock`) loses `norm1`, `attn`, `ls1` and `drop_path1`, and the rows of
          `mlp.fc1` and columns of `mlp.fc2` of the hidden nodes that are dropped; of a SwiGLU both gate and value;
        - a pruned block loses those rows and columns alone;
        - a dropped block becomes a `DroppedBlock`;
        - everything else, parameter names included, stays.
    """

    family = "vit"

    @staticmethod
    def handles(model: nn.Module) -> bool:
        """Whether the model is of this family."""
        return isinstance(model, VisionTransformer)

    def check(self, model: TimmModule) -> None:
        """See `ModelAdapter.check`."""
        if type(model) not in (VisionTransformer, VisionTransformerDistilled):
            raise UnsupportedModelError(
                f"The model is a {type(model).__qualname__}, a subclass of VisionTransformer that dcvit does not "
                "know; it could not be rebuilt from its saved form."
            )
        self._model_args(model)

    def input_size(self, model: TimmModule) -> tuple[int, int, int]:
        """See `ModelAdapter.input_size`."""
        height, width = model.patch_embed.img_size
        return model.patch_embed.proj.in_channels, height, width

    def dynamic_input(self, model: TimmModule) -> bool:
        """See `ModelAdapter.dynamic_input`."""
        return bool(model.dynamic_img_size)

    def tokens(self, model: TimmModule, images: Tensor) -> Tensor:
        """See `ModelAdapter.tokens`."""
        return model.forward_features(images)

    def embed(self, model: TimmModule, images: Tensor) -> Tensor:
        """See `ModelAdapter.embed`."""
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))

    def prepare(self, model: TimmModule, state: Tensor, block: int) -> Tensor:
        """See `ModelAdapter.prepare`."""
        return state

    def run_blocks(self, model: TimmModule, state: Tensor, first: int, stop: int) -> Tensor:
        """See `ModelAdapter.run_blocks`."""
        return model.blocks[first:stop](state)

    def as_tokens(self, state: Tensor) -> Tensor:
        """See `ModelAdapter.as_tokens`."""
        return state

    def from_tokens(self, tokens: Tensor) -> Tensor:
        """See `ModelAdapter.from_tokens`."""
        return tokens

    def num_blocks(self, model: TimmModule) -> int:
        """See `ModelAdapter.num_blocks`."""
        return len(model.blocks)

    def groups(self, model: TimmModule) -> Sequence[tuple[int, ...]]:
        """See `ModelAdapter.groups`; each block alone."""
        return [(block,) for block in range(len(model.blocks))]

    def final_norm(self, model: TimmModule, state: Tensor) -> Tensor:
        """See `ModelAdapter.final_norm`."""
        return model.norm(state)

    def num_classes(self, model: TimmModule) -> int:
        """See `ModelAdapter.num_classes`."""
        return int(model.num_classes)

    def logits(self, model: TimmModule, tokens: Tensor) -> Tensor:
        """See `ModelAdapter.logits`."""
        return model.forward_head(tokens)

    def features(self, model: TimmModule, tokens: Tensor) -> Tensor:
        """See `ModelAdapter.features`; without pooling (`global_pool=""`) the mean over the tokens."""
        features = model.forward_head(tokens, pre_logits=True)
        return features if features.ndim == 2 else features.mean(dim=1)

    def hidden_features(self, model: TimmModule, block: int) -> int:
        """See `ModelAdapter.hidden_features`."""
        module = model.blocks[block]
        return 0 if isinstance(module, DroppedBlock) else int(module.mlp.fc2.in_features)

    def cost(self, model: TimmModule) -> ModelCost:
        """See `ModelAdapter.cost`."""
        tokens = model.patch_embed.num_patches + model.num_prefix_tokens
        blocks = tuple(_block_cost(block, tokens) for block in model.blocks)
        total = Cost(params=_num_params(model))
        for block in blocks:
            total += Cost(
                block.attention.weight_macs + block.mlp.weight_macs,
                block.attention.attention_macs + block.mlp.attention_macs,
            )
        conv = model.patch_embed.proj
        total += Cost(weight_macs=model.patch_embed.num_patches * conv.weight.numel())
        for name in ("head", "head_dist"):
            head = getattr(model, name, None)
            if isinstance(head, nn.Linear):
                total += Cost(weight_macs=head.weight.numel())
        if model.attn_pool is not None:
            total += _latent_pool_cost(
                model.attn_pool, tokens - (0 if model.pool_include_prefix else model.num_prefix_tokens)
            )
        return ModelCost(total=total, blocks=blocks)

    def compress_block(self, model: TimmModule, block: int, kept: Sequence[int]) -> None:
        """See `ModelAdapter.compress_block`."""
        module = model.blocks[block]
        keep_hidden_nodes(module.mlp, torch.as_tensor(kept, dtype=torch.int64))
        model.blocks[block] = module if isinstance(module, CompressedBlock) else CompressedBlock(module)

    def prune_block(self, model: TimmModule, block: int, kept: Sequence[int]) -> None:
        """See `ModelAdapter.prune_block`."""
        keep_hidden_nodes(model.blocks[block].mlp, torch.as_tensor(kept, dtype=torch.int64))

    def hidden_filters(self, model: TimmModule, block: int) -> Tensor:
        """See `ModelAdapter.hidden_filters`; of a SwiGLU those of gate and value."""
        mlp = model.blocks[block].mlp
        if type(mlp) is SwiGLU:
            return torch.cat([mlp.fc1_g.weight, mlp.fc1_x.weight], dim=1)
        return torch.cat(mlp.fc1.weight.chunk(2), dim=1) if type(mlp) is GluMlp else mlp.fc1.weight

    def hidden_layer(self, model: TimmModule, block: int) -> nn.Linear:
        """See `ModelAdapter.hidden_layer`."""
        return model.blocks[block].mlp.fc2

    def fuse(self, model: TimmModule) -> None:
        """See `ModelAdapter.fuse`."""
        for i, block in enumerate(model.blocks):
            if type(block) is Block and not block._forward_hooks and not block._forward_pre_hooks:
                model.blocks[i] = WholeBlock(block)

    def drop_block(self, model: TimmModule, block: int) -> None:
        """See `ModelAdapter.drop_block`."""
        model.blocks[block] = DroppedBlock()

    def block(self, model: TimmModule, block: int) -> nn.Module:
        """See `ModelAdapter.block`."""
        return model.blocks[block]

    def output_layer(self, model: TimmModule, block: int) -> tuple[nn.Linear, Tensor | None] | None:
        """See `ModelAdapter.output_layer`."""
        module = model.blocks[block]
        if not isinstance(module, CompressedBlock) or module.post_norm:
            return None
        return module.mlp.fc2, getattr(module.ls2, "gamma", None)

    def parameters(self, model: TimmModule, first_block: int, last_block: int) -> list[nn.Parameter]:
        """See `ModelAdapter.parameters`."""
        blocks = list(model.blocks[first_block : last_block + 1].parameters())
        return blocks if first_block > 0 else self._stem_parameters(model) + blocks

    def body_parameters(self, model: TimmModule) -> list[nn.Parameter]:
        """See `ModelAdapter.body_parameters`."""
        return self._stem_parameters(model) + list(model.blocks.parameters()) + list(model.norm.parameters())

    @staticmethod
    def _stem_parameters(model: TimmModule) -> list[nn.Parameter]:
        names = ("cls_token", "reg_token", "dist_token", "pos_embed")
        loose = [getattr(model, name, None) for name in names]
        stem = [*model.patch_embed.parameters(), *model.norm_pre.parameters()]
        return [p for p in loose if p is not None] + stem

    def rebuild(self, model: TimmModule) -> nn.Module:
        """See `ModelAdapter.rebuild`."""
        weight = model.patch_embed.proj.weight
        config = self.config(model)
        pretrained_cfg = {**config["pretrained_cfg"], "architecture": ARCHITECTURE}
        with seeded(0):  # what is initialised here is overwritten; the caller's random state is not its business
            rebuilt = timm.create_model(ARCHITECTURE, pretrained_cfg=pretrained_cfg, **config["model_args"])
        rebuilt.to(device=weight.device, dtype=weight.dtype).load_state_dict(model.state_dict())
        return rebuilt.train(model.training)

    def config(self, model: TimmModule) -> Mapping[str, Any]:
        """See `ModelAdapter.config`."""
        args = self._model_args(model)
        return {
            "architecture": ARCHITECTURE,
            "num_classes": args["num_classes"],
            "num_features": args["embed_dim"],
            "global_pool": args["global_pool"],
            "model_args": args,
            "pretrained_cfg": self._pretrained_cfg(model),
        }

    def modeling_file(self) -> Path:
        """See `ModelAdapter.modeling_file`."""
        return Path(modeling_dcvit.__file__)

    def _pretrained_cfg(self, model: TimmModule) -> dict[str, Any]:
        """Preprocessing and head of a model, without where its own weights came from."""
        source = getattr(model, "pretrained_cfg", {})
        keep = ("interpolation", "crop_pct", "crop_mode", "mean", "std", "license", "label_names", "label_descriptions")
        cfg = {key: source[key] for key in keep if source.get(key) is not None}
        return {
            **cfg,
            "input_size": self.input_size(model),
            "fixed_input_size": not self.dynamic_input(model),
            "num_classes": self.num_classes(model),
            "first_conv": "patch_embed.proj",
            "classifier": ["head", "head_dist"] if isinstance(model, VisionTransformerDistilled) else "head",
        }

    def _model_args(self, model: TimmModule) -> dict[str, Any]:
        """The constructor arguments of a model, read off its modules, as values for JSON.

        Raises:
            UnsupportedModelError: Naming the first part that the arguments would not reproduce.
        """
        args = _read_model_args(model)
        with torch.device("meta"):
            twin = build(**args, compressed_block=CompressedBlock)
        original, rebuilt = _signature(model), _signature(twin)
        for name in sorted(original.keys() | rebuilt.keys()):
            if original.get(name) != rebuilt.get(name):
                raise UnsupportedModelError(
                    f"The model's part {name or '(root)'} is {original.get(name, 'absent')}, where a "
                    f"VisionTransformer built from its sizes has {rebuilt.get(name, 'nothing')}: dcvit could not "
                    "rebuild it from its saved form. Replace that part, or extend _read_model_args in "
                    "dcvit/models/vision_transformer.py."
                )
        return args


def _read_model_args(model: TimmModule) -> dict[str, Any]:
    """Every constructor argument of `VisionTransformer` that shapes the model, and `per_layer_config`."""
    embed = model.patch_embed
    if type(embed) is not PatchEmbed:
        raise UnsupportedModelError(
            f"patch_embed is a {type(embed).__qualname__}; only timm's PatchEmbed (one strided convolution) is "
            "supported. A convolutional stem would need its own cost and rebuild in the adapter."
        )
    if embed.img_size is None:
        raise UnsupportedModelError("patch_embed.img_size is None: call model.set_input_size(img_size=...) first.")
    whole = [block for block in model.blocks if _timm_type(block) in BLOCKS.values()]
    for i, block in enumerate(model.blocks):
        if not isinstance(block, (*BLOCKS.values(), MlpHalf, DroppedBlock)):
            raise UnsupportedModelError(
                f"blocks.{i} is a {type(block).__qualname__}; supported are timm's Block and ResPostBlock. "
                "Where attention and MLP run in parallel or in several branches, the cut is not defined."
            )
    if not whole:
        raise UnsupportedModelError("No block of the model has attention left: there is nothing to compress.")
    block = whole[0]
    attention = block.attn
    # Blocks are cut from the widest: what `build` makes loses nodes and gains none.
    mlp = max((b.mlp for b in model.blocks if not isinstance(b, DroppedBlock)), key=lambda mlp: mlp.fc2.in_features)
    intermediate_size = _fc1_features(mlp)
    if model.attn_pool is not None and model.attn_pool.mlp is not None:  # which is as wide as the uncut blocks
        intermediate_size = max(intermediate_size, model.attn_pool.mlp.fc1.out_features)
    widest = intermediate_size // (2 if type(mlp) is GluMlp else 1)
    if type(attention) is not Attention:
        raise UnsupportedModelError(
            f"blocks.*.attn is a {type(attention).__qualname__}; only timm's Attention, whose cost is known, is "
            "supported."
        )
    embed_dim = int(model.embed_dim)
    head_norm = model.norm if not isinstance(model.norm, nn.Identity) else model.fc_norm
    per_layer = {
        str(i): settings
        for i, module in enumerate(model.blocks)
        if (settings := _layer_settings(module, widest)) is not None
    }
    args: dict[str, Any] = {
        "img_size": list(embed.img_size),
        "patch_size": list(embed.patch_size),
        "in_chans": embed.proj.in_channels,
        "num_classes": int(model.num_classes),
        "global_pool": model.global_pool,
        "embed_dim": embed_dim,
        "depth": len(model.blocks),
        "num_heads": attention.num_heads,
        "intermediate_size": intermediate_size,
        "qkv_bias": attention.qkv.bias is not None,
        "qk_norm": not isinstance(attention.q_norm, nn.Identity),
        "scale_attn_norm": not isinstance(attention.norm, nn.Identity),
        "scale_mlp_norm": not isinstance(mlp.norm, nn.Identity),
        "proj_bias": attention.proj.bias is not None,
        "layer_scale": isinstance(getattr(block, "ls1", None), LayerScale),
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
        "embed_norm_layer": None if isinstance(embed.norm, nn.Identity) else _norm_spec("patch_embed.norm", embed.norm),
        "norm_layer": _norm_spec("blocks.*.norm1", block.norm1),
        "act_layer": _key(ACTIVATIONS, "blocks.*.mlp.act", type(mlp.act)),
        "block_fn": _key(BLOCKS, "blocks.*", _timm_type(block)),
        "mlp_layer": _mlp_key(mlp),
        "distilled": isinstance(model, VisionTransformerDistilled),
        "per_layer_config": per_layer,
    }
    return args


@register_model
def dcvit_vision_transformer(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Timm's entry point for vision transformers that dcvit compressed; the arguments come from `config.json`."""
    return modeling_dcvit.create(pretrained, compressed_block=CompressedBlock, **kwargs)


def create_vision_transformer(model_args: Mapping[str, Any], pretrained_cfg: Mapping[str, Any]) -> nn.Module:
    """A plain, randomly initialised `VisionTransformer` that can be saved with its preprocessing.

    Args:
        model_args: Arguments of timm's `VisionTransformer`.
        pretrained_cfg: `mean`, `std` and the like, as timm's models have them.
    """
    model = VisionTransformer(**model_args)
    model.pretrained_cfg = dict(pretrained_cfg)
    return model


def _layer_settings(block: TimmModule, widest: int) -> dict[str, Any] | None:
    """What differs in a block from a whole one of so many hidden nodes, in the key names of transformers'
    `per_layer_config`.
    """
    if isinstance(block, DroppedBlock):
        return {"skip": ["attention", "mlp"]}
    if isinstance(block, CompressedBlock):
        return {"skip": ["attention"], "intermediate_size": int(block.mlp.fc2.in_features)}
    if block.mlp.fc2.in_features < widest:
        return {"skip": [], "intermediate_size": int(block.mlp.fc2.in_features)}
    return None


def _signature(model: TimmModule) -> dict[str, str]:
    """Each module's type and settings, each parameter's and buffer's shape, by name."""
    parts = {
        name: f"{_timm_type(module).__qualname__}({module.extra_repr()})"
        for name, module in model.named_modules()
        if not isinstance(module, _STATELESS) or isinstance(module, DroppedBlock)
    }
    tensors = {name: f"Tensor{list(t.shape)}" for name, t in [*model.named_parameters(), *model.named_buffers()]}
    norms = {
        name + ".eps": str(getattr(module, "eps", None))
        for name, module in model.named_modules()
        if isinstance(module, tuple(NORMS.values()))
    }
    return parts | tensors | norms


def _timm_type(module: nn.Module) -> type[nn.Module]:
    """A module's type, as the finished model has it."""
    return Block if isinstance(module, WholeBlock) else type(module)


def _key(table: Mapping[str, type[nn.Module]], part: str, kind: type[nn.Module]) -> str:
    for key, value in table.items():
        if value is kind:
            return key
    raise UnsupportedModelError(
        f"{part} is a {kind.__qualname__}; supported are {', '.join(t.__qualname__ for t in table.values())}."
    )


def _norm_spec(part: str, norm: TimmModule) -> dict[str, Any]:
    return {"type": _key(NORMS, part, type(norm)), "eps": norm.eps}


def _mlp_key(mlp: TimmModule) -> str:
    if type(mlp) is Mlp:
        return "mlp"
    if type(mlp) is SwiGLU:
        return "swiglu"
    if type(mlp) is GluMlp and not mlp.gate_last:
        return "swiglu_packed"
    raise UnsupportedModelError(
        f"blocks.*.mlp is a {type(mlp).__qualname__}; supported are Mlp, SwiGLU and SwiGLUPacked."
    )


def _fc1_features(mlp: TimmModule) -> int:
    """The `hidden_features` argument of an MLP's constructor; a packed SwiGLU counts gate and value."""
    return int((mlp.fc1_x if type(mlp) is SwiGLU else mlp.fc1).out_features)


def _num_params(module: TimmModule) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _block_cost(block: TimmModule, tokens: int) -> BlockCost:
    if isinstance(block, DroppedBlock):
        return BlockCost(Cost(), Cost(), Cost(), 0)
    mlp = block.mlp
    hidden, width = mlp.fc2.in_features, mlp.fc2.out_features
    first_layers = [mlp.fc1_g, mlp.fc1_x] if type(mlp) is SwiGLU else [mlp.fc1]
    rows = sum(layer.out_features for layer in first_layers)  # gate and value count twice per hidden node
    fc1 = linear_cost(width, rows, tokens, bias=first_layers[0].bias is not None)
    fc2 = linear_cost(hidden, width, tokens, bias=mlp.fc2.bias is not None)
    rest = (
        _num_params(block.norm2)
        + _num_params(mlp.norm)
        + (0 if isinstance(block, ResPostBlock) else _num_params(block.ls2))
    )
    mlp_cost = fc1 + fc2 + Cost(params=rest)
    per_node = len(first_layers) if type(mlp) is SwiGLU else 2 if type(mlp) is GluMlp else 1
    node = linear_cost(width, per_node, tokens, bias=first_layers[0].bias is not None)
    node += linear_cost(1, width, tokens, bias=False)
    node += Cost(params=len(list(mlp.norm.parameters())))  # one weight, perhaps one bias, for each node
    if isinstance(block, CompressedBlock):
        return BlockCost(Cost(), mlp_cost, node, hidden)
    attention = block.attn
    inner = attention.num_heads * attention.head_dim
    cost = (
        linear_cost(width, 3 * inner, tokens, bias=False)
        + linear_cost(inner, width, tokens, bias=False)
        + Cost(attention_macs=2 * tokens * tokens * inner)
    )
    params = sum(_num_params(block.get_submodule(n)) for n in ("norm1", "attn", "ls1") if hasattr(block, n))
    return BlockCost(Cost(cost.weight_macs, cost.attention_macs, params), mlp_cost, node, hidden)


def _latent_pool_cost(pool: TimmModule, tokens: int) -> Cost:
    """MACs of attention pooling with latent queries (SigLIP's head); its parameters are counted with the model's."""
    if type(pool) is not AttentionPoolLatent:
        raise UnsupportedModelError(
            f"attn_pool is a {type(pool).__qualname__}; only AttentionPoolLatent is supported, whose cost is known."
        )
    latents, width = pool.latent_len, pool.num_heads * pool.head_dim
    layers = [(pool.q, latents), (pool.kv, tokens), (pool.proj, latents)]
    if pool.mlp is not None:
        layers += [(pool.mlp.fc1, latents), (pool.mlp.fc2, latents)]
    macs = sum(rows * layer.weight.numel() for layer, rows in layers if isinstance(layer, nn.Linear))
    return Cost(weight_macs=macs, attention_macs=2 * latents * tokens * width)
