"""What `fskd` and `cd` share: a network pruned to a uniform width, then fitted layer by layer in closed form.

In every block the hidden units go whose incoming weights have the least L1 norm (Li, Kadav, Durdanovic, Samet and Graf,
"Pruning Filters for Efficient ConvNets", arXiv 1608.08710): in a ViT of its MLP, while attention stays, in a CNN the
filters of a residual block (`dcvit.models.modeling.cnn.filter_path`). Front to back each block's layer that takes the
hidden units is then fitted. Student and teacher see the same views and the same tokens of them as dcvit's own
reconstruction does; of a feature map a position is a token, so that the number of equations does not grow with the
resolution. Neighbouring positions see nearly the same: more views tell more than more positions of each.
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
"""λ as a share of the mean squared input. Neither paper has a penalty: it only decides what the images leave open."""


@dataclass(frozen=True)
class LayerwiseConfig(MethodConfig):
    """What the methods read that fit layer by layer.

    Attributes:
        candidates: Blocks that may lose hidden units or filters, from 0; `None` is all that can.
        seed: See `MethodConfig`.
        impl: See `MethodConfig`.
        calibration: The images and tokens that layers are fitted on.
        round_to: Kept hidden units are rounded down to a multiple of this, 8 for example where hardware likes that; the
            budget holds.
    """

    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    round_to: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.round_to < 1:
            raise DcvitError(f"round_to={self.round_to!r}: expected 1 or more.")


@dataclass(frozen=True)
class LayerPair:
    """What goes into the layer that takes a block's hidden units and what comes out, of some images.

    Attributes:
        layer: The layer.
        inputs: Its input: tokens `[B, N, K]`, or of a convolution a map `[B, K, H, W]`.
        tokens: Its output `[B, N, D]`, the positions of a map one after another.
        places: Which of them serve as equations, `[B, S]`.
        of_held_out: Which images judge, `[B]`.
    """

    layer: nn.Linear | nn.Conv2d
    inputs: Tensor
    tokens: Tensor
    places: Tensor
    of_held_out: Tensor

    @property
    def hidden(self) -> Tensor:
        """The layer's input at the places `[B·S, K]`, or of a convolution with h·w taps the patches `[B·S, K·h·w]`."""
        if isinstance(self.layer, nn.Conv2d):
            return _patches(self.layer, self.inputs, self.places)
        return tokens_at(self.inputs, self.places)

    @property
    def output(self) -> Tensor:
        """Its output at the places `[B·S, D]`."""
        return tokens_at(self.tokens, self.places)

    @property
    def held_out(self) -> Tensor:
        """Which of these rows judge, `[B·S]`."""
        return self.of_held_out.repeat_interleave(self.places.shape[1])


@dataclass(frozen=True)
class Layer:
    """The layer that takes a pruned block's hidden units in the student, and the same block of the teacher.

    Attributes:
        block: The block, from 0.
        student: Its blocks before this one are fitted already.
        teacher: The original.
        student_states: What the student's block takes, of all views in order.
        teacher_states: What the teacher's takes.
        views: The images.
        batch_size: How many of them pass at once.
    """

    block: int
    student: nn.Module
    teacher: nn.Module
    student_states: SpilledBuffer
    teacher_states: SpilledBuffer
    views: Views
    batch_size: int

    def pairs(self, model: nn.Module, states: SpilledBuffer) -> Iterator[LayerPair]:
        """See `layer_pairs`; of one of the models on the states of one of them."""
        return layer_pairs(model, self.block, states.split(self.batch_size), self.views)


Fit = Callable[[Layer], tuple[float, float]]
"""Fits a layer in place; gives the held-out errors before and after, as shares of what is wanted."""


def fit_layerwise(task: Task[LayerwiseConfig], fit: Fit) -> Outcome:
    """Prune a model until it meets the budget, and fit it block by block.

    Args:
        task: What to compress, with what, to which budget.
        fit: Fits one layer.

    Raises:
        UnsupportedModelError: If no block can lose single hidden units.
        BudgetError: If the budget cannot be met, or a candidate does not exist or cannot lose any.
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
            behind = students.split(recovery.batch_size)
            students = _pass(compressible(student), block, behind) if reports else passed
            states = passed
    plan = plan_of(teacher, student, budget, candidates, candidates, kept_units=kept, pruned=candidates)
    return Outcome(student, plan, reconstructions=tuple(reports))


def l1_norms(model: nn.Module, block: int) -> Tensor:
    """The L1 norm of the weights that make each hidden unit of a block, `[K]`."""
    return compressible(model).hidden_filters(block).detach().abs().sum(dim=1)


def layer_pairs(model: nn.Module, block: int, states: Iterable[Tensor], views: Views) -> Iterator[LayerPair]:
    """Run a block on states, batch by batch, and watch the layer that takes its hidden units.

    Args:
        model: Whose block it is.
        block: The block, from 0.
        states: What it takes (see `ModelView.prepare`), of all views in order.
        views: The images; they choose the tokens.
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
            yield LayerPair(layer, inputs, tokens, views.places(tokens.shape[1], part), views.held_out[part])
            first = part.stop
    finally:
        handle.remove()


