"""Inspect the compiled GPU kernels without a GPU: `python -m benchmarks gpu-static`.

Every Triton kernel is compiled ahead of time as its launcher would launch it, in the configurations that
`dcvit/kernels/_configs.py` has for the shapes of `cases`. Every CUDA kernel of `csrc/cuda` is compiled too. The targets
are sm_80, sm_90 and the newest target of the compiler. The machine code shows the registers, the spills and the widest
memory accesses.

The launchers run on meta tensors, which have shapes but no data, and their launches are recorded instead of made. For
ViT-B with batch 64 the report adds the bytes that each kernel must move (every tensor once, and of gathered weights
only the kept part) and its floating-point operations. It also adds the least time that these take on an H100 SXM, by
its data sheet: 3.35 TB/s, 989 TFLOP/s in dense bfloat16 and 67 TFLOP/s in float32. The same is counted, operator by
operator, for the work that launchers leave to torch, such as matrix products, and for the eager implementation. These
times are bounds, not measurements.
"""

import argparse
import contextlib
import functools
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]

BANDWIDTH = 3.35e12
MATRIX_RATE = 989e12
VECTOR_RATE = 67e12

WIDE = 16
"""Bytes that a thread of a memory-bound kernel should load or store at once."""

SMALL = 2**20
"""Bytes below which the width of accesses does not matter: partial sums and vectors."""

HALF = (torch.float16, torch.bfloat16)
TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64",
}  # fmt: skip


