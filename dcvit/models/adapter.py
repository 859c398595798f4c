"""What the algorithm needs to know of a model family."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dcvit.costs import ModelCost
from dcvit.errors import UnsupportedModelError

__all__ = ["ModelAdapter", "OutputLayer", "adapter_for", "adapters", "require_supported"]

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
        """Inputs of the layer for each node that it takes: the taps of a convolution's filter."""
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


class ModelAdapter(Protocol):
    """A model family: how to read a model's structure, change it, and rebuild it.

    Attributes:
        family: Its name, as the methods of `dcvit.methods` have it.
        models: What it is of, in words.
        classes: Timm's classes that it handles.
        source: The papers of the architecture.
        removed: What a compressed block loses beside hidden nodes, in a word.
        keeps_ends: Whether the first and the last blocks stay whole unless the caller names them.
        pointwise_nodes: Whether a block's hidden nodes look at each token alone; in a CNN filters look around.
        mac_weight: How long a MAC takes in training, about, in those of a ViT's matrix products.

    All methods are stateless. `check` is called once, before any work; the others may assume that it passed.

    What runs from block to block is a state, a tensor whose first dimension is the batch: tokens `[B, N, D]` in a ViT,
    `[B, H, W, D]` in a Swin, a feature map `[B, D, H, W]` in a CNN. Each of its positions is a token.
    """

    family: str
    models: str
    classes: tuple[type[nn.Module], ...]
    source: str
    removed: str
    keeps_ends: bool
    pointwise_nodes: bool
    mac_weight: float

    def check(self, model: nn.Module) -> None:
        """Refuse a model that cannot be compressed.

        Raises:
            UnsupportedModelError: Naming the part that is not handled.
        """

    def input_size(self, model: nn.Module) -> tuple[int, int, int]:
        """Channels, height and width of the images that the model takes."""

    def dynamic_input(self, model: nn.Module) -> bool:
        """Whether images may have another height and width than `input_size`."""

    def cost(self, model: nn.Module) -> ModelCost:
        """MACs and parameters of the model at its own input size, and of each block."""

    def tokens(self, model: nn.Module, images: Tensor) -> Tensor:
        """Output tokens `[B, N, D]` after the final norm, for images `[B, C, H, W]`."""

    def embed(self, model: nn.Module, images: Tensor) -> Tensor:
        """The state that precedes the first block, for images `[B, C, H, W]`."""

    def prepare(self, model: nn.Module, state: Tensor, block: int) -> Tensor:
        """What a block takes, from the state that the one before it gave; other than that where a stage begins."""

    def run_blocks(self, model: nn.Module, state: Tensor, first: int, stop: int) -> Tensor:
        """A state through the blocks `first` to `stop - 1`, each with what `prepare` does before it."""

    def as_tokens(self, state: Tensor) -> Tensor:
        """The tokens `[B, N, D]` of a state."""

    def from_tokens(self, tokens: Tensor) -> Tensor:
        """A state of tokens `[B, N, D]`, in any arrangement; a compressed block takes each of them alone."""

    def num_blocks(self, model: nn.Module) -> int:
        """Blocks of the model. Cheap."""

    def groups(self, model: nn.Module) -> Sequence[tuple[int, ...]]:
        """All blocks, those together that are compressed together, to equal numbers of hidden nodes."""

    def final_norm(self, model: nn.Module, state: Tensor) -> Tensor:
        """Output tokens `[B, N, D]` from the state that the last block gave.

        `tokens` is `embed`, `run_blocks` over all blocks and `final_norm`, so that a part of it can be run alone.
        """

    def num_classes(self, model: nn.Module) -> int:
        """Classes of the head, 0 for a backbone."""

    def logits(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """Class logits `[B, num_classes]` from output tokens, through the pooling and the head."""

    def has_class_token(self, model: nn.Module) -> bool:
        """Whether the first of the output tokens is a class token."""

    def features(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """Pooled features `[B, D]` from output tokens, the input of the head."""

    def hidden_features(self, model: nn.Module, block: int) -> int:
        """Hidden nodes of a block's MLP."""

    def compress_block(self, model: nn.Module, block: int, kept: Sequence[int]) -> None:
        """In place: remove what mixes the tokens of a block, such as its attention, and all hidden nodes but `kept`."""

    def prune_block(self, model: nn.Module, block: int, kept: Sequence[int]) -> None:
        """In place: remove all hidden nodes of a block but `kept`, and nothing else; see `prune_obstacle`."""

    def prune_obstacle(self, model: nn.Module, block: int) -> str | None:
        """What keeps `prune_block` from removing single hidden nodes of a block, as words behind its name, if any."""

    def hidden_filters(self, model: nn.Module, block: int) -> Tensor:
        """The weights that make the hidden nodes of a block, a row each: `[K, F]`."""

    def hidden_layer(self, model: nn.Module, block: int) -> nn.Linear | nn.Conv2d:
        """The layer that takes the hidden nodes of a block, compressed or not."""

    def fuse(self, model: nn.Module) -> None:
        """In place: compute with dcvit's ops what they can compute of blocks that stay whole.

        Outputs change by rounding, names and weights not at all.
        """

    def drop_block(self, model: nn.Module, block: int) -> None:
        """In place: remove a block altogether."""

    def block(self, model: nn.Module, block: int) -> nn.Module:
        """A block's module, from a state that `prepare` made to a state of the same shape."""

    def halves(self, model: nn.Module, block: int) -> "tuple[Callable[[Tensor], Tensor], nn.Module] | None":
        """Attention and MLP of a block that has both, one behind the other and each with its residual.

        The first takes a state and gives the one between the two; the second is a module with the block's own weights,
        which treats each token alone, as a compressed block does. `None` where a block is made otherwise, or where its
        MLP has no output layer (see `output_layer`).

        The state between the two is one like others; without `pointwise_nodes` it holds more channels: first those of
        the block's input, then the inputs of its output layer, node by node.
        """

    def output_layer(self, model: nn.Module, block: int) -> OutputLayer | None:
        """The last layer of a block's MLP, or of a CNN's block.

        `None` where the output is not the input plus what that layer adds.
        """

    def absorbing_layers(self, model: nn.Module, block: int) -> tuple[nn.Conv2d | None, nn.Conv2d | None]:
        """The convolutions next to a dropped block that can absorb a linear map of channels.

        The last one before it takes the map on its output, the first one behind it on its input; `None` where there is
        no such convolution, as in a transformer, whose blocks begin with a norm.
        """

    def parameters(self, model: nn.Module, first_block: int, last_block: int) -> list[nn.Parameter]:
        """The parameters of blocks `first_block` to `last_block`, inclusive; what precedes block 0 goes with it."""

    def body_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """All parameters but those of the pooling and the head."""

    def rebuild(self, model: nn.Module) -> nn.Module:
        """A new, ordinary timm model of the same structure, weights and preprocessing."""

    def config(self, model: nn.Module) -> Mapping[str, Any]:
        """The `config.json` with which `timm.create_model("local-dir:…")` rebuilds the model."""


def adapter_for(model: nn.Module) -> ModelAdapter:
    """The adapter of a model's family. Cheap; it does not look inside the model.

    Raises:
        UnsupportedModelError: If no family fits.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"model={model!r} is a {type(model).__name__}: expected a timm model, or a name that timm knows."
        )
    for adapter in adapters():
        if isinstance(model, adapter.classes):
            return adapter
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    known = ", ".join(f"{one.__name__}" for adapter in adapters() for one in adapter.classes)
    raise UnsupportedModelError(
        f"Models of type {kind} are not supported; timm's {known} are (`dcvit families` lists the families). "
        "Another family needs an adapter in dcvit/models/ (see ModelAdapter)."
    )


def adapters() -> tuple[ModelAdapter, ...]:
    """One adapter for each family."""
    from dcvit.models.eva import EvaAdapter
    from dcvit.models.residual_cnn import ResidualCnnAdapter
    from dcvit.models.swin import SwinAdapter
    from dcvit.models.vision_transformer import VisionTransformerAdapter

    return VisionTransformerAdapter(), EvaAdapter(), SwinAdapter(), ResidualCnnAdapter()


def require_supported(model: nn.Module) -> ModelAdapter:
    """The adapter of a model, after looking for anything in it that cannot be handled.

    Raises:
        UnsupportedModelError: Naming the part: its type, a dtype other than float32 or float64, a device that is
            neither CPU nor CUDA, or more than one of them.
    """
    adapter = adapter_for(model)
    tensors = [*model.parameters(), *model.buffers()]
    places = {(tensor.dtype, tensor.device) for tensor in tensors if tensor.is_floating_point()}
    if len(places) > 1:
        listed = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in places))
        raise UnsupportedModelError(f"The model's parameters are {listed}: move them to one dtype and device.")
    ((dtype, device),) = places
    if device.type == "meta":
        raise UnsupportedModelError("The model is on the meta device, without weights: load it on a CPU or a GPU.")
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedModelError(
            f"The model is on {device}: compression runs on a CPU or a CUDA GPU, move it there."
        )
    if dtype not in (torch.float32, torch.float64):
        raise UnsupportedModelError(
            f"The model's parameters are {dtype}: recovery needs full precision, call model.float() first "
            "(the compressed model can be cast back)."
        )
    adapter.check(model)
    return adapter
