"""Runs code as where dcvit is not installed: in a process of its own, in which importing it fails."""

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
    # -I: neither the current folder nor PYTHONPATH is searched.
    finished = subprocess.run(
        [sys.executable, "-I", "-W", "error", str(script)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout
