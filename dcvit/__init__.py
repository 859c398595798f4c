"""Dense few-shot compression of vision transformers: `dcvit.compress` makes a pretrained model meet a budget."""

from dcvit._version import __version__
from dcvit.compression import compress
from dcvit.config import AugmentationConfig, CompressionConfig, MimickingConfig, ReconstructionConfig, SynthesisConfig
from dcvit.errors import (
    BudgetError,
    DcvitError,
    DistributedError,
    DtypeError,
    ExportError,
    HubError,
    ImagesError,
    NonFiniteError,
    RunStoreError,
    SaveFolderError,
    UnsupportedModelError,
)
from dcvit.export import Exported, export_model
from dcvit.family import Family, load_family, sweep
from dcvit.hub import push_to_hub
from dcvit.images import FewShotImages, load_images
from dcvit.latency import Latency, compare_latency, measure_latency
from dcvit.latency_planning import plan_latency
from dcvit.metric import Metric
from dcvit.planning import Budget, Plan, plan
from dcvit.ranking import Ranking, rank
from dcvit.recovery import Recovery, recover
from dcvit.report import write_report
from dcvit.results import CompressionResult, Report, load
from dcvit.synthesis import MetricSet, synthesize

__all__ = [
    "AugmentationConfig",
    "Budget",
    "BudgetError",
    "CompressionConfig",
    "CompressionResult",
    "DcvitError",
    "DistributedError",
    "DtypeError",
    "ExportError",
    "Exported",
    "Family",
    "FewShotImages",
    "HubError",
    "ImagesError",
    "Latency",
    "Metric",
    "MetricSet",
    "MimickingConfig",
    "NonFiniteError",
    "Plan",
    "Ranking",
    "ReconstructionConfig",
    "Recovery",
    "Report",
    "RunStoreError",
    "SaveFolderError",
    "SynthesisConfig",
    "UnsupportedModelError",
    "__version__",
    "compare_latency",
    "compress",
    "export_model",
    "load",
    "load_family",
    "load_images",
    "measure_latency",
    "plan",
    "plan_latency",
    "push_to_hub",
    "rank",
    "recover",
    "sweep",
    "synthesize",
    "write_report",
]
