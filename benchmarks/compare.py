"""Compare methods on the same images at the same budget: `python -m benchmarks compare`.

The runs are method x test bed x budget x seed. Each run has its own process. Finished runs are kept in a file
(`--out`), and an interrupted table resumes where it stopped. A method that does not support a bed's model family, or a
budget in the chosen metric, is left out there.
"""

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shlex import join
from statistics import mean
from typing import Any

import torch

import dcvit
from benchmarks.contestants import ABLATIONS, config_of, images_of
from benchmarks.harness import ROOT, header
from benchmarks.methods import BEDS, parts_of
from benchmarks.runs import (
    NOTHING,
    command_lines,
    count,
    json_lines,
    markdown,
    publish,
    run_command,
    run_missing,
    share,
    spread,
)
from benchmarks.testbeds import TestBed, imagenet, measure
from dcvit.config import TrainingConfig
from dcvit.methods import METHODS

RUNS = ROOT / "benchmarks" / "results" / "compare.jsonl"
"""File of finished runs. It is part of the repository, so that a table can grow over several machines and days."""

MEASURED = ("dcvit", "kernels", "csrc", "benchmarks/contestants.py", "benchmarks/methods.py", "benchmarks/testbeds")
"""Files and folders on which the figures of a run depend."""

FAMILIES = {
    "digits": "vit", "photographs": "vit", "dinov2": "vit", "swin": "swin", "resnet": "cnn", "efficientnet": "cnn",
}  # fmt: skip
METRICS = ("macs", "params")
BUDGETS = (0.1, 0.2, 0.3, 0.4, 0.5)
SEEDS = 5


@dataclass(frozen=True)
class Request:
    """The settings of a run. Together with the version of the code, they identify a finished run.

    Attributes:
        bed: Name of the test bed.
        method: Name of the method.
        budget: Share to remove of the MACs, or of another metric.
        seed: Seed of the few-shot set and of the method.
        num_images: Number of few-shot images.
        threads: CPU threads of torch.
        epochs: Epochs of each recovery by distillation; the method's own if `None`.
        ablation: The ablation of the published procedure; `None` for an unchanged method.
        imagenet: Folder of ImageNet, in which case `bed` is the name of the model; `None` for a bed of the repository.
        held_out: Number of validation images of ImageNet.
        unit: Metric of the budget, one of `METRICS`.
    """

    bed: str
    method: str
    budget: float
    seed: int
    num_images: int
    threads: int
    epochs: int | None = None
    ablation: str | None = None
    imagenet: str | None = None
    held_out: int = 0
    unit: str = "macs"

    @property
    def asked(self) -> str:
        """The budget in words."""
        return f"{self.budget:.1%}".replace(".0%", "%") + ("" if self.unit == "macs" else f" of {self.unit}")

    @property
    def title(self) -> str:
        """The name of the method, and of the ablation, in the table."""
        return self.method if self.ablation is None else f"{self.method}, {self.ablation}"

    @property
    def epochs_read(self) -> int | None:
        """The epochs, if the method has a distillation that reads them."""
        trains = self.ablation is not None or parts_of(METHODS[self.method].config(), TrainingConfig)
        return self.epochs if trains else None

    @property
    def label(self) -> str:
        """The label of the run in messages."""
        return f"{self.bed}, {self.asked}, seed {self.seed}, {self.title}"

    @property
    def prepared(self) -> bool:
        """Whether the bed caches nothing, which holds for ImageNet."""
        return self.imagenet is not None


@dataclass(frozen=True)
class Record:
    """A finished run.

    Attributes:
        request: Settings of the run.
        code: Version of the code.
        header: Machine, versions and commit.
        macs: Share of the MACs that is left.
        params: Share of the parameters that is left.
        latency: Share of the latency that is left, measured in turn with the original on a batch of few-shot images.
        agreement: Share of held-out images on which student and original agree.
        top1: Share of held-out images that are classified correctly; `None` without labels.
        error: r, see `benchmarks.testbeds.Measures`.
        original_top1: Top-1 of the original; `None` without labels.
        seconds: Wall-clock time of the compression.
    """

    request: Request
    code: str
    header: str
    macs: float
    params: float
    latency: float
    agreement: float
    top1: float | None
    error: float
    original_top1: float | None
    seconds: float

    @property
    def summary(self) -> str:
        """The main figures of the run in messages."""
        return f"agreement {self.agreement:.1%}, r {self.error:.4f}, {self.seconds:.1f} s"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Record":
        """Return the record of a dictionary that `dataclasses.asdict` made and JSON stored."""
        return cls(**{**values, "request": Request(**values["request"])})


