"""Measure an op's implementations in one process and in turn.

A round runs each contestant once. Ratios are taken within a round, and their median and quartiles over the rounds. A
slow or busy moment then affects all contestants alike, unlike a ratio of two runs at different times. pytest-benchmark
stores the rounds (`--benchmark-json`), and with them machine and commit.
"""

import functools
import importlib
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcvit.metrics.memory import measure_peak_memory
from dcvit.runtime.environment import device_name

ROOT = Path(__file__).parents[1]
REFERENCE = "reference"


@dataclass
class Case:
    """One shape of one op.

    Attributes:
        name: Name in the table.
        op: Name of the op.
        function: The op's public function, which takes `impl`.
        call: Runs the op once through the function that it gets, including the backward pass if the case has one. It
            returns the results, so that no compiler removes the work.
        inputs: Tensors of the call by name, which determine the implementations that can run.
        reference: A call that only moves `bytes` or only computes `flops`, to show what the machine can do.
        bytes: Bytes that the op must move, or 0.
        flops: Operations of the op's matrix products, or 0.
        results: Bytes that `call` returns and keeps for the backward pass. If not 0, the peak memory beyond them and
            the inputs is measured too.
        others: Further calls to measure, by name.
    """

    name: str
    op: str
    function: Callable[..., Tensor]
    call: Callable[[Callable[..., Tensor]], object]
    inputs: Mapping[str, Tensor | None]
    reference: Callable[[], object]
    bytes: int = 0
    flops: int = 0
    results: int = 0
    others: Mapping[str, Callable[[], object]] = field(default_factory=dict)


@dataclass
class Settings:
    """Settings of `python -m benchmarks kernels`."""

    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    runs: int = 500 if torch.cuda.is_available() else 15
    compile: bool = True
    dtype: torch.dtype = torch.float32


settings = Settings()


def device() -> torch.device:
    """Return the device that runs the benchmarks."""
    return torch.device(settings.device)


def draw(*shape: int) -> Tensor:
    """Draw normally distributed numbers on the device and in the dtype of the benchmarks."""
    return torch.randn(shape, device=device(), dtype=settings.dtype)


def measure(benchmark: Any, case: Case) -> None:
    """Measure a case with pytest-benchmark, and store the figures in its `extra_info`."""
    table = importlib.import_module(f"dcvit.ops.{case.op}").IMPLEMENTATIONS
    contestants: dict[str, Callable[[], object]] = {"eager": _caller(case, "eager")}
    for impl, implementation in table.items():
        if implementation.refuses(case.inputs) is None:
            contestants[impl] = _caller(case, impl)
    if settings.compile:
        torch.compiler.reset()
        contestants["compiled"] = functools.partial(
            case.call, torch.compile(functools.partial(case.function, impl="eager"), dynamic=False)
        )
    contestants |= case.others
    contestants[REFERENCE] = case.reference
    seconds: dict[str, list[float]] = {name: [] for name in contestants}

    def one_round() -> None:
        for name, run in contestants.items():
            seconds[name].append(_seconds(run))

    one_round()  # compiles, and touches memory for the first time
    for times in seconds.values():
        times.clear()
    benchmark.pedantic(one_round, rounds=settings.runs, iterations=1, warmup_rounds=1)
    benchmark.extra_info.update(
        op=case.op,
        case=case.name,
        bytes=case.bytes,
        flops=case.flops,
        seconds={name: times[1:] for name, times in seconds.items()},
        memory={
            name: measure_peak_memory(run, device()) - case.results
            for name, run in contestants.items()
            if case.results and name != REFERENCE
        },
    )


def _caller(case: Case, impl: str) -> Callable[[], object]:
    return functools.partial(case.call, functools.partial(case.function, impl=impl))


def _seconds(run: Callable[[], object]) -> float:
    if device().type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def copies(count: int) -> Callable[[], object]:
    """Return a call that copies and thereby moves `count` bytes, half read and half written."""
    source = torch.randn(max(1, count // 8), device=device())
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def header() -> str:
    """Return a line with the machine, the versions and the commit."""

    def git(*arguments: str) -> str:
        if shutil.which("git") is None:
            return ""
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") or "no commit"
    changed = " with changes" if git("status", "--porcelain") else ""
    name = device_name(device())
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{name} ({platform.machine()}), {torch.get_num_threads()} threads of {os.cpu_count()} cores{load}; "
        f"Python {platform.python_version()}, torch {torch.__version__}; commit {commit}{changed}"
    )
