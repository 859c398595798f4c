"""Bad input, and the sentence that each gets: it names the value, what was expected and the next step."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

import dcvit
from dcvit import Budget, DCViT
from dcvit.config import Ablation, AugmentationConfig, DistillationConfig, ReconstructionConfig, SynthesisConfig
from dcvit.data.synthesis import ProxySet
from dcvit.methods import Practise
from dcvit.models import load_model
from tests.conftest import CUT

IMAGES = torch.arange(4.0 * 64).view(4, 1, 8, 8) / 100


@dataclass(frozen=True)
class Place:
    """What bad input is made of.

    Attributes:
        tmp: A folder; in the sentences it is TMP. In it `empty` is an empty folder.
        small: A saved result in it.
    """

    tmp: Path
    small: Path

    @cached_property
    def demo(self) -> nn.Module:
        """The embedded model."""
        return load_model("demo")

    def compress(self, images: Any = IMAGES, model: Any = None, **options: Any) -> object:
        options = {"budget": Budget(macs=0.75), **options}
        return dcvit.compress(self.demo if model is None else model, images, **options)

    def edited(self, file: str, content: bytes | None) -> Path:
        """A copy of the saved result in which a file has another content, or none."""
        copy = self.tmp / "copy"
        shutil.copytree(self.small, copy)
        if content is None:
            (copy / file).unlink()
        else:
            (copy / file).write_bytes(content)
        return copy


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "small"
    dcvit.compress("demo", torch.randn(4, 1, 8, 8), Budget(macs=0.75), CUT).save(folder)
    return folder


@pytest.fixture
def place(saved: Path, tmp_path: Path) -> Place:
    shutil.copytree(saved, tmp_path / "small")
    (tmp_path / "empty").mkdir()
    return Place(tmp_path, tmp_path / "small")


def refusing(model: nn.Module, images: torch.Tensor) -> float:
    raise dcvit.DcvitError("clock='mine': not here.")


def classifies_each_token() -> nn.Module:
    model = load_model("demo")
    model.global_pool = ""
    return model


def broken_weights() -> nn.Module:
    model = load_model("demo")
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = float("nan")
    return model


CASES: dict[str, tuple[Callable[[Place], object], str]] = {
    "no pooling": (
        lambda at: at.compress(model=classifies_each_token()),
        (
            "The model classifies each token (global_pool=''): call model.reset_classifier(0) for a backbone, or give "
            "it a pooling, model.reset_classifier(num_classes, global_pool='avg')."
        ),
    ),
    "stopwatch": (
        lambda at: at.compress(stopwatch=refusing),
        "clock='mine': not here.",
    ),
    "latency of stages": (
        lambda at: dcvit.search.latency.plan_latency(
            timm.create_model("resnet18").eval(), Budget(latency=0.8, batch_size=1)
        ),
        (
            "candidates=[0, 1, 2, 3, 4]: the blocks differ in size or are compressed in pairs, so no single drop ratio "
            "fits them all. Ask for one of macs, params, file_size with block reconstruction and a searched structure, "
            "DCViT(recovery=ReconstructionConfig(), structure='searched'), or pass candidates of one size "
            "in DCViT(candidates=...)."
        ),
    ),
    "seed float": (
        lambda at: DCViT(seed=0.5),
        "seed=0.5: expected an int.",
    ),
    "budget none": (
        lambda at: Budget(),
        (
            "Budget(): expected exactly one of macs, params, file_size, activation_memory, latency, "
            "latency_ms, for example Budget(macs=0.75) for three quarters of the original's MACs."
        ),
    ),
    "budget two": (
        lambda at: Budget(macs=0.5, params=0.5),
        (
            "Budget(macs=0.5, params=0.5): expected exactly one of macs, params, file_size, "
            "activation_memory, latency, latency_ms, for example Budget(macs=0.75) for three quarters of the "
            "original's MACs."
        ),
    ),
    "budget zero": (
        lambda at: Budget(macs=0),
        "macs=0: an absolute number must be positive. Pass an int for an absolute number of macs.",
    ),
    "budget negative": (
        lambda at: Budget(macs=-0.5),
        (
            "macs=-0.5: a float is a fraction of the original and lies between 0 and 1, both excluded. Pass "
            "an int for an absolute number of macs."
        ),
    ),
    "budget one": (
        lambda at: Budget(macs=1.0),
        (
            "macs=1.0: a float is a fraction of the original and lies between 0 and 1, both excluded. Pass an"
            " int for an absolute number of macs."
        ),
    ),
    "budget above": (
        lambda at: Budget(params=1.5),
        (
            "params=1.5: a float is a fraction of the original and lies between 0 and 1, both excluded. Pass "
            "an int for an absolute number of params."
        ),
    ),
    "budget nan": (
        lambda at: Budget(macs=float("nan")),
        (
            "macs=nan: a float is a fraction of the original and lies between 0 and 1, both excluded. Pass an"
            " int for an absolute number of macs."
        ),
    ),
    "budget inf ms": (
        lambda at: Budget(latency_ms=float("inf")),
        ("latency_ms=inf: expected a positive number of milliseconds; pass a fraction of the original as latency=."),
    ),
    "budget str": (
        lambda at: Budget(macs="0.75"),
        "macs='0.75': expected a float (fraction) or an int (absolute number).",
    ),
    "budget bool": (
        lambda at: Budget(macs=True),
        "macs=True: expected a float (fraction) or an int (absolute number).",
    ),
    "latency ratio": (
        lambda at: Budget(latency=12),
        "latency=12: expected a fraction of the original. For milliseconds pass latency_ms=.",
    ),
    "batch size 0": (lambda at: Budget(latency=0.5, batch_size=0), "batch_size=0: expected an int, 1 or more."),
    "batch size float": (lambda at: Budget(latency=0.5, batch_size=8.0), "batch_size=8.0: expected an int, 1 or more."),
    "convention": (
        lambda at: Budget(macs=0.5, convention="flops"),
        "convention='flops': expected one of with_attention_products, without_attention_products.",
    ),
    "budget small": (
        lambda at: at.compress(budget=Budget(macs=0.01)),
        (
            "macs=0.01 asks for 69,853 of 6,985,344 (0.0100); 6 candidate blocks can meet 640,128 to "
            "6,985,343 (0.0916 to 1.0000). Allow all 8 blocks with "
            "DCViT(candidates=tuple(range(8))), --candidates 0,1,2,3,4,5,6,7, to go lower."
        ),
    ),
    "budget more than model": (
        lambda at: at.compress(budget=Budget(macs=10**12)),
        (
            "macs=1000000000000 asks for 1,000,000,000,000 of 6,985,344 (143156.8724); 6 candidate blocks can"
            " meet 640,128 to 6,985,343 (0.0916 to 1.0000)."
        ),
    ),
    "file size small": (
        lambda at: at.compress(budget=Budget(file_size=1000)),
        (
            "file_size=1000 asks for 1,000 of 1,617,504 (0.0006); 6 candidate blocks can meet 159,336 to "
            "1,617,503 (0.0985 to 1.0000). Allow all 8 blocks with "
            "DCViT(candidates=tuple(range(8))), --candidates 0,1,2,3,4,5,6,7, to go"
        ),
    ),
    "activation": (
        lambda at: at.compress(budget=Budget(activation_memory=0.5)),
        (
            "activation_memory=0.5 asks for 1,671,168 of 3,342,336 bytes at batch 64, but the peak is that of"
            " one block, and 2 blocks stay uncompressed, so no choice of hidden units lowers it: 3,342,336 is all "
            "that 6"
        ),
    ),
    "method": (
        lambda at: at.compress(method="dcvitt"),
        "method='dcvitt': expected a config (AutoFormer, CD, EViT, FSKD, MiniDeiT, Practise, MiR, S2ViTE, VTP, SPViT, "
        "DCViT), or the name of a method, one of autoformer, cd, evit, fskd, mini_deit, practise, mir, s2vite, vtp, "
        "spvit, dcvit (`dcvit methods` describes them).",
    ),
    "class token": (
        lambda at: at.compress(
            model=timm.create_model("resnet10t", num_classes=4),
            images=torch.zeros(2, 3, 32, 32),
            method=Practise(distillation=DistillationConfig(tokens="class")),
        ),
        'tokens="class": the model has no class token; distil all tokens with tokens="all".',
    ),
    "proxy set method": (
        lambda at: at.compress(method="fskd", proxy_set=ProxySet(IMAGES)),
        "proxy_set with method='fskd': only dcvit uses a proxy set; leave it out.",
    ),
    "run_dir method": (
        lambda at: at.compress(method="mir", run_dir=at.tmp / "r"),
        "run_dir with method='mir': only dcvit can resume a run; leave it out.",
    ),
    "model name": (
        lambda at: at.compress(model="vit_tyni"),
        "model='vit_tyni': timm knows no model of that name (Unknown model (vit_tyni)).",
    ),
    "model type": (
        lambda at: at.compress(model=torch.nn.Linear(2, 2)),
        (
            "Models of type torch.nn.modules.linear.Linear are not supported; timm's VisionTransformer, "
            "VisionTransformerDistilled, Eva, Beit, SwinTransformer, SwinTransformerV2, ResNet, EfficientNet, RegNet "
            "are (`dcvit"
        ),
    ),
    "model family": (
        lambda at: at.compress(model=timm.create_model("mixer_s32_224"), images=torch.zeros(2, 3, 224, 224)),
        (
            "Models of type timm.models.mlp_mixer.MlpMixer are not supported; timm's VisionTransformer, "
            "VisionTransformerDistilled, Eva, Beit, SwinTransformer, SwinTransformerV2, ResNet, EfficientNet, RegNet "
            "are (`dcvit"
        ),
    ),
    "torchvision model": (
        lambda at: at.compress(model=torchvision.models.resnet18(), images=torch.zeros(2, 3, 224, 224)),
        "Models of type torchvision.models.resnet.ResNet are not supported; timm's ",
    ),
    "model folder": (
        lambda at: at.compress(model="local-dir:/nowhere"),
        ("local-dir:/nowhere: there is no config.json in that folder; expected a folder that dcvit or timm saved."),
    ),
    "nan weights": (
        lambda at: at.compress(model=broken_weights()),
        "1 of 64 values of cls_token are NaN or infinite: load the model's weights again.",
    ),
    "images shape": (
        lambda at: at.compress(images=torch.zeros(4, 8, 8)),
        "The images have shape [4, 8, 8]: expected [N, C, H, W], here [N, 1, 8, 8].",
    ),
    "images channels": (
        lambda at: at.compress(images=torch.zeros(4, 3, 8, 8)),
        "The images have 3 channels (shape [4, 3, 8, 8]): the model takes 1. Convert them, or create the model with "
        "in_chans=3.",
    ),
    "images size": (
        lambda at: at.compress(images=torch.zeros(4, 1, 9, 9)),
        ("The images are 9x9: the model takes 8x8. Resize them, or call model.set_input_size(img_size=...)."),
    ),
    "images size of a CNN": (
        lambda at: at.compress(model=timm.create_model("resnet18").eval(), images=torch.zeros(4, 3, 9, 9)),
        "The images are 9x9: the model takes 224x224. Resize them, or set model.pretrained_cfg['input_size'].",
    ),
    "images dtype": (
        lambda at: at.compress(images=torch.zeros(4, 1, 8, 8, dtype=torch.uint8)),
        (
            "The images are torch.uint8: expected torch.float32, normalised as the model wants it "
            "(timm.data.create_transform(**timm.data.resolve_model_data_config(model)))."
        ),
    ),
    "images none": (
        lambda at: at.compress(images=torch.zeros(0, 1, 8, 8)),
        "There are no images: pass at least one, 50 to 1000 is usual.",
    ),
    "images nan": (
        lambda at: at.compress(images=torch.full((4, 1, 8, 8), float("nan"))),
        "The images [0, 1, 2, 3] have NaN or infinite pixels: remove or repair them.",
    ),
    "images path": (
        lambda at: at.compress(images="/nowhere"),
        "'/nowhere' is not a folder: expected one with image files.",
    ),
    "images empty folder": (
        lambda at: at.compress(images=at.tmp / "empty"),
        (
            "The folder 'TMP/empty' holds no image files (.jpg, .jpeg, .png, .bmp, .webp, .tif, .tiff, .ppm, .pgm): "
            "put some there, or name another folder."
        ),
    ),
    "images type": (
        lambda at: at.compress(images=42),
        "images is a int; expected a tensor [N, C, H, W], a Dataset, a DataLoader or a folder.",
    ),
    "images list": (
        lambda at: at.compress(images=["a", "b"]),
        (
            "2 of 2 files cannot be read as images: 'a' ([Errno 2] No such file or directory: 'a'), 'b' ([Errno 2] No "
            "such file or directory: 'b'): remove or replace them."
        ),
    ),
    "images of dicts": (
        lambda at: at.compress(images=[{"image": 1}]),
        "An image is a int; expected a tensor [C, H, W] or a PIL image.",
    ),
    "images of dicts without any": (
        lambda at: at.compress(images=[{"picture": 1, "label": 2}]),
        (
            "An item is a dict with the keys 'picture', 'label': expected the image under one of 'pixel_values', "
            "'image', 'images', 'img'. Rename the key, or pass only the images."
        ),
    ),
    "images all alike": (
        lambda at: at.compress(images=torch.zeros(4, 1, 8, 8)),
        (
            "All 4 images are the same, pixel by pixel: expected different ones. Look at what prepares them; values "
            "beyond what it expects, for example, all become white."
        ),
    ),
    "images of NaN pixels": (
        lambda at: at.compress(images=[Image.fromarray(np.full((8, 8), np.nan, dtype=np.float32))]),
        "Image 0 cannot be used: it has NaN or infinite pixels.",
    ),
    "images far too long": (
        lambda at: at.compress(images=[Image.new("L", (1, 4_000_000))]),
        (
            "Image 0 cannot be used: it is 1 x 4,000,000 pixels, and 8 x 32,000,000 once its shorter side fits the "
            "model, more than 134,217,728 in all; crop it or scale it down."
        ),
    ),
    "images as arrays": (
        lambda at: at.compress(images=np.zeros((4, 8, 8), dtype=np.uint8)),
        (
            "An image is a ndarray; expected a tensor [C, H, W] or a PIL image. Convert arrays with "
            "PIL.Image.fromarray(array)."
        ),
    ),
    "budget of per cent": (
        lambda at: at.compress(budget=Budget(macs=75)),
        "An int is an absolute number: for 75 % write 0.75.",
    ),
    "impl elsewhere": (
        lambda at: at.compress(method=DCViT(impl="cuda")),
        "impl='cuda' cannot run: ",
    ),
    "model is a folder": (
        lambda at: at.compress(model=str(at.small)),
        "There is a folder of that name: for the model in it pass local-dir:TMP/small.",
    ),
    "images file": (
        lambda at: at.compress(images=str(at.small / "config.json")),
        "'TMP/small/config.json' is not a folder: expected one with image files.",
    ),
    "num_blocks": (
        lambda at: at.compress(method=DCViT(num_blocks=99)),
        (
            "num_blocks=99: there are only 6 candidate blocks ([1, 2, 3, 4, 5, 6]). Ask for fewer, or allow "
            "more in DCViT(candidates=...)."
        ),
    ),
    "num_blocks 0": (lambda at: DCViT(num_blocks=0), "num_blocks=0: expected 1 or more, or None."),
    "candidates none": (
        lambda at: DCViT(candidates=()),
        "candidates=(): expected at least one block, or None.",
    ),
    "candidates float": (
        lambda at: DCViT(candidates=(1.5,)),
        "candidates=(1.5,): expected ints, blocks count from 0.",
    ),
    "candidates high": (
        lambda at: at.compress(method=DCViT(candidates=(1, 42))),
        "candidates=[1, 42]: block 42 does not exist, the model has 0 to 7.",
    ),
    "round_to 0": (lambda at: DCViT(round_to=0), "round_to=0: expected 1 or more."),
    "round_to high": (
        lambda at: at.compress(method=DCViT(round_to=100000)),
        "round_to=100000: a block has only 256 hidden units; pass a smaller one.",
    ),
    "seed": (lambda at: DCViT(seed=-1), "seed=-1: expected 0 or more."),
    "structure": (
        lambda at: DCViT(structure="most"),
        "structure='most': expected one of 'searched', 'fewest'.",
    ),
    "metric": (lambda at: Ablation(metric="l1"), "metric='l1': expected one of 'distillation', 'cross_entropy'."),
    "proxy set size": (
        lambda at: at.compress(proxy_set=ProxySet(torch.zeros(2, 1, 9, 9))),
        (
            "The proxy set's images are 9x9: the model takes 8x8. Resize them, or call "
            "model.set_input_size(img_size=...)."
        ),
    ),
    "ranking images": (
        lambda at: Ablation(ranking_images="noise"),
        "ranking_images='noise': expected one of 'synthetic', 'few-shot'.",
    ),
    "impl": (
        lambda at: DCViT(impl="cudnn"),
        "impl='cudnn': expected one of 'auto', 'eager', 'cpp', 'cuda', 'triton'.",
    ),
    "recovery": (
        lambda at: DCViT(recovery="fast"),
        "recovery='fast': expected a ReconstructionConfig or a DistillationConfig.",
    ),
    "units": (lambda at: ReconstructionConfig(units="best"), "units='best': expected one of 'greedy', 'random'."),
    "num_views": (lambda at: ReconstructionConfig(num_views=0), "num_views=0: expected 1 or more."),
    "step sizes": (
        lambda at: ReconstructionConfig(step_sizes=()),
        "step_sizes=(): expected one or more positive floats.",
    ),
    "step sizes negative": (
        lambda at: ReconstructionConfig(step_sizes=(0.1, -1)),
        "step_sizes=(0.1, -1): expected one or more positive floats.",
    ),
    "epochs": (lambda at: ReconstructionConfig(epochs=-1), "epochs=-1: expected 0 or more."),
    "learning rate": (
        lambda at: DistillationConfig(learning_rate=0.0),
        "learning_rate=0.0: expected a positive float or 'auto'.",
    ),
    "tokens": (lambda at: DistillationConfig(tokens="patch"), "tokens='patch': expected one of 'all', 'class'."),
    "updated": (
        lambda at: DistillationConfig(updated="none"),
        "updated='none': expected one of 'front', 'around', 'all'.",
    ),
    "lock_step": (lambda at: DistillationConfig(lock_step=0), "lock_step=0: expected 1 or more."),
    "synthesis images": (lambda at: SynthesisConfig(num_images=0), "num_images=0: expected 1 or more."),
    "betas": (lambda at: SynthesisConfig(betas=(0.5, 1.0)), "betas=(0.5, 1.0): expected two values in [0, 1)."),
    "jitter": (lambda at: SynthesisConfig(jitter=1.5), "jitter=1.5: expected a share of the image side in [0, 1)."),
    "flip": (lambda at: AugmentationConfig(flip=2.0), "flip=2.0: expected a probability."),
    "scale": (
        lambda at: AugmentationConfig(scale=(0.9, 0.1)),
        "scale=(0.9, 0.1): expected 0 < smallest <= largest <= 1.",
    ),
    "paper config to sweep": (
        lambda at: dcvit.sweep(at.demo, IMAGES, method=DCViT.paper()),
        (
            "recovery=DistillationConfig(epochs=2000, learning_rate=3e-05, learning_rates=(1e-05, 3e-05, 0.0001,"
            " 0.0003, 0.001), weight_decay=0.0001, warmup_epochs=20, batch_size=64, micro_batch=None, "
            "augmentation="
        ),
    ),
    "sweep none": (
        lambda at: dcvit.sweep(at.demo, IMAGES, ()),
        "budgets=(): expected at least one, for example (0.9, 0.8, 0.7).",
    ),
    "sweep same": (
        lambda at: dcvit.sweep(at.demo, IMAGES, (0.8, 0.8)),
        "budgets: 0.8 and 0.8 give the same structure; leave one of them out.",
    ),
    "sweep units": (
        lambda at: dcvit.sweep(at.demo, IMAGES, (Budget(macs=0.8), Budget(params=0.7))),
        "budgets: expected one metric and one convention for all, so that they can be ordered.",
    ),
    "sweep latency": (
        lambda at: dcvit.sweep(at.demo, IMAGES, (Budget(latency=0.8),)),
        "budgets of latency: expected one of macs, params, file_size; use Family.at for a latency.",
    ),
    "load none": (lambda at: dcvit.load("/nowhere"), "'/nowhere' is not a folder: expected one that dcvit saved."),
    "load foreign": (
        lambda at: dcvit.load(at.tmp / "empty"),
        "'TMP/empty' has no result.json: expected a folder that dcvit saved.",
    ),
    "load broken json": (
        lambda at: dcvit.load(at.edited("result.json", b"{")),
        (
            "'TMP/copy/result.json' is not valid JSON (Expecting property name enclosed in double quotes: "
            "line 1 column 2 (char 1)): the result is broken, compress again."
        ),
    ),
    "load list json": (
        lambda at: dcvit.load(at.edited("result.json", b"[]")),
        "'TMP/copy/result.json' holds a list: expected a dcvit result.",
    ),
    "load no plan": (
        lambda at: dcvit.load(at.edited("result.json", b"{}")),
        ("'TMP/copy/result.json' is not a dcvit result (KeyError: 'plan'). For another model use timm.create_model."),
    ),
    "load no weights": (
        lambda at: dcvit.load(at.edited("model.safetensors", None)),
        (
            "'TMP/copy' holds a broken model (dcvit_vision_transformer): local-dir:TMP/copy: there is no "
            "model.safetensors in that folder; expected a folder that dcvit or timm saved."
        ),
    ),
    "load cut weights": (
        lambda at: dcvit.load(at.edited("model.safetensors", (at.small / "model.safetensors").read_bytes()[:1000])),
        "'TMP/copy' holds a broken model (dcvit_vision_transformer): local-dir:TMP/copy is damaged (SafetensorError: ",
    ),
    "load forged header": (
        lambda at: dcvit.load(at.edited("model.safetensors", (1 << 62).to_bytes(8, "little") + b"{}")),
        "local-dir:TMP/copy is damaged (ValueError: the header of model.safetensors has 4,611,686,018,427,387,904 ",
    ),
    "load forged size": (
        lambda at: dcvit.load(
            at.edited(
                "config.json", (at.small / "config.json").read_bytes().replace(b'"depth": 8', b'"depth": 99999999')
            )
        ),
        "config.json holds the number 99999999, and no size of the weights is above 65536: they belong to",
    ),
    "load another model's config": (
        lambda at: dcvit.load(
            at.edited("config.json", (at.small / "config.json").read_bytes().replace(b'"depth": 8', b'"depth": 800'))
        ),
        (
            "config.json describes a model whose building takes more than 15,000 operations, and model.safetensors"
            " holds 304,217 values: they belong to different models"
        ),
    ),
    "load broken config": (
        lambda at: dcvit.load(at.edited("config.json", b"nonsense")),
        (
            "'TMP/copy/config.json' is not valid JSON (Expecting value: line 1 column 1 (char 0)): the result"
            " is broken, compress again."
        ),
    ),
    "load other architecture": (
        lambda at: dcvit.load(
            at.edited(
                "config.json",
                json.dumps(
                    {**json.loads((at.small / "config.json").read_text()), "architecture": "os.system"}
                ).encode(),
            )
        ),
        (
            "'TMP/copy' holds a broken model (os.system): local-dir:TMP/copy: config.json names the architecture "
            "'os.system'; expected a name that timm.list_models() has"
        ),
    ),
    "save occupied": (
        lambda at: dcvit.load(at.small).save(at.edited("mine.txt", b""), overwrite=True),
        "'TMP/copy' holds something else (mine.txt): name a folder that is empty or does not exist.",
    ),
    "save twice": (
        lambda at: dcvit.load(at.small).save(at.small),
        ("'TMP/small' holds an earlier result: name another folder, or replace it with overwrite=True (--overwrite)."),
    ),
    "save file": (
        lambda at: dcvit.load(at.small).save(at.small / "config.json"),
        "'TMP/small/config.json' is a file: name a folder that is empty or does not exist.",
    ),
    "save dtype": (
        lambda at: dcvit.load(at.small).save(at.tmp / "d", dtype=torch.int8),
        "dtype=torch.int8: expected one of torch.float32, torch.float16, torch.bfloat16.",
    ),
    "load family": (
        lambda at: dcvit.load_family(at.small),
        "'TMP/small' has no family.json: expected a folder that dcvit saved.",
    ),
    "family at": (
        lambda at: dcvit.load_family(at.tmp / "fam"),
        "'TMP/fam' has no family.json: expected a folder that dcvit saved.",
    ),
    "report": (
        lambda at: dcvit.write_report(at.tmp / "empty"),
        "'TMP/empty' has no result.json: expected a folder that dcvit saved.",
    ),
    "export format": (
        lambda at: dcvit.export_model(at.demo, at.tmp / "m.onnx", format="tflite"),
        "format='tflite': expected one of onnx, torch-export.",
    ),
    "push name": (
        lambda at: dcvit.push_to_hub(at.small, "no/such/name"),
        "repo_id='no/such/name': expected OWNER/NAME",
    ),
    "op shapes": (
        lambda at: dcvit.ops.distillation_loss(torch.zeros(1, 2, 3, 4), torch.zeros(2, 3, 5)),
        (
            "distillation_loss: student is [1, 2, 3, 4] and teacher [2, 3, 5]; expected [C, B, N, D] or [B, N, D], "
            "and [B, N, D]."
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gets_its_sentence(name: str, place: Place) -> None:
    call, sentence = CASES[name]
    before = sorted(path.relative_to(place.small) for path in place.small.rglob("*"))
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the sentence below is the match)
        call(place)
    assert isinstance(caught.value, dcvit.DcvitError) or name.startswith("op ")
    assert sentence in str(caught.value).replace(str(place.tmp), "TMP")
    assert sorted(path.relative_to(place.small) for path in place.small.rglob("*")) == before


def test_there_are_many_and_no_two_alike() -> None:
    assert len({sentence for _, sentence in CASES.values()}) >= 60
