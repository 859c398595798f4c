# SPDX-License-Identifier: Apache-2.0
"""What methods other than DC-ViT make of a vision transformer's blocks.

A saved folder's file holds those that the saved model has. A function here that makes one is marked with the key of
`per_layer_config` that asks for it.
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
"""What `config.json` says of blocks, by their numbers."""

Variation: TypeAlias = Callable[[TimmModule, str, PerLayerConfig], None]
"""A function that changes a block in place: it takes the model, the block's number and what the config says of all."""

VARIATIONS: dict[tuple[str, ...], Variation] = {}
"""By the keys of `per_layer_config` that ask for it, each variation, in the order in which they are made."""


def variation(*keys: str) -> Callable[[Variation], Variation]:
    """Enter a function in `VARIATIONS`."""

    def enter(change: Variation) -> Variation:
        VARIATIONS[keys] = change
        return change

    return enter


KERNEL = 3
"""Side of the convolutions in `SharedBlock` and `ConvolutionalAttention`."""


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
        around = nn.functional.conv2d(maps, self.local, padding=KERNEL // 2, groups=len(self.local))
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
        self.v = linear_rows(attn.qkv, torch.arange(2 * channels, 3 * channels, device=weight.device))
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


@torch.no_grad()
def keep_heads(attn: TimmModule, kept: Tensor) -> None:
    """In place: only some heads of a timm `Attention` stay.

    Args:
        attn: The attention, without a gate.
        kept: Their numbers `[H]`, at least one, in the order in which they stay.
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
    """In place: a block keeps only its first heads."""
    keep_heads(model.blocks[int(number)].attn, torch.arange(per_layer_config[number]["num_attention_heads"]))


@variation("token_mixer")
def convolve(model: TimmModule, number: str, per_layer_config: PerLayerConfig) -> None:
    """In place: a convolution takes the place of a block's attention."""
    if (mixer := per_layer_config[number]["token_mixer"]) != "convolution":
        raise ValueError(f"per_layer_config: block {number} has token_mixer={mixer!r}; expected 'convolution'.")
    block = model.blocks[int(number)]
    block.attn = ConvolutionalAttention(block.attn, model.patch_embed.grid_size, model.num_prefix_tokens)


@variation("token_keep_rate")
def end_tokens(model: TimmModule, number: str, per_layer_config: PerLayerConfig) -> None:
    """In place: tokens end in a block."""
    keep_rate = per_layer_config[number]["token_keep_rate"]
    model.blocks[int(number)] = FusingBlock(model.blocks[int(number)], keep_rate, model.num_prefix_tokens)


@variation("attention_of", "mlp_of")
def share(model: TimmModule, number: str, per_layer_config: PerLayerConfig) -> None:
    """In place: a block gets the weights of other blocks, or shares its own with them.

    Raises:
        ValueError: If the block that it names has none to share.
    """
    settings = per_layer_config[number]
    owners = {name: settings[name] for name in ("attention_of", "mlp_of") if name in settings}
    for name, owner in owners.items():
        if per_layer_config.get(str(owner), {}).get(name) != owner:
            raise ValueError(f"per_layer_config: block {number} has {name}={owner}, and block {owner} owns none.")
    share_weights(model, int(number), **owners)
