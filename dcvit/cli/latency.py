"""`dcvit latency`: time models side by side."""

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dcvit.artifacts.result import check_output_file, original_name
from dcvit.artifacts.saving import or_elsewhere, replace_file
from dcvit.cli.arguments import MODEL_HELP, device_argument, name_list, random_weights_argument
from dcvit.cli.command import Command
from dcvit.cli.inputs import load_named_model
from dcvit.cli.text import table
from dcvit.errors import DcvitError
from dcvit.metrics.latency import MODES, STOPWATCHES, compare_latency
from dcvit.models import DEMO_MODEL
from dcvit.runtime.environment import device_name, versions
from dcvit.runtime.progress import TerminalProgress

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help=MODEL_HELP + "; a folder of a compressed model needs no local-dir:"
    )
    parser.add_argument(
        "--original",
        nargs="?",
        const=True,
        metavar="MODEL",
        help="time the original of the compressed models first; MODEL may be left out only if it is demo",
    )
    random_weights_argument(parser)
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images per run")
    parser.add_argument("--runs", type=int, default=500, metavar="N", help="timed runs of each model in each mode")
    parser.add_argument("--warmup", type=int, default=10, metavar="N", help="untimed runs of each model before them")
    parser.add_argument(
        "--modes", type=name_list, default=("eager",), metavar="M,N,…", help="execution modes, of " + ", ".join(MODES)
    )
    parser.add_argument(
        "--clock",
        choices=tuple(STOPWATCHES),
        default="wall",
        help="cpu reads the processor time of one thread, for a busy machine",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; by default torch's choice")
    parser.add_argument("--overwrite", action="store_true", help="replace the FILE of --json if it exists")
    device_argument(parser)


def _run(arguments: argparse.Namespace, progress: TerminalProgress) -> dict[str, Any]:
    file = Path(arguments.json) if isinstance(arguments.json, str) else None
    if file is not None:
        check_output_file(file, overwrite=arguments.overwrite)
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise DcvitError(f"--threads {arguments.threads}: expected 1 or more.")
        torch.set_num_threads(arguments.threads)
    names = list(dict.fromkeys([*_originals(arguments.original, arguments.models), *arguments.models]))
    models = {}
    for name in names:
        folder = _is_folder(name)
        models[name] = load_named_model(
            f"local-dir:{_folder(name)}" if folder else name, arguments, pretrained=folder or None
        )
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler that measures memory prints to the terminal
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    rows = compare_latency(
        models,
        batch_size=arguments.batch_size,
        runs=arguments.runs,
        warmup=arguments.warmup,
        modes=arguments.modes,
        stopwatch=STOPWATCHES[arguments.clock],
        progress=progress,
    )
    values = {
        "rows": [row.to_dict() for row in rows],
        "batch_size": arguments.batch_size,
        "warmup": arguments.warmup,
        "device": device_name(torch.device(arguments.device)),
        "clock": arguments.clock,
        "threads": torch.get_num_threads(),
        "load": load,
        "versions": versions(),
    }
    if file is not None:
        or_elsewhere(partial(replace_file, text=json.dumps(values, indent=2) + "\n"), file)
    return values


def _originals(original: str | bool | None, models: list[str]) -> list[str]:
    """Return the originals to time first: the one that the user names, else the embedded model.

    A name that is read from a folder is never loaded, because it may lead to any download.

    Raises:
        DcvitError: If no model is a folder of a compressed model, or the user must name the original.
    """
    if original is None:
        return []
    folders = [name for name in models if _is_folder(name)]
    if not folders:
        raise DcvitError(f"--original: none of {', '.join(models)} is a folder of a compressed model.")
    if isinstance(original, str):
        return [original]
    for folder in folders:
        if (name := original_name(_folder(folder))) != DEMO_MODEL:
            raise DcvitError(
                f"--original: {folder} says that it was compressed from {name!r}, which may be a download: if you "
                "trust that name, pass it, as --original MODEL."
            )
    return [DEMO_MODEL]


def _is_folder(name: str) -> bool:
    """Return whether MODEL is a folder of a saved model. `demo` never is, even if a folder has that name."""
    return name.startswith("local-dir:") or (name != DEMO_MODEL and (Path(name) / "config.json").is_file())


def _folder(name: str) -> Path:
    return Path(name.removeprefix("local-dir:"))


def _show(values: dict[str, Any]) -> str:
    rows = [("model", "mode", "mean ms", "median ms", "p95 ms", "images/s", "× first", "peak MiB")]
    for row in values["rows"]:
        rows.append(
            (
                row["model"],
                row["mode"],
                *(f"{row[name]:.2f}" for name in ("mean_ms", "median_ms", "p95_ms")),
                f"{row['images_per_second']:.1f}",
                f"{row['ratio']:.4f}",
                f"{row['peak_bytes'] / 2**20:.1f}",
            )
        )
    load = "" if values["load"] is None else f", load {values['load']:.1f} before"
    runs = values["rows"][0]["runs"]
    return (
        f"{table(rows)}\n\n"
        f"{runs} runs of batch {values['batch_size']} in turn, after {values['warmup']} to warm up; "
        f"{values['clock']} clock; {values['device']}, {values['threads']} threads{load}. "
        "Peak: weights and activations of one run."
    )


COMMAND = Command(
    name="latency",
    summary="time models side by side",
    description=(
        "Time forward passes of models in turn, run by run, so that a change of load affects all equally. Ratios are "
        "to the first model in the same mode and round."
    ),
    run=_run,
    show=_show,
    add_arguments=_add_arguments,
    json_file=True,
)
