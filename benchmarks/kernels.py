"""Time each op x implementation x shape against eager and torch.compile(eager): `python -m benchmarks kernels`.

The op's tests run first; if one fails, no figure of the op is shown. Ratios say how many times faster an implementation
is than eager or than the compiled eager code: the median over rounds, with quartiles. "share" is the share that a call
reaches of the machine's copy bandwidth, or of the rate of only the op's matrix products; both are measured in the same
rounds. "extra MB" is the peak memory that a call holds beyond its inputs and results.
"""

import argparse
import contextlib
import io
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import REFERENCE, ROOT, device, header, settings

OPS = ("distillation_loss", "tv_prior", "synthesis_step", "dropped_mlp", "attention")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables.

    Returns:
        1 if tests or benchmarks of an op failed.
    """
    parser = argparse.ArgumentParser("python -m benchmarks kernels", description=__doc__.partition("\n")[0])
    parser.add_argument("--op", action="append", choices=OPS, help="only this op; may be repeated")
    parser.add_argument("--case", help="only cases whose name contains this, in pytest's -k syntax")
    parser.add_argument("--runs", type=int, help="rounds; by default 500 on a GPU and 15 on a CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default the GPU if there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                        help="of all tensors; ops that do not support it are skipped")  # fmt: skip
    parser.add_argument("--threads", type=int, help="CPU threads; by default all cores")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile(eager)")
    options = parser.parse_args(argv)
    settings.device = options.device or settings.device
    settings.runs = options.runs or (500 if settings.device == "cuda" else 15)
    settings.compile = not options.no_compile
    settings.dtype = getattr(torch, options.dtype)
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"{header()}; {options.dtype}", flush=True)
    ops = options.op or OPS
    red = failing(ops)
    failed = bool(red)
    for op in ops:
        if op in red:
            print(f"\n{op}: its tests fail, so there are no figures. See them with: pytest tests/ops/test_{op}.py")
            continue
        results = run(op, options.case)
        if results is None:
            print(f"\n{op}: the benchmark failed; see above.")
            failed = True
            continue
        for result in results:
            print(table(result), flush=True)
    return int(failed)


def failing(ops: Collection[str]) -> set[str]:
    """Run the tests of the measured implementations and return the ops whose tests fail."""
    files = [f"tests/ops/test_{op}.py" for op in ops]
    unmeasured = "not reference and not interpreted and not host"
    tests = ["-m", "pytest", *files, "-n", "auto", "-k", unmeasured, "-q", "--no-header", "-p", "no:cacheprovider"]
    done = subprocess.run([sys.executable, *tests], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return set()
    print(done.stdout)
    red = set(re.findall(r"^(?:FAILED|ERROR) tests/ops/test_(\w+)\.py", done.stdout, re.MULTILINE))
    return red or set(ops)


def run(op: str, case: str | None) -> list[dict[str, Any]] | None:
    """Measure an op under pytest-benchmark and return its cases, or `None` if that failed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        arguments = [
            str(ROOT / "benchmarks" / "ops" / f"{op}.py"),
            *("-q", "--no-header", "-p", "no:cacheprovider", "-W", "ignore"),
            *("--benchmark-disable-gc", f"--benchmark-json={file}"),
            *(("-k", case) if case else ()),
        ]
        with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.redirect_stderr(shown):
            code = pytest.main(arguments)
        if code:
            print(shown.getvalue(), file=sys.stderr)
            return None
        return [benchmark["extra_info"] for benchmark in json.loads(file.read_text())["benchmarks"]]


def table(result: dict[str, Any]) -> str:
    """Format the figures of one case."""
    seconds = result["seconds"]
    best = {name: statistics.median(times) for name, times in seconds.items()}
    reference = "copying" if result["bytes"] else "matrix products"
    unit, work = ("GB/s", result["bytes"]) if result["bytes"] else ("GFLOP/s", result["flops"])
    on_gpu = device().type == "cuda"
    average, mean = ("mean", statistics.mean) if on_gpu else ("median", statistics.median)
    lines = [
        "",
        f"{result['op']}  {result['case']}  ({len(seconds['eager'])} rounds)",
        f"  {'':14}{average + ' ms':>10}  {'x eager':>22}  {'x compiled':>22}  {unit:>8}  share  {'extra MB':>8}",
    ]
    for name, times in seconds.items():
        label = f"({reference})" if name == REFERENCE else name
        ratios = [ratio(seconds.get(other), times) if name != REFERENCE else "" for other in ("eager", "compiled")]
        memory = result["memory"].get(name)
        peak = "" if memory is None else f"{memory / 1e6:.0f}"
        lines.append(
            f"  {label:16}{mean(times) * 1e3:>8.{3 if on_gpu else 1}f}  {ratios[0]:>22}  {ratios[1]:>22}  "
            f"{work / best[name] / 1e9:>8.1f}  {best[REFERENCE] / best[name]:>5.0%}  {peak:>8}"
        )
    return "\n".join(lines)


def ratio(others: list[float] | None, times: list[float]) -> str:
    """Format the speed-up over the others within rounds: median [quartiles]."""
    if others is None:
        return ""
    ratios = sorted(other / own for other, own in zip(others, times, strict=True))
    if len(ratios) < 2:
        return f"{ratios[0]:.2f}"
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"
