"""A simple baseline of closed-form recovery in plain torch.

Hidden units are drawn at random. Each block gets one ridge regression towards zero with a fixed λ, on the images and
four random views of each. Blocks are ranked by the distillation loss on the few-shot images themselves. The best blocks
are then solved front to back on the student's own activations.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dcvit.budget import Budget
from dcvit.config import AugmentationConfig
from dcvit.data.augment import augment
from dcvit.data.images import FewShotImages
from dcvit.errors import DcvitError
from dcvit.models import compressible
from dcvit.models.surgery import draw_kept_units
from dcvit.runtime.seeding import generator
from dcvit.search.plan import plan

__all__ = ["naive_closed_form", "solve_block"]

NUM_VIEWS = 4
"""Random views of each image, in addition to the image itself."""

RIDGE = 0.01
"""λ, as a share of the mean diagonal of the Gram matrix."""

BATCH_SIZE = 50


@torch.no_grad()
def naive_closed_form(
    teacher: nn.Module, images: FewShotImages, budget: Budget, augmentation: AugmentationConfig, seed: int
) -> tuple[nn.Module, tuple[int, ...]]:
    """Compress a model to a budget.

    Args:
        teacher: The original, frozen. It is not changed.
        images: The few-shot set.
        budget: The budget, from which the published formulas give k and r_d.
        augmentation: Augmentation of the random views.
        seed: Seed of the views and hidden units.

    Returns:
        The compressed model, and the compressed blocks, best first.
    """
    view, planned = compressible(teacher), plan(teacher, budget)
    drawing, every = generator(seed, "naive views"), range(len(images))
    drawn = [augment(images, every, augmentation, drawing) for _ in range(NUM_VIEWS)]
    views = torch.cat([images.normalised, *drawn])
    tokens = torch.cat([view.embed(batch) for batch in views.split(BATCH_SIZE)])
    kept = {block: draw_kept_units(teacher, block, planned.hidden_features, seed) for block in planned.candidates}
    depth = len(view.cost().blocks)
    target = view.tokens(images.normalised)

    losses: dict[int, float] = {}
    for block, before, after in _walk(teacher, tokens):
        if block in kept:
            student = copy.deepcopy(teacher)
            solve_block(student, block, kept[block], before, after)
            output = compressible(student).final_norm(_run(student, before[: len(images)], block, depth))
            losses[block] = float((output - target).square().mean())
    chosen = tuple(sorted(losses, key=losses.__getitem__)[: planned.num_blocks])

    student, inputs = copy.deepcopy(teacher), tokens
    for block, _, after in _walk(teacher, tokens):
        if block in chosen:
            solve_block(student, block, kept[block], inputs, after)
        inputs = _run(student, inputs, block, block + 1)
    return compressible(student).rebuild().eval(), chosen


@torch.no_grad()
def solve_block(student: nn.Module, block: int, kept: tuple[int, ...], inputs: Tensor, targets: Tensor) -> None:
    """Compress a block in place, and fit its second MLP layer to all that the block should add to its input.

    Args:
        student: The model that the block belongs to.
        block: The block, from 0.
        kept: The hidden units that stay.
        inputs: Inputs of the block, `[B, N, D]`.
        targets: Target outputs of the block, `[B, N, D]`.

    Raises:
        DcvitError: If the block does not end in a linear layer with a bias.
    """
    view = compressible(student)
    view.compress_block(block, kept)
    found = view.output_layer(block)
    if found is None or found.layer.bias is None:
        raise DcvitError(f"Block {block} does not end in a linear layer with a bias: no closed form fits it.")
    layer, scale = found.layer, found.scale
    hidden: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: hidden.append(args[0].flatten(0, 1).double()))
    _run(student, inputs, block, block + 1)
    handle.remove()
    units, missing = torch.cat(hidden), (targets - inputs).flatten(0, 1).double()
    if scale is not None:
        missing = missing / scale  # LayerScale comes after the layer
    penalty = RIDGE * units.square().sum(0).mean()
    mean, constant = units.mean(0), missing.mean(0)  # the bias is not penalised
    units = units - mean
    gram = units.T @ units
    gram.diagonal().add_(penalty)
    weight = torch.linalg.solve(gram, units.T @ (missing - constant))
    layer.weight.copy_(weight.T)
    layer.bias.copy_(constant - mean @ weight)


def _walk(model: nn.Module, tokens: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each block with its input and output tokens, given the tokens before the first block."""
    for block in range(len(compressible(model).cost().blocks)):
        after = _run(model, tokens, block, block + 1)
        yield block, tokens, after
        tokens = after


def _run(model: nn.Module, tokens: Tensor, first: int, stop: int) -> Tensor:
    run_blocks = compressible(model).run_blocks
    return torch.cat([run_blocks(batch, first, stop) for batch in tokens.split(BATCH_SIZE)])
