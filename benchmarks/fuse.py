"""What `dcvit.fuse` gains: the fused student beside the plain one, `python -m benchmarks fuse`.

Students are cut to the budget without recovery, which changes weights but not time, and rebuilt as `dcvit.compress`
returns them. Three pass the same images in turn: the plain student, one of which only the compressed blocks are fused,
as `compress` returned it before there was `dcvit.fuse`, and one that is fused whole. A round runs each once, and a
ratio is taken within a round: what a slower or busier moment does to one of them it does to the others.
"""

import argparse
import copy
import statistics
from collections.abc import Sequence

import torch
from torch import nn

import dcvit
from benchmarks.compress import median_interval
from benchmarks.harness import header
from dcvit.metrics.latency import time_cpu
from dcvit.models import CompressedBlock, compressible, load_model
from dcvit.search.space import search_space

MODELS = ("deit_tiny_patch16_224", "vit_small_patch16_224", "swin_tiny_patch4_window7_224")

CUT_SHARE = 0.5
"""Of the candidate blocks, those that lose their attention and half of their hidden units."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser("python -m benchmarks fuse", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="*", default=MODELS, help="timm names, with random weights")
    parser.add_argument("--batch-size", nargs="*", type=int, default=(1, 8))
    parser.add_argument("--rounds", type=int, default=30, help="after one of warm-up; 6 are the fewest for an interval")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # processor time is what a clock would show of an idle CPU
    print(header())
    print(f"\n{options.rounds} rounds of all in turn, one thread, processor time, float32\n")
    print("| student of | batch | plain ms | fused blocks | ratio | 95 % interval | quartiles |\n" + 7 * "|---" + "|")
    for name in options.model:
        torch.manual_seed(0)
        plain = student_of(load_model(name, pretrained=False))
        compressed, fused = copy.deepcopy(plain), dcvit.fuse(copy.deepcopy(plain))
        for module in compressed.modules():
            if isinstance(module, CompressedBlock):
                dcvit.fuse(module)
        for batch_size in options.batch_size:
            seconds = measure([plain, compressed, fused], batch_size, options.rounds)
            for blocks, of_blocks in zip(("compressed", "all"), seconds[1:], strict=True):
                print(row(f"{name} | {batch_size}", blocks, seconds[0], of_blocks), flush=True)
    return 0


def student_of(model: nn.Module) -> nn.Module:
    """A model, half of whose candidate blocks are compressed to half of their hidden units."""
    student = copy.deepcopy(model)
    view = compressible(student)
    candidates = search_space(model, dcvit.DCViT()).candidates
    for block in candidates[: round(CUT_SHARE * len(candidates))]:
        view.compress_block(block, range(view.hidden_features(block) // 2))
    return view.rebuild().eval()


@torch.inference_mode()
def measure(models: Sequence[nn.Module], batch_size: int, rounds: int) -> list[list[float]]:
    """Seconds of each round, by model."""
    images = torch.randn(batch_size, *compressible(models[0]).input_size())
    found = [[time_cpu(model, images) for model in models] for _ in range(rounds + 1)][1:]
    return [list(of_model) for of_model in zip(*found, strict=True)]


def row(case: str, blocks: str, plain: Sequence[float], fused: Sequence[float]) -> str:
    """A line of the table."""
    ratios = [after / before for before, after in zip(plain, fused, strict=True)]
    interval, (low, _, high) = median_interval(ratios), statistics.quantiles(ratios)
    shown = "too few rounds" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
    return (
        f"| {case} | {1000 * statistics.median(plain):.1f} | {blocks} | {statistics.median(ratios):.3f} | {shown} "
        f"| {low:.3f} to {high:.3f} |"
    )
