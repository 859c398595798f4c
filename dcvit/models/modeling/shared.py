# SPDX-License-Identifier: Apache-2.0
"""Parts of compressed models that several families share, and checks of the files that describe them.

`dcvit.models.standalone` turns this package into the single file of a saved folder.
"""

import copy
import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import timm
import torch
from timm.layers import (
    GluMlp,
    LayerNorm,
    LayerNormFp32,
    LayerScale,
    QuickGELU,
    RmsNorm,
    RmsNormFp32,
    SimpleNorm,
    SimpleNormFp32,
    SwiGLU,
)
from timm.layers.activations import GELU, GELUTanh
from timm.models.eva import EvaBlockPostNorm
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

__all__ = [
    "ACTIVATIONS",
    "NORMS",
    "POST_NORM",
    "CompressedBlock",
    "DroppedBlock",
    "TimmModule",
    "compress_blocks",
    "create_base",
    "keep_hidden_units",
    "layer_scale",
    "linear_columns",
    "linear_rows",
    "norm_channels",
    "norm_from",
    "parameter_names",
    "require_arguments",
    "require_base",
    "shape_arguments",
]

LARGEST_ARGUMENT = 1 << 16
"""The largest number accepted as an argument; no size in timm's architectures is larger."""


TimmModule: TypeAlias = Any
"""A timm module, whose attributes have no static types."""


# Keys that `config.json` uses.
NORMS: dict[str, type[nn.Module]] = {
    "layernorm": LayerNorm,
    "layernormfp32": LayerNormFp32,
    "rmsnorm": RmsNorm,
    "rmsnormfp32": RmsNormFp32,
    "simplenorm": SimpleNorm,
    "simplenormfp32": SimpleNormFp32,
    "torch_layernorm": nn.LayerNorm,
}


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "timm_gelu": GELU,
    "gelu_tanh": GELUTanh,
    "quick_gelu": QuickGELU,
    "silu": nn.SiLU,
    "relu": nn.ReLU,
}


POST_NORM = (ResPostBlock, SwinTransformerV2Block, EvaBlockPostNorm)
"""Blocks whose norms follow attention and MLP."""


class CompressedBlock(nn.Module):
    """A transformer block without attention, x + ls2(mlp(norm2(x))), with timm's parameter names.

    Args:
        block: A timm `Block`, `ResPostBlock`, or block of a Swin, an Eva or a Beit. Its MLP branch is reused and not
            copied.
    """

    def __init__(self, block: TimmModule) -> None:
        super().__init__()
        self.post_norm = isinstance(block, POST_NORM)
        self.norm2 = block.norm2
        self.mlp = block.mlp
        self.ls2 = layer_scale(block)
        self.drop_path2 = block.drop_path2

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        rope: Tensor | None = None,
        shared_rel_pos_bias: Tensor | None = None,
    ) -> Tensor:
        """Map tokens to tokens of the same shape; the attention arguments of timm's blocks are ignored.

        They are listed, because TorchScript does not know `**arguments`.
        """
        branch: Tensor = self.norm2(self.mlp(x)) if self.post_norm else self.ls2(self.mlp(self.norm2(x)))
        return x + self.drop_path2(branch)

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: a Swin sets its blocks' image size, which matters only for windows."""


def layer_scale(block: TimmModule) -> nn.Module:
    """Return the LayerScale after a block's MLP; timm's Eva and Beit have only a parameter instead."""
    if (gamma := getattr(block, "gamma_2", None)) is None:
        found: nn.Module = getattr(block, "ls2", nn.Identity())
        return found
    scale = LayerScale(len(gamma))
    scale.gamma = gamma
    return scale


class DroppedBlock(nn.Module):
    """The replacement of a dropped block: its output is its input."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        rope: Tensor | None = None,
        shared_rel_pos_bias: Tensor | None = None,
    ) -> Tensor:
        """Return the tokens unchanged; the attention arguments of timm's blocks are ignored."""
        return x

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: a Swin sets its blocks' image size, which matters only for windows."""


def require_base(base: Any, base_args: Any, files: Collection[str]) -> None:
    """Refuse a timm architecture from a `config.json`, unless the values can only build a model.

    `timm.create_model` also accepts a folder or a repository as a name, and arguments that read, download or cache
    files.

    Args:
        base: The name of the architecture.
        base_args: Arguments of the architecture.
        files: The timm modules that may define it.

    Raises:
        ValueError: If these modules do not define it, or an argument does not shape a model.
    """
    name = base if isinstance(base, str) and base.isidentifier() and timm.is_model(base) else None
    if name is None or timm.model_entrypoint(name).__module__ not in files:
        raise ValueError(
            f"base={base!r}: expected the name of an architecture of {', '.join(files)}, as timm.list_models() has it."
        )
    require_arguments("base_args", base_args, shape_arguments(name))


def shape_arguments(architecture: str) -> set[str]:
    """Return the arguments of a timm architecture that shape it: those of the module classes in its file.

    Arguments of `timm.create_model` itself, such as the source of weights and the cache folder, are not included.
    """
    file = sys.modules[timm.model_entrypoint(architecture).__module__]
    classes = [value for value in vars(file).values() if isinstance(value, type) and issubclass(value, nn.Module)]
    return parameter_names(base for value in classes for base in value.__mro__ if "timm.models" in base.__module__)


