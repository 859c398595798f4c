"""Export of a model to one file that other runtimes read: an ONNX model or a `torch.export` program.

Both formats accept any batch size and need neither dcvit nor timm. A file is first written as a draft beside its
destination, read back by the runtime that it is for, and compared with the model. Only if the outputs agree is the
draft renamed to its final name.
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
"""The file formats: `onnx` for onnxruntime and other ONNX runtimes, `torch-export` for `torch.export.load`."""

SUFFIXES: dict[ExportFormat, str] = {"onnx": ".onnx", "torch-export": ".pt2"}
"""The file name suffix of each format."""

TOLERANCES = {
    torch.float32: 1e-4,
    torch.float16: 10 * torch.finfo(torch.float16).eps,
    torch.bfloat16: 10 * torch.finfo(torch.bfloat16).eps,
}
"""The largest allowed relative error, by dtype.

In float32, runtimes differ only in the order of summation, which gave errors of at most about 1e-6 on the models tried.
In half precision every layer rounds. Ten epsilons are 0.98 % (float16) and 7.8 % (bfloat16). That is three times the
error of PyTorch itself, at most 0.3 % and 2.1 %, measured on DINOv2 ViT-S/14, the model of the photographs test bed and
the embedded model, trained, uncompressed and compressed.
"""

BATCH_SIZES = (1, 3)
"""Batch sizes at which a file is compared with the model. It is traced at a different one."""

SINGLE_FILE_BYTES = 1_500_000_000
"""The largest size of weights inside an ONNX file, whose protocol buffer format is limited to 2 GiB.

Larger weights are stored in a separate file.
"""

_NEEDED: dict[ExportFormat, tuple[str, ...]] = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch-export": ()}

_Run = Callable[[Tensor], Tensor]
"""A function from images in float32 to outputs in float32."""


@dataclass(frozen=True)
class Exported:
    """An exported file and how closely its outputs match the model's.

    Attributes:
        path: The file.
        format: `onnx` or `torch-export`.
        dtype: The dtype of weights, input and output.
        num_bytes: The size, including a separate file of weights if there is one.
        errors: By batch size, the largest difference from the model in float32, relative to its largest output.
        tolerance: The largest error that was allowed.
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
    """Write a model to one file, read the file back and compare its outputs with the model's.

    The file takes normalised images `[B, C, H, W]` of the model's input size, with any B. It returns what the model
    returns: logits `[B, num_classes]`, or features if the model is a backbone. It also records how images are
    normalised: as `metadata_props` in an ONNX model, as the extra file `dcvit.json` in a `torch.export` program.

    Args:
        model: A supported model, compressed or not. It is not changed.
        path: The file to write; its folder is created if missing.
        format: The file format.
        dtype: The dtype of weights, input and output, one of `dcvit.artifacts.result.DTYPES`; ONNX files do not take
            bfloat16.
        overwrite: Whether to replace an earlier export of that format. No other file is ever replaced.

    Returns:
        The file's path, size and errors.

    Raises:
        UnsupportedModelError: If the model's family is not supported.
        SaveFolderError: If the path is a folder or has another suffix than `SUFFIXES`, or if the file exists and
            `overwrite` is not set or it is not an export. Also if the file cannot be written; an earlier file is then
            kept.
        DtypeError: If a weight does not fit the dtype, or the format does not support the dtype.
        ExportError: If a package is missing, or the file does not compute what the model does; the file is then
            removed.
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
            # The file of weights is named after this draft, so that no other export refers to it.
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
    """Move a draft and its weight file, if it has one, to their final names; delete weights of the replaced export."""
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
        with suppress(OSError):  # no export refers to it any more
            path.with_name(name).unlink()


def compare_rounded(model: nn.Module, dtype: torch.dtype) -> dict[int, float]:
    """Measure how much a model's output changes if its weights are stored in another dtype; it computes in float32.

    Returns:
        By batch size, the error as defined in `Exported`.

    Raises:
        DtypeError: If a weight does not fit the dtype.
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
            "dtype=torch.bfloat16: onnxruntime cannot run such a model on a CPU, so its outputs could not be compared. "
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
    """Return a copy on the CPU, in evaluation mode, in another dtype and without dcvit's ops."""
    plain = unfuse(copy.deepcopy(model)).cpu().eval().requires_grad_(False)
    weights = cast_weights(plain.state_dict(), dtype)
    plain.to(dtype).load_state_dict(weights)
    return plain


def _images(model: nn.Module, count: int) -> Tensor:
    """Return random images `[count, C, H, W]` in the model's pixel range, always the same ones."""
    prep = preprocessing(model)
    low, high = (bound.view(-1, 1, 1) for bound in prep.pixel_range)
    random = generator(0, "export", count)
    return low + (high - low) * torch.rand(count, *prep.input_size, generator=random, dtype=low.dtype, device="cpu")


def _trace(model: nn.Module) -> torch.export.ExportedProgram:
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        # Two images, because torch.export would treat a batch size of 0 or 1 as a constant.
        return torch.export.export(model, (_images(model, 2).to(dtype),), dynamic_shapes=_dynamic_shapes())


def _dynamic_shapes() -> dict[str, Any]:
    return {"x": {0: torch.export.Dim("batch")}}


def _metadata(model: nn.Module) -> dict[str, str]:
    """Return what is needed to run the file, one JSON value per key."""
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
    """Refuse a truncated file of weights: numpy, which writes it, does not report that the last part did not fit.

    Raises:
        OSError: If the file is truncated.
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
    archive = io.BytesIO()  # torch aborts the process if it cannot write to a file
    torch.export.save(program, archive, extra_files={"dcvit.json": json.dumps(values)})
    with create(path) as file:
        file.write(archive.getbuffer())


def _read_program(path: Path, dtype: torch.dtype) -> _Run:
    module = torch.export.load(path).module()
    return lambda batch: module(batch.to(dtype)).float()


def _compare(reference: nn.Module, run: _Run, dtype: torch.dtype, what: str) -> dict[int, float]:
    """Return the errors by batch size.

    Raises:
        ExportError: If an error is NaN or exceeds the dtype's tolerance.
    """
    errors = {}
    with torch.no_grad():
        for count in BATCH_SIZES:
            images = _images(reference, count)
            expected = reference(images)
            largest = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)  # all outputs may be zero
            errors[count] = float((run(images) - expected).abs().max() / largest)
    if not all(error <= TOLERANCES[dtype] for error in errors.values()):  # also true of NaN
        listed = ", ".join(f"{error:.2g} at batch size {count}" for count, error in errors.items())
        step = "report the model's name" if dtype == torch.float32 else "take torch.float32"
        raise ExportError(
            f"{what} does not compute what the model does: it differs by {listed}, relative to the largest output, "
            f"where {TOLERANCES[dtype]:.2g} is allowed for {dtype}. Nothing was written; {step}."
        )
    return errors
