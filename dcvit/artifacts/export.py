"""A model as one file that other runtimes read: an ONNX model, or a program of `torch.export`.

Both take any batch size, and neither needs dcvit or timm. A file is written beside its place, read back by the runtime
that it is for and compared with the model; only one that computes the same gets there, in one rename.
"""

import copy
import errno
import importlib.util
import io
import json
import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dcvit._version import __version__
from dcvit.artifacts.exported import is_export, weights_of
from dcvit.artifacts.result import DTYPES, cast_weights, check_output_file
from dcvit.errors import DtypeError, ExportError, SaveFolderError
from dcvit.models import compressible, preprocessing, unfuse
from dcvit.runtime.files import create, draft_folder, kind_of, remove_abandoned_drafts, sync, take_after
from dcvit.runtime.seeding import generator

__all__ = ["SUFFIXES", "TOLERANCES", "ExportFormat", "Exported", "compare_rounded", "export_model"]

ExportFormat = Literal["onnx", "torch-export"]
"""`onnx`: for onnxruntime and others. `torch-export`: for `torch.export.load`."""

SUFFIXES: dict[ExportFormat, str] = {"onnx": ".onnx", "torch-export": ".pt2"}
"""How a file's name ends."""

TOLERANCES = {
    torch.float32: 1e-4,
    torch.float16: 10 * torch.finfo(torch.float16).eps,
    torch.bfloat16: 10 * torch.finfo(torch.bfloat16).eps,
}
"""The largest relative error by dtype.

In float32 runtimes differ by the order of summation, by about 1e-6 at most on the models tried. In half precision each
layer rounds anew; ten epsilons, 0.98 % and 7.8 %, are three times what PyTorch itself was off by on DINOv2 ViT-S/14,
the photographs bed's model and the embedded one, trained, whole or cut: at most 0.3 % and 2.1 %.
"""

BATCH_SIZES = (1, 3)
"""That a file is compared at; it is traced at another one."""

SINGLE_FILE_BYTES = 1_500_000_000
"""Of weights. Protocol buffers, which ONNX is stored as, end at 2 GiB; beyond this weights get a file of their own."""

_NEEDED: dict[ExportFormat, tuple[str, ...]] = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch-export": ()}

_Run = Callable[[Tensor], Tensor]
"""From images in float32 to outputs in float32."""


@dataclass(frozen=True)
class Exported:
    """A file that was written, and how close it comes to the model.

    Attributes:
        path: The file.
        format: `onnx` or `torch-export`.
        dtype: Of weights, input and output.
        num_bytes: Size, with the weights where those have a file of their own.
        errors: By batch size, the largest difference from the model in float32, relative to its largest output.
        tolerance: What the errors had to stay below.
    """

    path: Path
    format: ExportFormat
    dtype: torch.dtype
    num_bytes: int
    errors: Mapping[int, float]
    tolerance: float


