"""Results of each stage of a compression, as frozen dataclasses without algorithms.

They are saved in `result.json`, so every field has a type that `dcvit.serialization` can check.
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
"""Shares of the hidden units at which `dcvit.recovery.reconstruct.error_curve` computes the error."""


def curve_units(hidden_features: int) -> tuple[int, ...]:
    """Return the numbers of hidden units that the shares in `CURVE` give for a block, ascending."""
    return tuple(sorted({round(share * hidden_features) for share in CURVE}))


@dataclass(frozen=True)
class LatencyModel:
    """Latency of the parts of a model, in milliseconds per batch.

    Attributes:
        batch_size: Images per batch.
        depth: Number of blocks of the model, L.
        original_ms: Latency of the whole original model.
        block_ms: Latency of one uncompressed block.
        compressed_ms: Pairs of hidden units kept, ascending, and the latency of a compressed block with that many.
    """

    batch_size: int
    depth: int
    original_ms: float
    block_ms: float
    compressed_ms: tuple[tuple[int, float], ...]

    @property
    def overhead_ms(self) -> float:
        """Non-block overhead, in milliseconds."""
        return self.original_ms - self.depth * self.block_ms

    def compressed(self, hidden_features: int) -> float:
        """Return c(h), the latency of a compressed block, in milliseconds. It never falls as units are added."""
        widths, times = zip(*self.compressed_ms, strict=True)
        return float(np.interp(hidden_features, widths, np.maximum.accumulate(times)))

    def predict(self, num_blocks: int, hidden_features: int) -> float:
        """Return t(k, h), the predicted latency of a structure, in milliseconds."""
        uncompressed = (self.depth - num_blocks) * self.block_ms
        return self.overhead_ms + uncompressed + num_blocks * self.compressed(hidden_features)


@dataclass(frozen=True)
class StructureTiming:
    """Timing of one structure, in alternation with the original model.

    Attributes:
        num_blocks: Number of compressed blocks.
        hidden_features: Number of hidden units that each of them keeps.
        ratio: Latency of the structure over the original's.
        error: Standard error of the ratio.
    """

    num_blocks: int
    hidden_features: int
    ratio: float
    error: float

    @property
    def structure(self) -> tuple[int, int]:
        """Number of compressed blocks, and of hidden units that each of them keeps."""
        return self.num_blocks, self.hidden_features


@dataclass(frozen=True)
class PlannedLatency:
    """Measurements from which a latency plan was made.

    Attributes:
        model: The calibrated latency model.
        goal: Required latency over the original's.
        ratio: Latency of the planned structure over the original's, as a pruned skeleton; the mean of its timings.
        timings: All timings in order; one structure may have several.
    """

    model: LatencyModel
    goal: float
    ratio: float
    timings: tuple[StructureTiming, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the measurements as plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """The structure that meets a budget. `compress` adds the chosen blocks and hidden units.

    Attributes:
        budget: The budget that is met.
        target: The budget as an absolute number: MACs per image, parameters, bytes or milliseconds.
        num_blocks: k, the number of blocks that are compressed or pruned.
        hidden_features: Number of hidden units that each of them keeps; their mean, rounded down, if they differ.
        drop_ratio: r_d, the share of their hidden units that is dropped.
        candidates: The blocks among which those without attention are chosen, from 0.
        cost: Cost of the compressed model.
        blocks: The chosen blocks in the order of compression, best first; empty until ranked.
        kept_units: For each chosen block, the indices of the hidden units kept, ascending.
        pruned: Those of `blocks` that keep their attention or have a convolution in its place, ascending.
        kept_heads: For each block that lost heads, the heads that its attention keeps, ascending.
        convolved: The blocks in which a convolution replaces the attention, ascending.
        token_keep_rates: For each block that drops tokens after its attention, the share of patch tokens that it keeps.
        attention_of: For each block that shares the weights of its attention, the block that owns them, which may be
            itself.
        mlp_of: For each block that shares the weights of its MLP, the block that owns them, which may be itself.
        latency: Measurements of a latency budget; `None` for other budgets.
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
        """Return the plan as plain values for JSON."""
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
        """Create a plan from the values of `to_dict`.

        Raises:
            TypeError: If a value is missing or has a wrong type.
            BudgetError: If the budget is invalid.
        """
        return from_plain(cls, values)


