"""The command line, `dcvit COMMAND`, with one module for each command; `dcvit --help` lists them."""

import argparse
import errno
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast

from safetensors import SafetensorError

from dcvit._version import __version__
from dcvit.cli import (
    compress,
    demo,
    evaluate,
    export,
    families,
    info,
    latency,
    methods,
    push,
    report,
    sweep,
    synthesize,
)
from dcvit.cli.arguments import run_folder
from dcvit.cli.command import Command
from dcvit.errors import DcvitError, DcvitWarning, DistributedError
from dcvit.runtime.checkpoint import RUN_FILE
from dcvit.runtime.distributed import ProcessGroup, launched
from dcvit.runtime.output import Lenient
from dcvit.runtime.progress import TerminalProgress

__all__ = ["COMMANDS", "EXIT_BAD_INPUT", "EXIT_FAILED", "EXIT_INTERRUPTED", "EXIT_OK", "main"]

COMMANDS: tuple[Command, ...] = tuple(
    module.COMMAND
    for module in (
        demo, compress, methods, families, sweep, report, synthesize, evaluate, export, push, latency, info
    )
)  # fmt: skip
"""All commands, in the order of `dcvit --help`."""

EXIT_OK, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130

DISK_ERRORS = {getattr(errno, name) for name in ("ENOSPC", "EROFS", "EDQUOT", "EFBIG", "EIO") if hasattr(errno, name)}
"""Error numbers of disk problems, which are not caused by the input. Windows lacks one of them."""

EPILOG = """\
examples:
  dcvit demo                                                     compress the embedded model, compare methods
  dcvit info deit_small_patch16_224 --random-weights             what each block costs, which budgets can be met
  dcvit compress deit_small_patch16_224 --data photos/ --macs 0.75 --out small/
  dcvit evaluate local-dir:small/ --data photos/ --teacher deit_small_patch16_224
  dcvit export small/ --format onnx                              one file for onnxruntime, compared with the model
  dcvit latency small/ --original deit_small_patch16_224         a compressed model and its original, in turn

exit codes: 0 done, 2 bad input (one sentence says what and what to do), 130 interrupted, 1 anything else
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments after the program's name; those of the process if `None`.

    Returns:
        The exit code.
    """
    _fill_closed_descriptors()
    out, error = Lenient(sys.stdout), Lenient(sys.stderr)
    usage = None
    with redirect_stdout(cast(TextIO, out)), redirect_stderr(cast(TextIO, error)):
        try:
            code = _main(argv)
        except SystemExit as left:  # argparse has printed help or refused the arguments
            usage, code = left, int(left.code or EXIT_OK)
        out.flush()
        if out.failure and code == EXIT_OK:
            if not out.unread:
                print(
                    f"dcvit: error: standard output takes no more ({out.failure}): the work is done, and all results "
                    "are saved.",
                    file=sys.stderr,
                )
            code = EXIT_FAILED
        error.flush()
    out.abandon()
    error.abandon()
    if usage is not None:
        raise SystemExit(code)
    return code


def _main(argv: Sequence[str] | None) -> int:
    """Run the command line; standard output and error are already wrapped in `Lenient`."""
    arguments = _parser().parse_args(argv)
    progress = TerminalProgress()
    try:
        with launched(getattr(arguments, "device", None)) as arguments.processes, warnings.catch_warnings():
            warnings.showwarning = _show_warning
            if not arguments.processes.is_main:
                progress = TerminalProgress(io.StringIO())
            values = _run(arguments, progress)
        if arguments.processes.is_main:
            print(json.dumps(values, indent=2) if arguments.json is True else arguments.command.show(values))
    except (DcvitError, OSError) as error:
        progress.close()
        print(f"dcvit: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT if isinstance(error, DcvitError) and not _is_of_disk(error) else EXIT_FAILED
    except KeyboardInterrupt:
        progress.close()
        print(f"dcvit: interrupted. {_how_to_resume(arguments)}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_OK


def _is_of_disk(error: BaseException | None) -> bool:
    """Return whether the cause is a full, read-only or broken disk, which is not caused by the input."""
    while error is not None:
        native = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
        if (int(native[1]) if native else getattr(error, "errno", None)) in DISK_ERRORS:
            return True
        error = error.__cause__
    return False


def _fill_closed_descriptors() -> None:
    """Open the standard descriptors that the caller closed (`>&-`), so that no other file receives their output."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def _run(arguments: argparse.Namespace, progress: TerminalProgress) -> dict[str, Any]:
    """Run a command and return its values.

    Raises:
        DistributedError: If several processes were started for a command that does not share its work.
    """
    command: Command = arguments.command
    processes: ProcessGroup = arguments.processes
    if processes.size > 1 and not command.shared:
        sharing = " and ".join(one.name for one in COMMANDS if one.shared)
        raise DistributedError(
            f"{command.name}: only {sharing} shares its work; start one process, not {processes.size}."
        )
    return command.run(arguments, progress)


def _how_to_resume(arguments: argparse.Namespace) -> str:
    folder = run_folder(arguments) if "run_dir" in arguments else None
    if folder is not None and (folder / RUN_FILE).is_file():
        return f"The same command resumes from the checkpoints in {str(folder)!r}."
    return "Nothing was saved."


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning on one line. The source location is left out of dcvit's own warnings: users cannot act on it."""
    location = "" if issubclass(category, DcvitWarning) else f" ({category.__name__}, {filename}:{lineno})"
    print(f"dcvit: warning: {message}{location}", file=sys.stderr)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """A help formatter that shows defaults, except `None`, `False` and `()`, which only mean an absent option."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        absent = action.default is None or action.default is False or action.default == ()
        return action.help if absent else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dcvit",
        description="Make a pretrained vision transformer smaller and faster from a few unlabelled images.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dcvit {__version__}")
    parsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        one = parsers.add_parser(
            command.name, help=command.summary, description=command.description,
            formatter_class=_Help,
        )  # fmt: skip
        if command.json_file:
            one.add_argument(
                "--json", nargs="?", const=True, default=False, metavar="FILE",
                help="write the result as JSON to FILE; without FILE, print it on standard output",
            )  # fmt: skip
        else:
            one.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
        command.add_arguments(one)
        one.set_defaults(command=command)
    return parser
