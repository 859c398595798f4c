"""Every setting, frozen: parts that methods share, what every method reads, and dcvit's own method with its presets.

A method is its config: `dcvit.compress(..., method=DCViT(num_blocks=3))`. Its type says which method, its fields are
all that the method reads. The configs of the other methods lie beside them, in `dcvit.methods.baselines`.
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
    """Take NumPy's numbers, and refuse floats where ints are counted."""
    plain_numbers(config)
    of: type = type(config)
    for name, kind in field_types(of).items():
        kinds, value = get_args(kind) or (kind,), getattr(config, name)
        whole = int in kinds and float not in kinds
        _check(not (whole and isinstance(value, float)), name, value, "an int")


def _freeze_positive(config: object, name: str) -> None:
    """Make a field a tuple, of one or more positive floats."""
    values = tuple(getattr(config, name))
    object.__setattr__(config, name, values)
    _check(len(values) > 0 and min(values) > 0, name, values, "one or more positive floats")


@runtime_checkable
class _Batched(Protocol):
    """Settings that say how many images pass through a model at once."""

    @property
    def micro_batch_size(self) -> int:
        """Images that pass through a model at once."""

    def with_micro_batch_at_most(self: Part, count: int) -> Part:
        """The same with at most so many images at once, which changes results by rounding alone."""


@dataclass(frozen=True)
class AugmentationConfig:
    """Random views of the few-shot images during recovery, timm's training augmentation.

    Attributes:
        scale: Smallest and largest share of the image's area that a random crop takes.
        ratio: Smallest and largest aspect ratio (width / height) of the crop.
        flip: Probability of a horizontal flip.
        color_jitter: Largest relative change of brightness, contrast and saturation (the last for RGB only).
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
    """The images and tokens that blocks are fitted on (`dcvit.recovery.calibration`).

    Attributes:
        num_views: Images that blocks are fitted on: the few-shot images and random views of them. Never fewer than the
            few-shot images.
        num_rows: Tokens drawn from them, at least one from each; each is one equation.
        augmentation: Random views; `None` leaves it at the few-shot images.
        batch_size: Images that pass through a model at once. Changes speed and memory, and results by rounding alone.
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
        """Images that pass through a model at once."""
        return self.batch_size

    def with_micro_batch_at_most(self: "Calibration", count: int) -> "Calibration":
        """The same with at most so many images at once."""
        return replace(self, batch_size=min(count, self.micro_batch_size))


Calibration = TypeVar("Calibration", bound=CalibrationConfig)


@dataclass(frozen=True)
class ReconstructionConfig(CalibrationConfig):
    """Block reconstruction (`dcvit.recovery.reconstruct`): a compressed block learns alone what the teacher's block
    gives.

    Attributes:
        num_views: See `CalibrationConfig`; where no refinement follows.
        num_rows: See `CalibrationConfig`.
        augmentation: See `CalibrationConfig`.
        batch_size: See `CalibrationConfig`; the gradients of a refinement step's parts add up.
        refinement_views: As `num_views`, where refinement follows, which goes over them many times.
        units: Which hidden units a block keeps: those that explain the missing output best (`"greedy"`), or
            `"random"` ones as published.
        epochs: Of the gradient steps after the closed form, passes over the rows; 0 leaves it at the closed form.
        step_sizes: Candidates of the gradient steps' size, as a share of a parameter tensor's root mean square; the
            best on held-out images is taken.
        batch_rows: Rows a gradient step.
        refinement_steps: Gradient steps on the output tokens at the end (`dcvit.recovery.finetune`), at most; 0 leaves
            them out.
        refinement_macs: Multiply-accumulates that they may take together, so that a large model is not held up: they
            gain least, and cost most, of all. The default leaves them out of models of more than 133 million an image,
            all ViTs at 224 px among them; multiply it to have them. One of a CNN counts as three, which it takes where
            it is depthwise.
        refinement_batch: Views a step.
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
    """How a student trains end to end.

    Attributes:
        epochs: Passes over the few-shot images, for each recovery.
        learning_rate: AdamW's peak learning rate, or `"auto"`: the best of `learning_rates`, found on images held out.
        learning_rates: The candidates of `"auto"`.
        weight_decay: AdamW's decoupled weight decay, on all updated parameters.
        warmup_epochs: Epochs over which the learning rate rises linearly; it then follows a half cosine to zero.
        batch_size: Images a step.
        micro_batch: Of these, how many pass through a model at once; the gradients of a step's parts add up. `None`
            is all. Changes speed and memory, and results by rounding alone.
        augmentation: Random views; `None` shows the images as they are, and computes the teacher's tokens once.
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
        """Images that pass through a model at once."""
        return self.batch_size if self.micro_batch is None else min(self.batch_size, self.micro_batch)

    def with_micro_batch_at_most(self: Training, count: int) -> Training:
        """The same with at most so many images at once."""
        return replace(self, micro_batch=min(count, self.micro_batch_size))

    def with_learning_rate(self: Training, find: Callable[[], float]) -> Training:
        """The same with a number for the learning rate: what `find` finds if it is `"auto"`."""
        return replace(self, learning_rate=find()) if self.learning_rate == "auto" else self


