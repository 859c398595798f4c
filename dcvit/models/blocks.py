"""Transformer blocks that compute with the ops of `dcvit.ops`; `dcvit.fuse` turns plain blocks into them.

A fused block is the plain block with another class: modules, parameters, hooks and names stay. It reads the parameters
of its layers and does not call the layers. It therefore does so only if the layers are standard ones without hooks.
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
from torch.utils._device import DeviceContext

from dcvit.costs import Cost, linear_cost
from dcvit.models.foreign import require_module
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

_BYPASSED = {
    kind: (kind.forward, kind.__call__)
    for kind in (
        Block, CompressedBlock, Attention, Mlp, LayerNorm, LayerNormFp32, nn.LayerNorm, nn.Linear, nn.GELU, GELU,
        LayerScale, DropPath, nn.Dropout, nn.Identity,
    )
}  # fmt: skip
"""The methods that a fused block does not call, by class, as they were when dcvit was imported."""

_SKIPPED_IN_ATTENTION = ("q_norm", "k_norm", "attn_drop", "norm", "proj_drop")
"""Parts of timm's `Attention` that `dcvit.ops.attention` does not run; it is used only where they do nothing."""


class FusedCompressedBlock(CompressedBlock):
    """A compressed block that computes norm, MLP, LayerScale and residual in one call of `dcvit.ops.dropped_mlp`.

    Attributes:
        impl: The implementation of the op.
    """

    impl: Impl

    def forward(self, x: Tensor, *ignored: Any, **arguments: Any) -> Tensor:
        """Map tokens to tokens of the same shape, as `CompressedBlock` does."""
        if _fusible_mlp(self, x) and not _is_patched(CompressedBlock):
            return _fused_mlp_sublayer(self, x)
        return super().forward(x)


class FusedBlock(Block):  # type: ignore[misc]
    """A timm `Block` that computes attention with `dcvit.ops.attention` and its MLP sublayer with `dropped_mlp`.

    On a GPU it runs timm's own code, because whole blocks with the ops have not been measured there.

    Attributes:
        impl: The implementation of the MLP op.
    """

    impl: Impl

    def forward(self, x: Tensor, **masks: Any) -> Tensor:
        """Map tokens `[B, N, D]` to `[B, N, D]`; `masks` are passed to timm's `Attention`."""
        if not x.is_cpu or _is_patched(Block):
            whole: Tensor = super().forward(x, **masks)
            return whole
        x = attention_sublayer(self, x, **masks)
        if _fusible_mlp(self, x):
            return _fused_mlp_sublayer(self, x)
        added: Tensor = self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x + added


_FUSED: dict[type[nn.Module], type[nn.Module]] = {Block: FusedBlock, CompressedBlock: FusedCompressedBlock}

PLAIN = {fused: plain for plain, fused in _FUSED.items()}
"""The plain block's class by the class of the fused one."""


def fuse(model: _Model, impl: Impl = "auto") -> _Model:
    """Make a model's transformer blocks compute with dcvit's fused ops, in place, and return the model.

    One op then computes the MLP with its norm, LayerScale and residual. On a CPU, another op computes the attention of
    short sequences. Outputs change only by rounding. Parameters, their names, `state_dict` and hooks stay. A pickle of
    the fused model, or a program compiled from it, needs dcvit.

    The modules run one by one, as without this call, if they have hooks or a replaced `forward`, if a method of their
    class was replaced after dcvit was imported, under autocast, on the meta device, for tensor subclasses (quantised,
    fake, distributed), in forward-mode differentiation, and while torch traces, compiles, exports or intercepts
    operations. Blocks of other types are not changed.

    Args:
        model: Any model; only blocks of timm's `VisionTransformer` and compressed blocks are fused.
        impl: The implementation, see `dcvit.ops`; "eager" calls the modules themselves, so it fuses nothing.

    Raises:
        UnsupportedModelError: If `model` is not a module.
    """
    require_module(model, "a model")
    if impl == "eager":
        return unfuse(model)
    for module in model.modules():
        if hasattr(module, "mlp"):
            block: Any = module
            block.impl = impl  # also on blocks of other types: they are fused when they are compressed
        if type(module) in _FUSED:
            module.__class__ = _FUSED[type(module)]
    return model


def unfuse(model: _Model) -> _Model:
    """Undo `fuse`, in place, so that the modules of each block run one by one, and return the model.

    Raises:
        UnsupportedModelError: If `model` is not a module.
    """
    require_module(model, "a model")
    for module in model.modules():
        module.__dict__.pop("impl", None)
        if type(module) in PLAIN:
            module.__class__ = PLAIN[type(module)]
    return model


def compressed(block: TimmModule) -> CompressedBlock:
    """Return a block without its attention, which shares the block's modules and is fused if the block was."""
    made = CompressedBlock(block)
    return fuse(made, block.impl) if hasattr(block, "impl") else made


