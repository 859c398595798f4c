# SPDX-License-Identifier: Apache-2.0
"""CNNs of residual blocks that dcvit compressed; this file needs only torch and timm."""

import copy
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.layers import BatchNormAct2d
from timm.models import build_model_with_cfg, register_model, regnet, resnet
from timm.models._efficientnet_blocks import EdgeResidual, InvertedResidual, SqueezeExcite
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn

from dcvit.models.modeling.shared import DroppedBlock, TimmModule, create_base, require_arguments

__all__ = [
    "ARCHITECTURE",
    "FILES",
    "STEM",
    "Pointwise",
    "PointwiseBlock",
    "build",
    "change_stem",
    "cnn_places",
    "cnn_stages",
    "create",
    "dcvit_residual_cnn",
    "expansion",
    "filter_path",
    "first_layers",
    "keep_filters",
    "last_activation",
    "prune_cnn",
    "stem_layers",
]

ARCHITECTURE = "dcvit_residual_cnn"
"""The name under which timm's registry knows compressed CNNs."""


FILES = ("timm.models.resnet", "timm.models.efficientnet", "timm.models.regnet")
"""timm's modules that define the architectures of compressed CNNs."""


STEM = ("kernel_size", "stride", "padding", "bias")
"""The settings in `config.json` of a first convolution that differs from the architecture's."""


class Pointwise(nn.Conv2d):
    """A 1×1 convolution with bias that may have zero input or output channels."""

    bias: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, H, W]` to `[B, K, H, W]`."""
        batch, _, height, width = x.shape
        if self.out_channels == 0:
            return x.new_empty((batch, 0, height, width))
        if self.in_channels == 0:
            return self.bias.view(-1, 1, 1).expand(batch, -1, height, width)
        return nn.functional.conv2d(x, self.weight, self.bias)


class PointwiseBlock(nn.Module):
    """A residual block that treats each position separately: act2(x + conv2(act1(conv1(x)))), both convolutions 1×1.

    `conv1` is the block's own first convolution, with the taps of each filter summed and its norm folded in. Its
    channels are the hidden units. `conv2` starts at zero and replaces all layers after `conv1`.

    Args:
        block: A residual block of timm's, see `expansion`. It is not changed.
    """

    def __init__(self, block: TimmModule) -> None:
        super().__init__()
        conv, norm, act = expansion(block)
        weight = conv.weight
        with torch.no_grad():
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            shift = norm.bias - norm.running_mean * scale
            if conv.bias is not None:
                shift = shift + conv.bias * scale
            self.conv1 = Pointwise(conv.in_channels, conv.out_channels, 1).to(weight)
            self.conv1.weight.copy_(weight.sum(dim=(2, 3), keepdim=True) * scale.view(-1, 1, 1, 1))
            self.conv1.bias.copy_(shift)
            self.conv2 = Pointwise(conv.out_channels, conv.in_channels, 1).to(weight)
            self.conv2.weight.zero_()
            self.conv2.bias.zero_()
        self.act1 = copy.deepcopy(act)
        if hasattr(self.act1, "inplace"):
            self.act1.inplace = False  # torch forbids in-place changes of the output of a module with a backward hook
        name = last_activation(block)
        self.act2 = nn.Identity() if name is None else copy.deepcopy(getattr(block, name))
        self.requires_grad_(weight.requires_grad).train(block.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, D, H, W]` to the same shape."""
        return self.act2(x + self.conv2(self.act1(self.conv1(x))))


def build(
    *,
    base: str,
    base_args: Mapping[str, Any],
    num_classes: int,
    in_chans: int,
    global_pool: str,
    per_layer_config: Mapping[str, Mapping[str, Any]],
    stem: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build the CNN that the `model_args` of a `config.json` describe, freshly initialised.

    Args:
        base: The timm architecture that was compressed.
        base_args: More arguments of that architecture.
        num_classes: Classes of the head.
        in_chans: Channels of the images.
        global_pool: The type of pooling.
        per_layer_config: Settings by the number of a residual block (see `cnn_places`). `skip` lists `block`,
            `convolution`, or nothing if only filters were removed. `intermediate_size` is the number of filters left.
        stem: Settings of the stem that differ from the architecture, as for small images; see `change_stem`.
        kwargs: Drop rates, which timm's scripts pass.
    """
    model = create_base(
        base, base_args, FILES, kwargs, num_classes=num_classes, in_chans=in_chans, global_pool=global_pool
    )
    change_stem(model, stem or {})
    prune_cnn(model, per_layer_config)
    return model


