"""Runs that are killed and go on: `python -m benchmarks kills`.

A compression of the embedded model is started, killed (SIGKILL) at a random moment and started again with the same
command, until it is done. In the end its weights must be, bit for bit, those of a run that was left alone, and no unit
of work that was finished before a kill may have been done again: its file must be the same inode, written at the same
time.

With `--full N` so many more runs write to a file system of a few MiB that other files fill up at a random moment, and
go on once there is room (this needs the right to mount one).

With `--processes N` so many processes of torch's launcher share a run, and one of them is killed in the middle of each
stage, once each; the launcher starts them again. Then the weights must be those of as many processes left alone.
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
"""The default but for less of everything: a run takes seconds, and has every kind of unit."""

WEIGHTS = "model.safetensors"
MOST_KILLS = 8
"""Of one run; each start goes on where the one before was killed, and may come to the end first."""

STAGES = ("synthesis", "views", "probes", "pruning probes", "step sizes", "reconstruction", "pilot runs", "refinement")
"""Of a run, in their order."""

FULL_BYTES = 8 << 20
"""Of the file system that is filled up: more than a run takes."""

Entries = dict[str, tuple[int, int]]
"""Of each finished unit its file's inode and time of writing."""


@dataclass(frozen=True)
class Story:
    """How one run went.

    Attributes:
        starts: How often the command was started.
        killed_at: Seconds after its start, of each kill.
        kept: Units that were finished at the last kill.
        error: What went wrong; empty if nothing did.
    """

    starts: int
    killed_at: tuple[float, ...]
    kept: int
    error: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Print how many runs ended well; exit code 1 if one did not."""
    parser = argparse.ArgumentParser("python -m benchmarks kills", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="at least; each run is killed once or more")
    parser.add_argument("--full", type=int, default=0, metavar="N", help="runs on a file system that fills up")
    parser.add_argument("--ranks", type=int, default=0, metavar="N", help="processes of runs of which one is killed")
    parser.add_argument("--at-once", type=int, default=2, help="runs beside each other, with one thread each")
    parser.add_argument("--seed", type=int, default=0, help="draws the moments")
    parser.add_argument("--child", nargs=2, type=Path, metavar=("OUT", "RUN_DIR"), help="be the run that is killed")
    options = parser.parse_args(argv)
    if options.child:
        return compress_digits(*options.child)
    print(header())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        began = time.monotonic()
        code, error = finish(folder / "alone")
        alone = time.monotonic() - began
        if code:
            print(error, file=sys.stderr)
            return 1
        wanted = digest(folder / "alone")
        print(f"left alone: {alone:.1f} s")

        def killed(number: int) -> Story:
            return kill(folder / f"run-{number}", wanted, alone, random.Random(options.seed * 100_000 + number))

        def filled(number: int) -> Story:
            return fill(folder / f"full-{number}", wanted, alone, random.Random(options.seed * 100_000 + number))

        stories = told(
            "kills", killed, options.kills, options.micro_batch_size, lambda told: sum(len(s.killed_at) for s in told)
        )
        full = told("full disks", filled, options.full, options.micro_batch_size, len)
        shared: list[Story] = []
        if options.processes:
            code, error = finish(folder / "shared", options.processes)
            if code:
                print(error, file=sys.stderr)
                return 1
            same = digest(folder / "shared")

            def rank_killed(number: int) -> Story:
                return kill_rank(folder / f"shared-{number}", same, STAGES[number], options.processes)

            shared = told(f"kills of one of {options.processes} ranks", rank_killed, len(STAGES), 1, len)
    return 1 if any(story.error for story in (*stories, *full, *shared)) else 0


def told(
    title: str, run: Callable[[int], Story], wanted: int, micro_batch_size: int, count: Callable[[Sequence[Story]], int]
) -> list[Story]:
    """Run until there are enough, and print how they went."""
    stories: list[Story] = []
    with ThreadPoolExecutor(micro_batch_size) as pool:
        while count(stories) < wanted:
            first = len(stories)
            for story in pool.map(run, range(first, first + min(10 * micro_batch_size, wanted - count(stories)))):
                stories.append(story)
                if story.error:
                    print(f"run {len(stories) - 1}: {story}", file=sys.stderr)
    if stories:
        well = sum(not story.error for story in stories)
        starts = sum(story.starts for story in stories)
        kept = sum(story.kept for story in stories)
        print(
            f"{title}: {count(stories)}; {well} of {len(stories)} runs ended with the same weights and did no unit "
            f"twice ({starts} starts, {kept} finished units found at the last one)"
        )
    return stories


def kill(folder: Path, wanted: str, alone: float, moments: random.Random) -> Story:
    """One run that is killed at least once."""
    killed_at: list[float] = []
    entries: Entries = {}
    kills = moments.randint(1, MOST_KILLS)
    for start in range(1, MOST_KILLS + 2):
        moment = moments.uniform(0.2, 0.9) * alone if len(killed_at) < kills else None
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
            if not (folder / WEIGHTS).is_file():  # else it was over: what is saved is saved at once
                continue
        else:
            if process.returncode:
                return Story(start, tuple(killed_at), len(entries), f"exit code {process.returncode}: {error}")
        same = digest(folder) == wanted
        return Story(start, tuple(killed_at), len(entries), "" if same else "other weights")
    return Story(MOST_KILLS + 1, tuple(killed_at), len(entries), "it never ended")


def kill_rank(folder: Path, wanted: str, stage: str, processes: int) -> Story:
    """One run of several processes, of which one is killed in the middle of a stage."""
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
    same = digest(folder) == wanted
    problem = f"done again: {again}" if again else "" if same else "other weights"
    return Story(2, (), len(entries), problem and f"killed in {stage}: {problem}")


def fill(folder: Path, wanted: str, alone: float, moments: random.Random) -> Story:
    """One run whose disk is full from a random moment on, until it has stopped; then there is room again."""
    with small_disk(folder) as disk:
        process = started(disk / "out")
        time.sleep(moments.uniform(0.3, 0.9) * alone)
        ballast = disk / "ballast"
        with ballast.open("wb", buffering=0) as file, suppress(OSError):  # once it is full
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
        same = digest(disk / "out") == wanted
        return Story(2, (), len(before), f"done again: {again}" if again else "" if same else "other weights")


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system in memory of `FULL_BYTES`."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={FULL_BYTES}", "dcvit", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def compress_digits(out: Path, kept: Path) -> int:
    """What is killed. Exit code 2, and the reason on standard error, if it cannot go on."""
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
    """The run, with one thread for each process."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--max-restarts=1"]
    return subprocess.Popen(
        [sys.executable, *(launcher if processes > 1 else []), "-m", "benchmarks", "kills", "--child", str(folder),
         str(run_dir(folder))],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run_dir(folder: Path) -> Path:
    """Where a run keeps its units."""
    return folder.with_name(f"{folder.name}.run")


def stage_file(folder: Path) -> Path:
    """Where a run notes the stage that it has come to."""
    return folder.with_name(f"{folder.name}.stage")


def finish(folder: Path, processes: int = 1) -> tuple[int, str]:
    """Run it to its end: exit code, and what it said."""
    process = started(folder, processes)
    _, error = process.communicate()
    return process.returncode, error


def finished(folder: Path) -> Entries:
    """The units that are there."""
    entries = run_dir(folder) / "units"
    return {path.name: ((stat := path.stat()).st_ino, stat.st_mtime_ns) for path in entries.glob("*.json")}


def digest(folder: Path) -> str:
    """Of a saved model's weights."""
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
