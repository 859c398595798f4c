"""Block reconstruction: fit a compressed block to the teacher's block, without the rest of the model.

A compressed block computes x + γ ⊙ (W₂ h(x) + b₂), where h(x) are its kept hidden units. Its inputs x are the student's
tokens, and its targets are the outputs of the teacher's block. N views of T tokens give N·T equations, tens of
thousands. Solving them needs neither the model after the block nor its gradients:

1. **Selection**: keep the hidden units that together explain the missing output best
   (`dcvit.recovery.ridge.select_inputs`).
2. **Closed form**: fit W₂ and b₂ by ridge regression, anchored at the original W₂, to the whole missing output,
   attention included. λ is the value with the lowest error on held-out images.
3. **Gradient steps** on only the block, starting from the closed form. They adapt the hidden units to what the removed
   attention computed. The epoch with the lowest error on the held-out images is kept, or the closed form if no epoch is
   better.
4. **Refit**: solve for W₂ and b₂ once more in closed form, now on all images, anchored at the result of the steps.

A pruned block keeps its attention and loses only hidden units. Then x is the output of its attention sublayer on the
student's own tokens, and its MLP is reconstructed in the same way without gradient steps, since the MLP has nothing new
to learn. (On DINOv2 ViT-S at 75 % of the MACs the steps would lower r of held-out images from 0.096 to 0.091, for 2.6
times the time.)

A pruned block of a CNN loses single filters. The inputs of its last layer depend on the neighbours of a position, so
the rows hold them next to the block's input. For a 3×3 layer they are patches, and all taps of a filter are kept or
dropped together.

The method follows BRECQ (arXiv 2102.05426, block reconstruction for quantisation), with the closed form of CORP (arXiv
2602.05243) and ReplaceMe (arXiv 2505.02819). Blocks are reconstructed front to back on the student's own activations,
so each block also corrects the errors of those before it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from dcvit.config import ReconstructionConfig
from dcvit.context import STANDALONE, RunContext
from dcvit.errors import NonFiniteError
from dcvit.history import BlockSpec, Reconstruction, curve_units
from dcvit.models import OutputLayer, compressible
from dcvit.models.surgery import copy_blocks, draw_kept_units, prune_mlp
from dcvit.ops import distillation_loss
from dcvit.recovery.calibration import Rows
from dcvit.recovery.ridge import FIRST_RIDGE, NormalEquations, best_ridge, select_inputs
from dcvit.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from dcvit.runtime.optim import Best, descend, pilot_runs, relative_adam, trainable, warmup_cosine

__all__ = [
    "CLOSED_FORM",
    "BlockProblem",
    "Descent",
    "ErrorCurve",
    "Sums",
    "choose_units",
    "error_curve",
    "find_step_size",
    "reconstruct_block",
]


CHUNK = 4096
"""Number of rows that pass through a block at once."""

RIDGE_WITHOUT_VALIDATION = 1e-2
"""λ if there is only one image, so that none can be held out, as a share of the mean squared hidden unit."""


@dataclass(frozen=True)
class Sums:
    """Normal equations of a block's output layer.

    Attributes:
        used: Sums over the training rows.
        held_out: Sums over the validation rows; `None` without any.
    """

    used: NormalEquations
    held_out: NormalEquations | None

    def of_inputs(self, kept: Tensor) -> "Sums":
        """Return the sums with only some inputs of the layer, given by index."""
        index = kept.to(self.used.gram.device)
        return Sums(self.used.of_inputs(index), None if self.held_out is None else self.held_out.of_inputs(index))

    def best_ridge(self, anchor: Tensor, *, constant: bool, near: float = FIRST_RIDGE) -> tuple[float, float]:
        """Return the best λ and its error on the validation rows, or on the training rows if there are no others."""
        if self.held_out is None:
            return RIDGE_WITHOUT_VALIDATION, self.used.error(
                self.used.solve(RIDGE_WITHOUT_VALIDATION, anchor, constant=constant)
            )
        return best_ridge(self.used, self.held_out, anchor, constant=constant, near=near)


@dataclass(frozen=True)
class ErrorCurve:
    """Error of a block after the closed form, by the number of hidden units that it keeps.

    Attributes:
        order: The hidden units, most useful first: all of them, or only as many as the second largest share of
            `dcvit.history.CURVE`.
        errors: Validation error by number of units, ascending, see `Reconstruction`.
        sums: The normal equations that the errors were computed from.
    """

    order: tuple[int, ...]
    errors: Mapping[int, float]
    sums: Sums


@dataclass(frozen=True)
class BlockProblem:
    """A block to compress, with its targets.

    Attributes:
        block: Index of the block, from 0.
        spec: What the block keeps.
        rows: The block's equations, or those of its MLP if the attention stays.
        kept: The hidden units to keep, if they are already chosen.
        sums: The normal equations over all hidden units, if they are already known.
    """

    block: int
    spec: BlockSpec
    rows: Rows
    kept: Sequence[int] | None = None
    sums: Sums | None = None


@dataclass(frozen=True)
class Descent:
    """Settings of the gradient steps on a single block.

    Attributes:
        step_size: Step size as a share of a tensor's root mean square, see `ReconstructionConfig.step_sizes`.
        epochs: Passes over the rows; 0 takes no steps.
    """

    step_size: float = 0.0
    epochs: int = 0


CLOSED_FORM = Descent()
"""No gradient steps."""


def reconstruct_block(
    student: nn.Module,
    problem: BlockProblem,
    config: ReconstructionConfig,
    descent: Descent = CLOSED_FORM,
    context: RunContext = STANDALONE,
    *,
    refit: bool = True,
) -> tuple[tuple[int, ...], Reconstruction]:
    """Compress a block of a student, in place, and fit it to the outputs of the teacher's block.

    Args:
        student: A model derived from the teacher in which this block is not compressed. Only this block changes.
        problem: The block and its targets.
        config: Settings of the reconstruction.
        descent: The gradient steps. A block that keeps its attention, or no hidden unit, takes none.
        context: Context of the run. Its seed draws random units and orders the rows; its processes share the work, and
            each holds all rows.
        refit: Whether the final fit uses the held-out images too. A probe must not, since it is ranked on them.

    Returns:
        The hidden units kept, ascending, and the errors of the reconstruction.

    Raises:
        NonFiniteError: If the block's error is NaN or infinite.
    """
    student_block = _PrunedBlock(student, problem, config, context)
    descends = student_block.can_descend and descent.epochs > 0
    before = student_block.error()
    ridge, error = student_block.solve(on_all=refit and not descends, at_most=before, sums=problem.sums)
    closed_form = None if student_block.output is None else error
    best_epoch, errors = 0, tuple[float, ...]()
    if descends:
        best_epoch, error, errors = student_block.descend(config.batch_rows, descent, error)
        again, error = student_block.solve(on_all=refit, at_most=error)
        ridge = ridge if again is None else again
    return student_block.kept, Reconstruction(problem.block, ridge, before, closed_form, error, best_epoch, errors)


def find_step_size(
    student: nn.Module, problem: BlockProblem, config: ReconstructionConfig, context: RunContext = STANDALONE
) -> float:
    """Find the step size of `config.step_sizes` with the lowest validation error after one epoch.

    The arguments are those of `reconstruct_block`. The student is not changed. This process does all the work.
    """
    context = context.single_process()
    block, spec, rows = problem.block, problem.spec, problem.rows
    kept = problem.kept
    if kept is None:
        kept = choose_units(student, block, spec.hidden_features, rows, config, context)
    problem = replace(problem, kept=kept)

    def error_after(step_size: float) -> float:
        copied = copy_blocks(student, [block])
        return reconstruct_block(copied, problem, config, Descent(step_size, 1), context)[1].error_after

    return pilot_runs(config.step_sizes, error_after, partial(context.progress, "step sizes"))[0]


def error_curve(
    student: nn.Module, block: int, rows: Rows, config: ReconstructionConfig, seed: int
) -> ErrorCurve | None:
    """Compute a block's error after the closed form, by the number of hidden units that it keeps.

    The sums over all hidden units contain those over any subset, so one pass over the rows serves every number.

    Args:
        student: A model derived from the teacher in which this block is not compressed; it does not change.
        block: Index of the block, from 0.
        rows: The block's equations, or those of its MLP if the attention stays.
        config: Settings of the reconstruction; `units` says how the hidden units are chosen.
        seed: Seed of units drawn at random.

    Returns:
        The curve; `None` if the block has no output layer to solve for.
    """
    module, output = _with_all_units(student, block, rows)
    if output is None:
        return None
    hidden = output.layer.weight.shape[1]
    sums = _sums(module, output, rows)
    counts = curve_units(hidden)
    most = max((count for count in counts if count < hidden), default=0)
    if config.units == "random":
        order = torch.randperm(hidden, generator=torch.Generator().manual_seed(seed))
    else:
        order = select_inputs(sums.used, most, group=output.num_patches)
    anchor = output.weights()
    errors: dict[int, float] = {}
    ridge = FIRST_RIDGE
    for count in reversed(counts):
        units = order[:count] if count <= len(order) else torch.arange(hidden)
        inputs = _inputs_of(units, output).to(anchor.device)
        ridge, errors[count] = sums.of_inputs(inputs).best_ridge(anchor[inputs], constant=output.constant, near=ridge)
    return ErrorCurve(tuple(order.tolist()), dict(sorted(errors.items())), sums)


def choose_units(
    student: nn.Module,
    block: int,
    count: int,
    rows: Rows,
    config: ReconstructionConfig,
    context: RunContext = STANDALONE,
) -> tuple[int, ...]:
    """Choose the hidden units that a block keeps.

    Args:
        student: A model derived from the teacher in which this block is not compressed; it does not change.
        block: Index of the block, from 0.
        count: Number of hidden units to keep.
        rows: The block's equations.
        config: Settings of the reconstruction; `units` says how the hidden units are chosen.
        context: Context of the run. Its seed draws random units; its processes share the work, and each holds all rows.

    Returns:
        The hidden units, most useful first; in any order if they are drawn at random.
    """
    if config.units == "random" or count == 0:
        return draw_kept_units(student, block, count, context.seed)
    module, output = _with_all_units(student, block, rows)
    if output is None:
        return draw_kept_units(student, block, count, context.seed)
    few = rows.thinned()
    equations = _summed(module, output, few, torch.arange(len(few.inputs), device=few.inputs.device), context.processes)
    return tuple(select_inputs(equations, count, group=output.num_patches).tolist())


def _inputs_of(units: Tensor, output: OutputLayer) -> Tensor:
    """Return the layer inputs that belong to some units: `num_patches` consecutive inputs for each."""
    return (units[:, None] * output.num_patches + torch.arange(output.num_patches, device=units.device)).flatten()


class _OnTokens(nn.Module):
    """A block without attention, or the MLP sublayer of a block with attention, applied to each token separately."""

    def __init__(self, model: nn.Module, block: int) -> None:
        super().__init__()
        self._view = compressible(model)
        sublayers = self._view.sublayers(block)
        self.block = self._view.block(block) if sublayers is None else sublayers[1]

    def forward(self, tokens: Tensor) -> Tensor:
        return self._view.as_tokens(self.block(self._view.from_tokens(tokens)))

    def hidden(self, state: Tensor) -> Tensor:
        """Return the hidden units `[R, K]`, the inputs of the output layer."""
        return self._view.as_tokens(state)[0]


def _with_all_units(student: nn.Module, block: int, rows: Rows) -> tuple[_OnTokens, OutputLayer | None]:
    """Return the module that a block's equations describe, with all hidden units, and its output layer.

    The module is the block without its attention, or its MLP sublayer.
    """
    view = compressible(student)
    if rows.features.shape[1]:
        return _OnTokens(student, block), view.output_layer(block)
    whole = copy_blocks(student, [block])
    view = compressible(whole)
    view.compress_block(block, range(view.hidden_features(block)))
    return _OnTokens(whole, block), view.output_layer(block)


@torch.no_grad()
def _equations(module: _OnTokens, output: OutputLayer, rows: Rows, chosen: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the hidden units `[R, K]` and the missing output `[R, D]` of a block for chunks of some rows."""
    if rows.features.shape[1]:
        for piece in chosen.split(CHUNK):
            yield rows.features[piece], rows.targets[piece] - rows.residual[piece]
        return
    hidden: list[Tensor] = []
    handle = output.layer.register_forward_pre_hook(lambda _, args: hidden.append(module.hidden(args[0])))
    try:
        for piece in chosen.split(CHUNK):
            module(rows.inputs[piece][None])
            yield hidden.pop(), rows.targets[piece] - rows.residual[piece]
    finally:
        handle.remove()


