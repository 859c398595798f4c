"""Steps 2 and 5: feature distillation, which trains a compressed student to match its teacher's output tokens.

Source: DC-ViT (arXiv 2403.18708). The loss is the mean squared error between all output tokens of student and teacher
after the final norm. Only the front part of the student is updated. This is more accurate than updating everything, and
the backward pass is cheaper.

Several students of one teacher train in lock step: they see the same batches, which are drawn once, and share the
teacher's activations. The result of a student does not depend on the others.
"""

import copy
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dcvit.config import DistillationConfig
from dcvit.context import STANDALONE, RunContext
from dcvit.data.augment import augment
from dcvit.data.images import FewShotImages
from dcvit.errors import DcvitError
from dcvit.history import Recovery
from dcvit.models import compressible
from dcvit.models.surgery import share_parameters
from dcvit.models.teacher import evaluating
from dcvit.ops import Impl, distillation_loss
from dcvit.runtime.distributed import ProcessGroup
from dcvit.runtime.optim import least, warmup_cosine
from dcvit.runtime.process_state import own_state
from dcvit.runtime.seeding import generator

__all__ = [
    "Candidate",
    "Selection",
    "Tail",
    "find_learning_rate",
    "output_tokens",
    "recover",
    "recover_together",
    "require_tokens",
    "split_held_out",
    "token_loss",
    "updated_parameters",
]

HELD_OUT_SHARE = 0.2
"""Share of the few-shot images on which learning rates are compared."""

