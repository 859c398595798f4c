"""`dcvit report`: write the page of a saved result again."""

import argparse
from typing import Any

from dcvit.cli.command import Command
from dcvit.report import write_report
from dcvit.runtime.progress import TerminalProgress

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="a folder that compress, demo or sweep saved")


def _run(arguments: argparse.Namespace, progress: TerminalProgress) -> dict[str, Any]:
    return {"page": str(write_report(arguments.run_folder))}


def _show(values: dict[str, Any]) -> str:
    return f"Report: {values['page']}"


COMMAND = Command(
    name="report",
    summary="write the report of a result again",
    description=(
        "Write RUN/report.html, one file that shows how the model was compressed, from the saved folder and without "
        "running a model. `compress`, `demo` and `sweep` already write it."
    ),
    run=_run,
    show=_show,
    add_arguments=_add_arguments,
)
