"""Measure how well methods recover, with time and memory: `python -m benchmarks recovery`.

The runs are method x test bed x budget x seed. Each run has its own process, so that its peak memory can be measured.
Finished runs are kept in a file (`--out`), and an interrupted table resumes where it stopped. A run counts as finished
only for the same settings and the same code. All runs of a seed come before the next seed, so that an interrupted table
is complete for fewer seeds.
"""

import argparse
import json
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import join
from statistics import mean
from typing import Any, ClassVar

import torch

from benchmarks.harness import ROOT, header
from benchmarks.methods import BEDS, GRADIENT_METHODS, METHODS, RECOVERY_BEDS, Options
from benchmarks.runs import (
    NOTHING,
    command_lines,
    count,
    json_lines,
    markdown,
    peak_memory,
    publish,
    run_command,
    run_missing,
    share,
    spread,
)
from benchmarks.testbeds import measure
from dcvit.budget import Budget
from dcvit.config import DCViT
from dcvit.models import compressible
from dcvit.runtime.progress import TerminalProgress, silent

RUNS = ROOT / "benchmarks" / "results" / "recovery.jsonl"
"""File of finished runs. It is part of the repository, so that a table can grow over several machines and days."""

MEASURED = ("dcvit", "kernels", "csrc", "benchmarks/methods.py", "benchmarks/naive.py", "benchmarks/testbeds")
"""Files and folders on which the figures of a run depend."""

PUBLISHED_EPOCHS = DCViT.paper().distillation.epochs

BUDGETS = (0.1, 0.2, 0.3, 0.4, 0.5)
SEEDS = 5


@dataclass(frozen=True)
class Request:
    """The settings of a run. Together with the version of the code, they identify a finished run.

    Attributes:
        bed: Name of the test bed.
        method: Name of the method.
        budget: Share of the MACs to remove.
        seed: Seed of the few-shot set and of the method.
        threads: CPU threads of torch.
        allowance: Seconds that a gradient method may take; `None` lets it run as published.
    """

    bed: str
    method: str
    budget: float
    seed: int
    threads: int
    allowance: float | None = None
    prepared: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """The label of the run in messages."""
        return f"{self.bed}, {self.budget:.0%}, seed {self.seed}, {self.method}"


@dataclass(frozen=True)
class Record:
    """A finished run.

    Attributes:
        request: Settings of the run.
        code: Version of the code, see `benchmarks.runs.code_version`.
        header: Machine, versions and commit.
        removed: Share of the MACs that was removed.
        error: r; `benchmarks.testbeds.Measures` describes this and the next four.
        agreement: Share of images on which student and teacher agree.
        top1: Share of images that are classified correctly; `None` without labels.
        cosine_class: Mean cosine similarity of the class token.
        cosine_patch: Mean cosine similarity of the patch tokens.
        seconds: Wall-clock time of the compression.
        blocks: The blocks that were compressed or dropped, best first.
        epochs: Epochs of each recovery, for the published procedures; else `None`.
        iterations: Iterations of the synthesis, for the published procedure; else `None`.
        memory: Peak resident set from the start of the process to the end of the compression, in MiB.
        memory_before: Peak resident set up to the start of the compression, in MiB.
        wall: Seconds of the whole process.
    """

    request: Request
    code: str
    header: str
    removed: float
    error: float
    agreement: float
    top1: float | None
    cosine_class: float | None
    cosine_patch: float | None
    seconds: float
    blocks: tuple[int, ...]
    epochs: int | None
    iterations: int | None
    memory: float
    memory_before: float
    wall: float

    @property
    def summary(self) -> str:
        """The main figures of the run in messages."""
        return f"r {self.error:.4f}, {self.seconds:.1f} s"

    @property
    def seconds_per_block(self) -> float:
        """Wall-clock time of the compression, divided by the number of blocks."""
        return self.seconds / len(self.blocks)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Record":
        """Return the record of a dictionary that `dataclasses.asdict` made and JSON stored."""
        return cls(**{**values, "request": Request(**values["request"]), "blocks": tuple(values["blocks"])})