def parameter_names(makers: Iterable[Callable[..., Any]]) -> set[str]:
    """Return the names of the arguments of functions or classes, except `device` and `dtype`."""
    return {name for maker in makers for name in inspect.signature(maker).parameters} - {"device", "dtype"}


def require_arguments(where: str, args: Any, names: Collection[str]) -> None:
    """Refuse arguments from a file that could do more than shape a model.

    Args:
        where: The name of the table in the file.
        args: The arguments by name.
        names: The names that are allowed.

    Raises:
        ValueError: If a name is not allowed, or a value is not a number, a word or a list of these; the message names
            the first such argument.
    """
    if not isinstance(args, Mapping):
        raise ValueError(f"{where}={args!r}: expected a table of arguments.")
    for name, value in args.items():
        if name not in names:
            raise ValueError(f"{where} has {name!r}, which is not among the arguments that shape a model of its kind.")
        if not _is_plain(value):
            raise ValueError(
                f"{where} has {name}={value!r}: expected a word, a number of at most {LARGEST_ARGUMENT}, or a list of "
                "these."
            )


def _is_plain(value: Any, nested: int = 2) -> bool:
    if isinstance(value, (list, tuple)):
        return nested > 0 and all(_is_plain(item, nested - 1) for item in value)
    if isinstance(value, (int, float)):
        return abs(value) <= LARGEST_ARGUMENT  # false for NaN
    return value is None or value == "" or (isinstance(value, str) and value.isidentifier())


def create_base(
    base: str, base_args: Mapping[str, Any], files: Collection[str], more: Mapping[str, Any], **read: Any
) -> TimmModule:
    """Create an uncompressed timm model that records how it was created.

    Args:
        base: The name of its architecture.
        base_args: Arguments that cannot be read off a model.
        files: The timm modules that may define it.
        more: Arguments that are not recorded: drop rates.
        read: Arguments that can be read off a model.
    """
    require_base(base, {**base_args, **more}, files)
    model: TimmModule = timm.create_model(base, pretrained=False, **read, **base_args, **more)
    model.dcvit_base = {"base": base, "base_args": dict(base_args)}
    return model


def compress_blocks(
    locations: Sequence[tuple[TimmModule, int]],
    per_layer_config: Mapping[str, Mapping[str, Any]],
) -> None:
    """Compress transformer blocks, in place, as `per_layer_config` describes.

    Args:
        locations: The list that holds each block, and the block's index in it, in the order of the blocks.
        per_layer_config: Settings by the number of a block: `skip` lists the parts that it lacks, and
            `intermediate_size` is its number of hidden units.
    """
    for number, settings in per_layer_config.items():
        blocks, index = locations[int(number)]
        if "mlp" in settings["skip"]:
            blocks[index] = DroppedBlock()
            continue
        keep_hidden_units(blocks[index].mlp, torch.arange(settings["intermediate_size"]))
        if "attention" in settings["skip"]:
            blocks[index] = CompressedBlock(blocks[index])


@torch.no_grad()
def keep_hidden_units(mlp: TimmModule, kept: Tensor) -> None:
    """Keep only some hidden units of an MLP, in place.

    Args:
        mlp: An MLP of one of the types in `MLPS`.
        kept: The numbers `[K]` of the hidden units to keep, in their new order.
    """
    hidden = mlp.fc2.in_features
    kept = kept.to(mlp.fc2.weight.device)
    if type(mlp) is GluMlp:
        mlp.fc1 = linear_rows(mlp.fc1, torch.cat([kept, kept + hidden]))
    elif type(mlp) is SwiGLU:
        mlp.fc1_g, mlp.fc1_x = linear_rows(mlp.fc1_g, kept), linear_rows(mlp.fc1_x, kept)
    else:
        mlp.fc1 = linear_rows(mlp.fc1, kept)
    if not isinstance(mlp.norm, nn.Identity):
        mlp.norm = norm_channels(mlp.norm, kept)
    mlp.fc2 = linear_columns(mlp.fc2, kept)


def norm_from(spec: Mapping[str, Any]) -> Any:
    """Return a constructor of the norm that a `config.json` describes, which takes the width."""
    return partial(NORMS[spec["type"]], eps=spec["eps"])


def linear_rows(layer: nn.Linear, rows: Tensor) -> nn.Linear:
    """Return a copy of a linear layer with some of its outputs."""
    kept = copy.deepcopy(layer)
    kept.out_features = len(rows)
    kept.weight = nn.Parameter(layer.weight[rows], requires_grad=layer.weight.requires_grad)
    if layer.bias is not None:
        kept.bias = nn.Parameter(layer.bias[rows], requires_grad=layer.bias.requires_grad)
    return kept


def linear_columns(layer: nn.Linear, columns: Tensor) -> nn.Linear:
    """Return a copy of a linear layer with some of its inputs."""
    kept = copy.deepcopy(layer)
    kept.in_features = len(columns)
    kept.weight = nn.Parameter(layer.weight[:, columns].contiguous(), requires_grad=layer.weight.requires_grad)
    return kept


def norm_channels(norm: TimmModule, channels: Tensor) -> nn.Module:
    """Return a copy of a norm with some of its channels."""
    if len(channels) == 0:
        return nn.Identity()
    kept: TimmModule = copy.deepcopy(norm)
    kept.normalized_shape = (len(channels),)
    for name, parameter in norm.named_parameters(recurse=False):
        setattr(kept, name, nn.Parameter(parameter[channels], requires_grad=parameter.requires_grad))
    return kept
