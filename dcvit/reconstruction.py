"""Block reconstruction: what a compressed block can learn without the rest of the model.

A compressed block computes x + γ ⊙ (W₂ h(x) + b₂), where h(x) are its kept hidden nodes. Everything that it should
learn is known: x is what the student gives it, and its output should be what the teacher's block gives. N views of T
tokens are N·T equations for it, tens of thousands, and solving them needs neither the model behind the block nor its
gradients:

1. **Which nodes to keep**: those that explain the missing output best together (`dcvit.regression.select_inputs`).
2. **Closed form**: W₂ and b₂ by ridge regression, anchored at the original W₂, to the whole missing output, attention
   included. λ is the one that predicts held-out images best.
3. **Gradient steps** on the block alone, from there: they bend the hidden nodes themselves towards what the removed
   attention computed. The epoch that is best on the held-out images is kept, the closed form if none is better.
4. W₂ and b₂ once more in closed form, now on all images, anchored at what the steps found.

A block that is pruned keeps its attention, and only nodes go. Then x is what its attention gives, on the student's own
tokens, and its MLP is reconstructed in the same way, but for the gradient steps: it has nothing new to learn. (On
DINOv2 ViT-S at 75 % of the MACs they would lower r of held-out images from 0.096 to 0.091, for 2.6 times the time.)

Of a CNN's block that is pruned single filters go. What its last layer takes depends on the neighbours of a position, so
rows hold that beside the block's input, of a 3×3 layer as patches, and all taps of a filter are kept or go together.

As in BRECQ (arXiv 2102.05426, block reconstruction for quantisation), with the closed form of CORP (arXiv 2602.05243)
and ReplaceMe (arXiv 2505.02819). Blocks are reconstructed front to back on the student's own activations, so that each
also makes good what the ones before it got wrong.
"""

import copy
import functools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dcvit.augmentation import augment
from dcvit.config import ReconstructionConfig
from dcvit.distributed import ALONE, Ranks
from dcvit.errors import NonFiniteError
from dcvit.images import FewShotImages
from dcvit.models import OutputLayer, adapter_for
from dcvit.ops import Impl, mimic_loss
from dcvit.optimisation import least, relative_adam, set_step_size, trainable, warmup_cosine
from dcvit.progress import Progress, silent
from dcvit.regression import FIRST_RIDGE, NormalEquations, best_ridge, select_inputs
from dcvit.seeding import generator
from dcvit.stacks import Stack
from dcvit.structure import Cut
from dcvit.surgery import copy_blocks, cut_block, draw_kept_nodes

__all__ = [
    "ErrorCurve",
    "Reconstruction",
    "Rows",
    "Sums",
    "TeacherStates",
    "Views",
    "choose_nodes",
    "curve_nodes",
    "draw_views",
    "error_curve",
    "find_step_size",
    "reconstruct_block",
    "tokens_at",
]

HELD_OUT_EVERY = 5
"""One image of so many is held out, with all its views; in the end blocks learn from it too."""

FEW_ROWS = 16384
"""Rows that suffice to choose nodes, whose products are the most expensive ones, and to try a block."""

CHUNK = 4096
"""Rows that pass through a block at a time."""

