# SPDX-License-Identifier: Apache-2.0
"""Evas and Beits that dcvit compressed; this file needs only torch and timm."""

from collections.abc import Mapping
from typing import Any

import timm
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from timm.models import build_model_with_cfg, register_model
from timm.models.beit import Beit
from timm.models.eva import Eva, checkpoint_filter_fn
from torch import Tensor, nn

from dcvit.models.modeling.shared import TimmModule, compress_blocks, create_base

__all__ = ["ARCHITECTURE", "FILES", "PrunedBeit", "build", "create", "dcvit_eva"]

ARCHITECTURE = "dcvit_eva"
"""The name under which timm's registry knows compressed Evas and Beits."""


FILES = ("timm.models.eva", "timm.models.beit")
"""timm's modules that define the architectures of compressed Evas and Beits."""


class PrunedBeit(Beit):  # type: ignore[misc]
    """A timm `Beit` in which some blocks may have no attention."""

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """Set the image size as timm's method does, but skip blocks without attention."""
        blocks: TimmModule = self.get_submodule("blocks")  # TorchScript takes no annotation of the class
        self.blocks = nn.ModuleList(block for block in blocks if hasattr(block, "attn"))
        try:
            super().set_input_size(*args, **kwargs)
        finally:
            self.blocks = blocks


def build(
    *,
    base: str,
    base_args: Mapping[str, Any],
    img_size: Any,
    num_classes: int,
    in_chans: int,
    global_pool: str,
    per_layer_config: Mapping[str, Mapping[str, Any]],
    **kwargs: Any,
) -> nn.Module:
    """Build the Eva or Beit that the `model_args` of a `config.json` describe, freshly initialised.

    Args:
        base: The timm architecture that was compressed.
        base_args: More arguments of that architecture.
        img_size: Height and width of the images, or both as one number.
        num_classes: Classes of the head.
        in_chans: Channels of the images.
        global_pool: The type of pooling.
        per_layer_config: Settings by the number of a block: `skip` lists the parts that it lacks, and
            `intermediate_size` is its number of hidden units.
        kwargs: Drop rates, which timm's scripts pass.
    """
    size = img_size if isinstance(img_size, int) else tuple(img_size)
    model = create_base(
        base,
        base_args,
        FILES,
        kwargs,
        img_size=size,
        num_classes=num_classes,
        in_chans=in_chans,
        global_pool=global_pool,
    )
    if isinstance(model, Beit):
        model.__class__ = PrunedBeit
    compress_blocks([(model.blocks, index) for index in range(len(model.blocks))], per_layer_config)
    return model


def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build an Eva or Beit as timm builds its own models, with weights if `pretrained`; see `build`."""
    return build_model_with_cfg(
        build,
        ARCHITECTURE,
        pretrained,
        pretrained_filter_fn=_fit_weights,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **kwargs,
    )


def _fit_weights(state: dict[str, Tensor], model: TimmModule) -> dict[str, Tensor]:
    """Return saved weights for a model built at another image size, with the position weights resampled.

    timm's function for Beit infers the old size from the number of weights, and so assumes a square.
    """
    if isinstance(model, Eva):
        fitted: dict[str, Tensor] = checkpoint_filter_fn(state, model)
        return fitted
    patch, grid = model.patch_embed.patch_size, model.patch_embed.grid_size
    height, width = model.pretrained_model_args["img_size"]  # the image size of the weights
    old = height // patch[0], width // patch[1]
    if old == tuple(grid):
        return state

    def resampled(name: str, tensor: Tensor) -> Tensor:
        if name == "pos_embed":
            return resample_abs_pos_embed(tensor, new_size=grid, old_size=old, num_prefix_tokens=1)
        if name.endswith("relative_position_bias_table"):
            shape = model.get_parameter(name).shape
            return resize_rel_pos_bias_table(tensor, new_window_size=grid, new_bias_shape=shape, old_window_size=old)
        return tensor

    return {name: resampled(name, tensor) for name, tensor in state.items()}


def dcvit_eva(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create a compressed Eva or Beit: timm's entry point, whose arguments come from `config.json`."""
    return create(pretrained, **kwargs)


# dcvit's own module always registers it, because a saved folder's file may have registered a version with fewer parts.
if __package__ or not timm.is_model(ARCHITECTURE):
    register_model(dcvit_eva)
