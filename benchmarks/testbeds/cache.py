"""The cache of what test beds train or download."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["cache_folder", "cached_tensors", "fingerprint", "writing"]


def cache_folder() -> Path:
    """Return `$DCVIT_CACHE`, or `dcvit/testbeds` in the user's cache folder. It may not exist yet."""
    if chosen := os.environ.get("DCVIT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dcvit" / "testbeds"


def fingerprint(*settings: object) -> str:
    """Return eight hex digits of the settings that made a file. In its name, they keep other settings from using it."""
    return sha256(repr(settings).encode()).hexdigest()[:8]


def cached_tensors(name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Load tensors from a safetensors file of the cache folder; make and save them first if it is missing."""
    path = cache_folder() / name
    if not path.is_file():
        with writing(path) as temporary:
            save_file(make(), temporary)
    return load_file(path)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write a file to. It is moved to `path` on success, and deleted on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        temporary = Path(folder) / path.name
        yield temporary
        temporary.chmod(0o644)  # safetensors makes files that only the owner can read
        temporary.replace(path)
