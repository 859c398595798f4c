# SPDX-License-Identifier: Apache-2.0
"""Changed vision transformer blocks of methods other than DC-ViT.

A saved folder's file contains only the variations that the saved model has. A function that makes one is registered
under the keys of `per_layer_config` that request it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from timm.layers.attention import maybe_add_mask, resolve_self_attn_mask
from torch import Tensor, nn

from dcvit.models.modeling.shared import TimmModule, linear_columns, linear_rows, norm_channels

__all__ = [
    "KERNEL",
    "VARIATIONS",
    "ConvolutionalAttention",
    "FusingBlock",
    "PerLayerConfig",
    "SharedBlock",
    "Variation",
    "convolve",
    "end_tokens",
    "keep_heads",
    "lose_heads",
    "share",
    "share_weights",
    "variation",
]

PerLayerConfig: TypeAlias = Mapping[str, Mapping[str, Any]]
"""The settings of blocks in `config.json`, by block number."""

Variation: TypeAlias = Callable[[TimmModule, str, PerLayerConfig], None]
"""A function that changes a block in place. It takes the model, the block's number and the settings of all blocks."""

VARIATIONS: dict[tuple[str, ...], Variation] = {}
"""The variations by the keys of `per_layer_config` that request them, in the order in which they are applied."""


def variation(*keys: str) -> Callable[[Variation], Variation]:
    """Return a decorator that registers a function in `VARIATIONS`."""

    def register(change: Variation) -> Variation:
        VARIATIONS[keys] = change
        return change

    return register


KERNEL = 3
"""The kernel size of the convolutions in `SharedBlock` and `ConvolutionalAttention`."""


class FusingBlock(nn.Module):
    """A transformer block that drops patch tokens with little attention from the class token, after its attention.

    The share `keep_rate` of the patch tokens with the most attention stays, in the original order. One more token is
    the mean of the others, weighted by their attention (EViT, arXiv 2202.07800).

    Args:
        block: A timm `Block` of a model with a class token. Its parts are reused and not copied.
        keep_rate: The share of patch tokens to keep, in (0, 1). Their number is rounded up.
        num_prefix_tokens: The number of class and register tokens, which always stay.
    """

    def __init__(self, block: TimmModule, keep_rate: float, num_prefix_tokens: int = 1) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1, self.drop_path1 = block.norm1, block.attn, block.ls1, block.drop_path1
        self.norm2, self.mlp, self.ls2, self.drop_path2 = block.norm2, block.mlp, block.ls2, block.drop_path2
        self.keep_rate, self.num_prefix_tokens = keep_rate, num_prefix_tokens

    def tokens_after(self, tokens: int) -> int:
        """Return the number of output tokens for a number of input tokens."""
        patches = tokens - self.num_prefix_tokens
        kept = self._num_kept(patches)
        return tokens if kept >= patches else self.num_prefix_tokens + kept + 1

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Map tokens `[B, N, D]` to `[B, M, D]`; attention masks are ignored."""
        mixed, attention = self.attend(self.norm1(x))
        x = self.fuse_tokens(x + self.drop_path1(self.ls1(mixed)), attention)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the attention's output `[B, N, D]`, and the class token's mean attention to the patches `[B, P]`."""
        logits, value = _logits_and_values(self.attn, x)
        weights = logits.softmax(dim=-1)
        return _projected(self.attn, weights, value), weights[:, :, 0, self.num_prefix_tokens :].mean(dim=1)

    def _num_kept(self, patches: int) -> int:
        return math.ceil(self.keep_rate * patches)

    def fuse_tokens(self, x: Tensor, attention: Tensor) -> Tensor:
        """Keep the tokens of `[B, N, D]` with the most attention `[B, P]`, and fuse the rest into one."""
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        kept = self._num_kept(patches.shape[1])
        if kept >= patches.shape[1]:
            return x
        order = attention.topk(patches.shape[1], dim=1).indices  # ONNX has no stable sort
        first, rest = order[:, :kept].topk(kept, dim=1, largest=False).values, order[:, kept:]
        weight = attention.gather(1, rest)
        weight = weight / weight.sum(dim=1, keepdim=True)
        fused = (weight.unsqueeze(-1) * _taken(patches, rest)).sum(dim=1, keepdim=True)
        return torch.cat([prefix, _taken(patches, first), fused], dim=1)