def _summed(
    module: _OnTokens, output: OutputLayer, rows: Rows, chosen: Tensor, processes: ProcessGroup
) -> NormalEquations:
    """Return the normal equations of a block's output layer over the chosen rows. Each process sums its share."""
    if len(chosen) < processes.size:
        return NormalEquations.of(_equations(module, output, rows, chosen))
    found = NormalEquations.of(_equations(module, output, rows, chosen[processes.share(len(chosen))]))
    energy = found.gram.new_tensor([found.energy])
    processes.sum(found.gram, found.moment, energy)
    return NormalEquations(found.gram, found.moment, float(energy), len(chosen))


def _sums(module: _OnTokens, output: OutputLayer, rows: Rows, processes: ProcessGroup = SINGLE_PROCESS) -> Sums:
    """Return the normal equations of a block's output layer over the training and the validation rows."""
    held_out = _summed(module, output, rows, rows.validation, processes) if rows.validates else None
    return Sums(_summed(module, output, rows, rows.training, processes), held_out)


class _PrunedBlock:
    """A block of a student that is compressed in place and fitted to its targets.

    Attributes:
        kept: The hidden units kept, ascending.
        output: Its output layer, if that can be solved for.
        can_descend: Whether gradient steps can train the block.
    """

    def __init__(
        self, student: nn.Module, problem: BlockProblem, config: ReconstructionConfig, context: RunContext
    ) -> None:
        block, spec, kept = problem.block, problem.spec, problem.kept
        if kept is None:
            kept = choose_units(student, block, spec.hidden_features, problem.rows, config, context)
        self.kept = tuple(sorted(kept))
        prune_mlp(student, block, self.kept, keep_attention=spec.attention)
        self.output = compressible(student).output_layer(block)
        units = torch.tensor(self.kept, dtype=torch.int64)
        self._inputs = units if self.output is None else _inputs_of(units, self.output)
        self._block, self._module, self._context = block, _OnTokens(student, block), context
        self._rows = problem.rows.with_features(self._inputs)
        self.can_descend = self._rows.validates and spec.hidden_features > 0 and not spec.attention

    @torch.no_grad()
    def error(self) -> float:
        """Return the unexplained share of the teacher's block's contribution.

        It is measured on the validation rows, or on all rows if none are held out.
        """
        rows, processes = self._rows, self._context.processes
        evaluated = rows.validation if rows.validates else rows.training
        total = torch.zeros(2, dtype=torch.float64, device=rows.inputs.device)  # squared error, squared contribution
        for piece in evaluated[processes.share(len(evaluated))].split(CHUNK):
            x, y = rows.inputs[piece], rows.targets[piece]
            total[0] += (self._module(x[None])[0] - y).double().square().sum()
            total[1] += (y - rows.residual[piece]).double().square().sum()
        processes.sum(total)
        error, energy = total.tolist()
        return float(error / max(energy, torch.finfo(torch.float64).tiny))

    @torch.no_grad()
    def solve(self, *, on_all: bool, at_most: float, sums: Sums | None = None) -> tuple[float | None, float]:
        """Fit the output layer in closed form.

        Args:
            on_all: Whether the final solution, after λ is chosen, uses the held-out images too.
            at_most: Largest validation error at which the solution replaces the layer's weights. Without validation
                rows it always does.
            sums: The normal equations over all hidden units, if they are already known.

        Returns:
            λ, which is `None` if the layer is not changed, and the validation error.

        Raises:
            NonFiniteError: If the error is NaN or infinite.
        """
        ridge, error = None, at_most
        if self.output is not None:
            anchor, constant = self.output.weights(), self.output.constant
            if sums is None:
                sums = _sums(self._module, self.output, self._rows, self._context.processes)
            else:
                sums = sums.of_inputs(self._inputs)
            best, found = sums.best_ridge(anchor, constant=constant)
            if sums.held_out is None or found <= at_most:
                equations = sums.used + sums.held_out if sums.held_out is not None and on_all else sums.used
                self.output.set(equations.solve(best, anchor, constant=constant))
                ridge, error = best, found
            elif math.isnan(found):
                error = found
        _require_finite(self._block, error)
        return ridge, error

    def descend(self, batch_rows: int, descent: Descent, error: float) -> tuple[int, float, tuple[float, ...]]:
        """Take gradient steps and keep the best epoch.

        Epoch 0 is the initial state, so the result is never worse than it.

        Args:
            batch_rows: Number of rows per step.
            descent: Settings of the steps.
            error: Validation error of the initial state.

        Returns:
            The best epoch, its validation error, and the validation error of each epoch.
        """
        module, rows, context = self._module, self._rows, self._context
        inputs, targets = rows.inputs[~rows.held_out], rows.targets[~rows.held_out]
        energy = (targets - inputs).square().mean().clamp_min(torch.finfo(inputs.dtype).tiny)
        per_epoch = -(-len(inputs) // batch_rows)
        drawing = context.generator("rows")

        def batches() -> Iterator[Tensor]:
            for _ in range(descent.epochs):
                yield from torch.randperm(len(inputs), generator=drawing).to(inputs.device).split(batch_rows)

        def backward(chosen: Tensor) -> None:
            index, share = context.processes.batch(chosen)
            tokens = trained(inputs[index][None])
            (share * distillation_loss(tokens, targets[index][None], impl=context.impl) / energy).backward()

        share = partial(warmup_cosine, total=descent.epochs * per_epoch, warmup=per_epoch // 2)
        best, errors = Best(module, error), list[float]()
        with trainable(module):
            trained = context.processes.parallel(module)
            for step in descend(relative_adam(module, descent.step_size), batches(), backward, share):
                if step % per_epoch == 0:
                    errors.append(self.error())
                    best.see(errors[-1], len(errors))
        best.restore()
        return best.at, best.error, tuple(errors)


def _require_finite(block: int, error: float) -> None:
    """Refuse a block whose error is not finite.

    Raises:
        NonFiniteError: If the error is NaN or infinite.
    """
    if not math.isfinite(error):
        raise NonFiniteError(
            f"Block {block}: its error is {error} after the closed form. The student's activations grew too large; "
            "choose a budget that removes less, or pass more images."
        )
