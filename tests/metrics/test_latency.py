"""Timing, the latency model and latency budgets, with a stopwatch that reads times off the modules."""

import itertools
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import Mlp, PatchEmbed
from timm.layers.attention import Attention
from torch import Tensor, nn

import dcvit
from dcvit.history import LatencyModel, Plan, StructureTiming
from dcvit.metrics import latency as latency_module
from dcvit.metrics.latency import (
    Latency,
    Timing,
    compare_latency,
    example_images,
    in_mode,
    measure_latency,
    time_cpu,
    time_forward,
)
from dcvit.metrics.latency_model import calibrate, time_structures
from dcvit.models.surgery import pruned_skeleton
from dcvit.runtime.precision import FULL, Precision
from dcvit.search.latency import TOLERANCE, plan_latency
from dcvit.search.plan import plan as make_plan
from tests.conftest import QUICK, slow_but
from tests.variants import VARIANTS

DEPTH = 8
MODEL = VARIANTS["plain"].create(depth=DEPTH)
HIDDEN = 192


@dataclass
class Clock:
    """Times a module by its parts: 3 ms a stem, 2 ms an attention, 4 ms an MLP of 192 units, 0.1 ms of which stay.

    Attributes:
        inside: What hidden units take in a whole model, over what they take in a chain of blocks: a latency model
            that is calibrated on blocks is wrong by that.
        drift: By how much each run takes longer than the one before, as a share.
    """

    inside: float = 1.0
    drift: float = 0.0
    runs: int = 0

    def __call__(self, module: nn.Module, inputs: Tensor) -> float:
        parts = list(module.modules())
        whole = any(isinstance(part, PatchEmbed) for part in parts)
        mlps = [part for part in parts if isinstance(part, Mlp)]
        units = sum(mlp.fc2.in_features for mlp in mlps)
        milliseconds = 3.0 * whole + 2.0 * sum(isinstance(part, Attention) for part in parts)
        milliseconds += 0.1 * len(mlps) + 3.9 * units / HIDDEN * (self.inside if whole else 1.0)
        self.runs += 1
        return milliseconds / 1000 * len(inputs) / 64 * (1 + self.drift * self.runs)


def true_ratio(plan: Plan, clock: Clock) -> float:
    """What a stopwatch makes of the structure that a plan names."""
    images = example_images(MODEL, 64)
    structure = pruned_skeleton(MODEL, dict.fromkeys(plan.candidates[: plan.num_blocks], plan.hidden_features))
    clock = Clock(clock.inside)
    return clock(structure, images) / clock(MODEL, images)


def test_figures_of_a_latency() -> None:
    latency = Latency((0.010, 0.020, 0.030, 0.060), batch_size=6)
    assert latency.mean_ms == pytest.approx(30)
    assert latency.median_ms == pytest.approx(25)
    assert latency.p95_ms == pytest.approx(55.5)  # 85 % of the way from the third to the last
    assert latency.images_per_second == pytest.approx(24 / 0.12)
    other = Latency((0.020, 0.020, 0.020, 0.020), batch_size=6)
    assert latency.ratio_to(other) == pytest.approx(1.25)
    # Ratios 0.5, 1, 1.5, 3: their deviations from 1.25 have the median 0.5.
    assert latency.ratio_error(other) == pytest.approx(1.2533 * 1.4826 * 0.5 / 2)
    assert other.ratio_error(other) == 0


def test_models_take_turns() -> None:
    calls: list[str] = []
    models = {name: nn.Linear(1, 1) for name in "ab"}

    def stopwatch(module: nn.Module, inputs: Tensor) -> float:
        calls.append(next(name for name, model in models.items() if model is module))
        return float(len(calls))

    seen: list[tuple[int, int]] = []
    latency = measure_latency(
        models, torch.ones(5, 1), Timing(runs=3, warmup=2), stopwatch=stopwatch,
        progress=lambda stage, done, total, loss: seen.append((done, total)),
    )  # fmt: skip
    assert "".join(calls) == "aabb" + "ab" + "ba" + "ab"
    assert latency["a"] == Latency((5.0, 8.0, 9.0), 5)
    assert latency["b"] == Latency((6.0, 7.0, 10.0), 5)
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_measurement_ends_by_time_or_precision() -> None:
    models = {"a": MODEL, "b": MODEL.blocks[0]}
    images = example_images(MODEL, 64)

    def rounds(**limits: Any) -> int:
        return len(measure_latency(models, images, Timing(40, **limits), stopwatch=Clock())["a"].seconds)

    assert rounds() == 40
    one = Clock()(MODEL, images) + Clock()(MODEL.blocks[0], images)
    assert rounds(max_seconds=7.5 * one) == 8
    assert rounds(max_seconds=0.0) == 5
    assert rounds(precision=1e-9) == 5  # these never differ

    noise = itertools.cycle([1.0, 1.2, 0.8, 1.1, 0.9])  # of a median deviation of 0.1
    latency = measure_latency(
        models, images, Timing(runs=100, precision=0.05),
        stopwatch=lambda module, inputs: 1.0 if module is MODEL else next(noise),
    )  # fmt: skip
    assert 5 < len(latency["a"].seconds) < 100
    assert latency["b"].ratio_error(latency["a"]) < 0.05


