"""AutoFormer: an evolutionary search for the best sub-network within a budget, with the original's own weights.

Source: Chen, Peng, Fu and Ling, "AutoFormer: Searching Transformers for Visual Recognition" (ICCV 2021, arXiv
2107.00651). Weights are entangled: a sub-network of h heads and r hidden units has the first h heads and the first r
units of the supernet's block. All sub-networks can therefore be evaluated without training any. An evolutionary search
keeps the best of a population, crosses them over and mutates them.

Choices and differences of this implementation:

- The supernet is the pretrained original. The paper trains it for 500 epochs so that its sub-networks work alone,
  which a few images do not allow.
- The search covers the heads and hidden units of each block. Width and depth stay, because slices of a width that was
  not trained for slicing compute nothing useful.
- There are no labels, so a sub-network is evaluated by its distillation loss on the few-shot images. The best one is
  trained by distillation after the search.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dcvit.methods.baselines.distillation import DistilledConfig
from dcvit.methods.baselines.groups import PrunableGroup, Space, Structure, recovered
from dcvit.methods.registry import Method, Outcome, Task, register
from dcvit.models import compressible
from dcvit.runtime.seeding import derive_seed

__all__ = ["GENERATIONS", "MUTATION", "PARENTS", "POPULATION", "AutoFormer", "autoformer", "entangled"]

POPULATION, GENERATIONS, PARENTS = 16, 6, 4
"""Numbers of individuals, generations and parents; the paper uses 50, 20 and 10."""

MUTATION = 0.2
"""Probability that a block's choice is drawn anew."""

EVALUATED = 16
"""Number of images that a sub-network is evaluated on."""

Genome = Mapping[int, tuple[float, float]]
"""The weight of each block's heads and of its hidden units. A larger weight keeps more of them."""


@dataclass(frozen=True)
class AutoFormer(DistilledConfig):
    """Settings of AutoFormer (arXiv 2107.00651): a sub-network of the original's first heads and hidden units."""


def autoformer(task: Task[AutoFormer]) -> Outcome:
    """Search for a sub-network that meets the budget, and train it by distillation.

    Args:
        task: The model, the images, the budget and the settings.

    Raises:
        BudgetError: If the budget cannot be met.
    """
    teacher, distillation = task.teacher, task.config.distillation
    space = Space(teacher, task.config.candidates)
    space.require(task.budget)
    view = compressible(teacher)
    draw = random.Random(derive_seed(task.context.seed, "autoformer"))
    batches = task.images.normalised[:EVALUATED].split(distillation.micro_batch_size)

    @torch.no_grad()
    def loss(structure: Structure, targets: list[Tensor]) -> float:
        student = structure.of(teacher)
        return sum(
            len(images) * float((compressible(student).tokens(images) - tokens).square().mean())
            for images, tokens in zip(batches, targets, strict=True)
        )

    with task.context.timer("ranking"):
        with torch.no_grad():
            targets = [view.tokens(images) for images in batches]
        found: dict[float, tuple[Genome, Structure]] = {}
        uniform: Genome = dict.fromkeys(space.blocks, (1.0, 1.0))
        population = [uniform, *(_drawn(space, draw) for _ in range(POPULATION - 1))]
        task.context.progress("evolution", 0, GENERATIONS, None)
        for generation in range(GENERATIONS):
            for genome in population:
                structure = space.best(entangled(space, genome), task.budget)
                found[loss(structure, targets)] = genome, structure
            best = sorted(found)[:PARENTS]
            parents = [found[value][0] for value in best]
            population = [_child(space, draw.choice(parents), draw.choice(parents), draw) for _ in range(POPULATION)]
            task.context.progress("evolution", generation + 1, GENERATIONS, best[0])
    return recovered(task, space, found[min(found)][1])


register(
    Method(
        name="autoformer",
        config=AutoFormer,
        title="the first heads and hidden units of each block, as many as an evolutionary search finds best",
        source="AutoFormer, arXiv 2107.00651",
        families=("vit",),
        compress=autoformer,
    )
)


def entangled(space: Space, genome: Genome) -> dict[PrunableGroup, float]:
    """Return scores that always keep the first heads and units of a block, and more where the weight is larger.

    The j-th of U groups of weight w scores w (1 − j / U), so equal weights keep the same share everywhere.
    """
    return {
        group: genome[group.block][group.kind == "unit"] * (1 - group.number / space.count(group.kind, group.block))
        for group in space.groups()
    }


def _drawn(space: Space, draw: random.Random) -> Genome:
    return {block: (draw.uniform(0.5, 2), draw.uniform(0.5, 2)) for block in space.blocks}


def _child(space: Space, one: Genome, other: Genome, draw: random.Random) -> Genome:
    """Take each block's choice from one of two parents, and draw some of them anew."""
    fresh = _drawn(space, draw)
    return {
        block: fresh[block] if draw.random() < MUTATION else draw.choice((one, other))[block] for block in space.blocks
    }
