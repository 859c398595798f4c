"""What each stage of a compression found, as frozen dataclasses without algorithm.

`result.json` holds them, so every field has a type that `dcvit.serialization` can check.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from dcvit.budget import Budget
from dcvit.config import DistillationConfig
from dcvit.costs import Cost
from dcvit.runtime.environment import versions
from dcvit.serialization import from_plain

__all__ = [
    "CURVE",
    "BlockShape",
    "BlockSpec",
    "ComparisonRow",
    "LatencyModel",
    "ModelFigures",
    "Plan",
    "PlannedLatency",
    "Probe",
    "Reconstruction",
    "Recovery",
    "Refinement",
    "Report",
    "SensitivityCurve",
    "StructureTiming",
    "curve_units",
]

CURVE = (0.0, 1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
"""Shares of the hidden units at which `dcvit.recovery.reconstruct.error_curve` looks."""


def curve_units(hidden_features: int) -> tuple[int, ...]:
    """The numbers of hidden units, of so many, at which `dcvit.recovery.reconstruct.error_curve` looks, ascending."""
    return tuple(sorted({round(share * hidden_features) for share in CURVE}))


@dataclass(frozen=True)
class LatencyModel:
    """What the parts of a model take, in milliseconds a batch.

    Attributes:
        batch_size: Images a batch.
        depth: Blocks of the model, L.
        original_ms: The whole original.
        block_ms: One block as it is.
        compressed_ms: Hidden units kept, ascending, and what a compressed block with them takes.
    """

    batch_size: int
    depth: int
    original_ms: float
    block_ms: float
    compressed_ms: tuple[tuple[int, float], ...]

    @property
    def rest_ms(self) -> float:
        """What is not blocks."""
        return self.original_ms - self.depth * self.block_ms

    def compressed(self, hidden_features: int) -> float:
        """c(h), in milliseconds; never less than with fewer units."""
        widths, times = zip(*self.compressed_ms, strict=True)
        return float(np.interp(hidden_features, widths, np.maximum.accumulate(times)))

    def predict(self, num_blocks: int, hidden_features: int) -> float:
        """t(k, h), in milliseconds."""
        whole = (self.depth - num_blocks) * self.block_ms
        return self.rest_ms + whole + num_blocks * self.compressed(hidden_features)


@dataclass(frozen=True)
class StructureTiming:
    """One structure that was timed in turn with the original.

    Attributes:
        num_blocks: Compressed blocks.
        hidden_features: Hidden units that each keeps.
        ratio: Its latency over the original's.
        error: The ratio's standard error.
    """

    num_blocks: int
    hidden_features: int
    ratio: float
    error: float

    @property
    def structure(self) -> tuple[int, int]:
        """Of compressed blocks the number, and the hidden units that each keeps."""
        return self.num_blocks, self.hidden_features


@dataclass(frozen=True)
class PlannedLatency:
    """How a plan came to its latency.

    Attributes:
        model: The calibrated latency model.
        goal: The latency asked for over the original's.
        ratio: That of the planned structure with weights not recovered yet, the mean of its timings.
        timings: All on the way, in order; one structure may have several.
    """

    model: LatencyModel
    goal: float
    ratio: float
    timings: tuple[StructureTiming, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """The structure that meets a budget; `compress` fills in which blocks and units.

    Attributes:
        budget: The budget that is met.
        target: The budget as an absolute number: MACs per image, parameters, bytes or milliseconds.
        num_blocks: k, how many blocks are cut: compressed, or pruned.
        hidden_features: Hidden units that each of them keeps; where they differ, their mean, rounded down.
        drop_ratio: r_d, the share of their hidden units that is dropped.
        candidates: The blocks among which those without attention are chosen, from 0.
        cost: What the compressed model will cost.
        blocks: The chosen blocks in the order of compression, best first; empty until ranked.
        kept_units: For each chosen block, the indices of the hidden units kept, ascending.
        pruned: Those of `blocks` that keep their attention, or have a convolution for it, ascending.
        kept_heads: For each block that lost heads, those that its attention keeps, ascending.
        convolved: The blocks in which a convolution took the place of the attention, ascending.
        token_keep_rates: For each block behind whose attention tokens end, the share of the patch tokens that goes on.
        attention_of: For each block that shares the weights of its attention, the block that owns them, which may be
            itself.
        mlp_of: Likewise of its MLP.
        latency: What was measured to meet a latency budget; `None` for the others.
    """

    budget: Budget
    target: int | float
    num_blocks: int
    hidden_features: int
    drop_ratio: float
    candidates: tuple[int, ...]
    cost: Cost
    blocks: tuple[int, ...] = ()
    kept_units: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    pruned: tuple[int, ...] = ()
    kept_heads: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    convolved: tuple[int, ...] = ()
    token_keep_rates: Mapping[int, float] = field(default_factory=dict)
    attention_of: Mapping[int, int] = field(default_factory=dict)
    mlp_of: Mapping[int, int] = field(default_factory=dict)
    latency: PlannedLatency | None = None

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values for JSON."""
        return {
            "budget": self.budget.to_dict(),
            "target": self.target,
            "num_blocks": self.num_blocks,
            "hidden_features": self.hidden_features,
            "drop_ratio": self.drop_ratio,
            "candidates": list(self.candidates),
            "cost": {
                "weight_macs": self.cost.weight_macs,
                "attention_macs": self.cost.attention_macs,
                "params": self.cost.params,
            },
            "blocks": list(self.blocks),
            "kept_units": {str(block): list(units) for block, units in self.kept_units.items()},
            "pruned": list(self.pruned),
            "kept_heads": {str(block): list(heads) for block, heads in self.kept_heads.items()},
            "convolved": list(self.convolved),
            "token_keep_rates": {str(block): rate for block, rate in self.token_keep_rates.items()},
            "attention_of": {str(block): owner for block, owner in self.attention_of.items()},
            "mlp_of": {str(block): owner for block, owner in self.mlp_of.items()},
            "latency": None if self.latency is None else self.latency.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Plan":
        """The inverse of `to_dict`.

        Raises:
            TypeError: If a value is missing or of another type.
            BudgetError: If the budget is none.
        """
        return from_plain(cls, values)


@dataclass(frozen=True)
class Recovery:
    """What a recovery did.

    Attributes:
        loss_before: Distillation loss on the unaugmented few-shot images before the first step.
        loss_after: The same after the last step.
        losses: Training loss of each epoch.
        learning_rate: The peak learning rate.
        seconds: Wall-clock time; of students that train together each has an equal share.
    """

    loss_before: float
    loss_after: float
    losses: tuple[float, ...]
    learning_rate: float
    seconds: float

    def require_run(self, config: DistillationConfig) -> None:
        """Refuse what a recovery by a config cannot have done.

        Raises:
            ValueError: If it says so; the learning rate must be a number there.
        """
        if len(self.losses) > config.epochs or self.learning_rate != config.learning_rate:
            raise ValueError(
                f"it tells of {len(self.losses)} epochs at learning rate {self.learning_rate}: expected "
                f"{config.epochs} at {config.learning_rate}"
            )


@dataclass(frozen=True)
class Reconstruction:
    """What the reconstruction of one block did.

    Errors are shares of what the teacher's block adds to its input that stay unexplained on the held-out images, or on
    all where a single image leaves none to hold out: 0 is perfect, 1 is no better than leaving the block out. They are
    a few per cent too low: units are chosen on all images, and blocks in front may have learnt from the held-out ones.

    Attributes:
        block: The block, from 0.
        ridge: λ of the closed form that the weights come from, a share of the mean squared hidden unit; `None` where
            there was none, or none was better than the original weights.
        error_before: With the original weights of the kept units.
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
class SensitivityCurve:
    """What cutting a block alone would cost, by the number of hidden units that it keeps.

    Attributes:
        units: Numbers of hidden units, ascending, from 0 to all.
        losses: The metric loss at each.
    """

    units: tuple[int, ...]
    losses: tuple[float, ...]

    def loss(self, kept: int) -> float:
        """The metric loss at any number of hidden units, interpolated."""
        return float(np.interp(kept, self.units, self.losses))


@dataclass(frozen=True)
class Probe:
    """One candidate block compressed alone and recovered.

    Attributes:
        block: The block, from 0.
        metric_loss: What it is ranked by, lower is better; where it was stopped, at that point.
        recovery: How the distillation went; `None` where the block was reconstructed.
        reconstruction: How the reconstruction went; `None` where the student mimicked.
        seconds: Wall-clock time; of probes in lock step each has an equal share.
        sensitivity: The metric loss expected at other numbers of hidden units, where the block was reconstructed.
        epochs: Epochs of distillation that it had, fewer than the others' where it was stopped; 0 where the block was
            reconstructed.
    """

    block: int
    metric_loss: float
    recovery: Recovery | None = None
    reconstruction: Reconstruction | None = None
    seconds: float = 0.0
    sensitivity: SensitivityCurve | None = None
    epochs: int = 0

    def require_distilled(self, config: DistillationConfig, *, halving: bool) -> None:
        """Refuse what no probe that mimics by a config comes to.

        Args:
            config: How it mimics.
            halving: Whether it may have stopped early.

        Raises:
            ValueError: If it says so.
        """
        if self.recovery is None or (self.reconstruction, self.sensitivity) != (None, None):
            raise ValueError(f"the probe of block {self.block} did not mimic")
        self.recovery.require_run(config)
        if self.epochs != len(self.recovery.losses) or (self.epochs < config.epochs and not halving):
            raise ValueError(f"the probe of block {self.block} tells of {self.epochs} epochs")
        # Of a student that diverged both losses are NaN.
        if not math.isfinite(self.metric_loss) and math.isfinite(self.recovery.loss_after):
            raise ValueError(f"the probe of block {self.block} has a metric loss of {self.metric_loss}")

    def require_reconstructed(self, block: int, kept: int, hidden_features: int) -> None:
        """Refuse what the probe of a block by reconstruction cannot have come to.

        Args:
            block: The block.
            kept: The hidden units that it keeps.
            hidden_features: Those that it has.

        Raises:
            ValueError: If it says so.
        """
        if self.block != block or self.reconstruction is None or self.recovery is not None or self.epochs:
            raise ValueError(f"it holds no reconstruction of block {block}")
        self.reconstruction.require_of(block, epochs=0)
        if not 0 <= self.metric_loss < math.inf:
            raise ValueError(f"it has a metric loss of {self.metric_loss}")
        profile = self.sensitivity
        if (profile is None) != (self.reconstruction.error_closed_form is None):
            raise ValueError("it has either a closed form or losses at other numbers of hidden units: expected both")
        if profile is None:
            return
        if profile.units != curve_units(hidden_features) or len(profile.losses) != len(profile.units):
            raise ValueError(f"its losses are not those at some numbers of {hidden_features} hidden units")
        at_kept = profile.loss(kept)
        if not all(map(math.isfinite, profile.losses)) or not math.isclose(at_kept, self.metric_loss, rel_tol=1e-6):
            raise ValueError(f"its losses give {at_kept} at {kept} hidden units: expected {self.metric_loss}")


@dataclass(frozen=True)
class Refinement:
    """What a refinement did.

    Attributes:
        error_before: Mean squared error of the output tokens on held-out views, weighted as in the loss, before.
        error_after: The same of the student that came out; never larger.
        step_size: Of the full run, a share of a tensor's root mean square; 0 if no pilot run made it better.
        steps: Gradient steps up to the best, pilot runs not counted.
        seconds: Wall-clock time.
        validations: Steps done and the error after them, each time that the full run was judged.
    """

    error_before: float
    error_after: float
    step_size: float
    steps: int
    seconds: float
    validations: tuple[tuple[int, float], ...] = ()

    def require_run(self, steps: int, step_sizes: Sequence[float]) -> None:
        """Refuse what a refinement cannot have done, see `refine`.

        Raises:
            ValueError: If it says so.
        """
        if not self.error_after <= self.error_before < math.inf:
            raise ValueError(f"it says that the error went from {self.error_before} to {self.error_after}")
        if not 0 <= self.steps <= steps or self.step_size not in (0.0, *step_sizes):
            raise ValueError(f"it tells of {self.steps} steps of size {self.step_size}")


@dataclass(frozen=True)
class ModelFigures:
    """What one model costs and how good it is.

    Attributes:
        macs: MACs per image, in the budget's convention.
        params: Number of parameters.
        latency_ms: Median time of one batch, in milliseconds.
        top1: Share of labelled images classified rightly; `None` where nothing was labelled.
        file_size: Bytes of its saved weights.
        activation_memory: Peak bytes of the activations of one pass at the budget's batch size, see
            `dcvit.metrics.memory`; `None` unless the budget is of that.
    """

    macs: int
    params: int
    latency_ms: float
    top1: float | None = None
    file_size: int | None = None
    activation_memory: int | None = None


@dataclass(frozen=True)
class BlockShape:
    """One block.

    Attributes:
        attention: Whether it has attention that could be removed.
        hidden_features: Hidden units of its MLP.
    """

    attention: bool
    hidden_features: int


@dataclass(frozen=True)
class Report:
    """How a compression went.

    Attributes:
        model: The original's name, or its type.
        teacher: Figures of the original.
        student: Figures of the compressed model.
        num_images: Size of the few-shot set.
        agreement: Share of images for which both name the same class; `None` without classes.
        distillation_loss: Final distillation loss on the few-shot images.
        learning_rate: Given or found: the peak learning rate of the distillation, or the step size of reconstruction.
        probes: The probe of each candidate block, best first.
        pruning_probes: Of each block that might keep its attention and lose hidden units only, best first.
        reconstructions: How each chosen block was reconstructed, front to back.
        refinement: How the student mimicked after that; `None` if it did not.
        steps: How the published distillation went after each progressive step; the first is the best probe's.
        seed: The seed.
        latency_ratio: The student's latency over the teacher's, median over runs in turn.
        latency_batch: Images of the batch whose latencies the figures hold; `None` in results saved before it was
            recorded.
        seconds: Wall-clock time of each stage.
        versions: Of what computed it.
        settings: The method's config, as `MethodConfig.to_dict` gives it; empty in results saved before it was
            recorded.
        blocks: The original's blocks; likewise.
        blocks_after: The compressed model's; likewise.
        method: The name of the method, see `dcvit.methods`.
        base_model: Hub repository of the original's weights; `None` unless they were loaded by a name that tells.
        family: The original's, see `ModelView.family`; `None` in results saved before it was recorded.
    """

    model: str
    teacher: ModelFigures
    student: ModelFigures
    num_images: int
    agreement: float | None
    distillation_loss: float
    learning_rate: float
    probes: tuple[Probe, ...]
    reconstructions: tuple[Reconstruction, ...]
    refinement: Refinement | None
    steps: tuple[Recovery, ...]
    seed: int
    latency_ratio: float | None = None
    latency_batch: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=lambda: versions())
    settings: Mapping[str, Any] = field(default_factory=dict)
    blocks: tuple[BlockShape, ...] = ()
    blocks_after: tuple[BlockShape, ...] = ()
    method: str = "dcvit"
    base_model: str | None = None
    pruning_probes: tuple[Probe, ...] = ()
    family: str | None = None


@dataclass(frozen=True)
class BlockSpec:
    """What a block keeps.

    Attributes:
        hidden_features: Hidden units.
        attention: Whether attention stays, so that the block is pruned, or goes.
    """

    hidden_features: int
    attention: bool = False


@dataclass(frozen=True)
class ComparisonRow:
    """One method of a demonstration on one few-shot set.

    Attributes:
        method: Its name.
        seed: Which few-shot set, and the seed of everything random.
        top1: Share of held-out digits classified rightly.
        agreement: Share of held-out digits on which it agrees with the original.
        macs: Per image, attention products included.
        params: Number of parameters.
        latency_ms: Median time of a batch of 64.
        blocks: What was dropped or compressed, best first.
    """

    method: str
    seed: int
    top1: float
    agreement: float
    macs: int
    params: int
    latency_ms: float
    blocks: tuple[int, ...]
