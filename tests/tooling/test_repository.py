"""What CONTRIBUTING promises of the whole: places, variables, commands."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

import dcvit

ROOT = Path(__file__).parents[2]
MODULES = sorted(path for path in (ROOT / "dcvit").rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Names of the modules that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "dcvit":
                found |= {f"dcvit.{alias.name}" for alias in node.names}
    return found


def part(path: Path) -> str:
    relative = path.relative_to(ROOT / "dcvit")
    return relative.parts[0].removesuffix(".py")


def test_every_package_is_installed() -> None:
    listed = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert listed is not None
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "dcvit").rglob("__init__.py")}
    assert set(re.findall(r'"([\w.]+)"', listed[1])) == found | {"dcvit.kernels"}


def test_only_models_knows_timm() -> None:
    for path in MODULES:
        if any(name.split(".")[0] == "timm" for name in imports(path)):
            assert part(path) == "models", path


def test_the_algorithm_names_no_device() -> None:
    for path in MODULES:
        assert ".cuda()" not in path.read_text(), path


def test_every_environment_variable_is_in_the_table() -> None:
    table = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE))
    used: set[str] = set()
    for folder in ("dcvit", "kernels", "benchmarks", "tests", "csrc", "."):
        for path in (ROOT / folder).glob("*" if folder == "." else "**/*"):
            if path.suffix in (".py", ".cpp", ".cu", ".h") and path != Path(__file__):
                text = path.read_text()
                used |= set(re.findall(r"(?:environ\.get\(|environ\[|getenv\()\s*\"(\w+)\"", text))
    used |= set(re.findall(r"^\t(\w+)=", (ROOT / "Makefile").read_text(), re.MULTILINE))
    ours = {name for name in used if name.startswith("DCVIT_")}
    assert ours == table


def test_readme_names_what_there_is() -> None:
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    first, second = re.findall(r"```sh\n(.+?)\n```", readme, re.DOTALL)[:2]
    assert (first, second) == ("make demo", "make test")
    for target in ("demo", "test", "test-gpu", "check", "fix", "bench", "install"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    for name in re.findall(r"dcvit\.(\w+)\(", readme):
        assert hasattr(dcvit, name), name


def test_changelog_has_the_version_or_is_unreleased() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in changelog or f"## [{dcvit.__version__}]" in changelog


@pytest.mark.parametrize("name", dcvit.__all__)
def test_public_things_are_documented(name: str) -> None:
    thing = getattr(dcvit, name)
    if name != "__version__":
        assert (thing.__doc__ or "").strip(), name


def test_tracked_files_name_no_machine() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    marks = ("/" + "root/", "/" + "home/", "/" + "Users/")
    for name in listed.stdout.split():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".cpp", ".cu", ".h", ".json") and path.is_file():
            assert not any(mark in path.read_text() for mark in marks), name


def test_make_without_arguments_lists_the_targets() -> None:
    done = subprocess.run(["make", "-n"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("demo", "test", "check", "install"):
        assert f'echo "{target} ' in done.stdout
