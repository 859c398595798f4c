"""What dcvit raises when the caller's input cannot be used.

Every message names the value, what was expected and the next step. All of them are `ValueError`s, so that code
that does not know dcvit can still catch them; the command line turns them into exit code 2. And what it warns of.
"""

__all__ = [
    "BudgetError",
    "DamagedEntryWarning",
    "DcvitError",
    "DcvitWarning",
    "DistributedError",
    "DtypeError",
    "ExportError",
    "HooksWarning",
    "HubError",
    "ImagesError",
    "ImagesWarning",
    "MemoryWarning",
    "NonFiniteError",
    "RunStoreError",
    "SaveFolderError",
    "UnsupportedModelError",
]


class DcvitError(ValueError):
    """Base class of everything that dcvit refuses."""


class UnsupportedModelError(DcvitError):
    """The model, or a part of it that the message names, cannot be compressed."""


class BudgetError(DcvitError):
    """The budget is malformed, or cannot be met by the model."""


class DistributedError(DcvitError):
    """The processes of one compression were not given the same, or what they need is missing."""


class DtypeError(DcvitError):
    """A dtype cannot hold a model's weights, or a file format cannot hold the dtype."""


class ExportError(DcvitError):
    """What an export needs is missing, or the exported file does not compute what the model does."""


class HubError(DcvitError):
    """The hub refuses an upload, or cannot be reached."""


class ImagesError(DcvitError):
    """The few-shot images do not fit the model."""


class NonFiniteError(DcvitError):
    """Weights or activations are NaN or infinite; the message names where."""


class RunStoreError(DcvitError):
    """A run's folder is in use, of another run, foreign, or cannot be written."""


class SaveFolderError(DcvitError):
    """A folder to save to is occupied, or a folder to load from is broken or foreign."""


class DcvitWarning(UserWarning):
    """Base class of everything that dcvit puts up with and says."""


class DamagedEntryWarning(DcvitWarning):
    """A unit on disk is not what was written; it is computed again."""


class HooksWarning(DcvitWarning):
    """The model has hooks that leave its output as it is; they fire during the work."""


class ImagesWarning(DcvitWarning):
    """Images were left out or scaled, are copies or of one colour, or look as if they were not normalised."""


class MemoryWarning(DcvitWarning):
    """Fewer images pass through a model at once than was asked for."""
