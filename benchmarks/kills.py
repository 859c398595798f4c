"""Kill runs and resume them: `python -m benchmarks kills`.

A compression of the embedded model is started, killed (SIGKILL) at a random moment and started again with the same
command, until it is done. In the end its weights must equal, bit for bit, those of an undisturbed run. No checkpoint
entry that was finished before a kill may be made again: its file must be the same inode, with the same time of writing.

With `--full N`, N more runs write to a file system of a few MiB that is filled up at a random moment, and resume once
there is space again. This needs the permission to mount a file system.

With `--processes N`, N processes of torch's launcher share a run. There is one such run for each stage, and one process
is killed in the middle of that stage. The launcher restarts the processes, and the weights must equal those of an
undisturbed run of N processes.
"""

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

import dcvit
from benchmarks.harness import header
from benchmarks.testbeds import digits
from dcvit import Budget, DCViT
from dcvit.config import ReconstructionConfig, SynthesisConfig
from dcvit.runtime.distributed import launched
from dcvit.runtime.progress import silent

CONFIG = DCViT(
    recovery=ReconstructionConfig(
        num_views=100, refinement_views=200, num_rows=2048, epochs=1, refinement_steps=220, refinement_batch=20
    ),
    synthesis=SynthesisConfig(iterations=10),
)
"""The default settings, scaled down: a run takes seconds and has every kind of checkpoint entry."""

WEIGHTS = "model.safetensors"
MOST_KILLS = 8
"""Largest number of kills of one run. A run resumes after each kill, so it may finish earlier."""

STAGES = ("synthesis", "views", "probes", "pruning probes", "step sizes", "reconstruction", "pilot runs", "refinement")
"""Stages of a run, in chronological order."""

FULL_BYTES = 8 << 20
"""Size of the file system that is filled up; a run needs less."""

Entries = dict[str, tuple[int, int]]
"""Inode and time of writing of each finished checkpoint entry's file, by file name."""