def change_stem(model: nn.Module, stem: Mapping[str, Any]) -> None:
    """Replace a CNN's first convolution, or remove the pooling after it, in place.

    Args:
        model: The CNN.
        stem: `kernel_size`, `stride`, `padding` and `bias` of the new convolution, or none of these; `pool`, which is
            `False` if the pooling is removed.
    """
    require_arguments("stem", stem, {*STEM, "pool"})
    if not stem.get("pool", True):
        model.maxpool = nn.Identity()
    if settings := {name: stem[name] for name in STEM if name in stem}:
        holder, name, norm = stem_layers(model)
        first = next(part for part in getattr(holder, name).modules() if isinstance(part, nn.Conv2d))
        made = nn.Conv2d(first.in_channels, len(norm.weight), **settings)
        setattr(holder, name, made.to(first.weight))


def stem_layers(model: TimmModule) -> tuple[TimmModule, str, TimmModule]:
    """Return the module that holds a CNN's first convolution, the convolution's name in it, and the norm after it."""
    if isinstance(model, resnet.ResNet):
        return model, "conv1", model.bn1
    return (model, "conv_stem", model.bn1) if isinstance(model, EfficientNet) else (model.stem, "conv", model.stem.bn)


def prune_cnn(model: nn.Module, per_layer_config: Mapping[str, Mapping[str, Any]]) -> None:
    """Compress a CNN's blocks, in place, as `per_layer_config` describes; see `build`."""
    locations = cnn_places(model)
    for number, settings in per_layer_config.items():
        stage, name = locations[int(number)]
        if "block" in settings["skip"]:
            setattr(stage, name, DroppedBlock())
            continue
        if "convolution" in settings["skip"]:
            setattr(stage, name, PointwiseBlock(getattr(stage, name)))
        keep_filters(getattr(stage, name), torch.arange(settings["intermediate_size"]))


def cnn_stages(model: TimmModule) -> list[TimmModule]:
    """Return the stages, which are sequences of blocks, of a ResNet, EfficientNet or RegNet."""
    if isinstance(model, EfficientNet):
        return list(model.blocks)
    prefix = "layer" if isinstance(model, resnet.ResNet) else "s"
    return [
        stage for name, stage in model.named_children() if name.startswith(prefix) and name[len(prefix) :].isdigit()
    ]


def cnn_places(model: TimmModule) -> list[tuple[TimmModule, str]]:
    """Return the stage and the name in it of each residual block. Other blocks are not numbered."""
    return [
        (stage, name)
        for stage in cnn_stages(model)
        for name, block in stage.named_children()
        if isinstance(block, (PointwiseBlock, DroppedBlock)) or expansion(block) is not None
    ]


def expansion(block: TimmModule) -> Any:
    """Return the first convolution of a residual block, with the norm and the activation after it.

    Return `None` unless the block adds to its input, and the convolution has one group and a plain BatchNorm.
    """
    found = first_layers(block)
    if found is None:
        return None
    if type(block) in (resnet.BasicBlock, resnet.Bottleneck):
        adds = block.downsample is None and block.stride == 1
    elif type(block) is regnet.Bottleneck:
        adds = isinstance(block.downsample, nn.Identity)
    else:
        adds = block.has_skip and getattr(block, "conv_s2d", None) is None
    conv, norm, _ = found
    plain = type(norm) in (nn.BatchNorm2d, BatchNormAct2d) and isinstance(conv, nn.Conv2d)
    return found if adds and plain and conv.groups == 1 else None


