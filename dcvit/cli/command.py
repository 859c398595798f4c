"""What a command of the command line is."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dcvit.runtime.progress import TerminalProgress

__all__ = ["Command"]


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    """For a command that takes none of its own."""


@dataclass(frozen=True)
class Command:
    """One command: what it takes, what it does, as values for JSON, and how a person sees them.

    Attributes:
        name: As it is called.
        summary: Its line in `dcvit --help`.
        description: The first paragraph of its own help.
        run: Does it; gives values that JSON can hold.
        show: What is printed of them.
        add_arguments: Adds its arguments to a parser.
        json_file: Whether `--json` may name a file to write to.
        shared: Whether several processes may share its work.
    """

    name: str
    summary: str
    description: str
    run: Callable[[argparse.Namespace, TerminalProgress], dict[str, Any]]
    show: Callable[[dict[str, Any]], str]
    add_arguments: Callable[[argparse.ArgumentParser], None] = _no_arguments
    json_file: bool = False
    shared: bool = False
