"""Transformer blocks that compute with `dcvit.ops`: what `dcvit.fuse` makes of timm's and of dcvit's own.

A fused block is the plain one under another class: modules, parameters, hooks and names stay. It takes the parameters
of its layers and does not call the layers, so it does that only where they are ordinary and nobody watches them.
"""

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from timm.layers import DropPath, GluMlp, LayerNorm, LayerNormFp32, LayerScale, Mlp, SwiGLU
from timm.layers.activations import GELU
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from dcvit.costs import Cost, linear_cost
from dcvit.models.modeling.shared import CompressedBlock, TimmModule, layer_scale
from dcvit.ops import Impl, attention, dropped_mlp

__all__ = [
    "PLAIN",
    "FusedBlock",
    "FusedCompressedBlock",
    "attention_sublayer",
    "compressed",
    "fuse",
    "mlp_sublayer_cost",
    "unfuse",
]

_Model = TypeVar("_Model", bound=nn.Module)

_INSIDE_ATTENTION = ("q_norm", "k_norm", "attn_drop", "norm", "proj_drop")
"""Parts of timm's `Attention` that `dcvit.ops.attention` leaves out, because they do nothing."""


class FusedCompressedBlock(CompressedBlock):
    """A compressed block whose MLP is one call of `dcvit.ops.dropped_mlp`, with norm, LayerScale and residual.

    Attributes:
        impl: The implementation that runs.
    """

    impl: Impl

    def forward(self, x: Tensor, **arguments: Any) -> Tensor:
        """Tokens to tokens of the same shape, as of a `CompressedBlock`."""
        return _fused_mlp_half(self, x) if _fusible_mlp(self, x) else super().forward(x, **arguments)


class FusedBlock(Block):  # type: ignore[misc]
    """timm's `Block` whose attention is one call of `dcvit.ops.attention`, and its MLP one of `dropped_mlp`.

    On a GPU it computes as timm's, because whole blocks have not been measured with the ops there.

    Attributes:
        impl: The implementation that runs.
    """

    impl: Impl

    def forward(self, x: Tensor, **masks: Any) -> Tensor:
        """Tokens `[B, N, D]` to `[B, N, D]`; what timm's `Attention` takes goes to it."""
        if _traced(x) or not x.is_cpu:
            whole: Tensor = super().forward(x, **masks)
            return whole
        x = attention_sublayer(self, x, **masks)
        if _fusible_mlp(self, x):
            return _fused_mlp_half(self, x)
        added: Tensor = self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x + added


_FUSED: dict[type[nn.Module], type[nn.Module]] = {Block: FusedBlock, CompressedBlock: FusedCompressedBlock}

PLAIN = {fused: plain for plain, fused in _FUSED.items()}
"""By class of a fused block, that of the block that it was."""


def fuse(model: _Model, impl: Impl = "auto") -> _Model:
    """Let a model's transformer blocks compute with dcvit's fused ops, in place, and return it.

    One call then computes a plain MLP with its norm, LayerScale and residual, and on a CPU another one the attention of
    few tokens. Outputs change by rounding. Parameters, their names, `state_dict` and hooks stay; a pickle of the model,
    and a program compiled from it, needs dcvit. The modules run one by one, as without this, where they have hooks or
    a replaced `forward`, under autocast, on the meta device, for tensors of other types (quantised, fake, distributed),
    and wherever torch traces, compiles, exports or watches operations. Blocks of other kinds stay as they are.

    Args:
        model: Any model; those of timm's `VisionTransformer`, and compressed ones, have something to fuse.
        impl: The implementation, see `dcvit.ops`; "eager" is the modules themselves, so that it fuses nothing.
    """
    if impl == "eager":
        return unfuse(model)
    for module in model.modules():
        if hasattr(module, "mlp"):
            block: Any = module
            block.impl = impl  # also of blocks of other kinds, for what becomes of them when they are compressed
        if type(module) in _FUSED:
            module.__class__ = _FUSED[type(module)]
    return model


def unfuse(model: _Model) -> _Model:
    """Undo `fuse`, in place: the modules of each block run one by one. Return the model."""
    for module in model.modules():
        module.__dict__.pop("impl", None)
        if type(module) in PLAIN:
            module.__class__ = PLAIN[type(module)]
    return model


def compressed(block: TimmModule) -> CompressedBlock:
    """What is left of a block without its attention, not copied; fused where the block was said to be."""
    made = CompressedBlock(block)
    return fuse(made, block.impl) if hasattr(block, "impl") else made


def attention_sublayer(block: TimmModule, x: Tensor, **masks: Any) -> Tensor:
    """The first half of timm's `Block`, fused or not, x + ls1(attn(norm1(x))): tokens `[B, N, D]` to `[B, N, D]`."""
    attn: TimmModule = block.attn
    normed = block.norm1(x)
    if (
        type(block) is FusedBlock
        and x.is_cpu
        and not any(m is not None and m is not False for m in masks.values())
        and _fusible_attention(attn, normed)
    ):
        qkv = attn.qkv(normed).unflatten(-1, (3, attn.num_heads, attn.head_dim))
        # An explicit choice is of the MLPs: which heads the attention takes depends on the model.
        mixed = attn.proj(attention(qkv))
    else:
        mixed = attn(normed, **masks)
    added: Tensor = block.drop_path1(block.ls1(mixed))
    return x + added


