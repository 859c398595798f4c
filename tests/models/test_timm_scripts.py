"""timm's own `train.py` and `validate.py` on saved students of each family, with their default arguments.

The wheel does not hold the scripts: `DCVIT_TIMM_SCRIPTS` names a folder with those of the installed version.
`test_hostile_folders.py` passes the arguments that they pass to `timm.create_model`, wherever it runs.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torchvision.transforms.functional import to_pil_image

from dcvit.artifacts.result import save_model
from dcvit.models import compressible
from tests.models.test_hostile_folders import EVA, RESNET, SWIN, VIT

SCRIPTS = os.environ.get("DCVIT_TIMM_SCRIPTS")
RUN = "import dcvit, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": VIT, "eva": EVA, "swin": SWIN,
    "cnn": (RESNET[0], {**RESNET[1], "layers": (1, 2, 1, 1), "pretrained_cfg_overlay": {"input_size": (3, 32, 32)}}),
}  # fmt: skip


@pytest.mark.skipif(SCRIPTS is None, reason="DCVIT_TIMM_SCRIPTS names no folder with timm's train.py and validate.py")
@pytest.mark.parametrize("kind", KINDS)
def test_timms_scripts_run_on_a_saved_student(kind: str, tmp_path: Path) -> None:
    name, arguments = KINDS[kind]
    model, folder = timm.create_model(name, **arguments).eval(), tmp_path / "student"
    view = compressible(model)
    block = next(block for block, cost in enumerate(view.cost().blocks) if cost.compressible)
    view.compress_block(block, range(view.hidden_features(block) // 2))
    save_model(view.model, folder)
    for split in ("train", "validation"):
        for label in range(4):
            (place := tmp_path / "images" / split / str(label)).mkdir(parents=True)
            for number in range(2):
                to_pil_image(torch.rand(3, 40, 40)).save(place / f"{number}.png")
    common: list[Any] = ["--data-dir", tmp_path / "images", "--model", f"local-dir:{folder}", "--pretrained"]
    common += ["--device", "cpu", "--batch-size", 4, "--workers", 0]
    for command in (
        ["train.py", *common, "--epochs", 1, "--warmup-epochs", 0, "--output", tmp_path / "out"],
        ["validate.py", *common],
    ):
        asked = [sys.executable, "-c", RUN, str(Path(str(SCRIPTS)) / command[0]), *map(str, command[1:])]
        done = subprocess.run(asked, capture_output=True, text=True, cwd=Path.cwd())
        assert done.returncode == 0, done.stderr[-2000:]
