"""The config of a method holds what it reads: every field changes the outcome, or is documented not to."""

import re
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import dcvit
from dcvit.config import AugmentationConfig, DistillationConfig, MethodConfig, ReconstructionConfig, SynthesisConfig
from dcvit.context import RunContext
from dcvit.data import synthesis as synthesis_module
from dcvit.data.synthesis import synthesize
from dcvit.methods import METHODS, Task
from dcvit.methods.baselines import autoformer
from dcvit.models import compressible
from dcvit.models.teacher import freeze
from tests.conftest import PUBLISHED, QUICK, quick, slow_but
from tests.variants import EVA_VARIANTS, VARIANTS

OTHERS = [name for name in METHODS if name != "dcvit"]  # whose fields tests/e2e/test_compression.py sets
BUDGETS = {"evit": dcvit.Budget(macs=0.8), "mini_deit": dcvit.Budget(params=0.7)}

CHANGES: dict[str, dict[str, Any]] = {
    "candidates": {"candidates": (0, 1, 2, 3, 4)},
    "seed": {"seed": 1},
    "halving": {"halving": True, "epochs": 8},
    "round_to": {"round_to": 16},
    "num_views": {"num_views": 30},
    "num_rows": {"num_rows": 120},
    "augmentation": {"augmentation": None},
    "epochs": {"epochs": 3},
    "learning_rate": {"learning_rate": 2e-4},
    "learning_rates": {"learning_rate": "auto", "learning_rates": (3e-4,)},
    "weight_decay": {"weight_decay": 0.5},
    "warmup_epochs": {"warmup_epochs": 2},
    "batch_size": {"batch_size": 2},
    "fixed_views": {"fixed_views": 1},
    "tokens": {"tokens": "class"},
    "updated": {"updated": "all"},
}
"""By field, what is changed of the quick settings."""

AGAINST: dict[str, dict[str, Any]] = {"halving": {"epochs": 8}, "learning_rates": {"learning_rate": "auto"}}
"""And of those that are compared with, where others must be set for a field to be read."""


def leaves(config: Any) -> list[tuple[Any, str]]:
    """The fields of a config and of its parts, but for those of the augmentation, which tests/data looks at."""
    found = []
    for of in fields(config):
        part = getattr(config, of.name)
        whole = is_dataclass(part) and not isinstance(part, AugmentationConfig)
        found += leaves(part) if whole else [(type(config), of.name)]
    return found


def documented(of: type, name: str) -> str:
    """What the docstring of a config's type, or of one that it is made from, says of a field."""
    texts = [re.search(rf"\n        {name}: (.*?)(?=\n        \w+: |\n\n|\Z)", kind.__doc__ or "", re.S)
             for kind in of.__mro__]  # fmt: skip
    return " ".join(text[1] for text in texts if text)


@cache
def deep() -> nn.Module:
    return freeze(VARIANTS["plain"].create(depth=6))


@cache
def images() -> Tensor:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def outcome(name: str, **changes: Any) -> tuple[Any, ...]:
    """The weights of the student, its plan, and what the probes came to."""
    few_shot, budget = dcvit.load_images(images(), deep()), BUDGETS.get(name, dcvit.Budget(macs=0.7))
    config = quick(name, **changes)
    found = METHODS[name].compress(Task(deep(), few_shot, budget, config, RunContext(config.seed, config.impl)))
    weights = torch.cat([value.flatten() for value in found.student.state_dict().values()])
    return weights.numpy().tobytes(), found.plan, [(probe.block, probe.metric_loss) for probe in found.probes]


@cache
def plain(name: str, field: str | None = None) -> tuple[Any, ...]:
    """What is compared with."""
    return outcome(name, **({} if field is None else AGAINST[field]))


UNCHANGED = r"[Cc]hanges\s+speed|has\s+no\s+effect"
CASES = [(name, of, field) for name in OTHERS for of, field in leaves(quick(name))]
FIRST = {(of, field): name for name, of, field in reversed(CASES)}
"""The first method with a field of a part that several methods have: of the others, it is slow."""


@pytest.fixture(autouse=True)
def _short_evolution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoformer, "POPULATION", 3)
    monkeypatch.setattr(autoformer, "GENERATIONS", 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "of", "field"),
    slow_but(CASES, *((name, *field) for field, name in FIRST.items())),
    ids=[f"{name}-{field}" for name, _, field in CASES],
)
def test_every_field_changes_the_outcome(name: str, of: type, field: str) -> None:
    if re.search(UNCHANGED, documented(of, field)):
        return
    assert outcome(name, **CHANGES[field]) != plain(name, field if field in AGAINST else None)


