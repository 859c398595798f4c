"""Steps 2 and 5: token distillation, which makes a cut student behave like its teacher again.

Source: DC-ViT (arXiv 2403.18708). The loss is the mean squared error between all output tokens of student and teacher
after the final norm; only the front part of the student is updated, which is both more accurate than updating
everything and cheaper in the backward pass.

Several students of one teacher train in lock step: they see the same batches, drawn once, and share what the teacher
makes of them. What a student learns does not depend on the others.
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
"""Called as selection(epochs done, the students that still train, by position) after each epoch; gives the positions
of those that go on."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A student that is to recover.

    Attributes:
        student: The cut model.
        blocks: Its compressed blocks, which decide what is updated.
        learning_rate: The peak; `None` is the config's.
        updated: The parameters that are updated; `None` takes those that the config names.
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
    """Train a cut student, in place, to reproduce the teacher's output tokens.

    Both are in evaluation mode meanwhile: the target is a function of the image alone, without dropout or stochastic
    depth.

    Args:
        student: The cut model; its weights change. It comes back in evaluation mode, its parameters frozen.
        teacher: The original; untouched.
        images: The few-shot set.
        blocks: The compressed blocks of the student, which decide what is updated.
        config: Its `learning_rate` must be a number; resolve `"auto"` with `find_learning_rate`.
        context: Its seed orders and augments the images, its ranks share each batch.
        stage: The name under which progress is told, after each epoch.

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
    """Train several students in lock step, in place, each as `recover` would alone with the same seed.

    Args:
        candidates: The students; their weights change.
        teacher: The original; untouched.
        images: The few-shot set.
        config: Of all; `lock_step` says how many go through a batch at once.
        context: Its seed orders and augments the images, its ranks share each batch of each student.
        selection: Which students go on after each epoch; `None` trains all to the end.
        stage: The name under which progress is told, after each epoch, with the smallest training loss.

    Returns:
        How each went, in the order of the candidates.

    Raises:
        ValueError: If a learning rate is `"auto"`.
        DcvitError: If the config mimics the class token, and the teacher has none.
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
    """The recovery of one student while it lasts.

    Attributes:
        student: The student.
        peak: The peak learning rate.
        start: The block from which the student is computed. All before it is the teacher's, and stays so.
        losses: Training loss of each epoch so far.
        seconds: So far.
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
        """Train at a share of the peak learning rate."""
        self._total = 0.0
        for group in self._optimizer.param_groups:
            group["lr"] = self.peak * share

    def tokens(self, batch: "_Batch") -> Tensor:
        """Output tokens `[B, N, D]`."""
        tokens: Tensor = self._tail(batch.inputs[self.start])
        return tokens

    def step(self, loss: Tensor, num_images: int) -> None:
        """Follow the gradient, which is not kept. The loss stays on its device, which need not be waited for."""
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._total = self._total + loss.double() * num_images

    def end_epoch(self, num_images: int) -> None:
        """Note the epoch's loss."""
        total = torch.tensor([float(self._total)], dtype=torch.float64)
        self._processes.sum(total)
        self.losses.append(float(total) / num_images)


class Tail(nn.Module):
    """A model from one of its blocks on.

    Args:
        model: The model.
        first: The block, whose tokens `[B, N, D]` it takes; `None` takes images.
    """

    def __init__(self, model: nn.Module, first: int | None) -> None:
        super().__init__()
        self.model, self.first = model, first

    def forward(self, inputs: Tensor) -> Tensor:
        """Output tokens `[B, N, D]`."""
        view = compressible(self.model)
        if self.first is None:
            return view.tokens(inputs)
        tokens = view.run_blocks(inputs, self.first, view.num_blocks())
        return view.final_norm(tokens)


def _shared_prefix(student: nn.Module, teacher: nn.Module, updated: Sequence[nn.Parameter]) -> int:
    """How many of the student's first blocks, with the stem before them, are the teacher's and not updated."""
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
    """Some views.

    Attributes:
        inputs: What a student takes that is computed from a block on, by block: the views `[B, C, H, W]` from 0 on,
            else the teacher's tokens before the block, `[B, N, D]`.
        target: The teacher's output tokens, `[B, N, D]`.
    """

    inputs: Mapping[int, Tensor]
    target: Tensor

    def of(self, chosen: Sequence[int]) -> "_Batch":
        """The chosen ones of them."""
        index = torch.tensor(chosen, dtype=torch.long, device=self.target.device)
        return _Batch({start: values[index] for start, values in self.inputs.items()}, self.target[index])

    def split(self, count: int) -> "list[_Batch]":
        """All of them in parts of so many."""
        parts = range(0, len(self.target), count)
        return [
            _Batch({start: values[i : i + count] for start, values in self.inputs.items()}, self.target[i : i + count])
            for i in parts
        ]


