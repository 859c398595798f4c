"""Transformer blocks that compute with `dcvit.ops`, under the parameter names of timm's."""

from typing import Any

import torch
from timm.layers import DropPath, GluMlp, LayerNorm, LayerNormFp32, LayerScale, Mlp, SwiGLU
from timm.layers.activations import GELU
from timm.layers.attention import Attention
from torch import Tensor, nn

from dcvit.costs import Cost, linear_cost
from dcvit.models.modeling import shared
from dcvit.models.modeling.shared import TimmModule, layer_scale
from dcvit.ops import Impl, attention, dropped_mlp

__all__ = ["CompressedBlock", "MlpSublayer", "WholeBlock", "attention_sublayer", "mlp_sublayer_cost"]

_INSIDE_ATTENTION = ("q_norm", "k_norm", "attn_drop", "norm", "proj_drop")
"""Parts of timm's `Attention` that `dcvit.ops.attention` leaves out, because they do nothing."""


class MlpSublayer(shared.MlpSublayer):
    """The second half of a transformer block, x + ls2(mlp(norm2(x))), under the parameter names of timm's `Block`.

    Where the MLP is the plain one, it is one call of `dcvit.ops.dropped_mlp`, with the norm, LayerScale and residual
    fused; else the modules run one by one.

    Args:
        block: A timm block, see `modeling.shared.MlpSublayer`; its MLP branch is taken over, not copied.
    """

    def __init__(self, block: TimmModule) -> None:
        super().__init__(block)
        self.impl: Impl = getattr(block, "impl", "auto")

    def mlp_sublayer(self, x: Tensor) -> Tensor:
        """Tokens `[B, N, D]` to `[B, N, D]`."""
        # Not by attribute, which nn.Module resolves in Python: that took as long as the op saves on small models.
        parts: dict[str, TimmModule] = self._modules
        norm, mlp, scale = parts["norm2"], parts["mlp"], parts["ls2"]
        # Autocast chooses a precision for each module; it does not see into the op, which would stay in float32.
        if self._fusible(norm, mlp, scale) and not torch.is_autocast_enabled(x.device.type):
            layers, norm_weights = mlp._modules, norm._parameters
            fc1, fc2 = layers["fc1"]._parameters, layers["fc2"]._parameters
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
                impl=self.impl,
            )
        return super().mlp_sublayer(x)

    def _fusible(self, norm: TimmModule, mlp: TimmModule, scale: TimmModule) -> bool:
        """Whether the fused op computes what the modules would: plain types, no hooks, nothing random active."""
        if self.post_norm or type(mlp) is not Mlp:
            return False
        layers = mlp._modules
        fc1, act, fc2 = layers["fc1"], layers["act"], layers["fc2"]
        return (
            type(norm) in (LayerNorm, LayerNormFp32, nn.LayerNorm)
            and norm._parameters.get("weight") is not None
            and type(fc1) is nn.Linear
            and type(act) in (nn.GELU, GELU)
            and getattr(act, "approximate", "none") == "none"
            and type(layers["norm"]) is nn.Identity
            and type(fc2) is nn.Linear
            and type(scale) in (LayerScale, nn.Identity)
            and not (norm._forward_hooks or mlp._forward_hooks or scale._forward_hooks)
            and not (fc1._forward_hooks or act._forward_hooks or fc2._forward_hooks)
            and not (norm._forward_pre_hooks or mlp._forward_pre_hooks or scale._forward_pre_hooks)
            and not (fc1._forward_pre_hooks or act._forward_pre_hooks or fc2._forward_pre_hooks)
            and not (self.training and (mlp.drop1.p > 0 or mlp.drop2.p > 0 or isinstance(self.drop_path2, DropPath)))
        )


class CompressedBlock(MlpSublayer):
    """A transformer block without attention and with fewer hidden units."""

    def forward(self, x: Tensor, **arguments: Any) -> Tensor:
        """Tokens `[B, N, D]` to `[B, N, D]`; the attention arguments of timm's blocks have nothing to act on."""
        return self.mlp_sublayer(x)


class WholeBlock(MlpSublayer):
    """timm's `Block`, computed with dcvit's ops while a model is compressed; no finished model holds one.

    Args:
        block: A timm `Block`; taken over, not copied.
    """

    def __init__(self, block: TimmModule) -> None:
        super().__init__(block)
        self.norm1, self.attn, self.ls1, self.drop_path1 = block.norm1, block.attn, block.ls1, block.drop_path1

    def forward(self, x: Tensor, **masks: Any) -> Tensor:
        """Tokens `[B, N, D]` to `[B, N, D]`; what timm's `Attention` takes goes to it."""
        return self.mlp_sublayer(self.attention_sublayer(x, **masks))

    def attention_sublayer(self, x: Tensor, **masks: Any) -> Tensor:
        """The first half of the block, x + ls1(attn(norm1(x)))."""
        attn: TimmModule = self._modules["attn"]
        normed = self.norm1(x)
        if self._plain(attn) and not any(mask is not None and mask is not False for mask in masks.values()):
            qkv = attn.qkv(normed).unflatten(-1, (3, attn.num_heads, attn.head_dim))
            # An explicit choice is of the MLPs: which heads the attention takes depends on the model.
            mixed = attn.proj(attention(qkv, impl="eager" if self.impl == "eager" else "auto"))
        else:
            mixed = attn(normed, **masks)
        added: Tensor = self.drop_path1(self.ls1(mixed))
        return x + added

    def _plain(self, attn: TimmModule) -> bool:
        """Whether attention is no more than qkv, softmax and proj: no hooks between, nothing random active."""
        parts: dict[str, TimmModule] = attn._modules
        return (
            type(attn) is Attention
            and type(parts["q_norm"]) is type(parts["k_norm"]) is type(parts["norm"]) is nn.Identity
            and parts.get("gate") is None
            and not (attn._forward_hooks or attn._forward_pre_hooks)
            and not any(parts[name]._forward_hooks or parts[name]._forward_pre_hooks for name in _INSIDE_ATTENTION)
            and not (self.training and (parts["attn_drop"].p > 0 or parts["proj_drop"].p > 0))
        )


def attention_sublayer(block: TimmModule, x: Tensor) -> Tensor:
    """The first half of timm's `Block`, or of a `WholeBlock`: tokens `[B, N, D]` to `[B, N, D]`."""
    if isinstance(block, WholeBlock):
        return block.attention_sublayer(x)
    mixed: Tensor = block.drop_path1(block.ls1(block.attn(block.norm1(x))))
    return x + mixed


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
