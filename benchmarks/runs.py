"""Shared parts of the benchmarks of whole compressions: processes, the file of finished runs, and tables."""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Protocol, TypeVar

from benchmarks.harness import ROOT
from benchmarks.testbeds.cache import fingerprint
from dcvit.errors import DcvitError

__all__ = [
    "NOTHING",
    "code_version",
    "command_lines",
    "count",
    "json_lines",
    "markdown",
    "peak_memory",
    "prepare_bed",
    "publish",
    "run_command",
    "run_missing",
    "share",
    "spread",
    "with_section",
]

NOTHING = "–"
"""Text of an empty cell."""


class AnyRequest(Protocol):
    """The settings of a run, a frozen dataclass. Its bed is prepared before the run, unless `prepared` is true."""

    @property
    def bed(self) -> str:
        """Name of the test bed."""

    @property
    def label(self) -> str:
        """The label of the run in messages."""

    @property
    def prepared(self) -> bool:
        """Whether the bed caches nothing and thus needs no preparation."""


class AnyRecord(Protocol):
    """A finished run, a dataclass that is identified by its request and the version of the code."""

    @property
    def request(self) -> Any:
        """The settings of the run."""

    @property
    def code(self) -> str:
        """Version of the code."""

    @property
    def summary(self) -> str:
        """The main figures of the run in messages."""


RequestT = TypeVar("RequestT", bound=AnyRequest)
RecordT = TypeVar("RecordT", bound=AnyRecord)


def share(text: str) -> float:
    """Parse an argument between 0 and 1."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a share between 0 and 1, both excluded")
    return value


def count(text: str) -> int:
    """Parse an argument of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return value


def run_command(command: str, request: dict[str, Any], threads: int, *more: str) -> tuple[dict[str, Any], float]:
    """Make one run in its own process: `python -m benchmarks COMMAND --run REQUEST`.

    On Linux, the peak memory of a process starts at the memory of its parent. The parent here has only imported what
    the child imports anyway, and must not load more.

    Args:
        command: Command of `python -m benchmarks`.
        request: Settings of the run.
        threads: CPU threads of torch.
        more: Further arguments.

    Returns:
        The JSON object that the process printed last, and the seconds that it took.

    Raises:
        DcvitError: If the process failed; its messages are on standard error.
    """
    start = time.perf_counter()
    arguments = [sys.executable, "-m", "benchmarks", command, "--threads", str(threads), "--run", json.dumps(request)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [*arguments, *more], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise DcvitError(f"the run ended with status {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found, time.perf_counter() - start


def run_missing(
    requests: Sequence[RequestT],
    known: Sequence[RecordT],
    out: Path,
    measured: Sequence[str],
    run: Callable[[RequestT, str], RecordT],
) -> tuple[list[RecordT], int]:
    """Make the runs of a table that are missing.

    Args:
        requests: Settings of the runs of a table.
        known: The finished runs.
        out: The file to which new runs are appended.
        measured: Files and folders on which the figures depend, see `code_version`.
        run: Makes a run, given its settings and the version of the code. It raises `DcvitError` if the run failed.

    Returns:
        The record of each run that did not fail, and the number of failed runs.
    """
    finished = {(record.request, record.code): record for record in known}
    out.parent.mkdir(parents=True, exist_ok=True)
    prepared: set[str] = set()
    records, failed = [], 0
    for number, request in enumerate(requests, 1):
        label = f"{number}/{len(requests)} {request.label}"
        code = code_version(measured)  # read each time, because the code may change while the table is made
        record = finished.get((request, code))
        if record is None:
            if not request.prepared and request.bed not in prepared:
                prepare_bed(request.bed)
                prepared.add(request.bed)
            try:
                record = run(request, code)
            except DcvitError as error:
                print(f"{label}: {error}", file=sys.stderr, flush=True)
                failed += 1
                continue
            with out.open("a") as file:
                file.write(json.dumps(asdict(record)) + "\n")  # type: ignore[call-overload]
            print(f"{label}: {record.summary}", file=sys.stderr, flush=True)
        records.append(record)
    return records, failed


def publish(text: str | None, failed: int, results: Path | None, name: str) -> int:
    """Print a table, write it into a results file if one is named, and report how many runs failed.

    Args:
        text: The section of the results file; `None` without a finished run.
        failed: Number of failed runs.
        results: The results file, or `None`.
        name: Name of the section.

    Returns:
        The exit status: 1 if a run failed.
    """
    print(text or "No finished runs.")
    if results and text:
        existing = results.read_text() if results.is_file() else ""
        results.write_text(with_section(existing, text, name))
    if failed:
        print(f"{failed} runs failed; the same command tries them again.", file=sys.stderr)
    return int(failed > 0)


def prepare_bed(bed: str) -> None:
    """Fill the cache of a test bed in another process, so that no run's time and memory include it."""
    code = f"from benchmarks.methods import BEDS; BEDS[{bed!r}](0)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=sys.stderr, check=False)


def peak_memory() -> float:
    """Return the peak resident set of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines; a missing file counts as empty."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def code_version(measured: Sequence[str]) -> str:
    """Return the last commit of the measured files, with a fingerprint if they have changed since.

    A commit of other files, such as the results, does not make finished runs outdated.

    Args:
        measured: Files and folders of the repository, relative to its root.
    """

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", *arguments, "--", *measured]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    commit = git("log", "-1", "--format=%h") or "no commit"
    if commit != "no commit" and not git("status", "--porcelain"):
        return commit
    paths = [ROOT / path for path in measured]
    files = sorted(f for path in paths for f in ([path] if path.is_file() else path.rglob("*")))
    sources = [f for f in files if f.suffix in (".py", ".cpp", ".cu", ".h")]
    return f"{commit}+{fingerprint(*[(str(f.relative_to(ROOT)), f.read_bytes()) for f in sources])}"


def command_lines(
    records: Sequence[RecordT],
    kind: Callable[[RecordT], Hashable],
    command: Callable[[Sequence[RecordT]], str],
) -> list[str]:
    """Return the indented commands that make a table of the runs, one for each kind of run."""
    kinds: dict[Hashable, list[RecordT]] = {}
    for record in records:
        kinds.setdefault(kind(record), []).append(record)
    return [f"    {command(alike)}" for alike in kinds.values()]


def spread(values: Sequence[float | None], decimals: int) -> str:
    """Format mean ± standard deviation. A single value has no deviation, and no value gives a dash."""
    known = [value for value in values if value is not None]
    if not known:
        return NOTHING
    deviation = f" ± {stdev(known):.{decimals}f}" if len(known) > 1 else ""
    return f"{mean(known):.{decimals}f}{deviation}"


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table of titles and cells."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_section(existing: str, text: str, name: str) -> str:
    """Insert a named section into the text of a results file, in place of an earlier one or at the end."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    section = f"{begin}\n{text}\n{end}\n"
    if begin in existing and end in existing:
        before, _, rest = existing.partition(begin)
        return before + section + rest.partition(end)[2].removeprefix("\n")
    return f"{existing.rstrip()}\n\n{section}" if existing.strip() else f"# Results\n\n{section}"
