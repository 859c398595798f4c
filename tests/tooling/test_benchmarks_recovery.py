"""The benchmark of recovery: its table, what makes a run count as finished, and the methods that it adds."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dcvit
from benchmarks import recovery
from benchmarks.methods import GRADIENT_METHODS, METHODS, num_whole_blocks, shortened
from benchmarks.naive import RIDGE, naive_closed_form, solve_block
from benchmarks.recovery import Record, Request
from benchmarks.runs import run_missing, with_section
from benchmarks.testbeds.measures import relative_error
from dcvit.errors import BudgetError, DcvitError
from dcvit.methods.baselines.practise import drop_blocks
from dcvit.models import compressible
from dcvit.models.surgery import compress_block, draw_kept_units
from dcvit.models.teacher import freeze
from dcvit.recovery.distill import output_tokens
from dcvit.search.plan import plan as make_plan
from tests.variants import VARIANTS


def record(
    method: str = "default", seed: int = 0, code: str = "c1", error: float = 0.1, seconds: float = 6.0
) -> Record:
    """A finished run on the digits that compressed two blocks."""
    return Record(
        request=Request("digits", method, 0.25, seed, threads=1, allowance=None),
        code=code, header="a machine", removed=0.251, error=error, agreement=0.9, top1=None, cosine_class=0.95,
        cosine_patch=0.9, seconds=seconds, blocks=(3, 1), epochs=None, iterations=None, memory=800.0,
        memory_before=700.0, wall=36.0,
    )  # fmt: skip


def cells(markdown: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]


# --- table -----------------------------------------------------------------------------------------------------------


def test_the_table_has_means_and_deviations_in_the_order_of_the_registry() -> None:
    runs = [record("naive closed form", 0, error=0.4), record(seed=1, error=0.3, seconds=8.0), record(error=0.1)]
    titles, _, default, naive = cells(recovery.table(runs))
    found = dict(zip(titles, default, strict=True))
    assert (found["method"], found["seeds"], found["MACs asked"]) == ("default", "2", "25%")
    assert found["r"] == "0.2000 ± 0.1414"
    assert found["s"] == "7.0 ± 1.4"
    assert found["s / block"] == "3.50 ± 0.71"
    assert found["top-1 %"] == found["epochs"] == "–"
    assert naive[titles.index("method")] == "naive closed form"
    assert naive[titles.index("r")] == "0.4000"


def test_epochs_that_differ_are_a_range() -> None:
    runs = [replace(record("paper", seed), epochs=31 + seed, iterations=2000) for seed in range(3)]
    assert cells(recovery.table(runs))[2][-2:] == ["31–33", "2000"]


def test_ratios_are_of_the_seeds_that_both_have() -> None:
    runs = [record(error=0.1), record(seed=1, error=9.0), record("naive closed form", error=0.4)]
    assert cells(recovery.ratios(runs))[2] == ["digits", "25%", "0.25", "–", "–"]
    runs += [replace(record("paper", seed, seconds=60.0), epochs=500) for seed in range(2)]
    assert cells(recovery.ratios(runs))[2] == ["digits", "25%", "0.25", "0.1", "0.025"]


def test_the_report_says_how_it_came_about() -> None:
    text = recovery.report([record(), record(seed=1, code="c2")])
    assert "a machine" in text
    assert "2 runs, 0.02 hours in all, of the code as of c1, c2." in text
    assert "--beds digits --methods default --budgets 0.25 --seeds 2 --threads 1\n" in text
    assert "700 MiB before" in text


def test_the_report_has_a_command_for_each_allowance() -> None:
    def allowed(seconds: float) -> Record:
        return replace(record("paper"), request=replace(record("paper").request, allowance=seconds))

    text = recovery.report([record(), record("paper"), allowed(3600.0), replace(allowed(1800.0), code="c2")])
    commands = [line for line in text.splitlines() if line.startswith("    python -m benchmarks recovery")]
    assert [command.partition(" --threads 1")[2] for command in commands] == ["", " --paper-hours 0.5"]
    assert "--methods default paper " in commands[0]
    assert "--methods paper " in commands[1]


def test_a_results_file_keeps_what_is_not_of_this_command() -> None:
    first = with_section("# Other\n\nwords\n", "one", "kind")
    assert with_section(first + "\n## More\n", "two", "kind") == first.replace("one", "two") + "\n## More\n"
    assert with_section(first, "two", "other").startswith(first)
    assert with_section("", "one", "kind").startswith("# Results\n")


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_record_survives_the_file(tmp_path: Path) -> None:
    assert recovery.read_records(tmp_path / "none") == []
    assert Record.from_dict(asdict(record())) == record()


@pytest.mark.parametrize(
    "other",
    [
        record(code="c2"), record(seed=1), record("paper"),
        *(replace(record(), request=replace(record().request, **change))
          for change in ({"bed": "dinov2"}, {"budget": 0.3}, {"threads": 2}, {"allowance": 60.0})),
    ],
)  # fmt: skip
def test_other_settings_or_code_are_another_run(other: Record, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("benchmarks.runs.prepare_bed", lambda bed: None)
    made: list[Request] = []

    def run(request: Request, code: str) -> Record:
        made.append(request)
        return other

    for wanted, missing in ((record(error=0.7, seconds=1.0), []), (other, [other.request])):
        monkeypatch.setattr("benchmarks.runs.code_version", lambda measured, code=wanted.code: code)
        run_missing([wanted.request], [record()], tmp_path / "out", recovery.MEASURED, run)
        assert made == missing


def test_an_interrupted_table_goes_on_where_it_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Request] = []
    broken = ["naive closed form"]

    def run_apart(request: Request, code: str, verbose: bool) -> Record:
        made.append(request)
        if request.method in broken:
            raise DcvitError("it broke")
        return replace(record(request.method, request.seed, code), request=request)

    monkeypatch.setattr(recovery, "run_apart", run_apart)
    monkeypatch.setattr("benchmarks.runs.prepare_bed", lambda bed: None)
    monkeypatch.setattr("benchmarks.runs.code_version", lambda measured: "c1")

    def call(*more: str) -> tuple[int, Sequence[tuple[str, int]], str]:
        made.clear()
        arguments = ["--beds", "digits", "--budgets", "0.25", "--methods", "default", "naive closed form"]
        status = recovery.main([*arguments, "--out", str(tmp_path / "runs.jsonl"), *more])
        return status, [(request.method, request.seed) for request in made], capsys.readouterr().out

    status, ran, text = call("--seeds", "2")
    assert status == 1
    assert ran == [("default", 0), ("naive closed form", 0), ("default", 1), ("naive closed form", 1)]
    assert "| digits | 25% | default | 2 |" in text
    broken.clear()
    assert call("--seeds", "2")[:2] == (0, [("naive closed form", 0), ("naive closed form", 1)])
    assert call("--seeds", "3")[1] == [("default", 2), ("naive closed form", 2)]
    assert len(call("--seeds", "1", "--force")[1]) == 2
    status, ran, text = call("--table", "--results", str(tmp_path / "RESULTS.md"))
    assert (status, ran) == (0, [])
    assert "| digits | 25% | naive closed form | 3 |" in text
    assert text.strip() in (tmp_path / "RESULTS.md").read_text()


def test_of_runs_made_again_the_table_takes_the_last() -> None:
    runs = [record(error=0.1), record("paper"), record(error=0.2, code="c2")]
    assert recovery.latest(runs, None, ["default"], [0.25], range(1)) == [runs[2]]
    assert recovery.latest(runs, None, None, [0.3], None) == []


def test_only_gradient_methods_have_an_allowance_and_on_digits_only_a_given_one() -> None:
    def allowances(hours: float | None) -> dict[tuple[str, str], float]:
        asked = recovery.requests(["digits", "dinov2"], METHODS, [0.1], [0], 1, hours)
        return {(r.bed, r.method): r.allowance for r in asked if r.allowance is not None}

    assert allowances(None) == {("dinov2", method): 3600.0 for method in GRADIENT_METHODS}
    assert allowances(0.5) == {(bed, m): 1800.0 for bed in ("digits", "dinov2") for m in GRADIENT_METHODS}


# --- methods ---------------------------------------------------------------------------------------------------------


def test_an_allowance_shortens_the_published_procedure() -> None:
    config = dcvit.DCViT.paper()
    # A quarter of 400 s gives 100 iterations of 1 s; the 300 s left give 10 recoveries 100 epochs of 0.3 s.
    short = shortened(config, 400, recoveries=10, iteration=1.0, epoch=0.3)
    assert (short.synthesis.iterations, short.synthesis.warmup_iterations) == (100, 5)
    assert (short.distillation.epochs, short.distillation.warmup_epochs) == (100, 1)
    assert shortened(config, 1e9, recoveries=10, iteration=1.0, epoch=0.3) == config
    least = shortened(config, 0.1, recoveries=10, iteration=1.0, epoch=0.3)
    assert (least.synthesis.iterations, least.distillation.epochs) == (1, 1)


def test_as_few_whole_blocks_go_as_meet_the_budget(model: nn.Module) -> None:
    def macs(blocks: Sequence[int]) -> int:
        return compressible(drop_blocks(model, blocks)).cost().total.macs("with_attention_products")

    assert num_whole_blocks(model, dcvit.Budget(macs=macs([1]))) == 1
    assert num_whole_blocks(model, dcvit.Budget(macs=macs([1]) - 1)) == 2
    assert num_whole_blocks(model, dcvit.Budget(macs=macs([1, 2]))) == 2
    with pytest.raises(BudgetError, match=r"without all 2 candidate blocks, .* are left"):
        num_whole_blocks(model, dcvit.Budget(macs=macs([1, 2]) - 1))


@pytest.mark.parametrize("name", ["plain", "layer_scale"])
def test_the_naive_layer_is_the_ridge_solution(name: str) -> None:
    model = freeze(VARIANTS[name].create().double())
    view, generator = compressible(model), torch.Generator().manual_seed(0)
    given, wanted = torch.randn(2, 6, 10, model.embed_dim, generator=generator, dtype=torch.float64)
    solve_block(model, 1, tuple(range(20)), given, wanted)
    found = view.output_layer(1)
    assert found is not None
    layer, scale = found.layer, found.scale
    hidden: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, args: hidden.append(args[0].flatten(0, 1)))
    view.run_blocks(given, 1, 2)
    weight, bias = (tensor.detach().clone().requires_grad_() for tensor in (layer.weight, layer.bias))
    missing = (wanted - given).flatten(0, 1) / (1 if scale is None else scale.detach())
    objective = (hidden[0] @ weight.T + bias - missing).square().sum()
    objective = objective + RIDGE * (hidden[0].T @ hidden[0]).diagonal().mean() * weight.square().sum()
    # At the minimum the gradient vanishes, but for rounding in float64.
    for gradient in torch.autograd.grad(objective, [weight, bias]):
        assert float(gradient.abs().max()) < 1e-9 * float(objective.detach())


@pytest.mark.parametrize("name", ["plain", "layer_scale"])
def test_naive_closed_form_lowers_the_error(name: str) -> None:
    teacher, images = freeze(VARIANTS[name].create()), torch.randn(24, 3, 32, 32)
    few_shot, budget = dcvit.load_images(images, teacher), dcvit.Budget(macs=0.7)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    student, blocks = naive_closed_form(teacher, few_shot, budget, dcvit.config.AugmentationConfig(), seed=0)
    planned = make_plan(teacher, budget)
    assert len(blocks) == planned.num_blocks
    assert compressible(student).cost().total.macs("with_attention_products") <= planned.target
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())

    cut = teacher
    for block in blocks:
        cut = compress_block(cut, block, draw_kept_units(teacher, block, planned.hidden_features, seed=0))

    def error(model: nn.Module, held_out: Tensor) -> float:
        return relative_error(output_tokens(model, held_out, 24), output_tokens(teacher, held_out, 24))

    for judged in (images, torch.randn(24, 3, 32, 32)):
        assert error(student, judged) < 0.8 * error(cut, judged)
