"""The views that blocks are fitted on, and the teacher's activations for them."""

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
"""One in this many images is held out with all its views. The final fit of a block uses these images too."""


@functools.lru_cache(maxsize=8)
def _few(count: int, enough: int) -> Tensor:
    """Return the indices of `enough` of `count` rows, ascending. The result is cached, so do not write to it."""
    # Taking every n-th row could leave out all held-out rows.
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:enough].sort().values


def _thinned(*tensors: Tensor) -> list[Tensor]:
    """Return the rows that `_few` chooses of tensors with equally many rows, or all rows if there are few."""
    count, device = len(tensors[0]), tensors[0].device
    return list(tensors) if count <= FEW_ROWS else [tensor[_few(count, FEW_ROWS).to(device)] for tensor in tensors]


class Holdout:
    """Examples of which some are held out for validation.

    Attributes:
        held_out: Mask of the examples used for validation, `[N]`.
    """

    held_out: Tensor

    @property
    def validates(self) -> bool:
        """Whether any example is held out."""
        return bool(self.held_out.any())

    @property
    def validation(self) -> Tensor:
        """Indices of the examples used for validation."""
        return self.held_out.nonzero().flatten()

    @property
    def training(self) -> Tensor:
        """Indices of the examples used for training."""
        return (~self.held_out).nonzero().flatten()


@dataclass(frozen=True)
class Rows(Holdout):
    """The equations of one block.

    Attributes:
        inputs: Inputs of the student's block, `[R, D]`. If the block's output layer does not act on each token
            separately (see `ModelView.sublayers`), the inputs of that layer follow, `[R, D + K]`.
        targets: Outputs of the teacher's block, `[R, D]`.
        held_out: Mask of the rows used for validation, `[R]`.
    """

    inputs: Tensor
    targets: Tensor
    held_out: Tensor

    @property
    def residual(self) -> Tensor:
        """The residual stream that the block adds to, `[R, D]`."""
        return self.inputs[:, : self.targets.shape[1]]

    @property
    def features(self) -> Tensor:
        """Inputs of the output layer, `[R, K]`; `[R, 0]` if they are not stored."""
        return self.inputs[:, self.targets.shape[1] :]

    def with_features(self, kept: Tensor) -> "Rows":
        """Return the equations of a block that keeps only some inputs of its output layer, given by index."""
        if not self.features.shape[1]:
            return self
        return Rows(
            torch.cat([self.residual, self.features[:, kept.to(self.inputs.device)]], 1), self.targets, self.held_out
        )

    def thinned(self) -> "Rows":
        """Return at most `FEW_ROWS` of the rows, drawn at random with a fixed seed."""
        if len(self.inputs) <= FEW_ROWS:
            return self
        return Rows(*_thinned(self.inputs, self.targets, self.held_out))


FEW_ROWS = 16384
"""Number of rows that suffices to choose hidden units, whose products cost most, and to probe a block."""


def tokens_at(tokens: Tensor, indices: Tensor) -> Tensor:
    """Return the tokens `[B·S, D]` of `[B, N, D]` at the token indices `[B, S]`."""
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1])).flatten(0, 1)


