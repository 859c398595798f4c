"""Frozen settings: parts that methods share, the base of all methods, and dcvit's own method with its presets.

A method is selected by its config: `dcvit.compress(..., method=DCViT(num_blocks=3))`. The config's type determines the
method, and the method reads only the config's fields. The configs of the other methods are next to their code, in
`dcvit.methods.baselines`.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, Protocol, TypeVar, get_args, runtime_checkable

from dcvit.errors import DcvitError
from dcvit.ops import Impl
from dcvit.serialization import field_types, plain_numbers

__all__ = [
    "Ablation", "AugmentationConfig", "CalibrationConfig", "DCViT", "DistillationConfig", "MethodConfig",
    "ReconstructionConfig", "SynthesisConfig", "TrainingConfig",
]  # fmt: skip

Tokens = Literal["all", "class"]
Updated = Literal["front", "around", "all"]
Units = Literal["greedy", "random"]
Structure = Literal["searched", "fewest"]
MetricKind = Literal["distillation", "cross_entropy"]
RankingImages = Literal["synthetic", "few-shot"]

Config = TypeVar("Config", bound="MethodConfig")
Part = TypeVar("Part", bound="_Batched")
Training = TypeVar("Training", bound="TrainingConfig")


def _check(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise DcvitError(f"{name}={value!r}: expected {expected}.")


def _check_choice(name: str, value: object, literal: Any) -> None:
    _check(value in get_args(literal), name, value, "one of " + ", ".join(map(repr, get_args(literal))))


def _check_numbers(config: object) -> None:
    """Convert NumPy numbers, and refuse floats in integer fields."""
    plain_numbers(config)
    of: type = type(config)
    for name, kind in field_types(of).items():
        kinds, value = get_args(kind) or (kind,), getattr(config, name)
        whole = int in kinds and float not in kinds
        _check(not (whole and isinstance(value, float)), name, value, "an int")


def _freeze_positive(config: object, name: str) -> None:
    """Convert a field to a tuple, and refuse it unless it holds one or more positive floats."""
    values = tuple(getattr(config, name))
    object.__setattr__(config, name, values)
    _check(len(values) > 0 and min(values) > 0, name, values, "one or more positive floats")


@runtime_checkable
class _Batched(Protocol):
    """Settings with a micro-batch size."""

    @property
    def micro_batch_size(self) -> int:
        """Number of images that pass through a model at once."""

    def with_micro_batch_at_most(self: Part, count: int) -> Part:
        """Return a copy with a micro-batch of at most `count` images, which changes results only by rounding."""


@dataclass(frozen=True)
class AugmentationConfig:
    """Settings of the random views of the few-shot images during recovery, timm's training augmentation.

    Attributes:
        scale: Smallest and largest share of the image's area in a random crop.
        ratio: Smallest and largest aspect ratio (width / height) of the crop.
        flip: Probability of a horizontal flip.
        color_jitter: Largest relative change of brightness, contrast and, for RGB, saturation.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    color_jitter: float = 0.3

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check(0 < self.scale[0] <= self.scale[1] <= 1, "scale", self.scale, "0 < smallest <= largest <= 1")
        _check(0 < self.ratio[0] <= self.ratio[1], "ratio", self.ratio, "0 < smallest <= largest")
        _check(0 <= self.flip <= 1, "flip", self.flip, "a probability")
        _check(0 <= self.color_jitter < 1, "color_jitter", self.color_jitter, "a value in [0, 1)")


