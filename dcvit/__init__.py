"""Dense few-shot compression of vision transformers: `dcvit.compress` makes a pretrained model meet a budget.

This module exports all that most users need. Other methods are in `dcvit.methods`, parts of their settings in
`dcvit.config`, errors in `dcvit.errors`, measurements in `dcvit.metrics`, and the steps of the algorithm in
`dcvit.data`, `dcvit.search` and `dcvit.recovery`.
"""

from dcvit._version import __version__
from dcvit.artifacts.export import export_model
from dcvit.artifacts.hub import push_to_hub
from dcvit.artifacts.result import CompressionResult, load
from dcvit.budget import Budget
from dcvit.compression.compress import compress
from dcvit.compression.sweep import Family, load_family, sweep
from dcvit.config import DCViT
from dcvit.data.images import load_images
from dcvit.errors import DcvitError
from dcvit.models import fuse, unfuse
from dcvit.report import write_report

__all__ = [
    "Budget",
    "CompressionResult",
    "DCViT",
    "DcvitError",
    "Family",
    "__version__",
    "compress",
    "export_model",
    "fuse",
    "load",
    "load_family",
    "load_images",
    "push_to_hub",
    "sweep",
    "unfuse",
    "write_report",
]
