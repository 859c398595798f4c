"""The only part of dcvit that knows timm: one adapter per model family.

The algorithm sees a model through `ModelView`. `require_supported` refuses a model that cannot be compressed, names
the part that is in the way, and does so before any work. `compressible` then returns the adapter wherever one is
needed.
"""

from dcvit.models.base import ModelView, OutputLayer
from dcvit.models.behaviour import remove_state_hooks, require_plain_behaviour
from dcvit.models.blocks import fuse, unfuse
from dcvit.models.cnn import CnnView
from dcvit.models.eva import EvaView
from dcvit.models.loading import (
    CONFIG_FILE,
    DEMO_MODEL,
    WEIGHTS_FILE,
    hub_repository,
    input_size,
    load_model,
    preprocessing,
)
from dcvit.models.modeling.shared import CompressedBlock, DroppedBlock
from dcvit.models.registry import compressible, families, require_supported
from dcvit.models.standalone import standalone_source
from dcvit.models.swin import SwinView
from dcvit.models.vision_transformer import create_vision_transformer

__all__ = [
    "CONFIG_FILE",
    "DEMO_MODEL",
    "WEIGHTS_FILE",
    "CnnView",
    "CompressedBlock",
    "DroppedBlock",
    "EvaView",
    "ModelView",
    "OutputLayer",
    "SwinView",
    "compressible",
    "create_vision_transformer",
    "families",
    "fuse",
    "hub_repository",
    "input_size",
    "load_model",
    "preprocessing",
    "remove_state_hooks",
    "require_plain_behaviour",
    "require_supported",
    "standalone_source",
    "unfuse",
]
