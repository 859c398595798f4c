"""Latency of one forward pass.

Latency is measured as in the paper (DC-ViT, arXiv 2403.18708): many runs at one batch size after a warm-up,
synchronised with the device. Models take turns run by run, so that a change in the machine's load affects all of them.
Ratios are taken within each round, so that such a change cancels out.
"""

import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean, median
from typing import Any, Literal, TypeVar, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from dcvit.errors import DcvitError
from dcvit.metrics.memory import measure_peak_memory
from dcvit.models import input_size
from dcvit.runtime.progress import Progress, silent

__all__ = [
    "DEFAULT_TIMING",
    "MODES",
    "PRECISE_TIMING",
    "QUICK_TIMING",
    "STOPWATCHES",
    "Latency",
    "LatencyRow",
    "Mode",
    "Stopwatch",
    "Timing",
    "compare_latency",
    "example_images",
    "in_mode",
    "measure_latency",
    "time_cpu",
    "time_forward",
]

Mode = Literal["eager", "compile", "fp16", "bf16"]
"""How a model runs: unchanged, through `torch.compile`, or under autocast to a half precision."""

MODES: tuple[Mode, ...] = get_args(Mode)

Stopwatch = Callable[[nn.Module, Tensor], float]
"""A function that runs a module once on a batch and returns the seconds that took; `time_forward` by default."""

LEAST_ROUNDS = 5
"""Rounds before a measurement may end for another reason than their number."""

K = TypeVar("K", bound=Hashable)


def time_forward(model: nn.Module, inputs: Tensor) -> float:
    """Return the seconds of one forward pass, until the device has finished it."""
    _synchronise(inputs.device)
    start = time.perf_counter()
    model(inputs)
    _synchronise(inputs.device)
    return time.perf_counter() - start


def time_cpu(model: nn.Module, inputs: Tensor) -> float:
    """Return the processor seconds of one forward pass in one thread, which equal wall-clock seconds on an idle CPU.

    On a busy machine, ratios of these vary several times less than those of `time_forward`.

    Raises:
        DcvitError: On another device, or with more than one thread, whose processor times would add up.
    """
    if inputs.device.type != "cpu":
        raise DcvitError(f"clock='cpu': the model is on {inputs.device}, whose work a CPU's clock does not see.")
    if torch.get_num_threads() > 1:
        raise DcvitError(
            f"clock='cpu': {torch.get_num_threads()} threads, expected one; "
            "call torch.set_num_threads(1) (--threads 1)."
        )
    start = time.process_time()
    model(inputs)
    return time.process_time() - start


STOPWATCHES: dict[str, Stopwatch] = {"wall": time_forward, "cpu": time_cpu}
"""Stopwatches by the clock that they read."""


@dataclass(frozen=True)
class Latency:
    """The timed runs of one model.

    Attributes:
        seconds: Seconds of each run, in the order of the rounds.
        batch_size: Images per run.
    """

    seconds: tuple[float, ...]
    batch_size: int

    @property
    def mean_ms(self) -> float:
        """Mean over the runs, in milliseconds per batch."""
        return 1000 * mean(self.seconds)

    @property
    def median_ms(self) -> float:
        """Median over the runs, in milliseconds per batch."""
        return 1000 * median(self.seconds)

    @property
    def p95_ms(self) -> float:
        """The time below which 95 % of the runs stay, in milliseconds per batch."""
        return 1000 * float(np.percentile(self.seconds, 95))

    @property
    def images_per_second(self) -> float:
        """Throughput: all images divided by the time of all runs."""
        return self.batch_size / mean(self.seconds)

    def ratio_to(self, other: "Latency") -> float:
        """Return the median ratio, run by run, of this model's time to another's from the same `measure_latency`."""
        return median(self._ratios(other))

    def ratio_error(self, other: "Latency") -> float:
        """Return the standard error of `ratio_to`, from the median absolute deviation, which resists slow outliers."""
        ratios = self._ratios(other)
        middle = median(ratios)
        # For normal values the standard deviation is 1.4826 MAD, and the median's standard error 1.2533 of the mean's.
        return 1.2533 * 1.4826 * median(abs(ratio - middle) for ratio in ratios) / math.sqrt(len(ratios))

    def _ratios(self, other: "Latency") -> list[float]:
        return [mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True)]