@dataclass(frozen=True)
class DistillationConfig(TrainingConfig):
    """Feature distillation, DC-ViT's token distillation: the student learns to give the teacher's output tokens.

    Attributes:
        epochs: See `TrainingConfig`; also those of each probe, where a method tries blocks so.
        learning_rate: See `TrainingConfig`.
        learning_rates: See `TrainingConfig`.
        weight_decay: See `TrainingConfig`.
        warmup_epochs: See `TrainingConfig`.
        batch_size: See `TrainingConfig`.
        micro_batch: See `TrainingConfig`.
        augmentation: See `TrainingConfig`.
        fixed_views: How many random views of each image there are; epochs cycle through them, and the teacher sees each
            only once. They are held in memory with the teacher's tokens. `None` draws new ones every epoch.
        tokens: Which output tokens are mimicked: all of them, or the class token only (an ablation), which the model
            must have.
        updated: Which part of the student is updated. `"front"`: the stem and every block up to one after the last
            compressed one. `"around"`: one block before the first compressed one to one after the last.
            `"all"`: everything but the head. The head, and what pools for it, is always frozen.
        lock_step: Of the students that train together (all candidates of the probes, all learning rates), how many go
            through a batch at once. Activations of so many are in memory, but weights and optimiser states of all.
            Changes speed and memory alone.
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
    """The proxy set, made from the model itself.

    Attributes:
        num_images: Images synthesised.
        micro_batch: Of these, how many pass through the model at once; all of a model with BatchNorm, whose statistics
            are those of all. `None` is all. Changes speed and memory, and results by rounding alone.
        iterations: Adam steps.
        learning_rate: Adam's peak learning rate.
        betas: Adam's moment decay rates.
        warmup_iterations: Steps over which the learning rate rises linearly; it then follows a half cosine to zero.
        jitter: Largest random roll, as a share of the image side (30 px of 224 in the paper).
        flip: Probability that a step sees the images mirrored.
        tv_exponent: β, the power of the four difference norms. `None` takes that of the model's family as published
            (`dcvit.models.ModelView.tv_exponent`): 0.6 for ViT, 1 for DeiT and Swin.
        tv_weight: Weight of the total variation.
        l2_weight: Weight of the images' mean 2-norm.
        bn_weight: Weight of the distance between what each BatchNorm sees and the statistics that it has, ten times as
            much at the first one; a model without BatchNorm has no such term.
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
        """Images that pass through the model at once."""
        return self.num_images if self.micro_batch is None else min(self.num_images, self.micro_batch)

    def with_micro_batch_at_most(self, count: int) -> "SynthesisConfig":
        """The same with at most so many images at once."""
        return replace(self, micro_batch=min(count, self.micro_batch_size))


