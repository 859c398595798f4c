"""The interface through which the algorithm sees a model of any family."""

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
"""A channel whose factor is smaller is switched off, and its weights stay as they are."""


@dataclass(frozen=True)
class OutputLayer:
    """The last layer of a block. With the inputs h of this layer, the block adds factor ⊙ W h + constant to its input.

    Attributes:
        layer: A linear layer or a convolution. Of a convolution, h are the patches of its input.
        scale: The LayerScale after the layer, `[D]`.
        norm: The BatchNorm after the layer; its running statistics are used.
    """

    layer: nn.Linear | nn.Conv2d
    scale: Tensor | None = None
    norm: nn.BatchNorm2d | None = None

    @property
    def factor(self) -> Tensor:
        """The factor of each channel after the layer, `[D]`."""
        if self.norm is not None:
            assert self.norm.running_var is not None
            return self.norm.weight.detach() / (self.norm.running_var + self.norm.eps).sqrt()
        return self.layer.weight.new_ones(len(self.layer.weight)) if self.scale is None else self.scale.detach()

    @property
    def constant(self) -> bool:
        """Whether a parameter (a bias) can hold the constant."""
        return self.norm is not None or self.layer.bias is not None

    @property
    def num_patches(self) -> int:
        """Inputs of the layer per hidden unit: the taps of a convolution's filter, 1 for a linear layer."""
        return math.prod(self.layer.weight.shape[2:])

    def weights(self) -> Tensor:
        """Return factor ⊙ W, transposed: `[K, D]`."""
        return (self.layer.weight.detach().flatten(1) * self.factor[:, None]).T

    @torch.no_grad()
    def set(self, solution: Tensor) -> None:
        """Write a solution into the layer and the norm, in place.

        Args:
            solution: factor ⊙ W, transposed, with the constant as its last row: `[K + 1, D]`.
        """
        layer, norm, factor = self.layer, self.norm, self.factor
        switched_off = factor.abs() <= SMALLEST_FACTOR
        unscaled = solution.to(layer.weight) / torch.where(switched_off, torch.inf, factor)
        weight = torch.where(switched_off[:, None], layer.weight.flatten(1), unscaled[:-1].T)
        layer.weight.copy_(weight.view_as(layer.weight))
        if norm is not None:
            assert norm.running_mean is not None
            before = -norm.running_mean if layer.bias is None else layer.bias - norm.running_mean
            norm.bias.copy_(solution[-1].to(norm.bias) - factor * before)
        elif layer.bias is not None:
            layer.bias.copy_(torch.where(switched_off, layer.bias, unscaled[-1]))


