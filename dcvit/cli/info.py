"""`dcvit info`: show what is installed and what a model costs."""

import argparse
from collections.abc import Callable
from typing import Any

from dcvit import ops
from dcvit.cli.arguments import MODEL_HELP, random_weights_argument
from dcvit.cli.command import Command
from dcvit.cli.text import span, table
from dcvit.config import DCViT
from dcvit.costs import MAC_CONVENTIONS, Cost
from dcvit.models import load_model, require_supported
from dcvit.runtime.environment import versions
from dcvit.runtime.progress import TerminalProgress
from dcvit.search.space import search_space

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
    random_weights_argument(parser)


def _run(arguments: argparse.Namespace, progress: TerminalProgress) -> dict[str, Any]:
    values: dict[str, Any] = {"versions": versions(), "implementations": ops.availability()}
    if arguments.model is None:
        return values
    model = load_model(arguments.model, pretrained=not arguments.random_weights)
    view = require_supported(model)
    space = search_space(model, DCViT())
    total = space.cost.total

    def budget(of: Callable[[Cost], int]) -> list[float]:
        least, most = space.savings(of)
        return [1 - most / of(total), 1 - least / of(total)]

    values["model"] = {
        "name": arguments.model,
        "family": view.family,
        "input_size": list(view.input_size()),
        "macs": {convention: total.macs(convention) for convention in MAC_CONVENTIONS},
        "params": total.params,
        "blocks": len(space.cost.blocks),
        "candidates": list(space.candidates),
        "hidden_features": [space.cost.blocks[block].hidden_features for block in space.candidates],
        "attention_macs": [space.cost.blocks[b].attention.macs(MAC_CONVENTIONS[0]) for b in space.candidates],
        "mlp_macs": [space.cost.blocks[block].mlp.macs(MAC_CONVENTIONS[0]) for block in space.candidates],
        "budget": {
            "macs": budget(lambda cost: cost.macs(MAC_CONVENTIONS[0])),
            "params": budget(lambda cost: cost.params),
        },
    }
    return values


def _show(values: dict[str, Any]) -> str:
    lines = [", ".join(f"{name} {version}" for name, version in values["versions"].items()), ""]
    for impl, problem in values["implementations"].items():
        lines.append(f"{impl:8}{'available' if problem is None else 'not available: ' + problem}")
    if "model" in values:
        model = values["model"]
        lines += [
            "",
            table(
                [
                    ("", model["name"]),
                    ("input", "x".join(map(str, model["input_size"]))),
                    *((f"MACs {name.replace('_', ' ')}", f"{macs:,}") for name, macs in model["macs"].items()),
                    ("parameters", f"{model['params']:,}"),
                    ("blocks", f"{model['blocks']}, candidates {model['candidates'][0]} to {model['candidates'][-1]}"),
                    ("MACs of one attention", span(model["attention_macs"])),
                    ("MACs of one MLP", span(model["mlp_macs"])),
                    ("hidden units of one MLP", span(model["hidden_features"])),
                    *(
                        (f"--{metric} from, to", f"{low:.4f}, {high:.4f}")
                        for metric, (low, high) in model["budget"].items()
                    ),
                ]
            ),
        ]
    return "\n".join(lines)


COMMAND = Command(
    name="info",
    summary="show what is installed and what a model costs",
    description=(
        "Show versions, and which kernels can run or why they cannot. For a model, show what each block costs and "
        "which budgets can be met."
    ),
    run=_run,
    show=_show,
    add_arguments=_add_arguments,
)
