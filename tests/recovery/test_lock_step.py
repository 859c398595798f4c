"""Probes distilled in lock step: each learns the same as separately, and hopeless ones stop early."""

import copy
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dcvit
from benchmarks.testbeds import digits
from dcvit.context import RunContext
from dcvit.data.images import load_images
from dcvit.history import Probe
from dcvit.methods.baselines.practise import Practise, block_dropping
from dcvit.models import compressible, fuse
from dcvit.models.surgery import compress_block, draw_kept_units, share_parameters
from dcvit.models.teacher import freeze
from dcvit.recovery import distill as recovery_module
from dcvit.recovery.distill import (
    Candidate,
    find_learning_rate,
    output_tokens,
    recover,
    recover_together,
    token_loss,
)
from dcvit.runtime.optim import warmup_cosine
from dcvit.runtime.seeding import generator
from dcvit.search import sensitivity as ranking_module
from dcvit.search.plan import plan as make_plan
from dcvit.search.sensitivity import RUNGS, Contest, rank, run_probes
from tests.conftest import PUBLISHED, slow_but
from tests.variants import VARIANTS

DEPTH = 6
QUICK = dcvit.config.DistillationConfig(epochs=4, learning_rate=1e-3, warmup_epochs=1, batch_size=4)
WHOLE = replace(QUICK, batch_size=8, augmentation=None)
HALVING = PUBLISHED.with_(ablation=replace(PUBLISHED.ablation, halving=True))
VIEWS: dict[str, dict[str, Any]] = {"none": {"augmentation": None}, "fixed": {"fixed_views": 2}, "fresh": {}}


@pytest.fixture
def teacher() -> nn.Module:
    """Six blocks, so that with `updated="around"` some lie in front."""
    return freeze(VARIANTS["plain"].create(depth=DEPTH, embed_dim=24))


@pytest.fixture
def few_shot(teacher: nn.Module, images: Tensor) -> dcvit.data.images.FewShotImages:
    return dcvit.load_images(images, teacher)


def cut(teacher: nn.Module, block: int) -> nn.Module:
    return compress_block(teacher, block, draw_kept_units(teacher, block, 40, seed=0))


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


# --- lock step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lock_step", "updated", "views"),
    slow_but([
        (1, "front", "fresh"), (1, "around", "none"),
        (3, "front", "none"), (3, "front", "fixed"), (3, "front", "fresh"),
        (3, "around", "fixed"), (3, "around", "fresh"),
    ], (1, "front", "fresh"), (3, "front", "fixed"), (3, "around", "fresh")),
)  # fmt: skip
def test_in_lock_step_a_student_learns_the_same_as_separately(
    teacher: nn.Module, few_shot: dcvit.data.images.FewShotImages, lock_step: int, updated: Any, views: str
) -> None:
    """To the last bit: same views, same order, and no sum runs over two students."""
    config = replace(QUICK, lock_step=lock_step, updated=updated, **VIEWS[views])
    alone = {block: cut(teacher, block) for block in range(1, 5)}
    losses = {
        block: recover(alone[block], teacher, few_shot, [block], config, RunContext(seed=5)).losses for block in alone
    }
    together = {block: cut(teacher, block) for block in range(1, 5)}
    candidates = [Candidate(student, (block,)) for block, student in together.items()]
    recoveries = recover_together(candidates, teacher, few_shot, config, RunContext(seed=5))
    for block, recovery in zip(together, recoveries, strict=True):
        assert same_weights(together[block], alone[block])
        # The reported loss of a batch is a sum that kernels may split differently.
        assert recovery.losses == pytest.approx(losses[block], rel=1e-5)
    assert not same_weights(together[1], cut(teacher, 1))


@pytest.mark.parametrize("updated", ["front", "around", "all"])
@pytest.mark.parametrize("same_prefix", [True, False])
def test_training_is_plain_adamw_on_the_distillation_loss(
    teacher: nn.Module, few_shot: dcvit.data.images.FewShotImages, updated: Any, same_prefix: bool
) -> None:
    """Whether or not what lies before the updated blocks is the teacher's, and so need not be computed again."""
    config = replace(QUICK, updated=updated, augmentation=None)
    student = cut(teacher, 3)
    if not same_prefix:
        with torch.no_grad():
            student.blocks[1].mlp.fc2.weight.mul_(-1)
    expected = copy.deepcopy(student)
    recover(student, teacher, few_shot, [3], config, RunContext(seed=5))

    parameters = recovery_module.updated_parameters(expected, [3], config)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, weight_decay=config.weight_decay)
    drawing = generator(5, "recovery")
    for epoch in range(config.epochs):
        optimizer.param_groups[0]["lr"] = 1e-3 * warmup_cosine(epoch, config.epochs, config.warmup_epochs)
        for chosen in torch.randperm(len(few_shot), generator=drawing).split(config.batch_size):
            views = few_shot.normalised[chosen]
            difference = expected.forward_features(views) - teacher.forward_features(views)
            optimizer.zero_grad()
            difference.square().mean().backward()
            optimizer.step()
    for name, value in student.state_dict().items():
        # Adam divides by the gradient's size: where it is near zero, rounding decides the sign of a step of 1e-3.
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=0, atol=2e-4, msg=lambda m, n=name: n + m)