@dataclass(frozen=True)
class Recovery:
    """Result of a recovery by distillation.

    Attributes:
        loss_before: Distillation loss on the unaugmented few-shot images before the first step.
        loss_after: Distillation loss on the unaugmented few-shot images after the last step.
        losses: Training loss of each epoch.
        learning_rate: Peak learning rate.
        seconds: Wall-clock time. Students that train together have equal shares of it.
    """

    loss_before: float
    loss_after: float
    losses: tuple[float, ...]
    learning_rate: float
    seconds: float

    def require_run(self, config: DistillationConfig) -> None:
        """Refuse values that a recovery with a config cannot have produced.

        Args:
            config: Settings of the distillation. Its `learning_rate` must be a number.

        Raises:
            ValueError: If the number of epochs or the learning rate does not fit the config.
        """
        if len(self.losses) > config.epochs or self.learning_rate != config.learning_rate:
            raise ValueError(
                f"it has {len(self.losses)} epochs at learning rate {self.learning_rate}: expected "
                f"{config.epochs} at {config.learning_rate}"
            )


@dataclass(frozen=True)
class Reconstruction:
    """Result of the reconstruction of one block.

    An error is the unexplained share of the teacher's block's contribution to the residual stream, on the held-out
    images, or on all images if there is only one. 0 is perfect, and 1 is no better than dropping the block. Errors are
    a few per cent too low: units are chosen on all images, and earlier blocks may have been fitted to the held-out
    ones.

    Attributes:
        block: Index of the block, from 0.
        ridge: λ of the closed form that gave the weights, as a share of the mean squared hidden unit; `None` if there
            was no closed form, or none improved on the original weights.
        error_before: Error with the original weights of the kept units.
        error_closed_form: Error after the closed form on the training images, or `error_before` if that did not
            improve; `None` without a closed form.
        error_after: Error after the gradient steps, or the error before them if they did not improve.
        epochs: Number of epochs of gradient steps up to the best.
        errors: Error after each epoch of gradient steps; empty if there were none.
    """

    block: int
    ridge: float | None
    error_before: float
    error_closed_form: float | None
    error_after: float
    epochs: int
    errors: tuple[float, ...] = ()

    def require_of(self, block: int, epochs: int) -> None:
        """Refuse values that the reconstruction of a block in at most `epochs` epochs cannot have produced.

        Raises:
            ValueError: If it is of another block, its error is not finite, or its epochs do not fit.
        """
        if self.block != block:
            raise ValueError(f"it is the reconstruction of block {self.block}: expected {block}")
        if not math.isfinite(self.error_after) or not 0 <= self.epochs <= len(self.errors) <= epochs:
            raise ValueError(f"it has an error of {self.error_after} after {self.epochs} epochs")


@dataclass(frozen=True)
class SensitivityCurve:
    """Metric loss when only one block is compressed or pruned, by the number of hidden units that it keeps.

    Attributes:
        units: Numbers of hidden units, ascending, from 0 to all.
        losses: Metric loss at each number.
    """

    units: tuple[int, ...]
    losses: tuple[float, ...]

    def loss(self, kept: int) -> float:
        """Return the metric loss at any number of hidden units, by linear interpolation."""
        return float(np.interp(kept, self.units, self.losses))


