"""Cutting a model: attention and hidden units out of a block, or a block out of the model.

Source: DC-ViT (arXiv 2403.18708). Cuts return a new model and leave the given one alone.
"""

import copy
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from dcvit.models import compressible
from dcvit.runtime.seeding import generator

__all__ = [
    "compress_block",
    "copy_blocks",
    "draw_kept_units",
    "drop_block",
    "prune_mlp",
    "pruned_skeleton",
    "share_parameters",
]


def draw_kept_units(model: nn.Module, block: int, hidden_features: int, seed: int) -> tuple[int, ...]:
    """Which hidden units a compressed block keeps: drawn at random, ascending.

    Args:
        model: The original model.
        block: The block, from 0.
        hidden_features: How many units stay.
        seed: The same seed and block draw the same units.
    """
    available = compressible(model).hidden_features(block)
    kept = torch.randperm(available, generator=generator(seed, "kept nodes", block), device="cpu")[:hidden_features]
    return tuple(sorted(kept.tolist()))


def copy_blocks(model: nn.Module, blocks: Collection[int]) -> nn.Module:
    """A copy of a model in which some blocks have parameters of their own, and the others share the model's."""
    view = compressible(model)
    own = {id(parameter) for block in blocks for parameter in view.block(block).parameters()}
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if id(p) not in own})


def compress_block(model: nn.Module, block: int, kept: Sequence[int]) -> nn.Module:
    """A copy of the model in which one block has no attention and only the hidden units `kept`."""
    student = copy.deepcopy(model)
    compressible(student).compress_block(block, kept)
    return student


def prune_mlp(model: nn.Module, block: int, kept: Sequence[int], *, keep_attention: bool) -> None:
    """Remove from a block, in place, all hidden units but `kept`, and its attention unless that is kept."""
    view = compressible(model)
    (view.prune_block if keep_attention else view.compress_block)(block, kept)


def drop_block(model: nn.Module, block: int) -> nn.Module:
    """A copy of the model without one block."""
    student = copy.deepcopy(model)
    compressible(student).drop_block(block)
    return student


def pruned_skeleton(model: nn.Module, hidden_features: Mapping[int, int]) -> nn.Module:
    """A model of a compressed structure, for figures that its weights do not change: time and memory.

    Args:
        model: The original; what stays of it is shared, not copied.
        hidden_features: How many hidden units each compressed block keeps, by block; the first ones are taken.
    """
    student = copy_blocks(model, ())
    for block, kept in hidden_features.items():
        compressible(student).compress_block(block, range(kept))
    return student


def share_parameters(model: nn.Module, source: nn.Module, *, but: Collection[nn.Parameter]) -> None:
    """In place: parameters of a model become those of another, where name and values agree, to save their memory.

    Args:
        model: Its parameters are replaced.
        source: Whose parameters it gets.
        but: Parameters of the model that stay its own, because they will change.
    """
    own, theirs = {id(parameter) for parameter in but}, dict(source.named_parameters())
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            twin = theirs.get(f"{prefix}.{name}" if prefix else name)
            if twin is not None and id(parameter) not in own and torch.equal(parameter, twin):
                setattr(module, name, twin)