Selection = Callable[[int, Mapping[int, nn.Module]], Collection[int]]
"""Called after each epoch as `selection(epochs_done, students)`, with the students that still train by position.

It returns the positions of the students that continue.
"""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A student to recover.

    Attributes:
        student: The compressed model.
        blocks: Its compressed blocks, which determine the updated parameters.
        learning_rate: Peak learning rate; `None` takes the config's.
        updated: The parameters to update; `None` takes those that the config selects.
    """

    student: nn.Module
    blocks: tuple[int, ...]
    learning_rate: float | None = None
    updated: tuple[nn.Parameter, ...] | None = None


def recover(
    student: nn.Module,
    teacher: nn.Module,
    images: FewShotImages,
    blocks: Sequence[int],
    config: DistillationConfig,
    context: RunContext = STANDALONE,
    *,
    stage: str = "recovery",
) -> Recovery:
    """Train a compressed student, in place, to reproduce the teacher's output tokens.

    Both models are in evaluation mode during training: the targets depend only on the image, without dropout or
    stochastic depth.

    Args:
        student: The compressed model; its weights change. Afterwards it is in evaluation mode with frozen parameters.
        teacher: The original model; it does not change.
        images: The few-shot set.
        blocks: The compressed blocks of the student, which determine the updated parameters.
        config: Settings of the distillation. Its `learning_rate` must be a number; resolve `"auto"` with
            `find_learning_rate`.
        context: Context of the run. Its seed orders and augments the images; its processes share each batch.
        stage: Name of the stage in progress reports, which follow each epoch.

    Returns:
        The losses and the time of the recovery.

    Raises:
        ValueError: If the learning rate is `"auto"`.
    """
    (recovery,) = recover_together([Candidate(student, tuple(blocks))], teacher, images, config, context, stage=stage)
    return recovery


@own_state()
def recover_together(
    candidates: Sequence[Candidate],
    teacher: nn.Module,
    images: FewShotImages,
    config: DistillationConfig,
    context: RunContext = STANDALONE,
    *,
    selection: Selection | None = None,
    stage: str = "recovery",
) -> tuple[Recovery, ...]:
    """Train several students in lock step, in place, each as `recover` would on its own with the same seed.

    Args:
        candidates: The students; their weights change.
        teacher: The original model; it does not change.
        images: The few-shot set.
        config: Settings for all students; `lock_step` is the number of students that process a batch at once.
        context: Context of the run. Its seed orders and augments the images; its processes share each batch of each
            student.
        selection: Chooses the students that continue after each epoch; `None` trains all to the end.
        stage: Name of the stage in progress reports, which follow each epoch with the smallest training loss.

    Returns:
        The recovery of each candidate, in their order.

    Raises:
        ValueError: If a learning rate is `"auto"`.
        DcvitError: If the config distils the class token and the teacher has none.
    """
    mark = time.perf_counter()
    require_tokens(teacher, config)
    impl, processes, progress = context.impl, context.processes, context.progress
    runs = [_Run(candidate, teacher, config, processes) for candidate in candidates]
    running = runs
    drawing = context.generator("recovery")
    with evaluating(teacher):
        views = _Views(teacher, images, {run.start for run in runs}, config, drawing)
        weight = _token_weight(views.targets, config)
        before = [token_loss(run.student, views.targets, images, config, impl=impl) for run in runs]
        progress(stage, 0, config.epochs, None)
        for epoch in range(config.epochs):
            for run in running:
                run.begin_epoch(warmup_cosine(epoch, config.epochs, config.warmup_epochs))
            for indices in torch.randperm(len(images), generator=drawing).split(config.batch_size):
                mine, share = processes.batch(torch.arange(len(indices)))
                batch = views.of(epoch, indices.tolist(), mine.tolist())
                for first in range(0, len(running), config.lock_step):
                    _step(
                        running[first : first + config.lock_step], batch, weight, impl, share, config.micro_batch_size
                    )
            for run in running:
                run.end_epoch(len(images))
            mark = _charge(running, mark)
            progress(stage, epoch + 1, config.epochs, _smallest([run.losses[-1] for run in running]))
            if selection is not None:
                going = selection(epoch + 1, {i: run.student for i, run in enumerate(runs) if run in running})
                running = [run for i, run in enumerate(runs) if i in going]
    for run in runs:
        run.student.requires_grad_(False)
    after = [token_loss(run.student, views.targets, images, config, impl=impl) for run in runs]
    _charge(runs, mark)
    return tuple(
        Recovery(loss_before, loss_after, tuple(run.losses), run.peak, run.seconds)
        for run, loss_before, loss_after in zip(runs, before, after, strict=True)
    )


class _Run:
    """The running recovery of one student.

    Attributes:
        student: The student.
        peak: Peak learning rate.
        start: First block that the student computes itself. Everything before it equals the teacher and is not updated.
        losses: Training loss of each epoch so far.
        seconds: Wall-clock time so far.
    """

    def __init__(
        self, candidate: Candidate, teacher: nn.Module, config: DistillationConfig, processes: ProcessGroup
    ) -> None:
        rate = config.learning_rate if candidate.learning_rate is None else candidate.learning_rate
        if rate == "auto":
            raise ValueError("learning_rate='auto': recover needs a number, find_learning_rate finds one.")
        self.student, self.peak = candidate.student, rate
        updated = list(candidate.updated or updated_parameters(self.student, candidate.blocks, config))
        self.student.eval().requires_grad_(False)
        for parameter in updated:
            parameter.requires_grad_(True)
        self.start = _shared_prefix(self.student, teacher, updated)
        self.losses: list[float] = []
        self.seconds = 0.0
        self._tail = processes.parallel(Tail(self.student, self.start or None))
        self._processes = processes
        self._optimizer = torch.optim.AdamW(updated, lr=rate, weight_decay=config.weight_decay, fused=True)
        self._total: Tensor | float = 0.0

    def begin_epoch(self, share: float) -> None:
        """Start an epoch at a share of the peak learning rate."""
        self._total = 0.0
        for group in self._optimizer.param_groups:
            group["lr"] = self.peak * share

    def tokens(self, batch: "_Batch") -> Tensor:
        """Return the student's output tokens `[B, N, D]`."""
        tokens: Tensor = self._tail(batch.inputs[self.start])
        return tokens

    def step(self, loss: Tensor, num_images: int) -> None:
        """Take an optimiser step and clear the gradients. The loss stays on its device to avoid a synchronisation."""
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._total = self._total + loss.double() * num_images

    def end_epoch(self, num_images: int) -> None:
        """Record the epoch's training loss."""
        total = torch.tensor([float(self._total)], dtype=torch.float64)
        self._processes.sum(total)
        self.losses.append(float(total) / num_images)


