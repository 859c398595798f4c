"""The table of docs/compatibility.md is what happens: compressed models under tools that know nothing of dcvit.

Each cell says "works", or "no" with the reason in the row's last column. Each check is run on a model with compressed,
dropped and pruned blocks, made as `dcvit.compress` makes what it returns, and a cell that says otherwise fails.
"""

import copy
import functools
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.beit import Block as BeitBlock
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dcvit.models import CompressedBlock, DroppedBlock, compressible
from dcvit.models.modeling.cnn import PointwiseBlock
from dcvit.models.modeling.shared import parameter_names
from tests.conftest import slow_but
from tests.models.test_cnn import create as create_cnn
from tests.variants import EVA_VARIANTS

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

# What tools warn of is theirs: that they are deprecated, for the most part.
pytestmark = pytest.mark.filterwarnings("ignore")


def vit() -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 48, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes).eval()


def swin() -> nn.Module:
    sizes = {"img_size": 32, "window_size": 2, "embed_dim": 24, "depths": (1, 2), "num_heads": (2, 4)}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, **sizes).eval()


def cnn() -> nn.Module:
    model: Any = timm.create_model("resnet18", num_classes=10, layers=(2, 2, 1, 1), channels=(16, 24, 32, 48)).eval()
    model.pretrained_cfg["input_size"] = (3, 32, 32)
    return model


def eva() -> nn.Module:
    return EVA_VARIANTS["dinov3"].create(depth=3)


FAMILIES: dict[str, Callable[[], nn.Module]] = {"ViT": vit, "EVA": eva, "Swin": swin, "CNN": cnn}
"""Small models."""


@functools.cache
def compressed(family: str) -> nn.Module:
    """A model with a compressed group of blocks, a pruned block and, where there are more, a dropped one."""
    model = FAMILIES[family]()
    view = compressible(model)
    for block in view.groups()[1]:
        view.compress_block(block, range(20))
    view.prune_block(0, range(12))
    if view.num_blocks() > 2:
        view.drop_block(view.num_blocks() - 1)
    return view.rebuild()


@dataclass
class Student:
    """A compressed model of the test's own, and what it gives for two images."""

    model: Any
    images: Tensor
    expected: Tensor
    folder: Path

    def require_close(self, found: Tensor, tolerance: float = 1e-4) -> None:
        """Two runtimes differ by the order of sums, 1e-6 of the largest output; what rounds weights says its own."""
        error = (found.float() - self.expected).abs().max() / self.expected.abs().max()
        assert error <= tolerance, f"the output differs by {float(error):.2g}"

    def layers(self) -> dict[str, nn.Module]:
        """All layers with products, by name."""
        return {name: m for name, m in self.model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


CHECKS: dict[str, Callable[[Student], None]] = {}


def check(tool: str) -> Callable[[Callable[[Student], None]], Callable[[Student], None]]:
    def entered(function: Callable[[Student], None]) -> Callable[[Student], None]:
        CHECKS[tool] = function
        return function

    return entered


@check("torchao `quantize_`, int8 weights")
def _(student: Student) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(student.model, quantization.Int8WeightOnlyConfig())
    student.require_close(student.model(student.images), 0.05)  # eight bits


@check("torch.ao, dynamic int8")
def _(student: Student) -> None:
    quantized = torch.ao.quantization.quantize_dynamic(student.model, {nn.Linear}, dtype=torch.qint8)
    assert any("quantized" in type(module).__module__ for module in quantized.modules())
    student.require_close(quantized(student.images), 0.1)  # eight bits, activations too


def run_onnx(student: Student, dynamo: bool) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    path = student.folder / "model.onnx"
    torch.onnx.export(student.model, (student.images,), path, dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: student.images.numpy()})
    student.require_close(torch.from_numpy(output))


@check("`torch.onnx.export(dynamo=True)`")
def _(student: Student) -> None:
    run_onnx(student, dynamo=True)


