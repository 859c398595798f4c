"""The common part of `fskd` and `cd`: prune a network to a uniform width, then fit it layer by layer in closed form.

Every block loses the hidden units whose incoming weights have the least L1 norm (Li, Kadav, Durdanovic, Samet and Graf,
"Pruning Filters for Efficient ConvNets", arXiv 1608.08710). In a ViT these are hidden units of the MLP, and attention
stays. In a CNN they are filters of a residual block (`dcvit.models.modeling.cnn.filter_path`). The layers that take the
hidden units are then fitted front to back. Student and teacher see the same views, and the same tokens of them, as in
dcvit's own reconstruction. Each position of a feature map is a token, and only some are sampled, so the number of
equations does not grow with the resolution. Neighbouring positions are much alike, so more views help more than more
positions of each view.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcvit.config import CalibrationConfig, MethodConfig
from dcvit.errors import BudgetError, DcvitError, UnsupportedModelError
from dcvit.history import Reconstruction
from dcvit.methods.budgets import plan_of, widest_mlps
from dcvit.methods.registry import Outcome, Task
from dcvit.models import ModelView, compressible
from dcvit.recovery.calibration import Views, draw_views, tokens_at
from dcvit.recovery.ridge import NormalEquations
from dcvit.runtime.spill import SpilledBuffer

__all__ = ["RIDGE", "Equations", "Layer", "LayerPair", "LayerwiseConfig", "fit_layerwise", "l1_norms", "layer_pairs"]

RIDGE = 1e-8
"""λ as a share of the mean squared input. Neither paper has a penalty; it only decides what the images leave open."""


@dataclass(frozen=True)
class LayerwiseConfig(MethodConfig):
    """Settings of the methods that fit layer by layer.

    Attributes:
        candidates: Blocks that may lose hidden units or filters, from 0; `None` is all blocks that can.
        seed: See `MethodConfig`.
        impl: See `MethodConfig`.
        calibration: The images and tokens that layers are fitted on.
        round_to: The number of kept hidden units is rounded down to a multiple of this, for example 8 for faster
            kernels. The budget still holds.
    """

    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    round_to: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.round_to < 1:
            raise DcvitError(f"round_to={self.round_to!r}: expected 1 or more.")


@dataclass(frozen=True)
class LayerPair:
    """Inputs and outputs of the layer that takes a block's hidden units, for a batch of images.

    Attributes:
        layer: The layer.
        inputs: Its input: tokens `[B, N, K]`, or a feature map `[B, K, H, W]` of a convolution.
        tokens: Its output as tokens `[B, N, D]`.
        token_indices: The token indices that are used as equations, `[B, S]`.
        held_out_images: Whether each image is held out for validation, `[B]`.
    """

    layer: nn.Linear | nn.Conv2d
    inputs: Tensor
    tokens: Tensor
    token_indices: Tensor
    held_out_images: Tensor

    @property
    def hidden(self) -> Tensor:
        """The layer's inputs at the token indices, `[B·S, K]`, or patches `[B·S, K·h·w]` of an h×w convolution."""
        if isinstance(self.layer, nn.Conv2d):
            return _patches(self.layer, self.inputs, self.token_indices)
        return tokens_at(self.inputs, self.token_indices)

    @property
    def output(self) -> Tensor:
        """The layer's outputs at the token indices, `[B·S, D]`."""
        return tokens_at(self.tokens, self.token_indices)

    @property
    def held_out(self) -> Tensor:
        """Whether each of these rows is held out for validation, `[B·S]`."""
        return self.held_out_images.repeat_interleave(self.token_indices.shape[1])