@dataclass(frozen=True)
class Equations:
    """The equations of a layer, in float64: λ is too small for the products of float32.

    Their matrices are K × K, of K unknowns for each output. That is 170 MB for the 4608 of a 3×3 convolution of 512
    channels; `cd` holds up to seven of them, and sums the products of 32768 rows twice, which takes a core a minute. K
    grows with the channels: those of wide_resnet50_2 take up to four times both.

    Attributes:
        used: Of the images that are learnt from; of all where there is but one.
        judging: Of those that judge; `None` where there is but one image.
    """

    used: NormalEquations
    judging: NormalEquations | None

    @classmethod
    def of(cls, rows: Iterable[tuple[Tensor, Tensor, Tensor]]) -> "Equations":
        """The sums over batches of inputs `[R, K]`, targets `[R, D]` and which of these rows are held out `[R]`."""
        sums: dict[bool, NormalEquations] = {}
        for residual, targets, held_out in rows:
            for judges, chosen in ((False, ~held_out), (True, held_out)):
                if bool(chosen.any()):
                    found = NormalEquations.of([(residual[chosen].double(), targets[chosen].double())])
                    sums[judges] = sums[judges] + found if judges in sums else found
        return cls(sums[False], sums.get(True))

    @property
    def held_out(self) -> NormalEquations:
        """Those that judge."""
        return self.used if self.judging is None else self.judging

    @property
    def every(self) -> NormalEquations:
        """Of all images: what is learnt once the others have judged."""
        return self.used if self.judging is None else self.used + self.judging


def _pass(model: ModelView, block: int, states: Iterable[Tensor]) -> SpilledBuffer:
    """Return what the next block takes, from what a block takes."""
    module = model.block(block)
    return SpilledBuffer(model.prepare(module(state), block + 1) for state in states)


def _patches(layer: nn.Conv2d, state: Tensor, places: Tensor) -> Tensor:
    """What a convolution multiplies its weight with: the patches `[B·S, K·h·w]` of a map `[B, K, H, W]` at some places.

    As `F.unfold` gives them, which would hold those of all positions.
    """
    vertical, horizontal = map(int, layer.padding)
    windows = F.pad(state, (horizontal, horizontal, vertical, vertical))
    for dim, (taps, step, apart) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), 2):
        windows = windows.unfold(dim, apart * (taps - 1) + 1, step)  # a view
    windows = windows[..., :: layer.dilation[0], :: layer.dilation[1]]
    images, width = torch.arange(len(state), device=state.device)[:, None], windows.shape[3]
    return windows[images, :, places // width, places % width].flatten(2).flatten(0, 1)


def _candidates(model: nn.Module, targets: tuple[int, ...] | None) -> tuple[int, ...]:
    view = compressible(model)
    obstacles = {block: view.prune_obstacle(block) for block in range(view.num_blocks())}
    able = tuple(block for block, obstacle in obstacles.items() if obstacle is None)
    for block in targets or ():
        if block not in able:
            obstacle = obstacles.get(block, "does not exist")
            raise BudgetError(
                f"candidates={list(targets or ())}: block {block} {obstacle}; {list(able)} can lose hidden units."
            )
    if not able:
        raise UnsupportedModelError(
            f"None of the model's {len(obstacles)} blocks can lose single hidden units: block 0 {obstacles[0]}. Choose "
            "dcvit, practise or mir, which cut blocks whole, or extend prune_block in dcvit/models/."
        )
    return targets or able


def _largest(norms: Tensor, count: int) -> tuple[int, ...]:
    """The units of largest norm, ascending; of equal ones the first."""
    order = norms.argsort(descending=True, stable=True)[:count]
    return tuple(sorted(order.tolist()))
