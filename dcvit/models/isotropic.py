"""The shared part of the adapters of isotropic vision transformers, in which all blocks have the same width.

Their blocks are in `model.blocks`, in order, and each has an attention and an MLP.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import AttentionPoolLatent, GluMlp, SwiGLU
from torch import Tensor, nn

from dcvit.costs import BlockCost, Cost, ModelCost
from dcvit.errors import UnsupportedModelError
from dcvit.models.base import ModelView, OutputLayer
from dcvit.models.blocks import compressed
from dcvit.models.modeling.shared import (
    POST_NORM,
    CompressedBlock,
    DroppedBlock,
    TimmModule,
    keep_hidden_units,
    layer_scale,
)
from dcvit.models.rebuild import ANOTHER_MODEL, num_classes, num_params, rebuilt, saved_config

__all__ = ["IsotropicView", "has_post_norm", "require_one_answer"]


class IsotropicView(ModelView):
    """The methods of `ModelView` that need only `patch_embed`, `blocks` and the names of a block's MLP.

    Attributes:
        architecture: The name under which timm's registry knows compressed models.
    """

    architecture: str
    removed = "attention"
    keeps_ends = True
    pointwise_units = True
    mac_weight = 1.0

    def input_size(self) -> tuple[int, int, int]:
        height, width = self.model.patch_embed.img_size
        return self.model.patch_embed.proj.in_channels, height, width

    def dynamic_input(self) -> bool:
        return bool(getattr(self.model, "dynamic_img_size", False))

    def tokens(self, images: Tensor) -> Tensor:
        return self.model.forward_features(images)

    def prepare(self, state: Tensor, block: int) -> Tensor:
        return state

    def as_tokens(self, state: Tensor) -> Tensor:
        return state

    def from_tokens(self, tokens: Tensor) -> Tensor:
        return tokens

    def num_blocks(self) -> int:
        return len(self.model.blocks)

    def groups(self) -> Sequence[tuple[int, ...]]:
        return [(block,) for block in range(len(self.model.blocks))]

    def final_norm(self, state: Tensor) -> Tensor:
        return self.model.norm(state)

    def logits(self, tokens: Tensor) -> Tensor:
        return self.model.forward_head(tokens)

    def has_class_token(self) -> bool:
        return self.model.cls_token is not None

    def features(self, tokens: Tensor) -> Tensor:
        # Without pooling (`global_pool=""`) the features are the mean over the tokens.
        features = self.model.forward_head(tokens, pre_logits=True)
        return features if features.ndim == 2 else features.mean(dim=1)

    def hidden_features(self, block: int) -> int:
        module = self.model.blocks[block]
        return 0 if isinstance(module, DroppedBlock) else int(module.mlp.fc2.in_features)

    def cost(self) -> ModelCost:
        blocks, tokens = self._block_costs()
        total = Cost(params=num_params(self.model))
        for block in blocks:
            total += Cost(
                block.attention.weight_macs + block.mlp.weight_macs,
                block.attention.attention_macs + block.mlp.attention_macs,
            )
        conv = self.model.patch_embed.proj
        total += Cost(weight_macs=self.model.patch_embed.num_patches * conv.weight.numel())
        for name in ("head", "head_dist"):
            head = getattr(self.model, name, None)
            if isinstance(head, nn.Linear):
                total += Cost(weight_macs=head.weight.numel())
        if (pool := getattr(self.model, "attn_pool", None)) is not None:
            pools_prefix = getattr(self.model, "pool_include_prefix", True)
            total += _latent_pool_cost(pool, tokens - (0 if pools_prefix else self.model.num_prefix_tokens))
        return ModelCost(total=total, blocks=tuple(blocks))

    @abstractmethod
    def _block_costs(self) -> tuple[list[BlockCost], int]:
        """Return the cost of each block, and the number of tokens after the last block."""

    def compress_block(self, block: int, kept: Sequence[int]) -> None:
        module = self.model.blocks[block]
        keep_hidden_units(module.mlp, torch.as_tensor(kept, dtype=torch.int64))
        self.model.blocks[block] = module if isinstance(module, CompressedBlock) else compressed(module)

    def prune_block(self, block: int, kept: Sequence[int]) -> None:
        keep_hidden_units(self.model.blocks[block].mlp, torch.as_tensor(kept, dtype=torch.int64))

    def prune_obstacle(self, block: int) -> str | None:
        return None if self.hidden_features(block) else "has no hidden units"

    def hidden_filters(self, block: int) -> Tensor:
        # A hidden unit of a SwiGLU has a gate and a value.
        mlp = self.model.blocks[block].mlp
        if type(mlp) is SwiGLU:
            return torch.cat([mlp.fc1_g.weight, mlp.fc1_x.weight], dim=1)
        return torch.cat(mlp.fc1.weight.chunk(2), dim=1) if type(mlp) is GluMlp else mlp.fc1.weight

    def hidden_layer(self, block: int) -> nn.Linear:
        return self.model.blocks[block].mlp.fc2

    def drop_block(self, block: int) -> None:
        self.model.blocks[block] = DroppedBlock()

    def block(self, block: int) -> nn.Module:
        return self.model.blocks[block]

    def output_layer(self, block: int) -> OutputLayer | None:
        """Return the last layer of a block's MLP; `None` if a norm follows it."""
        module = self.model.blocks[block]
        if isinstance(module, DroppedBlock) or has_post_norm(module):
            return None
        return OutputLayer(module.mlp.fc2, getattr(layer_scale(module), "gamma", None))

    def absorbing_layers(self, block: int) -> tuple[None, None]:
        return None, None

    def parameters(self, first_block: int, last_block: int) -> list[nn.Parameter]:
        blocks = list(self.model.blocks[first_block : last_block + 1].parameters())
        return blocks if first_block > 0 else self._stem_parameters() + blocks

    def body_parameters(self) -> list[nn.Parameter]:
        return self._stem_parameters() + list(self.model.blocks.parameters()) + list(self.model.norm.parameters())

    def _stem_parameters(self) -> list[nn.Parameter]:
        names = ("cls_token", "reg_token", "dist_token", "pos_embed")
        loose = [getattr(self.model, name, None) for name in names]
        stem = [*self.model.patch_embed.parameters(), *getattr(self.model, "norm_pre", nn.Identity()).parameters()]
        return [p for p in loose if p is not None] + stem

    def rebuild(self) -> nn.Module:
        return rebuilt(self.model, self.architecture, self.config())

    def config(self) -> Mapping[str, Any]:
        return saved_config(
            self.model, self.architecture, self._model_args(), input_size=self.input_size(),
            first_conv="patch_embed.proj",
            classifier=["head", "head_dist"] if hasattr(self.model, "head_dist") else "head",
            fixed_input_size=not self.dynamic_input(),
        )  # fmt: skip

    @abstractmethod
    def _model_args(self) -> dict[str, Any]:
        """Return the arguments of the architecture's builder that describe the model, as JSON values.

        Raises:
            UnsupportedModelError: If they do not reproduce the model; the message names the first part that differs.
        """


