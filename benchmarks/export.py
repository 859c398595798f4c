"""Time onnxruntime and PyTorch on the original and the compressed model: `python -m benchmarks export`.

The model is compressed to the budget without recovery, which would change its weights but not its time. All contestants
run in one process and in turn. A round runs each of them once, and ratios are taken within a round, so that a slow or
busy moment affects all contestants alike. Each ONNX file is compared with its model when it is written.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import dcvit
from benchmarks.compress import median_interval
from benchmarks.harness import header
from dcvit.models import compressible, load_model
from dcvit.models.surgery import compress_block, draw_kept_units
from dcvit.search.plan import plan as make_plan

ORIGINAL, COMPRESSED = "original", "compressed"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser("python -m benchmarks export", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="a timm name, with random weights, or demo")
    parser.add_argument("--macs", type=float, default=0.75, help="budget, as a share of the model")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds; an interval needs at least 6")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of both runtimes")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    print(header())
    torch.manual_seed(0)
    original = load_model(options.model, pretrained=options.model == "demo")
    models = {ORIGINAL: original, COMPRESSED: cut(original, options.macs)}
    images = torch.randn(options.batch_size, *compressible(original).input_size())
    print(f"{options.model}, batch of {options.batch_size}, {options.rounds} rounds of all in turn, float32\n")
    with tempfile.TemporaryDirectory() as folder:
        contestants = {
            (runtime, name): run
            for name, model in models.items()
            for runtime, run in runs(model, images, Path(folder) / f"{name}.onnx").items()
        }
    print(table(measure(contestants, options.rounds), models))
    return 0


def cut(model: nn.Module, macs: float) -> nn.Module:
    """Compress the first candidate blocks to a share of the model's MACs, with hidden units drawn at random."""
    plan = make_plan(model, dcvit.Budget(macs=macs))
    student = model
    for block in plan.candidates[: plan.num_blocks]:
        student = compress_block(student, block, draw_kept_units(model, block, plan.hidden_features, seed=0))
    return student


def runs(model: nn.Module, images: Tensor, path: Path) -> dict[str, Callable[[], object]]:
    """Write the ONNX file and return a forward pass for each runtime."""
    import onnxruntime

    exported = dcvit.export_model(model, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Spinning idle threads would slow down the next contestant.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(exported.path, options, providers=["CPUExecutionProvider"])
    batch = images.numpy()

    def pytorch() -> Tensor:
        with torch.inference_mode():
            return model(images)

    return {"PyTorch": pytorch, "onnxruntime": lambda: session.run(None, {"images": batch})}


def measure(
    contestants: dict[tuple[str, str], Callable[[], object]], rounds: int
) -> dict[tuple[str, str], list[float]]:
    """Return the seconds of each round, by contestant."""
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in contestants}
    for round_ in range(rounds + 1):
        for key, run in contestants.items():
            start = time.perf_counter()
            run()
            if round_:
                seconds[key].append(time.perf_counter() - start)
    return seconds


def table(seconds: dict[tuple[str, str], list[float]], models: dict[str, nn.Module]) -> str:
    """Format the median times, and for each runtime the ratio of compressed to original within a round."""
    before, after = (
        compressible(models[name]).cost().total.macs("with_attention_products") for name in (ORIGINAL, COMPRESSED)
    )
    lines = [
        f"MACs per image: original {before:,}, compressed {after:,}, ratio {after / before:.4f}",
        "",
        "| runtime | original ms | compressed ms | ratio | 95 % interval |",
        "|---|---|---|---|---|",
    ]
    for runtime in dict.fromkeys(runtime for runtime, _ in seconds):
        original, compressed = seconds[runtime, ORIGINAL], seconds[runtime, COMPRESSED]
        ratios = [short / long for long, short in zip(original, compressed, strict=True)]
        interval = median_interval(ratios)
        shown = "too few rounds" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
        lines.append(
            f"| {runtime} | {1000 * statistics.median(original):.2f} | {1000 * statistics.median(compressed):.2f} "
            f"| {statistics.median(ratios):.3f} | {shown} |"
        )
    return "\n".join(lines)
