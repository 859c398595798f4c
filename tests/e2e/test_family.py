"""A family of sizes: `dcvit.sweep`, its saved form, sizes in between."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import dcvit
from dcvit.compression import sweep as family_module
from dcvit.errors import BudgetError, DcvitError, SaveFolderError
from dcvit.models import compressible
from dcvit.report import write_report
from tests.variants import VARIANTS

RECOVERY = dcvit.config.ReconstructionConfig(
    num_views=10, num_rows=80, epochs=1, step_sizes=(0.01,), refinement_steps=0
)
QUICK = dcvit.DCViT(recovery=RECOVERY, ablation=dcvit.config.Ablation(ranking_images="few-shot"))
SHARES = (0.7, 0.9, 0.8)


@cache
def swept() -> dcvit.Family:
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return dcvit.sweep(VARIANTS["plain"].create(), images, SHARES, QUICK)


@pytest.fixture
def family() -> dcvit.Family:
    """Three members, in a list of its own."""
    return replace(swept(), members=list(swept().members))


def with_latencies(family: dcvit.Family, *latencies: float) -> dcvit.Family:
    members = [
        replace(m, report=replace(m.report, student=replace(m.report.student, latency_ms=latency)))
        for m, latency in zip(family.members, latencies, strict=True)
    ]
    return replace(family, members=members)


def test_members_come_largest_first_and_meet_their_budgets(family: dcvit.Family, model: nn.Module) -> None:
    original = compressible(model).cost().total.macs("with_attention_products")
    macs = [member.report.student.macs for member in family.members]
    assert macs == sorted(macs, reverse=True)
    assert len(set(macs)) == len(SHARES)
    for share, cost in zip(sorted(SHARES, reverse=True), macs, strict=True):
        assert share * original * 0.97 < cost <= share * original
    assert family.original.macs == original


@pytest.mark.slow
def test_a_member_is_what_compress_gives(model: nn.Module, images: Tensor) -> None:
    """With one budget nothing is shared that a single compression does otherwise."""
    alone = dcvit.compress(model, images, dcvit.Budget(macs=0.8), QUICK)
    (member,) = dcvit.sweep(model, images, [0.8], QUICK).members
    assert member.plan == alone.plan
    assert all(torch.equal(a, b) for a, b in zip(member.model.parameters(), alone.model.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "mobilenetv2_100", "resnet18"])
def test_sizes_of_models_whose_stages_differ(name: str) -> None:
    """Fewer MACs may come with more parameters there."""
    original = timm.create_model(name)
    plans = family_module._plans(original, dcvit.compression.sweep.DEFAULT_SHARES, dcvit.DCViT())
    macs = [planned.cost.macs("with_attention_products") for planned in plans]
    assert macs == sorted(macs, reverse=True)
    assert len(macs) == len(dcvit.compression.sweep.DEFAULT_SHARES)


def test_members_are_timed_on_one_batch(family: dcvit.Family) -> None:
    """One that is added later, too, on the scale of the others."""
    added = family.at(macs=0.75)
    assert added in family.members
    assert {member.report.latency_batch for member in family.members} == {6}
    assert {member.report.teacher.latency_ms for member in family.members} == {family.original.latency_ms}
    ratio = added.report.student.latency_ms / family.original.latency_ms
    assert ratio == pytest.approx(added.report.latency_ratio, rel=0.5)


def test_a_structure_that_is_there_already_is_not_added(family: dcvit.Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family_module, "NEAR", -1.0)  # as where only large parts can go
    member = family.members[1]
    assert family.at(macs=member.report.student.macs) is member
    assert len(family.members) == len(SHARES)


def test_what_members_share_is_done_once(model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("prepare", "make_proxy_set", "compress_prepared"):
        original = getattr(family_module, name)
        monkeypatch.setattr(
            family_module, name, lambda *a, _f=original, _n=name, **k: (calls.append(_n), _f(*a, **k))[1]
        )
    dcvit.sweep(model, images, SHARES, QUICK)
    assert sorted(calls) == ["compress_prepared"] * 3 + ["make_proxy_set", "prepare"]


def test_refined_members_take_a_share_of_the_steps_and_find_the_step_size_once(
    model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    original = family_module.compress_prepared

    def spy(*arguments: Any, **options: Any) -> Any:
        outcome = original(*arguments, **options)
        seen.append((options["refinement"].steps, len(options["refinement"].step_sizes)))
        return outcome

    monkeypatch.setattr(family_module, "compress_prepared", spy)
    monkeypatch.setattr("dcvit.recovery.finetune.FEWEST_STEPS", 1)
    recovery = replace(RECOVERY, refinement_steps=9, refinement_batch=5)
    family = dcvit.sweep(model, images, SHARES, replace(QUICK, recovery=recovery))
    assert [steps for steps, _ in seen] == [3, 3, 3]
    found = [member.report.refinement for member in family.members]
    assert all(refinement is not None for refinement in found)
    assert seen[0][1] == 4
    sizes = [refinement.step_size for refinement in found if refinement is not None]
    assert seen[1][1] == (1 if sizes[0] > 0 else 4)


def test_saved_families_load_and_every_member_is_a_timm_model(
    family: dcvit.Family, images: Tensor, tmp_path: Path
) -> None:
    family.save(tmp_path / "family")
    loaded = dcvit.load_family(tmp_path / "family")
    index = json.loads((tmp_path / "family" / "family.json").read_text())
    assert loaded.original == family.original
    assert [m["macs"] for m in index["members"]] == [m.report.student.macs for m in family.members]
    with torch.no_grad():
        for entry, member, again in zip(index["members"], family.members, loaded.members, strict=True):
            rebuilt = timm.create_model(f"local-dir:{tmp_path / 'family' / entry['folder']}", pretrained=True).eval()
            expected = member.model(images)
            assert torch.equal(rebuilt(images), expected)
            assert torch.equal(again.model(images), expected)


def test_the_report_shows_every_member(family: dcvit.Family, tmp_path: Path) -> None:
    family.save(tmp_path / "family")
    page = write_report(tmp_path / "family").read_text()
    for member in family.members:
        assert family.name(member) in page
    (tmp_path / "family" / "family.json").write_text('{"members": []}')
    with pytest.raises(SaveFolderError, match="not an index of a family"):
        write_report(tmp_path / "family")


def test_nothing_is_overwritten_unasked(family: dcvit.Family, tmp_path: Path) -> None:
    folder = tmp_path / "family"
    family.save(folder)
    with pytest.raises(SaveFolderError, match="earlier family"):
        family.save(folder)
    family.save(folder, overwrite=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(SaveFolderError, match="something else"):
        family.save(other, overwrite=True)
    with pytest.raises(SaveFolderError, match="is a file"):
        family.save(other / "notes.txt")


def test_overwriting_a_family_spares_what_is_not_its(family: dcvit.Family, tmp_path: Path) -> None:
    folder = tmp_path / "family"
    family.save(folder)
    for path, message in (
        (folder / family.name(family.members[-1]) / "notes.txt", r"something else \(notes\.txt\)"),
        (folder / "report.html", "is not a report that dcvit wrote"),
    ):
        path.write_text("mine")
        before = sorted(found.relative_to(folder) for found in folder.rglob("*"))
        with pytest.raises(SaveFolderError, match=message):
            family.save(folder, overwrite=True)
        assert path.read_text() == "mine"
        assert sorted(found.relative_to(folder) for found in folder.rglob("*")) == before
        path.unlink()
    family.save(folder, overwrite=True)


def test_overwriting_a_family_takes_all_of_its_members(family: dcvit.Family, tmp_path: Path) -> None:
    folder = tmp_path / "family"
    family.save(folder)
    fewer = dcvit.Family(family.original, family.members[:1])
    last = folder / family.name(family.members[-1])
    (last / "notes.txt").write_text("mine")
    with pytest.raises(SaveFolderError, match=r"something else \(notes\.txt\)"):
        fewer.save(folder, overwrite=True)
    assert (last / "notes.txt").read_text() == "mine"
    (last / "notes.txt").unlink()
    fewer.save(folder, overwrite=True)
    assert {path.name for path in folder.iterdir()} == {"family.json", family.name(family.members[0])}


ORIGINAL = '"original": {"macs": 1, "params": 1, "latency_ms": 1.0}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "not valid JSON"),
        ("[]", "holds a list"),
        ("{}", "not an index of a family"),
        (f'{{{ORIGINAL}, "members": []}}', "lists no members"),
        (f'{{{ORIGINAL}, "members": [{{"folder": "../elsewhere"}}]}}', "folder beside it"),
        (f'{{{ORIGINAL}, "members": [{{"folder": 3}}]}}', "folder beside it"),
    ],
)
def test_a_broken_index_is_said(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "family.json").write_text(text)
    with pytest.raises(SaveFolderError, match=message):
        dcvit.load_family(tmp_path)


def test_no_index_is_said(tmp_path: Path) -> None:
    with pytest.raises(SaveFolderError, match=r"has no family.json"):
        dcvit.load_family(tmp_path)


# Sizes in between.


def test_a_member_that_is_near_enough_is_taken(family: dcvit.Family) -> None:
    share = family.members[1].report.student.macs / family.original.macs
    assert family.at(macs=share + 0.004) is family.members[1]
    assert family.at(macs=family.members[2].report.student.macs) is family.members[2]
    assert len(family.members) == 3


@pytest.mark.parametrize("metric", ["macs", "params"])
def test_a_size_in_between_is_compressed(family: dcvit.Family, metric: str) -> None:
    member = family.at(**{metric: 0.85})
    amounts = [m.report.student.macs for m in family.members]
    assert any(m is member for m in family.members)
    assert len(family.members) == 4
    assert amounts == sorted(amounts, reverse=True)
    assert getattr(member.report.student, metric) <= 0.85 * getattr(family.original, metric)
    assert family.at(**{metric: 0.85}) is member


def test_a_loaded_family_gives_its_largest_that_fits(family: dcvit.Family, tmp_path: Path) -> None:
    family.save(tmp_path / "family")
    loaded = dcvit.load_family(tmp_path / "family")
    assert loaded.at(macs=0.85) is loaded.members[1]
    with pytest.raises(BudgetError, match="the smallest member has"):
        loaded.at(macs=0.3)


def test_within_a_latency(family: dcvit.Family, tmp_path: Path) -> None:
    timed = replace(with_latencies(family, 9.0, 8.0, 7.0), _search=None)
    assert timed.at(latency_ms=8.5) is timed.members[1]
    assert timed.at(latency_ms=7.0) is timed.members[2]
    with pytest.raises(BudgetError, match="fastest member takes 7 ms"):
        timed.at(latency_ms=6.9)


def test_a_latency_in_between_is_aimed_at(family: dcvit.Family) -> None:
    timed = with_latencies(family, 90000.0, 80000.0, 70000.0)
    member = timed.at(latency_ms=85000.0)
    assert len(timed.members) == 4
    assert timed.members[1] is member
    low, high = timed.members[2].report.student.macs, timed.members[0].report.student.macs
    assert low + 0.3 * (high - low) < member.report.student.macs < low + 0.7 * (high - low)


@pytest.mark.parametrize("given", [{}, {"macs": 0.8, "params": 0.8}])
def test_exactly_one_target(family: dcvit.Family, given: dict[str, float]) -> None:
    with pytest.raises(BudgetError, match="exactly one of macs, params and latency_ms"):
        family.at(**given)


# Bad input, before any long work.


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ((), "at least one"),
        ((0.8, 0.8), "leave one of them out"),
        ((0.8, 1.2), "between 0 and 1"),
        ((0.8, 0.01), "can meet"),
        ((0.8, dcvit.Budget(params=0.9)), "one metric"),
    ],
)
def test_bad_budgets(budgets: Any, message: str, model: nn.Module, images: Tensor) -> None:
    with pytest.raises(BudgetError, match=message):
        dcvit.sweep(model, images, budgets, QUICK)


def test_distillation_is_refused(model: nn.Module, images: Tensor) -> None:
    with pytest.raises(DcvitError, match="ReconstructionConfig"):
        dcvit.sweep(model, images, SHARES, dcvit.DCViT.paper())
