"""The views that blocks are fitted on, and what the teacher makes of them."""

import functools
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dcvit.config import CalibrationConfig
from dcvit.context import STANDALONE, RunContext
from dcvit.data.augment import augment
from dcvit.data.images import FewShotImages
from dcvit.models import compressible
from dcvit.runtime.seeding import generator
from dcvit.runtime.spill import SpilledBuffer

__all__ = ["FEW_ROWS", "HELD_OUT_EVERY", "Holdout", "Rows", "TeacherStates", "Views", "draw_views", "tokens_at"]

HELD_OUT_EVERY = 5
"""One image of so many is held out, with all its views; in the end blocks learn from it too."""


@functools.lru_cache(maxsize=8)
def _few(count: int, enough: int) -> Tensor:
    """Which rows are enough of more, ascending; not to be written to."""
    # Not every n-th: that could leave out all rows that are held out.
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:enough].sort().values


def _thinned(*tensors: Tensor) -> list[Tensor]:
    """Of tensors of equally many rows those that `_few` chooses; all where they are few."""
    count, device = len(tensors[0]), tensors[0].device
    return list(tensors) if count <= FEW_ROWS else [tensor[_few(count, FEW_ROWS).to(device)] for tensor in tensors]


class Holdout:
    """Things of which some validate, and are not learnt from until they have.

    Attributes:
        held_out: Which ones validate, `[N]`.
    """

    held_out: Tensor

    @property
    def validates(self) -> bool:
        """Whether there are any that do."""
        return bool(self.held_out.any())

    @property
    def validation(self) -> Tensor:
        """Those that do, by index."""
        return self.held_out.nonzero().flatten()

    @property
    def training(self) -> Tensor:
        """The others, by index."""
        return (~self.held_out).nonzero().flatten()


@dataclass(frozen=True)
class Rows(Holdout):
    """The equations of one block.

    Attributes:
        inputs: What the student's block gets, `[R, D]`; with what its output layer gets behind that, `[R, D + K]`, where
            that layer does not see each token alone (see `ModelView.sublayers`).
        targets: What the teacher's block gives, `[R, D]`.
        held_out: Which rows judge and are not learnt from, `[R]`.
    """

    inputs: Tensor
    targets: Tensor
    held_out: Tensor

    @property
    def residual(self) -> Tensor:
        """What the block adds to, `[R, D]`."""
        return self.inputs[:, : self.targets.shape[1]]

    @property
    def features(self) -> Tensor:
        """What the output layer gets `[R, K]`, where it is known; else `[R, 0]`."""
        return self.inputs[:, self.targets.shape[1] :]

    def with_features(self, kept: Tensor) -> "Rows":
        """The same for a block that keeps only some inputs of its output layer, by index."""
        if not self.features.shape[1]:
            return self
        return Rows(
            torch.cat([self.residual, self.features[:, kept.to(self.inputs.device)]], 1), self.targets, self.held_out
        )

    def thinned(self) -> "Rows":
        """At most `FEW_ROWS` of them, drawn at random but always the same."""
        if len(self.inputs) <= FEW_ROWS:
            return self
        return Rows(*_thinned(self.inputs, self.targets, self.held_out))


FEW_ROWS = 16384
"""Rows that suffice to choose units, whose products are the most expensive ones, and to try a block."""


def tokens_at(tokens: Tensor, places: Tensor) -> Tensor:
    """Some tokens `[B·S, D]` of all `[B, N, D]`, by their places `[B, S]`."""
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1])).flatten(0, 1)


@dataclass(frozen=True)
class Views(Holdout):
    """The images that blocks are reconstructed on.

    Attributes:
        images: The few-shot images, then random views of them: `[V, C, H, W]`, normalised. Read them in parts.
        held_out: Which views are of held-out images, `[V]`.
        keys: Random numbers, one for each token before the first block, `[V, N]`: those of the largest are drawn.
        num_tokens: S, how many tokens of a view serve as equations; all where there are fewer.
    """

    images: SpilledBuffer
    held_out: Tensor
    keys: Tensor
    num_tokens: int

    def places(self, available: int, views: slice = slice(None)) -> Tensor:
        """Which of so many tokens are chosen `[V, S]`, of all views or some; later stages have fewer than the first."""
        # The places of the largest of random numbers are a draw without replacement.
        return self.keys[views, :available].topk(min(self.num_tokens, available)).indices

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


