"""timm's isotropic vision transformers that the tests run over, small and with random weights."""

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
            # LayerScale starts at 1e-5, position embeddings at 0.02, class tokens at 1e-6, position biases at zero: far
            # from a trained model's.
            for parameter in model.parameters():
                if parameter.ndim == 1 or parameter.shape[0] == 1 or not parameter.any():
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
    "qk_norm": Variant("vit_little_patch16_reg4_gap_256", {"mlp_ratio": 4.0, "qk_norm": True}),
    "norms_everywhere": Variant("test_vit4", {"patch_size": 16}),
    "mlp_norm": Variant("beit3_base_patch16_224"),
    "dynamic_size": Variant("vit_tiny_patch16_224", {"dynamic_img_size": True}),
    "rectangle_5_channels": Variant("vit_tiny_patch16_224", {"img_size": (32, 48), "in_chans": 5}),
    "backbone": Variant("vit_small_patch14_dinov2", {"img_size": 28, "num_classes": 0}),
}
"""Of `VisionTransformer`."""

HEAD = {"head_init_scale": 1.0}  # timm's 0.001 leaves no logits

EVA_VARIANTS = {
    "dinov3": Variant("vit_small_patch16_dinov3", HEAD),
    "eva02": Variant("eva02_base_patch14_224", {"img_size": 28, **HEAD}),
    "rope_mixed": Variant("vit_small_patch16_rope_mixed_ape_224", HEAD),
    "perception_encoder": Variant("vit_pe_core_tiny_patch16_384", HEAD),
    "eva_post_norm": Variant("eva02_enormous_patch14_clip_224", {"img_size": 28, **HEAD}),
    "grouped_queries": Variant("vit_base_patch16_sapiens2", {"num_kv_heads": (3, 1, 1, 3), **HEAD}),
    "beit": Variant("beit_base_patch16_224", HEAD),
    "shared_bias": Variant(
        "beitv2_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, **HEAD}
    ),
}
"""Of `Eva` and `Beit`."""

REPRESENTATIVES = ("plain", "swiglu_packed", "post_norm", "attention_pool", "eva02")
"""Between them each kind of block, MLP, position and head: what tests run over that go through a whole compression."""
