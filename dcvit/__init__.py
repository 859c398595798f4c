"""Dense few-shot compression of vision transformers: `dcvit.compress` makes a pretrained model meet a budget."""

from dcvit._version import __version__
from dcvit.compression import compress
from dcvit.config import AugmentationConfig, CompressionConfig, MimickingConfig, ReconstructionConfig, SynthesisConfig
from dcvit.errors import BudgetError, DcvitError, ImagesError, SaveFolderError, UnsupportedModelError
from dcvit.images import FewShotImages, load_images
from dcvit.latency import Latency, compare_latency, measure_latency
from dcvit.latency_planning import plan_latency
from dcvit.metric import Metric
from dcvit.planning import Budget, Plan, plan
from dcvit.ranking import Ranking, rank
from dcvit.recovery import Recovery, recover
from dcvit.results import CompressionResult, Report, load
from dcvit.synthesis import MetricSet, synthesize

__all__ = [
    "AugmentationConfig",
    "Budget",
    "BudgetError",
    "CompressionConfig",
    "CompressionResult",
    "DcvitError",
    "FewShotImages",
    "ImagesError",
    "Latency",
    "Metric",
    "MetricSet",
    "MimickingConfig",
    "Plan",
    "Ranking",
    "ReconstructionConfig",
    "Recovery",
    "Report",
    "SaveFolderError",
    "SynthesisConfig",
    "UnsupportedModelError",
    "__version__",
    "compare_latency",
    "compress",
    "load",
    "load_images",
    "measure_latency",
    "plan",
    "plan_latency",
    "rank",
    "recover",
    "synthesize",
]
