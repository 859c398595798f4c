"""The result of `compress` and its saved form.

A saved result is a folder with these files. None of them uses pickle.

- `config.json` and `model.safetensors`: an ordinary timm model. After `import dcvit`,
  `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it.
- `modeling_dcvit.py`: a replacement for `import dcvit` where dcvit is not installed.
- `README.md`: the model card.
- `result.json`: the plan and the report.
- `metric_set.safetensors`: the synthesised images, with 8 bits per channel, their target classes and losses. Few-shot
  images are never saved.
- `report.html`: the report, if `dcvit.report.write_report` wrote one.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor, nn

from dcvit.artifacts.card import model_card
from dcvit.artifacts.consistency import require_consistent
from dcvit.artifacts.exported import is_export, weights_of
from dcvit.artifacts.saving import replacing_folder, require_writable, write_text
from dcvit.costs import FILE_METADATA, file_size
from dcvit.data.synthesis import ProxySet
from dcvit.errors import DtypeError, SaveFolderError, UnsupportedModelError
from dcvit.history import Plan, Report
from dcvit.models import CONFIG_FILE, WEIGHTS_FILE, compressible, load_model, preprocessing, standalone_source
from dcvit.runtime.earlier import in_present_words
from dcvit.runtime.files import (
    UnusableFileError,
    digest,
    file_mode,
    is_draft,
    kind_of,
    open_regular,
    own_file,
    parse_json,
    read_text,
)
from dcvit.serialization import from_plain

__all__ = [
    "DTYPES",
    "SAVED_FILES",
    "CompressionResult",
    "ProxyImages",
    "Record",
    "cast_weights",
    "check_folder",
    "check_output_file",
    "check_output_folder",
    "check_report_file",
    "is_report",
    "load",
    "original_name",
    "read_json",
    "read_record",
    "read_together",
    "save_model",
]

RESULT_FILE = "result.json"
CARD_FILE, MODELING_FILE = "README.md", "modeling_dcvit.py"
PROXY_SET_FILE, REPORT_FILE = "metric_set.safetensors", "report.html"
FAMILY_FILE = "family.json"
"""The file that lists the members of a family, which are folders beside it."""

REPORT_MARK = '<meta name="generator" content="dcvit'
"""The text that identifies a report among pages that something else wrote."""

SAVED_FILES = (CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, MODELING_FILE, RESULT_FILE)
"""The files of a saved result that are uploaded to a hub."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""The dtypes in which weights can be stored, by name."""

RESULT_FILES = (*SAVED_FILES, PROXY_SET_FILE, REPORT_FILE)

MOST_PROXY_SET_BYTES, MOST_IMAGE_BYTES = 512 << 20, 64 << 20
"""Size limits of a proxy set that is read, which is 3,500 images of 224 x 224, and of one image in it."""

EXPORTED_FILES = ("model.onnx", "model.pt2")
"""Exports that `dcvit export` may have written to the folder; `model.onnx` names its file of weights."""

DIGESTS = "digests"
"""The entry of `result.json` with the SHA-256 of each file that `load` reads beside it."""

MOST_READS = 100
"""How often a reader tries a folder that other processes keep saving to, before it gives up."""

_Read = TypeVar("_Read")