def _fused_mlp_half(block: TimmModule, x: Tensor) -> Tensor:
    # Not by attribute, which nn.Module resolves in Python: that took as long as the op saves on small models.
    parts: dict[str, TimmModule] = block._modules
    norm, layers, scale = parts["norm2"], parts["mlp"]._modules, parts["ls2"]
    fc1, fc2, norm_weights = layers["fc1"]._parameters, layers["fc2"]._parameters, norm._parameters
    return dropped_mlp(
        x,
        fc1["weight"],
        fc1["bias"],
        fc2["weight"],
        fc2["bias"],
        norm_weight=norm_weights["weight"],
        norm_bias=norm_weights["bias"],
        norm_eps=norm.eps,
        scale=scale._parameters["gamma"] if type(scale) is LayerScale else None,
        residual=True,
        impl=block.impl,
    )


def _fusible_mlp(block: TimmModule, x: Tensor) -> bool:
    """Whether the fused op computes what the modules would: plain types, nothing random active, nobody who listens."""
    parts: dict[str, TimmModule] = block._modules
    norm, mlp, scale, drop_path = parts["norm2"], parts["mlp"], parts["ls2"], parts["drop_path2"]
    if _traced(x) or type(mlp) is not Mlp or getattr(block, "post_norm", False):
        return False
    layers: dict[str, TimmModule] = mlp._modules
    act = layers["act"]
    return (
        type(norm) in (LayerNorm, LayerNormFp32, nn.LayerNorm)
        and type(layers["fc1"]) is type(layers["fc2"]) is nn.Linear
        and type(act) in (nn.GELU, GELU)
        and getattr(act, "approximate", "none") == "none"
        and type(layers["norm"]) is nn.Identity
        and type(layers["drop1"]) is type(layers["drop2"]) is nn.Dropout
        and type(scale) in (LayerScale, nn.Identity)
        and type(drop_path) in (DropPath, nn.Identity)
        and not (block.training and (layers["drop1"].p > 0 or layers["drop2"].p > 0 or type(drop_path) is DropPath))
        and _unwatched((norm, mlp, scale, drop_path, *layers.values()))
        and norm._parameters["weight"] is not None
    )


def _fusible_attention(attn: TimmModule, x: Tensor) -> bool:
    """Whether attention is no more than qkv, softmax and proj, likewise."""
    parts: dict[str, TimmModule] = attn._modules
    return (
        type(attn) is Attention
        and not _traced(x)
        and type(parts["q_norm"]) is type(parts["k_norm"]) is type(parts["norm"]) is nn.Identity
        and parts.get("gate") is None
        and not (attn.training and (parts["attn_drop"].p > 0 or parts["proj_drop"].p > 0))
        and _unwatched((attn, *(parts[name] for name in _INSIDE_ATTENTION)))
    )


def _traced(x: Tensor) -> bool:
    """Whether a tracer, a mode or a global hook would miss the modules, or autocast would choose for each of them."""
    return (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or x.is_meta
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or bool(_has_any_global_hook())
        or torch.is_autocast_enabled(x.device.type)
    )


def _unwatched(modules: Iterable[TimmModule]) -> bool:
    """Whether calling each module is calling its class's `forward` on ordinary parameters, and no more."""
    for module in modules:
        state = module.__dict__
        if (
            "forward" in state
            or state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
        ):
            return False
        for parameter in state["_parameters"].values():
            if parameter is not None and type(parameter) is not nn.Parameter:
                return False
    return True


def mlp_sublayer_cost(block: TimmModule, tokens: int) -> tuple[Cost, Cost]:
    """What the second half of a block costs, and one hidden unit of it, for so many tokens."""
    mlp = block.mlp
    hidden, width = mlp.fc2.in_features, mlp.fc2.out_features
    first_layers = [mlp.fc1_g, mlp.fc1_x] if type(mlp) is SwiGLU else [mlp.fc1]
    rows = sum(layer.out_features for layer in first_layers)  # gate and value count twice per hidden unit
    fc1 = linear_cost(width, rows, tokens, bias=first_layers[0].bias is not None)
    fc2 = linear_cost(hidden, width, tokens, bias=mlp.fc2.bias is not None)
    others = [block.norm2, mlp.norm, layer_scale(block)]
    rest = sum(parameter.numel() for module in others for parameter in module.parameters())
    per_unit = len(first_layers) if type(mlp) is SwiGLU else 2 if type(mlp) is GluMlp else 1
    unit = linear_cost(width, per_unit, tokens, bias=first_layers[0].bias is not None)
    unit += linear_cost(1, width, tokens, bias=False)
    unit += Cost(params=len(list(mlp.norm.parameters())))  # one weight, perhaps one bias, for each unit
    return fc1 + fc2 + Cost(params=rest), unit