@check("`torch.onnx.export(dynamo=False)`")
def _(student: Student) -> None:
    run_onnx(student, dynamo=False)


@check("`torch.export`")
def _(student: Student) -> None:
    program, file = torch.export.export(student.model, (student.images,)), io.BytesIO()
    assert not [node for node in program.graph.nodes if "dcvit" in str(node.target)]
    torch.export.save(program, file)
    file.seek(0)
    student.require_close(torch.export.load(file).module()(student.images))


@check("`torch.jit.trace`")
def _(student: Student) -> None:
    traced = torch.jit.trace(student.model, student.images)
    assert "dcvit::" not in str(traced.inlined_graph)
    student.require_close(traced(student.images))


@check("`torch.jit.script`")
def _(student: Student) -> None:
    student.require_close(torch.jit.script(student.model)(student.images))


@check("`torch.fx.symbolic_trace`")
def _(student: Student) -> None:
    student.require_close(torch.fx.symbolic_trace(student.model)(student.images))


@check("`FlopCounterMode`")
def _(student: Student) -> None:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        student.model(student.images)
    macs = compressible(student.model).cost().total.macs("with_attention_products")
    # Torch counts the products of positions in a rotation, and dcvit what pads a window: within two percent.
    assert counter.get_total_flops() / 2 / len(student.images) == pytest.approx(macs, rel=0.02)


@check("fvcore `FlopCountAnalysis`")
def _(student: Student) -> None:
    fvcore = pytest.importorskip("fvcore.nn")
    counted = fvcore.FlopCountAnalysis(student.model, student.images).unsupported_ops_warnings(False)
    by_module = counted.by_module()
    assert all(by_module[name] > 0 for name in student.layers())


@check("accelerate, offloading to disk")
def _(student: Student) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.disk_offload(student.model, student.folder / "offloaded", execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in student.model.parameters())
    student.require_close(student.model(student.images))


@check("PEFT LoRA")
def _(student: Student) -> None:
    peft = pytest.importorskip("peft")
    names = [name for name in student.layers() if re.search(r"fc\d$|conv\d$", name)]
    adapted = peft.get_peft_model(student.model, peft.LoraConfig(target_modules=names, init_lora_weights=False))
    found = adapted(student.images)
    found.sum().backward()
    trained = [p for name, p in adapted.named_parameters() if "lora_" in name]
    assert len(trained) == 2 * len(names)
    assert all(p.grad is not None for p in trained)
    torch.testing.assert_close(adapted.merge_and_unload()(student.images), found, rtol=1e-3, atol=1e-4)


@check("`DistributedDataParallel`")
def _(student: Student) -> None:
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{student.folder}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(student.model)
        found = parallel(student.images)
        found.sum().backward()
        assert all(parameter.grad is not None for parameter in student.model.parameters())
        student.require_close(found)
    finally:
        distributed.destroy_process_group()


@check("EMA, `AveragedModel` and timm's `ModelEmaV3`")
def _(student: Student) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(student.model)
    averaged.update_parameters(student.model)
    student.require_close(averaged(student.images))
    ema = timm.utils.ModelEmaV3(student.model)
    ema.update(student.model)
    student.require_close(ema(student.images))


@check("AMP, autocast to bfloat16")
def _(student: Student) -> None:
    outputs: list[Tensor] = []
    for layer in student.layers().values():
        layer.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        found = student.model(student.images)
    assert {output.dtype for output in outputs} == {torch.bfloat16}, "each layer computes in that dtype"
    found.float().sum().backward()
    student.require_close(found, 0.1)  # eight bits of mantissa


@check("`channels_last`")
def _(student: Student) -> None:
    images = student.images.to(memory_format=torch.channels_last)
    student.require_close(student.model.to(memory_format=torch.channels_last)(images))


