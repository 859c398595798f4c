"""What is printed never ends a run, and an interrupt leaves nothing behind: processes as a shell starts them."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import dcvit
from dcvit.cli import COMMANDS, main
from dcvit.runtime import spill as stacks
from dcvit.runtime.distributed import on_devices
from dcvit.runtime.output import Lenient
from dcvit.runtime.spill import SpilledBuffer
from tests.conftest import slow_but

DCVIT = f"{sys.executable} -m dcvit"

EVERY_COMMAND = """
import contextlib, sys
from dcvit.cli import COMMANDS, main

for name in ("--help", "--version", *(f"{one.name} --help" for one in COMMANDS)):
    with contextlib.suppress(SystemExit):
        main(name.split())
assert main(["methods"]) == 0
assert main(["families"]) == 0
assert main(["info", "demo"]) == 0
assert main(["latency", "demo", "--runs", "2", "--warmup", "1", "--batch-size", "2"]) == 0
assert main(["report", "no\\u2026such\\u03b2folder"]) == 2
"""


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, timeout=120, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_every_command_speaks_to_streams_of_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="ascii") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    exec(EVERY_COMMAND)
    printed, error = (stream.buffer.getvalue() for stream in streams.values())
    assert printed.count(b"usage:") == len(COMMANDS) + 1
    assert b"such\\u03b2folder' is not a folder" in error


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
    ids=["ascii", "latin-1", "C"],
)
def test_every_command_speaks_to_every_terminal(environment: dict[str, str]) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", EVERY_COMMAND], capture_output=True, timeout=200, env={**os.environ, **environment},
        check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr.decode()
    assert b"Traceback" not in finished.stderr
    assert finished.stdout.count(b"usage:") == len(COMMANDS) + 1
    assert b"such\\u03b2folder' is not a folder" in finished.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize(("command", "end"), [("methods", ">/dev/full"), ("--help", ">&-")])
def test_standard_output_that_ends_is_one_sentence(command: str, end: str) -> None:
    finished = shell(f"{DCVIT} {command} {end}")
    error = finished.stderr.decode()
    assert finished.returncode == 1
    assert error.startswith("dcvit: error: standard output takes no more (")
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", slow_but(["methods", "--help"], "methods"))
def test_a_reader_that_closes_the_pipe_sees_no_error(command: str) -> None:
    finished = shell(f"{DCVIT} {command} | head -c 0")  # it does not wait for the first byte
    assert (finished.returncode, finished.stderr) == (1, b"")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("end", slow_but(["2>&-", "2>/dev/full"], "2>&-"))
def test_a_run_needs_no_standard_error(end: str) -> None:
    finished = shell(f"{DCVIT} latency demo --runs 2 --warmup 1 --batch-size 2 --json {end}")
    assert finished.returncode == 0
    assert len(json.loads(finished.stdout)["rows"]) == 1
    assert shell(f"{DCVIT} report nowhere {end}").returncode == 2


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_closed_descriptors_are_not_given_to_files(tmp_path: Path) -> None:
    """What a library prints would go to a file of the run's."""
    process = os.fork()
    if not process:
        try:
            signal.alarm(60)  # which ends it if it hangs
            os.closerange(0, 3)
            sys.stdin = sys.stdout = sys.stderr = None  # type: ignore[assignment]
            main(["methods"])
            (tmp_path / "n").write_text(str(os.open(tmp_path / "file", os.O_CREAT)))
        finally:
            os._exit(0)
    os.waitpid(process, 0)
    assert int((tmp_path / "n").read_text()) > 2


def test_a_closed_stream_takes_whatever_is_written() -> None:
    with open(os.devnull, "w", encoding="ascii") as stream:
        lenient = Lenient(stream)
        assert lenient.write("\N{HORIZONTAL ELLIPSIS}") == 1
        assert not lenient.failure
    lenient.write("more")
    lenient.flush()
    assert "closed" in lenient.failure
    assert not lenient.isatty()


# Temporary files.


@pytest.fixture
def _unwritable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The folder for temporary files is gone; as root, permissions would hinder nothing."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))


@pytest.mark.usefixtures("_unwritable")
def test_without_a_temporary_folder_the_sentence_says_what_to_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(stacks, "IN_MEMORY", 0)
    with pytest.raises(dcvit.DcvitError, match=r"gone' cannot hold .* set TMPDIR to a folder .* can be written"):
        SpilledBuffer([torch.zeros(2, 3)])
    with pytest.raises(dcvit.errors.DistributedError, match="Set TMPDIR to a folder that can be written"):
        on_devices(["cpu", "cpu"], print)


def test_without_descriptors_the_sentence_says_what_to_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(stacks, "IN_MEMORY", 0)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    stacked = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 8, before[1]))
        with pytest.raises(dcvit.DcvitError, match=r"Too many open files.*: allow more open files \(ulimit -n\)"):
            stacked.extend(SpilledBuffer([torch.zeros(2, 3)]) for _ in range(100))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.slow
def test_what_the_system_refuses_is_a_sentence_on_the_command_line(tmp_path: Path) -> None:
    finished = shell(f"{DCVIT} evaluate demo --data {'a' * 5000}")
    assert finished.returncode in (1, 2)
    assert b"Traceback" not in finished.stderr
    assert finished.stderr.startswith(b"dcvit: error: ")


# Interrupts.


def ends_within(group: int, seconds: float) -> bool:
    """Whether all processes of a group are gone by then; the system may take a moment to bury the last."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("whom", slow_but(["all", "first"], "first"))
def test_an_interrupt_stops_all_devices_and_leaves_nothing(whom: str, tmp_path: Path) -> None:
    """A terminal interrupts all processes of the command, `kill` the first alone."""
    (tmp_path / "temporary").mkdir()
    command = [
        sys.executable, "-m", "dcvit", "compress", "demo", "--data", "digits", "--num-images", "8", "--macs", "0.8",
        "--synthesis-iterations", "3", "--devices", "cpu,cpu", "--out", str(tmp_path / "out"),
    ]  # fmt: skip

    def interruptible() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell's background job has ignored

    started = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=interruptible,
        env={
            **os.environ,
            "TMPDIR": str(tmp_path / "temporary"),
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),  # which torch keeps from run to run
        },
    )  # fmt: skip
    try:
        entries = tmp_path / "out.run" / "units"
        while started.poll() is None and not list(entries.glob("*.json")):
            time.sleep(0.05)
        assert started.poll() is None
        os.killpg(started.pid, signal.SIGINT) if whom == "all" else started.send_signal(signal.SIGINT)
        _, error = started.communicate(timeout=60)
        assert started.returncode == 130
        assert "Traceback" not in error
        assert (
            f"dcvit: interrupted. The same command resumes from the checkpoints in {str(tmp_path / 'out.run')!r}."
            in error
        )
        assert ends_within(started.pid, 30.0)
        assert not list((tmp_path / "temporary").iterdir())
        assert not (tmp_path / "out").exists()
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)


@pytest.mark.slow
def test_the_caller_s_signal_handlers_are_given_back() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = [signal.getsignal(number) for number in numbers]
    on_devices(["cpu", "cpu"], print)
    assert [signal.getsignal(number) for number in numbers] == before
