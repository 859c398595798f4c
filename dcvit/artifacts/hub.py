"""Upload of a saved model to the Hugging Face hub."""

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
"""Half-precision dtypes by their name in a safetensors file. `load` returns all weights in float32."""


def push_to_hub(folder: str | Path, repo_id: str, *, private: bool = False, api: HfApi | None = None) -> str:
    """Upload the weights, configuration and result of a saved model, and no other file of its folder.

    The model card is generated again from the result, and the modelling file from this package's sources, so edits to
    the folder's copies are not uploaded. To change the card, edit it on the hub.

    After `import dcvit`, `timm.create_model("hf-hub:OWNER/NAME", pretrained=True)` loads the model. The model card says
    how to load it where dcvit is not installed.

    Args:
        folder: A folder that `CompressionResult.save` or `dcvit compress` wrote.
        repo_id: The repository, `OWNER/NAME`; it is created if it does not exist.
        private: Whether a new repository is visible only to its owner. An existing repository is not changed.
        api: The client; by default, one with the login of the hub's own tools.

    Returns:
        The URL of the repository.

    Raises:
        SaveFolderError: If a file is missing, broken, a link, or was not written by dcvit.
        UnsupportedModelError: If dcvit does not save models of this architecture.
        HubError: If `repo_id` is not a valid name, or the hub refuses the upload or cannot be reached.
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
            f"Nothing was uploaded, because no copy can be made ({error}): set TMPDIR to a folder with enough room."
        ) from error


def _stage(folder: Path, staged: Path) -> None:
    """Copy a saved model to an empty folder and load it there, so that a broken model is not uploaded.

    Raises:
        SaveFolderError: If a file is missing, broken, a link, or was not written by dcvit.
        UnsupportedModelError: If dcvit does not save models of this architecture.
        OSError: If there is not enough room.
    """
    for name in (CARD_FILE, MODELING_FILE):
        if (kind := files.kind_of(folder / name)) not in (None, "a regular file"):
            raise SaveFolderError(f"{str(folder / name)!r} is {kind}, which dcvit did not save: remove it.")
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
    except Exception as error:  # the client and its HTTP library may raise anything
        reason = " ".join(str(error).split())
        raise HubError(
            f"repo_id={repo_id!r}: not uploaded ({type(error).__name__}: {reason}). `hf auth login` logs in; its token "
            "needs the right to write."
        ) from error
    return address