def test_time_forward_runs_the_model_once() -> None:
    seen: list[Tensor] = []

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x

    images = torch.ones(2)
    assert time_forward(Counting(), images) > 0
    assert len(seen) == 1
    assert seen[0] is images


def test_processor_time_leaves_out_what_others_take() -> None:
    class Waiting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.05)  # as a process does that is not scheduled
            return x

    images = torch.ones(2)
    assert time_cpu(Waiting(), images) < 0.05 <= time_forward(Waiting(), images)
    with pytest.raises(dcvit.DcvitError, match="the model is on meta"):
        time_cpu(Waiting(), images.to("meta"))
    torch.set_num_threads(2)
    try:
        with pytest.raises(dcvit.DcvitError, match="2 threads, expected one"):
            time_cpu(Waiting(), images)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("limits", [{"runs": 0}, {"warmup": -1}, {"batch_size": 0}, {"modes": ("eager", "int8")}])
def test_bad_settings(limits: dict[str, Any]) -> None:
    name, value = next(iter(limits.items()))
    shown = "mode='int8'" if name == "modes" else f"{name}={value}"
    with pytest.raises(dcvit.DcvitError, match=f"{shown}: expected"):
        compare_latency({"model": MODEL}, stopwatch=Clock(), **limits)


def test_half_precision_runs_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_module, "_has_half_precision", lambda device, dtype: dtype == torch.bfloat16)
    images = example_images(MODEL, 2)
    with torch.no_grad():
        assert in_mode(MODEL, "eager")(images).dtype == torch.float32
        assert in_mode(MODEL, "bf16")(images).dtype == torch.bfloat16
    assert MODEL(images).dtype == torch.float32
    with pytest.raises(dcvit.DcvitError, match="mode='fp16': this cpu has no fp16 arithmetic"):
        in_mode(MODEL, "fp16")


def test_a_compressed_block_leaves_its_precision_to_autocast() -> None:
    """The fused op would compute in float32 where autocast asks the layers for less."""
    block = pruned_skeleton(MODEL, {1: 100}).blocks[1]
    tokens = torch.randn(2, 5, 48)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        fc1 = block.mlp.fc1(block.norm2(tokens))
        assert fc1.dtype == torch.bfloat16
        expected = tokens + block.mlp.fc2(block.mlp.act(fc1))
        assert torch.equal(block(tokens), expected)


def test_compile_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []

    def compile_(module: nn.Module) -> nn.Module:
        compiled.append(module)
        return module

    monkeypatch.setattr(torch, "compile", compile_)
    rows = compare_latency({"model": MODEL}, batch_size=2, runs=1, modes=("eager", "compile"), stopwatch=Clock())
    assert compiled == [MODEL]
    assert [row.mode for row in rows] == ["eager", "compile"]


def test_compiling_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise torch._dynamo.exc.TorchDynamoException("no C++ compiler found")

    monkeypatch.setattr(torch, "compile", lambda module: Failing())
    with pytest.raises(dcvit.DcvitError, match=r"does not work here \(no C\+\+ compiler found\).*Leave that mode out"):
        compare_latency({"model": MODEL}, batch_size=2, runs=1, modes=("compile",), stopwatch=Clock())


def test_comparison_of_models() -> None:
    small = pruned_skeleton(MODEL, dict.fromkeys(range(1, 5), 48))
    wide = VARIANTS["rectangle_5_channels"].create()
    rows = compare_latency({"model": MODEL, "small": small, "wide": wide}, batch_size=32, runs=6, stopwatch=Clock())
    assert [row.model for row in rows] == ["model", "small", "wide"]
    model, compressed, _ = rows
    clock, images = Clock(), example_images(MODEL, 32)
    assert compressed.ratio == pytest.approx(clock(small, images) / clock(MODEL, images))
    assert model.ratio == 1
    assert model.weight_bytes == 4 * sum(parameter.numel() for parameter in MODEL.parameters())
    assert compressed.weight_bytes < model.weight_bytes
    assert model.activation_bytes == compressed.activation_bytes > 0  # some of its blocks are whole
    values = compressed.to_dict()
    assert values["images_per_second"] == pytest.approx(32_000 / values["mean_ms"])
    assert values["peak_bytes"] == compressed.weight_bytes + compressed.activation_bytes
    assert values["runs"] == 6


