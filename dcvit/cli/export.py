"""`dcvit export`: write a saved model for other runtimes."""

import argparse
from pathlib import Path
from typing import Any

from dcvit.artifacts.export import SUFFIXES, TOLERANCES, compare_rounded, export_model
from dcvit.artifacts.result import DTYPES, check_output_folder, load
from dcvit.cli.command import Command
from dcvit.models import load_model
from dcvit.runtime.progress import TerminalProgress

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="a folder that dcvit compress wrote")
    parser.add_argument(
        "--format",
        choices=(*SUFFIXES, "timm"),
        default="onnx",
        help="onnx for onnxruntime and others, torch-export for torch.export.load, or timm for a folder as of compress",
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default="float32",
        help="of the weights, and for files of input and output",
    )
    parser.add_argument(
        "--out",
        metavar="PATH",
        help="output path; by default FOLDER/model.onnx, FOLDER/model.pt2 or the folder FOLDER-DTYPE",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")


def _run(arguments: argparse.Namespace, progress: TerminalProgress) -> dict[str, Any]:
    folder, dtype = Path(arguments.folder), DTYPES[arguments.dtype]
    if arguments.format == "timm":
        out = Path(arguments.out or f"{folder}-{arguments.dtype}")
        check_output_folder(out, overwrite=arguments.overwrite)
        result = load(folder)
        errors = compare_rounded(result.model, dtype)
        result.save(out, overwrite=arguments.overwrite, dtype=dtype)
        num_bytes = sum(file.stat().st_size for file in out.iterdir())
    else:
        out = Path(arguments.out or folder / f"model{SUFFIXES[arguments.format]}")
        model = load_model(f"local-dir:{folder}")
        exported = export_model(model, out, format=arguments.format, dtype=dtype, overwrite=arguments.overwrite)
        errors, num_bytes = dict(exported.errors), exported.num_bytes
    return {
        "format": arguments.format,
        "dtype": arguments.dtype,
        "bytes": num_bytes,
        "errors": errors,
        "tolerance": TOLERANCES[dtype],
        "out": str(out),
    }


def _show(values: dict[str, Any]) -> str:
    errors = ", ".join(f"{error:.1e} at batch size {count}" for count, error in values["errors"].items())
    return (
        f"Saved to {values['out']}: {values['bytes'] / 1e6:.2f} MB, weights in {values['dtype']}.\n"
        f"Largest difference from the model in float32, relative to its largest output: {errors} "
        f"(allowed {values['tolerance']:.1e})."
    )


COMMAND = Command(
    name="export",
    summary="write a saved model for other runtimes, or in half precision",
    description=(
        "Write a saved model as one file that takes any batch size and needs neither dcvit nor timm, or as another "
        "folder with its weights in another dtype. The export is run and compared with the model; on a mismatch it is "
        "deleted."
    ),
    run=_run,
    show=_show,
    add_arguments=_add_arguments,
)