class ModelView(ABC):
    """A model as the algorithm sees it: it reads, changes and rebuilds the structure. Each family has its own subclass.

    Attributes:
        family: The family's name, as in `dcvit.methods`.
        models: The supported models, as text for users.
        classes: The timm classes that the adapter handles.
        source: The papers of the architectures.
        removed: The part that a compressed block loses besides hidden units, such as "attention".
        keeps_ends: Whether the first and the last blocks are left uncompressed unless the caller names them.
        pointwise_units: Whether a hidden unit depends on one token only; a CNN's filters also depend on its neighbours.
        mac_weight: The approximate training time of a MAC, relative to a MAC of a ViT's matrix products.

    `check` is called once, before any work. The other methods may assume that it passed.

    A state is the tensor that one block passes to the next. Its first dimension is the batch: tokens `[B, N, D]` in a
    ViT, `[B, H, W, D]` in a Swin, a feature map `[B, D, H, W]` in a CNN. Each of its positions is a token.
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
        """The exponent β of the total-variation norms in image synthesis: 0.6, as published for ViT."""
        return 0.6

    @abstractmethod
    def check(self) -> None:
        """Refuse a model that cannot be compressed.

        Raises:
            UnsupportedModelError: If a part is not supported; the message names it.
        """

    @abstractmethod
    def input_size(self) -> tuple[int, int, int]:
        """Return channels, height and width of the images that the model takes."""

    @abstractmethod
    def dynamic_input(self) -> bool:
        """Return whether images may have another height and width than `input_size`."""

    @abstractmethod
    def cost(self) -> ModelCost:
        """Return the MACs and parameters of the model, at its own input size, and of each block."""

    @abstractmethod
    def tokens(self, images: Tensor) -> Tensor:
        """Return the output tokens `[B, N, D]`, after the final norm, of images `[B, C, H, W]`."""

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Return the state before the first block, of images `[B, C, H, W]`."""

    @abstractmethod
    def prepare(self, state: Tensor, block: int) -> Tensor:
        """Return the input of a block from the previous block's output; the two differ where a stage begins."""

    @abstractmethod
    def run_blocks(self, state: Tensor, first: int, stop: int) -> Tensor:
        """Run a state through the blocks `first` to `stop - 1`, with `prepare` before each of them."""

    @abstractmethod
    def as_tokens(self, state: Tensor) -> Tensor:
        """Return the tokens `[B, N, D]` of a state."""

    @abstractmethod
    def from_tokens(self, tokens: Tensor) -> Tensor:
        """Return a state of tokens `[B, N, D]`, in any order: a compressed block treats each separately."""

    @abstractmethod
    def num_blocks(self) -> int:
        """Return the number of blocks of the model. The call is cheap."""

    @abstractmethod
    def groups(self) -> Sequence[tuple[int, ...]]:
        """Return all blocks in groups; a group is compressed together, to equal numbers of hidden units."""

    @abstractmethod
    def final_norm(self, state: Tensor) -> Tensor:
        """Return the output tokens `[B, N, D]` from the state after the last block.

        `tokens` equals `embed`, `run_blocks` over all blocks and `final_norm`, so that a part of it can run separately.
        """

    def num_classes(self) -> int:
        """Return the number of classes of the head, 0 for a backbone."""
        return num_classes(self.model)

    @abstractmethod
    def logits(self, tokens: Tensor) -> Tensor:
        """Return class logits `[B, num_classes]` from output tokens, through the pooling and the head."""

    @abstractmethod
    def has_class_token(self) -> bool:
        """Return whether the first output token is a class token."""

    @abstractmethod
    def features(self, tokens: Tensor) -> Tensor:
        """Return the pooled features `[B, D]` of output tokens, the input of the head."""

    @abstractmethod
    def hidden_features(self, block: int) -> int:
        """Return the number of hidden units of a block's MLP."""

    @abstractmethod
    def compress_block(self, block: int, kept: Sequence[int]) -> None:
        """Remove from a block, in place, the part that mixes tokens (its attention) and all hidden units but `kept`."""

    @abstractmethod
    def prune_block(self, block: int, kept: Sequence[int]) -> None:
        """Remove from a block, in place, all hidden units but `kept` and nothing else; see `prune_obstacle`."""

    @abstractmethod
    def prune_obstacle(self, block: int) -> str | None:
        """Return why `prune_block` cannot remove single hidden units of a block, as text after its name, or `None`."""

    @abstractmethod
    def hidden_filters(self, block: int) -> Tensor:
        """Return the weights that compute a block's hidden units, one row for each: `[K, F]`."""

    @abstractmethod
    def hidden_layer(self, block: int) -> nn.Linear | nn.Conv2d:
        """Return the layer whose inputs are the hidden units of a block, compressed or not."""

    @abstractmethod
    def drop_block(self, block: int) -> None:
        """Remove a whole block, in place."""

    @abstractmethod
    def block(self, block: int) -> nn.Module:
        """Return a block's module, which maps a state from `prepare` to a state of the same shape."""

    @abstractmethod
    def sublayers(self, block: int) -> "tuple[Callable[[Tensor], Tensor], nn.Module] | None":
        """Return the attention and the MLP sublayer of a block, each with its residual.

        The first maps the block's input to the state between the two. The second is a module with the block's own
        weights that treats each token separately, as a compressed block does. Return `None` for a block of another
        structure, or one whose MLP has no output layer (see `output_layer`).

        The state between them has the usual shape. Without `pointwise_units` it has more channels: the block's input
        comes first, then the inputs of its output layer, unit by unit.
        """

    @abstractmethod
    def output_layer(self, block: int) -> OutputLayer | None:
        """Return the last layer of a block's MLP, or of a CNN's block.

        Return `None` if the block's output is not its input plus what that layer adds.
        """

    @abstractmethod
    def absorbing_layers(self, block: int) -> tuple[nn.Conv2d | None, nn.Conv2d | None]:
        """Return the convolutions before and after a dropped block that can absorb a linear map of channels.

        The convolution before the block absorbs the map on its output, the one after the block on its input. An entry
        is `None` if there is no such convolution, as in a transformer, whose blocks begin with a norm.
        """

    @abstractmethod
    def parameters(self, first_block: int, last_block: int) -> list[nn.Parameter]:
        """Return the parameters of blocks `first_block` to `last_block`, inclusive; block 0 includes the stem."""

    @abstractmethod
    def body_parameters(self) -> list[nn.Parameter]:
        """Return all parameters but those of the pooling and the head."""

    @abstractmethod
    def rebuild(self) -> nn.Module:
        """Return a new, ordinary timm model of the same structure, weights and preprocessing."""

    @abstractmethod
    def config(self) -> Mapping[str, Any]:
        """Return the `config.json` from which `timm.create_model("local-dir:…")` rebuilds the model."""
