"""`dcvit methods`: list the values of `dcvit compress --method`."""

import argparse
from typing import Any

from dcvit.cli.command import Command
from dcvit.cli.text import table
from dcvit.methods import METHODS, Method
from dcvit.runtime.progress import TerminalProgress

__all__ = ["COMMAND", "listed"]


def listed() -> list[Method]:
    """Return the methods, the default first."""
    return sorted(METHODS.values(), key=lambda method: method.name != "dcvit")


def _run(arguments: argparse.Namespace, progress: TerminalProgress) -> dict[str, Any]:
    return {
        "methods": [
            {
                "name": m.name,
                "title": m.title,
                "families": list(m.families),
                "metrics": list(m.metrics),
                "source": m.source,
            }
            for m in listed()
        ]
    }


def _show(values: dict[str, Any]) -> str:
    rows = [("name", "title", "families", "budgets of", "source")]
    for method in values["methods"]:
        joined = (", ".join(method[key]) for key in ("families", "metrics"))
        rows.append((method["name"], method["title"], *joined, method["source"]))
    return table(rows, left=True)


COMMAND = Command(
    name="methods",
    summary="list the methods of compress",
    description="List the values of `dcvit compress --method`: dcvit's own method, and published ones to compare with.",
    run=_run,
    show=_show,
)
