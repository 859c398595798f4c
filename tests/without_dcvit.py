"""Runs code as where dcvit is not installed: in a process of its own, in which importing it fails."""

import atexit
import functools
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCKED = """\
import sys

for name in {blocked!r}:
    sys.modules[name] = None
    try:
        __import__(name)
    except ImportError:
        pass
    else:
        raise SystemExit(f"{{name}} can be imported")
"""

STARTER = """\
import os, runpy, sys, traceback, warnings

import safetensors.torch, timm, torch

warnings.filterwarnings("ignore", "This process.*is multi-threaded", DeprecationWarning)  # NumPy's threads, which wait
for line in sys.stdin:
    script, status = line.rstrip("\\n"), 1
    child = os.fork()
    if not child:
        try:
            os.chdir(os.path.dirname(script))
            for descriptor, name in ((1, "printed"), (2, "errors")):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
            runpy.run_path(script, run_name="__main__")
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)  # an ordinary end takes a second to free what was imported
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Starts a process for each script that it receives, from a process that has already imported the slow packages."""


OUTPUT = """\
import timm, torch
from safetensors.torch import load_file, save_file
sys.path.insert(0, {name!r})
import modeling_dcvit
model = timm.create_model("local-dir:" + {name!r}, pretrained=True).eval()
with torch.no_grad():
    save_file({{"output": model(load_file("images")["images"])}}, "output")
"""


def output_without_dcvit(saved: Path, images: Tensor) -> Tensor:
    """What a saved model makes of images where dcvit cannot be imported.

    Args:
        saved: Its folder; images and output pass through files beside it.
        images: Normalised, `[B, C, H, W]`.
    """
    save_file({"images": images}, saved.parent / "images")
    run_without(OUTPUT.format(name=saved.name), saved.parent)
    return load_file(saved.parent / "output")["output"]


def run_without(code: str, folder: Path, *blocked: str) -> str:
    """What code prints where some packages cannot be imported.

    Args:
        code: Python.
        folder: Where it runs.
        blocked: More packages than dcvit.
    """
    script = folder / "script.py"
    script.write_text(BLOCKED.format(blocked=("dcvit", *blocked)) + code)
    if blocked:  # which the starter has imported
        command = [sys.executable, "-I", "-W", "error", str(script)]
        finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        status, printed, errors = finished.returncode, finished.stdout, finished.stderr
    else:
        status = _start(script)
        printed, errors = ((folder / name).read_text() for name in ("printed", "errors"))
    assert status == 0, errors
    return printed


def _start(script: Path) -> int:
    """The exit code of a script that the starter starts in its folder, where it writes `printed` and `errors`."""
    starter = _starter()
    assert starter.stdin is not None
    assert starter.stdout is not None
    print(script, file=starter.stdin, flush=True)
    return int(starter.stdout.readline())


@functools.cache
def _starter() -> subprocess.Popen[str]:
    # -I: neither the current folder nor PYTHONPATH is searched.
    command = [sys.executable, "-I", "-W", "error", "-c", STARTER]
    starter = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(starter.communicate)  # which ends it
    return starter