def main(argv: Sequence[str] | None = None) -> int:
    """Make the missing runs, then print the table.

    Returns:
        1 if a run failed.
    """
    options = _parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.run:
        print(json.dumps(_measured(json.loads(options.run), options.verbose)), flush=True)
        return 0
    seeds = None if options.seeds is None else range(options.seeds)
    known, failed = read_records(options.out), 0
    if options.table:
        records = latest(known, options.beds, options.methods, options.budgets, seeds)
    else:
        runs = requests(
            options.beds or RECOVERY_BEDS, options.methods or METHODS, options.budgets or BUDGETS,
            seeds or range(SEEDS), options.threads, options.paper_hours,
        )  # fmt: skip
        records, failed = run_missing(
            runs, [] if options.force else known, options.out, MEASURED,
            lambda request, code: run_apart(request, code, options.verbose),
        )  # fmt: skip
    return publish(report(records) if records else None, failed, options.results, "recovery")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks recovery", description=__doc__.partition("\n")[0])
    parser.add_argument("--beds", nargs="+", choices=BEDS, help=f"by default {' '.join(RECOVERY_BEDS)}")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD",
                        help="of " + ", ".join(map(repr, METHODS)) + "; by default all")  # fmt: skip
    parser.add_argument("--budgets", nargs="+", type=share,
                        help=f"shares of the MACs to remove; by default {BUDGETS}")  # fmt: skip
    parser.add_argument("--seeds", type=count,
                        help=f"number of seeds, each with another few-shot set; by default {SEEDS}")  # fmt: skip
    parser.add_argument("--threads", type=count, default=1, help="CPU threads of torch; by default 1")
    parser.add_argument("--paper-hours", type=float,
                        help="hours that a run of a published procedure may take; by default one, and as published "
                        "on the digits")  # fmt: skip
    parser.add_argument("--out", type=Path, default=RUNS, help="JSON lines of finished runs")
    parser.add_argument("--force", action="store_true", help="also repeat finished runs")
    parser.add_argument("--table", action="store_true",
                        help="only print the last finished run of each kind")  # fmt: skip
    parser.add_argument("--results", type=Path, help="write the table into this Markdown file, too")
    parser.add_argument("--verbose", action="store_true", help="show the progress of each run")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one request, in its own process
    return parser


# --- runs ------------------------------------------------------------------------------------------------------------


def requests(
    beds: Iterable[str],
    methods: Iterable[str],
    budgets: Iterable[float],
    seeds: Iterable[int],
    threads: int,
    paper_hours: float | None,
) -> list[Request]:
    """Return all runs of a table, seed by seed.

    Args:
        beds: Names of test beds.
        methods: Names of methods.
        budgets: Shares of the MACs to remove.
        seeds: The seeds.
        threads: CPU threads of torch.
        paper_hours: Allowance of a gradient method in hours; `None` is one hour, and unlimited on the digits.
    """

    def allowance(bed: str, method: str) -> float | None:
        hours = (None if bed == "digits" else 1.0) if paper_hours is None else paper_hours
        return None if hours is None or method not in GRADIENT_METHODS else 3600 * hours

    return [
        Request(bed, method, budget, seed, threads, allowance(bed, method))
        for seed in seeds for bed in beds for budget in budgets for method in methods
    ]  # fmt: skip


def run_apart(request: Request, code: str, verbose: bool = False) -> Record:
    """Make one run in its own process, see `run_command`."""
    more = ["--verbose"] if verbose else []
    found, wall = run_command("recovery", asdict(request), request.threads, *more)
    return Record.from_dict({**found, "request": asdict(request), "code": code, "wall": wall})


