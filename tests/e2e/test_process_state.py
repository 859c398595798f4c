"""What the caller has set in the process decides nothing of a compression, and is afterwards as it was."""

import concurrent.futures
import locale
import os
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dcvit
from dcvit.data.images import load_images
from dcvit.methods import METHODS, VTP, Practise
from dcvit.recovery.finetune import token_weight
from dcvit.runtime.precision import Precision
from tests.conftest import CUT, CUT_REFINED, PUBLISHED, QUICK, SYNTHESIS, quick, slow_but
from tests.variants import EVA_VARIANTS, VARIANTS

AUGMENTED = PUBLISHED.with_(
    recovery=replace(
        PUBLISHED.distillation,
        augmentation=dcvit.config.AugmentationConfig(),
        learning_rate="auto",
        learning_rates=(1e-4, 1e-3),
    )
)
"""The published procedure with random views and a search for the learning rate."""

DROPPING = Practise(distillation=AUGMENTED.distillation)
"""Block dropping likewise."""

Weights = dict[str, Tensor]


@cache
def vit(variant: str = "plain") -> nn.Module:
    return (VARIANTS | EVA_VARIANTS)[variant].create()


@cache
def cnn() -> nn.Module:
    """A ResNet, whose blocks are three convolutions with norms, as small as timm makes one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        overlay = {"input_size": (3, 32, 32)}
        arguments: dict[str, Any] = {"layers": (3, 3, 1, 1), "channels": (16,) * 4, "zero_init_last": False}
        return timm.create_model("resnet18", num_classes=10, pretrained_cfg_overlay=overlay, **arguments).eval()


@cache
def images() -> Tensor:
    """Six, a caller's."""
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def compressed(method: dcvit.config.MethodConfig = QUICK, **changes: Any) -> Weights:
    arguments = {"model": vit(), "images": images(), "budget": dcvit.Budget(macs=0.75), **changes}
    return weights(dcvit.compress(method=method, **arguments).model)


