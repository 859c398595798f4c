"""Removal of attention and hidden units from a block, or of a block from a model.

Source: DC-ViT (arXiv 2403.18708). All functions return a new model, except those that work in place and say so.
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
    """Draw at random the hidden units that a compressed block keeps, in ascending order.

    Args:
        model: The original model.
        block: The block, from 0.
        hidden_features: The number of units to keep.
        seed: The seed. The same seed and block give the same units.
    """
    available = compressible(model).hidden_features(block)
    kept = torch.randperm(available, generator=generator(seed, "kept nodes", block), device="cpu")[:hidden_features]
    return tuple(sorted(kept.tolist()))


def copy_blocks(model: nn.Module, blocks: Collection[int]) -> nn.Module:
    """Return a copy of a model in which `blocks` have their own parameters and all other blocks share the model's."""
    view = compressible(model)
    own = {id(parameter) for block in blocks for parameter in view.block(block).parameters()}
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if id(p) not in own})


def compress_block(model: nn.Module, block: int, kept: Sequence[int]) -> nn.Module:
    """Return a copy of the model in which one block has no attention and only the hidden units `kept`."""
    student = copy.deepcopy(model)
    compressible(student).compress_block(block, kept)
    return student


def prune_mlp(model: nn.Module, block: int, kept: Sequence[int], *, keep_attention: bool) -> None:
    """Remove from a block, in place, all hidden units but `kept`, and its attention unless `keep_attention`."""
    view = compressible(model)
    (view.prune_block if keep_attention else view.compress_block)(block, kept)


def drop_block(model: nn.Module, block: int) -> nn.Module:
    """Return a copy of the model without one block."""
    student = copy.deepcopy(model)
    compressible(student).drop_block(block)
    return student


def pruned_skeleton(model: nn.Module, hidden_features: Mapping[int, int]) -> nn.Module:
    """Return a model of a compressed structure, to measure what does not depend on its weights: time and memory.

    Args:
        model: The original, whose remaining weights are shared and not copied.
        hidden_features: The number of hidden units that each compressed block keeps, by block: its first ones.
    """
    student = copy_blocks(model, ())
    for block, kept in hidden_features.items():
        compressible(student).compress_block(block, range(kept))
    return student


def share_parameters(model: nn.Module, source: nn.Module, *, but: Collection[nn.Parameter]) -> None:
    """Replace a model's parameters, in place, by those of another model with equal names and values, to save memory.

    Args:
        model: The model whose parameters are replaced.
        source: The model whose parameters are used.
        but: Parameters of `model` that are not replaced, because they will change.
    """
    own, theirs = {id(parameter) for parameter in but}, dict(source.named_parameters())
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            twin = theirs.get(f"{prefix}.{name}" if prefix else name)
            if twin is not None and id(parameter) not in own and torch.equal(parameter, twin):
                setattr(module, name, twin)
