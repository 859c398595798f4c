"""Arguments that several commands share."""

import argparse
from pathlib import Path
from typing import get_args

import torch

from dcvit import ops
from dcvit.methods import METHODS
from dcvit.runtime.checkpoint import CAN_LOCK, delete_run

__all__ = [
    "DATA_HELP", "MODEL_HELP", "TV_EXPONENT_HELP", "amount", "block_list", "device_argument", "forget_run",
    "impl_argument", "model_arguments", "name_list", "output_arguments", "random_weights_argument", "run_argument",
    "run_folder",
]  # fmt: skip

MODEL_HELP = "a timm name (deit_small_patch16_224), local-dir:FOLDER, hf-hub:OWNER/NAME, or demo (the embedded model)"
TV_EXPONENT_HELP = "exponent β of the image prior of synthesis (as published: 1 for DeiT and Swin, 0.6 for others)"
DATA_HELP = "a folder of image files, searched recursively, or digits (scikit-learn's)"


def model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    random_weights_argument(parser)


def random_weights_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--random-weights", action="store_true", help="do not load the pretrained weights of the model")


def run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run-dir", type=Path, metavar="FOLDER",
        help="folder for checkpoints, from which the same command resumes after it was stopped; by default OUT.run, "
        "which is deleted in the end",
    )  # fmt: skip


def output_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    parser.add_argument(
        "--out", default=default, required=default is None, metavar="FOLDER", help="folder for the result; empty or new"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result in that folder")


def impl_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--impl", choices=get_args(ops.Impl), default="auto", help="implementation of the hot paths")


def device_argument(parser: argparse.ArgumentParser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="device that runs the model")


def amount(text: str) -> float | int:
    """Parse an amount such as `0.75`, `4200000000`, `4.2G`, `22M` or `300K`."""
    units = {"K": 10**3, "M": 10**6, "G": 10**9}
    unit = units.get(text[-1:].upper())
    try:
        if unit is not None:
            return round(float(text[:-1]) * unit)
        return float(text) if "." in text or "e" in text.lower() else int(text)
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected a fraction such as 0.75 for 75 %, or an absolute number such as 4200000 or 4.2G"
        ) from error


def block_list(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected block indices, from 0, such as 1,2,5") from error


def name_list(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def run_folder(arguments: argparse.Namespace) -> Path | None:
    """Return the folder for checkpoints: by default beside the result; `None` if the method keeps none."""
    named: Path | None = arguments.run_dir
    if not METHODS[getattr(arguments, "method", "dcvit")].resumable or (named is None and not CAN_LOCK):
        return None
    out = Path(arguments.out).resolve()  # resolved, because `.` has no name
    return named if named is not None else out.with_name(f"{out.name}.run")


def forget_run(arguments: argparse.Namespace) -> None:
    """Delete the checkpoints of a finished run, unless the user named their folder."""
    folder = run_folder(arguments)
    if folder is not None and arguments.run_dir is None:
        delete_run(folder)
