"""One op, one name, the same place everywhere."""

from pathlib import Path

import pytest

import dcvit.ops

ROOT = Path(__file__).parents[2]
OPS = sorted(set(dcvit.ops.__all__) - {"Impl", "availability"})


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_module_and_its_tests(op: str) -> None:
    assert (ROOT / "dcvit" / "ops" / f"{op}.py").is_file()
    assert (ROOT / "tests" / "ops" / f"test_{op}.py").is_file()


@pytest.mark.parametrize("folder", ["dcvit/ops", "csrc/cpu", "csrc/cuda", "kernels", "benchmarks/ops"])
def test_every_file_there_is_named_after_an_op(folder: str) -> None:
    files = [file for file in (ROOT / folder).glob("*") if file.suffix in (".py", ".cpp", ".cu")]
    strangers = [file.name for file in files if file.stem not in OPS and not file.stem.startswith("_")]
    assert not strangers, f"{folder}: {strangers} name no op of {OPS}; helpers start with an underscore or are headers"
