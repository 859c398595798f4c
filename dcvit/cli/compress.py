"""`dcvit compress`: compress a model to a budget."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dcvit.artifacts.card import pruning_kind, shared_weights
from dcvit.artifacts.result import REPORT_FILE, CompressionResult, check_output_folder
from dcvit.artifacts.saving import or_elsewhere
from dcvit.budget import METRICS, Budget
from dcvit.cli.arguments import (
    DATA_HELP,
    TV_EXPONENT_HELP,
    amount,
    block_list,
    device_argument,
    forget_run,
    impl_argument,
    model_arguments,
    name_list,
    output_arguments,
    run_argument,
    run_folder,
)
from dcvit.cli.command import Command
from dcvit.cli.inputs import digits_by_default, load_data, load_named_model
from dcvit.cli.text import saved, table
from dcvit.compression.compress import compress
from dcvit.config import DCViT, DistillationConfig, MethodConfig, ReconstructionConfig
from dcvit.costs import MAC_CONVENTIONS
from dcvit.errors import DcvitError
from dcvit.methods import METHODS
from dcvit.metrics.agreement import top1
from dcvit.models import hub_repository, require_supported
from dcvit.models.teacher import freeze
from dcvit.report import run_page
from dcvit.runtime.progress import TerminalProgress
from dcvit.search.latency import TOLERANCE

__all__ = ["COMMAND", "with_top1"]

PRESETS: Mapping[str, Callable[[], DCViT]] = {
    "fast": DCViT.fast,
    "default": DCViT,
    "best": DCViT.best,
    "paper": DCViT.paper,
}
RECOVERIES = {"reconstruction": ReconstructionConfig, "distillation": DistillationConfig}

CONFIG_FIELDS: Mapping[str, Sequence[str]] = {
    "epochs": ("recovery.epochs", "distillation.epochs", "training.epochs"),
    "learning_rate": ("recovery.learning_rate", "distillation.learning_rate", "training.learning_rate"),
    "synthesis_iterations": ("synthesis.iterations",),
    "synthesis_images": ("synthesis.num_images",),
    "tv_exponent": ("synthesis.tv_exponent",),
    "num_blocks": ("num_blocks",),
    "structure": ("structure",),
    "round_to": ("round_to",),
}
"""For each option, the config fields that it may set. The first one that the method's config has is used."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser)
    parser.add_argument("--data", required=True, help=DATA_HELP)
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--macs", type=amount, metavar="X", help="budget: 0.75 is three quarters, 3.2G is absolute")
    budget.add_argument("--params", type=amount, metavar="X", help="budget in parameters, relative or absolute")
    budget.add_argument(
        "--file-size", type=amount, metavar="X", help="budget in bytes of the saved weights, relative or absolute"
    )
    budget.add_argument(
        "--activation-memory",
        type=amount,
        metavar="X",
        help="budget in bytes of activations at their peak, relative or absolute",
    )
    budget.add_argument(
        "--latency", type=float, metavar="X", help="budget as a fraction of the original's latency, measured here"
    )
    budget.add_argument("--latency-ms", type=float, metavar="MS", help="budget in milliseconds a batch, measured here")
    parser.add_argument(
        "--latency-batch",
        "--memory-batch",
        dest="budget_batch",
        type=int,
        default=64,
        metavar="N",
        help="batch size for a budget of latency or activation memory",
    )
    parser.add_argument(
        "--convention", choices=MAC_CONVENTIONS, default=MAC_CONVENTIONS[0], help="whether q·kᵀ and attn·v count"
    )
    parser.add_argument(
        "--method", choices=tuple(METHODS), default="dcvit", help="compression method, see `dcvit methods`"
    )
    parser.add_argument("--num-images", type=int, metavar="N", help="use N random images of the data, not all")
    parser.add_argument(
        "--preset", choices=tuple(PRESETS),
        help="settings that the options below then change: fast (only the closed form), default, best (ten times the "
        "refinement and four times the views), paper (the published settings, 2000 epochs per probe)",
    )  # fmt: skip
    parser.add_argument(
        "--recovery",
        choices=tuple(RECOVERIES),
        help="reconstruction block by block (default), or distillation of the output tokens as published (default of "
        "--preset paper)",
    )
    default, published = DCViT(), DCViT.paper()
    parser.add_argument(
        "--epochs", type=int,
        help=f"epochs of gradient steps on a chosen block ({default.reconstruction.epochs}); of distillation, for each "
        f"probe and each step ({DistillationConfig().epochs}, with --preset paper {published.distillation.epochs})",
    )  # fmt: skip
    parser.add_argument(
        "--learning-rate", type=float, metavar="RATE", help="peak, of distillation; found automatically by default"
    )
    parser.add_argument(
        "--synthesis-iterations", type=int, metavar="N",
        help=f"for the proxy set ({default.synthesis.iterations}, --preset paper {published.synthesis.iterations})",
    )  # fmt: skip
    parser.add_argument(
        "--synthesis-images", type=int, metavar="N",
        help=f"in the proxy set ({default.synthesis.num_images}, --preset paper {published.synthesis.num_images})",
    )  # fmt: skip
    parser.add_argument("--tv-exponent", type=float, metavar="β", help=TV_EXPONENT_HELP)
    parser.add_argument("--candidates", type=block_list, metavar="I,J,…", help="blocks that may be compressed, from 0")
    parser.add_argument(
        "--num-blocks", type=int, metavar="K", help="remove the attention of K blocks, and leave all others unchanged"
    )
    parser.add_argument(
        "--structure", choices=("searched", "fewest"),
        help="searched (default): blocks keep their attention where removing only hidden units loses less; fewest "
        "(--preset paper's): as few blocks as possible lose their attention",
    )  # fmt: skip
    parser.add_argument("--round-to", type=int, metavar="N", help="round kept hidden units down to a multiple of N")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same result")
    output_arguments(parser)
    run_argument(parser)
    impl_argument(parser)
    device_argument(parser)
    parser.add_argument(
        "--devices", type=name_list, default=(), metavar="D,E,…",
        help="share the work among several devices of this machine, such as cuda:0,cuda:1 or cpu,cpu; for several "
        "machines see docs/distributed.md",
    )  # fmt: skip