def test_calibration_measures_blocks() -> None:
    latency_model = calibrate(MODEL, range(1, 7), 64, stopwatch=Clock())
    assert latency_model.depth == DEPTH
    assert latency_model.original_ms == pytest.approx(3 + DEPTH * 6)
    assert latency_model.block_ms == pytest.approx(6)
    assert latency_model.overhead_ms == pytest.approx(3)
    assert [hidden for hidden, _ in latency_model.compressed_ms] == [0, 48, 96, 144, 192]
    for blocks, hidden in ((1, 192), (3, 10), (6, 0), (4, 100)):
        assert latency_model.predict(blocks, hidden) == pytest.approx(51 - blocks * (5.9 - 3.9 * hidden / HIDDEN))


def test_more_hidden_units_never_take_less_time() -> None:
    latency_model = LatencyModel(64, 8, 51.0, 6.0, ((0, 1.0), (96, 2.0), (192, 1.5)))
    assert latency_model.compressed(192) == latency_model.compressed(96) == 2.0
    assert latency_model.compressed(48) == 1.5


@pytest.mark.parametrize("goal", slow_but([0.9, 0.75, 0.6, 0.45], 0.75))
@pytest.mark.parametrize("clock", [Clock(), Clock(inside=1.4), Clock(inside=0.7), Clock(drift=1e-4)])
@pytest.mark.parametrize("round_to", [1, 8])
def test_a_latency_is_met(goal: float, clock: Clock, round_to: int) -> None:
    config = dcvit.DCViT(round_to=round_to)
    plan = plan_latency(MODEL, dcvit.Budget(latency=goal), config, stopwatch=clock)
    assert plan.latency is not None
    assert abs(true_ratio(plan, clock) / goal - 1) <= TOLERANCE
    assert plan.latency.ratio == pytest.approx(true_ratio(plan, clock), rel=1e-2)
    assert plan.latency.goal == goal
    assert plan.hidden_features % round_to == 0
    assert plan.target == pytest.approx(goal * plan.latency.model.original_ms)
    assert plan.drop_ratio == (HIDDEN - plan.hidden_features) / HIDDEN
    last = plan.latency.timings[-1]
    assert (last.num_blocks, last.hidden_features) == (plan.num_blocks, plan.hidden_features)


def test_structures_that_are_measured_correct_the_model() -> None:
    """If hidden units cost more in the model than separately, the first proposal is off and the next ones are not."""
    plan = plan_latency(MODEL, dcvit.Budget(latency=0.7), stopwatch=Clock(inside=1.6))
    assert plan.latency is not None
    first, *_, last = plan.latency.timings
    assert abs(first.ratio / 0.7 - 1) > TOLERANCE
    assert abs(last.ratio / 0.7 - 1) <= 0.01
    assert len(plan.latency.timings) <= 6


