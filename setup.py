"""Builds `dcvit/_C.abi3.so`, the compiled kernels of `csrc/`. All else stands in pyproject.toml.

A machine without torch, a compiler or CUDA still gets a working package: what could not be built and why is printed,
and kept in `dcvit/_C.json`, from which `dcvit info` tells it (pip shows the output of a build only with --verbose).
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    torch = cpp_extension = None

CSRC = Path(__file__).parent / "csrc"
STABLE = (2, 10)
"""The oldest torch whose stable ABI has all that csrc/ uses; a build against a newer one serves it too.

For an older torch the CPU kernels are built on ATen, as `csrc/cpu/torch.h` tells, and serve no other torch.
"""
ATEN = torch is not None and torch.__version__ < STABLE
TARGET = f"-DTORCH_TARGET_VERSION=0x{STABLE[0]:02x}{STABLE[1]:02x}000000000000"
SANITIZE = os.environ.get("DCVIT_SANITIZE")
"""Sanitizers for the CPU kernels, for example "address,undefined"; `make check-native` sets it."""
SANITIZER_FLAGS = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all"] if SANITIZE else []
CXX_FLAGS = [
    *(["-O1", "-g", "-fno-omit-frame-pointer", "-fno-wrapv", *SANITIZER_FLAGS] if SANITIZE else ["-O3", "-g0"]),
    "-fvisibility=hidden",
    "-fno-math-errno",  # sqrt and selections become vector instructions; no result changes
    "-fno-trapping-math",
    "-DDCVIT_ATEN" if ATEN else TARGET,
]
NVCC_FLAGS = ["-O3", "-lineinfo", TARGET, "-Xcompiler", "-fvisibility=hidden"]
AGAIN = "pip install --no-build-isolation --force-reinstall --no-deps ."


def problem() -> str | None:
    """Say why nothing can be compiled in this environment, if nothing can."""
    if not sources("cpu"):
        return "this copy of the sources lacks csrc/; take a complete one"
    if torch is None:
        return f"there was no torch to build against; install torch, setuptools, wheel and ninja, then run {AGAIN}"
    if shutil.which(compiler()[0]) is None:
        return f"no C++ compiler was found ({compiler()[0]}); install g++ or set CXX, then run {AGAIN}"
    return None


def compiler() -> list[str]:
    """The C++ compiler, which may have a launcher before it."""
    return shlex.split(os.environ.get("CXX", "c++"))


def openmp_flags() -> list[str]:
    """What ATen's headers need for loops on torch's threads; without it they run on one.

    What gcc makes of it calls the OpenMP runtime that torch brings, so nothing is linked. Other compilers would bring a
    runtime of its own, whose threads are not torch's.
    """
    if not ATEN or sys.platform != "linux":
        return []
    told = subprocess.run([*compiler(), "--version"], capture_output=True, text=True, check=False).stdout
    return ["-fopenmp"] if "Free Software Foundation" in told else []


def cuda_home() -> Path | None:
    """The CUDA toolkit that holds nvcc, which on the PATH may be a wrapper script."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            return Path(os.environ[variable])
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        # What nvcc would run tells where it lies; it prints that to stderr.
        with contextlib.suppress(OSError):  # one for another processor, for example
            command = [nvcc, "--dryrun", "-x", "cu", os.devnull]
            told = subprocess.run(command, capture_output=True, text=True, check=False)
            if found := re.search(r"^#\$ TOP=(.+)$", told.stderr, re.MULTILINE):
                return Path(found[1]).resolve()
    return next((home for home in [Path("/usr/local/cuda")] if (home / "bin" / "nvcc").is_file()), None)