@check("full backward hooks")
def _(student: Student) -> None:
    fired: set[str] = set()
    for name, layer in student.layers().items():
        layer.register_full_backward_hook(functools.partial(lambda name, *_: fired.add(name), name))
    student.model(student.images.requires_grad_()).sum().backward()
    assert fired == student.layers().keys()


@check("the meta device")
def _(student: Student) -> None:
    found = student.model.to("meta")(student.images.to("meta"))
    assert found.is_meta
    assert found.shape == student.expected.shape


@check("`torch.save` of the `state_dict`")
def _(student: Student) -> None:
    file = io.BytesIO()
    torch.save(student.model.state_dict(), file)
    file.seek(0)
    student.model.load_state_dict(torch.load(file, weights_only=True))
    student.require_close(student.model(student.images))


@check("`torch.save` of the model, read where dcvit is not installed")
def _(student: Student) -> None:
    file = io.BytesIO()
    torch.save(student.model, file)
    assert b"dcvit" not in file.getvalue(), "The pickle names dcvit's class of blocks"


def table() -> dict[str, dict[str, str]]:
    """The rows of the page's table by tool, each by column."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def test_the_table_has_a_row_for_each_tool() -> None:
    assert list(table()) == list(CHECKS)
    for row in table().values():
        assert {row[family] for family in FAMILIES} <= {"works", "no"}
        assert ("no" in (row[family] for family in FAMILIES)) == bool(row["why not"])


@pytest.fixture(params=slow_but(FAMILIES, "ViT"))
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn; all but one are slow."""
    return str(request.param)


@pytest.fixture
def student(family: str, tmp_path: Path) -> Student:
    """A copy of the family's compressed model."""
    model = copy.deepcopy(compressed(family))
    images = IMAGES.clone()
    with torch.no_grad():
        expected = model(images)
    return Student(model, images, expected, tmp_path)


@pytest.mark.parametrize("tool", CHECKS)
def test_the_table_says_what_happens(tool: str, family: str, student: Student) -> None:
    row = table()[tool]
    try:
        CHECKS[tool](student)
    except Exception as error:
        if row[family] == "works":
            raise
        # The reason that the page gives quotes the error.
        quoted = re.findall(r"`([^`]+)`", row["why not"])
        if not any(quote in str(error) for quote in quoted):
            pytest.fail(f"{tool} fails with {family} for another reason than {PAGE.name} gives: {error}")
    else:
        assert row[family] == "works", f"{tool} works with {family}: say so in {PAGE.name}"


BLOCKS = (Block, ResPostBlock, EvaBlock, EvaBlockPostNorm, BeitBlock, SwinTransformerBlock, SwinTransformerV2Block)

OTHERS: dict[str, Callable[[], nn.Module]] = {
    "Beit": EVA_VARIANTS["beit"].create,
    "Eva with norms last": EVA_VARIANTS["eva_post_norm"].create,
    "EfficientNet": lambda: create_cnn("efficientnet"),
    "RegNet": lambda: create_cnn("regnet"),
}


@pytest.mark.parametrize("units", [0, 3])
@pytest.mark.parametrize("kind", OTHERS)
def test_other_blocks_script_too(kind: str, units: int) -> None:
    """Also with no hidden unit left."""
    view = compressible(OTHERS[kind]())
    view.compress_block(next(block for block, of in enumerate(view.cost().blocks) if of.compressible), range(units))
    student, images = view.rebuild(), torch.randn(2, *view.input_size())
    torch.testing.assert_close(torch.jit.script(student)(images), student(images))


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_compressed_block_takes_what_timm_gives_to_its_blocks(kind: type[nn.Module]) -> None:
    """By name, because a scripted function names its arguments."""
    for made in (CompressedBlock, DroppedBlock):
        assert parameter_names([kind.forward]) <= parameter_names([made.forward])


def test_the_models_have_compressed_blocks(family: str) -> None:
    """The table must not cover only timm's blocks."""
    assert any(isinstance(module, CompressedBlock | PointwiseBlock) for module in compressed(family).modules())