def first_layers(block: TimmModule) -> tuple[TimmModule, TimmModule, TimmModule] | None:
    """Return a block's first convolution, and the norm and activation after it; `None` for other kinds of blocks."""
    if type(block) in (resnet.BasicBlock, resnet.Bottleneck):
        return block.conv1, block.bn1, block.act1
    if type(block) is InvertedResidual:
        return block.conv_pw, block.bn1, getattr(block.bn1, "act", None)
    if type(block) is EdgeResidual:
        return block.conv_exp, block.bn1, getattr(block.bn1, "act", None)
    if type(block) is regnet.Bottleneck:
        return block.conv1.conv, block.conv1.bn, getattr(block.conv1.bn, "act", None)
    return None


def last_activation(block: TimmModule) -> str | None:
    """Return the name of the activation after a residual block's sum; `None` if there is none."""
    if type(block) in (resnet.Bottleneck, regnet.Bottleneck):
        return "act3"
    return "act2" if type(block) in (resnet.BasicBlock, PointwiseBlock) else None


def filter_path(block: TimmModule) -> list[tuple[TimmModule, int]]:
    """Return the layers of a residual block that hold its hidden filters.

    The hidden filters are those of the first convolution. In a bottleneck they are those of the second convolution,
    whose outputs a 1×1 convolution takes.

    Args:
        block: A residual block, see `expansion`, or a `PointwiseBlock`.

    Returns:
        The layers from the convolution with the filters to the one that takes their outputs. Each comes with the
        dimension of its weight that indexes the filters.
    """
    if isinstance(block, PointwiseBlock):
        return [(block.conv1, 0), (block.conv2, 1)]
    conv, norm, _ = expansion(block)
    path = [(conv, 0), (norm, 0)]
    if type(block) is resnet.BasicBlock:
        return [*path, (block.conv2, 1)]
    if type(block) is resnet.Bottleneck:
        return [(block.conv2, 0), (block.bn2, 0), (block.conv3, 1)]
    last = block.conv_pwl if hasattr(block, "conv_pwl") else block.conv3.conv
    if type(block) is regnet.Bottleneck:
        path = [(block.conv2.conv, 0), (block.conv2.bn, 0)]
    elif type(block) is InvertedResidual:
        path += [(block.conv_dw, 0), (block.bn2, 0)]
    if type(block.se) is SqueezeExcite:
        path += [(block.se.conv_reduce, 1), (block.se.conv_expand, 0)]
    elif type(block.se) is not nn.Identity:
        path.append((block.se, 0))
    return [*path, (last, 1)]


@torch.no_grad()
def keep_filters(block: TimmModule, kept: Tensor) -> None:
    """Keep only some hidden filters of a block, in place.

    Args:
        block: The block. Each layer of its `filter_path` is a BatchNorm, or a convolution with one group or depthwise.
        kept: The numbers `[K]` of the filters to keep, in their new order.
    """
    for layer, dim in filter_path(block):
        for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
            if tensor.ndim <= dim:  # the bias of the last layer; a BatchNorm's batch count
                continue
            values = tensor.index_select(dim, kept.to(tensor.device))
            is_parameter = isinstance(tensor, nn.Parameter)
            setattr(layer, name, nn.Parameter(values, requires_grad=tensor.requires_grad) if is_parameter else values)
        if not isinstance(layer, nn.Conv2d):
            layer.num_features = len(kept)
        elif dim == 1:
            layer.in_channels = len(kept)
        else:
            layer.out_channels = len(kept)
            if layer.groups > 1:
                layer.in_channels = layer.groups = len(kept)


def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build a CNN as timm builds its own models, with weights if `pretrained`; the other arguments are `build`'s."""
    return build_model_with_cfg(
        build,
        ARCHITECTURE,
        pretrained,
        pretrained_strict=True,
        feature_cfg={"out_indices": (0, 1, 2, 3, 4), "flatten_sequential": kwargs["base"].startswith("reg")},
        **kwargs,
    )


def dcvit_residual_cnn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create a compressed CNN: timm's entry point, whose arguments come from `config.json`."""
    return create(pretrained, **kwargs)


# dcvit's own module always registers it, because a saved folder's file may have registered a version with fewer parts.
if __package__ or not timm.is_model(ARCHITECTURE):
    register_model(dcvit_residual_cnn)