@dataclass(frozen=True)
class Timing:
    """Settings of a latency measurement.

    Attributes:
        runs: Timed runs of each model, at most.
        warmup: Runs before them that do not count.
        max_seconds: Timing ends after the round in which all runs together exceed this time.
        precision: Timing ends after the round in which the standard errors of all ratios to the first model are below
            this. At least five rounds are run in either case.

    Raises:
        DcvitError: If `runs` is less than 1, or `warmup` less than 0.
    """

    runs: int = 500
    warmup: int = 10
    max_seconds: float = math.inf
    precision: float = 0.0

    def __post_init__(self) -> None:
        if self.runs < 1:
            raise DcvitError(f"runs={self.runs}: expected 1 or more.")
        if self.warmup < 0:
            raise DcvitError(f"warmup={self.warmup}: expected 0 or more.")


DEFAULT_TIMING = Timing()
"""The timing of the paper."""

QUICK_TIMING = Timing(runs=50, warmup=1, max_seconds=3.0)
"""Timing for a rough figure."""

PRECISE_TIMING = Timing(runs=1000, max_seconds=20.0, precision=0.004)
"""Timing until ratios are known to 0.4 %; on a busy machine it ends by the seconds."""


@torch.no_grad()
def measure_latency(
    models: Mapping[K, nn.Module],
    inputs: Tensor | Mapping[K, Tensor],
    timing: Timing = DEFAULT_TIMING,
    *,
    stopwatch: Stopwatch = time_forward,
    progress: Progress = silent,
    stage: str = "timing",
) -> dict[K, Latency]:
    """Time the forward passes of models that take turns.

    Args:
        models: The models by name. The order within a round is reversed in every other round.
        inputs: A batch `[B, C, H, W]` for whole models, or one batch for each model.
        timing: How often, and when it ends.
        stopwatch: Times one run.
        progress: Called after each round.
        stage: The stage that progress is called with.
    """
    runs = timing.runs
    batch = {name: inputs if isinstance(inputs, Tensor) else inputs[name] for name in models}
    seconds: dict[K, list[float]] = {name: [] for name in models}
    for name, model in models.items():
        for _ in range(timing.warmup):
            stopwatch(model, batch[name])

    def result() -> dict[K, Latency]:
        return {name: Latency(tuple(values), len(batch[name])) for name, values in seconds.items()}

    def enough() -> bool:
        if sum(map(sum, seconds.values())) > timing.max_seconds:
            return True
        first, *others = result().values()
        return timing.precision > 0 and all(other.ratio_error(first) < timing.precision for other in others)

    for done in range(1, runs + 1):
        for name in models if done % 2 else reversed(tuple(models)):
            seconds[name].append(stopwatch(models[name], batch[name]))
        last = done == runs or (done >= LEAST_ROUNDS and enough())
        progress(stage, done, done if last else runs, None)
        if last:
            break
    return result()


