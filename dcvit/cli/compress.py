"""`dcvit compress`: one model, one budget."""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

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
from dcvit.compression import compress
from dcvit.config import CompressionConfig, MimickingConfig, ReconstructionConfig, SynthesisConfig
from dcvit.costs import MAC_CONVENTIONS
from dcvit.errors import DcvitError
from dcvit.evaluation import top1
from dcvit.latency_planning import TOLERANCE
from dcvit.methods import METHODS
from dcvit.methods import method as find_method
from dcvit.model_card import cut_kind, shared_weights
from dcvit.models import hub_repository, require_supported
from dcvit.planning import UNITS, Budget
from dcvit.progress import TerminalProgress
from dcvit.report import run_page
from dcvit.results import REPORT_FILE, CompressionResult, check_output_folder
from dcvit.saving import or_elsewhere
from dcvit.teacher import freeze

__all__ = ["COMMAND", "with_top1"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser)
    parser.add_argument("--data", required=True, help=DATA_HELP)
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--macs", type=amount, metavar="X", help="budget: 0.75 is three quarters, 3.2G is absolute")
    budget.add_argument("--params", type=amount, metavar="X", help="budget in parameters, likewise")
    budget.add_argument("--file-size", type=amount, metavar="X", help="budget in bytes of the saved weights, likewise")
    budget.add_argument(
        "--activation-memory", type=amount, metavar="X", help="budget in bytes of activations at their peak, likewise"
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
        help="images a batch, of a budget of latency or activation memory",
    )
    parser.add_argument(
        "--convention", choices=MAC_CONVENTIONS, default=MAC_CONVENTIONS[0], help="whether q·kᵀ and attn·v count"
    )
    parser.add_argument(
        "--method", choices=tuple(METHODS), default="dcvit", help="how it is compressed, see `dcvit methods`"
    )
    parser.add_argument("--num-images", type=int, metavar="N", help="use N random images of the data, not all")
    parser.add_argument(
        "--paper",
        action="store_true",
        help="the published settings (2000 epochs a trial), before the options below",
    )
    parser.add_argument(
        "--recovery",
        choices=("reconstruction", "mimicking"),
        help="block by block (default), or by mimicking the output tokens as published (--paper's)",
    )
    parser.add_argument(
        "--epochs", type=int,
        help=f"gradient steps: of each chosen block ({ReconstructionConfig().epochs}); mimicking, of each trial and "
        f"each step ({MimickingConfig().epochs}, with --paper {CompressionConfig.paper().mimicking.epochs})",
    )  # fmt: skip
    parser.add_argument(
        "--learning-rate", type=float, metavar="RATE", help="peak, of mimicking; found automatically if not given"
    )
    defaults, published = SynthesisConfig(), CompressionConfig.paper().synthesis
    parser.add_argument(
        "--synthesis-iterations", type=int, metavar="N",
        help=f"for the metric set ({defaults.iterations}, with --paper {published.iterations})",
    )  # fmt: skip
    parser.add_argument(
        "--synthesis-images", type=int, metavar="N",
        help=f"in the metric set ({defaults.num_images}, with --paper {published.num_images})",
    )  # fmt: skip
    parser.add_argument("--tv-exponent", type=float, metavar="β", help=TV_EXPONENT_HELP)
    parser.add_argument("--candidates", type=block_list, metavar="I,J,…", help="blocks that may be compressed, from 0")
    parser.add_argument(
        "--num-blocks", type=int, metavar="K", help="take the attention of K blocks, and touch no others"
    )
    parser.add_argument(
        "--structure", choices=("searched", "fewest"),
        help="searched (default): blocks keep their attention where losing nodes alone costs less; fewest (--paper's): "
        "as few blocks as meet the budget lose it",
    )  # fmt: skip
    parser.add_argument(
        "--round-to", type=int, default=1, metavar="N", help="round kept hidden nodes down to a multiple"
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same result")
    output_arguments(parser)
    run_argument(parser)
    impl_argument(parser)
    device_argument(parser)
    parser.add_argument(
        "--devices", type=name_list, default=(), metavar="D,E,…",
        help="share the work over several of this machine: cuda:0,cuda:1 or cpu,cpu; several machines: "
        "see docs/distributed.md",
    )  # fmt: skip


def _run(arguments: argparse.Namespace, progress: TerminalProgress) -> dict[str, Any]:
    check_output_folder(arguments.out, overwrite=arguments.overwrite)
    budget = Budget(
        **{unit: getattr(arguments, unit) for unit in UNITS},
        batch_size=arguments.budget_batch,
        convention=arguments.convention,
    )
    config = CompressionConfig.paper() if arguments.paper else find_method(arguments.method).config()
    _check_method(arguments, config)
    config = config.with_(
        recovery=_recovery(arguments, config),
        synthesis=_changed(
            config.synthesis,
            iterations=arguments.synthesis_iterations,
            num_images=arguments.synthesis_images,
            tv_exponent=arguments.tv_exponent,
        ),
        candidates=arguments.candidates,
        num_blocks=arguments.num_blocks,
        structure=arguments.structure or config.structure,
        round_to=arguments.round_to,
        seed=arguments.seed,
        impl=arguments.impl,
    )
    if arguments.devices:
        arguments.device = "cpu"  # each process moves its own
    model = load_named_model(arguments.model, arguments)
    require_supported(model)
    images, labels, _ = load_data(arguments.data, model, digits_by_default(arguments), arguments.seed, progress)
    result = compress(
        model, images, budget, config,
        method=arguments.method, run_dir=run_folder(arguments), ranks=arguments.ranks, devices=arguments.devices,
        progress=progress,
    )  # fmt: skip
    if not arguments.ranks.leads:
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
    """A result with top-1 on labelled images; the original's is given, for it serves several results."""
    report = result.report
    student = replace(report.student, top1=top1(result.model, images, labels))
    return replace(result, report=replace(report, teacher=replace(report.teacher, top1=original), student=student))


def _check_method(arguments: argparse.Namespace, config: CompressionConfig) -> None:
    """Refuse options that a method does not read.

    Args:
        arguments: Of `compress`.
        config: The method's own.
    """
    if arguments.method == "dcvit":
        return
    for name in (
        "paper",
        "synthesis_iterations",
        "synthesis_images",
        "tv_exponent",
        "num_blocks",
        "structure",
        "run_dir",
    ):
        if getattr(arguments, name) not in (None, False):
            raise DcvitError(f"--{name.replace('_', '-')}: --method {arguments.method} does not read it; leave it out.")
    if find_method(arguments.method).recovery is None:
        for name in ("recovery", "epochs", "learning_rate"):
            if getattr(arguments, name) is not None:
                raise DcvitError(
                    f"--{name.replace('_', '-')}: --method {arguments.method} changes no weight; leave it out."
                )
        return
    kind = "mimicking" if isinstance(config.recovery, MimickingConfig) else "reconstruction"
    if arguments.recovery not in (None, kind):
        raise DcvitError(
            f"--recovery {arguments.recovery}: --method {arguments.method} reads the settings of {kind}; leave it out."
        )
    if kind == "reconstruction" and arguments.epochs is not None:
        raise DcvitError(f"--epochs {arguments.epochs}: --method {arguments.method} takes no gradient steps.")


def _recovery(arguments: argparse.Namespace, config: CompressionConfig) -> ReconstructionConfig | MimickingConfig:
    """The recovery that the options ask for, on top of a config's."""
    kind = {"reconstruction": ReconstructionConfig, "mimicking": MimickingConfig, None: type(config.recovery)}
    wanted = kind[arguments.recovery]
    if arguments.paper and wanted is not MimickingConfig:
        raise DcvitError("--recovery reconstruction: --paper recovers by mimicking; leave one of the two out.")
    if arguments.learning_rate is not None and wanted is not MimickingConfig:
        raise DcvitError(
            f"--learning-rate {arguments.learning_rate:g}: it is mimicking's, and block reconstruction finds its own "
            "step size; add --recovery mimicking, or leave it out."
        )
    recovery = config.recovery if isinstance(config.recovery, wanted) else wanted()
    changed: ReconstructionConfig | MimickingConfig = _changed(
        recovery, epochs=arguments.epochs, learning_rate=arguments.learning_rate
    )
    return changed


def _changed(config: Any, **changes: Any) -> Any:
    """A copy of a config in which the changes that are not `None` are made."""
    return replace(config, **{name: value for name, value in changes.items() if value is not None})


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
    nodes, convolved = values["plan"]["kept_nodes"], values["plan"]["convolved"]
    pruned = [block for block in values["plan"]["pruned"] if block not in convolved]
    if values["plan"]["token_keep_rates"]:
        rates = values["plan"]["token_keep_rates"].items()
        cut = f"Tokens end in blocks (share that goes on): {', '.join(f'{b} ({rate:g})' for b, rate in rates)}"
    elif shared := shared_weights(values["plan"]):
        cut = f"Shared weights: {'; '.join(shared)}"
    elif cut_kind(values) == "dropped":
        cut = f"Dropped blocks: {', '.join(map(str, values['blocks']))}"
    else:
        compressed = [block for block in values["blocks"] if block not in values["plan"]["pruned"]]
        told = [
            f"{name} blocks (hidden nodes kept): "
            + ", ".join(f"{block} ({len(nodes[str(block)])})" for block in blocks)
            for name, blocks in (("Compressed", compressed), ("Convolved", convolved), ("Pruned", pruned))
            if blocks
        ]
        if heads := values["plan"]["kept_heads"]:
            told.append("Heads kept in blocks: " + ", ".join(f"{b} ({len(kept)})" for b, kept in heads.items()))
        cut = f"{'; '.join(told)}; drop ratio {values['drop_ratio']:.4f}"
    return (
        f"{table(rows)}\n\n{_latency_met(values)}"
        f"{cut}; {agreed}mimicking loss {values['mimic_loss']:.4g}; {sum(values['seconds'].values()):.0f} s.\n"
        f"{saved(values['out'], values['page'])}"
    )


def _latency_met(values: dict[str, Any]) -> str:
    """Of a latency budget: what was asked, planned and measured at the end, as shares of the original's latency."""
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