@dataclass(frozen=True)
class Layer:
    """The layer to fit: it takes a pruned block's hidden units in the student, and has a counterpart in the teacher.

    Attributes:
        block: The block, from 0.
        student: The student. Its earlier blocks are already fitted.
        teacher: The original.
        student_states: The inputs of the student's block, for all views in order.
        teacher_states: The inputs of the teacher's block.
        views: The images.
        batch_size: Number of views per forward pass.
    """

    block: int
    student: nn.Module
    teacher: nn.Module
    student_states: SpilledBuffer
    teacher_states: SpilledBuffer
    views: Views
    batch_size: int

    def pairs(self, model: nn.Module, states: SpilledBuffer) -> Iterator[LayerPair]:
        """Yield the layer's inputs and outputs in either model on either model's states, see `layer_pairs`."""
        return layer_pairs(model, self.block, states.split(self.batch_size), self.views)


Fit = Callable[[Layer], tuple[float, float]]
"""Fits a layer in place; returns the held-out errors before and after, relative to the targets."""


def fit_layerwise(task: Task[LayerwiseConfig], fit: Fit) -> Outcome:
    """Prune a model until it meets the budget, and fit it block by block.

    Args:
        task: The model, the images, the budget and the settings.
        fit: Fits one layer.

    Raises:
        UnsupportedModelError: If no block can lose single hidden units.
        BudgetError: If the budget cannot be met, or a candidate does not exist or cannot lose hidden units.
    """
    teacher, budget, config, recovery = task.teacher, task.budget, task.config, task.config.calibration
    view = compressible(teacher)
    candidates = _candidates(teacher, config.candidates)
    counts = widest_mlps(teacher, budget, candidates, config.round_to)
    student = copy.deepcopy(teacher)
    kept, reports = {}, []
    with task.context.timer("views"):
        views = draw_views(teacher, task.images, recovery, task.context.seed)
    with task.context.timer("compression"), torch.no_grad():
        states = students = SpilledBuffer(
            view.prepare(view.embed(images), 0) for images in views.images.split(recovery.batch_size)
        )
        task.context.progress("layers", 0, len(counts), None)
        for block in range(view.num_blocks()):
            if block in counts:
                kept[block] = _largest(l1_norms(teacher, block), counts[block])
                compressible(student).prune_block(block, kept[block])
                before, after = fit(Layer(block, student, teacher, students, states, views, recovery.batch_size))
                reports.append(Reconstruction(block, RIDGE, before, after, after, 0))
                task.context.progress("layers", len(reports), len(counts), after)
            if len(reports) == len(counts):
                break
            passed = _pass(view, block, states.split(recovery.batch_size))
            student_batches = students.split(recovery.batch_size)
            students = _pass(compressible(student), block, student_batches) if reports else passed
            states = passed
    plan = plan_of(teacher, student, budget, candidates, candidates, kept_units=kept, pruned=candidates)
    return Outcome(student, plan, reconstructions=tuple(reports))


def l1_norms(model: nn.Module, block: int) -> Tensor:
    """Return the L1 norm of the incoming weights of each hidden unit of a block, `[K]`."""
    return compressible(model).hidden_filters(block).detach().abs().sum(dim=1)


def layer_pairs(model: nn.Module, block: int, states: Iterable[Tensor], views: Views) -> Iterator[LayerPair]:
    """Run a block on states, batch by batch, and yield inputs and outputs of the layer that takes its hidden units.

    Args:
        model: The model with the block.
        block: The block, from 0.
        states: The block's inputs (see `ModelView.prepare`), for all views in order.
        views: The views. They determine which tokens are used.
    """
    view = compressible(model)
    seen: list[tuple[Tensor, Tensor]] = []
    module, layer = view.block(block), view.hidden_layer(block)
    handle = layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    first = 0
    try:
        for state in states:
            module(state)
            part = slice(first, first + len(state))
            # A Swin block flattens its positions before its MLP, a compressed one does not.
            inputs, output = seen.pop()
            tokens = output if output.ndim == 3 else view.as_tokens(output)
            inputs = inputs if isinstance(layer, nn.Conv2d) else inputs.flatten(1, -2)
            yield LayerPair(layer, inputs, tokens, views.token_indices(tokens.shape[1], part), views.held_out[part])
            first = part.stop
    finally:
        handle.remove()


