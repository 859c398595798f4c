"""What the version before the settings got their present names wrote: results, families and runs go on to be of use.

`tests/fixtures/earlier` was written by it: `compress` and `sweep` of the plain variant with the settings `QUICK`, and
of a published procedure the beginning of a run.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import dcvit
from dcvit.runtime.earlier import run_of_earlier_versions, settings_of_earlier_versions
from tests.conftest import PUBLISHED, QUICK

EARLIER = Path(__file__).parents[1] / "fixtures" / "earlier"
MEMBER = "macs-425856"
BUDGET = dcvit.Budget(macs=0.75)


@pytest.fixture
def seen() -> Tensor:
    """The images of the runs."""
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def begun(name: str, tmp_path: Path) -> Path:
    """A copy of a run as if begun on this machine, whose versions it names."""
    folder = tmp_path / name
    shutil.copytree(EARLIER / name, folder)
    run = json.loads((folder / "run.json").read_text())
    run["versions"] = {"dcvit": dcvit.__version__, "torch": torch.__version__, "timm": timm.__version__}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let functions fail that compute what is finished."""

    def again(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("what is finished is computed again")

    for name in names:
        monkeypatch.setattr(name, again)


def test_results_load_and_are_reported(tmp_path: Path, seen: Tensor) -> None:
    folder = tmp_path / MEMBER
    shutil.copytree(EARLIER / "family" / MEMBER, folder)
    result = dcvit.load(folder)
    assert result.report.settings["metric_set"] == "synthetic"  # as it was saved
    assert torch.isfinite(result.model(seen)).all()
    page = dcvit.write_report(folder).read_text()
    assert "metric_set" in page
    assert "relative error of the output tokens" in page  # which the settings name as what blocks are ranked by
    assert "synthesised images:" not in page  # as something that is missing


def test_families_load_and_are_reported(tmp_path: Path) -> None:
    shutil.copytree(EARLIER / "family", tmp_path / "family")
    family = dcvit.load_family(tmp_path / "family")
    assert family.at(macs=0.6).plan.cost.macs("with_attention_products") == 425856
    assert MEMBER in dcvit.write_report(tmp_path / "family").read_text()


def test_a_run_goes_on(model: nn.Module, seen: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it is finished, so that nothing is computed but the report."""
    run_dir = begun("run", tmp_path)
    forbid(
        monkeypatch,
        "dcvit.methods.dcvit.method.synthesize",
        "dcvit.methods.dcvit.reconstructed.reconstruct_block",
        "dcvit.methods.dcvit.reconstructed.find_step_size",
        "dcvit.search.sensitivity.reconstruct_block",
    )
    result = dcvit.compress(model, seen, BUDGET, QUICK, run_dir=run_dir)
    assert len(result.report.reconstructions) == 4
    with pytest.raises(dcvit.errors.RunStoreError, match=r"settings\.seed was 0 there and is 1 here"):
        dcvit.compress(model, seen, BUDGET, QUICK.with_(seed=1), run_dir=run_dir)
    few_shot = QUICK.with_(ablation=dcvit.config.Ablation(ranking_images="few-shot"))
    told = r"settings\.ablation\.ranking_images was 'synthetic' there and is 'few-shot' here"
    with pytest.raises(dcvit.errors.RunStoreError, match=told):
        dcvit.compress(model, seen, BUDGET, few_shot, run_dir=run_dir)


def test_a_run_of_the_published_procedure_goes_on(
    model: nn.Module, seen: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its proxy set is finished, the probes are not."""
    forbid(monkeypatch, "dcvit.methods.dcvit.method.synthesize")
    result = dcvit.compress(model, seen, BUDGET, PUBLISHED, run_dir=begun("published.run", tmp_path))
    assert len(result.report.steps) == len(result.plan.blocks) > 0


@pytest.mark.parametrize(("name", "config"), [("run", QUICK), ("published.run", PUBLISHED)])
def test_settings_are_those_of_today(name: str, config: dcvit.DCViT) -> None:
    run = json.loads((EARLIER / name / "run.json").read_text())
    found = run_of_earlier_versions(run)
    assert found["settings"] == config.with_tv_exponent(0.6).to_dict()
    assert run_of_earlier_versions(found) == found
    assert found.keys() - run.keys() == {"proxy_set"}


def test_fixed_views_and_halving_moved() -> None:
    run = json.loads((EARLIER / "published.run" / "run.json").read_text())
    run["settings"]["recovery"]["augmentation"]["num_views"] = 8
    run["settings"]["recovery"]["halving"] = True
    run["settings"]["metric_set"] = "images"
    found = settings_of_earlier_versions(run["settings"])
    assert found["recovery"]["fixed_views"] == 8
    assert found["ablation"]["halving"] is True
    assert found["ablation"]["ranking_images"] == "few-shot"


@pytest.mark.parametrize("settings", [[], "x", {"metric_set": 1}, {"metric_set": [], "recovery": {"augmentation": 3}}])
def test_what_is_no_settings_is_no_error(settings: Any) -> None:
    run_of_earlier_versions({"settings": settings, "metric_set": 3})