def _measured(request: dict[str, Any], verbose: bool) -> dict[str, Any]:
    """Make a run in this process and return the fields of its `Record` that are known here."""
    asked = Request(**request)
    machine, bed = header(), BEDS[asked.bed](asked.seed)
    options = Options(asked.allowance, TerminalProgress(interval=60) if verbose else silent)
    before = peak_memory()
    model, info = METHODS[asked.method](bed, Budget(macs=1 - asked.budget), asked.seed, options)
    memory = peak_memory()
    measures = measure(bed, model)
    original, left = (compressible(m).cost().total.macs("with_attention_products") for m in (bed.model, model))
    return {
        "header": machine,
        "removed": 1 - left / original,
        **asdict(measures),
        **asdict(info),
        "memory": memory,
        "memory_before": before,
    }


def read_records(path: Path) -> list[Record]:
    """Read the finished runs of a file, in its order."""
    return [Record.from_dict(values) for values in json_lines(path)]


def latest(
    records: Iterable[Record],
    beds: Container[str] | None,
    methods: Container[str] | None,
    budgets: Container[float] | None,
    seeds: Container[int] | None,
) -> list[Record]:
    """Return the last run of each bed, method, budget and seed, restricted to the given values; `None` means all."""
    found: dict[tuple[object, ...], Record] = {}
    for record in records:
        request = record.request
        key = (request.bed, request.method, request.budget, request.seed)
        if all(only is None or k in only for k, only in zip(key, (beds, methods, budgets, seeds), strict=True)):
            found[key] = record
    return list(found.values())


# --- table -----------------------------------------------------------------------------------------------------------


def report(records: Sequence[Record]) -> str:
    """Return the section of a results file: how it was measured, the table, and the ratios."""
    hours = sum(record.wall for record in records) / 3600
    before = mean(record.memory_before for record in records)
    codes = list(dict.fromkeys(record.code for record in records))
    return "\n".join(
        [
            "## Recovery",
            "",
            records[-1].header,
            "",
            *command_lines(records, _shortened, command),
            "",
            f"{len(records)} runs, {hours:.2f} hours in all, of the code as of {', '.join(codes)}. Mean ± standard "
            "deviation over the seeds, each of which draws another few-shot set. MACs are the share taken away, asked "
            "for and reached, attention products included. r = ‖s − t‖² / ‖t − mean(t)‖² over all output tokens of the "
            "held-out images; lower is better, 0 is exact. Agreement and top-1 are percentages. Time is the wall clock "
            "of the whole compression, of `dcvit.compress` with its report; per block it is divided by the number of "
            "blocks compressed or dropped. Memory is the peak resident set of a fresh process up to the end of the "
            "compression: it includes the interpreter, torch and the test bed, "
            f"{before:.0f} MiB before the compression starts. Epochs are those of each recovery by a published "
            "procedure, iterations those of the synthesis of its proxy set; 2000 are as published, fewer are as many "
            "as the time allowed permits.",
            "",
            table(records),
            "",
            "How the default compares: its r as a ratio to that of the naive closed form, and its time per block as a "
            "ratio to that of the paper's procedure with the epochs above, and with all of its epochs, as if each took "
            "equally long (below 1 the default is better); of means over the seeds that both have.",
            "",
            ratios(records),
        ]
    )


def command(records: Sequence[Record]) -> str:
    """Return the command that makes a table of these runs. Their published procedures must have the same allowance."""

    def all_of(field: str, order: Iterable[Any] | None = None) -> list[str]:
        found = {getattr(record.request, field) for record in records}
        return [str(value) for value in (sorted(found) if order is None else order) if value in found]

    parts = ["--beds", *all_of("bed", BEDS), "--methods", *all_of("method", METHODS)]
    parts += ["--budgets", *all_of("budget"), "--seeds", str(1 + max(record.request.seed for record in records))]
    parts += ["--threads", all_of("threads")[-1]]
    if (allowance := _shortened(records[0])) is not None:
        parts += ["--paper-hours", f"{allowance / 3600:g}"]
    return join(["python", "-m", "benchmarks", "recovery", *parts])


