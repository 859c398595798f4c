"""Compiles the bodies of `csrc/cuda` for the CPU, where `matrix.py` tests them under the name "host".

`csrc/cuda/_host_shim.h` stands in for CUDA. The library is built with the host's C++ compiler into
`build/cuda_host/<hash of what goes into it>`, and only when that changed.
"""

import functools
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

_ROOT = Path(__file__).parents[2]
_SOURCES = _ROOT / "csrc" / "cuda"
_TORCH = Path(torch.__file__).parent
# Optimised, or the emulation takes minutes; without _FORTIFY_SOURCE, whose longjmp refuses to switch between fibers.
_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DDCVIT_HOST")
_SANITIZE = os.environ.get("DCVIT_SANITIZE")  # as for setup.py
_SANITIZER_FLAGS = (f"-fsanitize={_SANITIZE}", "-fno-sanitize-recover=all") if _SANITIZE else ()
if _SANITIZE:
    _FLAGS += (*_SANITIZER_FLAGS, "-g", "-fno-omit-frame-pointer")


@functools.cache
def load() -> str | None:
    """Register the kernels on the overloads `.host`; return why that is impossible, or `None`."""
    if torch.__version__ < (2, 10):
        return f"csrc/cuda needs the stable ABI of torch 2.10 or newer, and this is torch {torch.__version__}"
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "no C++ compiler (install g++)"
    library, error = _build(compiler)
    if error is not None:
        return error
    torch.ops.load_library(library)
    return None


def _build(compiler: str) -> tuple[Path, str | None]:
    sources = sorted([*_SOURCES.glob("*.cu"), *_SOURCES.glob("*.cpp")])
    inputs = [*sources, *sorted(_SOURCES.glob("*.h")), *sorted(_SOURCES.parent.glob("*.h"))]
    digest = hashlib.sha256("\0".join([compiler, torch.__version__, *_FLAGS]).encode())
    for file in inputs:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    folder = _ROOT / "build" / "cuda_host" / digest.hexdigest()[:16]
    library = folder / "host.so"
    if library.is_file():
        return library, None
    folder.mkdir(parents=True, exist_ok=True)

    def run(*arguments: str | Path) -> None:
        done = subprocess.run([compiler, *map(str, arguments)], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"csrc/cuda does not compile for the host:\n{done.stderr}")

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        run(*_FLAGS, f"-isystem{_TORCH / 'include'}", "-x", "c++", "-c", source, "-o", target)
        return target

    # What does not compile is an error, and no reason to skip.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compile_one, sources))
    partial = folder / f"host.{os.getpid()}.so"
    run("-shared", *_SANITIZER_FLAGS, *objects, f"-L{_TORCH / 'lib'}", "-ltorch_cpu", "-o", partial)
    partial.replace(library)  # at once, because another process may build the same
    return library, None