@dataclass(frozen=True)
class Views(Holdout):
    """The images that blocks are reconstructed on.

    Attributes:
        images: The few-shot images, followed by random views of them: `[V, C, H, W]`, normalised. Read them in parts.
        held_out: Mask of the views of held-out images, `[V]`.
        keys: Sampling keys, one random number for each token before the first block, `[V, N]`. The tokens with the
            largest keys are drawn.
        num_tokens: S, the number of tokens per view that serve as equations. A view with fewer tokens uses all of them.
    """

    images: SpilledBuffer
    held_out: Tensor
    keys: Tensor
    num_tokens: int

    def token_indices(self, available: int, views: slice = slice(None)) -> Tensor:
        """Return the indices of the sampled tokens, `[V, S]`.

        Args:
            available: Number of tokens per view. Later stages have fewer than the first.
            views: The views; all by default.
        """
        # The indices of the largest random numbers are a draw without replacement.
        return self.keys[views, :available].topk(min(self.num_tokens, available)).indices

    def rows(self, tokens: Tensor, views: slice = slice(None)) -> Tensor:
        """Return the sampled tokens `[V·S, D]` of the tokens `[V, N, D]` of some views, by default all."""
        return tokens_at(tokens, self.token_indices(tokens.shape[1], views))

    def few_rows(self, tokens: Tensor, views: slice) -> Tensor:
        """Return the sampled tokens of some views that `Rows.thinned` keeps, `[·, D]`."""
        rows = self.rows(tokens, views)
        of_each = len(rows) // len(tokens)
        if of_each * len(self.images) <= FEW_ROWS:
            return rows
        few = _few(of_each * len(self.images), FEW_ROWS) - of_each * views.start
        return rows[few[(few >= 0) & (few < len(rows))].to(rows.device)]

    def rows_of_all(self, batches: Iterable[Tensor], first: int = 0, *, few: bool = False) -> Tensor:
        """Return the sampled tokens `[V·S, D]` of consecutive views. Only one batch has to be in memory at a time.

        Args:
            batches: Tokens `[B, N, D]` of each batch of views.
            first: Index of the first view.
            few: Whether to take `few_rows` of each batch instead of `rows`.
        """
        chosen = []
        for tokens in batches:
            part = slice(first, first + len(tokens))
            chosen.append((self.few_rows if few else self.rows)(tokens, part))
            first += len(tokens)
        return torch.cat(chosen)


class TeacherStates:
    """Inputs and outputs of each block of the teacher at the sampled tokens of some views.

    Args:
        teacher: The original model.
        views: The images.
        batch_size: Number of images per forward pass.
        prunable: The blocks for which `mlp_rows` will be called.
        keep_output: Whether to keep the output tokens of all views in `output`, `[V, N, D]`.
        context: Context of the run. Its processes share the forward passes, and afterwards each process holds all
            results. Its progress callback is called after each pass.
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
                    # If nothing lies between two blocks, the input of the second is the output of the first: keep it
                    # only once.
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
        """Return the equations of a block.

        Args:
            block: Index of the block, from 0.
            inputs: Inputs of the student's block, `[R, D]` or `[R, D + K]`; those of the teacher's block by default.
            few: Whether `inputs` has only the rows of `Rows.thinned`. The targets are then thinned too.
        """
        targets = self._targets[block][:]
        held_out = self._held_out.repeat_interleave(len(targets) // len(self._held_out))
        if few:
            targets, held_out = _thinned(targets, held_out)
        return Rows(self._inputs[block][:] if inputs is None else inputs, targets, held_out)

    def mlp_rows(self, block: int) -> Rows:
        """Return the equations of only the MLP of a prunable block, thinned.

        Raises:
            KeyError: If the block is not in `prunable`, or its equations were released.
        """
        return self.rows(block, self._between[block][:], few=True)

    def release_mlp_rows(self, blocks: Iterable[int]) -> None:
        """Free the activations that `mlp_rows` needs for some blocks."""
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
    """Draw random views of the few-shot images, the held-out images and the sampling keys of the tokens.

    Args:
        teacher: The original model, which determines the number of tokens per image.
        images: The few-shot set.
        config: Settings of the views and rows.
        seed: Seed of the views and rows.
        num_views: Number of views, the few-shot images included; `config.num_views` by default.
        held_out_every: One in this many images is held out, drawn at random.
    """
    count, augmentation = len(images), config.augmentation
    total = config.num_views if num_views is None else num_views
    folds = 0 if augmentation is None else max(0, total // count - 1)
    # Two generators with one seed: results for a seed stay as they were when torch's global generator drew the views.
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
