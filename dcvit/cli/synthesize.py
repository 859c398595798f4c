"""`dcvit synthesize`: make the proxy set of a model."""

import argparse
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torchvision.utils import save_image

from dcvit.artifacts.result import PROXY_SET_FILE, check_folder
from dcvit.artifacts.saving import or_elsewhere, replacing_folder, require_writable
from dcvit.cli.arguments import TV_EXPONENT_HELP, device_argument, impl_argument, model_arguments
from dcvit.cli.command import Command
from dcvit.cli.inputs import load_named_model
from dcvit.config import SynthesisConfig
from dcvit.context import RunContext
from dcvit.data.synthesis import synthesize
from dcvit.errors import SaveFolderError
from dcvit.models import preprocessing
from dcvit.models.teacher import freeze
from dcvit.runtime.files import file_mode, is_draft
from dcvit.runtime.progress import TerminalProgress

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser)
    settings = SynthesisConfig()
    parser.add_argument("--num-images", type=int, default=settings.num_images, metavar="N", help="made in one batch")
    parser.add_argument("--iterations", type=int, default=settings.iterations, metavar="N", help="steps of Adam")
    parser.add_argument("--tv-exponent", type=float, default=settings.tv_exponent, metavar="β", help=TV_EXPONENT_HELP)
    parser.add_argument("--seed", type=int, default=0, help="same seed, same images")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder for the images; empty or new")
    impl_argument(parser)
    device_argument(parser)


def _run(arguments: argparse.Namespace, progress: TerminalProgress) -> dict[str, Any]:
    _check_output(Path(arguments.out))
    model = freeze(load_named_model(arguments.model, arguments))
    config = SynthesisConfig(
        num_images=arguments.num_images, iterations=arguments.iterations, tv_exponent=arguments.tv_exponent
    )
    proxy_set = synthesize(model, config, RunContext(arguments.seed, arguments.impl, progress=progress))
    assert proxy_set.targets is not None
    images, targets = proxy_set.images.cpu(), proxy_set.targets.cpu()
    pixels = preprocessing(model).pixels(images)
    pixels = pixels if pixels.shape[1] in (1, 3) else pixels.mean(1, keepdim=True)

    def save(out: Path) -> None:
        _check_output(out)
        with replacing_folder(out) as draft:
            save_file({"images": images.contiguous(), "targets": targets}, draft / PROXY_SET_FILE)
            os.chmod(draft / PROXY_SET_FILE, file_mode(draft))  # safetensors makes files that only the owner can read
            save_image(pixels, draft / "images.png", nrow=10)

    or_elsewhere(save, arguments.out)
    return {"images": list(images.shape), "loss": proxy_set.loss, "seed": arguments.seed, "out": str(arguments.out)}


def _check_output(folder: Path) -> None:
    """Refuse a folder that is not empty or cannot be written.

    Raises:
        SaveFolderError: If it is not empty or cannot be written.
    """
    check_folder(folder)
    if folder.is_dir() and not all(map(is_draft, os.listdir(folder))):
        raise SaveFolderError(f"{str(folder)!r} is not empty: name a folder that is empty or does not exist.")
    require_writable(folder)


def _show(values: dict[str, Any]) -> str:
    return f"{values['images'][0]} images, loss {values['loss']:.4g}; saved to {values['out']}."


COMMAND = Command(
    name="synthesize",
    summary="make the proxy set from a model",
    description=(
        "Invert a model: make images that it assigns to random classes. Write metric_set.safetensors (images, targets) "
        "and images.png."
    ),
    run=_run,
    show=_show,
    add_arguments=_add_arguments,
)
