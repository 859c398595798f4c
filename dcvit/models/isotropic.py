"""What the adapters of isotropic vision transformers share: from first to last as many tokens, of one width.

Their blocks are in `blocks`, one behind the other, and each has an attention and an MLP.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import AttentionPoolLatent, GluMlp, SwiGLU
from torch import Tensor, nn

from dcvit.costs import BlockCost, Cost, ModelCost
from dcvit.errors import UnsupportedModelError
from dcvit.models.adapter import OutputLayer
from dcvit.models.blocks import CompressedBlock
from dcvit.models.modeling_dcvit import POST_NORM, DroppedBlock, TimmModule, keep_hidden_nodes, layer_scale
from dcvit.models.rebuilding import num_params, rebuilt, saved_config

__all__ = ["IsotropicAdapter"]


class IsotropicAdapter(ABC):
    """The part of `ModelAdapter` that needs only `patch_embed`, `blocks` and the names of a block's MLP.

    Attributes:
        architecture: The name under which timm's registry knows compressed models.
    """

    architecture: str
    removed = "attention"
    keeps_ends = True
    pointwise_nodes = True
    mac_weight = 1.0

    def input_size(self, model: TimmModule) -> tuple[int, int, int]:
        """See `ModelAdapter.input_size`."""
        height, width = model.patch_embed.img_size
        return model.patch_embed.proj.in_channels, height, width

    def dynamic_input(self, model: TimmModule) -> bool:
        """See `ModelAdapter.dynamic_input`."""
        return bool(getattr(model, "dynamic_img_size", False))

    def tokens(self, model: TimmModule, images: Tensor) -> Tensor:
        """See `ModelAdapter.tokens`."""
        return model.forward_features(images)

    def prepare(self, model: TimmModule, state: Tensor, block: int) -> Tensor:
        """See `ModelAdapter.prepare`."""
        return state

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

    def has_class_token(self, model: TimmModule) -> bool:
        """See `ModelAdapter.has_class_token`."""
        return model.cls_token is not None

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
        blocks, tokens = self._block_costs(model)
        total = Cost(params=num_params(model))
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
        if (pool := getattr(model, "attn_pool", None)) is not None:
            pools_prefix = getattr(model, "pool_include_prefix", True)
            total += _latent_pool_cost(pool, tokens - (0 if pools_prefix else model.num_prefix_tokens))
        return ModelCost(total=total, blocks=tuple(blocks))

    @abstractmethod
    def _block_costs(self, model: TimmModule) -> tuple[list[BlockCost], int]:
        """What each block costs, and how many tokens leave the last."""

    def compress_block(self, model: TimmModule, block: int, kept: Sequence[int]) -> None:
        """See `ModelAdapter.compress_block`."""
        module = model.blocks[block]
        keep_hidden_nodes(module.mlp, torch.as_tensor(kept, dtype=torch.int64))
        model.blocks[block] = module if isinstance(module, CompressedBlock) else CompressedBlock(module)

    def prune_block(self, model: TimmModule, block: int, kept: Sequence[int]) -> None:
        """See `ModelAdapter.prune_block`."""
        keep_hidden_nodes(model.blocks[block].mlp, torch.as_tensor(kept, dtype=torch.int64))

    def prune_obstacle(self, model: TimmModule, block: int) -> str | None:
        """See `ModelAdapter.prune_obstacle`."""
        return None if self.hidden_features(model, block) else "has no hidden nodes"

    def hidden_filters(self, model: TimmModule, block: int) -> Tensor:
        """See `ModelAdapter.hidden_filters`; of a SwiGLU those of gate and value."""
        mlp = model.blocks[block].mlp
        if type(mlp) is SwiGLU:
            return torch.cat([mlp.fc1_g.weight, mlp.fc1_x.weight], dim=1)
        return torch.cat(mlp.fc1.weight.chunk(2), dim=1) if type(mlp) is GluMlp else mlp.fc1.weight

    def hidden_layer(self, model: TimmModule, block: int) -> nn.Linear:
        """See `ModelAdapter.hidden_layer`."""
        return model.blocks[block].mlp.fc2

    def drop_block(self, model: TimmModule, block: int) -> None:
        """See `ModelAdapter.drop_block`."""
        model.blocks[block] = DroppedBlock()

    def block(self, model: TimmModule, block: int) -> nn.Module:
        """See `ModelAdapter.block`."""
        return model.blocks[block]

    def output_layer(self, model: TimmModule, block: int) -> OutputLayer | None:
        """See `ModelAdapter.output_layer`; `None` where the norm lies behind the MLP."""
        module = model.blocks[block]
        if isinstance(module, (*POST_NORM, DroppedBlock)) or getattr(module, "post_norm", False):
            return None
        return OutputLayer(module.mlp.fc2, getattr(layer_scale(module), "gamma", None))

    def absorbing_layers(self, model: TimmModule, block: int) -> tuple[None, None]:
        """See `ModelAdapter.absorbing_layers`."""
        return None, None

    def parameters(self, model: TimmModule, first_block: int, last_block: int) -> list[nn.Parameter]:
        """See `ModelAdapter.parameters`."""
        blocks = list(model.blocks[first_block : last_block + 1].parameters())
        return blocks if first_block > 0 else self._stem_parameters(model) + blocks

    def body_parameters(self, model: TimmModule) -> list[nn.Parameter]:
        """See `ModelAdapter.body_parameters`."""
        return self._stem_parameters(model) + list(model.blocks.parameters()) + list(model.norm.parameters())

    def _stem_parameters(self, model: TimmModule) -> list[nn.Parameter]:
        names = ("cls_token", "reg_token", "dist_token", "pos_embed")
        loose = [getattr(model, name, None) for name in names]
        stem = [*model.patch_embed.parameters(), *getattr(model, "norm_pre", nn.Identity()).parameters()]
        return [p for p in loose if p is not None] + stem

    def rebuild(self, model: TimmModule) -> nn.Module:
        """See `ModelAdapter.rebuild`."""
        return rebuilt(model, self.architecture, self.config(model))

    def config(self, model: TimmModule) -> Mapping[str, Any]:
        """See `ModelAdapter.config`."""
        return saved_config(
            model, self.architecture, self._model_args(model), input_size=self.input_size(model),
            first_conv="patch_embed.proj",
            classifier=["head", "head_dist"] if hasattr(model, "head_dist") else "head",
            fixed_input_size=not self.dynamic_input(model),
        )  # fmt: skip

    @abstractmethod
    def _model_args(self, model: TimmModule) -> dict[str, Any]:
        """The arguments of the architecture's builder for a model, as values for JSON.

        Raises:
            UnsupportedModelError: Naming the first part that they would not reproduce.
        """


def require_one_answer(model: TimmModule) -> None:
    """Refuse a model that classifies each token.

    Raises:
        UnsupportedModelError: If it does.
    """
    if not model.global_pool and model.num_classes:
        raise UnsupportedModelError(
            "The model classifies each token (global_pool=''): call model.reset_classifier(0) for a backbone, or give "
            "it a pooling."
        )


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