CURVE = (0.0, 1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
"""Shares of the hidden nodes at which `error_curve` looks."""

RIDGE_UNJUDGED = 1e-2
"""λ where a single image leaves none to hold out, as a share of the mean squared hidden node."""


@dataclass(frozen=True)
class Views:
    """The images that blocks are reconstructed on.

    Attributes:
        images: The few-shot images, then random views of them: `[V, C, H, W]`, normalised. Read them in parts.
        held_out: Which views are of held-out images, `[V]`.
        lots: Random numbers, one for each token before the first block, `[V, N]`: those of the largest are drawn.
        num_tokens: S, how many tokens of a view serve as equations; all where there are fewer.
    """

    images: Stack
    held_out: Tensor
    lots: Tensor
    num_tokens: int

    def places(self, available: int, views: slice = slice(None)) -> Tensor:
        """Which of so many tokens are chosen `[V, S]`, of all views or some; later stages have fewer than the first."""
        # The places of the largest of random numbers are a draw without replacement.
        return self.lots[views, :available].topk(min(self.num_tokens, available)).indices

    def rows(self, tokens: Tensor, views: slice = slice(None)) -> Tensor:
        """The chosen tokens `[V·S, D]` of all tokens `[V, N, D]`, of all views or some."""
        return tokens_at(tokens, self.places(tokens.shape[1], views))

    def few_rows(self, tokens: Tensor, views: slice) -> Tensor:
        """Of the chosen tokens of some views those that `Rows.thinned` leaves of all, `[·, D]`."""
        rows = self.rows(tokens, views)
        of_each = len(rows) // len(tokens)
        if of_each * len(self.images) <= FEW_ROWS:
            return rows
        few = _few(of_each * len(self.images), FEW_ROWS) - of_each * views.start
        return rows[few[(few >= 0) & (few < len(rows))].to(rows.device)]

    def rows_of_all(self, batches: Iterable[Tensor], first: int = 0, *, few: bool = False) -> Tensor:
        """The chosen tokens `[V·S, D]` of views from one on, in batches: only one need be there at a time.

        Args:
            batches: Tokens `[B, N, D]`.
            first: The view that comes first.
            few: Take `few_rows` of them.
        """
        chosen = []
        for tokens in batches:
            part = slice(first, first + len(tokens))
            chosen.append((self.few_rows if few else self.rows)(tokens, part))
            first += len(tokens)
        return torch.cat(chosen)


def tokens_at(tokens: Tensor, places: Tensor) -> Tensor:
    """Some tokens `[B·S, D]` of all `[B, N, D]`, by their places `[B, S]`."""
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1])).flatten(0, 1)


@dataclass(frozen=True)
class Rows:
    """The equations of one block.

    Attributes:
        given: What the student's block gets, `[R, D]`; with what its output layer gets behind that, `[R, D + K]`, where
            that layer does not see each token alone (see `ModelAdapter.halves`).
        wanted: What the teacher's block gives, `[R, D]`.
        held_out: Which rows judge and are not learnt from, `[R]`.
    """

    given: Tensor
    wanted: Tensor
    held_out: Tensor

    @property
    def inputs(self) -> Tensor:
        """What the block adds to, `[R, D]`."""
        return self.given[:, : self.wanted.shape[1]]

    @property
    def nodes(self) -> Tensor:
        """What the output layer gets `[R, K]`, where it is known; else `[R, 0]`."""
        return self.given[:, self.wanted.shape[1] :]

    def of_nodes(self, kept: Tensor) -> "Rows":
        """The same for a block that keeps only some inputs of its output layer, by index."""
        if not self.nodes.shape[1]:
            return self
        return Rows(torch.cat([self.inputs, self.nodes[:, kept.to(self.given.device)]], 1), self.wanted, self.held_out)

    def thinned(self) -> "Rows":
        """At most `FEW_ROWS` of them, drawn at random but always the same."""
        if len(self.given) <= FEW_ROWS:
            return self
        return Rows(*_thinned(self.given, self.wanted, self.held_out))


def _thinned(*tensors: Tensor) -> list[Tensor]:
    """Of tensors of equally many rows those that `_few` chooses; all where they are few."""
    count, device = len(tensors[0]), tensors[0].device
    return list(tensors) if count <= FEW_ROWS else [tensor[_few(count, FEW_ROWS).to(device)] for tensor in tensors]


@functools.lru_cache(maxsize=8)
def _few(count: int, enough: int) -> Tensor:
    """Which rows are enough of more, ascending; not to be written to."""
    # Not every n-th: that could leave out all rows that are held out.
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:enough].sort().values


@dataclass(frozen=True)
class Reconstruction:
    """What the reconstruction of one block did.

    Errors are shares of what the teacher's block adds to its input that stay unexplained on the held-out images, or on
    all where a single image leaves none to hold out: 0 is perfect, 1 is no better than leaving the block out. They are
    a few per cent too low: nodes are chosen on all images, and blocks in front may have learnt from the held-out ones.

    Attributes:
        block: The block, from 0.
        ridge: λ of the closed form that the weights come from, a share of the mean squared hidden node; `None` where
            there was none, or none was better than the original weights.
        error_before: With the original weights of the kept nodes.
        error_closed_form: After the closed form, from the images that are not held out, if that was better; `None`
            where there was none.
        error_after: After the gradient steps, likewise.
        epochs: Of the gradient steps, up to the best.
        errors: After each epoch of the gradient steps, the best one or not; empty where there were none.
    """

    block: int
    ridge: float | None
    error_before: float
    error_closed_form: float | None
    error_after: float
    epochs: int
    errors: tuple[float, ...] = ()

    def require_of(self, block: int, epochs: int) -> None:
        """Refuse what the reconstruction of a block in so many epochs cannot have come to.

        Raises:
            ValueError: If it says so.
        """
        if self.block != block:
            raise ValueError(f"it is of block {self.block}: expected {block}")
        if not math.isfinite(self.error_after) or not 0 <= self.epochs <= len(self.errors) <= epochs:
            raise ValueError(f"it tells of an error of {self.error_after} after {self.epochs} epochs")


