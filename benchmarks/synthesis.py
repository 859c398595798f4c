"""Measure how well proxy sets rank the blocks, and what they cost: `python -m benchmarks synthesis`.

In each student, one candidate block of a test bed's model is compressed to a quarter of its hidden units and recovered
in closed form. Its true loss is r over the output tokens of the held-out images (`benchmarks.testbeds.Measures`). Each
proxy set then ranks the same students, and Spearman's rank correlation with the true order measures how well it does.
The proxy sets are the one that `dcvit.compress` makes, the published one (2000 iterations), and plain noise. Each is
evaluated with both metrics, and with the one that `dcvit.compress` uses, which adds validation views of the few-shot
images (`dcvit.metrics.fidelity`).
"""

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean

import torch
from scipy.stats import spearmanr
from torch import nn

from benchmarks.harness import header
from benchmarks.methods import BEDS
from benchmarks.runs import markdown, spread
from benchmarks.testbeds import TestBed, measure
from dcvit.config import DCViT, MetricKind, ReconstructionConfig, SynthesisConfig
from dcvit.context import RunContext
from dcvit.data.images import load_images
from dcvit.data.synthesis import synthesize
from dcvit.history import BlockSpec
from dcvit.methods.dcvit.reconstructed import HELD_OUT_VIEWS
from dcvit.metrics.fidelity import Metric
from dcvit.models import compressible
from dcvit.recovery.calibration import TeacherStates, Views, draw_views
from dcvit.recovery.reconstruct import BlockProblem, reconstruct_block
from dcvit.search.space import choose_candidates

KEPT = 0.25
"""Share of the hidden units that the compressed block keeps."""

VIEWS = 250
"""Number of views for the closed form. Few are enough, because proxy sets are compared and not students."""

METRICS: dict[str, MetricKind] = {
    "cross-entropy": "cross_entropy",
    "distillation": "distillation",
    "distillation, held-out images too": "distillation",
}
"""Metrics that rank the students."""


@dataclass(frozen=True)
class Evaluated:
    """The figures of one proxy set.

    Attributes:
        seconds: Seconds of its synthesis.
        correlation: Spearman's correlation of the order by each of `METRICS` with the true order.
    """

    seconds: float
    correlation: dict[str, float]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser("python -m benchmarks synthesis", description=__doc__.partition("\n")[0])
    parser.add_argument("--beds", nargs="+", choices=BEDS, default=["digits", "photographs"])
    parser.add_argument("--seeds", type=int, default=5, help="number of few-shot sets, each with its own proxy sets")
    parser.add_argument("--iterations", type=int, default=DCViT.paper().synthesis.iterations,
                        help="iterations of the published set")  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    print(header())
    rows = []
    for name in options.beds:
        evaluated: dict[str, list[Evaluated]] = {}
        for seed in range(options.seeds):
            for label, result in _compare(BEDS[name](seed), seed, options.iterations).items():
                evaluated.setdefault(label, []).append(result)
        for label, results in evaluated.items():
            cells = [spread([result.correlation[metric] for result in results], 2) for metric in METRICS]
            rows.append([name, label, str(len(results)), *cells, f"{mean(result.seconds for result in results):.1f}"])
    print("Rank correlation with the true order, mean ± standard deviation:\n")
    print(markdown(["bed", "proxy set", "seeds", *METRICS, "s"], rows))
    return 0


def _compare(bed: TestBed, seed: int, iterations: int) -> dict[str, Evaluated]:
    """Return the figures of each proxy set on a test bed, by label."""
    config = DCViT(seed=seed)
    recovery = replace(config.reconstruction, augmentation=bed.augmentation, num_views=VIEWS)
    views = draw_views(bed.model, load_images(bed.images, bed.model), recovery, seed)
    students = _students(bed.model, views, recovery, seed)
    true = [measure(bed, student).error for student in students.values()]
    default, published = config.synthesis, DCViT.paper().synthesis
    synthesis = {
        f"default: {default.num_images} images, {default.iterations} iterations": default,
        f"published: {published.num_images} images, {iterations} iterations": replace(published, iterations=iterations),
        f"noise: {default.num_images} images": replace(default, iterations=1),
    }

    def evaluate(settings: SynthesisConfig) -> Evaluated:
        start = time.perf_counter()
        made = synthesize(bed.model, replace(settings, flip=bed.augmentation.flip), RunContext(seed)).images
        seconds = time.perf_counter() - start
        correlation = {}
        for name, kind in METRICS.items():
            held_out = [views.images[views.held_out][:HELD_OUT_VIEWS]] if "held-out" in name else []
            metric = Metric(bed.model, [made, *held_out], kind)
            losses = [metric.loss(student, block) for block, student in students.items()]
            correlation[name] = float(spearmanr(losses, true).statistic)
        return Evaluated(seconds, correlation)

    return {label: evaluate(settings) for label, settings in synthesis.items()}


def _students(model: nn.Module, views: Views, config: ReconstructionConfig, seed: int) -> dict[int, nn.Module]:
    """Return for each candidate block a model in which only that block is compressed and solved."""
    states, view = TeacherStates(model, views, config.batch_size), compressible(model)
    students = {}
    for block in choose_candidates(model, None):
        students[block] = copy.deepcopy(model)
        count = round(KEPT * view.hidden_features(block))
        rows = states.rows(block).thinned()
        problem = BlockProblem(block, BlockSpec(count), rows)
        reconstruct_block(students[block], problem, config, context=RunContext(seed), refit=False)
    return students
