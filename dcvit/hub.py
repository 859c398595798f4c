"""A saved model on the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id

from dcvit._version import __version__
from dcvit.errors import HubError, SaveFolderError
from dcvit.results import SAVED_FILES, load

__all__ = ["push_to_hub"]


def push_to_hub(folder: str | Path, repo_id: str, *, private: bool = False, api: HfApi | None = None) -> str:
    """Upload a saved model: the files that dcvit saved, and nothing else of the folder.

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
        SaveFolderError: If a file is missing, broken, or not dcvit's.
        HubError: If the name is not one, or the hub refuses or cannot be reached.
    """
    folder = Path(folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"repo_id={repo_id!r}: expected OWNER/NAME ({error}).") from error
    load(folder)  # what does not load is not worth an upload
    missing = [name for name in SAVED_FILES if not (folder / name).is_file()]
    if missing:
        raise SaveFolderError(
            f"{str(folder)!r} has no {', '.join(missing)}: dcvit.load(folder).save(another) writes all files anew."
        )
    api = api or HfApi(library_name="dcvit", library_version=__version__)
    try:
        address = str(api.create_repo(repo_id, private=private, exist_ok=True))
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
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