class Tail(nn.Module):
    """A model without the blocks before a given one.

    Args:
        model: The model.
        first: The block whose input tokens `[B, N, D]` are the module's input; `None` takes images.
    """

    def __init__(self, model: nn.Module, first: int | None) -> None:
        super().__init__()
        self.model, self.first = model, first

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the output tokens `[B, N, D]`."""
        view = compressible(self.model)
        if self.first is None:
            return view.tokens(inputs)
        tokens = view.run_blocks(inputs, self.first, view.num_blocks())
        return view.final_norm(tokens)


def _shared_prefix(student: nn.Module, teacher: nn.Module, updated: Sequence[nn.Parameter]) -> int:
    """Return the number of the student's first blocks that equal the teacher's, stem included, and are not updated."""
    view, changing = compressible(student), {id(parameter) for parameter in updated}
    depth = view.num_blocks()
    for block in range(depth):
        ours, theirs = (compressible(model).parameters(block, block) for model in (student, teacher))
        if len(ours) != len(theirs) or any(id(parameter) in changing for parameter in ours):
            return block
        if not all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)):
            return block
    return depth


@dataclass(frozen=True)
class _Batch:
    """A batch of views.

    Attributes:
        inputs: Inputs of a student by its first computed block: the views `[B, C, H, W]` for block 0, and the teacher's
            tokens before the block, `[B, N, D]`, for the others.
        target: The teacher's output tokens, `[B, N, D]`.
    """

    inputs: Mapping[int, Tensor]
    target: Tensor

    def of(self, chosen: Sequence[int]) -> "_Batch":
        """Return the views at the given indices."""
        index = torch.tensor(chosen, dtype=torch.long, device=self.target.device)
        return _Batch({start: values[index] for start, values in self.inputs.items()}, self.target[index])

    def split(self, count: int) -> "list[_Batch]":
        """Split the batch into parts of at most `count` views."""
        parts = range(0, len(self.target), count)
        return [
            _Batch({start: values[i : i + count] for start, values in self.inputs.items()}, self.target[i : i + count])
            for i in parts
        ]


class _Views:
    """The views of each epoch, with the teacher's activations for them.

    Args:
        teacher: The original model.
        images: The few-shot set.
        starts: The first computed block of each student.
        config: Settings of the distillation.
        drawing: Random generator of the views.

    Attributes:
        targets: The teacher's output tokens for the unaugmented images, `[N, T, D]`.
    """

    def __init__(
        self,
        teacher: nn.Module,
        images: FewShotImages,
        starts: Collection[int],
        config: DistillationConfig,
        drawing: torch.Generator,
    ) -> None:
        self._teacher, self._images, self._starts, self._config = teacher, images, sorted(starts), config
        self._drawing = drawing
        augmentation = config.augmentation
        all_images = range(len(images))
        self._fixed: list[_Batch] | None = None
        if augmentation is None:
            self._fixed = [self._see(images.normalised)]
            self.targets = self._fixed[0].target
            return
        self.targets = output_tokens(teacher, images.normalised, config.micro_batch_size)
        if config.fixed_views is not None:
            count = min(config.fixed_views, config.epochs)
            self._fixed = [self._see(augment(images, all_images, augmentation, drawing)) for _ in range(count)]

    def of(self, epoch: int, chosen: Sequence[int], mine: Sequence[int]) -> _Batch:
        """Return the views of this process's images. All images' views are drawn, so that processes draw the same.

        Args:
            epoch: Index of the epoch, from 0.
            chosen: Indices of the images in the batch.
            mine: Positions in `chosen` of this process's share.
        """
        if self._fixed is not None:
            return self._fixed[epoch % len(self._fixed)].of([chosen[position] for position in mine])
        assert self._config.augmentation is not None
        return self._see(augment(self._images, chosen, self._config.augmentation, self._drawing)[mine])

    @torch.no_grad()
    def _see(self, views: Tensor) -> _Batch:
        """Run the teacher once, and keep its tokens before each student's first computed block."""
        teacher = compressible(self._teacher)
        depth = teacher.num_blocks()
        kept: dict[int, list[Tensor]] = {start: [] for start in self._starts}
        outputs: list[Tensor] = []
        for images in views.split(self._config.micro_batch_size):
            tokens, at = teacher.embed(images), 0
            for start in self._starts:
                tokens, at = teacher.run_blocks(tokens, at, start), start
                kept[start].append(tokens if start > 0 else images)
            outputs.append(teacher.final_norm(teacher.run_blocks(tokens, at, depth)))
        return _Batch({start: torch.cat(parts) for start, parts in kept.items()}, torch.cat(outputs))


@torch.enable_grad()
def _step(
    runs: Sequence[_Run], batch: _Batch, weight: Tensor | None, impl: Impl, share: float, micro_batch_size: int
) -> None:
    """Take one gradient step of each student on the same batch. Their activations are in memory at the same time.

    Args:
        runs: The students.
        batch: This process's part of the batch.
        weight: Token weights of the loss.
        impl: Implementation of the ops.
        share: Weight of the part in the batch's gradient, see `ProcessGroup.batch`.
        micro_batch_size: Number of views that pass through a student at once.
    """
    total, count = batch.target.new_zeros(len(runs)), len(batch.target)
    for part in batch.split(micro_batch_size):
        tokens = torch.stack([run.tokens(part) for run in runs])
        losses = distillation_loss(tokens, part.target, weight=weight, impl=impl)
        weighs = len(part.target) / count
        losses.backward(torch.full_like(losses, share * weighs))  # each student's gradient is that of its own loss
        total += weighs * losses.detach()
    for run, loss in zip(runs, total, strict=True):
        run.step(loss, count if share > 0 else 0)


