"""What benchmarks of whole compressions share: a process for each run, a file of finished ones, cells and tables."""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.harness import ROOT
from benchmarks.testbeds.cache import fingerprint
from dcvit.errors import DcvitError

__all__ = [
    "NOTHING",
    "code_version",
    "count",
    "json_lines",
    "markdown",
    "peak_memory",
    "prepare_bed",
    "run_command",
    "share",
    "spread",
    "with_section",
]

NOTHING = "–"
"""An empty cell."""


def share(text: str) -> float:
    """An argument between 0 and 1."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a share between 0 and 1, both excluded")
    return value


def count(text: str) -> int:
    """An argument of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return value


def run_command(command: str, request: dict[str, Any], threads: int, *more: str) -> tuple[dict[str, Any], float]:
    """One run in a process of its own: `python -m benchmarks COMMAND --run REQUEST`.

    Linux starts a process's peak memory at what its parent holds; the parent here has imported what the child
    imports anyway, and must load no more.

    Args:
        command: Of `python -m benchmarks`.
        request: What is to be run.
        threads: Of torch.
        more: Arguments beyond.

    Returns:
        What the process printed last, and the seconds that it took.

    Raises:
        DcvitError: If it failed; what it said has gone to standard error.
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


def prepare_bed(bed: str) -> None:
    """Have a test bed make what it caches, so that no run's time and memory contain it; not in this process."""
    code = f"from benchmarks.methods import BEDS; BEDS[{bed!r}](0)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=sys.stderr, check=False)


def peak_memory() -> float:
    """The peak resident set of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def json_lines(path: Path) -> list[dict[str, Any]]:
    """What a file of JSON lines holds; nothing if there is none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def code_version(measured: Sequence[str]) -> str:
    """The last commit that touched what is measured, and a fingerprint of what has changed since.

    A commit of something else, such as the results, does not make finished runs outdated.

    Args:
        measured: Files and folders of the repository.
    """

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", *arguments, "--", *measured]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    commit = git("log", "-1", "--format=%h") or "no commit"
    if commit != "no commit" and not git("status", "--porcelain"):
        return commit
    places = [ROOT / place for place in measured]
    files = sorted(f for place in places for f in ([place] if place.is_file() else place.rglob("*")))
    sources = [f for f in files if f.suffix in (".py", ".cpp", ".cu", ".h")]
    return f"{commit}+{fingerprint(*[(str(f.relative_to(ROOT)), f.read_bytes()) for f in sources])}"


def spread(values: Sequence[float | None], decimals: int) -> str:
    """Mean ± standard deviation; the mean alone of one value, and a dash where there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return NOTHING
    deviation = f" ± {stdev(known):.{decimals}f}" if len(known) > 1 else ""
    return f"{mean(known):.{decimals}f}{deviation}"


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of titles and cells."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_section(existing: str, text: str, name: str) -> str:
    """A results file with the section of a name, in place of an earlier one or at the end."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    section = f"{begin}\n{text}\n{end}\n"
    if begin in existing and end in existing:
        before, _, rest = existing.partition(begin)
        return before + section + rest.partition(end)[2].removeprefix("\n")
    return f"{existing.rstrip()}\n\n{section}" if existing.strip() else f"# Results\n\n{section}"