def _logits_and_values(attn: TimmModule, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits `[B, H, N, N]` of a timm `Attention`, and its values `[B, H, N, C]`."""
    qkv = attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    query, key, value = qkv.unbind(0)
    query, key = attn.q_norm(query), attn.k_norm(key)
    return attn.scale * query @ key.mT, value


def _projected(attn: TimmModule, weights: Tensor, value: Tensor) -> Tensor:
    """Return a timm `Attention`'s output `[B, N, D]` from its weights `[B, H, N, N]` and values `[B, H, N, C]`."""
    mixed = attn.norm((weights @ value).transpose(1, 2).flatten(2))
    projected: Tensor = attn.proj_drop(attn.proj(mixed))
    return projected


def _taken(tokens: Tensor, index: Tensor) -> Tensor:
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


class SharedBlock(nn.Module):
    """A transformer block that shares the weights of its attention, its MLP or both with neighbouring blocks.

    Each block has its own weight transformations: linear maps across the heads, before and after the softmax, and a
    depthwise 3×3 convolution of the patches, whose output is added to the MLP's input (MiniViT, arXiv 2204.07154).
    They start as identities and zeros. Attention with these maps computes `[H, N, N]` values for each image
    explicitly, because fused kernels do not support the maps.

    Only one of the blocks owns a shared module. The others hold it without registering it, so that its parameters are
    counted once, stored once, and shared again in a rebuilt model.

    Args:
        block: A timm `Block`. Its parts are reused and not copied.
        attention: The shared attention, which may be the block's own; `None` if it is not shared.
        mlp: The shared MLP, which may be the block's own; `None` if it is not shared.
        attention_of: The number of the block that owns the attention.
        mlp_of: The number of the block that owns the MLP.
        grid: Rows and columns of patches.
        num_prefix_tokens: The number of class and other tokens before the patches, which are not convolved.
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
            self.__dict__[name] = shared  # bypasses nn.Module, which would register it

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Map tokens `[B, N, D]` to `[B, N, D]`; the masks are those of timm's `Attention`."""
        attend = self.attn if self.attention_of is None else self.attend
        x = x + self.drop_path1(self.ls1(attend(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        normed = self.norm2(x)
        return x + self.drop_path2(self.ls2(self.mlp(normed if self.mlp_of is None else self.look_around(normed))))

    def attend(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the attention's output `[B, N, D]`, computed with maps across the heads."""
        logits, value = _logits_and_values(self.attn, x)
        logits = _mixed(logits, self.mix_logits)
        logits = maybe_add_mask(logits, resolve_self_attn_mask(x.shape[1], logits, attn_mask, is_causal))
        weights = self.attn.attn_drop(_mixed(logits.softmax(dim=-1), self.mix_weights))
        return _projected(self.attn, weights, value)

    def look_around(self, x: Tensor) -> Tensor:
        """Add the convolution of the patch tokens to the tokens `[B, N, D]`.

        Raises:
            ValueError: If the number of patches is neither that of the model's grid nor a square.
        """
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        maps = patches.mT.unflatten(2, _grid_of(patches.shape[1], self.grid))
        around = nn.functional.conv2d(maps, self.local, padding=KERNEL // 2, groups=len(self.local))
        return torch.cat([prefix, patches + around.flatten(2).mT], dim=1)

    def extra_repr(self) -> str:
        """Return the owners of its weights."""
        return f"attention_of={self.attention_of}, mlp_of={self.mlp_of}"


def _mixed(attention: Tensor, across: Tensor) -> Tensor:
    """Apply a linear map `[H, H]` across the heads to attention `[B, H, N, N]`."""
    return (across @ attention.flatten(2)).unflatten(2, attention.shape[2:])


def _grid_of(patches: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Return rows and columns for a number of patches: the model's grid, or a square.

    Raises:
        ValueError: If the number fits neither.
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
    """A convolution over the grid of patches that replaces an attention and keeps its value and output projections.

    Each channel of the values v `[B, N, C]` is mixed separately. v̄ is the mean over all tokens:

        patch                                            (k * v) + m v̄ + b,     k is 3×3, padded with zeros
        prefix token t (class, distillation, registers)  s_t v_t + m_t v̄ + b_t

    There are no queries, keys or N² products (after SPViT, arXiv 2111.11802). All mixing weights start at zero.

    Args:
        attn: A timm `Attention` without a gate. Its `norm` and `proj` are reused, and its value rows are copied.
        grid: Rows and columns of patches. Any other number of patches must be a square.
        num_prefix_tokens: The number of tokens before the patches.
    """

    def __init__(self, attn: TimmModule, grid: tuple[int, int], num_prefix_tokens: int) -> None:
        super().__init__()
        self.grid, self.num_prefix_tokens = grid, num_prefix_tokens
        self.num_heads, self.head_dim = attn.num_heads, attn.head_dim  # of the replaced attention
        weight, channels = attn.qkv.weight, attn.attn_dim
        self.v = linear_rows(attn.qkv, torch.arange(2 * channels, 3 * channels, device=weight.device))
        # `skip_init` draws no random numbers; the weights start at zero.
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
        """Map tokens `[B, N, D]` to the same shape; the attention's arguments are ignored."""
        mixed: Tensor = self.proj_drop(self.proj(self.norm(self.mix(self.v(x)))))
        return mixed

    def mix(self, value: Tensor) -> Tensor:
        """Mix the values `[B, N, C]` of the tokens.

        Raises:
            ValueError: If the patches do not form a grid.
        """
        prefix, patches = self.split(value)
        mean = value.mean(dim=1, keepdim=True)
        own, shared, constant = self.prefix
        mixed = self.conv(patches).flatten(2).mT + self.mean * mean
        return torch.cat([own * prefix + shared * mean + constant, mixed], dim=1)

    def split(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Split values `[B, N, C]` into those of the prefix tokens `[B, T, C]` and of the grid `[B, C, H, W]`.

        Raises:
            ValueError: If the patches do not form a grid.
        """
        prefix, patches = value[:, : self.num_prefix_tokens], value[:, self.num_prefix_tokens :]
        return prefix, patches.mT.unflatten(2, _grid_of(patches.shape[1], self.grid))


def share_weights(
    model: TimmModule, number: int, *, attention_of: int | None = None, mlp_of: int | None = None
) -> None:
    """Replace a block by a `SharedBlock`, in place.

    Args:
        model: The model.
        number: The number of the block, a timm `Block`.
        attention_of: The number of the block that owns the shared attention, which may be `number`; `None` if the
            attention is not shared.
        mlp_of: The same for the MLP.
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


@torch.no_grad()
def keep_heads(attn: TimmModule, kept: Tensor) -> None:
    """Keep only some heads of a timm `Attention`, in place.

    Args:
        attn: The attention, without a gate.
        kept: The numbers `[H]` of the heads to keep, at least one, in their new order.
    """
    kept = kept.to(attn.qkv.weight.device)
    channels = (kept[:, None] * attn.head_dim + torch.arange(attn.head_dim, device=kept.device)).flatten()
    attn.qkv = linear_rows(attn.qkv, torch.cat([channels + i * attn.attn_dim for i in range(3)]))
    attn.proj = linear_columns(attn.proj, channels)
    if not isinstance(attn.norm, nn.Identity):
        attn.norm = norm_channels(attn.norm, channels)
    attn.num_heads, attn.attn_dim = len(kept), len(channels)


@variation("num_attention_heads")
def lose_heads(model: TimmModule, number: str, per_layer_config: PerLayerConfig) -> None:
    """Keep only the first heads of a block, in place."""
    keep_heads(model.blocks[int(number)].attn, torch.arange(per_layer_config[number]["num_attention_heads"]))


@variation("token_mixer")
def convolve(model: TimmModule, number: str, per_layer_config: PerLayerConfig) -> None:
    """Replace a block's attention by a convolution, in place."""
    if (mixer := per_layer_config[number]["token_mixer"]) != "convolution":
        raise ValueError(f"per_layer_config: block {number} has token_mixer={mixer!r}; expected 'convolution'.")
    block = model.blocks[int(number)]
    block.attn = ConvolutionalAttention(block.attn, model.patch_embed.grid_size, model.num_prefix_tokens)


@variation("token_keep_rate")
def end_tokens(model: TimmModule, number: str, per_layer_config: PerLayerConfig) -> None:
    """Replace a block by a `FusingBlock`, which drops tokens, in place."""
    keep_rate = per_layer_config[number]["token_keep_rate"]
    model.blocks[int(number)] = FusingBlock(model.blocks[int(number)], keep_rate, model.num_prefix_tokens)


@variation("attention_of", "mlp_of")
def share(model: TimmModule, number: str, per_layer_config: PerLayerConfig) -> None:
    """Let a block use the weights of other blocks, or share its own with them, in place.

    Raises:
        ValueError: If the named owner does not own shared weights.
    """
    settings = per_layer_config[number]
    owners = {name: settings[name] for name in ("attention_of", "mlp_of") if name in settings}
    for name, owner in owners.items():
        if per_layer_config.get(str(owner), {}).get(name) != owner:
            raise ValueError(f"per_layer_config: block {number} has {name}={owner}, and block {owner} owns none.")
    share_weights(model, int(number), **owners)
