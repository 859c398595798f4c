"""timm's VisionTransformer variants that the tests run over, small and with random weights."""

from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import nn

SMALL = {"img_size": 32, "depth": 4, "embed_dim": 48, "num_heads": 3, "num_classes": 10}


@dataclass(frozen=True)
class Variant:
    """A timm architecture, made small."""

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    def create(self, **changes: Any) -> nn.Module:
        """The model in evaluation mode, the same weights each time."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = timm.create_model(self.name, **{**SMALL, **self.kwargs, **changes})
            # LayerScale starts at 1e-5, position embeddings at 0.02, class tokens at 1e-6: far from a trained model's.
            for parameter in model.parameters():
                if parameter.ndim == 1 or parameter.shape[0] == 1:
                    nn.init.normal_(parameter, mean=float(parameter.detach().mean().round()), std=0.2)
            if isinstance(model.head, nn.Linear):
                model.head.weight.data.mul_(20)  # logits of a few units, as after training
        return model.eval()


VARIANTS = {
    "plain": Variant("vit_tiny_patch16_224"),
    "distilled": Variant("deit_tiny_distilled_patch16_224"),
    "layer_scale": Variant("deit3_small_patch16_224"),
    "registers": Variant("vit_small_patch14_reg4_dinov2", {"img_size": 28}),
    "swiglu_packed": Variant("vit_giant_patch14_dinov2", {"img_size": 28, "mlp_ratio": 4.0}),
    "swiglu_rmsnorm": Variant("aimv2_large_patch14_224", {"img_size": 28, "mlp_ratio": 4.0}),
    "pre_norm_quick_gelu": Variant("vit_base_patch16_clip_quickgelu_224"),
    "attention_pool": Variant("vit_base_patch16_siglip_224"),
    "average_pool": Variant("vit_base_patch16_siglip_gap_224"),
    "post_norm": Variant("vit_base_patch16_rpn_224"),
    "qk_norm": Variant("vit_little_patch16_reg4_gap_256", {"mlp_ratio": 4.0}),
    "norms_everywhere": Variant("test_vit4", {"patch_size": 16}),
    "mlp_norm": Variant("beit3_base_patch16_224"),
    "dynamic_size": Variant("vit_tiny_patch16_224", {"dynamic_img_size": True}),
    "rectangle_5_channels": Variant("vit_tiny_patch16_224", {"img_size": (32, 48), "in_chans": 5}),
    "backbone": Variant("vit_small_patch14_dinov2", {"img_size": 28, "num_classes": 0}),
}
