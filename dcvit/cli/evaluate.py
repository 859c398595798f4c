"""`dcvit evaluate`: measure the cost, latency and agreement of a model."""

import argparse
from typing import Any

from dcvit.cli.arguments import DATA_HELP, MODEL_HELP, device_argument, model_arguments
from dcvit.cli.command import Command
from dcvit.cli.inputs import load_data, load_named_model
from dcvit.cli.text import table
from dcvit.costs import MAC_CONVENTIONS
from dcvit.errors import DcvitError
from dcvit.metrics.agreement import agreement, top1
from dcvit.metrics.latency import QUICK_TIMING, measure_latency
from dcvit.models import compressible
from dcvit.models.teacher import freeze
from dcvit.runtime.progress import TerminalProgress

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser)
    parser.add_argument("--data", required=True, help=DATA_HELP)
    parser.add_argument("--teacher", metavar="MODEL", help="a model to measure agreement with: " + MODEL_HELP)
    device_argument(parser)


def _run(arguments: argparse.Namespace, progress: TerminalProgress) -> dict[str, Any]:
    model = freeze(load_named_model(arguments.model, arguments))
    images, labels, unlabelled = load_data(arguments.data, model, progress=progress)
    cost = compressible(model).cost().total
    values: dict[str, Any] = {
        "model": arguments.model,
        "images": len(images),
        "macs": {convention: cost.macs(convention) for convention in MAC_CONVENTIONS},
        "params": cost.params,
        "latency_ms": measure_latency({"model": model}, images.normalised[:64], QUICK_TIMING)["model"].median_ms,
        "top1": None if labels is None else top1(model, images.normalised, labels),
        "unlabelled": unlabelled,
        "agreement": None,
    }
    if arguments.teacher is not None:
        teacher = freeze(load_named_model(arguments.teacher, arguments))
        if compressible(teacher).input_size() != compressible(model).input_size():
            raise DcvitError(f"--teacher {arguments.teacher}: it takes images of another size than {arguments.model}.")
        values["agreement"] = agreement(model, teacher, images.normalised)
    return values


def _show(values: dict[str, Any]) -> str:
    rows = [
        ("images", f"{values['images']}"),
        *((f"MACs {name.replace('_', ' ')}", f"{macs:,}") for name, macs in values["macs"].items()),
        ("parameters", f"{values['params']:,}"),
        ("latency ms", f"{values['latency_ms']:.2f}"),
        ("top-1 %", "no labels" if values["top1"] is None else f"{100 * values['top1']:.2f}"),
    ]
    if values["agreement"] is not None:
        rows.append(("agreement %", f"{100 * values['agreement']:.2f}"))
    shown = table([("", values["model"]), *rows])
    return shown if values["unlabelled"] is None else f"{shown}\n\nThe data has no labels: {values['unlabelled']}"


COMMAND = Command(
    name="evaluate",
    summary="measure a model",
    description=(
        "Cost and latency of a model; top-1 where the data is labelled (digits, or a folder with one subfolder for "
        "each of the model's classes, in alphabetical order); agreement with another model."
    ),
    run=_run,
    show=_show,
    add_arguments=_add_arguments,
)