def test_fields_that_change_only_speed() -> None:
    """As the test above takes them for it; those of dcvit's own method among them."""
    found = {
        field for name in METHODS for of, field in leaves(quick(name)) if re.search(UNCHANGED, documented(of, field))
    }
    assert found == {"impl", "micro_batch", "lock_step", "batch_size", "seed"}
    alone = {(of.__name__, field) for _, of, field in CASES if re.search(UNCHANGED, documented(of, field))}
    assert {pair for pair in alone if pair[1] in ("seed", "batch_size")} == {
        ("EViT", "seed"), ("EViT", "batch_size"), ("CalibrationConfig", "batch_size"),
    }  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_fewer_images_at_once(name: str) -> None:
    config = METHODS[name].config()
    assert config.micro_batch_size == 64
    half = config.halved()
    assert half is not None
    assert (half.micro_batch_size, type(half)) == (32, type(config))
    assert config.with_micro_batch_at_most(1).halved() is None


def test_the_type_says_which_method() -> None:
    chosen: MethodConfig = dcvit.methods.EViT()
    result = dcvit.compress(deep(), images(), BUDGETS["evit"], chosen)
    assert result.report.method == "evit"
    assert result.report.settings == {"candidates": None, "seed": 0, "impl": "auto", "batch_size": 64}
    by_name = dcvit.compress(deep(), images(), BUDGETS["evit"], method="evit")
    assert by_name.plan == result.plan


# Presets.


def test_fast_takes_no_gradient_step() -> None:
    small = {"num_views": 60, "num_rows": 300}
    config = dcvit.DCViT.fast(synthesis=QUICK.synthesis)
    config = config.with_(recovery=replace(config.reconstruction, **small))
    report = dcvit.compress(deep(), images(), dcvit.Budget(macs=0.75), config).report
    assert report.refinement is None
    assert all(not block.epochs for block in report.reconstructions)


def test_best_does_more_of_the_same() -> None:
    default, best = ReconstructionConfig(), dcvit.DCViT.best().reconstruction
    for field, times in (("refinement_steps", 10), ("refinement_macs", 10), ("refinement_views", 4), ("num_views", 4)):
        assert getattr(best, field) == times * getattr(default, field)
    assert dcvit.DCViT.best(seed=3).seed == dcvit.DCViT.fast(seed=3).seed == dcvit.DCViT.paper(seed=3).seed == 3
    assert isinstance(dcvit.DCViT.paper().recovery, DistillationConfig)


# β of the prior of synthesised images.

FAMILIES = {
    "ViT": (lambda: VARIANTS["plain"].create(), 0.6),
    "DeiT, by its token": (lambda: VARIANTS["distilled"].create(), 1.0),
    "DeiT, by its name": (lambda: timm.create_model("deit_tiny_patch16_224", img_size=32, depth=2), 1.0),
    "DeiT-III": (lambda: VARIANTS["layer_scale"].create(), 1.0),
    "EVA": (lambda: EVA_VARIANTS["eva02"].create(), 0.6),
    "Swin": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=56, embed_dim=24, depths=(2, 2, 2, 2)), 1.0,
    ),
    "CNN": (lambda: timm.create_model("resnet10t"), 0.6),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_the_prior_follows_the_family(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    create, published = FAMILIES[name]
    model = create().eval()
    assert compressible(model).tv_exponent == published
    given = []
    step = synthesis_module.synthesis_step
    monkeypatch.setattr(
        synthesis_module,
        "synthesis_step",
        lambda *args, beta, **options: (given.append(beta), step(*args, beta=beta, **options))[1],
    )
    for exponent in (None, 0.8):
        synthesize(model, SynthesisConfig(num_images=2, iterations=1, tv_exponent=exponent))
    assert given == [published, 0.8]


@pytest.mark.slow
def test_the_settings_of_a_result_have_a_number() -> None:
    deit = VARIANTS["distilled"].create()
    for config in (QUICK, PUBLISHED):
        report = dcvit.compress(deit, images(), dcvit.Budget(macs=0.8), config).report
        assert report.settings["synthesis"]["tv_exponent"] == 1.0
    explicit = QUICK.with_(synthesis=replace(QUICK.synthesis, tv_exponent=0.7))
    family = dcvit.sweep(deit, images(), [0.8], explicit)
    assert family.members[0].report.settings["synthesis"]["tv_exponent"] == 0.7


# The root.


def test_the_root_exports_what_a_user_needs() -> None:
    assert sorted(dcvit.__all__) == sorted([
        "Budget", "CompressionResult", "DCViT", "DcvitError", "Family", "__version__", "compress", "export_model",
        "fuse", "load", "load_family", "load_images", "push_to_hub", "sweep", "unfuse", "write_report",
    ])  # fmt: skip


@pytest.mark.slow
def test_submodules_are_there_after_one_import() -> None:
    names = (
        "methods.FSKD", "config.SynthesisConfig", "errors.BudgetError", "metrics.latency.measure_latency",
        "data.synthesis.synthesize", "search.plan.plan", "search.sensitivity.rank", "recovery.distill.recover",
    )  # fmt: skip
    code = "import dcvit\n" + "\n".join(f"dcvit.{name}" for name in names)
    subprocess.run([sys.executable, "-c", code], check=True)