@dataclass(frozen=True)
class CalibrationConfig:
    """Settings of the images and tokens that blocks are fitted on (`dcvit.recovery.calibration`).

    Attributes:
        num_views: Number of images that blocks are fitted on: the few-shot images and random views of them. All
            few-shot images are used, even if there are more of them.
        num_rows: Number of tokens sampled from these images, at least one from each. Each token is one equation.
        augmentation: Settings of the random views; `None` uses only the few-shot images.
        batch_size: Number of images that pass through a model at once. Changes speed and memory, and results only by
            rounding.
    """

    num_views: int = 1000
    num_rows: int = 32768
    augmentation: AugmentationConfig | None = field(default_factory=AugmentationConfig)
    batch_size: int = 64

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check(self.num_views >= 1, "num_views", self.num_views, "1 or more")
        _check(self.num_rows >= 1, "num_rows", self.num_rows, "1 or more")
        _check(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")

    @property
    def micro_batch_size(self) -> int:
        """Number of images that pass through a model at once."""
        return self.batch_size

    def with_micro_batch_at_most(self: "Calibration", count: int) -> "Calibration":
        """Return a copy with a micro-batch of at most `count` images."""
        return replace(self, batch_size=min(count, self.micro_batch_size))


Calibration = TypeVar("Calibration", bound=CalibrationConfig)


@dataclass(frozen=True)
class ReconstructionConfig(CalibrationConfig):
    """Settings of block reconstruction (`dcvit.recovery.reconstruct`).

    Each compressed block is fitted to the outputs of the teacher's block, without the rest of the model.

    Attributes:
        num_views: See `CalibrationConfig`; used if no refinement follows.
        num_rows: See `CalibrationConfig`.
        augmentation: See `CalibrationConfig`.
        batch_size: See `CalibrationConfig`; a refinement step accumulates the gradients of its micro-batches.
        refinement_views: Number of views if a refinement follows, which passes over them many times.
        units: Which hidden units a block keeps: those that explain the missing output best (`"greedy"`), or
            `"random"` ones as published.
        epochs: Number of passes over the rows in the gradient steps after the closed form; 0 takes no steps.
        step_sizes: Candidates of the gradient steps' size, as a share of a parameter tensor's root mean square. The
            best one on held-out images is used.
        batch_rows: Number of rows per gradient step.
        refinement_steps: Largest number of gradient steps on the output tokens at the end (`dcvit.recovery.finetune`);
            0 disables the refinement.
        refinement_macs: Largest number of multiply-accumulates (MACs) of these steps together. They gain least and cost
            most of all stages, so the limit spares large models. The default disables the refinement of models with
            more than 133 million MACs per image, such as all ViTs at 224 px; raise it to refine these. A MAC of a CNN
            counts as three, since a depthwise convolution needs that much time.
        refinement_batch: Number of views per refinement step.
    """

    refinement_views: int = 2500
    units: Units = "greedy"
    epochs: int = 6
    step_sizes: tuple[float, ...] = (0.01, 0.03, 0.1)
    batch_rows: int = 256
    refinement_steps: int = 1000
    refinement_macs: float = 6e12
    refinement_batch: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.refinement_views >= 1, "refinement_views", self.refinement_views, "1 or more")
        _check_choice("units", self.units, Units)
        _check(self.epochs >= 0, "epochs", self.epochs, "0 or more")
        _freeze_positive(self, "step_sizes")
        _check(self.batch_rows >= 1, "batch_rows", self.batch_rows, "1 or more")
        _check(self.refinement_steps >= 0, "refinement_steps", self.refinement_steps, "0 or more")
        _check(self.refinement_macs >= 0, "refinement_macs", self.refinement_macs, "0 or more")
        _check(self.refinement_batch >= 1, "refinement_batch", self.refinement_batch, "1 or more")


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of end-to-end training of a student.

    Attributes:
        epochs: Number of passes over the few-shot images in each recovery.
        learning_rate: AdamW's peak learning rate, or `"auto"` for the best of `learning_rates` on held-out images.
        learning_rates: Candidates for `"auto"`.
        weight_decay: AdamW's decoupled weight decay, on all updated parameters.
        warmup_epochs: Epochs over which the learning rate rises linearly; it then follows a half cosine to zero.
        batch_size: Number of images per step.
        micro_batch: Number of images of a step that pass through a model at once; their gradients are accumulated.
            `None` takes the whole batch. Changes speed and memory, and results only by rounding.
        augmentation: Settings of the random views; `None` uses the images as they are, and computes the teacher's
            tokens only once.
    """

    epochs: int = 100
    learning_rate: float | Literal["auto"] = "auto"
    learning_rates: tuple[float, ...] = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
    weight_decay: float = 1e-4
    warmup_epochs: int = 5
    batch_size: int = 64
    micro_batch: int | None = None
    augmentation: AugmentationConfig | None = field(default_factory=AugmentationConfig)

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check(self.epochs >= 0, "epochs", self.epochs, "0 or more")
        rate = self.learning_rate
        _check(
            rate == "auto" or (isinstance(rate, float) and rate > 0),
            "learning_rate",
            rate,
            "a positive float or 'auto'",
        )
        _freeze_positive(self, "learning_rates")
        _check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        _check(self.warmup_epochs >= 0, "warmup_epochs", self.warmup_epochs, "0 or more")
        _check(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        _check(self.micro_batch is None or self.micro_batch >= 1, "micro_batch", self.micro_batch, "1 or more, or None")

    @property
    def micro_batch_size(self) -> int:
        """Number of images that pass through a model at once."""
        return self.batch_size if self.micro_batch is None else min(self.batch_size, self.micro_batch)

    def with_micro_batch_at_most(self: Training, count: int) -> Training:
        """Return a copy with a micro-batch of at most `count` images."""
        return replace(self, micro_batch=min(count, self.micro_batch_size))

    def with_learning_rate(self: Training, find: Callable[[], float]) -> Training:
        """Return a copy with a numeric learning rate; `find` is called if it is `"auto"`."""
        return replace(self, learning_rate=find()) if self.learning_rate == "auto" else self


@dataclass(frozen=True)
class DistillationConfig(TrainingConfig):
    """Settings of feature distillation, which trains a student to match the teacher's output tokens.

    The DC-ViT paper (arXiv 2403.18708) calls it token mimicking.

    Attributes:
        epochs: See `TrainingConfig`; also the epochs of each probe, in methods that probe blocks by distillation.
        learning_rate: See `TrainingConfig`.
        learning_rates: See `TrainingConfig`.
        weight_decay: See `TrainingConfig`.
        warmup_epochs: See `TrainingConfig`.
        batch_size: See `TrainingConfig`.
        micro_batch: See `TrainingConfig`.
        augmentation: See `TrainingConfig`.
        fixed_views: Number of random views of each image. Epochs cycle through them, and the teacher runs only once on
            each. The views stay in memory with the teacher's tokens. `None` draws new views every epoch.
        tokens: Which output tokens are distilled: all of them, or only the class token (an ablation), which the model
            must have.
        updated: Which part of the student is updated. `"front"`: the stem and every block up to one after the last
            compressed one. `"around"`: one block before the first compressed one to one after the last.
            `"all"`: everything except the head. The head and its pooling are always frozen.
        lock_step: Number of students that process a batch at once, among those that train together (all candidates of
            the probes, or all learning rates). The activations of this many students are in memory, but the weights and
            optimiser states of all. Changes speed and memory only.
    """

    fixed_views: int | None = None
    tokens: Tokens = "all"
    updated: Updated = "front"
    lock_step: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.fixed_views is None or self.fixed_views >= 1, "fixed_views", self.fixed_views, "1 or more, or None")
        _check_choice("tokens", self.tokens, Tokens)
        _check_choice("updated", self.updated, Updated)
        _check(self.lock_step >= 1, "lock_step", self.lock_step, "1 or more")


@dataclass(frozen=True)
class SynthesisConfig:
    """Settings of the proxy set, which is synthesised from the model itself.

    Attributes:
        num_images: Number of synthesised images.
        micro_batch: Number of these images that pass through the model at once. `None` takes all of them, as does a
            model with BatchNorm, whose statistics are over all images. Changes speed and memory, and results only by
            rounding.
        iterations: Number of Adam steps.
        learning_rate: Adam's peak learning rate.
        betas: Adam's moment decay rates.
        warmup_iterations: Steps over which the learning rate rises linearly; it then follows a half cosine to zero.
        jitter: Largest random roll, as a share of the image side (30 px of 224 in the paper).
        flip: Probability that the images are mirrored in a step.
        tv_exponent: β, the power of the four difference norms. `None` takes the published value for the model's family
            (`dcvit.models.ModelView.tv_exponent`): 0.6 for ViT, 1 for DeiT and Swin.
        tv_weight: Weight of the total variation.
        l2_weight: Weight of the images' mean 2-norm.
        bn_weight: Weight of the distance between the batch statistics and the stored statistics of each BatchNorm, ten
            times as large for the first one. A model without BatchNorm has no such term.
    """

    num_images: int = 16
    micro_batch: int | None = None
    iterations: int = 30
    learning_rate: float = 0.25
    betas: tuple[float, float] = (0.5, 0.9)
    warmup_iterations: int = 3
    jitter: float = 30 / 224
    flip: float = 0.5
    tv_exponent: float | None = None
    tv_weight: float = 1e-4
    l2_weight: float = 1e-5
    bn_weight: float = 0.01

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check(self.num_images >= 1, "num_images", self.num_images, "1 or more")
        _check(self.micro_batch is None or self.micro_batch >= 1, "micro_batch", self.micro_batch, "1 or more, or None")
        _check(self.iterations >= 1, "iterations", self.iterations, "1 or more")
        _check(self.learning_rate > 0, "learning_rate", self.learning_rate, "a positive float")
        _check(all(0 <= b < 1 for b in self.betas), "betas", self.betas, "two values in [0, 1)")
        _check(self.warmup_iterations >= 0, "warmup_iterations", self.warmup_iterations, "0 or more")
        _check(0 <= self.jitter < 1, "jitter", self.jitter, "a share of the image side in [0, 1)")
        _check(0 <= self.flip <= 1, "flip", self.flip, "a probability")
        beta = self.tv_exponent
        _check(beta is None or beta > 0, "tv_exponent", beta, "a positive float, or None")
        _check(self.tv_weight >= 0, "tv_weight", self.tv_weight, "0 or more")
        _check(self.l2_weight >= 0, "l2_weight", self.l2_weight, "0 or more")
        _check(self.bn_weight >= 0, "bn_weight", self.bn_weight, "0 or more")

    @property
    def micro_batch_size(self) -> int:
        """Number of images that pass through the model at once."""
        return self.num_images if self.micro_batch is None else min(self.num_images, self.micro_batch)

    def with_micro_batch_at_most(self, count: int) -> "SynthesisConfig":
        """Return a copy with a micro-batch of at most `count` images."""
        return replace(self, micro_batch=min(count, self.micro_batch_size))


@dataclass(frozen=True)
class Ablation:
    """Settings for ablations of dcvit's method, measured in benchmarks/RESULTS.md. Other users keep the defaults.

    `tokens` and `updated`, which are also ablations, are in `DistillationConfig` because other methods read them too.

    Attributes:
        ranking_images: Images on which blocks are ranked: synthesised images, or the few-shot images.
        metric: How a student is compared with its teacher on these images, see `dcvit.metrics.fidelity`: by all output
            tokens (`"distillation"`), or by class distributions as published (`"cross_entropy"`).
        progressive: With distillation, whether blocks are compressed one by one, best first, or all at once with the
            same number of epochs.
        halving: With distillation, whether the worse half of the probes by metric loss stops early, twice. At least as
            many probes continue as blocks are to be compressed. The choice may differ between blocks with nearly equal
            losses; `dcvit.search.sensitivity.RUNGS` documents when probes stop, and the measurements.
    """

    ranking_images: RankingImages = "synthetic"
    metric: MetricKind = "distillation"
    progressive: bool = True
    halving: bool = False

    def __post_init__(self) -> None:
        _check_choice("ranking_images", self.ranking_images, RankingImages)
        _check_choice("metric", self.metric, MetricKind)
        _check(isinstance(self.progressive, bool), "progressive", self.progressive, "True or False")
        _check(isinstance(self.halving, bool), "halving", self.halving, "True or False")


@dataclass(frozen=True)
class MethodConfig:
    """Settings that every method reads; the type of a config determines the method.

    Attributes:
        candidates: Blocks that may be compressed, from 0; `None` leaves the choice to the method.
        seed: Seed of everything random.
        impl: Implementation of the ops, see `dcvit.ops`. Changes speed, and results only by rounding.
    """

    candidates: tuple[int, ...] | None = None
    seed: int = 0
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        _check_numbers(self)
        if self.candidates is not None:
            requested: Iterable[int] = self.candidates
            object.__setattr__(self, "candidates", tuple(sorted(set(requested))))
            _check(bool(self.candidates), "candidates", requested, "at least one block, or None")
            _check(
                all(isinstance(b, int) and not isinstance(b, bool) for b in self.candidates or ()),
                "candidates",
                requested,
                "ints, blocks count from 0",
            )
        _check(self.seed >= 0, "seed", self.seed, "0 or more")
        _check_choice("impl", self.impl, Impl)

    @property
    def micro_batch_size(self) -> int:
        """Largest number of images that pass through a model at once."""
        return max(part.micro_batch_size for part in self._parts().values())

    def with_micro_batch_at_most(self: Config, count: int) -> Config:
        """Return a copy with micro-batches of at most `count` images, which changes results only by rounding."""
        smaller: dict[str, Any] = {name: part.with_micro_batch_at_most(count) for name, part in self._parts().items()}
        return replace(self, **smaller)

    def halved(self: Config) -> Config | None:
        """Return a copy with half the micro-batch size, rounded up; `None` if it is already one image."""
        return None if self.micro_batch_size == 1 else self.with_micro_batch_at_most(-(-self.micro_batch_size // 2))

    def with_(self: Config, **changes: Any) -> Config:
        """Return a copy with some fields changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return every setting as plain values for JSON."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # tuples become lists, as in a saved file
        return values

    def _parts(self) -> dict[str, _Batched]:
        values = {of.name: getattr(self, of.name) for of in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, _Batched)}


