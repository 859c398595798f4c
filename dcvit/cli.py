"""The command line, `dcvit COMMAND`; `dcvit --help` lists the commands."""

import argparse
import io
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO, get_args

import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.utils import save_image

from dcvit import ops
from dcvit._version import __version__
from dcvit.compression import compress, freeze
from dcvit.config import CompressionConfig, MimickingConfig, ReconstructionConfig, SynthesisConfig
from dcvit.costs import MAC_CONVENTIONS, Cost
from dcvit.demo import load_digits
from dcvit.demo.comparison import (
    BLOCK_DROPPING,
    DEMO_CONFIG,
    NUM_DROPPED,
    PUBLISHED_DEMO_CONFIG,
    THIS_METHOD,
    Comparison,
    compare,
)
from dcvit.distributed import Ranks, launched
from dcvit.errors import DcvitError, DcvitWarning, DistributedError, ImagesError, SaveFolderError
from dcvit.evaluation import agreement, top1
from dcvit.export import SUFFIXES, TOLERANCES, compare_rounded, export_model
from dcvit.family import DEFAULT_SHARES, check_family_folder, sweep
from dcvit.hub import push_to_hub
from dcvit.images import FewShotImages, image_files, load_images
from dcvit.latency import MODES, STOPWATCHES, compare_latency, measure_latency
from dcvit.latency_planning import TOLERANCE
from dcvit.methods import METHODS
from dcvit.methods import method as find_method
from dcvit.methods.budgets import candidate_groups
from dcvit.methods.practise import block_dropping
from dcvit.model_card import cut_kind, shared_weights
from dcvit.models import DEMO_MODEL, adapter_for, adapters, hub_repository, load_model, preprocessing, require_supported
from dcvit.planning import UNITS, Budget, search_space
from dcvit.progress import TerminalProgress
from dcvit.report import FamilyPoint, run_page, saved_family_page, write_report
from dcvit.results import (
    DTYPES,
    REPORT_FILE,
    CompressionResult,
    check_output_file,
    check_output_folder,
    device_name,
    load,
    original_name,
    versions,
)
from dcvit.run_store import RUN_FILE
from dcvit.seeding import seeded
from dcvit.synthesis import synthesize

__all__ = ["main"]

EXIT_OK, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 2, 130