def has_post_norm(block: TimmModule) -> bool:
    """Return whether the norms of a block, compressed or not, follow attention and MLP."""
    return isinstance(block, POST_NORM) or getattr(block, "post_norm", False)


def require_one_answer(model: TimmModule) -> None:
    """Refuse a model that classifies each token.

    Raises:
        UnsupportedModelError: If it does.
    """
    if not model.global_pool and num_classes(model):
        raise UnsupportedModelError(
            "The model classifies each token (global_pool=''): call model.reset_classifier(0) for a backbone, or give "
            "it a pooling, model.reset_classifier(num_classes, global_pool='avg')."
        )


def _latent_pool_cost(pool: TimmModule, tokens: int) -> Cost:
    """Return the MACs of attention pooling with latent queries (SigLIP's head); parameters are counted elsewhere."""
    if type(pool) is not AttentionPoolLatent:
        raise UnsupportedModelError(
            f"attn_pool is a {type(pool).__qualname__}; only AttentionPoolLatent is supported, whose cost is known. "
            f"{ANOTHER_MODEL}"
        )
    latents, width = pool.latent_len, pool.num_heads * pool.head_dim
    layers = [(pool.q, latents), (pool.kv, tokens), (pool.proj, latents)]
    if pool.mlp is not None:
        layers += [(pool.mlp.fc1, latents), (pool.mlp.fc2, latents)]
    macs = sum(rows * layer.weight.numel() for layer, rows in layers if isinstance(layer, nn.Linear))
    return Cost(weight_macs=macs, attention_macs=2 * latents * tokens * width)
