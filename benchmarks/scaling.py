"""Predict the time and memory of large compressions from rates measured here: `python -m benchmarks scaling`.

The work of each stage is counted (`dcvit.costs`, and the sizes in `DCViT`) and divided by the rate at which this device
does such work. Rates are measured for forward passes, passes with gradients, products of hidden units, greedy selection
and Cholesky factorisations. For several devices, the shared work (docs/distributed.md) is divided by their number, and
the time of their communication at a given link rate is added. `--check` compares the prediction with a compression that
is run now.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import timm
import torch
from torch import nn

import dcvit
from benchmarks.harness import header
from benchmarks.runs import markdown
from dcvit.history import CURVE
from dcvit.methods.dcvit.reconstructed import HELD_OUT_VIEWS
from dcvit.metrics.latency import example_images, time_forward
from dcvit.models import compressible
from dcvit.recovery.calibration import FEW_ROWS
from dcvit.recovery.finetune import PILOT_SHARE, STEP_SIZES, num_steps

MODELS = {
    "ViT-B/16, 224 px": "vit_base_patch16_224",
    "ViT-L/16, 224 px": "vit_large_patch16_224",
    "ViT-g/14, 224 px": "vit_giant_patch14_224",
}
NUM_IMAGES = 1000
BUDGET = 0.75
RIDGES_TRIED = 3
"""Mean number of λ that a search tries."""

COMPRESSED = 1 / 4
"""Share of the blocks that lose their attention. About as many others are pruned."""


@dataclass(frozen=True)
class Rates:
    """Work that a device does in one second.

    Attributes:
        forward: MACs of a model's forward pass.
        backward: MACs of a pass with gradients, which counts three times the MACs of the forward pass.
        gram: MACs of products of hidden units.
        select: Multiply-adds of greedy selection, in float64.
        solve: Multiply-adds of Cholesky factorisations and solutions, in float64.
    """

    forward: float
    backward: float
    gram: float
    select: float
    solve: float


@dataclass(frozen=True)
class Work:
    """The work of a compression.

    Attributes:
        alone: Seconds of each stage in which one process works while the others wait.
        queued: Seconds of one probe and the number of probes, by kind.
        split: Seconds of each stage that is divided evenly among the processes.
        told: Bytes that are reduced over all processes.
        memory: Bytes that each process holds, by kind.
    """

    alone: dict[str, float]
    queued: dict[str, tuple[float, int]]
    split: dict[str, float]
    told: float
    memory: dict[str, float]

    def seconds(self, processes: int, link: float) -> dict[str, float]:
        """Return the seconds of each stage.

        Args:
            processes: Number of processes.
            link: Bytes that their all-reduce moves per second.
        """
        found = dict(self.alone)
        found |= {stage: each * math.ceil(count / processes) for stage, (each, count) in self.queued.items()}
        found |= {stage: whole / processes for stage, whole in self.split.items()}
        if processes > 1:
            found["communication"] = 2 * self.told * (processes - 1) / processes / link
        return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the prediction, and the check if there is one."""
    parser = argparse.ArgumentParser("python -m benchmarks scaling", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--link", type=float, default=10e9, metavar="BYTES", help="all-reduced per second")
    parser.add_argument("--images", type=int, default=NUM_IMAGES)
    parser.add_argument("--check", metavar="MODEL", help="also compress this model, with random weights and 50 images")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    rates = measured(device)
    print(header(), "", *page(rates, options.processes, options.link, options.images), sep="\n")
    if options.check:
        print("", *check(options.check, rates, device), sep="\n")
    return 0


@torch.no_grad()
def measured(device: torch.device) -> Rates:
    """Measure the rates of a device with a ViT-S, and with matrices of a ViT-B's size."""
    model = timm.create_model("vit_small_patch16_224").eval().requires_grad_(False).to(device)
    batch = example_images(model, 16)
    macs = len(batch) * compressible(model).cost().total.macs("with_attention_products")

    def with_gradients(module: nn.Module, images: torch.Tensor) -> float:
        with torch.enable_grad():
            seen = images.clone().requires_grad_()
            return time_forward(_Backward(module), seen)

    hidden = torch.randn(8192, 3072, device=device)
    square = torch.randn(3072, 3072, dtype=torch.float64, device=device)
    positive = square @ square.T + 3072 * torch.eye(3072, dtype=torch.float64, device=device)
    rows = torch.randn(1536, 3072, dtype=torch.float64, device=device)
    return Rates(
        forward=macs / best(lambda: time_forward(model, batch)),
        backward=3 * macs / best(lambda: with_gradients(model, batch)),
        gram=hidden.numel() * 3072 / best(lambda: timed(lambda: hidden.T @ hidden, device)),
        select=rows.numel() / best(lambda: timed(lambda: rows[:, 0] @ rows, device)),
        solve=3072**3 / 3 / best(lambda: timed(lambda: torch.linalg.cholesky_ex(positive), device)),
    )


class _Backward(nn.Module):
    """A model whose forward pass returns the gradient with respect to the images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(self.model(images).sum(), images)[0]


def best(once: Callable[[], float], times: int = 4) -> float:
    """Return the least seconds of several measurements."""
    return min(once() for _ in range(times))


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds until a device has finished a call."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def work(model: nn.Module, num_images: int, rates: Rates, config: dcvit.DCViT) -> Work:
    """Return the work of compressing a model by a quarter of its MACs with the default method.

    Args:
        model: The model, on any device including the meta device.
        num_images: Number of few-shot images.
        rates: Rates of the device.
        config: The settings.
    """
    view, recovery = compressible(model), config.reconstruction
    cost = view.cost()
    macs, depth = cost.total.macs("with_attention_products"), len(cost.blocks)
    hidden, width = cost.blocks[1].hidden_features, int(model.num_features)
    channels, height, _ = view.input_size()
    block_macs = cost.blocks[1].mlp.weight_macs
    tokens = block_macs // (2 * width * hidden)
    steps = num_steps(model, recovery)
    views = max(num_images, recovery.refinement_views if steps else recovery.num_views)
    rows = max(recovery.num_rows // views, 1) * views
    few, kept = min(rows, FEW_ROWS), hidden // 2
    without_attention, pruned = round(COMPRESSED * depth), round(COMPRESSED * depth)
    mlp = 2 * width * hidden  # MACs per row

    def solutions(units: int) -> float:
        return RIDGES_TRIED * (units**3 / 3 + 2 * units**2 * width) / rates.solve

    curve = sum(solutions(round(share * hidden)) for share in CURVE)
    metric = (config.synthesis.num_images + HELD_OUT_VIEWS) * macs / 2 / rates.forward  # half of the model on average
    probe = few * (mlp / rates.forward + hidden**2 / rates.gram) + (0.75 * hidden) ** 2 / 2 * hidden / rates.select
    probe += curve + metric
    gradients = 3 * 0.8 * rows * (mlp / 2) / rates.backward
    one_block = rows * (mlp / rates.forward + hidden**2 / rates.gram)
    passes = steps * (1 + len(STEP_SIZES) / PILOT_SHARE) * recovery.refinement_batch
    tensors = {
        "weights of teacher and students": 3 * 4 * cost.total.params,
        "views": 4 * views * channels * height**2,
        "rows of all blocks": 4 * depth * (rows + few) * width,
        "tokens of the views": 4 * (2 if steps else 1) * views * tokens * width,
        "tokens of the metric's images": 4
        * (depth + 1)
        * (config.synthesis.num_images + HELD_OUT_VIEWS)
        * tokens
        * width,
        "normal equations": 6 * 8 * hidden**2,
        "a pass": 4 * recovery.batch_size * tokens * (2 * hidden + 6 * width),
    }
    return Work(
        alone={
            "proxy set": config.synthesis.iterations * config.synthesis.num_images * 3 * macs / rates.backward,
            "step sizes": len(recovery.step_sizes) * (few / rows * (one_block + gradients) + 2 * solutions(kept)),
            "solutions of blocks": (without_attention + pruned) * 2 * solutions(kept),
        },
        queued={"probes": (probe, depth - 2), "pruning probes": (probe, depth)},
        split={
            "teacher's pass": views * macs / rates.forward,
            "student's passes": views * macs / rates.forward,
            "normal equations": (2 * without_attention + pruned) * one_block,
            "gradient steps": without_attention * recovery.epochs * gradients,
            "refinement": 3 * passes * macs / rates.backward,
        },
        told=(2 * without_attention + pruned) * 8 * hidden**2
        + without_attention * recovery.epochs * (rows / recovery.batch_rows) * 4 * mlp / 2,
        memory=tensors,
    )


def page(rates: Rates, processes: Sequence[int], link: float, num_images: int) -> list[str]:
    """Return the lines of the prediction: rates, and for each model its time, its longest stages and its memory."""
    config = dcvit.DCViT()
    rows, memory = [], []
    for title, name in MODELS.items():
        with torch.device("meta"):
            model = timm.create_model(name).eval()
        found = work(model, num_images, rates, config)
        for count in processes:
            seconds = found.seconds(count, link)
            total = sum(seconds.values())
            limits = sorted(seconds, key=seconds.__getitem__, reverse=True)[:3]
            shares = ", ".join(f"{stage} {seconds[stage] / total:.0%}" for stage in limits)
            rows.append(
                [title, str(count), f"{total / 60:,.1f}", f"{sum(found.seconds(1, link).values()) / total:.1f}", shares]
            )
        largest = sorted(found.memory, key=found.memory.__getitem__, reverse=True)[:3]
        most = ", ".join(f"{kind} {found.memory[kind] / 2**30:.1f}" for kind in largest)
        memory.append([title, f"{sum(found.memory.values()) / 2**30:.1f}", most])
    figures = ", ".join(f"{name} {value / 1e9:,.1f}" for name, value in vars(rates).items())
    return [
        f"Measured rates, in 10⁹ per second: {figures}. {num_images} images, a quarter of the MACs removed; "
        f"all-reduce at {link / 1e9:g} GB/s.",
        "",
        markdown(["model", "processes", "minutes", "speed-up over one", "longest stages"], rows),
        "",
        markdown(["model", "GiB per process", "largest parts, GiB"], memory),
    ]


def check(name: str, rates: Rates, device: torch.device) -> list[str]:
    """Run a compression now and compare its stages with the prediction."""
    model = timm.create_model(name).eval().to(device)
    config = dcvit.DCViT()
    expected = work(model, 50, rates, config).seconds(1, 1.0)
    computed = {
        "proxy set": expected["proxy set"],
        "views": expected["teacher's pass"],
        "ranking": expected["probes"] + expected["pruning probes"],
        "step size": expected["step sizes"],
        "compression": sum(
            expected[s] for s in ("solutions of blocks", "student's passes", "normal equations", "gradient steps")
        ),
        "refinement": expected["refinement"],
    }
    seen = dcvit.compress(model, example_images(model, 50), dcvit.Budget(macs=BUDGET), config).report.seconds
    rows = [[stage, f"{value:.0f}", f"{seen.get(stage, 0.0):.0f}"] for stage, value in computed.items()]
    rows.append(["all", f"{sum(computed.values()):.0f}", f"{sum(seen.get(stage, 0.0) for stage in computed):.0f}"])
    return [f"{name}, 50 images:", "", markdown(["stage", "s, predicted", "s, measured"], rows)]