MODEL_HELP = "a timm name (deit_small_patch16_224), local-dir:FOLDER, hf-hub:OWNER/NAME, or demo (the embedded model)"
DATA_HELP = "a folder of image files, searched recursively, or digits (scikit-learn's)"
EPILOG = """\
examples:
  dcvit demo                                                     compress the embedded model, compare methods
  dcvit info deit_small_patch16_224 --random-weights             what each block costs, which budgets can be met
  dcvit compress deit_small_patch16_224 --data photos/ --macs 0.75 --out small/
  dcvit evaluate local-dir:small/ --data photos/ --teacher deit_small_patch16_224
  dcvit export small/ --format onnx                              one file for onnxruntime, compared with the model
  dcvit latency small/ --original                                a compressed model and its original, in turn

exit codes: 0 done, 2 bad input (one sentence says what and what to do), 130 interrupted, 1 anything else
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments after the program's name; the process's own if `None`.

    Returns:
        The exit code.
    """
    arguments = _parser().parse_args(argv)
    progress = TerminalProgress()
    try:
        with launched(getattr(arguments, "device", None)) as arguments.ranks, warnings.catch_warnings():
            warnings.showwarning = _show_warning
            if not arguments.ranks.leads:
                progress = TerminalProgress(io.StringIO())
            values = _run(arguments, progress)
        if arguments.ranks.leads:
            print(json.dumps(values, indent=2) if arguments.json is True else arguments.show(values))
    except DcvitError as error:
        progress.close()
        print(f"dcvit: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        progress.close()
        print(f"dcvit: interrupted. {_how_to_go_on(arguments)}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_OK


def _run(arguments: argparse.Namespace, progress: TerminalProgress) -> dict[str, Any]:
    """What a command comes to."""
    run: Callable[[argparse.Namespace, TerminalProgress], dict[str, Any]] = arguments.run
    ranks: Ranks = arguments.ranks
    if ranks.size > 1 and arguments.command != "compress":
        raise DistributedError(
            f"{arguments.command}: only compress shares its work; start one process, not {ranks.size}."
        )
    return run(arguments, progress)


def _how_to_go_on(arguments: argparse.Namespace) -> str:
    if "run_dir" in arguments and (_run_dir(arguments) / RUN_FILE).is_file():
        return f"The same command goes on from what is in {str(_run_dir(arguments))!r}."
    return "Nothing was saved."


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """One line; of dcvit's own without the place in the code, which tells a user nothing."""
    place = "" if issubclass(category, DcvitWarning) else f" ({category.__name__}, {filename}:{lineno})"
    print(f"dcvit: warning: {message}{place}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dcvit",
        description="Make a pretrained vision transformer smaller and faster from a few unlabelled images.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dcvit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str,
        run: Callable[[argparse.Namespace, TerminalProgress], dict[str, Any]],
        show: Callable[[dict[str, Any]], str],
        summary: str,
        description: str,
        json_file: bool = False,
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=summary, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        if json_file:
            sub.add_argument(
                "--json",
                nargs="?",
                const=True,
                default=False,
                metavar="FILE",
                help="write the result as JSON to FILE; without FILE, print it on standard output",
            )
        else:
            sub.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
        sub.set_defaults(run=run, show=show)
        return sub

    demo = command(
        "demo",
        _demo,
        _show_demo,
        "compress the embedded model and compare methods",
        "Compress the embedded digits model with a few unlabelled images, and compare the original, block dropping and "
        "this method at the same MACs on the 797 digits held out.",
    )
    demo.add_argument("--seeds", type=int, default=1, metavar="N", help="repeat with seeds 0 to N-1, print mean ± std")
    demo.add_argument("--num-images", type=int, default=50, metavar="N", help="unlabelled images")
    demo.add_argument(
        "--epochs",
        type=int,
        default=PUBLISHED_DEMO_CONFIG.mimicking.epochs,
        help="of each recovery of block dropping and of the published procedure",
    )
    demo.add_argument(
        "--drop", type=int, default=NUM_DROPPED, metavar="N", help="whole blocks that block dropping takes"
    )
    _output_arguments(demo, default="dcvit-demo")
    _impl_argument(demo)

    compress_ = command(
        "compress",
        _compress,
        _show_compress,
        "compress a model to a budget",
        "Compress a model from a few unlabelled images. The result is an ordinary timm model: after `import dcvit`, "
        "timm.create_model('local-dir:OUT', pretrained=True).",
    )
    _model_arguments(compress_)
    compress_.add_argument("--data", required=True, help=DATA_HELP)
    budget = compress_.add_mutually_exclusive_group(required=True)
    budget.add_argument("--macs", type=_amount, metavar="X", help="budget: 0.75 is three quarters, 3.2G is absolute")
    budget.add_argument("--params", type=_amount, metavar="X", help="budget in parameters, likewise")
    budget.add_argument("--file-size", type=_amount, metavar="X", help="budget in bytes of the saved weights, likewise")
    budget.add_argument(
        "--activation-memory", type=_amount, metavar="X", help="budget in bytes of activations at their peak, likewise"
    )
    budget.add_argument(
        "--latency", type=float, metavar="X", help="budget as a fraction of the original's latency, measured here"
    )
    budget.add_argument("--latency-ms", type=float, metavar="MS", help="budget in milliseconds a batch, measured here")
    compress_.add_argument(
        "--latency-batch",
        "--memory-batch",
        dest="budget_batch",
        type=int,
        default=64,
        metavar="N",
        help="images a batch, of a budget of latency or activation memory",
    )
    compress_.add_argument(
        "--convention", choices=MAC_CONVENTIONS, default=MAC_CONVENTIONS[0], help="whether q·kᵀ and attn·v count"
    )
    compress_.add_argument(
        "--method", choices=tuple(METHODS), default="dcvit", help="how it is compressed, see `dcvit methods`"
    )
    compress_.add_argument("--num-images", type=int, metavar="N", help="use N random images of the data, not all")
    compress_.add_argument(
        "--paper",
        action="store_true",
        help="the published settings (2000 epochs a trial), before the options below",
    )
    compress_.add_argument(
        "--recovery",
        choices=("reconstruction", "mimicking"),
        help="block by block (default), or by mimicking the output tokens as published (--paper's)",
    )
    compress_.add_argument(
        "--epochs", type=int, help="gradient steps: of each chosen block; mimicking, of each trial and each step"
    )
    compress_.add_argument(
        "--learning-rate", type=float, metavar="RATE", help="peak, of mimicking; found automatically if not given"
    )
    compress_.add_argument("--synthesis-iterations", type=int, metavar="N", help="for the metric set")
    compress_.add_argument("--synthesis-images", type=int, metavar="N", help="in the metric set")
    compress_.add_argument("--candidates", type=_blocks, metavar="I,J,…", help="blocks that may be compressed, from 0")
    compress_.add_argument(
        "--num-blocks", type=int, metavar="K", help="take the attention of K blocks, and touch no others"
    )
    compress_.add_argument(
        "--structure", choices=("searched", "fewest"),
        help="searched: blocks keep their attention where losing nodes alone costs less; fewest: as few blocks as meet "
        "the budget lose it",
    )  # fmt: skip
    compress_.add_argument(
        "--round-to", type=int, default=1, metavar="N", help="round kept hidden nodes down to a multiple"
    )
    compress_.add_argument("--seed", type=int, default=0, help="same seed, same result")
    _output_arguments(compress_)
    _run_argument(compress_)
    _impl_argument(compress_)
    _device_argument(compress_)
    compress_.add_argument(
        "--devices", type=_names, default=(), metavar="D,E,…",
        help="share the work over several of this machine: cuda:0,cuda:1 or cpu,cpu; several machines: see README",
    )  # fmt: skip

    command(
        "methods",
        _methods,
        _show_methods,
        "list the methods of compress",
        "What `dcvit compress --method` takes: dcvit's own method, and published ones to compare with.",
    )
    command(
        "families",
        _families,
        _show_families,
        "list the model families, and the methods that each takes",
        "What can be compressed, and by which of `dcvit methods`.",
    )

    sweep_ = command(
        "sweep",
        _sweep,
        _show_sweep,
        "compress a model to many sizes at once",
        "Compress a model to many budgets from one search. Every size is saved as `dcvit compress` saves it, in a "
        "folder of its own; family.json lists them.",
    )
    _model_arguments(sweep_)
    sweep_.add_argument("--data", help=DATA_HELP + "; digits for the model demo if not given")
    sweep_.add_argument(
        "--macs", type=_amount, nargs="+", default=list(DEFAULT_SHARES), metavar="X",
        help="budgets: 0.75 is three quarters, 3.2G is absolute",
    )  # fmt: skip
    sweep_.add_argument(
        "--block-dropping", action="store_true", help="also drop whole blocks and recover, to compare with"
    )
    sweep_.add_argument("--num-images", type=int, metavar="N", help="use N random images of the data, not all")
    sweep_.add_argument("--seed", type=int, default=0, help="same seed, same result")
    _output_arguments(sweep_, default="dcvit-sweep")
    _run_argument(sweep_)
    _impl_argument(sweep_)
    _device_argument(sweep_)

    report = command(
        "report",
        _report,
        _show_report,
        "write the report of a result again",
        "Write RUN/report.html, one file that shows what was done and how it went, from the saved folder alone: no "
        "model is run. `compress` and `demo` write it already.",
    )
    report.add_argument("run_folder", metavar="RUN", help="a folder that compress or demo saved")

    synthesize_ = command(
        "synthesize",
        _synthesize,
        _show_synthesize,
        "make the metric set from a model",
        "Make images that a model takes for random classes, by inverting it. Writes metric_set.safetensors "
        "(images, targets) and images.png.",
    )
    _model_arguments(synthesize_)
    settings = SynthesisConfig()
    synthesize_.add_argument("--num-images", type=int, default=settings.num_images, metavar="N", help="in one batch")
    synthesize_.add_argument("--iterations", type=int, default=settings.iterations, metavar="N", help="steps of Adam")
    synthesize_.add_argument(
        "--tv-exponent", type=float, default=settings.tv_exponent, metavar="β", help="0.6 for ViT, 1 for DeiT"
    )
    synthesize_.add_argument("--seed", type=int, default=0, help="same seed, same images")
    synthesize_.add_argument("--out", required=True, metavar="FOLDER", help="where to write; empty or new")
    _impl_argument(synthesize_)
    _device_argument(synthesize_)

    evaluate = command(
        "evaluate",
        _evaluate,
        _show_evaluate,
        "measure a model",
        "Cost and latency of a model; top-1 where the data is labelled (digits, or a folder with one subfolder for "
        "each of the model's classes, in alphabetical order); agreement with another model.",
    )
    _model_arguments(evaluate)
    evaluate.add_argument("--data", required=True, help=DATA_HELP)
    evaluate.add_argument("--teacher", metavar="MODEL", help="a model to agree with, " + MODEL_HELP)
    _device_argument(evaluate)

    export_ = command(
        "export",
        _export,
        _show_export,
        "write a saved model for other runtimes, or in half precision",
        "Write a saved model as one file that takes any batch size and needs neither dcvit nor timm, or as another "
        "folder with its weights in another dtype. What was written is run and compared with the model; on a mismatch "
        "nothing is left.",
    )
    export_.add_argument("folder", metavar="FOLDER", help="a folder that dcvit compress wrote")
    export_.add_argument(
        "--format",
        choices=(*SUFFIXES, "timm"),
        default="onnx",
        help="for onnxruntime and others, for torch.export.load, or a folder for timm as compress writes",
    )
    export_.add_argument(
        "--dtype", choices=tuple(DTYPES), default="float32", help="of the weights, and for files of input and output"
    )
    export_.add_argument(
        "--out",
        metavar="PATH",
        help="where to write; FOLDER/model.onnx, FOLDER/model.pt2 or the folder FOLDER-DTYPE if not given",
    )
    export_.add_argument("--overwrite", action="store_true", help="replace what was exported there earlier")

    push = command(
        "push",
        _push,
        _show_push,
        "upload a saved model to the Hugging Face hub",
        "Upload the files that dcvit saved, model card included, and nothing else of the folder. Log in first: "
        "hf auth login.",
    )
    push.add_argument("folder", metavar="FOLDER", help="a folder that dcvit compress wrote")
    push.add_argument("repo_id", metavar="OWNER/NAME", help="the repository; made if there is none")
    push.add_argument("--private", action="store_true", help="a new repository is seen by its owner alone")

    latency = command(
        "latency",
        _latency,
        _show_latency,
        "time models side by side",
        "Time forward passes of models that take turns, run by run, so that a change of load hits all alike. Ratios "
        "are to the first model in the same mode, within a round.",
        json_file=True,
    )
    latency.add_argument(
        "models", nargs="+", metavar="MODEL", help=MODEL_HELP + "; a folder of a compressed model needs no local-dir:"
    )
    latency.add_argument(
        "--original",
        action="store_true",
        help="put the originals of the compressed models first, as result.json has it",
    )
    latency.add_argument("--random-weights", action="store_true", help="do not load the weights that belong to a name")
    latency.add_argument("--batch-size", type=int, default=64, metavar="N", help="images a run")
    latency.add_argument("--runs", type=int, default=500, metavar="N", help="timed runs of each model in each mode")
    latency.add_argument("--warmup", type=int, default=10, metavar="N", help="runs before them that do not count")
    latency.add_argument(
        "--modes", type=_names, default=("eager",), metavar="M,N,…", help="how they run, of " + ", ".join(MODES)
    )
    latency.add_argument(
        "--clock",
        choices=tuple(STOPWATCHES),
        default="wall",
        help="cpu reads the processor time of one thread, for a machine that others load",
    )
    latency.add_argument("--threads", type=int, metavar="N", help="CPU threads; torch's choice if not given")
    latency.add_argument("--overwrite", action="store_true", help="replace the FILE of --json if it exists")
    _device_argument(latency)

    info = command(
        "info",
        _info,
        _show_info,
        "what is installed, what a model costs",
        "Versions and which kernels can run, with the reason where they cannot; for a model, what each block costs and "
        "which budgets can be met.",
    )
    info.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
    info.add_argument("--random-weights", action="store_true", help="do not load the weights that belong to the name")
    return parser


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--random-weights", action="store_true", help="do not load the weights that belong to the name")


def _run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run-dir", type=Path, metavar="FOLDER",
        help="where finished work is kept, so that the same command goes on after it was stopped; OUT.run if not "
        "given, and then deleted in the end",
    )  # fmt: skip


def _output_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    parser.add_argument(
        "--out", default=default, required=default is None, metavar="FOLDER", help="where to save; empty or new"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result in that folder")


def _impl_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--impl", choices=get_args(ops.Impl), default="auto", help="implementation of the hot paths")


def _device_argument(parser: argparse.ArgumentParser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="where to compute")


def _amount(text: str) -> float | int:
    """`0.75`, `4200000000`, `4.2G`, `22M` or `300K`."""
    units = {"K": 10**3, "M": 10**6, "G": 10**9}
    unit = units.get(text[-1:].upper())
    try:
        if unit is not None:
            return round(float(text[:-1]) * unit)
        return float(text) if "." in text or "e" in text.lower() else int(text)
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number such as 0.75, 4200000 or 4.2G") from error


def _blocks(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _load(name: str, arguments: argparse.Namespace, *, pretrained: bool | None = None) -> nn.Module:
    with seeded(0, "random weights"):
        model = load_model(name, pretrained=not arguments.random_weights if pretrained is None else pretrained)
    try:
        return model.to(arguments.device)
    except (RuntimeError, AssertionError) as error:
        raise DcvitError(f"--device {arguments.device}: not usable here ({str(error).splitlines()[0]}).") from error


def _load_data(
    data: str, model: nn.Module, num_images: int | None = None, seed: int = 0
) -> tuple[FewShotImages, torch.Tensor | None]:
    """Images, and labels where the data has them for this model."""
    device = next(model.parameters()).device
    if data == "digits":
        digits = load_digits()
        if num_images is None:
            return load_images(digits.test_images.to(device), model), digits.test_labels
        return load_images(digits.few_shot(num_images, seed).to(device), model), None
    files = image_files(Path(data))
    if num_images is not None:
        if num_images > len(files):
            raise ImagesError(f"--num-images {num_images}: the folder {data!r} holds only {len(files)} images.")
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[:num_images]
        files = [files[i] for i in sorted(order.tolist())]
    return load_images(data if num_images is None else _Files(files), model), _folder_labels(Path(data), files, model)


class _Files(torch.utils.data.Dataset[Any]):
    """Some image files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        with Image.open(self.files[index]) as image:
            image.load()
            return image


def _folder_labels(folder: Path, files: Sequence[Path], model: nn.Module) -> torch.Tensor | None:
    """Labels from subfolders, if there is one for each class."""
    classes = sorted({file.relative_to(folder).parts[0] for file in files if len(file.relative_to(folder).parts) > 1})
    if not classes or len(classes) != adapter_for(model).num_classes(model):
        return None
    return torch.tensor([classes.index(file.relative_to(folder).parts[0]) for file in files])


# Each command: what it does, as values for JSON, and how a person sees them.


def _demo(arguments: argparse.Namespace, progress: TerminalProgress) -> dict[str, Any]:
    check_output_folder(arguments.out, overwrite=arguments.overwrite)
    if arguments.seeds < 1:
        raise DcvitError(f"--seeds {arguments.seeds}: expected 1 or more.")
    torch.set_num_threads(1)  # a second one saves this small model next to nothing, and costs much on a busy machine
    mimicking = replace(PUBLISHED_DEMO_CONFIG.mimicking, epochs=arguments.epochs)
    comparison: Comparison = compare(
        "demo",
        load_digits(),
        range(arguments.seeds),
        num_images=arguments.num_images,
        num_dropped=arguments.drop,
        config=replace(DEMO_CONFIG, impl=arguments.impl),
        published=replace(PUBLISHED_DEMO_CONFIG, recovery=mimicking),
        progress=progress,
    )
    comparison.save(arguments.out, overwrite=arguments.overwrite)
    return {**comparison.to_dict(), "out": str(arguments.out), "page": str(write_report(arguments.out))}


def _show_demo(values: dict[str, Any]) -> str:
    rows = [("method", "top-1 %", "agreement %", "MMACs", "params", "latency ms")]
    for method in values["comparison"]:
        several = len(method["seeds"]) > 1

        def figure(name: str, scale: float, digits: int, method: Any = method, several: bool = several) -> str:
            value = f"{method[name]['mean'] * scale:.{digits}f}"
            return value + (f" ± {method[name]['std'] * scale:.{digits}f}" if several else "")

        rows.append(
            (
                method["method"],
                figure("top1", 100, 2),
                figure("agreement", 100, 2),
                f"{method['macs'] / 1e6:.3f}",
                f"{method['params']:,}",
                figure("latency_ms", 1, 2),
            )
        )
    top1_of = {method["method"]: 100 * method["top1"]["mean"] for method in values["comparison"]}
    lead = top1_of[THIS_METHOD] - top1_of[BLOCK_DROPPING]
    verdict = f"{THIS_METHOD} is {abs(lead):.2f} points {'above' if lead >= 0 else 'below'} {BLOCK_DROPPING}."
    seeds = len(values["comparison"][0]["seeds"])
    spread = f", mean ± standard deviation over {seeds} few-shot sets" if seeds > 1 else ""
    images = values["report"]["num_images"]
    return (
        f"{_table(rows)}\n\n"
        f"On the 797 held-out digits, from {images} unlabelled images{spread}; latency of a batch of 64.\n"
        f"{verdict}\n{_saved(values['out'], values['page'])}"
    )


def _compress(arguments: argparse.Namespace, progress: TerminalProgress) -> dict[str, Any]:
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
            config.synthesis, iterations=arguments.synthesis_iterations, num_images=arguments.synthesis_images
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
    model = _load(arguments.model, arguments)
    require_supported(model)
    images, labels = _load_data(arguments.data, model, _default_digits(arguments), arguments.seed)
    run_dir = _run_dir(arguments) if find_method(arguments.method).resumable else None
    result = compress(
        model, images, budget, config,
        method=arguments.method, run_dir=run_dir, ranks=arguments.ranks, devices=arguments.devices, progress=progress,
    )  # fmt: skip
    if not arguments.ranks.leads:
        return {}
    base_model = None if arguments.random_weights else hub_repository(arguments.model)
    result = replace(result, report=replace(result.report, model=arguments.model, base_model=base_model))
    if labels is not None:
        original = top1(freeze(model), images.normalised, labels)
        result = _with_top1(result, original, images.normalised, labels)
    result.save(arguments.out, overwrite=arguments.overwrite, page=lambda record: run_page(record).html())
    _forget_run(arguments)
    return {**result.to_dict(), "out": str(arguments.out), "page": str(Path(arguments.out) / REPORT_FILE)}


def _run_dir(arguments: argparse.Namespace) -> Path:
    """Where finished work is kept: beside the result, unless a folder is named."""
    named: Path | None = arguments.run_dir
    out = Path(arguments.out).resolve()  # `.` has no name
    return named if named is not None else out.with_name(f"{out.name}.run")


def _forget_run(arguments: argparse.Namespace) -> None:
    """Delete the work of a run that is done, unless its folder was named."""
    if arguments.run_dir is None and _run_dir(arguments).is_dir():
        shutil.rmtree(_run_dir(arguments))


def _check_method(arguments: argparse.Namespace, config: CompressionConfig) -> None:
    """Refuse options that a method does not read.

    Args:
        arguments: Of `compress`.
        config: The method's own.
    """
    if arguments.method == "dcvit":
        return
    for name in ("paper", "synthesis_iterations", "synthesis_images", "num_blocks", "structure", "run_dir"):
        if getattr(arguments, name) not in (None, False):
            raise DcvitError(f"--{name.replace('_', '-')}: --method {arguments.method} does not read it; leave it out.")
    kind = "mimicking" if isinstance(config.recovery, MimickingConfig) else "reconstruction"
    if arguments.recovery not in (None, kind):
        raise DcvitError(
            f"--recovery {arguments.recovery}: --method {arguments.method} reads the settings of {kind}; leave it out."
        )
    if kind == "reconstruction" and arguments.epochs is not None:
        raise DcvitError(f"--epochs {arguments.epochs}: --method {arguments.method} takes no gradient steps.")


def _methods(arguments: argparse.Namespace, progress: TerminalProgress) -> dict[str, Any]:
    return {
        "methods": [
            {"name": m.name, "title": m.title, "families": list(m.families), "units": list(m.units), "source": m.source}
            for m in sorted(METHODS.values(), key=lambda m: m.name != "dcvit")
        ]
    }


def _show_methods(values: dict[str, Any]) -> str:
    rows = [("name", "title", "families", "budgets of", "source")]
    for method in values["methods"]:
        joined = (", ".join(method[key]) for key in ("families", "units"))
        rows.append((method["name"], method["title"], *joined, method["source"]))
    return _table(rows, left=True)


def _families(arguments: argparse.Namespace, progress: TerminalProgress) -> dict[str, Any]:
    return {
        "families": [
            {
                "name": adapter.family,
                "models": adapter.models,
                "classes": [one.__name__ for one in adapter.classes],
                "methods": [method["name"] for method in _methods(arguments, progress)["methods"]
                            if adapter.family in method["families"]],
                "source": adapter.source,
            }
            for adapter in adapters()
        ]
    }  # fmt: skip


def _show_families(values: dict[str, Any]) -> str:
    rows = [("name", "models", "timm's classes", "methods", "source")]
    for family in values["families"]:
        joined = (", ".join(family[key]) for key in ("classes", "methods"))
        rows.append((family["name"], family["models"], *joined, family["source"]))
    return _table(rows, left=True)


def _sweep(arguments: argparse.Namespace, progress: TerminalProgress) -> dict[str, Any]:
    check_family_folder(arguments.out, overwrite=arguments.overwrite)
    if arguments.data is None:
        if arguments.model != "demo":
            raise DcvitError(f"sweep {arguments.model}: name the few-shot images with --data FOLDER.")
        arguments.data = "digits"
    config = DEMO_CONFIG if arguments.data == "digits" else CompressionConfig()
    model = _load(arguments.model, arguments)
    require_supported(model)
    images, _ = _load_data(arguments.data, model, _default_digits(arguments), arguments.seed)
    config = config.with_(seed=arguments.seed, impl=arguments.impl)
    family = sweep(model, images, arguments.macs, config, run_dir=_run_dir(arguments), progress=progress)
    seconds = sum(sum(member.report.seconds.values()) for member in family.members)
    members = [replace(m, report=replace(m.report, model=arguments.model)) for m in family.members]
    judges, judged_on, labels = images.normalised, f"the {len(images)} few-shot images", None
    if arguments.data == "digits":
        digits = load_digits()
        judges, labels = digits.test_images.to(arguments.device), digits.test_labels
        judged_on = f"the {len(judges)} held-out digits"
    original = freeze(model)
    if labels is not None:
        known = top1(original, judges, labels)
        members = [_with_top1(member, known, judges, labels) for member in members]
    family = replace(family, original=members[0].report.teacher, members=members)
    points = [family.points()[0]]
    for member, point in zip(members, family.points()[1:], strict=True):
        points.append(replace(point, agreement=agreement(member.model, original, judges)))
    if arguments.block_dropping:
        points += _dropped_points(original, images, judges, labels, members, arguments, progress)
    index = family.save(
        arguments.out, overwrite=arguments.overwrite, points=points, judged_on=judged_on,
        page=lambda values: saved_family_page(values).html(),
    )  # fmt: skip
    _forget_run(arguments)
    return {**index, "seconds": seconds, "out": str(arguments.out), "page": str(Path(arguments.out) / REPORT_FILE)}


def _with_top1(
    result: CompressionResult, original: float, images: torch.Tensor, labels: torch.Tensor
) -> CompressionResult:
    """A result with top-1 on labelled images; the original's is given, for it serves several results."""
    report = result.report
    student = replace(report.student, top1=top1(result.model, images, labels))
    return replace(result, report=replace(report, teacher=replace(report.teacher, top1=original), student=student))


def _dropped_points(
    original: nn.Module,
    images: FewShotImages,
    judges: torch.Tensor,
    labels: torch.Tensor | None,
    members: Sequence[CompressionResult],
    arguments: argparse.Namespace,
    progress: TerminalProgress,
) -> list[FamilyPoint]:
    """Whole blocks dropped and recovered by mimicking, down to the smallest member."""
    config = PUBLISHED_DEMO_CONFIG if arguments.data == "digits" else CompressionConfig(recovery=MimickingConfig())
    config = config.with_(seed=arguments.seed, impl=arguments.impl)
    adapter, convention = adapter_for(original), members[-1].plan.budget.convention
    smallest = members[-1].report.student.macs
    models: dict[str, nn.Module] = {"original": original}
    trials = None
    for count in range(1, len(candidate_groups(original, None)) + 1):
        dropped = block_dropping(original, images, count, config, trials=trials, progress=progress)
        trials = dropped.trials
        blocks = ", ".join(map(str, sorted(dropped.blocks)))
        models[f"without block{'s' if count > 1 else ''} {blocks}"] = dropped.model
        if adapter.cost(dropped.model).total.macs(convention) <= smallest:
            break
    latency = measure_latency(models, images.normalised[:64], runs=50, warmup=1, max_seconds=3.0)
    points = []
    for name, model in list(models.items())[1:]:
        cost = adapter.cost(model).total
        # In proportion to the members' own original: the two were not timed in one run.
        time = members[0].report.teacher.latency_ms * latency[name].ratio_to(latency["original"])
        points.append(
            FamilyPoint(
                name, "block dropping", cost.macs(convention), cost.params, time,
                agreement(model, original, judges), None if labels is None else top1(model, judges, labels),
            )
        )  # fmt: skip
    return points


def _show_sweep(values: dict[str, Any]) -> str:
    titles = ("", "MMACs", "share", "params", "latency ms", "top-1 %", "agreement %", "blocks (hidden nodes kept)")
    rows: list[tuple[str, ...]] = [titles]
    blocks = {
        member["folder"]: ", ".join(
            f"{block} ({kept})" if int(block) in member["pruned"] else f"{block} ({kept}, no attention)"
            for block, kept in member["blocks"].items()
        )
        for member in values["members"]
    }
    for point in sorted(values["points"], key=lambda point: (-point["macs"], point["kind"])):
        rows.append(
            (
                point["name"],
                f"{point['macs'] / 1e6:,.3f}",
                f"{point['macs'] / values['original']['macs']:.4f}",
                f"{point['params']:,}",
                f"{point['latency_ms']:.2f}",
                *("" if value is None else f"{100 * value:.2f}" for value in (point["top1"], point["agreement"])),
                blocks.get(point["name"], ""),
            )
        )
    return (
        f"{_table(rows)}\n\n"
        f"Judged on {values['judged_on']}; the sweep took {values['seconds']:.0f} s.\n"
        f"Saved to {values['out']}: dcvit.load_family({values['out']!r}), or each folder as a timm model; "
        f"report: {values['page']}."
    )


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


def _default_digits(arguments: argparse.Namespace) -> int | None:
    """50 images of the digits unless told otherwise: their other use is as a test set."""
    wanted: int | None = arguments.num_images
    return 50 if wanted is None and arguments.data == "digits" else wanted


def _changed(config: Any, **changes: Any) -> Any:
    """A copy of a config in which the changes that are not `None` are made."""
    return replace(config, **{name: value for name, value in changes.items() if value is not None})


def _show_compress(values: dict[str, Any]) -> str:
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
        f"{_table(rows)}\n\n{_latency_met(values)}"
        f"{cut}; {agreed}mimicking loss {values['mimic_loss']:.4g}; {sum(values['seconds'].values()):.0f} s.\n"
        f"{_saved(values['out'], values['page'])}"
    )


def _latency_met(values: dict[str, Any]) -> str:
    """Of a latency budget: what was asked, planned and measured at the end, as shares of the original's latency."""
    planned, finished = values["plan"]["latency"], values["report"]["latency_ratio"]
    if planned is None:
        return ""
    off = finished / planned["goal"] - 1
    verdict = f"{100 * off:+.1f} % from the goal"
    if abs(off) > TOLERANCE:
        verdict += ", more than when planned: measure again with `dcvit latency OUT --original` on an idle machine"
    return (
        f"Latency over the original's at batch {planned['model']['batch_size']}: asked {planned['goal']:.4f}, planned "
        f"structure {planned['ratio']:.4f}, finished model {finished:.4f} ({verdict}).\n"
    )


def _saved(folder: str, page: str) -> str:
    return (
        f"Saved to {folder}: after `import dcvit`, timm.create_model('local-dir:{folder}', pretrained=True).\n"
        f"Report: {page}"
    )


def _report(arguments: argparse.Namespace, progress: TerminalProgress) -> dict[str, Any]:
    return {"page": str(write_report(arguments.run_folder))}


def _show_report(values: dict[str, Any]) -> str:
    return f"Report: {values['page']}"


def _synthesize(arguments: argparse.Namespace, progress: TerminalProgress) -> dict[str, Any]:
    out = Path(arguments.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SaveFolderError(f"{str(out)!r} is not empty: name a folder that is empty or does not exist.")
    model = freeze(_load(arguments.model, arguments))
    config = SynthesisConfig(
        num_images=arguments.num_images, iterations=arguments.iterations, tv_exponent=arguments.tv_exponent
    )
    metric_set = synthesize(model, config, seed=arguments.seed, impl=arguments.impl, progress=progress)
    assert metric_set.targets is not None
    images, targets = metric_set.images.cpu(), metric_set.targets.cpu()
    pixels = preprocessing(model).pixels(images)
    out.mkdir(parents=True, exist_ok=True)
    save_file({"images": images.contiguous(), "targets": targets}, out / "metric_set.safetensors")
    save_image(pixels if pixels.shape[1] in (1, 3) else pixels.mean(1, keepdim=True), out / "images.png", nrow=10)
    return {"images": list(images.shape), "loss": metric_set.loss, "seed": arguments.seed, "out": str(out)}


def _show_synthesize(values: dict[str, Any]) -> str:
    return f"{values['images'][0]} images, loss {values['loss']:.4g}; saved to {values['out']}."


def _evaluate(arguments: argparse.Namespace, progress: TerminalProgress) -> dict[str, Any]:
    model = freeze(_load(arguments.model, arguments))
    images, labels = _load_data(arguments.data, model)
    cost = adapter_for(model).cost(model).total
    values: dict[str, Any] = {
        "model": arguments.model,
        "images": len(images),
        "macs": {convention: cost.macs(convention) for convention in MAC_CONVENTIONS},
        "params": cost.params,
        "latency_ms": measure_latency({"model": model}, images.normalised[:64], runs=50, warmup=1, max_seconds=3.0)[
            "model"
        ].median_ms,
        "top1": None if labels is None else top1(model, images.normalised, labels),
        "agreement": None,
    }
    if arguments.teacher is not None:
        teacher = freeze(_load(arguments.teacher, arguments))
        if adapter_for(teacher).input_size(teacher) != adapter_for(model).input_size(model):
            raise DcvitError(f"--teacher {arguments.teacher}: it takes images of another size than {arguments.model}.")
        values["agreement"] = agreement(model, teacher, images.normalised)
    return values


def _show_evaluate(values: dict[str, Any]) -> str:
    rows = [
        ("images", f"{values['images']}"),
        *((f"MACs {name.replace('_', ' ')}", f"{macs:,}") for name, macs in values["macs"].items()),
        ("parameters", f"{values['params']:,}"),
        ("latency ms", f"{values['latency_ms']:.2f}"),
        ("top-1 %", "no labels" if values["top1"] is None else f"{100 * values['top1']:.2f}"),
    ]
    if values["agreement"] is not None:
        rows.append(("agreement %", f"{100 * values['agreement']:.2f}"))
    return _table([("", values["model"]), *rows])


def _export(arguments: argparse.Namespace, progress: TerminalProgress) -> dict[str, Any]:
    folder, dtype = Path(arguments.folder), DTYPES[arguments.dtype]
    if arguments.format == "timm":
        out = Path(arguments.out or f"{folder}-{arguments.dtype}")
        check_output_folder(out, overwrite=arguments.overwrite)
        result = load(folder)
        errors = compare_rounded(result.model, dtype)
        result.save(out, overwrite=arguments.overwrite, dtype=dtype)
        num_bytes = sum(file.stat().st_size for file in out.iterdir())
    else:
        out = Path(arguments.out or folder / f"model{SUFFIXES[arguments.format]}")
        model = load_model(f"local-dir:{folder}")
        exported = export_model(model, out, format=arguments.format, dtype=dtype, overwrite=arguments.overwrite)
        errors, num_bytes = dict(exported.errors), exported.num_bytes
    return {
        "format": arguments.format,
        "dtype": arguments.dtype,
        "bytes": num_bytes,
        "errors": errors,
        "tolerance": TOLERANCES[dtype],
        "out": str(out),
    }


def _show_export(values: dict[str, Any]) -> str:
    errors = ", ".join(f"{error:.1e} at batch size {count}" for count, error in values["errors"].items())
    return (
        f"Saved to {values['out']}: {values['bytes'] / 1e6:.2f} MB, weights in {values['dtype']}.\n"
        f"Largest difference from the model in float32, relative to its largest output: {errors} "
        f"(allowed {values['tolerance']:.1e})."
    )


def _push(arguments: argparse.Namespace, progress: TerminalProgress) -> dict[str, Any]:
    address = push_to_hub(arguments.folder, arguments.repo_id, private=arguments.private)
    return {"repo_id": arguments.repo_id, "address": address}


def _show_push(values: dict[str, Any]) -> str:
    return f"Uploaded to {values['address']}: timm.create_model('hf-hub:{values['repo_id']}', pretrained=True)."


def _latency(arguments: argparse.Namespace, progress: TerminalProgress) -> dict[str, Any]:
    file = Path(arguments.json) if isinstance(arguments.json, str) else None
    if file is not None:
        check_output_file(file, overwrite=arguments.overwrite)
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise DcvitError(f"--threads {arguments.threads}: expected 1 or more.")
        torch.set_num_threads(arguments.threads)
    folders = [name for name in arguments.models if _is_folder(name)]
    if arguments.original and not folders:
        raise DcvitError(f"--original: none of {', '.join(arguments.models)} is a folder of a compressed model.")
    originals = [original_name(_folder(name)) for name in folders] if arguments.original else []
    names = list(dict.fromkeys([*originals, *arguments.models]))
    models = {}
    for name in names:
        folder = _is_folder(name)
        models[name] = _load(f"local-dir:{_folder(name)}" if folder else name, arguments, pretrained=folder or None)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that tells memory writes to the terminal itself
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    rows = compare_latency(
        models,
        batch_size=arguments.batch_size,
        runs=arguments.runs,
        warmup=arguments.warmup,
        modes=arguments.modes,
        stopwatch=STOPWATCHES[arguments.clock],
        progress=progress,
    )
    values = {
        "rows": [row.to_dict() for row in rows],
        "batch_size": arguments.batch_size,
        "warmup": arguments.warmup,
        "device": device_name(torch.device(arguments.device)),
        "clock": arguments.clock,
        "threads": torch.get_num_threads(),
        "load": load,
        "versions": versions(),
    }
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return values


def _is_folder(name: str) -> bool:
    """Whether MODEL is a folder of a saved model; a timm name, or `demo`, is not even where a folder is called so."""
    return name.startswith("local-dir:") or (name != DEMO_MODEL and (Path(name) / "config.json").is_file())


def _folder(name: str) -> Path:
    return Path(name.removeprefix("local-dir:"))


def _show_latency(values: dict[str, Any]) -> str:
    rows = [("model", "mode", "mean ms", "median ms", "p95 ms", "images/s", "× first", "peak MiB")]
    for row in values["rows"]:
        rows.append(
            (
                row["model"],
                row["mode"],
                *(f"{row[name]:.2f}" for name in ("mean_ms", "median_ms", "p95_ms")),
                f"{row['images_per_second']:.1f}",
                f"{row['ratio']:.4f}",
                f"{row['peak_bytes'] / 2**20:.1f}",
            )
        )
    load = "" if values["load"] is None else f", load {values['load']:.1f} before"
    runs = values["rows"][0]["runs"]
    return (
        f"{_table(rows)}\n\n"
        f"{runs} runs of batch {values['batch_size']} in turn, after {values['warmup']} to warm up; "
        f"{values['clock']} clock; {values['device']}, {values['threads']} threads{load}. "
        "Peak: weights and activations of one run."
    )


def _info(arguments: argparse.Namespace, progress: TerminalProgress) -> dict[str, Any]:
    values: dict[str, Any] = {"versions": versions(), "implementations": ops.availability()}
    if arguments.model is None:
        return values
    model = load_model(arguments.model, pretrained=not arguments.random_weights)
    adapter = require_supported(model)
    space = search_space(model, CompressionConfig())
    total = space.cost.total

    def budget(of: Callable[[Cost], int]) -> list[float]:
        least, most = space.savings(of)
        return [1 - most / of(total), 1 - least / of(total)]

    values["model"] = {
        "name": arguments.model,
        "family": adapter.family,
        "input_size": list(adapter.input_size(model)),
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


def _show_info(values: dict[str, Any]) -> str:
    lines = [", ".join(f"{name} {version}" for name, version in values["versions"].items()), ""]
    for impl, problem in values["implementations"].items():
        lines.append(f"{impl:8}{'available' if problem is None else 'not available: ' + problem}")
    if "model" in values:
        model = values["model"]
        lines += [
            "",
            _table(
                [
                    ("", model["name"]),
                    ("input", "x".join(map(str, model["input_size"]))),
                    *((f"MACs {name.replace('_', ' ')}", f"{macs:,}") for name, macs in model["macs"].items()),
                    ("parameters", f"{model['params']:,}"),
                    ("blocks", f"{model['blocks']}, candidates {model['candidates'][0]} to {model['candidates'][-1]}"),
                    ("MACs of one attention", _span(model["attention_macs"])),
                    ("MACs of one MLP", _span(model["mlp_macs"])),
                    ("hidden nodes of one MLP", _span(model["hidden_features"])),
                    *(
                        (f"--{unit} from, to", f"{low:.4f}, {high:.4f}")
                        for unit, (low, high) in model["budget"].items()
                    ),
                ]
            ),
        ]
    return "\n".join(lines)


def _span(values: Sequence[int]) -> str:
    """The least and the largest, or the one value that there is."""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _table(rows: Sequence[Sequence[str]], *, left: bool = False) -> str:
    """Rows of text in columns with a rule under the first row; the first column to the left, the others as said."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = (
            text.ljust(width) if left or not i else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return "\n".join([line(rows[0]), "  ".join("-" * width for width in widths), *(line(row) for row in rows[1:])])


if __name__ == "__main__":
    sys.exit(main())