@dataclass(frozen=True)
class Probe:
    """Sensitivity probe: the result of compressing and recovering a single candidate block.

    Attributes:
        block: Index of the block, from 0.
        metric_loss: Loss by which the block is ranked, lower is better. For a stopped probe, the loss at that point.
        recovery: Result of the distillation; `None` if the block was reconstructed.
        reconstruction: Result of the reconstruction; `None` if the student was distilled.
        seconds: Wall-clock time. Probes in lock step have equal shares of it.
        sensitivity: Expected metric loss at other numbers of hidden units, if the block was reconstructed.
        epochs: Epochs of distillation, fewer than for other probes if it was stopped; 0 if the block was reconstructed.
    """

    block: int
    metric_loss: float
    recovery: Recovery | None = None
    reconstruction: Reconstruction | None = None
    seconds: float = 0.0
    sensitivity: SensitivityCurve | None = None
    epochs: int = 0

    def require_distilled(self, config: DistillationConfig, *, halving: bool) -> None:
        """Refuse values that a probe by distillation cannot have produced.

        Args:
            config: Settings of the distillation.
            halving: Whether the probe may have stopped early.

        Raises:
            ValueError: If a value does not fit the settings.
        """
        if self.recovery is None or (self.reconstruction, self.sensitivity) != (None, None):
            raise ValueError(f"the probe of block {self.block} was not recovered by distillation")
        self.recovery.require_run(config)
        if self.epochs != len(self.recovery.losses) or (self.epochs < config.epochs and not halving):
            raise ValueError(f"the probe of block {self.block} has {self.epochs} epochs")
        # Both losses of a student that diverged are NaN.
        if not math.isfinite(self.metric_loss) and math.isfinite(self.recovery.loss_after):
            raise ValueError(f"the probe of block {self.block} has a metric loss of {self.metric_loss}")

    def require_reconstructed(self, block: int, kept: int, hidden_features: int) -> None:
        """Refuse values that a probe by reconstruction cannot have produced.

        Args:
            block: Index of the block.
            kept: Number of hidden units that it keeps.
            hidden_features: Number of hidden units of the original block.

        Raises:
            ValueError: If a value does not fit the block.
        """
        if self.block != block or self.reconstruction is None or self.recovery is not None or self.epochs:
            raise ValueError(f"it holds no reconstruction of block {block}")
        self.reconstruction.require_of(block, epochs=0)
        if not 0 <= self.metric_loss < math.inf:
            raise ValueError(f"it has a metric loss of {self.metric_loss}")
        curve = self.sensitivity
        if (curve is None) != (self.reconstruction.error_closed_form is None):
            raise ValueError("it has only one of a closed form and a sensitivity curve: expected both or none")
        if curve is None:
            return
        if curve.units != curve_units(hidden_features) or len(curve.losses) != len(curve.units):
            raise ValueError(f"its sensitivity curve does not fit a block of {hidden_features} hidden units")
        at_kept = curve.loss(kept)
        if not all(map(math.isfinite, curve.losses)) or not math.isclose(at_kept, self.metric_loss, rel_tol=1e-6):
            raise ValueError(f"its sensitivity curve has {at_kept} at {kept} hidden units: expected {self.metric_loss}")


@dataclass(frozen=True)
class Refinement:
    """Result of a refinement, the fine-tuning by `dcvit.recovery.finetune`.

    Attributes:
        error_before: Mean squared error of the output tokens on the validation views before the refinement, weighted as
            in the loss.
        error_after: The same error of the refined student; it is never larger.
        step_size: Step size of the full run, as a share of a tensor's root mean square; 0 if no pilot run improved the
            student.
        steps: Number of gradient steps up to the best state, without pilot runs.
        seconds: Wall-clock time.
        validations: Pairs of steps done and the error after them, for each validation of the full run.
    """

    error_before: float
    error_after: float
    step_size: float
    steps: int
    seconds: float
    validations: tuple[tuple[int, float], ...] = ()

    def require_run(self, steps: int, step_sizes: Sequence[float]) -> None:
        """Refuse values that `refine` cannot have produced.

        Args:
            steps: Number of steps of the full run.
            step_sizes: Candidates of the step size.

        Raises:
            ValueError: If the error grew or is not finite, or the steps do not fit.
        """
        if not self.error_after <= self.error_before < math.inf:
            raise ValueError(f"its error changed from {self.error_before} to {self.error_after}")
        if not 0 <= self.steps <= steps or self.step_size not in (0.0, *step_sizes):
            raise ValueError(f"it has {self.steps} steps of size {self.step_size}")


