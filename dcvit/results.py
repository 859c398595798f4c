"""What `compress` gives back, and its saved form.

A saved result is a folder with three files and no pickle:

- `config.json` and `model.safetensors`: an ordinary timm model, which after `import dcvit` is rebuilt by
  `timm.create_model("local-dir:FOLDER", pretrained=True)`;
- `result.json`: the plan and the report.
"""

import json
import platform
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from dcvit._version import __version__
from dcvit.errors import SaveFolderError, UnsupportedModelError
from dcvit.models import adapter_for, load_model
from dcvit.planning import Plan
from dcvit.ranking import Trial
from dcvit.reconstruction import Reconstruction
from dcvit.recovery import Recovery
from dcvit.refinement import Refinement

__all__ = ["CompressionResult", "ModelFigures", "Report", "check_output_folder", "load", "save_model", "versions"]

CONFIG_FILE, WEIGHTS_FILE, RESULT_FILE = "config.json", "model.safetensors", "result.json"


@dataclass(frozen=True)
class ModelFigures:
    """What one model costs and how good it is.

    Attributes:
        macs: MACs per image, in the budget's convention.
        params: Number of parameters.
        latency_ms: Median time of one batch, in milliseconds.
        top1: Share of labelled images classified rightly; `None` where nothing was labelled.
    """

    macs: int
    params: int
    latency_ms: float
    top1: float | None = None


@dataclass(frozen=True)
class Report:
    """How a compression went.

    Attributes:
        model: The original's name, or its type.
        teacher: Figures of the original.
        student: Figures of the compressed model.
        num_images: Size of the few-shot set.
        agreement: Share of images for which both name the same class; `None` without classes.
        mimic_loss: Final mimicking loss on the few-shot images.
        learning_rate: Given or found: the peak learning rate of the mimicking, or the step size of reconstruction.
        trials: The trial of each candidate block, best first.
        reconstructions: How each chosen block was reconstructed, front to back.
        refinement: How the student mimicked after that; `None` if it did not.
        steps: How the published mimicking went after each progressive step; the first is the best trial's.
        seed: The seed.
        seconds: Wall-clock time of each stage.
        versions: Of what computed it.
    """

    model: str
    teacher: ModelFigures
    student: ModelFigures
    num_images: int
    agreement: float | None
    mimic_loss: float
    learning_rate: float
    trials: tuple[Trial, ...]
    reconstructions: tuple[Reconstruction, ...]
    refinement: Refinement | None
    steps: tuple[Recovery, ...]
    seed: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=lambda: versions())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Report":
        """The inverse of `dataclasses.asdict`."""
        return cls(
            **{
                **values,
                "teacher": ModelFigures(**values["teacher"]),
                "student": ModelFigures(**values["student"]),
                "trials": tuple(_trial(trial) for trial in values["trials"]),
                "refinement": None if values["refinement"] is None else Refinement(**values["refinement"]),
                "reconstructions": tuple(Reconstruction(**block) for block in values["reconstructions"]),
                "steps": tuple(_recovery(step) for step in values["steps"]),
            }
        )


