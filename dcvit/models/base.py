"""What the algorithm needs to know of a model family."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dcvit.costs import ModelCost
from dcvit.models.modeling.shared import TimmModule
from dcvit.models.rebuild import num_classes

__all__ = ["ModelView", "OutputLayer"]

SMALLEST_FACTOR = 1e-12
"""A channel that is multiplied by less asks for nothing of its layer."""


@dataclass(frozen=True)
class OutputLayer:
    """The layer with which a block ends: it adds factor ⊙ W h + constant to its input, for what the layer is given, h.

    Attributes:
        layer: A linear layer, or a convolution, whose h are the patches of what it is given.
        scale: The LayerScale behind it, `[D]`.
        norm: The BatchNorm behind it, with the statistics that it has.
    """

    layer: nn.Linear | nn.Conv2d
    scale: Tensor | None = None
    norm: nn.BatchNorm2d | None = None

    @property
    def factor(self) -> Tensor:
        """What each channel is multiplied by behind the layer, `[D]`."""
        if self.norm is not None:
            assert self.norm.running_var is not None
            return self.norm.weight.detach() / (self.norm.running_var + self.norm.eps).sqrt()
        return self.layer.weight.new_ones(len(self.layer.weight)) if self.scale is None else self.scale.detach()

    @property
    def constant(self) -> bool:
        """Whether there is a parameter for the constant."""
        return self.norm is not None or self.layer.bias is not None

    @property
    def num_patches(self) -> int:
        """Inputs of the layer for each unit that it takes: the taps of a convolution's filter."""
        return math.prod(self.layer.weight.shape[2:])

    def weights(self) -> Tensor:
        """Factor ⊙ W, transposed: `[K, D]`."""
        return (self.layer.weight.detach().flatten(1) * self.factor[:, None]).T

    @torch.no_grad()
    def set(self, solution: Tensor) -> None:
        """In place: have it add what a solution says.

        Args:
            solution: factor ⊙ W transposed and, as its last row, the constant: `[K + 1, D]`.
        """
        layer, norm, factor = self.layer, self.norm, self.factor
        switched_off = factor.abs() <= SMALLEST_FACTOR
        wanted = solution.to(layer.weight) / torch.where(switched_off, torch.inf, factor)
        weight = torch.where(switched_off[:, None], layer.weight.flatten(1), wanted[:-1].T)
        layer.weight.copy_(weight.view_as(layer.weight))
        if norm is not None:
            assert norm.running_mean is not None
            before = -norm.running_mean if layer.bias is None else layer.bias - norm.running_mean
            norm.bias.copy_(solution[-1].to(norm.bias) - factor * before)
        elif layer.bias is not None:
            layer.bias.copy_(torch.where(switched_off, layer.bias, wanted[-1]))