@dataclass(frozen=True)
class CompressionResult:
    """The result of `compress`.

    Attributes:
        model: The compressed model, an ordinary `nn.Module`.
        plan: Its structure: blocks and kept hidden units.
        report: Figures, losses and timings.
        proxy_set: The images on which the blocks were ranked. It is saved only if it was synthesised.
    """

    model: nn.Module
    plan: Plan
    report: Report
    proxy_set: ProxySet | None = None

    def to(self, device: str | torch.device) -> "CompressionResult":
        """Return the result on another device; the model is moved in place."""
        made = None if self.proxy_set is None else self.proxy_set.to(device)
        return replace(self, model=self.model.to(device), proxy_set=made)

    def save(
        self,
        folder: str | Path,
        *,
        overwrite: bool = False,
        dtype: torch.dtype | None = None,
        more: Mapping[str, Any] | None = None,
        page: "Callable[[Record], str] | None" = None,
    ) -> None:
        """Save model, plan, report, model card and synthesised images to a folder, all files or none.

        Args:
            folder: The folder; it is created if missing.
            overwrite: Whether to replace an earlier result in that folder, with its exports. Nothing else is ever
                replaced.
            dtype: The dtype in which the weights are stored, one of `DTYPES`; by default, the model's own. timm always
                loads them into float32, so a half-precision file has half the size and rounds the weights once.
            more: Further entries of `result.json`.
            page: Makes the HTML of `report.html` from the saved record.

        Raises:
            SaveFolderError: If the folder holds something else, or holds an earlier result and `overwrite` is not set.
                Also if it cannot be written; an earlier result is then kept.
            DtypeError: If a weight does not fit the dtype.
        """
        check_output_folder(folder, overwrite=overwrite)
        images = None if self.proxy_set is None else ProxyImages.of(self.proxy_set, self.model)
        tensors = {} if images is None else {PROXY_SET_FILE: images.to_tensors()}
        stored = self._stored_as(dtype)
        extra = stored.files(dtype, more)
        if page is not None:
            extra[REPORT_FILE] = page(Record(self.plan, stored.report, images, extra[RESULT_FILE]))
        save_model(self.model, folder, extra=extra, tensors=tensors, dtype=dtype)

    def files(self, dtype: torch.dtype | None = None, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the contents of files beside the model, by name: `result.json` as values, the model card as text."""
        values = {**self.to_dict(), **(more or {})}
        stored = str(dtype or next(self.model.parameters()).dtype).removeprefix("torch.")
        card = model_card(values, compressible(self.model).config(), dtype=stored)
        return {RESULT_FILE: values, CARD_FILE: card}

    def _stored_as(self, dtype: torch.dtype | None) -> "CompressionResult":
        """Return the result with the file size that the model has in a dtype, by default its own."""
        weights = self.model.state_dict()
        size = file_size(weights if dtype is None else cast_weights(weights, dtype))
        return replace(self, report=replace(self.report, student=replace(self.report.student, file_size=size)))

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of `result.json`: the main figures first, everything else in `plan` and `report`."""
        plan, report = self.plan.to_dict(), asdict(self.report)
        return {
            "teacher": report["teacher"],
            "student": report["student"],
            "budget": plan["budget"],
            "blocks": plan["blocks"],
            "hidden_features": plan["hidden_features"],
            "drop_ratio": plan["drop_ratio"],
            "agreement": report["agreement"],
            "distillation_loss": report["distillation_loss"],
            "seconds": report["seconds"],
            "seed": report["seed"],
            "versions": report["versions"],
            "plan": plan,
            "report": report,
        }


@dataclass(frozen=True)
class ProxyImages:
    """The saved form of synthesised images.

    Attributes:
        pixels: The pixels, uint8 `[M, C, H, W]`.
        targets: Their target classes, `[M]`.
        losses: The loss CE + R at each iteration.
    """

    pixels: Tensor
    targets: Tensor
    losses: tuple[float, ...]

    @classmethod
    def of(cls, proxy_set: ProxySet, model: nn.Module) -> "ProxyImages | None":
        """Convert a proxy set of a model; return `None` if it was not synthesised."""
        if proxy_set.targets is None:
            return None
        pixels = preprocessing(model).pixels(proxy_set.images).clamp(0, 1).mul(255).round().to(torch.uint8)
        return cls(pixels.cpu(), proxy_set.targets.cpu(), proxy_set.losses)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the contents of `metric_set.safetensors`."""
        losses = torch.tensor(self.losses, dtype=torch.float64)
        return {"pixels": self.pixels.contiguous(), "targets": self.targets, "losses": losses}

    def proxy_set(self, model: nn.Module) -> ProxySet:
        """Return the images as a model's inputs; saving rounded them to 8 bits."""
        images = preprocessing(model).normalised(self.pixels.to(next(model.parameters()).dtype) / 255)
        return ProxySet(images, self.targets, min(self.losses, default=float("nan")), self.losses)


@dataclass(frozen=True)
class Record:
    """A saved result without its model.

    Attributes:
        plan: The plan.
        report: The report.
        images: The synthesised images; `None` where none were saved.
        values: The contents of `result.json`. Its plan and report have been checked and completed with defaults.
    """

    plan: Plan
    report: Report
    images: ProxyImages | None
    values: Mapping[str, Any]


def load(folder: str | Path) -> CompressionResult:
    """Load a saved result, with its model in evaluation mode.

    Args:
        folder: A folder that `CompressionResult.save` or `dcvit compress` wrote.

    Raises:
        SaveFolderError: If a file is missing, broken, from another save, or was not written by dcvit.
    """
    return read_together(Path(folder) / RESULT_FILE, lambda: _load(Path(folder)))


def _load(folder: Path) -> CompressionResult:
    record = read_record(folder)
    architecture = read_json(folder / CONFIG_FILE).get("architecture")
    try:
        model = load_model(f"local-dir:{folder}")
        preprocessing(model)
    except UnsupportedModelError as error:
        raise SaveFolderError(f"{str(folder)!r} holds a broken model ({architecture}): {error}") from error
    _check_digests(folder, record.values)
    if record.images is None:
        return CompressionResult(model, record.plan, record.report)
    size, shape = compressible(model).input_size(), tuple(record.images.pixels.shape[1:])
    if shape != tuple(size):
        raise SaveFolderError(
            f"{str(folder / PROXY_SET_FILE)!r} holds images of the size {shape}, the model takes {tuple(size)}: "
            "delete it, and the model loads without a proxy set."
        )
    return CompressionResult(model, record.plan, record.report, record.images.proxy_set(model))


def _check_digests(folder: Path, values: Mapping[str, Any]) -> None:
    """Refuse files that were not saved together. Results of earlier versions have no digests and are not checked.

    Raises:
        SaveFolderError: If a file is not the one that `result.json` was saved with, or the digests are not a table.
    """
    if DIGESTS not in values:
        return
    recorded = values[DIGESTS]
    if not isinstance(recorded, dict):
        raise SaveFolderError(
            f"{str(folder / RESULT_FILE)!r} holds a {type(recorded).__name__} as {DIGESTS}: expected a table of the "
            "files that it was saved with; copy the whole folder again, or compress again."
        )
    for name in (CONFIG_FILE, WEIGHTS_FILE, PROXY_SET_FILE):
        path = folder / name
        try:
            differs = kind_of(path) is not None and digest(own_file(folder, name)) != recorded.get(name)
        except OSError as error:
            raise SaveFolderError(f"{str(path)!r} cannot be read ({error}): copy the folder again.") from error
        if differs:
            raise SaveFolderError(
                f"{str(path)!r} is not the file that {RESULT_FILE} was saved with: copy the whole folder again, or "
                "compress again."
            )


def read_together(file: Path, read: Callable[[], _Read]) -> _Read:
    """Read files that were saved together, and read again if another process replaced them meanwhile.

    Args:
        file: A file that every save replaces.
        read: Reads all files.

    Raises:
        SaveFolderError: If the files are replaced faster than they are read.
    """
    for _ in range(MOST_READS):
        try:
            opened = open_regular(file)  # kept open, so that its inode number is not reused
        except OSError:
            return read()  # this raises the error that says what is wrong
        with opened:
            try:
                found = read()
            except Exception:
                if _is_still(file, opened):
                    raise
            else:
                if _is_still(file, opened):
                    return found
    raise SaveFolderError(
        f"{str(file.parent)!r} is replaced faster than it can be read: read it when no process saves to it."
    )


def _is_still(file: Path, opened: BinaryIO) -> bool:
    """Return whether a path still names the file that was opened."""
    try:
        return os.path.samestat(os.fstat(opened.fileno()), os.lstat(file))
    except OSError:
        return False


def read_record(folder: str | Path) -> Record:
    """Read a saved result without its model.

    Args:
        folder: A folder that `CompressionResult.save` or `dcvit compress` wrote.

    Raises:
        SaveFolderError: If a file is missing, broken, or was not written by dcvit.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):  # also false if the name is too long or contains NUL
        raise SaveFolderError(f"{str(folder)!r} is not a folder: expected one that dcvit saved.")
    values = in_present_words(read_json(folder / RESULT_FILE))
    try:
        _add_missing_entries(values)
        plan, report = Plan.from_dict(values["plan"]), from_plain(Report, values["report"])
        require_consistent(plan, report)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise SaveFolderError(
            f"{str(folder / RESULT_FILE)!r} is not a dcvit result ({type(error).__name__}: {error}). "
            "For another model use timm.create_model."
        ) from error
    checked = {**values, "plan": plan.to_dict(), "report": asdict(report)}
    return Record(plan, report, _read_proxy_images(folder / PROXY_SET_FILE), checked)


def _add_missing_entries(values: Mapping[str, Any]) -> None:
    """Add, in place, the entries that earlier versions did not write."""
    plan, report = values["plan"], values["report"]
    if "pruned" not in plan:
        kept, after = map(int, plan["kept_units"]), report.get("blocks_after", ())
        plan["pruned"] = sorted(b for b in kept if b < len(after) and after[b]["attention"])
    for probe in report["probes"]:
        if "epochs" not in probe:
            probe["epochs"] = 0 if probe["recovery"] is None else len(probe["recovery"]["losses"])


def save_model(
    model: nn.Module,
    folder: str | Path,
    *,
    extra: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model as `config.json`, `model.safetensors` and `modeling_dcvit.py`, all files or none.

    Args:
        model: A supported model.
        folder: The folder; it is created if missing. All files in it that dcvit wrote are replaced.
        extra: More files, by name: text is written unchanged, anything else as JSON. `result.json` gets the digests of
            the other files.
        tensors: More safetensors files, by name.
        dtype: The dtype in which the weights are stored; by default, the model's own.

    Raises:
        DtypeError: If a weight does not fit the dtype.
        SaveFolderError: If the folder holds something else, or cannot be written.
    """
    _refuse(folder, _foreign_entries(Path(folder)))
    weights = model.state_dict() if dtype is None else cast_weights(model.state_dict(), dtype)
    config = dict(compressible(model).config())
    files = {CONFIG_FILE: config, MODELING_FILE: standalone_source(config), **(extra or {})}
    result = files.pop(RESULT_FILE, None)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with replacing_folder(folder, first=RESULT_FILE, last=CONFIG_FILE) as draft:
        mode = file_mode(draft)
        for name, content in {WEIGHTS_FILE: state, **(tensors or {})}.items():
            save_file(dict(content), draft / name, metadata=FILE_METADATA)
            os.chmod(draft / name, mode)  # safetensors lets only the owner read its files
        for name, content in files.items():
            write_text(draft / name, content if isinstance(content, str) else _as_json(content))
        if result is not None:
            digests = {name: digest(draft / name) for name in (CONFIG_FILE, WEIGHTS_FILE, *(tensors or {}))}
            write_text(draft / RESULT_FILE, _as_json({**result, DIGESTS: digests}))


def _as_json(values: Any) -> str:
    return json.dumps(values, indent=2, allow_nan=True) + "\n"


def cast_weights(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return weights in another dtype, by name.

    Raises:
        DtypeError: If a finite weight becomes infinite in that dtype.
    """
    if dtype not in DTYPES.values():
        raise DtypeError(f"dtype={dtype}: expected one of {', '.join(f'torch.{name}' for name in DTYPES)}.")
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    for name, tensor in weights.items():
        if tensor.is_floating_point() and bool((cast[name].isinf() & tensor.isfinite()).any()):
            raise DtypeError(
                f"dtype={dtype}: {name} holds {float(tensor.abs().max()):.4g}, beyond the range of that dtype; take "
                "torch.bfloat16, or leave the weights in torch.float32."
            )
    return cast


def check_output_folder(folder: str | Path, *, overwrite: bool = False) -> None:
    """Refuse a folder to which a result cannot be saved. This writes a file to it, or to the folder above it.

    Raises:
        SaveFolderError: If it is a file, cannot be written, holds something else, or holds an earlier result and
            `overwrite` is not set.
    """
    folder = Path(folder)
    check_folder(folder)
    present = [name for name in sorted(os.listdir(folder)) if not is_draft(name)] if folder.is_dir() else []
    _refuse(folder, _foreign_entries(folder) or (present if RESULT_FILE not in present else []))
    if present and not overwrite:
        raise SaveFolderError(
            f"{str(folder)!r} holds an earlier result: name another folder, or replace it with overwrite=True "
            "(--overwrite)."
        )
    require_writable(folder)


def check_folder(folder: Path) -> None:
    """Refuse a path that is not a folder and where no folder can be created.

    Raises:
        SaveFolderError: If it is a file, or a link to something that is not a folder.
    """
    if folder.is_dir():
        return
    kind = kind_of(folder)
    if kind == "a link":
        raise SaveFolderError(
            f"{str(folder)!r} is a link to {os.readlink(folder)!r}, which is not a folder: create it, or name "
            "another folder."
        )
    if kind is not None:
        raise SaveFolderError(f"{str(folder)!r} is a file: name a folder that is empty or does not exist.")


def _foreign_entries(folder: Path) -> list[str]:
    """Return the names in a folder that belong to neither a result nor its exports nor abandoned drafts."""
    exports = [name for name in EXPORTED_FILES if is_export(folder / name)]
    own = {*RESULT_FILES, *exports}.union(*(weights_of(folder / name) for name in exports))
    return [
        name
        for name in (sorted(os.listdir(folder)) if folder.is_dir() else ())
        if not is_draft(name)
        and (
            name not in own
            or kind_of(folder / name) != "a regular file"
            or (name == REPORT_FILE and not is_report(folder / name))
        )
    ]


def _refuse(folder: str | Path, foreign: Sequence[str]) -> None:
    """Refuse to replace a folder that holds other files.

    Raises:
        SaveFolderError: If there are any.
    """
    if foreign:
        raise SaveFolderError(
            f"{str(folder)!r} holds something else ({', '.join(foreign[:3])}): name a folder that is empty or does not "
            "exist."
        )


def is_report(path: Path) -> bool:
    """Return whether a file is a report that dcvit wrote; `False` if it cannot be read or is not a regular file."""
    try:
        with open_regular(path) as file:
            return REPORT_MARK.encode() in file.read(500)
    except OSError:
        return False


def check_report_file(path: Path) -> None:
    """Refuse a file that a report must not replace.

    Raises:
        SaveFolderError: If it exists and is not a report that dcvit wrote.
    """
    if kind_of(path) is not None and not is_report(path):
        raise SaveFolderError(f"{str(path)!r} is not a report that dcvit wrote: move it away first.")


def check_output_file(file: Path, *, overwrite: bool = False) -> None:
    """Refuse a file that cannot be written. This writes another file to its folder.

    Raises:
        SaveFolderError: If it is not a regular file, its folder cannot be written, or it exists and `overwrite` is not
            set.
    """
    kind = kind_of(file)
    if kind not in (None, "a regular file"):
        raise SaveFolderError(f"{str(file)!r} is {kind}: name a file that does not exist.")
    if kind is not None and not overwrite:
        raise SaveFolderError(
            f"{str(file)!r} exists: name another file, or replace it with overwrite=True (--overwrite)."
        )
    require_writable(file.parent)


def original_name(folder: str | Path) -> str:
    """Return the name of the original of a saved model.

    Raises:
        SaveFolderError: If the folder has no `result.json`, or the file names no model.
    """
    file = Path(folder) / RESULT_FILE
    report = read_json(file).get("report")
    name = report.get("model") if isinstance(report, dict) else None
    if not isinstance(name, str):
        raise SaveFolderError(f"{str(file)!r} does not name the original: pass the original's name yourself.")
    return name


def read_json(path: Path) -> dict[str, Any]:
    """Return the table in a JSON file of a saved folder.

    Raises:
        SaveFolderError: If the file does not exist, is not a regular file, is too large, or holds something else.
    """
    try:
        with reading(path) as file:
            values = parse_json(read_text(file))
    except ValueError as error:
        if isinstance(error, SaveFolderError):
            raise
        raise SaveFolderError(
            f"{str(path)!r} is not valid JSON ({error}): the result is broken, compress again."
        ) from error
    if not isinstance(values, dict):
        raise SaveFolderError(f"{str(path)!r} holds a {type(values).__name__}: expected a dcvit result.")
    return values


@contextmanager
def reading(path: Path) -> Iterator[Path]:
    """Turn an error from reading a file of a saved folder into one that says what to do.

    Yields:
        The path to read, see `dcvit.runtime.files.own_file`.

    Raises:
        SaveFolderError: If the file is missing, is not a regular one, is too large, or cannot be read.
    """
    try:
        yield own_file(path.parent, path.name)
    except FileNotFoundError as error:
        raise SaveFolderError(
            f"{str(path.parent)!r} has no {path.name}: expected a folder that dcvit saved."
        ) from error
    except UnusableFileError as error:
        raise SaveFolderError(
            f"{error}: expected the file that dcvit saved. Links to elsewhere are not followed; "
            "`cp -rL` copies what they lead to."
        ) from error
    except OSError as error:
        raise SaveFolderError(f"{str(path)!r} cannot be read ({error}): let this user read it.") from error


def _read_proxy_images(path: Path) -> ProxyImages | None:
    if not os.path.lexists(path):
        return None
    try:
        with reading(path) as found, open_regular(found, most=MOST_PROXY_SET_BYTES) as file:
            tensors = load_tensors(file.read())
        pixels, targets, losses = (tensors[name] for name in ("pixels", "targets", "losses"))
        if not _are_images(pixels) or targets.shape != pixels.shape[:1] or losses.ndim != 1:
            shapes = ", ".join(f"{name} {tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items())
            raise SafetensorError(f"it holds {shapes}")
        return ProxyImages(pixels, targets, tuple(losses.tolist()))
    except (SafetensorError, KeyError) as error:
        raise SaveFolderError(
            f"{str(path)!r} is not a proxy set that dcvit saved ({error}): the result is broken, compress again."
        ) from error


def _are_images(pixels: Tensor) -> bool:
    if pixels.ndim != 4 or pixels.dtype != torch.uint8:
        return False
    return pixels.numel() > 0 and pixels[0].numel() <= MOST_IMAGE_BYTES
