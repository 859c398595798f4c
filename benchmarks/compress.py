"""Time `dcvit.compress` on the embedded model, with and without the kernels: `python -m benchmarks compress`.

The runs come in pairs, one with `impl="eager"` and one with `impl="auto"`, in one process and in alternating order. A
slow or busy moment affects both runs of a pair, so it hardly changes their ratio. The interval of the median ratio
assumes nothing about the distribution. Many short runs are more informative than a few long ones. Each run is therefore
that of the demonstration with a quarter of its refinement, which is the longest stage. The other stages, such as
measuring the latency for the report, have a larger share of the time than in the demonstration.

The profile shows the time of each stage, and the operators that take most of it. The operators are profiled with the
fewest possible refinement steps, because a profiler keeps every call in memory.
"""

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

import dcvit
from benchmarks.harness import header
from dcvit.demo import load_digits
from dcvit.demo.comparison import DEMO_CONFIG
from dcvit.models.loading import load_model
from dcvit.ops import Impl
from dcvit.recovery.finetune import FEWEST_STEPS

IMPLS: tuple[Impl, Impl] = ("eager", "auto")


@dataclass(frozen=True)
class Run:
    """Wall-clock and processor seconds of one compression, and wall-clock seconds of each stage."""

    wall: float
    cpu: float
    stages: dict[str, float]


def main(argv: Sequence[str] | None = None) -> int:
    """Print times, ratios and profile."""
    parser = argparse.ArgumentParser("python -m benchmarks compress", description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=16, help="number of pairs; an interval needs at least 6")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; the demonstration uses one")
    parser.add_argument("--steps", type=int, help="refinement steps; by default a quarter of the demonstration's")
    parser.add_argument("--macs", type=float, default=0.75, help="budget, as a share of the model")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    print(header())
    model, images = load_model("demo").eval(), load_digits().few_shot(50, 0)
    recovery = DEMO_CONFIG.reconstruction

    def run(impl: Impl, steps: int) -> Run:
        config = replace(DEMO_CONFIG, impl=impl, recovery=replace(recovery, refinement_steps=steps))
        wall, cpu = time.perf_counter(), time.process_time()
        result = dcvit.compress(model, dcvit.load_images(images, model), dcvit.Budget(macs=options.macs), config)
        return Run(time.perf_counter() - wall, time.process_time() - cpu, dict(result.report.seconds))

    steps = options.steps or recovery.refinement_steps // 4
    print(
        f"{options.runs} pairs of runs of {steps} refinement steps (the demonstration: {recovery.refinement_steps})\n"
    )
    for impl in IMPLS:
        run(impl, FEWEST_STEPS)
    runs: dict[Impl, list[Run]] = {impl: [] for impl in IMPLS}
    for pair in range(options.runs):
        for impl in IMPLS if pair % 2 == 0 else IMPLS[::-1]:
            runs[impl].append(run(impl, steps))

    eager, auto = runs["eager"], runs["auto"]
    for stage in ("in all", *eager[0].stages):
        medians = [statistics.median(r.stages.get(stage, r.wall) for r in runs[impl]) for impl in IMPLS]
        print(
            f"{stage:14}" + "".join(f"  {impl} {seconds:7.3f} s" for impl, seconds in zip(IMPLS, medians, strict=True))
        )
    print("\nSpeed-up of auto over eager, median of the pairs:")
    print("  by the clock      " + verdict([a.wall / b.wall for a, b in zip(eager, auto, strict=True)]))
    print("  by processor time " + verdict([a.cpu / b.cpu for a, b in zip(eager, auto, strict=True)]))

    for impl in IMPLS:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run(impl, FEWEST_STEPS)
        events = sorted(profile.key_averages(), key=lambda event: event.self_cpu_time_total, reverse=True)
        total = sum(event.self_cpu_time_total for event in events)
        print(f"\nimpl={impl!r}: share of the time inside operators")
        for event in events[:14]:
            print(f"  {event.self_cpu_time_total / total:6.1%}  {event.count:7} calls  {event.key}")
    return 0


def verdict(ratios: Sequence[float]) -> str:
    """Format the median, its interval, and whether the interval excludes 1."""
    median = f"{statistics.median(ratios):.3f}"
    interval = median_interval(ratios)
    if interval is None:
        return f"{median}, too few pairs for an interval"
    low, high = interval
    means = "faster" if low > 1 else "slower" if high < 1 else "no difference shown"
    return f"{median}, 95 % interval [{low:.3f}, {high:.3f}]: {means}"


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Return a confidence interval of the median of the distribution of `values`.

    It reaches from the k-th smallest to the k-th largest of the n values. The median is below the interval with the
    probability that fewer than k of n fair coins show heads, and above it with the same probability.

    Args:
        values: Independent samples.
        level: Smallest probability that the interval contains the median.

    Returns:
        Both ends of the interval, or `None` if there are too few values.
    """
    ordered, n = sorted(values), len(values)
    outside, k = 0.0, 0
    while (outside := outside + 2 * math.comb(n, k) / 2**n) <= 1 - level:
        k += 1
    return None if k == 0 else (ordered[k - 1], ordered[n - k])