class TeacherStates:
    """What each block of the teacher takes and gives, at the rows of some views.

    Args:
        teacher: The original.
        views: The images.
        batch_size: Images a pass.
        prunable: The blocks of which `mlp_rows` will be asked.
        keep_output: Whether to keep the output tokens of all views, which `output` then holds, `[V, N, D]`.
        context: Its ranks share the passes, and each then holds what all found; its progress is told after each.
    """

    def __init__(
        self,
        teacher: nn.Module,
        views: Views,
        batch_size: int,
        *,
        prunable: Collection[int] = (),
        keep_output: bool = False,
        context: RunContext = STANDALONE,
    ) -> None:
        view, processes, progress = compressible(teacher), context.processes, context.progress
        depth = view.num_blocks()
        self._held_out = views.held_out
        inputs, targets = [SpilledBuffer() for _ in range(depth)], [SpilledBuffer() for _ in range(depth)]
        sublayers = {block: found for block in prunable if (found := view.sublayers(block)) is not None}
        between = {block: SpilledBuffer() for block in sublayers}
        outputs = SpilledBuffer()
        count = len(views.images)
        firsts, counts = processes.batches(count, batch_size)
        progress("views", 0, count, None)
        with torch.no_grad():
            for first in firsts:
                part = slice(first, first + batch_size)
                state = view.embed(views.images[part])
                for block in range(depth):
                    prepared = view.prepare(state, block)
                    # Where nothing lies between two blocks, what one takes is what the other gave, and kept once.
                    if block == 0 or prepared is not state:
                        inputs[block].append(views.rows(view.as_tokens(prepared), part))
                    if block in sublayers:
                        attention, mlp = sublayers[block]
                        middle = attention(prepared)
                        between[block].append(views.few_rows(view.as_tokens(middle), part))
                        state = mlp(middle)
                    else:
                        state = view.run_blocks(state, block, block + 1)
                    targets[block].append(views.rows(view.as_tokens(state), part))
                if keep_output:
                    outputs.append(view.final_norm(state))
                progress("views", min(first + batch_size, count), count, None)

        self._targets = [processes.gathered(buffer, counts) for buffer in targets]
        self._inputs = [
            processes.gathered(buffer, counts) if len(buffer) else self._targets[block - 1]
            for block, buffer in enumerate(inputs)
        ]
        self._between = {block: processes.gathered(buffer, counts) for block, buffer in between.items()}
        self.output = processes.gathered(outputs, counts) if keep_output else None

    def rows(self, block: int, inputs: Tensor | None = None, *, few: bool = False) -> Rows:
        """The equations of a block.

        Args:
            block: The block, from 0.
            inputs: What a student's block gets, `[R, D]` or `[R, D + K]`; what the teacher's gets if not given.
            few: `inputs` has those of `Rows.thinned` alone, and so have the others.
        """
        targets = self._targets[block][:]
        held_out = self._held_out.repeat_interleave(len(targets) // len(self._held_out))
        if few:
            targets, held_out = _thinned(targets, held_out)
        return Rows(self._inputs[block][:] if inputs is None else inputs, targets, held_out)

    def mlp_rows(self, block: int) -> Rows:
        """The equations of the MLP of a prunable block alone, thinned.

        Raises:
            KeyError: If the block was not named as prunable, or its equations were given up.
        """
        return self.rows(block, self._between[block][:], few=True)

    def release_mlp_rows(self, blocks: Iterable[int]) -> None:
        """Free what `mlp_rows` needs of some blocks."""
        for block in blocks:
            self._between.pop(block, None)


def draw_views(
    teacher: nn.Module,
    images: FewShotImages,
    config: CalibrationConfig,
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
    total = config.num_views if num_views is None else num_views
    folds = 0 if augmentation is None else max(0, total // count - 1)
    # Two of one seed, so that a seed still gives what it gave when torch's global generator drew the views.
    of_views, of_rows = generator(seed, "views"), generator(seed, "views")
    with torch.no_grad():
        views = SpilledBuffer([images.normalised])
        if augmentation is not None:
            for _ in range(folds):
                views.append(augment(images, range(count), augmentation, of_views))
        view = compressible(teacher)
        available = view.as_tokens(view.embed(images.normalised[:1])).shape[1]
        keys = torch.rand(len(views), available, generator=of_rows, dtype=torch.float32)
        held_out = torch.zeros(count, dtype=torch.bool)
        held_out[torch.randperm(count, generator=of_rows)[1::held_out_every]] = True
    device = images.normalised.device
    return Views(views, held_out.repeat(folds + 1).to(device), keys.to(device), max(1, config.num_rows // len(views)))