def _run(arguments: argparse.Namespace, progress: TerminalProgress) -> dict[str, Any]:
    check_output_folder(arguments.out, overwrite=arguments.overwrite)
    budget = Budget(
        **{metric: getattr(arguments, metric) for metric in METRICS},
        batch_size=arguments.budget_batch,
        convention=arguments.convention,
    )
    config = _config(arguments)
    if arguments.devices:
        arguments.device = "cpu"  # each process moves the model to its own device
    model = load_named_model(arguments.model, arguments)
    require_supported(model)
    images, labels, _ = load_data(arguments.data, model, digits_by_default(arguments), arguments.seed, progress)
    result = compress(
        model, images, budget, config,
        run_dir=run_folder(arguments), processes=arguments.processes, devices=arguments.devices, progress=progress,
    )  # fmt: skip
    if not arguments.processes.is_main:
        return {}
    base_model = None if arguments.random_weights else hub_repository(arguments.model)
    result = replace(result, report=replace(result.report, model=arguments.model, base_model=base_model))
    if labels is not None:
        original = top1(freeze(model), images.normalised, labels)
        result = with_top1(result, original, images.normalised, labels)
    or_elsewhere(
        partial(result.save, overwrite=arguments.overwrite, page=lambda record: run_page(record).html()), arguments.out
    )
    forget_run(arguments)
    return {**result.to_dict(), "out": str(arguments.out), "page": str(Path(arguments.out) / REPORT_FILE)}


def with_top1(
    result: CompressionResult, original: float, images: torch.Tensor, labels: torch.Tensor
) -> CompressionResult:
    """Return a result with top-1 on labelled images added.

    Args:
        result: The result.
        original: Top-1 of the original, which callers compute once for several results.
        images: Normalised images, `[N, C, H, W]`.
        labels: Class of each image, `[N]`.
    """
    report = result.report
    student = replace(report.student, top1=top1(result.model, images, labels))
    return replace(result, report=replace(report, teacher=replace(report.teacher, top1=original), student=student))


def _config(arguments: argparse.Namespace) -> MethodConfig:
    """Return the method's settings with the values of the options.

    Raises:
        DcvitError: If an option is given that the method does not read.
    """
    config = METHODS[arguments.method].config()
    if isinstance(config, DCViT):
        config = _preset(arguments)
    for option in ("preset", "recovery", "run_dir"):
        if arguments.method != "dcvit" and getattr(arguments, option) is not None:
            raise _unread(option, arguments)
    for option, names in CONFIG_FIELDS.items():
        if (value := getattr(arguments, option)) is not None:
            config = _changed(config, option, names, value, arguments)
    return config.with_(candidates=arguments.candidates, seed=arguments.seed, impl=arguments.impl)


def _preset(arguments: argparse.Namespace) -> DCViT:
    """Return the settings of dcvit's own method for the chosen preset and kind of recovery."""
    config = PRESETS[arguments.preset or "default"]()
    kind = RECOVERIES[arguments.recovery] if arguments.recovery else type(config.recovery)
    if isinstance(config.recovery, kind):
        return config
    if arguments.preset in (None, "default"):
        return config.with_(recovery=kind())
    raise DcvitError(
        f"--recovery {arguments.recovery}: --preset {arguments.preset} uses another recovery; leave one of the two out."
    )


