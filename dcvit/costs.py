"""The cost of a model: multiply-accumulates, parameters and the size of its file, counted analytically.

One multiply-accumulate (MAC) is one multiplication and one addition, two FLOPs. The products of matrix multiplications
and convolutions are counted. Norms, activations, softmax, biases and residual additions are not, as in
`torch.utils.flop_counter`, against which the tests check every figure. All figures are per image.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dcvit.errors import BudgetError

__all__ = ["MAC_CONVENTIONS", "BlockCost", "Cost", "MacConvention", "ModelCost", "file_size", "linear_cost"]

MacConvention = Literal["with_attention_products", "without_attention_products"]
"""Which MACs count.

`with_attention_products` counts every product. `without_attention_products` omits q·kᵀ and attn·v, which have no
weights, so counters that hook layers miss them. ViT-B/16 at 224 px has 17.56 GMACs with them and 16.85 without.
"""

MAC_CONVENTIONS: tuple[MacConvention, ...] = get_args(MacConvention)


@dataclass(frozen=True)
class Cost:
    """The cost of a part of a model, for one image.

    Attributes:
        weight_macs: MACs of products with a weight (linear layers and convolutions).
        attention_macs: MACs of the products inside attention, q·kᵀ and attn·v.
        params: Number of parameters.
    """

    weight_macs: int = 0
    attention_macs: int = 0
    params: int = 0

    def macs(self, convention: MacConvention) -> int:
        """Return the MACs per image under a convention.

        Raises:
            BudgetError: If the convention is unknown.
        """
        if convention not in MAC_CONVENTIONS:
            raise BudgetError(f"convention={convention!r}: expected one of {', '.join(MAC_CONVENTIONS)}.")
        return self.weight_macs + (self.attention_macs if convention == "with_attention_products" else 0)

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.weight_macs + other.weight_macs,
            self.attention_macs + other.attention_macs,
            self.params + other.params,
        )

    def __mul__(self, times: int) -> "Cost":
        return Cost(self.weight_macs * times, self.attention_macs * times, self.params * times)

    def __sub__(self, other: "Cost") -> "Cost":
        return self + other * -1


@dataclass(frozen=True)
class BlockCost:
    """The cost of one block, split into the parts that compression can remove.

    Attributes:
        attention: Cost of the attention branch: its norm, projections, products and LayerScale.
        mlp: Cost of the whole MLP branch, norm and LayerScale included.
        hidden_unit: Cost of one hidden unit of the MLP; `mlp` has `hidden_features` of them.
        hidden_features: Number of hidden units, 4d in a plain ViT.
        pruned_unit: Cost of one hidden unit while the attention is kept, if it differs from `hidden_unit`; the cost of
            a filter in a CNN.
    """

    attention: Cost
    mlp: Cost
    hidden_unit: Cost
    hidden_features: int
    pruned_unit: Cost | None = None

    def unit_cost(self, attention: bool) -> Cost:
        """Return the cost of one hidden unit of the block, with or without its attention."""
        return self.pruned_unit if attention and self.pruned_unit is not None else self.hidden_unit

    @property
    def compressible(self) -> bool:
        """Whether there is attention left to remove."""
        return self.attention != Cost() and self.hidden_features > 0


@dataclass(frozen=True)
class ModelCost:
    """The cost of a model and of each of its blocks."""

    total: Cost
    blocks: tuple[BlockCost, ...]


def linear_cost(in_features: int, out_features: int, tokens: int, *, bias: bool) -> Cost:
    """Return the cost of a linear layer applied to `tokens` rows."""
    return Cost(
        weight_macs=tokens * in_features * out_features,
        params=in_features * out_features + (out_features if bias else 0),
    )


FILE_METADATA = {"format": "pt"}
"""Metadata of a saved `model.safetensors`."""


def file_size(state: Mapping[str, Tensor]) -> int:
    """Return the size in bytes of the `model.safetensors` that holds a model's state.

    Source: the safetensors format. A file has 8 bytes for the header's length, a JSON header padded to a multiple of 8
    bytes, and the tensors' bytes, wide dtypes first, then by name.
    """
    header: dict[str, object] = {"__metadata__": FILE_METADATA}
    end = 0
    for name, tensor in sorted(state.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _code(tensor.dtype), "shape": list(tensor.shape), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + end


def _code(dtype: torch.dtype) -> str:
    """Return a dtype's name in the header. Only its length matters, so signed and unsigned are not distinguished."""
    if dtype == torch.bool:
        return "BOOL"
    kind = "BF" if dtype == torch.bfloat16 else "F" if dtype.is_floating_point else "I"
    return f"{kind}{8 * dtype.itemsize}"