@dataclass(frozen=True)
class Equations:
    """The equations of a layer, in float64 because λ is too small for products in float32.

    Their matrices are K × K for K unknowns per output. One takes 170 MB for the K = 4608 of a 3×3 convolution of 512
    channels. `cd` holds up to seven of them and sums the products of 32768 rows twice, which takes one core a minute. K
    grows with the number of channels: wide_resnet50_2 takes up to four times the memory and time.

    Attributes:
        used: Equations of the images that the layer is fitted on; of all images if there is only one.
        validation: Equations of the validation images; `None` if there is only one image.
    """

    used: NormalEquations
    validation: NormalEquations | None

    @classmethod
    def of(cls, rows: Iterable[tuple[Tensor, Tensor, Tensor]]) -> "Equations":
        """Sum the equations of batches of inputs `[R, K]`, targets `[R, D]` and held-out flags `[R]`."""
        sums: dict[bool, NormalEquations] = {}
        for inputs, targets, held_out in rows:
            for validation, chosen in ((False, ~held_out), (True, held_out)):
                if bool(chosen.any()):
                    found = NormalEquations.of([(inputs[chosen].double(), targets[chosen].double())])
                    sums[validation] = sums[validation] + found if validation in sums else found
        return cls(sums[False], sums.get(True))

    @property
    def held_out(self) -> NormalEquations:
        """The validation equations; those of all images if there is only one image."""
        return self.used if self.validation is None else self.validation

    @property
    def every(self) -> NormalEquations:
        """The equations of all images, for the final fit after validation."""
        return self.used if self.validation is None else self.used + self.validation


def _pass(model: ModelView, block: int, states: Iterable[Tensor]) -> SpilledBuffer:
    """Return the inputs of the next block, from the inputs of a block."""
    module = model.block(block)
    return SpilledBuffer(model.prepare(module(state), block + 1) for state in states)


def _patches(layer: nn.Conv2d, state: Tensor, token_indices: Tensor) -> Tensor:
    """Return the patches `[B·S, K·h·w]` of a feature map `[B, K, H, W]` that a convolution reads at token indices.

    `F.unfold` would give the same patches, but hold those of all positions in memory.
    """
    vertical, horizontal = map(int, layer.padding)
    windows = F.pad(state, (horizontal, horizontal, vertical, vertical))
    for dim, (taps, step, apart) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), 2):
        windows = windows.unfold(dim, apart * (taps - 1) + 1, step)  # a view
    windows = windows[..., :: layer.dilation[0], :: layer.dilation[1]]
    images, width = torch.arange(len(state), device=state.device)[:, None], windows.shape[3]
    return windows[images, :, token_indices // width, token_indices % width].flatten(2).flatten(0, 1)


def _candidates(model: nn.Module, requested: tuple[int, ...] | None) -> tuple[int, ...]:
    view = compressible(model)
    obstacles = {block: view.prune_obstacle(block) for block in range(view.num_blocks())}
    able = tuple(block for block, obstacle in obstacles.items() if obstacle is None)
    for block in requested or ():
        if block not in able:
            obstacle = obstacles.get(block, "does not exist")
            raise BudgetError(
                f"candidates={list(requested or ())}: block {block} {obstacle}; {list(able)} can lose hidden units."
            )
    if not able:
        raise UnsupportedModelError(
            f"None of the model's {len(obstacles)} blocks can lose single hidden units: block 0 {obstacles[0]}. Choose "
            "dcvit, practise or mir, which drop whole blocks, or extend prune_block in dcvit/models/."
        )
    return requested or able


def _largest(norms: Tensor, count: int) -> tuple[int, ...]:
    """Return the units of largest norm, ascending. Ties go to the first units."""
    order = norms.argsort(descending=True, stable=True)[:count]
    return tuple(sorted(order.tolist()))
