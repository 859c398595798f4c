"""`dcvit sweep`: compress a model to many budgets."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcvit.artifacts.result import REPORT_FILE, CompressionResult
from dcvit.artifacts.saving import or_elsewhere
from dcvit.cli.arguments import (
    DATA_HELP,
    amount,
    device_argument,
    forget_run,
    impl_argument,
    model_arguments,
    output_arguments,
    run_argument,
    run_folder,
)
from dcvit.cli.command import Command
from dcvit.cli.compress import with_top1
from dcvit.cli.inputs import digits_by_default, load_data, load_named_model
from dcvit.cli.text import table
from dcvit.compression.sweep import DEFAULT_SHARES, check_family_folder, sweep
from dcvit.config import DCViT
from dcvit.data.images import FewShotImages
from dcvit.demo import load_digits
from dcvit.demo.comparison import DEMO_CONFIG, PUBLISHED_DEMO_CONFIG
from dcvit.errors import DcvitError
from dcvit.methods.baselines.practise import Practise, block_dropping
from dcvit.methods.budgets import candidate_groups
from dcvit.metrics.agreement import agreement, top1
from dcvit.metrics.latency import QUICK_TIMING, measure_latency
from dcvit.models import compressible, require_supported
from dcvit.models.teacher import freeze
from dcvit.report import FamilyPoint, saved_family_page
from dcvit.runtime.progress import TerminalProgress

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser)
    parser.add_argument("--data", help=DATA_HELP + "; by default digits for the model demo")
    parser.add_argument(
        "--macs", type=amount, nargs="+", default=list(DEFAULT_SHARES), metavar="X",
        help="budgets: 0.75 is three quarters, 3.2G is absolute",
    )  # fmt: skip
    parser.add_argument(
        "--block-dropping", action="store_true", help="also drop whole blocks and recover, for comparison"
    )
    parser.add_argument("--num-images", type=int, metavar="N", help="use N random images of the data, not all")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same result")
    output_arguments(parser, default="dcvit-sweep")
    run_argument(parser)
    impl_argument(parser)
    device_argument(parser)


def _run(arguments: argparse.Namespace, progress: TerminalProgress) -> dict[str, Any]:
    check_family_folder(arguments.out, overwrite=arguments.overwrite)
    if arguments.data is None:
        if arguments.model != "demo":
            raise DcvitError(f"sweep {arguments.model}: name the few-shot images with --data FOLDER.")
        arguments.data = "digits"
    config = DEMO_CONFIG if arguments.data == "digits" else DCViT()
    model = load_named_model(arguments.model, arguments)
    require_supported(model)
    images = load_data(arguments.data, model, digits_by_default(arguments), arguments.seed, progress).images
    config = config.with_(seed=arguments.seed, impl=arguments.impl)
    family = sweep(model, images, arguments.macs, config, run_dir=run_folder(arguments), progress=progress)
    seconds = sum(sum(member.report.seconds.values()) for member in family.members)
    members = [replace(m, report=replace(m.report, model=arguments.model)) for m in family.members]
    held_out, evaluated_on, labels = images.normalised, f"the {len(images)} few-shot images", None
    if arguments.data == "digits":
        digits = load_digits()
        held_out, labels = digits.test_images.to(arguments.device), digits.test_labels
        evaluated_on = f"the {len(held_out)} held-out digits"
    original = freeze(model)
    if labels is not None:
        known = top1(original, held_out, labels)
        members = [with_top1(member, known, held_out, labels) for member in members]
    family = replace(family, original=members[0].report.teacher, members=members)
    points = [family.points()[0]]
    for member, point in zip(members, family.points()[1:], strict=True):
        points.append(replace(point, agreement=agreement(member.model, original, held_out)))
    if arguments.block_dropping:
        points += _dropped_points(original, images, held_out, labels, members, arguments, progress)
    save = partial(
        family.save, overwrite=arguments.overwrite, points=points, evaluated_on=evaluated_on,
        page=lambda values: saved_family_page(values).html(),
    )  # fmt: skip
    index = or_elsewhere(save, arguments.out)
    forget_run(arguments)
    return {**index, "seconds": seconds, "out": str(arguments.out), "page": str(Path(arguments.out) / REPORT_FILE)}


def _dropped_points(
    original: nn.Module,
    images: FewShotImages,
    held_out: torch.Tensor,
    labels: torch.Tensor | None,
    members: Sequence[CompressionResult],
    arguments: argparse.Namespace,
    progress: TerminalProgress,
) -> list[FamilyPoint]:
    """Drop whole blocks and recover by distillation, down to the MACs of the smallest member; return the points."""
    config = Practise(distillation=PUBLISHED_DEMO_CONFIG.distillation) if arguments.data == "digits" else Practise()
    config = config.with_(seed=arguments.seed, impl=arguments.impl)
    convention = members[-1].plan.budget.convention
    smallest = members[-1].report.student.macs
    models: dict[str, nn.Module] = {"original": original}
    probes = None
    for count in range(1, len(candidate_groups(original, None)) + 1):
        dropped = block_dropping(original, images, count, config, probes=probes, progress=progress)
        probes = dropped.probes
        blocks = ", ".join(map(str, sorted(dropped.blocks)))
        models[f"without block{'s' if count > 1 else ''} {blocks}"] = dropped.model
        if compressible(dropped.model).cost().total.macs(convention) <= smallest:
            break
    latency = measure_latency(models, images.normalised[: members[0].report.latency_batch], QUICK_TIMING)
    points = []
    for name, model in list(models.items())[1:]:
        cost = compressible(model).cost().total
        # Scaled to the original of the members, because these models were timed in another run than the members.
        time = members[0].report.teacher.latency_ms * latency[name].ratio_to(latency["original"])
        points.append(
            FamilyPoint(
                name, "block dropping", cost.macs(convention), cost.params, time,
                agreement(model, original, held_out), None if labels is None else top1(model, held_out, labels),
            )
        )  # fmt: skip
    return points


def _show(values: dict[str, Any]) -> str:
    titles = ("", "MMACs", "share", "params", "latency ms", "top-1 %", "agreement %", "blocks (hidden units kept)")
    rows: list[tuple[str, ...]] = [titles]
    blocks = {
        member["folder"]: ", ".join(
            f"{block} ({kept})" if int(block) in member["pruned"] else f"{block} ({kept}, no attention)"
            for block, kept in member["blocks"].items()
        )
        for member in values["members"]
    }
    for point in sorted(values["points"], key=lambda point: (-point["macs"], point["kind"])):
        rows.append(
            (
                point["name"],
                f"{point['macs'] / 1e6:,.3f}",
                f"{point['macs'] / values['original']['macs']:.4f}",
                f"{point['params']:,}",
                f"{point['latency_ms']:.2f}",
                *("" if value is None else f"{100 * value:.2f}" for value in (point["top1"], point["agreement"])),
                blocks.get(point["name"], ""),
            )
        )
    return (
        f"{table(rows)}\n\n"
        f"Evaluated on {values['evaluated_on']}; the sweep took {values['seconds']:.0f} s.\n"
        f"Saved to {values['out']}: dcvit.load_family({values['out']!r}), or each folder as a timm model; "
        f"report: {values['page']}."
    )


COMMAND = Command(
    name="sweep",
    summary="compress a model to many sizes at once",
    description=(
        "Compress a model to many budgets from one search. Every size is saved as `dcvit compress` saves it, in a "
        "folder of its own; family.json lists them."
    ),
    run=_run,
    show=_show,
    add_arguments=_add_arguments,
)
