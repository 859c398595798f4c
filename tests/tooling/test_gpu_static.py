"""The static report on the GPU kernels, of which one kernel of each op is compiled here."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.8", reason="the report is on what Triton 3.8 or newer compiles")

from benchmarks import gpu_static
from benchmarks.gpu_static import Code, Row, Work, judge, read_opcodes

ROOT = Path(__file__).parents[2]
KERNELS = {
    "distillation_loss": "distillation_loss_fwd_kernel",
    "tv_prior": "tv_prior_bwd_kernel",
    "synthesis_step": "synthesis_step_fwd_kernel",
    "dropped_mlp": "dropped_mlp_output_fwd_kernel",
}


COMPILE = f"""
from benchmarks import gpu_static

wanted = {KERNELS!r}
for case in gpu_static.cases():
    if case.eager is None or case.op not in wanted:
        continue
    with gpu_static.recorded(case.title, True) as launches:
        case.launch()
    launch = next(launch for launch in launches if launch.name == wanted[case.op])
    del wanted[case.op]
    for arch in (80, 90):
        row = gpu_static.row_of(launch, gpu_static.compile_triton(launch, arch))
        problems = gpu_static.judge(row)
        assert not problems, problems
        print("COMPILED", row.code.name, row.code.registers, row.code.load, row.code.store)
    if case.op == "synthesis_step":
        print(gpu_static.compiled(launch, 90).asm["ttir"])
assert not wanted, wanted
"""


@pytest.fixture(scope="module")
def compiled() -> list[str]:
    """What a process says that compiles a kernel of each op; in this one, kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_kernel_of_each_op_compiles_without_spills(compiled: list[str]) -> None:
    lines = [line.split()[1:] for line in compiled if line.startswith("COMPILED")]
    assert sorted(line[0] for line in lines) == sorted([*KERNELS.values()] * 2)
    for _, registers, load, store in lines:
        assert 16 <= int(registers) <= 255
        assert (int(load), int(store)) == (16, 16)


@pytest.mark.slow
def test_images_are_only_written_in_the_second_pass(compiled: list[str]) -> None:
    """Nothing orders a program's stores before its neighbours' loads on a GPU, so none may load what another stores.

    The moments are loaded and stored, but each element by the thread that owns it: no other pixel's are needed.
    """
    roots: dict[str, str] = {}
    accessed: dict[str, set[str]] = {"tt.load": set(), "tt.store": set()}
    for line in compiled:
        result, _, operation = line.strip().rpartition(" = ")
        operands = [word.strip(",:") for word in operation.split() if word.startswith("%")]
        if operation.startswith(("tt.addptr", "tt.splat", "tt.broadcast")):
            roots[result] = roots.get(operands[0], operands[0])
        for access, names in accessed.items():
            if operation.startswith(access):
                names.add(roots.get(operands[0], operands[0]))
    assert accessed["tt.store"] == {"%images", "%exp_avg", "%exp_avg_sq"}
    assert {"%snapshot", "%grad", "%exp_avg", "%exp_avg_sq", "%norms"} <= accessed["tt.load"]
    assert "%images" not in accessed["tt.load"]


GOOD = Row(
    Code("kernel", 90, threads=128, registers=64, shared=0, spills=0, load=16, store=16),
    work=Work(read=2**24, written=2**24, flops=1),
)


def test_a_good_kernel_passes() -> None:
    assert judge(GOOD) == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (replace(GOOD, code=replace(GOOD.code, spills=3)), "3 instructions spill registers"),
        (replace(GOOD, code=replace(GOOD.code, load=4)), "widest load is 4 bytes, expected 16"),
        (replace(GOOD, code=replace(GOOD.code, store=4)), "widest store is 4 bytes, expected 16"),
    ],
)
def test_a_bad_kernel_fails(row: Row, message: str) -> None:
    (problem,) = judge(row)
    assert message in problem
    assert problem.startswith("kernel ()")


def test_narrow_accesses_do_not_matter_where_little_is_moved_or_much_computed() -> None:
    narrow = replace(GOOD, code=replace(GOOD.code, load=4, store=4))
    assert judge(replace(narrow, work=Work(read=1000, written=1000, flops=1))) == []
    assert judge(replace(narrow, work=Work(read=2**24, written=2**24, flops=10**12))) == []


def test_machine_code_is_read() -> None:
    opcodes = ["LDG.E.128.CONSTANT", "LDG.E", "LDGSTS.E.BYPASS.LTC128B.64", "STG.E.U16", "FFMA"]
    code = read_opcodes("kernel", opcodes, 90, 128, 64, 0)
    assert (code.load, code.store, code.spills) == (16, 2, 0)
    code = read_opcodes("kernel", ["LDGSTS.E.BYPASS.LTC128B.64", "STL.64", "LDL"], 80, 128, 64, 0)
    assert (code.load, code.store, code.spills) == (8, 0, 2)


def test_occupancy() -> None:
    assert GOOD.code.occupancy == 0.5  # 65536 / (64 * 32) = 32 of 64 warps
    assert replace(GOOD.code, shared=100_000).occupancy == 2 * 4 / 64
    assert replace(GOOD.code, registers=16).occupancy == 1


def test_the_report_fails_on_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(
        gpu_static, "_report_triton", lambda *_: judge(replace(GOOD, code=replace(GOOD.code, spills=3)))
    )
    assert gpu_static.main(["--no-cuda"]) == 1
    assert "FAIL kernel () on sm_90: 3 instructions spill" in capsys.readouterr().out
    monkeypatch.setattr(gpu_static, "_report_triton", lambda *_: judge(GOOD))
    assert gpu_static.main(["--no-cuda"]) == 0


def test_interpreted_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="TRITON_INTERPRET=1 makes kernels that cannot be compiled"):
        gpu_static.main([])