# --- launches --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel.

    Attributes:
        case: Title of the case that launched the kernel.
        function: The kernel.
        arguments: All arguments of the kernel by name.
        options: `num_warps` and `num_stages`, if the launcher sets them.
        counted: Whether bytes are reported for the case.
    """

    case: str
    function: Any
    arguments: dict[str, Any]
    options: dict[str, int]
    counted: bool

    @property
    def name(self) -> str:
        """The kernel's name."""
        name: str = self.function.__name__
        return name

    def specialisation(self) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
        """Return signature, constants and alignments, as Triton derives them from the arguments of a launch."""
        signature, constants, aligned = {}, {}, {}
        for i, parameter in enumerate(self.function.params):
            value = self.arguments[parameter.name]
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
                signature[parameter.name] = "constexpr"
                constants[(i,)] = value
            elif isinstance(value, Tensor):
                signature[parameter.name] = f"*{TYPES[value.dtype]}"
                aligned[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(value, int):
                signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0:
                    aligned[(i,)] = [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = parameter.annotation_type or "fp32"
        return signature, constants, aligned

    def key(self) -> str:
        """Return a key that is equal for launches of the same machine code."""
        return repr((self.name, *self.specialisation(), sorted(self.options.items())))

    @property
    def tiles(self) -> str:
        """The configuration as a short text."""
        blocks = [str(self.arguments[p.name]) for p in self.function.params if p.is_constexpr]
        return "x".join(blocks) + "".join(f" {key[4]}{value}" for key, value in self.options.items())


@contextlib.contextmanager
def recorded(case: str, counted: bool) -> Iterator[list[Launch]]:
    """Record launches instead of making them; yield the list of records."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def record(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = function.arg_names
        options = {key: value for key, value in kwargs.items() if key not in names}
        arguments = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
        launches.append(Launch(case, function, arguments, options, counted))

    original, JITFunction.run = JITFunction.run, record
    try:
        yield launches
    finally:
        JITFunction.run = original


@dataclass(frozen=True)
class Case:
    """A call of an op on meta tensors.

    Attributes:
        op: Name of the op.
        title: Sizes and dtype.
        launch: Function that calls the launchers.
        eager: Function that runs the eager implementation with its backward pass; `None` for a case that only tests
            a configuration.
    """

    op: str
    title: str
    launch: Callable[[], Any]
    eager: Callable[[], Any] | None = None


def cases() -> list[Case]:
    """Return the cases: ViT-B with batch 64, which is counted, and sizes that use the other configurations."""
    half, single = torch.bfloat16, torch.float32
    found = [
        *(_distil(c, 64, 197, 768, dtype, True) for c in (1, 6) for dtype in (half, single)),
        _prior(64, 224),
        _step(64, 224),
        *(_mlp(64 * 197, 768, 3072, k, dtype, True) for dtype in (half, single) for k in (1536, None)),
    ]
    for width in (192, 384, 1024, 1535):
        found += [_distil(2, 64, 257, width, dtype, False) for dtype in (half, single)]
    found += [_distil(1, 64, 197, 768, torch.float16, False), _mlp(64 * 197, 768, 3072, 1536, torch.float16, False)]
    for rows, width, kept in (
        (64 * 257, 192, 256),
        (64 * 257, 384, 768),
        (64 * 257, 1024, 3072),
        (64 * 257, 768, 1535),
        (16, 768, 768),
    ):
        found += [_mlp(rows, width, 4 * width, kept, dtype, False) for dtype in (half, single)]
    return found


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _kernels(op: str) -> Any:
    return importlib.import_module(f"dcvit.kernels.{op}")


def _op(name: str) -> Any:
    return importlib.import_module(f"dcvit.ops.{name}")


def _distil(c: int, b: int, n: int, d: int, dtype: torch.dtype, counted: bool) -> Case:
    student, teacher, losses = _meta(c, b, n, d, dtype=dtype), _meta(b, n, d, dtype=dtype), _meta(c)

    def launch() -> None:
        kernels = _kernels("distillation_loss")
        kernels.distillation_loss(student, teacher, None, True)
        if not counted:
            kernels.distillation_loss(student, teacher, _meta(n), False)
            kernels.distillation_loss_rescale(student, losses)
            kernels.distillation_loss_backward(losses, student, teacher, None)

    def eager() -> None:
        leaf = student.clone().requires_grad_()
        with counting():
            _op("distillation_loss").eager(leaf, teacher, None).sum().backward()

    title = f"[{c}, {b}, {n}, {d}] {_short(dtype)}, loss and gradient"
    return Case("distillation_loss", title, launch, eager if counted else None)


def _prior(b: int, size: int) -> Case:
    images = _meta(b, 3, size, size)

    def launch() -> None:
        kernels = _kernels("tv_prior")
        value, norms, image_norms = kernels.tv_prior(images, 0.6, 1e-4, 1e-5)
        kernels.tv_prior_backward(value, images, norms, image_norms, 0.6, 1e-4, 1e-5)

    def eager() -> None:
        leaf = images.clone().requires_grad_()
        with counting():
            _op("tv_prior").eager(leaf, 0.6, 1e-4, 1e-5).backward()

    return Case("tv_prior", f"[{b}, 3, {size}, {size}] fp32, value and gradient", launch, eager)


def _step(b: int, size: int) -> Case:
    images = [_meta(b, 3, size, size) for _ in range(4)]
    settings = (3, 0.25, 0.5, 0.9, 1e-8, 0.6, 1e-4, 1e-5, _meta(3), _meta(3))

    def eager() -> None:
        with torch.no_grad(), counting():
            _op("synthesis_step").eager(*images, *settings)

    def launch() -> None:
        _kernels("synthesis_step").synthesis_step(*images, *settings)

    return Case("synthesis_step", f"[{b}, 3, {size}, {size}] fp32", launch, eager)


def _mlp(rows: int, width: int, hidden: int, kept: int | None, dtype: torch.dtype, counted: bool) -> Case:
    make = functools.partial(_meta, dtype=dtype)
    x, w1, b1, w2, b2 = make(rows, width), make(hidden, width), make(hidden), make(width, hidden), make(width)
    idx = None if kept is None else _meta(kept, dtype=torch.int64)
    nw, nb, scale = make(width), make(width), make(width)

    def launch() -> None:
        kernels = _kernels("dropped_mlp")
        y, pre, stats = kernels.dropped_mlp(x, w1, b1, w2, b2, idx, nw, nb, 1e-6, scale, True, True)
        kernels.dropped_mlp_backward(y, x, w1, w2, b2, idx, nw, nb, scale, True, pre, stats, 255)

    def eager() -> None:
        leaves = [t.clone().requires_grad_() for t in (x, w1, b1, w2, b2, nw, nb, scale)]
        with counting():
            y = _op("dropped_mlp").eager(*leaves[:5], idx, *leaves[5:7], 1e-6, leaves[7], True)
            torch.autograd.grad(y, leaves, x)

    units = f"{hidden} hidden units" if kept is None else f"{kept} of {hidden} hidden units"
    title = f"[{rows}, {width}], {units}, {_short(dtype)}, forward and backward"
    return Case("dropped_mlp", title, launch, eager if counted else None)


def _short(dtype: torch.dtype) -> str:
    return TYPES[dtype]


# --- bytes and operations --------------------------------------------------------------------------------------------

WRITTEN = {
    "distillation_loss_fwd_kernel": ("partial", "unit"),
    "distillation_loss_mean_kernel": ("losses",),
    "distillation_loss_bwd_kernel": ("gradient",),
    "distillation_loss_rescale_kernel": ("unit",),
    "tv_prior_fwd_kernel": ("partial", "snapshot"),
    "tv_prior_norms_kernel": ("value", "norms", "image_norms"),
    "tv_prior_bwd_kernel": ("gradient",),
    "synthesis_step_fwd_kernel": ("images", "exp_avg", "exp_avg_sq"),
    "dropped_mlp_norm_fwd_kernel": ("stats", "h"),
    "dropped_mlp_gelu_fwd_kernel": ("activation",),
    "dropped_mlp_output_fwd_kernel": ("y",),
    "dropped_mlp_hidden_bwd_kernel": ("grad_pre", "activation", "partial"),
    "dropped_mlp_norm_bwd_kernel": ("grad_x", "partial"),
}
"""Arguments that each kernel writes. A kernel that is missing here fails the report."""

READ_AND_WRITTEN = {
    "distillation_loss_rescale_kernel": ("unit",),
    "synthesis_step_fwd_kernel": ("exp_avg", "exp_avg_sq"),
}

ROW_LENGTHS = ("width", "kept", "out")

OPERATIONS = {
    "distillation_loss_fwd_kernel": ("student", 5),
    "distillation_loss_bwd_kernel": ("student", 3),
    "distillation_loss_rescale_kernel": ("unit", 1),
    "tv_prior_fwd_kernel": ("images", 14),
    "tv_prior_bwd_kernel": ("images", 22),
    "synthesis_step_fwd_kernel": ("images", 36),
    "dropped_mlp_norm_fwd_kernel": ("x", 8),
    "dropped_mlp_gelu_fwd_kernel": ("pre", 20),
    "dropped_mlp_output_fwd_kernel": ("z", 3),
    "dropped_mlp_hidden_bwd_kernel": ("pre", 40),
    "dropped_mlp_norm_bwd_kernel": ("x", 14),
}
"""Operations for each element of the named argument. The other kernels only add a few partial sums."""


@dataclass(frozen=True)
class Work:
    """The least work of a kernel.

    Attributes:
        read: Bytes that are read.
        written: Bytes that are written.
        flops: Floating-point operations.
    """

    read: int
    written: int
    flops: int

    @property
    def bound_by_memory(self) -> bool:
        """Whether the bytes take longer than the operations."""
        return (self.read + self.written) / BANDWIDTH >= self.flops / VECTOR_RATE

    @property
    def seconds(self) -> float:
        """Time on an H100 at its published rates."""
        return max((self.read + self.written) / BANDWIDTH, self.flops / VECTOR_RATE)


def work_of(launch: Launch) -> Work:
    """Count the least work of a launch."""
    arguments, written = launch.arguments, WRITTEN[launch.name]
    size = {name: value.nbytes for name, value in arguments.items() if isinstance(value, Tensor)}
    again = READ_AND_WRITTEN.get(launch.name, ())
    name, operations = OPERATIONS.get(launch.name, ("partial", 1))
    return Work(
        read=sum(n for name, n in size.items() if name not in written or name in again),
        written=sum(n for name, n in size.items() if name in written),
        flops=operations * arguments[name].numel(),
    )


class _OperatorCounter(TorchDispatchMode):
    """A mode that adds up the bytes, operations and times of torch's operators."""

    current: "_OperatorCounter | None" = None

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.flops = self.kernels = 0
        self.seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = func(*args, **(kwargs or {}))
        if func.is_view or func.namespace != "aten" or "empty" in func.name():
            return result
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        size = sum(prod(n for n, s in zip(t.shape, t.stride(), strict=True) if s) * t.element_size() for t in tensors)
        flops = counter.get_total_flops()
        half = any(t.dtype in HALF for t in tensors)
        self.bytes += size
        self.flops += flops
        self.kernels += 1
        self.seconds += max(size / BANDWIDTH, flops / (MATRIX_RATE if half else VECTOR_RATE))
        return result


@contextlib.contextmanager
def counting() -> Iterator[None]:
    """Count the operators that run in the context, if `count_eager` is running."""
    with _OperatorCounter.current or contextlib.nullcontext():
        yield


def count_eager(case: Case) -> _OperatorCounter:
    """Run a case's eager implementation on meta tensors and count its operators."""
    assert case.eager is not None
    _OperatorCounter.current = counter = _OperatorCounter()
    try:
        case.eager()
    finally:
        _OperatorCounter.current = None
    return counter


# --- machine code ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Code:
    """A compiled kernel.

    Attributes:
        name: Name of the kernel.
        arch: Compute capability, 90 for sm_90.
        threads: Threads per block, or their maximum if each launch chooses them; 0 if unknown.
        registers: Registers per thread.
        shared: Bytes of shared memory per block.
        spills: Number of instructions that access local memory.
        load: Widest load from global memory, in bytes; 0 if there is none.
        store: Widest store to global memory, in bytes; 0 if there is none.
    """

    name: str
    arch: int
    threads: int
    registers: int
    shared: int
    spills: int
    load: int
    store: int

    @property
    def occupancy(self) -> float:
        """The share of a multiprocessor's warps that can be resident."""
        if not self.threads:
            return float("nan")
        warps, blocks, shared = LIMITS.get(self.arch, LIMITS[max(LIMITS)])
        block_warps = -(-self.threads // 32)
        register_blocks = 65536 // (block_warps * (-(-self.registers * 32 // 256) * 256 or 256))
        shared_blocks = shared // (self.shared + 1024)  # 1 KiB is reserved for each block
        return min(blocks, warps // block_warps, register_blocks, shared_blocks) * block_warps / warps


LIMITS = {
    80: (64, 32, 164 * 1024), 86: (48, 16, 100 * 1024), 89: (48, 24, 100 * 1024), 90: (64, 32, 228 * 1024),
    100: (64, 32, 228 * 1024), 103: (64, 32, 228 * 1024), 120: (48, 24, 100 * 1024), 121: (48, 24, 100 * 1024),
}  # fmt: skip
"""Most warps, blocks and bytes of shared memory of a multiprocessor (CUDA programming guide, compute capabilities)."""


def read_code(cubin: Path, arch: int, *, threads: int = 0, shared: int = 0) -> list[Code]:
    """Disassemble the kernels of a cubin.

    Args:
        cubin: The file.
        arch: Compute capability for which it was compiled.
        threads: Threads per block; 0 if unknown.
        shared: Bytes of shared memory per block; 0 for what the kernel declares.
    """
    tools = _nvidia()
    environment = os.environ | {"PATH": f"{Path(tools.cuobjdump.path).parent}{os.pathsep}{os.environ['PATH']}"}
    usage, sass, elf = (
        subprocess.run(
            [tools.cuobjdump.path, flag, str(cubin)], capture_output=True, text=True, check=True, env=environment
        ).stdout
        for flag in ("-res-usage", "-sass", "-elf")
    )
    resources = {
        name: (int(registers), int(static))
        for name, registers, static in re.findall(
            r"Function (\S+):\s+REG:(\d+) STACK:\d+ SHARED:(\d+)", usage
        )
    }  # fmt: skip
    limits = dict(
        re.findall(r"^\.nv\.info\.(\S+)(?:(?!^\.)[\s\S])*?EIATTR_MAX_THREADS\n.*\n\s*Value:\s*(0x\w+)", elf, re.M)
    )
    found = []
    for part in re.split(r"\n\s*Function : ", sass)[1:]:
        name, _, body = part.partition("\n")
        opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", body)
        registers, static = resources[name.strip()]
        block = threads or int(limits.get(name.strip(), "0"), 16)
        found.append(read_opcodes(name.strip(), opcodes, arch, block, registers, shared or static))
    return found


def read_opcodes(
    name: str, opcodes: Sequence[str], arch: int, threads: int, registers: int, shared: int
) -> Code:  # fmt: skip
    """Summarise a kernel's instructions."""
    names = [opcode.split(".") for opcode in opcodes]
    return Code(
        name, arch, threads, registers, shared,
        spills=sum(parts[0] in ("LDL", "STL") for parts in names),
        load=max((_width(parts) for parts in names if parts[0] in ("LD", "LDG", "LDGSTS", "UBLKCP")), default=0),
        store=max((_width(parts) for parts in names if parts[0] in ("ST", "STG")), default=0),
    )  # fmt: skip


def _width(parts: list[str]) -> int:
    if parts[0] == "UBLKCP":
        return WIDE
    sizes = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1}
    return max((sizes[part] for part in parts[1:] if part in sizes), default=4)


def _nvidia() -> Any:
    from triton import knobs

    return knobs.nvidia


def newest_arch() -> int:
    """Return the highest compute capability that Triton's compiler supports."""
    text = subprocess.run([_nvidia().ptxas_blackwell.path, "--help"], capture_output=True, text=True, check=True).stdout
    return max(int(number) for number in re.findall(r"'sm_(\d+)'", text))


def compiled(launch: Launch, arch: int) -> Any:
    """Compile a launch ahead of time; return Triton's compiled kernel, with the code of every stage in `asm`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(launch.function, *launch.specialisation())
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


def compile_triton(launch: Launch, arch: int) -> Code:
    """Compile a launch and return its machine code's figures."""
    kernel = compiled(launch, arch)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        (code,) = read_code(cubin, arch, threads=32 * kernel.metadata.num_warps, shared=kernel.metadata.shared)
    return replace(code, name=launch.name)


def compile_cuda(source: Path, arch: int) -> list[Code]:
    """Compile the kernels of a file of `csrc/cuda` with the nvcc on the path.

    Raises:
        RuntimeError: If nvcc fails.
    """
    torch_headers = Path(torch.__file__).parent / "include"
    folders = (ROOT / "csrc", source.parent, torch_headers, torch_headers / "torch" / "csrc" / "api" / "include")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [
            "nvcc", "-cubin", f"-arch=sm_{arch}", "-std=c++20", "-O3", "--expt-relaxed-constexpr",
            *(f"-I{path}" for path in folders), str(source), "-o", str(cubin),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile for sm_{arch}:\n{done.stderr}")
        return [replace(code, name=_demangled(code.name)) for code in read_code(cubin, arch)]


def _demangled(name: str) -> str:
    """Return a kernel's name and template arguments, without namespaces and parameters."""
    if shutil.which("c++filt") is None:
        return name
    long = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    short = re.sub(r"\(anonymous namespace\)::|dcvit::|c10::|^void ", "", long)
    short = re.sub(r"\(\w+\)(\d+)", r"\1", short)
    return short.partition("(")[0]


# --- checks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A kernel of the report.

    Attributes:
        code: Figures of the machine code.
        tiles: The configuration.
        work: The least work of the kernel at the counted size; `None` if it is not counted.
        wide: Whether rows start at multiples of 16 bytes, which wide loads and stores require.
    """

    code: Code
    tiles: str = ""
    work: Work | None = None
    wide: bool = True


def row_of(launch: Launch, code: Code) -> Row:
    """Return the row of a compiled launch."""
    # Like here, Triton recognises aligned rows only if their length is a multiple of 16.
    aligned = all(launch.arguments.get(name, 0) % 16 == 0 for name in ROW_LENGTHS)
    work = work_of(launch) if launch.name in WRITTEN else None
    return Row(code, launch.tiles, work=work, wide=aligned)


def judge(row: Row) -> list[str]:
    """Check a kernel and return a description of each problem."""
    code, work = row.code, row.work
    where = f"{code.name} ({row.tiles}) on sm_{code.arch}"
    problems = []
    if code.spills:
        problems.append(f"{where}: {code.spills} instructions spill registers, expected none; take smaller tiles.")
    if work is not None and work.bound_by_memory:
        if work.read > SMALL and code.load < WIDE and row.wide:
            problems.append(f"{where}: memory bounds it, and its widest load is {code.load} bytes, expected {WIDE}.")
        if work.written > SMALL and code.store < WIDE and row.wide:
            problems.append(f"{where}: memory bounds it, and its widest store is {code.store} bytes, expected {WIDE}.")
    return problems


def _cuda_row(code: Code) -> Row | str:
    """Return the row of a CUDA kernel, or the reason why it cannot be checked."""
    name = re.split(r"[<(]", code.name)[0]
    if name in CUDA_SMALL:
        return Row(code)
    if name not in CUDA_MOVES:
        return f"{name} of csrc/cuda is in neither CUDA_MOVES nor CUDA_SMALL; add it to one."
    read, written = (2 * SMALL if moves else 0 for moves in CUDA_MOVES[name])
    return Row(code, work=Work(read, written, flops=0))


CUDA_MOVES = {
    "distillation_pass_kernel": (True, True),
    "distillation_rescale_kernel": (True, True),
    "prior_sums_kernel": (True, False),
    "prior_gradient_kernel": (True, True),
    "synthesis_step_kernel": (True, True),
    "normalise_kernel": (True, True),
    "activate_kernel": (True, True),
    "finish_kernel": (True, True),
    "hidden_gradient_kernel": (True, True),
    "norm_gradient_kernel": (True, True),
    "column_sums_kernel": (True, False),
}
"""Memory-bound CUDA kernels: whether they read and whether they write whole tensors, which must use wide accesses."""

CUDA_SMALL = (
    "weight_sum_kernel", "distillation_losses_kernel", "image_sums_kernel", "prior_value_kernel", "prior_slopes_kernel",
    "finish_sums_kernel", "pack_kernel", "unpack_kernel",
)  # fmt: skip
"""CUDA kernels that add up partial sums, or gather the kept part of a weight."""


# --- the report ------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report.

    Returns:
        1 if a kernel spills, or is memory-bound and has only narrow accesses.
    """
    parser = argparse.ArgumentParser("python -m benchmarks gpu-static", description=__doc__.partition("\n")[0])
    parser.add_argument("--op", action="append", help="only this op; may be repeated")
    parser.add_argument("--arch", type=int, action="append", help="only this compute capability, such as 90")
    parser.add_argument("--counted-only", action="store_true", help="only ViT-B with batch 64")
    parser.add_argument("--no-cuda", action="store_true", help="leave csrc/cuda out")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="number of concurrent compilations")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("gpu-static: TRITON_INTERPRET=1 makes kernels that cannot be compiled; unset it.")
    try:
        import triton
    except ModuleNotFoundError:
        raise SystemExit("gpu-static: Triton is not installed (pip install triton).") from None

    archs = sorted(set(options.arch or (80, 90, newest_arch())))
    chosen = [
        case for case in cases()
        if (not options.op or case.op in options.op) and (case.eager or not options.counted_only)
    ]  # fmt: skip
    print(f"torch {torch.__version__}, triton {triton.__version__}, targets {', '.join(f'sm_{a}' for a in archs)}")
    problems = _report_triton(chosen, archs, options.jobs)
    if not options.no_cuda:
        problems += _report_cuda(archs, options.op)
    print()
    for problem in problems:
        print(f"FAIL {problem}")
    print(f"{len(problems)} failures" if problems else "no spills, no narrow copies")
    return 1 if problems else 0


def _report_triton(chosen: Sequence[Case], archs: Sequence[int], jobs: int) -> list[str]:
    by_case: list[tuple[Case, list[Launch], _OperatorCounter]] = []
    for case in chosen:
        with recorded(case.title, case.eager is not None) as launches, _OperatorCounter() as left:
            case.launch()
        by_case.append((case, launches, left))
    every = {launch.key(): launch for _, launches, _ in by_case for launch in launches}
    counted = {launch.key(): launch for _, launches, _ in by_case for launch in launches if launch.counted}
    every |= counted
    tasks = [(key, arch) for key in every for arch in archs]
    with ThreadPoolExecutor(jobs) as pool:  # most of the time is spent in ptxas, a separate process
        codes = dict(zip(tasks, pool.map(lambda task: compile_triton(every[task[0]], task[1]), tasks), strict=True))

    problems = []
    print("\nTriton kernels")
    print(HEADER)
    for (key, _), code in codes.items():
        launch = every[key]
        row = row_of(launch, code)
        if launch.name not in WRITTEN:
            problems.append(f"{launch.name} is not in WRITTEN, so its bytes are not counted; add it there.")
        problems += judge(row)
        print(_line(row, _short(_operands(launch))))

    print("\nBytes and operations, and the time that they imply on an H100 (3.35 TB/s, 989 and 67 TFLOP/s)")
    for case, launches, left in by_case:
        if case.eager is None:
            continue
        print(f"\n  {case.op} {case.title}")
        works = [work_of(launch) for launch in launches]
        for launch, work in zip(launches, works, strict=True):
            _print_work(launch.name, work.read + work.written, work.flops, work.seconds)
        if left.kernels:
            _print_work(f"left to torch, {left.kernels} operators", left.bytes, left.flops, left.seconds)
        total = left.seconds + sum(work.seconds for work in works)
        size = left.bytes + sum(w.read + w.written for w in works)
        count = len(works) + left.kernels
        _print_work(f"all, {count} kernels", size, left.flops + sum(w.flops for w in works), total)
        eager = count_eager(case)
        _print_work(f"eager, {eager.kernels} operators", eager.bytes, eager.flops, eager.seconds)
        print(f"    bound of eager over bound of kernels: {eager.seconds / total:.2f}")
    return problems


def _operands(launch: Launch) -> torch.dtype:
    tensors = [v for v in launch.arguments.values() if isinstance(v, Tensor)]
    return next((t.dtype for t in tensors if t.dtype in HALF), torch.float32)


def _report_cuda(archs: Sequence[int], ops: Sequence[str] | None) -> list[str]:
    sources = [file for file in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if not ops or file.stem in ops]
    print("\nCUDA kernels")
    if not sources:
        print("  csrc/cuda holds none")
        return []
    if shutil.which("nvcc") is None:
        return ["the CUDA kernels were not compiled: there is no nvcc on the path. --no-cuda leaves them out."]
    print(HEADER)
    problems = []
    for source in sources:
        for arch in archs:
            for code in compile_cuda(source, arch):
                row = _cuda_row(code)
                if isinstance(row, str):
                    problems.append(row)
                    row = Row(code)
                problems += judge(row)
                print(_line(row, ""), flush=True)
    return problems


HEADER = (
    f"{'kernel':34} {'type':5} {'tiles, warps, stages':30} {'arch':>4} {'regs':>4} {'spill':>5} {'shared':>7} "
    f"{'occ.':>5} {'load':>4} {'store':>5}"
)


def _line(row: Row, dtype: str) -> str:
    c = row.code
    return (
        f"{f'{c.name:34} {dtype:5} {row.tiles}':71} {c.arch:4} {c.registers:4} {c.spills:5} {c.shared:7} "
        f"{c.occupancy:5.0%} {c.load:4} {c.store:5}"
    )


def _print_work(name: str, size: int, flops: int, seconds: float) -> None:
    print(f"    {name:34} {size / 1e6:9.1f} MB {flops / 1e9:9.2f} GFLOP {seconds * 1e6:8.1f} us")


if __name__ == "__main__":
    sys.exit(main())
