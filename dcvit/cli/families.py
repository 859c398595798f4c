"""`dcvit families`: list the model families and the methods for each."""

import argparse
from typing import Any

from dcvit.cli.command import Command
from dcvit.cli.methods import listed
from dcvit.cli.text import table
from dcvit.models import families
from dcvit.runtime.progress import TerminalProgress

__all__ = ["COMMAND"]


def _run(arguments: argparse.Namespace, progress: TerminalProgress) -> dict[str, Any]:
    return {
        "families": [
            {
                "name": view.family,
                "models": view.models,
                "classes": [one.__name__ for one in view.classes],
                "methods": [method.name for method in listed() if view.family in method.families],
                "source": view.source,
            }
            for view in families()
        ]
    }


def _show(values: dict[str, Any]) -> str:
    rows = [("name", "models", "timm's classes", "methods", "source")]
    for family in values["families"]:
        joined = (", ".join(family[key]) for key in ("classes", "methods"))
        rows.append((family["name"], family["models"], *joined, family["source"]))
    return table(rows, left=True)


COMMAND = Command(
    name="families",
    summary="list the model families and the methods that compress each",
    description="List the models that can be compressed, and which of `dcvit methods` compress them.",
    run=_run,
    show=_show,
)
