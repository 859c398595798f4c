"""timm's `ResNet`, `EfficientNet` and `RegNet`: CNNs of residual blocks.

Only blocks that add to their input are numbered, because only they can be removed. The stem and blocks that change the
shape belong to the numbered block after them. DC-ViT drops residual blocks whole (arXiv 2403.18708). Here they are
compressed as densely as a transformer's blocks: the spatial convolution is removed, like attention there, and the rest
treats each position separately, x + W₂ act(W₁ x + b₁) + b₂, with as many hidden units as the budget allows
(`PointwiseBlock`). A pruned block keeps all its layers. Its hidden units are filters, which are removed together with
their channels in all layers up to the one that takes them as inputs (`filter_path`).

If an activation follows the sum, as in a ResNet, a state is the sum before the activation. What a block adds is then
linear in its last layer, and the activation is counted as lying between two blocks.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import regnet, resnet
from timm.models._efficientnet_blocks import EdgeResidual, InvertedResidual, SqueezeExcite
from timm.models.efficientnet import EfficientNet
from timm.models.regnet import RegNet
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dcvit.costs import BlockCost, Cost, ModelCost, linear_cost
from dcvit.errors import UnsupportedModelError
from dcvit.models.base import ModelView, OutputLayer
from dcvit.models.building import without_values
from dcvit.models.modeling.cnn import (
    ARCHITECTURE,
    FILES,
    PointwiseBlock,
    build,
    change_stem,
    cnn_places,
    cnn_stages,
    expansion,
    filter_path,
    first_layers,
    keep_filters,
    last_activation,
    prune_cnn,
    stem_layers,
)
from dcvit.models.modeling.shared import DroppedBlock, TimmModule
from dcvit.models.rebuild import (
    ANOTHER_MODEL,
    base_of,
    num_params,
    rebuilt,
    require_class,
    require_same,
    saved_config,
)

__all__ = ["CnnView"]

_LAST_CONVOLUTION: dict[type, str] = {
    resnet.BasicBlock: "conv2",
    resnet.Bottleneck: "conv3",
    InvertedResidual: "conv_pwl",
    EdgeResidual: "conv_pwl",
    regnet.Bottleneck: "conv3.conv",
}


_LAST_NORM: dict[type, str] = {
    resnet.BasicBlock: "bn2",
    resnet.Bottleneck: "bn3",
    InvertedResidual: "bn3",
    EdgeResidual: "bn2",
}


class CnnView(ModelView):
    """timm's `ResNet`, `EfficientNet` and `RegNet`. A state is a feature map `[B, D, H, W]`.

    Modifications:
        - a compressed block becomes a `PointwiseBlock`;
        - a pruned block loses filters, with their channels up to the layer that takes them as inputs;
        - a dropped block becomes a `DroppedBlock`;
        - everything else stays, including the statistics of every BatchNorm.
    """

    family = "cnn"
    models = "ResNet, ResNeXt, MobileNetV2, EfficientNet, RegNet"
    classes: tuple[type[nn.Module], ...] = (ResNet, EfficientNet, RegNet)
    source = "arXiv 1512.03385, 1611.05431, 1801.04381, 1905.11946, 2003.13678"
    removed = "convolution"
    keeps_ends = False
    pointwise_units = False
    mac_weight = 3.0  # depthwise convolutions: MobileNetV2, on one core of an AMD EPYC

    def check(self) -> None:
        require_class(self.model, self.classes)
        if not _pool_type(self.model):
            raise UnsupportedModelError(
                "The model has no pooling (global_pool=''): give it one, "
                "model.reset_classifier(num_classes, global_pool='avg')."
            )
        if not cnn_places(self.model):
            blocks = [block for stage in cnn_stages(self.model) for block in stage.children()]
            kinds = sorted({type(block).__qualname__ for block in blocks})
            norms = sorted({type(found[1]).__qualname__ for block in blocks if (found := first_layers(block))})
            raise UnsupportedModelError(
                f"None of the model's blocks ({', '.join(kinds)}) is a residual block with BatchNorm2d, which is what "
                f"dcvit compresses; their norms are {', '.join(norms) or 'unknown'}. Put a BatchNorm2d with the "
                f"same weights and statistics there if the norm computes the same. {ANOTHER_MODEL}"
            )
        self._model_args()

    def input_size(self) -> tuple[int, int, int]:
        """Return the size in `model.pretrained_cfg`; no module stores it."""
        channels, height, width = self.model.pretrained_cfg["input_size"]
        return int(channels), int(height), int(width)

    def dynamic_input(self) -> bool:
        return True

    def tokens(self, images: Tensor) -> Tensor:
        return self.as_tokens(self.model.forward_features(images))

    def embed(self, images: Tensor) -> Tensor:
        return _through(_stem(self.model), images)

    def prepare(self, state: Tensor, block: int) -> Tensor:
        """Apply the previous block's activation, and the blocks between that change the shape."""
        return _through(_between(self.model)[block], state)

    def run_blocks(self, state: Tensor, first: int, stop: int) -> Tensor:
        between = _between(self.model)
        for block in range(first, stop):
            state = self.block(block)(_through(between[block], state))
        return state

    def as_tokens(self, state: Tensor) -> Tensor:
        return state.flatten(2).transpose(1, 2)

    def from_tokens(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2).unsqueeze(-1)

    def num_blocks(self) -> int:
        return len(cnn_places(self.model))

    def groups(self) -> Sequence[tuple[int, ...]]:
        return [(block,) for block in range(self.num_blocks())]

    def final_norm(self, state: Tensor) -> Tensor:
        """Apply all layers from the last numbered block to the pooling."""
        behind = _between(self.model)[-1]
        if isinstance(self.model, EfficientNet):
            behind += [self.model.conv_head, self.model.bn2]
        elif isinstance(self.model, RegNet):
            behind.append(self.model.final_conv)
        return self.as_tokens(_through(behind, state))

    def logits(self, tokens: Tensor) -> Tensor:
        # The pooling does not depend on the order of the tokens.
        return self.model.forward_head(self.from_tokens(tokens))

    def has_class_token(self) -> bool:
        return False

    def features(self, tokens: Tensor) -> Tensor:
        return self.model.forward_head(self.from_tokens(tokens), pre_logits=True)

    def hidden_features(self, block: int) -> int:
        """Return the number of hidden filters of a block, which is that of its first convolution's channels."""
        return _hidden_features(_at(self.model, block))

    def cost(self) -> ModelCost:
        # The MACs are counted in a pass on the meta device: no weight is copied and nothing is computed.
        memo: dict[int, Any] = {id(t): t.detach().to("meta") for t in self.model.buffers()}
        memo |= {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in self.model.parameters()}
        twin = copy.deepcopy(self.model, memo).eval()
        blocks = [_at(twin, block) for block in range(type(self)(twin).num_blocks())]
        sizes: dict[nn.Module, int] = {}
        macs: dict[nn.Module, int] = {}
        counter = _MacCounter()

        def begin(block: nn.Module, _: object) -> None:
            macs[block] = -counter.macs

        def end(block: nn.Module, _: object, output: Tensor) -> None:
            macs[block] += counter.macs
            sizes[block] = output.shape[2] * output.shape[3]

        for block in blocks:
            block.register_forward_pre_hook(begin)
            block.register_forward_hook(end)
        weight = next(self.model.parameters())
        images = torch.empty(1, *self.input_size(), device="meta", dtype=weight.dtype)
        with torch.inference_mode(False), torch.no_grad(), counter:
            twin(images)
        costs = tuple(_block_cost(block, macs[block], sizes[block]) for block in blocks)
        return ModelCost(total=Cost(counter.macs, 0, num_params(self.model)), blocks=costs)

    def compress_block(self, block: int, kept: Sequence[int]) -> None:
        self.model.dcvit_base = _base(self.model)
        stage, name = cnn_places(self.model)[block]
        module = getattr(stage, name)
        module = module if isinstance(module, PointwiseBlock) else PointwiseBlock(module)
        keep_filters(module, torch.as_tensor(kept, dtype=torch.int64))
        setattr(stage, name, module)

    def prune_block(self, block: int, kept: Sequence[int]) -> None:
        """Remove from a block, in place, all hidden filters but `kept`; see `filter_path`."""
        self.model.dcvit_base = _base(self.model)
        keep_filters(_at(self.model, block), torch.as_tensor(kept, dtype=torch.int64))

    def prune_obstacle(self, block: int) -> str | None:
        return _prune_obstacle(_at(self.model, block))

    def hidden_filters(self, block: int) -> Tensor:
        conv, _ = filter_path(_at(self.model, block))[0]
        return conv.weight.flatten(1)

    def hidden_layer(self, block: int) -> nn.Conv2d:
        return filter_path(_at(self.model, block))[-1][0]

    def drop_block(self, block: int) -> None:
        self.model.dcvit_base = _base(self.model)
        stage, name = cnn_places(self.model)[block]
        setattr(stage, name, DroppedBlock())

    def block(self, block: int) -> nn.Module:
        """Return a block without the activation after its sum; it shares its parameters with the model's."""
        return _without_activation(_at(self.model, block))

    def sublayers(self, block: int) -> tuple[Callable[[Tensor], Tensor], nn.Module] | None:
        """Return the block up to its last layer, and that layer with its BatchNorm.

        Return `None` if single filters cannot be removed, or if a filter changes the outputs of others.
        """
        module, layer = _at(self.model, block), self.output_layer(block)
        if layer is None or isinstance(module, PointwiseBlock) or _prune_obstacle(module) is not None:
            return None
        if any(isinstance(part, SqueezeExcite) for part in module.children()):  # it weights each filter by all
            return None
        return partial(_with_patches, self.block(block), self.hidden_layer(block)), _LastLayer(layer)

    def output_layer(self, block: int) -> OutputLayer | None:
        """Return the last layer of a block; `None` if more than a BatchNorm follows it."""
        module = _at(self.model, block)
        if isinstance(module, PointwiseBlock):
            return OutputLayer(module.conv2)
        norm = getattr(module, _LAST_NORM.get(type(module), ""), None)
        plain = isinstance(norm, nn.BatchNorm2d) and isinstance(getattr(norm, "act", nn.Identity()), nn.Identity)
        behind = module.se if isinstance(module, (resnet.BasicBlock, resnet.Bottleneck)) else None
        return OutputLayer(self.hidden_layer(block), norm=norm) if plain and behind is None else None

    def absorbing_layers(self, block: int) -> tuple[nn.Conv2d | None, nn.Conv2d | None]:
        """Return the convolutions of the nearest remaining blocks before and after a block."""
        modules = [module for stage in cnn_stages(self.model) for module in stage.children()]
        gap = next(i for i, module in enumerate(modules) if module is _at(self.model, block))
        before, behind = (
            next((module for module in side if not isinstance(module, DroppedBlock)), None)
            for side in (reversed(modules[:gap]), modules[gap + 1 :])
        )
        name, first = _LAST_CONVOLUTION.get(type(before)), first_layers(behind)
        last = None if before is None or name is None else before.get_submodule(name)
        return last, first[0] if first is not None and isinstance(first[0], nn.Conv2d) else None

    def parameters(self, first_block: int, last_block: int) -> list[nn.Parameter]:
        # Blocks that change the shape belong to the block after them.
        found: list[nn.Parameter] = []
        if first_block == 0:
            found += [p for module in _stem(self.model) for p in module.parameters()]
        for block, modules in enumerate(_between(self.model)[:-1]):
            if first_block <= block <= last_block:
                found += [p for module in (*modules, _at(self.model, block)) for p in module.parameters()]
        return found

    def body_parameters(self) -> list[nn.Parameter]:
        head = {id(parameter) for parameter in self.model.get_classifier().parameters()}
        return [parameter for parameter in self.model.parameters() if id(parameter) not in head]

    def rebuild(self) -> nn.Module:
        return rebuilt(self.model, ARCHITECTURE, self.config())

    def config(self) -> Mapping[str, Any]:
        source = self.model.pretrained_cfg
        return saved_config(
            self.model, ARCHITECTURE, self._model_args(), input_size=self.input_size(),
            first_conv=source.get("first_conv"), classifier=source.get("classifier"),
        )  # fmt: skip

    def _model_args(self) -> dict[str, Any]:
        """Return the arguments of `modeling.cnn.build` that describe the model, as JSON values.

        Raises:
            UnsupportedModelError: If they do not reproduce the model; the message names the first part that differs.
        """
        args = {
            **_base(self.model),
            "num_classes": self.num_classes(),
            "in_chans": int(next(m for m in self.model.modules() if isinstance(m, nn.Conv2d)).in_channels),
            "global_pool": _pool_type(self.model),
        }
        with without_values():
            twin = build(**args, per_layer_config={})
            if stem := _stem_settings(self.model, twin):
                args["stem"] = stem
                change_stem(twin, stem)
            args["per_layer_config"] = {
                str(i): settings
                for i, pair in enumerate(zip(cnn_places(self.model), cnn_places(twin), strict=False))
                if (settings := _layer_settings(*(getattr(stage, name) for stage, name in pair))) is not None
            }
            prune_cnn(twin, args["per_layer_config"])
        require_same(self.model, twin, f"{args['base']} of timm")
        return args


