"""`dcvit.compress` end to end on the embedded model, with the kernels and without: `python -m benchmarks compress`.

Both run in turn, in one process. The profile shows where a run's time goes, of the operators that take most; it is of
a tenth of the epochs and of the synthesis' steps, because a profiler keeps every call in memory.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

import dcvit
from benchmarks.harness import header
from benchmarks.kernels import ratio
from dcvit.demo import load_digits
from dcvit.demo.comparison import DEMO_CONFIG
from dcvit.models.loading import load_model
from dcvit.ops import Impl


def main(argv: Sequence[str] | None = None) -> int:
    """Print times, ratio and profile."""
    parser = argparse.ArgumentParser("python -m benchmarks compress", description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=3, help="rounds")
    parser.add_argument("--threads", type=int, default=1, help="one is what the demonstration takes")
    parser.add_argument("--epochs", type=int, help="of the recovery; the demonstration's if not given")
    parser.add_argument("--macs", type=float, default=0.75, help="budget, as a share of the model")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    print(header())
    model, images = load_model("demo").eval(), load_digits().few_shot(50, 0)
    epochs, iterations = options.epochs or DEMO_CONFIG.recovery.epochs, DEMO_CONFIG.synthesis.iterations

    def run(impl: Impl, share: int = 1) -> float:
        start = time.perf_counter()
        recovery = replace(DEMO_CONFIG.recovery, epochs=max(1, epochs // share))
        synthesis = replace(DEMO_CONFIG.synthesis, iterations=max(1, iterations // share))
        config = replace(DEMO_CONFIG, impl=impl, recovery=recovery, synthesis=synthesis)
        dcvit.compress(model, dcvit.load_images(images, model), dcvit.Budget(macs=options.macs), config)
        return time.perf_counter() - start

    impls: tuple[Impl, ...] = ("eager", "auto")
    seconds: dict[Impl, list[float]] = {impl: [] for impl in impls}
    run("auto")
    for _ in range(options.runs):
        for impl in impls:
            seconds[impl].append(run(impl))
    for impl in impls:
        print(f"impl={impl!r:8} {statistics.median(seconds[impl]):8.2f} s")
    print(f"auto is {ratio(seconds['eager'], seconds['auto'])} times as fast as eager (median and quartiles)\n")

    for impl in impls:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run(impl, 10)
        events = sorted(profile.key_averages(), key=lambda event: event.self_cpu_time_total, reverse=True)
        total = sum(event.self_cpu_time_total for event in events)
        print(f"impl={impl!r}: share of the time inside operators")
        for event in events[:14]:
            print(f"  {event.self_cpu_time_total / total:6.1%}  {event.count:7} calls  {event.key}")
    return 0