def _charge(runs: Sequence[_Run], since: float) -> float:
    """Divide the time since a mark equally among the runs, and return the new mark."""
    now = time.perf_counter()
    for run in runs:
        run.seconds += (now - since) / len(runs)
    return now


def _smallest(losses: Sequence[float]) -> float:
    """Return the smallest loss among the runs that have not diverged, or NaN if all have."""
    return min((loss for loss in losses if not math.isnan(loss)), default=math.nan)


def find_learning_rate(
    student: nn.Module,
    teacher: nn.Module,
    images: FewShotImages,
    blocks: Sequence[int],
    config: DistillationConfig,
    context: RunContext = STANDALONE,
) -> float:
    """Find the learning rate with the lowest loss on images held out of the recovery.

    A copy of the student is trained with each candidate rate on four fifths of the images, all in lock step. The
    remaining fifth is used for validation. A single image is used for both. The student is not changed.

    Args:
        student: A compressed model.
        teacher: The original model.
        images: The few-shot set.
        blocks: The compressed blocks of the student.
        config: Settings of the distillation; `learning_rates` holds the candidates.
        context: Context of the run. Its seed splits, orders and augments the images. This process does all the work.
    """
    validation, training = split_held_out(images, context.seed)
    with evaluating(teacher):
        target = output_tokens(teacher, validation.normalised, config.micro_batch_size)
    candidates = [Candidate(copy.deepcopy(student), tuple(blocks), rate) for rate in config.learning_rates]
    for candidate in candidates[1:]:
        updated = updated_parameters(candidate.student, blocks, config)
        share_parameters(candidate.student, candidates[0].student, but=updated)
    recover_together(candidates, teacher, training, config, context.single_process(), stage="learning rates")
    losses = (token_loss(candidate.student, target, validation, config, impl=context.impl) for candidate in candidates)
    return least(dict(zip(config.learning_rates, losses, strict=True)))


def split_held_out(images: FewShotImages, seed: int) -> tuple[FewShotImages, FewShotImages]:
    """Split the images into validation and training images for learning rates; a single image is used for both."""
    order = torch.randperm(len(images), generator=generator(seed, "held out"), device="cpu").tolist()
    held_out = max(1, round(len(images) * HELD_OUT_SHARE))
    return images.subset(order[:held_out]), images.subset(order[held_out:] or order)


def updated_parameters(student: nn.Module, blocks: Sequence[int], config: DistillationConfig) -> list[nn.Parameter]:
    """Return the parameters that recovery updates, for the compressed blocks of a student.

    The published choice (`updated="front"`) is everything up to one block after the last compressed one. The final norm
    and the head come after the front and are not updated. Parameters that all blocks share belong to the stem: mixed
    rotary positions of an Eva, the shared position biases of a Beit.
    """
    view = compressible(student)
    last = max(blocks) + 1
    if config.updated == "all":
        return view.body_parameters()
    first = 0 if config.updated == "front" else max(0, min(blocks) - 1)
    return view.parameters(first, last)


def require_tokens(teacher: nn.Module, config: DistillationConfig) -> None:
    """Refuse to distil the class token of a model that has none.

    Raises:
        DcvitError: If `config.tokens` is `"class"` and the model has no class token.
    """
    if config.tokens == "class" and not compressible(teacher).has_class_token():
        raise DcvitError('tokens="class": the model has no class token; distil all tokens with tokens="all".')


def _token_weight(targets: Tensor, config: DistillationConfig) -> Tensor | None:
    """Return token weights `[T]` of the loss for target tokens `[N, T, D]`; `None` weighs all tokens equally."""
    if config.tokens == "all":
        return None
    weight = targets.new_zeros(targets.shape[1])
    weight[0] = 1
    return weight


@torch.no_grad()
def output_tokens(model: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    """Return a model's output tokens `[N, T, D]` for images `[N, C, H, W]`, without gradients."""
    view = compressible(model)
    return torch.cat([view.tokens(batch) for batch in images.split(batch_size)])


@torch.no_grad()
def token_loss(
    student: nn.Module, targets: Tensor, images: FewShotImages, config: DistillationConfig, *, impl: Impl = "auto"
) -> float:
    """Return a student's distillation loss on the unaugmented images against the teacher's tokens `[N, T, D]`."""
    tokens = output_tokens(student, images.normalised, config.micro_batch_size)
    return float(distillation_loss(tokens, targets, weight=_token_weight(targets, config), impl=impl))