@dataclass(frozen=True)
class CompressionResult:
    """What `compress` gives back.

    Attributes:
        model: The compressed model, an ordinary `nn.Module`.
        plan: Its structure: blocks and kept nodes.
        report: Figures, losses, timings.
    """

    model: nn.Module
    plan: Plan
    report: Report

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Save model, plan and report to a folder.

        Args:
            folder: Created if missing.
            overwrite: Replace an earlier result in that folder. Nothing else is ever replaced.

        Raises:
            SaveFolderError: If the folder holds something else, or an earlier result and `overwrite` is not set.
        """
        check_output_folder(folder, overwrite=overwrite)
        save_model(self.model, folder, extra={RESULT_FILE: self.to_dict()})

    def to_dict(self) -> dict[str, Any]:
        """`result.json`: what one looks for first at the top, everything else in `plan` and `report`."""
        plan, report = self.plan.to_dict(), asdict(self.report)
        return {
            "teacher": report["teacher"],
            "student": report["student"],
            "budget": plan["budget"],
            "blocks": plan["blocks"],
            "hidden_features": plan["hidden_features"],
            "drop_ratio": plan["drop_ratio"],
            "agreement": report["agreement"],
            "mimic_loss": report["mimic_loss"],
            "seconds": report["seconds"],
            "seed": report["seed"],
            "versions": report["versions"],
            "plan": plan,
            "report": report,
        }


def load(folder: str | Path) -> CompressionResult:
    """Load a saved result, with its model in evaluation mode.

    Args:
        folder: What `CompressionResult.save` or `dcvit compress` wrote.

    Raises:
        SaveFolderError: If a file is missing, broken, or not dcvit's.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SaveFolderError(f"{str(folder)!r} is not a folder: expected one that dcvit saved.")
    values = _read_json(folder / RESULT_FILE)
    architecture = _read_json(folder / CONFIG_FILE).get("architecture")
    try:
        plan, report = Plan.from_dict(values["plan"]), Report.from_dict(values["report"])
    except (KeyError, TypeError, AttributeError) as error:
        raise SaveFolderError(
            f"{str(folder / RESULT_FILE)!r} is not a dcvit result ({type(error).__name__}: {error}). "
            "For another model use timm.create_model."
        ) from error
    try:
        model = load_model(f"local-dir:{folder}")
        adapter_for(model)
    except UnsupportedModelError as error:
        raise SaveFolderError(f"{str(folder)!r} holds a broken model ({architecture}): {error}") from error
    return CompressionResult(model, plan, report)


def save_model(model: nn.Module, folder: str | Path, *, extra: Mapping[str, Any] | None = None) -> None:
    """Write a model as `config.json` and `model.safetensors`, all files or none.

    Args:
        model: A supported model.
        folder: Created if missing; files of the same names are replaced.
        extra: More JSON files, by name.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, Path(temporary) / WEIGHTS_FILE, metadata={"format": "pt"})
        (Path(temporary) / WEIGHTS_FILE).chmod(0o644)  # safetensors writes for the owner alone
        for name, content in {CONFIG_FILE: dict(adapter_for(model).config(model)), **(extra or {})}.items():
            text = json.dumps(content, indent=2, allow_nan=True)
            (Path(temporary) / name).write_text(text + "\n", encoding="utf-8")
        folder.mkdir(exist_ok=True)
        for file in Path(temporary).iterdir():
            shutil.move(file, folder / file.name)


def check_output_folder(folder: str | Path, *, overwrite: bool = False) -> None:
    """Refuse a folder to which a result cannot be saved.

    Raises:
        SaveFolderError: If it is a file, holds something else, or an earlier result and `overwrite` is not set.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise SaveFolderError(f"{str(folder)!r} is a file: name a folder that is empty or does not exist.")
    present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    foreign = [name for name in present if name not in (CONFIG_FILE, WEIGHTS_FILE, RESULT_FILE)]
    if foreign or (present and RESULT_FILE not in present):
        raise SaveFolderError(
            f"{str(folder)!r} holds something else ({', '.join((foreign or present)[:3])}): "
            "name a folder that is empty or does not exist."
        )
    if present and not overwrite:
        raise SaveFolderError(
            f"{str(folder)!r} holds an earlier result: name another folder, or replace it with overwrite=True "
            "(--overwrite)."
        )


def versions() -> dict[str, str]:
    """The versions of what computes."""
    return {
        "dcvit": __version__,
        "torch": torch.__version__,
        "timm": metadata.version("timm"),
        "numpy": metadata.version("numpy"),
        "python": platform.python_version(),
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SaveFolderError(
            f"{str(path.parent)!r} has no {path.name}: expected a folder that dcvit saved."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SaveFolderError(
            f"{str(path)!r} is not valid JSON ({error}): the result is broken, compress again."
        ) from error
    if not isinstance(values, dict):
        raise SaveFolderError(f"{str(path)!r} holds a {type(values).__name__}: expected a dcvit result.")
    return values


def _trial(values: Mapping[str, Any]) -> Trial:
    recovery, reconstruction = values["recovery"], values["reconstruction"]
    return Trial(
        **{
            "epochs": 0 if recovery is None else len(recovery["losses"]),  # earlier versions did not write it
            **values,
            "recovery": None if recovery is None else _recovery(recovery),
            "reconstruction": None if reconstruction is None else Reconstruction(**reconstruction),
        }
    )


def _recovery(values: Mapping[str, Any]) -> Recovery:
    return Recovery(**{**values, "losses": tuple(values["losses"])})