def _changed(
    config: MethodConfig, option: str, names: Sequence[str], value: Any, arguments: argparse.Namespace
) -> MethodConfig:
    """Return the config with an option's value in the first of the named fields that the config has."""
    for part, _, name in (dotted.rpartition(".") for dotted in names):
        if not part and _has(config, name):
            return config.with_(**{name: value})
        if _has(config, part) and _has(getattr(config, part), name):
            return config.with_(**{part: replace(getattr(config, part), **{name: value})})
    if option == "learning_rate" and isinstance(config, DCViT):
        raise DcvitError(
            f"--learning-rate {value:g}: only distillation reads it, block reconstruction finds its own step size; add "
            "--recovery distillation, or leave it out."
        )
    raise _unread(option, arguments)


def _has(config: Any, name: str) -> bool:
    return name in {field.name for field in fields(config)}


def _unread(option: str, arguments: argparse.Namespace) -> DcvitError:
    return DcvitError(f"--{option.replace('_', '-')}: --method {arguments.method} does not read it; leave it out.")


def _show(values: dict[str, Any]) -> str:
    teacher, student = values["teacher"], values["student"]
    rows = [("", "original", "compressed", "ratio")]
    for label, name, form in (
        ("MACs", "macs", "{:,}"),
        ("parameters", "params", "{:,}"),
        ("file bytes", "file_size", "{:,}"),
        ("activation bytes", "activation_memory", "{:,}"),
        ("latency ms", "latency_ms", "{:.2f}"),
    ):
        if teacher[name] is not None:
            rows.append(
                (label, form.format(teacher[name]), form.format(student[name]), f"{student[name] / teacher[name]:.4f}")
            )
    if teacher["top1"] is not None:
        rows.append(("top-1 %", f"{100 * teacher['top1']:.2f}", f"{100 * student['top1']:.2f}", ""))
    agreed = "" if values["agreement"] is None else f"agreement on the images {100 * values['agreement']:.2f} %, "
    units, convolved = values["plan"]["kept_units"], values["plan"]["convolved"]
    pruned = [block for block in values["plan"]["pruned"] if block not in convolved]
    if values["plan"]["token_keep_rates"]:
        rates = values["plan"]["token_keep_rates"].items()
        compression = f"Share of tokens kept in blocks: {', '.join(f'{b} ({rate:g})' for b, rate in rates)}"
    elif shared := shared_weights(values["plan"]):
        compression = f"Shared weights: {'; '.join(shared)}"
    elif pruning_kind(values) == "dropped":
        compression = f"Dropped blocks: {', '.join(map(str, values['blocks']))}"
    else:
        compressed = [block for block in values["blocks"] if block not in values["plan"]["pruned"]]
        parts = [
            f"{name} blocks (hidden units kept): "
            + ", ".join(f"{block} ({len(units[str(block)])})" for block in blocks)
            for name, blocks in (("Compressed", compressed), ("Convolved", convolved), ("Pruned", pruned))
            if blocks
        ]
        if heads := values["plan"]["kept_heads"]:
            parts.append("Heads kept in blocks: " + ", ".join(f"{b} ({len(kept)})" for b, kept in heads.items()))
        compression = f"{'; '.join(parts)}; drop ratio {values['drop_ratio']:.4f}"
    return (
        f"{table(rows)}\n\n{_latency_met(values)}"
        f"{compression}; {agreed}distillation loss {values['distillation_loss']:.4g}; "
        f"{sum(values['seconds'].values()):.0f} s.\n"
        f"{saved(values['out'], values['page'])}"
    )


def _latency_met(values: dict[str, Any]) -> str:
    """Compare the requested, planned and final latency of a latency budget, as shares of the original's."""
    planned, finished = values["plan"]["latency"], values["report"]["latency_ratio"]
    if planned is None:
        return ""
    off = finished / planned["goal"] - 1
    verdict = f"{100 * off:+.1f} % from the goal"
    if abs(off) > TOLERANCE:
        verdict += (
            ", more than when planned: measure again with `dcvit latency OUT --original MODEL` on an idle machine"
        )
    return (
        f"Latency over the original's at batch {planned['model']['batch_size']}: asked {planned['goal']:.4f}, planned "
        f"structure {planned['ratio']:.4f}, finished model {finished:.4f} ({verdict}).\n"
    )


COMMAND = Command(
    name="compress",
    summary="compress a model to a budget",
    description=(
        "Compress a model from a few unlabelled images. The result is an ordinary timm model: after `import dcvit`, "
        "timm.create_model('local-dir:OUT', pretrained=True)."
    ),
    run=_run,
    show=_show,
    add_arguments=_add_arguments,
    shared=True,
)
