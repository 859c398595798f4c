"""The type of a command of the command line."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dcvit.runtime.progress import TerminalProgress

__all__ = ["Command"]


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no arguments, for a command that takes none."""


@dataclass(frozen=True)
class Command:
    """A command: its arguments, the function that runs it, and the function that formats its values.

    Attributes:
        name: Name on the command line.
        summary: Line in `dcvit --help`.
        description: First paragraph of the command's own help.
        run: Function that runs the command and returns values that JSON can hold.
        show: Function that formats these values as text for the terminal.
        add_arguments: Function that adds the command's arguments to a parser.
        json_file: Whether `--json` may name a file to write to.
        shared: Whether several processes may share the work.
    """

    name: str
    summary: str
    description: str
    run: Callable[[argparse.Namespace, TerminalProgress], dict[str, Any]]
    show: Callable[[dict[str, Any]], str]
    add_arguments: Callable[[argparse.ArgumentParser], None] = _no_arguments
    json_file: bool = False
    shared: bool = False