def cuda_problem(home: Path | None) -> str | None:
    """Say why the CUDA kernels cannot be compiled, if they cannot."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA; install one with CUDA, then run {AGAIN}"
    if ATEN:
        oldest = ".".join(map(str, STABLE))
        return (
            f"torch {torch.__version__} lacks parts of the stable ABI that CUDA kernels need; "
            f"install torch {oldest} or newer, then run {AGAIN}"
        )
    if home is None or not (home / "bin" / "nvcc").is_file():
        return f"no nvcc was found; install the CUDA toolkit {torch.version.cuda} or set CUDA_HOME, then run {AGAIN}"
    return None


def arch_flags(nvcc: Path) -> list[str]:
    """Flags for sm_80, sm_90 and the newest that nvcc knows, with PTX for later ones.

    With TORCH_CUDA_ARCH_LIST there are none: torch makes them from it.
    """
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return []
    told = subprocess.run([str(nvcc), "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = sorted({int(number) for number in re.findall(r"^compute_(\d+)$", told, re.MULTILINE)})
    newest = known[-1]
    archs = sorted({80, 90, newest} & set(known))
    return [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs] + [
        f"-gencode=arch=compute_{newest},code=compute_{newest}"
    ]


def sources(folder: str) -> list[str]:
    """Files to compile, relative to the project as setuptools wants them."""
    return sorted(
        str(file.relative_to(CSRC.parent)) for pattern in ("*.cpp", "*.cu") for file in (CSRC / folder).glob(pattern)
    )


def extension(home: Path | None) -> Extension:
    """`dcvit._C`, with the CUDA kernels if there is a toolkit."""
    if home is None:
        return cpp_extension.CppExtension(
            "dcvit._C",
            sources("cpu"),
            extra_compile_args={"cxx": [*CXX_FLAGS, *openmp_flags()]},
            extra_link_args=SANITIZER_FLAGS,
            py_limited_api=True,
        )
    cpp_extension.CUDA_HOME = str(home)  # torch asks where the first nvcc on the PATH lies
    flags = {
        "cxx": [*CXX_FLAGS, "-DUSE_CUDA"],
        "nvcc": [*NVCC_FLAGS, "-DUSE_CUDA", *arch_flags(home / "bin" / "nvcc")],
    }
    return cpp_extension.CUDAExtension(
        "dcvit._C", sources("cpu") + sources("cuda"), extra_compile_args=flags, py_limited_api=True
    )


class BuildKernels(build_ext if cpp_extension is None else cpp_extension.BuildExtension):
    """Builds what can be built, and keeps what could not be and why."""

    def run(self) -> None:
        version = None if torch is None else torch.__version__
        note = {"torch": version, "only": version if ATEN else None, "cpu": problem(), "cuda": None}
        if os.environ.get("DCVIT_CUDA") == "0":
            note["cuda"] = f"DCVIT_CUDA=0 left them out; unset it, then run {AGAIN}"
        elif note["cpu"] is None and sources("cuda"):
            home = cuda_home()
            note["cuda"] = cuda_problem(home) or self.attempt(home)
        if note["cpu"] is None and (note["cuda"] is not None or not sources("cuda")):
            note["cpu"] = self.attempt(None)

        package = Path(self.get_ext_fullpath("dcvit._C")).parent
        package.mkdir(parents=True, exist_ok=True)
        if note["cpu"] is not None:
            note["cuda"] = None
            for stale in package.glob("_C.*so"):
                stale.unlink()
        (package / "_C.json").write_text(json.dumps(note, indent=2) + "\n")
        for kernels, missing in (("compiled kernels", note["cpu"]), ("CUDA kernels", note["cuda"])):
            if missing is not None:
                print(f"dcvit is installed without its {kernels}: {missing}.", file=sys.stderr)

    def attempt(self, home: Path | None) -> str | None:
        """Compile, and say why that failed if it did."""
        before = self.compiler, self.inplace
        try:
            made = vars(extension(home))
            vars(self.extensions[0]).update({name: value for name, value in made.items() if not name.startswith("_")})
            super().run()
        except Exception as error:
            self.compiler, self.inplace = before
            cause = str(error).strip().splitlines() or [type(error).__name__]
            return f"compiling failed ({cause[0]}); the compiler's messages stand in the output of {AGAIN} --verbose"
        return None


setup(
    ext_modules=[Extension("dcvit._C", [], py_limited_api=True, optional=True)],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