@dataclass(frozen=True)
class Story:
    """The history of one run.

    Attributes:
        starts: Number of starts of the command.
        killed_at: Time of each kill, in seconds after the start.
        kept: Number of checkpoint entries that were finished at the last kill.
        error: Description of the failure; empty if there was none.
    """

    starts: int
    killed_at: tuple[float, ...]
    kept: int
    error: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Print how many runs ended well.

    Returns:
        1 if a run failed.
    """
    parser = argparse.ArgumentParser("python -m benchmarks kills", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="fewest kills in all; each run is killed once or more")
    parser.add_argument("--full", type=int, default=0, metavar="N", help="runs on a file system that fills up")
    parser.add_argument("--processes", type=int, default=0, metavar="N", help="processes of each shared run")
    parser.add_argument("--jobs", type=int, default=2, help="concurrent runs, with one thread each")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--child", nargs=2, type=Path, metavar=("OUT", "RUN_DIR"), help="be the run that is killed")
    options = parser.parse_args(argv)
    if options.child:
        return compress_digits(*options.child)
    print(header())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        began = time.monotonic()
        code, error = finish(folder / "undisturbed")
        duration = time.monotonic() - began
        if code:
            print(error, file=sys.stderr)
            return 1
        expected = digest(folder / "undisturbed")
        print(f"undisturbed run: {duration:.1f} s")

        def killed(number: int) -> Story:
            return kill(folder / f"run-{number}", expected, duration, random.Random(options.seed * 100_000 + number))

        def filled(number: int) -> Story:
            return fill(folder / f"full-{number}", expected, duration, random.Random(options.seed * 100_000 + number))

        stories = repeat(
            "kills", killed, options.kills, options.jobs, lambda stories: sum(len(s.killed_at) for s in stories)
        )
        full = repeat("full disks", filled, options.full, options.jobs, len)
        shared: list[Story] = []
        if options.processes:
            code, error = finish(folder / "shared", options.processes)
            if code:
                print(error, file=sys.stderr)
                return 1
            expected_shared = digest(folder / "shared")

            def process_killed(number: int) -> Story:
                return kill_process(folder / f"shared-{number}", expected_shared, STAGES[number], options.processes)

            shared = repeat(f"kills of one of {options.processes} processes", process_killed, len(STAGES), 1, len)
    return 1 if any(story.error for story in (*stories, *full, *shared)) else 0


def repeat(
    title: str, run: Callable[[int], Story], enough: int, at_once: int, count: Callable[[Sequence[Story]], int]
) -> list[Story]:
    """Make runs until their count is large enough, and print a summary.

    Args:
        title: Name of the runs in the summary.
        run: Makes the run of a number.
        enough: The count to reach.
        at_once: Number of concurrent runs.
        count: Counts finished runs, or the kills in them.
    """
    stories: list[Story] = []
    with ThreadPoolExecutor(at_once) as pool:
        while count(stories) < enough:
            first = len(stories)
            for story in pool.map(run, range(first, first + min(10 * at_once, enough - count(stories)))):
                stories.append(story)
                if story.error:
                    print(f"run {len(stories) - 1}: {story}", file=sys.stderr)
    if stories:
        well = sum(not story.error for story in stories)
        starts = sum(story.starts for story in stories)
        kept = sum(story.kept for story in stories)
        print(
            f"{title}: {count(stories)}; {well} of {len(stories)} runs ended with the same weights and made no "
            f"entry twice ({starts} starts, {kept} finished entries found at the last one)"
        )
    return stories


def kill(folder: Path, expected: str, duration: float, moments: random.Random) -> Story:
    """Make one run that is killed at least once."""
    killed_at: list[float] = []
    entries: Entries = {}
    kills = moments.randint(1, MOST_KILLS)
    for start in range(1, MOST_KILLS + 2):
        moment = moments.uniform(0.2, 0.9) * duration if len(killed_at) < kills else None
        process = started(folder)
        try:
            _, error = process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            killed_at.append(round(moment or 0.0, 2))
            now = finished(folder)
            again = [name for name, file in entries.items() if now.get(name) != file]
            if again:
                return Story(start, tuple(killed_at), len(entries), f"done again: {', '.join(again)}")
            entries = now
            if not (folder / WEIGHTS).is_file():  # else the run was done: a result is saved in one step
                continue
        else:
            if process.returncode:
                return Story(start, tuple(killed_at), len(entries), f"exit code {process.returncode}: {error}")
        same = digest(folder) == expected
        return Story(start, tuple(killed_at), len(entries), "" if same else "other weights")
    return Story(MOST_KILLS + 1, tuple(killed_at), len(entries), "it never ended")


def kill_process(folder: Path, expected: str, stage: str, processes: int) -> Story:
    """Make one run of several processes, of which one is killed in the middle of a stage."""
    process = started(folder, processes)
    while process.poll() is None and not (stage_file(folder).is_file() and stage_file(folder).read_text() == stage):
        time.sleep(0.01)
    if process.poll() is not None:
        return Story(1, (), 0, f"it ended before {stage}: {process.communicate()[1]}")
    time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    entries = finished(folder)
    os.kill(int(children[STAGES.index(stage) % len(children)]), signal.SIGKILL)
    _, error = process.communicate()
    if process.returncode:
        return Story(2, (), len(entries), f"killed in {stage}: exit code {process.returncode}: {error}")
    now = finished(folder)
    again = [name for name, file in entries.items() if now.get(name) != file]
    same = digest(folder) == expected
    problem = f"done again: {again}" if again else "" if same else "other weights"
    return Story(2, (), len(entries), problem and f"killed in {stage}: {problem}")


def fill(folder: Path, expected: str, duration: float, moments: random.Random) -> Story:
    """Make one run whose disk is full from a random moment until the run has stopped, and then resume it."""
    with small_disk(folder) as disk:
        process = started(disk / "out")
        time.sleep(moments.uniform(0.3, 0.9) * duration)
        ballast = disk / "ballast"
        with ballast.open("wb", buffering=0) as file, suppress(OSError):  # raised once the disk is full
            while True:
                file.write(bytes(1 << 12))
        before = finished(disk / "out")
        _, error = process.communicate()
        if process.returncode not in (0, 2):
            return Story(1, (), len(before), f"exit code {process.returncode}: {error}")
        if process.returncode == 2 and "No space left" not in error:
            return Story(1, (), len(before), f"it did not say why: {error}")
        ballast.unlink()
        if process.returncode:
            code, error = finish(disk / "out")
            if code:
                return Story(2, (), len(before), f"exit code {code}: {error}")
        after = finished(disk / "out")
        again = [name for name, file in before.items() if after.get(name) != file]
        same = digest(disk / "out") == expected
        return Story(2, (), len(before), f"done again: {again}" if again else "" if same else "other weights")


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a file system of `FULL_BYTES` in memory, and unmount it afterwards."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={FULL_BYTES}", "dcvit", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def compress_digits(out: Path, kept: Path) -> int:
    """Compress the embedded model; this is the run that is killed.

    Returns:
        The exit code: 2, with the reason on standard error, if the compression fails.
    """
    torch.set_num_threads(1)
    bed = digits(seed=0)
    seen: set[str] = set()

    def note(stage: str, done: int, total: int, loss: float | None) -> None:
        if stage not in seen:
            seen.add(stage)
            stage_file(out).write_text(stage)

    try:
        with launched() as processes:
            result = dcvit.compress(
                bed.model, bed.images, Budget(macs=0.7), CONFIG,
                run_dir=kept, processes=processes, progress=note if processes.is_main else silent,
            )  # fmt: skip
        if processes.is_main:
            result.save(out)
    except dcvit.DcvitError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def started(folder: Path, processes: int = 1) -> "subprocess.Popen[str]":
    """Start a run, with one thread for each process."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--max-restarts=1"]
    return subprocess.Popen(
        [sys.executable, *(launcher if processes > 1 else []), "-m", "benchmarks", "kills", "--child", str(folder),
         str(run_dir(folder))],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run_dir(folder: Path) -> Path:
    """Return the folder of a run's checkpoint entries."""
    return folder.with_name(f"{folder.name}.run")


def stage_file(folder: Path) -> Path:
    """Return the file in which a run notes its current stage."""
    return folder.with_name(f"{folder.name}.stage")


def finish(folder: Path, processes: int = 1) -> tuple[int, str]:
    """Make a run to its end, and return the exit code and the text on standard error."""
    process = started(folder, processes)
    _, error = process.communicate()
    return process.returncode, error


def finished(folder: Path) -> Entries:
    """Return the finished checkpoint entries of a run."""
    entries = run_dir(folder) / "units"
    return {path.name: ((stat := path.stat()).st_ino, stat.st_mtime_ns) for path in entries.glob("*.json")}


def digest(folder: Path) -> str:
    """Return the SHA-256 of a saved model's weights."""
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