@dataclass(frozen=True)
class Ablation:
    """What only an ablation of dcvit's method turns: each is measured in benchmarks/RESULTS.md, and best left alone.

    Two more are in `DistillationConfig`, for other methods read them too: `tokens` and `updated`.

    Attributes:
        ranking_images: What blocks are ranked on: synthesised images, or the few-shot images.
        metric: How a student is compared with its teacher on them, see `dcvit.metrics.fidelity`: by all output tokens
            (`"distillation"`), or by class distributions as published.
        progressive: Of distillation: compress block by block, best first, or all at once with the same number of
            epochs.
        halving: Of distillation: whether hopeless probes stop early: twice, the worse half by metric loss, but never so
            many that fewer blocks are left than are to be compressed. Of blocks that come out close together it may
            choose others; `dcvit.search.sensitivity.RUNGS` says when they stop, and what was measured.
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
    """What every method reads; the type of a config says which method it is of.

    Attributes:
        candidates: Blocks that may be cut, from 0; `None` leaves the choice to the method.
        seed: Seeds everything that is random.
        impl: Which implementation of the ops runs, see `dcvit.ops`. Changes speed, and results by rounding alone.
    """

    candidates: tuple[int, ...] | None = None
    seed: int = 0
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        _check_numbers(self)
        if self.candidates is not None:
            wanted: Iterable[int] = self.candidates
            object.__setattr__(self, "candidates", tuple(sorted(set(wanted))))
            _check(bool(self.candidates), "candidates", wanted, "at least one block, or None")
            _check(
                all(isinstance(b, int) and not isinstance(b, bool) for b in self.candidates or ()),
                "candidates",
                wanted,
                "ints, blocks count from 0",
            )
        _check(self.seed >= 0, "seed", self.seed, "0 or more")
        _check_choice("impl", self.impl, Impl)

    @property
    def micro_batch_size(self) -> int:
        """Images that pass through a model at once, at most."""
        return max(part.micro_batch_size for part in self._parts().values())

    def with_micro_batch_at_most(self: Config, count: int) -> Config:
        """The same with at most so many images at once, which changes results by rounding alone."""
        smaller: dict[str, Any] = {name: part.with_micro_batch_at_most(count) for name, part in self._parts().items()}
        return replace(self, **smaller)

    def halved(self: Config) -> Config | None:
        """The same with half as many images at once; `None` at one image."""
        return None if self.micro_batch_size == 1 else self.with_micro_batch_at_most(-(-self.micro_batch_size // 2))

    def with_(self: Config, **changes: Any) -> Config:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Every setting as plain values for JSON."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # tuples become lists, as in a saved file
        return values

    def _parts(self) -> dict[str, _Batched]:
        values = {of.name: getattr(self, of.name) for of in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, _Batched)}


@dataclass(frozen=True)
class DCViT(MethodConfig):
    """DC-ViT (arXiv 2403.18708) and what dcvit made of it: attention and hidden units out of the blocks that recover
    best.

    The defaults are for a few hundred images and one machine. Other presets: `fast`, `best` and `paper`.

    Attributes:
        candidates: Blocks that may be cut, from 0; `None` is all, but of a transformer the first and the last keep
            their attention.
        seed: See `MethodConfig`.
        impl: See `MethodConfig`.
        recovery: How cut students recover: block by block (`ReconstructionConfig`), or by distillation of the teacher's
            output tokens as published (`DistillationConfig`).
        synthesis: How the proxy set is made, the images that blocks are ranked on.
        num_blocks: k, how many blocks lose their attention, if it is to be a certain number; then the others stay as
            they are.
        round_to: Kept hidden units are rounded down to a multiple of this, 8 for example where hardware likes that; the
            budget holds.
        structure: As published (`"fewest"`): as few blocks as meet the budget, the ones of least metric loss, lose
            their attention, all with the same share of hidden units. Or (`"searched"`): the blocks, the units that each
            keeps and whether its attention stays, of which the probes promise the least loss in all. Where the budget
            is of latency or activation memory it is the fewest all the same.
        ablation: What only an ablation turns.
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
        """The closed form alone: no gradient step on any block, no refinement.

        Args:
            **changes: Fields to change, for example `seed=2021`.
        """
        return cls(recovery=ReconstructionConfig(epochs=0, refinement_steps=0)).with_(**changes)

    @classmethod
    def best(cls, **changes: Any) -> "DCViT":
        """Ten times the refinement, and four times the views, for quality at any price.

        Where the default refines, this takes about ten times as long and, for the views and the teacher's tokens of
        them, four times the memory or disk. Models of more than 1.3 billion MACs an image, ViT-Small at 224 px among
        them, are not refined all the same, and take about four times as long; raise `refinement_macs` to have it.

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
        """The published settings: DC-ViT (arXiv 2403.18708 and its supplementary), at a cost of (L + k) · 2000 epochs.

        The probes train in lock step: random views are drawn once for all of them, not anew for each block. Nothing
        else differs from probes one after another.

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
        """`recovery`, where it is block reconstruction.

        Raises:
            DcvitError: Where it is not.
        """
        if isinstance(self.recovery, ReconstructionConfig):
            return self.recovery
        raise DcvitError(f"recovery={self.recovery!r}: this needs block reconstruction, pass ReconstructionConfig().")

    @property
    def distillation(self) -> DistillationConfig:
        """`recovery`, where it is distillation.

        Raises:
            DcvitError: Where it is not.
        """
        if isinstance(self.recovery, DistillationConfig):
            return self.recovery
        raise DcvitError(f"recovery={self.recovery!r}: this needs distillation, pass DistillationConfig().")

    @property
    def halving(self) -> bool:
        """Whether hopeless probes stop early."""
        return self.ablation.halving

    def with_tv_exponent(self, of_family: float) -> "DCViT":
        """The same with a number for β: that of the model's family, unless there is one already."""
        return self if self.synthesis.tv_exponent is not None else replace(
            self, synthesis=replace(self.synthesis, tv_exponent=of_family)
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Every setting as plain values for JSON; `recovery` says under `method` which of the two kinds it is."""
        values = super().to_dict()
        method = "reconstruction" if isinstance(self.recovery, ReconstructionConfig) else "distillation"
        return {**values, "recovery": {"method": method, **values["recovery"]}}