@dataclass(frozen=True)
class Sums:
    """The equations of a block's output layer, summed.

    Attributes:
        used: Over the rows that are learnt from.
        held_out: Over those that judge; `None` where there are none.
    """

    used: NormalEquations
    held_out: NormalEquations | None

    def of_inputs(self, kept: Tensor) -> "Sums":
        """The same with only some inputs of the layer, given by index."""
        index = kept.to(self.used.gram.device)
        return Sums(self.used.of_inputs(index), None if self.held_out is None else self.held_out.of_inputs(index))

    def best_ridge(self, anchor: Tensor, *, constant: bool, near: float = FIRST_RIDGE) -> tuple[float, float]:
        """λ and the error that it leaves on the rows that judge; without any, on those that are learnt from."""
        if self.held_out is None:
            return RIDGE_UNJUDGED, self.used.error(self.used.solve(RIDGE_UNJUDGED, anchor, constant=constant))
        return best_ridge(self.used, self.held_out, anchor, constant=constant, near=near)


@dataclass(frozen=True)
class ErrorCurve:
    """What the closed form would miss of a block, by the number of hidden nodes that it keeps.

    Attributes:
        order: The hidden nodes, most useful first: all, or `CURVE`'s last share but one of them.
        errors: The held-out error by number of nodes, ascending, see `Reconstruction`.
        sums: Those that they were computed from.
    """

    order: tuple[int, ...]
    errors: Mapping[int, float]
    sums: Sums