@dataclass(frozen=True)
class ModelFigures:
    """Cost and accuracy of one model.

    Attributes:
        macs: MACs per image, in the budget's convention.
        params: Number of parameters.
        latency_ms: Median time of one batch, in milliseconds.
        top1: Share of labelled images classified correctly; `None` without labels.
        file_size: Size of its saved weights in bytes.
        activation_memory: Peak activation memory of one pass at the budget's batch size, in bytes, see
            `dcvit.metrics.memory`; `None` unless the budget is of activation memory.
    """

    macs: int
    params: int
    latency_ms: float
    top1: float | None = None
    file_size: int | None = None
    activation_memory: int | None = None


@dataclass(frozen=True)
class BlockShape:
    """Shape of one block.

    Attributes:
        attention: Whether it has attention that could be removed.
        hidden_features: Number of hidden units of its MLP.
    """

    attention: bool
    hidden_features: int


@dataclass(frozen=True)
class Report:
    """Report of a compression.

    Attributes:
        model: Name of the original model, or its type.
        teacher: Figures of the original model.
        student: Figures of the compressed model.
        num_images: Size of the few-shot set.
        agreement: Share of images for which both models predict the same class; `None` without classes.
        distillation_loss: Final distillation loss on the few-shot images.
        learning_rate: Peak learning rate of the distillation, or step size of the reconstruction, set or found.
        probes: The probe of each candidate block, best first.
        pruning_probes: The probe of each block that may keep its attention and lose only hidden units, best first.
        reconstructions: Result of the reconstruction of each chosen block, front to back.
        refinement: Result of the refinement after that; `None` without one.
        steps: Result of the distillation after each progressive step, as published. The first is the best probe's.
        seed: The seed.
        latency_ratio: Latency of the student over the teacher's, the median over alternating runs.
        latency_batch: Batch size of the measured latencies; `None` in results saved before it was recorded.
        seconds: Wall-clock time of each stage.
        versions: Versions of the software that produced the result.
        settings: The method's config as returned by `MethodConfig.to_dict`; empty in results saved before it was
            recorded.
        blocks: Shapes of the original's blocks; empty in results saved before they were recorded.
        blocks_after: Shapes of the compressed model's blocks; empty in results saved before they were recorded.
        method: Name of the method, see `dcvit.methods`.
        base_model: Hub repository of the original's weights; `None` unless the name they were loaded by identifies it.
        family: Family of the original model, see `ModelView.family`; `None` in results saved before it was recorded.
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
    """The part of a block that is kept.

    Attributes:
        hidden_features: Number of hidden units kept.
        attention: Whether the attention is kept. A block with attention is pruned, one without it is compressed.
    """

    hidden_features: int
    attention: bool = False


@dataclass(frozen=True)
class ComparisonRow:
    """Result of one method on one few-shot set in a demonstration.

    Attributes:
        method: Name of the method.
        seed: Number of the few-shot set, and seed of everything random.
        top1: Share of held-out digits classified correctly.
        agreement: Share of held-out digits for which the student predicts the same class as the original model.
        macs: MACs per image, attention products included.
        params: Number of parameters.
        latency_ms: Median time of a batch of 64, in milliseconds.
        blocks: The dropped or compressed blocks, best first.
    """

    method: str
    seed: int
    top1: float
    agreement: float
    macs: int
    params: int
    latency_ms: float
    blocks: tuple[int, ...]
