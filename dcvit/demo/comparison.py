"""The demonstration: a comparison of this method with block dropping at the same MACs, on held-out digits."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from torch import nn

from dcvit.artifacts.result import CompressionResult, Record
from dcvit.budget import Budget
from dcvit.compression.compress import compress
from dcvit.config import AugmentationConfig, DCViT, DistillationConfig, ReconstructionConfig, SynthesisConfig
from dcvit.data.images import load_images
from dcvit.demo.digits import Digits
from dcvit.history import ComparisonRow, ModelFigures
from dcvit.methods.baselines.practise import Practise, block_dropping, drop_blocks
from dcvit.metrics.agreement import agreement, top1
from dcvit.metrics.latency import QUICK_TIMING, measure_latency
from dcvit.models import compressible, load_model
from dcvit.models.teacher import freeze
from dcvit.runtime.progress import Progress, silent

__all__ = [
    "BLOCK_DROPPING",
    "DEMO_CONFIG",
    "DIGIT_VIEWS",
    "NUM_DROPPED",
    "PUBLISHED_DEMO_CONFIG",
    "THIS_METHOD",
    "Comparison",
    "Settings",
    "compare",
]

BLOCK_DROPPING = "block dropping (PRACTISE)"
THIS_METHOD = "dcvit"

NUM_DROPPED = 2
"""Number of whole blocks that block dropping removes: two of eight, about a quarter of the MACs."""

# Digits are centred and have a writing direction: small shifts only, no mirror images, no colours.
DIGIT_VIEWS = AugmentationConfig(scale=(0.7, 1.0), ratio=(0.9, 1.1), flip=0.0, color_jitter=0.0)

DEMO_CONFIG = DCViT(recovery=ReconstructionConfig(augmentation=DIGIT_VIEWS), synthesis=SynthesisConfig(flip=0.0))
"""The default config, with augmentation that suits digits."""

PUBLISHED_DEMO_CONFIG = DCViT.paper(
    recovery=DistillationConfig(
        epochs=20,
        learning_rate=1e-3,
        warmup_epochs=2,
        batch_size=25,
        augmentation=DIGIT_VIEWS,
        fixed_views=8,
    ),
    synthesis=SynthesisConfig(num_images=50, iterations=100, flip=0.0),
)
"""The published procedure, shortened to minutes on a CPU and adapted to 8x8 digits."""


@dataclass(frozen=True)
class Settings:
    """The settings of the methods that are compared.

    Attributes:
        config: The settings of this method.
        published: The settings of the published procedure and of block dropping. Their impl is replaced by `config`'s.
    """

    config: DCViT = DEMO_CONFIG
    published: DCViT = PUBLISHED_DEMO_CONFIG


DEMO_SETTINGS = Settings()


@dataclass(frozen=True)
class Comparison:
    """All rows, and the result of the first seed.

    Attributes:
        rows: One row per method and seed, grouped by seed.
        result: This method's result on the first seed, with top-1 on the held-out digits filled in.
    """

    rows: tuple[ComparisonRow, ...]
    result: CompressionResult

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods in the order of the table."""
        return tuple(dict.fromkeys(row.method for row in self.rows))

    def summary(self, method: str) -> dict[str, Any]:
        """Return mean and standard deviation of a method's figures over the seeds (the deviation of one seed is 0)."""
        rows = [row for row in self.rows if row.method == method]

        def spread(name: str) -> dict[str, float]:
            values = [float(getattr(row, name)) for row in rows]
            return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else 0.0}

        return {
            "method": method,
            "seeds": [row.seed for row in rows],
            **{name: spread(name) for name in ("top1", "agreement", "latency_ms")},
            "macs": rows[0].macs,
            "params": rows[0].params,
            "rows": [asdict(row) for row in rows],
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of `result.json`: the first seed's result, and all methods under `comparison`."""
        return {**self.result.to_dict(), **self._summaries()}

    def save(self, folder: str | Path, *, overwrite: bool = False, page: Callable[[Record], str] | None = None) -> None:
        """Save the first seed's result, with all methods in its `result.json`; see `CompressionResult.save`."""
        self.result.save(folder, overwrite=overwrite, more=self._summaries(), page=page)

    def _summaries(self) -> dict[str, Any]:
        return {"comparison": [self.summary(method) for method in self.methods]}


def compare(
    model: str | nn.Module,
    digits: Digits,
    seeds: Sequence[int],
    *,
    num_images: int = 50,
    num_dropped: int = NUM_DROPPED,
    settings: Settings = DEMO_SETTINGS,
    progress: Progress = silent,
) -> Comparison:
    """Run block dropping and this method at the MACs that block dropping reaches.

    Args:
        model: The original model, or its name.
        digits: The data. Few-shot sets are drawn from the training part, and the figures use the held-out part.
        seeds: The seeds. Each gives one few-shot set and one run of all methods.
        num_images: Size of a few-shot set.
        num_dropped: Number of whole blocks that block dropping removes.
        settings: The settings of the methods. Their seeds are replaced.
        progress: Called during each run, see `Progress`.
    """
    teacher = freeze(load_model(model))
    rows: list[ComparisonRow] = []
    results: list[CompressionResult] = []
    for seed in seeds:
        config = replace(settings.config, seed=seed)
        practise = Practise(distillation=settings.published.distillation, seed=seed, impl=config.impl)
        images = digits.few_shot(num_images, seed)
        few_shot = load_images(images, teacher)
        dropped = block_dropping(teacher, few_shot, num_dropped, practise, progress=progress)
        budget = Budget(macs=compressible(dropped.model).cost().total.macs("with_attention_products"))
        published = replace(settings.published, seed=seed, impl=config.impl)
        gradient_only = compress(model, images, budget, published, progress=progress)
        result = compress(model, images, budget, config, progress=progress)
        models: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
            "original": (teacher, ()),
            "block dropping, not recovered": (drop_blocks(teacher, dropped.blocks), dropped.blocks),
            BLOCK_DROPPING: (dropped.model, dropped.blocks),
            "DC-ViT as published, shortened": (gradient_only.model, gradient_only.plan.blocks),
            THIS_METHOD: (result.model, result.plan.blocks),
        }
        latency = measure_latency({name: m for name, (m, _) in models.items()}, digits.test_images[:64], QUICK_TIMING)
        for name, (candidate, blocks) in models.items():
            cost = compressible(candidate).cost().total
            agreed = agreement(candidate, teacher, digits.test_images)
            assert agreed is not None
            accuracy = top1(candidate, digits.test_images, digits.test_labels)
            macs = cost.macs("with_attention_products")
            rows.append(ComparisonRow(name, seed, accuracy, agreed, macs, cost.params, latency[name].median_ms, blocks))
        results.append(result)
    by_method = {row.method: row for row in rows if row.seed == seeds[0]}
    return Comparison(tuple(rows), _with_top1(results[0], by_method["original"], by_method[THIS_METHOD]))


def _with_top1(result: CompressionResult, teacher: ComparisonRow, student: ComparisonRow) -> CompressionResult:
    def figures(row: ComparisonRow, of: ModelFigures) -> ModelFigures:
        return replace(of, latency_ms=row.latency_ms, top1=row.top1)

    report = result.report
    report = replace(
        report,
        teacher=figures(teacher, report.teacher),
        student=figures(student, report.student),
        agreement=student.agreement,
    )
    return replace(result, report=report)