@dataclass(frozen=True)
class DCViT(MethodConfig):
    """Settings of dcvit's own method, DC-ViT (arXiv 2403.18708) and what dcvit adds to it.

    It removes attention and hidden units from the blocks that recover best. The defaults are for a few hundred images
    and one machine. Other presets are `fast`, `best` and `paper`.

    Attributes:
        candidates: Blocks that may be compressed, from 0; `None` allows all, except that the first and the last block
            of a transformer keep their attention.
        seed: See `MethodConfig`.
        impl: See `MethodConfig`.
        recovery: How compressed students recover: block by block (`ReconstructionConfig`), or by distillation of the
            teacher's output tokens as published (`DistillationConfig`).
        synthesis: Settings of the proxy set, the images on which blocks are ranked.
        num_blocks: k, the number of blocks that lose their attention; the others are then not changed. `None` leaves
            the number open.
        round_to: Kept hidden units are rounded down to a multiple of this, for example 8 for the hardware's sake. The
            budget is still not exceeded.
        structure: How the structure is found. `"fewest"`, as published: the fewest blocks that meet the budget, chosen
            by smallest metric loss, lose their attention and the same share of hidden units. `"searched"`: the blocks,
            their numbers of hidden units and whether their attention stays are chosen for the smallest total loss
            predicted by the probes. Budgets of latency or activation memory always use `"fewest"`.
        ablation: Settings for ablations.
    """

    recovery: ReconstructionConfig | DistillationConfig = field(default_factory=ReconstructionConfig)
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    num_blocks: int | None = None
    round_to: int = 1
    structure: Structure = "searched"
    ablation: Ablation = field(default_factory=Ablation)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.num_blocks is None or self.num_blocks >= 1, "num_blocks", self.num_blocks, "1 or more, or None")
        _check(self.round_to >= 1, "round_to", self.round_to, "1 or more")
        _check_choice("structure", self.structure, Structure)
        _check(
            isinstance(self.recovery, ReconstructionConfig | DistillationConfig),
            "recovery",
            self.recovery,
            "a ReconstructionConfig or a DistillationConfig",
        )
        _check(isinstance(self.synthesis, SynthesisConfig), "synthesis", self.synthesis, "a SynthesisConfig")
        _check(isinstance(self.ablation, Ablation), "ablation", self.ablation, "an Ablation")

    @classmethod
    def fast(cls, **changes: Any) -> "DCViT":
        """Return the fast preset: only the closed form, without gradient steps on blocks and without refinement.

        Args:
            **changes: Fields to change, for example `seed=2021`.
        """
        return cls(recovery=ReconstructionConfig(epochs=0, refinement_steps=0)).with_(**changes)

    @classmethod
    def best(cls, **changes: Any) -> "DCViT":
        """Return the preset for best quality: ten times the refinement steps and four times the views.

        Where the default refines, this preset takes about ten times as long. The views and the teacher's tokens for
        them need four times the memory or disk. Models with more than 1.3 billion MACs per image, such as ViT-Small at
        224 px, are still not refined, and take about four times as long; raise `refinement_macs` to refine them.

        Args:
            **changes: Fields to change, for example `seed=2021`.
        """
        return cls(
            recovery=ReconstructionConfig(
                num_views=4000, num_rows=65536, refinement_views=10000, refinement_steps=10000, refinement_macs=6e13
            )
        ).with_(**changes)

    @classmethod
    def paper(cls, **changes: Any) -> "DCViT":
        """Return the published settings of DC-ViT (arXiv 2403.18708 and its supplement).

        The cost is (L + k) · 2000 epochs. The probes train in lock step: random views are drawn once for all of them,
        not separately for each block. Otherwise the results equal those of probes that run one after another.

        Args:
            **changes: Fields to change, for example `seed=2021`.
        """
        return cls(
            recovery=DistillationConfig(
                epochs=2000,
                learning_rate=3e-5,
                weight_decay=1e-4,
                warmup_epochs=20,
                batch_size=64,
                tokens="all",
                updated="front",
                augmentation=AugmentationConfig(),
            ),
            synthesis=SynthesisConfig(
                num_images=50,
                iterations=2000,
                learning_rate=0.25,
                betas=(0.5, 0.9),
                warmup_iterations=100,
                jitter=30 / 224,
                flip=0.5,
                tv_exponent=None,
                tv_weight=1e-4,
                l2_weight=1e-5,
            ),
            structure="fewest",
            ablation=Ablation(ranking_images="synthetic", metric="cross_entropy", progressive=True, halving=False),
        ).with_(**changes)

    @property
    def reconstruction(self) -> ReconstructionConfig:
        """`recovery`, if it is block reconstruction.

        Raises:
            DcvitError: If it is distillation.
        """
        if isinstance(self.recovery, ReconstructionConfig):
            return self.recovery
        raise DcvitError(f"recovery={self.recovery!r}: this needs block reconstruction, pass ReconstructionConfig().")

    @property
    def distillation(self) -> DistillationConfig:
        """`recovery`, if it is distillation.

        Raises:
            DcvitError: If it is block reconstruction.
        """
        if isinstance(self.recovery, DistillationConfig):
            return self.recovery
        raise DcvitError(f"recovery={self.recovery!r}: this needs distillation, pass DistillationConfig().")

    @property
    def halving(self) -> bool:
        """Whether the worse probes stop early."""
        return self.ablation.halving

    def with_tv_exponent(self, of_family: float) -> "DCViT":
        """Return a copy with a value for β: the one of the model's family, unless it is already set."""
        return self if self.synthesis.tv_exponent is not None else replace(
            self, synthesis=replace(self.synthesis, tv_exponent=of_family)
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return every setting as plain values for JSON; `method` in `recovery` names its kind."""
        values = super().to_dict()
        method = "reconstruction" if isinstance(self.recovery, ReconstructionConfig) else "distillation"
        return {**values, "recovery": {"method": method, **values["recovery"]}}