class _MacCounter(TorchDispatchMode):
    """A counter of this thread's multiply-accumulates; torch's `FlopCounterMode` hooks the modules of all threads.

    Attributes:
        macs: The multiply-accumulates so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        flops = flop_registry.get(func._overloadpacket)
        if flops is not None:
            self.macs += flops(*args, **(kwargs or {}), out_val=output) // 2
        return output


def _base(model: TimmModule) -> dict[str, Any]:
    """Return the timm architecture that the model is built from, and its arguments: a ResNet's blocks and widths."""
    if hasattr(model, "dcvit_base"):
        known: dict[str, Any] = model.dcvit_base
        return known
    base = model.pretrained_cfg.get("architecture")
    if not isinstance(model, ResNet):
        return base_of(base, {}, FILES)
    stages = cnn_stages(model)
    first = [getattr(stage, next(iter(stage._modules))) for stage in stages]
    channels = [(block.conv3 if hasattr(block, "conv3") else block.conv2).out_channels for block in first]
    sizes = {
        "layers": [len(stage) for stage in stages],
        "channels": [width // type(block).expansion for width, block in zip(channels, first, strict=True)],
    }
    return base_of(base, sizes, FILES)


def _at(model: TimmModule, block: int) -> TimmModule:
    """Return a block's module in the model."""
    stage, name = cnn_places(model)[block]
    return getattr(stage, name)


def _stem_settings(model: TimmModule, whole: TimmModule) -> dict[str, Any]:
    """Return the settings of a model's stem that differ from timm's, see `modeling.cnn.change_stem`."""
    convolutions = [getattr(holder, name) for holder, name, _ in (stem_layers(model), stem_layers(whole))]
    settings = [_convolution_settings(one) if type(one) is nn.Conv2d else {} for one in convolutions]
    found: dict[str, Any] = settings[0] if settings[0] != settings[1] else {}
    gone = isinstance(getattr(model, "maxpool", None), nn.Identity)
    return {**found, "pool": False} if gone and not isinstance(whole.maxpool, nn.Identity) else found


def _convolution_settings(conv: nn.Conv2d) -> dict[str, Any]:
    return {
        "kernel_size": list(conv.kernel_size),
        "stride": list(conv.stride),
        "padding": conv.padding if isinstance(conv.padding, str) else list(conv.padding),
        "bias": conv.bias is not None,
    }


def _through(modules: Sequence[TimmModule], state: Tensor) -> Tensor:
    for module in modules:
        state = module(state)
    return state


def _stem(model: TimmModule) -> list[TimmModule]:
    """Return the layers before the first stage."""
    if isinstance(model, ResNet):
        return [model.conv1, model.bn1, model.act1, model.maxpool]
    return [model.conv_stem, model.bn1] if isinstance(model, EfficientNet) else [model.stem]


def _between(model: TimmModule) -> list[list[TimmModule]]:
    """Return the layers between numbered blocks: a list before each block, and one after the last."""
    numbered = {(id(stage), name) for stage, name in cnn_places(model)}
    found: list[list[TimmModule]] = [[]]
    for stage in cnn_stages(model):
        for name, block in stage.named_children():
            if (id(stage), name) not in numbered:
                found[-1].append(block)
                continue
            activation = last_activation(block)
            found.append([] if activation is None else [_out_of_place(getattr(block, activation))])
    return found


def _out_of_place(activation: TimmModule) -> TimmModule:
    """Return the activation without in-place computation, because the state before it is still needed."""
    twin = copy.copy(activation)
    if getattr(twin, "inplace", False):
        twin.inplace = False
    return twin


def _without_activation(block: TimmModule) -> TimmModule:
    """Return a block without the activation after its sum; everything else is shared with the block."""
    name = last_activation(block)
    if name is None:
        return block
    twin = copy.copy(block)
    twin._modules = {**block._modules, name: nn.Identity()}
    return twin


def _with_patches(block: TimmModule, layer: nn.Conv2d, state: Tensor) -> Tensor:
    """Return a block's input followed by the inputs of its last layer at each position, `[B, D + K, H, W]`."""
    taken: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    try:
        block(state)
    finally:
        handle.remove()
    (hidden,) = taken
    if layer.kernel_size != (1, 1):
        assert not isinstance(layer.padding, str)
        patches = F.unfold(hidden, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        hidden = patches.unflatten(-1, state.shape[2:])
    return torch.cat([state, hidden], dim=1)


class _LastLayer(nn.Module):
    """The last layer of a block with the residual sum.

    It maps the block's input and the last layer's inputs, `[B, D + K, H, W]`, to the block's output `[B, D, H, W]`.

    Args:
        output: The block's last layer, with the BatchNorm after it.
    """

    def __init__(self, output: OutputLayer) -> None:
        super().__init__()
        assert output.norm is not None
        self.layer, self.norm = output.layer, output.norm

    def forward(self, state: Tensor) -> Tensor:
        weight = self.layer.weight.flatten(1)[..., None, None]
        x, hidden = state.split([len(weight), weight.shape[1]], dim=1)
        added: Tensor = self.norm(F.conv2d(hidden, weight, self.layer.bias))
        return x + added


def _hidden_features(block: TimmModule) -> int:
    if isinstance(block, PointwiseBlock):
        return block.conv1.out_channels
    if isinstance(block, DroppedBlock):
        return 0
    filters, first = filter_path(block)[0][0], expansion(block)[0]  # these are two layers in a bottleneck
    return int(min(filters.out_channels, first.out_channels))


def _block_cost(block: TimmModule, macs: int, positions: int) -> BlockCost:
    """Return the cost of a block from its MACs and the number of positions of its output."""
    if isinstance(block, DroppedBlock):
        return BlockCost(Cost(), Cost(), Cost(), 0)
    hidden = _hidden_features(block)
    width = block.conv2.out_channels if isinstance(block, PointwiseBlock) else expansion(block)[0].in_channels
    unit = linear_cost(width, 1, positions, bias=True) + linear_cost(1, width, positions, bias=False)
    pointwise = unit * hidden + Cost(params=width)
    whole = Cost(macs, 0, num_params(block))
    if isinstance(block, PointwiseBlock):
        return BlockCost(Cost(), pointwise, unit, hidden)
    return BlockCost(whole - pointwise, pointwise, unit, hidden, _filter_cost(block, positions))


def _filter_cost(block: TimmModule, positions: int) -> Cost:
    """Return the cost of one hidden filter of a block, including its channel in the layers after it."""
    macs = params = 0
    for layer, dim in filter_path(block):
        macs += positions * _of_one(layer.weight, dim) if isinstance(layer, nn.Conv2d) else 0
        params += sum(_of_one(parameter, dim) for parameter in layer.parameters() if parameter.ndim > dim)
    return Cost(macs, 0, params)


def _of_one(parameter: Tensor, dim: int) -> int:
    return parameter.numel() // max(parameter.shape[dim], 1)


def _prune_obstacle(block: TimmModule) -> str | None:
    """Return why single hidden filters cannot be removed, such as groups of channels; `None` if they can."""
    if isinstance(block, DroppedBlock):
        return "has no hidden units"
    names = {layer: name for name, layer in block.named_modules()}
    layers = [layer for layer, _ in filter_path(block)]
    for layer in layers:
        where = f"is of type {type(block).__qualname__}, and its {names[layer]}"
        if isinstance(layer, nn.BatchNorm2d):
            continue
        if not isinstance(layer, nn.Conv2d):
            return f"{where}, of type {type(layer).__qualname__}, cannot lose single channels"
        depthwise = layer in layers[1:-1] and layer.groups == layer.out_channels
        if layer.groups > 1 and not depthwise:
            return f"{where} has {layer.groups} groups, each of which would have to lose equally many filters"
        if layer is layers[0] and layer.out_channels > _hidden_features(block):
            return f"{where} has more filters than the convolution before it"
    return None


def _layer_settings(block: TimmModule, whole: TimmModule) -> dict[str, Any] | None:
    """Return the settings of a block that differ from timm's, with the keys of transformers' `per_layer_config`."""
    if isinstance(block, DroppedBlock):
        return {"skip": ["block"]}
    hidden = _hidden_features(block)
    if isinstance(block, PointwiseBlock):
        return {"skip": ["convolution"], "intermediate_size": hidden}
    pruned = hidden < _hidden_features(whole) and _prune_obstacle(whole) is None
    return {"skip": [], "intermediate_size": hidden} if pruned else None


def _pool_type(model: TimmModule) -> str:
    pool = model.head.global_pool if isinstance(model, RegNet) else model.global_pool
    return str(pool.pool_type or "")
