"""`dcvit.compress`: one call for every method, on one device or several."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from dcvit.config import CompressionConfig, MimickingConfig
from dcvit.distributed import ALONE, Ranks, on_devices
from dcvit.errors import DcvitError
from dcvit.finishing import finish
from dcvit.images import FewShotImages, Images, check_images, load_images
from dcvit.latency import Stopwatch, time_forward
from dcvit.methods import METHODS, Method, Task, Timer
from dcvit.methods import method as find_method
from dcvit.methods.dcvit import DCVIT
from dcvit.models import adapter_for, hub_repository, load_model
from dcvit.out_of_memory import within_memory
from dcvit.planning import Budget
from dcvit.precision import InPrecision, Precision
from dcvit.process_state import own_state
from dcvit.progress import Progress, silent
from dcvit.recovery import require_tokens
from dcvit.results import CompressionResult, versions
from dcvit.run_store import MemoryStore, Store, digest_images, digest_model
from dcvit.synthesis import MetricSet
from dcvit.teacher import freeze, require_finite

__all__ = ["checked_images", "compress", "open_store"]

Given = TypeVar("Given")


def compress(
    model: str | nn.Module,
    images: Images | FewShotImages,
    budget: Budget,
    config: CompressionConfig | None = None,
    *,
    method: str = "dcvit",
    metric_set: MetricSet | None = None,
    run_dir: str | Path | None = None,
    ranks: Ranks = ALONE,
    devices: Sequence[str] = (),
    progress: Progress = silent,
    stopwatch: Stopwatch = time_forward,
) -> CompressionResult:
    """Make a model smaller and faster from a few unlabelled images.

    Args:
        model: A timm model, or a name that `timm.create_model` takes (its pretrained weights are loaded). Unchanged.
        images: The few-shot set, see `dcvit.images.load_images`. Labels are never read.
        budget: What the result may cost, `Budget(macs=0.75)` for example.
        config: Every knob; `CompressionConfig.paper()` holds the published settings. The method's own if not given.
        method: One of `dcvit.methods.METHODS`.
        metric_set: Images to rank blocks on, in place of what `config.metric_set` names.
        run_dir: A folder for finished work, see `dcvit.run_store`: the same call with the same folder goes on where an
            earlier one was stopped, and ends with the same weights. It can be deleted in the end.
        ranks: The processes that share the work, see `dcvit.distributed`: each calls this with the same arguments.
        devices: Start such processes on this machine, one for each, and share the work over them:
            `["cuda:0", "cuda:1"]` or `["cpu"] * 2`. A script must then guard what it does by
            `if __name__ == "__main__"`, and `progress` must be picklable.
        progress: Told how it goes, see `dcvit.progress`.
        stopwatch: Times one pass, for a latency budget and for the report, under the caller's autocast and TF32;
            everything else is computed in full precision.

    Returns:
        The compressed model, the plan that it follows, and a report.

    Raises:
        DcvitError: If there is no such method, or it does not read what it is given; or if the class token is to be
            mimicked, and the model has none.
        DistributedError: If a rank is given something else than the first.
        UnsupportedModelError: If the model cannot be compressed, or not by that method.
        ImagesError: If the images do not fit the model.
        BudgetError: If the budget cannot be met, or is of what that method does not save.
        NonFiniteError: If a weight is NaN or infinite, or a block of the original makes such values of the images.
        RunStoreError: If `run_dir` is in use, or holds something else, or a run of other settings, model or images; and
            later, if it cannot be written.
        All of them before any long work; `NonFiniteError` also during it, where a student's values grow too large.
    """
    chosen = find_method(method)
    chosen.require_unit(budget)
    config = config or chosen.config()
    clock = InPrecision(stopwatch, Precision.of_caller())
    if run_dir is not None and not chosen.resumable:
        raise DcvitError(
            f"run_dir with method={method!r}: only {_resumable()} goes on where it was stopped; leave it out."
        )
    if metric_set is not None and method != DCVIT.name:
        raise DcvitError(f"metric_set with method={method!r}: only {DCVIT.name} ranks on one, leave it out.")
    if ranks.size > 1 or len(devices) > 1:
        _require_shareable(chosen, config, ranks, devices)
    if len(devices) > 1:
        arguments = {"method": method, "run_dir": run_dir, "stopwatch": clock}
        result = on_devices(devices, partial(_as_rank, model, images, budget, config, metric_set, arguments, progress))
        assert result is not None  # the first process gives it
        return result if isinstance(model, str) else result.to(next(model.parameters()).device)
    with own_state():
        timer = Timer()
        with timer("prepare"):
            original = freeze(load_model(model))
            home = next(original.parameters()).device
            if devices:
                original, images = original.to(devices[0]), _moved(images, devices[0])
                metric_set = _moved(metric_set, devices[0])
            chosen.require_family(original)
            if isinstance(config.recovery, MimickingConfig):
                require_tokens(original, config.recovery)
            few_shot = checked_images(images, metric_set, original, progress)
            if stopwatch is not time_forward:
                clock(original, few_shot.normalised[:1])  # it may refuse
        with open_store(run_dir, original, few_shot, metric_set, config, ranks, budget=budget.to_dict()) as store:
            task = Task(original, few_shot, budget, config, timer, progress, clock, metric_set, store, ranks)

            def completed(config: CompressionConfig) -> CompressionResult:
                outcome = chosen.compress(replace(task, config=config))
                return finish(
                    model, original, few_shot, outcome.metric_set, outcome, config, timer, clock,
                    method=method, ranks=ranks,
                )  # fmt: skip

            return within_memory(completed, config, ranks).to(home)


def _require_shareable(method: Method, config: CompressionConfig, ranks: Ranks, devices: Sequence[str]) -> None:
    """Refuse what several processes cannot do.

    Raises:
        DcvitError: If that is so.
    """
    if ranks.size > 1 and devices:
        raise DcvitError(
            f"devices={list(devices)} with {ranks.size} ranks: each rank has a device; leave one of them out."
        )
    if not method.resumable:
        raise DcvitError(
            f"method={method.name!r} on several devices: only {_resumable()} shares its work; name one device."
        )
    if isinstance(config.recovery, MimickingConfig) and config.recovery.halving:
        raise DcvitError("halving=True on several devices: no one process sees all trials; leave one of them out.")


def _resumable() -> str:
    """The methods that are, by name."""
    return ", ".join(name for name, method in METHODS.items() if method.resumable)


def _as_rank(
    model: str | nn.Module,
    images: Images | FewShotImages,
    budget: Budget,
    config: CompressionConfig,
    metric_set: MetricSet | None,
    arguments: Mapping[str, Any],
    progress: Progress,
    ranks: Ranks,
    device: str,
) -> CompressionResult | None:
    """`compress` in a process that `on_devices` started; what the first found."""
    original = copy.deepcopy(load_model(model)).to(device)
    result = compress(
        original, _moved(images, device), budget, config, metric_set=_moved(metric_set, device),
        ranks=ranks, progress=progress if ranks.leads else silent, **arguments,
    )  # fmt: skip
    if not ranks.leads:
        return None
    report = result.report
    if isinstance(model, str):
        report = replace(report, model=model, base_model=hub_repository(model))
    return replace(result.to("cpu"), report=report)


def _moved(given: Given, device: str) -> Given:
    """Images on a device, where they are tensors; others follow the model."""
    return cast(Given, given.to(device)) if isinstance(given, Tensor | FewShotImages | MetricSet) else given


def checked_images(
    images: Images | FewShotImages, metric_set: MetricSet | None, original: nn.Module, progress: Progress
) -> FewShotImages:
    """The few-shot set, after all that is refused before any work: of the images, and of the model on them.

    Args:
        images: The caller's.
        metric_set: The caller's, if there is one.
        original: The original.
        progress: Told how many images are read.

    Raises:
        ImagesError: If the images do not fit the model.
        NonFiniteError: As `require_finite` does.
    """
    few_shot = load_images(images, original, progress)
    if metric_set is not None:
        check_images(metric_set.images, original, "The metric set's images")
    require_finite(original, few_shot)
    return few_shot


def open_store(
    run_dir: str | Path | None,
    model: nn.Module,
    images: FewShotImages,
    metric_set: MetricSet | None,
    config: CompressionConfig,
    ranks: Ranks = ALONE,
    **asked: Any,
) -> AbstractContextManager[Store]:
    """The store of a run (`dcvit.run_store.open_run`), opened with all that its result depends on.

    Args:
        run_dir: Its folder; `None` keeps what is finished in memory, so that it is not done again if that runs out.
        model: The original.
        images: The few-shot set.
        metric_set: The caller's, if there is one.
        config: Every knob.
        ranks: The processes that share the work.
        **asked: What is asked for, as plain values: a budget, or several.

    Raises:
        RunStoreError: As `open_run` does.
        DistributedError: As `Ranks.store` does.
    """
    if run_dir is None and ranks.size == 1:
        return nullcontext(MemoryStore())
    fingerprint = {
        **asked,
        "settings": config.to_dict(),
        "model": digest_model(model, adapter_for(model).config(model)),
        "images": digest_images(images.normalised),
        "metric_set": None if metric_set is None else digest_images(metric_set.images),
        "device": images.normalised.device.type,
        "versions": {name: version for name, version in versions().items() if name in ("dcvit", "torch", "timm")},
    }
    return ranks.store(run_dir, fingerprint)
