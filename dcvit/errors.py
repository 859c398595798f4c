"""Errors that dcvit raises if the caller's input cannot be used, and its warnings.

Every message names the value, what was expected and the next step. All errors are `ValueError`s, so code that does not
import dcvit's classes can still catch them. The command line turns them into exit code 2.
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
    """Base class of all errors of dcvit."""


class UnsupportedModelError(DcvitError):
    """The model, or a part of it that the message names, cannot be compressed."""


class BudgetError(DcvitError):
    """The budget is malformed, or cannot be met by the model."""


class DistributedError(DcvitError):
    """The processes of one compression got different inputs, or a requirement of distributed runs is missing."""


class DtypeError(DcvitError):
    """A dtype cannot hold a model's weights, or a file format cannot hold the dtype."""


class ExportError(DcvitError):
    """A requirement of an export is missing, or the outputs of the exported file differ from the model's."""


class HubError(DcvitError):
    """The hub refuses an upload, or cannot be reached."""


class ImagesError(DcvitError):
    """The few-shot images do not fit the model."""


class NonFiniteError(DcvitError):
    """Weights or activations are NaN or infinite; the message names where."""


class RunStoreError(DcvitError):
    """A run's folder is in use, belongs to another run, was not written by dcvit, or cannot be written."""


class SaveFolderError(DcvitError):
    """A folder to save to is occupied, or a folder to load from is damaged or was not written by dcvit."""


class DcvitWarning(UserWarning):
    """Base class of all warnings of dcvit."""


class DamagedEntryWarning(DcvitWarning):
    """A checkpoint entry on disk is damaged; it is computed again."""


class HooksWarning(DcvitWarning):
    """The model has hooks that leave its output as it is and fire during the work, or hooks of its `state_dict`."""


class ImagesWarning(DcvitWarning):
    """Images were skipped or rescaled, are copies or of a single colour, or seem not to be normalised."""


class MemoryWarning(DcvitWarning):
    """The micro-batch is smaller than the requested one, because memory did not suffice."""
