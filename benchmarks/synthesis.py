"""How useful a proxy set is, and what it costs: `python -m benchmarks synthesis`.

Each candidate block of a test bed's model is compressed alone, to a quarter of its hidden units, and recovered in
closed form. Its true loss is r over the output tokens of the held-out images (`benchmarks.testbeds.Measures`). Metric
sets then judge the same students, and the rank correlation (Spearman) with the true order says how well each orders
them. Compared are the set that `dcvit.compress` makes, the published one (2000 iterations), and noise that no iteration
has touched; each by both metrics, and by the one that `dcvit.compress` takes, which looks at held-out few-shot images
too (`dcvit.metrics.fidelity`).
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
"""Share of the hidden units that a tried block keeps."""

VIEWS = 250
"""Views that the blocks are solved on: what is compared is the judges, not the students."""

METRICS: dict[str, MetricKind] = {
    "cross-entropy": "cross_entropy",
    "distillation": "distillation",
    "distillation, held-out images too": "distillation",
}
"""What the students are judged by."""


@dataclass(frozen=True)
class Evaluated:
    """What one proxy set makes of the candidates.

    Attributes:
        seconds: Of its synthesis.
        correlation: Spearman's, of the order by each of `METRICS` with the true order.
    """

    seconds: float
    correlation: dict[str, float]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser("python -m benchmarks synthesis", description=__doc__.partition("\n")[0])
    parser.add_argument("--beds", nargs="+", choices=BEDS, default=["digits", "photographs"])
    parser.add_argument("--seeds", type=int, default=5, help="few-shot sets, each with proxy sets of its own")
    parser.add_argument("--iterations", type=int, default=DCViT.paper().synthesis.iterations,
                        help="of the published set")  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    print(header())
    rows = []
    for name in options.beds:
        judged: dict[str, list[Evaluated]] = {}
        for seed in range(options.seeds):
            for label, result in _compare(BEDS[name](seed), seed, options.iterations).items():
                judged.setdefault(label, []).append(result)
        for label, results in judged.items():
            cells = [spread([result.correlation[metric] for result in results], 2) for metric in METRICS]
            rows.append([name, label, str(len(results)), *cells, f"{mean(result.seconds for result in results):.1f}"])
    print("Rank correlation with the true order, mean ± standard deviation:\n")
    print(markdown(["bed", "proxy set", "seeds", *METRICS, "s"], rows))
    return 0


def _compare(bed: TestBed, seed: int, iterations: int) -> dict[str, Evaluated]:
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

    def judge(settings: SynthesisConfig) -> Evaluated:
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

    return {label: judge(settings) for label, settings in synthesis.items()}


def _students(model: nn.Module, views: Views, config: ReconstructionConfig, seed: int) -> dict[int, nn.Module]:
    """The model with each candidate block compressed alone and solved, by block."""
    states, view = TeacherStates(model, views, config.batch_size), compressible(model)
    students = {}
    for block in choose_candidates(model, None):
        students[block] = copy.deepcopy(model)
        count = round(KEPT * view.hidden_features(block))
        rows = states.rows(block).thinned()
        problem = BlockProblem(block, BlockSpec(count), rows)
        reconstruct_block(students[block], problem, config, context=RunContext(seed), refit=False)
    return students