class TeacherStates:
    """What each block of the teacher takes and gives, at the rows of some views.

    Args:
        teacher: The original.
        views: The images.
        batch_size: Images a pass.
        prunable: The blocks of which `mlp_rows` will be asked.
        keep_output: Whether to keep the output tokens of all views, which `output` then holds, `[V, N, D]`.
        ranks: The processes that share the passes; each then holds what all found.
        progress: Told after each pass.
    """

    def __init__(
        self,
        teacher: nn.Module,
        views: Views,
        batch_size: int,
        *,
        prunable: Collection[int] = (),
        keep_output: bool = False,
        ranks: Ranks = ALONE,
        progress: Progress = silent,
    ) -> None:
        adapter = adapter_for(teacher)
        depth = adapter.num_blocks(teacher)
        self._held_out = views.held_out
        given, wanted = [Stack() for _ in range(depth)], [Stack() for _ in range(depth)]
        halves = {block: found for block in prunable if (found := adapter.halves(teacher, block)) is not None}
        between = {block: Stack() for block in halves}
        outputs = Stack()
        count = len(views.images)
        firsts, counts = ranks.batches(count, batch_size)
        progress("views", 0, count, None)
        with torch.no_grad():
            for first in firsts:
                part = slice(first, first + batch_size)
                state = adapter.embed(teacher, views.images[part])
                for block in range(depth):
                    prepared = adapter.prepare(teacher, state, block)
                    # Where nothing lies between two blocks, what one takes is what the other gave, and kept once.
                    if block == 0 or prepared is not state:
                        given[block].append(views.rows(adapter.as_tokens(prepared), part))
                    if block in halves:
                        attention, mlp = halves[block]
                        middle = attention(prepared)
                        between[block].append(views.few_rows(adapter.as_tokens(middle), part))
                        state = mlp(middle)
                    else:
                        state = adapter.run_blocks(teacher, state, block, block + 1)
                    wanted[block].append(views.rows(adapter.as_tokens(state), part))
                if keep_output:
                    outputs.append(adapter.final_norm(teacher, state))
                progress("views", min(first + batch_size, count), count, None)

        self._wanted = [ranks.gathered(stack, counts) for stack in wanted]
        self._given = [
            ranks.gathered(stack, counts) if len(stack) else self._wanted[block - 1]
            for block, stack in enumerate(given)
        ]
        self._between = {block: ranks.gathered(stack, counts) for block, stack in between.items()}
        self.output = ranks.gathered(outputs, counts) if keep_output else None

    def rows(self, block: int, given: Tensor | None = None, *, few: bool = False) -> Rows:
        """The equations of a block.

        Args:
            block: The block, from 0.
            given: What a student's block gets, `[R, D]` or `[R, D + K]`; what the teacher's gets if not given.
            few: `given` has those of `Rows.thinned` alone, and so have the others.
        """
        wanted = self._wanted[block][:]
        held_out = self._held_out.repeat_interleave(len(wanted) // len(self._held_out))
        if few:
            wanted, held_out = _thinned(wanted, held_out)
        return Rows(self._given[block][:] if given is None else given, wanted, held_out)

    def mlp_rows(self, block: int) -> Rows:
        """The equations of the MLP of a prunable block alone, thinned.

        Raises:
            KeyError: If the block was not named as prunable, or its equations were given up.
        """
        return self.rows(block, self._between[block][:], few=True)

    def give_up_mlp_rows(self, blocks: Iterable[int]) -> None:
        """Free what `mlp_rows` needs of some blocks."""
        for block in blocks:
            self._between.pop(block, None)


def draw_views(
    teacher: nn.Module,
    images: FewShotImages,
    config: ReconstructionConfig,
    seed: int,
    *,
    num_views: int | None = None,
    held_out_every: int = HELD_OUT_EVERY,
) -> Views:
    """The few-shot images and as many random views as make a number, with the rows that they give.

    Args:
        teacher: Says how many tokens an image has.
        images: The few-shot set.
        config: How they differ.
        seed: Draws views and rows.
        num_views: How many; `config.num_views` if not given.
        held_out_every: One image of so many is held out, drawn at random.
    """
    count, augmentation = len(images), config.augmentation
    wanted = config.num_views if num_views is None else num_views
    folds = 0 if augmentation is None else max(0, wanted // count - 1)
    # Two of one seed, so that a seed still gives what it gave when torch's global generator drew the views.
    of_views, of_rows = generator(seed, "views"), generator(seed, "views")
    with torch.no_grad():
        views = Stack([images.normalised])
        if augmentation is not None:
            for _ in range(folds):
                views.append(augment(images, range(count), augmentation, of_views))
        adapter = adapter_for(teacher)
        available = adapter.as_tokens(adapter.embed(teacher, images.normalised[:1])).shape[1]
        lots = torch.rand(len(views), available, generator=of_rows, dtype=torch.float32)
        held_out = torch.zeros(count, dtype=torch.bool)
        held_out[torch.randperm(count, generator=of_rows)[1::held_out_every]] = True
    device = images.normalised.device
    return Views(views, held_out.repeat(folds + 1).to(device), lots.to(device), max(1, config.num_rows // len(views)))


def reconstruct_block(
    student: nn.Module,
    block: int,
    cut: Cut,
    rows: Rows,
    config: ReconstructionConfig,
    *,
    kept: Sequence[int] | None = None,
    sums: Sums | None = None,
    step_size: float,
    epochs: int,
    refit: bool = True,
    seed: int = 0,
    impl: Impl = "auto",
    ranks: Ranks = ALONE,
) -> tuple[tuple[int, ...], Reconstruction]:
    """Cut a block of a student, in place, and let it reproduce what the teacher's block gives.

    Args:
        student: Any cut of the teacher in which the block is whole; nothing but that block changes.
        block: The block, from 0.
        cut: What stays.
        rows: The block's equations; of its MLP where attention stays.
        config: How.
        kept: The hidden nodes that stay, where they are chosen already.
        sums: The block's equations summed, over all hidden nodes, where they are known.
        step_size: Of the gradient steps, see `ReconstructionConfig.step_sizes`.
        epochs: Of the gradient steps, passes over the rows; a block that keeps its attention does without.
        refit: Learn from the held-out images too once they have judged. Not in a trial: they judge that as well.
        seed: Draws random nodes and orders the rows.
        impl: Implementation of the ops.
        ranks: The processes that share the work, each with all rows.

    Returns:
        The hidden nodes kept, ascending, and how it went.

    Raises:
        NonFiniteError: If the block's error is NaN or infinite.
    """
    adapter = adapter_for(student)
    chosen = choose_nodes(student, block, cut.hidden_features, rows, config, seed, ranks) if kept is None else kept
    kept = tuple(sorted(chosen))
    cut_block(student, block, cut, kept, impl)
    module = _OnTokens(student, block)
    output = adapter.output_layer(student, block)
    nodes = torch.tensor(kept, dtype=torch.int64)
    inputs = nodes if output is None else _inputs_of(nodes, output)
    rows = rows.of_nodes(inputs)
    error_before = error_after = _error(module, rows, ranks)
    ridge = error_closed_form = None
    judged = bool(rows.held_out.any())
    steps = epochs if judged and cut.hidden_features and not cut.attention else 0
    if output is not None:
        known = _sums(module, output, rows, ranks) if sums is None else sums.of_inputs(inputs)
        ridge, error_closed_form = _fit_output_layer(output, known, on_all=refit and not steps, at_most=error_before)
        error_after = error_closed_form
    _require_finite(block, error_after)
    best_epoch, errors = 0, tuple[float, ...]()
    if steps:
        best_epoch, error_after, errors = _descend(
            module, rows, config, step_size, steps, error_after, seed, impl, ranks
        )
        if output is not None:
            found = _sums(module, output, rows, ranks)
            again, error_after = _fit_output_layer(output, found, on_all=refit, at_most=error_after)
            ridge = ridge if again is None else again
            _require_finite(block, error_after)
    return kept, Reconstruction(block, ridge, error_before, error_closed_form, error_after, best_epoch, errors)


def _require_finite(block: int, error: float) -> None:
    """Refuse a block that no longer knows what it is to learn.

    Raises:
        NonFiniteError: If its error is NaN or infinite.
    """
    if not math.isfinite(error):
        raise NonFiniteError(
            f"Block {block}: what is left of its error is {error} after the closed form. The student's values grew too "
            "large; ask for a budget that cuts less, or pass more images."
        )


def find_step_size(
    student: nn.Module,
    block: int,
    cut: Cut,
    rows: Rows,
    config: ReconstructionConfig,
    *,
    kept: Sequence[int] | None = None,
    seed: int = 0,
    impl: Impl = "auto",
    progress: Progress = silent,
) -> float:
    """The step size of `config.step_sizes` with the lowest held-out error after one epoch.

    The arguments are those of `reconstruct_block`, and `progress` is told after each step size; the student is not
    changed.
    """
    if kept is None:
        kept = choose_nodes(student, block, cut.hidden_features, rows, config, seed)
    errors: dict[float, float] = {}
    progress("step sizes", 0, len(config.step_sizes), None)
    for done, step_size in enumerate(config.step_sizes, 1):
        _, report = reconstruct_block(
            copy_blocks(student, [block]), block, cut, rows, config,
            kept=kept, step_size=step_size, epochs=1, seed=seed, impl=impl,
        )  # fmt: skip
        errors[step_size] = report.error_after
        progress("step sizes", done, len(config.step_sizes), report.error_after)
    return least(errors)


def error_curve(
    student: nn.Module, block: int, rows: Rows, config: ReconstructionConfig, seed: int
) -> ErrorCurve | None:
    """What the closed form would miss of a block, by the number of hidden nodes that it keeps.

    The sums over all hidden nodes hold those over any of them, so that one pass over the rows serves every number.

    Args:
        student: Any cut of the teacher in which the block is whole; not changed.
        block: The block, from 0.
        rows: The block's equations, or those of its MLP if attention is to stay.
        config: How the nodes are chosen.
        seed: Draws random ones.

    Returns:
        The curve; `None` if the block has no output layer to solve for.
    """
    module, output = _with_all_nodes(student, block, rows)
    if output is None:
        return None
    hidden = output.layer.weight.shape[1]
    sums = _sums(module, output, rows)
    counts = curve_nodes(hidden)
    most = max((count for count in counts if count < hidden), default=0)
    if config.nodes == "random":
        order = torch.randperm(hidden, generator=torch.Generator().manual_seed(seed))
    else:
        order = select_inputs(sums.used, most, group=output.num_patches)
    anchor = output.weights()
    errors: dict[int, float] = {}
    ridge = FIRST_RIDGE
    for count in reversed(counts):
        nodes = order[:count] if count <= len(order) else torch.arange(hidden)
        inputs = _inputs_of(nodes, output).to(anchor.device)
        ridge, errors[count] = sums.of_inputs(inputs).best_ridge(anchor[inputs], constant=output.constant, near=ridge)
    return ErrorCurve(tuple(order.tolist()), dict(sorted(errors.items())), sums)


def curve_nodes(hidden_features: int) -> tuple[int, ...]:
    """The numbers of hidden nodes, of so many, at which `error_curve` looks, ascending."""
    return tuple(sorted({round(share * hidden_features) for share in CURVE}))


def choose_nodes(
    student: nn.Module,
    block: int,
    count: int,
    rows: Rows,
    config: ReconstructionConfig,
    seed: int,
    ranks: Ranks = ALONE,
) -> tuple[int, ...]:
    """The hidden nodes that a block is to keep: most useful first, or in any order if drawn at random.

    Args:
        student: Any cut of the teacher in which the block is whole; not changed.
        block: The block, from 0.
        count: How many.
        rows: The block's equations.
        config: How they are chosen.
        seed: Draws random ones.
        ranks: The processes that share the work, each with all rows.
    """
    if config.nodes == "random" or count == 0:
        return draw_kept_nodes(student, block, count, seed)
    module, output = _with_all_nodes(student, block, rows)
    if output is None:
        return draw_kept_nodes(student, block, count, seed)
    few = rows.thinned()
    equations = _summed(module, output, few, torch.arange(len(few.given), device=few.given.device), ranks)
    return tuple(select_inputs(equations, count, group=output.num_patches).tolist())


def _inputs_of(nodes: Tensor, output: OutputLayer) -> Tensor:
    """Which inputs of the layer come of some nodes: `num_patches` in a row of each."""
    return (nodes[:, None] * output.num_patches + torch.arange(output.num_patches, device=nodes.device)).flatten()


class _OnTokens(nn.Module):
    """A block without attention, or the second half of one that has it, from tokens to tokens: each alone."""

    def __init__(self, model: nn.Module, block: int) -> None:
        super().__init__()
        self._adapter = adapter_for(model)
        halves = self._adapter.halves(model, block)
        self.block = self._adapter.block(model, block) if halves is None else halves[1]

    def forward(self, tokens: Tensor) -> Tensor:
        return self._adapter.as_tokens(self.block(self._adapter.from_tokens(tokens)))

    def hidden(self, state: Tensor) -> Tensor:
        """The hidden nodes `[R, K]` that the output layer is given."""
        return self._adapter.as_tokens(state)[0]


def _with_all_nodes(student: nn.Module, block: int, rows: Rows) -> tuple[_OnTokens, OutputLayer | None]:
    """What its equations are of, with every hidden node: a block without its attention, or the second half of it."""
    adapter = adapter_for(student)
    if rows.nodes.shape[1]:
        return _OnTokens(student, block), adapter.output_layer(student, block)
    whole = copy_blocks(student, [block])
    adapter.compress_block(whole, block, range(adapter.hidden_features(whole, block)))
    return _OnTokens(whole, block), adapter.output_layer(whole, block)


@torch.no_grad()
def _equations(module: _OnTokens, output: OutputLayer, rows: Rows, chosen: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden nodes `[R, K]` and missing output `[R, D]` of a block, of some rows, piece by piece."""
    if rows.nodes.shape[1]:
        for piece in chosen.split(CHUNK):
            yield rows.nodes[piece], rows.wanted[piece] - rows.inputs[piece]
        return
    hidden: list[Tensor] = []
    handle = output.layer.register_forward_pre_hook(lambda _, args: hidden.append(module.hidden(args[0])))
    try:
        for piece in chosen.split(CHUNK):
            module(rows.given[piece][None])
            yield hidden.pop(), rows.wanted[piece] - rows.inputs[piece]
    finally:
        handle.remove()


def _summed(module: _OnTokens, output: OutputLayer, rows: Rows, chosen: Tensor, ranks: Ranks) -> NormalEquations:
    """The equations of a block's output layer over some rows, by index: each rank sums its share."""
    if len(chosen) < ranks.size:
        return NormalEquations.of(_equations(module, output, rows, chosen))
    found = NormalEquations.of(_equations(module, output, rows, chosen[ranks.share(len(chosen))]))
    energy = found.gram.new_tensor([found.energy])
    ranks.sum(found.gram, found.moment, energy)
    return NormalEquations(found.gram, found.moment, float(energy), len(chosen))


def _sums(module: _OnTokens, output: OutputLayer, rows: Rows, ranks: Ranks = ALONE) -> Sums:
    """The equations of a block's output layer."""
    used, judged = ((~rows.held_out).nonzero().flatten(), rows.held_out.nonzero().flatten())
    held_out = _summed(module, output, rows, judged, ranks) if len(judged) else None
    return Sums(_summed(module, output, rows, used, ranks), held_out)


@torch.no_grad()
def _fit_output_layer(
    output: OutputLayer,
    sums: Sums,
    *,
    on_all: bool,
    at_most: float = float("inf"),
) -> tuple[float | None, float]:
    """Closed form, in place: λ, or `None` if the layer stays as it is, and the held-out error, which may be NaN.

    Args:
        output: What the block ends with.
        sums: Its equations.
        on_all: Once λ is found, solve for the held-out images too.
        at_most: The held-out error to beat; else the layer stays as it is.
    """
    anchor, constant = output.weights(), output.constant
    ridge, error = sums.best_ridge(anchor, constant=constant)
    equations = sums.used
    if sums.held_out is not None:
        if not error <= at_most:
            return None, error if math.isnan(error) else at_most
        equations = sums.used + sums.held_out if on_all else sums.used
    output.set(equations.solve(ridge, anchor, constant=constant))
    return ridge, error


def _descend(
    module: _OnTokens,
    rows: Rows,
    config: ReconstructionConfig,
    step_size: float,
    epochs: int,
    error: float,
    seed: int,
    impl: Impl,
    ranks: Ranks,
) -> tuple[int, float, tuple[float, ...]]:
    """Gradient steps on a block alone, in place; the best epoch, its held-out error, and that of each epoch.

    Epoch 0 is the start, with the given error: nothing worse is ever kept.
    """
    given, wanted = rows.given[~rows.held_out], rows.wanted[~rows.held_out]
    energy = (wanted - given).square().mean().clamp_min(torch.finfo(given.dtype).tiny)
    optimizer = relative_adam(module, step_size)
    best, best_epoch = copy.deepcopy(module.state_dict()), 0
    per_epoch = -(-len(given) // config.batch_rows)
    total, step = epochs * per_epoch, 0
    errors: list[float] = []
    drawing = generator(seed, "rows")
    with torch.enable_grad(), trainable(module):
        trained = ranks.parallel(module)
        for epoch in range(1, epochs + 1):
            for chosen in torch.randperm(len(given), generator=drawing).to(given.device).split(config.batch_rows):
                set_step_size(optimizer, step_size * warmup_cosine(step, total, per_epoch // 2))
                index, share = ranks.batch(chosen)
                loss = share * mimic_loss(trained(given[index][None]), wanted[index][None], impl=impl) / energy
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                step += 1
            found = _error(module, rows, ranks)
            errors.append(found)
            if found < error:
                error, best_epoch, best = found, epoch, copy.deepcopy(module.state_dict())
    module.load_state_dict(best)
    return best_epoch, error, tuple(errors)


@torch.no_grad()
def _error(module: _OnTokens, rows: Rows, ranks: Ranks = ALONE) -> float:
    """Share of the teacher's block's contribution that a block misses, on the held-out rows, or all without any."""
    judged = (rows.held_out if bool(rows.held_out.any()) else ~rows.held_out).nonzero().flatten()
    total = torch.zeros(2, dtype=torch.float64, device=rows.given.device)  # missed, and all
    for piece in judged[ranks.share(len(judged))].split(CHUNK):
        x, y = rows.given[piece], rows.wanted[piece]
        total[0] += (module(x[None])[0] - y).double().square().sum()
        total[1] += (y - rows.inputs[piece]).double().square().sum()
    ranks.sum(total)
    missed, energy = total.tolist()
    return float(missed / max(energy, torch.finfo(torch.float64).tiny))