def test_a_structure_is_timed_again_where_the_machine_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first timings are off by up to 5 %, and the search comes back to a structure that it has timed."""
    errors = iter((-0.05, 0.04, 0.05))

    def disturbed(*args: Any, **kwargs: Any) -> tuple[StructureTiming, ...]:
        error = next(errors, 0.0)
        return tuple(replace(timing, ratio=timing.ratio * (1 + error)) for timing in time_structures(*args, **kwargs))

    monkeypatch.setattr("dcvit.search.latency.time_structures", disturbed)
    plan = plan_latency(MODEL, dcvit.Budget(latency=0.9), stopwatch=Clock())
    assert plan.latency is not None
    assert abs(true_ratio(plan, Clock()) / 0.9 - 1) <= TOLERANCE
    chosen = [t.ratio for t in plan.latency.timings if t.structure == (plan.num_blocks, plan.hidden_features)]
    assert len(chosen) > 1
    assert plan.latency.ratio == pytest.approx(sum(chosen) / len(chosen))


def test_milliseconds_are_of_the_batch() -> None:
    fraction = plan_latency(MODEL, dcvit.Budget(latency=0.75), stopwatch=Clock())
    for batch_size in (64, 16):
        budget = dcvit.Budget(latency_ms=0.75 * 51 * batch_size / 64, batch_size=batch_size)
        plan = plan_latency(MODEL, budget, stopwatch=Clock())
        assert (plan.num_blocks, plan.hidden_features) == (fraction.num_blocks, fraction.hidden_features)
        assert plan.target == pytest.approx(budget.value)


def test_the_fewest_blocks_are_taken_by_default() -> None:
    budget = dcvit.Budget(latency=0.75)
    fewest = plan_latency(MODEL, budget, stopwatch=Clock())
    assert fewest.num_blocks == math.ceil(0.25 * 51 / 5.9)
    more = plan_latency(MODEL, budget, dcvit.DCViT(num_blocks=fewest.num_blocks + 1), stopwatch=Clock())
    assert more.num_blocks == fewest.num_blocks + 1
    assert more.hidden_features > fewest.hidden_features


@pytest.mark.parametrize("budget", [{"latency": 0.1}, {"latency": 0.999}, {"latency_ms": 57.24}, {"latency_ms": 1e9}])
def test_a_latency_out_of_range_says_what_was_measured(budget: dict[str, float]) -> None:
    with pytest.raises(dcvit.errors.BudgetError) as caught:
        plan_latency(MODEL, dcvit.Budget(**budget), stopwatch=Clock(inside=1.2))  # type: ignore[arg-type]
    original = 3 + DEPTH * (2.1 + 3.9 * 1.2)
    low = 1 - 6 * (2 + 3.9 * 1.2) / original
    high = 1 - 2 / original
    assert f"6 candidate blocks reach {low:.4f} to {high:.4f}" in str(caught.value)
    assert f"({low * original:.3f} to {high * original:.3f} ms)" in str(caught.value)
    assert ("Allow all 8 blocks" in str(caught.value)) == (budget.get("latency") == 0.1)


def test_a_gap_between_structures_names_the_nearest() -> None:
    config = dcvit.DCViT(round_to=192)  # all hidden units or none
    with pytest.raises(dcvit.errors.BudgetError, match=r"Nearest is 0.76\d\d, 2 blocks with 0 hidden units each"):
        plan_latency(MODEL, dcvit.Budget(latency=0.8), config, stopwatch=Clock())


def test_a_latency_model_serves_several_budgets() -> None:
    latency_model = calibrate(MODEL, range(1, 7), 32, stopwatch=Clock())
    clock = Clock()
    budget = dcvit.Budget(latency=0.8, batch_size=32)
    plan = plan_latency(MODEL, budget, latency_model=latency_model, stopwatch=clock)
    assert plan.latency is not None
    assert plan.latency.model is latency_model
    with pytest.raises(dcvit.errors.BudgetError, match="batch_size=64: the latency model was calibrated at 32"):
        plan_latency(MODEL, dcvit.Budget(latency=0.8), latency_model=latency_model, stopwatch=clock)
    assert plan_latency(MODEL, dcvit.Budget(macs=0.75)) == make_plan(MODEL, dcvit.Budget(macs=0.75))


@dataclass
class Noting:
    """A clock that notes whether the precision is the expected one when it is read."""

    file: Path
    expected: Precision

    def __call__(self, module: nn.Module, inputs: Tensor) -> float:
        with self.file.open("a") as file:
            print(Precision.current() == self.expected, file=file)
        return Clock()(module, inputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "devices", [[], pytest.param(["cpu", "cpu"], marks=pytest.mark.slow)], ids=["here", "in other processes"]
)
def test_timed_in_the_callers_precision(images: Tensor, devices: list[str], tmp_path: Path) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            stopwatch = Noting(tmp_path / "noted.txt", Precision.current())
            dcvit.compress(MODEL, images, dcvit.Budget(latency=0.8), QUICK, devices=devices, stopwatch=stopwatch)
    finally:
        torch.set_float32_matmul_precision(before)
    assert stopwatch.expected != FULL
    assert set(stopwatch.file.read_text().split()) == {"True"}


def test_compression_to_a_latency(images: Tensor, tmp_path: Path) -> None:
    budget = dcvit.Budget(latency=0.7, batch_size=16)
    result = dcvit.compress(MODEL, images, budget, QUICK, stopwatch=Clock(inside=1.3))
    assert result.plan.latency is not None
    assert result.report.latency_ratio == pytest.approx(result.plan.latency.ratio)
    assert abs(result.report.latency_ratio / 0.7 - 1) <= TOLERANCE
    # The report's times are those of the budget's batch size, not of the few images.
    assert result.report.teacher.latency_ms == pytest.approx((3 + DEPTH * (2.1 + 3.9 * 1.3)) * 16 / 64)
    assert len(result.plan.blocks) == result.plan.num_blocks

    result.save(tmp_path / "out")
    loaded = dcvit.load(tmp_path / "out")
    assert loaded.plan == result.plan
    assert replace(loaded.report, probes=(), reconstructions=()) == replace(
        result.report, probes=(), reconstructions=()
    )
    values = json.loads((tmp_path / "out" / "result.json").read_text())
    assert values["budget"] == {"latency": 0.7, "convention": "with_attention_products", "batch_size": 16}