def attention_sublayer(block: TimmModule, x: Tensor, **masks: Any) -> Tensor:
    """Run the attention sublayer of timm's `Block`, fused or not, x + ls1(attn(norm1(x))), on tokens `[B, N, D]`."""
    attn: TimmModule = block.attn
    normed = block.norm1(x)
    if (
        type(block) is FusedBlock
        and x.is_cpu
        and not any(m is not None and m is not False for m in masks.values())
        and _fusible_attention(attn, normed)
    ):
        qkv = attn.qkv(normed).unflatten(-1, (3, attn.num_heads, attn.head_dim))
        # `impl` applies only to the MLPs: which heads the attention op supports depends on the model.
        mixed = attn.proj(attention(qkv))
    else:
        mixed = attn(normed, **masks)
    added: Tensor = block.drop_path1(block.ls1(mixed))
    return x + added


def _fused_mlp_sublayer(block: TimmModule, x: Tensor) -> Tensor:
    # Attribute access of nn.Module runs in Python; on small models it took as long as the op saves.
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
    """Return whether the fused op equals the modules: standard types, no active dropout, no hooks."""
    parts: dict[str, TimmModule] = block._modules
    norm, mlp, scale, drop_path = parts["norm2"], parts["mlp"], parts["ls2"], parts["drop_path2"]
    if _traced(x) or type(mlp) is not Mlp or getattr(block, "post_norm", False):
        return False
    layers: dict[str, TimmModule] = mlp._modules
    act = layers["act"]
    return (
        type(norm) in (LayerNorm, LayerNormFp32, nn.LayerNorm)
        and len(norm.normalized_shape) == 1
        and type(layers["fc1"]) is type(layers["fc2"]) is nn.Linear
        and type(act) in (nn.GELU, GELU)
        and getattr(act, "approximate", "none") == "none"
        and type(layers["norm"]) is nn.Identity
        and type(layers["drop1"]) is type(layers["drop2"]) is nn.Dropout
        and type(scale) in (LayerScale, nn.Identity)
        and type(drop_path) in (DropPath, nn.Identity)
        and not (_drops(layers["drop1"]) or _drops(layers["drop2"]))
        and not (drop_path.training and type(drop_path) is DropPath)
        and _all_plain((norm, mlp, scale, drop_path, *layers.values()))
        and all(layer._parameters.get("weight") is not None for layer in (norm, layers["fc1"], layers["fc2"]))
    )


def _fusible_attention(attn: TimmModule, x: Tensor) -> bool:
    """Return whether the attention consists only of qkv, softmax and proj, without active dropout or hooks."""
    parts: dict[str, TimmModule] = attn._modules
    return (
        type(attn) is Attention
        and not _traced(x)
        and type(parts["q_norm"]) is type(parts["k_norm"]) is type(parts["norm"]) is nn.Identity
        and parts.get("gate") is None
        and type(parts["attn_drop"]) is type(parts["proj_drop"]) is nn.Dropout
        # torch's fused attention drops by the flag of the whole module.
        and not (
            _drops(parts["attn_drop"]) or _drops(parts["proj_drop"]) or (attn.training and parts["attn_drop"].p > 0)
        )
        and _all_plain((attn, *(parts[name] for name in _SKIPPED_IN_ATTENTION)))
    )


def _drops(dropout: TimmModule) -> bool:
    """Return whether a dropout is active; its own flag decides, which may differ from that of its block."""
    return bool(dropout.training and dropout.p > 0)


def _traced(x: Tensor) -> bool:
    """Return whether the modules must be called: under a tracer, a mode, a transform, a global hook or autocast."""
    return (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or x.is_meta
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or any(
            type(torch._C._get_function_stack_at(i)) is not DeviceContext  # which names only the device of new tensors
            for i in range(torch._C._len_torch_function_stack())
        )
        or bool(_has_any_global_hook())
        or torch.is_autocast_enabled(x.device.type)
    )


def _all_plain(modules: Iterable[TimmModule]) -> bool:
    """Return whether each module has no hooks, its class's own methods and ordinary parameters."""
    for module in modules:
        state = module.__dict__
        if (
            "forward" in state
            or state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
            or _is_patched(type(module))
        ):
            return False
        for parameter in state["_parameters"].values():
            if parameter is not None and type(parameter) is not nn.Parameter:
                return False
    return True


def _is_patched(kind: TimmModule) -> bool:
    """Return whether the methods of a class are not those with which it was imported."""
    return (kind.forward, kind.__call__) != _BYPASSED.get(kind)


def mlp_sublayer_cost(block: TimmModule, tokens: int) -> tuple[Cost, Cost]:
    """Return the cost of a block's MLP sublayer, and of one of its hidden units, for a number of tokens."""
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
    unit += Cost(params=len(list(mlp.norm.parameters())))  # one weight, and a bias if there is one, per unit
    return fc1 + fc2 + Cost(params=rest), unit