def weights(model: nn.Module) -> Weights:
    """All, and the buffers that are not saved."""
    return {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def family() -> Weights:
    members = dcvit.sweep(vit(), images(), (0.8, 0.6), QUICK).members
    return {f"{i}.{name}": value for i, member in enumerate(members) for name, value in weights(member.model).items()}


def synthesised() -> Weights:
    made = dcvit.data.synthesis.synthesize(vit(), SYNTHESIS)
    assert made.targets is not None
    return {"images": made.images, "targets": made.targets}


WORK: dict[str, Callable[[], Weights]] = {
    "dcvit": compressed,
    "paper": lambda: compressed(AUGMENTED),
    "refined": lambda: compressed(CUT_REFINED),
    "CNN": lambda: compressed(DROPPING, model=cnn(), budget=dcvit.Budget(macs=0.9)),
    "rotary positions": lambda: compressed(model=vit("rope_mixed")),
    "sweep": family,
    "synthesis": synthesised,
}


@cache
def plain(work: str) -> Weights:
    """What some work gives in a process in which nothing is set."""
    return WORK[work]()


def state() -> dict[str, Any]:
    """All of a process and a thread that the work could change."""
    return {
        "random numbers of torch": torch.random.get_rng_state().tolist(),
        "random numbers of numpy": str(np.random.get_state()),
        "random numbers of Python": random.getstate(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "precision": Precision.current(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "working directory": Path.cwd(),
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "errors of numpy": np.geterr(),
        "locale": locale.setlocale(locale.LC_ALL),
    }


@contextmanager
def as_set(set_it: Callable[[Any], object], value: Any, before: Any) -> Iterator[None]:
    """A setting that has no context manager of its own."""
    set_it(value)
    try:
        yield
    finally:
        set_it(before)


@contextmanager
def warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextmanager
def reseeded() -> Iterator[None]:
    of_numpy, of_python = np.random.get_state(), random.getstate()
    with torch.random.fork_rng():
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(12345)
        yield
    np.random.set_state(of_numpy)
    random.setstate(of_python)


@contextmanager
def another_thread_draws() -> Iterator[None]:
    """Random numbers of torch's global generator, all the time."""
    done = threading.Event()

    def draw() -> None:
        while not done.wait(1e-4):
            torch.rand(3)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def another_locale() -> Iterator[None]:
    """One that writes numbers in another way than C, if there is one."""
    before = locale.setlocale(locale.LC_ALL)
    for name in ("de_DE.UTF-8", "fr_FR.UTF-8", "tr_TR.UTF-8", "hi_IN.UTF-8"):
        try:
            locale.setlocale(locale.LC_ALL, name)
        except locale.Error:
            continue
        with as_set(lambda name: locale.setlocale(locale.LC_ALL, name), name, before):
            yield
        return
    pytest.skip("no locale but C is installed")


def several(*contexts: AbstractContextManager[Any]) -> AbstractContextManager[Any]:
    stack = ExitStack()
    for context in contexts:
        stack.enter_context(context)
    return stack


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "default dtype float64": lambda: as_set(torch.set_default_dtype, torch.float64, torch.float32),
    "default dtype bfloat16": lambda: as_set(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default dtype float16": lambda: as_set(torch.set_default_dtype, torch.float16, torch.float32),
    "default device": lambda: as_set(torch.set_default_device, "meta", None),
    "scope of a device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic algorithms": lambda: as_set(torch.use_deterministic_algorithms, True, False),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "lower precision": lambda: as_set(torch.set_float32_matmul_precision, "medium", "highest"),
    "locale": another_locale,
    "warnings are errors": warnings_are_errors,
    "errors of numpy": lambda: np.errstate(all="raise"),
    "reseeded": reseeded,
    "another thread draws": another_thread_draws,
    "all of torch's": lambda: several(
        as_set(torch.set_default_dtype, torch.float64, torch.float32),
        torch.device("meta"),
        torch.autocast("cpu", torch.bfloat16),
        torch.inference_mode(),
        reseeded(),
    ),
    "all else": lambda: several(
        as_set(torch.use_deterministic_algorithms, True, False),
        as_set(torch.set_float32_matmul_precision, "medium", "highest"),
        warnings_are_errors(),
        np.errstate(all="raise"),
    ),
}


def assert_same(found: Weights, expected: Weights) -> None:
    """To the last bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    "name", slow_but(STATES, "default dtype bfloat16", "locale", "another thread draws", "all of torch's", "all else")
)
@pytest.mark.parametrize("work", slow_but(["dcvit", "paper"], "dcvit"))
def test_the_callers_state_changes_nothing_and_is_not_changed(work: str, name: str) -> None:
    expected = plain(work)
    with STATES[name]():
        before = state()
        found = WORK[work]()
        after = state()
    if name == "another thread draws":
        del before["random numbers of torch"], after["random numbers of torch"]
    assert after == before
    assert_same(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", slow_but(["default dtype float64", "inference mode", "all of torch's"], "all of torch's")
)
@pytest.mark.parametrize("work", ["refined", "CNN", "rotary positions", "sweep", "synthesis"])
def test_of_other_work_too(work: str, name: str) -> None:
    expected = plain(work)
    with STATES[name]():
        before = state()
        found = WORK[work]()
        assert state() == before
    assert_same(found, expected)


class Watching(TorchDispatchMode):
    """Sees each operation and changes none, as a logger does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_modes_of_the_callers_change_only_who_rounds() -> None:
    """Under them fused blocks run as modules, which is how they always run with the eager implementation."""
    eager = replace(CUT, impl="eager")
    expected = compressed(eager)
    with Watching(), BaseTorchFunctionMode():
        found = compressed(eager)
    assert_same(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", slow_but([name for name in STATES if name.startswith("default dtype")], "default dtype bfloat16")
)
@pytest.mark.parametrize("method", ["dcvit", "vtp"])
def test_the_default_dtype_rounds_nothing(method: str, name: str) -> None:
    """The refinement of a compressed model and the gates of a pruned one keep full precision."""
    config = CUT_REFINED if method == "dcvit" else VTP(distillation=AUGMENTED.distillation)
    budget = dcvit.Budget(**{METHODS[method].metrics[0]: 0.75})
    expected = compressed(config, budget=budget)
    with STATES[name]():
        assert_same(compressed(config, budget=budget), expected)


@pytest.mark.parametrize("name", [name for name in STATES if name.startswith("default dtype")])
def test_the_default_dtype_rounds_no_weight_of_the_loss(name: str) -> None:
    tokens = torch.randn(1, 17, 48, generator=torch.Generator().manual_seed(0))
    expected = token_weight(vit(), tokens)
    assert expected is not None
    with STATES[name]():
        found = token_weight(vit(), tokens)
    assert found is not None
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", [name for name in STATES if name.startswith("default dtype")])
def test_the_default_dtype_rounds_no_picture(name: str) -> None:
    pictures = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)) for i in (1, 2)]
    expected = load_images(pictures, vit())
    with STATES[name]():
        found = load_images(pictures, vit())
        assert torch.equal(found.normalised, expected.normalised)
        assert all(torch.equal(*pair) for pair in zip(found.pixels, expected.pixels, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("method", slow_but(METHODS, "dcvit", "practise", "fskd", "evit"))
def test_no_method_touches_the_random_state(method: str) -> None:
    """Nor is it touched by it: whatever it is, one seed gives one result."""
    chosen = METHODS[method]
    rates = (
        {} if method in ("dcvit", "fskd", "cd", "evit") else {"learning_rate": "auto", "learning_rates": (1e-4, 1e-3)}
    )
    config = quick(method, **rates)
    budget = dcvit.Budget(**{chosen.metrics[0]: 0.9})
    first = compressed(config, budget=budget)
    with reseeded():
        before = state()
        again = compressed(config, budget=budget)
        assert state() == before
    assert_same(again, first)


def test_a_model_and_images_made_in_inference_mode() -> None:
    """Tensors of which autograd keeps nothing: the work is on copies, and what comes out can be trained."""
    with torch.inference_mode():
        model = VARIANTS["plain"].create()
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
        result = dcvit.compress(model, images().clone(), dcvit.Budget(macs=0.75), QUICK)
    assert_same(weights(result.model), plain("dcvit"))
    result.model.requires_grad_()(images()).sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_stays(threads: int) -> None:
    """Sums may be rounded in another order by more of them, so the weights are compared with those of as many."""
    with as_set(torch.set_num_threads, threads, torch.get_num_threads()):
        first = compressed()
        assert torch.get_num_threads() == threads
        assert_same(compressed(), first)


def test_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = plain("dcvit")
    monkeypatch.chdir(tmp_path)
    assert_same(compressed(), expected)
    assert Path.cwd() == tmp_path
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("work", "count"), slow_but([("dcvit", 4), ("paper", 4), ("CNN", 2)], ("CNN", 2)))
def test_several_threads_at_once(work: str, count: int) -> None:
    """Each run has another seed and gives the same result as a separate run."""
    config, model = {
        "dcvit": (QUICK, vit()),
        "paper": (AUGMENTED, vit()),
        "CNN": (DROPPING, cnn()),
    }[work]

    def seeded_with(seed: int) -> Weights:
        return compressed(config.with_(seed=seed), model=model, budget=dcvit.Budget(macs=0.9))

    alone = [seeded_with(seed) for seed in range(count)]
    before = state()
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        together = list(pool.map(seeded_with, range(count)))
    assert state() == before
    for found, expected in zip(together, alone, strict=True):
        assert_same(found, expected)
    assert not all(torch.equal(alone[0][name], alone[1][name]) for name in alone[0] if name in alone[1])


@pytest.mark.slow
def test_several_threads_in_a_lower_precision() -> None:
    """In which each is timed: it waits until the others do not compute in full precision, and they go on afterwards."""
    expected = [compressed(QUICK.with_(seed=seed)) for seed in range(3)]
    seen: set[str] = set()

    def noting(model: nn.Module, batch: Tensor) -> float:
        seen.add(torch.get_float32_matmul_precision())
        return 1.0

    with as_set(torch.set_float32_matmul_precision, "medium", "highest"):
        before = state()
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            runs = [pool.submit(compressed, QUICK.with_(seed=seed), stopwatch=noting) for seed in range(3)]
            together = [run.result(timeout=120) for run in runs]
        assert state() == before
    assert seen == {"medium"}
    for found, alone in zip(together, expected, strict=True):
        assert_same(found, alone)