def test_one_loss_for_as_many_students_as_the_lock_step_says(
    teacher: nn.Module, few_shot: dcvit.data.images.FewShotImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    real = recovery_module.distillation_loss

    def noted(student: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if student.requires_grad:
            sizes.append(len(student))
        return real(student, *args, **kwargs)

    monkeypatch.setattr(recovery_module, "distillation_loss", noted)
    candidates = [Candidate(cut(teacher, block), (block,)) for block in range(DEPTH - 1)]
    recover_together(candidates, teacher, few_shot, replace(QUICK, lock_step=2))
    assert sizes == [2, 2, 1] * 2 * QUICK.epochs  # two batches an epoch


@pytest.mark.parametrize(
    ("views", "passes"), [("none", 1), ("fixed", 1 + 2), ("fresh", 1 + QUICK.epochs)], ids=list(VIEWS)
)
def test_the_teacher_sees_a_view_once_for_all(
    teacher: nn.Module, few_shot: dcvit.data.images.FewShotImages, views: str, passes: int
) -> None:
    candidates = [Candidate(cut(teacher, block), (block,)) for block in (1, 2, 3)]
    seen: list[int] = []
    teacher.blocks[-1].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    recover_together(candidates, teacher, few_shot, replace(QUICK, **VIEWS[views], lock_step=2))
    assert sum(seen) == passes * len(few_shot)


def test_a_prefix_that_is_not_updated_is_the_teachers(
    teacher: nn.Module, few_shot: dcvit.data.images.FewShotImages
) -> None:
    """If block 3 or 4 is compressed, blocks from 2 or 3 on are trained; earlier blocks run only for validation."""
    students = {block: cut(teacher, block) for block in (3, 4)}
    ran: dict[int, list[int]] = {3: [0] * DEPTH, 4: [0] * DEPTH}
    for block, student in students.items():
        for i, module in enumerate(student.blocks):

            def count(_: nn.Module, args: tuple[Tensor], block: int = block, i: int = i) -> None:
                ran[block][i] += len(args[0])

            module.register_forward_pre_hook(count)
    candidates = [Candidate(student, (block,)) for block, student in students.items()]
    recover_together(candidates, teacher, few_shot, replace(QUICK, updated="around"))
    judged, all_of_them = 2 * len(few_shot), (2 + QUICK.epochs) * len(few_shot)
    assert ran == {block: [judged] * (block - 1) + [all_of_them] * (DEPTH - block + 1) for block in (3, 4)}


def test_a_diverging_student_does_not_change_the_others(
    teacher: nn.Module, few_shot: dcvit.data.images.FewShotImages
) -> None:
    config = replace(QUICK, lock_step=2)
    students, alone = [cut(teacher, 1) for _ in range(2)], cut(teacher, 1)
    seen: list[float] = []
    recoveries = recover_together(
        [Candidate(student, (1,), rate) for student, rate in zip(students, (1e30, 1e-3), strict=True)],
        teacher, few_shot, config,
        RunContext(progress=lambda stage, done, total, loss: seen.append(loss) if done else None),
    )  # fmt: skip
    assert [recovery.learning_rate for recovery in recoveries] == [1e30, 1e-3]
    assert recoveries[0].loss_after != recoveries[0].loss_after
    recover(alone, teacher, few_shot, [1], config)
    assert same_weights(students[1], alone)
    assert seen[1:] == list(recoveries[1].losses[1:]), "the progress shows the one that is left"


def test_learning_rates_are_compared_as_if_separate(
    teacher: nn.Module, few_shot: dcvit.data.images.FewShotImages
) -> None:
    config = replace(QUICK, learning_rates=(1e-6, 3e-3, 1e-3, 1e-2), augmentation=None)
    student = cut(teacher, 2)
    order = torch.randperm(len(few_shot), generator=generator(7, "held out")).tolist()
    judged, used = few_shot.subset(order[:1]), few_shot.subset(order[1:])
    targets, losses = output_tokens(teacher, judged.normalised, 4), []
    for rate in config.learning_rates:
        copied = copy.deepcopy(student)
        recover(copied, teacher, used, [2], replace(config, learning_rate=rate), RunContext(seed=7))
        losses.append(token_loss(copied, targets, judged, config))
    best = config.learning_rates[losses.index(min(losses))]
    found = find_learning_rate(
        student, teacher, few_shot, [2], replace(config, learning_rate="auto"), RunContext(seed=7)
    )
    assert found == best != config.learning_rates[0]


def test_candidates_share_what_stays_the_teachers(teacher: nn.Module) -> None:
    student = cut(teacher, 2)
    with torch.no_grad():
        student.blocks[5].mlp.fc2.bias.add_(1)
    expected = copy.deepcopy(student.state_dict())
    updated = recovery_module.updated_parameters(student, [2], QUICK)
    share_parameters(student, teacher, but=updated)
    theirs = {id(parameter) for parameter in teacher.parameters()}
    shared = {name for name, parameter in student.named_parameters() if id(parameter) in theirs}
    behind = ("blocks.4.", "blocks.5.", "norm.", "head.")
    assert shared == {n for n in expected if n.startswith(behind)} - {"blocks.5.mlp.fc2.bias"}
    assert all(torch.equal(value, expected[name]) for name, value in student.state_dict().items())


def test_a_round_leaves_the_teacher_and_the_best_student_apart(
    teacher: nn.Module, few_shot: dcvit.data.images.FewShotImages
) -> None:
    before = copy.deepcopy(teacher.state_dict())
    config = PUBLISHED.with_(recovery=QUICK)
    plan = make_plan(teacher, dcvit.Budget(macs=0.8), config)
    ranking = rank(
        teacher, few_shot, dcvit.metrics.fidelity.Metric(teacher, [few_shot.normalised], "distillation"), plan, QUICK
    )
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    places = {parameter.data_ptr() for parameter in teacher.parameters()}
    assert not any(parameter.data_ptr() in places for parameter in ranking.student.parameters())
    best = ranking.blocks[0]
    alone = compress_block(teacher, best, ranking.kept_units[best])
    recover(alone, teacher, few_shot, [best], QUICK, RunContext().derived("trial"))
    assert same_weights(ranking.student, alone)


def test_seconds_add_up_to_the_wall_clock(teacher: nn.Module, few_shot: dcvit.data.images.FewShotImages) -> None:
    clock = iter(range(1000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovery_module.time, "perf_counter", lambda: float(next(clock)))
        candidates = [Candidate(cut(teacher, block), (block,)) for block in (1, 2, 3, 4)]
        recoveries = recover_together(
            candidates, teacher, few_shot, QUICK, selection=lambda done, running: [0, 1] if done > 1 else running
        )
        passed = next(clock) - 1
    assert sum(recovery.seconds for recovery in recoveries) == pytest.approx(passed)
    assert recoveries[0].seconds > recoveries[2].seconds


# --- halving ---------------------------------------------------------------------------------------------------------


def halved(
    teacher: nn.Module,
    few_shot: dcvit.data.images.FewShotImages,
    num_chosen: int,
    config: dcvit.config.DistillationConfig,
    *,
    halving: bool = True,
) -> tuple[tuple[Probe, ...], nn.Module]:
    targets = output_tokens(teacher, few_shot.normalised, 4)
    return run_probes(
        teacher,
        few_shot,
        Contest(
            range(DEPTH - 1),
            lambda block: cut(teacher, block),
            lambda student: token_loss(student, targets, few_shot, config),
            num_chosen,
            halving,
        ),
        config,
    )


@pytest.mark.parametrize(("num_chosen", "epochs_of_each"), [(1, [9, 9, 7, 5, 5]), (3, [9, 9, 9, 5, 5]), (5, [9] * 5)])
def test_the_worse_half_stops_at_each_rung(
    teacher: nn.Module, few_shot: dcvit.data.images.FewShotImages, num_chosen: int, epochs_of_each: list[int]
) -> None:
    """Nine epochs, of which one warms up: the rungs are after 1 + 4 and 1 + 6. Half of five is three."""
    config = replace(WHOLE, epochs=9)
    assert RUNGS == (0.5, 0.75)
    full, best = halved(teacher, few_shot, num_chosen, config, halving=False)
    probes, student = halved(teacher, few_shot, num_chosen, config)
    assert [probe.epochs for probe in full] == [9] * 5
    assert [probe.epochs for probe in probes] == epochs_of_each
    for epochs in set(epochs_of_each):
        losses = [probe.metric_loss for probe in probes if probe.epochs == epochs]
        assert losses == sorted(losses)
    through = {probe.block: probe for probe in full}
    for probe in probes:
        assert probe.recovery is not None
        recovery = through[probe.block].recovery
        assert recovery is not None
        assert probe.recovery.losses == recovery.losses[: probe.epochs], "who goes on trains as without halving"
        assert probe.metric_loss == probe.recovery.loss_after
    survivors = [probe.block for probe in probes if probe.epochs == 9]
    assert survivors == [probe.block for probe in full if probe.block in survivors]
    if probes[0].block == full[0].block:
        assert same_weights(student, best)


def test_the_worst_by_metric_loss_stop() -> None:
    class Losses(dict[int, float]):
        def score(self, student: nn.Module) -> float:
            return self[id(student)]

    students: Mapping[int, nn.Module] = {position: nn.Identity() for position in (0, 2, 3, 7)}
    values = (0.3, float("nan"), 0.1, 0.2)
    losses = Losses({id(student): loss for student, loss in zip(students.values(), values, strict=True)})
    selection = ranking_module._halving(losses.score, 1, replace(WHOLE, epochs=8, warmup_epochs=0))

    def going(done: int) -> Collection[int]:
        return set(selection(done, students))

    assert {done: going(done) for done in range(1, 9)} == {
        **{done: {0, 2, 3, 7} for done in (1, 2, 3, 5, 7, 8)},
        4: {3, 7},
        6: {3, 7},
    }


def test_who_stopped_ranks_behind_who_ran_through() -> None:
    nan = float("nan")
    probes = [Probe(block, loss, epochs=epochs) for block, loss, epochs in
              ((1, 0.1, 5), (2, nan, 9), (3, 0.3, 9), (4, 0.2, 7), (5, 0.05, 5), (6, 0.3, 9))]  # fmt: skip
    assert [probe.block for probe in ranking_module._best_first(probes)] == [3, 6, 2, 4, 5, 1]


def test_a_run_of_one_epoch_has_no_rung(teacher: nn.Module, few_shot: dcvit.data.images.FewShotImages) -> None:
    for epochs in (0, 1):
        probes, _ = halved(teacher, few_shot, 1, replace(WHOLE, epochs=epochs))
        assert [probe.epochs for probe in probes] == [epochs] * 5


def test_halving_saves_the_steps_and_is_reported(
    teacher: nn.Module, few_shot: dcvit.data.images.FewShotImages, tmp_path: Path
) -> None:
    steps: list[int] = []
    real = recovery_module._Run.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovery_module._Run, "step", lambda *args: (steps.append(1), real(*args))[1])
        halved(teacher, few_shot, 1, replace(WHOLE, epochs=9))
    assert len(steps) == 9 + 9 + 7 + 5 + 5  # one batch an epoch

    config = HALVING.with_(recovery=replace(WHOLE, epochs=9), num_blocks=1)
    result = dcvit.compress(teacher, few_shot.normalised, dcvit.Budget(macs=0.88), config)
    assert [probe.epochs for probe in result.report.probes] == [9, 7, 5, 5]
    assert result.plan.blocks == (result.report.probes[0].block,)
    result.save(tmp_path / "out")
    assert asdict(dcvit.load(tmp_path / "out").report) == asdict(result.report)

    # A result saved before probes recorded their epochs.
    file = tmp_path / "out" / "result.json"
    values = json.loads(file.read_text())
    for probe in values["report"]["probes"]:
        del probe["epochs"]
    file.write_text(json.dumps(values))
    assert dcvit.load(tmp_path / "out").report == result.report


def test_block_dropping_halves_too(teacher: nn.Module, few_shot: dcvit.data.images.FewShotImages) -> None:
    config = Practise(distillation=replace(WHOLE, epochs=5), halving=True)
    dropped = block_dropping(teacher, few_shot, 1, config)
    assert [probe.epochs for probe in dropped.probes] == [5, 4, 3, 3]
    assert compressible(dropped.model).cost().blocks[dropped.blocks[0]].mlp.params == 0


@pytest.mark.slow
def test_on_the_digits_halving_chooses_the_same_blocks() -> None:
    """On the test bed, of fewer images and epochs. Of near ties it may choose another, see `RUNGS`."""
    pytest.importorskip("sklearn")
    bed = digits(seed=0, num_images=25)
    teacher = fuse(freeze(bed.model), "auto")
    images = load_images(bed.images, teacher)
    proxy_set = dcvit.data.synthesis.synthesize(teacher, dcvit.config.SynthesisConfig(iterations=20, flip=0.0))
    metric = dcvit.metrics.fidelity.Metric(teacher, [proxy_set.images], "distillation")
    config = dcvit.config.DistillationConfig(
        epochs=40, learning_rate=1e-3, warmup_epochs=4, augmentation=bed.augmentation, fixed_views=8
    )
    full, shorter = (
        rank(teacher, images, metric, plan, config, halving=halving)
        for plan in [make_plan(teacher, dcvit.Budget(macs=0.75))]
        for halving in (False, True)
    )
    assert full.blocks[:3] == shorter.blocks[:3]
    assert [probe.epochs for probe in shorter.probes] == [40] * 3 + [22] * 3
    assert shorter.blocks[:3] != tuple(sorted(shorter.blocks)[:3])
    assert same_weights(full.student, shorter.student)
