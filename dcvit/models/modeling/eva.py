# SPDX-License-Identifier: Apache-2.0
"""Evas and Beits that dcvit compressed, in torch and timm alone."""

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
"""Where timm has the architectures that a compressed Eva or Beit may be of."""


class PrunedBeit(Beit):  # type: ignore[misc]
    """timm's `Beit`, some of whose blocks may have no attention that would have to be told another image size."""

    blocks: nn.ModuleList

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """As of timm's."""
        blocks = self.blocks
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
    """The Eva or Beit that the `model_args` of a `config.json` describe, freshly initialised.

    Args:
        base: The timm architecture that was compressed.
        base_args: More arguments of it.
        img_size: Height and width of the images, or both as one number.
        num_classes: Classes of the head.
        in_chans: Channels of the images.
        global_pool: The pooling.
        per_layer_config: By the number of a block: `skip`, the parts that it lacks; `intermediate_size`, its hidden
            units.
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
    """Build an Eva or Beit the way timm builds its own, with its weights if `pretrained`; see `build`."""
    return build_model_with_cfg(
        build,
        ARCHITECTURE,
        pretrained,
        pretrained_filter_fn=_fit_weights,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **kwargs,
    )


def _fit_weights(state: dict[str, Tensor], model: TimmModule) -> dict[str, Tensor]:
    """Saved weights for a model built at another image size: what they say of positions is resampled.

    Timm's function for Beit tells the size that weights are of from their number, and so takes it for a square.
    """
    if isinstance(model, Eva):
        fitted: dict[str, Tensor] = checkpoint_filter_fn(state, model)
        return fitted
    patch, grid = model.patch_embed.patch_size, model.patch_embed.grid_size
    height, width = model.pretrained_model_args["img_size"]  # of the weights
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
    """Timm's entry point for Evas and Beits that dcvit compressed; the arguments come from `config.json`."""
    return create(pretrained, **kwargs)


# A module of dcvit registers it whatever a saved folder's file registered before, which need not know all of its parts.
if __package__ or not timm.is_model(ARCHITECTURE):
    register_model(dcvit_eva)