def _shortened(record: Record) -> float | None:
    """Return the allowance if it is not the default of the command. All runs of one command share it."""
    return None if record.request.allowance == 3600.0 else record.request.allowance


def table(records: Iterable[Record]) -> str:
    """Format the methods for each test bed and budget."""
    rows = []
    for (bed, budget), of_methods in _grouped(records).items():
        for method, runs in of_methods.items():
            rows.append(
                [
                    bed,
                    f"{budget:.0%}",
                    method,
                    str(len(runs)),
                    spread([100 * run.removed for run in runs], 1),
                    spread([run.error for run in runs], 4),
                    spread([100 * run.agreement for run in runs], 1),
                    spread([None if run.top1 is None else 100 * run.top1 for run in runs], 1),
                    spread([run.cosine_class for run in runs], 4),
                    spread([run.cosine_patch for run in runs], 4),
                    spread([run.seconds for run in runs], 1),
                    spread([run.seconds_per_block for run in runs], 2),
                    spread([run.memory for run in runs], 0),
                    _between([run.epochs for run in runs if run.epochs is not None]),
                    _between([run.iterations for run in runs if run.iterations is not None]),
                ]
            )
    titles = ["bed", "MACs asked", "method", "seeds", "MACs %", "r", "agreement %", "top-1 %", "cosine, class"]
    return markdown([*titles, "cosine, patches", "s", "s / block", "peak MiB", "epochs", "iterations"], rows)


def ratios(records: Iterable[Record]) -> str:
    """Compare the default with the naive closed form in r, and with the paper's procedure in time per block."""
    rows = []
    for (bed, budget), runs in _grouped(records).items():
        default, naive, paper = (runs.get(name, []) for name in ("default", "naive closed form", "paper"))
        error = _ratio(default, naive, lambda run: run.error)
        seconds = _ratio(default, paper, lambda run: run.seconds_per_block)
        whole = _ratio(default, paper, _published_seconds_per_block)
        rows.append([bed, f"{budget:.0%}", error, seconds, whole])
    titles = ["bed", "MACs asked", "r, default / naive closed form", "s / block, default / paper"]
    return markdown([*titles, f"the same, the paper's at {PUBLISHED_EPOCHS} epochs"], rows)


def _published_seconds_per_block(run: Record) -> float:
    """Return the time per block, extrapolated to all published epochs for a shortened published procedure."""
    return run.seconds_per_block * (1.0 if run.epochs is None else PUBLISHED_EPOCHS / run.epochs)


def _grouped(records: Iterable[Record]) -> dict[tuple[str, float], dict[str, list[Record]]]:
    """Group the runs by test bed and budget, and then by method, in the order of the registries."""
    beds, methods = list(BEDS), list(METHODS)

    def order(record: Record) -> tuple[int, float, int, int]:
        request = record.request
        return beds.index(request.bed), request.budget, methods.index(request.method), request.seed

    found: dict[tuple[str, float], dict[str, list[Record]]] = {}
    for record in sorted(records, key=order):
        request = record.request
        found.setdefault((request.bed, request.budget), {}).setdefault(request.method, []).append(record)
    return found


def _ratio(ours: Sequence[Record], theirs: Sequence[Record], figure: Callable[[Record], float]) -> str:
    """Format the ratio of the means over the seeds that both have."""
    own, others = ({run.request.seed: figure(run) for run in runs} for runs in (ours, theirs))
    seeds = own.keys() & others.keys()
    return f"{sum(own[s] for s in seeds) / sum(others[s] for s in seeds):.3g}" if seeds else NOTHING


def _between(values: Sequence[int]) -> str:
    low, high = min(values, default=None), max(values, default=None)
    return NOTHING if low is None else str(low) if low == high else f"{low}–{high}"
