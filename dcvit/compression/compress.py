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
from dcvit.models import compressible, hub_repository, load_model, require_plain_behaviour
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
"""The default method."""

Movable = TypeVar("Movable")


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
        model: A timm model, or a name that `timm.create_model` takes; its pretrained weights are loaded. The model is
            not changed.
        images: The few-shot set, see `dcvit.data.images.load_images`. Labels are never read.
        budget: The largest cost of the result, for example `Budget(macs=0.75)`.
        method: A config, whose type identifies the method, such as `DCViT(num_blocks=3)`, `DCViT.best()` or
            `dcvit.methods.FSKD()`; or the name of a method in `dcvit.methods.METHODS`, for its default config.
        proxy_set: Images to rank blocks on, instead of synthesised ones.
        run_dir: A folder for checkpoints, see `dcvit.runtime.checkpoint`. The same call with the same folder resumes an
            interrupted run and ends with the same weights. The folder can be deleted when the run is finished.
        processes: The processes that share the work, see `dcvit.runtime.distributed`. Each of them calls this function
            with the same arguments.
        devices: Devices of this machine, such as `["cuda:0", "cuda:1"]` or `["cpu"] * 2`. One process is started for
            each of several devices, and they share the work. A script must then protect its main part with
            `if __name__ == "__main__"`, and `progress` must be picklable.
        progress: Called with the state of the work, see `dcvit.runtime.progress`.
        stopwatch: Times one forward pass, for a latency budget and for the report, under the caller's autocast and
            TF32 settings. Everything else is computed in full precision.

    Returns:
        The compressed model, the plan that it follows, and a report.

    Raises:
        DcvitError: If there is no such method, or it does not support `proxy_set`, `run_dir` or `devices`. Also if only
            the class token is to be distilled, and the model has none.
        DistributedError: If the arguments of a process differ from those of the main process.
        UnsupportedModelError: If the model cannot be compressed, or not by that method.
        ImagesError: If the images do not fit the model.
        BudgetError: If the budget cannot be met, or the method does not reduce its metric.
        NonFiniteError: If a weight, or the output of a block of the original, is NaN or infinite.
        RunStoreError: If `run_dir` is in use, or holds something else or a run with other settings, model or images.
            Also later, if it cannot be written.
        All of these are raised before any long work. `NonFiniteError` is also raised later, if a student's values
        overflow.
    """
    chosen, config = method_of(method)
    chosen.require_metric(budget)
    clock = InPrecision(stopwatch, Precision.of_caller())
    if run_dir is not None and not chosen.resumable:
        raise DcvitError(f"run_dir with method={chosen.name!r}: only {_resumable()} can resume a run; leave it out.")
    if proxy_set is not None and not isinstance(config, DCViT):
        raise DcvitError(f"proxy_set with method={chosen.name!r}: only dcvit uses a proxy set; leave it out.")
    if processes.size > 1 or len(devices) > 1:
        _require_shareable(chosen, config, processes, devices)
    if len(devices) > 1:
        call = {
            "model": model, "images": images, "budget": budget, "method": config, "proxy_set": proxy_set,
            "run_dir": run_dir, "progress": progress, "stopwatch": clock,
        }  # fmt: skip
        result = on_devices(devices, partial(_as_process, call))
        assert result is not None  # the main process returns it
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
                clock(original, few_shot.normalised[:1])  # a custom stopwatch may raise an error
        with open_store(run_dir, original, few_shot, proxy_set, config, processes, budget=budget.to_dict()) as store:
            context = RunContext(config.seed, config.impl, processes, progress, store, timer)
            task = Task(original, few_shot, budget, config, context, clock, proxy_set)

            def completed(config: MethodConfig) -> CompressionResult:
                configured = replace(task, config=config)
                return finish(model, configured, chosen.compress(configured), method=chosen.name)

            return within_memory(completed, config, processes).to(home)


def _require_shareable(method: Method, config: MethodConfig, processes: ProcessGroup, devices: Sequence[str]) -> None:
    """Refuse a method or config that several processes cannot run together.

    Raises:
        DcvitError: If they cannot, or if `devices` is set in a run that has several processes already.
    """
    if processes.size > 1 and devices:
        raise DcvitError(
            f"devices={list(devices)} with {processes.size} processes: each of them has a device; leave devices out."
        )
    if not method.resumable:
        raise DcvitError(
            f"method={method.name!r} on several devices: only {_resumable()} can use several; name one device."
        )
    if isinstance(config, DCViT) and isinstance(config.recovery, DistillationConfig) and config.halving:
        raise DcvitError("halving=True on several devices: halving needs all probes in one process; name one device.")


def _settled(config: MethodConfig, model: nn.Module) -> MethodConfig:
    """Return a method's config with the defaults that depend on the model, such as the prior's exponent β.

    Raises:
        DcvitError: If only the class token is to be distilled, and the model has none.
    """
    for of in fields(config):
        part = getattr(config, of.name)
        if isinstance(part, DistillationConfig):
            require_tokens(model, part)
    if isinstance(config, DCViT):
        return config.with_tv_exponent(compressible(model).tv_exponent)
    return config


def _resumable() -> str:
    """Return the names of the methods that can resume a run."""
    return ", ".join(name for name, method in METHODS.items() if method.resumable)


def _as_process(call: Mapping[str, Any], processes: ProcessGroup, device: str) -> CompressionResult | None:
    """Call `compress` in a process that `on_devices` started; return the result in the main process only.

    Args:
        call: The arguments by name, without `processes` and `devices`.
        processes: The processes.
        device: The device of this process.
    """
    model = call["model"]
    moved = {name: _moved(call[name], device) for name in ("images", "proxy_set")}
    original = copy.deepcopy(load_model(model)).to(device)
    progress = call["progress"] if processes.is_main else silent
    result = compress(**{**call, **moved, "model": original, "processes": processes, "progress": progress})
    if not processes.is_main:
        return None
    report = result.report
    if isinstance(model, str):
        report = replace(report, model=model, base_model=hub_repository(model))
    return replace(result.to("cpu"), report=report)


def _moved(value: Movable, device: str) -> Movable:
    """Return tensors of images on a device. Images in other forms are returned unchanged; loading moves them."""
    return cast(Movable, value.to(device)) if isinstance(value, Tensor | FewShotImages | ProxySet) else value


def checked_images(
    images: Images | FewShotImages, proxy_set: ProxySet | None, original: nn.Module, progress: Progress
) -> FewShotImages:
    """Load the few-shot set, and check the images and the model's outputs for them before any long work.

    Args:
        images: The caller's images.
        proxy_set: The caller's proxy set, if there is one.
        original: The original.
        progress: Called with the number of images that have been read.

    Raises:
        ImagesError: If the images do not fit the model.
        NonFiniteError: If a weight, or the output of a block of the original, is NaN or infinite.
        UnsupportedModelError: If the output does not come only from its modules, see `require_plain_behaviour`.
    """
    few_shot = load_images(images, original, progress)
    if proxy_set is not None:
        check_images(proxy_set.images, original, "The proxy set's images")
    require_finite(original, few_shot)
    require_plain_behaviour(original, first_images(few_shot))
    return few_shot


def open_store(
    run_dir: str | Path | None,
    model: nn.Module,
    images: FewShotImages,
    proxy_set: ProxySet | None,
    config: MethodConfig,
    processes: ProcessGroup = SINGLE_PROCESS,
    **targets: Any,
) -> AbstractContextManager[Store]:
    """Open the store of a run (`dcvit.runtime.checkpoint.open_run`), identified by all inputs of its result.

    Args:
        run_dir: The folder. `None` keeps checkpoints in memory, so that work is not repeated if device memory runs out.
        model: The original.
        images: The few-shot set.
        proxy_set: The caller's proxy set, if there is one.
        config: The method's settings.
        processes: The processes that share the work.
        **targets: The budget or budgets, as plain values.

    Raises:
        RunStoreError: If `run_dir` is in use, or holds something else or a different run.
        DistributedError: If the inputs of a process differ from those of the main process.
    """
    if run_dir is None and processes.size == 1:
        return nullcontext(MemoryStore())
    fingerprint = {
        **targets,
        "settings": config.to_dict(),
        "model": digest_model(model, compressible(model).config()),
        "images": digest_images(images.normalised),
        "proxy_set": None if proxy_set is None else digest_images(proxy_set.images),
        "device": images.normalised.device.type,
        "versions": {name: version for name, version in versions().items() if name in ("dcvit", "torch", "timm")},
    }
    return processes.store(run_dir, fingerprint)
