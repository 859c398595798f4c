"""`dcvit.compress`: one call for every method, on one device or several."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from dcvit.artifacts.result import CompressionResult
from dcvit.budget import Budget
from dcvit.compression.finish import finish
from dcvit.compression.out_of_memory import within_memory
from dcvit.config import DCViT, DistillationConfig, MethodConfig
from dcvit.context import RunContext
from dcvit.data.images import FewShotImages, Images, check_images, first_images, load_images, require_finite
from dcvit.data.synthesis import ProxySet
from dcvit.errors import DcvitError
from dcvit.methods import METHODS, Method, Task, method_of
from dcvit.metrics.latency import Stopwatch, time_forward
from dcvit.models import compressible, hub_repository, load_model, require_modules_alone
from dcvit.models.teacher import freeze
from dcvit.recovery.distill import require_tokens
from dcvit.runtime.checkpoint import MemoryStore, Store, digest_images, digest_model
from dcvit.runtime.distributed import SINGLE_PROCESS, ProcessGroup, on_devices
from dcvit.runtime.environment import versions
from dcvit.runtime.precision import InPrecision, Precision
from dcvit.runtime.process_state import own_state
from dcvit.runtime.progress import Progress, Timer, silent

__all__ = ["DEFAULT", "checked_images", "compress", "open_store"]

DEFAULT = DCViT()
"""The method unless told otherwise."""

Given = TypeVar("Given")


def compress(
    model: str | nn.Module,
    images: Images | FewShotImages,
    budget: Budget,
    method: str | MethodConfig = DEFAULT,
    *,
    proxy_set: ProxySet | None = None,
    run_dir: str | Path | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
    devices: Sequence[str] = (),
    progress: Progress = silent,
    stopwatch: Stopwatch = time_forward,
) -> CompressionResult:
    """Make a model smaller and faster from a few unlabelled images.

    Args:
        model: A timm model, or a name that `timm.create_model` takes (its pretrained weights are loaded). Unchanged.
        images: The few-shot set, see `dcvit.data.images.load_images`. Labels are never read.
        budget: What the result may cost, `Budget(macs=0.75)` for example.
        method: How: a config, whose type says which method, as `DCViT(num_blocks=3)`, `DCViT.best()` or
            `dcvit.methods.FSKD()`; or the name of a method (`dcvit.methods.METHODS`), for its default config.
        proxy_set: Images to rank blocks on, in place of synthesised ones.
        run_dir: A folder for finished work, see `dcvit.runtime.checkpoint`: the same call with the same folder goes on
            where an earlier one was stopped, and ends with the same weights. It can be deleted in the end.
        processes: The processes that share the work, see `dcvit.runtime.distributed`: each calls this with the same
            arguments.
        devices: Start such processes on this machine, one for each, and share the work over them:
            `["cuda:0", "cuda:1"]` or `["cpu"] * 2`. A script must then guard what it does by
            `if __name__ == "__main__"`, and `progress` must be picklable.
        progress: Told how it goes, see `dcvit.runtime.progress`.
        stopwatch: Times one pass, for a latency budget and for the report, under the caller's autocast and TF32;
            everything else is computed in full precision.

    Returns:
        The compressed model, the plan that it follows, and a report.

    Raises:
        DcvitError: If there is no such method, or it has no use for `proxy_set`, `run_dir` or `devices`; or if the
            class token is to be mimicked, and the model has none.
        DistributedError: If a rank is given something else than the first.
        UnsupportedModelError: If the model cannot be compressed, or not by that method.
        ImagesError: If the images do not fit the model.
        BudgetError: If the budget cannot be met, or is of what that method does not save.
        NonFiniteError: If a weight is NaN or infinite, or a block of the original makes such values of the images.
        RunStoreError: If `run_dir` is in use, or holds something else, or a run of other settings, model or images; and
            later, if it cannot be written.
        All of them before any long work; `NonFiniteError` also during it, where a student's values grow too large.
    """
    chosen, config = method_of(method)
    chosen.require_metric(budget)
    clock = InPrecision(stopwatch, Precision.of_caller())
    if run_dir is not None and not chosen.resumable:
        raise DcvitError(
            f"run_dir with method={chosen.name!r}: only {_resumable()} goes on where it was stopped; leave it out."
        )
    if proxy_set is not None and not isinstance(config, DCViT):
        raise DcvitError(f"proxy_set with method={chosen.name!r}: only dcvit ranks on one, leave it out.")
    if processes.size > 1 or len(devices) > 1:
        _require_shareable(chosen, config, processes, devices)
    if len(devices) > 1:
        call = {
            "model": model, "images": images, "budget": budget, "method": config, "proxy_set": proxy_set,
            "run_dir": run_dir, "progress": progress, "stopwatch": clock,
        }  # fmt: skip
        result = on_devices(devices, partial(_as_process, call))
        assert result is not None  # the first process gives it
        return result if isinstance(model, str) else result.to(next(model.parameters()).device)
    with own_state():
        timer = Timer()
        with timer("prepare"):
            original = freeze(load_model(model))
            home = next(original.parameters()).device
            if devices:
                original, images = original.to(devices[0]), _moved(images, devices[0])
                proxy_set = _moved(proxy_set, devices[0])
            chosen.require_family(original)
            config = _settled(config, original)
            few_shot = checked_images(images, proxy_set, original, progress)
            if stopwatch is not time_forward:
                clock(original, few_shot.normalised[:1])  # it may refuse
        with open_store(run_dir, original, few_shot, proxy_set, config, processes, budget=budget.to_dict()) as store:
            context = RunContext(config.seed, config.impl, processes, progress, store, timer)
            task = Task(original, few_shot, budget, config, context, clock, proxy_set)

            def completed(config: MethodConfig) -> CompressionResult:
                given = replace(task, config=config)
                return finish(model, given, chosen.compress(given), method=chosen.name)

            return within_memory(completed, config, processes).to(home)


def _require_shareable(method: Method, config: MethodConfig, processes: ProcessGroup, devices: Sequence[str]) -> None:
    """Refuse what several processes cannot do.

    Raises:
        DcvitError: If that is so.
    """
    if processes.size > 1 and devices:
        raise DcvitError(
            f"devices={list(devices)} with {processes.size} ranks: each rank has a device; leave one of them out."
        )
    if not method.resumable:
        raise DcvitError(
            f"method={method.name!r} on several devices: only {_resumable()} shares its work; name one device."
        )
    if isinstance(config, DCViT) and isinstance(config.recovery, DistillationConfig) and config.halving:
        raise DcvitError("halving=True on several devices: no one process sees all probes; leave one of them out.")


def _settled(config: MethodConfig, model: nn.Module) -> MethodConfig:
    """A method's config for a certain model: with a number for β, where there is a prior.

    Raises:
        DcvitError: If the class token is to be mimicked, and the model has none.
    """
    for of in fields(config):
        part = getattr(config, of.name)
        if isinstance(part, DistillationConfig):
            require_tokens(model, part)
    if isinstance(config, DCViT):
        return config.with_tv_exponent(compressible(model).tv_exponent)
    return config


def _resumable() -> str:
    """The methods that are, by name."""
    return ", ".join(name for name, method in METHODS.items() if method.resumable)


def _as_process(call: Mapping[str, Any], processes: ProcessGroup, device: str) -> CompressionResult | None:
    """Call `compress` in a process that `on_devices` started; return what the first found.

    Args:
        call: The arguments by name, without `processes` and `devices`.
        processes: The processes.
        device: This one's.
    """
    model = call["model"]
    moved = {name: _moved(call[name], device) for name in ("images", "proxy_set")}
    original = copy.deepcopy(load_model(model)).to(device)
    progress = call["progress"] if processes.is_main else silent
    result = compress(**{**call, **moved, "model": original, "ranks": processes, "progress": progress})
    if not processes.is_main:
        return None
    report = result.report
    if isinstance(model, str):
        report = replace(report, model=model, base_model=hub_repository(model))
    return replace(result.to("cpu"), report=report)


def _moved(given: Given, device: str) -> Given:
    """Images on a device, where they are tensors; others follow the model."""
    return cast(Given, given.to(device)) if isinstance(given, Tensor | FewShotImages | ProxySet) else given


def checked_images(
    images: Images | FewShotImages, proxy_set: ProxySet | None, original: nn.Module, progress: Progress
) -> FewShotImages:
    """The few-shot set, after all that is refused before any work: of the images, and of the model on them.

    Args:
        images: The caller's.
        proxy_set: The caller's, if there is one.
        original: The original.
        progress: Told how many images are read.

    Raises:
        ImagesError: If the images do not fit the model.
        NonFiniteError: As `require_finite` does.
        UnsupportedModelError: As `require_modules_alone` does.
    """
    few_shot = load_images(images, original, progress)
    if proxy_set is not None:
        check_images(proxy_set.images, original, "The proxy set's images")
    require_finite(original, few_shot)
    require_modules_alone(original, first_images(few_shot))
    return few_shot


def open_store(
    run_dir: str | Path | None,
    model: nn.Module,
    images: FewShotImages,
    proxy_set: ProxySet | None,
    config: MethodConfig,
    processes: ProcessGroup = SINGLE_PROCESS,
    **asked: Any,
) -> AbstractContextManager[Store]:
    """The store of a run (`dcvit.runtime.checkpoint.open_run`), opened with all that its result depends on.

    Args:
        run_dir: Its folder; `None` keeps what is finished in memory, so that it is not done again if that runs out.
        model: The original.
        images: The few-shot set.
        proxy_set: The caller's, if there is one.
        config: The method's settings.
        processes: The processes that share the work.
        **asked: What is asked for, as plain values: a budget, or several.

    Raises:
        RunStoreError: As `open_run` does.
        DistributedError: As `ProcessGroup.store` does.
    """
    if run_dir is None and processes.size == 1:
        return nullcontext(MemoryStore())
    fingerprint = {
        **asked,
        "settings": config.to_dict(),
        "model": digest_model(model, compressible(model).config()),
        "images": digest_images(images.normalised),
        "proxy_set": None if proxy_set is None else digest_images(proxy_set.images),
        "device": images.normalised.device.type,
        "versions": {name: version for name, version in versions().items() if name in ("dcvit", "torch", "timm")},
    }
    return processes.store(run_dir, fingerprint)
