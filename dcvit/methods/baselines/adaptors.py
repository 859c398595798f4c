"""PRACTISE's adaptors: linear maps of the channels on both sides of a dropped block.

Source: Wang and Wu (arXiv 2202.07861). An adaptor is a 1×1 convolution without norm. The adaptor in front of the gap
follows the last convolution before the gap, and the adaptor behind it precedes the first convolution after the gap.
Each can therefore be multiplied into its neighbour, so the smaller network has no additional layers. Here they are
parametrisations of those convolutions' weights from the start: A·W in front and W·A behind, which are the same maps.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dcvit.models import compressible

__all__ = ["absorb_adaptors", "adaptors", "insert_adaptors"]


class _Adaptor(nn.Module):
    """A linear map of channels, initially the identity.

    Attributes:
        matrix: The map, `[C, C]`.
        behind: True if it acts on the convolution's output, False if it acts on the input.
    """

    def __init__(self, weight: Tensor, *, behind: bool) -> None:
        super().__init__()
        self.behind = behind
        self.matrix = nn.Parameter(torch.eye(weight.shape[0 if behind else 1]).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the convolution's weight `[O, I, H, W]` multiplied with the map."""
        if self.behind:
            return torch.einsum("po,oihw->pihw", self.matrix, weight)
        return torch.einsum("oihw,ij->ojhw", weight, self.matrix)


def insert_adaptors(model: nn.Module, blocks: Iterable[int]) -> None:
    """Insert adaptors around dropped blocks, in place, where convolutions can absorb them.

    The model's outputs do not change, because each adaptor is initially the identity.

    Args:
        model: The model without the blocks.
        blocks: The dropped blocks.
    """
    for block in blocks:
        before, behind = compressible(model).absorbing_layers(block)
        for layer, of_output in ((before, True), (behind, False)):
            if layer is not None and not any(one.behind == of_output for one in _of(layer)):
                adaptor = _Adaptor(layer.weight, behind=of_output)
                parametrize.register_parametrization(layer, "weight", adaptor)


def adaptors(model: nn.Module) -> list[nn.Parameter]:
    """Return the matrices of a model's adaptors."""
    return [adaptor.matrix for layer in model.modules() for adaptor in _of(layer)]


@torch.no_grad()
def absorb_adaptors(model: nn.Module) -> None:
    """Multiply each adaptor into its convolution in float64, and remove it, in place."""
    for layer in list(model.modules()):
        held = list(_of(layer))
        if not held:
            continue
        original = layer.parametrizations["weight"].original  # type: ignore[index,union-attr]
        weight = original.double()
        for adaptor in held:
            weight = adaptor.double()(weight)
        dtype, needs_grad = original.dtype, original.requires_grad
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        layer.weight = nn.Parameter(weight.to(dtype), requires_grad=needs_grad)


def _of(layer: nn.Module) -> Iterator[_Adaptor]:
    if parametrize.is_parametrized(layer, "weight"):
        yield from (one for one in layer.parametrizations["weight"] if isinstance(one, _Adaptor))  # type: ignore[index]
