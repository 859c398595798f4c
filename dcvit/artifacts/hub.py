"""A saved model on the Hugging Face hub."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import safe_open

from dcvit._version import __version__
from dcvit.artifacts.result import CARD_FILE, MODELING_FILE, RESULT_FILE, SAVED_FILES, load, read_json, reading
from dcvit.errors import HubError, SaveFolderError
from dcvit.models import CONFIG_FILE, WEIGHTS_FILE, standalone_source
from dcvit.runtime import files

__all__ = ["push_to_hub"]

HALF = {"F16": torch.float16, "BF16": torch.bfloat16}
"""What weights in half precision are called in a file; `load` gives them back in float32."""


def push_to_hub(folder: str | Path, repo_id: str, *, private: bool = False, api: HfApi | None = None) -> str:
    """Upload a saved model: its weights, configuration and result, and nothing else of the folder.

    The model card is written anew from the result, and the modelling file is made of this package's sources, so that
    what was changed in the folder's goes nowhere. A card of one's own belongs on the hub.

    After `import dcvit`, `timm.create_model("hf-hub:OWNER/NAME", pretrained=True)` loads it; the model card says how to
    load it where dcvit is not installed.

    Args:
        folder: What `CompressionResult.save` or `dcvit compress` wrote.
        repo_id: `OWNER/NAME`; made if there is no such repository.
        private: Whether a new repository is seen by its owner alone. One that exists stays as it is.
        api: The client; by default the one that the hub's own tools have been logged in with.

    Returns:
        The address of the repository.

    Raises:
        SaveFolderError: If a file is missing, broken, a link, or not dcvit's.
        UnsupportedModelError: If the model is none that dcvit saves.
        HubError: If the name is not one, or the hub refuses or cannot be reached.
    """
    folder = Path(folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"repo_id={repo_id!r}: expected OWNER/NAME ({error}).") from error
    try:
        with TemporaryDirectory(prefix="dcvit-") as staged:
            _stage(folder, Path(staged))
            return _upload(
                Path(staged), repo_id, private, api or HfApi(library_name="dcvit", library_version=__version__)
            )
    except OSError as error:
        raise HubError(
            f"Nothing was uploaded, no copy can be made ({error}): set TMPDIR to a folder with room for one."
        ) from error


def _stage(folder: Path, staged: Path) -> None:
    """Copy a saved model to an empty folder, and load it there: what does not load is not worth an upload.

    Raises:
        SaveFolderError: If a file is missing, broken, a link, or not dcvit's.
        UnsupportedModelError: If the model is none that dcvit saves.
        OSError: If there is no room for it.
    """
    for name in (CARD_FILE, MODELING_FILE):
        if (kind := files.kind_of(folder / name)) not in (None, "a regular file"):
            raise SaveFolderError(f"{str(folder / name)!r} is {kind}, which dcvit did not save: take it away.")
    for name in (RESULT_FILE, CONFIG_FILE, WEIGHTS_FILE):
        with reading(folder / name):
            source = files.open_regular(folder / name)
        with source, files.create(staged / name) as copy:
            shutil.copyfileobj(source, copy)
    try:
        result = load(staged)
    except SaveFolderError as error:
        raise SaveFolderError(str(error).replace(str(staged), str(folder))) from error
    with safe_open(staged / WEIGHTS_FILE, framework="pt") as weights:
        stored = [HALF[code] for name in weights.keys() if (code := weights.get_slice(name).get_dtype()) in HALF]  # noqa: SIM118
    card = result.files(stored[0] if stored else None)[CARD_FILE]
    (staged / CARD_FILE).write_text(card, encoding="utf-8")
    (staged / MODELING_FILE).write_text(standalone_source(read_json(staged / CONFIG_FILE)), encoding="utf-8")


def _upload(staged: Path, repo_id: str, private: bool, api: HfApi) -> str:
    try:
        address = str(api.create_repo(repo_id, private=private, exist_ok=True))
        api.upload_folder(
            repo_id=repo_id,
            folder_path=staged,
            allow_patterns=list(SAVED_FILES),
            commit_message=f"Upload a model that dcvit {__version__} compressed",
        )
    except Exception as error:  # whatever the client and the HTTP library below it raise
        reason = " ".join(str(error).split())
        raise HubError(
            f"repo_id={repo_id!r}: not uploaded ({type(error).__name__}: {reason}). `hf auth login` logs in; its token "
            "needs the right to write."
        ) from error
    return address
