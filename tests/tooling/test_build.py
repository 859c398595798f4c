"""What `setup.py` does on machines that lack something: the package must install, and say what it lacks.

Each test builds a small copy of the project, in which csrc/ is one op, into a wheel.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
KERNEL = """
#include "torch.h"
int64_t probe(int64_t x) { return 2 * x; }
DCVIT_LIBRARY_IMPL(dcvit_build_test, CompositeExplicitAutograd, m) { m.impl("probe", DCVIT_KERNEL(&probe)); }
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The files of a build, with one small kernel."""
    copy = tmp_path / "project"
    (copy / "csrc" / "cpu").mkdir(parents=True)
    (copy / "csrc" / "cpu" / "probe.cpp").write_text(KERNEL)
    shutil.copy(ROOT / "csrc" / "cpu" / "torch.h", copy / "csrc" / "cpu")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("dcvit", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    return copy


def build(project: Path, *, blocked: str | None = None, **environment: str) -> tuple[zipfile.ZipFile, str]:
    """The wheel and what was printed; `blocked` is a module that cannot be imported."""
    variables = {"MAX_JOBS": "1"} | {
        name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH", "PYTHONPATH")
    }
    if blocked is not None:
        modules = project.parent / "blocked"
        modules.mkdir(exist_ok=True)
        (modules / f"{blocked}.py").write_text(f"raise ImportError('no {blocked} here')")
        variables["PYTHONPATH"] = str(modules)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", "wheel"],
        cwd=project, env=variables | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (wheel,) = (project / "wheel").glob("*.whl")
    return zipfile.ZipFile(wheel), done.stderr


def note(wheel: zipfile.ZipFile) -> dict[str, str | None]:
    return json.loads(wheel.read("dcvit/_C.json"))


def sentence(kernels: str, printed: str) -> str:
    (line,) = [line for line in printed.splitlines() if line.startswith(f"dcvit is installed without its {kernels}: ")]
    return line


@pytest.mark.native
@pytest.mark.slow
def test_one_file_for_every_python(project: Path, tmp_path: Path) -> None:
    wheel, printed = build(project)
    assert "dcvit is installed without" not in printed
    assert wheel.filename is not None
    assert "-cp310-abi3-" in wheel.filename
    (extension,) = [name for name in wheel.namelist() if name.endswith(".so")]
    assert extension == "dcvit/_C.abi3.so"
    assert note(wheel)["cpu"] is None
    assert note(wheel)["only"] == (torch.__version__ if torch.__version__ < (2, 10) else None)
    wheel.extract(extension, tmp_path)
    code = f"""
import torch
library = torch.library.Library("dcvit_build_test", "DEF")
library.define("probe(int x) -> int")
torch.ops.load_library({extension!r})
print(torch.ops.dcvit_build_test.probe(21))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "42\n"


@pytest.mark.slow
def test_without_torch(project: Path) -> None:
    wheel, printed = build(project, blocked="torch")
    assert not [name for name in wheel.namelist() if name.endswith(".so")]
    assert "no torch to build against" in sentence("compiled kernels", printed)
    assert "pip install --no-build-isolation" in str(note(wheel)["cpu"])


@pytest.mark.slow
def test_without_a_compiler(project: Path) -> None:
    wheel, printed = build(project, CXX="no-such-compiler")
    assert not [name for name in wheel.namelist() if name.endswith(".so")]
    assert "no C++ compiler was found (no-such-compiler)" in sentence("compiled kernels", printed)
    assert "install g++ or set CXX" in str(note(wheel)["cpu"])


@pytest.mark.native
@pytest.mark.slow
def test_sources_that_do_not_compile(project: Path) -> None:
    (project / "csrc" / "cpu" / "probe.cpp").write_text("this is no C++")
    wheel, printed = build(project)
    assert not [name for name in wheel.namelist() if name.endswith(".so")]
    assert "compiling failed" in sentence("compiled kernels", printed)


def test_an_extension_that_can_no_longer_be_built_does_not_stay(project: Path) -> None:
    stale = project / "dcvit" / "_C.abi3.so"
    stale.write_text("of an older build")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=project, env=os.environ | {"CXX": "no-such-compiler"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not stale.exists()
    assert json.loads((project / "dcvit" / "_C.json").read_text())["cpu"] is not None


@pytest.mark.native
@pytest.mark.slow
def test_cuda_sources_without_a_toolkit(project: Path) -> None:
    (project / "csrc" / "cuda").mkdir()
    (project / "csrc" / "cuda" / "probe.cu").write_text("not compiled here")
    (project / "no-toolkit").mkdir()
    wheel, printed = build(project, CUDA_HOME=str(project / "no-toolkit"))
    assert [name for name in wheel.namelist() if name.endswith(".so")], "the CPU kernels are built all the same"
    assert note(wheel)["cpu"] is None
    said = sentence("CUDA kernels", printed)
    reasons = ("no nvcc was found", "is a build without CUDA", "install torch 2.10 or newer")
    assert any(reason in said for reason in reasons)


@pytest.mark.native
@pytest.mark.slow
@pytest.mark.parametrize(
    ("nvcc", "told"), [("#!/bin/sh\nexit 127\n", "CUDA_HOME"), ("\x7fELF of another processor", "PATH")]
)
def test_a_toolkit_that_does_not_run(project: Path, nvcc: str, told: str) -> None:
    (project / "csrc" / "cuda").mkdir()
    (project / "csrc" / "cuda" / "probe.cu").write_text("not compiled here")
    found = project / "toolkit" / "bin" / "nvcc"
    found.parent.mkdir(parents=True)
    found.write_text(nvcc)
    found.chmod(0o755)
    variables = {
        "CUDA_HOME": str(project / "toolkit"),
        "PATH": f"{found.parent}{os.pathsep}{os.environ['PATH']}",
    }
    wheel, printed = build(project, **{told: variables[told]})
    assert [name for name in wheel.namelist() if name.endswith(".so")], "the CPU kernels are built all the same"
    assert note(wheel)["cpu"] is None
    assert sentence("CUDA kernels", printed)


@pytest.mark.slow
def test_a_source_distribution_is_complete(project: Path) -> None:
    """A wheel that is made from it has the same kernels."""
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", "dist"]
    subprocess.run(command, cwd=project, capture_output=True, text=True, check=True)
    (archive,) = (project / "dist").glob("*.tar.gz")
    shutil.unpack_archive(archive, project.parent / "unpacked", filter="data")
    (unpacked,) = (project.parent / "unpacked").iterdir()
    for name in ("csrc", "kernels", "dcvit"):
        wanted = [file for file in (project / name).rglob("*") if file.suffix in (".py", ".cpp", ".h")]
        assert wanted
        assert not [file for file in wanted if not (unpacked / file.relative_to(project)).is_file()]
    shutil.rmtree(unpacked / "csrc")
    _, printed = build(unpacked)
    assert "lacks csrc/" in sentence("compiled kernels", printed)


@pytest.mark.native
@pytest.mark.slow
def test_cuda_sources_that_do_not_compile(project: Path) -> None:
    (project / "csrc" / "cuda").mkdir()
    (project / "csrc" / "cuda" / "probe.cu").write_text("this is no CUDA")
    wheel, printed = build(project)
    assert [name for name in wheel.namelist() if name.endswith(".so")], "the CPU kernels are built all the same"
    assert note(wheel)["cpu"] is None
    assert sentence("CUDA kernels", printed)