class ModelView(ABC):
    """A model as the algorithm sees it: how to read its structure, change it, and rebuild it. A class for each family.

    Attributes:
        family: Its name, as the methods of `dcvit.methods` have it.
        models: What it is of, in words.
        classes: Timm's classes that it handles.
        source: The papers of the architecture.
        removed: What a compressed block loses beside hidden units, in a word.
        keeps_ends: Whether the first and the last blocks stay whole unless the caller names them.
        pointwise_units: Whether a block's hidden units look at each token alone; in a CNN filters look around.
        mac_weight: How long a MAC takes in training, about, in those of a ViT's matrix products.

    `check` is called once, before any work; the other methods may assume that it passed.

    What runs from block to block is a state, a tensor whose first dimension is the batch: tokens `[B, N, D]` in a ViT,
    `[B, H, W, D]` in a Swin, a feature map `[B, D, H, W]` in a CNN. Each of its positions is a token.
    """

    family: str
    models: str
    classes: tuple[type[nn.Module], ...]
    source: str
    removed: str
    keeps_ends: bool
    pointwise_units: bool
    mac_weight: float

    def __init__(self, model: TimmModule) -> None:
        self.model = model

    @property
    def tv_exponent(self) -> float:
        """β of the prior of synthesised images, the power of its difference norms: 0.6, as published for ViT."""
        return 0.6

    @abstractmethod
    def check(self) -> None:
        """Refuse a model that cannot be compressed.

        Raises:
            UnsupportedModelError: Naming the part that is not handled.
        """

    @abstractmethod
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that the model takes."""

    @abstractmethod
    def dynamic_input(self) -> bool:
        """Whether images may have another height and width than `input_size`."""

    @abstractmethod
    def cost(self) -> ModelCost:
        """MACs and parameters of the model at its own input size, and of each block."""

    @abstractmethod
    def tokens(self, images: Tensor) -> Tensor:
        """Output tokens `[B, N, D]` after the final norm, for images `[B, C, H, W]`."""

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """The state that precedes the first block, for images `[B, C, H, W]`."""

    @abstractmethod
    def prepare(self, state: Tensor, block: int) -> Tensor:
        """What a block takes, from the state that the one before it gave; other than that where a stage begins."""

    @abstractmethod
    def run_blocks(self, state: Tensor, first: int, stop: int) -> Tensor:
        """A state through the blocks `first` to `stop - 1`, each with what `prepare` does before it."""

    @abstractmethod
    def as_tokens(self, state: Tensor) -> Tensor:
        """The tokens `[B, N, D]` of a state."""

    @abstractmethod
    def from_tokens(self, tokens: Tensor) -> Tensor:
        """A state of tokens `[B, N, D]`, in any arrangement; a compressed block takes each of them alone."""

    @abstractmethod
    def num_blocks(self) -> int:
        """Blocks of the model. Cheap."""

    @abstractmethod
    def groups(self) -> Sequence[tuple[int, ...]]:
        """All blocks, those together that are compressed together, to equal numbers of hidden units."""

    @abstractmethod
    def final_norm(self, state: Tensor) -> Tensor:
        """Output tokens `[B, N, D]` from the state that the last block gave.

        `tokens` is `embed`, `run_blocks` over all blocks and `final_norm`, so that a part of it can be run alone.
        """

    def num_classes(self) -> int:
        """Classes of the head, 0 for a backbone."""
        return num_classes(self.model)

    @abstractmethod
    def logits(self, tokens: Tensor) -> Tensor:
        """Class logits `[B, num_classes]` from output tokens, through the pooling and the head."""

    @abstractmethod
    def has_class_token(self) -> bool:
        """Whether the first of the output tokens is a class token."""

    @abstractmethod
    def features(self, tokens: Tensor) -> Tensor:
        """Pooled features `[B, D]` from output tokens, the input of the head."""

    @abstractmethod
    def hidden_features(self, block: int) -> int:
        """Hidden units of a block's MLP."""

    @abstractmethod
    def compress_block(self, block: int, kept: Sequence[int]) -> None:
        """In place: remove what mixes the tokens of a block, such as its attention, and all hidden units but `kept`."""

    @abstractmethod
    def prune_block(self, block: int, kept: Sequence[int]) -> None:
        """In place: remove all hidden units of a block but `kept`, and nothing else; see `prune_obstacle`."""

    @abstractmethod
    def prune_obstacle(self, block: int) -> str | None:
        """What keeps `prune_block` from removing single hidden units of a block, as words behind its name, if any."""

    @abstractmethod
    def hidden_filters(self, block: int) -> Tensor:
        """The weights that make the hidden units of a block, a row each: `[K, F]`."""

    @abstractmethod
    def hidden_layer(self, block: int) -> nn.Linear | nn.Conv2d:
        """The layer that takes the hidden units of a block, compressed or not."""

    @abstractmethod
    def drop_block(self, block: int) -> None:
        """In place: remove a block altogether."""

    @abstractmethod
    def block(self, block: int) -> nn.Module:
        """A block's module, from a state that `prepare` made to a state of the same shape."""

    @abstractmethod
    def sublayers(self, block: int) -> "tuple[Callable[[Tensor], Tensor], nn.Module] | None":
        """Attention and MLP of a block that has both, one behind the other and each with its residual.

        The first takes a state and gives the one between the two; the second is a module with the block's own weights,
        which treats each token alone, as a compressed block does. `None` where a block is made otherwise, or where its
        MLP has no output layer (see `output_layer`).

        The state between the two is one like others; without `pointwise_units` it holds more channels: first those of
        the block's input, then the inputs of its output layer, unit by unit.
        """

    @abstractmethod
    def output_layer(self, block: int) -> OutputLayer | None:
        """The last layer of a block's MLP, or of a CNN's block.

        `None` where the output is not the input plus what that layer adds.
        """

    @abstractmethod
    def absorbing_layers(self, block: int) -> tuple[nn.Conv2d | None, nn.Conv2d | None]:
        """The convolutions next to a dropped block that can absorb a linear map of channels.

        The last one before it takes the map on its output, the first one behind it on its input; `None` where there is
        no such convolution, as in a transformer, whose blocks begin with a norm.
        """

    @abstractmethod
    def parameters(self, first_block: int, last_block: int) -> list[nn.Parameter]:
        """The parameters of blocks `first_block` to `last_block`, inclusive; what precedes block 0 goes with it."""

    @abstractmethod
    def body_parameters(self) -> list[nn.Parameter]:
        """All parameters but those of the pooling and the head."""

    @abstractmethod
    def rebuild(self) -> nn.Module:
        """A new, ordinary timm model of the same structure, weights and preprocessing."""

    @abstractmethod
    def config(self) -> Mapping[str, Any]:
        """The `config.json` with which `timm.create_model("local-dir:…")` rebuilds the model."""