class _Views:
    """What students see in each epoch, and what the teacher makes of it.

    Args:
        teacher: The original.
        images: The few-shot set.
        starts: The blocks from which students are computed.
        config: How.
        drawing: Draws the views.

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
        everyone = range(len(images))
        self._fixed: list[_Batch] | None = None
        if augmentation is None:
            self._fixed = [self._see(images.normalised)]
            self.targets = self._fixed[0].target
            return
        self.targets = output_tokens(teacher, images.normalised, config.micro_batch_size)
        if config.fixed_views is not None:
            count = min(config.fixed_views, config.epochs)
            self._fixed = [self._see(augment(images, everyone, augmentation, drawing)) for _ in range(count)]

    def of(self, epoch: int, chosen: Sequence[int], mine: Sequence[int]) -> _Batch:
        """Views of chosen images, of which only some are looked at: all are drawn, so that ranks draw alike."""
        if self._fixed is not None:
            return self._fixed[epoch % len(self._fixed)].of([chosen[place] for place in mine])
        assert self._config.augmentation is not None
        return self._see(augment(self._images, chosen, self._config.augmentation, self._drawing)[mine])

    @torch.no_grad()
    def _see(self, views: Tensor) -> _Batch:
        """Run the teacher once, and keep its tokens where a student starts."""
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
    """One gradient step of each student on the same batch; their activations are alive together.

    Args:
        runs: The students.
        batch: This rank's part of it.
        weight: Of the tokens.
        impl: Implementation of the ops.
        share: What the part counts, see `ProcessGroup.batch`.
        micro_batch_size: Views that pass through a student at once.
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
    """Share the time since a mark equally; the new mark."""
    now = time.perf_counter()
    for run in runs:
        run.seconds += (now - since) / len(runs)
    return now


def _smallest(losses: Sequence[float]) -> float:
    """The smallest loss of those that have not diverged, NaN if all have."""
    return min((loss for loss in losses if not math.isnan(loss)), default=math.nan)


def find_learning_rate(
    student: nn.Module,
    teacher: nn.Module,
    images: FewShotImages,
    blocks: Sequence[int],
    config: DistillationConfig,
    context: RunContext = STANDALONE,
) -> float:
    """The learning rate that recovers best, judged on images held out of the recovery.

    Each candidate recovers a copy of the student on four fifths of the images, all in lock step; the fifth left out
    decides. A single image serves both ends. The student is not changed.

    Args:
        student: A cut model.
        teacher: The original.
        images: The few-shot set.
        blocks: The compressed blocks of the student.
        config: `learning_rates` holds the candidates.
        context: Its seed splits, orders and augments the images. One process does it all.
    """
    judged, used = split_held_out(images, context.seed)
    with evaluating(teacher):
        target = output_tokens(teacher, judged.normalised, config.micro_batch_size)
    candidates = [Candidate(copy.deepcopy(student), tuple(blocks), rate) for rate in config.learning_rates]
    for candidate in candidates[1:]:
        updated = updated_parameters(candidate.student, blocks, config)
        share_parameters(candidate.student, candidates[0].student, but=updated)
    recover_together(candidates, teacher, used, config, context.single_process(), stage="learning rates")
    losses = (token_loss(candidate.student, target, judged, config, impl=context.impl) for candidate in candidates)
    return least(dict(zip(config.learning_rates, losses, strict=True)))


def split_held_out(images: FewShotImages, seed: int) -> tuple[FewShotImages, FewShotImages]:
    """The images that judge learning rates, and those that are learnt from: all of them where there is but one."""
    order = torch.randperm(len(images), generator=generator(seed, "held out"), device="cpu").tolist()
    held_out = max(1, round(len(images) * HELD_OUT_SHARE))
    return images.subset(order[:held_out]), images.subset(order[held_out:] or order)


def updated_parameters(student: nn.Module, blocks: Sequence[int], config: DistillationConfig) -> list[nn.Parameter]:
    """The parameters that recovery updates, for the compressed blocks of a student.

    Published (`updated="front"`): everything up to one block after the last compressed one. The final norm and the
    head lie behind the front and stay as they are. What all blocks share goes with the stem: mixed rotary positions of
    an Eva, the shared position biases of a Beit.
    """
    view = compressible(student)
    last = max(blocks) + 1
    if config.updated == "all":
        return view.body_parameters()
    first = 0 if config.updated == "front" else max(0, min(blocks) - 1)
    return view.parameters(first, last)


def require_tokens(teacher: nn.Module, config: DistillationConfig) -> None:
    """Refuse to mimic a class token where there is none.

    Raises:
        DcvitError: If that is asked for.
    """
    if config.tokens == "class" and not compressible(teacher).has_class_token():
        raise DcvitError('tokens="class": the model has no class token; mimic all tokens with tokens="all".')


def _token_weight(targets: Tensor, config: DistillationConfig) -> Tensor | None:
    """Token weights `[T]` of the loss against tokens `[N, T, D]`; `None` weighs all alike."""
    if config.tokens == "all":
        return None
    weight = targets.new_zeros(targets.shape[1])
    weight[0] = 1
    return weight


@torch.no_grad()
def output_tokens(model: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    """Output tokens `[N, T, D]` of a model for images `[N, C, H, W]`, without gradients."""
    view = compressible(model)
    return torch.cat([view.tokens(batch) for batch in images.split(batch_size)])


@torch.no_grad()
def token_loss(
    student: nn.Module, targets: Tensor, images: FewShotImages, config: DistillationConfig, *, impl: Impl = "auto"
) -> float:
    """The distillation loss of a student on the unaugmented images, against the teacher's tokens `[N, T, D]`."""
    tokens = output_tokens(student, images.normalised, config.micro_batch_size)
    return float(distillation_loss(tokens, targets, weight=_token_weight(targets, config), impl=impl))