def export_model(
    model: nn.Module,
    path: str | Path,
    *,
    format: ExportFormat = "onnx",
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> Exported:
    """Write a model to one file, read it back and compare.

    The file takes normalised images `[B, C, H, W]` of the model's own size and any B, and gives what the model gives:
    logits `[B, num_classes]`, or features of a backbone. It also tells how images are normalised: as `metadata_props`
    of an ONNX model, as the extra file `dcvit.json` of a `torch.export` program.

    Args:
        model: A supported model, whole or compressed. Unchanged.
        path: The file; its folder is created if missing.
        format: For which runtime.
        dtype: One of `dcvit.artifacts.result.DTYPES`, of weights, input and output; ONNX takes no bfloat16.
        overwrite: Replace an earlier export of that format. Nothing else is ever replaced.

    Returns:
        Where it is, its size and its errors.

    Raises:
        UnsupportedModelError: If the model's family is not supported.
        SaveFolderError: If the path is a folder, ends otherwise than `SUFFIXES`, or exists and `overwrite` is not set
            or it is no export; or if it cannot be written, and then what was there stays.
        DtypeError: If the dtype cannot hold a weight, or the format not the dtype.
        ExportError: If a package is missing, or the file does not compute what the model does; it is then removed.
    """
    path = Path(path)
    compressible(model)  # refuses other families
    _check(path, format, dtype, overwrite)
    reference = _plain(model, torch.float32)
    subject = _plain(model, dtype)
    write, read = (_write_onnx, _read_onnx) if format == "onnx" else (_write_program, _read_program)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned_drafts(path)
        with draft_folder(path) as folder:
            # A file of weights is called after this name, so that no other export's file names it.
            draft = folder / f"{path.stem}-{secrets.token_hex(8)}{path.suffix}"
            write(subject, _trace(subject), draft)
            errors = _compare(reference, read(draft, dtype), dtype, f"The {format} file")
            num_bytes = sum(file.stat().st_size for file in folder.iterdir())
            _put(draft, path)
    except OSError as error:
        raise SaveFolderError(
            f"{str(path)!r} cannot be written ({error.strerror or error}): make room, or name another file."
        ) from error
    return Exported(path, format, dtype, num_bytes, errors, TOLERANCES[dtype])


def _put(draft: Path, path: Path) -> None:
    """Give an export its name, after its file of weights, if it has one; delete those that the replaced one names."""
    earlier = weights_of(path)
    weights = draft.with_name(f"{draft.name}.data")
    placed = path.with_name(weights.name)
    written = [file for file in (weights, draft) if file.exists()]
    found = os.stat(path if path.exists() else draft)
    for file in written:
        take_after(file, found)
    try:
        for file in written:
            sync(file)
            os.replace(file, placed if file == weights else path)
    except BaseException:
        placed.unlink(missing_ok=True)
        raise
    sync(path.parent)
    for name in earlier - {placed.name}:
        with suppress(OSError):  # no file names it any more
            path.with_name(name).unlink()


def compare_rounded(model: nn.Module, dtype: torch.dtype) -> dict[int, float]:
    """How much a model's output changes where its weights are stored in another dtype; it still computes in float32.

    Returns:
        By batch size, the error as `Exported` has it.

    Raises:
        DtypeError: If the dtype cannot hold a weight.
        ExportError: If an error exceeds the dtype's tolerance.
    """
    rounded = _plain(model, dtype).float()
    return _compare(_plain(model, torch.float32), rounded, dtype, f"The model with weights in {dtype}")


def _check(path: Path, format: ExportFormat, dtype: torch.dtype, overwrite: bool) -> None:
    if format not in get_args(ExportFormat):
        raise ExportError(f"format={format!r}: expected one of {', '.join(get_args(ExportFormat))}.")
    if dtype not in TOLERANCES:
        raise DtypeError(f"dtype={dtype}: expected one of {', '.join(f'torch.{name}' for name in DTYPES)}.")
    if format == "onnx" and dtype == torch.bfloat16:
        raise DtypeError(
            "dtype=torch.bfloat16: onnxruntime does not run such a model on a CPU, so that it could not be compared. "
            "Take torch.float16, or format='torch-export'."
        )
    missing = [name for name in _NEEDED[format] if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"format={format!r} needs {', '.join(missing)}: pip install 'dcvit[export]'.")
    if path.is_dir() or path.suffix != SUFFIXES[format]:
        problem = "is a folder" if path.is_dir() else f"does not end in {SUFFIXES[format]}"
        raise SaveFolderError(f"{str(path)!r} {problem}: name a file, such as model{SUFFIXES[format]}.")
    check_output_file(path, overwrite=overwrite)
    if kind_of(path) is not None and not is_export(path):
        raise SaveFolderError(
            f"{str(path)!r} is not a file that dcvit exported: move it away first, or name another file."
        )


def _plain(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy on the CPU, in evaluation mode, in another dtype and without dcvit's ops."""
    plain = unfuse(copy.deepcopy(model)).cpu().eval().requires_grad_(False)
    weights = cast_weights(plain.state_dict(), dtype)
    plain.to(dtype).load_state_dict(weights)
    return plain


def _images(model: nn.Module, count: int) -> Tensor:
    """Random images `[count, C, H, W]` of the pixel range that the model is made for, always the same."""
    prep = preprocessing(model)
    low, high = (bound.view(-1, 1, 1) for bound in prep.pixel_range)
    drawing = generator(0, "export", count)
    return low + (high - low) * torch.rand(count, *prep.input_size, generator=drawing, dtype=low.dtype, device="cpu")


def _trace(model: nn.Module) -> torch.export.ExportedProgram:
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        # Two images: sizes 0 and 1 are what torch.export would take for constants.
        return torch.export.export(model, (_images(model, 2).to(dtype),), dynamic_shapes=_dynamic_shapes())


def _dynamic_shapes() -> dict[str, Any]:
    return {"x": {0: torch.export.Dim("batch")}}


def _metadata(model: nn.Module) -> dict[str, str]:
    """What one has to know to run a file: a JSON value for each key."""
    prep = preprocessing(model)
    names = ("input_size", "mean", "std")
    return {"dcvit": json.dumps(__version__), **{name: json.dumps(getattr(prep, name)) for name in names}}


def _write_onnx(model: nn.Module, program: torch.export.ExportedProgram, path: Path) -> None:
    onnx_program = torch.onnx.export(
        program,
        (),
        dynamo=True,
        dynamic_shapes=_dynamic_shapes(),
        input_names=["images"],
        output_names=["logits" if compressible(model).num_classes() else "features"],
        verbose=False,
    )
    assert onnx_program is not None
    onnx_program.model.metadata_props.update(_metadata(model))
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    apart = weights > SINGLE_FILE_BYTES
    onnx_program.save(path, external_data=apart)
    if apart:
        _require_whole(path)


def _require_whole(path: Path) -> None:
    """Refuse a file of weights that ends early: numpy, which writes it, does not say that its last part did not fit.

    Raises:
        OSError: If that is so.
    """
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    tensors = onnx.load(path, load_external_data=False).graph.initializer
    for info in (ExternalDataInfo(tensor) for tensor in tensors if uses_external_data(tensor)):
        if (path.parent / info.location).stat().st_size < (info.offset or 0) + (info.length or 0):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _read_onnx(path: Path, dtype: torch.dtype) -> _Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (images,) = session.get_inputs()

    def run(batch: Tensor) -> Tensor:
        (output,) = session.run(None, {images.name: batch.to(dtype).numpy()})
        return torch.from_numpy(output).float()

    return run


def _write_program(model: nn.Module, program: torch.export.ExportedProgram, path: Path) -> None:
    values = {name: json.loads(value) for name, value in _metadata(model).items()}
    archive = io.BytesIO()  # torch ends the process where it cannot write to a file
    torch.export.save(program, archive, extra_files={"dcvit.json": json.dumps(values)})
    with create(path) as file:
        file.write(archive.getbuffer())


def _read_program(path: Path, dtype: torch.dtype) -> _Run:
    module = torch.export.load(path).module()
    return lambda batch: module(batch.to(dtype)).float()


def _compare(reference: nn.Module, run: _Run, dtype: torch.dtype, what: str) -> dict[int, float]:
    """The errors by batch size.

    Raises:
        ExportError: If one exceeds the dtype's tolerance, or is not a number.
    """
    errors = {}
    with torch.no_grad():
        for count in BATCH_SIZES:
            images = _images(reference, count)
            expected = reference(images)
            largest = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)  # a head may give zeros alone
            errors[count] = float((run(images) - expected).abs().max() / largest)
    if not all(error <= TOLERANCES[dtype] for error in errors.values()):  # what is not a number is not within either
        listed = ", ".join(f"{error:.2g} at batch size {count}" for count, error in errors.items())
        step = "report the model's name" if dtype == torch.float32 else "take torch.float32"
        raise ExportError(
            f"{what} does not compute what the model does: it differs by {listed}, relative to the largest output, "
            f"where {TOLERANCES[dtype]:.2g} is allowed for {dtype}. Nothing was written; {step}."
        )
    return errors
