"""`dcvit demo`: compress the embedded model and compare methods."""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dcvit.artifacts.result import REPORT_FILE, check_output_folder
from dcvit.artifacts.saving import or_elsewhere
from dcvit.cli.arguments import impl_argument, output_arguments
from dcvit.cli.command import Command
from dcvit.cli.text import saved, table
from dcvit.config import DCViT
from dcvit.demo import load_digits
from dcvit.demo.comparison import (
    BLOCK_DROPPING,
    DEMO_CONFIG,
    NUM_DROPPED,
    PUBLISHED_DEMO_CONFIG,
    THIS_METHOD,
    Comparison,
    Settings,
    compare,
)
from dcvit.errors import DcvitError
from dcvit.methods.budgets import candidate_groups
from dcvit.models import load_model
from dcvit.report import run_page
from dcvit.runtime.progress import TerminalProgress

__all__ = ["COMMAND"]

PAPER_EPOCHS = DCViT.paper().distillation.epochs


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="repeat with seeds 0 to N-1, print mean ± std"
    )
    parser.add_argument("--num-images", type=int, default=50, metavar="N", help="number of unlabelled images")
    parser.add_argument(
        "--epochs",
        type=int,
        default=PUBLISHED_DEMO_CONFIG.distillation.epochs,
        help="epochs of each recovery of block dropping and of the published procedure",
    )
    parser.add_argument(
        "--drop", type=int, default=NUM_DROPPED, metavar="N", help="number of whole blocks that block dropping removes"
    )
    output_arguments(parser, default="dcvit-demo")
    impl_argument(parser)


def _run(arguments: argparse.Namespace, progress: TerminalProgress) -> dict[str, Any]:
    check_output_folder(arguments.out, overwrite=arguments.overwrite)
    if arguments.seeds < 1:
        raise DcvitError(f"--seeds {arguments.seeds}: expected 1 or more.")
    blocks = len(candidate_groups(load_model("demo"), None))
    if not 1 <= arguments.drop <= blocks:
        raise DcvitError(f"--drop {arguments.drop}: expected 1 to {blocks}, the number of blocks that may be dropped.")
    torch.set_num_threads(1)  # a second thread hardly speeds up this small model, and slows it down on a busy machine
    distillation = replace(PUBLISHED_DEMO_CONFIG.distillation, epochs=arguments.epochs)
    comparison: Comparison = compare(
        "demo",
        load_digits(),
        range(arguments.seeds),
        num_images=arguments.num_images,
        num_dropped=arguments.drop,
        settings=Settings(
            replace(DEMO_CONFIG, impl=arguments.impl), replace(PUBLISHED_DEMO_CONFIG, recovery=distillation)
        ),
        progress=progress,
    )
    or_elsewhere(
        partial(comparison.save, overwrite=arguments.overwrite, page=lambda record: run_page(record).html()),
        arguments.out,
    )
    return {
        **comparison.to_dict(),
        "epochs": arguments.epochs,
        "out": str(arguments.out),
        "page": str(Path(arguments.out) / REPORT_FILE),
    }


def _show(values: dict[str, Any]) -> str:
    rows = [("method", "top-1 %", "agreement %", "MMACs", "params", "latency ms")]
    for method in values["comparison"]:
        several = len(method["seeds"]) > 1

        def figure(name: str, scale: float, digits: int, method: Any = method, several: bool = several) -> str:
            value = f"{method[name]['mean'] * scale:.{digits}f}"
            return value + (f" ± {method[name]['std'] * scale:.{digits}f}" if several else "")

        rows.append(
            (
                method["method"],
                figure("top1", 100, 2),
                figure("agreement", 100, 2),
                f"{method['macs'] / 1e6:.3f}",
                f"{method['params']:,}",
                figure("latency_ms", 1, 2),
            )
        )
    top1_of = {method["method"]: 100 * method["top1"]["mean"] for method in values["comparison"]}
    lead = top1_of[THIS_METHOD] - top1_of[BLOCK_DROPPING]
    verdict = f"{THIS_METHOD} is {abs(lead):.2f} points {'above' if lead >= 0 else 'below'} {BLOCK_DROPPING}."
    seeds = len(values["comparison"][0]["seeds"])
    spread = f", mean ± standard deviation over {seeds} few-shot sets" if seeds > 1 else ""
    images = values["report"]["num_images"]
    return (
        f"{table(rows)}\n\n"
        f"On the 797 held-out digits, from {images} unlabelled images{spread}; latency of a batch of 64.\n"
        f"Block dropping and DC-ViT had {values['epochs']} epochs for each recovery; published are {PAPER_EPOCHS}.\n"
        f"{verdict}\n{saved(values['out'], values['page'])}"
    )


COMMAND = Command(
    name="demo",
    summary="compress the embedded model and compare methods",
    description=(
        "Compress the embedded digits model with a few unlabelled images, and compare the original, block dropping and "
        "this method at the same MACs on the 797 digits held out."
    ),
    run=_run,
    show=_show,
    add_arguments=_add_arguments,
)