def main(argv: Sequence[str] | None = None) -> int:
    """Make the missing runs, then print the table.

    Returns:
        1 if a run failed.
    """
    options = _parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.run:
        print(json.dumps(_measured(Request(**json.loads(options.run)))), flush=True)
        return 0
    known = [Record.from_dict(values) for values in json_lines(options.out)]
    failed = 0
    if options.table:
        records = latest(known)
    else:
        requests = _requests(options)
        records, failed = run_missing(requests, [] if options.force else known, options.out, MEASURED, run_apart)
    return publish(report(records) if records else None, failed, options.results, "compare")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks compare", description=__doc__.partition("\n")[0])
    parser.add_argument("--beds", nargs="+", choices=BEDS, default=list(BEDS), help="all by default")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="all by default")
    parser.add_argument("--budgets", nargs="+", type=share, default=list(BUDGETS),
                        help="shares of the MACs to remove (default: %(default)s)")  # fmt: skip
    parser.add_argument("--unit", nargs="+", choices=METRICS, default=["macs"],
                        help="metrics of the budgets (default: macs)")  # fmt: skip
    parser.add_argument("--seeds", type=count, default=SEEDS, help="number of few-shot sets (default: %(default)s)")
    parser.add_argument("--num-images", nargs="+", type=count, metavar="N",
                        help="few-shot images (default: 50, with --imagenet 50 100 500 1000)")  # fmt: skip
    parser.add_argument("--epochs", type=count, help="of each recovery by distillation; by default the methods' own")
    parser.add_argument("--ablate", nargs="*", choices=ABLATIONS, metavar="ABLATION",
                        help="ablations of the published procedure: " + ", ".join(map(repr, ABLATIONS))
                        + "; without a name, all")  # fmt: skip
    parser.add_argument("--imagenet", type=Path, metavar="DIR",
                        help="the paper's protocol on DIR/train and DIR/val, seeds from 2021 on")  # fmt: skip
    parser.add_argument("--model", default="deit_base_patch16_224", help="model on ImageNet (default: %(default)s)")
    parser.add_argument("--held-out", type=count, default=50_000, metavar="N",
                        help="number of validation images of ImageNet (default: %(default)s)")  # fmt: skip
    parser.add_argument("--threads", type=count, default=1, help="CPU threads of torch (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RUNS, help="JSON lines of finished runs")
    parser.add_argument("--force", action="store_true", help="also repeat finished runs")
    parser.add_argument("--table", action="store_true", help="only print the last finished run of each kind")
    parser.add_argument("--results", type=Path, help="write the table into this Markdown file, too")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one request, in its own process
    return parser


# --- runs ------------------------------------------------------------------------------------------------------------


def _requests(options: argparse.Namespace) -> list[Request]:
    """Return all runs of a table, seed by seed, so that an interrupted table is complete for fewer seeds."""
    ablations: list[str | None] = [None]
    methods = options.methods
    if options.ablate is not None:
        ablations, methods = list(options.ablate or ABLATIONS), ["dcvit"]
    asked = [(unit, name) for unit in options.unit for name in methods if unit in METHODS[name].metrics]
    if options.imagenet is not None:
        numbers = options.num_images or [50, 100, 500, 1000]
        return [
            Request(options.model, name, budget, seed, number, options.threads, options.epochs, ablation,
                    str(options.imagenet), options.held_out, unit)
            for seed in imagenet.SEEDS[: options.seeds] for number in numbers for budget in options.budgets
            for ablation in ablations for unit, name in asked
        ]  # fmt: skip
    return [
        Request(bed, name, budget, seed, number, options.threads, options.epochs, ablation, unit=unit)
        for seed in range(options.seeds) for bed in options.beds for number in options.num_images or [50]
        for budget in options.budgets for ablation in ablations for unit, name in asked
        if FAMILIES[bed] in METHODS[name].families
    ]  # fmt: skip


def run_apart(request: Request, code: str) -> Record:
    """Make one run in its own process, see `run_command`."""
    found, _ = run_command("compare", asdict(request), request.threads)
    return Record.from_dict({**found, "request": asdict(request), "code": code})


def _bed(request: Request) -> TestBed:
    if request.imagenet is None:
        return BEDS[request.bed](request.seed, request.num_images)
    return imagenet.imagenet(
        Path(request.imagenet), request.seed, request.num_images, model=request.bed, num_held_out=request.held_out
    )


def _measured(request: Request) -> dict[str, Any]:
    """Make a run in this process and return the fields of its `Record` that are known here."""
    machine, bed = header(), _bed(request)
    config = config_of(request.method, bed, request.seed, request.epochs, request.ablation)
    images = images_of(bed, request.seed, request.ablation)
    start = time.perf_counter()
    budget = dcvit.Budget(**{request.unit: 1 - request.budget})
    result = dcvit.compress(bed.model, images, budget, config)
    seconds = time.perf_counter() - start
    measures, (original, left) = measure(bed, result.model), (result.report.teacher, result.report.student)
    return {
        "header": machine,
        "macs": left.macs / original.macs,
        "params": left.params / original.params,
        "latency": result.report.latency_ratio,
        "agreement": measures.agreement,
        "top1": measures.top1,
        "error": measures.error,
        "original_top1": bed.top1(bed.model, bed.teacher_tokens),
        "seconds": seconds,
    }


def latest(records: Iterable[Record]) -> list[Record]:
    """Return the last run of each request. Epochs that the method does not read are ignored."""
    return list({replace(record.request, epochs=record.request.epochs_read): record for record in records}.values())


# --- table -----------------------------------------------------------------------------------------------------------


def report(records: Sequence[Record]) -> str:
    """Return the section of a results file: how it was measured, and tables of methods and ablations for each bed."""
    ordered = sorted(records, key=_order)
    whole = [record for record in ordered if record.request.ablation is None]
    ablated = [record for record in ordered if record.request.ablation is not None]
    hours = sum(record.seconds for record in records) / 3600
    codes = list(dict.fromkeys(record.code for record in records))
    lines = [
        "## Methods compared",
        "",
        records[-1].header,
        "",
        *command_lines(ordered, _kind, command),
        "",
        f"{len(records)} runs, {hours:.2f} hours of compression in all, of the code as of {', '.join(codes)}. Mean ± "
        "standard deviation over the seeds, each of which draws another few-shot set. The column `asked` is the share "
        "of the MACs to remove, or of the named metric. MACs, parameters and latency are shares of the original's that "
        "are left, in per cent; latency is measured in turn with the original, in one thread of a shared machine. "
        "Agreement with the original and top-1 are measured on held-out images, in per cent. "
        "r = ‖s − t‖² / ‖t − mean(t)‖² over their output tokens; 0 is exact. Epochs are those of "
        "each recovery by distillation, if a method has one.",
    ]
    for of_kind, what in ((whole, ""), (ablated, ", ablations of the published procedure")):
        for bed in dict.fromkeys(record.request.bed for record in of_kind):
            of_bed = [record for record in of_kind if record.request.bed == bed]
            top1 = of_bed[0].original_top1
            title = f"### {bed}{what}" + ("" if top1 is None else f" (original: {100 * top1:.1f} % top-1)")
            lines += ["", title, "", table(of_bed)]
    return "\n".join(lines)


def table(records: Sequence[Record]) -> str:
    """Format the methods at each budget of one bed, with the best agreement of a budget in bold."""
    groups: dict[tuple[str, int], dict[tuple[str, int | None], list[Record]]] = {}
    for record in records:
        request = record.request
        of_budget = groups.setdefault((request.asked, request.num_images), {})
        of_budget.setdefault((request.title, request.epochs_read), []).append(record)
    rows = []
    for (asked, images), methods in groups.items():
        best = max(mean(run.agreement for run in runs) for runs in methods.values())
        for (name, epochs), runs in methods.items():
            cell = spread([100 * run.agreement for run in runs], 1)
            rows.append(
                [
                    asked,
                    str(images),
                    name,
                    str(len(runs)),
                    f"**{cell}**" if mean(run.agreement for run in runs) == best else cell,
                    spread([None if run.top1 is None else 100 * run.top1 for run in runs], 1),
                    spread([run.error for run in runs], 4),
                    spread([100 * run.macs for run in runs], 1),
                    spread([100 * run.params for run in runs], 1),
                    spread([100 * run.latency for run in runs], 0),
                    spread([run.seconds for run in runs], 0),
                    NOTHING if epochs is None else str(epochs),
                ]
            )
    titles = ["asked", "images", "method", "seeds", "agreement %", "top-1 %", "r", "MACs %", "params %"]
    return markdown([*titles, "latency %", "s", "epochs"], rows)


def command(records: Sequence[Record]) -> str:
    """Return the command that makes a table of these runs, which must have the same epochs and metric."""

    def all_of(field: str) -> list[str]:
        return [str(value) for value in dict.fromkeys(getattr(record.request, field) for record in records)]

    seeds = {record.request.seed for record in records}
    ablations = [value for value in all_of("ablation") if value != "None"]
    parts = ["--beds", *all_of("bed"), *(["--ablate", *ablations] if ablations else ["--methods", *all_of("method")])]
    parts += ["--budgets", *sorted(all_of("budget")), "--seeds", str(len(seeds)), "--num-images", *all_of("num_images")]
    parts += [] if all_of("epochs") == ["None"] else ["--epochs", *all_of("epochs")]
    parts += [] if all_of("unit") == ["macs"] else ["--unit", *all_of("unit")]
    return join(["python", "-m", "benchmarks", "compare", *parts])


def _kind(record: Record) -> tuple[bool, int | None, str]:
    """Return the values that all runs of one command share."""
    return record.request.ablation is not None, record.request.epochs, record.request.unit


def _order(record: Record) -> tuple[Any, ...]:
    """Return the sort key of a record in the tables."""
    request, beds, methods = record.request, list(BEDS), list(METHODS)
    bed = beds.index(request.bed) if request.bed in beds else len(beds)
    ablation = -1 if request.ablation is None else list(ABLATIONS).index(request.ablation)
    method = -1 if request.method == "dcvit" else methods.index(request.method)
    return bed, METRICS.index(request.unit), request.budget, request.num_images, method, ablation, request.seed
