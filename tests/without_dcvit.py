"""Runs code as where dcvit is not installed: in a process of its own, in which importing it fails."""

import subprocess
import sys
from pathlib import Path

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


def run_without(code: str, folder: Path, *blocked: str) -> str:
    """What code prints where some packages cannot be imported.

    Args:
        code: Python.
        folder: Where it runs.
        blocked: More packages than dcvit.
    """
    script = folder / "script.py"
    script.write_text(BLOCKED.format(blocked=("dcvit", *blocked)) + code)
    # -I: neither the current folder nor PYTHONPATH is searched.
    finished = subprocess.run(
        [sys.executable, "-I", "-W", "error", str(script)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout
