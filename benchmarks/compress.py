"""`dcvit.compress` end to end on the embedded model, with the kernels and without: `python -m benchmarks compress`.

Whole runs, in pairs of one with `impl="eager"` and one with `impl="auto"`, in one process and in changing order. A
pair's ratio is spared what a slower or busier moment does to both, and the interval of the median ratio assumes nothing
of its distribution. Many short runs tell more than a few long ones, so a run is the demonstration's with a quarter of
its refinement, the longest stage; the others, such as measuring the latency for the report, weigh more than there.

The profile shows where a run's time goes, by stage and of the operators that take most; the latter with as little
refinement as there can be, because a profiler keeps every call in memory.
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
    """Seconds of one compression: by the clock, of the processor, and by the clock in each stage."""

    wall: float
    cpu: float
    stages: dict[str, float]


def main(argv: Sequence[str] | None = None) -> int:
    """Print times, ratios and profile."""
    parser = argparse.ArgumentParser("python -m benchmarks compress", description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=16, help="pairs; 6 are the fewest that give an interval")
    parser.add_argument("--threads", type=int, default=1, help="one is what the demonstration takes")
    parser.add_argument("--steps", type=int, help="of the refinement; a quarter of the demonstration's if not given")
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
    print("\nHow many times as fast as eager auto is, median of the pairs:")
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
    """The median, its interval, and whether that excludes 1."""
    median = f"{statistics.median(ratios):.3f}"
    interval = median_interval(ratios)
    if interval is None:
        return f"{median}, too few pairs for an interval"
    low, high = interval
    means = "faster" if low > 1 else "slower" if high < 1 else "no difference shown"
    return f"{median}, 95 % interval [{low:.3f}, {high:.3f}]: {means}"


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """An interval that holds the median of what `values` are drawn from, with a probability of at least `level`.

    It reaches from the k-th smallest to the k-th largest value. The median lies below it, or above, if fewer than k of
    n fair coins show heads, or tails. `None` if even all values are too few.
    """
    ordered, n = sorted(values), len(values)
    outside, k = 0.0, 0
    while (outside := outside + 2 * math.comb(n, k) / 2**n) <= 1 - level:
        k += 1
    return None if k == 0 else (ordered[k - 1], ordered[n - k])