@dataclass(frozen=True)
class LatencyRow:
    """One model in one mode, as `compare_latency` measures it.

    Attributes:
        model: The name of the model.
        mode: How it ran.
        latency: Its runs.
        ratio: Its time over that of the first model in the same mode, median over the rounds.
        weight_bytes: Bytes of its parameters and buffers.
        activation_bytes: Peak bytes that one pass allocates beyond weights and input.
    """

    model: str
    mode: Mode
    latency: Latency
    ratio: float
    weight_bytes: int
    activation_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values for JSON."""
        return {
            "model": self.model,
            "mode": self.mode,
            "mean_ms": self.latency.mean_ms,
            "median_ms": self.latency.median_ms,
            "p95_ms": self.latency.p95_ms,
            "images_per_second": self.latency.images_per_second,
            "ratio": self.ratio,
            "weight_bytes": self.weight_bytes,
            "activation_bytes": self.activation_bytes,
            "peak_bytes": self.weight_bytes + self.activation_bytes,
            "runs": len(self.latency.seconds),
        }


def compare_latency(
    models: Mapping[str, nn.Module],
    *,
    batch_size: int = 64,
    runs: int = 500,
    warmup: int = 10,
    modes: Sequence[Mode] = ("eager",),
    stopwatch: Stopwatch = time_forward,
    progress: Progress = silent,
) -> tuple[LatencyRow, ...]:
    """Measure models side by side, each one in every mode, all interleaved.

    Args:
        models: Models by name; ratios refer to the first. They may take images of different sizes.
        batch_size: Images per run.
        runs: Timed runs of each model in each mode.
        warmup: Runs before them; in `"compile"` mode these compile.
        modes: How the models run.
        stopwatch: Times one run.
        progress: Called after each round.

    Returns:
        One row for each model and mode, mode by mode.

    Raises:
        DcvitError: If a mode is unknown or the device lacks it, before anything runs; if compiling fails.
    """
    timing = Timing(runs, warmup)
    if batch_size < 1:
        raise DcvitError(f"batch_size={batch_size}: expected 1 or more.")
    for mode in modes:
        for model in models.values():
            _require_mode(mode, _device(model))
    subjects = {(name, mode): in_mode(model, mode) for mode in modes for name, model in models.items()}
    images = {name: example_images(model, batch_size) for name, model in models.items()}
    inputs = {(name, mode): images[name] for name, mode in subjects}
    memory = {key: _peak_memory(subject, key[1], inputs[key]) for key, subject in subjects.items()}
    latency = measure_latency(subjects, inputs, timing, stopwatch=stopwatch, progress=progress)
    first = next(iter(models))
    return tuple(
        LatencyRow(
            model=name,
            mode=mode,
            latency=latency[name, mode],
            ratio=latency[name, mode].ratio_to(latency[first, mode]),
            weight_bytes=sum(t.nbytes for t in (*models[name].parameters(), *models[name].buffers())),
            activation_bytes=memory[name, mode],
        )
        for name, mode in subjects
    )


def in_mode(model: nn.Module, mode: Mode) -> nn.Module:
    """Return a module that runs a model in a mode. The model is shared, not copied.

    Raises:
        DcvitError: If the mode is unknown or the model's device lacks it.
    """
    device = _device(model)
    _require_mode(mode, device)
    if mode == "compile":
        return cast(nn.Module, torch.compile(model))
    return model if mode == "eager" else _Autocast(model, device.type, _HALF[mode])


def example_images(model: nn.Module, batch_size: int) -> Tensor:
    """Return a batch of Gaussian noise `[B, C, H, W]` of a model's input size, device and dtype; the same each time."""
    weight = next(model.parameters())
    drawing = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(batch_size, *input_size(model), generator=drawing, dtype=torch.float32, device="cpu")
    return noise.to(weight.device, weight.dtype)


_HALF: dict[Mode, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}


class _Autocast(nn.Module):
    def __init__(self, model: nn.Module, device_type: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.device_type, self.dtype = model, device_type, dtype

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device_type, self.dtype):
            output: Tensor = self.model(images)
        return output


def _require_mode(mode: Mode, device: torch.device) -> None:
    if mode not in MODES:
        raise DcvitError(f"mode={mode!r}: expected one of {', '.join(MODES)}.")
    if mode in _HALF and not _has_half_precision(device, _HALF[mode]):
        raise DcvitError(f"mode={mode!r}: this {device.type} has no {mode} arithmetic; leave that mode out.")


def _has_half_precision(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a device itself computes in a half precision, as far as torch can tell."""
    if device.type == "cpu":  # other CPUs emulate it, slower than float32
        native = torch.ops.mkldnn
        checks = {torch.float16: native._is_mkldnn_fp16_supported, torch.bfloat16: native._is_mkldnn_bf16_supported}
        return bool(checks[dtype]())
    if device.type == "cuda" and dtype == torch.bfloat16:
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.amp.is_autocast_available(device.type))


@torch.no_grad()
def _peak_memory(subject: nn.Module, mode: Mode, images: Tensor) -> int:
    try:
        subject(images)  # not measured: only the first pass compiles, or allocates some things
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = " ".join(str(error).split())[:200]
        raise DcvitError(
            f"mode={mode!r}: torch.compile does not work here ({reason}); a CPU needs a C++ compiler. "
            "Leave that mode out."
        ) from error
    return measure_peak_memory(partial(subject, images), images.device)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
