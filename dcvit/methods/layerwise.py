"""What `fskd` and `cd` share: a network pruned to a uniform width, then fitted layer by layer in closed form.

In every block the hidden nodes go whose incoming weights have the least L1 norm (Li, Kadav, Durdanovic, Samet and Graf,
"Pruning Filters for Efficient ConvNets", arXiv 1608.08710); attention stays. Front to back each block's last layer,
which takes the hidden nodes, is then fitted. Student and teacher see the same views and the same tokens of them as
dcvit's own reconstruction does.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dcvit.errors import BudgetError
from dcvit.methods.budgets import target, widest_mlps
from dcvit.methods.registry import Outcome, Task
from dcvit.models import adapter_for
from dcvit.planning import Plan
from dcvit.reconstruction import Reconstruction, Views, draw_views
from dcvit.regression import NormalEquations

__all__ = ["RIDGE", "Equations", "Layer", "LayerPair", "fit_layerwise", "l1_norms", "layer_pairs"]

RIDGE = 1e-8
"""λ as a share of the mean squared input. Neither paper has a penalty: it only decides what the images leave open."""


@dataclass(frozen=True)
class Layer:
    """A pruned block's last layer in the student, and the same block of the teacher.

    Attributes:
        block: The block, from 0.
        student: Its blocks before this one are fitted already.
        teacher: The original.
        student_states: What the student's block takes, in batches.
        teacher_states: What the teacher's takes.
        views: The images.
    """

    block: int
    student: nn.Module
    teacher: nn.Module
    student_states: Sequence[Tensor]
    teacher_states: Sequence[Tensor]
    views: Views


Fit = Callable[[Layer], tuple[float, float]]
"""Fits a layer in place; gives the held-out errors before and after, as shares of what is wanted."""


def fit_layerwise(task: Task, fit: Fit) -> Outcome:
    """Prune a model until it meets the budget, and fit it block by block.

    Args:
        task: Of its config candidates (all blocks if `None`), the reconstruction's views, rows and batch size, round_to
            and seed are read.
        fit: Fits one layer.

    Raises:
        DcvitError: If the config's recovery is not block reconstruction.
        BudgetError: If the budget cannot be met, or a candidate does not exist or has no hidden nodes.
    """
    teacher, budget, config, recovery = task.teacher, task.budget, task.config, task.config.reconstruction
    adapter = adapter_for(teacher)
    candidates = _candidates(teacher, config.candidates)
    counts = widest_mlps(teacher, budget, candidates, config.round_to)
    student = copy.deepcopy(teacher)
    kept, reports = {}, []
    with task.timer("views"):
        views = draw_views(teacher, task.images, recovery, config.seed)
    with task.timer("compression"), torch.no_grad():
        states = [adapter.embed(teacher, images) for images in views.images.split(recovery.batch_size)]
        students = states
        task.progress("layers", 0, len(counts), None)
        for block in range(adapter.num_blocks(teacher)):
            if block in counts:
                kept[block] = _largest(l1_norms(teacher, block), counts[block])
                adapter.prune_block(student, block, kept[block])
                before, after = fit(Layer(block, student, teacher, students, states, views))
                reports.append(Reconstruction(block, RIDGE, before, after, after, 0))
                task.progress("layers", len(reports), len(counts), after)
            students = [adapter.run_blocks(student, state, block, block + 1) for state in students]
            states = [adapter.run_blocks(teacher, state, block, block + 1) for state in states]
    left, hidden = sum(counts.values()), sum(adapter.hidden_features(teacher, block) for block in counts)
    plan = Plan(
        budget=budget,
        target=target(teacher, budget),
        num_blocks=len(counts),
        hidden_features=left // len(counts),
        drop_ratio=(hidden - left) / hidden,
        candidates=candidates,
        cost=adapter.cost(student).total,
        blocks=candidates,
        kept_nodes=kept,
        pruned=candidates,
    )
    return Outcome(student, plan, reconstructions=tuple(reports))


def l1_norms(model: nn.Module, block: int) -> Tensor:
    """The L1 norm of the weights that make each hidden node of a block, `[K]`."""
    return adapter_for(model).hidden_filters(model, block).detach().abs().sum(dim=1)


@dataclass(frozen=True)
class LayerPair:
    """What goes into a block's last layer and what comes out, at some tokens.

    Attributes:
        hidden: `[R, K]`.
        output: `[R, D]`.
    """

    hidden: Tensor
    output: Tensor


def layer_pairs(model: nn.Module, block: int, states: Sequence[Tensor], views: Views) -> Iterator[LayerPair]:
    """Run a block on states, batch by batch, and watch its last layer at the tokens that the views chose.

    Args:
        model: Whose block it is.
        block: The block, from 0.
        states: What it takes, of all views in order.
        views: The images.
    """
    adapter = adapter_for(model)
    seen: list[tuple[Tensor, Tensor]] = []
    layer = adapter.hidden_layer(model, block)
    handle = layer.register_forward_hook(lambda _, given, output: seen.append((given[0], output)))
    first = 0
    try:
        for state in states:
            adapter.run_blocks(model, state, block, block + 1)
            part = slice(first, first + len(state))
            # A Swin block flattens its positions before its MLP.
            tokens = (side if side.ndim == 3 else adapter.as_tokens(side) for side in seen.pop())
            hidden, output = (views.rows(side, part) for side in tokens)
            yield LayerPair(hidden, output)
            first = part.stop
    finally:
        handle.remove()


@dataclass(frozen=True)
class Equations:
    """The equations of a layer, in float64.

    Attributes:
        used: Of the images that are learnt from; of all where there is but one.
        held_out: Of those that judge, likewise.
        every: Of all: what is learnt once the others have judged.
    """

    used: NormalEquations
    held_out: NormalEquations
    every: NormalEquations

    @classmethod
    def of(cls, inputs: Iterable[Tensor], targets: Iterable[Tensor], views: Views) -> "Equations":
        """The sums over inputs `[R, K]` and targets `[R, D]` of all views, in batches."""
        pairs = [(x.double(), y.double()) for x, y in zip(inputs, targets, strict=True)]
        rows = sum(len(x) for x, _ in pairs) // len(views.held_out)
        masks = views.held_out.repeat_interleave(rows).split([len(x) for x, _ in pairs])
        if not bool(views.held_out.any()):
            every = NormalEquations.of(pairs)
            return cls(every, every, every)
        used = NormalEquations.of((x[~mask], y[~mask]) for (x, y), mask in zip(pairs, masks, strict=True))
        held_out = NormalEquations.of((x[mask], y[mask]) for (x, y), mask in zip(pairs, masks, strict=True))
        return cls(used, held_out, used + held_out)


def _candidates(model: nn.Module, wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    adapter = adapter_for(model)
    depth = adapter.num_blocks(model)
    able = tuple(block for block in range(depth) if adapter.hidden_features(model, block))
    for block in wanted or ():
        if block not in able:
            raise BudgetError(f"candidates={list(wanted or ())}: block {block} has no hidden nodes; {list(able)} have.")
    return wanted or able


def _largest(norms: Tensor, count: int) -> tuple[int, ...]:
    """The nodes of largest norm, ascending; of equal ones the first."""
    order = norms.argsort(descending=True, stable=True)[:count]
    return tuple(sorted(order.tolist()))
