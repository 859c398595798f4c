"""The only part of dcvit that knows timm: one adapter per model family.

The algorithm sees a model through `ModelAdapter`. `require_supported` refuses what cannot be compressed,
by name and before any work; `adapter_for` then finds the adapter wherever one is needed.
"""

from dcvit.models.adapter import ModelAdapter, OutputLayer, adapter_for, adapters, require_supported
from dcvit.models.blocks import CompressedBlock, MlpHalf
from dcvit.models.eva import EvaAdapter  # imported, adapters make saved models known to timm
from dcvit.models.loading import (
    CONFIG_FILE,
    DEMO_MODEL,
    WEIGHTS_FILE,
    hub_repository,
    input_size,
    load_model,
    preprocessing,
)
from dcvit.models.modeling_dcvit import DroppedBlock
from dcvit.models.residual_cnn import ResidualCnnAdapter
from dcvit.models.swin import SwinAdapter
from dcvit.models.vision_transformer import create_vision_transformer

__all__ = [
    "CONFIG_FILE",
    "DEMO_MODEL",
    "WEIGHTS_FILE",
    "CompressedBlock",
    "DroppedBlock",
    "EvaAdapter",
    "MlpHalf",
    "ModelAdapter",
    "OutputLayer",
    "ResidualCnnAdapter",
    "SwinAdapter",
    "adapter_for",
    "adapters",
    "create_vision_transformer",
    "hub_repository",
    "input_size",
    "load_model",
    "preprocessing",
    "require_supported",
]
