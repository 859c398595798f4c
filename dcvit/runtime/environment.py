"""The machine and the versions of a run."""

import platform
from importlib import metadata
from pathlib import Path

import torch

from dcvit._version import __version__

__all__ = ["device_name", "versions"]


def device_name(device: torch.device) -> str:
    """Return the name of a device: the model of a GPU or CPU, else the device's type."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def versions() -> dict[str, str]:
    """Return the versions of dcvit, Python and the libraries that compute."""
    return {
        "dcvit": __version__,
        "torch": torch.__version__,
        "timm": metadata.version("timm"),
        "numpy": metadata.version("numpy"),
        "python": platform.python_version(),
    }
